"""Training recipes: the shipped ones load, and what cannot work is refused before anything starts."""

from pathlib import Path

import pytest

import ray_jobs
from audiomae.config import build_config, dump_config, load_config
from audiomae.errors import ConfigError
from audiomae.training.recipe import Recipe

RECIPES = Path(ray_jobs.__file__).parent / "recipes"


@pytest.mark.parametrize("name", ["debug", "demo"])
def test_shipped_recipes_load_and_survive_a_round_trip(name, tmp_path):
    config = load_config(Recipe, [RECIPES / f"{name}.yaml"])
    (tmp_path / "saved.yaml").write_text(dump_config(config))
    assert load_config(Recipe, [tmp_path / "saved.yaml"]) == config


def test_later_files_and_sets_win(tmp_path):
    (tmp_path / "more.yaml").write_text("optim: {lr: 0.5}\n")
    config = load_config(Recipe, [RECIPES / "debug.yaml", tmp_path / "more.yaml"], ["encoder.pooling=cls"])
    assert config.optim.lr == 0.5 and config.optim.warmup_epochs == 1 and config.encoder.pooling == "cls"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"epoch": 3}, r"unknown config key 'epoch'; did you mean 'epochs'"),
        ({"optim": {"lr": 0}}, r"optim.lr.*greater than 0"),
        ({"batch_size": 4, "accumulate": 4, "workers": {"num": 2}}, "raise batch_size"),
        ({"workers": {"num": [3, 2]}}, "least, most"),
        ({"objective": {"mae": 0}}, "every loss weight is 0"),
        ({"objective": {"mask_ratio": 1.0}}, "objective.mask_ratio"),
        ({"augment": {"time_masks": 1, "time_mask_share": 0}}, "give the masks a size"),
    ],
)
def test_what_cannot_work_is_refused_with_the_key(tree, message):
    with pytest.raises(ConfigError, match=message):
        build_config(Recipe, tree)


def test_workers_may_be_a_number_or_a_range():
    assert build_config(Recipe, {"workers": {"num": 3}}).workers.range == (3, 3)
    assert build_config(Recipe, {"workers": {"num": [1, 4]}}).workers.range == (1, 4)
