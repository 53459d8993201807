"""Windows without signal become rows of `silent/`, by a rule that is stated, and nothing of them is lost."""

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from audiomae.artifacts.tables import EmbedSettings
from audiomae.corpus.decode import decode
from audiomae.embedding.decoding import decode_item
from audiomae.embedding.embedder import embed_shard
from audiomae.embedding.payload import Payload
from audiomae.embedding.pieces import Clip, Silent
from audiomae.embedding.silence import hush, peak_db

RATE = 8000
KEEP = EmbedSettings(fingerprint="f" * 64, dim=2, sample_rate=RATE, mode="windows", window_s=1, hop_s=1)
SKIP = KEEP.model_copy(update={"silence": "skip", "last_window": "whole"})


def recording(path: Path, *peaks_db: float) -> str:
    """A wav of one second at each of these peaks (dBFS); -inf is digital zero."""
    time = np.arange(RATE) / RATE
    parts = [10 ** (peak / 20) * np.sin(2 * np.pi * 500 * time) for peak in peaks_db]
    soundfile.write(path, np.concatenate(parts), RATE, subtype="FLOAT")
    return path.name


def items(*uris: str, **columns: list[float | None]) -> pa.Table:
    return pa.table({"uri": list(uris), "size": [1] * len(uris), "content_id": ["x"] * len(uris), **columns})


def loudness(clips) -> np.ndarray:
    """Stands for an encoder: a unit vector that tells how loud the window is."""
    peaks = [float(np.abs(clip.samples).max()) for clip in clips]
    return np.array([[np.cos(peak), np.sin(peak)] for peak in peaks], np.float32)


def embedded(folder: Path, table: pa.Table, settings: EmbedSettings):
    return embed_shard(table, partial(decode_item, root=str(folder), settings=settings), loudness, settings).tables


QUIET_ZERO = -np.inf


def test_absolute_and_relative_limits_in_any_order(tmp_path: Path) -> None:
    table = items(
        recording(tmp_path / "a.wav", -1, -45, QUIET_ZERO, -52, -61),
        recording(tmp_path / "b.wav", QUIET_ZERO, -58, -52, -1),  # the loudest comes last
        recording(tmp_path / "c.wav", -30, -58, -61),  # a quiet recording: 28 dB below its loudest is not silent
    )
    found = embedded(tmp_path, table, SKIP)
    rows = list(zip(found.embeddings["uri"].to_pylist(), found.embeddings["start_s"].to_pylist(), strict=True))
    assert rows == [("a.wav", 0), ("a.wav", 1), ("b.wav", 3), ("c.wav", 0), ("c.wav", 1)]
    silent = found.silent.to_pylist()
    assert {(row["uri"], row["start_s"]) for row in silent} == {
        *(("a.wav", start) for start in (2, 3, 4)),
        *(("b.wav", start) for start in (0, 1, 2)),
        ("c.wav", 2),
    }
    by_place = {(row["uri"], row["start_s"]): row for row in silent}
    assert by_place["a.wav", 2]["peak_db"] == -200 and "below -60 dBFS" in by_place["a.wav", 2]["reason"]
    assert "50 dB below the loudest window of its file" in by_place["b.wav", 1]["reason"]
    assert by_place["b.wav", 1]["peak_db"] == pytest.approx(-58, abs=0.05)
    assert found.failures.num_rows == 0


def test_keep_embeds_every_window(tmp_path: Path) -> None:
    found = embedded(tmp_path, items(recording(tmp_path / "a.wav", QUIET_ZERO, -1)), KEEP)
    assert found.embeddings.num_rows == 2 and found.silent.num_rows == 0


def test_a_silent_file_is_a_failure_with_its_windows_listed_and_a_silent_segment_is_not(tmp_path: Path) -> None:
    names = [recording(tmp_path / "a.wav", QUIET_ZERO, -75), recording(tmp_path / "b.wav", -1)]
    found = embedded(tmp_path, items(*names), SKIP)
    assert found.embeddings["uri"].to_pylist() == ["b.wav"]
    (failure,) = found.failures.to_pylist()
    assert (failure["uri"], failure["error_class"], failure["kind"]) == ("a.wav", "SilentAudio", "failed")
    assert found.silent["uri"].to_pylist() == ["a.wav", "a.wav"]
    long = recording(tmp_path / "long.wav", -1, -1, QUIET_ZERO, QUIET_ZERO)
    halves = items(long, long, segment_start_s=[0.0, 2.0], segment_end_s=[2.0, None])
    found = embedded(tmp_path, halves, SKIP)
    assert (found.embeddings.num_rows, found.silent.num_rows, found.failures.num_rows) == (2, 2, 0)


def test_the_vector_of_a_file_is_the_mean_of_what_can_be_heard_and_spans_all_of_it(tmp_path: Path) -> None:
    table = items(recording(tmp_path / "a.wav", QUIET_ZERO, -1, -80))
    per_file = SKIP.model_copy(update={"mode": "file"})
    (row,) = embedded(tmp_path, table, per_file).embeddings.to_pylist()
    (heard,) = embedded(tmp_path, table, SKIP).embeddings.to_pylist()
    assert row["embedding"] == pytest.approx(heard["embedding"]) and (row["start_s"], row["end_s"]) == (0, 3)
    (kept,) = embedded(tmp_path, table, per_file.model_copy(update={"silence": "keep"})).embeddings.to_pylist()
    assert row["id"] == kept["id"], "the id of a file does not depend on what is silent in it"


def test_windows_that_crossed_processes_are_judged_alike(tmp_path: Path) -> None:
    table = items(recording(tmp_path / "a.wav", -55, QUIET_ZERO, -1, -45))
    decode = partial(decode_item, root=str(tmp_path), settings=SKIP)
    payload = Payload(began=0.0)
    for number, item in enumerate(table.to_pylist()):
        payload.decode(number, item, decode)
    replayed = Payload.unpack(payload.pack())
    found = embed_shard(table, partial(replayed.replay, otherwise=decode), loudness, SKIP).tables
    here = embed_shard(table, decode, loudness, SKIP).tables
    assert found.embeddings["start_s"].to_pylist() == here.embeddings["start_s"].to_pylist() == [2, 3]
    assert sorted(found.silent["start_s"].to_pylist()) == sorted(here.silent["start_s"].to_pylist()) == [0, 1]


def test_peaks_of_nothing_and_of_one_sided_signals() -> None:
    assert peak_db(np.zeros(0, np.float32)) == peak_db(np.zeros(9, np.float32)) == -200
    assert peak_db(np.array([0, -0.5, 0.1], np.float32)) == pytest.approx(-6.02)
    assert peak_db(np.array([1e-30], np.float32)) == -200


def test_only_what_was_let_through_is_taken_back() -> None:
    quiet, loud = np.full(4, 10**-2.9, np.float32), np.ones(4, np.float32)  # -58 dBFS and 0
    pieces = list(hush(iter([Clip(0, 1, quiet), Clip(1, 2, loud), Clip(2, 3, quiet)]), SKIP))
    assert [(type(piece), piece.start_s) for piece in pieces] == [(Clip, 0), (Clip, 1), (Silent, 2), (Silent, 0)]


def test_the_barks_of_a_real_corpus_no_longer_find_silence(esc10: Path) -> None:
    """The query that a newcomer tried: a bark of half a second in five, cut into windows, among others like it."""
    uris = [str(path.relative_to(esc10)) for path in sorted(esc10.glob("dog_bark/*.ogg"))[:12]]
    windows = {"window_s": 1.0, "hop_s": 1.0, "sample_rate": 16_000}
    kept = embedded(esc10, items(*uris), KEEP.model_copy(update=windows))
    heard = embedded(esc10, items(*uris), SKIP.model_copy(update=windows))
    assert kept.embeddings.num_rows == 60 == heard.embeddings.num_rows + heard.silent.num_rows
    assert heard.silent.num_rows >= 10 and set(heard.embeddings["uri"].to_pylist()) == set(uris)
    rows = heard.embeddings.select(["uri", "start_s", "end_s"]).to_pylist()
    peaks = [peak_db(decode(esc10 / row["uri"], 16_000, row["start_s"], row["end_s"] - row["start_s"])) for row in rows]
    assert min(peaks) >= -60
