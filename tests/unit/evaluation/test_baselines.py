"""The classical baselines: their numbers, their edge cases, and the anchor on real audio."""

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from audiomae.evaluation.baselines import (
    BASELINES,
    LOGMEL,
    MFCC,
    RANDOM,
    centred,
    corpus_vectors,
    logmel_statistics,
    mfcc_statistics,
)
from audiomae.metrics import Labelled, score_protocol, summarise

RATE = 16000


def tone(hertz, seconds=1.0, gain=0.5):
    return (gain * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


@pytest.mark.parametrize(("vectorize", "dim"), [(mfcc_statistics, 80), (logmel_statistics, 160)])
def test_any_length_and_silence_give_a_finite_vector(vectorize, dim):
    for samples in (tone(440), np.zeros(RATE, np.float32), tone(440, 0.001), np.zeros(0, np.float32)):
        vector = vectorize(samples)
        assert vector.shape == (dim,) and vector.dtype == np.float32 and np.isfinite(vector).all()


def test_level_moves_the_log_mel_mean_alone():
    loud, quiet = logmel_statistics(tone(1000, gain=0.8)), logmel_statistics(tone(1000, gain=0.4))
    band = loud[:80].argmax()
    assert loud[band] - quiet[band] == pytest.approx(2 * np.log(2), abs=0.01)
    assert loud[80 + band] == pytest.approx(quiet[80 + band], abs=0.02)


def test_pitch_tells_tones_apart():
    vectors = centred([mfcc_statistics(tone(f * (1 + 0.01 * i))) for f in (300, 3000) for i in range(4)])
    assert summarise(score_protocol(Labelled(vectors, np.repeat([0, 1], 4))))["mAP"] == 1.0


def test_a_span_is_the_same_as_its_samples(tmp_path):
    samples = np.concatenate([tone(300), tone(2000), tone(700)])
    sf.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    spans = [("a.wav", 1.0, 2.0), ("gone.wav", 0.0, 1.0), ("a.wav", 0.0, 3.0)]
    second, gone, whole = corpus_vectors(str(tmp_path), spans, [MFCC, LOGMEL])
    assert gone is None and set(second) == {MFCC, LOGMEL}
    np.testing.assert_allclose(second[LOGMEL], logmel_statistics(samples[RATE : 2 * RATE]), atol=1e-4)
    np.testing.assert_allclose(whole[LOGMEL], logmel_statistics(samples), atol=1e-4)


def test_the_untrained_encoder_is_one_of_them_and_seeded(tmp_path):
    sf.write(tmp_path / "a.wav", tone(300), RATE)
    config = {"backbone": {"size": "debug"}}
    one, same, other = (corpus_vectors(str(tmp_path), [("a.wav", 0, 1)], [RANDOM], config, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one[0][RANDOM], same[0][RANDOM])
    assert np.abs(one[0][RANDOM] - other[0][RANDOM]).max() > 0.01
    assert set(BASELINES.values()) == {MFCC, LOGMEL, RANDOM}


@pytest.mark.slow
def test_mfcc_statistics_stand_at_the_anchor_on_real_audio(esc10: Path):
    files = sorted(esc10.glob("*/*.ogg"))
    found = corpus_vectors(str(esc10), [(str(f.relative_to(esc10)), 0.0, 5.0) for f in files], [MFCC])
    vectors = centred([vectors[MFCC] for vectors in found])
    labels, folds = [f.parent.name for f in files], [f.name[0] for f in files]
    result = summarise(score_protocol(Labelled(vectors, labels), groups=folds))
    # measured elsewhere on this data and protocol: 0.523 / 0.743
    assert result["mAP"] == pytest.approx(0.523, abs=0.03)
    assert result["R@1"] == pytest.approx(0.743, abs=0.05)
