"""Small checkpoints in the layouts of others: official AudioMAE++ (made by renaming back), and timm's folders."""

import json
import re
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from audiomae.model.audiomae import AudioMAE, AudioMAEConfig, flat_positions, grid_positions

ARGUMENTS = {
    "img_size": [200, 80],
    "patch_size": [4, 16],
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 48,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "mask_ratio": 0.8,
    "encoder_plusplus_block": True,
    "decoder_plusplus_block": True,
    "encoder_use_swiglu_final_ffn": True,
    "decoder_use_swiglu_final_ffn": True,
}
BACK = [
    (r"^patch_proj\.", "patch_embed.proj."),
    (r"^norm\.", "encoder.encoder_norm."),
    (r"^blocks\.", "encoder.blocks."),
    (r"^decoder\.blocks\.", "decoder.decoder_blocks."),
    (r"^decoder\.(embed|norm|pred)\.", r"decoder.decoder_\1."),
    (r"\.ffn1\.fc([12])\.", r".ffn1.layer\1."),
    (r"\.attn\.(qkv|proj)\.", r".attn.\1_layer."),
    (r"\.ffn2\.fc1_x\.", ".ffn2.linear1."),
    (r"\.ffn2\.fc1_g\.", ".ffn2.linear2."),
    (r"\.ffn2\.norm\.", ".ffn2.ln."),
    (r"\.ffn2\.fc2\.", ".ffn2.project."),
]


def official_network() -> AudioMAE:
    """The smallest network, with the quirks of the official code."""
    torch.manual_seed(0)
    return AudioMAE(AudioMAEConfig(size="debug", ffn2_norm="norm2", decoder_positions="1d")).eval()


def official_weights(model: AudioMAE) -> dict[str, torch.Tensor]:
    weights = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in BACK:
            name = re.sub(pattern, replacement, name)
        weights[name] = value
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].reshape(64, 1, 4, 16)
    for name, table in (
        ("encoder.pos_embed", grid_positions(50, 5, 64, torch.device("cpu"))),
        ("decoder.decoder_pos_embed", flat_positions(250, 48, torch.device("cpu"))),
    ):
        weights[name] = torch.nn.functional.pad(table, (0, 0, 1, 0))
    return weights


def official_folder(target: Path, network: AudioMAE) -> None:
    """A checkpoint of this network as the official code writes it."""
    target.mkdir(parents=True, exist_ok=True)
    torch.save({"model": official_weights(network), "epoch": 7}, target / "checkpoint.pth")
    (target / "config.json").write_text(json.dumps(ARGUMENTS))


def vit_folder(target: Path) -> nn.Module:
    """A spectrogram ViT in timm's layout (config.json + model.safetensors), small: 128 mels, 64 frames; the network."""
    torch.manual_seed(0)
    args = {"img_size": [64, 128], "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 3}
    vit = timm.create_model("vit_base_patch16_224", num_classes=0, **args).eval()
    torch.nn.init.normal_(vit.pos_embed, std=0.5)
    target.mkdir(parents=True)
    save_file(vit.state_dict(), target / "model.safetensors")
    pretrained_cfg = {
        "input_size": [1, 64, 128],
        "fixed_input_size": True,
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
    }
    config = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": 48,
        "model_args": args,
        "pretrained_cfg": {**pretrained_cfg, "classifier": "head"},
    }
    (target / "config.json").write_text(json.dumps(config))
    return vit
