"""What a corpus is like, before anything is spent on it: counts over the whole listing, sound of a sample of its files.

What a name, a size or a column tells is counted over every listed file. What only decoding tells (rate, channels,
length, silence, clipping, damage) comes from all files of a small corpus, else from a sample spread over the listing
with a few files of every format; of each file the first minute is decoded.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audiomae.artifacts.tables import EmbedSettings
from audiomae.corpus.likeness import look_alikes, shown
from audiomae.corpus.manifest import open_source
from audiomae.corpus.notes import Notes
from audiomae.corpus.webdataset import UNPAIRED
from audiomae.embedding.inspection import DECODED_S, Finding, inspect
from audiomae.errors import DecodeError

WHOLE_FILES, SAMPLE_FILES, PER_FORMAT = 512, 64, 4
THREADS = 4
BIN_S = (1, 3, 10, 30, 60, 600, 3600)
EXAMPLES = 5


def check(
    root: str, listing: pa.Table, settings: EmbedSettings, notes: Notes, sample_files: int | None = None
) -> dict[str, Any]:
    """The report on a corpus, ready for JSON.

    Args:
        root: of relative uris.
        listing: every file once, with `uri`, `size` and the corpus' own columns.
        settings: windowing, for the predicted rows.
        notes: what was noted while listing.
        sample_files: how many files to decode; default: all of up to 512, 64 of more.
    """
    total = listing.num_rows
    count = sample_files or (total if total <= WHOLE_FILES else SAMPLE_FILES)
    suffixes = suffixes_of(listing["uri"])
    rows = sample_rows(suffixes, count)
    sample = listing.take(pa.array(rows))
    with ThreadPoolExecutor(THREADS) as pool:
        findings = list(pool.map(lambda row: inspect(root, row), sample.to_pylist()))
    sizes = np.maximum(listing["size"].to_numpy(zero_copy_only=False), 0)
    report: dict[str, Any] = {
        "files": total,
        "bytes": int(sizes.sum()),
        "unreadable": int(pc.sum(pc.less(listing["size"], 0)).as_py() or 0),
        "formats": _formats(suffixes, sizes),
        "sample": {"files": len(rows), "whole": len(rows) == total, "seconds_of_each": DECODED_S},
        "decoded": _decoded(findings),
    }
    for kind in ("silent", "cancelling", "clipped", "damaged", "failed"):
        found = [finding for finding in findings if kind in finding.kinds]
        report[kind] = {
            "files": len(found),
            "estimated": round(len(found) * total / max(1, len(findings))),
            "examples": [f"{finding.uri}: {finding.kinds[kind]}".rstrip(": ") for finding in found[:EXAMPLES]],
        }
    unpaired = notes.get(UNPAIRED)
    report |= {
        "labels": _labels(listing),
        "unpaired_sidecars": {"files": unpaired.cases, "examples": list(unpaired.examples)},
        "duplicates": duplicates(root, listing, count),
        "notes": notes.lines(),
        "predicted": predict(findings, suffixes.take(pa.array(rows)), suffixes, sizes, settings),
    }
    return report


def suffixes_of(uris: pa.ChunkedArray) -> pa.DictionaryArray:
    """The lower-case suffix of each name, without its dot; empty where there is none."""
    encoded = pc.dictionary_encode(pc.utf8_slice_codeunits(uris.combine_chunks(), start=-6, stop=None))
    found = pc.extract_regex(pc.utf8_lower(encoded.dictionary), r"\.(?P<suffix>[a-z0-9]{1,5})$").field("suffix")
    suffixes = pc.dictionary_encode(pc.fill_null(found, ""))
    return pa.DictionaryArray.from_arrays(suffixes.indices.take(encoded.indices), suffixes.dictionary)


def sample_rows(suffixes: pa.DictionaryArray, count: int) -> np.ndarray:
    """Row numbers, ascending: a few of every format, the rest spread evenly over the listing."""
    total = len(suffixes)
    if count >= total:
        return np.arange(total)
    codes = suffixes.indices.to_numpy(zero_copy_only=False)
    chosen: set[int] = set()
    for code in range(len(suffixes.dictionary)):
        of_kind = np.flatnonzero(codes == code)
        chosen.update(int(row) for row in of_kind[np.linspace(0, len(of_kind) - 1, PER_FORMAT).astype(int)])
        if len(chosen) >= count:
            break
    for row in np.linspace(0, total - 1, count).astype(int):
        if len(chosen) >= count:
            break
        chosen.add(int(row))
    return np.array(sorted(chosen))


# --- the whole --------------------------------------------------------------------------------------------------------


def _formats(suffixes: pa.DictionaryArray, sizes: np.ndarray) -> dict[str, dict[str, int]]:
    codes = suffixes.indices.to_numpy(zero_copy_only=False)
    names = suffixes.dictionary.to_pylist()
    files, sums = np.bincount(codes, minlength=len(names)), np.bincount(codes, sizes, minlength=len(names))
    order = np.argsort(-files, kind="stable")
    return {names[code] or "(none)": {"files": int(files[code]), "bytes": int(sums[code])} for code in order}


def _decoded(findings: Sequence[Finding]) -> dict[str, Any]:
    good = [finding for finding in findings if finding.codec]
    lengths = np.array([finding.duration_s for finding in good])
    edges = [0, *BIN_S, math.inf]
    result: dict[str, Any] = {
        "codecs": _counted(finding.codec for finding in good),
        "sample_rates": _counted(str(finding.sample_rate) for finding in good),
        "channels": _counted(str(finding.channels) for finding in good),
        "durations": {
            (f"{low:g} to {high:g} s" if math.isfinite(high) else f"over {low:g} s"): int(
                ((lengths >= low) & (lengths < high)).sum()
            )
            for low, high in pairwise(edges)
        },
    }
    if len(lengths):
        result["duration_s"] = {
            "shortest": float(lengths.min()),
            "median": float(np.median(lengths)),
            "longest": float(lengths.max()),
        }
    return result


def _counted(values: Iterator[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _labels(listing: pa.Table) -> dict[str, Any]:
    """Distinct labels, how many files each has, and which look alike; of every text column with few values, too."""
    result: dict[str, Any] = {"look_alike": {}}
    for name in listing.column_names:
        if name in ("uri", "content_id") or not pa.types.is_string(listing[name].type):
            continue
        head = listing[name].slice(0, 1 << 16)
        if name != "label" and len(head.unique()) > max(64, len(head) // 4):
            continue  # free text
        counts = {entry["values"]: entry["counts"] for entry in listing[name].value_counts().to_pylist()}
        if name == "label":
            missing = counts.pop(None, 0)
            result |= {"classes": len(counts), "without": missing, "files": dict(Counter(counts).most_common(50))}
        groups = look_alikes(value for value in counts if value is not None)
        if groups:
            result["look_alike"][name] = [[shown(value) for value in group] for group in groups]
    return result


def duplicates(root: str, listing: pa.Table, budget: int) -> dict[str, Any]:
    """Files with the same bytes: by the etag that a store gives, else by SHA-256 of up to `budget` files that share
    their size, those whose size few others have first."""
    if listing.num_rows and _all_etags(listing["content_id"]):
        key, checked = pc.binary_join_element_wise(listing["content_id"], listing["size"].cast(pa.string()), "/"), None
        candidates = np.flatnonzero(_repeated(key))
        keys = key.take(pa.array(candidates)).to_pylist()
    else:
        candidates, shared = _same_size(listing["size"], budget)
        checked = {"files": len(candidates), "of": shared}
        rows = listing.select([name for name in ("uri", "size", "tar_offset") if name in listing.column_names])
        with ThreadPoolExecutor(THREADS) as pool:
            keys = list(pool.map(lambda row: _digest(root, row), rows.take(pa.array(candidates)).to_pylist()))
    groups: dict[str, list[str]] = {}
    for row, value in zip(candidates, keys, strict=True):
        if value:
            groups.setdefault(value, []).append(listing["uri"][int(row)].as_py())
    found = [uris for uris in groups.values() if len(uris) > 1]
    return {
        "groups": len(found),
        "files": sum(map(len, found)),
        "examples": [uris[:EXAMPLES] for uris in found[:EXAMPLES]],
        "checked": checked,
    }


def _all_etags(content_ids: pa.ChunkedArray) -> bool:
    """Whether every file has the MD5 that a store gives; a look at the first tells for most corpora."""
    heads = (content_ids.slice(0, 1), content_ids)
    return all(pc.all(pc.match_substring_regex(ids, r"^[0-9a-f]{32}(-[0-9]+)?$")).as_py() for ids in heads)


def _same_size(sizes: pa.ChunkedArray, most: int) -> tuple[np.ndarray, int]:
    """Rows of up to `most` files that share their size, the rarest sizes first, and how many share theirs."""
    encoded = sizes.combine_chunks().dictionary_encode()
    codes, values = encoded.indices.to_numpy(zero_copy_only=False), encoded.dictionary.to_numpy()
    counts = np.bincount(codes, minlength=len(values))
    shared = np.flatnonzero((counts > 1) & (values > 0))
    order = shared[np.lexsort((values[shared], counts[shared]))]
    chosen = order[: np.searchsorted(np.cumsum(counts[order]), most) + 1]
    place = np.full(len(values), -1)
    place[chosen] = np.arange(len(chosen))
    rows = np.flatnonzero(place[codes] >= 0)
    return rows[np.argsort(place[codes[rows]], kind="stable")[:most]], int(counts[shared].sum())


def _repeated(column: pa.ChunkedArray) -> np.ndarray:
    """bool[N]: whether another row has the same value."""
    encoded = column.combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    return np.bincount(codes, minlength=len(encoded.dictionary))[codes] > 1


def _digest(root: str, row: dict[str, Any]) -> str:
    try:
        source = open_source(root, row["uri"], row.get("tar_offset"), row.get("size"))
        if isinstance(source, bytes):
            return hashlib.sha256(source).hexdigest()
        digest = hashlib.sha256()
        with source.open("rb") if isinstance(source, Path) else source as file:
            while data := file.read(1 << 20):
                digest.update(data)
        return digest.hexdigest()
    except (DecodeError, OSError):
        return ""


def predict(
    findings: Sequence[Finding],
    sampled: pa.DictionaryArray,
    suffixes: pa.DictionaryArray,
    sizes: np.ndarray,
    settings: EmbedSettings,
) -> dict[str, Any]:
    """Rows and audio hours of the whole from the sample: each format by its bytes or by its number of files, whichever
    fits the sampled files better."""
    codes = suffixes.indices.to_numpy(zero_copy_only=False)
    of_sample = sampled.indices.to_numpy(zero_copy_only=False)
    lengths = np.array([finding.duration_s for finding in findings])
    windows = np.array([_windows(finding, settings) for finding in findings], float)
    weights = np.array([max(0, finding.size) for finding in findings], float)
    seconds = rows = 0.0
    for code in np.unique(codes):
        inside = codes == code
        mine = of_sample == code
        mine = mine if mine.any() else np.ones(len(findings), bool)
        total = int(inside.sum()), float(sizes[inside].sum())
        seconds += _projected(lengths[mine], weights[mine], *total)
        rows += _projected(windows[mine], weights[mine], *total)
    return {"rows": round(rows), "audio_hours": seconds / 3600}


def _projected(values: np.ndarray, weights: np.ndarray, files: int, size: float) -> float:
    """The sum over all files of what is known of some, by ratio to bytes or by mean."""
    by_file = values.mean() * files
    if not weights.sum():
        return float(by_file)
    ratio = values.sum() / weights.sum()
    spread = np.square(values - ratio * weights).sum(), np.square(values - values.mean()).sum()
    return float(ratio * size if spread[0] < spread[1] else by_file)


def _windows(finding: Finding, settings: EmbedSettings) -> int:
    if "failed" in finding.kinds or not finding.duration_s:
        return 0
    if settings.mode == "file":
        return 1
    whole = math.floor((finding.duration_s - settings.window_s) / settings.hop_s + 1e-9) + 1
    if whole < 1:
        return 1
    rest = finding.duration_s - whole * settings.hop_s
    uncovered = finding.duration_s - ((whole - 1) * settings.hop_s + settings.window_s) > 1e-6
    return whole + (1 if uncovered and 2 * rest >= settings.window_s else 0)


# --- for a person -----------------------------------------------------------------------------------------------------


def as_text(report: dict[str, Any]) -> list[str]:
    """The report in lines."""
    sample, decoded = report["sample"], report["decoded"]
    lines = [f"{report['files']:,} files, {report['bytes'] / 2**30:,.2f} GiB"]
    lines += [f"{report['unreadable']:,} cannot be read"] if report["unreadable"] else []
    formats = (f"{name} {one['files']:,} ({one['bytes'] / 2**30:,.2f} GiB)" for name, one in report["formats"].items())
    lines.append(f"formats: {', '.join(formats)}")
    of = "all" if sample["whole"] else f"a sample of {sample['files']:,}"
    lines.append(f"decoded: {of} of the files, the first {sample['seconds_of_each']:g} s of each")
    for name, title in (("codecs", "codecs"), ("sample_rates", "sample rates"), ("channels", "channels")):
        lines.append(f"  {title}: {', '.join(f'{value} ({count:,})' for value, count in decoded[name].items())}")
    if "duration_s" in decoded:
        length = decoded["duration_s"]
        spans = ", ".join(f"{span} ({count:,})" for span, count in decoded["durations"].items() if count)
        lines.append(f"  durations: {length['shortest']:.2f} to {length['longest']:.2f} s: {spans}")
    for kind in ("silent", "cancelling", "clipped", "damaged", "failed"):
        found = report[kind]
        about = "" if sample["whole"] or not found["files"] else f", about {found['estimated']:,} in all"
        lines.append(f"  {kind}: {found['files']:,}{about}")
        lines += [f"    {example}" for example in found["examples"]]
    labels = report["labels"]
    if "classes" in labels:
        lines.append(f"labels: {labels['classes']:,} classes, {labels['without']:,} files without")
    for column, groups in labels["look_alike"].items():
        lines.append(f"look alike in {column}: {'; '.join(' / '.join(group) for group in groups)}")
    pairs = report["unpaired_sidecars"]
    if pairs["files"]:
        lines.append(f"unpaired sidecars: {pairs['files']:,} (e.g. {', '.join(pairs['examples'])})")
    same = report["duplicates"]
    checked = same["checked"]
    how = (
        "by etag" if checked is None else f"of {checked['of']:,} that share their size, {checked['files']:,} were read"
    )
    lines.append(f"duplicates by content: {same['files']:,} files in {same['groups']:,} groups ({how})")
    lines += [f"    {' = '.join(uris)}" for uris in same["examples"]]
    lines += [f"note: {line}" for line in report["notes"]]
    predicted = report["predicted"]
    lines.append(f"predicted: {predicted['rows']:,} rows, {predicted['audio_hours']:,.4g} audio hours")
    return lines
