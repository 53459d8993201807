"""What OpenAPI says beyond what FastAPI sees by itself: bodies that routes read on their own, problems, binaries."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve.schema import ExamplesQuery, ProblemBody, ReloadRequest, TextQuery, VectorQuery

REF = "#/components/schemas/{model}"
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
    form = {"type": "object", "properties": fields, "required": ["file"] if only else []}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}


def binary(kind: str, *more: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route that answers with something other than JSON."""
    content = {kind: {"schema": {"type": "string", "format": "binary"}}}
    return {status: {"description": "the content", "content": content} for status in (200, *more)}


def install(app: FastAPI) -> None:
    """Give `app` its OpenAPI document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            models: list[Any] = [
                (model, "validation") for model in (VectorQuery, TextQuery, ExamplesQuery, ReloadRequest, ProblemBody)
            ]
            _, extra = models_json_schema(models, ref_template=REF)
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {}).update(extra["$defs"])
            components["schemas"].pop("HTTPValidationError", None)
            components["schemas"].pop("ValidationError", None)
            components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
