"""Statistics of a clip that its pooled vector leaves out: how the tokens of every block, and its frames, vary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiomae.model.pooling import masked_mean

MIN_DEVIATION = 1e-6


class TokenStatistics(nn.Module):
    """Mean and standard deviation of the patch tokens of every block and of the log-mel frames.

    Statistics pooling (Snyder et al. 2017, *Deep Neural Network Embeddings for Text-Independent Speaker Verification*),
    of all blocks as in Desplanques et al. 2020, *ECAPA-TDNN* (multi-layer feature aggregation). The last block's mean
    is left out: it is what pooling makes a vector of. What the early blocks keep is less drawn to the training clips.

    Args:
        dim: D, width of a token.
        blocks: L.
        mels: F, rows of the spectrogram.
    """

    def __init__(self, dim: int, blocks: int, mels: int) -> None:
        super().__init__()
        self.parts = [dim] * (2 * blocks - 1) + [2 * mels]
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(self.width))
        self.deviation: Tensor
        self.register_buffer("deviation", torch.ones(self.width))

    @property
    def width(self) -> int:
        """W, how many numbers they are."""
        return sum(self.parts)

    def forward(self, tokens: Tensor, token_mask: Tensor | None, x: Tensor, frame_lengths: Tensor | None) -> Tensor:
        """Of a batch, float32[B, W].

        Args:
            tokens: float[B, 1 + N, L * D], cls first, the blocks side by side.
            token_mask: bool[B, 1 + N], True = real; None = all.
            x: log-mel [B, 1, T, F].
            frame_lengths: int64[B]; None = all T.
        """
        frame_mask = None
        if frame_lengths is not None:
            frame_mask = torch.arange(x.shape[2], device=x.device) < frame_lengths.to(x.device)[:, None]
        mean, deviation = _moments(tokens[:, 1:].float(), None if token_mask is None else token_mask[:, 1:])
        frames = torch.cat(_moments(x[:, 0].float(), frame_mask), dim=1)
        return torch.cat([deviation, mean[:, : -self.parts[0]], frames], dim=1)

    def fit(self, rows: Tensor) -> None:
        """Standardise by these clips, float[N, W], from now on."""
        self.mean.copy_(rows.mean(0))
        self.deviation.copy_(rows.std(0, correction=0).clamp(min=MIN_DEVIATION))

    def scaled(self, rows: Tensor) -> Tensor:
        """Standardised, and each kind of statistic of unit length: float32[B, W] -> float32[B, W]."""
        parts = ((rows - self.mean) / self.deviation).split(self.parts, dim=1)
        return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)


def _moments(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation over dim 1 of [B, N, D], of what the mask [B, N] leaves."""
    mean = masked_mean(values, mask)
    return mean, masked_mean((values - mean.unsqueeze(1)).square(), mask).sqrt()
