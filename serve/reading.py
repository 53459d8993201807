"""What routes read of a request, and the parameters that they have in common."""

from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import Query, Request
from pydantic import ValidationError

from serve import problems
from serve.problems import Problem
from serve.queries import Mixed, Region, Sound
from serve.schema import Example, Examples, SearchForm, check_region
from serve.service import SearchService
from serve.uploads import Form, parse_form, read_body

DEFAULT_K = 10
JSON_BODY_IN_LOOP = 64 << 10  # a larger JSON body is parsed in a thread
GATED = (503, 504)
UPLOAD = (408, 413, 415, 422, 431, *GATED)

K = Annotated[int, Query(ge=1, description="hits wanted")]
FilterText = Annotated[str | None, Query(description='JSON, for example {"label": "rain"}')]
Seconds = Annotated[float | None, Query(ge=0, le=1e6, allow_inf_nan=False)]


async def read_object(request: Request, service: SearchService, empty: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a request's body; 422 when it is none."""
    data = await read_body(request)
    if not data and empty is not None:
        return empty
    try:
        if len(data) <= JSON_BODY_IN_LOOP:
            value = orjson.loads(data)
        else:
            value = await service.lanes.run("light", 1, orjson.loads, data)
    except orjson.JSONDecodeError as error:
        raise Problem(422, "invalid_request", f"body: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Problem(422, "invalid_request", f"body: expected a JSON object, got {type(value).__name__}")
    return value


async def read_form(request: Request) -> Form:
    """The form in a request's body."""
    return parse_form(await read_body(request), request.headers.get("content-type", ""))


def required_file(form: Form) -> bytes:
    """The uploaded file; 422 when there is none, or nothing in it."""
    if "file" not in form.files:
        raise Problem(422, "invalid_request", "file: field required (a file in multipart/form-data)")
    if not form.files["file"]:
        raise Problem(422, "empty_upload", "the uploaded file is empty; send an audio file")
    return form.files["file"]


def mixed(form: Form, fields: SearchForm, region: Region) -> Mixed:
    """A form with examples or words as one query."""
    try:
        given = Examples.model_validate_json(fields.examples) if fields.examples else Examples()
    except ValidationError as error:
        raise problems.invalid([{**item, "loc": ("examples", *item["loc"])} for item in error.errors()]) from None
    mix = Mixed(
        [sound_of(example, form) for example in given.include],
        [sound_of(example, form) for example in given.exclude],
        fields.text,
    )
    if form.files.get("file"):
        mix.include.insert(0, Sound(form.files["file"], region=region))
    return mix


def sound_of(example: Example, form: Form | None = None) -> Any:
    """An example as something that has a vector."""
    if example.vector is not None:
        return np.asarray(example.vector)
    if example.id is not None:
        return Sound(clip=example.id, region=Region(example.start_s, example.end_s))
    if form is None or not form.files.get(example.upload or ""):
        detail = f"examples: no file {example.upload!r} in the form: send it beside `examples` to POST /search"
        raise Problem(422, "invalid_request", detail)
    return Sound(form.files[example.upload or ""])


def region_from(start_s: float | None, end_s: float | None) -> Region:
    """A stretch of time from the query string."""
    try:
        check_region(start_s, end_s)
    except ValueError as error:
        raise Problem(422, "invalid_request", str(error)) from None
    return Region(start_s, end_s)
