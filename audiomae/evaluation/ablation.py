"""Results of an ablation -> one table: what each technique gives over its parent, with spread.

"Expected beforehand" is what the research note foretold of a row, written down before anything was measured.

A result is one (row, fold, seed): the fold's clips query the other folds with an encoder that never saw the fold.
Differences to the parent are taken pair by pair over folds and seeds, and tested over queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from audiomae.evaluation.compare import PairedComparison, holm, paired_test

METRICS = ("mAP", "R@1")
Run = tuple[str, int]  # fold, seed


@dataclass(frozen=True)
class RowResults:
    """What is known of one row: its description, and ``runs[(fold, seed)]`` as committed by the job.

    A run holds ``metrics`` (means by name) and ``queries`` (``{uri: {"AP", "R@1"}}``).
    """

    name: str
    technique: str
    section: str
    parent: str | None
    guess: str
    note: str
    expected_runs: int
    runs: Mapping[Run, Mapping[str, Any]] = field(default_factory=dict)

    def values(self, metric: str) -> dict[Run, float]:
        """The metric of each run."""
        return {run: float(result["metrics"][metric]) for run, result in self.runs.items()}

    def by_fold(self, metric: str) -> dict[str, float]:
        """The metric of each fold, averaged over seeds."""
        values = self.values(metric)
        folds = sorted({fold for fold, _ in values})
        return {fold: float(np.mean([v for (f, _), v in values.items() if f == fold])) for fold in folds}

    def per_query(self, metric: str, runs: Sequence[Run]) -> dict[str, float]:
        """The metric of each query (``AP`` or ``R@1``), averaged over the seeds among ``runs``."""
        collected: dict[str, list[float]] = {}
        for run in runs:
            for uri, scores in self.runs[run]["queries"].items():
                collected.setdefault(uri, []).append(scores[metric])
        return {uri: float(np.mean(values)) for uri, values in collected.items()}


@dataclass(frozen=True)
class Difference:
    """A row against its parent: mean and sample deviation of the paired run differences, and a test over queries."""

    pairs: int
    mean: dict[str, float]
    std: dict[str, float]
    relative: float
    test: PairedComparison


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample deviation (0 for a single value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def difference(row: RowResults, parent: RowResults, seed: int = 0) -> Difference | None:
    """``row`` minus ``parent`` over the runs both have; None when they share none."""
    shared = sorted(row.runs.keys() & parent.runs.keys())
    if not shared:
        return None
    mean, std = {}, {}
    for metric in METRICS:
        ours, theirs = row.values(metric), parent.values(metric)
        mean[metric], std[metric] = mean_std([ours[run] - theirs[run] for run in shared])
    base = float(np.mean([parent.values("mAP")[run] for run in shared]))
    our_queries, their_queries = row.per_query("AP", shared), parent.per_query("AP", shared)
    uris = sorted(our_queries.keys() & their_queries.keys())
    test = paired_test([our_queries[uri] for uri in uris], [their_queries[uri] for uri in uris], seed=seed)
    return Difference(len(shared), mean, std, mean["mAP"] / base if base else 0.0, test)


def render_table(rows: Sequence[RowResults], preface: str, failures: Mapping[str, str]) -> str:
    """The results as Markdown: one table per section, then the folds of the first row.

    Args:
        rows: in the order of the table; the first is the recipe itself.
        preface: what was run, on what, how to run it again.
        failures: reason by unit name, of runs that could not be done.
    """
    known = {row.name: row for row in rows if row.runs}
    differences = {
        row.name: difference(row, known[row.parent]) for row in known.values() if row.parent and row.parent in known
    }
    tested = [name for name, found in differences.items() if found]
    corrected = dict(zip(tested, holm([found.test.p_value for found in differences.values() if found]), strict=True))
    lines = ["# Results", "", preface.strip(), "", _HOW, ""]
    for section in dict.fromkeys(row.section for row in rows):
        lines += [f"## {section}", "", *_HEADER]
        for row in rows:
            if row.section == section:
                lines.append(_line(row, known, differences.get(row.name), corrected.get(row.name)))
        notes = [f"- {row.technique}: {row.note}" for row in rows if row.section == section and row.note]
        lines += ["", *notes, *([""] if notes else [])]
    if rows and rows[0].runs:
        lines += _folds(rows[0])
    if failures:
        lines += ["## Runs that failed", "", *(f"- {name}: {reason}" for name, reason in failures.items()), ""]
    return "\n".join(lines).rstrip() + "\n"


_HOW = """Each run trains on all folds but one; the clips of that fold query those of the others. mAP and R@1: mean over
runs, ± deviation over folds and seeds. Difference: mean of the paired differences to the row named under "against"
(same fold, same seed), ± their deviation, in points of mAP and R@1, and relative to the parent's mAP. p: sign-flip
permutation test of the queries' average precision (averaged over seeds), Holm-corrected over all rows."""
_HEADER = (
    "| technique | against | runs | mAP | R@1 | difference mAP | difference R@1 | p | expected beforehand |",
    "|---|---|---|---|---|---|---|---|---|",
)


def _line(row: RowResults, known: Mapping[str, RowResults], found: Difference | None, p_value: float | None) -> str:
    parent = row.parent or ""
    against = known[parent].technique if parent in known else parent
    runs = f"{len(row.runs)}" if len(row.runs) == row.expected_runs else f"{len(row.runs)} of {row.expected_runs}"
    cells = [row.technique, against, runs]
    for metric in METRICS:
        values = list(row.values(metric).values())
        cells.append(_spread(values) if values else "")
    if found is None:
        cells += ["", "", ""]
    else:
        share = f"{found.relative:+.0%}"
        points = [f"{100 * found.mean[metric]:+.1f}" for metric in METRICS]
        if found.pairs > 1:
            points = [f"{text} ± {100 * found.std[metric]:.1f}" for text, metric in zip(points, METRICS, strict=True)]
        cells += [f"{points[0]} ({share})", points[1]]
        cells.append("" if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}")
    cells.append(row.guess)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _spread(values: Sequence[float]) -> str:
    mean, std = mean_std(values)
    return f"{mean:.3f} ± {std:.3f}" if len(values) > 1 else f"{mean:.3f}"


def _folds(row: RowResults) -> list[str]:
    folds = sorted({fold for fold, _ in row.runs})
    lines = [f"## {row.technique}, fold by fold", "", f"| | {' | '.join(folds)} | mean ± deviation |"]
    lines.append("|---" * (len(folds) + 2) + "|")
    for metric in METRICS:
        values = row.by_fold(metric)
        cells = [f"{values[fold]:.3f}" for fold in folds]
        lines.append(
            f"| {metric} | {' | '.join(cells)} | {'{:.3f} ± {:.3f}'.format(*mean_std(list(values.values())))} |"
        )
    return [*lines, ""]
