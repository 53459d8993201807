"""Byte ranges, media types and pictures of the service, and what it finds for an item."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from serve import media
from serve.arguments import ServeArgs
from serve.audio import clip_vector, decode_query
from serve.problems import Problem
from serve.queries import Region
from tests.timelines import mux

ARGS = ServeArgs(index="unused", max_audio_s=5.0)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, (0, 100)),
        ("bytes=0-", (0, 100)),
        ("bytes=10-19", (10, 20)),
        ("bytes=90-500", (90, 100)),
        ("bytes=-30", (70, 100)),
        ("bytes=-500", (0, 100)),
        ("bytes=20-10", (0, 100)),
        ("bytes=0-1,5-6", (0, 100)),
        ("seconds=0-1", (0, 100)),
    ],
)
def test_ranges(header: str | None, expected: tuple[int, int]) -> None:
    assert media.parse_range(header, 100) == expected


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=200-300", "bytes=-0"])
def test_ranges_outside_of_the_file(header: str) -> None:
    with pytest.raises(Problem) as caught:
        media.parse_range(header, 100)
    assert caught.value.status_code == 416
    assert caught.value.headers == {"Content-Range": "bytes */100"}


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("a/b.FLAC", "audio/flac"),
        ("x.m4a", "audio/mp4"),
        ("x.webm", "video/webm"),
        ("page.html", "application/octet-stream"),
        ("noext", "application/octet-stream"),
    ],
)
def test_only_media_types_are_named(uri: str, kind: str) -> None:
    assert media.media_type(uri) == kind


def test_chunks_of_a_range() -> None:
    data = bytes(range(256)) * 3000
    assert b"".join(media.chunks(io.BytesIO(data), 5, 700_000)) == data[5:700_000]


def test_a_picture_is_a_png_of_the_sound() -> None:
    time = np.arange(media.PICTURE_RATE) / media.PICTURE_RATE
    low, high = (
        media.spectrogram_png(np.sin(2 * np.pi * hertz * time).astype(np.float32)) for hertz in (200.0, 8000.0)
    )
    assert low[:8] == high[:8] == b"\x89PNG\r\n\x1a\n"
    assert low != high


@pytest.mark.parametrize("uri", ["gone.wav", "../outside.wav", "a/../../outside.wav", ""])
def test_files_outside_of_the_corpus_are_not_found(tmp_path: Path, uri: str) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "a").mkdir(parents=True)
    soundfile.write(tmp_path / "outside.wav", np.zeros(10), 8000)
    with pytest.raises(Problem) as caught:
        media.find(str(corpus), {"uri": uri})
    assert (caught.value.status_code, caught.value.code) == (404, "audio_missing")


def test_an_items_window_as_wav(tmp_path: Path) -> None:
    samples = np.linspace(-0.5, 0.5, 8000 * 4, dtype=np.float32)
    soundfile.write(tmp_path / "x.flac", samples, 8000)
    data = media.as_wav(tmp_path / "x.flac", {"start_s": 1.0, "end_s": 3.0})
    window, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == 8000
    np.testing.assert_allclose(window, samples[8000:24000], atol=1e-3)


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def test_an_upload_becomes_windows() -> None:
    windows = list(decode_query(wav(np.ones((8000 * 5, 2))), 16_000, 2.0, ARGS))
    assert [(window.start_s, window.end_s) for window in windows] == [(0, 2), (2, 4), (4, 5)]
    assert all(window.samples.dtype == np.float32 for window in windows)


def test_a_recording_in_which_the_browser_was_too_busy_for_a_moment_is_a_query(tmp_path: Path) -> None:
    mux(tmp_path / "live.webm", "webm", lambda time: time if time < 1.5 else time + 0.3)
    windows = list(decode_query((tmp_path / "live.webm").read_bytes(), 16_000, 2.0, ServeArgs(index="unused")))
    assert [window.start_s for window in windows][:2] == [0, 2]


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 422, "empty_upload"),
        (b"just some text, renamed to .wav" * 40, 415, "not_audio"),
        (wav(np.ones(8000))[:9000], 422, "bad_audio"),
        (wav(np.full(8000, np.nan)), 422, "bad_audio"),
        (wav(np.zeros(0)), 422, "bad_audio"),
        (wav(np.ones(8000 * 6)), 422, "audio_too_long"),
    ],
    ids=["empty", "text", "truncated", "nan", "no samples", "too long"],
)
def test_what_is_no_sound_is_refused_with_a_reason(data: bytes, status: int, code: str) -> None:
    with pytest.raises(Problem) as caught:
        list(decode_query(data, 16_000, 2.0, ARGS))
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.detail


@pytest.mark.parametrize(
    ("region", "spans"),
    [
        (Region(1.0, 1.5), [(1.0, 1.5)]),
        (Region(1.0, 4.0), [(1.0, 3.0), (3.0, 4.0)]),
        (Region(1.0, 3.4), [(1.0, 3.0)]),
        (Region(3.0), [(3.0, 5.0)]),
        (Region(None, 2.0), [(0.0, 2.0)]),
    ],
)
def test_a_region_is_cut_exactly(region: Region, spans: list[tuple[float, float]]) -> None:
    windows = decode_query(wav(np.ones(8000 * 5)), 16_000, 2.0, ARGS, region)
    assert [(window.start_s, window.end_s) for window in windows] == spans


def test_a_region_past_the_end_is_refused() -> None:
    with pytest.raises(Problem) as caught:
        list(decode_query(wav(np.ones(8000)), 16_000, 2.0, ARGS, Region(3.0, 4.0)))
    assert (caught.value.status_code, caught.value.code) == (422, "bad_region")


def test_silence_is_a_sound() -> None:
    (window,) = decode_query(wav(np.zeros(800)), 16_000, 2.0, ARGS)
    assert len(window.samples) == 1600


def test_a_clips_vector_is_the_mean_direction() -> None:
    vector = clip_vector(np.array([[1, 0], [0, 1]], np.float32))
    np.testing.assert_allclose(vector, [0.5**0.5, 0.5**0.5], rtol=1e-6)
