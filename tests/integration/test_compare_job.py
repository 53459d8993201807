"""`ray_jobs/compare.py` and `embed_corpus.py --pooling`: the poolings of an encoder that is there."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiomae import AudioEncoder
from audiomae.artifacts.embeddings import EmbeddingSet
from audiomae.errors import ConfigError
from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.encoder import EncoderConfig, ProjectionConfig
from ray_jobs import compare, embed_corpus
from ray_jobs.configs import CompareConfig

RATE = 16_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve tones of two labels, a silent file and one that is no audio."""
    folder = tmp_path_factory.mktemp("tones")
    draw = np.random.default_rng(0)
    time = np.arange(RATE) / RATE
    for number in range(12):
        (folder / ("low", "high")[number % 2]).mkdir(exist_ok=True)
        tone = 0.3 * np.sin(2 * np.pi * (300, 3000)[number % 2] * draw.uniform(0.9, 1.1) * time)
        soundfile.write(folder / ("low", "high")[number % 2] / f"{number}.wav", tone, RATE)
    soundfile.write(folder / "low" / "silent.wav", np.zeros(RATE), RATE)
    (folder / "low" / "broken.wav").write_text("no audio")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("encoder") / "encoder"
    AudioEncoder.from_config(EncoderConfig(backbone=AudioMAEConfig(size="debug"))).save(path)
    return str(path)


def test_every_pooling_is_scored_on_the_same_files_and_agrees_with_its_own_embedding_job(
    corpus: Path, encoder: str, tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare.compare(CompareConfig(encoder=encoder, corpus=str(corpus), out=str(tmp_path / "out")))
    assert next(iter(found.results)) == "mean" and len(found.results) == 7
    said = capsys.readouterr().out
    assert "silent.wav: nothing can be heard in it" in said and "broken.wav" in said and "12 queries" in said
    assert "| max |" in (tmp_path / "out" / "comparison.md").read_text()

    line = ["--encoder", encoder, "--corpus", str(corpus), "--out", str(tmp_path / "max"), "--pooling", "max"]
    assert embed_corpus.main([*line, "--per-file"]) == 0
    embeddings = EmbeddingSet.open(tmp_path / "max")
    again = AudioEncoder.load(embeddings.encoder, device="cpu")
    assert again.config.pooling == "max" and again.fingerprint == embeddings.fingerprint
    failed = {Path(row["uri"]).name: row["error_class"] for row in embeddings.failures().to_pylist()}
    assert failed["silent.wav"] == "SilentAudio" and len(failed) == 2


def test_a_projection_forbids_another_pooling_and_that_is_said(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "projected"
    config = EncoderConfig(backbone=AudioMAEConfig(size="debug"), projection=ProjectionConfig(dim=8))
    AudioEncoder.from_config(config).save(path)
    settings = CompareConfig(encoder=str(path), corpus=str(corpus), out=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="trained on its mean pooling"):
        compare.compare(settings)
    with pytest.raises(ConfigError, match="trained on its mean pooling"):
        embed_corpus.main(
            ["--encoder", str(path), "--corpus", str(corpus), "--out", str(tmp_path / "emb"), "--pooling", "max"]
        )
