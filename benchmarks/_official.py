"""The official AudioMAE++ repository's way through the model, for comparisons: what its users run today.

Rebuilt from github.com/SarthakYadav/audiomae-plusplus-official: `src/models/layers.py` (attention with its scores
written out) and `hear_api/runtime.py` (one sound at a time, cut into whole windows, one window per forward).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiomae.model.encoder import AudioEncoder


class OfficialAttention(nn.Module):
    """softmax(q k^T) v in three steps; takes over the weights of a timm `Attention`."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.scale: float = attention.scale
        self.qkv: nn.Module = attention.qkv
        self.proj: nn.Module = attention.proj

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Tokens [B, N, D] -> [B, N, D]; the official code knows no mask."""
        rows, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(rows, tokens, dim))


def use_official_attention(encoder: AudioEncoder) -> None:
    """Replace the fused attention of every block, decoder included; the weights stay."""
    backbone: Any = encoder.backbone
    for network in filter(None, (backbone, backbone.decoder)):
        for block in network.blocks:
            block.attn = OfficialAttention(block.attn)


@torch.no_grad()
def embed_sound(encoder: AudioEncoder, waveform: Tensor) -> Tensor:
    """One sound, float32 [S] -> unit vector float32 [dim], the tail's padding dropped."""
    backbone: Any = encoder.backbone
    x, _ = encoder.features(waveform[None])  # [1, 1, T, F]
    window = backbone.config.img_size[0]
    missing = window - x.shape[2] % window  # a whole window more where nothing is missing, as the original
    tokens = [backbone.encode(unit).tokens[:, 1:] for unit in F.pad(x, (0, 0, 0, missing)).split(window, dim=2)]
    padded = tokens[0].shape[1] * missing // window
    sequence = torch.hstack(tokens)
    sequence = sequence[:, : sequence.shape[1] - padded]
    return encoder.head(torch.cat([sequence.mean(1, keepdim=True), sequence], dim=1))[0]
