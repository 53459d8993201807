"""What stands before the API replicas: Ray, connected to or started, and its HTTP proxy with its settings."""

import math
import os
import socket
from typing import Any

import click
import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from audiomae.artifacts.releases import Release
from audiomae.cpus import available_cpus
from audiomae.search.indexed import segment_rows
from ray_jobs._cluster import node_types, nodes, offers_gpus
from serve import proxy
from serve.arguments import ServeArgs

MEMORY_SHARE = 0.5  # of a node's memory, for an index in one process
RESERVED_CPUS = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01)  # of a replica: the first with which all of them find a node
MOST_REPLICAS = 4  # of the API, unless more are asked for: each takes some 0.6 GB where it encodes
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
NICENESS = {"RAY_worker_niceness": "0"}  # Ray's default is 15: right for batch jobs, wrong for what people wait for
# In an API replica user code runs on the server's own event loop: no hop between two threads for each message.
REPLICA_ENVIRONMENT = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}


def start(args: ServeArgs) -> None:
    """Connect to Ray and start Serve's HTTP proxy on the address asked for, before `serve run` does on its default.

    `serve run --address` (and `--runtime-env`, `--working-dir`) hold: the cluster named there is connected to.

    Raises:
        click.ClickException: the port is taken, or this is a `serve deploy`, whose proxies are up already.
    """
    if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        if args.port is not None or args.host != DEFAULT_HOST:
            raise click.UsageError(
                "serve.app:build: in a config file, host and port go under `http_options`, not `args`"
            )
        return
    host, port = args.host, args.port or DEFAULT_PORT
    if not ray.is_initialized():
        connect()
    if args.port is None and args.host == DEFAULT_HOST and serve.status().proxies:
        return
    if not serve.status().proxies:
        refuse_taken_port(host, port)
    serve.start(http_options={"host": host, "port": port})


def connect() -> None:
    """Connect to the cluster that `serve run` was told to use, or start Ray here."""
    context = click.get_current_context(silent=True)
    given: dict[str, Any] = dict(context.params) if context is not None else {}
    address = given.get("address") or os.environ.get("RAY_ADDRESS") or None
    if address in (None, "auto", "local"):  # Ray may be started here, and its processes inherit this environment
        for name, value in {**NICENESS, **proxy.environment()}.items():
            os.environ.setdefault(name, value)
    options: dict[str, Any] = {"namespace": "serve"}
    if {"runtime_env", "runtime_env_json", "working_dir"} <= given.keys():
        from ray.serve.scripts import parse_runtime_env_args

        names = ("runtime_env", "runtime_env_json", "working_dir")
        options["runtime_env"] = parse_runtime_env_args(**{name: given[name] for name in names})
    if address:
        options["address"] = address
    ray.init(**options)


def encoder_gpus(args: ServeArgs) -> float:
    """GPUs of each Encoder replica: as asked for, else 1 where the cluster has one or would start one."""
    if args.encoder_gpus is not None:
        return args.encoder_gpus
    if args.device != "auto":
        return 1.0 if args.device.startswith("cuda") else 0.0
    return 1.0 if ray.is_initialized() and offers_gpus() else 0.0


def shards_needed(release: Release) -> int:
    """How many processes the vectors of a release are divided over, unless the arguments say.

    One where vectors and codes take at most half of the memory that Ray counts on its smallest node: they are mapped,
    so what is searched stays in memory. Else as many as bring each part below that, but no more than there are nodes,
    as parts on one node share its memory; a cluster that the autoscaler grows may have any number of nodes.
    """
    info = release.info
    a_row = 2 * int(info["dim"]) + int(info["spec"].get("bytes_in_memory", 0))
    memory = [node["memory"] for node in nodes() if node.get("memory")] if ray.is_initialized() else []
    if not memory:
        return 1
    parts = math.ceil(sum(segment_rows(release)) * a_row / (MEMORY_SHARE * min(memory)))
    return max(1, parts if node_types() else min(parts, len(memory)))


def api_replicas(release: Release, index_shards: int) -> int:
    """How many processes answer HTTP requests, unless the arguments say.

    One for each core of the largest node, up to four: threads of one process wait for each other's Python, and two of
    them encode 1.3 times as much as one. One where the index is divided, as what is searched is elsewhere; and no more
    than half of that node's memory has room for where the index is a graph, which each of them holds.
    """
    if index_shards > 1:
        return 1
    here = {"CPU": float(available_cpus())}
    known = nodes() if ray.is_initialized() else [here]
    largest = max(known, key=lambda node: node.get("CPU", 0), default=here)
    most = min(MOST_REPLICAS, int(largest.get("CPU", 0)))
    spec = release.info["spec"]
    if spec["kind"] == "hnsw" and "memory" in largest:
        held = sum(segment_rows(release)) * int(spec["bytes_in_memory"])
        most = min(most, int(MEMORY_SHARE * largest["memory"] / max(1, held)))
    return max(1, most)


def reserved_cpus(replicas: int) -> float:
    """CPUs that each of so many replicas reserves: half of one, but less where the nodes have too few for all of them.

    A replica that finds no node is waited for, for ever. An autoscaler starts the nodes that are missing.
    """
    known = nodes() if ray.is_initialized() else []
    if not known or node_types():
        return RESERVED_CPUS[0]

    def fit(share: float) -> bool:
        return sum(int(node.get("CPU", 0) / share + 1e-9) for node in known) >= replicas

    return next(filter(fit, RESERVED_CPUS), RESERVED_CPUS[-1])


def instance() -> str:
    """Which run of Serve this is: its controller keeps its id until Serve is shut down, restarts of it included."""
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    return controller._actor_id.hex()


def refuse_taken_port(host: str, port: int) -> None:
    """Say that a port is in use before Ray Serve says it in its own many words."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"cannot listen on {host}:{port}: {error.strerror}; choose another port="
            raise click.ClickException(reason) from None
