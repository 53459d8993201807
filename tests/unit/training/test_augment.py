"""Each transform does what it says, repeats with its seed, and depends on nothing else."""

import math

import pytest
import torch

from audiomae.training import augment
from audiomae.training.augment import AugmentConfig

ALL = AugmentConfig(
    time_shift=True, gain_db=6, stretch=1.3, freq_crop=0.2, mix=0.4, eq_db=3, time_masks=2, freq_masks=2
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrograms(count: int = 4, frames: int = 260, bands: int = 80) -> torch.Tensor:
    return torch.randn(count, frames, bands, generator=seeded(9)) * 2 - 5


def test_everything_together_is_seeded_and_finite():
    x = spectrograms()
    first, again = (augment.augment(x, 200, ALL, seeded(3)) for _ in range(2))
    assert first.shape == (4, 200, 80) and torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, augment.augment(x, 200, ALL, seeded(4)))


def test_nothing_switched_on_is_the_plain_window():
    off = AugmentConfig(time_shift=False, gain_db=0)
    x = spectrograms()
    assert torch.equal(augment.augment(x, 200, off, seeded()), x[:, :200])
    assert off.source_frames(200) == 200 and ALL.source_frames(200) == 260


def test_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    augment.augment(spectrograms(), 200, ALL, seeded())
    assert torch.equal(state, torch.get_rng_state())


def test_time_shift_rolls_each_clip_by_its_own_offset():
    x = torch.arange(50.0)[None, :, None].expand(8, 50, 3)
    shifted = augment.time_shift(x, seeded())
    offsets = set()
    for row in shifted[:, :, 0]:
        start = int(row[0])
        assert torch.equal(row, torch.roll(torch.arange(50.0), -start))
        offsets.add(start)
    assert len(offsets) > 4


def test_gain_is_uniform_over_a_clip_and_bounded():
    x = spectrograms(64)
    change = augment.gain(x, 6.0, seeded()) - x
    per_clip = change.mean(dim=(1, 2))
    assert torch.allclose(change, per_clip[:, None, None].expand_as(change), atol=1e-5)
    limit = 6 * math.log(10) / 10
    assert per_clip.abs().max() <= limit + 1e-5 and per_clip.max() > limit / 2 and per_clip.min() < -limit / 2


def test_background_mix_adds_power():
    x = spectrograms(6, 20, 5)
    x -= x.logsumexp((1, 2), keepdim=True)  # all at one level
    mixed = augment.background_mix(x, 0.5, 1.0, seeded(1))
    draw = seeded(1)
    share = torch.rand(6, 1, 1, generator=draw) * 0.5
    torch.rand(6, 1, 1, generator=draw)
    other = torch.randperm(6, generator=draw)
    expected = ((1 - share) * x.exp() + share * x[other].exp()).log()
    assert torch.allclose(mixed, expected, atol=1e-5)


def test_a_background_has_the_clips_level_however_it_was_recorded():
    x = spectrograms(6, 20, 5)
    louder = x + torch.tensor([0.0, 3.0, -2.0, 5.0, 1.0, -4.0])[:, None, None]
    mixed = augment.background_mix(x, 0.5, 1.0, seeded(1))
    again = augment.background_mix(louder, 0.5, 1.0, seeded(1))
    assert torch.allclose(again - louder, mixed - x, atol=1e-4)
    assert torch.allclose(mixed.logsumexp((1, 2)), x.logsumexp((1, 2)), atol=1e-4)


def test_equaliser_is_one_smooth_curve_per_clip():
    x = spectrograms(400, 7, 51)
    change = (augment.equalise(x, 3.0, seeded()) - x) * 10 / math.log(10)
    assert torch.allclose(change, change[:, :1].expand_as(change), atol=1e-3)
    curve = change[:, 0]
    bends = (curve[:, 2:] - 2 * curve[:, 1:-1] + curve[:, :-2]).abs() > 1e-2
    assert bends.sum(dim=1).max() <= augment.EQ_POINTS - 2
    assert curve[:, 0].std() == pytest.approx(3.0, abs=0.4) and abs(curve.mean()) < 0.3


def test_background_mix_leaves_the_other_clips_alone():
    x = spectrograms(200, 4, 3)
    mixed = augment.background_mix(x, 0.5, 0.25, seeded())
    untouched = (mixed == x).all(dim=2).all(dim=1).float().mean()
    assert 0.6 < untouched < 0.9


def test_resampled_crop_of_the_whole_is_the_identity():
    x = spectrograms(3, 200)
    assert torch.allclose(augment.resampled_crop(x, 200, 1.0, 0.0, seeded()), x, atol=1e-3)


def test_resampled_crop_changes_speed_within_bounds():
    ramp = torch.arange(300.0)[None, :, None].expand(64, 300, 4)
    cropped = augment.resampled_crop(ramp, 200, 1.5, 0.0, seeded())
    speed = (cropped[:, 150, 0] - cropped[:, 50, 0]) / 100
    assert speed.min() >= 1 / 1.5 - 1e-3 and speed.max() <= 1.5 + 1e-3
    assert speed.min() < 0.8 and speed.max() > 1.25


def test_resampled_crop_moves_along_frequency():
    ramp = torch.arange(80.0)[None, None].expand(64, 50, 80)
    cropped = augment.resampled_crop(ramp, 50, 1.0, 0.3, seeded())
    span = cropped[:, 0, -2] - cropped[:, 0, 1]
    assert span.min() < 65 and span.max() <= 78 and (cropped.min() >= 0) and (cropped.max() <= 79)


@pytest.mark.parametrize("axis", [1, 2])
def test_masks_fill_whole_spans_with_the_mean(axis):
    x = spectrograms(40, 100, 60)
    masked = augment.mask_spans(x, axis, 2, 0.2, seeded())
    changed = (masked != x).any(dim=3 - axis)
    share = changed.float().mean(dim=1)
    assert 0 < share.max() <= 0.4 + 0.02 and share.mean() == pytest.approx(0.19, abs=0.06)
    means = x.mean(dim=(1, 2))
    for row in range(40):
        filled = masked[row][changed[row]] if axis == 1 else masked[row][:, changed[row]]
        assert torch.allclose(filled, means[row].expand_as(filled), atol=1e-5)


@pytest.mark.parametrize("broken", [{"time_masks": 1, "time_mask_share": 0}, {"freq_masks": 1, "freq_mask_share": 0}])
def test_masks_without_a_size_are_refused(broken):
    with pytest.raises(ValueError, match="give the masks a size"):
        AugmentConfig(**broken)


def test_pitch_moves_a_tone_along_the_mel_axis_and_nothing_else():
    x = torch.full((64, 40, 50), -10.0)
    x[:, :, 25] = 0.0
    moved = augment.resampled_crop(x, 40, 1.0, 0.0, seeded(), pitch=0.1)
    peaks = moved.mean(1).argmax(1)
    assert peaks.min() >= 20 and peaks.max() <= 30 and len(set(peaks.tolist())) > 5
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), atol=1e-4, rtol=0)


def test_scales_give_each_view_its_crop_length():
    config = AugmentConfig(scales=(1.0, 0.5), stretch=1.2)
    assert config.crop_frames(100, 2) == [120, 60] and config.crop_frames(100, 1) == [120]
    with pytest.raises(ValueError, match="shares of the window"):
        AugmentConfig(scales=(1.0, 0.0))
