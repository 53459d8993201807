"""How fast is a training step? Against a bare PyTorch DDP script and against the official repository's block.

    python benchmarks/train_step.py                     # tiny size, 2 processes, gloo, one thread each
    python benchmarks/train_step.py --size base --workers 1 --batch 64     # on a GPU

Both sides of a ratio run in the same processes and take turns step by step, so that whatever else the machine does
hits both; beside wall time there is CPU time, which a busy machine disturbs less. The bare script has its batches in
memory and nothing else around it: model, augmentation, loss, DDP, AdamW. Ours is `audiomae.training.loop` with its
reader thread, seeds, metrics and checks.

For the second ratio the official repository's attention (benchmarks/_official.py) replaces ours in encoder and decoder;
the rest of its block does the same products as ours.
"""

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _official import use_official_attention
from torch import Generator, Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

from audiomae.artifacts.features import Segment, read_clips, write_shard
from audiomae.config import build_config
from audiomae.model.audiomae import mae_loss
from audiomae.model.devices import pick_precision
from audiomae.model.encoder import AudioEncoder
from audiomae.model.masking import random_masking
from audiomae.training.augment import augment
from audiomae.training.clips import build_items
from audiomae.training.data import Batch
from audiomae.training.loop import Meter, TrainLoop, build_encoder, training_window
from audiomae.training.losses import info_nce
from audiomae.training.recipe import Recipe

CLIPS, CLIP_FRAMES, CLASSES = 256, 500, 10
WARMUP = 3


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", help="debug, tiny, small, medium, base, large or huge")
    parser.add_argument("--batch", type=int, default=16, help="clips per step, all workers together")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each side")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/train_step.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _write_cache(folder)
        mp.spawn(_worker, (args, folder), nprocs=args.workers)
        result = json.loads((Path(folder) / "result.json").read_text())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(_table(result))


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{'side':<20}{'step s':>10}{'ours / it':>11}{'CPU ours / it':>15}",
        f"{'ours':<20}{result['step_s']:>10.3f}",
    ]
    for name in ("bare_ddp", "official_attention"):
        ratios = f"{result[f'ratio_{name}']:>11.3f}{result[f'cpu_ratio_{name}']:>15.3f}"
        lines.append(f"{name:<20}{result[f'step_s_{name}']:>10.3f}{ratios}")
    return "\n".join([*lines, f"waiting for data: {result['data_wait_share']:.3%} of the time"])


def _config(args: argparse.Namespace) -> Recipe:
    tree = {
        "encoder": {"backbone": {"size": args.size}},
        "objective": {"mae": 1.0, "contrastive": 0.1, "mae_views": "all"},
        "data": {"val_fraction": 0.0},
        "batch_size": args.batch,
        "epochs": 1000,
        "workers": {"num": args.workers},
    }
    return build_config(Recipe, tree)


def _write_cache(folder: str) -> None:
    def extract(uri: str) -> list[Segment]:
        draw = np.random.default_rng(int(uri))
        return [Segment(0.0, CLIP_FRAMES / 100, draw.normal(-6, 2, size=(CLIP_FRAMES, 80)))]

    write_shard(folder, 0, [str(index) for index in range(CLIPS)], extract)


def _items(folder: str, config: Recipe) -> pa.Table:
    clips = read_clips(folder, 1)
    uris = [str(index) for index in range(CLIPS)]
    labels = [f"c{index % CLASSES}" for index in range(CLIPS)]
    return build_items(clips, pa.table({"uri": uris, "label": labels}), config.data, 0)


def _worker(rank: int, args: argparse.Namespace, folder: str) -> None:
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(1)
    if args.workers > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=args.workers)
    config = _config(args)
    loop = TrainLoop(config, _items(folder, config), Path(folder), device, _Silent())
    batches = [loop.loader.read(step) for step in range(4)]
    bare = _Bare(config, batches, loop.labels, device, args.workers, official=False)
    official = _Bare(config, batches, loop.labels, device, args.workers, official=True)
    ours = loop.steps()
    sides = {"ours": lambda: next(ours), "bare": bare.step, "official": official.step}
    wall, cpu = _take_turns(sides, args.steps, device)
    loop.meter = Meter()
    for _ in range(args.steps):  # without pauses in which the reader could get ahead
        next(ours)
    wait = loop.meter.summary()["data_wait_share"]
    ours.close()
    if rank == 0:
        result = _result(args, wall, cpu, wait, device, pick_precision(config.precision, device))
        (Path(folder) / "result.json").write_text(json.dumps(result))
    if args.workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def _take_turns(
    sides: dict[str, Callable[[], Any]], steps: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and CPU seconds of every measured step of every side."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(WARMUP + steps):
        names = list(sides)
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            began, began_cpu = time.perf_counter(), time.process_time()
            sides[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_number >= WARMUP:
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - began_cpu)
    return wall, cpu


def _result(
    args: argparse.Namespace,
    wall: dict[str, list[float]],
    cpu: dict[str, list[float]],
    wait: float,
    device: torch.device,
    precision: str,
) -> dict[str, Any]:
    median = {name: statistics.median(values) for name, values in wall.items()}
    return {
        "size": args.size,
        "batch": args.batch,
        "views": 2,
        "workers": args.workers,
        "steps": args.steps,
        "precision": precision,
        "step_s": median["ours"],
        "step_s_bare_ddp": median["bare"],
        "step_s_official_attention": median["official"],
        "ratio_bare_ddp": _paired(wall, "bare"),
        "ratio_official_attention": _paired(wall, "official"),
        "cpu_ratio_bare_ddp": _paired(cpu, "bare"),
        "cpu_ratio_official_attention": _paired(cpu, "official"),
        "data_wait_share": wait,
        "clips_per_s": args.batch / median["ours"],
        "hardware": {
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else platform.processor() or platform.machine(),
            "cpus": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg()[0],
            "torch": torch.__version__,
        },
    }


def _paired(times: dict[str, list[float]], other: str) -> float:
    """Median over rounds of our time to the other's in the same round."""
    return statistics.median(a / max(b, 1e-9) for a, b in zip(times["ours"], times[other], strict=True))


class _Silent:
    """A host that keeps nothing."""

    def restore(self) -> None:
        return None

    def report(self, metrics: Any, checkpoint: Any) -> None:
        pass

    def progress(self, step: int, total: int, note: str) -> None:
        pass

    def history(self, records: Any) -> None:
        pass


class _Bare:
    """What a careful person writes by hand: resident batches, the model, DDP, AdamW."""

    def __init__(
        self,
        config: Recipe,
        batches: list[Batch],
        labels: Tensor,
        device: torch.device,
        workers: int,
        official: bool,
    ) -> None:
        self.config, self.device, self.workers = config, device, workers
        torch.manual_seed(config.seed)
        encoder = build_encoder(config)
        if official:
            use_official_attention(encoder)
        self.window = training_window(encoder)
        self.model: nn.Module = _BareModel(encoder, config).to(device).train()
        if workers > 1:
            self.model = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True
        )
        self.batches = [
            (torch.from_numpy(batch.features).to(device), labels[torch.from_numpy(batch.clips)].to(device))
            for batch in batches
        ]
        self.calls = 0

    def step(self) -> None:
        features, labels = self.batches[self.calls % len(self.batches)]
        self.calls += 1
        generator = Generator().manual_seed(self.calls)
        views = augment(features.flatten(0, 1).float(), self.window, self.config.augment, generator)
        self.optimizer.zero_grad(set_to_none=True)
        precision = pick_precision(self.config.precision, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = self.model(views, labels, Generator(self.device).manual_seed(self.calls))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if math.isfinite(float(norm)) and math.isfinite(float(loss.detach())):
            self.optimizer.step()


class _BareModel(nn.Module):
    """Masked reconstruction and supervised InfoNCE over the visible tokens, gathered over ranks."""

    def __init__(self, encoder: AudioEncoder, config: Recipe) -> None:
        super().__init__()
        self.encoder, self.weight = encoder, config.objective.contrastive

    def forward(self, views: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        encoder: Any = self.encoder
        backbone: Any = encoder.backbone
        x = encoder.features.finish(views).x
        grid = backbone.grid(x.shape[2])
        every = torch.ones(len(x), grid[0] * grid[1], dtype=torch.bool, device=x.device)
        drawn = random_masking(every, grid, backbone.config.mask_ratio, "unstructured", generator)
        seen = backbone.encode(x, ids_keep=drawn.ids_keep)
        pred = backbone.decode(seen.tokens, drawn.ids_restore)
        reconstruction = mae_loss(pred, backbone.patchify(x), drawn.mask, True)
        with torch.autocast(x.device.type, enabled=False):
            z = encoder.head(seen.tokens)
            groups = labels.repeat(2)
            if dist.is_initialized():
                z = torch.cat(list(all_gather(z)))
                parts = [torch.empty_like(groups) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, groups)
                groups = torch.cat(parts)
            return reconstruction + self.weight * info_nce(z, groups, 0.1)


if __name__ == "__main__":
    main()
