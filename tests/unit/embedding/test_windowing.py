"""Windows follow the lengths of the files and the encoder's own window."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from audiomae.corpus.survey import sampled_durations
from audiomae.embedding.windowing import fitting_windows


@pytest.mark.parametrize(
    ("durations", "own", "window"),
    [
        ([5.0] * 20, 2.0, 5.0),  # not three windows of which one is half
        ([5.001] * 20, 2.0, 5.0),  # a lossy codec's extra frame
        ([3.0, 4.0, 7.2] * 5, 2.0, 7.2),
        ([1.0] * 20, 2.0, 2.0),  # shorter than the encoder's window: one window each anyway
        ([12.0] * 20, 10.0, 12.0),
        ([60.0] * 20, 2.0, 2.0),
        ([5.0] * 19 + [600.0], 2.0, 5.0),  # one long file among short ones
        ([5.0] * 10 + [600.0] * 10, 2.0, 2.0),
        ([], 2.0, 2.0),
    ],
)
def test_a_short_file_is_one_window_and_a_long_one_is_cut_into_the_encoders(durations, own, window) -> None:
    found = fitting_windows(durations, own)
    assert (found.window_s, found.hop_s) == (window, window)
    assert f"{window:g} s" in found.reason


def test_durations_come_from_headers_and_unreadable_files_are_left_out(tmp_path: Path) -> None:
    for number in range(5):
        soundfile.write(tmp_path / f"{number}.wav", np.zeros(8000 * (number + 1)), 8000)
    (tmp_path / "5.wav").write_text("not audio")
    listing = pa.table({"uri": [f"{number}.wav" for number in range(6)], "size": [1] * 6})
    assert sampled_durations(str(tmp_path), listing) == [1, 2, 3, 4, 5]
    assert sampled_durations(str(tmp_path), listing, most=2) == [1]
