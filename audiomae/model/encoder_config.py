"""The settings of an encoder: everything that decides what vector a clip gets, but the weights."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from audiomae.config import StrictConfig
from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.features import FeatureConfig
from audiomae.model.pooling import PoolingName
from audiomae.model.text import TextConfig
from audiomae.model.vit import SpectrogramViTConfig


class ProjectionConfig(StrictConfig):
    """Head after pooling, where a contrastive objective or a shared audio-text space wants one.

    `hidden` None = one linear layer; else linear, GELU, linear.
    """

    dim: int = Field(default=512, gt=0)
    hidden: int | None = Field(default=None, gt=0)


BackboneConfig = Annotated[AudioMAEConfig | SpectrogramViTConfig, Field(discriminator="kind")]


class EncoderConfig(StrictConfig):
    """Everything that decides what vector a clip gets, but the weights.

    Attributes:
        long_input: what happens to clips longer than the backbone's window: `chunk` = window-long pieces, the tokens of
            all pieces pooled together (as the official code); `interpolate` / `extend` = one sequence, positions
            squeezed into the window / counted on.
        official_windows: what the official HEAR code does to windows: a clip's last piece is filled with zeros that
            take part in attention, and `freq_concat` and timestamps read a window's time-major tokens as if they were
            band-major (so they concatenate five stretches of time rather than bands). False masks and sorts properly.
        centred: subtract the mean vector of the training clips before the last normalisation (Suzuki et al. 2013,
            *Centering Similarity Measures to Reduce Hubs*); the mean is fitted when the encoder is trained.
        crops: a clip's vector is the mean over this many copies of it, each starting an equal share later and going on
            from its beginning; costs as many times the encoding.
        text: the text tower of a CLAP-trained encoder.
    """

    features: FeatureConfig = FeatureConfig()
    backbone: BackboneConfig = AudioMAEConfig()
    pooling: PoolingName = "mean"
    projection: ProjectionConfig | None = None
    long_input: Literal["chunk", "interpolate", "extend"] = "chunk"
    official_windows: bool = False
    centred: bool = False
    crops: int = Field(default=1, ge=1)
    text: TextConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_kind(cls, values: Any) -> Any:
        """`backbone.size=tiny` alone means an AudioMAE."""
        if isinstance(values, dict) and isinstance(values.get("backbone"), dict):
            return {**values, "backbone": {"kind": "audiomae", **values["backbone"]}}
        return values

    @model_validator(mode="after")
    def _check_mels(self) -> "EncoderConfig":
        if self.features.out_mels != self.backbone.img_size[1]:
            raise ValueError(
                f"features give {self.features.out_mels} mel rows, backbone.img_size has {self.backbone.img_size[1]}: "
                "make features.n_mels (or resize_mels) and backbone.img_size[1] equal"
            )
        if self.official_windows and self.long_input != "chunk":
            raise ValueError("official_windows: is defined for long_input=chunk only")
        if self.centred and self.text:
            raise ValueError("centred: text vectors would be compared with shifted audio vectors; set it to false")
        if self.backbone.kind == "timm" and self.long_input == "extend":
            raise ValueError("long_input=extend: a timm ViT has learned positions; choose chunk or interpolate")
        return self

    def fingerprint_fields(self) -> dict[str, Any]:
        """What enters the fingerprint beside the weights.

        Of the features, `centred` and `crops` only what differs from the defaults, so that a setting added later (off
        by default) leaves the fingerprints of saved encoders, and with them the indexes built on those, as they are.
        """
        later = self.model_dump(mode="json", include={"centred", "crops"}, exclude_defaults=True)
        fields = self.model_dump(mode="json", include={"pooling", "projection", "long_input", "official_windows"})
        features = self.features.model_dump(mode="json", exclude_defaults=True)
        return {**fields, **later, "features": features, "backbone": self.backbone.fingerprint_fields()}
