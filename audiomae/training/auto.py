"""The recipe that fits: from a corpus and a machine to a recipe file, the changes to it, and why.

What it picks was measured on ESC-10 (docs/recipes.md says what was, and what is only scaled from it). Nothing here
depends on how fast this machine happens to be: the same corpus on as many cores gets the same recipe.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from audiomae.corpus.decode import AudioInfo
from audiomae.training.recipe import DataConfig

LABELLED, UNLABELLED, LARGE = "small_labelled", "small_unlabelled", "large"
# 320 clips learn for 1,500 steps, where the curve on ESC-10 is nearly flat; a folder of 60 for 200, half a minute
STEPS_PER_CLIP, FREE_CLIPS = 5, 20
FEWEST_STEPS, MOST_STEPS = 200, 30_000
LARGE_CLIPS = 20_000  # from here on a GPU is given the official layout
MOST_HOURS = 1.0  # without a GPU
CORE_S_PER_STEP = 0.2  # of a batch of 32 windows of 5 s, measured on one core; for the budget only
# A small network's step is a thousand operations of microseconds: two threads took 2.3 times as long as one, and ten
# times where something else wanted a core. So cores are shared out to processes of one thread once that saves minutes,
# two hyperthreads counting as one.
WORTH_SHARING_S, MOST_WORKERS = 600, 8
LONGEST_WINDOW_S, LONG_FILE_WINDOW_S = 10.0, 5.0
FRAMES_PER_S = 50
RATES = (8000, 16_000, 22_050, 32_000)


@dataclass(frozen=True)
class CorpusFacts:
    """What the choice rests on. `durations_s` and `rates` are of a sample; `labels` counts files by label."""

    files: int
    durations_s: Sequence[float] = ()
    rates: Sequence[int] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    captioned: int = 0


@dataclass(frozen=True)
class Machine:
    """The cores and GPUs that training may use."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class Choice:
    """A file of `ray_jobs/recipes` by name, the keys that differ from it, and why, for the reader."""

    recipe: str
    changes: dict[str, Any]
    reasons: list[str]


def facts_of(listing: pa.Table, headers: Sequence[AudioInfo], data: DataConfig) -> CorpusFacts:
    """Facts of a corpus listing (one row a file) and a sample of its files' headers."""

    def known(column: str | None) -> list[str]:
        if column is None or column not in listing.column_names:
            return []
        return [str(value) for value in listing[column].to_pylist() if value is not None]

    return CorpusFacts(
        files=listing.num_rows,
        durations_s=[info.duration_s for info in headers if info.duration_s],
        rates=[info.sample_rate for info in headers],
        labels=Counter(known(data.label)),
        captioned=len(known(data.caption)),
    )


def choose(facts: CorpusFacts, machine: Machine) -> Choice:
    """Size, input, batch, epochs and objectives for a corpus on a machine."""
    window_s, clip_s = _window(facts.durations_s)
    clips = _clip_count(facts, clip_s)
    by_label, why_labels = _labels(facts)
    if machine.gpus and clips >= LARGE_CLIPS:
        return _large(facts, machine, clips, by_label, why_labels)
    batch = 32 if clips >= 64 else max(4, clips // 2)
    rate = _rate(facts.rates)
    workers, steps, why_steps = _steps(clips, machine, batch, window_s)
    per_epoch = max(1, int(clips * 0.9) // batch)
    epochs = math.ceil(steps / per_epoch)
    every = max(1, epochs // 4)
    changes = {
        "encoder": {
            "features": {
                "sample_rate": rate,
                "n_fft": round(rate * 0.032),
                "win_length": round(rate * 0.032),
                "hop_length": rate // FRAMES_PER_S,
                "f_max": rate / 2,
            },
            "backbone": {"img_size": [round(window_s * FRAMES_PER_S), 64]},
        },
        "data": {"clip_s": clip_s},
        "batch_size": batch,
        "epochs": epochs,
        "optim": {"warmup_epochs": max(1, epochs // 30)},
        "validation": {"every_epochs": every},
        "checkpoint": {"every_epochs": every},
        "workers": {"num": workers},
    }
    return Choice(
        LABELLED if by_label else UNLABELLED,
        changes,
        [
            f"{facts.files:,} files, about {clips:,} clips of {clip_s:g} s: the small encoder, {why_steps}",
            why_labels,
            f"windows of {window_s:g} s at {rate:,} Hz, as the files are",
        ],
    )


def _window(durations_s: Sequence[float]) -> tuple[float, float]:
    """(window, clip) in seconds: whole files where they are short, else windows out of clips of ten seconds."""
    if not len(durations_s):
        return LONG_FILE_WINDOW_S, LONGEST_WINDOW_S
    typical = float(np.quantile(durations_s, 0.9))
    if typical > LONGEST_WINDOW_S + 0.05:
        return LONG_FILE_WINDOW_S, LONGEST_WINDOW_S
    window = max(1.0, round(typical, 1))
    return window, window


def _clip_count(facts: CorpusFacts, clip_s: float) -> int:
    per_file = [max(1, round(seconds / clip_s)) for seconds in facts.durations_s] or [1]
    return round(facts.files * sum(per_file) / len(per_file))


def _labels(facts: CorpusFacts) -> tuple[bool, str]:
    """Whether labels are worth learning from, and why."""
    labelled, classes = sum(facts.labels.values()), len(facts.labels)
    if labelled < facts.files / 2:
        return False, f"{labelled:,} of {facts.files:,} files have a label: it learns by comparing views of one clip"
    if classes == 1:
        only = next(iter(facts.labels))
        return False, f"every label is {only!r}, which teaches nothing: it learns by comparing views of one clip"
    if classes > labelled / 2:
        return False, (
            f"{classes:,} labels for {labelled:,} files are too few files a label: it learns by comparing views of one "
            "clip"
        )
    return True, f"{classes:,} labels: clips of one label are pulled together"


def _rate(rates: Sequence[int]) -> int:
    """The highest of `RATES` that most files have; more would be empty bands."""
    usual = float(np.median(rates)) if len(rates) else RATES[-1]
    return max([rate for rate in RATES if rate <= usual], default=RATES[0])


def _steps(clips: int, machine: Machine, batch: int, window_s: float) -> tuple[int, int, str]:
    """Workers, optimiser steps, and what limits the steps."""
    wanted = int(min(max(STEPS_PER_CLIP * (clips - FREE_CLIPS), FEWEST_STEPS), MOST_STEPS))
    if machine.gpus:
        return machine.gpus, wanted, f"{wanted:,} steps"
    step_s = CORE_S_PER_STEP * max(0.1, batch * window_s / (32 * 5.0))
    workers = _processes(machine, batch) if wanted * step_s > WORTH_SHARING_S else 1
    affordable = int(MOST_HOURS * 3600 * workers / step_s)
    if wanted <= affordable:
        return workers, wanted, f"{wanted:,} steps"
    spent = f"about {MOST_HOURS:g} h of {workers} core{'s'[: workers > 1]}"
    return workers, affordable, f"{affordable:,} steps, {spent} ({wanted:,} would be worth it)"


def _processes(machine: Machine, batch: int) -> int:
    """One for two CPUs, as many of them as divide a batch evenly."""
    most = min(MOST_WORKERS, machine.cpus // 2)
    return max((number for number in range(1, most + 1) if batch % number == 0), default=1)


def _large(facts: CorpusFacts, machine: Machine, clips: int, by_label: bool, why_labels: str) -> Choice:
    size = "base" if clips >= 100_000 else "small"
    batch = 64 * machine.gpus
    epochs = int(min(100, max(20, 10_000_000 // clips)))
    changes: dict[str, Any] = {
        "encoder": {"backbone": {"size": size}},
        "batch_size": batch,
        "epochs": epochs,
        "workers": {"num": machine.gpus, "gpu": True},
    }
    if not by_label:
        changes["objective"] = {"supervised": False}
    return Choice(
        LARGE,
        changes,
        [
            f"{facts.files:,} files, about {clips:,} clips, {machine.gpus} GPU(s): size {size} in the official layout, "
            f"{epochs} epochs in batches of {batch}",
            why_labels,
        ],
    )
