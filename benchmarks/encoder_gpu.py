"""How much of a GPU does embedding use? The share of the measured matrix peak, and the share of time it is busy.

    python benchmarks/encoder_gpu.py                 # on a machine with a GPU; about a minute

The peak is that of one large bfloat16 matrix product through PyTorch on random data, measured in the same process. The
encoder is measured twice: on waveforms that lie on the device already, and through `BatchEncoder`, which is what an
encoder actor of the embedding job runs: waveforms in host memory in, vectors in host memory out. FLOPs are counted by
PyTorch (`AudioEncoder.summary`), two a multiply-add, attention included; the log-mel front end is in the time, not in
the count. Busy time is what the profiler says of the device's kernels and copies.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiomae.config import build_config
from audiomae.embedding.embedder import BatchEncoder
from audiomae.embedding.pieces import Clip
from audiomae.model.encoder import AudioEncoder
from audiomae.model.encoder_config import EncoderConfig

MATRIX, REPEATS, WARMUP = 8192, 10, 3


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["small", "base", "large"], help="encoder sizes")
    parser.add_argument("--batch", type=int, default=512, help="windows a batch (that of an encoder actor on a GPU)")
    parser.add_argument("--windows", type=int, default=2048, help="windows through BatchEncoder")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/encoder_gpu.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(77, "encoder_gpu.py: no CUDA device here; run it on a machine with a GPU\n")
    peak = matrix_peak()
    rows = [measure(size, args.batch, args.windows, peak) for size in args.sizes]
    result = {
        "hardware": {"device": torch.cuda.get_device_name(), "cpus": os.cpu_count(), "torch": torch.__version__},
        "matrix_peak_tflops": peak,
        "batch": args.batch,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"bfloat16 matrix product of {MATRIX}: {peak:.0f} TFLOP/s")
    for row in rows:
        print(
            f"{row['size']:<6} {row['precision']}: {row['plain_windows_per_s']:,.0f} windows/s on the device, compiled "
            f"{row['device_windows_per_s']:,.0f}, "
            f"{row['device_share_of_peak']:.1%} of the peak; from host memory {row['host_windows_per_s']:,.0f}, "
            f"{row['host_share_of_peak']:.1%}, device busy {row['busy']:.1%}"
        )


def matrix_peak() -> float:
    """TFLOP/s of a large bfloat16 matrix product."""
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * MATRIX**3 / _median_s(lambda: a @ b) / 1e12


def measure(size: str, batch: int, windows: int, peak: float) -> dict[str, Any]:
    """Rates of one encoder size with its default input, as a batch job loads it."""
    encoder = AudioEncoder.from_config(build_config(EncoderConfig, {"backbone": {"size": size}})).to("cuda").eval()
    encoder.precision = "bfloat16"
    facts = encoder.summary()
    samples = round(facts["window_s"] * facts["sample_rate"])
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 0.1, (windows, samples)).astype(np.float32)
    waveforms = torch.from_numpy(noise[:batch]).to("cuda")
    encode = BatchEncoder(encoder, batch)
    clips = [Clip(0.0, facts["window_s"], row) for row in noise]

    @torch.inference_mode()
    def on_device() -> Tensor:
        return encoder(waveforms)

    def from_host() -> None:
        encode(clips)

    plain_rate = batch / _median_s(on_device)
    encoder.compile_blocks()  # as jobs do from 50,000 files on
    device_rate, host_rate = batch / _median_s(on_device), windows / _median_s(from_host)
    to_share = facts["flops_per_window"] / 1e12 / peak
    return {
        "size": size,
        "precision": encoder.precision,
        "window_s": facts["window_s"],
        "gflops_per_window": facts["flops_per_window"] / 1e9,
        "plain_windows_per_s": plain_rate,
        "device_windows_per_s": device_rate,
        "device_share_of_peak": device_rate * to_share,
        "host_windows_per_s": host_rate,
        "host_share_of_peak": host_rate * to_share,
        "busy": _busy(from_host),
    }


def _median_s(call: Callable[[], Any]) -> float:
    """Median seconds of a call, by the device's own clock."""
    times = []
    for repeat in range(WARMUP + REPEATS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        call()
        ended.record()
        torch.cuda.synchronize()
        if repeat >= WARMUP:
            times.append(began.elapsed_time(ended) / 1000)
    return statistics.median(times)


def _busy(call: Callable[[], Any]) -> float:
    """Share of a call's time in which a kernel or copy runs on the device."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / (reached - spans[0][0])


if __name__ == "__main__":
    main()
