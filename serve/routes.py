"""The HTTP surface: every route, its parameters and its answer. What happens behind them is in `service`."""

import hmac
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, File, Form, Header, Query, Request, UploadFile
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from serve import media, problems
from serve.audio import clip_vector
from serve.metrics import ApiMetrics, CountRequests, merge
from serve.problems import Problem
from serve.records import Ranked, metadata
from serve.schema import (
    Embedding,
    EmbedResponse,
    Health,
    Hit,
    ItemResponse,
    Links,
    ReleaseInfo,
    ReloadRequest,
    SearchResponse,
    TextQuery,
    Timing,
    VectorQuery,
    VectorSearchResponse,
)
from serve.service import SearchService, Serving
from serve.uploads import LimitBody, read_upload

TOKEN_VARIABLE = "AUDIOMAE_ADMIN_TOKEN"
STATIC = Path(__file__).parent / "static"
DEFAULT_K = 10

K = Annotated[int, Query(ge=1, description="hits wanted")]
FilterText = Annotated[str | None, Query(description='JSON, for example {"label": "rain"}')]
Upload = Annotated[UploadFile, File(description="any audio file; decoded by content, not by name")]


Scrape = Callable[[], Awaitable[list[str]]]


def create_app(service: SearchService, metrics: ApiMetrics, scrape: Scrape) -> FastAPI:
    """The FastAPI application of one API replica.

    Args:
        service: answers the queries.
        metrics: this replica's counters.
        scrape: gathers the metrics texts of all replicas.
    """
    app = FastAPI(
        title="AudioMAE++ similarity search",
        description="Find me sounds like this one: by audio, by text, by id, by vector.",
    )
    app.add_middleware(LimitBody, max_bytes=int(service.args.max_upload_mib * 2**20))
    problems.install(app)
    app.add_middleware(CountRequests, metrics=metrics)
    _search_routes(app, service, metrics)
    _item_routes(app, service)
    _operation_routes(app, service, scrape)
    app.mount("/", StaticFiles(directory=STATIC, html=True), name="page")
    return app


def _search_routes(app: FastAPI, service: SearchService, metrics: ApiMetrics) -> None:
    def finish(request: Request, timing: Timing) -> Timing:
        timing.total = round((time.perf_counter() - request.state.started) * 1000, 3)
        metrics.stages(timing.model_dump())
        return timing

    @app.post("/search", tags=["search"])
    async def search(
        request: Request,
        file: Upload,
        k: Annotated[int, Form(ge=1)] = DEFAULT_K,
        filter: Annotated[str | None, Form(description="JSON")] = None,
        mode: Annotated[Literal["clip", "windows"], Form()] = "clip",
    ) -> SearchResponse:
        """Items that sound like the upload: like all of it (`clip`), or like any part of it (`windows`)."""
        data = await read_upload(file)
        serving, ranked, windows, timing = await service.search_audio(data, k, filter, mode == "windows")
        hits = [to_hit(hit) for hit in ranked]
        if mode == "windows":
            for answer, hit in zip(hits, ranked, strict=True):
                answer.query_start_s, answer.query_end_s = windows[hit.query].start_s, windows[hit.query].end_s
        return SearchResponse(release=serving.version, results=hits, timing_ms=finish(request, timing))

    @app.post("/search/vector", tags=["search"])
    async def search_vector(request: Request, query: VectorQuery) -> VectorSearchResponse:
        """Items nearest to one or many vectors (of this release's encoder; see `fingerprint` in /release)."""
        serving, rankings, timing = await service.search_vectors(query.vectors, query.k, query.filter)
        results = [[to_hit(hit) for hit in ranking] for ranking in rankings]
        return VectorSearchResponse(release=serving.version, results=results, timing_ms=finish(request, timing))

    @app.post("/search/text", tags=["search"])
    async def search_text(request: Request, query: TextQuery) -> SearchResponse:
        """Items that a description fits; 501 when the release has no text tower."""
        serving, ranked, timing = await service.search_text(query.text, query.k, query.filter)
        hits = [to_hit(hit) for hit in ranked]
        return SearchResponse(release=serving.version, results=hits, timing_ms=finish(request, timing))

    @app.get("/search/id/{clip}", tags=["search"])
    async def search_id(request: Request, clip: int, k: K = DEFAULT_K, filter: FilterText = None) -> SearchResponse:
        """More like this: items nearest to an item, itself excluded."""
        serving, ranked, timing = await service.search_similar(clip, k, filter)
        hits = [to_hit(hit) for hit in ranked]
        return SearchResponse(release=serving.version, results=hits, timing_ms=finish(request, timing))

    @app.post("/embed", tags=["search"])
    async def embed(request: Request, file: Upload) -> EmbedResponse:
        """The upload as vectors: one for the whole clip, one for each window."""
        data = await read_upload(file)
        serving, vectors, windows, timing = await service.embed(data)
        return EmbedResponse(
            fingerprint=serving.encoder.fingerprint,
            dim=serving.encoder.dim,
            vector=clip_vector(vectors).tolist(),
            windows=[
                Embedding(start_s=window.start_s, end_s=window.end_s, vector=vector.tolist())
                for window, vector in zip(windows, vectors, strict=True)
            ],
            timing_ms=finish(request, timing),
        )


def _item_routes(app: FastAPI, service: SearchService) -> None:
    @app.get("/items/{clip}", tags=["items"])
    async def item(clip: int) -> ItemResponse:
        """One row of the items table."""
        serving, row, _ = await service.item(clip)
        place = {name: row[name] for name in ("id", "uri", "start_s", "end_s")}
        return ItemResponse(release=serving.version, item=metadata(row), links=links(clip), **place)

    @app.get("/items/{clip}/audio", tags=["items"], response_class=Response)
    async def item_audio(
        clip: int,
        format: Annotated[Literal["original", "wav"], Query()] = "original",
        range: Annotated[str | None, Header()] = None,
    ) -> Response:
        """The item's file as it lies in the corpus (byte ranges supported), or its own window as WAV."""
        _, row, root = await service.item(clip)
        return await service.in_decode_thread(media.audio_response, root, row, format, range)

    @app.get("/items/{clip}/spectrogram.png", tags=["items"], response_class=Response)
    async def item_spectrogram(clip: int) -> Response:
        """A picture of the item's sound: log-mel, time to the right, pitch upwards."""
        _, row, root = await service.item(clip)
        return await service.in_decode_thread(media.spectrogram_response, root, row)


def _operation_routes(app: FastAPI, service: SearchService, scrape: Scrape) -> None:
    @app.get("/healthz", tags=["operation"])
    async def healthz() -> Health:
        """This process runs."""
        return Health(status="ok")

    @app.get("/readyz", tags=["operation"])
    async def readyz() -> Health:
        """Encoder and index answer, and belong together."""
        serving = await service.check()
        return Health(status="ready", release=serving.version)

    @app.get("/release", tags=["operation"])
    async def release() -> ReleaseInfo:
        """What is being served."""
        return release_info(await service.serving())

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def prometheus() -> Response:
        """Prometheus metrics of all API replicas."""
        return Response(merge(await scrape()), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/admin/reload", tags=["operation"], dependencies=[Depends(require_token)])
    async def reload(body: ReloadRequest | None = None) -> ReleaseInfo:
        """Swap to the latest or a named release while requests go on; needs `Authorization: Bearer TOKEN`.

        Every replica has opened and checked the new release when this returns; all API replicas answer from it within
        a second.
        """
        return release_info(await service.reload((body or ReloadRequest()).version))


async def require_token(authorization: Annotated[str | None, Header()] = None) -> None:
    """403 when the service has no admin token, 401 when the caller's is missing or wrong."""
    expected = os.environ.get(TOKEN_VARIABLE)
    if not expected:
        raise Problem(403, "admin_disabled", f"set {TOKEN_VARIABLE} in the service's environment to use /admin")
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), expected.encode()):
        headers = {"WWW-Authenticate": "Bearer"}
        raise Problem(
            401, "unauthorized", "expected `Authorization: Bearer TOKEN` with the admin token", headers=headers
        )


def release_info(serving: Serving) -> ReleaseInfo:
    """The public description of what is served."""
    return ReleaseInfo(
        version=serving.version,
        fingerprint=serving.index.fingerprint,
        rows=serving.index.rows,
        dim=serving.index.dim,
        columns=list(serving.index.columns),
        sample_rate=serving.encoder.sample_rate,
        window_s=serving.window_s,
        text=serving.encoder.text_reason is None,
        text_reason=serving.encoder.text_reason,
        device=serving.encoder.device,
    )


def to_hit(hit: Ranked) -> Hit:
    """A ranked row as the API shows it."""
    row = hit.row
    return Hit(
        id=row["id"],
        uri=row["uri"],
        start_s=row["start_s"],
        end_s=row["end_s"],
        score=hit.score,
        item=metadata(row),
        links=links(row["id"]),
    )


def links(clip: int) -> Links:
    """Where an item's parts are, relative to the service's root."""
    base = f"items/{clip}"
    return Links(item=base, audio=f"{base}/audio", spectrogram=f"{base}/spectrogram.png", similar=f"search/id/{clip}")
