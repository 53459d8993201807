"""The MTEB adapter inside the installed mteb package, on tasks small enough to be made here."""

import numpy as np
import pytest

pytest.importorskip("mteb", reason="mteb is not installed (the dev extra)")
import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.encoder import AudioEncoder, EncoderConfig
from audiomae.model.mteb import MTEBAudioEncoder

COMMON = {
    "description": "Tones and noises made for a test.",
    "reference": None,
    "dataset": {"path": "local", "revision": "1"},
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "date": ("2026-01-01", "2026-01-01"),
    "domains": [],
    "task_subtypes": [],
    "license": "cc0-1.0",
    "annotations_creators": "derived",
    "dialect": [],
    "sample_creation": "created",
    "bibtex_citation": "",
    "modalities": ["audio"],
}


def sound(label: int, seed: int) -> dict:
    """0 = a tone, 1 = noise; at rates other than the encoder's, of differing lengths, some in stereo."""
    rng = np.random.default_rng(seed)
    rate, seconds = int(rng.choice([8_000, 16_000, 22_050])), rng.uniform(0.3, 1.2)
    time = np.arange(int(rate * seconds)) / rate
    samples = np.sin(2 * np.pi * rng.uniform(300, 900) * time) if label == 0 else rng.standard_normal(len(time))
    samples = samples * rng.uniform(0.1, 0.5)
    return {"array": np.stack([samples, samples]) if seed % 3 == 0 else samples[None], "sampling_rate": rate}


def rows(count: int, seed: int) -> dict:
    return {"audio": [sound(i % 2, seed + i) for i in range(count)], "label": [i % 2 for i in range(count)]}


class ToneOrNoise(AbsTaskClassification):
    metadata = TaskMetadata(
        type="AudioClassification", name="ToneOrNoise", main_score="accuracy", category="a2c", **COMMON
    )
    input_column_name = "audio"
    samples_per_label = 4
    n_experiments = 2

    def load_data(self, **kwargs):
        self.dataset = DatasetDict(train=Dataset.from_dict(rows(12, 0)), test=Dataset.from_dict(rows(8, 100)))
        self.data_loaded = True


class SoundsLike(AbsTaskRetrieval):
    metadata = TaskMetadata(
        type="Any2AnyRetrieval", name="SoundsLike", main_score="ndcg_at_10", category="a2a", **COMMON
    )

    def load_data(self, **kwargs):
        queries, corpus = rows(4, 200), rows(8, 300)
        ids = {"queries": [f"q{i}" for i in range(4)], "corpus": [f"d{i}" for i in range(8)]}
        self.queries = {"test": Dataset.from_dict({"id": ids["queries"], "audio": queries["audio"]})}
        self.corpus = {"test": Dataset.from_dict({"id": ids["corpus"], "audio": corpus["audio"]})}
        self.queries, self.corpus = DatasetDict(self.queries), DatasetDict(self.corpus)
        self.relevant_docs = {
            "test": {
                q: {d: int(i % 2 == j % 2) for j, d in enumerate(ids["corpus"])} for i, q in enumerate(ids["queries"])
            }
        }
        self.data_loaded = True


@pytest.fixture(scope="module")
def model() -> MTEBAudioEncoder:
    return MTEBAudioEncoder(AudioEncoder.from_config(EncoderConfig(backbone=AudioMAEConfig(size="debug"))))


@pytest.mark.parametrize("task", [ToneOrNoise, SoundsLike])
def test_mteb_runs_the_encoder(model, task):
    result = mteb.evaluate(model, task(), cache=None, co2_tracker=False, show_progress_bar=False)
    assert result.task_results[0].get_score() >= 0.9  # even untrained, tone and noise lie far apart
    assert result.model_name == model.mteb_model_meta.name


def test_rates_and_channels_become_what_the_encoder_hears(model):
    item = {"array": np.stack([np.ones(800), np.zeros(800)]), "sampling_rate": 8_000}
    waveform = model._waveform(item)
    assert waveform.shape == (1600,) and waveform[800] == pytest.approx(0.5, abs=1e-2)


def test_model_card(model):
    card = model.mteb_model_meta
    assert card.revision == model.encoder.fingerprint and card.embed_dim == 64 and card.modalities == ["audio"]


def test_inputs_that_it_cannot_encode_are_explained(model):
    with pytest.raises(ValueError, match="expected audio or text, got"):
        model.encode([{"image": [1]}], task_metadata=None, hf_split="test", hf_subset="default")
    with pytest.raises(RuntimeError, match="no text tower"):
        model.encode([{"text": ["rain"]}], task_metadata=None, hf_split="test", hf_subset="default")
    assert model.encode([], task_metadata=None, hf_split="test", hf_subset="default").shape == (0, 64)
