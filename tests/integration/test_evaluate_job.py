"""The evaluation job on embedding folders as a user has them: files written, numbers right, errors clear."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile as sf

from audiomae import AudioEncoder
from audiomae.artifacts.embeddings import ShardOrigin, ShardTables, commit_shard, write_run
from audiomae.artifacts.tables import EmbedSettings, embedding_schema, vectors_to_column
from audiomae.errors import ConfigError, UserError
from audiomae.metrics import Labelled, score_protocol, summarise
from audiomae.model.encoder import EncoderConfig
from audiomae.storage import write_json
from ray_jobs.evaluate_retrieval import main
from ray_jobs.evaluating.job import display_names

CLASSES, FOLDS, RATE = ("low", "mid", "high"), 4, 16000
FAILURES = pa.schema([(name, pa.string()) for name in ("uri", "stage", "error_class", "message")])


def write_embeddings(out: Path, corpus: Path, noise: float, encoder: str = "gone/encoder", windows: int = 2) -> tuple:
    """An embedding folder in two shards with vectors of our choice: 24 files, each in `windows` windows."""
    rng = np.random.default_rng(0)
    files = [(f"{label}/{i}.wav", label, i % FOLDS) for label in CLASSES for i in range(8)]
    centres = {label: rng.normal(size=6) for label in CLASSES}
    rows = [
        {"uri": uri, "label": label, "fold": fold, "start_s": 0.5 * w, "end_s": 0.5 * (w + 1)}
        for uri, label, fold in files
        for w in range(windows)
    ]
    vectors = np.stack([centres[row["label"]] + noise * rng.normal(size=6) for row in rows]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    settings = EmbedSettings(fingerprint=f"f{noise}", dim=6, sample_rate=RATE, mode="windows", window_s=0.5, hop_s=0.5)
    schema = embedding_schema(settings, [pa.field("label", pa.string()), pa.field("fold", pa.int64())])
    for shard, part in (("s0", slice(0, 20)), ("s1", slice(20, None))):
        columns = {name: [row[name] for row in rows[part]] for name in ("uri", "start_s", "end_s", "label", "fold")}
        columns |= {"id": range(len(columns["uri"])), "embedding": vectors_to_column(vectors[part])}
        table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
        origin = ShardOrigin(inputs=len(table), audio_s=1.0, fingerprint=settings.fingerprint, manifest="m")
        commit_shard(out, shard, ShardTables(table), origin)
    run = {"fingerprint": settings.fingerprint, "dim": 6, "encoder": encoder, "corpus_root": str(corpus)}
    write_run(out, run)
    plan = {"generation": 0, "shards": [{"name": "s0"}, {"name": "s1"}], "settings": settings.model_dump(), "files": []}
    write_json(out / "manifest" / "plan-000000.json", plan)
    return vectors, rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for place, label in enumerate(CLASSES):
        (root / label).mkdir()
        for i in range(8):
            tone = 0.4 * np.sin(2 * np.pi * (200 * 4**place + 5 * i) * np.arange(RATE) / RATE)
            sf.write(root / label / f"{i}.wav", tone, RATE)
    return root


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, corpus):
    base = tmp_path_factory.mktemp("runs")
    AudioEncoder.from_config(EncoderConfig.model_validate({"backbone": {"size": "debug"}})).save(
        base / "good" / "encoder"
    )
    good = write_embeddings(base / "good" / "embeddings", corpus, 0.5, str(base / "good" / "encoder"))
    write_embeddings(base / "bad" / "embeddings", corpus, 4.0, "bad/encoder")
    return base, good


def test_everything_in_one_call(embedded, corpus, tmp_path, ray_cluster, capsys):
    base, (vectors, rows) = embedded
    argv = ["--embeddings", str(base / "good/embeddings"), "--compare", str(base / "bad/embeddings"), "--baselines"]
    argv += ["--label", "label", "--group", "fold", "--out", str(tmp_path / "eval"), "--set", "resamples=200"]
    argv += ["--set", "worst_queries=2"]
    assert main(argv) == 0

    result = json.loads((tmp_path / "eval/metrics.json").read_text())
    clips = vectors.reshape(24, 2, 6).mean(axis=1)
    expected = summarise(
        score_protocol(Labelled(clips, [r["label"] for r in rows[::2]]), groups=[r["fold"] for r in rows[::2]])
    )
    for name in ("mAP", "R@1", "R@5", "P@10", "nDCG@10", "kNN"):
        assert result[name] == pytest.approx(expected[name], abs=1e-6), name
    assert set(result["per_group"]) == {"0", "1", "2", "3"} and set(result["per_class"]) == set(CLASSES)
    assert result["name"] == "good"
    assert set(result["others"]) == {"bad", "MFCC statistics", "log-mel mean/std", "random-init encoder"}
    assert result["others"]["MFCC statistics"]["mAP"] > 0.95  # pure tones
    versus_bad = next(t for t in result["comparisons"] if (t["second"], t["metric"]) == ("bad", "mAP"))
    assert versus_bad["difference"] > 0.2 and versus_bad["p_holm"] < 0.05

    page = (tmp_path / "eval/report.html").read_text()
    assert page.count('class="worst"') == 2 and page.count("<audio") == 2 * 4
    plots = {path.name for path in (tmp_path / "eval/plots").iterdir()}
    assert {"confusion.png", "map.png", "per_class_map.png", "per_group_map.png", "worst_1.png"} <= plots

    written = (tmp_path / "eval/report.html").stat().st_mtime_ns
    capsys.readouterr()
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "already evaluated" in said and f"{result['mAP']:.3f}" in said
    assert (tmp_path / "eval/report.html").stat().st_mtime_ns == written
    assert main([*argv, "--level", "window"]) == 0
    assert json.loads((tmp_path / "eval/metrics.json").read_text())["num_queries"] == 48


def test_without_group_each_row_asks_all_the_others_and_lost_audio_is_no_failure(tmp_path):
    moved = write_embeddings(tmp_path / "moved", tmp_path / "nowhere", 0.5, windows=1)[0]
    argv = ["--embeddings", str(tmp_path / "moved"), "--out", str(tmp_path / "out"), "--set", "resamples=200"]
    assert main([*argv, "--set", "map=PCA"]) == 0
    result = json.loads((tmp_path / "out/metrics.json").read_text())
    labels = [label for label in CLASSES for _ in range(8)]
    assert result["mAP"] == pytest.approx(summarise(score_protocol(Labelled(moved, labels)))["mAP"], abs=1e-6)
    assert result["num_gallery"] == 24 and result["per_group"] == {}
    assert "<audio" not in (tmp_path / "out/report.html").read_text()


def test_one_group_can_ask_alone(embedded, tmp_path):
    base, _ = embedded
    argv = ["--embeddings", str(base / "good/embeddings"), "--group", "fold", "--out", str(tmp_path)]
    assert main([*argv, "--query-group", "2", "--set", "resamples=200", "--set", "worst_queries=0"]) == 0
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert list(result["per_group"]) == ["2"] and result["num_queries"] == 6 and result["num_gallery"] == 18


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        (["--label", "labell"], UserError, "did you mean 'label'"),
        (["--group", "fold", "--query-group", "9"], UserError, "query group '9' is not in the data"),
        (["--set", "knn=3"], ConfigError, "did you mean 'knn_k'"),
        (["--compare", "/nowhere"], UserError, "no embeddings were written here"),
    ],
)
def test_bad_requests_are_explained(embedded, tmp_path, extra, error, message):
    base, _ = embedded
    with pytest.raises(error, match=message):
        main(["--embeddings", str(base / "good/embeddings"), "--out", str(tmp_path), *extra])


def test_an_unfinished_embedding_is_refused(embedded, tmp_path, corpus):
    write_embeddings(tmp_path / "half", corpus, 0.5)
    (tmp_path / "half/commits/s1.json").unlink()
    with pytest.raises(UserError, match="only 1 of 2 shards"):
        main(["--embeddings", str(tmp_path / "half"), "--out", str(tmp_path / "out")])


def test_runs_are_named_after_their_encoders_or_what_else_tells_them_apart():
    assert display_names(["runs/first/encoder"], ["runs/embeddings"]) == ["first"]
    assert display_names(["timm:hf_hub:owner/name"], ["runs/embeddings"]) == ["name"]
    assert display_names(["runs/a/encoder", "s3://b/runs/c/encoder/"], ["x/1", "x/2"]) == ["a", "c"]
    assert display_names(["runs/a/encoder", "runs/b/encoder"], ["same", "same"]) == ["a", "b"]
    one = ["runs/a/encoder"] * 2
    assert display_names(one, ["runs/whole/embeddings", "runs/windows/embeddings/"]) == ["whole", "windows"]
    assert display_names(one, ["s3://b/x/v1", "s3://b/x/v2"]) == ["v1", "v2"]
    assert display_names(one, ["same", "same"]) == ["same (0)", "same (1)"]
