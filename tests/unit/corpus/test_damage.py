"""What is damaged is read around and said; nothing that FFmpeg would give is lost, and nothing is made up."""

from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from audiomae.corpus.damage import MAX_SPANS, DecodeReport, LostSpan, is_heard
from audiomae.corpus.decode import DecodeLimits, decode, iter_windows
from audiomae.errors import DecodeError
from tests.audio_files import signal, write_case
from tests.damage import make_damaged_files, reference_spans
from tests.timelines import bursts, encoded

RATE = 16_000
TICKS = 1000  # of a second, in which spans are compared


def mask(spans: list[tuple[float, float]]) -> np.ndarray:
    out = np.zeros(20 * TICKS, bool)
    for start, end in spans:
        out[round(start * TICKS) : round(end * TICKS)] = True
    return out


def embedded_spans(path: Path) -> tuple[np.ndarray, DecodeReport]:
    """Where the decoded samples are sound, not silence for what was lost."""
    report = DecodeReport()
    try:
        samples = decode(path, RATE, report=report)
    except DecodeError:
        return mask([]), report
    lost = [(span.start_s, span.end_s if span.end_s is not None else span.start_s) for span in report.lost]
    return mask([(0.0, len(samples) / RATE)]) & ~mask(lost), report


@pytest.mark.timeout(900)
def test_three_hundred_damaged_files(tmp_path: Path) -> None:
    paths = make_damaged_files(tmp_path)
    assert len(paths) >= 300
    both = ours_alone = theirs = 0
    poor = {}
    for path in paths:
        reference, (ours, _) = mask(reference_spans(path)), embedded_spans(path)
        both, theirs = both + (reference & ours).sum(), theirs + reference.sum()
        ours_alone += (ours & ~reference).sum()
        if (reference & ours).sum() < 0.9 * reference.sum():
            poor[path.name] = (reference & ours).sum() / reference.sum()
    assert both >= 0.99 * theirs and ours_alone <= 0.005 * theirs
    assert not poor


def test_whole_files_are_not_called_damaged(tmp_path: Path) -> None:
    for name in ("16.wav", "aiff", "caf", "flac", "ogg", "opus", "mp3", "vbr.mp3", "no_header.mp3", "m4a", "aac", "ts"):
        report = DecodeReport()
        decode(write_case(tmp_path, name), RATE, limits=DecodeLimits(on_damage="fail"), report=report)
        assert not report.lost and not report.cancelled, name
    for behind in (b"TAG" + bytes(125), bytes(20_000)):  # a tag, and what a downloader preallocated
        for name in ("mp3", "no_header.mp3", "flac"):
            data = write_case(tmp_path, name).read_bytes() + behind
            assert len(decode(data, RATE, limits=DecodeLimits(on_damage="fail"))) == len(decode(data, RATE))


@pytest.mark.parametrize("name", ["aac", "mp3", "vbr.mp3", "flac", "opus", "ogg", "m4a"])
def test_a_cut_end_is_a_lost_span(tmp_path: Path, name: str) -> None:
    whole = write_case(tmp_path, name).read_bytes()
    data = whole[: -1200 if "mp3" in name else -30] if name != "m4a" else _m4a_cut(tmp_path)
    report = DecodeReport()
    samples = decode(data, RATE, report=report)
    (span,) = report.lost
    assert span.start_s == pytest.approx(len(samples) / RATE, abs=0.05)
    assert span.end_s is not None and span.end_s == pytest.approx(4.0, abs=0.12)
    assert len(samples) / RATE > (3.0 if name in ("ogg", "opus") else 3.8)  # an Ogg page is as long as a second
    with pytest.raises(DecodeError):
        decode(data, RATE, limits=DecodeLimits(on_damage="fail"))


def _m4a_cut(folder: Path) -> bytes:
    path = folder / "head_first.m4a"
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as file:
        stream = file.add_stream("aac", rate=44100, layout="mono")
        for packet in encoded(stream, signal(44100, 4.0), 44100):
            file.mux(packet)
    return path.read_bytes()[:-300]


def test_a_lost_packet_is_silence_of_its_length(tmp_path: Path) -> None:
    path = tmp_path / "a.aac"
    with av.open(str(path), "w", format="adts") as file:
        stream = file.add_stream("aac", rate=44100, layout="mono")
        for packet in encoded(stream, bursts(44100), 44100):
            file.mux(packet)
    whole = path.read_bytes()
    frames = [at for at in range(len(whole) - 1) if whole[at] == 0xFF and whole[at + 1] & 0xF6 == 0xF0]
    middle = min(frames, key=lambda at: abs(at - len(whole) // 2))
    data = whole[: middle + 7] + b"\xff" * 60 + whole[middle + 67 :]
    report = DecodeReport()
    samples = decode(data, RATE, report=report)
    assert len(samples) == pytest.approx(len(decode(whole, RATE)), abs=RATE // 100)
    assert report.lost and all(span.end_s is not None and span.end_s - span.start_s < 0.15 for span in report.lost)


@pytest.mark.parametrize("channels", [(1, 1), (1, 2), (2, 1)])
def test_rate_and_channels_that_change_midway_are_converted(tmp_path: Path, channels: tuple[int, int]) -> None:
    parts = []
    for count, rate in zip(channels, (22050, 44100), strict=True):
        path = tmp_path / f"{rate}.mp3"
        sound = np.repeat(signal(rate, 3.0)[:, None], count, axis=1)
        soundfile.write(path, sound, rate, format="MP3")
        parts.append(path.read_bytes())
    samples = decode(b"".join(parts), RATE)
    assert len(samples) / RATE == pytest.approx(6.1, abs=0.15)
    first, second = decode(parts[0], RATE), decode(parts[1], RATE)
    np.testing.assert_allclose(samples[: RATE * 2], first[: RATE * 2], atol=1e-3)
    tail = samples[-RATE * 2 :]
    spectrum = np.fft.rfft(tail, 4 * len(tail)) * np.fft.rfft(second[-RATE * 2 :], 4 * len(tail)).conj()
    best = np.abs(np.fft.irfft(spectrum)).max() / np.linalg.norm(tail) / np.linalg.norm(second[-RATE * 2 :])
    assert best > 0.9


def test_report_joins_what_touches_and_stays_short() -> None:
    report = DecodeReport()
    report.add(LostSpan(1.0, 1.1, "CorruptAudio", "why"))
    report.add(LostSpan(1.12, 1.3, "CorruptAudio", "why"))
    report.add(LostSpan(1.31, 2.0, "Gap", "other"))
    assert [(span.start_s, span.end_s) for span in report.lost] == [(1.0, 1.3), (1.31, 2.0)]
    for number in range(3, 3 * MAX_SPANS):
        report.add(LostSpan(number, number + 0.5, "Gap", "why"))
    assert len(report.lost) == MAX_SPANS and report.lost[-1].end_s == 3 * MAX_SPANS - 0.5
    assert [span.start_s for span in report.within(1.2, 4.0)] == [1.31, 3]


def test_windows_of_nothing_but_silence_for_lost_samples() -> None:
    silences = [(100, 200), (300, 1000)]
    assert is_heard(silences, 50, 150) and not is_heard(silences, 300, 400) and is_heard(silences, 980, 1100)
    assert not silences[1:]  # what lies behind is forgotten


def test_all_of_it_lost_is_a_failure(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    with pytest.raises(DecodeError) as caught:
        list(iter_windows(tmp_path / "a.wav", RATE, 0.5, 0.5))
    assert caught.value.error_class == "NonFiniteSamples"
