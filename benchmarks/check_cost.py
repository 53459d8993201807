"""What `embed_corpus --check` adds to the planning of a large corpus of real, small files.

    python benchmarks/check_cost.py --files 1000000

The corpus is a folder of hard links to a few generated sounds (WAV, FLAC, Ogg, MP3; 5 s each), so that every listed
file can be decoded. Timed are listing it, writing its plan, and the check; the share is check / (list + plan).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from audiomae.artifacts.tables import EmbedSettings
from audiomae.corpus.manifest import list_corpus
from audiomae.embedding.listing import Listing
from audiomae.embedding.plan import PlanRequest, new_plan
from audiomae.embedding.preflight import check

RATE, SECONDS, SOURCES = 44_100, 5, 64
SUFFIXES = ("wav", "flac", "ogg", "mp3")


def write_corpus(folder: Path, files: int) -> None:
    """`files` names for `SOURCES` sounds, 10,000 a folder."""
    rng = np.random.default_rng(0)
    originals = []
    for number in range(SOURCES):
        path = folder / f"source-{number}.{SUFFIXES[number % len(SUFFIXES)]}"
        soundfile.write(path, rng.uniform(-0.5, 0.5, RATE * SECONDS), RATE)
        originals.append(path)
    for number in range(files - SOURCES):
        original = originals[number % SOURCES]
        inside = folder / f"{number // 10_000:04d}"
        inside.mkdir(exist_ok=True)
        (inside / f"{number:08d}{original.suffix}").hardlink_to(original)


def main() -> None:
    """Print one line and its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    files = parser.parse_args().files
    settings = EmbedSettings(fingerprint="f" * 64, dim=4, sample_rate=16_000, mode="windows", window_s=5, hop_s=5)
    with tempfile.TemporaryDirectory(prefix="audiomae-check-") as name:
        source, out = Path(name) / "corpus", str(Path(name) / "out")
        source.mkdir()
        write_corpus(source, files)
        began = time.perf_counter()
        corpus = list_corpus(str(source))
        listing = Listing(corpus.batches())
        listed = time.perf_counter()
        new_plan(str(out), listing, settings, lambda uris: [None] * len(uris), PlanRequest("e", "c", corpus.root))
        planned = time.perf_counter()
        report = check(corpus.root, listing.table(), settings, corpus.notes)
        checked = time.perf_counter()
    result = {
        "files": files,
        "list_s": listed - began,
        "plan_s": planned - listed,
        "check_s": checked - planned,
        "share": (checked - planned) / (planned - began),
        "sample": report["sample"],
    }
    print(f"list and plan {planned - began:.1f} s, check {checked - planned:.2f} s: {result['share']:.1%} more")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
