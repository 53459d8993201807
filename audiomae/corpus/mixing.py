"""Channels to one: the standard downmix, and stereo that cancels.

Two steps. `Pick` turns whatever channels a block has into one or two columns: mono and stereo as they are, 3 to 8
channels at known places by ITU-R BS.775 (the centre at -3 dB into both sides, surrounds at -3 dB into their own,
low-frequency channels left out; weights of a side sum to 1, so nothing clips), any other number by the plain mean. It
also takes single channels out. `mix` then halves the sum of the two columns.

A sum loses what the two sides have with opposite signs: one reversed plug makes a recording silent. So each cell of
`CELL_S`, counted from the file's start, is looked at: where the sum keeps less than `CANCEL_SHARE` of the channels'
energy, the cell is mixed as the difference, which has the energy that the sum lost. Cells lie on a fixed grid and a
cell is decided by its own samples alone, so a window has the same samples wherever reading began.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from audiomae.errors import DecodeError

CELL_S = 0.5
FADE_S = 0.02
CANCEL_SHARE = 0.125
"""Of the channels' mean energy: 0 for R = -L, 0.1 for R = -L / 2, 0.5 for unrelated channels, 1 for equal ones."""
ROOT_HALF = 0.5**0.5

# channels of files that name no places, by number: the order of wav and flac, which most others keep
USUAL = {
    1: ("FC",),
    2: ("FL", "FR"),
    3: ("FL", "FR", "FC"),
    4: ("FL", "FR", "BL", "BR"),
    5: ("FL", "FR", "FC", "BL", "BR"),
    6: ("FL", "FR", "FC", "LFE", "BL", "BR"),
    7: ("FL", "FR", "FC", "LFE", "BC", "SL", "SR"),
    8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}
# place: weight into (left, right)
WEIGHTS = {
    "FL": (1.0, 0.0),
    "FR": (0.0, 1.0),
    "FC": (ROOT_HALF, ROOT_HALF),
    "LFE": (0.0, 0.0),
    "LFE2": (0.0, 0.0),
    "BL": (ROOT_HALF, 0.0),
    "BR": (0.0, ROOT_HALF),
    "SL": (ROOT_HALF, 0.0),
    "SR": (0.0, ROOT_HALF),
    "BC": (0.5, 0.5),
    "FLC": (ROOT_HALF, 0.0),
    "FRC": (0.0, ROOT_HALF),
    "WL": (ROOT_HALF, 0.0),
    "WR": (0.0, ROOT_HALF),
    "DL": (1.0, 0.0),
    "DR": (0.0, 1.0),
}


class Pick:
    """float32[frames, channels] -> float32[frames, 1 or 2] by the `channel` option."""

    def __init__(self, channel: str) -> None:
        """`mix`, `left`, `right`, or the number of a channel, counted from 0."""
        self.channel = channel

    def __call__(self, samples: np.ndarray, places: Sequence[str] = ()) -> np.ndarray:
        """The one or two columns that are mixed.

        Args:
            samples: of all channels.
            places: of the channels (`FL`, `FR`, `FC`, `LFE`, ...); empty where the file does not say.

        Raises:
            DecodeError: `NoSuchChannel`.
        """
        channels = samples.shape[1]
        if len(places) != channels or not set(places) <= set(WEIGHTS):
            places = USUAL.get(channels, ())
        if self.channel != "mix":
            return samples[:, [self._number(channels, places)]]
        if channels <= 2:
            return samples
        matrix = matrix_to_stereo(places) if places else None
        if matrix is None:
            return samples.mean(axis=1, dtype=np.float32, keepdims=True)
        return np.asarray(samples @ matrix)

    def _number(self, channels: int, places: Sequence[str]) -> int:
        if channels == 1 and self.channel in ("left", "right"):
            return 0
        place = {"left": "FL", "right": "FR"}.get(self.channel)
        if place is not None:
            return places.index(place) if place in places else int(place == "FR")
        number = int(self.channel)
        if number >= channels:
            raise DecodeError(
                "decode",
                f"channel {number} was asked for, the file has {channels} (counted from 0)",
                "NoSuchChannel",
            )
        return number


def matrix_to_stereo(places: Sequence[str]) -> np.ndarray | None:
    """float32[channels, 2] for channels at `places`, columns summing to 1; `None` where no place reaches a side."""
    weights = np.array([WEIGHTS[place] for place in places], np.float64)
    sums = weights.sum(axis=0)
    return (weights / sums).astype(np.float32) if sums.all() else None


def mix(
    blocks: Iterator[np.ndarray], position: int, rate: int, cancelled: Callable[[int, int], None]
) -> Iterator[np.ndarray]:
    """Mono float32 blocks of picked ones (`[frames, 1]` or all `[frames, 2]`), the first of which lies at `position`.

    Args:
        position: of the first frame; for stereo it must lie on the grid of cells (`cell_frames`).
        cancelled: told the frames [start, stop) of each cell whose sum cancels.
    """
    cell = cell_frames(rate)
    fade = max(1, round(FADE_S * rate))
    held: np.ndarray | None = None
    before = _Before()
    for block in blocks:
        if block.shape[1] == 1:
            yield np.ascontiguousarray(block[:, 0])
            continue
        if held is not None and len(held):
            block = np.concatenate([held, block])
        whole = len(block) // cell * cell
        held = block[whole:]
        if whole:
            yield _mix_cells(block[:whole], cell, fade, before, position, cancelled)
            position += whole
    if held is not None and len(held):
        yield _mix_cells(held, len(held), fade, before, position, cancelled)


def cell_frames(rate: int) -> int:
    """Native frames of a cell."""
    return max(1, round(CELL_S * rate))


class _Before:
    """How the last cell was mixed: the `sign` of its right channel, or `None` where it was silent."""

    sign: float | None = None


def _mix_cells(
    samples: np.ndarray, cell: int, fade: int, before: _Before, position: int, cancelled: Callable[[int, int], None]
) -> np.ndarray:
    """Mono of whole cells of float32[cells * cell, 2]."""
    mono = np.asarray((samples[:, 0] + samples[:, 1]) * np.float32(0.5))
    rows = mono.reshape(-1, cell)
    pairs = np.ascontiguousarray(samples).reshape(-1, 2 * cell)
    kept, there = np.vecdot(rows, rows), np.vecdot(pairs, pairs) * 0.5
    signs = np.where(kept < CANCEL_SHARE * there, np.float32(-1), np.float32(1))
    if before.sign != -1 and (signs > 0).all():
        before.sign = 1.0 if there[-1] > 0 else None
        return mono
    for number, sign in enumerate(signs):
        first = number * cell
        audible = there[number] > 0
        if sign < 0:
            cancelled(position + first, position + first + cell)
        last = sign if before.sign is None or not audible else before.sign
        if sign < 0 or last < 0:
            right = np.full(cell, sign, np.float32)
            if last != sign:
                count = min(fade, cell)
                right[:count] = np.linspace(last, sign, count, endpoint=False, dtype=np.float32)
            rows[number] = (samples[first : first + cell, 0] + right * samples[first : first + cell, 1]) * 0.5
        before.sign = float(sign) if audible else None
    return mono
