"""The settings of an encoder: everything that decides what vector a clip gets, but the weights.

Plain values and their checks. Nothing here loads torch, so that a command can explain itself at once; the networks that
these settings describe lie in the modules beside this one.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from audiomae.config import StrictConfig, also_called, shown_as

Size = Literal["debug", "tiny", "small", "medium", "base", "large", "huge"]
Positions = Literal["extend", "interpolate"]
MaskMode = Literal["unstructured", "time", "frequency", "time+frequency"]
PoolingName = Literal[
    "cls", "mean", "mean_cls", "cls_mean_concat", "max", "attention_score", "attention", "freq_concat"
]


def _square(value: Any) -> Any:
    """One number stands for both: 16 is a patch of 16 frames x 16 mels."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


Pair = Annotated[tuple[int, int], BeforeValidator(_square)]

SIZES: dict[str, dict[str, int]] = {
    "debug": {
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 2,
        "decoder_embed_dim": 48,
        "decoder_depth": 1,
        "decoder_heads": 2,
    },
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "medium": {"embed_dim": 512, "depth": 12, "num_heads": 8},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}


class FeatureConfig(StrictConfig):
    """Log-mel settings. The defaults are the official AudioMAE++ ones, less its extra last frame."""

    kind: Literal["logmel", "kaldi"] = Field(
        "logmel", description="logmel = centred frames, HTK mel scale, log(power + eps); kaldi = Kaldi filter banks"
    )
    sample_rate: int = Field(16000, gt=0, description="Hz; every waveform given to the model has this rate")
    n_mels: int = Field(
        80, gt=0, description="number of mel bands", json_schema_extra=also_called("num_mel_bins", "mel_bins")
    )
    n_fft: int = Field(400, gt=0, description="FFT length in samples; kaldi rounds it up to a power of two by itself")
    win_length: int = Field(400, gt=0, description="window length in samples (400 = 25 ms at 16 kHz)")
    hop_length: int = Field(160, gt=0, description="samples from one frame to the next (160 = 10 ms at 16 kHz)")
    f_min: float = Field(50.0, ge=0, description="lower edge of the lowest mel band, Hz")
    f_max: float = Field(8000.0, gt=0, description="upper edge of the highest mel band, Hz")
    normalize: Literal["clip", "fixed", "none"] = Field(
        "clip",
        description="clip = zero mean and unit deviation over the clip's own frames; fixed = (x - mean) / std; none",
    )
    mean: float = Field(0.0, description="the mean that normalize=fixed subtracts")
    std: float = Field(1.0, gt=0, description="the deviation that normalize=fixed divides by")
    range_db: float | None = Field(
        60.0,
        gt=0,
        description="raise everything quieter than this many dB below the clip's loudest cell to that level before "
        "normalising (librosa's top_db), so that digital silence weighs no more than a quiet room; null = off",
    )
    drop_last_frame: bool = Field(
        True,
        description="keep ceil(samples / hop) frames of the 1 + samples // hop that centred framing gives, so that 2 s "
        "fit into one 200-frame window; official checkpoints keep all",
    )
    resize_time: float = Field(
        1.0,
        gt=0,
        description="factor on the number of frames, for image-style layouts (224 / 512 squeezes 512 frames into 224)",
    )
    resize_mels: int | None = Field(None, gt=0, description="rows of the resized mel axis; null = as computed")

    @property
    def frame_rate(self) -> float:
        """Frames per second of the spectrogram that the model sees."""
        return self.sample_rate / self.hop_length * self.resize_time

    @property
    def out_mels(self) -> int:
        """Size of the frequency axis that the model sees."""
        return self.resize_mels or self.n_mels


class AudioMAEConfig(StrictConfig):
    """Architecture of one AudioMAE++ network; `size` fills the dimensions that are not given."""

    kind: Literal["audiomae"] = Field(
        "audiomae",
        description="which network: audiomae = AudioMAE++, timm = a VisionTransformer of timm",
        json_schema_extra=shown_as("audiomae|timm"),
    )
    size: Size = Field("base", description="named dimensions; each can be overridden by its own key")
    img_size: Pair = Field(
        (200, 80), description="[frames, mels] of the model's window; longer input is chunked or gets more positions"
    )
    patch_size: Pair = Field((4, 16), description="[frames, mels] of a patch")
    stride: Pair | None = Field(
        None,
        description="[frames, mels] from patch to patch; smaller than patch_size = overlapping patches (AST uses 10 of "
        "16); null = patch_size",
    )
    embed_dim: int = Field(768, gt=0, multiple_of=4, description="width of a token; default: by size")
    depth: int = Field(
        12, gt=0, description="encoder blocks; default: by size", json_schema_extra=also_called("num_layers", "layers")
    )
    num_heads: int = Field(12, gt=0, description="attention heads, a divisor of embed_dim; default: by size")
    mlp_ratio: float = Field(4.0, gt=0, description="width of a feed-forward network, in multiples of embed_dim")
    decoder_embed_dim: int = Field(384, gt=0, multiple_of=4, description="width of a decoder token")
    decoder_depth: int = Field(4, gt=0, description="decoder blocks")
    decoder_heads: int = Field(8, gt=0, description="attention heads of the decoder, a divisor of its width")
    mask_ratio: float = Field(0.75, ge=0.0, lt=1.0, description="share of the patches hidden in pretraining")
    mask_mode: MaskMode = Field("unstructured", description="what is hidden: single patches, time steps, mel bands")
    norm_pix_loss: bool = Field(True, description="reconstruct each patch normalised by its own mean and deviation")
    ffn2_norm: Literal["norm3", "norm2"] = Field(
        "norm3",
        description="the norm before the second feed-forward network; norm2 as the official code does (it shares the "
        "attention's norm and leaves norm3 unused), which official checkpoints need",
    )
    decoder_positions: Literal["2d", "1d"] = Field(
        "2d", description="2d sin-cos, or 1d over the flattened patches as in the official code"
    )
    drop_path: float = Field(
        0.0, ge=0.0, lt=1.0, description="stochastic depth rate at the last encoder block, rising linearly from 0"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_size(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**SIZES.get(str(values.get("size", "base")), {}), **values}

    @model_validator(mode="after")
    def _check_shapes(self) -> "AudioMAEConfig":
        for name, dim, heads in (
            ("num_heads", self.embed_dim, self.num_heads),
            ("decoder_heads", self.decoder_embed_dim, self.decoder_heads),
        ):
            if dim % heads:
                raise ValueError(f"{name}: expected a divisor of the width {dim}, got {heads}")
        for axis, image, patch, step in zip(("time", "mel"), self.img_size, self.patch_size, self.steps, strict=True):
            if not 0 < step <= patch <= image:
                raise ValueError(
                    f"{axis} axis: expected 0 < stride <= patch_size <= img_size, got stride {step}, patch {patch}, "
                    f"image {image}"
                )
            if step == patch and image % patch:
                raise ValueError(f"{axis} axis: img_size {image} is not a multiple of patch_size {patch}")
        return self

    @property
    def steps(self) -> tuple[int, int]:
        """(frames, mels) from one patch to the next."""
        return self.stride or self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """(Nt, Nf) patches of one full window."""
        (t, f), (pt, pf), (st, sf) = self.img_size, self.patch_size, self.steps
        return (t - pt) // st + 1, (f - pf) // sf + 1

    def fingerprint_fields(self) -> dict[str, Any]:
        """The settings that decide an embedding: not those of the decoder or of training."""
        names = {"kind", "img_size", "patch_size", "stride", "num_heads", "ffn2_norm"}
        return self.model_dump(mode="json", include=names)

    @property
    def time_slack(self) -> int:
        """Frames added before counting time steps: a last partial patch counts (zero-padded) unless patches overlap,
        where the one before it holds most of its frames already (AST drops it too)."""
        return self.steps[0] - 1 if self.steps[0] == self.patch_size[0] else 0


class SpectrogramViTConfig(StrictConfig):
    """A timm VisionTransformer over log-mel."""

    kind: Literal["timm"] = Field("timm", description="which network: timm = a VisionTransformer of timm")
    architecture: str = Field(description="name that `timm.create_model` builds, without weights")
    model_args: dict[str, Any] = Field({}, description="further arguments of `timm.create_model`")
    img_size: Pair = Field(description="[frames, mels] of the window, as the built model has it")
    patch_size: Pair = Field(description="[frames, mels] of a patch, as the built model has it")
    embed_dim: int = Field(gt=0, description="width of a token, as the built model has it")

    @property
    def grid(self) -> tuple[int, int]:
        """(Nt, Nf) patches of one full window."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    def fingerprint_fields(self) -> dict[str, Any]:
        """The settings that decide an embedding."""
        return self.model_dump(mode="json")


class TextConfig(StrictConfig):
    """A transformers text encoder beside the audio encoder; it stays frozen, its projection is trained."""

    model: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2",
        description="name on the model hub, or a local folder in the transformers layout",
        json_schema_extra=also_called("text_model", "text_encoder"),
    )
    dim: int = Field(384, gt=0, description="width of its hidden states (384 for all-MiniLM-L6-v2)")
    max_tokens: int = Field(128, gt=1, description="longer texts are cut to this many tokens")


def as_saved(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a saved encoder with the settings that it does not name as they were when it was written."""
    return {**config, "features": {"range_db": None, **config.get("features", {})}}


class ProjectionConfig(StrictConfig):
    """Head after pooling, where a contrastive objective or a shared audio-text space wants one."""

    dim: int = Field(512, gt=0, description="width of the vectors")
    hidden: int | None = Field(
        None, gt=0, description="width of a hidden layer (linear, GELU, linear); null = one linear layer"
    )


# the defaults that fingerprints are told by: those of the first encoders, and of each setting as it was added
FEATURES_BEFORE = FeatureConfig(range_db=None).model_dump(mode="json")
LATER = {"centred", "discriminant", "statistics", "crops"}
BackboneConfig = Annotated[AudioMAEConfig | SpectrogramViTConfig, Field(discriminator="kind")]


class EncoderConfig(StrictConfig):
    """Everything that decides what vector a clip gets, but the weights."""

    features: FeatureConfig = Field(FeatureConfig(), description="the log-mel front end")
    backbone: BackboneConfig = Field(AudioMAEConfig(), description="the network")
    pooling: PoolingName = Field("mean", description="how the tokens of a clip become one vector")
    projection: ProjectionConfig | None = Field(None, description="a head after pooling; null = none")
    long_input: Literal["chunk", "interpolate", "extend"] = Field(
        "chunk",
        description="clips longer than the backbone's window: chunk = window-long pieces whose tokens are pooled "
        "together, as in the official code; interpolate, extend = one sequence, its positions squeezed into the window "
        "or counted on",
    )
    official_windows: bool = Field(
        False,
        description="treat windows as the official HEAR code does: a clip's last piece is filled with zeros that take "
        "part in attention, and freq_concat and timestamps read a window's time-major tokens as if they were "
        "band-major; false masks and sorts properly",
    )
    centred: bool = Field(
        False,
        description="subtract the mean vector of the training clips before the last normalisation (Suzuki et al. 2013, "
        "Centering Similarity Measures to Reduce Hubs); the mean is fitted when the encoder is trained",
    )
    discriminant: bool = Field(
        False,
        description="after centring, scale down the directions in which training clips of one class differ and double "
        "those in which the classes do (audiomae.training.discriminant); fitted when the encoder is trained, from the "
        "labels; without any it changes nothing. Needs centred",
    )
    statistics: bool = Field(
        False,
        description="the discriminant map also sees the mean and deviation of the tokens of every block and of the "
        "log-mel frames, and gives a vector as long as without them; losses do not see them. Needs discriminant",
    )
    crops: int = Field(
        1,
        ge=1,
        description="a clip's vector is the mean over this many copies of it, each starting an equal share later and "
        "going on from its beginning; costs as many times the encoding",
    )
    text: TextConfig | None = Field(None, description="the text tower of a CLAP-trained encoder; null = none")

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
        if self.discriminant and not self.centred:
            raise ValueError("discriminant: is defined for centred vectors; set centred to true as well")
        if self.statistics and not self.discriminant:
            raise ValueError("statistics: the discriminant map takes them in; set discriminant to true as well")
        if self.backbone.kind == "timm" and self.long_input == "extend":
            raise ValueError("long_input=extend: a timm ViT has learned positions; choose chunk or interpolate")
        return self

    def fingerprint_fields(self) -> dict[str, Any]:
        """What enters the fingerprint beside the weights.

        Of the features what differs from `FEATURES_BEFORE`, of `LATER` what differs from the defaults: a setting added
        later leaves the fingerprints of saved encoders, and with them the indexes built on those, as they are.
        """
        later = self.model_dump(mode="json", include=LATER, exclude_defaults=True)
        fields = self.model_dump(mode="json", include={"pooling", "projection", "long_input", "official_windows"})
        features = self.features.model_dump(mode="json")
        features = {name: value for name, value in features.items() if value != FEATURES_BEFORE[name]}
        return {**fields, **later, "features": features, "backbone": self.backbone.fingerprint_fields()}
