"""The embedding job on a real Ray cluster: every file embedded or failed with a reason, whatever the layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from audiomae.artifacts.embeddings import EmbeddingSet, column_to_vectors
from audiomae.corpus.synthetic import generate
from audiomae.embedding import plan as planning
from audiomae.errors import ConfigError, UserError
from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.encoder import AudioEncoder, EncoderConfig
from audiomae.storage import read_json
from ray_jobs.embed_corpus import main

Run = Callable[..., int]
BAD = 3  # empty, text, silent
DAMAGED = 3  # truncated twice, NaN: the rest of them is embedded
GOOD = 30 + DAMAGED


def debug_encoder(directory: Path, seed: int = 0) -> Path:
    config = EncoderConfig(backbone=AudioMAEConfig.model_validate({"size": "debug"}))
    AudioEncoder.from_config(config, seed=seed).save(directory)
    return directory


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return debug_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("corpus"), num_clips=30)


@pytest.fixture(scope="module")
def run(encoder: Path, ray_cluster: None) -> Run:
    def run_job(corpus: Path, out: Path, *flags: str) -> int:
        return main(["--encoder", str(encoder), "--corpus", str(corpus), "--out", str(out), "--workers", "1", *flags])

    return run_job


@pytest.fixture(scope="module")
def embedded(run: Run, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus embedded by windows in several shards."""
    out = tmp_path_factory.mktemp("embedded")
    assert run(corpus, out, "--window-s", "2", "--hop-s", "2", "--shard-minutes", "0.5") == 0
    return out


def failed(embeddings: EmbeddingSet) -> pa.Table:
    """The failure rows of inputs that gave no embedding."""
    failures = embeddings.failures()
    return failures.filter(pc.equal(failures["kind"], "failed"))


def by_id(out: Path) -> pa.Table:
    return EmbeddingSet.open(out).read().sort_by("id")


def assert_equal_embeddings(one: pa.Table, other: pa.Table) -> None:
    assert one.drop(["embedding"]).equals(other.drop(["embedding"]))
    vectors = [column_to_vectors(table["embedding"]) for table in (one, other)]
    assert (1 - (vectors[0] * vectors[1]).sum(axis=1)).max() < 1e-5


def test_every_file_is_embedded_or_failed_with_a_reason(embedded: Path, corpus: Path) -> None:
    embeddings = EmbeddingSet.open(embedded)
    table, failures = embeddings.read(), failed(embeddings)
    assert len(embeddings.shards) > 3 and embeddings.complete
    assert embeddings.precision == embeddings.run["precision"] == "float32"
    listed = {
        str(path.relative_to(corpus)) for path in corpus.rglob("*") if path.is_file() and path.name != "listing.csv"
    }
    assert set(table["uri"].to_pylist()) | set(failures["uri"].to_pylist()) == listed
    assert not set(table["uri"].to_pylist()) & set(failures["uri"].to_pylist())
    assert (len(set(table["uri"].to_pylist())), failures.num_rows) == (GOOD, BAD)
    damaged = embeddings.failures().filter(pc.equal(embeddings.failures()["kind"], "damaged"))
    assert set(damaged["uri"].to_pylist()) == {"bad_nan.wav", "bad_truncated.flac", "bad_truncated.wav"}
    assert embeddings.silent()["uri"].to_pylist() == ["silence.wav"]
    assert all(failures["stage"].to_pylist()) and all(failures["error_class"].to_pylist())
    assert len(set(table["id"].to_pylist())) == table.num_rows
    assert table.schema.names == ["id", "uri", "start_s", "end_s", "embedding", "label"]
    run_json = read_json(embedded / "run.json")
    assert (run_json["status"], run_json["inputs"], run_json["embedded"], run_json["failed"]) == (
        "complete",
        GOOD + BAD,
        GOOD,
        BAD,
    )
    assert not list(embedded.rglob("*.tmp"))


def test_embeddings_are_what_the_encoder_gives(embedded: Path, corpus: Path, encoder: Path) -> None:
    from audiomae.corpus.decode import decode

    model = AudioEncoder.load(encoder)
    rows = [row for row in by_id(embedded).to_pylist() if row["uri"].endswith((".wav", ".ogg"))][:6]
    clips = [decode(corpus / row["uri"], 16_000, row["start_s"], row["end_s"] - row["start_s"]) for row in rows]
    expected = model.embed(clips)
    got = np.array([row["embedding"] for row in rows], np.float32)
    assert (1 - (got * expected).sum(axis=1)).max() < 1e-5


def test_relaunching_does_nothing_but_say_so(
    run: Run, corpus: Path, embedded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in embedded.rglob("*.parquet")}
    assert run(corpus, embedded, "--window-s", "2", "--hop-s", "2") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in embedded.rglob("*.parquet")} == before


def test_another_window_encoder_or_corpus_is_refused(run: Run, corpus: Path, embedded: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"window_s is 3\.0, it was 2\.0.*another --out"):
        run(corpus, embedded, "--window-s", "3")
    with pytest.raises(UserError, match=r"computed in float32, --dtype asks for bfloat16: .*--allow-precision-change"):
        run(corpus, embedded, "--window-s", "2", "--dtype", "bfloat16")
    assert run(corpus, embedded, "--window-s", "2", "--dtype", "bfloat16", "--allow-precision-change") == 0
    other = debug_encoder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="fingerprint is"):
        run(corpus, embedded, "--window-s", "2", "--encoder", str(other))
    smaller = tmp_path / "smaller"
    shutil.copytree(corpus, smaller, copy_function=shutil.copy2)
    with pytest.raises(UserError, match=r"its root is .*--update"):
        run(smaller, embedded, "--window-s", "2")
    (smaller / "silence.wav").unlink()
    with pytest.raises(UserError, match=r"1 vanished \(e\.g\. silence\.wav\).*--update"):
        run(smaller, embedded, "--window-s", "2")


def test_split_and_fused_layouts_agree(run: Run, corpus: Path, embedded: Path, tmp_path: Path) -> None:
    flags = ["--window-s", "2", "--topology", "split", "--shard-minutes", "1"]
    assert run(corpus, tmp_path / "split", *flags) == 0
    assert_equal_embeddings(by_id(embedded), by_id(tmp_path / "split"))
    failures = [EmbeddingSet.open(out).failures().sort_by("uri") for out in (embedded, tmp_path / "split")]
    assert failures[0].equals(failures[1])


def test_updates_and_retries(run: Run, corpus: Path, tmp_path: Path) -> None:
    """Failed files repaired, a file replaced, one added, one gone, in one folder's life."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(corpus, source, copy_function=shutil.copy2)
    assert run(source, out, "--per-file", "--shard-minutes", "0.5") == 0
    first = by_id(out)
    assert first.num_rows == GOOD and set(first["start_s"].to_pylist()) == {0.0}

    files = sorted(path for path in source.glob("*/*") if path.suffix == ".wav")
    shutil.copy(files[0], source / "bad_empty.wav")
    files[1].unlink()
    shutil.copy(files[0], files[2])
    shutil.copy(files[0], source / "new.wav")
    changed = {str(path.relative_to(source)) for path in (files[2], source / "new.wav", source / "bad_empty.wav")}
    assert run(source, out, "--per-file", "--update") == 0
    second = by_id(out)
    assert second.num_rows == GOOD + 1
    assert read_json(out / "run.json")["last_run"]["inputs"] == len(changed)
    kept = [uri not in changed for uri in second["uri"].to_pylist()]
    gone = str(files[1].relative_to(source))
    old = first.filter(pa.array([uri not in {gone, *changed} for uri in first["uri"].to_pylist()]))
    assert second.filter(pa.array(kept)).equals(old)  # copied, bit by bit
    assert EmbeddingSet.open(out).vanished()["uri"].to_pylist() == [gone]

    assert run(source, out, "--per-file", "--retry-failed") == 0
    assert read_json(out / "run.json")["last_run"]["inputs"] == BAD - 1
    assert by_id(out).equals(second) and failed(EmbeddingSet.open(out)).num_rows == BAD - 1


def test_long_files_are_segmented_without_a_trace(
    run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    longest = sorted((path for path in corpus.glob("*/*")), key=lambda path: path.stat().st_size)[-3:]
    for path in longest:
        shutil.copy2(path, source)
    flags = ["--window-s", "1", "--hop-s", "0.5"]
    assert run(source, tmp_path / "whole", *flags) == 0
    monkeypatch.setattr(planning, "PROBE_ABOVE_BYTES", 0)
    monkeypatch.setattr(planning, "SEGMENT_S", 1.0)
    assert run(source, tmp_path / "cut", *flags, "--shard-minutes", "0.05") == 0
    assert read_json(tmp_path / "cut" / "run.json")["inputs"] > 2 * len(longest)
    assert_equal_embeddings(by_id(tmp_path / "whole"), by_id(tmp_path / "cut"))


def test_too_many_failures_fail_the_job(run: Run, tmp_path: Path, corpus: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in (corpus / "bad_text.wav", corpus / "bad_empty.wav", next(corpus.glob("bell/*"))):
        shutil.copy(path, source / f"{path.parent.name}_{path.name}")
    with pytest.raises(UserError, match=r"66\.7% of the files failed"):
        run(source, tmp_path / "out")
    assert run(source, tmp_path / "out", "--max-failure-rate", "0.7") == 0
    next(source.glob("bell_*")).unlink()
    with pytest.raises(UserError, match="no file of the corpus could be decoded"):
        run(source, tmp_path / "out", "--update", "--max-failure-rate", "1")


def test_bad_usage_says_what_to_do(tmp_path: Path, encoder: Path) -> None:
    with pytest.raises(ConfigError, match="window"):
        main(["--encoder", str(encoder), "--corpus", str(tmp_path), "--out", "o", "--set", "windows=3"])
    with pytest.raises(ConfigError, match="out"):
        main(["--encoder", str(encoder), "--corpus", str(tmp_path)])
    with pytest.raises(UserError, match="--encoder"):
        main(["--encoder", str(tmp_path / "none"), "--corpus", str(tmp_path), "--out", str(tmp_path / "o")])
    with pytest.raises(UserError, match="empty"):
        main(["--encoder", str(encoder), "--corpus", str(tmp_path), "--out", str(tmp_path / "o")])


def test_a_dry_run_predicts_and_writes_nothing(
    encoder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["--encoder", str(encoder), "--corpus", str(corpus), "--out", str(out), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"{GOOD + BAD} files") and any(line.startswith("predicted: ") for line in lines)
    printed = dict(line.split(": ") for line in lines[lines.index(f"files: {GOOD + BAD}") :])
    assert {"audio_hours", "hours", "disk_gib", "memory_gib_per_worker"} <= set(printed)
    assert 0.3 < float(printed["audio_hours"]) * 3600 / 100 < 3 and float(printed["cpu_hours"]) > 0
    assert not out.exists()


def test_a_check_reports_as_text_and_json_and_embeds_nothing(
    encoder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--encoder", str(encoder), "--corpus", str(corpus), "--out", str(out)]
    assert main([*arguments, "--check", "--types", "label=text"]) == 0
    report = json.loads((out / "check.json").read_bytes())
    assert report["files"] == GOOD + BAD and report["failed"]["files"] + report["damaged"]["files"] >= BAD - 1
    assert [path.name for path in out.iterdir()] == ["check.json"]
    assert f"failed: {report['failed']['files']}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no column 'lable'"):
        main([*arguments, "--check", "--types", "lable=text"])
