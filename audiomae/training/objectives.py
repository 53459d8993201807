"""The trained module: encoder and heads in, a weighted sum of losses out.

One forward takes the augmented views of a rank's clips. Reconstruction is a mean over clips; the other losses compare
clips and see the joined batch of all ranks (`distributed.gather_with_grad`). With gradient caching (Gao et al. 2021,
*Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup*) they also see the joined micro-batches of
a step, while only one micro-batch's activations are in memory.
"""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from audiomae.errors import ConfigError
from audiomae.model.audiomae import AudioMAE, EncoderOutput, mae_loss
from audiomae.model.encoder import AudioEncoder
from audiomae.model.masking import Masking, random_masking
from audiomae.training import losses
from audiomae.training.distributed import gather, gather_with_grad
from audiomae.training.recipe import SUPERVISED, ObjectiveConfig


class ClipTargets(NamedTuple):
    """What is known of a rank's B clips: row number, class and caption number, `UNLABELLED` (-1) where unknown."""

    clips: Tensor
    labels: Tensor
    captions: Tensor


class Output(NamedTuple):
    """`loss`: scalar to minimise; `parts`: unweighted scalars by name, detached."""

    loss: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Replay:
    """Second pass of gradient caching over one micro-batch.

    Attributes:
        grads: float[V, B, D], gradient of the joined losses with respect to this micro-batch's embeddings.
        share: this micro-batch's share of the step's clips, which scales its reconstruction loss.
        joined: on the step's last micro-batch, float[V, n, D] embeddings of all micro-batches of this rank and their
            targets: the heads (temperatures, class vectors) get their gradient from them once.
    """

    grads: Tensor
    share: float
    joined: tuple[Tensor, ClipTargets] | None = None


class Objective(nn.Module):
    """Encoder and loss heads.

    Args:
        encoder: trained in place.
        config: weights and forms.
        classes: number of labels; 0 = unlabelled.
        caption_vectors: float[K, T] text-tower vectors of the K distinct captions, for the CLAP loss.

    Raises:
        ConfigError: a loss that the data or the encoder cannot serve.
    """

    def __init__(
        self, encoder: AudioEncoder, config: ObjectiveConfig, classes: int = 0, caption_vectors: Tensor | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config
        _check(encoder, config, classes, caption_vectors)
        dim = encoder.dim
        self.by_label = bool(classes) if config.supervised is None else config.supervised
        self.projector: nn.Module = nn.Identity()
        if config.projector:
            hidden = nn.Linear(dim, config.projector)
            self.projector = nn.Sequential(hidden, nn.GELU(), nn.Linear(config.projector, config.projector))
        if config.clap_lite:
            self.classes = nn.Parameter(torch.randn(classes, dim) * 0.02)
            self.clap_lite_scale = nn.Parameter(torch.tensor(losses.initial_log_scale(config.temperature)))
        self.teacher: AudioMAE | None = None
        if config.latent:
            self.teacher = copy.deepcopy(_masked_backbone(encoder)).requires_grad_(False)
            self.teacher.decoder = None
            self.latent_head = nn.Linear(self.teacher.config.decoder_embed_dim, self.teacher.dim)
        if config.clap:
            assert caption_vectors is not None
            self.caption_vectors: Tensor
            self.register_buffer("caption_vectors", caption_vectors.float(), persistent=False)
            self.clap_scale = nn.Parameter(torch.tensor(losses.initial_log_scale(config.temperature)))

    def forward(
        self, views: Tensor, targets: ClipTargets, generator: Generator, replay: Replay | None = None
    ) -> Output:
        """Losses of one (micro-)batch.

        Args:
            views: float[V, B, T, F] log-mel, augmented, not yet normalised.
            targets: of the B clips.
            generator: of the views' device; draws the masks.
            replay: second pass of gradient caching.
        """
        embeddings, parts = self.embed_views(views, generator, reconstruct=self.config.reconstructs)
        if replay is None:
            parts |= self.compare(embeddings, targets)
            loss = self.weighted(parts)
        else:
            loss = (embeddings * replay.grads).sum() + self.weighted(parts) * replay.share
            if replay.joined is not None:
                compared = self.compare(*replay.joined)
                loss, parts = loss + self.weighted(compared), parts | compared
        return Output(loss, {name: value.detach() for name, value in parts.items()})

    def weighted(self, parts: dict[str, Tensor]) -> Tensor:
        """Sum of the parts times their weights."""
        terms = [getattr(self.config, name) * value for name, value in parts.items()]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def embed_views(self, views: Tensor, generator: Generator, reconstruct: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Unit embeddings float32[V, B, D] of the views, and the losses over what is hidden where asked for.

        The views go through the backbone as one batch; with `view_tokens: visible` embeddings come from the very
        tokens that the masked pass encoded. [V, B, 0] when no loss compares clips.
        """
        config, encoder = self.config, self.encoder
        x = encoder.features.finish(views.flatten(0, 1)).x
        embeddings, parts = x.new_empty(len(x), 0), dict[str, Tensor]()
        if reconstruct or (config.compares and config.view_tokens == "visible"):
            seen, drawn = self._encode_visible(x, generator)
            if reconstruct:
                rows = len(x) if config.mae_views == "all" else views.shape[1]
                parts = self._reconstruct(x[:rows], seen.tokens[:rows], drawn.ids_restore[:rows], drawn.mask[:rows])
            if config.compares and config.view_tokens == "visible":
                embeddings = encoder.head(seen.tokens, None, seen.cls_attention)
        if config.compares and config.view_tokens == "all":
            embeddings = encoder.embed_spectrogram(x)
        return embeddings.float().unflatten(0, (len(views), -1)), parts

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Let the teacher of the latent targets follow the encoder; `progress` runs from 0 to 1 over the training.

        Its decay rises to 1 with half a cosine (Grill et al. 2020, BYOL, section 3.3).
        """
        if self.teacher is None:
            return
        decay = 1 - (1 - self.config.teacher_decay) * (math.cos(math.pi * progress) + 1) / 2
        student = dict(_masked_backbone(self.encoder).named_parameters())
        for name, parameter in self.teacher.named_parameters():
            parameter.lerp_(student[name], 1 - decay)

    def _reconstruct(self, x: Tensor, tokens: Tensor, ids_restore: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Pixels of the hidden patches, and the teacher's tokens: hidden ones, and their mean from the cls token.

        The latent targets are those of EAT (Chen et al. 2024, *EAT: Self-Supervised Pre-Training with Efficient Audio
        Transformer*, section 3): what a moving average of the encoder makes of the whole view.
        """
        config, backbone = self.config, _masked_backbone(self.encoder)
        decoded = backbone.decode_tokens(tokens, ids_restore)
        parts: dict[str, Tensor] = {}
        if config.mae:
            assert backbone.decoder is not None
            pred = backbone.decoder.pred(decoded)
            parts["mae"] = mae_loss(pred, backbone.patchify(x), mask, backbone.config.norm_pix_loss)
        if self.teacher is not None:
            with torch.no_grad():
                every = self.teacher.encode(x).tokens[:, 1:].float()
            target = F.layer_norm(every, every.shape[-1:])
            frames = mae_loss(self.latent_head(decoded), target, mask, norm_pix=False)
            clips = F.mse_loss(
                F.layer_norm(tokens[:, 0].float(), every.shape[-1:]), F.layer_norm(every.mean(1), every.shape[-1:])
            )
            parts["latent"] = frames + clips
        return parts

    def _encode_visible(self, x: Tensor, generator: Generator) -> tuple[EncoderOutput, Masking]:
        config, backbone = self.config, _masked_backbone(self.encoder)
        ratio = backbone.config.mask_ratio if config.mask_ratio is None else config.mask_ratio
        grid = backbone.grid(x.shape[2])
        modes = config.view_mask_modes or (config.mask_mode or backbone.config.mask_mode,)
        every = torch.ones(len(x) // len(modes), grid[0] * grid[1], dtype=torch.bool, device=x.device)
        draws = [random_masking(every, grid, ratio, mode, generator) for mode in modes]
        drawn = Masking(*(torch.cat(parts) for parts in zip(*draws, strict=True)))
        attention = config.compares and self.encoder.pooling.needs_cls_attention
        return backbone.encode(x, ids_keep=drawn.ids_keep, want_cls_attention=attention), drawn

    def compare(self, embeddings: Tensor, targets: ClipTargets) -> dict[str, Tensor]:
        """The losses that compare clips, unweighted, over the joined batch of all ranks.

        Args:
            embeddings: float[V, B, D] unit vectors of this rank.
            targets: of its B clips.
        """
        config = self.config
        if not config.compares:
            return {}
        with torch.autocast(embeddings.device.type, enabled=False):
            z = gather_with_grad(embeddings.float().transpose(0, 1).contiguous()).transpose(0, 1)
            clips, labels, captions = (gather(target) for target in targets)
            views, rows = len(z), z.flatten(0, 1)
            every = [target.repeat(views) for target in (clips, labels, captions)]
            parts: dict[str, Tensor] = {}
            if config.contrastive:
                groups = losses.contrastive_groups(every[0], every[1] if self.by_label else None)
                heads = F.normalize(self.projector(rows), dim=1)
                parts["contrastive"] = losses.info_nce(heads, groups, config.temperature, config.positives)
            if config.uniformity:
                parts["uniformity"] = torch.stack([losses.uniformity(view) for view in z]).mean()
            if config.alignment:
                parts["alignment"] = losses.alignment(z[0], z[1])
            if config.triplet:
                parts["triplet"] = losses.triplet_semi_hard(rows, every[1], config.margin)
            if config.clap_lite:
                parts["clap_lite"] = losses.clap_lite(rows, self.classes, every[1], self.clap_lite_scale)
            if config.clap:
                text = self.encoder.project_text(self.caption_vectors[every[2].clamp(min=0)])
                parts["clap"] = losses.clap(rows, text, every[2], self.clap_scale)
            return parts


def _masked_backbone(encoder: AudioEncoder) -> AudioMAE:
    backbone = encoder.backbone
    assert isinstance(backbone, AudioMAE)
    return backbone


def _check(encoder: AudioEncoder, config: ObjectiveConfig, classes: int, captions: Tensor | None) -> None:
    masked = config.reconstructs or config.view_tokens == "visible"
    if masked and not isinstance(encoder.backbone, AudioMAE):
        raise ConfigError(
            "objective: masked passes need an AudioMAE backbone, and this encoder has another one: "
            "set objective.mae=0, objective.latent=0 and objective.view_tokens=all"
        )
    if config.view_tokens == "visible" and encoder.config.pooling == "freq_concat" and config.compares:
        raise ConfigError(
            "objective.view_tokens: freq_concat pooling needs every patch of a time step, masked views have a few: "
            "set objective.view_tokens=all"
        )
    supervised = [name for name in SUPERVISED if getattr(config, name)]
    if config.contrastive and config.supervised:
        supervised.append("contrastive (supervised: true)")
    if supervised and not classes:
        raise ConfigError(f"objective: {', '.join(supervised)} need labels and the corpus has none: set data.label")
    if config.contrastive and config.views == 1 and not classes:
        raise ConfigError("objective: contrastive learning without labels compares two views: set objective.views=2")
    if config.clap and not encoder.has_text:
        raise ConfigError(
            "objective.clap: the encoder has no text tower: set encoder.text (for example encoder.text={})"
        )
    if config.clap and captions is None:
        raise ConfigError("objective.clap: the corpus has neither captions nor labels: set data.caption or data.label")
