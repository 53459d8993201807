"""Refusing local paths in a cluster whose nodes do not share them, before anything is spent on the job."""

import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from audiomae.errors import UserError
from audiomae.storage import is_local, to_path
from ray_jobs._cluster import NodeRequest, notice_of_waiting

ENCODER_KINDS = ("official:", "timm:local-dir:")
ANSWER_S = 60.0
MOST_NODES = 16


def check_shared_disk(
    reads: Mapping[str, str | None], writes: Mapping[str, str | None], request: NodeRequest | None = None
) -> None:
    """Refuse what lies on a disk of this machine and is not seen from the cluster's other nodes.

    Args:
        reads: flag -> what the job reads: a path, URI or encoder; `None` and S3 are fine everywhere.
        writes: flag -> where the job writes; a file is left there for a moment for the others to look for.
        request: what the job's workers ask for. In a cluster with no node yet the first that joins is asked.

    Raises:
        UserError: naming the flag, the path, the node that lacks it, and what to do.
    """
    given = {flag: path for flag, value in reads.items() if (path := _local(value)) and os.path.exists(path)}
    targets = {flag: path for flag, value in writes.items() if (path := _local(value))}
    if not given and not targets:
        return
    others = [_pinned(node) for node in _other_nodes()][:MOST_NODES]
    if not others and not _head_works():
        others = [(request or NodeRequest({"CPU": 1})).options]  # the first node that joins
    if not others:
        return
    with _markers(targets) as markers:
        sought = {**given, **markers}
        with notice_of_waiting(request or NodeRequest({"CPU": 1})):
            answers = [
                ray.remote(_unseen).options(max_retries=0, **options).remote(list(sought.values()))
                for options in others
            ]
            for host, missing in _answers(answers, patient=bool(_other_nodes())):
                for flag in (flag for flag, path in sought.items() if path in missing):
                    raise UserError(
                        f"{flag} {given.get(flag) or targets[flag]} is on a disk of {socket.gethostname()} that node "
                        f"{host} of this cluster does not see; put it on s3://, or on a disk that every node mounts "
                        "under the same path"
                    )


def _answers(references: list[Any], patient: bool) -> Iterator[tuple[str, list[str]]]:
    """What the nodes say; one that does not answer in a minute, or leaves, has no say."""
    if not patient:
        yield ray.get(references[0])
        return
    ready, late = ray.wait(references, num_returns=len(references), timeout=ANSWER_S)
    for reference in late:
        ray.cancel(reference, force=True)
    for reference in ready:
        try:
            yield ray.get(reference)
        except ray.exceptions.RayError:
            continue


def _local(value: str | None) -> str | None:
    """The absolute path of what lies on a local disk."""
    if not value:
        return None
    kind = next((kind for kind in ENCODER_KINDS if value.startswith(kind)), "")
    if not kind and value.startswith("timm:"):
        return None
    path = to_path(value.removeprefix(kind))
    return str(path) if is_local(path) else None


@contextmanager
def _markers(targets: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """A file in each target folder, for as long as the block runs; folders that this made are removed again."""
    markers: dict[str, str] = {}
    made: list[Path] = []
    try:
        for flag, path in targets.items():
            folder = Path(path)
            made += [part for part in (folder, *folder.parents) if not part.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            marker = folder / f".seen-from-other-nodes-{uuid.uuid4().hex}"
            marker.touch()
            markers[flag] = str(marker)
        yield markers
    finally:
        for marker_path in markers.values():
            Path(marker_path).unlink(missing_ok=True)
        for folder in made:
            try:
                folder.rmdir()
            except OSError:
                break


def _unseen(paths: list[str]) -> tuple[str, list[str]]:
    """(address of this node, those of the paths that are not there)."""
    return ray.util.get_node_ip_address(), [path for path in paths if not os.path.exists(path)]


def _other_nodes() -> list[dict[str, Any]]:
    """The alive nodes besides this driver's that can run work."""
    here = ray.get_runtime_context().get_node_id()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here and _works(node)]


def _head_works() -> bool:
    here = ray.get_runtime_context().get_node_id()
    return any(_works(node) for node in ray.nodes() if node["NodeID"] == here)


def _works(node: Mapping[str, Any]) -> bool:
    return bool(node["Resources"].keys() & {"CPU", "GPU"})


def _pinned(node: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}
