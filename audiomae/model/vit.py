"""Any plain Vision Transformer of timm as a spectrogram backbone: AudioMAE's ViT-B above all.

Same contract as AudioMAE's encoder: time-first log-mel in, cls and time-major patch tokens out, padding masked.
"""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from audiomae.errors import ConfigError
from audiomae.model.audiomae import EncoderOutput
from audiomae.model.blocks import cls_attention
from audiomae.model.encoder_config import Positions, SpectrogramViTConfig


class SpectrogramViT(nn.Module):
    """The wrapped network, `self.vit`. Learned positions: shorter input takes the first rows, longer is resampled."""

    def __init__(self, config: SpectrogramViTConfig, vit: VisionTransformer | None = None) -> None:
        super().__init__()
        self.config = config
        vit = vit or timm.create_model(config.architecture, pretrained=False, **{**config.model_args, **FIXED_ARGS})
        self.vit = check_vit(vit, config.architecture)

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.config.embed_dim

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self.vit.blocks)

    def step_counts(self, frame_lengths: Tensor) -> Tensor:
        """Time steps of patches that clips of int64[B] frames have; a last partial patch counts."""
        patch = self.config.patch_size[0]
        return (frame_lengths + patch - 1).div(patch, rounding_mode="floor").clamp(min=1)

    def encode(
        self,
        x: Tensor,
        frame_lengths: Tensor | None = None,
        *,
        positions: Positions = "interpolate",
        want_cls_attention: bool = False,
        every_block: bool = False,
    ) -> EncoderOutput:
        """As `AudioMAE.encode`: log-mel [B, 1, T, F] -> tokens [B, 1 + N, D]; learned positions cannot `extend`."""
        vit = self.vit
        x = F.pad(x, (0, 0, 0, -x.shape[2] % self.config.patch_size[0]))
        patches = vit.patch_embed.proj(x)
        grid = (int(patches.shape[2]), int(patches.shape[3]))
        patches = vit.patch_embed.norm(patches.flatten(2).transpose(1, 2))
        prefix, embedded = self._positions(grid, frame_lengths, positions)
        tokens = vit.norm_pre(torch.cat([prefix.expand(len(x), -1, -1).to(patches.dtype), patches + embedded], dim=1))
        token_mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        attn_mask = None
        if frame_lengths is not None:
            real = torch.arange(grid[0], device=x.device) < self.step_counts(frame_lengths.to(x.device))[:, None]
            token_mask[:, vit.num_prefix_tokens :] = real.repeat_interleave(grid[1], dim=1)
            attn_mask = token_mask[:, None, None]
        attention, passed = None, list[Tensor]()
        for index, block in enumerate(vit.blocks):
            if want_cls_attention and index == len(vit.blocks) - 1:
                attention = self._cls_attention(block, tokens, token_mask)
            tokens = block(tokens, attn_mask=attn_mask)
            if every_block:
                passed.append(tokens)
        tokens = vit.fc_norm(vit.norm(tokens))  # timm gives one of the two to a model, the other is the identity
        if every_block:
            tokens = torch.cat([*passed[:-1], tokens], dim=-1)
        return self._output(tokens, token_mask, grid, attention, padded=frame_lengths is not None)

    def _output(
        self, tokens: Tensor, token_mask: Tensor, grid: tuple[int, int], attention: Tensor | None, padded: bool
    ) -> EncoderOutput:
        """Drop register tokens; a model without cls gets the mean of its patches in that place."""
        patches, mask = tokens[:, self.vit.num_prefix_tokens :], token_mask[:, self.vit.num_prefix_tokens :]
        if self.vit.has_class_token:
            cls = tokens[:, :1]
        else:
            cls = (patches * mask.unsqueeze(-1)).sum(1, keepdim=True) / mask.sum(1).view(-1, 1, 1)
        token_mask = F.pad(mask, (1, 0), value=True)
        return EncoderOutput(torch.cat([cls, patches], dim=1), token_mask, grid, attention, padded)

    def _cls_attention(self, block: Any, tokens: Tensor, token_mask: Tensor) -> Tensor:
        if not self.vit.has_class_token:
            raise ValueError(
                f"attention_score pooling needs a cls token, {self.config.architecture} has none: choose mean"
            )
        prefix = self.vit.num_prefix_tokens
        return cls_attention(block.attn, block.norm1(tokens), token_mask[:, prefix:], prefix)

    def _positions(
        self, grid: tuple[int, int], frame_lengths: Tensor | None, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Prefix tokens with their positions [1, P, D], and patch positions [1 or B, N, D]."""
        vit, window = self.vit, self.config.grid
        prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        special = torch.cat(prefix, dim=1) if prefix else vit.pos_embed[:, :0]
        table = vit.pos_embed
        if not vit.no_embed_class:
            special, table = special + table[:, : special.shape[1]], table[:, special.shape[1] :]
        steps = grid[0]
        if steps <= window[0]:
            return special, table[:, : steps * grid[1]]
        if positions == "extend":
            raise ValueError(
                f"{steps} time steps, but {window[0]} learned positions: choose long_input chunk or interpolate"
            )
        if frame_lengths is None:
            return special, self._stretched(table, steps)
        counts = self.step_counts(frame_lengths.to("cpu"))
        rows = table.new_zeros(len(counts), steps * grid[1], table.shape[2])
        for count in counts.unique().tolist():  # clips of one length share a table; few lengths in a batch
            stretched = table if count <= window[0] else self._stretched(table, count)
            size = min(count * grid[1], stretched.shape[1])
            rows[(counts == count).to(rows.device), :size] = stretched[:, :size]
        return special, rows

    def _stretched(self, table: Tensor, steps: int) -> Tensor:
        grid = list(self.config.grid)
        return resample_abs_pos_embed(table, [steps, grid[1]], old_size=grid, num_prefix_tokens=0)


FIXED_ARGS = {"num_classes": 0, "in_chans": 1}


def check_vit(model: nn.Module, name: str) -> VisionTransformer:
    """The model, if it is a plain ViT with absolute positions over one channel.

    Raises:
        ConfigError: it is something else; the message names what fits.
    """
    if not isinstance(model, VisionTransformer) or model.pos_embed is None:
        raise ConfigError(
            f"timm model {name!r}: expected a VisionTransformer with absolute positions, got {type(model).__name__}; "
            "for example hf_hub:gaunernst/vit_base_patch16_1024_128.audiomae_as2m"
        )
    return model
