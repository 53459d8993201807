"""Decoded windows of one shard on their way from a decoding process to an encoding one, as one Arrow IPC buffer.

Samples cross as int16 with one scale for each block of 64 (block floating point), half the bytes of float32: a block
keeps 15 bits below its own peak, and an embedding moves by less than 1e-5 in cosine (tested on real audio; one scale
for the whole window costs up to 2e-4, float16 up to 3e-3, because quiet stretches lie near the floor of the log). A
payload is at most 64 MB; an item that does not fit is left out and decoded as a stream by the encoding process.
"""

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from audiomae.embedding.decoding import Decode, EmbedJob, IsolatedDecoder, Item, consume_item, decoder_of
from audiomae.embedding.pieces import BLOCK, PIECES, Clip, Piece
from audiomae.embedding.plan import ShardEntry, read_shard_items
from audiomae.errors import ItemError

MAX_SAMPLES = 32 << 20  # 64 MB of int16: about 35 minutes at 16 kHz
FULL_SCALE = 32767


class PayloadFull(Exception):
    """The windows of the item at hand do not fit any more."""


def quantise(clip: Clip) -> Clip:
    """A float32 window as int16 and the scale of each block that restores it."""
    count = len(clip.samples)
    blocks = np.pad(clip.samples, (0, -count % BLOCK)).reshape(-1, BLOCK)
    scales = (np.abs(blocks).max(axis=1) / FULL_SCALE).astype(np.float32)
    samples = np.rint(blocks / np.where(scales > 0, scales, 1)[:, None]).clip(-FULL_SCALE, FULL_SCALE).astype(np.int16)
    return clip._replace(samples=samples.reshape(-1)[:count], scales=scales)


class Payload:
    """Windows by item number, what else is known of the items, the reasons of those that failed, the time it took."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.decode_s = 0.0
        self.clips: dict[int, list[Clip]] = {}
        self.notes: dict[int, list[Piece]] = {}  # what is silent or damaged
        self.failures: dict[int, list[str]] = {}
        self._room = MAX_SAMPLES

    def decode(self, number: int, item: Item, decode: Decode) -> None:
        """Add the windows of an item, or why there are none, or, when they do not fit, nothing."""
        began = time.perf_counter()
        pieces: list[Piece] = []
        room = self._room

        def accept(piece: Piece) -> None:
            nonlocal room
            pieces.append(quantise(piece) if isinstance(piece, Clip) else piece)
            room -= len(piece.samples) if isinstance(piece, Clip) else 0
            if room < 0:
                raise PayloadFull

        def reset() -> None:
            nonlocal room
            pieces.clear()
            room = self._room

        try:
            failure = consume_item(item, decode, accept, reset)
        except PayloadFull:
            return
        finally:
            self.decode_s += time.perf_counter() - began
        if failure and not pieces:
            self.failures[number] = [failure["stage"], failure["error_class"], failure["message"]]
            return
        self.clips[number] = [piece for piece in pieces if isinstance(piece, Clip)]
        self.notes[number] = [piece for piece in pieces if not isinstance(piece, Clip)]
        self._room = room

    def replay(self, item: Item, otherwise: Decode) -> Iterator[Piece]:
        """The pieces of `item["number"]` (its position in the shard); `otherwise` decodes what was left out.

        Raises:
            ItemError: when the item failed on the other side.
        """
        number = item["number"]
        if number in self.failures:
            stage, error_class, message = self.failures[number]
            raise ItemError(stage, error_class, message)
        if number in self.clips or number in self.notes:
            yield from self.clips.get(number, ())
            yield from self.notes.get(number, ())
            return
        for piece in otherwise(item):
            yield quantise(piece) if isinstance(piece, Clip) else piece

    def pack(self) -> bytes:
        """As one Arrow IPC stream."""
        pairs = [(number, clip) for number, clips in self.clips.items() for clip in clips]
        said = {
            number: [[type(piece).__name__, *piece] for piece in pieces]
            for number, pieces in self.notes.items()
            if pieces
        }
        notes = {"failures": self.failures, "notes": said, "decode_s": self.decode_s, "began": self.began}
        table = pa.table(
            {
                "number": pa.array([number for number, _ in pairs], pa.int32()),
                "start_s": pa.array([clip.start_s for _, clip in pairs], pa.float64()),
                "end_s": pa.array([clip.end_s for _, clip in pairs], pa.float64()),
                "samples": _lists([clip.samples for _, clip in pairs], np.int16),
                "scales": _lists([clip.scales for _, clip in pairs if clip.scales is not None], np.float32),
                "note": pa.array([clip.note for _, clip in pairs], pa.string()),
            }
        ).replace_schema_metadata({"payload": json.dumps(notes)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    @classmethod
    def unpack(cls, buffer: Any) -> "Payload":
        """The payload in an IPC buffer; its samples stay in the buffer (no copy)."""
        table = pa.ipc.open_stream(buffer).read_all().combine_chunks()
        notes = json.loads(table.schema.metadata[b"payload"])
        payload = cls(notes["began"])
        payload.decode_s = notes["decode_s"]
        payload.failures = {int(number): reason for number, reason in notes["failures"].items()}
        payload.notes = {
            int(number): [PIECES[kind](*values) for kind, *values in pieces]
            for number, pieces in notes["notes"].items()
        }
        if table.num_rows:
            spans = (table[name].to_pylist() for name in ("number", "start_s", "end_s"))
            arrays = (_rows(table[name].chunk(0)) for name in ("samples", "scales"))
            for number, *clip in zip(*spans, *arrays, table["note"].to_pylist(), strict=True):
                payload.clips.setdefault(number, []).append(Clip(*clip))
        return payload


def _lists(arrays: list[np.ndarray], dtype: type) -> pa.LargeListArray:
    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int64)
    return pa.LargeListArray.from_arrays(offsets, np.concatenate([np.zeros(0, dtype), *arrays]))


def _rows(lists: pa.LargeListArray) -> list[np.ndarray]:
    flat, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
    return [flat[start:end] for start, end in pairwise(offsets)]


def decode_shards(job: EmbedJob, batch: pa.Table) -> pa.Table:
    """Shard entries in; out, one row per shard: its entry and its decoded windows as one Arrow IPC buffer."""
    decode = decoder_of(job)
    buffers = []
    for text in batch["entry"].to_pylist():
        payload = Payload(began=time.time())
        items = read_shard_items(job.out, ShardEntry.model_validate_json(text))
        for number, item in enumerate(items.to_pylist()):
            payload.decode(number, item, decode)
        buffers.append(payload.pack())
    if isinstance(decode, IsolatedDecoder):
        decode.close()
    return pa.table({"entry": batch["entry"], "payload": pa.array(buffers, pa.large_binary())})
