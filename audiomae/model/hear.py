"""The HEAR 2021 interface (hearbenchmark.com/hear-api.html), so that any encoder runs in its evaluation kit.

    import audiomae.model.hear as hear
    model = hear.load_model("runs/first/encoder")           # or official:PATH, timm:...
    vectors = hear.get_scene_embeddings(audio, model)        # audio: float32 [n_sounds, n_samples] at model.sample_rate

Embeddings are the pooled tokens before projection and normalisation, as HEAR's linear probes expect and as the official
AudioMAE++ wrapper returns them.
"""

import torch
from torch import Tensor

from audiomae.model.encoder import AudioEncoder


def load_model(model_file_path: str = "", device: str = "auto") -> AudioEncoder:
    """Load any encoder, in float32 on every device.

    The result has `sample_rate`, `scene_embedding_size` and `timestamp_embedding_size`.

    Raises:
        ValueError: no path was given: the package carries no weights of its own.
    """
    if not model_file_path:
        raise ValueError("load_model: expected an encoder directory, official:PATH or timm:NAME, got an empty path")
    return AudioEncoder.load(model_file_path, device=device, dtype="float32")


@torch.inference_mode()
def get_scene_embeddings(audio: Tensor, model: AudioEncoder) -> Tensor:
    """One vector a sound: float32 [n_sounds, n_samples] -> float32 [n_sounds, model.scene_embedding_size]."""
    with model.autocast():
        x, frame_lengths = model.features(_checked(audio, model))
        return model.pool_spectrogram(x, frame_lengths).float()


@torch.inference_mode()
def get_timestamp_embeddings(audio: Tensor, model: AudioEncoder) -> tuple[Tensor, Tensor]:
    """One vector a time step of patches (40 ms for the official layout).

    Returns:
        embeddings float32 [n_sounds, T, model.timestamp_embedding_size], the bands of a step side by side; and
        timestamps float32 [n_sounds, T], milliseconds from the start, the sound's length divided evenly.
    """
    audio = _checked(audio, model)
    with model.autocast():
        x, frame_lengths = model.features(audio)
        embeddings = model.pooling.by_time(model.token_sequence(x, frame_lengths).tokens[:, 1:]).float()
    steps = embeddings.shape[1]
    step_ms = audio.shape[1] / model.sample_rate * 1000 / steps
    timestamps = torch.arange(steps, device=embeddings.device) * step_ms
    return embeddings, timestamps.expand(len(audio), -1)


def _checked(audio: Tensor, model: AudioEncoder) -> Tensor:
    if audio.dim() != 2 or audio.shape[1] == 0:
        raise ValueError(f"audio: expected float32 [n_sounds, n_samples], got {list(audio.shape)}: batch the sounds")
    return audio.to(model.device)
