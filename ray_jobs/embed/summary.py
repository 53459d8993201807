"""What an embedding job says of itself when it is done: counts, rates, which stage held the others up, cost."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from audiomae.artifacts.embeddings import EmbeddingSet, ShardReceipt
from audiomae.artifacts.tables import DAMAGED, FAILED
from audiomae.embedding.stages import COMMITTERS
from ray_jobs._cluster import cpus_now
from ray_jobs.embed.topology import Topology

FAILURES_SHOWN = 3
COUNTS = ("inputs", "rows", "failed", "damaged", "silent")


def summarise(
    reports: Sequence[dict[str, Any]],
    receipts: Iterable[ShardReceipt],
    skipped: int,
    topology: Topology | None,
    elapsed_s: float,
    price_per_hour: float | None,
) -> dict[str, Any]:
    """What the final line and run.json say of this run; rates count from the first file to the last.

    Args:
        reports: of the shards' stages; a worker killed after its commit leaves none.
        receipts: of the shards this run committed.
        skipped: files embedded before this run.
    """
    receipts = list(receipts)
    inputs, rows = sum(receipt.inputs for receipt in receipts), sum(receipt.rows for receipt in receipts)
    audio_s = sum(receipt.audio_s for receipt in receipts)
    summary: dict[str, Any] = {"inputs": inputs, "rows": rows, "audio_s": audio_s, "skipped": skipped}
    summary["elapsed_s"] = round(elapsed_s, 3)
    done = [report for report in reports if report["status"] == "committed"]
    if not done or topology is None:
        return summary
    wall_s = max(report["ended"] for report in done) - min(report["began"] for report in done)
    stages = stage_shares(done, topology, wall_s)
    summary |= {"wall_s": wall_s, "rows_per_s": rows / wall_s, "x_real_time": audio_s / wall_s}
    summary |= {"topology": topology.describe(), "stages": stages, "bottleneck": max(stages, key=stages.__getitem__)}
    if price_per_hour is not None and audio_s:
        summary["cost_per_1000_audio_hours"] = price_per_hour * elapsed_s / audio_s * 1000
    return summary


def stage_shares(reports: Sequence[dict[str, Any]], topology: Topology, wall_s: float) -> dict[str, float]:
    """How busy each stage's workers were, 0 to 1: the busiest holds the others up."""
    encoders = len({report["worker"] for report in reports})
    decode_slots = encoders
    if topology.decode is not None:
        cpus = cpus_now() - encoders * topology.encode.resources["CPU"]
        decode_slots = max(1, int(cpus / topology.decode.resources["CPU"]))
    writers = encoders * (COMMITTERS if topology.decode is None else 1)
    slots = {"decode": decode_slots, "encode": encoders, "write": writers}
    return {
        stage: round(sum(report[f"{stage}_s"] for report in reports) / (count * wall_s), 3)
        for stage, count in slots.items()
    }


def final_line(summary: dict[str, Any], failed: int, unit: str) -> str:
    """Rows, audio hours, speed, failures, skipped, bottleneck, cost; a row is a `unit`: one of the windows or files."""
    if "wall_s" not in summary:
        return f"nothing to do: {summary['skipped']:,} files were embedded before, {failed:,} of them failed"
    parts = [
        f"{summary['rows']:,} {unit}, {summary['audio_s'] / 3600:,.2f} audio hours in {summary['wall_s']:,.1f} s",
        f"{summary['rows_per_s']:,.1f} {unit}/s, {summary['x_real_time']:,.0f}x real time",
        f"{failed:,} files failed, {summary['skipped']:,} skipped",
        f"bottleneck {summary['bottleneck']} ("
        + ", ".join(f"{name} {share:.0%}" for name, share in summary["stages"].items())
        + " busy)",
    ]
    if "cost_per_1000_audio_hours" in summary:
        parts.append(f"{summary['cost_per_1000_audio_hours']:,.2f} per 1,000 audio hours")
    return "; ".join(parts)


def failure_lines(embeddings: EmbeddingSet) -> list[str]:
    """Which inputs failed and why: error classes, most frequent first, the first files, and where all of them are."""
    failures = embeddings.failures()
    failed = failures.filter(pc.equal(failures["kind"], FAILED))
    if not len(failed):
        return []
    counts = failed.group_by("error_class").aggregate([("uri", "count")]).to_pylist()
    lines = [
        f"  {row['uri_count']:,} {row['error_class']}" for row in sorted(counts, key=lambda row: -row["uri_count"])
    ]
    for row in failed.slice(0, FAILURES_SHOWN).to_pylist():
        lines.append(f"  {row['uri']}: {row['error_class']} ({row['stage']}): {' '.join(row['message'].split())}")
    more = f"{len(failed) - FAILURES_SHOWN:,} more and " if len(failed) > FAILURES_SHOWN else ""
    return [*lines, f"  {more}all reasons: {embeddings.path}/failures"]


def counts_of(receipts: Iterable[ShardReceipt]) -> dict[str, int]:
    """Totals over shards, as run.json records them: inputs = embedded + failed, windows = rows + silent."""
    totals = dict.fromkeys(COUNTS, 0)
    for receipt in receipts:
        for name in COUNTS:
            totals[name] += getattr(receipt, name)
    return totals | {"embedded": totals["inputs"] - totals["failed"]}


def accounting(counts: Mapping[str, int], planned: int) -> str:
    """The line that says where every input went."""
    unfinished = planned - counts["inputs"]
    text = f"inputs {planned:,} = embedded {counts['embedded']:,} + failed {counts['failed']:,}"
    text += f" + unfinished {unfinished:,}" if unfinished else ""
    if counts["damaged"]:
        text += f"; {counts['damaged']:,} of the embedded files are damaged (failures/, kind {DAMAGED})"
    if counts["silent"]:
        text += f"; {counts['silent']:,} windows are silent and were left out (silent/)"
    return text
