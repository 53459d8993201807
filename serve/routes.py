"""The HTTP surface: every route, its parameters and its answer. What happens behind them is in `service`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from serve import access, answers, openapi, problems, proxy
from serve.admission import Shedding
from serve.item_routes import add_item_routes
from serve.metrics import ApiMetrics, CountRequests, merge
from serve.problems import responses
from serve.quality import describe
from serve.reading import GATED, read_object
from serve.request_log import RequestLog
from serve.schema import Health, ReleaseInfo, ReloadRequest
from serve.search_routes import add_search_routes
from serve.service import SearchService
from serve.serving import Serving
from serve.shards import IndexShards
from serve.uploads import Limits

STATIC = Path(__file__).parent / "static"


class Backstage:
    """What routes need of the process they run in: the metrics of all replicas, and a swap of releases in all."""

    async def scrape(self) -> list[str]:
        """The metrics text of every replica."""
        raise NotImplementedError

    async def reload(self, version: str) -> Serving:
        """Swap to a release in all replicas."""
        raise NotImplementedError


def create_app(service: SearchService, metrics: ApiMetrics, backstage: Backstage, log: RequestLog) -> FastAPI:
    """The FastAPI application of one API replica.

    Args:
        service: answers the queries.
        metrics: this replica's counters.
        backstage: what concerns all replicas.
        log: of requests.
    """
    app = FastAPI(
        title="AudioMAE++ similarity search",
        description="Find me sounds like this one: by audio, by text, by id, by vector.",
        redirect_slashes=False,
    )
    problems.install(app)
    app.add_middleware(access.Tokens)
    app.add_middleware(Limits, args=service.args)
    short, refused = service.lanes.all["short"], metrics.refused_by_proxy
    app.add_middleware(Shedding, lane=short, note=refused, proxied=proxy.is_on())
    if service.args.cors:
        app.add_middleware(CORSMiddleware, allow_origins=[service.args.cors], allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(CountRequests, metrics=metrics, note=log.note)
    add_search_routes(app, service, metrics)
    add_item_routes(app, service)
    _operation_routes(app, service, backstage)
    openapi.install(app, lambda: service.release.last)
    app.router.routes.append(StaticPage(list(app.routes)))
    return app


class StaticPage(Mount):
    """The page at `/`, for every path that no route of the API has: those answer 405 to other methods themselves."""

    def __init__(self, others: Sequence[BaseRoute]) -> None:
        super().__init__("/", StaticFiles(directory=STATIC, html=True), name="page")
        self._others = others

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As `Mount`, after the API."""
        if any(route.matches(scope)[0] is not Match.NONE for route in self._others):
            return Match.NONE, {}
        return super().matches(scope)


def _operation_routes(app: FastAPI, service: SearchService, backstage: Backstage) -> None:
    @app.get("/healthz", tags=["operation"], response_model=Health, responses=responses(431))
    async def healthz() -> Response:
        """This process runs."""
        return answers.json_response({"status": "ok", "release": None})

    @app.get("/readyz", tags=["operation"], response_model=Health, responses=responses(431, 503))
    async def readyz() -> Response:
        """Encoder and index answer, and belong together."""
        serving = await service.release.check()
        return answers.json_response({"status": "ready", "release": serving.version})

    @app.get("/release", tags=["operation"], response_model=ReleaseInfo, responses=responses(431, 503))
    async def release() -> Response:
        """What is being served."""
        return answers.json_response(release_info(await service.release.current(), service.shards))

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

        Every replica has opened and checked the new release when this returns, and every API replica in reach answers
        from it; one that is not follows within a second.
        """
        access.require_admin(request.headers.get("authorization"))
        body = await read_object(request, service, empty={})
        serving = await backstage.reload(ReloadRequest.model_validate(body).version)
        return answers.json_response(release_info(serving, service.shards))


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
