"""`--recipe`: what lies under the keys that were given, and that a resumed run goes on with what it began with."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiomae.errors import ConfigError
from audiomae.storage import read_json, to_path
from audiomae.training.auto import Machine
from ray_jobs.configs import RECIPES, PipelineConfig, TrainConfig
from ray_jobs.train import COMMAND
from ray_jobs.training import fitting


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Eight files of two labels, on a cluster of two cores."""
    for number in range(8):
        folder = tmp_path / "sounds" / ("low", "high")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{number}.wav", np.ones(16_000) * 0.1, 16_000)
    monkeypatch.setattr(fitting, "connect", lambda **_: None)
    monkeypatch.setattr(fitting, "nodes", lambda: [{"CPU": 2.0}])
    monkeypatch.setattr(fitting, "offers_gpus", lambda: False)
    return str(tmp_path / "sounds")


def line(corpus: str, *more: str) -> TrainConfig:
    config: TrainConfig = COMMAND.parse(["--corpus", corpus, "--storage", "runs", "--name", "first", *more])
    return config


def test_a_line_without_a_config_gets_what_fits_and_given_keys_win(corpus: str, tmp_path: Path, capsys) -> None:
    run = to_path(tmp_path / "run")
    found = fitting.fitted(line(corpus, "--epochs", "7", "--set", "augment.pitch=0.01"), run)
    assert (found.epochs, found.augment.pitch) == (7, 0.01)
    assert found.objective.clap_lite == 1.0 and found.encoder.features.sample_rate == 16_000 and found.data.clip_s == 1
    assert "recipe auto: small_labelled.yaml; 8 files" in capsys.readouterr().out
    assert read_json(run / "recipe.json")["recipe"] == "small_labelled"
    Path(corpus, "low", "new.wav").write_bytes(Path(corpus, "low", "0.wav").read_bytes())
    assert fitting.fitted(line(corpus, "--epochs", "7", "--set", "augment.pitch=0.01"), run).training == found.training


def test_an_empty_autoscaled_cluster_counts_as_what_it_would_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "nodes", lambda: [{"CPU": 0.0}])
    monkeypatch.setattr(fitting, "node_types", lambda: [{"CPU": 0}, {"CPU": 4}, {"CPU": 6, "GPU": 1}])
    monkeypatch.setattr(fitting, "offers_gpus", lambda: True)
    assert fitting._machine() == Machine(cpus=6, gpus=1)
    monkeypatch.setattr(fitting, "offers_gpus", lambda: False)
    assert fitting._machine().gpus == 0


def test_a_whole_config_stays_as_it_is_and_recipes_go_by_name(corpus: str, tmp_path: Path) -> None:
    run = to_path(tmp_path / "run")
    whole = line(corpus, "--config", str(RECIPES / "debug.yaml"))
    assert fitting.fitted(whole, run) == whole and not (run / "recipe.json").exists()
    plain = line(corpus, "--recipe", "none")
    assert fitting.fitted(plain, run) == plain
    note = fitting.fitted(line(corpus, "--recipe", "note", "--epochs", "1"), run)
    assert note.encoder.backbone.img_size == (384, 384) and note.objective.contrastive == 0.01 and note.epochs == 1
    with pytest.raises(ConfigError, match="did you mean 'small_labelled'"):
        fitting.fitted(line(corpus, "--recipe", "small_labeled"), run)


def test_the_pipeline_hands_on_only_what_was_given() -> None:
    config = PipelineConfig(corpus="sounds", out="out", epochs=3, recipe="auto")
    assert config.training == {"epochs": 3, "recipe": "auto"}
