"""Augmentations of log-mel spectrograms, on the model's device, drawn from explicit generators.

A batch is `float[B, T, F]`: natural-log mel power, time first. Each transform takes a `torch.Generator` that lives on
the CPU: its few numbers per clip are drawn there, so that a seed gives the same augmentation on every device, and the
arithmetic runs where the batch lies.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from audiomae.training.recipe import AugmentConfig

DB_TO_LOG_POWER = math.log(10) / 10
EQ_POINTS = 6


def augment(batch: Tensor, window: int, config: AugmentConfig, generator: Generator) -> Tensor:
    """One augmented view of every clip.

    Order: resampled crop (or plain cut to the window), time shift, background mix, equaliser, gain, SpecAugment.

    Args:
        batch: float[B, R, F] with R = `config.source_frames(window)`.
        window: frames of the result.

    Returns:
        float[B, window, F].
    """
    if config.stretch > 1 or config.freq_crop > 0 or config.pitch > 0:
        batch = resampled_crop(batch, window, config.stretch, config.freq_crop, generator, config.pitch)
    else:
        batch = batch[:, :window]
    if config.time_shift:
        batch = time_shift(batch, generator)
    if config.mix > 0:
        batch = background_mix(batch, config.mix, config.mix_prob, generator)
    if config.eq_db > 0:
        batch = equalise(batch, config.eq_db, generator)
    if config.gain_db > 0:
        batch = gain(batch, config.gain_db, generator)
    if config.time_masks:
        batch = mask_spans(batch, 1, config.time_masks, config.time_mask_share, generator)
    if config.freq_masks:
        batch = mask_spans(batch, 2, config.freq_masks, config.freq_mask_share, generator)
    return batch


def resampled_crop(
    batch: Tensor, window: int, stretch: float, freq_crop: float, generator: Generator, pitch: float = 0.0
) -> Tensor:
    """Cut a random rectangle of each spectrogram and resize it to the window (bilinear).

    The random resize crop of Niizumi et al. 2021 (BYOL-A, section III-C): it shifts pitch and speed a little. The
    cut lasts `window * stretch ** u` frames, u uniform in [-1, 1], and keeps 1 - freq_crop to 1 of the mel axis. With
    `pitch` it may also reach past the mel axis by that share of it, where the edge band is repeated.

    Args:
        batch: float[B, R, F], R >= window * stretch.

    Returns:
        float[B, window, F].
    """
    count, frames, bands = batch.shape
    draw = torch.rand(4, count, generator=generator)
    height = window * stretch ** (2 * draw[0] - 1)
    top = draw[1] * (frames - height)
    width = bands * (1 - freq_crop * draw[2])
    left = draw[3] * (bands - width)
    if pitch:
        left = left + (2 * torch.rand(count, generator=generator) - 1) * pitch * bands
    rows = _sample_positions(top, height, window, frames)
    columns = _sample_positions(left, width, bands, bands)
    grid = torch.stack(
        [columns[:, None, :].expand(count, window, bands), rows[:, :, None].expand(count, window, bands)], dim=-1
    )
    grid = grid.to(batch.device, batch.dtype)
    return F.grid_sample(batch[:, None], grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]


def time_shift(batch: Tensor, generator: Generator) -> Tensor:
    """Roll each spectrogram along time by a uniform offset; what leaves at the end enters at the start.

    Args:
        batch: float[B, T, F].
    """
    count, frames, _ = batch.shape
    offset = torch.randint(frames, (count, 1), generator=generator)
    index = (torch.arange(frames)[None] - offset) % frames
    return batch[torch.arange(count, device=batch.device)[:, None], index.to(batch.device)]


def gain(batch: Tensor, max_db: float, generator: Generator) -> Tensor:
    """Louder or softer by up to `max_db` decibels, uniform per clip.

    Args:
        batch: float[B, T, F] natural-log power.
    """
    decibels = (2 * torch.rand(len(batch), 1, 1, generator=generator) - 1) * max_db
    return batch + (decibels * DB_TO_LOG_POWER).to(batch.device, batch.dtype)


def background_mix(batch: Tensor, max_share: float, probability: float, generator: Generator) -> Tensor:
    """Add another clip of the batch as background, in power: log((1 - a) exp(x) + a exp(y)), a uniform in [0, max].

    BYOL-A's mixup for log-mel (Niizumi et al. 2021, eq. 3) within the batch. Powers of independent sounds add. The
    background is first brought to the clip's own mean power, so that the share is one whatever the recording levels.

    Args:
        batch: float[B, T, F] natural-log power.
        max_share: largest share of the background.
        probability: share of the clips that get one.
    """
    count = len(batch)
    share = torch.rand(count, 1, 1, generator=generator) * max_share
    mixed = (torch.rand(count, 1, 1, generator=generator) < probability).flatten().nonzero().flatten()
    other = torch.randperm(count, generator=generator)[mixed].to(batch.device)
    share = share[mixed].to(batch.device, batch.dtype)
    level = batch.logsumexp((1, 2), keepdim=True)
    mixed = mixed.to(batch.device)
    background = batch[other] + (level[mixed] - level[other])
    return batch.index_copy(0, mixed, torch.logaddexp(batch[mixed] + torch.log1p(-share), background + share.log()))


def equalise(batch: Tensor, deviation_db: float, generator: Generator) -> Tensor:
    """Filter each clip by a random smooth curve over the mel axis: another microphone, room or distance.

    FilterAugment in its linear form (Nam, Kim, Park 2022): normal gains at `EQ_POINTS` evenly spaced bands, straight
    lines in dB between them, the same for all frames of a clip.

    Args:
        batch: float[B, T, F] natural-log power.
        deviation_db: standard deviation of the gains.
    """
    points = torch.randn(len(batch), 1, EQ_POINTS, generator=generator) * deviation_db * DB_TO_LOG_POWER
    curve = F.interpolate(points, size=batch.shape[2], mode="linear", align_corners=True)
    return batch + curve.to(batch.device, batch.dtype)


def mask_spans(batch: Tensor, axis: int, number: int, max_share: float, generator: Generator) -> Tensor:
    """SpecAugment (Park et al. 2019): replace `number` spans along `axis` by the clip's mean.

    Args:
        batch: float[B, T, F].
        axis: 1 = time, 2 = frequency.
        number: spans per clip; they may overlap.
        max_share: longest span as a share of the axis; lengths are uniform from 0.
    """
    count, size = len(batch), batch.shape[axis]
    length = torch.rand(number, count, 1, generator=generator) * max_share * size
    start = torch.rand(number, count, 1, generator=generator) * (size - length)
    position = torch.arange(size)[None, None] + 0.5
    masked = ((position >= start) & (position < start + length)).any(dim=0).to(batch.device)
    masked = masked[:, :, None] if axis == 1 else masked[:, None, :]
    return torch.where(masked, batch.mean(dim=(1, 2), keepdim=True), batch)


def _sample_positions(start: Tensor, length: Tensor, outputs: int, inputs: int) -> Tensor:
    """Where to sample an axis of `inputs` cells to resize [start, start + length) to `outputs` cells, in [-1, 1]."""
    centres = start[:, None] + (torch.arange(outputs)[None] + 0.5) / outputs * length[:, None]
    return 2 * centres / inputs - 1
