"""What decoding a file lost or had to change, with its place in time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from audiomae.errors import DecodeError

OnDamage = Literal["salvage", "fail"]
MERGE_S = 0.05
"""Lost spans of one kind nearer than this are one row: a bad sector takes many packets."""
MAX_SPANS = 100
HEARD_SHARE = 0.01

Lose = Callable[[int, int | None, str, str], None]
"""(first frame, frame after the last or `None`, class, reason): native frames that the reader could not give."""


@dataclass(frozen=True)
class LostSpan:
    """A stretch of a file that could not be read. `end_s` is `None` where nothing says how long it would have been."""

    start_s: float
    end_s: float | None
    error_class: str
    message: str
    stage: str = "decode"


@dataclass
class DecodeReport:
    """Filled while a file is read; times are those of its windows.

    Attributes:
        lost: spans in the order they were met. Up to `MAX_SPANS`; the last one then covers all that followed.
        cancelled: spans of stereo whose channels cancel, so that they were mixed as a difference.
    """

    lost: list[LostSpan] = field(default_factory=list)
    cancelled: list[tuple[float, float]] = field(default_factory=list)

    def add(self, span: LostSpan) -> None:
        """Add a span, joined to the one before where they overlap, or are of one kind and almost touch."""
        if self.lost:
            last = self.lost[-1]
            apart_s = span.start_s - last.end_s if last.end_s is not None else 0.0
            near = apart_s < 0 or (apart_s <= MERGE_S and last.error_class == span.error_class)
            if near or len(self.lost) >= MAX_SPANS:
                ends = [end for end in (last.end_s, span.end_s) if end is not None]
                end = max(ends) if len(ends) == 2 else None
                self.lost[-1] = LostSpan(last.start_s, end, last.error_class, last.message, last.stage)
                return
        self.lost.append(span)

    def add_cancelled(self, start_s: float, end_s: float) -> None:
        """Add a span, joined to the one before where they touch."""
        if self.cancelled and abs(self.cancelled[-1][1] - start_s) < 1e-6:
            start_s = self.cancelled.pop()[0]
        self.cancelled.append((start_s, end_s))

    def cancels_in(self, start_s: float, end_s: float) -> bool:
        """Whether the channels cancel somewhere in [start_s, end_s)."""
        return any(start < end_s and end > start_s for start, end in self.cancelled)

    def within(self, start_s: float, end_s: float | None) -> list[LostSpan]:
        """The spans that begin in [start_s, end_s)."""
        return [s for s in self.lost if s.start_s >= start_s and (end_s is None or s.start_s < end_s)]


def is_heard(silences: list[tuple[int, int]], first: float, last: float) -> bool:
    """Whether more than a hundredth of [first, last) lies outside of `silences` (ascending, apart).

    Silences that end before `first` are dropped: calls go forward.
    """
    while silences and silences[0][1] <= first:
        del silences[0]
    lost = 0.0
    for start, stop in silences:
        if start >= last:
            break
        lost += max(0.0, min(stop, last) - max(start, first))
    return last - first - lost > HEARD_SHARE * (last - first)


def refuse(span: LostSpan) -> DecodeError:
    """The error for a lost span where damage is not to be salvaged."""
    where = f"{span.start_s:.2f} s to {'the end' if span.end_s is None else f'{span.end_s:.2f} s'}"
    return DecodeError(span.stage, f"{span.message} (lost: {where})", span.error_class)
