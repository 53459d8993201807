"""The configuration of a training run: what YAML recipes hold and flags override.

Plain values and their checks. Nothing here loads torch, so that a command can explain itself at once.
"""

import math
from typing import Literal

from pydantic import Field, model_validator

from audiomae.config import StrictConfig, also_called
from audiomae.model.encoder_config import EncoderConfig, MaskMode

Scalar = str | int | float | bool
Where = dict[str, Scalar | list[Scalar]]

WEIGHTS = ("mae", "latent", "contrastive", "uniformity", "alignment", "triplet", "clap_lite", "clap")
HIDDEN_TARGETS = ("mae", "latent")  # losses over what is hidden; the others compare clips
SUPERVISED = ("triplet", "clap_lite")


class DataConfig(StrictConfig):
    """Which clips are trained on and what is known of them. Column names are those of the corpus listing."""

    cache: str | None = Field(None, description="where decoded features are kept; null = STORAGE/features")
    cache_gib: float = Field(64.0, gt=0, description="disk of each node for features that lie on s3://, in GiB")
    shuffle_shards: int = Field(
        64, ge=1, description="feature shards that clips are shuffled among; a smaller corpus is shuffled as a whole"
    )
    clip_s: float = Field(10.0, gt=0, description="longer files are cut into clips of this many seconds")
    label: str | None = Field("label", description="column with the class; null = ignore labels")
    caption: str | None = Field("caption", description="column with a sentence about the clip, for objective.clap")
    caption_template: str = Field("the sound of {label}", description="caption of a labelled clip without one")
    filter: Where = Field({}, description="column: value or list; other files are not even decoded")
    exclude: Where = Field(
        {}, description="column: value or list; decoded into the cache, but never trained on or validated on"
    )
    val_fraction: float = Field(0.1, ge=0, lt=1, description="share of files of each class held out for validation")
    val_filter: Where = Field({}, description="column: value or list; these files are the validation set instead")


class AugmentConfig(StrictConfig):
    """What is done to each view of a clip; 0 or null turns a transform off. Every view draws its own numbers."""

    time_shift: bool = Field(True, description="roll the window by a random offset, as a clip of a loop would start")
    gain_db: float = Field(6.0, ge=0, description="uniform gain within +- this many dB")
    stretch: float = Field(
        1.0, ge=1, description="resampled crop: a stretch of 1/x to x window lengths becomes the window"
    )
    freq_crop: float = Field(
        0.0, ge=0, lt=1, description="resampled crop: cut up to this share of the mel axis, resize back"
    )
    pitch: float = Field(
        0.0, ge=0, lt=1, description="shift up or down by up to this share of the mel axis, edge bands repeated"
    )
    scales: tuple[float, ...] = Field(
        (1.0,), min_length=1, description="crop length of each view, as a share of the window; a short crop is repeated"
    )
    mix: float = Field(0.0, ge=0, lt=1, description="background mix: another clip at up to this share of the power")
    mix_prob: float = Field(1.0, ge=0, le=1, description="share of clips that get a background")
    eq_db: float = Field(
        0.0, ge=0, description="random equaliser: smooth filter curve of this standard deviation in dB"
    )
    time_masks: int = Field(0, ge=0, description="SpecAugment: number of masked time spans")
    time_mask_share: float = Field(0.1, ge=0, lt=1, description="longest masked span, as a share of the window")
    freq_masks: int = Field(0, ge=0, description="SpecAugment: number of masked mel bands")
    freq_mask_share: float = Field(0.1, ge=0, lt=1, description="widest masked band, as a share of the mel axis")

    @model_validator(mode="after")
    def _masks_have_size(self) -> "AugmentConfig":
        if self.time_masks and not self.time_mask_share:
            raise ValueError("time_masks is set but time_mask_share is 0: give the masks a size")
        if self.freq_masks and not self.freq_mask_share:
            raise ValueError("freq_masks is set but freq_mask_share is 0: give the masks a size")
        if not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError(f"scales: expected shares of the window, above 0 and at most 1, got {list(self.scales)}")
        return self

    def source_frames(self, window: int) -> int:
        """Frames to read from a clip so that the longest resampled crop fits: `ceil(window * stretch)`."""
        return math.ceil(window * self.stretch)

    def crop_frames(self, window: int, views: int) -> list[int]:
        """Frames that each view is cut from; the last of `scales` counts for views beyond it."""
        full = self.source_frames(window)
        return [max(1, round(full * self.scales[min(view, len(self.scales) - 1)])) for view in range(views)]


class ObjectiveConfig(StrictConfig):
    """The weight of each loss (0 = off) and how the losses are formed."""

    mae: float = Field(
        1.0,
        ge=0,
        description="weight of masked reconstruction",
        json_schema_extra=also_called("mae_weight", "mae_loss_weight"),
    )
    latent: float = Field(
        0.0, ge=0, description="predict a slowly following teacher's tokens where patches are hidden (EAT)"
    )
    contrastive: float = Field(
        0.0,
        ge=0,
        description="weight of the contrastive loss: InfoNCE between views, or by label",
        json_schema_extra=also_called("contrast_weight", "contrastive_weight", "contrast_loss_weight", "info_nce"),
    )
    uniformity: float = Field(
        0.0,
        ge=0,
        description="weight of the uniformity loss: vectors spread over the sphere",
        json_schema_extra=also_called("uniformity_weight", "uniformity_loss_weight"),
    )
    alignment: float = Field(0.0, ge=0, description="weight of the alignment loss: two views of a clip lie close")
    triplet: float = Field(0.0, ge=0, description="weight of the triplet loss; needs labels")
    clap_lite: float = Field(0.0, ge=0, description="weight of the loss against one learnt vector per class")
    clap: float = Field(0.0, ge=0, description="weight of the audio-caption loss; needs encoder.text")

    views: Literal[1, 2] = Field(2, description="augmented views of each clip in a step")
    view_tokens: Literal["visible", "all"] = Field(
        "visible",
        description="visible = embed the tokens that the masked pass encoded (one pass); all = a second, unmasked pass",
    )
    mae_views: Literal["first", "all"] = Field("first", description="which views are reconstructed")
    mask_ratio: float | None = Field(None, ge=0, lt=1, description="null = the backbone's")
    mask_mode: MaskMode | None = Field(None, description="null = the backbone's")
    view_mask_modes: tuple[MaskMode, MaskMode] | None = Field(
        None, description="mask mode of the first and of the second view, such as [time, frequency] (AudioMosaic)"
    )
    teacher_decay: float = Field(
        0.99, ge=0, lt=1, description="for objective.latent: the share of itself that the teacher keeps at each step"
    )
    supervised: bool | None = Field(None, description="contrastive positives by label; null = where labels exist")
    positives: Literal["mean", "sum"] = Field(
        "mean",
        description="several positives of a clip: mean of their log-probabilities, or log of their summed probability",
    )
    temperature: float = Field(
        0.1, gt=0, description="of the contrastive loss; the CLAP losses begin with it and learn their own"
    )
    margin: float = Field(0.2, gt=0, description="of the triplet loss")
    projector: int = Field(0, ge=0, description="width of a head used by contrastive losses only; 0 = none")

    @property
    def learns_labels(self) -> bool:
        """Whether a loss looks at the labels, where there are any."""
        by_label = self.contrastive and self.supervised is not False
        return bool(by_label) or any(getattr(self, name) for name in SUPERVISED)

    @model_validator(mode="after")
    def _consistent(self) -> "ObjectiveConfig":
        if not any(getattr(self, name) for name in WEIGHTS):
            raise ValueError(f"every loss weight is 0: set at least one of {', '.join(WEIGHTS)}")
        if self.views == 1 and (self.alignment or (self.contrastive and self.supervised is False)):
            raise ValueError("alignment and self-supervised contrastive losses compare two views: set views: 2")
        if self.view_mask_modes and self.views != 2:
            raise ValueError("view_mask_modes names a mask mode for each of two views: set views: 2")
        return self

    @property
    def compares(self) -> bool:
        """Whether any loss compares clips with each other."""
        return any(getattr(self, name) for name in WEIGHTS if name not in HIDDEN_TARGETS)

    @property
    def reconstructs(self) -> bool:
        """Whether any loss asks for what is hidden, which takes the decoder."""
        return any(getattr(self, name) for name in HIDDEN_TARGETS)


class OptimConfig(StrictConfig):
    """AdamW and its schedule."""

    lr: float = Field(
        1e-3,
        gt=0,
        description="peak learning rate at the configured batch size, not rescaled",
        json_schema_extra=also_called("learning_rate", "base_lr"),
    )
    min_lr: float = Field(0.0, ge=0, description="rate that the cosine ends at")
    weight_decay: float = Field(0.05, ge=0, description="decay of weight matrices; biases, norms and tokens get none")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay rates of its two moments")
    warmup_epochs: float = Field(1.0, ge=0, description="epochs over which the rate rises linearly to its peak")
    clip_grad: float | None = Field(1.0, gt=0, description="largest gradient norm; null = no clipping")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="rate factor per layer below the top (BEiT/MAE fine-tuning)"
    )
    freeze_layers: int = Field(0, ge=0, description="freeze the patch embedding and this many blocks from the bottom")


class ValidationConfig(StrictConfig):
    """Retrieval on held-out clips: they query the training clips."""

    every_epochs: int = Field(1, ge=1, description="epochs between validations; the last epoch is always validated")
    max_queries: int = Field(512, ge=1, description="at most this many held-out clips ask")
    max_gallery: int = Field(1024, ge=1, description="at most this many training clips answer")


class CheckpointingConfig(StrictConfig):
    """When the state of a run is saved. The best by validation retrieval and the last are kept."""

    every_epochs: int = Field(
        1, ge=1, description="epochs between checkpoints; validated epochs and the last are always saved"
    )
    every_steps: int | None = Field(None, ge=1, description="also save inside epochs, every so many steps")


class WorkersConfig(StrictConfig):
    """Ray Train workers. Their number decides the random draws of a step, never its clips."""

    num: int | tuple[int, int] = Field(2, description="workers, or [least, most] for elastic training")
    gpu: bool | Literal["auto"] = Field(
        "auto", description="one GPU per worker; auto = where the cluster has or may start any"
    )
    cpus: float = Field(1, gt=0, description="CPUs reserved per worker")
    accelerator_type: str | None = Field(None, description="kind of GPU, such as L4 or H100")
    resources: dict[str, float] = Field({}, description="custom resources each worker reserves")
    labels: dict[str, str] = Field({}, description="node labels the workers need, `!value` to avoid one")
    max_failures: int = Field(3, ge=-1, description="worker failures to restart from; -1 = no limit")

    @model_validator(mode="after")
    def _consistent(self) -> "WorkersConfig":
        if self.accelerator_type and self.gpu is False:
            raise ValueError(f"accelerator_type {self.accelerator_type} needs gpu: true or auto, got false")
        return self

    @model_validator(mode="after")
    def _ordered(self) -> "WorkersConfig":
        least, most = self.range
        if not 1 <= least <= most:
            raise ValueError(f"num: expected a positive number or [least, most] in order, got {self.num}")
        return self

    @property
    def range(self) -> tuple[int, int]:
        """(least, most) workers."""
        return self.num if isinstance(self.num, tuple) else (self.num, self.num)


class Recipe(StrictConfig):
    """How an encoder is trained: all that decides a training run, but the corpus and where the run is kept."""

    seed: int = Field(0, ge=0, description="seed of weights, order, augmentation and validation split")
    init: str | None = Field(
        None,
        description="start from an encoder (folder, s3://, official:PATH, timm:NAME): features and backbone come from "
        "it, the rest of `encoder` from here",
    )
    encoder: EncoderConfig = Field(EncoderConfig(), description="what is trained")
    data: DataConfig = Field(DataConfig(), description="which clips are trained on")
    augment: AugmentConfig = Field(AugmentConfig(), description="what is done to each view of a clip")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="the losses")
    optim: OptimConfig = Field(OptimConfig(), description="the optimiser and its schedule")
    epochs: int = Field(
        100, ge=1, description="passes over the training clips", json_schema_extra=also_called("num_epochs")
    )
    batch_size: int = Field(64, ge=2, description="clips per optimiser step, all workers together")
    accumulate: int = Field(1, ge=1, description="micro-batches per step and worker")
    grad_cache: bool = Field(
        False, description="with accumulate > 1: losses that compare clips see the whole step's batch"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on GPUs that have it, else float32"
    )
    export: Literal["best", "last"] = Field("best", description="which checkpoint becomes the encoder")
    validation: ValidationConfig = Field(ValidationConfig(), description="retrieval on held-out clips")
    checkpoint: CheckpointingConfig = Field(CheckpointingConfig(), description="when the run's state is saved")
    workers: WorkersConfig = Field(WorkersConfig(), description="the Ray Train workers")

    @model_validator(mode="after")
    def _captions_have_a_model(self) -> "Recipe":
        if self.objective.clap and self.encoder.text is None:
            raise ValueError(
                "objective.clap compares sounds with sentences, but encoder.text, the model that reads sentences, is "
                "not set: add --set encoder.text.model=NAME_OR_FOLDER, or take --recipe clap, or set objective.clap=0"
            )
        return self

    @model_validator(mode="after")
    def _batch_fits(self) -> "Recipe":
        smallest = self.batch_size // self.workers.range[1] // self.accumulate
        if smallest < 1:
            raise ValueError(
                f"batch_size {self.batch_size} over {self.workers.range[1]} workers x {self.accumulate} micro-batches "
                "leaves none for each: raise batch_size"
            )
        return self
