"""The report on a corpus before it is embedded: what it counts, what it hears, what it predicts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from audiomae.artifacts.tables import EmbedSettings
from audiomae.corpus.manifest import list_corpus
from audiomae.embedding.listing import Listing
from audiomae.embedding.preflight import as_text, check, sample_rows, suffixes_of
from tests.audio_files import FFMPEG_CASES, encode, signal
from tests.unit.corpus.test_tars import pack

RATE = 16_000
SETTINGS = EmbedSettings(fingerprint="f" * 64, dim=4, sample_rate=RATE, mode="windows", window_s=2, hop_s=1)
TONE = np.sin(2 * np.pi * 440 * np.arange(4 * RATE) / RATE).astype(np.float32)


def report_of(src: object, sample_files: int | None = None) -> dict[str, Any]:
    corpus = list_corpus(str(src))
    report = check(corpus.root, Listing(corpus.batches()).table(), SETTINGS, corpus.notes, sample_files)
    assert json.loads(json.dumps(report)) == report and all(isinstance(line, str) for line in as_text(report))
    return report


def test_sounds_that_are_remarkable(tmp_path: Path) -> None:
    sounds = {
        "full_scale.wav": TONE,
        "slow.wav": np.sin(2 * np.pi * 20 * np.arange(4 * RATE) / RATE).astype(np.float32),
        "loud_noise.wav": np.random.default_rng(0).uniform(-0.99, 0.99, 4 * RATE).astype(np.float32),
        "silent_zeros.wav": np.zeros(4 * RATE, np.float32),
        "silent_hiss.wav": TONE * 1e-4,
        "clipped.wav": np.clip(TONE * 1.5, -1, 1),
        "clipped_peaks.flac": np.clip(TONE * 1.1, -1, 1),
        "cancelling.wav": np.stack([TONE, -TONE], 1) / 2,
        "cancelling_half.flac": np.stack([TONE, -0.6 * TONE], 1) / 2,
        "wide.wav": np.random.default_rng(1).uniform(-0.5, 0.5, (4 * RATE, 2)).astype(np.float32),
        "one_side.wav": np.stack([TONE, 0 * TONE], 1) / 2,
    }
    for name, samples in sounds.items():
        soundfile.write(tmp_path / name, samples, RATE)
    encode(tmp_path / "stereo.m4a", "aac", RATE, np.float32(TONE / 4), "stereo")
    (tmp_path / "failed.wav").write_bytes(b"nothing like it")
    (tmp_path / "failed_empty.ogg").touch()
    report = report_of(tmp_path)
    for kind in ("silent", "clipped", "cancelling", "failed"):
        named = {example.partition(": ")[0] for example in report[kind]["examples"]}
        assert named == {name for name in [*sounds, "failed.wav", "failed_empty.ogg"] if name.startswith(kind)}, kind
        assert report[kind]["files"] == report[kind]["estimated"] == len(named)
    assert report["files"] == 14 and report["formats"]["wav"]["files"] == 10
    assert report["decoded"]["channels"] == {"1": 7, "2": 5} and report["decoded"]["sample_rates"] == {str(RATE): 12}
    assert report["sample"]["whole"] and report["predicted"]["rows"] == 12 * 3
    assert report["predicted"]["audio_hours"] == pytest.approx(12 * 4 / 3600, rel=0.02)


def test_damaged_files(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "cut.flac", TONE, RATE)
    data = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    soundfile.write(tmp_path / "whole.flac", TONE, RATE)
    report = report_of(tmp_path)
    assert [example.partition(":")[0] for example in report["damaged"]["examples"]] == ["cut.flac"]
    assert report["failed"]["files"] == 0


@pytest.mark.parametrize("name", ["m4a", "webm", "wma", "3gp"])
def test_channels_of_what_only_ffmpeg_reads(tmp_path: Path, name: str) -> None:
    codec, rate, _, container, bit_rate, options = FFMPEG_CASES[name]
    encode(tmp_path / f"a.{name}", codec, rate, signal(rate, 3) * 0, "mono", container, bit_rate, options)
    report = report_of(tmp_path)
    assert report["silent"]["files"] == 1 and report["decoded"]["sample_rates"] == {str(rate): 1}


def test_labels_sidecars_and_duplicates(tmp_path: Path) -> None:
    def wav(seed: int) -> bytes:
        path = tmp_path / "one.wav"
        soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, 3200), RATE)
        data = path.read_bytes()
        path.unlink()
        return data

    names = [(f"{number}.wav", wav(number % 4)) for number in range(5)]
    labels = [
        (f"{number}.json", json.dumps({"label": label, "site": "A" if number else "a"}).encode())
        for number, label in enumerate(["Dog", "dog", "cat", "cats"])
    ]
    pack(tmp_path / "a.tar", *names, *labels, ("lost.cls", b"x"))
    report = report_of(tmp_path / "a.tar")
    assert report["unpaired_sidecars"] == {"files": 1, "examples": ["a.tar#lost.cls"]}
    assert report["labels"]["look_alike"] == {"label": [["'Dog'", "'dog'"]], "site": [["'A'", "'a'"]]}
    assert report["labels"]["classes"] == 4 and report["labels"]["without"] == 1
    same = report["duplicates"]
    assert same["examples"] == [["a.tar#0.wav", "a.tar#4.wav"]] and same["checked"] == {"files": 5, "of": 5}


def test_of_many_files_of_one_size_those_of_a_rare_size_are_read_first(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.wav").write_bytes(b"common" + name.encode())
    for name in ("x.wav", "y.wav"):
        (tmp_path / name).write_bytes(b"rare, and equal")
    (tmp_path / "lone.wav").write_bytes(b"of a size of its own")
    same = report_of(tmp_path, sample_files=4)["duplicates"]
    assert same["examples"] == [["x.wav", "y.wav"]] and same["checked"] == {"files": 4, "of": 8}


def test_duplicates_in_a_store_are_told_by_their_etags(s3_bucket: str, tmp_path: Path) -> None:
    from audiomae.storage import to_path, write_bytes

    soundfile.write(tmp_path / "a.wav", TONE[:3200], RATE)
    data = (tmp_path / "a.wav").read_bytes()
    for name in ("a.wav", "d/b.wav"):
        write_bytes(to_path(s3_bucket) / name, data)
    write_bytes(to_path(s3_bucket) / "c.wav", data + b"\0\0")
    report = report_of(s3_bucket)
    assert report["duplicates"]["examples"] == [["a.wav", "d/b.wav"]] and report["duplicates"]["checked"] is None


def test_a_sample_has_every_format_and_predicts_the_whole(tmp_path: Path) -> None:
    for number in range(40):
        soundfile.write(tmp_path / f"{number:02d}.wav", TONE[: RATE * (1 + number % 4)], RATE)
    soundfile.write(tmp_path / "rare.ogg", TONE, RATE)
    whole, some = report_of(tmp_path), report_of(tmp_path, sample_files=12)
    assert some["sample"] == {"files": 12, "whole": False, "seconds_of_each": 60.0}
    assert whole["predicted"]["rows"] == 10 * (1 + 1 + 2 + 3) + 3
    assert some["predicted"]["audio_hours"] == pytest.approx(whole["predicted"]["audio_hours"], rel=0.02)
    assert some["predicted"]["rows"] == pytest.approx(whole["predicted"]["rows"], rel=0.3)


def test_suffixes_and_sample_rows() -> None:
    uris = pa.chunked_array([["a.WAV", "b", "d.x/c", "e.tar.ogg", "é.flac", "g.", ".h"] + ["z.mp3"] * 100])
    suffixes = suffixes_of(uris)
    assert suffixes.to_pylist()[:7] == ["wav", "", "", "ogg", "flac", "", "h"]
    rows = sample_rows(suffixes, 20)
    assert len(rows) == 20 and set(range(7)) <= set(rows.tolist())
