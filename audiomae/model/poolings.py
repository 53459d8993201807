"""One pass of a backbone, every pooling of its tokens: what the poolings of an existing encoder are compared by."""

from collections.abc import Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from audiomae.errors import ConfigError
from audiomae.model.chunking import encode_long
from audiomae.model.encoder import AudioEncoder
from audiomae.model.pooling import Pooling, PoolingName


def comparable(encoder: AudioEncoder, names: Sequence[PoolingName] | None = None) -> list[Pooling]:
    """The poolings to compare on an encoder: those named, or all that need no training, its own first.

    Raises:
        ConfigError: a projection was trained on the encoder's own pooling, or learned attention that was never learnt.
    """
    own = encoder.pooling.name
    if encoder.config.projection or encoder.config.text:
        raise ConfigError(
            f"this encoder has a projection that was trained on its {own} pooling, so another pooling cannot go before "
            "it; train with encoder.projection=null to compare poolings"
        )
    untrained: list[PoolingName] = [name for name in get_args(PoolingName) if name not in (own, "attention")]
    wanted: list[PoolingName] = list(names or [own, *untrained])
    if "attention" in wanted and own != "attention":
        raise ConfigError(f"pooling attention: its scores are learnt, and this encoder was trained with {own}")
    bands = encoder.config.backbone.grid[1]
    return [encoder.pooling if name == own else Pooling(name, encoder.backbone.dim, bands) for name in wanted]


@torch.inference_mode()
def pooled(
    encoder: AudioEncoder, poolings: Sequence[Pooling], waveforms: Tensor, lengths: Tensor | None = None
) -> dict[str, Tensor]:
    """Unit vectors float32[B, D_out] of a padded batch by pooling; the backbone runs once.

    As `AudioEncoder.forward` with that pooling, without centre and crops. (An encoder in the official window layout
    runs twice: its `freq_concat` reads the tokens of a window in another order.)
    """
    encoder.eval()
    with encoder.autocast():
        x, frame_lengths = encoder.features(waveforms, lengths)
    quirk = encoder.config.official_windows
    found: dict[str, Tensor] = {}
    for reordered in (False, True) if quirk else (False,):
        chosen = [pooling for pooling in poolings if (pooling.name == "freq_concat" and quirk) == reordered]
        if not chosen:
            continue
        with encoder.autocast():
            out = encode_long(
                encoder.backbone,
                x,
                frame_lengths,
                encoder.config.long_input,
                quirk,
                reordered,
                any(pooling.needs_cls_attention for pooling in chosen),
            )
        tokens = (out.tokens, out.mask, out.cls_attention)
        found |= {pooling.name: F.normalize(pooling(*tokens), dim=-1) for pooling in chosen}
    return {pooling.name: found[pooling.name].float() for pooling in poolings}
