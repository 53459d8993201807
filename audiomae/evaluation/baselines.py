"""What a trained encoder has to beat: hand-made statistics of a clip, and the same encoder before it learnt anything.

Every baseline maps samples to one vector; `corpus_vectors` applies several of them to stretches of corpus files. On
ESC-10 (queries from one fold, gallery of the other four) MFCC statistics reach mAP 0.53 and R@1 0.78.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import librosa
import numpy as np
import numpy.typing as npt

from audiomae.config import build_config
from audiomae.corpus.decode import decode
from audiomae.corpus.manifest import open_source
from audiomae.errors import DecodeError

SAMPLE_RATE = 16000
MAX_SPAN_S = 30.0  # of a longer span the first 30 s stand for it, so that a baseline never decodes a whole day
_MEL = {"n_fft": 400, "hop_length": 160, "n_mels": 80}
_NUM_MFCC = 20
_LOG_FLOOR = 1e-6

Samples = npt.NDArray[np.float32]
Vectorizer = Callable[[Samples], npt.NDArray[np.float32]]


def mfcc_statistics(samples: Samples) -> npt.NDArray[np.float32]:
    """Mean, deviation, minimum and maximum over time of 20 MFCCs: float32[S] at 16 kHz -> float32[80].

    The classical fixed-length description of a clip (as in Piczak 2015, *ESC: Dataset for Environmental Sound
    Classification*, whose baselines use MFCC statistics), from 80 mel bands of 25 ms frames each 10 ms.
    """
    mfcc = librosa.feature.mfcc(S=_log_mel(samples), n_mfcc=_NUM_MFCC)
    return _statistics(mfcc, with_range=True)


def logmel_statistics(samples: Samples) -> npt.NDArray[np.float32]:
    """Mean and deviation over time of an 80-band log-mel spectrogram: float32[S] at 16 kHz -> float32[160]."""
    return _statistics(_log_mel(samples), with_range=False)


MFCC, LOGMEL, RANDOM = "MFCC statistics", "log-mel mean/std", "random-init encoder"
BASELINES = {"mfcc": MFCC, "logmel": LOGMEL, "random": RANDOM}  # names for the command line -> names for the reader
STATISTICS: Mapping[str, Vectorizer] = {MFCC: mfcc_statistics, LOGMEL: logmel_statistics}


def corpus_vectors(
    corpus_root: str,
    spans: Sequence[tuple[str, float, float]],
    names: Sequence[str],
    encoder_config: dict[str, Any] | None = None,
    seed: int = 0,
) -> list[dict[str, npt.NDArray[np.float32]] | None]:
    """The named baselines of some stretches of a corpus; what one Ray task of the evaluation computes.

    Args:
        corpus_root: as an embedding folder names it.
        spans: ``(uri, start_s, end_s)`` each.
        names: values of ``BASELINES``.
        encoder_config: of which ``RANDOM`` is an untrained copy with weights from ``seed``.

    Returns one dict of vectors by name per span, None where the audio could not be read.
    """
    by_rate: dict[int, dict[str, Vectorizer]] = defaultdict(dict)
    by_rate[SAMPLE_RATE] |= {name: STATISTICS[name] for name in names if name != RANDOM}
    if RANDOM in names:
        rate, embed = _untrained(encoder_config or {}, seed)
        by_rate[rate][RANDOM] = embed
    found: list[dict[str, npt.NDArray[np.float32]] | None] = []
    for uri, start, end in spans:
        try:
            vectors: dict[str, npt.NDArray[np.float32]] = {}
            for rate, vectorizers in by_rate.items():
                samples = _read(corpus_root, uri, start, end, rate)
                vectors |= {name: vectorize(samples) for name, vectorize in vectorizers.items()}
            found.append(vectors)
        except (DecodeError, OSError):
            found.append(None)
    return found


def _untrained(encoder_config: Mapping[str, Any], seed: int) -> tuple[int, Vectorizer]:
    """Sample rate and embedding function of an encoder with random weights."""
    from audiomae.model.encoder import AudioEncoder, EncoderConfig

    encoder = AudioEncoder.from_config(build_config(EncoderConfig, encoder_config), seed=seed)
    return encoder.sample_rate, lambda samples: encoder.embed([samples])[0]


def _read(corpus_root: str, uri: str, start_s: float, end_s: float, rate: int) -> Samples:
    source = open_source(corpus_root, uri)
    return decode(source, rate, start_s=start_s, duration_s=min(end_s - start_s, MAX_SPAN_S))


def centred(vectors: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Features less their mean over the set: float[N, D]. Else one shared offset dominates every cosine."""
    data = np.asarray(vectors, np.float32)
    return data - data.mean(axis=0, keepdims=True)


def _log_mel(samples: Samples) -> npt.NDArray[np.float32]:
    if len(samples) < _MEL["n_fft"]:
        samples = np.pad(samples, (0, _MEL["n_fft"] - len(samples)))
    power = librosa.feature.melspectrogram(y=samples, sr=SAMPLE_RATE, **_MEL)
    return np.log(power + _LOG_FLOOR)


def _statistics(frames: npt.NDArray[Any], with_range: bool) -> npt.NDArray[np.float32]:
    """Statistics over the last axis of float[bands, frames], concatenated."""
    parts = [frames.mean(axis=1), frames.std(axis=1)]
    if with_range:
        parts += [frames.min(axis=1), frames.max(axis=1)]
    return np.concatenate(parts).astype(np.float32)
