"""One measurement of an ablation, as one Ray task: train on all folds but one, embed everything, let that fold ask."""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from audiomae.artifacts import receipts
from audiomae.config import build_config
from audiomae.corpus.decode import decode
from audiomae.corpus.manifest import open_source
from audiomae.errors import DecodeError, IntegrityError
from audiomae.evaluation.baselines import SAMPLE_RATE, centred, logmel_statistics, mfcc_statistics
from audiomae.metrics import Labelled, mean_values, score_protocol
from audiomae.model.devices import pick_device
from audiomae.model.encoder import AudioEncoder, EncoderConfig
from audiomae.scratch import scratch
from audiomae.storage import copy_tree, list_sizes, to_path
from audiomae.training.clips import build_items
from audiomae.training.loop import ENCODER_DIR, TrainLoop
from audiomae.training.recipe import CheckpointingConfig, Recipe

NOTHING_TO_RESUME = CheckpointingConfig(every_epochs=10**9)
# the keys of results of older versions
UNSEALED = frozenset({"metrics", "queries", "row", "fold", "seed", "method", "key", "training", "dim", "seconds"})
HAND_MADE = {"mfcc": mfcc_statistics, "logmel": logmel_statistics}


def sample_rate_of(unit: Mapping[str, Any]) -> int:
    """The rate at which a unit wants the corpus' audio."""
    if unit["method"] in HAND_MADE:
        return SAMPLE_RATE
    return build_config(Recipe, unit["config"]).encoder.features.sample_rate


def run_unit(  # noqa: PLR0913 (a Ray task: Ray resolves references only among the arguments themselves)
    unit: Mapping[str, Any],
    out: str,
    listing: pa.Table,
    cached: tuple[str, pa.Table] | None,
    chunks: Sequence[Any],
    fold_column: str,
    threads: int,
    text_model: str | None,
    parent_done: Any = None,
) -> dict[str, Any]:
    """Train (if the method trains), embed and score; writes and returns the result.

    Args:
        unit: `Unit.as_dict()`.
        out: the ablation's folder.
        listing: N rows with `uri`, the label column and `fold_column`.
        cached: feature cache and its rows, for methods that train.
        chunks: references to `decode_files` results, together the audio of the N rows.
        threads: of torch.
        text_model: replaces `encoder.text.model` where a row has a text tower.
        parent_done: the parent's result; only to be scheduled after it.
    """
    import ray

    torch.set_num_threads(threads)
    started = time.monotonic()
    config = build_config(Recipe, _with_text_model(unit["config"], text_model))
    audio = {uri: clip for reference in chunks for uri, clip in ray.get(reference).items()}
    clips = [audio[uri] for uri in listing["uri"].to_pylist()]
    about: dict[str, Any] = {}
    if unit["method"] in HAND_MADE:
        vectors = centred([HAND_MADE[unit["method"]](clip) for clip in clips])
    else:
        encoder, about = _encoder(unit, config, out, listing, cached)
        vectors = encoder.embed(clips)
    result = _scored(vectors, listing, str(config.data.label), fold_column, str(unit["fold"]))
    result |= {name: unit[name] for name in ("row", "fold", "seed", "method", "key")}
    result |= {"training": about, "dim": int(vectors.shape[1]), "seconds": round(time.monotonic() - started, 1)}
    commit_result(out, unit, result)
    return result


def result_path(out: str, unit: Mapping[str, Any]) -> Any:
    """Where a unit's result is committed."""
    return to_path(out) / "results" / unit["row"] / f"fold-{unit['fold']}-seed-{unit['seed']}.json"


def commit_result(out: str, unit: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write a unit's result in place of one of another config or corpus; it names the encoder that was kept, if any."""
    names = []
    if unit["keep_encoder"]:
        folder = encoder_dir(out, unit["row"], unit)
        below = folder.path.removeprefix(to_path(out).path).strip("/")
        names = [f"{below}/{name}" for name in list_sizes(folder)]
    path = result_path(out, unit)
    receipts.withdraw(path)
    receipts.create(path, receipts.describe(out, names, result))


def read_result(out: str, unit: Mapping[str, Any]) -> dict[str, Any] | None:
    """A unit's result, if it was made from the very same configs and corpus and its encoder is whole; else None.

    A damaged one is said and measured again.
    """
    path = result_path(out, unit)
    try:
        receipt = receipts.read_result(path, UNSEALED)
        if receipt.facts.get("key") != unit["key"]:
            return None
        receipts.verify(out, receipt)
    except FileNotFoundError:
        return None
    except IntegrityError as error:
        print(f"measured again: {error}")
        return None
    is_kept = not unit["keep_encoder"] or (encoder_dir(out, unit["row"], unit) / "config.json").exists()
    return dict(receipt.facts) if is_kept else None


def encoder_dir(out: str, row: str, unit: Mapping[str, Any]) -> Any:
    """Where the encoder of a row that others build on is kept, for the fold and seed of `unit`."""
    return to_path(out) / "encoders" / row / f"fold-{unit['fold']}-seed-{unit['seed']}"


def _encoder(
    unit: Mapping[str, Any], config: Recipe, out: str, listing: pa.Table, cached: tuple[str, pa.Table] | None
) -> tuple[AudioEncoder, dict[str, Any]]:
    """The encoder that the unit's method gives, and the figures of its training's last epoch."""
    if unit["method"] == "untrained":
        return AudioEncoder.from_config(config.encoder, config.seed), {}
    if unit["method"] == "reuse":
        parent = AudioEncoder.load(encoder_dir(out, unit["parent"], unit), device="auto", dtype="float32")
        return _with_changes(parent, config.encoder), {}
    if unit["method"] == "continue":
        start = encoder_dir(out, unit["parent"], unit)
        config = config.model_copy(update={"init": str(start)})
    assert cached is not None, "methods that train get a feature cache"
    with scratch("ablation") as folder:
        host = _KeepEncoders(Path(folder))
        about = _train(config, listing, cached, host)
        chosen = host.chosen(config.export)
        if unit["keep_encoder"]:
            copy_tree(chosen, encoder_dir(out, unit["row"], unit))
        return AudioEncoder.load(chosen, device="auto", dtype="float32"), about


def _train(config: Recipe, listing: pa.Table, cached: tuple[str, pa.Table], host: "_KeepEncoders") -> dict[str, Any]:
    cache, clips = cached
    config = config.model_copy(update={"checkpoint": NOTHING_TO_RESUME})
    items = build_items(clips, listing, config.data, config.seed)
    device = pick_device("auto")
    loop = TrainLoop(config, items, cache, device, host)
    stopped = loop.run()
    if stopped is not None:
        raise RuntimeError(
            f"loss is {stopped.loss} at step {stopped.step}; clips of that step: {', '.join(stopped.clips)}"
        )
    last = host.records[-1]
    kept = {name: last[name] for name in ("epoch", "step", "loss", "val_mAP", "val_R@1") if name in last}
    return kept | {"device": device.type, "clips": len(items)}


class _KeepEncoders:
    """Host of the training loop inside one task: keeps the best and the last encoder, nothing to resume from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best = -float("inf")
        self.records: list[dict[str, Any]] = []

    def restore(self) -> Path | None:
        return None

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if checkpoint is None:
            return
        self._keep(checkpoint, "last")
        if metrics.get("score", -float("inf")) > self.best:
            self.best = metrics["score"]
            self._keep(checkpoint, "best")

    def progress(self, step: int, total: int, note: str) -> None:
        pass

    def history(self, records: Sequence[dict[str, Any]]) -> None:
        self.records = list(records)

    def chosen(self, export: str) -> Path:
        """The directory of the encoder that the recipe exports: `best` by validation or `last`."""
        return self.folder / export

    def _keep(self, checkpoint: Path, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.copytree(checkpoint / ENCODER_DIR, self.folder / name)


def _with_changes(trained: AudioEncoder, wanted: EncoderConfig) -> AudioEncoder:
    """The trained backbone under another pooling or input handling; a projection fitted to one pooling is left out."""
    config = wanted.model_copy(update={"projection": None, "text": None})
    encoder = AudioEncoder.from_config(config)
    weights = {name: value for name, value in trained.state_dict().items() if name.startswith("backbone.")}
    missing, _ = encoder.load_state_dict(weights, strict=False)
    backbone = [name for name in missing if name.startswith("backbone.")]
    if backbone:
        raise RuntimeError(f"reuse: the parent has no weights for {', '.join(backbone[:3])}: this row needs training")
    return encoder.to(trained.device)


def _with_text_model(tree: Mapping[str, Any], text_model: str | None) -> dict[str, Any]:
    encoder = dict(tree.get("encoder") or {})
    if text_model is not None and encoder.get("text") is not None:
        encoder["text"] = {**encoder["text"], "model": text_model}
    return {**tree, "encoder": encoder}


def _scored(vectors: np.ndarray, listing: pa.Table, label: str, fold_column: str, fold: str) -> dict[str, Any]:
    """Means over the fold's queries against the other folds, and AP and R@1 of each query by uri."""
    uris = np.array(listing["uri"].to_pylist())
    labels, folds = (np.array([str(value) for value in listing[name].to_pylist()]) for name in (label, fold_column))
    scores = score_protocol(Labelled(vectors, labels, uris), groups=folds, query_groups=[fold])
    queries = {
        str(uris[row]): {"AP": float(ap), "R@1": float(hit)}
        for row, ap, hit in zip(scores.query_rows, scores.values["AP"], scores.values["R@1"], strict=True)
    }
    return {"metrics": mean_values(scores.values), "queries": queries}


def decode_files(root: str, uris: Sequence[str], sample_rate: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Audio by uri of the files that can be decoded, float32[S] each, and the reason by uri for the others."""
    clips, failed = {}, {}
    for uri in uris:
        try:
            clips[uri] = decode(open_source(root, uri), sample_rate)
        except (DecodeError, OSError) as error:
            failed[uri] = str(error)
    return clips, failed
