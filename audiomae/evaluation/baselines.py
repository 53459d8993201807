"""What a trained encoder has to beat: hand-made statistics of a clip, and the same encoder before it learnt anything.

Every baseline maps samples to one vector; `span_vectors` applies several of them to one stretch of a file. On ESC-10
(queries from one fold, gallery of the other four) MFCC statistics reach mAP 0.53 and R@1 0.78.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import librosa
import numpy as np
import numpy.typing as npt

from audiomae.corpus.decode import decode
from audiomae.corpus.manifest import open_source

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


STATISTICS: Mapping[str, Vectorizer] = {"MFCC statistics": mfcc_statistics, "log-mel mean/std": logmel_statistics}


def span_vectors(
    corpus_root: str, uri: str, start_s: float, end_s: float, vectorizers: Mapping[str, Vectorizer], sample_rate: int
) -> dict[str, npt.NDArray[np.float32]]:
    """One vector per name for the stretch ``[start_s, end_s]`` of a corpus file, decoded once at ``sample_rate``.

    Raises:
        DecodeError: when the file cannot be read.
    """
    samples = decode(
        open_source(corpus_root, uri), sample_rate, start_s=start_s, duration_s=min(end_s - start_s, MAX_SPAN_S)
    )
    return {name: vectorize(samples) for name, vectorize in vectorizers.items()}


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
