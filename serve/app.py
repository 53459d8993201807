"""The Serve application: `serve run serve.app:build index=INDEX [port=8001]`.

Three deployments: `Api` (HTTP and decoding, on CPU), `Encoder` (the model, on a GPU where there is one) and `Index`
(the vectors, in memory). They scale apart from each other; `serve/config.yaml` shows how.
"""

import socket
import threading
import uuid
from typing import Any, cast

import click
import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from audiomae import storage
from audiomae.artifacts import releases as releases
from audiomae.config import build_config
from audiomae.errors import ConfigError, IntegrityError, UserError
from serve import media
from serve.metrics import ApiMetrics
from serve.routes import create_app
from serve.schema import ServeArgs
from serve.service import SearchService
from serve.versions import SharedVersion, mismatch

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


@serve.ingress()
class Api:
    """HTTP in, HTTP out: holds no model and no index, so it starts in a moment and scales with the traffic."""

    def __init__(
        self, args: ServeArgs, encoder: DeploymentHandle, index: DeploymentHandle, shared: SharedVersion
    ) -> None:
        context = serve.get_replica_context()
        self._metrics = ApiMetrics(context.replica_tag)
        self._name, self._app_name = context.deployment, context.app_name
        self._service = SearchService(args, encoder, index, shared)
        threading.Thread(target=media.warm_up, daemon=True).start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service, self._metrics, self._scrape)

    async def metrics_text(self) -> str:
        """This replica's metrics."""
        index = (await self._service.serving()).index
        self._metrics.serving(index.version, index.fingerprint, index.rows)
        return self._metrics.text()

    async def _scrape(self) -> list[str]:
        siblings = serve.get_deployment_handle(self._name, self._app_name)
        return await siblings.broadcast("metrics_text").results_async(timeout_s=10)


def build(args: dict[str, Any]) -> serve.Application:
    """Application builder for `serve run` and `serve deploy`; the keys are those of `ServeArgs`.

    The release is checked here, before anything starts: a corrupted file, or an encoder that did not make the vectors,
    ends the command with a message.

    Raises:
        click.ClickException: bad arguments (exit status 2), or a release that must not be served (1).
    """
    try:
        config = build_config(ServeArgs, args)
        release = releases.resolve(config.index, config.version)
        releases.verify(release)
        check_encoder(release)
    except ConfigError as error:
        raise click.UsageError(f"serve.app:build: {error}") from None
    except (UserError, IntegrityError) as error:
        raise click.ClickException(str(error)) from None
    if config.port is not None or config.host != DEFAULT_HOST:
        start_http(config.host, config.port or DEFAULT_PORT)
    return compose(config, release.version)


def check_encoder(release: releases.Release) -> None:
    """Refuse a release whose encoder did not make its vectors, by what both say of themselves.

    `AudioEncoder.load` checks later that the weights are what the encoder says.
    """
    recorded = storage.read_json(str(release.path / "encoder" / "config.json")).get("fingerprint")
    if recorded != release.fingerprint:
        raise mismatch(release, str(recorded))


def compose(args: ServeArgs, version: str) -> serve.Application:
    """The three deployments with their limits.

    Requests beyond `max_ongoing_requests` wait in their caller; beyond `max_queued_requests` they get 503 at once, so
    that overload is an answer and not a growing queue. CPU numbers are reservations: small, so that the service also
    starts on a laptop; raise them in `serve/config.yaml` to keep batch jobs away.
    """
    from serve.encoder import Encoder  # here, so that API replicas load neither the model nor the index library
    from serve.index import Index

    encoder_options: dict[str, Any] = {"num_cpus": 0.5}
    if args.device.startswith("cuda"):
        encoder_options["num_gpus"] = 1
    encoder = (
        deployment(Encoder)
        .options(
            num_replicas=args.encoder_replicas,
            max_ongoing_requests=2 * args.max_batch_size,
            max_queued_requests=8 * args.max_batch_size,
            ray_actor_options=encoder_options,
        )
        .bind(args, version)
    )
    index = (
        deployment(Index)
        .options(
            num_replicas=args.index_replicas,
            max_ongoing_requests=32,
            max_queued_requests=256,
            ray_actor_options={"num_cpus": 0.2},
        )
        .bind(args, version)
    )
    return (
        deployment(Api)
        .options(
            num_replicas=args.api_replicas,
            max_ongoing_requests=64,
            max_queued_requests=256,
            ray_actor_options={"num_cpus": 0.1},
        )
        .bind(args, encoder, index, SharedVersion(uuid.uuid4().hex, version))
    )


def deployment(cls: type) -> serve.Deployment:
    """`cls` as a deployment of its own name; a dead replica is noticed, and replaced, within seconds."""
    return cast(serve.Deployment, serve.deployment(cls)).options(health_check_period_s=2)


def start_http(host: str, port: int) -> None:
    """Start Serve's HTTP proxy on `host:port`, before `serve run` starts it on its default.

    Raises:
        click.ClickException: the port is taken, or this is a `serve deploy`, whose proxies are up already.
    """
    if not ray.is_initialized():
        ray.init(namespace="serve")
    if ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        raise click.UsageError("serve.app:build: in a config file, host and port go under `http_options`, not `args`")
    if not serve.status().proxies:
        refuse_taken_port(host, port)
    serve.start(http_options={"host": host, "port": port})


def refuse_taken_port(host: str, port: int) -> None:
    """Say that a port is in use before Ray Serve says it in its own many words."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"cannot listen on {host}:{port}: {error.strerror}; choose another port="
            raise click.ClickException(reason) from None
