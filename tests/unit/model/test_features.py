"""Log-mel against torchaudio, librosa and Kaldi's fbank; padding never changes a frame."""

import librosa
import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from audiomae.model.features import FeatureConfig, LogMel

KALDI = FeatureConfig(kind="kaldi", n_mels=128, f_min=20.0, normalize="fixed", mean=-4.0, std=9.0, range_db=None)
RESIZED = FeatureConfig(n_mels=128, n_fft=1024, resize_time=224 / 512, resize_mels=224)


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.1


def test_equals_torchaudio_with_all_frames():
    waveform = noise(16_100)
    mel = torchaudio.transforms.MelSpectrogram(16_000, n_fft=400, hop_length=160, f_min=50.0, f_max=8000.0, n_mels=80)
    reference = (mel(waveform) + torch.finfo().eps).log().T
    reference = (reference - reference.mean()) / reference.std()
    x, frames = LogMel(FeatureConfig(drop_last_frame=False, range_db=None))(waveform[None])
    assert x.shape == (1, 1, 101, 80) and frames.tolist() == [101]
    # torchaudio's own bank differs so much from one CPU to another; ours does not: the golden values hold to 1e-6
    torch.testing.assert_close(x[0, 0], reference, rtol=0, atol=5e-4)


def test_agrees_with_librosa():
    waveform = noise(8_000).numpy()
    power = librosa.feature.melspectrogram(
        y=waveform,
        sr=16_000,
        n_fft=400,
        hop_length=160,
        n_mels=80,
        fmin=50,
        fmax=8000,
        htk=True,
        norm=None,
        pad_mode="reflect",
    )
    x, _ = LogMel(FeatureConfig(normalize="none", drop_last_frame=False, range_db=None))(
        torch.from_numpy(waveform)[None]
    )
    np.testing.assert_allclose(x[0, 0].numpy(), np.log(power.T + np.finfo(np.float32).eps), atol=2e-3)


def test_kaldi_equals_torchaudio_fbank():
    waveform = noise(16_050)
    reference = torchaudio.compliance.kaldi.fbank(
        waveform[None],
        htk_compat=True,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        sample_frequency=16_000,
    )
    x, frames = LogMel(KALDI)(waveform[None])
    assert frames.tolist() == [len(reference)]
    torch.testing.assert_close(x[0, 0] * 9.0 - 4.0, reference, rtol=0, atol=1e-3)


@pytest.mark.parametrize("config", [FeatureConfig(), FeatureConfig(drop_last_frame=False), KALDI, RESIZED])
def test_frames_do_not_depend_on_the_batch(config):
    lengths = [16_000, 9_333, 401, 200, 1]
    features = LogMel(config)
    batch = torch.full((len(lengths), max(lengths)), 7.0)  # what lies past a clip's end must not matter
    for row, length in enumerate(lengths):
        batch[row, :length] = noise(length, row)
    x, frames = features(batch, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone, count = features(noise(length, row)[None])
        assert count.item() == frames[row].item() == features.frame_counts(torch.tensor([length])).item()
        torch.testing.assert_close(x[row, :, : count.item()], alone[0], rtol=0, atol=2e-4)
        assert (x[row, :, count.item() :] == 0).all()


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 3000), keep_last=st.booleans())
def test_frame_counts_are_those_computed(length, keep_last):
    features = LogMel(FeatureConfig(drop_last_frame=not keep_last))
    x, frames = features(torch.zeros(1, length))
    assert x.shape[2] == frames.item() == features.frame_counts(torch.tensor([length])).item()


def test_two_seconds_fill_one_official_window():
    assert LogMel(FeatureConfig()).frame_counts(torch.tensor([32_000])).item() == 200
    assert LogMel(FeatureConfig(drop_last_frame=False)).frame_counts(torch.tensor([32_000])).item() == 201


def test_image_layout_has_the_asked_size():
    x, frames = LogMel(RESIZED)(noise(512 * 160)[None])
    assert x.shape == (1, 1, 224, 224) and frames.tolist() == [224]
    assert RESIZED.frame_rate == pytest.approx(43.75) and RESIZED.out_mels == 224


@pytest.mark.parametrize("config", [FeatureConfig(), KALDI, RESIZED])
@pytest.mark.parametrize("length", [1, 16_000])
def test_silence_is_finite(config, length):
    x, _ = LogMel(config)(torch.zeros(2, length))
    assert torch.isfinite(x).all()


def test_silence_standardises_to_zero():
    x, _ = LogMel(FeatureConfig())(torch.zeros(1, 16_000))
    assert x.abs().max() < 1e-2


def test_range_is_librosas_top_db_whatever_lies_past_the_end():
    features = LogMel(FeatureConfig(normalize="none", range_db=30.0))
    plain = LogMel(FeatureConfig(normalize="none", range_db=None))
    waveform = torch.cat([noise(4_000), torch.zeros(4_000)])
    expected = librosa.power_to_db(plain(waveform[None]).x[0, 0].exp().numpy(), amin=1e-12, top_db=30.0)
    batch = torch.stack([torch.nn.functional.pad(waveform, (0, 8_000)), noise(16_000, 1) * 9])
    x, frames = features(batch, torch.tensor([8_000, 16_000]))
    np.testing.assert_allclose(x[0, 0, : frames[0]].numpy() * 10 / np.log(10), expected, atol=1e-3)
    assert (x[0, 0, frames[0] :] == 0).all()


def test_constants_stay_out_of_the_state_dict():
    assert not LogMel(FeatureConfig()).state_dict()


def test_wrong_rank_is_explained():
    with pytest.raises(ValueError, match=r"expected \[batch, samples\], got \[16000\]"):
        LogMel(FeatureConfig())(torch.zeros(16_000))
