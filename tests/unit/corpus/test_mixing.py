"""Channels to one: the standard matrix, single channels, and stereo that cancels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiomae.corpus.decode import CANCELS, DecodeLimits, DecodeReport, decode, iter_windows
from audiomae.corpus.mixing import ROOT_HALF
from audiomae.errors import ConfigError, DecodeError
from tests.audio_files import signal

RATE = 16_000
SPEAKERS = {"FL": 1, "FR": 2, "FC": 4, "LFE": 8, "BL": 16, "BR": 32, "BC": 256, "SL": 512, "SR": 1024}


def wav(path: Path, channels: Sequence[np.ndarray], places: str = "") -> Path:
    """A float wav; with `places`, its channel mask says where the channels belong."""
    samples = np.stack(channels, axis=1).astype(np.float32)
    soundfile.write(path, samples, RATE, subtype="FLOAT", format="WAVEX" if places else "WAV")
    if places:
        data = bytearray(path.read_bytes())
        at = data.index(b"fmt ") + 28
        data[at : at + 4] = sum(SPEAKERS[place] for place in places.split()).to_bytes(4, "little")
        path.write_bytes(data)
    return path


def tones(count: int, seconds: float = 2.0) -> list[np.ndarray]:
    time = np.arange(round(RATE * seconds)) / RATE
    return [0.3 * np.sin(2 * np.pi * (400 + 300 * number) * time) for number in range(count)]


def levels(samples: np.ndarray, count: int) -> np.ndarray:
    """The amplitude of each of `tones` in a mix of them, relative to how it went in."""
    time = np.arange(len(samples)) / RATE
    waves = [np.exp(-2j * np.pi * (400 + 300 * number) * time) for number in range(count)]
    return np.array([2 * abs(np.mean(samples * wave)) / 0.3 for wave in waves])


HALF = ROOT_HALF / 2


@pytest.mark.parametrize(
    ("places", "weights"),
    [
        ("FL FR FC LFE BL BR", [0.5, 0.5, ROOT_HALF, 0, HALF, HALF]),
        ("FL FR FC LFE SL SR", [0.5, 0.5, ROOT_HALF, 0, HALF, HALF]),
        ("FL FR FC LFE BL BR SL SR", [0.5, 0.5, ROOT_HALF, 0, HALF, HALF, HALF, HALF]),
        ("FL FR BL BR", [0.5, 0.5, HALF, HALF]),
        ("FL FR FC BC", [0.5, 0.5, ROOT_HALF, 0.5]),
        ("FL FR LFE", [0.5, 0.5, 0]),
        ("FL FR FC", [0.5, 0.5, ROOT_HALF]),
        ("FL FR FC BL BR", [0.5, 0.5, ROOT_HALF, HALF, HALF]),
    ],
)
def test_standard_downmix(tmp_path: Path, places: str, weights: list[float]) -> None:
    count = len(weights)
    named = decode(wav(tmp_path / "a.wav", tones(count), places), RATE)
    expected = np.array(weights) / sum(weights)
    np.testing.assert_allclose(levels(named, count), expected, atol=1e-3)
    assert np.abs(named).max() <= 0.31
    if places in ("FL FR FC LFE BL BR", "FL FR BL BR", "FL FR FC", "FL FR FC BL BR"):  # what a file without a mask has
        plain = decode(wav(tmp_path / "b.wav", tones(count)), RATE)
        np.testing.assert_allclose(plain, named, atol=1e-6)


def test_mono_and_ordinary_stereo_are_untouched(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    left, right = signal(RATE, 30.3), 0.2 * rng.standard_normal(round(RATE * 30.3))
    np.testing.assert_array_equal(decode(wav(tmp_path / "a.wav", [left]), RATE), left)
    report = DecodeReport()
    for other in (left, right, 0 * left, 0.5 * left + right):
        pair = np.stack([left, other], axis=1).astype(np.float32)
        got = decode(wav(tmp_path / "b.wav", [left, other]), RATE, report=report)
        np.testing.assert_array_equal(got, (pair[:, 0] + pair[:, 1]) * np.float32(0.5))
    assert not report.cancelled


@pytest.mark.parametrize("scale", [1.0, 0.9, 0.7, 0.5])
def test_inverted_stereo_keeps_its_energy(tmp_path: Path, scale: float) -> None:
    left = signal(RATE, 6.2)
    path = wav(tmp_path / "a.wav", [left, -scale * left])
    report = DecodeReport()
    samples = decode(path, RATE, report=report)
    np.testing.assert_allclose(samples, (1 + scale) / 2 * left, atol=1e-6)
    assert report.cancelled == [(0.0, 6.2)]
    assert [window.note for window in iter_windows(path, RATE, 2, 2)] == [CANCELS] * 3


def test_stereo_inverted_for_a_while(tmp_path: Path) -> None:
    left = signal(RATE, 40.0)
    right = left.copy()
    right[10 * RATE : 25 * RATE] *= -1
    path = wav(tmp_path / "a.wav", [left, right])
    whole = decode(path, RATE)
    windows = list(iter_windows(path, RATE, 2.5, 2.5))
    assert [window.note is not None for window in windows] == [10 <= window.start_s < 25 for window in windows]
    for second in range(40):
        there = np.std(left[second * RATE : (second + 1) * RATE])
        assert np.std(whole[second * RATE : (second + 1) * RATE]) > 0.9 * there
    for window in windows:  # a window read alone has the same samples
        alone = decode(path, RATE, window.start_s, 2.5)
        np.testing.assert_array_equal(alone, window.samples)
        first = round(window.start_s * RATE)
        np.testing.assert_array_equal(window.samples, whole[first : first + len(alone)])
    assert np.abs(np.diff(whole)).max() <= np.abs(np.diff(left)).max() + 0.01  # no clicks where the mix changes over


@pytest.mark.parametrize(
    ("channel", "number"), [("left", 0), ("right", 1), ("0", 0), ("1", 1), ("2", 2), ("3", 3), ("5", 5)]
)
def test_single_channels(tmp_path: Path, channel: str, number: int) -> None:
    path = wav(tmp_path / "a.wav", tones(6), "FL FR FC LFE BL BR")
    samples = decode(path, RATE, limits=DecodeLimits(channel=channel))
    np.testing.assert_allclose(samples, tones(6)[number], atol=1e-6)


def test_channels_that_are_not_there(tmp_path: Path) -> None:
    mono = wav(tmp_path / "a.wav", [signal(RATE, 1)])
    np.testing.assert_array_equal(decode(mono, RATE, limits=DecodeLimits(channel="right")), decode(mono, RATE))
    with pytest.raises(DecodeError, match="channel 1 was asked for, the file has 1") as caught:
        decode(mono, RATE, limits=DecodeLimits(channel="1"))
    assert caught.value.error_class == "NoSuchChannel"
    with pytest.raises((ConfigError, ValueError)):
        DecodeLimits(channel="middle")


def test_every_reader_mixes_alike(tmp_path: Path) -> None:
    channels = tones(6)
    samples = np.stack(channels, axis=1)
    expected = levels(decode(wav(tmp_path / "a.wav", channels, "FL FR FC LFE BL BR"), RATE), 6)
    for name, kind, subtype in (("a.flac", "FLAC", "PCM_16"), ("a.ogg", "OGG", "VORBIS"), ("a.aiff", "AIFF", "PCM_16")):
        order = [0, 2, 1, 4, 5, 3] if kind == "OGG" else range(6)  # Vorbis: left, centre, right, surrounds, low
        soundfile.write(tmp_path / name, samples[:, list(order)], RATE, format=kind, subtype=subtype)
        np.testing.assert_allclose(levels(decode(tmp_path / name, RATE), 6), expected, atol=0.01, err_msg=name)
