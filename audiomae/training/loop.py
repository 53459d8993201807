"""The training loop, free of ray: optimiser steps, epochs, validation, state to resume from.

Everything random in a step is drawn from (seed, step, rank), and the learning rate is a function of the step. The
state of a run is therefore weights, optimiser moments and the step number: a run resumed from step k computes exactly
what an undisturbed one computes from step k, given the same number of workers and threads.
"""

import contextlib
import math
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from audiomae.artifacts import receipts
from audiomae.artifacts.features import FeatureStore
from audiomae.artifacts.shard_cache import ShardCache
from audiomae.errors import ConfigError
from audiomae.model.devices import pick_precision
from audiomae.model.encoder import AudioEncoder
from audiomae.scratch import scratch
from audiomae.storage import list_sizes
from audiomae.training import schedule
from audiomae.training.augment import augment
from audiomae.training.clips import numbered
from audiomae.training.data import Batch, Loader
from audiomae.training.distributed import rank, world_size
from audiomae.training.objectives import ClipTargets, Objective, Replay
from audiomae.training.recipe import HIDDEN_TARGETS, Recipe
from audiomae.training.sampling import Sampler
from audiomae.training.validation import Validator

STATE_FILE, ENCODER_DIR = "state.pt", "encoder"
FIX_CHECKPOINT = "restore it, or start another --name"
MASKS, AUGMENTATION = 0, 1  # what a generator is for


class Host(Protocol):
    """What the loop needs from whoever runs it."""

    def restore(self) -> Path | None:
        """Directory of the last checkpoint, None on a fresh start."""

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        """Called on every rank alike; `checkpoint` is a directory on rank 0 when there is something to save."""

    def progress(self, step: int, total: int, note: str) -> None:
        """Called on rank 0 after every step."""

    def history(self, records: Sequence[dict[str, Any]]) -> None:
        """Called on rank 0 after every epoch with the records of all epochs so far."""


@dataclass(frozen=True)
class NonFinite:
    """Why training stopped: the step whose loss or gradient was not finite and its clips (all ranks)."""

    step: int
    loss: float
    clips: list[str]


class _NonFiniteStep(Exception):
    def __init__(self, found: NonFinite) -> None:
        super().__init__(found)
        self.found = found


@dataclass
class Meter:
    """Running sums of an epoch; part of the saved state, so that an interrupted epoch logs all of itself."""

    steps: int = 0
    clips: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, values: dict[str, float], clips: int, seconds: float, waited_s: float) -> None:
        """Count one step."""
        self.steps += 1
        self.clips += clips
        self.seconds += seconds
        self.waited_s += waited_s
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def summary(self) -> dict[str, float]:
        """Means over the steps, clips/s, and the share of the time spent waiting for data."""
        means = {name: value / max(1, self.steps) for name, value in self.sums.items()}
        elapsed = max(self.seconds, 1e-9)
        return means | {"clips_per_s": self.clips / elapsed, "data_wait_share": self.waited_s / elapsed}


class TrainLoop:
    """One worker's training.

    Args:
        config: the recipe.
        items: from `build_items`.
        cache: feature cache, a folder or an S3 prefix.
        device: where to train.
        host: checkpoints and reports.

    torch.distributed must be initialised already when there are several workers.
    """

    def __init__(self, config: Recipe, items: pa.Table, cache: str | Path, device: torch.device, host: Host) -> None:
        self.config, self.items, self.device, self.host = config, items, device, host
        self.precision = pick_precision(config.precision, device)
        shards = ShardCache(str(cache), config.data.cache_gib)
        self.store = FeatureStore(shards, items["shard"], items["first_frame"], items["frames"])
        held_out = np.asarray(items["validation"])
        classes, labels = numbered(items["label"])
        captions, caption_of = numbered(items["caption"])
        self.labels, self.captions = torch.from_numpy(labels), torch.from_numpy(caption_of)
        torch.manual_seed(config.seed)
        encoder = build_encoder(config).to(device)
        self.window = training_window(encoder)
        texts = captions.to_pylist() if config.objective.clap and encoder.has_text else []
        vectors = encoder.text_tower.encode(texts) if texts else None
        self.objective = Objective(encoder, config.objective, len(classes), vectors).to(device)
        self.sampler = Sampler(
            np.flatnonzero(~held_out), config.batch_size, config.seed, self.store.shard, config.data.shuffle_shards
        )
        self.total_steps = config.epochs * self.sampler.steps_per_epoch
        frames = config.augment.source_frames(self.window)
        crops = config.augment.crop_frames(self.window, config.objective.views)
        self.loader = Loader(self.store, self.sampler, frames, crops, rank(), world_size())
        self.validator = Validator(self.store, held_out, labels, config, self.window)
        self.step, self.meter, self.records = 0, Meter(), list[dict[str, Any]]()
        self._prepare_parameters()
        self.module: nn.Module = self.objective
        if world_size() > 1:
            self.module = DistributedDataParallel(self.objective, broadcast_buffers=False, gradient_as_bucket_view=True)

    # --- running ----------------------------------------------------------------------------------------------------

    def run(self) -> NonFinite | None:
        """Train to the end of the last epoch, from the host's checkpoint when there is one."""
        checkpoint = self.host.restore()
        if checkpoint is not None:
            self._load(checkpoint)
        every_steps = self.config.checkpoint.every_steps
        try:
            for values in self.steps():
                if rank() == 0:
                    self.host.progress(self.step, self.total_steps, f"loss {values['loss']:.4f}")
                if self.step % self.sampler.steps_per_epoch == 0:
                    self._finish_epoch()
                elif every_steps and self.step % every_steps == 0:
                    self._report({})
        except _NonFiniteStep as stopped:
            return stopped.found
        return None

    def steps(self) -> Generator[dict[str, float]]:
        """Take the remaining optimiser steps one by one; yields each step's losses and gradient norm."""
        self.objective.train()
        began = time.perf_counter()
        for batch in self.loader.batches(self.step, self.total_steps):
            waited, self.loader.waited_s = self.loader.waited_s, 0.0
            values = self._train_step(batch)
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                clips = [self.items["uri"][int(row)].as_py() for row in self.sampler.global_batch(batch.step)]
                raise _NonFiniteStep(NonFinite(batch.step, values["loss"], clips))
            self.step += 1
            self.meter.add(values, len(batch.clips) * world_size(), time.perf_counter() - began, waited)
            yield values
            began = time.perf_counter()

    def _finish_epoch(self) -> None:
        epoch = self.step // self.sampler.steps_per_epoch
        last = self.step == self.total_steps
        record: dict[str, Any] = {"epoch": epoch, "step": self.step} | self._mean_over_ranks(self.meter.summary())
        record["lr"] = self._lr(self.step - 1)
        validated = last or epoch % self.config.validation.every_epochs == 0
        if validated:
            record |= self.validator.run(self.objective.encoder)
        self.records.append(record)
        self.meter = Meter()
        if rank() == 0:
            self.host.history(self.records)
        if validated or epoch % self.config.checkpoint.every_epochs == 0:
            self._report(record | ({"score": record.get("val_mAP", float(epoch))} if validated else {}))

    def _mean_over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        if world_size() == 1:
            return values
        every = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(every)
        return dict(zip(values, (every / world_size()).tolist(), strict=True))

    # --- one step ---------------------------------------------------------------------------------------------------

    def _train_step(self, batch: Batch) -> dict[str, float]:
        """Forward, backward and update; losses by part, their weighted sum, and the gradient norm before clipping."""
        config = self.config
        schedule.set_lr(self.optimizer, self._lr(batch.step))
        self.optimizer.zero_grad(set_to_none=True)
        views, targets = self._views(batch), self._targets(batch.clips)
        chunks = views.split(_chunk_size(len(batch.clips), config.accumulate), dim=1)
        parts = self._cached_backward(chunks, targets) if self._caches else self._plain_backward(chunks, targets)
        limit = config.optim.clip_grad or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        names = [*parts, "grad_norm"]
        values = dict(zip(names, torch.stack([*parts.values(), norm]).tolist(), strict=True))  # one wait for the device
        values["loss"] = sum(values[name] * getattr(config.objective, name) for name in parts)
        if math.isfinite(values["grad_norm"]):
            self.optimizer.step()
            self.objective.after_step(self.step / self.total_steps)
            torch.autograd.graph.increment_version(self.parameters)  # the fused step does not; fingerprints watch it
        return values

    @property
    def _caches(self) -> bool:
        return self.config.grad_cache and self.config.accumulate > 1 and self.config.objective.compares

    def _views(self, batch: Batch) -> Tensor:
        """Augmented views float32[V, B, T, F] on the device."""
        features = torch.from_numpy(batch.features)
        if self.device.type == "cuda":
            features = features.pin_memory()
        features = features.to(self.device, non_blocking=True).float()
        generator = torch.Generator().manual_seed(self._seed(batch.step, AUGMENTATION))
        augmented = augment(features.flatten(0, 1), self.window, self.config.augment, generator)
        return augmented.unflatten(0, features.shape[:2])

    def _targets(self, clips: Any) -> ClipTargets:
        rows = torch.from_numpy(clips)
        return ClipTargets(*(part.to(self.device) for part in (rows, self.labels[rows], self.captions[rows])))

    def _plain_backward(self, chunks: Sequence[Tensor], targets: ClipTargets) -> dict[str, Tensor]:
        """Gradient accumulation: losses that compare clips see one micro-batch at a time."""
        totals: dict[str, Tensor] = {}
        for index, (views, part) in enumerate(self._micro_batches(chunks, targets)):
            share = views.shape[1] / len(targets.clips)
            with self._sync(index == len(chunks) - 1):
                with self._autocast():
                    out = self.module(views, part, self._generator(index))
                (out.loss * share).backward()
            for name, value in out.parts.items():
                totals[name] = totals.get(name, 0.0) + value * share
        return totals

    def _cached_backward(self, chunks: Sequence[Tensor], targets: ClipTargets) -> dict[str, Tensor]:
        """Gradient caching: embed all micro-batches, differentiate the joined losses, replay each with its gradient."""
        embedded = []
        with torch.no_grad(), self._autocast():
            for index, views in enumerate(chunks):
                embedded.append(self.objective.embed_views(views, self._generator(index), reconstruct=False)[0])
        joined = torch.cat(embedded, dim=1).requires_grad_()
        compared = self.objective.compare(joined, targets)
        (gradient,) = torch.autograd.grad(self.objective.weighted(compared), joined)
        grads = gradient.split(chunks[0].shape[1], dim=1)
        totals = {name: value.detach() for name, value in compared.items()}
        for index, (views, part) in enumerate(self._micro_batches(chunks, targets)):
            share = views.shape[1] / len(targets.clips)
            final = index == len(chunks) - 1
            replay = Replay(grads[index], share, (joined.detach(), targets) if final else None)
            with self._sync(final):
                with self._autocast():
                    out = self.module(views, part, self._generator(index), replay)
                out.loss.backward()
            for name in HIDDEN_TARGETS:
                if name in out.parts:
                    totals[name] = totals.get(name, 0.0) + out.parts[name] * share
        return totals

    def _micro_batches(self, chunks: Sequence[Tensor], targets: ClipTargets) -> list[tuple[Tensor, ClipTargets]]:
        size = chunks[0].shape[1]
        split = zip(*(part.split(size) for part in targets), strict=True)
        return [(views, ClipTargets(*part)) for views, part in zip(chunks, split, strict=True)]

    def _sync(self, final: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over ranks once a step, in the backward of its last micro-batch."""
        if final or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def _generator(self, micro_batch: int) -> torch.Generator:
        """The mask generator of a micro-batch; also seeds drop path, so that replays are equal."""
        seed = self._seed(self.step, MASKS, micro_batch)
        torch.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    def _seed(self, step: int, *purpose: int) -> int:
        state = np.random.SeedSequence([self.config.seed, step, rank(), *purpose]).generate_state(1, np.uint64)
        return int(state[0] >> np.uint64(1))

    def _lr(self, step: int) -> float:
        optim = self.config.optim
        warmup = round(optim.warmup_epochs * self.sampler.steps_per_epoch)
        return optim.lr * schedule.lr_factor(step, self.total_steps, warmup, optim.min_lr / optim.lr)

    # --- state ------------------------------------------------------------------------------------------------------

    def _prepare_parameters(self) -> None:
        """Freeze what the config says and what no loss reaches (DDP waits for every gradient), build the optimiser."""
        depth, layer_of = encoder_layers(self.objective)
        schedule.freeze(self.objective, layer_of, self.config.optim.freeze_layers)
        self._freeze_unreached()
        groups = schedule.param_groups(self.objective, self.config.optim, layer_of, depth)
        self.optimizer = schedule.build_optimizer(groups, self.config.optim)
        self.parameters = [parameter for group in groups for parameter in group["params"]]

    def _freeze_unreached(self) -> None:
        clips = self.sampler.clips[:2] if len(self.sampler.clips) > 1 else self.sampler.clips.repeat(2)
        views = torch.zeros(self.config.objective.views, 2, self.window, self.store.bands, device=self.device)
        self.objective(views, self._targets(clips), self._generator(0)).loss.backward()
        for parameter in self.objective.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.requires_grad_(False)
            parameter.grad = None

    def _report(self, metrics: dict[str, Any]) -> None:
        if rank() != 0:
            return self.host.report(metrics, None)
        with scratch("checkpoint") as folder:
            self._save(Path(folder))
            self.host.report({"step": self.step} | metrics, Path(folder))

    def _save(self, folder: Path) -> None:
        encoder = self.objective.encoder
        encoder.save(folder / ENCODER_DIR, with_decoder=getattr(encoder.backbone, "decoder", None) is not None)
        state = {
            "step": self.step,
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meter": vars(self.meter),
            "records": self.records,
        }
        torch.save(state, folder / STATE_FILE)
        receipt = receipts.describe(folder, list_sizes(folder), {"step": self.step})
        receipts.create(folder / receipts.RECEIPT_FILE, receipt)

    def _load(self, folder: Path) -> None:
        with contextlib.suppress(FileNotFoundError):  # checkpoints of older versions have no receipt
            receipts.verify(folder, receipts.read(folder / receipts.RECEIPT_FILE, FIX_CHECKPOINT), fix=FIX_CHECKPOINT)
        state = torch.load(folder / STATE_FILE, map_location=self.device, weights_only=True)
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.meter, self.records = state["step"], Meter(**state["meter"]), state["records"]


def build_encoder(config: Recipe) -> AudioEncoder:
    """The encoder to train: new, or with features and backbone of `config.init` and heads as `config.encoder` says."""
    decoder = config.objective.reconstructs
    if config.init is None:
        return AudioEncoder.from_config(config.encoder, config.seed, with_decoder=decoder)
    given = AudioEncoder.load(config.init, device="cpu", dtype="float32", with_decoder=decoder)
    wanted = config.encoder.model_copy(update={"features": given.config.features, "backbone": given.config.backbone})
    encoder = AudioEncoder.from_config(wanted, config.seed, with_decoder=decoder)
    ours = encoder.state_dict()
    weights = {
        name: value for name, value in given.state_dict().items() if name in ours and ours[name].shape == value.shape
    }
    encoder.load_state_dict({**ours, **weights})
    return encoder


def training_window(encoder: AudioEncoder) -> int:
    """Log-mel frames (before any resizing) that fill the backbone's window."""
    return math.ceil(encoder.config.backbone.img_size[0] / encoder.config.features.resize_time)


def encoder_layers(objective: Objective) -> tuple[int, schedule.LayerOf]:
    """(number of blocks, parameter name -> depth): patch and position embeddings are 0, heads and decoder the top."""
    blocks = [name for name, _ in objective.named_modules() if _is_block(name)]
    root = blocks[0].rpartition("blocks.")[0]  # a timm ViT lies one level deeper than an AudioMAE
    prefixes = [root + name for name in ("patch_proj", "patch_embed", "pos_embed", "cls_token")]
    return len(blocks), schedule.layer_names(prefixes, blocks)


def _is_block(name: str) -> bool:
    head, _, index = name.rpartition(".")
    return (
        head.startswith("encoder.backbone.") and head.endswith("blocks") and "decoder" not in head and index.isdigit()
    )


def _chunk_size(rows: int, accumulate: int) -> int:
    if rows % accumulate:
        raise ConfigError(f"accumulate: {rows} clips per worker do not split into {accumulate} equal micro-batches")
    return rows // accumulate
