import io
import math
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from audiomae.corpus import opening
from audiomae.corpus.decode import DecodeLimits, DecodeReport, decode, iter_windows, probe
from audiomae.errors import DecodeError
from tests.audio_files import ALL_CASES, signal, write_case
from tests.mutations import riff

RATE = 16_000


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cases")


def wav(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str = "FLOAT") -> Path:
    soundfile.write(path, samples, rate, subtype=subtype, format="WAV")
    return path


@pytest.mark.parametrize("name", ALL_CASES)
def test_window_read_by_seeking_is_the_slice_of_the_whole(cases: Path, name: str) -> None:
    path = write_case(cases, name)
    whole = decode(path, RATE)
    assert len(whole) / RATE == pytest.approx(4.0, abs=0.12)  # codecs without a length field keep their padding
    rng = np.random.default_rng(1)
    for start_s in [0.0, 0.011, 3.5, *rng.uniform(0, 3.5, 4)]:
        window = decode(path, RATE, start_s, 0.7)
        first = round(start_s * RATE)
        np.testing.assert_allclose(window, whole[first : first + len(window)], atol=1e-5)
        assert len(window) == min(round(0.7 * RATE), len(whole) - first)
    for window in iter_windows(path, RATE, 0.9, 0.4, start_s=0.8):
        first = round(window.start_s * RATE)
        np.testing.assert_allclose(window.samples, whole[first : first + len(window.samples)], atol=1e-5)


@pytest.mark.parametrize("name", ALL_CASES)
def test_every_codec_gives_the_sound_that_went_in(cases: Path, name: str) -> None:
    path = write_case(cases, name)
    info = probe(path)
    assert info.channels in (1, 2, 6)
    assert info.duration_s is None or info.duration_s == pytest.approx(4.0, rel=0.5)
    whole = decode(path, RATE).astype(float)
    rate = info.sample_rate
    sent = soxr.resample(signal(rate, 4.0).astype(float), rate, 2000)  # the part that even a telephone keeps
    got = soxr.resample(whole, RATE, 2000)
    size = min(len(sent), len(got))
    spectrum = np.fft.rfft(sent[:size], 2 * size) * np.fft.rfft(got[:size], 2 * size).conj()
    best = np.abs(np.fft.irfft(spectrum)).max() / np.linalg.norm(sent[:size]) / np.linalg.norm(got[:size])
    assert best > (0.5 if name in ("3gp", "amr", "voice.opus") else 0.85)  # at the best lag: encoders delay


@pytest.mark.parametrize(("name", "subtype"), [("ogg", "VORBIS"), ("mp3", "MPEG_LAYER_III")])
def test_windows_far_into_a_file(tmp_path: Path, name: str, subtype: str) -> None:
    path = tmp_path / f"a.{name}"  # long enough that seeking does not fall back to the start
    soundfile.write(path, signal(44100, 34.0), 44100, subtype=subtype)
    whole = decode(path, RATE)
    for start_s in (0.2, 9.3, 19.9, 33.1):
        window = decode(path, RATE, start_s, 0.5)
        first = round(start_s * RATE)
        np.testing.assert_allclose(window, whole[first : first + len(window)], atol=1e-5)


def test_windows_of_real_vorbis(esc10: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted(esc10.rglob("*.ogg"))[::10]:
        whole = decode(path, RATE)
        start_s = float(rng.uniform(0, 4.8))
        window = decode(path, RATE, start_s, 1.0)
        first = round(start_s * RATE)
        np.testing.assert_allclose(window, whole[first : first + len(window)], atol=1e-5)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44099, 48000, 192000])
def test_resampled_pieces_equal_one_call_of_soxr(tmp_path: Path, rate: int) -> None:
    samples = signal(rate, 23.0)
    path = wav(tmp_path / "a.wav", samples, rate)
    np.testing.assert_allclose(decode(path, RATE), soxr.resample(samples, rate, RATE, "HQ"), atol=3e-5)


def test_channels_are_averaged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for channels in (1, 2, 64):
        samples = rng.uniform(-1, 1, (4000, channels)).astype(np.float32)
        got = decode(wav(tmp_path / "a.wav", samples), RATE)
        np.testing.assert_allclose(got, samples.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("name", ["16.wav", "flac", "ogg", "mp3", "no_header.mp3", "opus", "m4a", "webm"])
def test_path_bytes_and_file_agree(cases: Path, name: str) -> None:
    path = write_case(cases, name)
    expected = decode(str(path), RATE)
    np.testing.assert_array_equal(decode(path.read_bytes(), RATE), expected)
    with path.open("rb") as file:
        np.testing.assert_array_equal(decode(file, RATE), expected)
    assert probe(io.BytesIO(path.read_bytes())) == probe(path)


def test_content_decides_not_the_name(cases: Path, tmp_path: Path) -> None:
    disguised = tmp_path / "really_an_m4a.wav"
    disguised.write_bytes(write_case(cases, "m4a").read_bytes())
    assert probe(disguised).codec == "mov/aac"


# --- windows ----------------------------------------------------------------------------------------------------------


def spans(path: Path, *args: float, **kwargs: Any) -> list[tuple[float, float]]:
    return [(round(w.start_s, 6), round(w.end_s, 6)) for w in iter_windows(path, RATE, *args, **kwargs)]


def test_last_window_rule(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.wav", signal(RATE, 12.0))
    assert spans(path, 5, 5) == [(0, 5), (5, 10)]  # 2 s are less than half of 5
    assert spans(path, 4, 4) == [(0, 4), (4, 8), (8, 12)]
    assert spans(path, 4.5, 4.5) == [(0, 4.5), (4.5, 9), (9, 12)]
    assert spans(path, 5, 2.5) == [(0, 5), (2.5, 7.5), (5, 10), (7.5, 12)]
    assert spans(path, 4, 1)[-1] == (8, 12)  # the whole is covered: no partial windows beyond
    assert spans(path, 20, 20) == [(0, 12)]  # shorter than a window: its one window, however short
    assert spans(path, 2, 5) == [(0, 2), (5, 7), (10, 12)]


def test_a_last_window_can_be_moved_back_until_it_is_whole(tmp_path: Path) -> None:
    samples = signal(RATE, 12.0)
    path = wav(tmp_path / "a.wav", samples)

    def whole(window_s: float, hop_s: float) -> list[tuple[float, float]]:
        return spans(path, window_s, hop_s, last_window="whole")

    assert whole(5, 5) == [(0, 5), (5, 10)]  # 2 s are less than half of 5: as with partial windows
    assert whole(4, 4) == [(0, 4), (4, 8), (8, 12)]
    assert whole(4.5, 4.5) == [(0, 4.5), (4.5, 9), (7.5, 12)]
    assert whole(5, 2.5) == [(0, 5), (2.5, 7.5), (5, 10), (7, 12)]
    assert whole(20, 20) == [(0, 12)]  # a file shorter than a window is its one window
    *_, last = iter_windows(path, RATE, 4.5, 4.5, last_window="whole")
    np.testing.assert_allclose(last.samples, decode(path, RATE, 7.5), atol=1e-6)


def test_shorter_than_anything_is_one_window(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.wav", np.full(1, 0.5, np.float32))
    (window,) = iter_windows(path, RATE, 5, 5)
    assert window.samples.tolist() == [0.5]


@pytest.mark.parametrize(("window_s", "hop_s"), [(1.0, 1.0), (1.0, 0.3), (0.7, 1.1), (3.0, 0.5)])
@pytest.mark.parametrize("seconds", [0.4, 6.0, 6.23, 9.9, 47.3])
def test_segments_give_the_windows_of_the_whole(tmp_path: Path, window_s: float, hop_s: float, seconds: float) -> None:
    path = wav(tmp_path / "a.wav", signal(22050, seconds), 22050)
    whole = list(iter_windows(path, RATE, window_s, hop_s))
    parts, start, step = [], 0.0, hop_s * 7
    while start < seconds:
        parts += iter_windows(path, RATE, window_s, hop_s, start, start + step)
        start += step
    assert [w.start_s for w in parts] == pytest.approx([w.start_s for w in whole])
    assert [w.end_s for w in parts] == pytest.approx([w.end_s for w in whole])
    for part, one in zip(parts, whole, strict=True):
        np.testing.assert_allclose(part.samples, one.samples, atol=1e-5)


def test_streaming_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    def peak(seconds: int) -> int:
        path = tmp_path / f"{seconds}.wav"
        with soundfile.SoundFile(path, "w", 8000, 1, "PCM_U8") as file:
            for second in range(0, seconds, 60):
                file.write(signal(8000, 60, seed=second))
        tracemalloc.start()
        count = sum(1 for _ in iter_windows(path, RATE, 5, 5))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == seconds // 5
        return size

    assert peak(1500) < peak(600) + 2**20


MEASURE = """
import resource, sys
from audiomae.corpus.decode import iter_windows
count = sum(len(window.samples) for window in iter_windows(sys.argv[1], 16000, 5, 5))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "subtype"), [("flac", "PCM_16"), ("ogg", "VORBIS"), ("wav", "PCM_U8")])
def test_24_hours_in_the_memory_of_10_minutes(tmp_path: Path, name: str, subtype: str) -> None:
    minute = signal(8000, 60)

    def measure(minutes: int) -> int:
        path = tmp_path / f"{minutes}.{name}"
        with soundfile.SoundFile(path, "w", 8000, 1, subtype) as file:
            for _ in range(minutes):
                file.write(minute)
        command = [sys.executable, "-c", MEASURE, str(path)]
        count, kib = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        assert int(count) == minutes * 60 * RATE
        return int(kib)

    assert measure(24 * 60) < measure(10) + 50 * 1024


# --- failures ---------------------------------------------------------------------------------------------------------


STRICT = DecodeLimits(on_damage="fail")


def failure(source: object, limits: DecodeLimits | None = None) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        decode(source, RATE, limits=limits or DecodeLimits())
    assert caught.value.message and caught.value.stage in ("open", "read", "limits", "decode", "samples")
    return caught.value


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert failure(tmp_path / "absent.wav").error_class == "NotFound"
    (tmp_path / "folder.wav").mkdir()
    assert failure(tmp_path / "folder.wav").error_class == "NotAFile"
    (tmp_path / "broken.wav").symlink_to("nowhere.wav")
    error = failure(tmp_path / "broken.wav")
    assert error.error_class == "NotFound" and "nowhere.wav" in error.message
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    assert failure(tmp_path / "loop.wav").error_class == "NotFound"
    os.mkfifo(tmp_path / "pipe.wav")
    assert failure(tmp_path / "pipe.wav").error_class == "NotAFile"
    assert failure("a\0b.wav").error_class == "ReadFailed"
    (tmp_path / "empty.wav").touch()
    assert failure(tmp_path / "empty.wav").error_class == "EmptyFile"
    assert failure(b"").error_class == "EmptyFile"


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wav(tmp_path / "a.wav", signal(RATE, 1))

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(opening.os, "open", refuse)  # the suite may run as root, whom no mode bits stop
    assert failure(path).error_class == "PermissionDenied"


def test_not_audio(tmp_path: Path) -> None:
    assert failure(b"just some text\n" * 100).error_class == "UnknownFormat"
    assert failure(b"\x89PNG\r\n\x1a\n" + bytes(200)).error_class == "UnknownFormat"
    wav(tmp_path / "other.wav", signal(RATE, 1))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile://{tmp_path}/other.wav\n#EXT-X-ENDLIST\n"
    assert failure(playlist.encode()).error_class == "UnknownFormat"  # an upload must not open other files
    (tmp_path / "a.m3u8").write_text(playlist)
    assert failure(tmp_path / "a.m3u8").error_class == "UnknownFormat"
    (tmp_path / "a.ffconcat").write_text("ffconcat version 1.0\nfile other.wav\n")
    assert failure(tmp_path / "a.ffconcat").error_class == "UnknownFormat"


PCM = (signal(RATE, 1) * 32767).astype("<i2").tobytes()


def test_rates_and_channels_out_of_range() -> None:
    assert failure(riff(rate=0, data=PCM)).error_class in ("RateOutOfRange", "UnknownFormat")
    assert failure(riff(rate=10_000_000, data=PCM)).error_class == "RateOutOfRange"
    assert failure(riff(rate=999, data=PCM)).error_class == "RateOutOfRange"
    assert failure(riff(channels=0, data=PCM)).error_class in ("TooManyChannels", "UnknownFormat")
    assert failure(riff(channels=1000, data=PCM * 4)).error_class == "TooManyChannels"
    assert len(decode(riff(channels=64, data=PCM * 4), RATE)) == 1000  # 64 are averaged like any other number


def test_lengths_that_lie(tmp_path: Path) -> None:
    error = failure(riff(declared=10 * len(PCM), data=PCM), STRICT)
    assert error.error_class == "TruncatedFile" and "320000" in error.message
    assert len(decode(riff(declared=10 * len(PCM), data=PCM), RATE)) == RATE
    assert len(decode(riff(declared=0xFFFFFFFF, data=PCM), RATE)) == RATE  # a stream that was piped: no promise
    assert failure(riff(data=b"")).error_class == "NoAudio"
    path = tmp_path / "a.flac"
    soundfile.write(path, signal(RATE, 2), RATE)
    head = bytearray(path.read_bytes())
    head[21] |= 0x0F  # the four high bits of the 36-bit number of samples
    assert failure(bytes(head), STRICT).error_class == "TooLong"
    assert len(decode(bytes(head), RATE)) == 2 * RATE


@pytest.mark.parametrize(
    "name", ["16.wav", "flac", "mp3", "vbr.mp3", "m4a", "caf", "aiff", "mulaw.au", "ogg", "wma", "mka"]
)
def test_cut_in_half(cases: Path, name: str) -> None:
    whole = write_case(cases, name).read_bytes()
    error = failure(whole[: len(whole) // 2], STRICT)
    assert error.error_class in ("TruncatedFile", "CorruptAudio", "UnknownFormat")


def test_samples_that_are_not_numbers(tmp_path: Path) -> None:
    for value, name in ((np.nan, "NonFiniteSamples"), (np.inf, "NonFiniteSamples"), (1e9, "AmplitudeOutOfRange")):
        samples = signal(RATE, 30)
        samples[400_000] = value
        path = wav(tmp_path / "a.wav", samples)
        error = failure(path, STRICT)
        assert error.error_class == name and error.stage == "samples"
        report = DecodeReport()
        kept = np.concatenate([window.samples for window in iter_windows(path, RATE, 5, 5, report=report)])
        samples[400_000] = 0
        np.testing.assert_array_equal(kept, samples)
        (lost,) = report.lost
        assert (lost.error_class, lost.start_s, lost.end_s) == (name, 25.0, 400_001 / RATE)
        everything = failure(wav(tmp_path / "b.wav", np.full(RATE, value, np.float32)))
        assert everything.error_class in (name, "NoAudio")


def test_silence_and_loud_floats_are_fine(tmp_path: Path) -> None:
    assert not decode(wav(tmp_path / "a.wav", np.zeros(RATE, np.float32)), RATE).any()
    samples = np.full(RATE, 20_000.0, np.float32)  # 16-bit values stored as float
    np.testing.assert_allclose(decode(wav(tmp_path / "b.wav", samples), RATE), samples)


def test_decompression_bomb_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.flac"
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16") as file:
        for _ in range(61):
            file.write(np.zeros(8000 * 60, np.int16))
    assert path.stat().st_size < 500_000
    error = failure(path)
    assert error.error_class == "TooLong" and "windows" in error.message
    assert len(decode(path, RATE, 3600.0, 5.0)) == 5 * RATE
    assert failure(path, DecodeLimits(max_duration_s=600)).error_class == "TooLong"


def test_cpu_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wav(tmp_path / "a.wav", signal(RATE, 5))
    clock = iter(range(0, 100_000, 100))
    monkeypatch.setattr(opening.time, "thread_time", lambda: next(clock))
    error = failure(path)
    assert error.error_class == "TooSlow" and error.stage == "limits"


class FaultyFile(io.BytesIO):
    """Gives its first 4,000 bytes and then breaks, as a dropped connection does."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= 4000:
            raise ConnectionResetError("dropped")
        return super().read(size)


@pytest.mark.parametrize("name", ["16.wav", "flac", "ogg", "m4a"])
def test_a_read_fault_is_not_taken_for_a_short_file(cases: Path, name: str) -> None:
    error = failure(FaultyFile(write_case(cases, name).read_bytes()))
    assert (error.stage, error.error_class) == ("read", "ReadFailed") and "dropped" in error.message


def test_start_beyond_the_end(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.wav", signal(RATE, 1))
    with pytest.raises(DecodeError, match="no audio from second 7 on"):
        decode(path, RATE, 7.0, 1.0)


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(DecodeError("open", "why", "NotFound")))
    assert (error.stage, error.message, error.error_class) == ("open", "why", "NotFound")
    assert str(error) == "NotFound (open): why"


def test_bad_window_lengths(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.wav", signal(RATE, 1))
    with pytest.raises(ValueError, match="at least one sample"):
        next(iter_windows(path, RATE, 0, 1))


def test_probe_reads_no_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wav(tmp_path / "a.wav", signal(48000, 3), 48000)

    def never(*_: object) -> Iterator[np.ndarray]:
        raise AssertionError("probe must not decode")

    monkeypatch.setattr(opening.SoundfileReader, "blocks", never)
    info = probe(path)
    assert (info.sample_rate, info.channels, info.num_frames, info.duration_s) == (48000, 1, 144000, 3.0)
    assert info.exact_seek and info.codec == "wav/float" and math.isclose(info.duration_s or 0, 3)
