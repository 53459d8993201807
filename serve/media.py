"""The sound of an item, as its file or as a picture. Files are found by what the release says, never by the request."""

import io
import mimetypes
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
from starlette.responses import Response, StreamingResponse

from audiomae.corpus.decode import decode, probe
from audiomae.corpus.manifest import open_source
from audiomae.errors import DecodeError
from serve.audio import decode_problem
from serve.catalogue import EXAMPLES, Catalogue
from serve.problems import Problem

CHUNK_BYTES = 256 << 10
MAX_WAV_S, MAX_WAV_RATE = 600.0, 48_000
PICTURE_S, PICTURE_RATE, PICTURE_MELS, PICTURE_COLUMNS = 60.0, 22_050, 96, 480
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=300"}
TYPES = {".m4a": "audio/mp4", ".flac": "audio/flac", ".ogg": "audio/ogg", ".opus": "audio/ogg", ".caf": "audio/x-caf"}
OUTLINE_RATE, OUTLINE_POINTS = 8_000, 240
_RANGE = re.compile(r"bytes=(\d*)-(\d*)$")


def audio_response(root: str, row: dict[str, Any], format: str, range_header: str | None) -> Response:
    """The item's file as it is (`original`), or its window decoded (`wav`, mono, at most 10 minutes and 48 kHz).

    Raises:
        Problem: 404 when the file has gone, 416 for a range outside of it, 422 when it cannot be decoded.
    """
    source = find(root, row)
    if format == "wav":
        return ranged(io.BytesIO(as_wav(source, row)), range_header, "audio/wav")
    if isinstance(source, Path):
        file: BinaryIO = source.open("rb")
    else:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
    return ranged(file, range_header, media_type(row["uri"]))


def playable_examples(catalogue: Catalogue) -> list[dict[str, Any]]:
    """The first few of a release's examples whose files are still where the corpus was."""
    found = []
    for row in catalogue.examples:
        try:
            find(catalogue.index.corpus_root(row), row)
        except Problem:
            continue
        found.append(row)
        if len(found) == EXAMPLES:
            break
    return found


def spectrogram_response(root: str, row: dict[str, Any]) -> Response:
    """A PNG of the item's first minute: log-mel, time to the right, pitch upwards."""
    source = find(root, row)
    seconds = min(row["end_s"] - row["start_s"], PICTURE_S)
    try:
        samples = decode(source, PICTURE_RATE, row["start_s"], seconds)
    except DecodeError as error:
        raise decode_problem(error) from None
    return Response(spectrogram_png(samples), media_type="image/png", headers=HEADERS)


def waveform(root: str, row: dict[str, Any]) -> dict[str, Any]:
    """The outline of an item's file (`WaveformResponse`): all of it up to a minute, else the minute around it."""
    source = find(root, row)
    try:
        length = probe(source).duration_s
        end = max(length or 0.0, row["end_s"])
        start = (
            0.0 if end <= PICTURE_S else min(max(0.0, (row["start_s"] + row["end_s"] - PICTURE_S) / 2), end - PICTURE_S)
        )
        samples = np.abs(decode(source, OUTLINE_RATE, start, min(PICTURE_S, end - start)))
    except DecodeError as error:
        raise decode_problem(error) from None
    edges = np.linspace(0, len(samples), OUTLINE_POINTS + 1).astype(int)
    peaks = [float(samples[a : max(b, a + 1)].max(initial=0.0)) for a, b in pairwise(edges)]
    end_s = start + len(samples) / OUTLINE_RATE
    return {"start_s": start, "end_s": end_s, "duration_s": length, "peaks": [round(peak, 4) for peak in peaks]}


def find(root: str, row: dict[str, Any]) -> Path | bytes | BinaryIO:
    """The corpus file of an item.

    Raises:
        Problem: 404 `audio_missing` when the corpus no longer has it, or when a relative `uri` leads out of the corpus.
    """
    uri = row["uri"]
    missing = Problem(404, "audio_missing", f"{uri!r} is not where the corpus was when it was embedded")
    try:
        source = open_source(root, uri, row.get("tar_offset"), row.get("size"))
    except DecodeError as error:
        raise missing from error
    if isinstance(source, Path):
        inside = os.path.isabs(uri) or Path(os.path.abspath(source)).is_relative_to(os.path.abspath(root))
        if not inside or not source.is_file():
            raise missing
    return source


def as_wav(source: Path | bytes | BinaryIO, row: dict[str, Any]) -> bytes:
    """The item's window as a 16-bit mono WAV file, which every browser plays."""
    try:
        rate = min(probe(source).sample_rate, MAX_WAV_RATE)
        samples = decode(source, rate, row["start_s"], min(row["end_s"] - row["start_s"], MAX_WAV_S))
    except DecodeError as error:
        raise decode_problem(error) from None
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def spectrogram_png(samples: np.ndarray) -> bytes:
    """Draw float32[S] mono samples at 22,050 Hz: mels upwards, the loudest 80 dB in colour."""
    import librosa
    from matplotlib.image import imsave

    hop = max(256, -(-len(samples) // PICTURE_COLUMNS))
    mel = librosa.feature.melspectrogram(
        y=samples, sr=PICTURE_RATE, n_fft=2048, hop_length=hop, n_mels=PICTURE_MELS, power=2.0, htk=True
    )
    file = io.BytesIO()
    imsave(file, librosa.power_to_db(mel, ref=np.max, top_db=80.0), cmap="magma", origin="lower", format="png")
    return file.getvalue()


def warm_up() -> None:
    """Pay for the imports of the first picture (seconds) before somebody waits for it."""
    spectrogram_png(np.ones(PICTURE_RATE, np.float32))


def media_type(uri: str) -> str:
    """The type of an audio or video file by its name; anything else is plain bytes, so that no page is ever served."""
    known = TYPES.get(Path(uri).suffix.lower()) or mimetypes.guess_type(uri)[0] or ""
    return known if known.startswith(("audio/", "video/")) else "application/octet-stream"


def ranged(file: BinaryIO, range_header: str | None, kind: str) -> Response:
    """A seekable binary file, or the one byte range of it that is asked for (RFC 9110)."""
    size = file.seek(0, os.SEEK_END)
    try:
        start, end = parse_range(range_header, size)
    except Problem:
        file.close()
        raise
    headers = {**HEADERS, "Accept-Ranges": "bytes", "Content-Length": str(end - start)}
    if (start, end) == (0, size):
        return StreamingResponse(chunks(file, 0, size), media_type=kind, headers=headers)
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return StreamingResponse(chunks(file, start, end), 206, media_type=kind, headers=headers)


def parse_range(header: str | None, size: int) -> tuple[int, int]:
    """First and one-past-last byte of a `Range` header; everything when there is none or it is not one byte range.

    Raises:
        Problem: 416 when it lies outside of the file.
    """
    match = _RANGE.match(header.strip()) if header else None
    if match is None or match.groups() == ("", ""):
        return 0, size
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return 0, size
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= end:
        detail = f"range {header!r} of a file of {size:,} bytes"
        raise Problem(416, "bad_range", detail, headers={"Content-Range": f"bytes */{size}"})
    return start, end


def chunks(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """The bytes [start, end) in pieces; closes the file."""
    with file:
        file.seek(start)
        while start < end and (data := file.read(min(CHUNK_BYTES, end - start))):
            start += len(data)
            yield data
