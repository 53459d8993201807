"""How far the probability beside a hit can be trusted: on clips that were neither indexed nor used to fit it.

    python benchmarks/calibration.py --corpus ../shared/data/esc10 --encoder RUN/encoder
    python benchmarks/calibration.py --corpus ../shared/data/esc10                       # an untrained encoder

The corpus is a folder of labels (ESC-10), the fold is the first digit of a file name. For each fold a release is built
of the others, calibrated by what it holds as the service does, and searched with the clips of the fold. What is
promised is compared with what happened: expected calibration error over ten bins of equally many hits, of each fold
and of all. A fold whose release refuses to calibrate itself (its own held-out half is off by more than 0.05) promises
nothing.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "benchmarks" / "calibration.json"
K = 10


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="a folder of folders, one for each label")
    parser.add_argument("--encoder", help="an AudioEncoder directory; default: an untrained one of the smallest kind")
    parser.add_argument("--out", default=str(OUT))
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    files = sorted(path for path in Path(args.corpus).glob("*/*.*") if path.name[0].isdigit())
    labels = np.array([path.parent.name for path in files])
    folds = np.array([path.name[0] for path in files])
    vectors = embed([str(path) for path in files], args.encoder)
    found, promised, happened = {}, [], []
    with tempfile.TemporaryDirectory() as work:
        for fold in sorted(set(folds)):
            index = index_of(Path(work) / fold, vectors, labels, folds != fold)
            said, same = one_fold(index, vectors[folds == fold], labels[folds == fold])
            found[fold] = facts(said, same)
            if said is not None:
                promised.append(said)
                happened.append(same)
    report = {
        "corpus": Path(args.corpus).name,
        "clips": len(files),
        "encoder": args.encoder and Path(args.encoder).parent.name,
        "folds": found,
        "all": facts(np.concatenate(promised), np.concatenate(happened)) if promised else None,
    }
    Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def embed(paths: list[str], encoder_dir: str | None) -> np.ndarray:
    """Unit vectors float32[N, dim] of files."""
    import serving  # type: ignore[import-not-found]

    from audiomae import AudioEncoder

    encoder = AudioEncoder.load(encoder_dir) if encoder_dir else serving.make_encoder()
    return np.concatenate([encoder.embed(paths[start : start + 16]) for start in range(0, len(paths), 16)])


def index_of(folder: Path, vectors: np.ndarray, labels: np.ndarray, mine: np.ndarray) -> Any:
    """A release of some of the clips."""
    import embedding_sets  # type: ignore[import-not-found]

    from audiomae import AudioIndex

    made = embedding_sets.make_set(folder / "set", vectors[mine], columns={"label": labels[mine].tolist()})
    embedding_sets.make_release(folder / "index", [made])
    return AudioIndex.open(folder / "index")


def one_fold(index: Any, queries: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """The probabilities of all hits of the queries (None: not calibrated), and which hits have the query's label."""
    from serve.quality import calibrate

    hits = index.search(queries, k=K)
    same = np.array([[item["label"] == label for item in row] for row, label in zip(hits.items, labels, strict=True)])
    calibration = calibrate(index, np.arange(len(index)))
    return None if calibration is None else calibration(np.minimum(hits.scores, 1.0)).ravel(), same.ravel()


def facts(promised: np.ndarray | None, happened: np.ndarray) -> dict[str, Any]:
    """What was promised and what happened."""
    from serve.quality import calibration_error

    right = round(float(happened.mean()), 4)
    if promised is None:
        return {"hits": len(happened), "right": right, "calibrated": False}
    error = round(calibration_error(promised, happened), 4)
    return {
        "hits": len(happened),
        "right": right,
        "calibrated": True,
        "promised": round(float(promised.mean()), 4),
        "error": error,
    }


if __name__ == "__main__":
    main()
