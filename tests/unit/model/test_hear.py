"""The HEAR interface on our own encoders (official ones: tests/golden)."""

import pytest
import torch

import audiomae.model.hear as hear
from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.encoder import AudioEncoder, EncoderConfig, ProjectionConfig

pytestmark = pytest.mark.usefixtures("cpu_with_bfloat16")  # the same figures on a CPU that has it

BACKBONE = AudioMAEConfig(size="debug")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    config = EncoderConfig(backbone=BACKBONE, pooling="mean", projection=ProjectionConfig(dim=8))
    AudioEncoder.from_config(config).save(folder)
    return hear.load_model(str(folder), device="cpu")


def test_required_attributes(model):
    assert model.sample_rate == 16_000
    assert model.scene_embedding_size == 64 and model.timestamp_embedding_size == 320


@pytest.mark.parametrize("samples", [1, 5_000, 32_000, 77_777])
def test_shapes_for_any_length_and_batch(model, samples):
    audio = torch.randn(3, samples)
    scene = hear.get_scene_embeddings(audio, model)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    assert scene.shape == (3, 64) and scene.dtype == torch.float32
    assert embeddings.shape == (3, timestamps.shape[1], 320) and timestamps.shape[0] == 3
    assert (timestamps[:, 0] == 0).all() and timestamps[0, -1] < samples / 16
    torch.testing.assert_close(hear.get_scene_embeddings(audio[1:2], model)[0], scene[1], rtol=0, atol=1e-5)


def test_timestamps_are_forty_milliseconds_apart(model):
    _, timestamps = hear.get_timestamp_embeddings(torch.randn(1, 32_000), model)
    torch.testing.assert_close(timestamps[0, :3], torch.tensor([0.0, 40.0, 80.0]))


def test_timestamp_embedding_hears_its_own_time(model):
    """Bands of a step lie side by side: the mean over bands of the mean over time is the mean-pooled scene."""
    audio = torch.randn(2, 64_000)
    embeddings, _ = hear.get_timestamp_embeddings(audio, model)
    torch.testing.assert_close(
        embeddings.unflatten(2, (5, 64)).mean((1, 2)), hear.get_scene_embeddings(audio, model), rtol=1e-4, atol=1e-5
    )


def test_wrong_rank_and_empty_path_are_explained(model):
    with pytest.raises(ValueError, match=r"\[n_sounds, n_samples\]"):
        hear.get_scene_embeddings(torch.randn(100), model)
    with pytest.raises(ValueError, match="empty path"):
        hear.load_model("")
