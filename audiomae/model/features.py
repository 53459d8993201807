"""Waveform -> normalised log-mel spectrogram, batched, on the model's device, blind to padding.

Two front ends: `logmel` (the HTK mel scale, centred frames: the official AudioMAE++ features are its defaults
with `drop_last_frame=False`) and `kaldi` (Kaldi filter banks, as AudioMAE and AST were trained on). Time is the first
axis of a spectrogram everywhere in the product: `[B, 1, T, F]`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.compliance import kaldi

from audiomae.model.encoder_config import FeatureConfig
from audiomae.model.mel import htk_bank

LOG_FLOOR = torch.finfo(torch.float32).eps
MIN_STD = 1e-2  # below any real recording's log-mel deviation: digital silence maps to zeros, not to amplified rounding
DB_TO_LOG_POWER = math.log(10) / 10
PREEMPHASIS = 0.97  # Kaldi's default


class Spectrogram(NamedTuple):
    """A padded batch: `x` float32 [B, 1, T, F], zero past each clip's own `frame_lengths` int64[B]."""

    x: Tensor
    frame_lengths: Tensor


class LogMel(nn.Module):
    """Log-mel front end; no parameters, its constants follow `.to(device)` and stay out of the state dict."""

    window: Tensor
    mel_bank: Tensor

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("cpu"):  # real constants, even while the networks around are being built without storage
            window, mel_bank = self._constants()
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("mel_bank", mel_bank.contiguous(), persistent=False)

    def _constants(self) -> tuple[Tensor, Tensor]:
        """Window [win_length] and mel bank [n_fft / 2 + 1, n_mels]."""
        config = self.config
        if config.kind == "kaldi":
            window = torch.hann_window(config.win_length, periodic=False)
            bank, _ = kaldi.get_mel_banks(
                config.n_mels, self._fft_size, config.sample_rate, config.f_min, config.f_max, 100.0, -500.0, 1.0
            )
            return window, F.pad(bank, (0, 1)).T
        bank = htk_bank(config.n_fft // 2 + 1, config.f_min, config.f_max, config.n_mels, config.sample_rate)
        return torch.hann_window(config.win_length), torch.from_numpy(bank)

    @property
    def _fft_size(self) -> int:
        if self.config.kind == "kaldi":
            return 1 << (self.config.win_length - 1).bit_length()
        return self.config.n_fft

    def frame_counts(self, lengths: Tensor) -> Tensor:
        """Frames that clips of these lengths have: int64[B] samples -> int64[B] frames, at least 1."""
        return self._resized(self._raw_frame_counts(lengths))

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Spectrogram:
        """Log-mel of a padded batch.

        Args:
            waveforms: float32 [B, S] at `sample_rate`; what lies past a clip's length is never read into its frames.
            lengths: int64[B] samples per clip (on the CPU, to spare a device sync), None = all S.

        Returns:
            `Spectrogram`: a clip's frames are the same alone and in any batch; frames past its end are 0.
        """
        if waveforms.dim() != 2:
            raise ValueError(
                f"waveforms: expected [batch, samples], got {list(waveforms.shape)}: add or merge a dimension"
            )
        size = waveforms.shape[1]
        if lengths is None:
            lengths = torch.full((waveforms.shape[0],), size, dtype=torch.int64)
        even = size > 0 and bool((lengths == size).all())
        with torch.autocast(waveforms.device.type, enabled=False):
            frames = self._frames(waveforms.float(), None if even else lengths.clamp(max=size))
            return self.finish(frames, None if even else self._raw_frame_counts(lengths.clamp(max=size)))

    def finish(self, frames: Tensor, counts: Tensor | None = None) -> Spectrogram:
        """Normalise and resize plain log-mel, such as training keeps in its cache.

        Args:
            frames: float [B, T, n_mels], natural-log mel power.
            counts: int64[B] frames per clip, None = all T.
        """
        if counts is None:
            counts = torch.full((len(frames),), frames.shape[1], dtype=torch.int64)
            mask = None
        else:
            mask = _row_mask(counts.to(frames.device), frames.shape[1])
        with torch.autocast(frames.device.type, enabled=False):
            x = self._normalized(frames, counts.to(frames.device), mask).unsqueeze(1)
            if self.config.resize_time != 1.0 or self.config.out_mels != self.config.n_mels:
                x, counts = self._resize(x), self._resized(counts)
                if mask is not None:
                    x = x * _row_mask(counts.to(x.device), x.shape[2])[:, None, :, None]
        return Spectrogram(x, counts)

    def _raw_frame_counts(self, lengths: Tensor) -> Tensor:
        hop = self.config.hop_length
        if self.config.kind == "kaldi":
            counts = (lengths - self.config.win_length) // hop + 1
        elif self.config.drop_last_frame:
            counts = (lengths + hop - 1) // hop
        else:
            counts = lengths // hop + 1
        return counts.clamp(min=1)

    def _resized(self, counts: Tensor) -> Tensor:
        if self.config.resize_time == 1.0:
            return counts
        return (counts * self.config.resize_time).round().to(torch.int64).clamp(min=1)

    def _frames(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, S] -> log-mel [B, T, n_mels], not normalised; `lengths` None = every clip fills its row."""
        if self.config.kind == "kaldi":
            power = self._kaldi_power(waveforms, lengths)
        else:
            padded = _reflect(waveforms, lengths, self._fft_size // 2)
            spectrum = torch.stft(
                padded,
                self._fft_size,
                self.config.hop_length,
                self.config.win_length,
                self.window,
                center=False,
                return_complex=True,
            )
            if self.config.drop_last_frame:
                spectrum = spectrum[..., : max(1, -(-waveforms.shape[1] // self.config.hop_length))]
            power = _power(spectrum).transpose(1, 2)
        mel = power @ self.mel_bank
        return mel.clamp(min=LOG_FLOOR).log() if self.config.kind == "kaldi" else (mel + LOG_FLOOR).log()

    def _kaldi_power(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        """Kaldi framing: no padding, per-frame offset removal, pre-emphasis, symmetric Hann window."""
        size = self.config.win_length
        if waveforms.shape[1] < size:
            waveforms = F.pad(waveforms, (0, size - waveforms.shape[1]))
        if lengths is not None:
            inside = _row_mask(lengths.to(waveforms.device), waveforms.shape[1])
            waveforms = torch.where(inside, waveforms, torch.zeros_like(waveforms))
        frames = waveforms.unfold(1, size, self.config.hop_length)
        frames = frames - frames.mean(-1, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        frames = (frames - PREEMPHASIS * previous) * self.window
        return _power(torch.fft.rfft(frames, self._fft_size))

    def _normalized(self, frames: Tensor, counts: Tensor, mask: Tensor | None) -> Tensor:
        if self.config.range_db is not None:
            frames = _limit_range(frames, mask, self.config.range_db)
        if self.config.normalize == "clip":
            frames = _standardize(frames, counts, mask)
        elif self.config.normalize == "fixed":
            frames = (frames - self.config.mean) / self.config.std
        return frames if mask is None else frames.masked_fill(~mask.unsqueeze(-1), 0.0)

    def _resize(self, x: Tensor) -> Tensor:
        """Bilinear, antialiased; time by a fixed factor over zero padding, so that rows do not depend on the batch."""
        scale, frames = self.config.resize_time, x.shape[2]
        if scale != 1.0:
            margin = 2 * int(1 / scale + 2)
            x = F.pad(x, (0, 0, 0, margin))
            x = F.interpolate(x, scale_factor=(scale, 1.0), mode="bilinear", antialias=True)
            x = x[:, :, : max(1, round(frames * scale))]
        if self.config.out_mels != x.shape[3]:
            x = F.interpolate(x, size=(x.shape[2], self.config.out_mels), mode="bilinear", antialias=True)
        return x


def _power(spectrum: Tensor) -> Tensor:
    """Squared magnitude, six times as fast on a CPU as summing over `view_as_real`."""
    return torch.addcmul(spectrum.real.square(), spectrum.imag, spectrum.imag)


def _row_mask(counts: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=counts.device) < counts[:, None]


def _limit_range(frames: Tensor, mask: Tensor | None, range_db: float) -> Tensor:
    """Lift what lies more than `range_db` below each clip's own loudest cell: float [B, T, F] log power -> the same."""
    inside = frames if mask is None else frames.masked_fill(~mask.unsqueeze(-1), -math.inf)
    peak = inside.amax((1, 2), keepdim=True)
    return torch.maximum(frames, peak - range_db * DB_TO_LOG_POWER)


def _standardize(frames: Tensor, counts: Tensor, mask: Tensor | None) -> Tensor:
    """Zero mean, unit (unbiased) deviation over each clip's own frames: float [B, T, F] -> the same.

    By sums: `torch.std_mean` over two axes takes ten times as long on a CPU.
    """

    def inside(values: Tensor) -> Tensor:
        return values if mask is None else values.masked_fill(~mask.unsqueeze(-1), 0.0)

    cells = (counts * frames.shape[2])[:, None, None]
    mean = inside(frames).sum((1, 2), keepdim=True) / cells
    centred = inside(frames - mean)
    std = (centred.square().sum((1, 2), keepdim=True) / (cells - 1).clamp(min=1)).sqrt()
    return centred / std.clamp(min=MIN_STD)


def _reflect(waveforms: Tensor, lengths: Tensor | None, pad: int) -> Tensor:
    """Mirror each clip about its own ends: [B, S] -> [B, S + 2 pad]; any length, even shorter than `pad`."""
    batch, size = waveforms.shape
    if lengths is None and size > pad:
        return F.pad(waveforms, (pad, pad), mode="reflect")
    device = waveforms.device
    if lengths is None:
        lengths = torch.full((batch,), size, dtype=torch.int64)
    ends = lengths.to(device).clamp(min=1)[:, None]
    source = F.pad(waveforms, (0, 1)) if size == 0 else waveforms
    offsets = torch.arange(pad, device=device)[None]
    padded = F.pad(source, (pad, pad))
    padded[:, :pad] = source.gather(1, _mirror(pad - offsets, ends))
    padded.scatter_(1, pad + ends + offsets, source.gather(1, _mirror(ends + offsets, ends)))
    return padded


def _mirror(index: Tensor, length: Tensor) -> Tensor:
    """Where position `index` >= 0 of an endlessly mirrored signal of `length` samples lies in it."""
    period = (2 * length - 2).clamp(min=1)
    phase = index % period
    return torch.minimum(phase, period - phase).clamp(max=length - 1)
