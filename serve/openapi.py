"""What OpenAPI says beyond what FastAPI sees by itself: bodies that routes read on their own, problems, binaries."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve.schema import ExamplesQuery, ProblemBody, ReloadRequest, TextQuery, VectorQuery
from serve.serving import Serving

REF = "#/components/schemas/{model}"
MODELS: tuple[type[BaseModel], ...] = (VectorQuery, TextQuery, ExamplesQuery, ReloadRequest, ProblemBody)
BEARER: dict[str, Any] = {"security": [{"bearer": []}]}


def body(model: str, required: bool = True) -> dict[str, Any]:
    """`openapi_extra` of a route that reads a JSON body of this model."""
    content = {"application/json": {"schema": {"$ref": REF.format(model=model)}}}
    return {"requestBody": {"required": required, "content": content}}


def multipart(model: type[BaseModel], only: Sequence[str] = ()) -> dict[str, Any]:
    """`openapi_extra` of a route that reads a form of this model (or `only` these fields of it)."""
    schema = model.model_json_schema(ref_template=REF)
    fields = {name: field for name, field in schema["properties"].items() if not only or name in only}
    fields["file"] = {"type": "string", "format": "binary", "description": fields["file"]["description"]}
    form: dict[str, Any] = {"type": "object", "properties": fields}
    if only:
        form["required"] = ["file"]
    else:
        form["anyOf"] = [{"required": [name]} for name in ("file", "examples", "text")]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}


def binary(kind: str, *more: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route that answers with something other than JSON."""
    content = {kind: {"schema": {"type": "string", "format": "binary"}}}
    return {status: {"description": "the content", "content": content} for status in (200, *more)}


def install(app: FastAPI, serving: Callable[[], Serving | None]) -> None:
    """Give `app` its OpenAPI document, which fits the release that is being served.

    A vector has as many numbers as the release's have; what needs a text tower is left out where there is none.
    """
    plain = app.openapi

    def document() -> dict[str, Any]:
        now = serving()
        schema = copy.deepcopy(plain())
        _, extra = models_json_schema([(model, "validation") for model in MODELS], ref_template=REF)
        components = schema.setdefault("components", {})
        models = components.setdefault("schemas", {})
        models.update(extra["$defs"])
        for name in ("HTTPValidationError", "ValidationError"):
            models.pop(name, None)
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        if now is not None:
            vector = models["VectorQuery"]["properties"]["vectors"]["items"]
            vector |= {"minItems": now.catalogue.dim, "maxItems": now.catalogue.dim, "contains": {"not": {"const": 0}}}
            if now.encoder.text_reason is not None:
                _without_text(schema, now.encoder.text_reason)
        return schema

    app.openapi = document  # type: ignore[method-assign]


def _without_text(schema: dict[str, Any], reason: str) -> None:
    schema["paths"]["/search/text"] = {"description": f"501 with this release: {reason}"}
    form = schema["paths"]["/search"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    form["properties"].pop("text", None)
    form["anyOf"] = [choice for choice in form["anyOf"] if choice["required"] != ["text"]]
    schema["components"]["schemas"]["ExamplesQuery"]["properties"].pop("text", None)
