"""The files of a saved encoder: config.json, model.safetensors, and text/ when it has a text tower."""

import shutil
import tempfile

from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import load_file
from torch import Tensor
from upath import UPath

from audiomae.errors import IntegrityError
from audiomae.model.text import TextConfig, TextTower
from audiomae.storage import copy_tree, fetch_dir, is_local, read_bytes

CONFIG_FILE, WEIGHTS_FILE, TEXT_SUBDIR = "config.json", "model.safetensors", "text"


def read_weights(path: UPath) -> dict[str, Tensor]:
    """Tensors of a local or remote safetensors file. IntegrityError when it is missing or damaged."""
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
    with tempfile.TemporaryDirectory() as folder:
        tower.save(folder)
        copy_tree(folder, target)
