"""A labelled corpus that any machine can make: `python -m audiomae.corpus.synthetic OUT`.

Twelve classes of sound (`sounds.py`) in the formats a real collection has: wav of 16, 24 and 32-bit float, flac, ogg,
mp3; 8 to 48 kHz; mono and stereo; 0.3 to 12 s; quiet and loud, clean and noisy, dry and in a room. Beside them a few
files that are broken on purpose. Everything is drawn from the seed: the samples are always the same, and so are the
bytes except of ogg, whose stream number libsndfile draws itself.
"""

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
from scipy.io import wavfile

from audiomae.cli import run_job
from audiomae.corpus.sounds import SOUNDS, coloured_noise, log_uniform, room
from audiomae.cpus import available_cpus

RATES = (8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000)
FORMATS = (
    ("wav", "PCM_16"),
    ("wav", "PCM_24"),
    ("wav", "FLOAT"),
    ("flac", "PCM_16"),
    ("ogg", "VORBIS"),
    ("mp3", "MPEG_LAYER_III"),
)
FOLDS = 5
BAD_RATE = 16_000


def generate(out_dir: str | os.PathLike[str], num_clips: int = 480, seed: int = 0, bad_files: bool = True) -> Path:
    """Write the corpus.

    Args:
        out_dir: made if absent; `<label>/<name>.<ext>` and `listing.csv` (uri, label, fold) go into it.
        num_clips: number of good clips, dealt evenly over classes and over folds 1 to 5 (hold one out for queries).
        seed: of everything random.
        bad_files: add the broken files and one of pure silence, at the top of `out_dir`; listed without label and fold.

    Returns:
        `out_dir`.
    """
    out = Path(out_dir)
    for label in SOUNDS:
        (out / label).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(available_cpus()) as pool:  # NumPy, SciPy and the encoders let go of the interpreter lock
        rows = list(pool.map(lambda index: _write_clip(out, seed, index), range(num_clips)))
    if bad_files:
        rows += [(uri, "", "") for uri in _write_bad_files(out, seed)]
    with (out / "listing.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("uri", "label", "fold"))
        writer.writerows(sorted(rows))
    return out


def render(label: str, rng: np.random.Generator, rate: int, seconds: float) -> np.ndarray:
    """One clip of a class, float32[samples] with its peak at -24 to -1 dB of full scale."""
    n = max(64, int(seconds * rate))
    sound = SOUNDS[label](rng, rate, n)
    if rng.random() < 0.5:
        sound = room(rng, rate, sound)
    power = np.mean(sound**2) + 1e-12
    snr_db = rng.uniform(0, 25)
    mixed = sound / np.sqrt(power) + 10 ** (-snr_db / 20) * coloured_noise(rng, n)
    return (mixed / np.abs(mixed).max() * 10 ** (rng.uniform(-24, -1) / 20)).astype(np.float32)


def _write_clip(out: Path, seed: int, index: int) -> tuple[str, str, str]:
    labels = list(SOUNDS)
    label, number = labels[index % len(labels)], index // len(labels)
    rng = np.random.default_rng([seed, index])
    suffix, subtype = FORMATS[(number + index) % len(FORMATS)]
    rate = int(rng.choice(RATES))
    samples = render(label, rng, rate, log_uniform(rng, 0.3, 12.0))
    if rng.random() < 0.3:  # the other side comes a little later and softer
        delay = int(rng.integers(1, max(2, rate // 1500)))
        other = np.concatenate([np.zeros(delay, np.float32), samples[:-delay]]) * np.float32(rng.uniform(0.4, 1))
        samples = np.stack([samples, other], axis=1)
    uri = f"{label}/{label}_{number:04d}.{suffix}"
    if subtype == "FLOAT":  # libsndfile puts the time of day into these
        wavfile.write(out / uri, rate, samples)
    else:
        soundfile.write(out / uri, samples, rate, subtype=subtype)
    return uri, label, str(number % FOLDS + 1)


def _write_bad_files(out: Path, seed: int) -> list[str]:
    rng = np.random.default_rng([seed, 1 << 32])
    good = render("bell", rng, BAD_RATE, 2.0)
    soundfile.write(out / "bad_truncated.wav", good, BAD_RATE, subtype="PCM_16")
    soundfile.write(out / "bad_truncated.flac", good, BAD_RATE, subtype="PCM_16")
    for name in ("bad_truncated.wav", "bad_truncated.flac"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[: len(whole) // 2])
    (out / "bad_empty.wav").write_bytes(b"")
    (out / "bad_text.wav").write_text("This is a text file that somebody renamed to .wav.\n" * 20)
    holes = good.copy()
    holes[len(holes) // 2 :: 50] = np.nan
    wavfile.write(out / "bad_nan.wav", BAD_RATE, holes)
    soundfile.write(out / "silence.wav", np.zeros(2 * BAD_RATE, np.float32), BAD_RATE, subtype="PCM_16")
    return ["bad_empty.wav", "bad_nan.wav", "bad_text.wav", "bad_truncated.flac", "bad_truncated.wav", "silence.wav"]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `generate`."""
    parser = argparse.ArgumentParser(
        description="make the synthetic corpus", epilog="example: ... synthetic /tmp/corpus"
    )
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--clips", type=int, default=480, help="number of good clips (480)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-bad-files", action="store_true", help="leave out the broken files")
    args = parser.parse_args(argv)
    out = generate(args.out, args.clips, args.seed, bad_files=not args.no_bad_files)
    print(f"{args.clips} clips of {len(SOUNDS)} classes in {out}; listing: {out / 'listing.csv'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_job(main)
