"""What a GPU saves where an index is built: finding the lists, and giving each row its list.

    python benchmarks/index_gpu.py                    # on a machine with a GPU and faiss-gpu; about two minutes

Both steps are the builder's own functions, which take a GPU where faiss has one; the same process runs them again with
faiss's GPUs hidden, on every core. 1,024, 4,096 and 8,192 lists are what the builder takes for 10^6, 10^7 and 10^8
rows. Same results within tolerance: the share of rows that one quantiser gives the same list on both (scores are
rounded otherwise), and the mean cosine similarity of rows to their centroids with each side's own quantiser.
Vectors are those of `_clustered.py`.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import faiss
import numpy as np
from _clustered import BLOCK, Clustered

from audiomae.search import index as ann
from audiomae.search.index.encoding import TRAIN_ROWS_PER_LIST
from audiomae.search.spec import IndexSpec
from audiomae.vectors import widened


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows that are given their lists")
    parser.add_argument("--lists", type=int, nargs="+", default=[1024, 4096, 8192], help="numbers of lists")
    parser.add_argument("--dim", type=int, default=384, help="length of a vector")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/index_gpu.json"))
    args = parser.parse_args()
    if faiss.get_num_gpus() == 0:
        parser.exit(77, "index_gpu.py: faiss finds no GPU here; it takes faiss-gpu and a machine with a GPU\n")
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    vectors = Clustered(args.dim)
    with ThreadPoolExecutor() as pool:
        blocks = list(pool.map(lambda number: ann.to_rows(vectors.block(number)[0]), range(-(-args.rows // BLOCK))))
    rows = np.concatenate(blocks)[: args.rows]
    cells = [measure(rows, nlist) for nlist in args.lists]
    facts = {"device": _device(), "cpus": os.cpu_count(), "cpu": platform.processor(), "faiss": faiss.__version__}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"hardware": facts, "rows": len(rows), "dim": args.dim, "cells": cells}, indent=2) + "\n"
    )
    for cell in cells:
        gpu, cpu = cell["gpu"], cell["cpu"]
        print(
            f"{cell['lists']:>6,} lists: trained in {gpu['train_s']:.2f} s on the GPU, {cpu['train_s']:.2f} s on "
            f"{os.cpu_count()} cores ({cell['train_ratio']:.1f} x); {len(rows):,} rows assigned in "
            f"{gpu['assign_s']:.2f} and {cpu['assign_s']:.2f} s ({cell['assign_ratio']:.1f} x); same list for "
            f"{cell['same_list']:.4%} of rows, similarity to the centroid {gpu['similarity']:.4f} and "
            f"{cpu['similarity']:.4f}"
        )


def measure(rows: np.ndarray, nlist: int) -> dict[str, Any]:
    """Both steps on both sides."""
    spec = IndexSpec(kind="ivf", factory=f"IVF{nlist},RaBitQfs", nlist=nlist, nprobe=8)
    sample = rows[np.random.default_rng(1).permutation(len(rows))[: TRAIN_ROWS_PER_LIST * nlist]]
    found: dict[str, Any] = {}
    lists = {}
    with tempfile.TemporaryDirectory() as name:
        quantiser = Path(name) / "gpu" / ann.TRAINED_FILE
        for side, hidden in (("gpu", False), ("cpu", True)):
            out = Path(name) / side
            out.mkdir()
            with gpus_hidden(hidden):
                if side == "gpu":
                    ann.train(_few(spec), sample[:5000], out)  # kernels loaded, memory taken
                _, train_s = _timed(ann.train, spec, sample, out)
                lists[side], assign_s = _timed(ann.assign, quantiser, rows)
                own = ann.assign(out / ann.TRAINED_FILE, rows[:100_000])
            opened = ann.Quantiser(out)
            fit = np.einsum("nd,nd->n", widened(rows[: len(own)]), opened.centroids[own.astype(np.int64)])
            found[side] = {"train_s": train_s, "assign_s": assign_s, "similarity": float(fit.mean())}
    return {
        "lists": nlist,
        "sample": len(sample),
        **found,
        "train_ratio": found["cpu"]["train_s"] / found["gpu"]["train_s"],
        "assign_ratio": found["cpu"]["assign_s"] / found["gpu"]["assign_s"],
        "same_list": float((lists["gpu"] == lists["cpu"]).mean()),
    }


@contextmanager
def gpus_hidden(hidden: bool) -> Iterator[None]:
    """Let the builder believe that faiss has no GPU."""
    with mock.patch.object(faiss, "get_num_gpus", lambda: 0) if hidden else mock.MagicMock():
        yield


def _few(spec: IndexSpec) -> IndexSpec:
    return spec.model_copy(update={"factory": "IVF64,RaBitQfs", "nlist": 64})


def _timed(step: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    found = step(*args)
    return found, time.perf_counter() - start


def _device() -> str:
    try:
        import torch

        return torch.cuda.get_device_name()
    except (ImportError, RuntimeError):
        return "a GPU"


if __name__ == "__main__":
    main()
