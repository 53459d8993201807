"""The Serve application: `serve run serve.app:build index=INDEX [port=8001]`.

Two deployments: `Api` (HTTP, the index mapped, short queries decoded and encoded where they arrive) and `Encoder` (long
uploads at a low priority, or everything on a GPU). They scale apart from each other; `serve/config.yaml` shows how. An
index that is too large for one process is divided over further ones: `Shard0`, `Shard1`, ...
"""

from typing import Any, cast

import click
from ray import serve

from audiomae import storage
from audiomae.artifacts import releases
from audiomae.config import build_config
from audiomae.errors import ConfigError, IntegrityError, UserError
from serve import front
from serve.arguments import ServeArgs
from serve.replica import Api
from serve.versions import SharedVersion, mismatch

API_REQUESTS = 10_000  # what an API replica may hold: it queues and refuses by itself (serve/admission.py)


def build(args: dict[str, Any]) -> serve.Application:
    """Application builder for `serve run` and `serve deploy`; the keys are those of `ServeArgs`.

    The release is checked here, before anything starts: a corrupted file, or an encoder that did not make the vectors,
    ends the command with a message.

    Raises:
        click.ClickException: bad arguments (exit status 2), or a release that must not be served (1).
    """
    try:
        config = build_config(ServeArgs, args)
        # replicas run in whatever folder their node was started in
        config = config.model_copy(update={"index": str(storage.to_path(config.index))})
        release = releases.resolve(config.index, config.version)
        releases.verify(release)
        check_encoder(release)
    except ConfigError as error:
        raise click.UsageError(f"serve.app:build: {error}") from None
    except (UserError, IntegrityError) as error:
        raise click.ClickException(str(error)) from None
    front.start(config)
    return compose(config, release)


def check_encoder(release: releases.Release) -> None:
    """Refuse a release whose encoder did not make its vectors, by what both say of themselves.

    `AudioEncoder.load` checks later that the weights are what the encoder says.
    """
    recorded = storage.read_json(str(release.path / "encoder" / "config.json")).get("fingerprint")
    if recorded != release.fingerprint:
        raise mismatch(release, str(recorded))


def compose(args: ServeArgs, release: releases.Release) -> serve.Application:
    """The deployments with their limits.

    Ray's own queues are wide open: requests wait, and are refused, in `serve.admission`, where costs are known and the
    answer is a problem with `Retry-After`. CPUs are reserved: few, so that the service also starts on a laptop; raise
    them in `serve/config.yaml` to keep batch jobs away.
    """
    from serve.encoder import Encoder

    version, gpus = release.version, front.encoder_gpus(args)
    count = args.index_shards or front.shards_needed(release)
    args = args.model_copy(update={"api_replicas": args.api_replicas or front.api_replicas(release, count)})
    cpus = front.reserved_cpus(args.encoder_replicas + args.api_replicas + (count if count > 1 else 0))
    encoder = (
        deployment(Encoder)
        .options(
            num_replicas=args.encoder_replicas,
            max_ongoing_requests=API_REQUESTS,
            ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        )
        .bind(args, version)
    )
    shared = SharedVersion(args.index, args.version, version, front.instance())
    shards = [shard(args, number, count, shared, cpus) for number in range(count)] if count > 1 else []
    return (
        deployment(Api)
        .options(
            num_replicas=args.api_replicas,
            max_ongoing_requests=API_REQUESTS,
            ray_actor_options={"num_cpus": cpus, "runtime_env": {"env_vars": front.REPLICA_ENVIRONMENT}},
            logging_config={"enable_access_log": False},
        )
        .bind(args, encoder, shared, not gpus, shards)
    )


def shard(args: ServeArgs, number: int, count: int, shared: SharedVersion, cpus: float) -> serve.Application:
    """Deployment `Shard<number>` of so many: by its name whoever asks for a part of the index gets that part."""
    from serve.shard import Shard

    return (
        deployment(Shard)
        .options(
            name=f"Shard{number}",
            max_ongoing_requests=API_REQUESTS,
            ray_actor_options={"num_cpus": cpus, "runtime_env": {"env_vars": front.REPLICA_ENVIRONMENT}},
        )
        .bind(args, number, count, shared)
    )


def deployment(cls: type) -> serve.Deployment:
    """`cls` as a deployment of its own name; a dead replica is noticed, and replaced, within seconds."""
    return cast(serve.Deployment, serve.deployment(cls)).options(health_check_period_s=2)
