"""Where things are in time, over generated families: containers with faults, files end to end, lengths that lie.

The measure is the ear's: second k of every file begins with a tone burst of its own pitch, and each burst must be heard
in its windows within 20 ms of where an independent reader, by packet timestamps, has it.
"""

from pathlib import Path

import numpy as np
import pytest
import soxr

from audiomae.corpus.decode import DecodeLimits, DecodeReport, Window, decode, iter_windows, probe
from audiomae.errors import DecodeError
from tests import timelines
from tests.damage import reference
from tests.timelines import BURST_S, Timeline

RATE = 16_000
SLACK_S = 0.02


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("timelines")


@pytest.fixture(scope="module")
def faulty(folder: Path) -> list[Timeline]:
    return timelines.make_timeline_files(folder / "faults")


def onset(samples: np.ndarray, second: int) -> float | None:
    """When the burst of this second sets in, s from the first sample; `None` where it is not heard."""
    time = np.arange(len(samples)) / RATE
    tone = samples * np.exp(-2j * np.pi * (500 + 100 * second) * time)
    level = np.abs(np.convolve(tone, np.ones(160) / 160, "same"))
    return float(np.argmax(level > 0.125)) / RATE if level.max(initial=0) > 0.125 else None


def heard(windows: list[Window], second: int, at_s: float) -> float | None:
    """When the burst that belongs to `at_s` sets in by the windows around it."""
    for window in windows:
        if window.start_s <= max(at_s - 0.05, windows[0].start_s) and at_s + BURST_S <= window.end_s:
            first = max(0, round((at_s - 0.3 - window.start_s) * RATE))
            found = onset(window.samples[first : first + RATE], second)
            return None if found is None else window.start_s + first / RATE + found
    return None


def faults_of(one: Timeline) -> list[str]:
    """What is wrong with the windows of a file, and with its length."""
    samples, rate, start_s = reference(one.path)
    sound = soxr.resample(samples, rate, RATE)
    whole = [Window(start_s, start_s + len(sound) / RATE, sound)]
    windows = list(iter_windows(one.path, RATE, 1.0, 0.5))
    found = []
    if abs(windows[0].start_s - start_s) > SLACK_S or abs(start_s - one.start_s) > 0.05:
        found.append(f"starts at {windows[0].start_s:.3f}, not {start_s:.3f}")
    for second, at_s in one.bursts:
        expected, got = heard(whole, second, at_s), heard(windows, second, at_s)
        if expected is None or abs(expected - at_s) > 0.2:
            found.append(f"the reference has burst {second} at {expected}, not {at_s}")
        elif got is None or abs(got - expected) > SLACK_S:
            found.append(f"burst {second} at {got}, not {expected:.3f}")
    length_s = len(decode(one.path, RATE)) / RATE
    if abs(length_s - len(sound) / RATE) > 0.1:
        found.append(f"{length_s:.3f} s, not {len(sound) / RATE:.3f}")
    return found


def check(files: list[Timeline]) -> dict[str, list[str]]:
    wrong = {one.path.name: faults_of(one) for one in files}
    return {name: found for name, found in wrong.items() if found}


@pytest.mark.timeout(900)
def test_gaps_pauses_losses_and_pictures(faulty: list[Timeline]) -> None:
    assert len(faulty) >= 60
    assert not check(faulty)


def test_files_end_to_end_and_wrong_counts(folder: Path) -> None:
    files = timelines.make_joined_files(folder / "joined")
    assert len(files) >= 25
    assert not check(files)
    for one in files:  # all of it is there, by the seconds that went in; an MP3 keeps its encoder's padding
        assert len(decode(one.path, RATE)) / RATE == pytest.approx(one.sound_s, abs=0.25), one.path.name


def test_lengths_that_a_dead_recorder_left(folder: Path) -> None:
    files = timelines.make_unfinished_files(folder / "unfinished")
    for one in files:
        report = DecodeReport()
        windows = list(iter_windows(one.path, RATE, 1.0, 0.25, report=report))
        assert len(decode(one.path, RATE)) / RATE == pytest.approx(one.sound_s, abs=0.1), one.path.name
        assert not report.lost and probe(one.path).duration_s == pytest.approx(one.sound_s, abs=0.1), one.path.name
        for second, at_s in one.bursts:
            found = heard(windows, second, at_s)
            assert found is not None and abs(found - at_s) <= SLACK_S, one.path.name
        assert probe(one.path.read_bytes()) == probe(one.path)


def test_a_wav_without_samples_stays_empty(tmp_path: Path) -> None:
    whole = bytearray(timelines.sound("WAV", "PCM_16", 16000, 1)[:44])
    whole[40:44] = bytes(4)
    listed = b"LIST\x0a\x00\x00\x00INFOsome.."
    (tmp_path / "a.wav").write_bytes(bytes(whole) + listed)
    with pytest.raises(DecodeError, match="no samples"):
        decode(tmp_path / "a.wav", RATE)


def test_gaps_are_said_and_can_fail_the_file(faulty: list[Timeline]) -> None:
    (one,) = [one for one in faulty if one.path.name == "gap_2.4.webm"]
    report = DecodeReport()
    windows = list(iter_windows(one.path, RATE, 1.0, 1.0, report=report))
    (lost,) = report.lost
    assert lost.error_class == "Gap" and lost.start_s == pytest.approx(2.4, abs=0.03)
    assert lost.end_s == pytest.approx(4.8, abs=0.03)
    assert [window.start_s for window in windows] == [0, 1, 2, 4, 5]  # [3, 4) is nothing but gap
    with pytest.raises(DecodeError, match="no sound for"):
        decode(one.path, RATE, limits=DecodeLimits(on_damage="fail"))
    as_silence = DecodeLimits(on_damage="fail", gaps_fail=False)
    assert np.array_equal(decode(one.path, RATE, limits=as_silence), decode(one.path, RATE))


def test_segments_follow_the_same_timeline(faulty: list[Timeline]) -> None:
    for one in [one for one in faulty if one.start_s == 0][::8]:
        whole = {round(w.start_s, 4): w for w in iter_windows(one.path, RATE, 1.0, 0.5)}
        parts: dict[float, Window] = {}
        for start in np.arange(0, 12, 1.5):
            for window in iter_windows(one.path, RATE, 1.0, 0.5, start_s=start, end_s=start + 1.5):
                parts[round(window.start_s, 4)] = window
        shared = parts.keys() & whole.keys()
        assert len(shared) >= 3
        for start_s in shared:
            np.testing.assert_allclose(parts[start_s].samples, whole[start_s].samples, atol=1e-5)
