"""DSD, Shorten, LOAS and Monkey's Audio are decoded; what is not is named."""

from pathlib import Path

import numpy as np
import pytest

from audiomae.corpus.decode import decode, probe
from audiomae.corpus.folders import may_be_audio
from audiomae.errors import DecodeError
from tests.audio_files import encode, signal
from tests.rare_formats import dff, dsf, shorten, silent_ape, silent_musepack

RATE = 16_000


def loudest_hertz(samples: np.ndarray) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(samples * np.hanning(len(samples))))) * RATE / len(samples))


@pytest.mark.parametrize(("name", "write"), [("dsf", dsf), ("dff", dff)])
def test_dsd(name: str, write) -> None:
    data = write(1.0, 1000.0)
    assert may_be_audio(f"a.{name}") and probe(data).sample_rate == 352_800
    samples = decode(data, RATE)
    assert len(samples) / RATE == pytest.approx(1.0, abs=0.02)
    assert loudest_hertz(samples) == pytest.approx(1000, abs=2)


def test_shorten() -> None:
    time = np.arange(2 * RATE) / RATE
    sent = np.round(10_000 * np.sin(2 * np.pi * 500 * time)).astype(np.int16)
    samples = decode(shorten(sent, RATE), RATE)
    np.testing.assert_allclose(samples, sent[: len(samples)] / 32768, atol=1e-6)
    assert len(samples) == len(sent) // 256 * 256


def test_loas(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.latm", "aac", 44100, signal(44100, 3.0), container="latm")
    assert probe(path).codec == "loas/aac_latm"
    assert len(decode(path, RATE)) / RATE == pytest.approx(3.0, abs=0.1)


def test_monkeys_audio() -> None:
    samples = decode(silent_ape(3), RATE)
    assert len(samples) == 3 * RATE and not samples.any()


def test_musepack_that_counts_no_frames() -> None:
    whole = decode(silent_musepack(200, 200), RATE)
    assert len(whole) / RATE == pytest.approx(200 * 1152 / 44100, abs=0.1)
    assert len(decode(silent_musepack(200, 0), RATE)) == pytest.approx(len(whole), abs=RATE // 10)


@pytest.mark.parametrize(
    ("magic", "name"),
    [(b"OFR ", "OptimFROG"), (b"MThd\x00\x00\x00\x06", "MIDI"), (b"LA04", "La (Lossless Audio)"), (b"ADIF", "ADIF")],
)
def test_a_format_that_is_not_decoded_is_named(magic: bytes, name: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(magic + bytes(3000), RATE)
    assert caught.value.error_class == "UnknownFormat" and name in caught.value.message
