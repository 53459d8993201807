"""Routes that search: by sound, by vector, by words, by examples, by id."""

import time
from collections.abc import Callable

from fastapi import FastAPI, Request
from starlette.responses import Response

from serve import answers, openapi
from serve.audio import clip_vector
from serve.metrics import ApiMetrics
from serve.problems import responses
from serve.queries import Mixed, Region, Sound, Wanted
from serve.reading import (
    DEFAULT_K,
    GATED,
    UPLOAD,
    FilterText,
    K,
    Seconds,
    mixed,
    read_form,
    read_object,
    region_from,
    required_file,
    sound_of,
)
from serve.schema import (
    EmbedResponse,
    ExamplesQuery,
    Group,
    SearchForm,
    SearchResponse,
    TextQuery,
    Timing,
    VectorOptions,
    VectorSearchResponse,
)
from serve.service import SearchService


def add_search_routes(app: FastAPI, service: SearchService, metrics: ApiMetrics) -> None:
    """Add them to `app`."""
    _add_upload_routes(app, service, metrics)
    _add_body_routes(app, service, metrics)
    _add_id_route(app, service, metrics)


def _add_upload_routes(app: FastAPI, service: SearchService, metrics: ApiMetrics) -> None:
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
        wanted = Wanted(fields.k, fields.filter, fields.group, fields.collapse, fields.mode == "windows")
        region = Region(fields.start_s, fields.end_s)
        if fields.examples is None and fields.text is None:
            upload = Sound(required_file(form), region=region)
            answer = await service.search_sound(upload, wanted)
        else:
            answer = await service.search_mixed(mixed(form, fields, region), wanted)
        return reply(request, metrics, lambda timing_ms: answers.search_json(answer, timing_ms), answer.timing)

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
        return reply(
            request, metrics, lambda timing_ms: answers.dumps({**content, "timing_ms": timing_ms}), found.timing
        )


def _add_body_routes(app: FastAPI, service: SearchService, metrics: ApiMetrics) -> None:
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
        return reply(request, metrics, lambda timing_ms: answers.vector_search_json(answer, timing_ms), answer.timing)

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
        return reply(request, metrics, lambda timing_ms: answers.search_json(answer, timing_ms), answer.timing)

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
        return reply(request, metrics, lambda timing_ms: answers.search_json(answer, timing_ms), answer.timing)


def _add_id_route(app: FastAPI, service: SearchService, metrics: ApiMetrics) -> None:
    @app.get(
        "/search/id/{clip}", tags=["search"], response_model=SearchResponse, responses=responses(404, 422, 431, *GATED)
    )
    async def search_id(  # noqa: PLR0913 (FastAPI takes one for each query parameter)
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
        return reply(request, metrics, lambda timing_ms: answers.search_json(answer, timing_ms), answer.timing)


def reply(request: Request, metrics: ApiMetrics, body: Callable[[dict[str, float]], bytes], timing: Timing) -> Response:
    """The answer to a query, its time (`timing_ms`) noted in it, in the log and in the metrics."""
    timing.total = (time.perf_counter() - request.state.started) * 1000
    stages_ms = {name: round(value, 3) for name, value in vars(timing).items()}
    metrics.stages(stages_ms)
    request.scope["state"]["stages_ms"] = stages_ms
    shown = {name: value for name, value in stages_ms.items() if name != "queue"}
    return Response(body(shown), media_type="application/json")
