"""Clips of any length through a backbone with a fixed window: which frames go where, and the tokens back in order."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from audiomae.model.audiomae import EncoderOutput, Positions

MAX_PIECES = 256  # pieces in one backbone call: bounds memory when a clip is hours long


class WindowConfig(Protocol):
    """What is asked of a backbone's config."""

    @property
    def img_size(self) -> tuple[int, int]: ...
    @property
    def grid(self) -> tuple[int, int]: ...


class Backbone(Protocol):
    """What is asked of a backbone: AudioMAE, or a timm ViT in `vit.py`."""

    @property
    def config(self) -> WindowConfig: ...

    def step_counts(self, frame_lengths: Tensor) -> Tensor: ...

    def encode(
        self,
        x: Tensor,
        frame_lengths: Tensor | None = None,
        *,
        positions: Positions = "extend",
        want_cls_attention: bool = False,
        every_block: bool = False,
    ) -> EncoderOutput: ...


def encode_long(  # noqa: PLR0913 (the options of AudioEncoder, passed through)
    backbone: Backbone,
    x: Tensor,
    frame_lengths: Tensor | None = None,
    long_input: str = "chunk",
    official_windows: bool = False,
    official_order: bool = False,
    want_cls_attention: bool = False,
    every_block: bool = False,
) -> EncoderOutput:
    """Tokens of whole clips.

    `chunk` cuts a clip into window-long pieces and a shorter rest, encodes them side by side (pieces of all clips
    together, and no attention mask unless rests differ), and lines up their patch tokens in time; the clip's cls token
    is the mean over its pieces, weighted by their time steps. `extend` and `interpolate` run each clip as one sequence.

    Args:
        x: log-mel [B, 1, T, F], zero past each clip's frames.
        frame_lengths: int64[B], best on the CPU; None = all T.
        official_windows: fill rests with zeros to the whole window and let them take part in attention.
        official_order: with `official_windows`, read each window's tokens, which are time-major, as if they were
            band-major, as the official code does before it lines up the bands of a time step.
        every_block: tokens of all blocks side by side.

    Returns:
        EncoderOutput with tokens [B, 1 + N, D] over whole clips, time-major.
    """
    wanted = {"want_cls_attention": want_cls_attention, "every_block": every_block}
    window = backbone.config.img_size[0]
    frames = x.shape[2]
    lengths = torch.full((x.shape[0],), frames) if frame_lengths is None else frame_lengths.to("cpu").clamp(max=frames)
    if long_input != "chunk" or (frames <= window and not official_windows):
        positions: Positions = "interpolate" if long_input == "interpolate" else "extend"
        return _encode(backbone, x, lengths, positions, **wanted)
    whole, rest = lengths // window, lengths % window
    if official_windows:
        whole, rest = -(-lengths // window), torch.zeros_like(lengths)
    pieces = F.pad(x, (0, 0, 0, -frames % window)).unflatten(2, (-1, window)).squeeze(1)  # [B, C, window, F]
    outputs = []
    if bool(whole.any()):
        used = torch.arange(pieces.shape[1]) < whole[:, None]
        full = pieces.flatten(0, 1) if bool(used.all()) else pieces[used.to(x.device)]
        outputs += [_encode(backbone, part.unsqueeze(1), None, "extend", **wanted) for part in full.split(MAX_PIECES)]
    owners = rest.nonzero().squeeze(1)
    if len(owners):
        tails = pieces[owners.to(x.device), whole[owners].to(x.device), : int(rest.max())].unsqueeze(1)
        outputs.append(_encode(backbone, tails, rest[owners], "extend", **wanted))
    if official_order:
        outputs = [out._replace(tokens=_as_if_band_major(out.tokens, backbone.config.grid)) for out in outputs]
    layout = _Layout(backbone.config.grid, whole, backbone.step_counts(lengths) if official_windows else None)
    if not official_windows:
        layout.add_rests(owners, backbone.step_counts(rest[owners]))
    return layout.assemble(outputs)


def _as_if_band_major(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Time-major tokens [P, 1 + Nt * Nf, D], reordered as the official `forward_features` reads them."""
    steps, bands = grid
    patches = tokens[:, 1:].unflatten(1, (bands, steps)).transpose(1, 2).flatten(1, 2)
    return torch.cat([tokens[:, :1], patches], dim=1)


class _Layout:
    """Where each clip's time steps and pieces lie in the backbone's outputs: whole pieces first, then rests."""

    def __init__(self, grid: tuple[int, int], whole: Tensor, steps: Tensor | None) -> None:
        self.grid = grid
        self.whole = whole
        self.steps = whole * grid[0] if steps is None else steps
        self.rest_rank = torch.zeros_like(whole)
        self.has_rest = torch.zeros_like(whole, dtype=torch.bool)
        self.rest_steps = torch.zeros_like(whole)

    def add_rests(self, owners: Tensor, steps: Tensor) -> None:
        """Rests of the clips `owners` (int64[R]) with `steps` time steps each, in the order they were encoded."""
        self.rest_rank[owners] = torch.arange(len(owners))
        self.has_rest[owners] = True
        self.rest_steps[owners] = steps
        self.steps = self.steps + self.rest_steps

    def assemble(self, outputs: list[EncoderOutput]) -> EncoderOutput:
        """Outputs over pieces [P, 1 + n, D] -> one output over clips [B, 1 + N, D]."""
        device = outputs[0].tokens.device
        bands = self.grid[1]
        columns, total = torch.arange(int(self.steps.max())), int(self.whole.sum())
        first = self.whole.cumsum(0) - self.whole
        in_whole = columns < (self.whole * self.grid[0])[:, None]
        rest_size = int(self.rest_steps.max())
        rows = torch.where(
            in_whole,
            first[:, None] * self.grid[0] + columns,
            total * self.grid[0] + (self.rest_rank * rest_size - self.whole * self.grid[0])[:, None] + columns,
        )
        real = columns < self.steps[:, None]
        rows = rows.masked_fill(~real, 0).to(device)
        patches = torch.cat([out.tokens[:, 1:].flatten(0, 1).unflatten(0, (-1, bands)) for out in outputs])
        tokens = torch.cat([self._cls(outputs, first, total), patches[rows].flatten(1, 2)], dim=1)
        token_mask = F.pad(real.to(device).repeat_interleave(bands, 1), (1, 0), value=True)
        attention = None
        if outputs[0].cls_attention is not None:
            attention = torch.cat([self._scores(out) for out in outputs])[rows].flatten(1, 2)
            attention = attention * token_mask[:, 1:]
            attention = attention / attention.sum(1, keepdim=True)
        return EncoderOutput(tokens, token_mask, (len(columns), bands), attention, padded=not bool(real.all()))

    def _scores(self, out: EncoderOutput) -> Tensor:
        """A piece's cls attention counts as much as it has real time steps: [P, n] -> [P * steps, bands]."""
        assert out.cls_attention is not None
        steps = out.token_mask[:, 1:].sum(1, keepdim=True)
        return (out.cls_attention * steps).flatten().unflatten(0, (-1, self.grid[1]))

    def _cls(self, outputs: list[EncoderOutput], first: Tensor, total: int) -> Tensor:
        """Mean of a clip's cls tokens, weighted by the real time steps of their pieces: [B, 1, D]."""
        cls = torch.cat([out.tokens[:, 0] for out in outputs])
        numbers = torch.arange(int((self.whole + self.has_rest).max()))
        rows = torch.where(numbers < self.whole[:, None], first[:, None] + numbers, (total + self.rest_rank)[:, None])
        weights = (self.steps[:, None] - numbers * self.grid[0]).clamp(0, self.grid[0]) / self.steps[:, None]
        rows = rows.masked_fill(weights == 0, 0)
        weights = weights.to(cls.device, cls.dtype).unsqueeze(-1)
        return (cls[rows.to(cls.device)] * weights).sum(1, keepdim=True)


def _encode(
    backbone: Backbone, x: Tensor, lengths: Tensor | None, positions: Positions, **wanted: bool
) -> EncoderOutput:
    """One backbone call; an attention mask only if some clip has fewer time steps than the batch."""
    if lengths is not None:
        x = x[:, :, : int(lengths.max())]
        steps = backbone.step_counts(lengths)
        if bool((steps == steps.max()).all()):
            lengths = None
    return backbone.encode(x, lengths, positions=positions, **wanted)
