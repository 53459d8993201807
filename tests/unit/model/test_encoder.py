"""AudioEncoder: batch invariance, odd inputs, save and load, fingerprint, precision."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from pydantic import ValidationError
from safetensors.torch import load as load_file_bytes
from safetensors.torch import load_file, save_file

from audiomae import AudioEncoder
from audiomae.errors import ConfigError, IntegrityError
from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.devices import pick_precision
from audiomae.model.encoder import EncoderConfig, ProjectionConfig
from audiomae.model.features import FeatureConfig
from audiomae.model.pooling import POOLINGS

DEBUG = AudioMAEConfig(size="debug")


def make(seed: int = 0, **settings) -> AudioEncoder:
    return AudioEncoder.from_config(EncoderConfig(backbone=DEBUG, **settings), seed=seed)


def clips(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal(length) * 0.1).astype(np.float32) for length in lengths]


@pytest.fixture(scope="module")
def encoder() -> AudioEncoder:
    return make()


# --- vectors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("long_input", ["chunk", "extend", "interpolate"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vector_does_not_depend_on_the_batch(pooling, long_input):
    encoder = make(pooling=pooling, long_input=long_input)
    sounds = [*clips(80_000, 16_000, 32_000, 33_000, 300, 1), np.zeros(20_000, np.float32)]
    together = encoder.embed(sounds)
    alone = np.concatenate([encoder.embed([sound]) for sound in sounds])
    assert together.dtype == np.float32 and together.shape == (7, encoder.dim)
    assert np.isfinite(together).all()
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose((together * alone).sum(1), 1, atol=1e-5)


def test_order_and_batch_size_do_not_matter(encoder):
    sounds = clips(9_000, 40_000, 1_000, 40_000, 20_000)
    np.testing.assert_allclose(encoder.embed(sounds, batch_size=2), encoder.embed(sounds, batch_size=5), atol=1e-5)


def test_official_windows_are_batch_invariant_too():
    encoder = make(pooling="freq_concat", official_windows=True)
    sounds = clips(80_000, 16_000, 33_000)
    alone = np.concatenate([encoder.embed([sound]) for sound in sounds])
    np.testing.assert_allclose(encoder.embed(sounds), alone, atol=1e-5)


def test_different_sounds_differ(encoder):
    noise, tone = clips(16_000)[0], np.sin(np.arange(16_000) / 5).astype(np.float32)
    assert encoder.embed([noise, tone]).prod(0).sum() < 0.999


def test_path_and_samples_give_the_same(encoder, tmp_path):
    (sound,) = clips(24_000)
    soundfile.write(tmp_path / "a.wav", sound, 16_000, subtype="FLOAT")
    np.testing.assert_allclose(
        encoder.embed([tmp_path / "a.wav", str(tmp_path / "a.wav")]), encoder.embed([sound] * 2), atol=1e-5
    )
    for one in (tmp_path / "a.wav", str(tmp_path / "a.wav")):  # one path is a list of one
        np.testing.assert_allclose(encoder.embed(one), encoder.embed([sound]), atol=1e-5)


def test_embed_keeps_training_mode_and_accepts_nothing():
    encoder = make().train()
    assert encoder.embed([]).shape == (0, 64) and encoder.training


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros((2, 100), np.float32), r"mono array float32\[S\]"),
        (np.zeros(0, np.float32), r"S > 0"),
        (np.array([0.0, np.nan], np.float32), "NaN"),
    ],
)
def test_bad_samples_are_explained(encoder, clip, message):
    with pytest.raises(ValueError, match=f"clip 1: .*{message}"):
        encoder.embed([np.zeros(10, np.float32), clip])


def test_gradient_reaches_every_encoder_weight():
    encoder = make(pooling="attention", projection=ProjectionConfig(dim=16, hidden=32)).train()
    vectors = encoder(torch.randn(2, 40_000), torch.tensor([40_000, 9_000]))
    (vectors[0] * vectors[1].detach()).sum().backward()
    assert not [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]


def test_head_on_visible_tokens_of_a_masked_step():
    encoder = AudioEncoder.from_config(
        EncoderConfig(backbone=DEBUG, projection=ProjectionConfig(dim=8)), with_decoder=True
    )
    x, frames = encoder.features(torch.randn(2, 32_000), torch.tensor([32_000, 9_000]))
    seen = encoder.backbone.encode(x, frames, ids_keep=torch.arange(20).expand(2, -1))
    vectors = encoder.head(seen.tokens, seen.token_mask)
    assert vectors.shape == (2, 8)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    "settings",
    [
        {"img_size": (224, 224), "patch_size": (16, 16)},
        {"img_size": (384, 384), "patch_size": (16, 16)},
        {"img_size": (448, 448), "patch_size": (32, 32)},
    ],
)
def test_image_layouts_embed(settings):
    side = settings["img_size"][0]
    features = FeatureConfig(n_mels=128, n_fft=1024, resize_time=side / 512, resize_mels=side)
    encoder = AudioEncoder.from_config(
        EncoderConfig(features=features, backbone=AudioMAEConfig(size="debug", **settings))
    )
    assert encoder.window_s == pytest.approx(5.12)
    sounds = clips(80_000, 30_000)
    np.testing.assert_allclose(encoder.embed(sounds), np.concatenate([encoder.embed([s]) for s in sounds]), atol=1e-5)


# --- precision --------------------------------------------------------------------------------------------------------


def test_bfloat16_stays_close_to_float32(tmp_path):
    make().save(tmp_path)
    sounds = clips(80_000, 32_000, 5_000, 100)
    full = AudioEncoder.load(tmp_path, device="cpu", dtype="float32").embed(sounds)
    half = AudioEncoder.load(tmp_path, device="cpu", dtype="bfloat16").embed(sounds)
    assert half.dtype == np.float32 and (full != half).any()
    assert (full * half).sum(1).min() >= 0.9995


@pytest.mark.parametrize("native", [True, False], ids=["native bfloat16", "no bfloat16"])
def test_auto_is_float32_on_every_cpu(tmp_path, monkeypatch, native):
    monkeypatch.setattr("audiomae.model.devices.native_bfloat16", lambda device: native)
    make().save(tmp_path)
    assert AudioEncoder.load(tmp_path, device="cpu").precision == "float32"
    assert AudioEncoder.load(tmp_path, device="cpu", dtype="bfloat16").precision == "bfloat16"
    assert pick_precision("auto", torch.device("cuda")) == ("bfloat16" if native else "float32")
    assert pick_precision("float32", torch.device("cuda")) == "float32"
    with pytest.raises(ValueError, match="auto, float32 or bfloat16"):
        AudioEncoder.load(tmp_path, device="cpu", dtype="float8")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run the suite on a machine with a GPU")
def test_gpu_agrees_with_cpu(tmp_path):
    make().save(tmp_path)
    sounds = clips(80_000, 32_000, 5_000)
    cpu = AudioEncoder.load(tmp_path, device="cpu", dtype="float32").embed(sounds)
    for dtype, least in (("float32", 0.99999), ("bfloat16", 0.9995)):
        gpu = AudioEncoder.load(tmp_path, device="cuda", dtype=dtype)
        assert (gpu.embed(sounds) * cpu).sum(1).min() >= least
        assert gpu.fingerprint == make().fingerprint


# --- save, load, fingerprint ------------------------------------------------------------------------------------------


def test_saved_encoder_loads_and_embeds_the_same(tmp_path):
    encoder = make(pooling="attention", projection=ProjectionConfig(dim=24))
    encoder.save(tmp_path)
    again = AudioEncoder.load(tmp_path, device="cpu", dtype="float32")
    sounds = clips(50_000, 3_000)
    assert (again.embed(sounds) == encoder.embed(sounds)).all()
    assert (again.fingerprint, again.dim, again.config) == (encoder.fingerprint, 24, encoder.config)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["config.json", "model.safetensors", "receipt.json"]
    assert not again.training


def test_fingerprint_is_the_same_in_every_process_and_release():
    encoder = make(features=FeatureConfig(range_db=None))  # what a new encoder had before range_db became a default
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(0.5)
    assert encoder.fingerprint == "ca1b73caa5c43195648b8121e08b6be702d8f59081eda5344f7049da9d45bfc0"


def test_an_encoder_saved_before_a_setting_existed_loads_as_it_was(tmp_path):
    encoder = make(features=FeatureConfig(range_db=None))
    encoder.save(tmp_path / "old")
    (tmp_path / "old" / "receipt.json").unlink()  # encoders had none then
    path = tmp_path / "old" / "config.json"
    saved = json.loads(path.read_text())
    for later in ("centred", "discriminant", "crops"):
        del saved["config"][later]
    del saved["config"]["features"]["range_db"]
    path.write_text(json.dumps(saved))
    again = AudioEncoder.load(tmp_path / "old", device="cpu")
    assert again.fingerprint == encoder.fingerprint and again.config.features.range_db is None
    assert make().config.features.range_db == 60, "new encoders lift near-silence to a quiet room"


def test_fingerprint_follows_what_decides_a_vector(encoder):
    base = encoder.fingerprint
    different = [
        make(seed=1),
        make(pooling="max"),
        make(long_input="extend"),
        make(features=FeatureConfig(f_min=0.0)),
        AudioEncoder.from_config(EncoderConfig(backbone=AudioMAEConfig(size="debug", img_size=(400, 80)))),
        AudioEncoder.from_config(EncoderConfig(backbone=AudioMAEConfig(size="debug", ffn2_norm="norm2"))),
    ]
    prints = [base, *(other.fingerprint for other in different)]
    assert len(set(prints)) == len(prints)


def test_fingerprint_ignores_decoder_and_training_settings():
    backbone = AudioMAEConfig(size="debug", mask_ratio=0.9, drop_path=0.1, decoder_depth=2)
    assert (
        AudioEncoder.from_config(EncoderConfig(backbone=backbone), with_decoder=True).fingerprint == make().fingerprint
    )


def test_fingerprint_follows_training():
    encoder = make()
    before = encoder.fingerprint
    assert encoder.fingerprint == before
    with torch.no_grad():
        encoder.backbone.norm.weight.mul_(2.0)
    assert encoder.fingerprint != before
    encoder.backbone.load_state_dict(make().backbone.state_dict())
    assert encoder.fingerprint == before


def test_a_file_that_is_not_what_the_receipt_says_is_refused_by_name(tmp_path, encoder):
    encoder.save(tmp_path)
    for name in ("config.json", "model.safetensors", "receipt.json"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-1] + b"!")
        with pytest.raises(IntegrityError, match=rf"{name}: damaged"):
            AudioEncoder.load(tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert AudioEncoder.load(tmp_path).fingerprint == encoder.fingerprint


def save_without_receipt(encoder, folder):
    """As older versions saved it."""
    encoder.save(folder)
    (folder / "receipt.json").unlink()


def test_changed_weights_are_refused(tmp_path, encoder):
    save_without_receipt(encoder, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["backbone.norm.weight"][0] += 1e-3
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"changed after it was saved.*expected .*restore"):
        AudioEncoder.load(tmp_path)


def test_changed_config_is_refused(tmp_path, encoder):
    save_without_receipt(encoder, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["config"]["features"]["f_min"] = 20.0
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(IntegrityError):
        AudioEncoder.load(tmp_path)
    saved["config"]["pool"] = "mean"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="'pool'; did you mean 'pooling'"):
        AudioEncoder.load(tmp_path)


def test_damaged_directory_is_explained(tmp_path, encoder):
    save_without_receipt(encoder, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(IntegrityError, match="not a whole safetensors file"):
        AudioEncoder.load(tmp_path)
    weights = load_file_bytes(whole)
    save_file({name: value for name, value in weights.items() if "norm1" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"(?s)does not belong to config.json.*norm1"):
        AudioEncoder.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match="copy the whole encoder directory"):
        AudioEncoder.load(tmp_path)


def test_missing_directory_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no encoder here.*official:PATH"):
        AudioEncoder.load(tmp_path / "nothing")


def test_decoder_is_saved_only_on_request(tmp_path):
    encoder = AudioEncoder.from_config(EncoderConfig(backbone=DEBUG), with_decoder=True)
    encoder.save(tmp_path / "release")
    with pytest.raises(ConfigError, match="saved without its decoder"):
        AudioEncoder.load(tmp_path / "release", with_decoder=True)
    encoder.save(tmp_path / "full", with_decoder=True)
    again = AudioEncoder.load(tmp_path / "full", device="cpu", with_decoder=True)
    assert torch.equal(again.backbone.decoder.pred.weight, encoder.backbone.decoder.pred.weight)
    assert AudioEncoder.load(tmp_path / "full", device="cpu").backbone.decoder is None
    assert again.fingerprint == encoder.fingerprint


def test_with_pooling_keeps_the_weights(encoder):
    other = encoder.with_pooling("max")
    assert other.config.pooling == "max"
    (sound,) = clips(32_000)
    x, frames = encoder.features(torch.from_numpy(sound)[None])
    torch.testing.assert_close(
        other.pool_spectrogram(x, frames), encoder.token_sequence(x, frames).tokens[:, 1:].amax(1)
    )
    with pytest.raises(ValueError, match="projection"):
        make(projection=ProjectionConfig(dim=4)).with_pooling("max")


def test_summary(encoder):
    facts = encoder.summary()
    assert facts["parameters"] == sum(p.numel() for p in encoder.parameters())
    assert facts["window_s"] == 2.0 and facts["dim"] == 64 and facts["sample_rate"] == 16_000
    tokens, dim = 251, 64
    per_block = tokens * (2 * dim * 4 * dim + 4 * dim * dim + 3 * dim * 170 + 2 * tokens * dim)
    expected = 2 * (2 * per_block + 250 * 64 * dim)
    assert expected <= facts["flops_per_window"] <= 1.2 * expected  # the rest is the mel bank


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": FeatureConfig(n_mels=64)}, "features give 64 mel rows, backbone.img_size has 80"),
        ({"official_windows": True, "long_input": "extend"}, "long_input=chunk only"),
        ({"pooling": "median"}, "attention_score"),
    ],
)
def test_settings_that_do_not_fit_are_explained(settings, message):
    with pytest.raises(ValidationError, match=message):
        EncoderConfig(backbone=DEBUG, **settings)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, audiomae; print([name for name in ('torch', 'faiss', 'ray', 'numpy') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("settings", [{}, {"discriminant": True, "centred": True, "pooling": "attention"}])
def test_loading_an_encoder_does_not_load_torchs_compiler(tmp_path, settings):
    """Every worker, driver and replica would pay two seconds of CPU for it."""
    make(**settings).save(tmp_path)
    code = "import sys, torch, audiomae; before = 'torch._dynamo' in sys.modules; "
    code += f"audiomae.AudioEncoder.load({str(tmp_path)!r}).embed([torch.ones(16000).numpy()]); "
    code += "print(before, 'torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False False"


def test_unknown_export_is_explained():
    import audiomae

    with pytest.raises(AttributeError, match="AudioEncoder and AudioIndex"):
        _ = audiomae.AudioDecoder
    assert {"AudioEncoder", "AudioIndex"} <= set(dir(audiomae))


def test_s3_directory_saves_and_loads(encoder, s3_bucket):
    encoder.save(f"{s3_bucket}/models/one")
    again = AudioEncoder.load(f"{s3_bucket}/models/one", device="cpu", dtype="float32")
    (sound,) = clips(20_000)
    assert again.fingerprint == encoder.fingerprint
    assert (again.embed([sound]) == encoder.embed([sound])).all()
    with pytest.raises(FileNotFoundError, match="no encoder here"):
        AudioEncoder.load(f"{s3_bucket}/models/two")


# --- centre and crops -------------------------------------------------------------------------------------------------


def test_centring_and_crops_keep_vectors_independent_of_the_batch_and_enter_the_fingerprint(tmp_path):
    plain, moved = make(), make(centred=True, crops=3)
    moved.centre.copy_(torch.linspace(-0.1, 0.1, moved.dim))
    assert len({plain.fingerprint, make(centred=True).fingerprint, make(crops=3).fingerprint, moved.fingerprint}) == 4
    sounds = clips(80_000, 16_000, 33_000)
    together = moved.embed(sounds)
    alone = np.concatenate([moved.embed([sound]) for sound in sounds])
    np.testing.assert_allclose((together * alone).sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    moved.save(tmp_path / "moved")
    again = AudioEncoder.load(tmp_path / "moved", device="cpu")
    assert again.fingerprint == moved.fingerprint
    np.testing.assert_allclose(again.embed(sounds), together, atol=1e-6)


def test_crops_average_the_clip_over_where_it_starts():
    one, four = make(), make(crops=4)
    (sound,) = clips(32_000)
    x = one.features(torch.from_numpy(sound)[None]).x
    rolled = [one.embed_spectrogram(torch.roll(x, -50 * number, dims=2)) for number in range(4)]
    expected = torch.nn.functional.normalize(torch.stack(rolled).sum(0), dim=-1)
    torch.testing.assert_close(torch.from_numpy(four.embed([sound])), expected, atol=1e-5, rtol=0)


def test_the_discriminant_map_comes_after_the_centre_and_before_the_last_normalisation():
    plain, mapped = make(), make(centred=True, discriminant=True)
    (sound,) = clips(32_000)
    draw = torch.Generator().manual_seed(0)
    mapped.centre.copy_(0.1 * torch.randn(mapped.dim, generator=draw))
    mapped.discriminant.copy_(torch.randn(mapped.dim, mapped.dim, generator=draw))
    moved = (torch.from_numpy(plain.embed([sound])) - mapped.centre) @ mapped.discriminant
    expected = torch.nn.functional.normalize(moved, dim=-1)
    torch.testing.assert_close(torch.from_numpy(mapped.embed([sound])), expected, atol=1e-5, rtol=0)
    mapped.precision = "bfloat16"  # the map itself stays float32
    assert mapped.centring(torch.ones(1, mapped.dim)).dtype == torch.float32
    with pytest.raises(ValueError, match="centred"):
        EncoderConfig(discriminant=True)
    assert mapped.with_pooling("max").discriminant is None


def test_losses_see_neither_centre_nor_crops():
    plain, moved = make().train(), make(centred=True, discriminant=True, crops=2).train()
    moved.centre.fill_(0.3)
    moved.discriminant.fill_(0.1)
    x = torch.randn(2, 1, 200, 80, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain.embed_spectrogram(x), moved.embed_spectrogram(x))
