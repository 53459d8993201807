"""The work of `ray_jobs/compare.py`: vectors as Ray tasks, then one protocol for every pooling of every encoder."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from audiomae.artifacts.tables import EmbedSettings
from audiomae.config import nearest
from audiomae.corpus.manifest import list_corpus
from audiomae.corpus.survey import sampled_durations
from audiomae.embedding.listing import Listing
from audiomae.embedding.poolings import Pooled, pool_files
from audiomae.embedding.windowing import fitting_windows
from audiomae.errors import UserError
from audiomae.evaluation.rows import LabelledRows
from audiomae.evaluation.runs import compare_runs, evaluate_rows
from audiomae.model.encoder import AudioEncoder
from audiomae.model.poolings import comparable
from audiomae.storage import to_path, write_bytes, write_json
from audiomae.vectors import normalised
from ray_jobs._tasks import answers_of
from ray_jobs.configs import CompareConfig, Comparison

FILES_PER_TASK = 32
SHOWN = ("mAP", "R@1", "R@5", "kNN")


def run(config: CompareConfig) -> Comparison:
    """See `ray_jobs.compare.compare`."""
    encoders = {encoder: AudioEncoder.load(encoder, device="cpu", dtype="float32") for encoder in config.encoder}
    names = {
        uri: [pooling.name for pooling in comparable(encoder, config.pooling)] for uri, encoder in encoders.items()
    }
    corpus = list_corpus(config.corpus)
    listing = Listing(corpus.batches()).table()
    listing = _labelled(config, listing)
    durations = sampled_durations(corpus.root, listing)
    rows: list[LabelledRows] = []
    for uri, encoder in encoders.items():
        windows = fitting_windows(durations, encoder.window_s)
        settings = EmbedSettings(
            fingerprint=encoder.fingerprint,
            dim=encoder.dim,
            sample_rate=encoder.sample_rate,
            mode="file",
            window_s=windows.window_s,
            hop_s=windows.hop_s,
            silence="skip",
            last_window="whole",
        )
        work = partial(_pool, encoder=uri, names=names[uri], root=corpus.root, settings=settings)
        found = answers_of("encoding", "files", work, listing.to_pylist(), FILES_PER_TASK)
        label = f"{_short(uri, config.encoder)} " if len(encoders) > 1 else ""
        rows += _rows(label, names[uri], config, corpus.root, listing, found)
    runs = [evaluate_rows(each, config) for each in rows]
    tests = compare_runs(runs[0], runs[1:])
    results = {each.name: {metric: each.summary[metric] for metric in SHOWN} for each in runs}
    table = "\n".join(_table(results, tests, len(runs[0].scores)))
    print(table)
    out = to_path(config.out)
    write_bytes(out / "comparison.md", (table + "\n").encode())
    write_json(out / "comparison.json", {"results": results, "tests": tests, "protocol": config.describe()})
    print(f"table: {out / 'comparison.md'}")
    return Comparison(str(out), results)


def _labelled(config: CompareConfig, listing: pa.Table) -> pa.Table:
    for column in filter(None, (config.label, config.group)):
        if column not in listing.column_names:
            raise UserError(f"{config.corpus}: no column {column!r}{nearest(column, listing.column_names)}")
        listing = listing.filter(listing[column].is_valid())
    return listing


def _pool(
    items: Sequence[dict[str, Any]], encoder: str, names: Sequence[Any], root: str, settings: EmbedSettings
) -> list[Pooled | str]:
    torch.set_num_threads(1)
    return pool_files(_loaded(encoder), names, root, items, settings)


@lru_cache(maxsize=1)
def _loaded(encoder: str) -> AudioEncoder:
    return AudioEncoder.load(encoder)


def _rows(
    label: str,
    names: Sequence[str],
    config: CompareConfig,
    root: str,
    listing: pa.Table,
    found: Sequence[Pooled | str],
) -> list[LabelledRows]:
    """One set of rows for each pooling, over the files that gave a vector."""
    places = [place for place, value in enumerate(found) if not isinstance(value, str)]
    failed = [
        (uri, value) for uri, value in zip(listing["uri"].to_pylist(), found, strict=True) if isinstance(value, str)
    ]
    for uri, reason in failed[:3]:
        print(f"left out: {uri}: {reason}")
    if len(failed) > 3:
        print(f"left out: {len(failed) - 3:,} more")
    if not places:
        raise UserError(f"{config.corpus}: not one file gave a vector; see the reasons above")
    kept = listing.take(pa.array(places))
    text = {column: np.array([str(value) for value in kept[column].to_pylist()]) for column in ("uri", config.label)}
    groups = None if config.group is None else np.array([str(value) for value in kept[config.group].to_pylist()])
    vectors = [value for value in found if not isinstance(value, str)]
    return [
        LabelledRows(
            name=f"{label}{name}",
            vectors=normalised(np.stack([value[name] for value in vectors]).astype(np.float32)),
            labels=text[config.label],
            groups=groups,
            uris=text["uri"],
            spans=np.zeros((len(places), 2)),
            corpus_root=root,
        )
        for name in names
    ]


def _short(uri: str, every: Sequence[str]) -> str:
    """The part of an encoder's address that tells it from the others."""
    parts = [part for part in uri.rstrip("/").split("/") if part != "encoder"]
    others = {part for other in every if other != uri for part in other.split("/")}
    own = [part for part in parts if part not in others]
    return own[-1] if own else uri


def _table(results: dict[str, dict[str, float]], tests: Sequence[dict[str, Any]], queries: int) -> list[str]:
    first = next(iter(results))
    corrected = {test["second"]: test for test in tests if test["metric"] == "mAP"}
    lines = [f"| pooling | {' | '.join(SHOWN)} | mAP against {first} | p (Holm) |", "|" + "---|" * (len(SHOWN) + 3)]
    for name, metrics in results.items():
        test = corrected.get(name)
        shown = " | ".join(f"{metrics[metric]:.3f}" for metric in SHOWN)
        against = f"{-test['difference'] * 100:+.1f} points | {test['p_holm']:.3f}" if test else " | "
        lines.append(f"| {name} | {shown} | {against} |")
    return [*lines, "", f"{queries} queries; sign-flip tests paired over queries."]
