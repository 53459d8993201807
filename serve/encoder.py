"""The encoder: windows of sound in, unit vectors out, batched across requests.

`BatchingEncoder` lives in a process: in every API replica for short queries where they run on CPUs (no hop), and in the
`Encoder` deployment for long uploads and for GPUs. On CPUs the deployment works when nothing else does, so that long
uploads take the time that short queries leave.
"""

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, PriorityQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from audiomae import storage
from audiomae.artifacts import releases
from audiomae.cpus import available_cpus
from serve.arguments import ServeArgs
from serve.audio import decode_query
from serve.queries import EncoderInfo, Region
from serve.teamwork import Teamwork
from serve.versions import VersionCache, mismatch

if TYPE_CHECKING:  # torch is loaded where something is encoded: `serve run` only passes these classes on
    from audiomae.model.encoder import AudioEncoder

LONG_BATCH = 4  # windows of a long upload encoded at a time: a short query waits for no more than these
BEHIND = 2  # how much nicer the encoding threads are than the rest of their process
LAST = 19  # niceness of threads that work when nobody else does


@dataclass(order=True)
class _Job:
    """A few windows of one request to encode together; the first ones of every request first, then by arrival."""

    priority: tuple[int, int]
    version: str = field(compare=False)
    windows: Sequence[np.ndarray] = field(compare=False)
    done: "Future[np.ndarray]" = field(compare=False)


class BatchingEncoder:
    """Encodes windows of many requests together; a batch forms while those before it are being encoded.

    On CPUs several batches are computed side by side, each by one thread. Threads that share a batch wait for each
    other, and turn on the spot while they do: with eight clients two of them answered less than half as many requests
    a second as one did. There is one for every core, at a lower priority than the event loop, which starves otherwise;
    in several processes rather than in one, where they wait for each other's Python.

    A request that is the only one is decoded and encoded by one thread, `leader`: to hand it on to others and back
    takes a millisecond or two. It may get the other cores as well (`Teamwork`). No other thread leads a team, as OpenMP
    lets threads sleep between two steps, and wakes them for each, once a process has teams of more threads than cores.

    A request's windows are queued a few at a time: the first few of all requests come before the next of any, so that a
    long one does not hold up those that come after it.

    Args:
        args: the service's arguments.
        processes: how many share the cores.
        behind: how much nicer than their process the threads are.
    """

    def __init__(self, args: ServeArgs, processes: int = 1, behind: int = BEHIND) -> None:
        import torch

        from audiomae.model.devices import pick_device

        self._args = args
        self._encoders: VersionCache[AudioEncoder] = VersionCache(self._open)
        self._jobs: PriorityQueue[_Job] = PriorityQueue()
        self._arrivals = itertools.count()
        self._idle, self._counting = 0, threading.Lock()
        torch.set_num_threads(1)  # of threads that are made from here on
        one_by_one = pick_device(args.device).type == "cuda"
        cores = 1 if one_by_one else args.encoder_threads or available_cpus()
        self._threads = cores if args.encoder_threads else max(1, cores // processes)
        self._teamwork = Teamwork(cores)
        self.leader = ThreadPoolExecutor(1, "leader", initializer=_step_back, initargs=(behind,))
        for _ in range(self._threads):
            threading.Thread(target=self._work, args=[behind], name="encode", daemon=True).start()

    def load(self, version: str) -> EncoderInfo:
        """Make the encoder of release `version` ready and describe it.

        Raises:
            IntegrityError: when the release's encoder is not the one that made its vectors.
        """
        encoder = self._encoders.get(version)
        return EncoderInfo(
            fingerprint=encoder.fingerprint,
            sample_rate=encoder.sample_rate,
            window_s=encoder.window_s,
            dim=encoder.dim,
            device=str(encoder.device),
            text_reason=text_reason(encoder),
        )

    def submit(self, version: str, windows: Sequence[np.ndarray]) -> "list[Future[np.ndarray]]":
        """Queue W windows, each float32[S] mono at the encoder's rate; the futures give float32[few, dim], in order."""
        arrival = next(self._arrivals)
        futures: list[Future[np.ndarray]] = []
        for start in range(0, len(windows), LONG_BATCH):
            done: Future[np.ndarray] = Future()
            futures.append(done)
            self._jobs.put(_Job((start, arrival), version, windows[start : start + LONG_BATCH], done))
        return futures

    def encode(self, version: str, windows: Sequence[np.ndarray], timeout_s: float) -> np.ndarray:
        """Unit vectors float32[W, dim] of W windows. Raises TimeoutError."""
        futures = self.submit(version, windows)
        try:
            return np.concatenate([done.result(timeout_s) for done in futures])
        finally:
            for done in futures:
                done.cancel()

    def encode_alone(self, version: str, windows: Sequence[np.ndarray], _timeout_s: float) -> np.ndarray:
        """As `encode`, in the thread of `leader`, whose request has the cores to itself."""
        import torch

        encoder, threads, began = self._encoders.get(version), self._teamwork.choose(), time.perf_counter()
        torch.set_num_threads(threads)  # of this thread
        try:
            vectors = encoder.embed(windows, batch_size=min(len(windows), self._args.max_batch_size))
        finally:
            torch.set_num_threads(1)  # of threads that are made from here on
        if self._idle == self._threads:  # else somebody came meanwhile
            self._teamwork.learn(threads, (time.perf_counter() - began) / len(windows))
        return vectors

    def encode_text(self, version: str, texts: list[str]) -> np.ndarray:
        """Unit vectors float32[T, dim] of texts; only for encoders with a text tower."""
        return self._encoders.get(version).embed_text(texts)

    def _work(self, behind: int) -> None:
        _step_back(behind)
        while True:
            jobs = self._next_jobs()
            wanted = [job for job in jobs if job.done.set_running_or_notify_cancel()]
            for version in dict.fromkeys(job.version for job in wanted):
                batch = [job for job in wanted if job.version == version]
                windows = [window for job in batch for window in job.windows]
                try:
                    vectors = self._encoders.get(version).embed(windows, batch_size=len(windows))
                except Exception as error:
                    for job in batch:
                        job.done.set_exception(error)
                else:
                    ends = np.cumsum([len(job.windows) for job in batch])
                    for job, found in zip(batch, np.split(vectors, ends[:-1]), strict=True):
                        job.done.set_result(found)

    def _next_jobs(self) -> list[_Job]:
        """Wait for work; as much of it as makes a batch, but for what threads that wait can begin at once."""
        with self._counting:
            self._idle += 1
        jobs = [self._jobs.get()]
        with self._counting:
            self._idle -= 1
            size = len(jobs[0].windows)
            while size < self._args.max_batch_size and self._jobs.qsize() > self._idle:
                try:
                    jobs.append(self._jobs.get_nowait())
                except Empty:  # one that waited was faster
                    break
                size += len(jobs[-1].windows)
        return jobs

    def _open(self, version: str) -> "AudioEncoder":
        from audiomae.model.encoder import AudioEncoder

        release = releases.resolve(self._args.index, version)
        encoder = AudioEncoder.load(str(checked_encoder_dir(release)), device=self._args.device, dtype=self._args.dtype)
        if encoder.fingerprint != release.fingerprint:
            raise mismatch(release, encoder.fingerprint)
        return encoder


def _step_back(behind: int) -> None:
    """What a thread that computes begins with: one thread, and so much nicer than before; with `LAST` behind everybody.

    The nicest thread still has a core for milliseconds once it has got it; the scheduling class for idle time gives it
    back at once.
    """
    import torch

    torch.get_num_threads()  # a thread takes over what was set last, in whatever thread, when it first asks
    torch.set_num_threads(1)
    with suppress(OSError, AttributeError):  # of this thread alone; as it is where the system has no such thing
        mine = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, mine, min(LAST, os.getpriority(os.PRIO_PROCESS, mine) + behind))
        if behind == LAST:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class Encoder:
    """The deployment: long uploads decoded and encoded from their bytes, and short ones where there is a GPU.

    Every call names its release, so a query is always encoded by the encoder its index was built with.
    """

    def __init__(self, args: ServeArgs, version: str) -> None:
        from audiomae.model.devices import pick_device

        self._args = args
        behind = BEHIND if pick_device(args.device).type == "cuda" else LAST
        self._encoder = BatchingEncoder(args, behind=behind)
        self._encoder.load(version)
        self._uploads = ThreadPoolExecutor(available_cpus(), "upload", initializer=_step_back, initargs=(behind,))

    def load(self, version: str) -> EncoderInfo:
        """As `BatchingEncoder.load`."""
        return self._encoder.load(version)

    async def encode(self, version: str, windows: list[np.ndarray]) -> np.ndarray:
        """Unit vectors float32[W, dim] of decoded windows."""
        return np.concatenate(await asyncio.gather(*map(asyncio.wrap_future, self._encoder.submit(version, windows))))

    async def embed_upload(
        self, version: str, data: bytes, window_s: float, region: Region
    ) -> tuple[list[tuple[float, float]], np.ndarray]:
        """Where the windows of an upload lie, in seconds, and their vectors float32[W, dim]; one upload a CPU.

        Raises:
            Problem: 413, 415 or 422 with the decoder's reason.
        """
        work = asyncio.get_running_loop().run_in_executor
        return await work(self._uploads, self._embed_upload, version, data, window_s, region)

    def encode_text(self, version: str, texts: list[str]) -> np.ndarray:
        """As `BatchingEncoder.encode_text`."""
        return self._encoder.encode_text(version, texts)

    def _embed_upload(self, version: str, data: bytes, window_s: float, region: Region) -> Any:
        rate = self._encoder.load(version).sample_rate
        spans, vectors, batch = [], [], []
        for window in decode_query(data, rate, window_s, self._args, region):
            spans.append((window.start_s, window.end_s))
            batch.append(window.samples)
            if len(batch) == LONG_BATCH:
                vectors.append(self._encoder.encode(version, batch, self._args.request_timeout_s))
                batch = []
        if batch:
            vectors.append(self._encoder.encode(version, batch, self._args.request_timeout_s))
        return spans, np.concatenate(vectors)


def text_reason(encoder: "AudioEncoder") -> str | None:
    """Why the encoder cannot embed text; `None` when it can, its text model then being loaded."""
    if not encoder.has_text:
        return "its encoder was trained on sound alone: train with a CLAP objective and publish that encoder"
    try:
        encoder.text_tower  # noqa: B018 (loads on first use)
    except RuntimeError as error:
        return str(error)
    return None


def checked_encoder_dir(release: releases.Release) -> Path:
    """The release's encoder on a local disk, its checksums checked; the index files are left where they are."""
    releases.verify(release, lambda name: name.startswith("encoder/"))
    return storage.fetch_dir(str(release.path / "encoder"))
