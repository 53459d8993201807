"""Tokens of a clip -> one vector. Padding tokens never count."""

import math
from typing import get_args

import torch
from torch import Tensor, nn

from audiomae.model.encoder_config import PoolingName

POOLINGS: tuple[str, ...] = get_args(PoolingName)


class Pooling(nn.Module):
    """One way to pool `[B, 1 + N, D]` tokens (cls first) into `[B, out_dim]`.

    - `cls`: the cls token.
    - `mean`: mean of the patch tokens (Reimers and Gurevych 2019, section 3: mean beats cls for similarity).
    - `mean_cls`: mean of patch tokens and cls.
    - `cls_mean_concat`: cls beside mean, 2 D wide.
    - `max`: largest value of each channel over the patches.
    - `attention_score`: patches weighted by how much the last block's cls token attends to them.
    - `attention`: learned attention pooling, softmax of one linear score per token, cls included (Lin et al. 2017, "A
      Structured Self-Attentive Sentence Embedding", with one hop); starts as the plain mean.
    - `freq_concat`: the bands of a time step side by side, then the mean over time, Nf D wide: the scene embedding of
      Niizumi et al. 2022 (MSM-MAE) and of the official AudioMAE++ code.

    Only `attention` has parameters; they are trained, saved and fingerprinted with the encoder.
    """

    def __init__(self, name: PoolingName, dim: int, bands: int) -> None:
        """Args: dim: D, width of a token. bands: Nf, patches along the mel axis."""
        super().__init__()
        if name not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {name!r}")
        self.name = name
        self.bands = bands
        self.out_dim = {"cls_mean_concat": 2 * dim, "freq_concat": bands * dim}.get(name, dim)
        self.score = nn.Linear(dim, 1) if name == "attention" else None
        if self.score is not None:
            nn.init.zeros_(self.score.weight)
            nn.init.zeros_(self.score.bias)

    @property
    def needs_cls_attention(self) -> bool:
        """Whether `forward` wants `cls_attention`."""
        return self.name == "attention_score"

    def forward(self, tokens: Tensor, token_mask: Tensor | None = None, cls_attention: Tensor | None = None) -> Tensor:
        """Pool in float32.

        Args:
            tokens: float [B, 1 + N, D], cls first, patches time-major.
            token_mask: bool [B, 1 + N], True = real; None = all real.
            cls_attention: float [B, N] >= 0, for `attention_score`.
        """
        tokens = tokens.float()
        patches = tokens[:, 1:]
        patch_mask = None if token_mask is None else token_mask[:, 1:]
        if self.name == "cls":
            return tokens[:, 0]
        if self.name == "mean":
            return masked_mean(patches, patch_mask)
        if self.name == "mean_cls":
            return masked_mean(tokens, token_mask)
        if self.name == "cls_mean_concat":
            return torch.cat([tokens[:, 0], masked_mean(patches, patch_mask)], dim=-1)
        if self.name == "max":
            return patches.amax(1) if patch_mask is None else _hide(patches, patch_mask, -math.inf).amax(1)
        if self.name == "freq_concat":
            return masked_mean(self.by_time(patches), None if patch_mask is None else patch_mask[:, :: self.bands])
        if self.name == "attention":
            return self._learned(tokens, token_mask)
        if cls_attention is None:
            raise ValueError(
                "attention_score pooling: expected cls_attention, got None: encode with want_cls_attention=True"
            )
        weights = cls_attention.float() if patch_mask is None else cls_attention.float() * patch_mask
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
        return (patches * weights.unsqueeze(-1)).sum(1)

    def by_time(self, patches: Tensor) -> Tensor:
        """Patch tokens [B, Nt * Nf, D] -> one vector a time step [B, Nt, Nf * D] (low band first)."""
        return patches.unflatten(1, (-1, self.bands)).flatten(2)

    def _learned(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        assert self.score is not None
        with torch.autocast(tokens.device.type, enabled=False):
            scores = self.score(tokens).squeeze(-1)
            if token_mask is not None:
                scores = scores.masked_fill(~token_mask, -math.inf)
            return (tokens * scores.softmax(1).unsqueeze(-1)).sum(1)


def _hide(tokens: Tensor, mask: Tensor, value: float) -> Tensor:
    return tokens.masked_fill(~mask.unsqueeze(-1), value)


def masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over dim 1 of [B, N, D], of real tokens only."""
    if mask is None:
        return tokens.mean(1)
    return _hide(tokens, mask, 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
