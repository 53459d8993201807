"""The statistics of a clip are those of its own tokens and frames, whatever it is padded with."""

import numpy as np
import pytest
import torch

from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.encoder import AudioEncoder, EncoderConfig
from audiomae.model.statistics import TokenStatistics

D, BLOCKS, MELS = 4, 3, 5


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [2, 1 + 6, 3 * 4] and log-mel [2, 1, 9, 5]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 7, D * BLOCKS, generator=draw), torch.randn(2, 1, 9, MELS, generator=draw)


def test_they_are_deviations_of_all_blocks_means_of_all_but_the_last_and_both_of_the_frames() -> None:
    statistics = TokenStatistics(D, BLOCKS, MELS)
    tokens, x = batch()
    patches, frames = tokens[:, 1:].numpy(), x[:, 0].numpy()
    expected = [patches.std(1), patches.mean(1)[:, :-D], frames.mean(1), frames.std(1)]
    found = statistics(tokens, None, x, None)
    assert found.shape == (2, statistics.width) and statistics.width == D * 5 + 2 * MELS
    np.testing.assert_allclose(found.numpy(), np.concatenate(expected, axis=1), atol=1e-6)


def test_padding_changes_nothing() -> None:
    statistics = TokenStatistics(D, BLOCKS, MELS)
    tokens, x = batch()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    found = statistics(tokens, mask, x, torch.tensor([9, 6]))
    alone = statistics(tokens[1:, :4], None, x[1:, :, :6], None)
    torch.testing.assert_close(found[1:], alone, atol=1e-6, rtol=0)


def test_fitted_they_are_standardised_kind_by_kind() -> None:
    statistics = TokenStatistics(D, BLOCKS, MELS)
    rows = 3 + 5 * torch.randn(50, statistics.width, generator=torch.Generator().manual_seed(1))
    rows[:, 0] = 7.0  # never varies
    statistics.fit(rows)
    scaled = statistics.scaled(rows)
    assert torch.isfinite(scaled).all() and float(scaled[:, 0].abs().max()) == 0.0
    for part in scaled.split(statistics.parts, dim=1):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(50))


def encoder(**settings: object) -> AudioEncoder:
    """Small, with statistics that were fitted to noise."""
    given = {"centred": True, "discriminant": True, "statistics": True, **settings}
    config = EncoderConfig(backbone=AudioMAEConfig(size="debug"), **given)  # type: ignore[arg-type]
    made = AudioEncoder.from_config(config)
    assert made.statistics is not None and made.discriminant is not None and made.centre is not None
    draw = torch.Generator().manual_seed(2)
    made.statistics.fit(torch.randn(30, made.statistics.width, generator=draw))
    made.centre.copy_(0.01 * torch.randn(made.width, generator=draw))
    made.discriminant.copy_(torch.randn(made.width, made.dim, generator=draw))
    return made


@pytest.mark.parametrize("long_input", ["chunk", "extend", "interpolate"])
def test_a_vector_is_the_same_in_any_batch_saved_and_loaded(long_input: str, tmp_path) -> None:
    made = encoder(long_input=long_input, crops=2)
    draw = np.random.default_rng(0)
    sounds = [draw.normal(0, 0.1, size).astype(np.float32) for size in (80_000, 16_000, 33_000)]
    together = made.embed(sounds)
    alone = np.concatenate([made.embed([sound]) for sound in sounds])
    assert together.shape == (3, made.dim)
    np.testing.assert_allclose((together * alone).sum(1), 1, atol=1e-5)
    made.save(tmp_path / "encoder")
    again = AudioEncoder.load(tmp_path / "encoder", device="cpu")
    assert again.fingerprint == made.fingerprint
    np.testing.assert_allclose(again.embed(sounds), together, atol=1e-6)


def test_before_they_are_fitted_a_vector_is_what_it_is_without_them() -> None:
    config = EncoderConfig(backbone=AudioMAEConfig(size="debug"), centred=True, discriminant=True)
    plain = AudioEncoder.from_config(config)
    beside = AudioEncoder.from_config(config.model_copy(update={"statistics": True}))
    sound = np.random.default_rng(0).normal(0, 0.1, 40_000).astype(np.float32)
    np.testing.assert_allclose(beside.embed([sound]), plain.embed([sound]), atol=1e-6)
    x = torch.randn(2, 1, 200, 80, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder().train().embed_spectrogram(x), plain.train().embed_spectrogram(x))
    assert beside.fingerprint != plain.fingerprint
    assert beside.with_pooling("max").statistics is None


def test_a_change_of_what_is_standardised_by_changes_the_fingerprint() -> None:
    made = encoder()
    before = made.fingerprint
    assert made.statistics is not None
    made.statistics.mean.add_(0.1)
    assert made.fingerprint != before


def test_without_the_map_that_takes_them_in_they_are_refused() -> None:
    with pytest.raises(ValueError, match="discriminant"):
        EncoderConfig(statistics=True, centred=True)
