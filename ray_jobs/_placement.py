"""Where the stages of an embedding job run: settings that load nothing heavy."""

from typing import Literal

from pydantic import Field

from audiomae.config import StrictConfig


class PlacementConfig(StrictConfig):
    """What each stage asks of the nodes it runs on. `resources` and `labels` are those that nodes were started with."""

    topology: Literal["auto", "fused", "split"] = Field(
        "auto", description="fused: workers decode and encode; split: decode tasks feed encoders; auto: split with GPUs"
    )
    workers: int | None = Field(
        None, ge=1, description="most encoding workers; default: as many as the cluster has or gets room for"
    )
    threads: int = Field(
        1, ge=1, description="torch threads of each worker, and the CPUs it reserves where it has them"
    )
    device: str = Field("auto", description="torch device of the encoders; auto: a GPU where there is one")
    num_gpus_per_encoder: float | None = Field(
        None,
        ge=0,
        description="GPUs each encoder reserves, 0.25 puts four on one; default: 1 where the cluster has GPUs, or its "
        "autoscaler would start them, else 0",
    )
    accelerator_type: str | None = Field(None, description="kind of GPU for the encoders, such as L4 or H100")
    encode_resources: dict[str, float] = Field({}, description="custom resources each encoder reserves")
    encode_labels: dict[str, str] = Field({}, description="node labels the encoders need, `!value` to avoid one")
    decode_resources: dict[str, float] = Field({}, description="custom resources each decode task reserves")
    decode_labels: dict[str, str] = Field({}, description="node labels the decode tasks need, `!value` to avoid one")
