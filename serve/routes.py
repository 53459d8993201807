"""The HTTP surface: every route, its parameters and its answer. What happens behind them is in `service`."""

import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from fastapi import FastAPI, Header, Query, Request
from pydantic import ValidationError
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from audiomae.config import nearest
from serve import access, answers, media, openapi, problems
from serve.audio import clip_vector
from serve.metrics import ApiMetrics, CountRequests, merge
from serve.problems import Problem, responses
from serve.quality import describe
from serve.queries import Region, Wanted, check_filter
from serve.schema import (
    EmbedResponse,
    Example,
    Examples,
    ExamplesQuery,
    ExamplesResponse,
    FacetsResponse,
    Group,
    Health,
    ItemResponse,
    ItemsResponse,
    MapResponse,
    ReleaseInfo,
    ReloadRequest,
    SearchForm,
    SearchResponse,
    TextQuery,
    Timing,
    VectorOptions,
    VectorSearchResponse,
    WaveformResponse,
    check_region,
)
from serve.service import Mixed, SearchService, Serving, Sound
from serve.shards import IndexShards
from serve.uploads import Form, Limits, parse_form, read_body

STATIC = Path(__file__).parent / "static"
DEFAULT_K = 10
JSON_BODY_IN_LOOP = 64 << 10  # a larger JSON body is parsed in a thread
GATED = (503, 504)
UPLOAD = (408, 413, 415, 422, 431, *GATED)

K = Annotated[int, Query(ge=1, description="hits wanted")]
FilterText = Annotated[str | None, Query(description='JSON, for example {"label": "rain"}')]
Seconds = Annotated[float | None, Query(ge=0, le=1e6, allow_inf_nan=False)]
Scrape = Callable[[], Awaitable[list[str]]]


class Backstage:
    """What routes need of the process they run in: the metrics of all replicas, and a swap of releases in all."""

    async def scrape(self) -> list[str]:
        """The metrics text of every replica."""
        raise NotImplementedError

    async def reload(self, version: str) -> Serving:
        """Swap to a release in all replicas."""
        raise NotImplementedError


def create_app(service: SearchService, metrics: ApiMetrics, backstage: Backstage) -> FastAPI:
    """The FastAPI application of one API replica.

    Args:
        service: answers the queries.
        metrics: this replica's counters.
        backstage: what concerns all replicas.
    """
    app = FastAPI(
        title="AudioMAE++ similarity search",
        description="Find me sounds like this one: by audio, by text, by id, by vector.",
        redirect_slashes=False,
    )
    problems.install(app)
    app.add_middleware(access.Tokens)
    app.add_middleware(Limits, args=service.args, shed=service.shed)
    if service.args.cors:
        app.add_middleware(CORSMiddleware, allow_origins=[service.args.cors], allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(CountRequests, metrics=metrics)
    _search_routes(app, service, metrics)
    _item_routes(app, service)
    _operation_routes(app, service, backstage)
    openapi.install(app, lambda: service.serving_now)
    app.router.routes.append(Page(list(app.routes)))
    return app


class Page(Mount):
    """The page at `/`, for every path that no route of the API has: those answer 405 to other methods themselves."""

    def __init__(self, others: Sequence[BaseRoute]) -> None:
        super().__init__("/", StaticFiles(directory=STATIC, html=True), name="page")
        self._others = others

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As `Mount`, after the API."""
        if any(route.matches(scope)[0] is not Match.NONE for route in self._others):
            return Match.NONE, {}
        return super().matches(scope)


def _search_routes(app: FastAPI, service: SearchService, metrics: ApiMetrics) -> None:
    def reply(request: Request, body: Callable[[Timing], bytes], timing: Timing) -> Response:
        timing.total = (time.perf_counter() - request.state.started) * 1000
        for name, value in timing:
            setattr(timing, name, round(value, 3))
        metrics.stages({"queue": timing.queue, **timing.model_dump()})
        request.scope["state"]["timing"] = timing
        return Response(body(timing), media_type="application/json")

    @app.post(
        "/search",
        tags=["search"],
        response_model=SearchResponse,
        responses=responses(*UPLOAD, 404, 501),
        openapi_extra=openapi.multipart(SearchForm),
    )
    async def search(request: Request) -> Response:
        """Items that sound like the upload: like all of it (`clip`), or like any part of it (`windows`).

        With `examples` or `text` beside or instead of the file: items near all that is included, away from the rest.
        """
        form = await read_form(request)
        fields = SearchForm.model_validate({**form.fields, "file": form.files.get("file", b"")})
        wanted = Wanted(fields.k, fields.filter, fields.group, fields.collapse)
        region = Region(fields.start_s, fields.end_s)
        if fields.examples is None and fields.text is None:
            upload = Sound(required_file(form), region=region)
            answer = await service.search_sound(upload, wanted, fields.mode == "windows")
        else:
            answer = await service.search_mixed(mixed(form, fields, region), wanted)
        return reply(request, lambda timing: answers.search_json(answer, timing), answer.timing)

    @app.post(
        "/search/vector",
        tags=["search"],
        response_model=VectorSearchResponse,
        responses=responses(400, 408, 413, 422, 431, *GATED),
        openapi_extra=openapi.body("VectorQuery"),
    )
    async def search_vector(request: Request) -> Response:
        """Items nearest to one or many vectors (of this release's encoder; see `fingerprint` in /release)."""
        body = await read_object(request, service)
        vectors = body.pop("vectors", None)
        options = VectorOptions.model_validate(body)
        answer = await service.search_vectors(vectors, Wanted(options.k, options.filter, options.group))
        return reply(request, lambda timing: answers.vector_search_json(answer, timing), answer.timing)

    @app.post(
        "/search/text",
        tags=["search"],
        response_model=SearchResponse,
        responses=responses(400, 408, 413, 422, 431, 501, *GATED),
        openapi_extra=openapi.body("TextQuery"),
    )
    async def search_text(request: Request) -> Response:
        """Items that a description fits; 501 when the release has no text tower."""
        query = TextQuery.model_validate(await read_object(request, service))
        answer = await service.search_mixed(Mixed(text=query.text), Wanted(query.k, query.filter, query.group))
        return reply(request, lambda timing: answers.search_json(answer, timing), answer.timing)

    @app.post(
        "/search/examples",
        tags=["search"],
        response_model=SearchResponse,
        responses=responses(400, 404, 408, 413, 422, 431, 501, *GATED),
        openapi_extra=openapi.body("ExamplesQuery"),
    )
    async def search_examples(request: Request) -> Response:
        """Items near all the included examples and words, away from the excluded ones; the examples are no hits."""
        query = ExamplesQuery.model_validate(await read_object(request, service))
        mix = Mixed(
            [sound_of(one) for one in query.examples.include], [sound_of(one) for one in query.examples.exclude]
        )
        mix.text = query.text
        answer = await service.search_mixed(mix, Wanted(query.k, query.filter, query.group, query.collapse))
        return reply(request, lambda timing: answers.search_json(answer, timing), answer.timing)

    @app.get(
        "/search/id/{clip}", tags=["search"], response_model=SearchResponse, responses=responses(404, 422, 431, *GATED)
    )
    async def search_id(
        request: Request,
        clip: int,
        k: K = DEFAULT_K,
        filter: FilterText = None,
        group: Group = "file",
        start_s: Seconds = None,
        end_s: Seconds = None,
    ) -> Response:
        """More like this: items nearest to an item (or to a stretch of its file), itself excluded."""
        wanted, region = Wanted(k, filter, group), region_from(start_s, end_s)
        if region:
            answer = await service.search_sound(Sound(clip=clip, region=region), wanted)
        else:
            answer = await service.search_similar(clip, wanted)
        return reply(request, lambda timing: answers.search_json(answer, timing), answer.timing)

    @app.post(
        "/embed",
        tags=["search"],
        response_model=EmbedResponse,
        responses=responses(*UPLOAD),
        openapi_extra=openapi.multipart(SearchForm, ("file", "start_s", "end_s")),
    )
    async def embed(request: Request) -> Response:
        """The upload as vectors: one for the whole clip, one for each window."""
        form = await read_form(request)
        fields = SearchForm.model_validate({**form.fields, "file": b""})
        serving, found = await service.embed(required_file(form), Region(fields.start_s, fields.end_s))
        windows = [
            {"start_s": start, "end_s": end, "vector": vector}
            for (start, end), vector in zip(found.spans, found.vectors, strict=True)
        ]
        content = {
            "fingerprint": serving.encoder.fingerprint,
            "dim": serving.encoder.dim,
            "vector": clip_vector(found.vectors),
            "windows": windows,
        }
        return reply(request, lambda timing: answers.dumps({**content, "timing_ms": timing.model_dump()}), found.timing)


def _item_routes(app: FastAPI, service: SearchService) -> None:
    @app.get("/items", tags=["items"], response_model=ItemsResponse, responses=responses(422, 431, *GATED))
    async def items(
        filter: FilterText = None,
        offset: Annotated[int, Query(ge=0, le=10**12)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    ) -> Response:
        """Items of the index, in its order; facets of the same filter are at /facets."""
        serving = await service.serving()
        checked = check_filter(filter, serving.catalogue.columns)
        total, rows = await service.filtered(serving.catalogue.items, checked, offset, limit)
        shown = [answers.shown(row) for row in rows]
        return answers.json_response({"release": serving.version, "total": total, "items": shown})

    @app.get("/facets", tags=["items"], response_model=FacetsResponse, responses=responses(422, 431, *GATED))
    async def facets(filter: FilterText = None, limit: Annotated[int, Query(ge=1, le=1000)] = 20) -> Response:
        """What the items' columns hold, with counts: of all items, or of those that a filter lets through."""
        serving = await service.serving()
        checked = check_filter(filter, serving.catalogue.columns)
        text = orjson.dumps(checked, option=orjson.OPT_SORT_KEYS).decode() if checked else None
        return answers.json_response(await service.filtered(serving.catalogue.facets, text, limit))

    @app.get("/examples", tags=["items"], response_model=ExamplesResponse, responses=responses(431, *GATED))
    async def examples() -> Response:
        """Six items to begin with: playable, and as different as the columns say."""
        serving = await service.serving()
        rows = await service.in_lane("media", 1, media.playable_examples, serving.catalogue)
        return answers.json_response({"release": serving.version, "items": [answers.shown(row) for row in rows]})

    @app.get("/map", tags=["items"], response_model=MapResponse, responses=responses(404, 422, 431, *GATED))
    async def map_points(colour: Annotated[str | None, Query(max_length=200)] = None) -> Response:
        """Where the sounds lie on the map, and the values of one column to colour them by."""
        serving = await service.serving()
        if colour is not None and colour not in serving.catalogue.columns:
            hint = nearest(colour, serving.catalogue.columns)
            raise Problem(422, "unknown_column", f"colour: no column {colour!r}{hint}")
        found = await service.in_lane("light", 1, serving.catalogue.map, colour)
        if found is None:
            raise Problem(404, "no_map", f"release {serving.version} was built without a map; build the index again")
        return answers.json_response(found)

    @app.get("/items/{clip}", tags=["items"], response_model=ItemResponse, responses=responses(404, 422, 431, *GATED))
    async def item(clip: int) -> Response:
        """One row of the items table."""
        serving, row = await service.item(clip)
        return answers.json_response({"release": serving.version, **answers.shown(row)})

    @app.get(
        "/items/{clip}/audio",
        tags=["items"],
        response_class=Response,
        responses=openapi.binary("audio/*", 206) | responses(404, 416, 422, 431, *GATED),
    )
    async def item_audio(
        clip: int,
        format: Annotated[Literal["original", "wav"], Query()] = "original",
        range: Annotated[str | None, Header()] = None,
    ) -> Response:
        """The item's file as it lies in the corpus (byte ranges supported), or its own window as WAV."""
        serving, row = await service.item(clip)
        root = serving.catalogue.index.corpus_root(row)
        return await service.in_lane("media", 1, media.audio_response, root, row, format, range)

    @app.get(
        "/items/{clip}/waveform",
        tags=["items"],
        response_model=WaveformResponse,
        responses=responses(404, 422, 431, *GATED),
    )
    async def item_waveform(clip: int) -> Response:
        """The outline of the item's file: all of it up to a minute, else the minute around the item."""
        serving, row = await service.item(clip)
        root = serving.catalogue.index.corpus_root(row)
        found = await service.in_lane("media", 1, media.waveform, root, row)
        response = answers.json_response(found)
        response.headers["Cache-Control"] = media.HEADERS["Cache-Control"]
        return response

    @app.get(
        "/items/{clip}/spectrogram.png",
        tags=["items"],
        response_class=Response,
        responses=openapi.binary("image/png") | responses(404, 422, 431, *GATED),
    )
    async def item_spectrogram(clip: int) -> Response:
        """A picture of the item's sound: log-mel, time to the right, pitch upwards."""
        serving, row = await service.item(clip)
        root = serving.catalogue.index.corpus_root(row)
        return await service.in_lane("media", 1, media.spectrogram_response, root, row)


def _operation_routes(app: FastAPI, service: SearchService, backstage: Backstage) -> None:
    @app.get("/healthz", tags=["operation"], response_model=Health, responses=responses(431))
    async def healthz() -> Response:
        """This process runs."""
        return answers.json_response({"status": "ok", "release": None})

    @app.get("/readyz", tags=["operation"], response_model=Health, responses=responses(431, 503))
    async def readyz() -> Response:
        """Encoder and index answer, and belong together."""
        serving = await service.check()
        return answers.json_response({"status": "ready", "release": serving.version})

    @app.get("/release", tags=["operation"], response_model=ReleaseInfo, responses=responses(431, 503))
    async def release() -> Response:
        """What is being served."""
        return answers.json_response(release_info(await service.serving(), service.shards))

    @app.get(
        "/metrics",
        tags=["operation"],
        response_class=Response,
        responses=openapi.binary("text/plain") | responses(431, 503),
    )
    async def prometheus() -> Response:
        """Prometheus metrics of all API replicas."""
        return Response(merge(await backstage.scrape()), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post(
        "/admin/reload",
        tags=["operation"],
        response_model=ReleaseInfo,
        responses=responses(400, 401, 403, 404, 408, 409, 413, 422, 431, *GATED),
        openapi_extra=openapi.body("ReloadRequest", required=False) | openapi.BEARER,
    )
    async def reload(request: Request) -> Response:
        """Swap to the latest or a named release while requests go on; needs `Authorization: Bearer TOKEN`.

        Every replica has opened and checked the new release when this returns; all API replicas answer from it within
        a second.
        """
        access.require_admin(request.headers.get("authorization"))
        body = await read_object(request, service, empty={})
        serving = await backstage.reload(ReloadRequest.model_validate(body).version)
        return answers.json_response(release_info(serving, service.shards))


async def read_object(request: Request, service: SearchService, empty: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a request's body; 422 when it is none."""
    data = await read_body(request)
    if not data and empty is not None:
        return empty
    try:
        if len(data) <= JSON_BODY_IN_LOOP:
            value = orjson.loads(data)
        else:
            value = await service.in_lane("light", 1, orjson.loads, data)
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
    import numpy as np

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


def release_info(serving: Serving, shards: IndexShards | None) -> dict[str, Any]:
    """The public description of what is served: a `ReleaseInfo`."""
    catalogue, encoder = serving.catalogue, serving.encoder
    return {
        "version": serving.version,
        "fingerprint": catalogue.fingerprint,
        "rows": catalogue.rows,
        "sounds": catalogue.sounds,
        "hours": round(catalogue.hours, 4),
        "dim": catalogue.dim,
        "columns": list(catalogue.columns),
        "sample_rate": encoder.sample_rate,
        "window_s": serving.window_s,
        "text": encoder.text_reason is None,
        "text_reason": encoder.text_reason,
        "device": encoder.device,
        "shards": len(shards.clients) if shards else 1,
        "missing": shards.missing if shards else [],
        "precision": catalogue.precision,
        **describe(catalogue.calibration),
    }
