"""Whole clips through a windowed backbone, against a loop over clips and pieces."""

import pytest
import torch

from audiomae.model import chunking
from audiomae.model.audiomae import AudioMAE, AudioMAEConfig
from audiomae.model.chunking import encode_long

BANDS = 5


@pytest.fixture(scope="module")
def model() -> AudioMAE:
    torch.manual_seed(0)
    return AudioMAE(AudioMAEConfig(size="debug", img_size=(40, 80)), decoder=False).eval()


def clips(lengths):
    x = torch.randn(len(lengths), 1, max(lengths), 80, generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(lengths):
        x[row, :, length:] = 0
    return x


def slowly(model, clip, length):
    """(tokens, cls attention) of one clip [1, T, F], piece by piece."""
    cls, patches, scores, steps = [], [], [], []
    for start in range(0, length, 40):
        piece = clip[None, :, start : min(start + 40, length)]
        out = model.encode(piece, want_cls_attention=True)
        cls.append(out.tokens[0, 0])
        patches.append(out.tokens[0, 1:])
        scores.append(out.cls_attention[0] * out.grid[0])
        steps.append(out.grid[0])
    mean_cls = sum(c * n for c, n in zip(cls, steps, strict=True)) / sum(steps)
    attention = torch.cat(scores)
    return torch.cat([mean_cls[None], *patches]), attention / attention.sum()


@pytest.mark.parametrize(
    "lengths",
    [[100, 100], [80, 80], [40], [40, 17], [7], [97, 40, 80, 3, 41, 120], [1, 200]],
    ids=str,
)
def test_chunks_equal_a_loop(model, lengths, monkeypatch):
    monkeypatch.setattr(chunking, "MAX_PIECES", 3)
    x = clips(lengths)
    out = encode_long(model, x, torch.tensor(lengths), want_cls_attention=True)
    assert out.tokens.shape[1] == 1 + out.grid[0] * out.grid[1]
    for row, length in enumerate(lengths):
        tokens, attention = slowly(model, x[row], length)
        real = out.token_mask[row]
        assert real.sum() == len(tokens)
        torch.testing.assert_close(out.tokens[row, real], tokens, rtol=0, atol=1e-5)
        torch.testing.assert_close(out.cls_attention[row, real[1:]], attention, rtol=0, atol=1e-6)
    assert out.padded == (not bool(out.token_mask.all()))


def test_no_lengths_means_all_frames(model):
    x = clips([100, 100])
    one, other = encode_long(model, x), encode_long(model, x, torch.tensor([100, 100]))
    assert torch.equal(one.tokens, other.tokens) and not one.padded


def test_uniform_batches_run_without_attention_mask(model, monkeypatch):
    """The common case of an embedding job: equal windows, so no mask is built at all."""
    masks = []
    encode = model.encode
    monkeypatch.setattr(
        model, "encode", lambda x, lengths=None, **kw: masks.append(lengths) or encode(x, lengths, **kw)
    )
    encode_long(model, clips([100, 100, 99]), torch.tensor([100, 100, 99]))  # 99 frames fill the same patches
    assert masks == [None, None]


@pytest.mark.parametrize("mode", ["extend", "interpolate"])
def test_one_sequence_modes_run_each_clip_whole(model, mode):
    lengths = [100, 60, 10]
    x = clips(lengths)
    out = encode_long(model, x, torch.tensor(lengths), mode)
    for row, length in enumerate(lengths):
        alone = model.encode(x[row : row + 1, :, :length], positions=mode)
        torch.testing.assert_close(out.tokens[row, out.token_mask[row]], alone.tokens[0], rtol=0, atol=1e-5)


def test_overlapping_patches_do_not_cross_windows():
    torch.manual_seed(0)
    config = AudioMAEConfig(size="debug", img_size=(64, 32), patch_size=(16, 16), stride=(10, 10))
    model = AudioMAE(config, decoder=False).eval()
    x = torch.randn(1, 1, 150, 32)
    out = encode_long(model, x)
    pieces = [model.encode(x[:, :, start : start + 64]).tokens[:, 1:] for start in (0, 64, 128)]
    torch.testing.assert_close(out.tokens[:, 1:], torch.cat(pieces, 1), rtol=0, atol=1e-5)


def test_official_windows_attend_to_their_zero_padding(model):
    x = clips([50])
    official = encode_long(model, x, torch.tensor([50]), official_windows=True)
    padded = model.encode(torch.nn.functional.pad(x, (0, 0, 0, 30))[:, :, 40:])
    torch.testing.assert_close(official.tokens[0, 1 + 50 :], padded.tokens[0, 1 : 1 + 3 * BANDS], rtol=0, atol=1e-5)
    assert official.grid == (13, BANDS)
    masked = encode_long(model, x, torch.tensor([50]))
    assert (masked.tokens[:, 51:] - official.tokens[:, 51:]).abs().max() > 1e-3
