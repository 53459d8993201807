"""Which patches an MAE step hides: unstructured, whole time steps, bands, or both, at any ratio, aware of padding."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from audiomae.model.encoder_config import MaskMode


class Masking(NamedTuple):
    """The outcome of one draw over B clips of N patches, K kept columns.

    Attributes:
        ids_keep: int64 [B, K], patches in order of preference; only the first `visible` of a row are really seen.
        ids_restore: int64 [B, N], inverse of the shuffle of which `ids_keep` is the head.
        mask: float32 [B, N], 1 = hidden and to be reconstructed; 0 = visible, or padding.
        visible: bool [B, K], False where a shorter clip has fewer visible patches than the batch has columns.
    """

    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor
    visible: Tensor


def random_masking(
    patch_mask: Tensor,
    grid: tuple[int, int],
    ratio: float,
    mode: MaskMode = "unstructured",
    generator: torch.Generator | None = None,
) -> Masking:
    """Draw which patches stay visible; every clip keeps floor((1 - ratio) x its own real patches), at least one.

    `unstructured` hides independent patches (He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners");
    `time`, `frequency` and `time+frequency` hide whole steps, bands, or the union of both (Huang et al. 2022, "Masked
    Autoencoders that Listen", section 3). A structured mode breaks at most one step or band, at random, to meet the
    ratio exactly.

    Args:
        patch_mask: bool [B, Nt * Nf], True = real, time-major.
        grid: (Nt, Nf).
        ratio: share of real patches to hide, 0 <= ratio < 1.
        generator: of the patch_mask's device.
    """
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"mask ratio: expected 0 <= ratio < 1, got {ratio}; 0.75 is the usual choice")
    batch, patches = patch_mask.shape
    device = patch_mask.device
    noise = _noise(batch, grid, mode, generator, device)
    order = noise.masked_fill(~patch_mask, math.inf).argsort(dim=1, stable=True)
    keep_counts = (patch_mask.sum(1) * (1.0 - ratio) + 1e-4).floor().to(torch.int64).clamp(min=1)
    most = max(1, math.floor(patches * (1.0 - ratio) + 1e-4))
    ranks = order.argsort(dim=1)
    hidden = (ranks >= keep_counts[:, None]) & patch_mask
    return Masking(
        ids_keep=order[:, :most],
        ids_restore=ranks,
        mask=hidden.float(),
        visible=torch.arange(most, device=device) < keep_counts[:, None],
    )


def _noise(
    batch: int, grid: tuple[int, int], mode: MaskMode, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Float [B, Nt * Nf]; the patches of least noise stay visible. Ties inside a step or band break at random."""
    steps, bands = grid

    def draw(*size: int) -> Tensor:
        return torch.rand(batch, *size, generator=generator, device=device)

    if mode == "unstructured":
        return draw(steps * bands)
    tie_break = draw(steps, bands) * 1e-3 / max(steps, bands)
    if mode == "time":
        noise = _ranks(draw(steps))[:, :, None] + tie_break
    elif mode == "frequency":
        noise = _ranks(draw(bands))[:, None, :] + tie_break
    elif mode == "time+frequency":
        noise = torch.maximum(_ranks(draw(steps))[:, :, None], _ranks(draw(bands))[:, None, :]) + tie_break
    else:
        raise ValueError(f"mask mode: expected unstructured, time, frequency or time+frequency, got {mode!r}")
    return noise.flatten(1)


def _ranks(noise: Tensor) -> Tensor:
    """Rank in (0, 1] of each entry of its row: makes both axes of `time+frequency` hide the same share."""
    return (noise.argsort(dim=1).argsort(dim=1) + 1.0) / noise.shape[1]
