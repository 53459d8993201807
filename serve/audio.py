"""An uploaded file as the windows that the encoder takes, within limits, and their vectors as one."""

import numpy as np

from audiomae.corpus.decode import DecodeLimits, Window, iter_windows
from audiomae.errors import DecodeError
from serve.problems import Problem
from serve.schema import ServeArgs

# The decoder's stable classes -> (HTTP status, our stable code). The rest is sound that cannot be used: 422 bad_audio.
CODES = {
    "EmptyFile": (422, "empty_upload"),
    "UnknownFormat": (415, "not_audio"),
    "TooLarge": (413, "upload_too_large"),
    "TooLong": (422, "audio_too_long"),
    "TooSlow": (422, "decode_too_slow"),
}


def decode_query(data: bytes, sample_rate: int, window_s: float, args: ServeArgs) -> list[Window]:
    """Decode an upload into windows of float32[S] mono samples, cut as the corpus was.

    Args:
        data: the file's bytes, in any format and rate.
        sample_rate: of the result, in Hz.
        window_s: length of a window in seconds; the last may be shorter.
        args: the service's limits.

    Raises:
        Problem: 413, 415 or 422 with the decoder's reason.
    """
    limits = DecodeLimits(max_duration_s=args.max_audio_s, cpu_base_s=args.max_decode_s, cpu_per_audio_s=0.0)
    try:
        return list(iter_windows(data, sample_rate, window_s, window_s, limits=limits))
    except DecodeError as error:
        raise decode_problem(error) from None


def decode_problem(error: DecodeError) -> Problem:
    """A file that gives no audio, as an answer."""
    status, code = CODES.get(error.error_class, (422, "bad_audio"))
    return Problem(status, code, error.message, error_class=error.error_class, stage=error.stage)


def clip_vector(vectors: np.ndarray) -> np.ndarray:
    """The unit vector float32[dim] of a whole clip: the mean direction of its windows' float32[W, dim].

    The same rule by which `embed_corpus.py --per-file` embeds a file.
    """
    mean = vectors.mean(axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)
