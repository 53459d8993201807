"""The shards of the index as an API replica sees them: who answers, who is missing, and where each is now."""

import functools
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
from ray.serve.handle import DeploymentHandle

from audiomae.search.sharded import Divided, Question, ShardMissingError
from serve.shard import ASK, PING, UNKNOWN, pack, secret, unpack

LOGGER = logging.getLogger("ray.serve")
FIRST_S = 20.0  # how long a question waits for a shard that has never been seen
ADDRESS_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
ASKING_THREADS = 16  # a shard
SMALL_BYTES = 4096  # selections of so many bytes go with every question, larger ones once


class ShardClient:
    """Asks one shard. While it does not answer it is missing, at once; a thread looks for it until it is back.

    Args:
        handle: of its deployment, not used before.
        shards: how many there are.
        answer_s: the longest wait for an answer.
    """

    def __init__(self, handle: DeploymentHandle, shards: int, answer_s: float) -> None:
        self.name = handle.deployment_name
        self._handle, self._shards, self._answer_s = handle, shards, answer_s
        self._connection: _Connection | None = None
        self._seen = threading.Event()
        self._lock = threading.Lock()
        self._looking = False
        self._look()

    @property
    def is_missing(self) -> bool:
        """Whether it does not answer now."""
        return self._connection is None

    def wait(self, seconds: float) -> bool:
        """Whether it has ever answered, after waiting for that."""
        return self._seen.wait(seconds)

    def ask(self, version: str, question: Question) -> list[np.ndarray]:
        """Its answer about release `version`.

        Raises:
            ShardMissingError: it does not answer.
        """
        connection = self._connection
        if connection is None and self._seen.wait(FIRST_S):
            connection = self._connection
        if connection is None:
            raise ShardMissingError(self.name)
        try:
            return connection.ask({"version": version, "shards": self._shards}, question)
        except (flight.FlightError, pa.ArrowException) as error:
            LOGGER.warning(f"{self.name} does not answer: {type(error).__name__}: {error}")
            self._lose(connection)
            raise ShardMissingError(self.name) from error

    async def load(self, version: str, timeout_s: float) -> Any:
        """Make a release ready in all its replicas."""
        return await self._handle.broadcast("load", version, self._shards).results_async(timeout_s=timeout_s)

    def _lose(self, connection: "_Connection") -> None:
        if self._connection is connection:
            self._connection = None
            self._look()

    def _look(self) -> None:
        with self._lock:
            if self._looking:
                return
            self._looking = True
        threading.Thread(target=self._connect, name=f"look for {self.name}", daemon=True).start()

    def _connect(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                if not self._handle.is_initialized:  # the event loop of a replica is not of this thread
                    self._handle._init(_run_router_in_separate_loop=True)
                address = self._handle.address.remote().result(timeout_s=ADDRESS_S)
                connection = _Connection(address, self._answer_s)
                connection.ping()
                break
            except Exception as error:  # dead, starting, moved: until it is back
                LOGGER.info(f"{self.name} is not there yet: {type(error).__name__}")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        with self._lock:
            self._connection, self._looking = connection, False
        self._seen.set()


class _Connection:
    """To one replica of a shard, from any thread."""

    def __init__(self, address: str, answer_s: float) -> None:
        self._client = flight.FlightClient(address)
        headers = [(b"authorization", f"Bearer {secret()}".encode())]
        self._options = flight.FlightCallOptions(timeout=answer_s, headers=headers)
        self._quick = flight.FlightCallOptions(timeout=ADDRESS_S, headers=headers)
        self._sent: set[str] = set()

    def ping(self) -> None:
        """Raises when nobody answers."""
        list(self._client.do_action(flight.Action(PING, b""), self._quick))

    def ask(self, head: dict[str, Any], question: Question) -> list[np.ndarray]:
        """The answer."""
        known, arrays = self._call(head, question, all_bits=False)
        if known.get(UNKNOWN):
            _, arrays = self._call(head, question, all_bits=True)
        return arrays

    def _call(
        self, head: dict[str, Any], question: Question, all_bits: bool
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        allowed, bits = None, []
        if question.allowed is not None:
            allowed = []
            for segment, selection in question.allowed.items():
                give = all_bits or selection.bits.nbytes <= SMALL_BYTES or selection.digest not in self._sent
                allowed.append([segment, selection.digest, selection.count, give])
                if give:
                    bits.append(selection.bits)
                    self._sent.add(selection.digest)
        asked = {"operation": question.operation, "numbers": question.numbers, "allowed": allowed}
        body = pack({**head, **asked, "names": list(question.arrays)}, [*question.arrays.values(), *bits])
        (result,) = self._client.do_action(flight.Action(ASK, body), self._options)
        return unpack(memoryview(result.body))


class IndexShards:
    """All shards.

    Args:
        handles: of their deployments, in order.
        answer_s: the longest wait for an answer.
    """

    def __init__(self, handles: Sequence[DeploymentHandle], answer_s: float) -> None:
        self.clients = [ShardClient(handle, len(handles), answer_s) for handle in handles]
        self._pool = ThreadPoolExecutor(ASKING_THREADS * len(handles), thread_name_prefix="ask")

    @property
    def missing(self) -> list[str]:
        """Names of those that do not answer now."""
        return [client.name for client in self.clients if client.is_missing]

    def divided(self, version: str) -> Divided:
        """How to ask them about a release."""
        return Divided({client.name: functools.partial(client.ask, version) for client in self.clients}, self._pool)

    def never_seen(self, seconds: float) -> list[str]:
        """Names of those that have not answered yet, after waiting so long for them."""
        until = time.monotonic() + seconds
        return [client.name for client in self.clients if not client.wait(max(0.0, until - time.monotonic()))]
