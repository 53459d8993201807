"""Rates over steps, layer-wise decay, freezing, and which parameters are decayed."""

import itertools
import math

import pytest
import torch
from torch import nn

from audiomae.errors import ConfigError
from audiomae.training import schedule
from audiomae.training.schedule import OptimConfig


def test_warm_up_is_linear_then_the_cosine_falls_to_the_floor():
    factors = [schedule.lr_factor(step, 110, 10, floor=0.1) for step in range(111)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[110] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[10:]))


def test_no_warm_up_starts_at_the_peak():
    assert schedule.lr_factor(0, 10, 0) == 1.0
    assert 0 < schedule.lr_factor(9, 10, 0) < 0.05


@pytest.fixture
def model() -> nn.Module:
    blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    return nn.ModuleDict({"embed": nn.Linear(4, 4), "blocks": blocks, "head": nn.Linear(4, 2)})


LAYER_OF = schedule.layer_names(["embed"], ["blocks.0", "blocks.1", "blocks.2"])


def test_layer_names():
    assert [LAYER_OF(name) for name in ("embed.weight", "blocks.0.weight", "blocks.2.bias", "head.weight")] == [
        0,
        1,
        3,
        4,
    ]


def test_layer_decay_scales_from_the_top_down(model):
    groups = schedule.param_groups(model, OptimConfig(layer_decay=0.5), LAYER_OF, 3)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert named["head.weight"] == 1.0
    assert named["blocks.2.weight"] == 0.5
    assert named["blocks.0.weight"] == named["blocks.0.bias"] == 0.125
    assert named["embed.weight"] == 0.0625
    optimizer = schedule.build_optimizer(groups, OptimConfig(layer_decay=0.5))
    schedule.set_lr(optimizer, 2e-3)
    assert sorted({group["lr"] for group in optimizer.param_groups}, reverse=True) == pytest.approx(
        [2e-3 * 0.5**k for k in (0, 1, 2, 3, 4)]
    )


def test_vectors_are_not_decayed(model):
    groups = schedule.param_groups(model, OptimConfig(weight_decay=0.1), LAYER_OF, 3)
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_freezing_keeps_embedding_and_lower_blocks_as_they_are(model):
    frozen = schedule.freeze(model, LAYER_OF, 2)
    assert sorted(frozen) == sorted(
        f"{layer}.{kind}" for layer in ("embed", "blocks.0", "blocks.1") for kind in ("weight", "bias")
    )
    groups = schedule.param_groups(model, OptimConfig(), LAYER_OF, 3)
    assert sum(len(group["params"]) for group in groups) == 4
    assert schedule.freeze(model, LAYER_OF, 0) == []


def test_freezing_everything_is_refused(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing is left to train"):
        schedule.param_groups(model, OptimConfig(), LAYER_OF, 3)


def test_optimizer_steps_like_plain_adamw():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    theirs.load_state_dict(ours.state_dict())
    config = OptimConfig(lr=0.01, weight_decay=0.1)
    optimizer = schedule.build_optimizer(schedule.param_groups(ours, config, lambda _: 0, 0), config)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=config.betas, weight_decay=0.1)
    for step in range(3):
        x = torch.full((2, 3), float(step + 1))
        for module, optim in ((ours, optimizer), (theirs, reference)):
            optim.zero_grad()
            module(x).square().sum().backward()
            optim.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)
    assert math.isfinite(float(ours.weight.sum()))
