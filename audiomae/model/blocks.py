"""The transformer block of AudioMAE++, from timm's parts, and a look at what its cls token attends to."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, Mlp, SwiGLU
from torch import Tensor, nn

layer_norm = partial(nn.LayerNorm, eps=1e-6)
silu = partial(nn.SiLU, inplace=True)  # spares an allocation as wide as the hidden layer: 10% of a CPU forward


class MacaronBlock(nn.Module):
    """x + FFN/2, + attention, + SwiGLU FFN, each pre-normed (Gulati et al. 2020's macaron, AudioMAE++'s SwiGLU)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, ffn2_norm: str, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.ffn1 = Mlp(dim, int(dim * mlp_ratio), act_layer=silu)
        self.norm2 = layer_norm(dim)
        self.attn = Attention(dim, heads, qkv_bias=True)
        self.norm3 = layer_norm(dim)
        self.ffn2 = SwiGLU(dim, int(4 * dim * (2 / 3)), act_layer=silu, norm_layer=layer_norm)
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


def cls_attention(attn: Attention, x: Tensor, patch_mask: Tensor, prefix: int = 1) -> Tensor:
    """How much token 0 attends to each patch, mean over heads: attention input x [B, prefix + N, D] -> float32 [B, N].

    Only the cls query is computed; the softmax runs over a clip's real patches, so its row sums to 1.
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
