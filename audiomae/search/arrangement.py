"""How the rows of an index are arranged: what is read together, which segments stay, are merged or written again."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from audiomae.search.indexed import Indexed, IndexedSegment
from audiomae.search.plan import OldRows, Part, SegmentPlan, Slice
from audiomae.search.spec import BuildOptions, IndexSpec


def why_rebuild(old: Indexed, new: IndexSpec, config: BuildOptions) -> str:
    """Why all segments have to be written again, in words; empty when they need not."""
    if old.legacy:
        return "it is stored in the form of an older version"
    before = IndexSpec(**old.info["spec"])
    old_codec, new_codec = before.factory.partition(",")[2], new.factory.partition(",")[2]
    if (before.kind, old_codec) != (new.kind, new_codec) or (config.index and new.nlist != before.nlist):
        asked = "was asked for" if config.index else "suits this size and memory"
        return f"{new.factory or 'an exhaustive scan'} {asked}, not {before.factory or 'an exhaustive scan'}"
    if new.nlist >= 4 * max(before.nlist, 1):
        return f"{new.nlist} lists suit this size, not {before.nlist}"
    return ""


def rebuilt(segments: Sequence[IndexedSegment], parts: Sequence[Part], config: BuildOptions) -> tuple[SegmentPlan, ...]:
    """Everything in as few segments as may be."""
    pieces: list[OldRows | Part] = [
        OldRows(s.name, s.num_rows, s.deleted) for s in segments if len(s.deleted) < s.num_rows
    ]
    made: list[SegmentPlan] = []
    for piece in pieces + list(parts):
        if not made or made[-1].num_rows + piece.num_rows > config.segment_rows:
            made.append(SegmentPlan())
        made[-1] = _joined(made[-1], piece)
    return tuple(made)


def _joined(segment: SegmentPlan, piece: OldRows | Part) -> SegmentPlan:
    if isinstance(piece, OldRows):
        return replace(segment, old=(*segment.old, piece))
    return replace(segment, parts=(*segment.parts, piece))


def arrange(
    segments: Sequence[IndexedSegment], parts: Sequence[Part], config: BuildOptions
) -> tuple[tuple[str, ...], tuple[SegmentPlan, ...]]:
    """Which segments stay and which are written.

    New rows become a segment of their own. A segment with many deleted rows is written again; `fan_in` segments of
    about one size become one, as long as it is not larger than `segment_rows`.
    """
    pieces: list[tuple[bool, SegmentPlan]] = []  # (is it to be written, what it holds)
    for segment in segments:
        dead = len(segment.deleted) / segment.num_rows
        rows = OldRows(segment.name, segment.num_rows, segment.deleted)
        if dead < 1:
            pieces.append((dead > config.compact_share, SegmentPlan((rows,))))
    for part in parts:
        last = pieces[-1] if pieces else None
        if last is not None and last[1].parts and last[1].num_rows + part.num_rows <= config.segment_rows:
            pieces[-1] = (True, _joined(last[1], part))
        else:
            pieces.append((True, SegmentPlan(parts=(part,))))
    while (group := _same_size(pieces, config)) is not None:
        merged = SegmentPlan(
            tuple(old for number in group for old in pieces[number][1].old),
            tuple(part for number in group for part in pieces[number][1].parts),
        )
        pieces = [piece for number, piece in enumerate(pieces) if number not in group] + [(True, merged)]
    kept = tuple(plan.old[0].name for written, plan in pieces if not written)
    return kept, tuple(plan for written, plan in pieces if written)


def _same_size(pieces: Sequence[tuple[bool, SegmentPlan]], config: BuildOptions) -> list[int] | None:
    tiers: dict[int, list[int]] = {}
    for number, (_, plan) in enumerate(pieces):
        if plan.num_rows * config.fan_in <= config.segment_rows:
            tiers.setdefault(int(math.log(max(plan.num_rows, 1), 4)), []).append(number)
    return next((group for _, group in sorted(tiers.items()) if len(group) >= config.fan_in), None)


def cut(slices: Sequence[Slice], keep: np.ndarray, config: BuildOptions) -> tuple[Part, ...]:
    """The new rows that are kept (`keep` is bool over all of them), in parts of about one size."""
    total = len(keep)
    if not keep.any():
        return ()
    count = max(min(config.min_parts, total), -(-total // config.rows_per_part))
    edges = [round(total * number / count) for number in range(count + 1)]
    starts = np.cumsum([0, *(piece.stop - piece.start for piece in slices)])
    parts = []
    for low, high in zip(edges, edges[1:], strict=False):  # noqa: RUF007
        pieces = []
        first_slice = max(int(np.searchsorted(starts, low, side="right")) - 1, 0)
        for piece, start in zip(slices[first_slice:], starts[first_slice:], strict=False):
            if start >= high:
                break
            first, last = max(low - start, 0), min(high - start, piece.stop - piece.start)
            if first < last and keep[start + first : start + last].any():
                pieces.append((replace(piece, start=int(first), stop=int(last)), keep[start + first : start + last]))
        if pieces:
            parts.append(Part(tuple(p for p, _ in pieces), np.concatenate([k for _, k in pieces])))
    return tuple(parts)
