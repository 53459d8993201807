"""AudioMAE++: layouts, block and loss against slow references, padding without effect."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from audiomae.model.audiomae import AudioMAE, AudioMAEConfig, MacaronBlock, grid_positions, mae_loss
from audiomae.model.masking import random_masking

DEBUG = AudioMAEConfig(size="debug")


def make(decoder: bool = True, **settings) -> AudioMAE:
    torch.manual_seed(0)
    return AudioMAE(AudioMAEConfig(size="debug", **settings), decoder=decoder).eval()


def spectrogram(batch: int = 2, frames: int = 200, mels: int = 80, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 1, frames, mels, generator=torch.Generator().manual_seed(seed))


class Step(NamedTuple):
    """A masked step: scalar loss, predicted and true patches [B, N, P], mask [B, N], visible tokens."""

    loss: torch.Tensor
    pred: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor
    tokens: torch.Tensor


def masked_step(model: AudioMAE, x: torch.Tensor, seed: int = 0) -> Step:
    """What an objective does with a view: hide three quarters, encode what is visible, reconstruct the rest."""
    grid = model.grid(x.shape[2])
    every = torch.ones(len(x), grid[0] * grid[1], dtype=torch.bool)
    drawn = random_masking(every, grid, 0.75, "unstructured", torch.Generator().manual_seed(seed))
    tokens = model.encode(x, ids_keep=drawn.ids_keep).tokens
    pred, target = model.decode(tokens, drawn.ids_restore), model.patchify(x)
    return Step(mae_loss(pred, target, drawn.mask, model.config.norm_pix_loss), pred, target, drawn.mask, tokens)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "grid"),
    [
        ({}, (50, 5)),
        ({"img_size": (224, 224), "patch_size": (16, 16)}, (14, 14)),
        ({"img_size": (384, 384), "patch_size": (16, 16)}, (24, 24)),
        ({"img_size": (448, 448), "patch_size": (32, 32)}, (14, 14)),
        ({"img_size": (512, 128), "patch_size": (16, 16)}, (32, 8)),
        ({"img_size": (1024, 128), "patch_size": (16, 16), "stride": (10, 10)}, (101, 12)),
    ],
)
def test_layouts_train_and_encode(layout, grid):
    model = make(**layout)
    frames, mels = model.config.img_size
    x = spectrogram(1, frames, mels)
    assert model.config.grid == model.grid(frames) == grid
    out = masked_step(model, x)
    assert out.pred.shape == out.target.shape == (1, grid[0] * grid[1], math.prod(model.config.patch_size))
    assert torch.isfinite(out.loss)
    assert model.encode(x).tokens.shape == (1, 1 + grid[0] * grid[1], 64)


@pytest.mark.parametrize("stride", [None, (10, 10)])
def test_patchify_equals_a_loop(stride):
    model = make(img_size=(64, 32), patch_size=(16, 16), stride=stride)
    x = spectrogram(2, 64, 32)
    steps, bands = model.config.grid
    st, sf = model.config.steps
    patches = model.patchify(x)
    for t in range(steps):
        for f in range(bands):
            expected = x[:, 0, t * st : t * st + 16, f * sf : f * sf + 16].flatten(1)
            assert (patches[:, t * bands + f] == expected).all()


def test_last_partial_patch_is_zero_padded():
    model = make()
    assert model.grid(531)[0] == 133 and model.grid(1)[0] == 1
    patches = model.patchify(spectrogram(1, 6)).unflatten(1, (2, 5))
    assert (patches[:, 1].unflatten(2, (4, 16))[:, :, 2:] == 0).all()


@pytest.mark.parametrize("size", ["tiny", "small", "medium", "base", "large", "huge"])
def test_named_sizes(size):
    widths = {"tiny": 192, "small": 384, "medium": 512, "base": 768, "large": 1024, "huge": 1280}
    config = AudioMAEConfig(size=size)
    assert config.embed_dim == widths[size] and config.depth == {"large": 24, "huge": 32}.get(size, 12)
    assert AudioMAEConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 7}, "num_heads: expected a divisor"),
        ({"stride": (5, 16)}, "stride 5"),
        ({"img_size": (202, 80)}, "not a multiple"),
        ({"size": "enormous"}, "debug"),
        ({"patches": 3}, "patches"),
    ],
)
def test_bad_config_is_explained(settings, message):
    with pytest.raises(ValidationError, match=message):
        AudioMAEConfig(**settings)


def test_wrong_mel_count_is_explained():
    with pytest.raises(ValueError, match=r"expected \[B, 1, T, 80\]"):
        make().encode(spectrogram(1, 200, 64))


# --- block and positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["norm3", "norm2"])
def test_block_equals_the_written_out_formula(norm):
    torch.manual_seed(0)
    block = MacaronBlock(24, 3, 4.0, norm).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 7, 24)
    keep = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])

    def ffn1(v):
        return block.ffn1.fc2(F.silu(block.ffn1.fc1(v)))

    def attention(v):
        out = torch.zeros_like(v)
        q, k, w = block.attn.qkv(v).chunk(3, dim=-1)
        for b in range(2):
            for head in range(3):
                cut = slice(head * 8, head * 8 + 8)
                scores = q[b, :, cut] @ k[b, :, cut].T / math.sqrt(8)
                out[b, :, cut] = scores.masked_fill(~keep[b], -math.inf).softmax(-1) @ w[b, :, cut]
        return block.attn.proj(out)

    def swiglu(v):
        return block.ffn2.fc2(block.ffn2.norm(F.silu(block.ffn2.fc1_g(v)) * block.ffn2.fc1_x(v)))

    h = x + 0.5 * ffn1(block.norm1(x))
    h = h + attention(block.norm2(h))
    expected = h + swiglu(getattr(block, norm)(h))
    torch.testing.assert_close(block(x, keep[:, None, None]), expected, rtol=1e-4, atol=1e-4)


def test_cls_attention_equals_the_softmax_row():
    model = make()
    block = model.blocks[0]
    x = torch.randn(2, 6, 64)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    normed = block.norm2(x + 0.5 * block.ffn1(block.norm1(x)))
    q, k, _ = block.attn.qkv(normed).chunk(3, dim=-1)
    expected = torch.zeros(2, 5)
    for head in range(2):
        cut = slice(head * 32, head * 32 + 32)
        scores = torch.einsum("bd,bnd->bn", q[:, 0, cut], k[:, 1:, cut]) / math.sqrt(32)
        expected += scores.masked_fill(~mask, -math.inf).softmax(-1) / 2
    torch.testing.assert_close(block.cls_attention(x, mask), expected, rtol=1e-5, atol=1e-6)


def test_positions_are_mae_sincos():
    table = grid_positions(3, 5, 16, torch.device("cpu"))[0]
    for t in range(3):
        for f in range(5):
            for half, position in ((0, f), (8, t)):
                for i in range(4):
                    angle = position / 10000 ** (i / 4)
                    assert table[t * 5 + f, half + i] == pytest.approx(math.sin(angle), abs=1e-6)
                    assert table[t * 5 + f, half + 4 + i] == pytest.approx(math.cos(angle), abs=1e-6)


def test_long_input_extends_or_squeezes_positions():
    model = make()
    window = grid_positions(50, 5, 64, torch.device("cpu"))
    extended = model._positions((100, 5), None, "extend", torch.device("cpu"))
    squeezed = model._positions((100, 5), None, "interpolate", torch.device("cpu"))
    torch.testing.assert_close(extended[:, :250], window)
    torch.testing.assert_close(squeezed.unflatten(1, (100, 5))[:, ::2], window.unflatten(1, (50, 5)))
    mixed = model._positions((100, 5), torch.tensor([400, 200]), "interpolate", torch.device("cpu"))
    torch.testing.assert_close(mixed[:1], squeezed)
    torch.testing.assert_close(mixed[1:, :250], window)


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["extend", "interpolate"])
def test_tokens_do_not_depend_on_the_batch(positions):
    model = make()
    lengths = torch.tensor([400, 203, 7, 1])
    x = spectrogram(4, 400)
    for row, length in enumerate(lengths.tolist()):
        x[row, :, length:] = 0
    out = model.encode(x, lengths, positions=positions, want_cls_attention=True)
    for row, length in enumerate(lengths.tolist()):
        alone = model.encode(x[row : row + 1, :, :length], positions=positions, want_cls_attention=True)
        real = out.token_mask[row]
        assert real.sum() == alone.tokens.shape[1]
        torch.testing.assert_close(out.tokens[row, real], alone.tokens[0], rtol=0, atol=1e-5)
        scores = out.cls_attention[row]
        torch.testing.assert_close(scores[real[1:]], alone.cls_attention[0], rtol=0, atol=1e-6)
        assert (scores[~real[1:]] == 0).all()


# --- the masked step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_equals_a_loop(norm_pix):
    pred, target = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]).float()
    errors = []
    for b in range(2):
        for n in range(6):
            if mask[b, n]:
                wanted = target[b, n]
                if norm_pix:
                    wanted = (wanted - wanted.mean()) / (wanted.var() + 1e-6) ** 0.5
                errors.append(((pred[b, n] - wanted) ** 2).mean())
    assert mae_loss(pred, target, mask, norm_pix).item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_encoder_sees_only_visible_patches():
    model = make()
    x = spectrogram(1)
    out = masked_step(model, x)
    hidden = out.mask[0].bool().unflatten(0, (50, 5))
    changed = x.clone()
    changed[0, 0][hidden.repeat_interleave(4, 0).repeat_interleave(16, 1)] += 1.0
    again = masked_step(model, changed)
    torch.testing.assert_close(out.tokens, again.tokens)
    torch.testing.assert_close(out.pred, again.pred)


@pytest.mark.parametrize("norm", ["norm3", "norm2"])
def test_every_trainable_parameter_gets_a_gradient(norm):
    """A parameter without one would stall DDP."""
    model = make(ffn2_norm=norm).train()
    masked_step(model, spectrogram()).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_a_few_steps_reduce_the_loss():
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    x = torch.sin(torch.arange(200)[:, None] * torch.linspace(0.02, 0.3, 80)).expand(8, 1, 200, 80)
    losses = []
    for step in range(25):
        loss = masked_step(model, x, seed=step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_without_decoder_decoding_is_refused():
    model = make(decoder=False)
    with pytest.raises(RuntimeError, match="no decoder"):
        masked_step(model, spectrogram(1))
