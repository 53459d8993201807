"""The configuration of a training run: what YAML recipes hold and `--set` overrides."""

from typing import Literal

from pydantic import Field, model_validator

from audiomae.config import StrictConfig
from audiomae.model.encoder import EncoderConfig
from audiomae.training.augment import AugmentConfig
from audiomae.training.objectives import ObjectiveConfig
from audiomae.training.schedule import OptimConfig

Scalar = str | int | float | bool
Where = dict[str, Scalar | list[Scalar]]


class DataConfig(StrictConfig):
    """Which clips are trained on and what is known of them. Column names are those of the corpus listing."""

    cache: str | None = Field(None, description="where decoded features are kept; null = STORAGE/features")
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


class ValidationConfig(StrictConfig):
    """Retrieval on held-out clips: they query the training clips."""

    every_epochs: int = Field(1, ge=1, description="the last epoch is always validated")
    max_queries: int = Field(512, ge=1)
    max_gallery: int = Field(1024, ge=1)


class CheckpointingConfig(StrictConfig):
    """When the state of a run is saved. The best by validation retrieval and the last are kept."""

    every_epochs: int = Field(1, ge=1, description="validated epochs are always saved, so is the last")
    every_steps: int | None = Field(None, ge=1, description="also inside epochs")


class WorkersConfig(StrictConfig):
    """Ray Train workers. Their number decides the random draws of a step, never its clips."""

    num: int | tuple[int, int] = Field(2, description="workers, or [least, most] for elastic training")
    gpu: bool | Literal["auto"] = Field("auto", description="one GPU per worker; auto = if the cluster has any")
    cpus: float = Field(1, gt=0, description="CPUs reserved per worker")
    max_failures: int = Field(3, ge=-1, description="worker failures to restart from; -1 = no limit")

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


class TrainConfig(StrictConfig):
    """Everything that decides a training run."""

    seed: int = Field(0, ge=0)
    init: str | None = Field(
        None,
        description="start from an encoder (directory, s3://, official:PATH, timm:NAME): features and backbone come "
        "from it, the rest of `encoder` from here",
    )
    encoder: EncoderConfig = EncoderConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    epochs: int = Field(100, ge=1)
    batch_size: int = Field(64, ge=2, description="clips per optimiser step, all workers together")
    accumulate: int = Field(1, ge=1, description="micro-batches per step and worker")
    grad_cache: bool = Field(
        False, description="with accumulate > 1: losses that compare clips see the whole step's batch"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on GPUs that have it, else float32"
    )
    export: Literal["best", "last"] = Field("best", description="which checkpoint becomes the encoder")
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointingConfig = CheckpointingConfig()
    workers: WorkersConfig = WorkersConfig()

    @model_validator(mode="after")
    def _batch_fits(self) -> "TrainConfig":
        smallest = self.batch_size // self.workers.range[1] // self.accumulate
        if smallest < 1:
            raise ValueError(
                f"batch_size {self.batch_size} over {self.workers.range[1]} workers x {self.accumulate} micro-batches "
                "leaves none for each: raise batch_size"
            )
        return self
