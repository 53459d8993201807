"""The whole line as one command, on real audio with bad files among it."""

from pathlib import Path

import pytest

from audiomae import AudioEncoder, AudioIndex
from audiomae.artifacts.embeddings import EmbeddingSet
from audiomae.errors import ConfigError
from audiomae.storage import read_json
from ray_jobs import pipeline

RECIPE = Path(pipeline.__file__).parent / "recipes" / "debug.yaml"
BAD = {"empty.ogg": b"", "cut.ogg": b"OggS" + bytes(500), "text.wav": b"no sound here\n" * 40}


def write_listing(esc10: Path, folder: Path, every: int) -> Path:
    """Real clips, labels from their folders and folds from their names, and files that are no audio."""
    rows = [f"{path},{path.parent.name},{path.name[0]}" for path in sorted(esc10.rglob("*.ogg"))[::every]]
    for number, (name, data) in enumerate(BAD.items()):
        (folder / name).write_bytes(data)
        rows.insert(10 * number, f"{folder / name},rain,{number + 1}")
    path = folder / "listing.csv"
    path.write_text("\n".join(["uri,label,fold", *rows]))
    return path


@pytest.mark.parametrize(("every", "clips"), [(8, 50), pytest.param(1, 400, marks=pytest.mark.slow)])
def test_real_audio_from_files_to_answers(
    every: int, clips: int, esc10: Path, tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    listing, out = write_listing(esc10, tmp_path, every), tmp_path / "out"
    line = ["--config", str(RECIPE), "--set", "epochs=1", "--set", "workers.num=1", "--set", "embed.per_file=true"]
    line += ["--corpus", str(listing), "--out", str(out), "--group", "fold"]
    assert pipeline.main(line) == 0
    embeddings = EmbeddingSet.open(out / "embeddings")
    run = read_json(out / "embeddings" / "run.json")
    assert (run["inputs"], run["embedded"], run["failed"]) == (clips + len(BAD), clips, len(BAD))
    table = embeddings.read()
    assert table.num_rows == clips and len(set(table["label"].to_pylist())) == 10
    assert {Path(uri).name for uri in embeddings.failures()["uri"].to_pylist()} == set(BAD)
    encoder = AudioEncoder.load(str(out / "train" / "encoder"))
    index = AudioIndex.open(str(out / "index"))
    asked = table["uri"].to_pylist()[:3]
    hits = index.search(encoder.embed(asked), k=1)
    assert [hit[0]["uri"] for hit in hits.items] == asked and hits.scores.min() > 0.99
    metrics = read_json(out / "evaluation" / "metrics.json")
    assert 0.1 < metrics["mAP"] < 1 and set(metrics["per_group"]) == {"1", "2", "3", "4", "5"}
    assert (out / "evaluation" / "report.html").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert f"serve run serve.app:build index={out / 'index'}" in said

    assert pipeline.main(line) == 0
    again = capsys.readouterr().out
    assert (
        f"{clips + 3} of {clips + 3} files are embedded already" in again
        and "already finished" in again
        and "training:" not in again
    )


@pytest.mark.parametrize(
    ("key", "message"),
    [("embed.per_fil=true", "embed.per_file"), ("index.recal=0.9", "index.recall")],
)
def test_a_misspelt_key_of_a_late_stage_is_refused_before_the_first(tmp_path: Path, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline.main(["--config", str(RECIPE), "--corpus", "nowhere", "--out", str(tmp_path / "out"), "--set", key])
    assert not (tmp_path / "out").exists()
