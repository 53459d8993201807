"""Encoded audio for tests: a signal that never repeats itself, in any codec that the installed libraries can write."""

from pathlib import Path

import av
import numpy as np
import soundfile


def signal(rate: int, seconds: float, seed: int = 0) -> np.ndarray:
    """float32[samples]: a wandering tone and gated noise, so that no two windows are alike."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(rate * seconds)) / rate
    tone = 0.3 * np.sin(2 * np.pi * (200 + 150 * np.sin(time)) * time)
    return (tone + 0.1 * rng.standard_normal(len(time)) * (np.sin(5 * time) > 0)).astype(np.float32)


def encode(
    path: Path,
    codec: str,
    rate: int,
    samples: np.ndarray,
    layout: str = "mono",
    container: str | None = None,
    bit_rate: int | None = None,
    options: dict[str, str] | None = None,
    muxer_options: dict[str, str] | None = None,
) -> Path:
    """Write mono `samples` (taken to be at `rate`) with FFmpeg."""
    with av.open(str(path), "w", format=container, options=muxer_options or {}) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout, options=options or {})
        if bit_rate:
            stream.bit_rate = bit_rate
        context = stream.codec_context
        context.open()
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(
            format=context.format, layout=layout, rate=rate, frame_size=context.frame_size or 1024
        )
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            for packet in stream.encode(piece):
                file.mux(packet)
        for packet in stream.encode(None):
            file.mux(packet)
    return path


# name: (codec, rate, layout, container, bit rate, codec options)
FFMPEG_CASES = {
    "m4a": ("aac", 44100, "stereo", None, 128_000, {}),
    "alac.m4a": ("alac", 48000, "mono", None, None, {}),
    "mp4": ("aac", 48000, "mono", None, 96_000, {}),
    "aac": ("aac", 22050, "mono", "adts", 64_000, {}),
    "3gp": ("amr_nb", 8000, "mono", None, 12_200, {}),
    "amr": ("amr_nb", 8000, "mono", None, 12_200, {}),
    "wma": ("wmav2", 44100, "stereo", "asf", 128_000, {}),
    "webm": ("libopus", 48000, "stereo", None, 64_000, {}),
    "voice.opus": ("libopus", 48000, "mono", "ogg", 12_000, {"application": "voip"}),
    "ac3": ("ac3", 48000, "stereo", None, 128_000, {}),
    "wv": ("wavpack", 44100, "stereo", None, None, {}),
    "tta": ("tta", 44100, "stereo", None, None, {}),
    "mp2": ("mp2", 44100, "stereo", None, 128_000, {}),
    "mka": ("flac", 44100, "stereo", "matroska", None, {}),
    "ts": ("aac", 44100, "stereo", "mpegts", 96_000, {}),
    "avi": ("pcm_s16le", 44100, "stereo", None, None, {}),
    "low.mp3": ("libmp3lame", 44100, "mono", None, 32_000, {}),
    "vbr.mp3": ("libmp3lame", 44100, "mono", None, None, {"global_quality": "472", "flags": "+qscale"}),
}
# name: (libsndfile format, subtype, rate, channels)
SNDFILE_CASES = {
    "u8.wav": ("WAV", "PCM_U8", 8000, 1),
    "16.wav": ("WAV", "PCM_16", 44100, 2),
    "24.wav": ("WAV", "PCM_24", 48000, 1),
    "32.wav": ("WAV", "PCM_32", 22050, 1),
    "f32.wav": ("WAV", "FLOAT", 44099, 1),
    "f64.wav": ("WAV", "DOUBLE", 96000, 1),
    "ima.wav": ("WAV", "IMA_ADPCM", 22050, 2),
    "ms.wav": ("WAV", "MS_ADPCM", 11025, 1),
    "gsm.wav": ("WAV", "GSM610", 8000, 1),
    "mulaw.au": ("AU", "ULAW", 8000, 1),
    "aiff": ("AIFF", "PCM_24", 44100, 2),
    "w64": ("W64", "PCM_16", 32000, 6),
    "rf64": ("RF64", "PCM_16", 16000, 1),
    "caf": ("CAF", "ALAC_16", 44100, 2),
    "flac": ("FLAC", "PCM_24", 96000, 2),
    "ogg": ("OGG", "VORBIS", 44100, 2),
    "opus": ("OGG", "OPUS", 48000, 1),
    "mp3": ("MP3", "MPEG_LAYER_III", 44100, 2),
    "low_rate.mp3": ("MP3", "MPEG_LAYER_III", 8000, 1),
}
ALL_CASES = [*SNDFILE_CASES, *FFMPEG_CASES, "no_header.mp3"]


def write_case(folder: Path, name: str, seconds: float = 4.0) -> Path:
    """One file of `ALL_CASES`: `signal` in that codec, other channels softer."""
    path = folder / f"case.{name}"
    if path.exists():
        return path
    if name in SNDFILE_CASES:
        kind, subtype, rate, channels = SNDFILE_CASES[name]
        mono = signal(rate, seconds)
        samples = np.stack([mono * 0.9**channel for channel in range(channels)], axis=1)
        soundfile.write(path, samples, rate, format=kind, subtype=subtype)
        return path
    if name == "no_header.mp3":  # variable rate and nothing in the file that says how long it is
        options = {"global_quality": "472", "flags": "+qscale"}
        return encode(
            path, "libmp3lame", 44100, signal(44100, seconds), options=options, muxer_options={"write_xing": "0"}
        )
    codec, rate, layout, container, bit_rate, options = FFMPEG_CASES[name]
    return encode(path, codec, rate, signal(rate, seconds), layout, container, bit_rate, options)
