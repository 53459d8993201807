"""Files become plain log-mel clips, and a model sees the same through the cache as from the waveform."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiomae.artifacts import features
from audiomae.artifacts.features import FeatureStore
from audiomae.artifacts.shard_cache import ShardCache
from audiomae.model.encoder import AudioEncoder, EncoderConfig
from audiomae.model.features import FeatureConfig, LogMel
from audiomae.training.extract import Extractor, cache_recipe, plain_features
from audiomae.training.recipe import Recipe
from audiomae.training.validation import Validator, _vectors

RATE = 16000


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for index, seconds in enumerate((0.5, 2.3, 5.2)):
        soundfile.write(tmp_path / f"{index}.wav", 0.1 * draw.normal(size=int(seconds * RATE)), RATE)
    return tmp_path


def test_long_files_are_cut_into_clips(corpus):
    extract = Extractor(str(corpus), FeatureConfig(), clip_s=2.0)
    spans = {uri: [(s.start_s, s.end_s, len(s.features)) for s in extract(uri)] for uri in ("0.wav", "1.wav", "2.wav")}
    assert spans["0.wav"] == [(0.0, 0.5, 50)]
    assert spans["1.wav"] == [(0.0, 2.0, 200)]  # the rest is less than half a clip
    assert [round(end, 3) for _, end, _ in spans["2.wav"]] == [2.0, 4.0, 5.2]


def test_normalising_and_resizing_are_left_to_the_model():
    config = FeatureConfig(normalize="clip", resize_time=0.5, resize_mels=64)
    plain = plain_features(config)
    assert plain.normalize == "none" and plain.resize_time == 1.0 and plain.resize_mels is None
    same = cache_recipe(FeatureConfig(normalize="fixed", mean=3.0), 10.0)
    assert cache_recipe(FeatureConfig(n_mels=64), 10.0) != cache_recipe(FeatureConfig(), 10.0)
    assert same["features"]["n_mels"] == 80


@pytest.mark.parametrize("normalize", ["clip", "fixed"])
def test_finished_cached_frames_equal_the_features_of_the_waveform(normalize):
    config = FeatureConfig(normalize=normalize, mean=-5.0, std=4.0)
    wave = torch.randn(3, RATE * 2, generator=torch.Generator().manual_seed(0)) * 0.1
    lengths = torch.tensor([RATE * 2, RATE, RATE // 3])
    whole, plain = LogMel(config)(wave, lengths), LogMel(plain_features(config))(wave, lengths)
    finished = LogMel(config).finish(plain.x[:, 0], plain.frame_lengths)
    torch.testing.assert_close(finished.x, whole.x, atol=1e-4, rtol=1e-4)
    assert torch.equal(finished.frame_lengths, whole.frame_lengths)


def test_validation_embeds_what_the_encoder_embeds(corpus, tmp_path):
    """Queries and gallery go through the cache in half precision; the vectors are those of `AudioEncoder.embed`."""
    backbone = {"size": "debug", "depth": 1}
    encoder = AudioEncoder.from_config(EncoderConfig(backbone=backbone))
    uris = ["0.wav", "1.wav", "2.wav"]
    features.write_shard(str(tmp_path / "cache"), 0, uris, Extractor(str(corpus), encoder.config.features, 10.0))
    clips = features.read_clips(str(tmp_path / "cache"), 1)
    store = FeatureStore(
        ShardCache(str(tmp_path / "cache"), 1.0), clips["shard"], clips["first_frame"], clips["frames"]
    )
    labels = np.array([0, 0, 1])
    held_out = np.array([True, False, True])
    validator = Validator(store, held_out, labels, Recipe(), window=200)
    with torch.inference_mode():
        vectors = validator._embed(encoder, np.array([2, 0, 1]), _vectors(encoder)).numpy()
    expected = encoder.embed([corpus / uris[row] for row in (2, 0, 1)])
    assert np.sum(vectors * expected, axis=1).min() > 1 - 1e-5
    metrics = validator.run(encoder.train())
    assert set(metrics) == {"val_mAP", "val_R@1", "alignment", "uniformity", "rankme", "mean_cosine"}
    assert encoder.training and metrics == validator.run(encoder)


@pytest.mark.parametrize(("supervised", "statistics"), [(None, False), (None, True), (False, True)])
def test_the_discriminant_map_is_fitted_to_labels_that_training_learns(
    corpus: Path, tmp_path: Path, supervised: bool | None, statistics: bool
) -> None:
    config = EncoderConfig(
        backbone={"size": "debug", "depth": 2}, centred=True, discriminant=True, statistics=statistics, crops=2
    )
    encoder = AudioEncoder.from_config(config)
    before = encoder.fingerprint
    uris = [f"{number}.wav" for number in range(3)] * 2
    features.write_shard(str(tmp_path / "cache"), 0, uris, Extractor(str(corpus), encoder.config.features, 10.0))
    clips = features.read_clips(str(tmp_path / "cache"), 1)
    store = FeatureStore(
        ShardCache(str(tmp_path / "cache"), 1.0), clips["shard"], clips["first_frame"], clips["frames"]
    )
    recipe = Recipe.model_validate({"objective": {"contrastive": 1.0, "views": 2, "supervised": supervised}})
    Validator(store, np.zeros(6, bool), np.array([0, 1, 1, 0, 1, 1]), recipe, window=200).run(encoder)
    learnt = not torch.equal(encoder.discriminant, torch.eye(encoder.width, encoder.dim))
    assert learnt == (supervised is None) and encoder.fingerprint != before
    encoder.save(tmp_path / "encoder")
    again = AudioEncoder.load(tmp_path / "encoder", device="cpu")
    sound = corpus / "0.wav"
    assert again.fingerprint == encoder.fingerprint and np.array_equal(again.embed(sound), encoder.embed(sound))
