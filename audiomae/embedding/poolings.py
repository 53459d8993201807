"""Files to one vector for each pooling: decoded and encoded once, pooled in every way."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from audiomae.artifacts.tables import EmbedSettings
from audiomae.embedding.decoding import decode_item
from audiomae.embedding.embedder import batches_by_length
from audiomae.embedding.pieces import Clip
from audiomae.errors import ItemError
from audiomae.model.encoder import AudioEncoder
from audiomae.model.encoder_config import PoolingName
from audiomae.model.poolings import comparable, pooled
from audiomae.vectors import clip_vectors

BATCH_SIZE = 8
Pooled = dict[str, np.ndarray]


def pool_files(
    encoder: AudioEncoder,
    names: Sequence[PoolingName],
    root: str,
    items: Sequence[dict[str, Any]],
    settings: EmbedSettings,
) -> list[Pooled | str]:
    """Unit vectors of each file by pooling, float32[D_out], the mean over its windows; or why it gave none.

    Args:
        encoder: its backbone runs once over each window.
        names: poolings, of those that `comparable` allows.
        items: rows of a listing, with their `uri`.
        settings: windows and silence.
    """
    poolings = comparable(encoder, names)
    clips: list[tuple[int, np.ndarray]] = []
    reasons: dict[int, str] = {}
    for number, item in enumerate(items):
        try:
            pieces = list(decode_item(item, root, settings))
        except ItemError as error:
            reasons[number] = str(error)
            continue
        heard = [piece.samples for piece in pieces if isinstance(piece, Clip)]
        clips += [(number, samples) for samples in heard]
        if not heard:
            reasons[number] = "nothing can be heard in it"
    owners: list[int] = []
    windows: dict[str, list[np.ndarray]] = {}
    for batch in batches_by_length([len(samples) for _, samples in clips], BATCH_SIZE):
        sounds = [torch.from_numpy(clips[position][1]) for position in batch]
        padded = torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True).to(encoder.device)
        found = pooled(encoder, poolings, padded, torch.tensor([len(sound) for sound in sounds]))
        owners += [clips[position][0] for position in batch]
        for name, vectors in found.items():
            windows.setdefault(name, []).append(vectors.cpu().numpy())
    files, file_of = np.unique(np.array(owners, np.int64), return_inverse=True)
    means = {name: clip_vectors(np.concatenate(parts), file_of) for name, parts in windows.items()}
    place = {number: row for row, number in enumerate(files.tolist())}
    return [
        reasons[number] if number in reasons else {name: rows[place[number]] for name, rows in means.items()}
        for number in range(len(items))
    ]
