"""The work of `ray_jobs/train.py`: features as Ray tasks, the loop on Ray Train, the best checkpoint exported."""

import io
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from audiomae.artifacts import runs
from audiomae.artifacts.features import FeatureStore, pending_shards, verify_features
from audiomae.artifacts.shard_cache import ShardCache
from audiomae.cli import Progress, waiting
from audiomae.config import build_config, dump_config, flat
from audiomae.errors import ConfigError, IntegrityError, UserError
from audiomae.model.encoder_config import FeatureConfig
from audiomae.scratch import scratch_dir
from audiomae.storage import (
    arrow_filesystem,
    copy_tree,
    is_local,
    list_names,
    open_seekable,
    read_bytes,
    read_json,
    remove_tree,
    to_path,
    write_bytes,
    write_json,
)
from audiomae.training.clips import CORPUS_ROOT, build_items, same_items
from audiomae.training.data import cache_caution
from audiomae.training.recipe import Recipe
from audiomae.training.split import cautions, repeated
from ray_jobs._cluster import notice_of_waiting
from ray_jobs._ray import ENCODER, connect
from ray_jobs._shared_disk import check_shared_disk
from ray_jobs.configs import TrainConfig, TrainResult
from ray_jobs.training.feature_cache import build_cache, list_files
from ray_jobs.training.fitting import fitted
from ray_jobs.training.nodes import choose_workers, collectives, scaling, worker_device

MAY_CHANGE = ("workers", "checkpoint")
PREPARED = "prepared"  # metadata of items.parquet: the corpus as it was named, where its features are, how many failed
PROGRESS_FILE = "progress.json"
PROGRESS_EVERY_S = 2.0
MOST_COMPARED = 20_000  # clips


def run(config: TrainConfig) -> TrainResult:
    """See `ray_jobs.train.train`."""
    folder = to_path(config.storage) / config.name
    config = fitted(config, folder)
    _check_config(folder, config.training)
    receipt = runs.read_finished(folder)
    if receipt is not None:
        print(f"already finished: {folder / 'encoder'} ({_summary(receipt)})")
        return _result(folder, receipt, resumed=True)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "900")  # autoscaled or busy nodes take a while
    features = _checked_features(config)
    connect(loading=[ENCODER])
    check_shared_disk(
        {"--corpus": config.corpus, "--init": config.init},
        {"--storage": config.storage, "--data.cache": config.data.cache},
    )
    started = time.monotonic()
    prepared = _prepare(folder, config, features)
    result = _fit(folder, config, prepared.cache)
    if result.return_value:
        raise UserError(_stop_message(result))
    receipt = _export(folder, config, result) | {"clips": prepared.clips, "failed_files": prepared.failed_files}
    receipt["seconds"] = round(time.monotonic() - started, 1)
    runs.finish(folder, receipt)
    print(f"trained: {folder / 'encoder'} ({_summary(receipt)})")
    return _result(folder, receipt)


def _result(folder: Any, receipt: dict[str, Any], resumed: bool = False) -> TrainResult:
    facts = {name: receipt[name] for name in ("fingerprint", "clips", "failed_files", "epoch", "loss", "seconds")}
    measured = {name.removeprefix("val_"): value for name, value in receipt.items() if name.startswith("val_")}
    return TrainResult(encoder=str(folder / "encoder"), validation=measured, resumed=resumed, **facts)


def _check_config(run: Any, recipe: Recipe) -> None:
    """Refuse to continue a run with another config than it began with."""
    path = run / "config.yaml"
    if not path.exists():
        return
    before = flat(yaml.safe_load(read_bytes(path)))
    now = flat(recipe.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.split(".")[0] not in MAY_CHANGE
    ]
    if changed:
        raise ConfigError(
            f"{run} was started with another config ({'; '.join(changed)}); resume with the same one, or choose "
            "another --name"
        )


def _checked_features(config: TrainConfig) -> FeatureConfig:
    """What the corpus is turned into. The models that the run starts from are loaded once on the way.

    A missing one is then said at once and in a line, not by a worker that the cluster restarts.
    """
    if config.encoder.text is not None:
        from audiomae.model.text import TextTower

        TextTower(config.encoder.text)
    if config.init is None:
        return config.encoder.features
    from audiomae.model.encoder import AudioEncoder

    return AudioEncoder.load(config.init, device="cpu").config.features


class _Prepared(NamedTuple):
    """Where the features are, how many clips they hold, and how many files could not be decoded."""

    cache: str
    clips: int
    failed_files: int


def _prepare(run: Any, config: TrainConfig, features: FeatureConfig) -> _Prepared:
    """Make the features of the corpus; save config and table of clips. A resumed run must find what it began with."""
    began = _prepared_before(run, config)
    if began is not None:
        print(f"going on with the {began.clips} clips that the run began with; the corpus is not listed again")
        return began
    root, listing = list_files(config.corpus, config.data)
    where = config.data.cache or str(to_path(config.storage) / "features")
    cache, clips = build_cache(where, root, listing, features, config.data.clip_s)
    decoded = clips.filter(pc.is_null(clips["error"]))
    items = build_items(decoded, listing, config.data, config.seed)
    training = len(items) - int(pc.sum(items["validation"]).as_py() or 0)
    print(f"{len(items)} clips from {len(listing)} files: {training} to train on, {len(items) - training} held out")
    steps = config.epochs * max(1, training // config.batch_size)
    said: list[str | None] = [*cautions(items, steps, _copies(cache, items))]
    if not is_local(to_path(cache)):
        data = config.data
        said.append(
            cache_caution(items["shard"], items["frames"], features.n_mels, data.shuffle_shards, data.cache_gib)
        )
    for line in filter(None, said):
        print(f"caution: {line}")
    if training < 2:
        raise UserError(
            f"{config.corpus}: {training} clips are left to train on; check data.exclude and data.val_fraction"
        )
    table = io.BytesIO()
    failed = len(clips) - len(decoded)
    facts = {
        "corpus": config.corpus,
        "cache": cache,
        "shards": 1 + int(pc.max(clips["shard"]).as_py()),
        "failed": failed,
    }
    pq.write_table(items.replace_schema_metadata({CORPUS_ROOT: root, PREPARED: json.dumps(facts)}), table)
    path = run / "items.parquet"
    if path.exists() and not same_items(pq.read_table(io.BytesIO(read_bytes(path))), items):
        raise UserError(
            f"the clips of {config.corpus} are not those that {run} began with; use another --name to start anew"
        )
    write_bytes(path, table.getvalue())
    write_bytes(run / "config.yaml", dump_config(config.training).encode())
    return _Prepared(cache, len(items), failed)


def _prepared_before(run: Any, config: TrainConfig) -> _Prepared | None:
    """What a run began with, while all of its features are there and sound; None where it has to be made (again)."""
    path = run / "items.parquet"
    if not path.exists() or not (run / "config.yaml").exists():
        return None
    with open_seekable(path) as file:
        table = pq.ParquetFile(file)
        known, rows = table.schema_arrow.metadata or {}, table.metadata.num_rows
    facts = json.loads(known.get(PREPARED.encode(), b"{}"))
    if facts.get("corpus") != config.corpus or pending_shards(facts["cache"], facts["shards"]):
        return None
    if is_local(to_path(facts["cache"])):  # those on S3 are checked by the nodes that fetch them
        verify_features(to_path(facts["cache"]), range(facts["shards"]))
    return _Prepared(facts["cache"], rows, facts["failed"])


def _copies(cache: str, items: pa.Table) -> int:
    """Held-out clips that are copies of trained ones, looked for where that takes a second."""
    if len(items) > MOST_COMPARED or not is_local(to_path(cache)):
        return 0
    store = FeatureStore(ShardCache(cache), items["shard"], items["first_frame"], items["frames"])
    return repeated(store, np.asarray(items["validation"]))


def _fit(run: Any, config: TrainConfig, cache: str) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    filesystem, storage_path = arrow_filesystem(config.storage)
    request = choose_workers(config.workers)
    trainer = TorchTrainer(
        _worker,  # type: ignore[arg-type]  # Ray 2.60 passes its return value on, its annotation says None
        train_loop_config={"config": config.training.model_dump(mode="json"), "run": str(run), "cache": cache},
        scaling_config=scaling(config.workers, request),
        torch_config=collectives(),
        run_config=RunConfig(
            name=config.name,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.workers.max_failures),
            # the one with the best score; Ray Train always keeps the latest besides
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="score"),
        ),
    )
    with _ProgressWatch(run), notice_of_waiting(request, config.workers.range[1]):
        return trainer.fit()


def _worker(settings: dict[str, Any]) -> dict[str, Any] | None:
    """One Ray Train worker. Returns what stopped training short of its end, None when it is done."""
    from audiomae.training.loop import TrainLoop

    run = to_path(settings["run"])
    config = build_config(Recipe, settings["config"])
    items = pq.read_table(io.BytesIO(read_bytes(run / "items.parquet")))
    loop = TrainLoop(config, items, settings["cache"], worker_device(), _RayHost(run))
    stopped = loop.run()
    return vars(stopped) if stopped else None


class _RayHost:
    """Connects the loop to Ray Train's checkpoints and to the run's files."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self._written = 0.0
        self._board: Any = None

    def restore(self) -> Path | None:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        return Path(checkpoint.to_directory()) if checkpoint else None

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        import ray.train

        if checkpoint is None:
            ray.train.report(metrics)
            return
        ray.train.report(
            {"score": -1.0} | metrics,
            checkpoint=ray.train.Checkpoint.from_directory(checkpoint),
            checkpoint_dir_name=f"checkpoint_{metrics['step']:08d}",
        )

    def progress(self, step: int, total: int, note: str) -> None:
        now = time.monotonic()
        if now - self._written > PROGRESS_EVERY_S or step == total:
            self._written = now
            write_json(self.run / PROGRESS_FILE, {"step": step, "total": total, "note": note, "pid": os.getpid()})

    def history(self, records: Sequence[dict[str, Any]]) -> None:
        write_bytes(self.run / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
        if self._board is None:
            self._board = _Board(self.run / "tensorboard", records[-1]["epoch"])
        self._board.write(records[-1])


class _Board:
    """TensorBoard curves, one point an epoch. `first` hides what an interrupted worker wrote from that epoch on."""

    def __init__(self, folder: Any, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._local = Path(folder) if is_local(folder) else scratch_dir("tensorboard")
        self._writer = SummaryWriter(str(self._local), purge_step=first)

    def write(self, record: dict[str, Any]) -> None:
        """Add an epoch's record; on S3 the event file is uploaded anew."""
        for name, value in record.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()
        if not is_local(self.folder):
            copy_tree(self._local, self.folder)


class _ProgressWatch:
    """Prints the progress that the first worker leaves in the run's folder, in the driver."""

    def __init__(self, run: Any) -> None:
        self.path = run / PROGRESS_FILE
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        before = self._read()
        first = step = before["step"] if before else 0
        with waiting("starting the training workers"):
            now = self._next(before)
        if now is None:
            return
        with Progress("training", now["total"] - first, "steps") as progress:
            while now is not None:
                progress.update(max(0, now["step"] - step), now["note"])
                step = now["step"]
                now = self._next(now)

    def _next(self, before: dict[str, Any] | None) -> dict[str, Any] | None:
        """What is written after `before`; None when training has ended."""
        while not self._stop.wait(1.0):
            now = self._read()
            if now is not None and now != before:
                return now
        return None

    def _read(self) -> dict[str, Any] | None:
        try:
            value: dict[str, Any] = read_json(self.path)
        except (OSError, IntegrityError):  # not there yet, or storage has a bad moment: the next look will tell
            return None
        return value


def _export(run: Any, config: TrainConfig, result: Any) -> dict[str, Any]:
    """Copy the chosen checkpoint's encoder, without its decoder, to `encoder/`; what the receipt says about it."""
    from audiomae.model.encoder import AudioEncoder

    chosen, metrics = result.checkpoint, result.metrics
    if config.export == "best":
        chosen, metrics = max(result.best_checkpoints, key=lambda pair: pair[1]["score"])
    with chosen.as_directory() as folder:
        encoder = AudioEncoder.load(Path(folder) / "encoder", device="cpu", dtype="float32")
        encoder.save(run / "encoder")
    kept = {Path(checkpoint.path).name for checkpoint, _ in result.best_checkpoints} | {
        Path(result.checkpoint.path).name
    }
    for name in list_names(run):
        if name.startswith("checkpoint_0") and name not in kept:
            remove_tree(run / name)
    wanted = ("epoch", "step", "loss", "val_mAP", "val_R@1")
    return {name: metrics[name] for name in wanted if name in metrics} | {"fingerprint": encoder.fingerprint}


def _stop_message(result: Any) -> str:
    stop = result.return_value
    last = result.checkpoint.path if result.checkpoint else "none yet"
    return (
        f"training stopped: the loss or its gradient is not finite (loss {stop['loss']}) at step {stop['step']}; "
        f"clips of that step: {', '.join(stop['clips'])}; last good checkpoint: {last}. Look at those clips, or lower "
        "optim.lr and start another --name with --set init=CHECKPOINT/encoder"
    )


def _summary(receipt: dict[str, Any]) -> str:
    parts = [f"epoch {receipt['epoch']}", f"loss {receipt['loss']:.4f}"]
    parts += [f"{name} {receipt[name]:.3f}" for name in ("val_mAP", "val_R@1") if name in receipt]
    return ", ".join([*parts, f"{receipt['seconds']:.0f} s", f"fingerprint {receipt['fingerprint'][:12]}"])
