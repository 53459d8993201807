"""How fast is the embedding job? Against the ideal of its machine, a DataLoader loop and a file-by-file extractor.

    python benchmarks/embed_throughput.py                       # 2,000 generated clips, tiny encoder, all cores
    python benchmarks/embed_throughput.py --corpus DIR --encoder ENC --clips 0

Four ways to the same embeddings, one after another on the same files, cores and weights; each is given its best thread
and worker counts, found on a sample first:

- job: `ray_jobs/embed_corpus.py` as a process of its own, from the first file's decoding to the last shard's commit;
- ideal: decoding alone in a tight loop and encoding alone on windows that lie in memory, each on all cores; together on
  the same cores they could do 1 / (1 / decode + 1 / encode), on a GPU the smaller of the two. Measured before and after
  the job, and averaged;
- dataloader: a PyTorch DataLoader whose workers decode, length-bucketed batches in the main process;
- file_by_file: librosa.load, then one window of one sound after another, as the official repository (`_official.py`).

Rates are files per second from the first to the last one; start-up and end-to-end times stand beside them.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _official import embed_sound, use_official_attention
from torch.utils.data import DataLoader, Dataset

from audiomae.artifacts.embeddings import EmbedSettings
from audiomae.config import build_config
from audiomae.corpus.manifest import list_corpus
from audiomae.corpus.synthetic import generate
from audiomae.embedding.decoding import decode_item
from audiomae.embedding.embedder import BatchEncoder
from audiomae.embedding.pieces import Clip
from audiomae.errors import ItemError
from audiomae.model.audiomae import AudioMAE
from audiomae.model.encoder import AudioEncoder, EncoderConfig

ROOT = Path(__file__).resolve().parent.parent
WINDOW_S = 5.0
SAMPLE = 96  # files on which settings are chosen
LOADER_BATCH = 32
SPAWN = multiprocessing.get_context("spawn")


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", help="a folder of audio; default: generated")
    parser.add_argument("--encoder", help="an encoder; default: an untrained one of --size")
    parser.add_argument("--size", default="tiny", help="size of the default encoder")
    parser.add_argument("--clips", type=int, default=2000, help="use the first so many files; 0 = all")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/embed_throughput.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """The result as a person wants to see it."""
    rates, lines = result["rates_files_per_s"], []
    for name in ("job", "ideal", "decode", "encode", "dataloader", "file_by_file"):
        line = f"{name:<14}{rates[name]:>10.1f}{rates['job'] / rates[name]:>10.2f}"
        if name in result["startup_s"]:
            line += f"{result['startup_s'][name]:>12.1f}{result['end_to_end_s'][name]:>14.1f}"
        lines.append(line)
    shares = ", ".join(f"{stage} {share:.1%}" for stage, share in result["stage_shares"].items())
    head = f"{result['clips']:,} files{'files/s':>13}{'job / it':>10}{'start-up s':>12}{'end to end s':>14}"
    return "\n".join([head, *lines, f"workers of the job: {shares} busy; bottleneck {result['bottleneck']}"])


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All four, and their ratios."""
    encoder = args.encoder or str(default_encoder(folder / "encoder", args.size))
    root = args.corpus or str(generate(folder / "corpus", num_clips=args.clips or 2000, bad_files=False))
    listing = folder / "listing.csv"
    uris = [uri for table in list_corpus(root).batches() for uri in table["uri"].to_pylist()]
    uris = [str(Path(root, uri).absolute()) for uri in uris[: args.clips or None]]
    listing.write_text("\n".join(["uri", *uris]))
    for uri in uris:  # everyone reads from the page cache
        Path(uri).read_bytes()
    say(f"{len(uris)} files, encoder {encoder}")

    before = ideal(encoder, uris)
    job = run_job(encoder, listing, folder / "embeddings")
    after = ideal(encoder, uris)
    loader = best_loader(encoder, uris)
    single = best_single(encoder, uris)
    best = {name: (before[name] + after[name]) / 2 for name in ("decode", "encode", "ideal")}
    rates = {
        "job": job["files_per_s"],
        **best,
        "dataloader": loader["files_per_s"],
        "file_by_file": single["files_per_s"],
    }
    whole = {"job": job["elapsed_s"], "dataloader": loader["elapsed_s"], "file_by_file": single["elapsed_s"]}
    return {
        "clips": len(uris),
        "ratio_ideal": rates["job"] / rates["ideal"],
        "ratio_dataloader": rates["job"] / rates["dataloader"],
        "ratio_file_by_file": rates["job"] / rates["file_by_file"],
        "rates_files_per_s": rates,
        "end_to_end_s": whole,
        "end_to_end_ratio_dataloader": whole["dataloader"] / whole["job"],
        "end_to_end_ratio_file_by_file": whole["file_by_file"] / whole["job"],
        "startup_s": {"job": job["startup_s"], "dataloader": loader["startup_s"], "file_by_file": single["startup_s"]},
        "stage_shares": job["stages"],
        "encoder_busy": job["stages"]["encode"],
        "bottleneck": job["bottleneck"],
        "x_real_time": job["x_real_time"],
        "settings": {
            "job": job["topology"],
            "ideal": [before, after],
            "dataloader": loader["setting"],
            "file_by_file": single["setting"],
        },
        "hardware": hardware(),
    }


def default_encoder(directory: Path, size: str) -> Path:
    """An untrained encoder: speed does not depend on the weights."""
    AudioEncoder.from_config(build_config(EncoderConfig, {"backbone": {"size": size}})).save(directory)
    return directory


def hardware() -> dict[str, Any]:
    """What this ran on."""
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "torch": torch.__version__,
    }


def settings_of(encoder: AudioEncoder) -> EmbedSettings:
    return EmbedSettings(
        fingerprint=encoder.fingerprint,
        dim=encoder.dim,
        sample_rate=encoder.sample_rate,
        mode="windows",
        window_s=WINDOW_S,
        hop_s=WINDOW_S,
    )


def windows_of(uri: str, settings: EmbedSettings) -> list[Clip]:
    """The windows of a file; none when it cannot be decoded."""
    try:
        return [piece for piece in decode_item({"uri": uri}, "", settings) if isinstance(piece, Clip)]
    except ItemError:
        return []


# --- the job ----------------------------------------------------------------------------------------------------------


def run_job(encoder: str, listing: Path, out: Path) -> dict[str, Any]:
    """`embed_corpus` from its command line, on all cores."""
    say("job")
    command = [
        sys.executable,
        str(ROOT / "ray_jobs" / "embed_corpus.py"),
        "--encoder",
        encoder,
        "--corpus",
        str(listing),
    ]
    command += ["--out", str(out), "--window-s", str(WINDOW_S), "--hop-s", str(WINDOW_S), "--max-failure-rate", "1"]
    began = time.time()
    subprocess.run(
        command, check=True, env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    )
    elapsed_s = time.time() - began
    run = json.loads((out / "run.json").read_text())["last_run"]
    shutil.rmtree(out)
    return {
        **run,
        "files_per_s": run["inputs"] / run["wall_s"],
        "elapsed_s": elapsed_s,
        "startup_s": elapsed_s - run["wall_s"],
    }


# --- the ideal --------------------------------------------------------------------------------------------------------


def ideal(encoder: str, uris: Sequence[str]) -> dict[str, Any]:
    """Files per second of decoding alone, of encoding alone, and of both composed on the same cores."""
    cores = os.cpu_count() or 1
    decode = in_parallel(decode_alone, cores, encoder, uris)
    if torch.cuda.is_available():
        encode, how = in_parallel(partial(encode_alone, threads=1), 1, encoder, uris), "1 process on the GPU"
        return {"decode": decode, "encode": encode, "ideal": min(decode, encode), "encode_setting": how}
    layouts = [(cores, 1), (1, cores)] if cores > 1 else [(1, 1)]
    trials = {
        layout: in_parallel(partial(encode_alone, threads=layout[1]), layout[0], encoder, uris[:SAMPLE])
        for layout in layouts
    }
    layout = max(trials, key=lambda key: trials[key])
    encode = in_parallel(partial(encode_alone, threads=layout[1]), layout[0], encoder, uris)
    result = {"decode": decode, "encode": encode, "ideal": 1 / (1 / decode + 1 / encode)}
    say(f"ideal: {result}")
    return {**result, "encode_setting": f"{layout[0]} processes of {layout[1]} threads"}


def in_parallel(work: Callable[..., None], count: int, encoder: str, uris: Sequence[str]) -> float:
    """Files per second of `count` processes that share the files and start together."""
    barrier, times = SPAWN.Barrier(count), SPAWN.Queue()
    processes = [SPAWN.Process(target=work, args=(encoder, uris[rank::count], barrier, times)) for rank in range(count)]
    for process in processes:
        process.start()
    spans = [times.get() for _ in processes]
    for process in processes:
        process.join()
    return len(uris) / (max(end for _, end in spans) - min(start for start, _ in spans))


def decode_alone(encoder: str, uris: Sequence[str], barrier: Any, times: Any) -> None:
    """Decode the files, keep nothing."""
    settings = settings_of(AudioEncoder.load(encoder))
    torch.set_num_threads(1)
    windows_of(uris[0], settings)
    barrier.wait()
    began = time.time()
    for uri in uris:
        windows_of(uri, settings)
    times.put((began, time.time()))


def encode_alone(encoder: str, uris: Sequence[str], barrier: Any, times: Any, threads: int) -> None:
    """Decode the files first; then encode what lies in memory, in padded batches that lie ready."""
    torch.set_num_threads(threads)
    model = AudioEncoder.load(encoder)
    batches = BatchEncoder(model)
    settings = settings_of(model)
    clips = [clip for uri in uris for clip in windows_of(uri, settings)]
    batches(clips[:8])
    barrier.wait()
    began = time.time()
    batches(clips)
    times.put((began, time.time()))


# --- a DataLoader loop ------------------------------------------------------------------------------------------------


class Files(Dataset[list[Clip]]):
    """The windows of each file."""

    def __init__(self, uris: Sequence[str], settings: EmbedSettings) -> None:
        self.uris, self.settings = uris, settings

    def __len__(self) -> int:
        return len(self.uris)

    def __getitem__(self, index: int) -> list[Clip]:
        torch.set_num_threads(1)
        return windows_of(self.uris[index], self.settings)


def flatten(items: Iterable[list[Clip]]) -> list[torch.Tensor]:
    """The windows of a batch of files as tensors, which cross from the workers through shared memory."""
    return [torch.from_numpy(clip.samples) for clips in items for clip in clips]


def best_loader(encoder: str, uris: Sequence[str]) -> dict[str, Any]:
    """The DataLoader loop in the setting that is fastest on a sample."""
    cores = os.cpu_count() or 1
    candidates = [
        (workers, threads) for workers in sorted({1, max(1, cores - 1), cores}) for threads in sorted({1, cores})
    ]
    return best_of("dataloader", loader_loop, candidates, encoder, uris)


def loader_loop(encoder: str, uris: Sequence[str], setting: tuple[int, int], results: Any, began: float) -> None:
    """Embed the files with a DataLoader of (workers, threads)."""
    workers, threads = setting
    torch.set_num_threads(threads)
    model = AudioEncoder.load(encoder)
    batches = BatchEncoder(model, LOADER_BATCH)
    pinned = batches.device.type == "cuda"
    loader = DataLoader(
        Files(uris, settings_of(model)),
        LOADER_BATCH,
        num_workers=workers,
        collate_fn=flatten,
        prefetch_factor=4,
        pin_memory=pinned,
    )
    warm_up(batches)
    first = time.time()
    rows = [batches([Clip(0.0, WINDOW_S, window.numpy()) for window in windows]) for windows in loader if windows]
    np.concatenate(rows)
    results.put((began, first, time.time()))


# --- file by file -----------------------------------------------------------------------------------------------------


def best_single(encoder: str, uris: Sequence[str]) -> dict[str, Any]:
    """The file-by-file extractor with as many threads as serve it best."""
    return best_of("file_by_file", file_by_file, sorted({1, os.cpu_count() or 1}), encoder, uris)


def file_by_file(encoder: str, uris: Sequence[str], threads: int, results: Any, began: float) -> None:
    """librosa.load, then the official repository's way through the model; one forward a sound where it has no such."""
    import librosa

    torch.set_num_threads(threads)
    model = AudioEncoder.load(encoder)
    official = isinstance(model.backbone, AudioMAE)
    if official:
        use_official_attention(model)

    @torch.no_grad()
    def embed(waveform: torch.Tensor) -> np.ndarray:
        sound = waveform.to(model.device)
        return (embed_sound(model, sound) if official else model(sound[None])[0]).cpu().numpy()

    embed(torch.zeros(round(WINDOW_S * model.sample_rate)))
    first = time.time()
    rows = []
    for uri in uris:
        try:
            waveform, _ = librosa.load(uri, sr=model.sample_rate, mono=True)
        except Exception:
            continue
        rows.append(embed(torch.from_numpy(waveform)))
    np.stack(rows)
    results.put((began, first, time.time()))


def warm_up(batches: BatchEncoder) -> None:
    """One forward, so that no first-call cost is counted."""
    batches([Clip(0.0, WINDOW_S, np.zeros(round(WINDOW_S * batches.encoder.sample_rate), np.float32))])


def best_of(
    name: str, loop: Callable[..., None], candidates: Sequence[Any], encoder: str, uris: Sequence[str]
) -> dict[str, Any]:
    """Run each setting on a sample, the best of them on everything."""
    sample = uris[:: max(1, len(uris) // SAMPLE)]
    trials = {setting: in_process(loop, encoder, sample, setting)["files_per_s"] for setting in candidates}
    setting = max(trials, key=lambda key: trials[key])
    say(f"{name}: {trials}")
    return {
        **in_process(loop, encoder, uris, setting),
        "setting": {"best": setting, "trials": {str(k): v for k, v in trials.items()}},
    }


def in_process(loop: Callable[..., None], encoder: str, uris: Sequence[str], setting: Any) -> dict[str, float]:
    """Run a loop in a fresh process; its rate, start-up and whole time."""
    results = SPAWN.Queue()
    process = SPAWN.Process(target=loop, args=(encoder, uris, setting, results, time.time()))
    process.start()
    began, first, last = results.get()
    process.join()
    return {"files_per_s": len(uris) / (last - first), "startup_s": first - began, "elapsed_s": last - began}


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
