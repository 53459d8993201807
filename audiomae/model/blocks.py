"""The transformer block of AudioMAE++ and its parts, and a look at what its cls token attends to.

The parts compute what timm's of the same names do, from weights of the same names (tested). They are written out
because importing timm loads all of its models, and torchvision: more CPU time than torch itself, in every process.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

layer_norm = partial(nn.LayerNorm, eps=1e-6)
silu = partial(nn.SiLU, inplace=True)  # spares an allocation as wide as the hidden layer: 10% of a CPU forward


class Attention(nn.Module):
    """Multi-head self-attention: [B, N, D] -> [B, N, D]. `attn_mask`, True where a key counts, as torch takes it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = float((dim // heads) ** -0.5)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        batch, tokens, dim = x.shape
        parts = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = silu()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """SiLU(gate) * x, normed, projected (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)
        self.act = silu()
        self.norm = layer_norm(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.fc1_g(x), self.fc1_x(x)
        return self.fc2(self.norm(self.act(gate) * x))


class DropPath(nn.Module):
    """Drops a clip's whole branch at this rate and scales the kept ones up (Huang et al. 2016, stochastic depth)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        kept = x.new_empty((len(x), *[1] * (x.dim() - 1))).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


class MacaronBlock(nn.Module):
    """x + FFN/2, + attention, + SwiGLU FFN, each pre-normed (Gulati et al. 2020's macaron, AudioMAE++'s SwiGLU)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, ffn2_norm: str, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.ffn1 = Mlp(dim, int(dim * mlp_ratio))
        self.norm2 = layer_norm(dim)
        self.attn = Attention(dim, heads)
        self.norm3 = layer_norm(dim)
        self.ffn2 = SwiGLU(dim, int(4 * dim * (2 / 3)))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.share_norm2 = ffn2_norm == "norm2"
        self.norm3.requires_grad_(not self.share_norm2)  # a parameter without a gradient would stall DDP

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = torch.add(x, self.ffn1(self.norm1(x)), alpha=0.5)
        x = x + self.drop_path(self.attn(self.norm2(x), attn_mask=attn_mask))
        norm = self.norm2 if self.share_norm2 else self.norm3
        return x + self.drop_path(self.ffn2(norm(x)))

    def cls_attention(self, x: Tensor, patch_mask: Tensor) -> Tensor:
        """Attention of token 0 to the patches, for this block's input x [B, 1 + N, D] -> [B, N], rows sum to 1."""
        return cls_attention(self.attn, self.norm2(x + 0.5 * self.ffn1(self.norm1(x))), patch_mask)


def cls_attention(attn: Any, x: Tensor, patch_mask: Tensor, prefix: int = 1) -> Tensor:
    """How much token 0 attends to each patch, mean over heads: attention input x [B, prefix + N, D] -> float32 [B, N].

    `attn` is an `Attention`, or timm's. Only the cls query is computed; the softmax runs over a clip's real patches, so
    its row sums to 1.
    """
    batch, tokens, dim = x.shape
    weight, bias = attn.qkv.weight, attn.qkv.bias
    query = F.linear(x[:, 0], weight[:dim], None if bias is None else bias[:dim])
    keys = F.linear(x[:, prefix:], weight[dim : 2 * dim], None if bias is None else bias[dim : 2 * dim])
    query = attn.q_norm(query.view(batch, attn.num_heads, 1, -1))
    keys = attn.k_norm(keys.view(batch, tokens - prefix, attn.num_heads, -1).transpose(1, 2))
    scores = ((query @ keys.transpose(2, 3)) * attn.scale).squeeze(2).float()
    return scores.masked_fill(~patch_mask[:, None], float("-inf")).softmax(-1).mean(1)


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers, as the official code starts."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
