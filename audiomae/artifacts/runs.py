"""A finished training run: `train.json`, the receipt that names its encoder, clips, settings and curves."""

from collections.abc import Mapping
from typing import Any

from audiomae.artifacts import receipts
from audiomae.artifacts.receipts import Receipt
from audiomae.storage import Location, list_names, list_sizes, to_path

RUN_FILE, ENCODER_DIR = "train.json", "encoder"
RECORDS = ("config.yaml", "items.parquet", "metrics.jsonl")
FIX = "restore it from a copy, or delete train.json and run the same command again to export the run anew"
# facts of older versions, which named no file
UNSEALED = frozenset({"epoch", "step", "loss", "val_mAP", "val_R@1", "fingerprint", "clips", "failed_files", "seconds"})


def finish(run: Location, facts: Mapping[str, Any]) -> None:
    """Mark a run as finished, once its encoder is exported."""
    root = to_path(run)
    names = [name for name in list_names(root) if name in RECORDS]
    names += [f"{ENCODER_DIR}/{name}" for name in list_sizes(root / ENCODER_DIR)]
    receipts.create(root / RUN_FILE, receipts.describe(root, names, facts))


def read_finished(run: Location) -> dict[str, Any] | None:
    """What a finished run has to say of itself, its files checked; None while it is not finished.

    Raises:
        IntegrityError: the receipt, the encoder or a record of the run is damaged.
    """
    root = to_path(run)
    try:
        receipt = read_receipt(root / RUN_FILE)
    except FileNotFoundError:
        return None
    receipts.verify(root, receipt, fix=FIX)
    return dict(receipt.facts)


def read_receipt(path: Location) -> Receipt:
    """`train.json` itself. FileNotFoundError when there is none, IntegrityError when it is damaged."""
    return receipts.read_result(path, UNSEALED, FIX)
