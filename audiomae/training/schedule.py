"""Learning rates: warm-up and cosine decay over steps, layer-wise decay, and which parameters get weight decay.

The rate is a function of the step number alone, so a resumed run needs no scheduler state.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from audiomae.errors import ConfigError
from audiomae.training.recipe import OptimConfig

LayerOf = Callable[[str], int]


def lr_factor(step: int, total_steps: int, warmup_steps: int, floor: float = 0.0) -> float:
    """Factor on the peak rate at `step`: linear warm-up from 1/warmup_steps, then half a cosine down to `floor`.

    Loshchilov & Hutter 2017 (SGDR, eq. 5 without restarts) after the warm-up of Goyal et al. 2017.

    Args:
        step: 0-based optimiser step.
        total_steps: steps of the whole run.
        warmup_steps: steps of the warm-up.
        floor: last factor, `min_lr / lr`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def freeze(module: nn.Module, layer_of: LayerOf, layers: int) -> list[str]:
    """Turn gradients off for the patch embedding (layer 0) and blocks 1 to `layers`; returns the frozen names.

    Args:
        module: the trained module.
        layer_of: parameter name -> depth, 0 = embedding, 1..depth = blocks, above = the rest.
        layers: how many blocks to freeze; 0 freezes nothing.
    """
    frozen = [name for name, _ in module.named_parameters() if layers > 0 and layer_of(name) <= layers]
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    return frozen


def param_groups(module: nn.Module, config: OptimConfig, layer_of: LayerOf, num_layers: int) -> list[dict[str, Any]]:
    """AdamW groups with a `lr_scale` each: `layer_decay ** (layers above)`; vectors and scalars get no weight decay.

    Layer-wise decay as in Clark et al. 2020 (ELECTRA) and BEiT: the top (heads) keeps the full rate.

    Args:
        module: parameters without gradient are left out.
        layer_of: see `freeze`; values above `num_layers` count as the top.
        num_layers: number of blocks.

    Raises:
        ConfigError: nothing is left to train.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = min(layer_of(name), num_layers + 1)
        decays = parameter.ndim > 1
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "lr_scale": config.layer_decay ** (num_layers + 1 - layer),
                "weight_decay": config.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ConfigError("optim.freeze_layers: every parameter is frozen, nothing is left to train; lower it")
    return [groups[key] for key in sorted(groups)]


def build_optimizer(groups: Iterable[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over `param_groups`; fused into one kernel per group."""
    return torch.optim.AdamW(list(groups), lr=config.lr, betas=config.betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's rate to `lr` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def layer_names(prefixes: Sequence[str], blocks: Sequence[str]) -> LayerOf:
    """A `layer_of` from name prefixes: `prefixes` are layer 0, `f"{blocks[i]}."` layer i + 1, anything else the top."""

    def layer_of(name: str) -> int:
        for index, block in enumerate(blocks):
            if name.startswith(block + "."):
                return index + 1
        return 0 if any(name.startswith(prefix) for prefix in prefixes) else len(blocks) + 1

    return layer_of
