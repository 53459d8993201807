"""The embedding job's stages, as callables that Ray Data maps over the shards of a plan (and anything else could).

A row is one shard in, one `ShardReport` out. `FusedStage` decodes and encodes in one process: best where both run on
the same cores, since nothing crosses between processes. `decode_shards` and `EncodeStage` split the two, for encoders
on a GPU: windows cross as int16 (`payload.py`).
"""

import os
import socket
import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from audiomae.artifacts.embeddings import ShardOrigin, agree_on_precision, commit_shard, is_committed
from audiomae.embedding.decoding import EmbedJob, Item, decoder_of
from audiomae.embedding.embedder import BatchEncoder, ShardResult, embed_shard
from audiomae.embedding.payload import Payload
from audiomae.embedding.pieces import Clip
from audiomae.embedding.plan import ShardEntry, read_shard_items
from audiomae.errors import IntegrityError
from audiomae.model.encoder import AudioEncoder

COMMITTERS = 4  # threads of one worker
REPORT_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("status", pa.string()),  # committed | duplicate | error
        ("message", pa.string()),
        ("worker", pa.string()),
        ("device", pa.string()),
        ("inputs", pa.int64()),
        ("rows", pa.int64()),
        ("failed", pa.int64()),
        ("audio_s", pa.float64()),
        ("decode_s", pa.float64()),
        ("encode_s", pa.float64()),
        ("write_s", pa.float64()),
        ("began", pa.float64()),
        ("ended", pa.float64()),
    ]
)


class _Embedder:
    """What both encoding stages share: the loaded encoder, the commit, the report."""

    def __init__(self, job: EmbedJob) -> None:
        torch.set_num_threads(job.threads)
        self.job = job
        encoder = AudioEncoder.load(job.encoder, device=job.device, dtype=job.dtype)
        precision = agree_on_precision(job.out, encoder.precision)
        if job.dtype == "auto":  # as this folder began, also on a machine that would choose otherwise
            encoder.precision = precision
        if encoder.fingerprint != job.settings.fingerprint:
            raise IntegrityError(
                f"{job.encoder}: fingerprint {encoder.fingerprint}, expected {job.settings.fingerprint} (the plan): "
                "the encoder was replaced while the job ran; restore it or embed into a fresh folder"
            )
        self.encode = BatchEncoder(encoder, job.batch_size)
        if job.compiled and encoder.device.type == "cuda":
            self.encode = self._compiled() or self.encode
        self.lock = threading.Lock()  # two calls may run at once: one computes while the other reads or commits
        self.worker, self.device = f"{socket.gethostname()}-{os.getpid()}", str(encoder.device)

    def _compiled(self) -> BatchEncoder | None:
        """The encoder with compiled blocks, tried on one batch; None, and a line that says why, where that fails."""
        before = self.encode
        encoder = AudioEncoder.load(self.job.encoder, device=before.device, dtype=before.encoder.precision)
        encoder.compile_blocks()
        encode = BatchEncoder(encoder, self.job.batch_size)
        window_s = self.job.settings.window_s or encoder.window_s
        window = Clip(0.0, window_s, np.zeros(round(window_s * encoder.sample_rate), np.float32))
        try:
            encode([window] * encode.batch_size)
        except Exception as error:  # no C compiler on the node, a block that cannot be traced: slower, and as right
            reason = str(error).partition("\n")[0]
            print(f"note: the encoder runs uncompiled: {type(error).__name__}: {reason}", flush=True)
            return None
        return encode

    def commit(self, entry: ShardEntry, result: ShardResult, began: float) -> Item:
        """Commit a shard and report on it."""
        write_began = time.time()
        job = self.job
        origin = ShardOrigin(
            inputs=entry.items,
            audio_s=result.audio_s,
            fingerprint=job.settings.fingerprint,
            manifest=job.manifest,
            precision=self.encode.encoder.precision,
        )
        won = commit_shard(job.out, entry.name, result.tables, origin)
        counts = result.tables.counts
        ended = time.time()
        return {
            "shard": entry.name,
            "status": "committed" if won else "duplicate",
            "worker": self.worker,
            "device": self.device,
            "inputs": entry.items,
            "rows": counts["rows"],
            "failed": counts["failed"],
            "audio_s": result.audio_s,
            "decode_s": result.decode_s,
            "encode_s": result.encode_s,
            "write_s": ended - write_began,
            "began": began,
            "ended": ended,
        }


class FusedStage(_Embedder):
    """Blocks of shard entries in, reports out; decoding and encoding alternate in this process.

    Two calls may run at once: while one decodes and encodes, the other ends its block. A few threads store what is
    embedded while the next shards are: a commit waits for the disk, or for S3, three times.
    """

    def __init__(self, job: EmbedJob) -> None:
        super().__init__(job)
        self.decode = decoder_of(job)
        self.committers = ThreadPoolExecutor(COMMITTERS, thread_name_prefix="commit")

    def __call__(self, batch: pa.Table) -> pa.Table:
        texts = batch["entries"].combine_chunks().flatten().to_pylist()
        return _reports([future.result() for future in [self._embed(_entry(text)) for text in texts]])

    def _embed(self, entry: ShardEntry) -> Future[Item]:
        began = time.time()
        try:
            if is_committed(self.job.out, entry.name):  # by a worker that was killed before it could say so
                return _done(_report(entry, "duplicate", began))
            items = read_shard_items(self.job.out, entry)
            with self.lock:
                began = time.time()
                result = embed_shard(items, self.decode, self.encode, self.job.settings)
        except Exception:
            return _done(_report(entry, "error", began, traceback.format_exc(limit=-3)))
        return self.committers.submit(self._commit, entry, result, began)

    def _commit(self, entry: ShardEntry, result: ShardResult, began: float) -> Item:
        try:
            return self.commit(entry, result, began)
        except Exception:
            return _report(entry, "error", began, traceback.format_exc(limit=-3))


class EncodeStage(_Embedder):
    """Shard entries with decoded windows in, reports out.

    Two calls may run at once: while one encodes, the other unpacks, builds its table or commits.
    """

    def __call__(self, batch: pa.Table) -> pa.Table:
        entries = [_entry(text) for text in batch["entry"].to_pylist()]
        payloads = [scalar.as_buffer() for scalar in batch["payload"].combine_chunks()]
        return _reports([self._embed(*pair) for pair in zip(entries, payloads, strict=True)])

    def _embed(self, entry: ShardEntry, buffer: pa.Buffer) -> Item:
        payload = Payload.unpack(buffer)
        try:
            if is_committed(self.job.out, entry.name):
                return _report(entry, "duplicate", payload.began)
            items = read_shard_items(self.job.out, entry)
            decode = decoder_of(self.job)
            with self.lock:
                result = embed_shard(items, partial(payload.replay, otherwise=decode), self.encode, self.job.settings)
            result.decode_s += payload.decode_s
            return self.commit(entry, result, payload.began)
        except Exception:
            return _report(entry, "error", payload.began, traceback.format_exc(limit=-3))


def _entry(text: str) -> ShardEntry:
    return ShardEntry.model_validate_json(text)


def _done(report: Item) -> Future[Item]:
    future: Future[Item] = Future()
    future.set_result(report)
    return future


def _reports(rows: list[Item]) -> pa.Table:
    return pa.Table.from_pylist(rows, REPORT_SCHEMA)


def _report(entry: ShardEntry, status: str, began: float, message: str | None = None) -> Item:
    """The report of a shard that this worker did not commit: `error` leaves it for another pass."""
    return {
        "shard": entry.name,
        "status": status,
        "message": message,
        "inputs": entry.items,
        "failed": 0,
        "began": began,
        "ended": time.time(),
    }
