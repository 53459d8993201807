"""A timm ViT as spectrogram backbone: the same tokens as timm computes, padding without effect."""

import pytest
import timm
import torch

from audiomae.model.chunking import encode_long
from audiomae.model.vit import SpectrogramViT, SpectrogramViTConfig

ARGS = {"img_size": [64, 32], "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}


def make(architecture: str = "vit_tiny_patch16_224", **model_args) -> SpectrogramViT:
    torch.manual_seed(0)
    config = SpectrogramViTConfig(
        architecture=architecture,
        model_args={**ARGS, **model_args},
        img_size=(64, 32),
        patch_size=(16, 16),
        embed_dim=48,
    )
    model = SpectrogramViT(config).eval()
    torch.nn.init.normal_(model.vit.pos_embed, std=0.5)
    return model


def spectrogram(lengths):
    x = torch.randn(len(lengths), 1, max(lengths), 32, generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(lengths):
        x[row, :, length:] = 0
    return x


@pytest.mark.parametrize("model_args", [{}, {"reg_tokens": 2}, {"no_embed_class": True}, {"pre_norm": True}])
def test_full_window_equals_timm(model_args):
    model = make(**model_args)
    x = spectrogram([64, 64])
    expected = model.vit.forward_features(x)
    prefix = model.vit.num_prefix_tokens
    out = model.encode(x)
    assert out.grid == model.config.grid == (4, 2)
    torch.testing.assert_close(out.tokens[:, 0], expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.tokens[:, 1:], expected[:, prefix:], rtol=0, atol=1e-5)


def test_model_without_cls_gets_the_mean():
    model = make(class_token=False, global_pool="avg")
    out = model.encode(spectrogram([64, 20]), torch.tensor([64, 20]))
    torch.testing.assert_close(out.tokens[1, 0], out.tokens[1, 1:5].mean(0), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="needs a cls token"):
        model.encode(spectrogram([64]), want_cls_attention=True)


@pytest.mark.parametrize("long_input", ["chunk", "interpolate"])
def test_tokens_do_not_depend_on_the_batch(long_input):
    model = make()
    lengths = [150, 64, 40, 150, 3]
    x = spectrogram(lengths)
    out = encode_long(model, x, torch.tensor(lengths), long_input, want_cls_attention=True)
    for row, length in enumerate(lengths):
        alone = encode_long(model, x[row : row + 1, :, :length], None, long_input, want_cls_attention=True)
        real = out.token_mask[row]
        torch.testing.assert_close(out.tokens[row, real], alone.tokens[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(out.cls_attention[row, real[1:]], alone.cls_attention[0], rtol=0, atol=1e-6)


def test_learned_positions_cannot_extend():
    with pytest.raises(ValueError, match=r"10 time steps, but 4 learned positions"):
        encode_long(make(), spectrogram([150]), None, "extend")


def test_other_networks_are_refused():
    config = SpectrogramViTConfig(architecture="resnet10t", img_size=(64, 32), patch_size=(16, 16), embed_dim=48)
    with pytest.raises(ValueError, match="expected a VisionTransformer"):
        SpectrogramViT(config, timm.create_model("resnet10t"))
