"""The work of `ray_jobs/embed_corpus.py`: list, plan, carry out what is not committed yet, sum up."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from audiomae.artifacts.embeddings import (
    EmbeddingSet,
    collect_garbage,
    committed_shards,
    read_receipts,
    settled_precision,
    write_run,
)
from audiomae.artifacts.tables import FAILED, EmbedSettings, map_ahead
from audiomae.corpus.manifest import Corpus, ReadAs, list_corpus
from audiomae.corpus.survey import sampled_durations
from audiomae.embedding.decoding import EmbedJob
from audiomae.embedding.listing import Listing
from audiomae.embedding.plan import Plan, PlanRequest, load_plan, new_plan
from audiomae.embedding.preflight import as_text, check
from audiomae.embedding.update import copy_shard, difference, updated_plan
from audiomae.embedding.windowing import Windowing, fitting_windows
from audiomae.errors import UserError
from audiomae.model.encoder import AudioEncoder
from audiomae.model.poolings import comparable
from audiomae.storage import to_path, write_json
from ray_jobs._ray import connect, in_cluster
from ray_jobs._shared_disk import check_shared_disk
from ray_jobs.configs import EmbedConfig, EmbedResult
from ray_jobs.embed.estimate import estimate
from ray_jobs.embed.execution import probe_durations, run_passes
from ray_jobs.embed.summary import accounting, counts_of, failure_lines, final_line, summarise
from ray_jobs.embed.topology import choose_topology

COMPILED_FROM = 50_000  # files; compiling takes an encoder about as long as 50,000 windows of the base size
ENCODER_KINDS = ("official:", "timm:local-dir:")
KEPT_SETTINGS = ("silence", "silence_db", "silence_range_db", "on_damage", "channel")
"""What a relaunch need not repeat: it stays as the folder was begun."""


def run(config: EmbedConfig) -> EmbedResult:
    """See `ray_jobs.embed_corpus.embed`."""
    began = time.time()
    config = config.model_copy(update={"encoder": absolute(config.encoder)})
    if not (config.check or config.dry_run) and in_cluster():
        connect()
        check_shared_disk({"--encoder": config.encoder, "--corpus": config.corpus}, {"--out": config.out})
    encoder = load_encoder(config.encoder)
    if config.pooling and config.pooling != encoder.pooling.name:
        encoder = repooled(encoder, config)
        config = config.model_copy(update={"encoder": absolute(str(to_path(config.out) / "encoder"))})
    plan = load_plan(config.out)
    refuse_other_precision(config)
    if plan is not None and is_to_be_resumed(config, plan):
        settings, windowing = embed_settings(config, encoder, plan, [])
        print(describe(settings, windowing))
        refuse_other_settings(config.out, plan.settings, settings)
        print(f"going on with {plan.num_items:,} files as they were listed; --update looks for changes of the corpus")
        return finish(config, plan, carry_out(config, plan, began))
    corpus = list_corpus(config.corpus, ReadAs(types=config.types, null_words=config.null_words))
    listing = Listing(corpus.batches())
    durations = sampled_durations(corpus.root, listing.sample()) if plan is None and config.window_s is None else []
    settings, windowing = embed_settings(config, encoder, plan, durations)
    print(describe(settings, windowing))
    if listing.duplicates:
        print(f"{listing.duplicates:,} rows of the corpus repeat a uri; the first of each is used")
    if config.check or config.dry_run:
        return look_ahead(config, settings, corpus, listing.table())
    for line in corpus.notes.lines():
        print(f"note: {line}")
    plan = plan_in_force(config, plan, settings, corpus, listing, windowing)
    return finish(config, plan, carry_out(config, plan, began))


def is_to_be_resumed(config: EmbedConfig, plan: Plan) -> bool:
    """Whether a job was broken off: its plan then stands, and its corpus is not listed anew."""
    if config.update or config.retry_failed or config.check or config.dry_run or config.corpus != plan.corpus:
        return False
    return not committed_shards(config.out).issuperset(entry.name for entry in plan.shards)


def look_ahead(config: EmbedConfig, settings: EmbedSettings, corpus: Corpus, listing: pa.Table) -> EmbedResult:
    """`check` and `dry_run`: say what the corpus is like and what embedding it would take."""
    report = check(corpus.root, listing, settings, corpus.notes, config.check_files)
    print("\n".join(as_text(report)))
    if config.check:
        write_json(to_path(config.out) / "check.json", report)
    if not config.dry_run:
        return EmbedResult(config.out)
    estimated = estimate(config.encoder, settings, corpus.root, listing)
    for name, value in estimated.items():
        print(f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value:,}")
    return EmbedResult(config.out, estimate=estimated)


def absolute(encoder: str) -> str:
    """The encoder string with a local path made absolute: workers may run in another folder."""
    kind, path = next(
        ((kind, encoder.removeprefix(kind)) for kind in ENCODER_KINDS if encoder.startswith(kind)), ("", encoder)
    )
    is_path = bool(kind) or ("://" not in path and not encoder.startswith("timm:"))
    return f"{kind}{Path(path).expanduser().absolute()}" if is_path else encoder


def repooled(encoder: AudioEncoder, config: EmbedConfig) -> AudioEncoder:
    """The encoder under another pooling, kept in OUT/encoder for the workers and for whoever indexes the embeddings.

    Raises:
        ConfigError: its own pooling cannot be left, with the reason.
    """
    assert config.pooling is not None
    comparable(encoder, [config.pooling])
    other = encoder.with_pooling(config.pooling)
    other.save(str(to_path(config.out) / "encoder"))
    return other


def load_encoder(encoder: str) -> AudioEncoder:
    """The encoder on the CPU, for what it says of itself."""
    try:
        return AudioEncoder.load(encoder, device="cpu", dtype="float32")
    except FileNotFoundError as error:
        raise UserError(f"--encoder {encoder}: {error}") from None


def embed_settings(
    config: EmbedConfig, encoder: AudioEncoder, plan: Plan | None, durations_s: Sequence[float]
) -> tuple[EmbedSettings, str]:
    """What decides the vectors, and why the windows are as they are.

    What the command does not say is as it was when the folder was begun; in a new folder (no `plan`) windows fit the
    corpus, of which some files have these lengths, and silence is skipped.
    """
    said = {name: getattr(config, name) for name in KEPT_SETTINGS}
    given = {name: value for name, value in said.items() if value is not None}
    if plan is not None:
        before = plan.settings
        chosen = Windowing(before.window_s, before.hop_s, "as this folder was begun")
        rest = before.model_dump(include={"last_window", *said})
    else:
        chosen = fitting_windows(durations_s, encoder.window_s)
        rest = {"last_window": "whole", "silence": "skip"}
    if config.window_s is not None:
        chosen = Windowing(config.window_s, config.hop_s or config.window_s, "as asked")
    settings = EmbedSettings(
        fingerprint=encoder.fingerprint,
        dim=encoder.dim,
        sample_rate=encoder.sample_rate,
        mode="file" if config.per_file else "windows",
        window_s=chosen.window_s,
        hop_s=chosen.hop_s,
        vector_dtype=config.vector_dtype,
        **{**rest, **given},
    )
    return settings, chosen.reason


def describe(settings: EmbedSettings, reason: str) -> str:
    """Windows and silence in one line."""
    every = "" if settings.hop_s == settings.window_s else f" every {settings.hop_s:g} s"
    silent = (
        f"a window with a peak below {settings.silence_db:g} dBFS, or {settings.silence_range_db:g} dB below the "
        "loudest of its file, is silent and a row of silent/"
        if settings.silence == "skip"
        else "silent windows are embedded too"
    )
    unit = "one vector a file, the mean over windows" if settings.mode == "file" else "windows"
    return f"{unit} of {settings.window_s:g} s{every}: {reason}; {silent}"


def plan_in_force(
    config: EmbedConfig,
    plan: Plan | None,
    settings: EmbedSettings,
    corpus: Corpus,
    listing: Listing,
    windowing: str = "",
) -> Plan:
    """The plan to carry out: a new one, the one that is there, or (`--update`, `--retry-failed`) its next generation.

    Raises:
        UserError: when what is there was made with another encoder, windowing or corpus.
    """

    def probe(uris: list[str]) -> list[float | None]:
        connect()
        return probe_durations(corpus.root, uris)

    shard_s = config.shard_minutes and config.shard_minutes * 60
    request = PlanRequest(config.encoder, config.corpus, corpus.root, shard_s, windowing)
    if plan is None:
        return new_plan(config.out, listing, settings, probe, request)
    refuse_other_settings(config.out, plan.settings, settings)
    changes = difference(config.out, plan, listing)
    moved = plan.corpus_root != corpus.root
    if (changes or moved) and not config.update:
        what = changes.describe() or f"its root is {corpus.root}, it was {plan.corpus_root}"
        raise UserError(
            f"{config.out}: the corpus is not the one that was embedded here: {what}; add --update to embed "
            "what is new or changed and drop what vanished, or choose another --out"
        )
    if config.retry_failed:
        changes = changes.model_copy(update={"failed": failed_uris(config.out)})
    if not (changes or moved):
        return plan
    print(f"updating the plan: {changes.describe() or f'its root is {corpus.root} now'}")
    return updated_plan(config.out, plan, listing, probe, request, changes)


def refuse_other_settings(out: str, old: EmbedSettings, new: EmbedSettings) -> None:
    """Vectors of two encoders or windowings never share a folder, not even through `--update`."""
    before, now = old.model_dump(), new.model_dump()
    differs = [f"{name} is {now[name]}, it was {before[name]}" for name in now if now[name] != before[name]]
    if differs:
        raise UserError(f"{out} holds embeddings made otherwise: {'; '.join(differs)}; choose another --out")


def refuse_other_precision(config: EmbedConfig) -> None:
    """Vectors of two precisions share a folder only when that was asked for; every receipt says which it has."""
    settled = settled_precision(config.out)
    if settled is None or config.dtype in ("auto", settled) or config.allow_precision_change:
        return
    raise UserError(
        f"{config.out} holds embeddings computed in {settled}, --dtype asks for {config.dtype}: leave --dtype out to "
        "go on in the same precision, choose another --out, or allow both with --allow-precision-change"
    )


def failed_uris(out: str) -> list[str]:
    """The files in failures/ of what is committed that gave no embedding."""
    failures = EmbeddingSet.open(out).failures()
    return pc.unique(failures.filter(pc.equal(failures["kind"], FAILED))["uri"]).to_pylist()


def carry_out(config: EmbedConfig, plan: Plan, began: float) -> dict[str, Any]:
    """Commit every shard that is not committed yet; a summary of the run, which `began` then."""
    write_run(config.out, run_record(config, plan, "running"))
    committed = committed_shards(config.out)
    skipped = sum(entry.items for entry in plan.shards if entry.name in committed)
    pending = [entry for entry in plan.shards if entry.name not in committed]
    copies = [entry for entry in pending if entry.base]
    for _ in map_ahead(lambda entry: copy_shard(config.out, plan, entry), copies):
        pass
    skipped += sum(entry.items for entry in copies)
    pending = [entry for entry in pending if not entry.base]
    if skipped:
        print(f"{skipped:,} of {plan.num_items:,} files are embedded already and skipped")
    if not pending:
        return summarise([], [], skipped, None, time.time() - began, config.price_per_hour)
    connect()
    topology = choose_topology(config, len(pending))
    print(f"{sum(entry.items for entry in pending):,} files in {len(pending):,} shards, {topology.describe()}")
    job = EmbedJob(
        out=str(to_path(config.out)),
        encoder=config.encoder,
        root=plan.corpus_root,
        settings=plan.settings,
        manifest=plan.manifest_hash,
        device=config.device,
        dtype=config.dtype,
        batch_size=config.batch_size,
        compiled=plan.num_items >= COMPILED_FROM if config.compile is None else config.compile,
        threads=config.threads,
        stall_timeout_s=config.stall_timeout_s,
    )
    reports = run_passes(job, pending, topology)
    receipts = read_receipts(config.out, [entry.name for entry in pending]).values()
    return summarise(reports, receipts, skipped, topology, time.time() - began, config.price_per_hour)


def finish(config: EmbedConfig, plan: Plan, summary: dict[str, Any]) -> EmbedResult:
    """Clean up, record, print the final line.

    Raises:
        UserError: files are left to do, none could be embedded, or too many failed.
    """
    embeddings = EmbeddingSet.open(config.out)
    counts = counts_of(embeddings.receipts.values())
    failed, complete = counts["failed"], embeddings.complete
    if complete:
        collect_garbage(config.out, embeddings)
    totals = counts | {"inputs": plan.num_items, "precision": embeddings.precision, "last_run": summary}
    write_run(config.out, run_record(config, plan, "complete" if complete else "incomplete") | totals)
    print(final_line(summary, failed, "windows" if plan.settings.mode == "windows" else "files"))
    print("\n".join([accounting(counts, plan.num_items), *failure_lines(embeddings)]))
    print(f"{embeddings.num_rows:,} embeddings in {config.out}")
    if not complete:
        raise UserError(
            f"{plan.num_items - counts['inputs']:,} files were not finished; the same command again goes on with them"
        )
    if not embeddings.num_rows:
        raise UserError(f"no file of the corpus could be decoded; the reasons are in {config.out}/failures")
    if failed > config.max_failure_rate * plan.num_items:
        share = failed / plan.num_items
        raise UserError(f"{share:.1%} of the files failed, more than --max-failure-rate {config.max_failure_rate:.1%}")
    return EmbedResult(
        out=config.out,
        inputs=counts["inputs"],
        embedded=counts["embedded"],
        failed=failed,
        damaged=counts["damaged"],
        silent=counts["silent"],
        rows=counts["rows"],
    )


def run_record(config: EmbedConfig, plan: Plan, status: str) -> dict[str, Any]:
    """run.json: what a reader needs to know of the folder."""
    record: dict[str, Any] = {
        "status": status,
        "encoder": plan.encoder,
        "corpus": plan.corpus,
        "corpus_root": plan.corpus_root,
    }
    record |= {"manifest_hash": plan.manifest_hash, "generation": plan.generation}
    record |= {"windowing": plan.windowing, "config": config.model_dump()}
    return plan.settings.model_dump() | record
