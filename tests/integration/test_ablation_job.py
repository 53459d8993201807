"""The ablation from a listing to its table: trained, reused, continued and classical rows; relaunch; failures."""

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import yaml

from audiomae.artifacts import receipts
from audiomae.errors import ConfigError, UserError
from ray_jobs.ablation import main

RATE = 16000
ROWS = {
    "base": {"parent": None, "technique": "the recipe"},
    "cls": {"method": "reuse", "technique": "cls pooling", "changes": {"encoder": {"pooling": "cls"}}},
    "attention": {
        "method": "continue",
        "technique": "attention pooling",
        "changes": {
            "encoder": {"pooling": "attention"},
            "objective": {"mae": 0, "contrastive": 1},
            "optim": {"freeze_layers": 2},
            "epochs": 1,
        },
    },
    "mfcc": {"parent": None, "method": "mfcc", "technique": "MFCC"},
}


@pytest.fixture
def listing(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for place, label in enumerate(("low", "high")):
        for i in range(8):
            hertz = 300 * 8**place * rng.uniform(0.8, 1.2)
            sound = 0.4 * np.sin(2 * np.pi * hertz * np.arange(RATE) / RATE) + 0.02 * rng.normal(size=RATE)
            sf.write(tmp_path / f"{label}-{i}.wav", sound, RATE)
            rows.append({"uri": f"{label}-{i}.wav", "label": label, "fold": i % 2 + 1})
    (tmp_path / "broken.wav").write_bytes(b"not audio")
    rows.append({"uri": "broken.wav", "label": "low", "fold": 1})
    with (tmp_path / "listing.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["uri", "label", "fold"])
        writer.writeheader()
        writer.writerows(rows)
    return str(tmp_path / "listing.csv")


@pytest.fixture
def arguments(tmp_path, listing):
    def build(rows, *extra):
        folder = tmp_path / "rows"
        folder.mkdir(exist_ok=True)
        for name, row in rows.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump({"section": "All"} | row))
        recipe = str(Path(__file__).resolve().parents[2] / "ray_jobs/recipes/debug.yaml")
        sets = ["--set", "epochs=2", "--set", "batch_size=8", "--set", "precision=float32"]
        return [
            "--corpus",
            listing,
            "--out",
            str(tmp_path / "out"),
            "--rows",
            str(folder),
            "--config",
            recipe,
            *sets,
            *extra,
        ]

    return build


def stamps(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("fold-*.json")}


@pytest.mark.slow
def test_rows_of_every_kind_and_a_relaunch_that_does_only_what_is_missing(arguments, tmp_path, ray_cluster, capsys):
    argv = arguments(ROWS, "--cpus-per-run", "0.5", "--results", str(tmp_path / "docs/results.md"))
    assert main(argv) == 0
    assert "broken.wav" in capsys.readouterr().out
    results = tmp_path / "out/results"
    assert len(stamps(results)) == 4 * 2
    one = receipts.read(results / "cls/fold-1-seed-0.json").facts
    assert len(one["queries"]) == 8 and one["metrics"]["mAP"] == pytest.approx(
        np.mean([query["AP"] for query in one["queries"].values()])
    )
    trained = receipts.read(results / "base/fold-1-seed-0.json").facts["training"]
    assert trained["clips"] == 8 and trained["epoch"] == 2  # the asking fold is not among them
    assert receipts.read(results / "mfcc/fold-2-seed-0.json").facts["metrics"]["mAP"] == 1.0
    text = (tmp_path / "docs/results.md").read_text()
    assert "| cls pooling | the recipe | 2 |" in text and "the recipe, fold by fold" in text

    before = stamps(results)
    assert main([*argv, "--only", "mfcc"]) == 0
    assert "2 done before, 0 to do" in capsys.readouterr().out
    assert (tmp_path / "docs/results.md").read_text() == text  # what was measured before stays in the table
    assert main(argv) == 0
    assert "8 done before, 0 to do" in capsys.readouterr().out
    (results / "attention/fold-2-seed-0.json").unlink()
    assert main(argv) == 0
    assert "7 done before, 1 to do" in capsys.readouterr().out
    after = stamps(results)
    assert [name for name in before if after[name] != before[name]] == ["attention/fold-2-seed-0.json"]


def test_a_failing_row_is_reported_and_the_others_go_on(arguments, tmp_path, ray_cluster, capsys):
    wrong = {
        "technique": "too coarse",
        "method": "reuse",
        "changes": {"encoder": {"backbone": {"patch_size": [8, 16]}}},
    }
    rows = {"base": ROWS["base"], "coarse": wrong}
    assert main(arguments(rows, "--folds", "2", "--cpus-per-run", "0.5")) == 1
    said = capsys.readouterr().out
    assert "failed: coarse/fold-2-seed-0" in said
    text = (tmp_path / "out/results.md").read_text()
    assert "## Runs that failed" in text and "| the recipe |  | 1 |" in text


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        (["--fold-column", "folds"], UserError, "did you mean 'fold'"),
        (["--folds", "9"], UserError, "column 'fold' has 1, 2"),
        (["--only", "bass"], ConfigError, "did you mean 'base'"),
        (["--set", "objective.mea=1"], ConfigError, "did you mean 'objective.mae'"),
    ],
)
def test_bad_requests_are_explained(arguments, extra, error, message):
    with pytest.raises(error, match=message):
        main(arguments({"base": ROWS["base"]}, *extra))
