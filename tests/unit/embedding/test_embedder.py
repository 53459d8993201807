"""The embedding of one shard: accounting, retries, batching, and vectors that do not depend on the batch."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiomae.artifacts.embeddings import ShardTables
from audiomae.artifacts.tables import EmbedSettings, column_to_vectors
from audiomae.corpus.manifest import clip_id
from audiomae.embedding import decoding, embedder
from audiomae.embedding.decoding import Item
from audiomae.embedding.embedder import BatchEncoder, batches_by_length, embed_shard
from audiomae.embedding.payload import Payload
from audiomae.embedding.pieces import Clip, Damage, Silent
from audiomae.errors import ItemError
from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.encoder import AudioEncoder, EncoderConfig

SETTINGS = EmbedSettings(fingerprint="f" * 64, dim=2, sample_rate=100, mode="windows", window_s=1, hop_s=1)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "BACKOFF_S", 0.0)


def items(*uris: str) -> pa.Table:
    return pa.table(
        {
            "uri": list(uris),
            "size": [100] * len(uris),
            "content_id": ["c"] * len(uris),
            "label": [uri[0] for uri in uris],
            "segment_start_s": pa.array([None] * len(uris), pa.float64()),
            "segment_end_s": pa.array([None] * len(uris), pa.float64()),
            "shard": ["a"] * len(uris),
        }
    )


def windows(count: int, value: float = 1.0) -> Iterator[Clip]:
    for number in range(count):
        yield Clip(float(number), number + 1.0, np.full(100, value + number, np.float32))


def encode(clips: Sequence[Clip]) -> np.ndarray:
    """A unit vector at an angle that tells the clip's mean."""
    angles = np.array([clip.samples.mean() for clip in clips]) / 100
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_rows_carry_ids_offsets_and_the_corpus_columns() -> None:
    result = embed_shard(items("a.wav", "b.wav"), lambda item: windows(2), encode, SETTINGS)
    rows = result.tables.embeddings.to_pylist()
    assert [(row["uri"], row["start_s"], row["end_s"], row["label"]) for row in rows] == [
        ("a.wav", 0.0, 1.0, "a"),
        ("a.wav", 1.0, 2.0, "a"),
        ("b.wav", 0.0, 1.0, "b"),
        ("b.wav", 1.0, 2.0, "b"),
    ]
    assert [row["id"] for row in rows] == [clip_id(row["uri"], row["start_s"], 1.0) for row in rows]
    assert set(result.tables.embeddings.column_names) == {"id", "uri", "start_s", "end_s", "embedding", "label"}
    assert result.audio_s == 4.0 and result.tables.failures.num_rows == 0


def test_a_file_that_breaks_half_way_leaves_a_reason_and_no_rows() -> None:
    def decode(item: Item) -> Iterator[Clip]:
        yield from windows(2)
        if item["uri"] == "b.wav":
            raise ItemError("decode", "CorruptAudio", "lost sync")

    result = embed_shard(items("a.wav", "b.wav", "c.wav"), decode, encode, SETTINGS)
    assert result.tables.embeddings["uri"].to_pylist() == ["a.wav", "a.wav", "c.wav", "c.wav"]
    failure = result.tables.failures.to_pylist()
    assert failure == [
        {
            "uri": "b.wav",
            "start_s": 0.0,
            "end_s": None,
            "stage": "decode",
            "error_class": "CorruptAudio",
            "message": "lost sync",
            "kind": "failed",
        }
    ]


def test_a_half_read_file_is_dropped_even_after_some_of_it_was_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder, "BUFFER_SAMPLES", 150)  # encode after every second window

    def decode(item: Item) -> Iterator[Clip]:
        yield from windows(5)
        if item["uri"] == "b.wav":
            raise ItemError("decode", "CorruptAudio", "lost sync")

    streamed = embed_shard(items("a.wav", "b.wav", "c.wav"), decode, encode, SETTINGS)
    monkeypatch.setattr(embedder, "BUFFER_SAMPLES", 10**9)
    at_once = embed_shard(items("a.wav", "b.wav", "c.wav"), decode, encode, SETTINGS)
    assert streamed.tables.embeddings.equals(at_once.tables.embeddings)
    assert streamed.tables.embeddings.num_rows == 10


@pytest.mark.parametrize(("broken_reads", "expected_rows"), [(2, 3), (3, 0)])
def test_a_read_that_fails_for_a_passing_reason_is_tried_again(broken_reads: int, expected_rows: int) -> None:
    reads = []

    def decode(item: Item) -> Iterator[Clip]:
        reads.append(item["uri"])
        yield from windows(2)
        if len(reads) <= broken_reads:
            raise ItemError("read", "ReadFailed", "503 Slow Down", passing=True)
        yield from [Clip(2.0, 3.0, np.ones(100, np.float32))]

    result = embed_shard(items("a.wav"), decode, encode, SETTINGS)
    assert result.tables.embeddings.num_rows == expected_rows and len(reads) == 3
    if not expected_rows:
        assert result.tables.failures["message"].to_pylist() == ["503 Slow Down (tried 3 times)"]


def test_no_samples_and_no_numbers_are_failures_too() -> None:
    def decode(item: Item) -> Iterator[Clip]:
        return iter(()) if item["uri"] == "empty.wav" else windows(1, np.nan if item["uri"] == "nan.wav" else 1.0)

    result = embed_shard(items("a.wav", "empty.wav", "nan.wav"), decode, encode, SETTINGS)
    assert result.tables.embeddings["uri"].to_pylist() == ["a.wav"]
    assert sorted(result.tables.failures["error_class"].to_pylist()) == ["EmptyAudio", "NonFiniteEmbedding"]


def pieces(item: Item) -> Iterator[Clip | Silent | Damage]:
    """a: a silent window and a lost span between two windows; b: silence alone; c: both, then it fails; d: damage."""
    if item["uri"] == "d.wav":
        yield Damage(0.0, None, "decode", "CorruptAudio", "lost sync")
        return
    yield Silent(5.0, 6.0, "digital silence", float("-inf"))
    if item["uri"] == "b.wav":
        return
    yield from windows(1)
    yield Damage(1.0, 1.5, "decode", "CorruptAudio", "lost sync")
    if item["uri"] == "c.wav":
        raise ItemError("decode", "CorruptAudio", "no end")
    yield Clip(2.0, 3.0, np.ones(100, np.float32))


def check_pieces(tables: ShardTables) -> None:
    assert tables.counts == {"rows": 2, "failed": 3, "damaged": 1, "silent": 2}
    assert tables.embeddings["uri"].to_pylist() == ["a.wav", "a.wav"]
    failures = [(row["uri"], row["kind"], row["error_class"], row["end_s"]) for row in tables.failures.to_pylist()]
    assert failures == [
        ("b.wav", "failed", "SilentAudio", None),
        ("c.wav", "failed", "CorruptAudio", None),
        ("d.wav", "failed", "CorruptAudio", None),
        ("a.wav", "damaged", "CorruptAudio", 1.5),
    ]
    silent = {"start_s": 5.0, "end_s": 6.0, "reason": "digital silence", "peak_db": float("-inf")}
    assert tables.silent.to_pylist() == [{"uri": "a.wav", **silent}, {"uri": "b.wav", **silent}]


def test_silent_windows_and_damaged_spans_are_rows_of_their_own() -> None:
    files = items("a.wav", "b.wav", "c.wav", "d.wav")
    check_pieces(embed_shard(files, pieces, encode, SETTINGS).tables)


def test_silent_windows_and_damaged_spans_cross_between_processes() -> None:
    files = items("a.wav", "b.wav", "c.wav", "d.wav")
    payload = Payload(began=0.0)
    for number, item in enumerate(files.to_pylist()):
        payload.decode(number, item, pieces)
    arrived = Payload.unpack(payload.pack())
    replay = partial(arrived.replay, otherwise=lambda item: pytest.fail("nothing is decoded again"))
    check_pieces(embed_shard(files, replay, lambda clips: encode(clips), SETTINGS).tables)


def test_one_vector_per_file_is_the_normalised_mean_of_its_windows() -> None:
    own = SETTINGS.model_copy(update={"mode": "file"})
    result = embed_shard(items("a.wav", "b.wav"), lambda item: windows(3 if item["uri"] == "a.wav" else 1), encode, own)
    rows = result.tables.embeddings.to_pylist()
    assert [(row["uri"], row["start_s"], row["end_s"]) for row in rows] == [("a.wav", 0.0, 3.0), ("b.wav", 0.0, 1.0)]
    assert [row["id"] for row in rows] == [clip_id("a.wav", 0, 0), clip_id("b.wav", 0, 0)]
    mean = encode(list(windows(3))).mean(axis=0)
    np.testing.assert_allclose(rows[0]["embedding"], mean / np.linalg.norm(mean), atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=200), st.integers(1, 64))
def test_batches_hold_everything_once_with_less_than_five_percent_padding(lengths: list[int], batch_size: int) -> None:
    batches = batches_by_length(lengths, batch_size)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[position] for position in batch)
        assert len(batch) <= batch_size
        assert sum(lengths[position] for position in batch) >= 0.95 * longest * len(batch)


def test_equal_lengths_fill_whole_batches() -> None:
    assert [len(batch) for batch in batches_by_length([5] * 70, 32)] == [32, 32, 6]


@pytest.fixture(scope="module")
def encoder() -> AudioEncoder:
    return AudioEncoder.from_config(EncoderConfig(backbone=AudioMAEConfig.model_validate({"size": "debug"})))


def test_vectors_do_not_depend_on_the_batch_and_order_is_kept(encoder: AudioEncoder) -> None:
    rng = np.random.default_rng(0)
    clips = [
        Clip(0, 0, (rng.standard_normal(length) * 0.1).astype(np.float32))
        for length in (100, 16_000, 80_000, 79_000, 16_000, 33_333, 1_600, 80_000)
    ]
    together = BatchEncoder(encoder, 32)(clips)
    alone = np.concatenate([BatchEncoder(encoder, 1)([clip]) for clip in clips])
    assert (1 - (together * alone).sum(axis=1)).max() < 1e-5
    reverse = BatchEncoder(encoder, 3)(clips[::-1])[::-1]
    assert (1 - (together * reverse).sum(axis=1)).max() < 1e-5
    np.testing.assert_allclose(together, encoder.embed([clip.samples for clip in clips]), atol=1e-5)


def test_a_batch_that_the_device_has_no_memory_for_is_cut(
    encoder: AudioEncoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [Clip(0, 0, np.full(length, 0.1, np.float32)) for length in (16_000, *[8_000] * 12)]
    expected, tried, room = BatchEncoder(encoder, 32)(clips), [], 4
    encode, forward = BatchEncoder(encoder, 32), encoder.forward

    def on_a_small_device(waveforms: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        tried.append(len(waveforms))
        if len(waveforms) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(waveforms, lengths)

    monkeypatch.setattr(encoder, "forward", on_a_small_device)
    np.testing.assert_allclose(encode(clips), expected, atol=1e-5)
    assert "at once do not fit" in capsys.readouterr().out and encode.batch_size <= room
    tried.clear()
    np.testing.assert_allclose(encode(clips), expected, atol=1e-5)
    assert max(tried) <= room  # it remembers
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        encode(clips)


def test_a_shard_of_real_files_counts_its_padding(encoder: AudioEncoder) -> None:
    encode_batches = BatchEncoder(encoder, 8)
    lengths = np.linspace(10_000, 80_000, 40).astype(int)
    encode_batches([Clip(0, 0, np.ones(length, np.float32)) for length in lengths])
    assert encode_batches.samples == lengths.sum()
    assert encode_batches.samples / encode_batches.padded_samples > 0.95


def test_the_embedding_column_keeps_every_vector(tmp_path: Path) -> None:
    result = embed_shard(items("a.wav"), lambda item: windows(40), encode, SETTINGS)
    np.testing.assert_array_equal(column_to_vectors(result.tables.embeddings["embedding"]), encode(list(windows(40))))
