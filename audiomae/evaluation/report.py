"""One HTML file that shows a whole evaluation, with nothing outside it: pictures and sounds are inside as data URIs."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile as sf

from audiomae import pages
from audiomae.corpus.decode import decode
from audiomae.corpus.manifest import open_source
from audiomae.errors import DecodeError
from audiomae.evaluation import plots
from audiomae.evaluation.runs import RunResult

LISTENING_RATE = 22050
LISTENING_S = 6.0
_MAIN = ("mAP", "R@1", "R@5", "R@10", "P@5", "P@10", "nDCG@10", "kNN")
_BARS = 4  # runs drawn side by side; tables list them all

Samples = npt.NDArray[np.float32]
ReadSpan = Callable[[str, float, float], Samples | None]


@dataclass(frozen=True)
class WorstQuery:
    """A query that went wrong, and what it found. Titles are ready to show; images and sounds are data."""

    key: str
    label: str
    average_precision: float
    picture: bytes
    sounds: Sequence[tuple[str, bytes]]


def draw_plots(runs: Sequence[RunResult], map_method: str, seed: int) -> dict[str, bytes]:
    """Every standing picture of the report by file name (without ``.png``); the first run is the subject."""
    main, shown = runs[0], runs[:_BARS]
    scores, rows = main.scores, main.rows
    found = scores.top[:, 0] >= 0
    pictures = {
        "per_class_map": plots.metric_bars(_by(shown, "per_class", "mAP"), "mAP", "mAP by class"),
        "per_class_r1": plots.metric_bars(_by(shown, "per_class", "R@1"), "R@1", "R@1 by class"),
        "confusion": plots.confusion(
            scores.labels[found].tolist(), rows.labels[scores.top[found, 0]].tolist(), "nearest neighbour of each query"
        ),
        "map": plots.embedding_map(rows.vectors, rows.labels, map_method, seed),
    }
    if main.per_group:
        groups = {run.name: {g: m["mAP"] for g, m in run.per_group.items()} for run in shown}
        pictures["per_group_map"] = plots.metric_bars(groups, "mAP", f"mAP by {main.protocol.group}")
    return pictures


def worst_queries(run: RunResult, read_span: ReadSpan, count: int, retrieved: int = 3) -> list[WorstQuery]:
    """The queries of lowest average precision, at most two of a class, drawn and made audible.

    Args:
        run: the subject of the report.
        read_span: ``(uri, start_s, end_s)`` -> float32[S] at ``LISTENING_RATE``, or None when it cannot be read.
        count: how many queries.
        retrieved: how many of their nearest neighbours to show.
    """
    return [_worst(run, place, read_span, retrieved) for place in _worst_places(run, count)]


def corpus_reader(corpus_root: str) -> ReadSpan:
    """Reads stretches of corpus files at ``LISTENING_RATE``; None for a file that is gone or broken."""

    def read(uri: str, start_s: float, end_s: float) -> Samples | None:
        try:
            return decode(open_source(corpus_root, uri), LISTENING_RATE, start_s=start_s, duration_s=end_s - start_s)
        except (DecodeError, OSError):
            return None

    return read


def render_report(
    runs: Sequence[RunResult],
    comparisons: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, bytes],
    worst: Sequence[WorstQuery],
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
) -> str:
    """The report as HTML text.

    Args:
        runs: the subject first, then the runs and baselines it is compared with.
        comparisons: as :func:`audiomae.evaluation.runs.compare_runs` returns them.
        pictures: as :func:`draw_plots` returns them.
        worst: as :func:`worst_queries` returns them.
        facts: what was evaluated, shown as a list (corpus, encoder, fingerprint ...).
        notes: what the reader has to know, for example rows that were left out.
    """
    main = runs[0]
    metrics = [name for name in _MAIN if name in main.summary]
    tests = {(test["second"], test["metric"]): test for test in comparisons}
    return _TEMPLATE.render(
        title=f"Retrieval: {main.name}",
        protocol=main.protocol.describe(),
        facts=facts,
        notes=notes,
        runs=runs,
        main=main,
        metrics=metrics,
        tests=tests,
        classes=sorted(main.summary["per_class"], key=lambda name: main.summary["per_class"][name]["mAP"]),
        pictures=pictures,
        worst=worst,
    )


def _by(runs: Sequence[RunResult], part: str, metric: str) -> dict[str, dict[str, float]]:
    return {run.name: {name: means[metric] for name, means in run.summary[part].items()} for run in runs}


def _worst_places(run: RunResult, count: int) -> list[int]:
    """Places in the scores, worst first, at most two of a class."""
    precision = run.scores.values["AP"]
    taken: dict[str, int] = {}
    places: list[int] = []
    for place in np.argsort(precision, kind="stable"):
        label = str(run.scores.labels[place])
        if len(places) == count or np.isnan(precision[place]):
            break
        if taken.get(label, 0) < 2:
            taken[label] = taken.get(label, 0) + 1
            places.append(int(place))
    return places


def _worst(run: RunResult, place: int, read_span: ReadSpan, retrieved: int) -> WorstQuery:
    rows, scores = run.rows, run.scores
    query = int(scores.query_rows[place])
    neighbours = [int(row) for row in scores.top[place, :retrieved] if row >= 0]
    drawn, audible = [], []
    for rank, row in enumerate([query, *neighbours]):
        start, end = (float(value) for value in rows.spans[row])
        samples = read_span(str(rows.uris[row]), start, min(end, start + LISTENING_S))
        right = None if rank == 0 else bool(rows.labels[row] == rows.labels[query])
        about = "query" if rank == 0 else f"{rank}. cos {scores.top_scores[place, rank - 1]:.3f}"
        drawn.append(
            plots.Picture(
                np.zeros(0, np.float32) if samples is None else samples, f"{about}: {rows.labels[row]}", right
            )
        )
        if samples is not None and len(samples):
            audible.append((f"{about}: {rows.labels[row]} ({rows.uris[row]} at {start:g} s)", _mp3(samples)))
    return WorstQuery(
        key=f"{rows.uris[query]} at {rows.spans[query, 0]:g} s",
        label=str(rows.labels[query]),
        average_precision=float(scores.values["AP"][place]),
        picture=plots.spectrogram_row(drawn, LISTENING_RATE),
        sounds=audible,
    )


def _mp3(samples: Samples) -> bytes:
    sink = io.BytesIO()
    sf.write(sink, np.clip(samples, -1, 1), LISTENING_RATE, format="MP3", subtype="MPEG_LAYER_III")
    return sink.getvalue()


_TEMPLATE = pages.template(Path(__file__).with_name("report.html.j2"))
