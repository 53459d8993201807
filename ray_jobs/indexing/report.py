"""What was tried when an index was tuned, as one HTML file with a picture: which settings won and which lost."""

import base64
import html
import io
from collections.abc import Mapping
from typing import Any

from audiomae import storage
from audiomae.artifacts.releases import REPORTS_FOLDER, Release

CHOSEN, LOST, INK = "#1a7f4b", "#8a93a3", "#20242c"
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#20242c;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .9rem .2rem 0;text-align:right}tr.chosen{font-weight:600}"
    "img{max-width:100%}"
)


def write_report(published: Release, index_dir: str) -> str | None:
    """Write `INDEX/reports/VERSION.html`; its place, or None where every vector is compared and nothing was tuned."""
    info = published.info
    if not info["recall"].get("tried") or "exhaustive_per_s" not in info["recall"]:  # as an older version recorded it
        return None
    place = storage.to_path(index_dir) / REPORTS_FOLDER / f"{published.version}.html"
    storage.write_bytes(place, page(published.version, info).encode())
    return str(place)


def page(version: str, info: Mapping[str, Any]) -> str:
    """The report of a release from what release.json says of it."""
    spec, recall = info["spec"], info["recall"]
    vectors = info["rows"] + info["rows_deleted"]
    title = f"{spec['factory']} over {vectors:,} vectors"
    picture = base64.b64encode(draw(info)).decode()
    tried = [
        _row([_settings(trial), f"{trial['recall']:.4f}", f"{trial['per_s']:,.0f}"], _is_chosen(trial, spec))
        for trial in recall["tried"]
    ]
    tried.append(_row(["all vectors compared", "1.0000", f"{recall['exhaustive_per_s']:,.0f}"], False))
    filtered = [
        _row(
            [f"{row['share']:.2%}", row["kind"], row["queries"], *_numbers(row)],
            False,
        )
        for row in recall.get("filtered", [])
    ]
    parts = [
        f"<p>Release {html.escape(version)}: {spec['bytes_in_memory']} bytes of memory a vector (comparing all of them "
        f"reads {2 * info['dim']}). {recall['queries']} held-out queries asked all at once, recall@{recall['k']} "
        f"of at least {recall['asked']:g} wanted; the first settings that reach it are taken.</p>",
        f'<img alt="recall and speed of what was tried" src="data:image/png;base64,{picture}">',
        _table(["settings", f"recall@{recall['k']}", "queries/s"], tried),
    ]
    if filtered:
        parts += [
            "<h2>With filters</h2>",
            _table(["rows left", "kind", "queries", "mean recall", "5th percentile", "p50 ms"], filtered),
        ]
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1>\n{body}\n</html>\n"
    )


def draw(info: Mapping[str, Any]) -> bytes:
    """PNG: recall over speed of all that was tried, and recall over the share of rows that a filter leaves."""
    from matplotlib.figure import Figure

    spec, recall = info["spec"], info["recall"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, filters = figure.subplots(1, 2)
    for trial in recall["tried"]:
        chosen = _is_chosen(trial, spec)
        speed.scatter(trial["per_s"], trial["recall"], color=CHOSEN if chosen else LOST, s=60 if chosen else 25)
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
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110, metadata={"Software": None})
    return sink.getvalue()


def _is_chosen(trial: Mapping[str, Any], spec: Mapping[str, Any]) -> bool:
    return all(trial[name] == spec[name] for name in ("nprobe", "refine", "effort"))


def _numbers(row: dict[str, Any]) -> list[str]:
    return [f"{row['mean']:.3f}", f"{row['p5']:.3f}", f"{row['p50_ms']:.2f}"]


def _settings(trial: dict[str, Any]) -> str:
    first = f"effort {trial['effort']}" if trial["effort"] else f"nprobe {trial['nprobe']}"
    return f"{first}, refine {trial['refine']}"


def _table(head: list[str], rows: list[str]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><tr>{cells}</tr>\n" + "\n".join(rows) + "</table>"


def _row(cells: list[str], chosen: bool) -> str:
    inside = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    return f'<tr class="chosen">{inside}</tr>' if chosen else f"<tr>{inside}</tr>"
