"""The text tower: sentences -> vectors, for CLAP-style training and for text queries. Needs the `text` extra."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiomae.errors import ModelError, in_short
from audiomae.model.encoder_config import TextConfig


class TextTower:
    """A frozen transformers encoder with mean pooling over real tokens (Reimers and Gurevych 2019, "Sentence-BERT")."""

    def __init__(
        self, config: TextConfig, source: str | Path | None = None, device: str | torch.device = "cpu"
    ) -> None:
        """Load the model from `source` (a directory), or from `config.model` when None.

        Raises:
            ModelError: transformers is missing, the model cannot be loaded, or its width is not `config.dim`.
        """
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise ModelError(
                f"text needs the `text` extra, which is not installed ({error}): pip install '.[text]'"
            ) from None
        name = str(source or config.model)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
            self._model: Any = AutoModel.from_pretrained(name, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"text model {name!r} cannot be loaded ({in_short(error)}); give a hub name that is reachable "
                "from here, or a local directory in the transformers layout"
            ) from None
        width = self._model.config.hidden_size
        if width != config.dim:
            raise ModelError(
                f"text model {name!r}: its width is {width}, the config says text.dim={config.dim}: set {width}"
            )
        self.config = config
        self._model.eval().requires_grad_(False).to(device)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self._model.parameters()).device

    def to(self, device: str | torch.device) -> "TextTower":
        """Move the model; returns self."""
        self._model.to(device)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Texts -> float32 [B, dim], not normalised; padding tokens are masked out of attention and of the mean."""
        vectors = [self._encode_batch(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        return torch.cat(vectors) if vectors else torch.zeros(0, self.config.dim, device=self.device)

    def _encode_batch(self, texts: Sequence[str]) -> Tensor:
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.config.max_tokens, return_tensors="pt"
        ).to(self.device)
        hidden = self._model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

    def save(self, directory: str | Path) -> None:
        """Write model and tokenizer to a local directory that `TextTower(config, directory)` reads."""
        self._model.save_pretrained(directory)
        self._tokenizer.save_pretrained(directory)
