"""The work of `ray_jobs/evaluate_retrieval.py`: read the rows, compute the baselines as Ray tasks, write the report."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from audiomae.artifacts import receipts
from audiomae.artifacts.embeddings import EmbeddingSet
from audiomae.errors import ColumnError, ConfigError, IntegrityError, UserError
from audiomae.evaluation.baselines import BASELINES, RANDOM, centred, corpus_vectors
from audiomae.evaluation.cautions import cautions, hubness, trained_files
from audiomae.evaluation.rows import LabelledRows, read_rows
from audiomae.evaluation.runs import RunResult, compare_runs, evaluate_rows
from audiomae.storage import below, read_json, sha256_bytes, to_path, write_bytes, write_json
from ray_jobs._tasks import answers_of
from ray_jobs.configs import EvaluateConfig, EvaluateOptions, Evaluation

ROWS_PER_TASK = 64


def run(config: EvaluateConfig) -> Evaluation:
    """See `ray_jobs.evaluate_retrieval.evaluate`."""
    sets = [_open(directory) for directory in [config.embeddings, *config.compare]]
    out, inputs = to_path(config.out), _inputs_hash(config, sets)
    report = below(out, "report.html")
    if done := _finished(out, inputs):
        print(f"already evaluated, nothing to do: {report}")
        _print_table([done, *done["others"].values()])
        return Evaluation(str(out), done, report)

    names = display_names([found.encoder for found in sets], [config.embeddings, *config.compare])
    try:
        subjects = [
            read_rows(found, name, config.label, config.group, config.level)
            for found, name in zip(sets, names, strict=True)
        ]
        notes = [
            f"{rows.name}: {rows.unlabelled} rows have no label and were left out"
            for rows in subjects
            if rows.unlabelled
        ]
        computed, skipped = _baseline_rows(subjects[0], sets[0], config)
        runs = [evaluate_rows(rows, config) for rows in [*subjects, *computed]]
        comparisons = compare_runs(runs[0], runs[1:])
        warned = cautions(runs[0], trained_files(sets[0].encoder))
    except (ColumnError, ValueError) as error:
        raise UserError(str(error)) from None
    found = Findings(runs, comparisons, [*warned, *notes, *skipped])
    metrics = _write(out, found, sets[0], config, inputs)
    _print_table([run.as_dict() for run in runs])
    for line in warned:
        print(f"caution: {line}")
    print(f"report: {report}")
    return Evaluation(str(out), metrics, report)


def display_names(encoders: Sequence[str], directories: Sequence[str]) -> list[str]:
    """What the report calls each run: its encoder, where that tells them apart, else its folder of embeddings.

    Of an address it is the last part that says something and is not the others'.
    """
    names = _telling(encoders)
    if len(set(names)) < len(names):
        names = _telling(directories)
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names)]


def _telling(addresses: Sequence[str]) -> list[str]:
    paths = [_saying(address) or [address] for address in addresses]
    for end in (-1, 0):
        while len(paths) > 1 and all(len(parts) > 1 for parts in paths) and len({parts[end] for parts in paths}) == 1:
            paths = [parts[:-1] if end else parts[1:] for parts in paths]
        if len({parts[-1] for parts in paths}) == len(paths):
            return [parts[-1] for parts in paths]
    return ["/".join(parts) for parts in paths]


def _saying(address: str) -> list[str]:
    """The parts of an address without those that any run has."""
    parts = PurePosixPath(address.rstrip("/")).parts
    return [part for part in parts if part not in ("embeddings", "encoder", "emb", "/", "..", ".")]


def _open(directory: str) -> EmbeddingSet:
    try:
        found = EmbeddingSet.open(directory)
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    if not found.complete:
        raise UserError(
            f"{directory}: only {len(found.shards)} of {len(found.plan['shards'])} shards are embedded; "
            "run the same embed_corpus.py line again to finish them"
        )
    return found


def _inputs_hash(config: EvaluateConfig, sets: Sequence[EmbeddingSet]) -> str:
    """Names everything that decides the result, so that a relaunch knows whether there is anything to do."""
    content = [[found.fingerprint, *(receipt.sha256 for receipt in found.receipts.values())] for found in sets]
    return sha256_bytes(json.dumps([_options(config), content]).encode())


def _options(config: EvaluateConfig) -> dict[str, Any]:
    """What decides the result, wherever things lie."""
    return config.model_dump(mode="json", include=set(EvaluateOptions.model_fields))


def _finished(out: Any, inputs: str) -> dict[str, Any] | None:
    """What metrics.json holds, when it was made from these inputs and nothing of the evaluation is damaged."""
    try:
        receipt = receipts.read(out / receipts.RECEIPT_FILE)
        if receipt.facts.get("inputs") != inputs:
            return None
        receipts.verify(out, receipt)
    except FileNotFoundError:
        return None
    except IntegrityError as error:
        print(f"made again: {error}")
        return None
    stored: dict[str, Any] = read_json(out / "metrics.json")
    return stored


def _baseline_rows(
    rows: LabelledRows, embeddings: EmbeddingSet, config: EvaluateConfig
) -> tuple[list[LabelledRows], list[str]]:
    """Each baseline's vectors for the same clips (or windows), and what the reader has to know about them."""
    if not config.baselines:
        return [], []
    names = [BASELINES[key] for key in config.baselines]
    notes: list[str] = []
    encoder_config = None
    if RANDOM in names:
        encoder_config = _encoder_config(embeddings.encoder, notes)
        names = names if encoder_config is not None else [name for name in names if name != RANDOM]
    work = partial(corpus_vectors, rows.corpus_root, names=names, encoder_config=encoder_config, seed=config.seed)
    spans = list(zip(rows.uris.tolist(), *rows.spans.T.tolist(), strict=True))
    found = answers_of("baselines", "rows", work, spans, ROWS_PER_TASK)
    readable = np.array([vectors is not None for vectors in found])
    if not readable.any():
        return [], [*notes, f"baselines were left out: no file of {rows.corpus_root} could be read"]
    if not readable.all():
        notes.append(
            f"baselines: {int((~readable).sum())} of {len(rows)} {config.level}s could not be read and were left out"
        )
    kept = rows.take(np.flatnonzero(readable))
    stacked = {name: np.stack([vectors[name] for vectors in found if vectors is not None]) for name in names}
    return [
        kept.with_vectors(name, vectors if name == RANDOM else centred(vectors)) for name, vectors in stacked.items()
    ], notes


def _encoder_config(encoder: str, notes: list[str]) -> dict[str, Any] | None:
    """The configuration of the evaluated encoder, of which the random baseline is a fresh copy."""
    from audiomae import AudioEncoder

    try:
        return AudioEncoder.load(encoder, device="cpu").config.model_dump(mode="json")
    except (FileNotFoundError, ConfigError) as error:
        notes.append(f"{RANDOM} was left out: {error}")
        return None


class Findings(NamedTuple):
    """What is told of an evaluation: the run itself first, how the others compare with it, and what to know of both."""

    runs: Sequence[RunResult]
    comparisons: list[dict[str, Any]]
    notes: list[str]


def _write(
    out: Any, findings: Findings, embeddings: EmbeddingSet, config: EvaluateConfig, inputs: str
) -> dict[str, Any]:
    """Pictures, report, metrics.json, and last the receipt; returns what metrics.json holds."""
    from audiomae.evaluation.report import corpus_reader, draw_plots, render_report, worst_queries

    runs, comparisons, notes = findings
    hubs = hubness(runs[0])
    facts = {
        "hubs": f"k-occurrence skew {hubs['skew']:.2f} (0 = none), {hubs['never']:.0%} of the rows never found",
        "embeddings": str(embeddings.path),
        "encoder": embeddings.encoder,
        "fingerprint": embeddings.fingerprint,
        "corpus": embeddings.corpus_root,
        "rows": f"{len(runs[0].rows)} ({config.level}s), {embeddings.failed} inputs failed to embed",
    }
    pictures = draw_plots(runs, config.map, config.seed)
    worst = worst_queries(runs[0], corpus_reader(embeddings.corpus_root), config.worst_queries)
    images = pictures | {f"worst_{i + 1}": query.picture for i, query in enumerate(worst)}
    receipts.withdraw(out / receipts.RECEIPT_FILE)
    for name, data in images.items():
        write_bytes(out / "plots" / f"{name}.png", data)
    write_bytes(out / "report.html", render_report(runs, comparisons, pictures, worst, facts, notes).encode())
    metrics = {
        **runs[0].as_dict(),
        "hubness": hubness(runs[0]),
        "others": {run.name: run.as_dict() for run in runs[1:]},
        "comparisons": comparisons,
        "worst_queries": [{"query": w.key, "label": w.label, "AP": w.average_precision} for w in worst],
        "run": facts,
        "notes": notes,
        "protocol": _options(config),
        "inputs": inputs,
    }
    write_json(out / "metrics.json", metrics)
    names = ["metrics.json", "report.html", *(f"plots/{name}.png" for name in images)]
    receipts.create(out / receipts.RECEIPT_FILE, receipts.describe(out, names, {"inputs": inputs}))
    return metrics


def _print_table(results: Sequence[dict[str, Any]]) -> None:
    for line in _table(results):
        print(line)


def _table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    width = max(len(result["name"]) for result in results)
    yield f"{'run':<{width}}  {'mAP':>6}  {'95% interval':>16}  {'R@1':>6}  {'R@5':>6}  {'kNN':>6}  queries"
    for result in results:
        interval = result["confidence"]["mAP"]
        shown = "  ".join(f"{result.get(name, float('nan')):6.3f}" for name in ("R@1", "R@5", "kNN"))
        limits = f"{interval['low']:.3f} to {interval['high']:.3f}"
        yield f"{result['name']:<{width}}  {result['mAP']:6.3f}  {limits:>16}  {shown}  {result['num_queries']}"
