"""Checkpoints that others trained: official AudioMAE++ files, and spectrogram ViTs (AudioMAE) through timm.

official:PATH            an AudioMAE++ .pth with config.json beside it, or the directory that holds both
timm:hf_hub:OWNER/NAME   a spectrogram ViT from the hub, for example gaunernst/vit_base_patch16_1024_128.audiomae_as2m
timm:local-dir:PATH      the same from a local directory (config.json + model.safetensors)
"""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from audiomae.config import build_config
from audiomae.errors import ConfigError, ModelError, in_short
from audiomae.model.audiomae import AudioMAE, AudioMAEConfig, flat_positions, grid_positions
from audiomae.model.encoder import AudioEncoder, EncoderConfig
from audiomae.model.encoder_config import SIZES, SpectrogramViTConfig
from audiomae.model.features import FeatureConfig
from audiomae.model.vit import FIXED_ARGS, SpectrogramViT, check_vit
from audiomae.storage import fetch_dir, is_local, to_path

OFFICIAL_FEATURES = FeatureConfig(drop_last_frame=False, range_db=None)
# Filter banks and statistics (mean, 2 x deviation on AudioSet) that AudioMAE and AST were trained with
AUDIOMAE_FEATURES = FeatureConfig(
    kind="kaldi",
    n_mels=128,
    f_min=20.0,
    f_max=8000.0,
    normalize="fixed",
    mean=-4.2677393,
    std=2 * 4.5689974,
    range_db=None,
)

# official name -> ours; the rest of a name is kept
OFFICIAL_NAMES = (
    (r"^patch_embed\.proj\.", "patch_proj."),
    (r"^encoder\.encoder_norm\.", "norm."),
    (r"^encoder\.blocks\.", "blocks."),
    (r"^decoder\.decoder_blocks\.", "decoder.blocks."),
    (r"^decoder\.decoder_(embed|norm|pred)\.", r"decoder.\1."),
    (r"\.ffn1\.layer([12])\.", r".ffn1.fc\1."),
    (r"\.attn\.(qkv|proj)_layer\.", r".attn.\1."),
    (r"\.ffn2\.linear1\.", ".ffn2.fc1_x."),
    (r"\.ffn2\.linear2\.", ".ffn2.fc1_g."),
    (r"\.ffn2\.ln\.", ".ffn2.norm."),
    (r"\.ffn2\.project\.", ".ffn2.fc2."),
)
# what the official code can be told that this implementation does not compute: setting -> the value it must have
OFFICIAL_MUST_BE = {
    "in_chans": 1,
    "encoder_plusplus_block": True,
    "decoder_plusplus_block": True,
    "encoder_use_swiglu_final_ffn": True,
    "decoder_use_swiglu_final_ffn": True,
    "use_cls_token": True,
    "frequency_first": False,
    "encoder_use_rope": False,
    "decoder_use_rope": False,
    "limit_swiglu_features": False,
    "additive_swiglu": False,
}
# the official code's own defaults where they are not what must be
OFFICIAL_DEFAULTS = {name: False for name in OFFICIAL_MUST_BE if name.endswith(("_block", "_final_ffn"))}
OFFICIAL_KEYS = {
    "embed_dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "decoder_embed_dim": "decoder_embed_dim",
    "decoder_depth": "decoder_depth",
    "decoder_num_heads": "decoder_heads",
    "img_size": "img_size",
    "patch_size": "patch_size",
    "mlp_ratio": "mlp_ratio",
    "mask_ratio": "mask_ratio",
}
OFFICIAL_MASK_MODES = {"unstructured": "unstructured", "timestep": "time"}


def load_pretrained(uri: str, with_decoder: bool = False) -> AudioEncoder:
    """Build the encoder that `official:...` or `timm:...` names, on the CPU, in float32.

    Raises:
        FileNotFoundError, ConfigError, ModelError: not there, or no such checkpoint; the text says why.
    """
    kind, _, rest = uri.partition(":")
    if kind == "official":
        return load_official(rest, with_decoder)
    if with_decoder:
        raise ConfigError(f"{uri}: with_decoder: a timm ViT carries no decoder")
    return load_timm(rest)


def load_official(path: str, with_decoder: bool = False) -> AudioEncoder:
    """An official AudioMAE++ checkpoint as an encoder that computes what the official code's HEAR wrapper does.

    That is: all centred frames, per-clip standardisation, 2 s windows treated the official way, `freq_concat` pooling.
    """
    backbone = read_official(path, with_decoder)
    config = EncoderConfig(
        features=OFFICIAL_FEATURES.model_copy(update={"n_mels": backbone.config.img_size[1]}),
        backbone=backbone.config,
        pooling="freq_concat",
        official_windows=True,
    )
    encoder = AudioEncoder.from_config(config, with_decoder=with_decoder)
    encoder.backbone = backbone
    return encoder


def read_official(path: str, with_decoder: bool = True) -> AudioMAE:
    """The network of an official AudioMAE++ `.pth` (or its directory), with the official block's norm2 quirk."""
    where = to_path(path)
    remote_file = not is_local(where) and path.endswith(".pth")
    local = fetch_dir(str(where.parent if remote_file else where))
    checkpoint, config_file = _find_official(local / where.name if remote_file else Path(local))
    config = _official_config(config_file)
    weights = _read_state_dict(checkpoint)
    _check_positions(weights, config, checkpoint)
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].flatten(1)
    renamed = {_our_name(name): value for name, value in weights.items() if not name.endswith("pos_embed")}
    if not with_decoder:
        renamed = {name: value for name, value in renamed.items() if not name.startswith("decoder.")}
    model = AudioMAE(config, decoder=with_decoder)
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise ConfigError(f"{checkpoint}: its weights do not fit {config_file.name}: {in_short(error)}") from None
    return model


def load_timm(name: str) -> AudioEncoder:
    """A spectrogram ViT through timm, fed with AudioMAE's filter banks, mean-pooled.

    Args:
        name: what `timm.create_model` takes: `hf_hub:OWNER/NAME`, `local-dir:PATH` or a registry name. A model made for
            three-channel images gets its patch projection summed to one channel by timm.
    """
    try:
        architecture, model_args = _timm_recipe(name)
        vit = check_vit(timm.create_model(name, pretrained=True, **FIXED_ARGS), name)
    except ConfigError:
        raise
    except Exception as error:  # of timm, of the hub's client, of the network beneath it
        raise ModelError(
            f"timm:{name}: cannot be loaded ({type(error).__name__}: {in_short(error)}); expected hf_hub:OWNER/NAME "
            "that is reachable from here, or local-dir:PATH with config.json and model.safetensors in timm's layout"
        ) from None
    backbone = SpectrogramViTConfig(
        architecture=architecture,
        model_args={**model_args, "img_size": list(vit.patch_embed.img_size)},
        img_size=vit.patch_embed.img_size,
        patch_size=vit.patch_embed.patch_size,
        embed_dim=vit.embed_dim,
    )
    mels = backbone.img_size[1]
    features = AUDIOMAE_FEATURES.model_copy(update={"resize_mels": None if mels == AUDIOMAE_FEATURES.n_mels else mels})
    encoder = AudioEncoder.from_config(EncoderConfig(features=features, backbone=backbone))
    encoder.backbone = SpectrogramViT(backbone, vit)
    return encoder.eval()


def _timm_recipe(name: str) -> tuple[str, dict[str, Any]]:
    """Architecture and constructor arguments of a timm name: a saved encoder then needs neither hub nor folder."""
    source, _, rest = name.partition(":")
    if source == "local-dir":
        saved = json.loads((Path(rest) / "config.json").read_text())
        return saved["architecture"], dict(saved.get("model_args") or {})
    if rest:
        _, architecture, model_args = timm.models.load_model_config_from_hf(rest)
        return architecture, dict(model_args or {})
    return name.partition(".")[0], {}


def _find_official(path: Path) -> tuple[Path, Path]:
    """(.pth, config.json) of an official run: beside each other, or the .pth in `checkpoints/` below config.json."""
    if path.is_dir():
        found = sorted([*path.glob("*.pth"), *path.glob("checkpoints/*.pth")], key=_step_number)
        if not found:
            raise FileNotFoundError(f"official:{path}: no .pth in this directory or its checkpoints/")
        checkpoint = found[-1]
    elif path.is_file():
        checkpoint = path
    else:
        raise FileNotFoundError(f"official:{path}: no such file or directory")
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / "config.json").is_file():
            return checkpoint, folder / "config.json"
    raise FileNotFoundError(
        f"official:{checkpoint}: config.json is missing beside it; write one with the training config's model_args "
        "(img_size, patch_size, embed_dim, depth, num_heads, decoder_...)"
    )


def _step_number(path: Path) -> tuple[int, str]:
    digits = re.findall(r"\d+", path.stem)
    return (int(digits[-1]) if digits else -1, path.name)


def _official_config(file: Path) -> AudioMAEConfig:
    """Our config from the official training config (`model.arch`, `model.model_args`), or from its arguments alone."""
    try:
        saved = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
    model = saved.get("model", {})
    given = dict(model.get("model_args", saved))
    size = str(model.get("arch", "")).removeprefix("mae_plusplus_")
    given = {**SIZES.get(size, {}), **OFFICIAL_DEFAULTS, **given}
    for name, value in OFFICIAL_MUST_BE.items():
        if given.get(name, value) != value:
            raise ConfigError(f"{file}: {name}={given[name]} is not supported, expected {value}")
    values = {ours: given[theirs] for theirs, ours in OFFICIAL_KEYS.items() if theirs in given}
    mode = given.get("masking_mode", "unstructured")
    values["mask_mode"] = OFFICIAL_MASK_MODES.get(mode, mode)
    values["norm_pix_loss"] = bool(saved.get("opt", {}).get("norm_pix_loss", given.get("norm_pix_loss", False)))
    return build_config(AudioMAEConfig, {**values, "ffn2_norm": "norm2", "decoder_positions": "1d"})


def _read_state_dict(file: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint, read without running any code that it may carry."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(
            f"{file}: not a plain checkpoint of tensors (code in it is never run): {in_short(error)}"
        ) from None
    weights = checkpoint.get("model", checkpoint)
    return {name.removeprefix("module."): value.float() for name, value in weights.items()}


def _check_positions(weights: dict[str, Tensor], config: AudioMAEConfig, file: Path) -> None:
    """The file's position tables must be the sin-cos ones that are computed here."""
    steps, bands = config.grid
    device = torch.device("cpu")
    for name, expected in (
        ("encoder.pos_embed", grid_positions(steps, bands, config.embed_dim, device)),
        ("decoder.decoder_pos_embed", flat_positions(steps * bands, config.decoder_embed_dim, device)),
    ):
        table = weights.get(name)
        if table is None:
            continue
        if table.shape[1] != expected.shape[1] + 1 or not torch.allclose(table[:, 1:], expected, atol=1e-4):
            raise ConfigError(
                f"{file}: {name} {list(table.shape)} is not the sin-cos table of a {steps} x {bands} grid with cls: "
                "img_size and patch_size of the config are not the checkpoint's, or its positions were trained"
            )


def _our_name(name: str) -> str:
    for pattern, replacement in OFFICIAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
