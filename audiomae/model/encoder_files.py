"""The files of a saved encoder: config.json, model.safetensors, text/ when it has a text tower, and receipt.json.

The receipt is written last. Encoders of older versions have none: their fingerprint alone tells a changed weight.
"""

import shutil
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import load_file
from torch import Tensor
from upath import UPath

from audiomae.artifacts import receipts
from audiomae.artifacts.receipts import RECEIPT_FILE, Receipt
from audiomae.errors import IntegrityError
from audiomae.model.text import TextConfig, TextTower
from audiomae.scratch import scratch
from audiomae.storage import copy_tree, fetch_dir, is_local, list_sizes, read_bytes, read_json

CONFIG_FILE, WEIGHTS_FILE, TEXT_SUBDIR = "config.json", "model.safetensors", "text"
FIX = "restore the encoder directory from a copy, or export the encoder again"


def read_saved(path: UPath) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(content of config.json, tensors) of a local or remote encoder directory, its files checked first.

    Raises:
        FileNotFoundError: there is no encoder.
        IntegrityError: a file is missing, cut or changed.
    """
    receipt = _receipt_of(path)
    if receipt:
        receipts.verify(path, receipt, fix=FIX)
    saved = read_json(path / CONFIG_FILE)
    return saved, _read_weights(path / WEIGHTS_FILE)


def write_receipt(path: UPath, fingerprint: str) -> None:
    """The last file of an encoder directory: what every other file is."""
    names = [CONFIG_FILE, WEIGHTS_FILE, *(f"{TEXT_SUBDIR}/{name}" for name in list_sizes(path / TEXT_SUBDIR))]
    receipts.create(path / RECEIPT_FILE, receipts.describe(path, names, {"fingerprint": fingerprint}))


def _receipt_of(path: UPath) -> Receipt | None:
    try:
        return receipts.read(path / RECEIPT_FILE, FIX)
    except FileNotFoundError:
        return None


def _read_weights(path: UPath) -> dict[str, Tensor]:
    try:
        return load_file(str(path)) if is_local(path) else from_safetensors(read_bytes(path))
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing beside {CONFIG_FILE}: copy the whole encoder directory") from None
    except SafetensorError as error:
        raise IntegrityError(f"{path}: not a whole safetensors file ({error}): restore it") from None


def load_text_tower(config: TextConfig, source: UPath | None) -> TextTower:
    """From the encoder's own directory when it was loaded from one, else by the config's name."""
    if source is None:
        return TextTower(config)
    if is_local(source):
        return TextTower(config, str(source))
    folder = fetch_dir(source)
    try:
        return TextTower(config, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_text_tower(tower: TextTower, target: UPath) -> None:
    """Copy model and tokenizer into the encoder's directory, so that it answers text queries by itself."""
    with scratch("encoder") as folder:
        tower.save(folder)
        copy_tree(folder, target)
