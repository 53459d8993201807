"""What was tried when an index was tuned, as one HTML file with a picture: which settings won and which lost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audiomae import pages, storage
from audiomae.artifacts.releases import REPORTS_FOLDER, Release
from audiomae.pages import INK, MUTED, RIGHT


def write_report(published: Release, index_dir: str) -> str | None:
    """Write `INDEX/reports/VERSION.html`; its place, or None where every vector is compared and nothing was tuned."""
    recall = published.info["recall"]
    if not recall.get("tried") or "exhaustive_per_s" not in recall:  # as an older version recorded it
        return None
    place = storage.to_path(index_dir) / REPORTS_FOLDER / f"{published.version}.html"
    storage.write_bytes(place, render_report(published.version, published.info).encode())
    return str(place)


def render_report(version: str, info: Mapping[str, Any]) -> str:
    """The report of a release as HTML text, from what release.json says of it."""
    spec, recall = info["spec"], info["recall"]
    tried = [{**trial, "settings": _settings(trial), "chosen": _is_chosen(trial, spec)} for trial in recall["tried"]]
    return pages.template(Path(__file__).with_name("report.html.j2")).render(
        title=f"{spec['factory']} over {info['rows'] + info['rows_deleted']:,} vectors",
        version=version,
        info=info,
        spec=spec,
        recall=recall,
        tried=tried,
        filtered=recall.get("filtered", []),
        picture=draw(info),
    )


def draw(info: Mapping[str, Any]) -> bytes:
    """PNG: recall over speed of all that was tried, and recall over the share of rows that a filter leaves."""
    from matplotlib.figure import Figure

    spec, recall = info["spec"], info["recall"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, filters = figure.subplots(1, 2)
    for trial in recall["tried"]:
        chosen = _is_chosen(trial, spec)
        speed.scatter(trial["per_s"], trial["recall"], color=RIGHT if chosen else MUTED, s=60 if chosen else 25)
        if chosen or trial is recall["tried"][0]:
            point = trial["per_s"], trial["recall"]
            speed.annotate(_settings(trial), point, xytext=(6, -10), textcoords="offset points")
    speed.scatter(recall["exhaustive_per_s"], 1.0, color=INK, marker="*", s=70, label="all vectors compared")
    speed.axhline(recall["asked"], color=INK, linewidth=0.8, linestyle=":", label="wanted")
    speed.set(xscale="log", xlabel="queries/s", ylabel=f"recall@{recall['k']}", title="What was tried (green: taken)")
    speed.legend(frameon=False, loc="lower left")
    rows = sorted(recall.get("filtered", []), key=lambda row: row["share"])
    for kind, queries in sorted({(row["kind"], row["queries"]) for row in rows}):
        mine = [row for row in rows if (row["kind"], row["queries"]) == (kind, queries)]
        filters.plot([row["share"] for row in mine], [row["mean"] for row in mine], "o-", label=f"{kind}, {queries}")
    filters.set(xscale="log", xlabel="share of rows that the filter leaves", title="Mean recall with filters")
    if rows:
        filters.legend(frameon=False, fontsize=8)
    return pages.png(figure)


def _is_chosen(trial: Mapping[str, Any], spec: Mapping[str, Any]) -> bool:
    return all(trial[name] == spec[name] for name in ("nprobe", "refine", "effort"))


def _settings(trial: Mapping[str, Any]) -> str:
    first = f"effort {trial['effort']}" if trial["effort"] else f"nprobe {trial['nprobe']}"
    return f"{first}, refine {trial['refine']}"
