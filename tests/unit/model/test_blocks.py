"""The parts of a block compute what timm's of the same names do, and loading an encoder loads nothing of timm."""

import subprocess
import sys
from functools import partial

import pytest
import timm.layers
import torch
from torch import nn

from audiomae.model import blocks

DIM, HIDDEN = 24, 40
LIGHT = """
import sys
import audiomae.model.encoder, audiomae.embedding.stages, audiomae.training.loop
print(" ".join(name for name in ("timm", "torchvision", "torch._dynamo", "ray", "faiss") if name in sys.modules))
"""


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (blocks.Mlp(DIM, HIDDEN), timm.layers.Mlp(DIM, HIDDEN, act_layer=nn.SiLU)),
        (
            blocks.SwiGLU(DIM, HIDDEN),
            timm.layers.SwiGLU(DIM, HIDDEN, norm_layer=partial(nn.LayerNorm, eps=1e-6)),
        ),
        (blocks.Attention(DIM, 3), timm.layers.Attention(DIM, 3, qkv_bias=True)),
    ],
    ids=["mlp", "swiglu", "attention"],
)
def test_parts_equal_timms(ours: nn.Module, theirs: nn.Module) -> None:
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    if isinstance(ours, blocks.Attention):
        mask = (torch.arange(5) < torch.tensor([[5], [3]]))[:, None, None]
        assert torch.allclose(ours(x, attn_mask=mask), theirs(x, attn_mask=mask), atol=1e-6)


def test_dropped_branches_equal_timms() -> None:
    x = torch.ones(64, 2, DIM)
    ours, theirs = blocks.DropPath(0.25), timm.layers.DropPath(0.25)
    torch.manual_seed(0)
    dropped = ours(x)
    torch.manual_seed(0)
    assert torch.equal(dropped, theirs(x)) and 0 < (dropped == 0).float().mean() < 1
    assert torch.equal(ours.eval()(x), x)


def test_an_encoder_loads_nothing_of_timm() -> None:
    found = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
