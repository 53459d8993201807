"""One shard of the index: a process that has a part of the release's vectors and answers questions about it.

Ray Serve starts each shard as a deployment of its own (`Shard0`, `Shard1`, ...), watches it and replaces it. Questions
come by Arrow Flight, whose address the deployment tells: asking four shards through Serve's handles took four times as
long as through Flight (docs/serving.md), and a search asks all of them at least once. What goes over the wire is a JSON
head and plain arrays, and whoever asks must know a secret that the cluster's key-value store keeps.
"""

import asyncio
import hmac
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow.flight as flight
import ray
from ray.experimental import internal_kv

from audiomae.artifacts import releases
from audiomae.search.index import Selection
from audiomae.search.scanning import Scanner
from audiomae.search.sharded import Question, answer, open_shard
from serve.arguments import ServeArgs
from serve.versions import SharedVersion, VersionCache

ASK, PING = "ask", "ping"
UNKNOWN = "unknown"  # the answer to a question that names selections which the shard does not have (any more)
SECRET_KEY = "audiomae-serve-shard-secret"
KEPT_SELECTIONS = 256
DTYPES = ("float32", "int64", "uint8")


def pack(head: dict[str, Any], arrays: Sequence[np.ndarray]) -> bytes:
    """A JSON head and arrays as bytes."""
    described = [[array.dtype.name, array.shape] for array in arrays]
    text = orjson.dumps({**head, "arrays": described})
    return b"".join([len(text).to_bytes(8, "little"), text, *(np.ascontiguousarray(array).data for array in arrays)])


def unpack(data: memoryview) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What `pack` made. Raises ValueError when it did not."""
    start = 8 + int.from_bytes(data[:8], "little")
    head: dict[str, Any] = orjson.loads(data[8:start])
    arrays = []
    for name, shape in head.pop("arrays"):
        if name not in DTYPES:
            raise ValueError(f"an array of {name}: expected {', '.join(DTYPES)}")
        count = int(np.prod(shape, dtype=np.int64))
        stop = start + count * np.dtype(name).itemsize
        arrays.append(np.frombuffer(data[start:stop], name).reshape(shape).copy())
        start = stop
    return head, arrays


def secret() -> str:
    """What who asks a shard must know: made once in a cluster."""
    internal_kv._internal_kv_put(SECRET_KEY, secrets.token_hex().encode(), overwrite=False)
    return internal_kv._internal_kv_get(SECRET_KEY).decode()


class Shard:
    """The deployment: shard `number` of `shards`."""

    def __init__(self, args: ServeArgs, number: int, shards: int, shared: SharedVersion) -> None:
        self._args, self._number = args, number
        self._scanners: VersionCache[Scanner] = VersionCache(self._open)
        self._scanners.get(_key(shared.get(), shards))
        self._server = ShardServer(ray.util.get_node_ip_address(), secret(), self._scanners)
        self._thread = threading.Thread(target=self._server.serve, name="flight", daemon=True)
        self._thread.start()

    def address(self) -> str:
        """Where to ask."""
        return self._server.address

    async def load(self, version: str, shards: int) -> int:
        """Make release `version` ready, divided in so many; how many rows are looked at here."""
        scanner = await asyncio.to_thread(self._scanners.get, _key(version, shards))
        return sum(stop - start for start, stop in (piece.segment.between for piece in scanner.pieces))

    def check_health(self) -> None:
        """Raises when nobody can ask any more."""
        if not self._thread.is_alive():
            raise RuntimeError("the shard's Flight server has ended")

    def _open(self, key: str) -> Scanner:
        version, _, shards = key.rpartition("/")
        return open_shard(releases.resolve(self._args.index, version), self._number, int(shards))


class ShardServer(flight.FlightServerBase):
    """Answers questions over Arrow Flight, on a free port of `host`.

    Args:
        host: the address to listen on.
        known: what who asks must know.
        scanners: by release and number of shards.
    """

    def __init__(self, host: str, known: str, scanners: VersionCache[Scanner]) -> None:
        super().__init__(f"grpc://{_bracketed(host)}:0", middleware={"secret": _Guard(known)})
        self.address = f"grpc://{_bracketed(host)}:{self.port}"
        self._scanners = scanners
        self._selections: OrderedDict[str, Selection] = OrderedDict()
        self._lock = threading.Lock()

    def do_action(self, context: Any, action: flight.Action) -> Iterator[bytes]:
        """One question; see `audiomae.search.sharded.answer`."""
        if action.type == PING:
            return iter([b""])
        head, arrays = unpack(memoryview(action.body))
        question = self._question(head, arrays)
        if question is None:
            return iter([pack({UNKNOWN: True}, [])])
        scanner = self._scanners.get(_key(head["version"], head["shards"]))
        return iter([pack({}, answer(scanner, question))])

    def _question(self, head: dict[str, Any], arrays: list[np.ndarray]) -> Question | None:
        """The question, with the selections that it names; None when one of them is not here."""
        named = dict(zip(head["names"], arrays, strict=False))
        if head["allowed"] is None:
            return Question(head["operation"], head["numbers"], named)
        bits = iter(arrays[len(named) :])
        allowed: dict[int, Selection] = {}
        with self._lock:
            for segment, digest, count, given in head["allowed"]:
                if given:
                    self._selections[digest] = Selection(next(bits), count)
                selection = self._selections.get(digest)
                if selection is None:
                    return None
                self._selections.move_to_end(digest)
                allowed[segment] = selection
            while len(self._selections) > KEPT_SELECTIONS:
                self._selections.popitem(last=False)
        return Question(head["operation"], head["numbers"], named, allowed)


class _Guard(flight.ServerMiddlewareFactory):
    """Lets in who knows the secret."""

    def __init__(self, known: str) -> None:
        super().__init__()
        self._expected = f"Bearer {known}"

    def start_call(self, info: Any, headers: Any) -> None:
        given = headers.get("authorization") or [""]
        if not hmac.compare_digest(str(given[0]).encode(), self._expected.encode()):
            raise flight.FlightUnauthenticatedError("a shard answers its own service only")


def _key(version: str, shards: int) -> str:
    return f"{version}/{shards}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
