"""One API replica: a process that takes HTTP requests and answers them."""

import asyncio
import gc
import sys
import threading
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from audiomae.artifacts import releases
from audiomae.errors import IntegrityError, UserError
from serve import media
from serve.arguments import ServeArgs
from serve.failures import RELOAD_S, refusal
from serve.metrics import ApiMetrics
from serve.request_log import RequestLog
from serve.routes import Backstage, create_app
from serve.service import SearchService
from serve.serving import Serving
from serve.shards import IndexShards
from serve.versions import SharedVersion

FOLLOW_S = 5.0
GC_OBJECTS = 10_000  # new ones between two looks for garbage, which at Python's 700 took a twentieth of the event loop
SWITCH_S = 0.001  # a thread that computes gives the event loop its turn five times sooner than Python's default


@serve.ingress()
class Api(Backstage):
    """HTTP in, HTTP out: maps the index or asks its shards, and holds the encoder where CPUs encode the queries."""

    def __init__(
        self,
        args: ServeArgs,
        encoder: DeploymentHandle,
        shared: SharedVersion,
        local: bool,
        shards: Sequence[DeploymentHandle] = (),
    ) -> None:
        sys.setswitchinterval(SWITCH_S)
        context = serve.get_replica_context()
        self._metrics = ApiMetrics(context.replica_tag)
        self._name, self._app_name = context.deployment, context.app_name
        self._args = args
        many = IndexShards(shards, args.request_timeout_s / 2) if shards else None
        self._service = SearchService(args, encoder, shared, local, many)
        self._service.release.open(shared.get())
        threading.Thread(target=media.warm_up, daemon=True).start()
        gc.collect()
        gc.freeze()  # modules, model and index stay: the collector need not look through them again under load
        gc.set_threshold(GC_OBJECTS)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service, self._metrics, self, RequestLog.of_replica())

    async def metrics_text(self) -> str:
        """This replica's metrics."""
        catalogue = (await self._service.release.current()).catalogue
        self._metrics.serving(catalogue.version, catalogue.fingerprint, catalogue.rows)
        self._metrics.lanes(self._service.lanes.all.values())
        self._metrics.recall(self._service.shadow)
        if self._service.shards is not None:
            self._metrics.shards(len(self._service.shards.clients), len(self._service.shards.missing))
        return self._metrics.text()

    async def load(self, version: str) -> str:
        """Open release `version` in this replica, so that a swap to it takes no time."""
        return (await self._service.release.describe(version)).version

    async def follow(self) -> None:
        """Answer from the release that all replicas have agreed on."""
        await self._service.release.follow()

    async def scrape(self) -> list[str]:
        """The metrics of all replicas, this one's without a detour."""
        siblings = serve.get_deployment_handle(self._name, self._app_name)
        return await siblings.broadcast("metrics_text").results_async(timeout_s=10)

    async def reload(self, version: str) -> Serving:
        """Swap all replicas to the release that `version` ("latest" or a name) means now."""
        try:
            release = await asyncio.to_thread(releases.resolve, self._args.index, version)
        except (UserError, IntegrityError) as error:
            raise refusal(error) from error

        handle = serve.get_deployment_handle(self._name, self._app_name)

        async def siblings(concrete: str) -> Any:
            return await handle.broadcast("load", concrete).results_async(timeout_s=RELOAD_S)

        async def follow() -> Any:
            return await handle.broadcast("follow").results_async(timeout_s=FOLLOW_S)

        return await self._service.release.reload(release.version, siblings, follow)
