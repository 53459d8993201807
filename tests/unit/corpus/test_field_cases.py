"""Inputs that failed in the field, each with what is right; their kinds are in the tests beside this one."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from audiomae.corpus.decode import CANCELS, DecodeReport, Window, decode, iter_windows
from audiomae.corpus.manifest import list_corpus, open_source
from audiomae.errors import ListingError


@pytest.fixture(scope="module")
def cases() -> Path:
    path = Path(__file__).resolve().parents[4] / "shared" / "cases"
    if not path.is_dir():
        pytest.skip(f"the field cases are not at {path}")
    return path


def listed(path: Path) -> tuple[dict[str, dict[str, Any]], str]:
    corpus = list_corpus(str(path))
    rows = pa.concat_tables(corpus.batches()).to_pylist()
    return {row["uri"]: row for row in rows}, "\n".join(corpus.notes.lines())


def test_dots_in_names(cases: Path) -> None:
    rows, said = listed(cases / "15_dots_in_names_lose_labels.tar")
    assert [row.get("label") for row in rows.values()].count(None) == 0 and len(rows) == 2 and not said


def test_hard_link_member(cases: Path) -> None:
    name = "17_hard_link_member_missing.tar"
    rows, _ = listed(cases / name)
    assert list(rows) == [f"{name}#a.ogg", f"{name}#b.ogg"]
    for row in rows.values():
        assert open_source(str(cases), row["uri"], row["tar_offset"], row["size"]) == (cases / "a.ogg").read_bytes()


def test_null_words(cases: Path) -> None:
    rows, said = listed(cases / "18_null_words.csv")
    assert [row["label"] for row in rows.values()] == ["NA", "null", "nan", "None"]
    assert "4 unquoted words that may mean missing kept as text" in said


def test_labels_that_are_not_numbers(cases: Path) -> None:
    rows, said = listed(cases / "20_labels_become_numbers.csv")
    assert [row["label"] for row in rows.values()] == ["1.10", "1.1", "12e3"]
    assert "'1.1' / '1.10'" in said


def test_duplicate_column(cases: Path) -> None:
    with pytest.raises(ListingError, match="column 'label' comes twice") as caught:
        listed(cases / "21_duplicate_column.csv")
    assert caught.value.exit_status == 2


# --- sounds -----------------------------------------------------------------------------------------------------------

RATE = 16_000


def windows(path: Path) -> tuple[list[Window], DecodeReport]:
    report = DecodeReport()
    return list(iter_windows(path, RATE, 1.0, 1.0, report=report)), report


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("01_wav_data_size_0.wav", 6.0),
        ("02_chained_vorbis_6s_plus_4s.ogg", 10.0),
        ("04_concat_mp3_with_xing_6s_plus_4s.mp3", 10.1),
        ("05_mp3_noxing_20000_zeros_at_end.mp3", 6.0),
        ("08_video_12s_audio_6s.webm", 6.0),
        ("23_xing_says_87_frames.mp3", 6.0),
    ],
)
def test_the_whole_length_and_nothing_lost(cases: Path, name: str, seconds: float) -> None:
    found, report = windows(cases / name)
    assert len(decode(cases / name, RATE)) / RATE == pytest.approx(seconds, abs=0.1)
    assert found[-1].end_s == pytest.approx(seconds, abs=0.2) and not report.lost


def test_all_but_a_cut_frame(cases: Path) -> None:
    found, report = windows(cases / "07_adts_last_frame_cut.aac")
    (lost,) = report.lost
    assert found[-1].end_s == pytest.approx(lost.start_s, abs=0.001)
    assert lost.end_s is not None and 0.02 < lost.end_s - lost.start_s < 0.05


@pytest.mark.parametrize("name", ["10_live_webm_3s_gap_windows_shifted.webm", "12_mp4_3s_gap_fails_as_truncated.mp4"])
def test_gaps_of_three_seconds(cases: Path, name: str) -> None:
    found, report = windows(cases / name)
    (lost,) = report.lost
    assert (lost.start_s, lost.end_s) == (pytest.approx(3.0, abs=0.02), pytest.approx(6.0, abs=0.02))
    assert [window.start_s for window in found] == [0, 1, 2, 6, 7, 8, 9]
    for window in found:  # second k holds a burst of 500 + 100 k Hz
        loudest = np.argmax(np.abs(np.fft.rfft(window.samples[: RATE // 2]))) * 2
        assert loudest == pytest.approx(500 + 100 * window.start_s, abs=12)


def test_stereo_that_cancels(cases: Path) -> None:
    found, _ = windows(cases / "13_stereo_inverted.wav")
    assert all(np.std(window.samples) > 0.05 and window.note == CANCELS for window in found)


def test_centre_kept_and_low_frequencies_left_out(cases: Path) -> None:
    samples = decode(cases / "14_51_centre_1kHz_lfe_40Hz.wav", RATE)
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    hertz = np.fft.rfftfreq(len(samples), 1 / RATE)
    centre, low = (spectrum[np.argmin(np.abs(hertz - place))] for place in (1000, 40))
    assert centre > 1000 * low
