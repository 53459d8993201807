"""Search audio by sound: train an AudioMAE++ encoder, embed a corpus, index it, serve it.

    from audiomae import AudioEncoder, AudioIndex

Importing this package does nothing: torch, faiss and the rest load when one of the two names is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audiomae.model.encoder import AudioEncoder
    from audiomae.search.audio_index import AudioIndex

__all__ = ["AudioEncoder", "AudioIndex"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name == "AudioEncoder":
        from audiomae.model.encoder import AudioEncoder

        return AudioEncoder
    if name == "AudioIndex":
        from audiomae.search.audio_index import AudioIndex

        return AudioIndex
    raise AttributeError(f"module 'audiomae' has no attribute {name!r}; it exports AudioEncoder and AudioIndex")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
