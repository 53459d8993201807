"""From the items of one shard to its committed rows: decode, batch by length, encode, write.

`embed_shard` is the whole algorithm and knows neither Ray nor files: it takes an iterator of windows per item and an
encode function. `audiomae/embedding/stages.py` runs it in worker processes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from audiomae.artifacts.embeddings import ShardTables
from audiomae.artifacts.tables import (
    DECODE_NOTE,
    FAILURE_SCHEMA,
    SILENT_SCHEMA,
    EmbedSettings,
    embedding_schema,
    vectors_to_column,
)
from audiomae.corpus.manifest import clip_id
from audiomae.embedding.decoding import Decode, Item, consume_item, damage_row, failure_row, silent_row
from audiomae.embedding.pieces import BLOCK, Clip, Damage, Piece, Silent
from audiomae.embedding.plan import extra_columns
from audiomae.model.encoder import AudioEncoder
from audiomae.vectors import clip_vectors

MAX_PADDING = 0.05
BUFFER_SAMPLES = 16 << 20  # 64 MB of float32: about 17 minutes at 16 kHz


Encode = Callable[[Sequence[Clip]], np.ndarray]


@dataclass
class ShardResult:
    """The tables of one shard, and where the time went."""

    tables: ShardTables
    audio_s: float
    decode_s: float
    encode_s: float


def embed_shard(items: pa.Table, decode: Decode, encode: Encode, settings: EmbedSettings) -> ShardResult:
    """Embed the items of one shard; an item that fails becomes a failure row and leaves no embedding behind.

    Silent windows and damaged spans become rows of their own; they take nothing from the item's other windows.

    Args:
        items: work items (`audiomae.embedding.plan`), one row each.
        decode: yields the windows of an item (a dict of its columns and its `number` in the shard) in order, and what
            is silent or damaged in it; called again when a read fails for a passing reason.
        encode: embeds windows -> `float32[N, dim]`, rows L2-normalised.
    """
    began = time.perf_counter()
    rows = _ShardRows(encode)
    failures: dict[int, Item] = {}
    for number, item in enumerate(items.to_pylist()):
        item["number"] = number
        failure = consume_item(item, decode, partial(rows.add, number), partial(rows.drop, rows.mark()))
        if failure:
            failures[number] = failure
    rows.flush()
    decode_s = time.perf_counter() - began - rows.encode_s
    table, audio_s = _build_table(items, rows, failures, settings)
    return ShardResult(_tables(items, table, rows, failures), audio_s, decode_s, rows.encode_s)


def _tables(items: pa.Table, table: pa.Table, rows: "_ShardRows", failures: dict[int, Item]) -> ShardTables:
    """The shard's tables; damage to an item that failed as a whole is no row of its own."""
    uris = items["uri"].to_pylist()
    failure_rows = list(failures.values())
    failure_rows += [
        damage_row({"uri": uris[number]}, piece)
        for number, piece in rows.notes
        if isinstance(piece, Damage) and number not in failures
    ]
    silent_rows = [
        silent_row({"uri": uris[number]}, piece) for number, piece in rows.notes if isinstance(piece, Silent)
    ]
    return ShardTables(
        table,
        pa.Table.from_pylist(failure_rows, FAILURE_SCHEMA),
        pa.Table.from_pylist(silent_rows, SILENT_SCHEMA),
    )


class _ShardRows:
    """The rows of a shard in the making: windows wait until there are enough of them to batch by length."""

    def __init__(self, encode: Encode) -> None:
        self.encode = encode
        self.spans: list[tuple[int, float, float]] = []
        self.started: dict[float, int] = {}  # row of the present item by its start
        self.taken_back: set[int] = set()
        self.said: dict[int, str] = {}
        self.notes: list[tuple[int, Silent | Damage]] = []
        self.vectors: dict[int, np.ndarray] = {}
        self.waiting: list[tuple[int, Clip]] = []
        self.waiting_samples = 0
        self.encode_s = 0.0

    def add(self, item: int, piece: Piece) -> None:
        """Take a piece of the item with this number."""
        if isinstance(piece, Clip):
            self._add_clip(item, piece)
            return
        self.notes.append((item, piece))
        if isinstance(piece, Silent):
            self._take_back(piece.start_s)

    def _add_clip(self, item: int, clip: Clip) -> None:
        self.waiting.append((len(self.spans), clip))
        self.started[clip.start_s] = len(self.spans)
        if clip.note:
            self.said[len(self.spans)] = clip.note
        self.spans.append((item, clip.start_s, clip.end_s))
        self.waiting_samples += len(clip.samples)
        if self.waiting_samples >= BUFFER_SAMPLES:
            self.flush()

    def _take_back(self, start_s: float) -> None:
        """Leave out the present item's window of this start, if there is one: it turned out to be silent."""
        row = self.started.pop(start_s, None)
        if row is not None:
            self.taken_back.add(row)
            self.vectors.pop(row, None)
            self.waiting = [pair for pair in self.waiting if pair[0] != row]

    def item_spans(self) -> dict[int, tuple[float, float]]:
        """Seconds from where the first window of each item starts to where its last ends, silent ones included."""
        silent = ((item, note.start_s, note.end_s) for item, note in self.notes if isinstance(note, Silent))
        found: dict[int, tuple[float, float]] = {}
        for item, start, end in [*self.spans, *silent]:
            first, last = found.get(item, (start, end))
            found[item] = min(first, start), max(last, end)
        return found

    def mark(self) -> tuple[int, int]:
        """The present end, for `drop`; another item begins here."""
        self.started = {}
        return len(self.spans), len(self.notes)

    def drop(self, mark: tuple[int, int]) -> None:
        """Forget what came after `mark`: its item failed half-way."""
        first, first_note = mark
        del self.spans[first:], self.notes[first_note:]
        self.taken_back = {row for row in self.taken_back if row < first}
        self.started = {}
        self.waiting = [pair for pair in self.waiting if pair[0] < first]
        self.vectors = {row: vector for row, vector in self.vectors.items() if row < first}
        self.said = {row: note for row, note in self.said.items() if row < first}

    def flush(self) -> None:
        if self.waiting:
            began = time.perf_counter()
            vectors = self.encode([clip for _, clip in self.waiting])
            self.vectors.update(zip((row for row, _ in self.waiting), vectors, strict=True))
            self.encode_s += time.perf_counter() - began
        self.waiting, self.waiting_samples = [], 0


def _build_table(
    items: pa.Table, rows: _ShardRows, failures: dict[int, Item], settings: EmbedSettings
) -> tuple[pa.Table, float]:
    """The embedding table and the audio seconds behind it; items with a non-finite vector join `failures`."""
    uris = items["uri"].to_pylist()
    kept = [row for row in range(len(rows.spans)) if row not in rows.taken_back]
    vectors = np.array([rows.vectors[row] for row in kept], np.float32).reshape(-1, settings.dim)
    numbers = np.array([rows.spans[row][0] for row in kept], np.int64)
    spans = np.array([rows.spans[row][1:] for row in kept], np.float64).reshape(-1, 2).round(6)
    bad = np.unique(numbers[~np.isfinite(vectors).all(axis=1)])
    for number in bad:
        item = items.slice(int(number), 1).to_pylist()[0]
        failures[int(number)] = failure_row(item, "encode", "NonFiniteEmbedding", "the encoder gave NaN or infinity")
    said = np.array([rows.said.get(row) for row in kept], object)
    keep = ~np.isin(numbers, bad)
    vectors, numbers, spans, said = vectors[keep], numbers[keep], spans[keep], said[keep]
    heard = {number: span for number, span in rows.item_spans().items() if number not in failures}
    if len(heard) + len(failures) != items.num_rows:
        raise AssertionError(f"{items.num_rows} items gave {len(heard)} embedded + {len(failures)} failed")
    audio_s = float(sum(end - start for start, end in heard.values()))
    window_s = settings.window_s
    if settings.mode == "file" and len(numbers):
        firsts = np.flatnonzero(np.diff(numbers, prepend=-1))  # rows of an item are adjacent
        vectors = clip_vectors(vectors, np.cumsum(np.diff(numbers, prepend=-1) > 0) - 1)
        numbers, window_s = numbers[firsts], 0.0
        spans = np.array([heard[int(number)] for number in numbers]).round(6)
        said = np.array([next(filter(None, notes), None) for notes in np.split(said, firsts[1:])], object)
    schema = embedding_schema(settings, [items.schema.field(name) for name in extra_columns(items)])
    dtype = np.float16 if settings.vector_dtype == "float16" else np.float32
    columns = [
        pa.array(
            [clip_id(uris[n], start, window_s) for n, start in zip(numbers, spans[:, 0], strict=True)], pa.int64()
        ),
        pa.array([uris[n] for n in numbers], pa.string()),
        pa.array(spans[:, 0]),
        pa.array(spans[:, 1]),
        vectors_to_column(vectors.astype(dtype)),
        *(items[name].take(pa.array(numbers)) for name in extra_columns(items)),
    ]
    table = pa.Table.from_arrays(columns, schema=schema)
    if any(said):
        table = table.append_column(DECODE_NOTE, pa.array(said, pa.string()))
    return table, audio_s


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut windows into batches, longest first, such that padding stays under 5% of every batch.

    Returns lists of positions in `lengths`; deterministic, so a shard always rides in the same batches.
    """
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    batches: list[list[int]] = []
    longest = total = 0
    for position in order:
        length = lengths[position]
        count = len(batches[-1]) + 1 if batches else 0
        if not batches or count > batch_size or (total + length) < (1 - MAX_PADDING) * longest * count:
            batches.append([])
            longest, total = length, 0
        batches[-1].append(position)
        total += length
    return batches


class BatchEncoder:
    """Windows -> `float32[N, dim]` through an `AudioEncoder`, in length-bucketed batches.

    On a GPU the host pads the next batch into pinned memory while the device works on the last one; the only
    synchronisation is the copy of all results at the end. int16 windows are restored on the device. A batch that does
    not fit its memory is cut in halves, and later ones are no larger than what did fit.

    Args:
        encoder: where it is, windows go.
        batch_size: windows at a time; by default 512 on a GPU (a few per cent faster than 256 on an H100), 8 on a CPU.
    """

    def __init__(self, encoder: AudioEncoder, batch_size: int | None = None) -> None:
        self.encoder, self.device = encoder, encoder.device
        self.batch_size = batch_size or (512 if self.device.type == "cuda" else 8)
        self.padded_samples = self.samples = 0

    @torch.inference_mode()
    def __call__(self, clips: Sequence[Clip]) -> np.ndarray:
        lengths = [len(clip.samples) for clip in clips]
        batches = batches_by_length(lengths, self.batch_size)
        outputs = [self._fitting([clips[position] for position in batch]) for batch in batches]
        vectors = np.empty((len(clips), self.encoder.dim), np.float32)
        vectors[[position for batch in batches for position in batch]] = torch.cat(outputs).float().cpu().numpy()
        return vectors

    def _fitting(self, clips: Sequence[Clip]) -> torch.Tensor:
        """Vectors of a batch, in halves where the device has not enough memory for all of it."""
        half = len(clips) // 2
        if len(clips) <= self.batch_size:  # more is known not to fit
            try:
                return self._encode(clips)
            except torch.OutOfMemoryError:
                if not half:
                    raise
            self.batch_size = half
            print(f"{len(clips)} windows at once do not fit the memory of {self.device}: {half} from here on")
            torch.cuda.empty_cache()  # what the failed attempt held in pieces
        return torch.cat([self._fitting(clips[:half]), self._fitting(clips[half:])])

    def _encode(self, clips: Sequence[Clip]) -> torch.Tensor:
        lengths = torch.tensor([len(clip.samples) for clip in clips])
        longest = int(lengths.max())
        self.samples += int(lengths.sum())
        self.padded_samples += longest * len(clips)
        if clips[0].scales is None:
            waveforms = self._to_device([clip.samples for clip in clips], longest, torch.float32)
        else:
            blocks = -(-longest // BLOCK)
            counts = self._to_device([clip.samples for clip in clips], blocks * BLOCK, torch.int16)
            scales = self._to_device([clip.scales for clip in clips if clip.scales is not None], blocks, torch.float32)
            waveforms = (counts.float().unflatten(1, (blocks, BLOCK)) * scales[:, :, None]).flatten(1)[:, :longest]
        return self.encoder(waveforms, lengths)  # it wants the lengths on the CPU

    def _to_device(self, arrays: Sequence[np.ndarray], width: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows zero-padded to `width`, `[len(arrays), width]`, copied without waiting for the device."""
        padded = torch.zeros((len(arrays), width), dtype=dtype, pin_memory=self.device.type == "cuda")
        host = padded.numpy()
        for row, array in enumerate(arrays):
            host[row, : len(array)] = array
        return padded.to(self.device, non_blocking=True)
