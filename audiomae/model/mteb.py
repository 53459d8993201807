"""Any AudioEncoder in MTEB / MAEB: `mteb.evaluate(MTEBAudioEncoder(encoder), tasks)`.

Audio tasks use the audio tower; text inputs (zero-shot, text-to-audio retrieval) need an encoder trained with a text
tower. Needs the `mteb` package; decoding its hosted audio datasets also needs its `audio` extra.
"""

from typing import Any

import numpy as np
import soxr
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction

from audiomae.model.encoder import AudioEncoder


class MTEBAudioEncoder(AbsEncoder):
    """MTEB's encoder protocol around an `AudioEncoder`; similarity is cosine."""

    def __init__(self, encoder: AudioEncoder | str, revision: str | None = None, device: str | None = None) -> None:
        """Args: encoder: a loaded encoder, or what `AudioEncoder.load` takes. revision: ignored, MTEB passes one."""
        self.encoder = encoder if isinstance(encoder, AudioEncoder) else AudioEncoder.load(encoder, device or "auto")
        self.mteb_model_meta = describe(self.encoder)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """A DataLoader of MTEB batches -> float32 [N, dim], unit length.

        Args:
            inputs: batches with `audio` (items with `array` [S] or [channels, S] and `sampling_rate`), or `text`.
            kwargs: `batch_size` is used; the rest of MTEB's options do not concern an audio encoder.

        Raises:
            ValueError: a batch has neither audio nor text.
            RuntimeError: text for an encoder without a text tower.
        """
        parts = [self._encode_batch(batch, int(kwargs.get("batch_size", 32))) for batch in inputs]
        return np.concatenate(parts) if parts else np.zeros((0, self.encoder.dim), np.float32)

    def _encode_batch(self, batch: dict[str, Any], batch_size: int) -> np.ndarray:
        if "audio" in batch:
            clips = [self._waveform(item) for item in batch["audio"]]
            return self.encoder.embed(clips, batch_size=batch_size)
        if "text" in batch:
            return self.encoder.embed_text(list(batch["text"]))
        raise ValueError(f"MTEB batch: expected audio or text, got {sorted(batch)}: this encoder hears and reads only")

    def _waveform(self, item: Any) -> np.ndarray:
        """Mono float32[S] at the encoder's rate, by the resampler that the rest of the product uses."""
        samples, rate = np.asarray(item["array"], dtype=np.float32), int(item["sampling_rate"])
        if samples.ndim == 2:
            samples = samples.mean(axis=0)
        return (
            samples
            if rate == self.encoder.sample_rate
            else soxr.resample(samples, rate, self.encoder.sample_rate, "HQ")
        )


def describe(encoder: AudioEncoder) -> ModelMeta:
    """MTEB's model card of an encoder; its revision is the fingerprint."""
    return ModelMeta.create_empty(
        {
            "name": f"audiomae/{encoder.config.backbone.kind}-{encoder.fingerprint[:12]}",
            "revision": encoder.fingerprint,
            "n_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
            "embed_dim": encoder.dim,
            "framework": ["PyTorch"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "modalities": ["audio", "text"] if encoder.has_text else ["audio"],
            "use_instructions": False,
        }
    )
