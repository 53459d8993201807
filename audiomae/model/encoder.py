"""AudioEncoder: waveforms in, unit vectors out. Features, backbone, pooling and projection as one saved thing.

In use:

    encoder = AudioEncoder.load("runs/first/encoder")
    vectors = encoder.embed(["dog.wav", "rain.ogg"])     # float32 [2, encoder.dim], unit length
    encoder.save("elsewhere")                            # config.json + model.safetensors
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from upath import UPath

from audiomae.artifacts import receipts
from audiomae.config import build_config
from audiomae.errors import ConfigError, IntegrityError
from audiomae.model.audiomae import AudioMAE, AudioMAEConfig, EncoderOutput
from audiomae.model.chunking import encode_long
from audiomae.model.devices import pick_device, pick_precision
from audiomae.model.encoder_config import EncoderConfig, ProjectionConfig, SpectrogramViTConfig, as_saved
from audiomae.model.encoder_files import (
    CONFIG_FILE,
    TEXT_SUBDIR,
    WEIGHTS_FILE,
    load_text_tower,
    read_saved,
    save_text_tower,
    write_receipt,
)
from audiomae.model.features import LogMel
from audiomae.model.pooling import Pooling, PoolingName
from audiomae.model.statistics import TokenStatistics
from audiomae.model.text import TextTower
from audiomae.storage import to_path, write_bytes, write_json

if TYPE_CHECKING:  # it imports timm, which costs more than all the rest
    from audiomae.model.vit import SpectrogramViT

DECODER = "backbone.decoder."
Clip = str | PathLike[str] | np.ndarray | Tensor


class AudioEncoder(nn.Module):
    """Log-mel, backbone, pooling and projection. Build with `load` or `from_config`."""

    def __init__(self, config: EncoderConfig, with_decoder: bool = False) -> None:
        super().__init__()
        self.config = config
        self.features = LogMel(config.features)
        self.backbone = _backbone(config.backbone, with_decoder)
        self.pooling = Pooling(config.pooling, self.backbone.dim, config.backbone.grid[1])
        self.projection = _projection(self.pooling.out_dim, config.projection)
        self.statistics = (
            TokenStatistics(self.backbone.dim, self.backbone.depth, config.features.out_mels)
            if config.statistics
            else None
        )
        self.centre: Tensor | None
        self.register_buffer("centre", torch.zeros(self.width) if config.centred else None)
        self.discriminant: Tensor | None
        unfitted = torch.eye(self.width, self.dim, device="cpu") if config.discriminant else None
        self.register_buffer("discriminant", unfitted)
        self.text_projection = nn.Linear(config.text.dim, self.dim) if config.text else None
        self.precision = "float32"  # of the arithmetic: or bfloat16, by autocast
        self._text_tower: TextTower | None = None
        self._text_source: UPath | None = None
        self._known_fingerprint: tuple[object, str] | None = None

    # --- make, save, load -------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: EncoderConfig, seed: int = 0, with_decoder: bool = False) -> "AudioEncoder":
        """An untrained encoder; the same seed gives the same weights. `with_decoder` for pretraining."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(config, with_decoder).eval()

    @classmethod
    def load(
        cls,
        uri: str | PathLike[str],
        device: str | torch.device = "auto",
        dtype: str = "auto",
        with_decoder: bool = False,
    ) -> "AudioEncoder":
        """Load an encoder, ready to embed (eval mode).

        Args:
            uri: an encoder directory, local or s3://; `official:PATH`; `timm:NAME`; `timm:local-dir:PATH`.
            device: `auto` = CUDA when there is one.
            dtype: `float32`, `bfloat16` (autocast), or `auto` = bfloat16 on a GPU that has it, float32 on every CPU.
            with_decoder: keep the MAE decoder, for further pretraining; it must have been saved.

        Raises:
            FileNotFoundError, ConfigError: no encoder there, or one that this version cannot read.
            IntegrityError: the weights are not those that were saved.
        """
        text = str(uri)
        if text.startswith(("official:", "timm:")):
            from audiomae.model.pretrained import load_pretrained

            encoder = load_pretrained(text, with_decoder=with_decoder)
        else:
            encoder = cls._load_dir(text, with_decoder)
        chosen = pick_device(device)
        encoder.precision = pick_precision(dtype, chosen)
        known = encoder.fingerprint
        encoder.to(chosen).eval()
        encoder._known_fingerprint = (encoder._stamp(), known)
        return encoder

    def with_pooling(self, pooling: PoolingName) -> "AudioEncoder":
        """A new encoder, the same weights pooled in another way; ValueError if a projection was trained on this one."""
        if self.config.projection or self.config.text:
            raise ValueError(
                "with_pooling: the projection was trained on the present pooling; train another one instead"
            )
        fitted = {"centred": False, "discriminant": False, "statistics": False}
        config = self.config.model_copy(update={"pooling": pooling, **fitted})
        encoder = AudioEncoder.from_config(config, with_decoder=getattr(self.backbone, "decoder", None) is not None)
        encoder.backbone.load_state_dict(self.backbone.state_dict())
        encoder.precision = self.precision
        return encoder.to(self.device)

    @classmethod
    def _load_dir(cls, uri: str, with_decoder: bool) -> "AudioEncoder":
        path = to_path(uri)
        try:
            saved, weights = read_saved(path)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(
                f"{uri}: no encoder here ({CONFIG_FILE} not found); expected a directory written by AudioEncoder.save, "
                "or official:PATH, timm:NAME, timm:local-dir:PATH"
            ) from None
        config = build_config(EncoderConfig, as_saved(saved.get("config", {})))
        if with_decoder and not any(name.startswith(DECODER) for name in weights):
            raise ConfigError(f"{uri}: with_decoder=True, but the encoder was saved without its decoder")
        if not with_decoder:
            weights = {name: value for name, value in weights.items() if not name.startswith(DECODER)}
        with torch.device("meta"):
            encoder = cls(config, with_decoder)
        try:
            encoder.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise IntegrityError(f"{uri}: {WEIGHTS_FILE} does not belong to {CONFIG_FILE}: {error}") from None
        encoder._check_fingerprint(uri, saved.get("fingerprint"))
        encoder._text_source = path / TEXT_SUBDIR
        return encoder

    def save(self, directory: str | PathLike[str], with_decoder: bool = False) -> None:
        """Write `config.json`, `model.safetensors`, `text/` with a text tower, last the receipt, locally or to S3."""
        target = to_path(directory)
        receipts.withdraw(target / receipts.RECEIPT_FILE)
        self._known_fingerprint = None
        weights = {
            name: value.detach().cpu().contiguous()
            for name, value in self.state_dict().items()
            if with_decoder or not name.startswith(DECODER)
        }
        if self.config.text:
            save_text_tower(self.text_tower, target / TEXT_SUBDIR)
        write_bytes(target / WEIGHTS_FILE, to_safetensors(weights))
        write_json(
            target / CONFIG_FILE,
            {
                "config": self.config.model_dump(mode="json"),
                "fingerprint": self.fingerprint,
                "dim": self.dim,
                "sample_rate": self.sample_rate,
                "window_s": self.window_s,
            },
        )
        write_receipt(target, self.fingerprint)

    def compile_blocks(self) -> None:
        """Fuse what lies between the matrix products of each transformer block (torch.compile), for long jobs on a GPU.

        The first batches take seconds each, and any error of the compiler comes with them. Weights, their names and
        the fingerprint stay; vectors change in their last digits.
        """
        for name, module in self.backbone.named_modules():
            if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "blocks" and "decoder" not in name:
                for block in module:
                    block.compile(dynamic=True)

    # --- facts ------------------------------------------------------------------------------------------------------

    @property
    def sample_rate(self) -> int:
        """Hz of the waveforms that `forward` and `embed` take."""
        return self.config.features.sample_rate

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.config.projection.dim if self.config.projection else self.pooling.out_dim

    @property
    def width(self) -> int:
        """Length of what `describe` gives: `dim`, and the statistics."""
        return self.dim + (self.statistics.width if self.statistics else 0)

    @property
    def scene_embedding_size(self) -> int:
        """Length of a HEAR scene embedding: pooled tokens, before projection."""
        return self.pooling.out_dim

    @property
    def timestamp_embedding_size(self) -> int:
        """Length of a HEAR timestamp embedding: all bands of one time step."""
        return self.backbone.dim * self.pooling.bands

    @property
    def window_s(self) -> float:
        """Seconds of audio in the backbone's window: what it was trained on at a time."""
        return self.config.backbone.img_size[0] / self.config.features.frame_rate

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over weights, features, pooling and window: equal exactly when embeddings are comparable.

        Neither device, compute dtype, decoder nor text tower enter. Kept until a weight changes.
        """
        stamp = self._stamp()
        if self._known_fingerprint is None or self._known_fingerprint[0] != stamp:
            self._known_fingerprint = (stamp, self._hash())
        return self._known_fingerprint[1]

    def _stamp(self) -> object:
        """Changes whenever a parameter or what was fitted after training is replaced or written to in place."""
        tensors = [*self.parameters(), *self.buffers()]
        return tuple((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)

    def summary(self) -> dict[str, Any]:
        """Parameters (of the encoder, in all), FLOPs of one window, window, dim, rate: what a reader asks first."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        window = torch.zeros(1, round(self.window_s * self.sample_rate), device=self.device)
        counter = FlopCounterMode(display=False)
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:  # fused attention would not be counted
            self(window)
        return {
            "backbone": self.config.backbone.kind,
            "pooling": self.config.pooling,
            "parameters": sum(p.numel() for name, p in self.named_parameters() if not name.startswith(DECODER)),
            "flops_per_window": counter.get_total_flops(),
            "window_s": self.window_s,
            "sample_rate": self.sample_rate,
            "dim": self.dim,
            "fingerprint": self.fingerprint,
            "text": self.config.text.model if self.config.text else None,
        }

    # --- sound to vectors -------------------------------------------------------------------------------------------

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed a padded batch; differentiable.

        Args:
            waveforms: float32 [B, S] at `sample_rate`, on the encoder's device.
            lengths: int64[B] real samples per clip, best left on the CPU; None = all S.

        Returns:
            float32 [B, dim], unit length. A clip's vector does not depend on the batch it rides in.
        """
        with self.autocast():
            return self.embed_spectrogram(*self.features(waveforms, lengths))

    def embed_spectrogram(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """As `forward`, from log-mel [B, 1, T, F] as `features` gives it.

        In training mode none of `crops`, `centred`, `discriminant` and `statistics` applies: losses see plain vectors.
        """
        if self.training:
            return self._plain(x, frame_lengths)
        return self.centring(self.describe(x, frame_lengths))

    def describe(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """What is fitted to after training: plain vectors, the statistics beside them, as the mean over the crops.

        Returns:
            float32 [B, width], unit length.
        """
        crops = self.config.crops
        copies = [_start_later(x, frame_lengths, copy / crops) if copy else x for copy in range(crops)]
        described = torch.stack([self.describe_crop(copy, frame_lengths) for copy in copies]).sum(0)
        return described if crops == 1 and self.centre is None else F.normalize(described, dim=-1)

    def describe_crop(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """As `describe`, of the clip as it is."""
        if self.statistics is None:
            return self._plain(x, frame_lengths)
        out = self.token_sequence(x, frame_lengths, every_block=True)
        plain = self.head(out.tokens[..., -self.backbone.dim :], out.mask, out.cls_attention)
        beside = self.statistics.scaled(self.statistics(out.tokens, out.mask, x, frame_lengths))
        return F.normalize(torch.cat([plain, beside], dim=-1), dim=-1)

    def statistics_of(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """The statistics of log-mel [B, 1, T, F] as they are, float32[B, statistics.width]."""
        assert self.statistics is not None
        out = self.token_sequence(x, frame_lengths, every_block=True)
        found: Tensor = self.statistics(out.tokens, out.mask, x, frame_lengths)
        return found

    def _plain(self, x: Tensor, frame_lengths: Tensor | None) -> Tensor:
        return F.normalize(self.project(self.pool_spectrogram(x, frame_lengths)), dim=-1)

    def centring(self, vectors: Tensor) -> Tensor:
        """What `describe` gives, [B, width], less the mean of the training clips, through the map, of unit length.

        Without a centre it stays as it is, without a map it is only moved.

        Returns:
            float32 [B, dim].
        """
        if self.centre is None:
            return vectors
        moved = vectors - self.centre
        if self.discriminant is not None:
            with torch.autocast(self.device.type, enabled=False):
                moved = moved @ self.discriminant
        return F.normalize(moved, dim=-1)

    def pool_spectrogram(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """Log-mel [B, 1, T, F] -> pooled float32 [B, D_out], before projection and normalisation."""
        out = self.token_sequence(x, frame_lengths)
        return self.pooling(out.tokens, out.mask, out.cls_attention)

    def token_sequence(
        self, x: Tensor, frame_lengths: Tensor | None = None, every_block: bool = False
    ) -> EncoderOutput:
        """Log-mel [B, 1, T, F] -> `EncoderOutput` of whole clips of any length (chunked or as one sequence)."""
        return encode_long(
            self.backbone,
            x,
            frame_lengths,
            self.config.long_input,
            self.config.official_windows,
            self.config.official_windows and self.pooling.name == "freq_concat",
            self.pooling.needs_cls_attention,
            every_block,
        )

    def project(self, pooled: Tensor) -> Tensor:
        """Projection head: [B, D_out] -> [B, dim]; the identity without one."""
        return self.projection(pooled).float()

    def head(self, tokens: Tensor, token_mask: Tensor | None = None, cls_attention: Tensor | None = None) -> Tensor:
        """Tokens [B, 1 + K, D] (all, or an MAE step's visible ones) -> unit vectors [B, dim], for objectives."""
        return F.normalize(self.project(self.pooling(tokens, token_mask, cls_attention)), dim=-1)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 autocast when the encoder was loaded so; else leaves the caller's precision alone."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @torch.inference_mode()
    def embed(self, clips: Sequence[Clip] | str | PathLike[str], batch_size: int = 32) -> np.ndarray:
        """Whole clips -> float32 [B, dim], unit length, in the order given.

        Args:
            clips: paths (decoded and resampled), or mono float32[S] arrays already at `sample_rate`; one path is a
                list of one.

        Raises:
            ValueError: an empty, non-finite or multi-dimensional array.
            audiomae.corpus.decode.DecodeError: a file that cannot be decoded.
        """
        if isinstance(clips, str | PathLike):
            clips = [clips]
        was_training = self.training
        if was_training:  # it walks through all modules
            self.eval()
        try:
            waveforms = [self._waveform(clip, position) for position, clip in enumerate(clips)]
            vectors = np.zeros((len(waveforms), self.dim), np.float32)
            order = sorted(range(len(waveforms)), key=lambda position: len(waveforms[position]))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                lengths = torch.tensor([len(waveforms[row]) for row in rows])
                batch = nn.utils.rnn.pad_sequence([waveforms[row] for row in rows], batch_first=True)
                vectors[rows] = self(batch.to(self.device), lengths).cpu().numpy()
            return vectors
        finally:
            if was_training:
                self.train()

    # --- text to vectors --------------------------------------------------------------------------------------------

    @property
    def has_text(self) -> bool:
        """Whether `embed_text` works: the encoder was trained with a text tower."""
        return self.config.text is not None

    @property
    def text_tower(self) -> TextTower:
        """The frozen text model, loaded when first asked for."""
        if self.config.text is None:
            raise RuntimeError(
                "this encoder has no text tower: text queries need an encoder trained with the clap_text loss"
            )
        if self._text_tower is None:
            self._text_tower = load_text_tower(self.config.text, self._text_source)
        return self._text_tower.to(self.device)

    def project_text(self, hidden: Tensor) -> Tensor:
        """Text tower output [B, text.dim] -> unit vectors [B, dim] in the audio space; differentiable."""
        if self.text_projection is None:
            raise RuntimeError("this encoder has no text tower: set EncoderConfig.text")
        return F.normalize(self.text_projection(hidden).float(), dim=-1)

    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> float32 [B, dim], unit length, comparable with `embed`. RuntimeError when `has_text` is False."""
        return self.project_text(self.text_tower.encode(texts)).cpu().numpy()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _waveform(self, clip: Clip, position: int) -> Tensor:
        if isinstance(clip, str | PathLike):
            from audiomae.corpus.decode import decode

            return torch.from_numpy(decode(os.fspath(clip), self.sample_rate))
        waveform = torch.as_tensor(clip).detach().float().cpu()
        if waveform.dim() != 1 or len(waveform) == 0:
            raise ValueError(
                f"clip {position}: expected a mono array float32[S] with S > 0, got shape {list(waveform.shape)}: "
                "average the channels, or give a path"
            )
        if not bool(torch.isfinite(waveform).all()):
            raise ValueError(f"clip {position}: it has NaN or infinite samples: repair or drop it")
        return waveform

    def _hash(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config.fingerprint_fields(), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            if name.startswith((DECODER, "text_projection.")):
                continue
            array = value.detach().float().cpu().contiguous().numpy()
            digest.update(f"{name}{array.shape}".encode())
            digest.update(array.data)
        return digest.hexdigest()

    def _check_fingerprint(self, uri: str, expected: str | None) -> None:
        got = self.fingerprint
        if got != expected:
            raise IntegrityError(
                f"{uri}: the encoder's weights or config were changed after it was saved: fingerprint {got[:12]}..., "
                f"expected {str(expected)[:12]}...: restore the directory or export the encoder again"
            )


def _backbone(config: AudioMAEConfig | SpectrogramViTConfig, with_decoder: bool) -> "AudioMAE | SpectrogramViT":
    if isinstance(config, AudioMAEConfig):
        return AudioMAE(config, decoder=with_decoder)
    if with_decoder:
        raise ConfigError(
            f"{config.architecture}: only AudioMAE++ backbones have a decoder; train this one without MAE"
        )
    from audiomae.model.vit import SpectrogramViT

    return SpectrogramViT(config)


def _start_later(x: Tensor, frame_lengths: Tensor | None, share: float) -> Tensor:
    """Log-mel [B, 1, T, F] with each clip's own frames rolled by this share of them; padding stays where it is."""
    frames = torch.arange(x.shape[2], device=x.device)[None]
    lengths = torch.full((len(x), 1), x.shape[2]) if frame_lengths is None else frame_lengths[:, None]
    lengths = lengths.to(x.device)
    index = torch.where(frames < lengths, (frames + (lengths * share).long()) % lengths, frames)
    return x.gather(2, index[:, None, :, None].expand_as(x))


def _projection(width: int, config: ProjectionConfig | None) -> nn.Module:
    if config is None:
        return nn.Identity()
    if config.hidden is None:
        return nn.Linear(width, config.dim)
    return nn.Sequential(nn.Linear(width, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.dim))
