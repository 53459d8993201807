"""Checkpoints in other layouts: official AudioMAE++ (made here by renaming back), and timm local directories."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import torchaudio

from audiomae import AudioEncoder
from audiomae.errors import ConfigError
from audiomae.model.audiomae import AudioMAE
from audiomae.model.encoder import EncoderConfig
from audiomae.model.pretrained import AUDIOMAE_FEATURES, read_official
from tests import pretrained_files
from tests.pretrained_files import ARGUMENTS, official_folder, official_network, official_weights

pytestmark = pytest.mark.usefixtures("cpu_with_bfloat16")  # the same figures on a CPU that has it


@pytest.fixture
def original() -> AudioMAE:
    return official_network()


@pytest.fixture
def folder(original, tmp_path):
    official_folder(tmp_path, original)
    return tmp_path


def same(one: AudioMAE, other: AudioMAE) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


# --- official ---------------------------------------------------------------------------------------------------------


def test_every_weight_arrives(folder, original):
    for path in (folder, folder / "checkpoint.pth"):
        model = read_official(str(path))
        assert same(original, model)
        assert (model.config.ffn2_norm, model.config.decoder_positions, model.config.mask_ratio) == ("norm2", "1d", 0.8)


def test_training_run_layout_takes_the_last_checkpoint(original, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    weights = official_weights(original)
    torch.save(
        {"model": {name: value * 0 for name, value in weights.items()}}, tmp_path / "checkpoints/checkpoint-9.pth"
    )
    torch.save({"model": {f"module.{n}": v for n, v in weights.items()}}, tmp_path / "checkpoints/checkpoint-100.pth")
    arguments = {name: value for name, value in ARGUMENTS.items() if name not in ("embed_dim", "depth", "num_heads")}
    config = {
        "model": {"arch": "mae_plusplus_tiny", "model_args": {**arguments, "embed_dim": 64, "depth": 2, "num_heads": 2}}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same(original, read_official(str(tmp_path)))


def test_encoder_speaks_as_the_official_wrapper(folder):
    encoder = AudioEncoder.load(f"official:{folder}", device="cpu")
    assert encoder.config.pooling == "freq_concat" and encoder.dim == 320 and encoder.backbone.decoder is None
    assert encoder.window_s == 2.0 and not encoder.config.features.drop_last_frame
    assert encoder.with_pooling("mean").embed([np.ones(9_000, np.float32)]).shape == (1, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_use_rope": True}, "encoder_use_rope=True is not supported"),
        ({"encoder_plusplus_block": False}, "encoder_plusplus_block=False"),
        ({"use_cls_token": False}, "use_cls_token"),
        ({"img_size": [400, 80]}, "not the sin-cos table of a 100 x 5 grid"),
        ({"depth": 3}, "do not fit config.json"),
        ({"num_heads": 5}, "expected a divisor"),
    ],
)
def test_other_variants_are_refused(folder, change, message):
    (folder / "config.json").write_text(json.dumps({**ARGUMENTS, **change}))
    with pytest.raises((ValueError, ConfigError), match=message):
        AudioEncoder.load(f"official:{folder}")


def test_code_in_a_checkpoint_is_not_run(folder):
    class Payload:
        def __reduce__(self):
            return (open, (str(folder / "ran"), "w"))

    with (folder / "checkpoint.pth").open("wb") as file:
        pickle.dump({"model": Payload()}, file, protocol=2)
    with pytest.raises(ValueError, match="never run"):
        AudioEncoder.load(f"official:{folder}")
    assert not (folder / "ran").exists()


def test_missing_pieces_are_named(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        AudioEncoder.load(f"official:{folder}")
    (folder / "checkpoint.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \.pth"):
        AudioEncoder.load(f"official:{folder}")
    with pytest.raises(FileNotFoundError, match="no such file"):
        AudioEncoder.load(f"official:{folder}/x.pth")


# --- timm -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vit_folder(tmp_path):
    return tmp_path / "audiomae", pretrained_files.vit_folder(tmp_path / "audiomae")


def test_timm_folder_embeds_as_its_recipe_says(vit_folder):
    folder, vit = vit_folder
    encoder = AudioEncoder.load(f"timm:local-dir:{folder}", device="cpu")
    assert encoder.dim == 48 and encoder.window_s == pytest.approx(0.64) and encoder.config.pooling == "mean"
    samples = 400 + 63 * 160
    waveform = torch.randn(samples, generator=torch.Generator().manual_seed(0)) * 0.1
    fbank = torchaudio.compliance.kaldi.fbank(
        (waveform - waveform.mean())[None], htk_compat=True, window_type="hanning", num_mel_bins=128
    )
    fbank = (fbank - -4.2677393) / (4.5689974 * 2)
    with torch.no_grad():
        expected = vit.forward_features(fbank[None, None])[:, 1:].mean(1)
    expected = torch.nn.functional.normalize(expected, dim=1).numpy()
    np.testing.assert_allclose(encoder.embed([waveform]), expected, atol=1e-4)


def test_timm_encoder_saved_needs_the_folder_no_more(vit_folder, tmp_path):
    folder, _ = vit_folder
    encoder = AudioEncoder.load(f"timm:local-dir:{folder}", device="cpu")
    encoder.save(tmp_path / "saved")
    shutil.rmtree(folder)
    again = AudioEncoder.load(tmp_path / "saved", device="cpu")
    assert again.fingerprint == encoder.fingerprint
    sounds = [np.random.default_rng(0).standard_normal(n).astype(np.float32) for n in (30_000, 5_000, 10)]
    alone = np.concatenate([again.embed([sound]) for sound in sounds])
    np.testing.assert_allclose(again.embed(sounds), alone, atol=1e-5)
    assert (encoder.embed(sounds) == again.embed(sounds)).all()


def test_audiomae_vit_b_has_its_real_shape():
    """The recipe of gaunernst/vit_base_patch16_1024_128.audiomae_as2m, without its weights."""
    backbone = {
        "kind": "timm",
        "architecture": "vit_base_patch16_224",
        "model_args": {"img_size": [1024, 128]},
        "img_size": [1024, 128],
        "patch_size": [16, 16],
        "embed_dim": 768,
    }
    config = EncoderConfig.model_validate({"features": AUDIOMAE_FEATURES, "backbone": backbone})
    with torch.device("meta"):
        encoder = AudioEncoder(config)
    assert config.backbone.grid == (64, 8) and encoder.dim == 768
    assert encoder.backbone.vit.pos_embed.shape == (1, 513, 768)
    assert encoder.window_s == pytest.approx(10.24)


def test_timm_problems_are_explained(tmp_path):
    with pytest.raises(RuntimeError, match=r"config.json and model.safetensors"):
        AudioEncoder.load(f"timm:local-dir:{tmp_path}")
    with pytest.raises(ConfigError, match="no decoder"):
        AudioEncoder.load(f"timm:local-dir:{tmp_path}", with_decoder=True)
