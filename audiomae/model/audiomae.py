"""AudioMAE++: a masked autoencoder over log-mel patches with macaron blocks and SwiGLU.

Yadav, Theodoridis, Tan 2025, "AudioMAE++: learning better masked audio representations with SwiGLU FFNs"
(github.com/SarthakYadav/audiomae-plusplus-official). Input is time-first log-mel `[B, 1, T, F]`; patches are
time-major. Positions are fixed 2-D sin-cos, computed for whatever grid comes in, so any length runs.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiomae.model.blocks import MacaronBlock, init_weights, layer_norm
from audiomae.model.encoder_config import AudioMAEConfig, Positions


class EncoderOutput(NamedTuple):
    """What a backbone makes of a batch.

    Attributes:
        tokens: float [B, 1 + N, D], cls first, patches time-major; of all L blocks side by side, [B, 1 + N, L * D],
            where that was asked for.
        token_mask: bool [B, 1 + N], True = real.
        grid: (Nt, Nf) patches of the whole input.
        cls_attention: float [B, N] or None: how much the last block's cls query attends to each patch (mean over heads,
            sums to 1 over a clip's real patches).
        padded: False = every token is real, so the mask can be left out.
    """

    tokens: Tensor
    token_mask: Tensor
    grid: tuple[int, int]
    cls_attention: Tensor | None = None
    padded: bool = True

    @property
    def mask(self) -> Tensor | None:
        """`token_mask`, or None where every token is real."""
        return self.token_mask if self.padded else None


def _new_token(dim: int) -> nn.Parameter:
    """A learned token float32[1, 1, dim], drawn at random; on the meta device it only has a shape.

    To draw there makes torch load its compiler, 1.8 s of CPU for every process that loads an encoder.
    """
    token = torch.empty(1, 1, dim)
    return nn.Parameter(token if token.is_meta else token.normal_(std=0.02))


class Decoder(nn.Module):
    """Visible tokens and mask tokens at all positions -> the pixels of every patch."""

    def __init__(self, config: AudioMAEConfig) -> None:
        super().__init__()
        dim = config.decoder_embed_dim
        self.embed = nn.Linear(config.embed_dim, dim)
        self.mask_token = _new_token(dim)
        self.blocks = nn.ModuleList(
            MacaronBlock(dim, config.decoder_heads, config.mlp_ratio, config.ffn2_norm)
            for _ in range(config.decoder_depth)
        )
        self.norm = layer_norm(dim)
        self.pred = nn.Linear(dim, config.patch_size[0] * config.patch_size[1])


class AudioMAE(nn.Module):
    """The network. `decoder=False` builds the encoder alone (what a release carries)."""

    def __init__(self, config: AudioMAEConfig, decoder: bool = True) -> None:
        super().__init__()
        self.config = config
        pixels = config.patch_size[0] * config.patch_size[1]
        self.patch_proj = nn.Linear(pixels, config.embed_dim)
        self.cls_token = _new_token(config.embed_dim)
        rates = np.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(
            MacaronBlock(config.embed_dim, config.num_heads, config.mlp_ratio, config.ffn2_norm, rate) for rate in rates
        )
        self.norm = layer_norm(config.embed_dim)
        self.apply(init_weights)
        # after the encoder's weights were drawn, so that a seed gives the same encoder with and without a decoder
        self.decoder = Decoder(config).apply(init_weights) if decoder else None

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.config.embed_dim

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return self.config.depth

    def grid(self, frames: int) -> tuple[int, int]:
        """(Nt, Nf) patches of a spectrogram of `frames` frames."""
        return int(self.step_counts(torch.tensor(frames))), self.config.grid[1]

    def step_counts(self, frame_lengths: Tensor) -> Tensor:
        """Time steps of patches that clips of int64[B] frames have (int64[B]), at least 1."""
        config = self.config
        leftover = frame_lengths - config.patch_size[0] + config.time_slack
        return leftover.div(config.steps[0], rounding_mode="floor").clamp(min=0) + 1

    def patchify(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """Log-mel [B, 1, T, F] -> patches [B, Nt * Nf, pt * pf], overlapping when stride < patch_size.

        With ids int64[B, K] only those: [B, K, pt * pf].
        """
        if x.dim() != 4 or x.shape[1] != 1 or x.shape[3] != self.config.img_size[1]:
            raise ValueError(
                f"AudioMAE input: expected [B, 1, T, {self.config.img_size[1]}], got {list(x.shape)}: "
                "features.n_mels (or resize_mels) and backbone.img_size must agree"
            )
        (pt, pf), (st, sf) = self.config.patch_size, self.config.steps
        steps, _ = self.grid(x.shape[2])
        missing = (steps - 1) * st + pt - x.shape[2]
        if missing > 0:
            x = F.pad(x, (0, 0, 0, missing))
        patches = x[:, 0].unfold(1, pt, st).unfold(2, pf, sf)
        if ids is None:
            return patches.flatten(1, 2).flatten(2)
        rows = torch.arange(len(x), device=x.device)[:, None]
        return patches[rows, ids // patches.shape[2], ids % patches.shape[2]].flatten(2)

    def encode(
        self,
        x: Tensor,
        frame_lengths: Tensor | None = None,
        ids_keep: Tensor | None = None,
        positions: Positions = "extend",
        want_cls_attention: bool = False,
        every_block: bool = False,
    ) -> EncoderOutput:
        """Tokens of all patches, or of `ids_keep` only.

        Args:
            x: log-mel [B, 1, T, F], zero past each clip's own frames.
            frame_lengths: int64[B] real frames; None = all T, and no attention mask at all.
            ids_keep: int64[B, K] patches to keep (all when None).
            positions: past the model's window, `extend` counts on, `interpolate` squeezes the clip into the window.
            want_cls_attention: also return the last block's attention of cls to patches.
            every_block: the tokens of all blocks side by side, first to last; only those of the last are normalised.

        Padding is never attended to, so a clip's tokens are the same alone and in any batch.
        """
        grid = self.grid(x.shape[2])
        patches = self.patchify(x, ids_keep)
        patch_mask = None if frame_lengths is None else self.patch_mask(frame_lengths.to(x.device), grid)
        embedded = self._positions(grid, frame_lengths, positions, x.device)
        if ids_keep is not None:
            embedded = _take(embedded.expand(len(x), -1, -1), ids_keep)
            if patch_mask is not None:
                patch_mask = patch_mask.gather(1, ids_keep)
        tokens = self.patch_proj(patches) + embedded
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1).to(tokens.dtype), tokens], dim=1)
        if patch_mask is None:
            token_mask, attn_mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool), None
        else:
            token_mask = F.pad(patch_mask, (1, 0), value=True)
            attn_mask = token_mask[:, None, None]
        scores, passed = None, list[Tensor]()
        for block in self.blocks:
            if want_cls_attention and block is self.blocks[-1]:
                assert isinstance(block, MacaronBlock)
                scores = block.cls_attention(tokens, token_mask[:, 1:])
            tokens = block(tokens, attn_mask)
            if every_block:
                passed.append(tokens)
        tokens = self.norm(tokens)
        if every_block:
            tokens = torch.cat([*passed[:-1], tokens], dim=-1)
        return EncoderOutput(tokens, token_mask, grid, scores, padded=patch_mask is not None)

    def patch_mask(self, frame_lengths: Tensor, grid: tuple[int, int]) -> Tensor:
        """bool [B, Nt * Nf]: True for the patches of the time steps that each clip has."""
        real = torch.arange(grid[0], device=frame_lengths.device) < self.step_counts(frame_lengths)[:, None]
        return real.repeat_interleave(grid[1], dim=1)

    def decode(self, tokens: Tensor, ids_restore: Tensor) -> Tensor:
        """Visible tokens [B, 1 + K, D] and the shuffle's inverse int64[B, N] -> predicted patches [B, N, pt * pf]."""
        decoded = self.decode_tokens(tokens, ids_restore)
        assert self.decoder is not None
        return self.decoder.pred(decoded)

    def decode_tokens(self, tokens: Tensor, ids_restore: Tensor) -> Tensor:
        """As `decode`, up to what the prediction is made from: [B, N, decoder_embed_dim]."""
        decoder = self.decoder
        if decoder is None:
            raise RuntimeError("this AudioMAE has no decoder: it was loaded from an encoder saved for inference")
        x = decoder.embed(tokens)
        kept = x[:, 1:]
        batch, patches = ids_restore.shape
        hidden = decoder.mask_token.to(x.dtype).expand(batch, patches - kept.shape[1], -1)
        patch_tokens = _take(torch.cat([kept, hidden], dim=1), ids_restore)
        bands = self.config.grid[1]
        if self.config.decoder_positions == "1d":
            embedded = flat_positions(patches, x.shape[2], x.device)
        else:
            embedded = grid_positions(patches // bands, bands, x.shape[2], x.device)
        x = torch.cat([x[:, :1], patch_tokens + embedded], dim=1)
        for block in decoder.blocks:
            x = block(x)
        return decoder.norm(x)[:, 1:]

    def _positions(
        self, grid: tuple[int, int], frame_lengths: Tensor | None, positions: Positions, device: torch.device
    ) -> Tensor:
        """Sin-cos positions [1, N, D], or [B, N, D] when clips of different lengths are squeezed differently."""
        steps, bands = grid
        window = self.config.grid[0]
        if positions == "extend" or steps <= window:
            return grid_positions(steps, bands, self.dim, device)
        if frame_lengths is None:
            return grid_positions(steps, bands, self.dim, device, scale=window / steps)
        scales = (window / self.step_counts(frame_lengths.to(device))).clamp(max=1.0)
        times = torch.arange(steps, device=device) * scales[:, None]
        time_half = _sincos(times, self.dim // 2)[:, :, None].expand(-1, -1, bands, -1)
        mel_half = _sincos(torch.arange(bands, device=device), self.dim // 2).expand(len(scales), steps, -1, -1)
        return torch.cat([mel_half, time_half], dim=-1).flatten(1, 2)


def mae_loss(pred: Tensor, target: Tensor, mask: Tensor, norm_pix: bool) -> Tensor:
    """Mean squared error over hidden patches: pred, target [B, N, P], mask [B, N] (1 = counts) -> scalar, in float32.

    With `norm_pix` each target patch is normalised by its own mean and unbiased variance (He et al. 2022, section 4.2).
    """
    target = target.float()
    if norm_pix:
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
    error = (pred.float() - target).square().mean(-1)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def _take(tokens: Tensor, ids: Tensor) -> Tensor:
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


def _sincos(positions: Tensor, dim: int) -> Tensor:
    """Vaswani et al. 2017 positions, sines then cosines: any shape [...] -> [..., dim]."""
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device=positions.device) / (dim / 2))
    angles = positions.double().unsqueeze(-1) * omega
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the cache outlives the caller's mode
def grid_positions(steps: int, bands: int, dim: int, device: torch.device, scale: float = 1.0) -> Tensor:
    """2-D sin-cos [1, steps * bands, dim], time-major; the mel half comes first, as in MAE's code."""
    times = _sincos(torch.arange(steps) * scale, dim // 2)[:, None].expand(-1, bands, -1)
    mels = _sincos(torch.arange(bands), dim // 2)[None].expand(steps, -1, -1)
    return torch.cat([mels, times], dim=-1).reshape(1, steps * bands, dim).to(device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def flat_positions(count: int, dim: int, device: torch.device) -> Tensor:
    return _sincos(torch.arange(count), dim)[None].to(device)
