"""An uploaded file as the windows that the encoder takes, within limits, and their vectors as one."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from audiomae.corpus.decode import DecodeLimits, Window, iter_windows
from audiomae.errors import DecodeError
from audiomae.vectors import clip_vectors
from serve.arguments import ServeArgs
from serve.problems import Problem
from serve.queries import WHOLE, Region

# The decoder's stable classes -> (HTTP status, our stable code). The rest is sound that cannot be used: 422 bad_audio.
CODES = {
    "EmptyFile": (422, "empty_upload"),
    "UnknownFormat": (415, "not_audio"),
    "TooLarge": (413, "upload_too_large"),
    "TooLong": (422, "audio_too_long"),
    "TooSlow": (422, "decode_too_slow"),
}


def decode_query(
    source: Any, sample_rate: int, window_s: float, args: ServeArgs, region: Region = WHOLE
) -> Iterator[Window]:
    """Decode a sound into windows of float32[S] mono samples, cut as the corpus was, one after the other.

    Args:
        source: the file's bytes in any format and rate, or what else `iter_windows` takes.
        sample_rate: of the result, in Hz.
        window_s: length of a window in seconds; the last may be shorter.
        args: the service's limits.
        region: the stretch of the file to take; the last window ends with it.

    Raises:
        Problem: 413, 415 or 422 with the decoder's reason; 422 `bad_region` when the file has nothing there.
    """
    limits = DecodeLimits(
        on_damage="fail",
        gaps_fail=False,  # a browser that was busy leaves some in what it records
        max_duration_s=args.max_audio_s,
        cpu_base_s=args.max_decode_s,
        cpu_per_audio_s=0.0,
    )
    start_s, given = region.start_s or 0.0, False
    try:
        for window in iter_windows(source, sample_rate, window_s, window_s, start_s, region.end_s, limits=limits):
            cut = window if region.end_s is None else _cut(window, region.end_s, sample_rate)
            if given and len(cut.samples) < len(window.samples) / 2:
                continue  # as the corpus is cut: a last window that is less than half full does not count
            given = True
            yield cut
    except DecodeError as error:
        raise decode_problem(error) from None
    if not given:
        raise Problem(422, "bad_region", f"there is no sound at {start_s:g} s: the file ends before that")


def _cut(window: Window, end_s: float, sample_rate: int) -> Window:
    samples = window.samples[: max(1, round((end_s - window.start_s) * sample_rate))]
    return replace(window, samples=samples, end_s=window.start_s + len(samples) / sample_rate)


def decode_problem(error: DecodeError) -> Problem:
    """A file that gives no audio, as an answer."""
    status, code = CODES.get(error.error_class, (422, "bad_audio"))
    return Problem(status, code, error.message, error_class=error.error_class, stage=error.stage)


def clip_vector(vectors: np.ndarray) -> np.ndarray:
    """The unit vector float32[dim] of a whole clip: the mean direction of its windows' float32[W, dim].

    The same rule by which `embed_corpus.py --per-file` embeds a file.
    """
    return clip_vectors(vectors, np.zeros(len(vectors), np.int64))[0]
