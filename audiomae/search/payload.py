"""Decoded windows of one shard on their way from a decoding process to an encoding one, as one Arrow IPC buffer.

Samples cross as int16 with one scale per window (peak = 32767), half the bytes of float32: the error is at most 1/65534
of the window's peak, and an embedding moves by less than 1e-5 in cosine (tested on real audio). A payload is at most
64 MB; an item that does not fit is left out and decoded as a stream by the encoding process.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from audiomae.search.decoding import Clip, Decode, Item, ItemError
from audiomae.search.embedder import consume_item

MAX_SAMPLES = 32 << 20  # 64 MB of int16: about 35 minutes at 16 kHz
FULL_SCALE = 32767


class PayloadFull(Exception):
    """The windows of the item at hand do not fit any more."""


def quantise(clip: Clip) -> Clip:
    """A float32 window as int16 and the scale that restores it."""
    scale = float(np.abs(clip.samples).max(initial=0.0)) / FULL_SCALE or 1.0
    return clip._replace(samples=np.rint(clip.samples / scale).astype(np.int16), scale=scale)


class Payload:
    """Windows by item number, the reasons of items that gave none, and the time it took."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.decode_s = 0.0
        self.clips: dict[int, list[Clip]] = {}
        self.failures: dict[int, list[str]] = {}
        self._room = MAX_SAMPLES

    def decode(self, number: int, item: Item, decode: Decode) -> None:
        """Add the windows of an item, or why there are none, or, when they do not fit, nothing."""
        began = time.perf_counter()
        clips: list[Clip] = []

        def accept(clip: Clip) -> None:
            clips.append(quantise(clip))
            if sum(len(clip.samples) for clip in clips) > self._room:
                raise PayloadFull

        try:
            failure = consume_item(item, decode, accept, clips.clear)
        except PayloadFull:
            return
        finally:
            self.decode_s += time.perf_counter() - began
        if failure:
            self.failures[number] = [failure["stage"], failure["error_class"], failure["message"]]
        else:
            self.clips[number] = clips
            self._room -= sum(len(clip.samples) for clip in clips)

    def replay(self, item: Item, otherwise: Decode) -> Iterator[Clip]:
        """The windows of `item["number"]` (its position in the shard); `otherwise` decodes what was left out.

        Raises:
            ItemError: when the item failed on the other side.
        """
        number = item["number"]
        if number in self.failures:
            stage, error_class, message = self.failures[number]
            raise ItemError(stage, error_class, message)
        yield from self.clips[number] if number in self.clips else map(quantise, otherwise(item))

    def pack(self) -> bytes:
        """As one Arrow IPC stream."""
        pairs = [(number, clip) for number, clips in self.clips.items() for clip in clips]
        lengths = [len(clip.samples) for _, clip in pairs]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        flat = np.concatenate([np.zeros(0, np.int16), *(clip.samples for _, clip in pairs)])
        notes = {"failures": self.failures, "decode_s": self.decode_s, "began": self.began}
        table = pa.table(
            {
                "number": pa.array([number for number, _ in pairs], pa.int32()),
                "start_s": pa.array([clip.start_s for _, clip in pairs], pa.float64()),
                "end_s": pa.array([clip.end_s for _, clip in pairs], pa.float64()),
                "scale": pa.array([clip.scale for _, clip in pairs], pa.float64()),
                "samples": pa.LargeListArray.from_arrays(offsets, pa.array(flat)),
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
        if table.num_rows:
            samples = table["samples"].chunk(0)
            flat, offsets = samples.values.to_numpy(), samples.offsets.to_numpy()
            spans = zip(*(table[name].to_pylist() for name in ("number", "start_s", "end_s", "scale")), strict=True)
            for row, (number, start_s, end_s, scale) in enumerate(spans):
                clip = Clip(start_s, end_s, flat[offsets[row] : offsets[row + 1]], scale)
                payload.clips.setdefault(number, []).append(clip)
        return payload
