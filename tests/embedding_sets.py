"""Embedding sets, tiny encoders and releases for tests of what comes after embedding."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from audiomae import storage
from audiomae.artifacts import releases as release
from audiomae.artifacts.embeddings import EmbeddingSet, ShardOrigin, ShardTables, commit_shard, plans, write_run
from audiomae.artifacts.releases import Release
from audiomae.artifacts.tables import EmbedSettings, embedding_schema, vectors_to_column
from audiomae.corpus.manifest import clip_id
from audiomae.search import build
from audiomae.search.build_plan import make_plan
from audiomae.search.plan import Request
from audiomae.search.spec import BuildOptions

if TYPE_CHECKING:
    from audiomae.model.encoder import AudioEncoder


def clusters(count: int, dim: int, seed: int = 0, centres: int = 50, spread: float = 0.5) -> np.ndarray:
    """Clustered unit vectors, float32[count, dim]: the same centres for every seed."""
    middle = np.random.default_rng(99).standard_normal((centres, dim))
    rng = np.random.default_rng(seed)
    vectors = middle[rng.integers(0, centres, count)] + spread * rng.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make_set(
    directory: Path,
    vectors: np.ndarray,
    *,
    names: Sequence[str] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    root: str = "/corpus",
    fingerprint: str = "f" * 64,
    encoder: str = "nowhere",
    shards: int = 3,
    generation: int = 0,
    kept: Sequence[str] = (),
    ids: Sequence[int] | None = None,
    precision: str | None = "float32",
) -> EmbeddingSet:
    """An embedding set with these vectors (row i is the whole file `names[i]`), as embed_corpus.py leaves it.

    A later `generation` in the same folder stands for an update: `kept` are the older shards still in force.
    """
    uris = list(names) if names is not None else [f"{i:06d}.wav" for i in range(len(vectors))]
    settings = EmbedSettings(
        fingerprint=fingerprint, dim=vectors.shape[1], sample_rate=16000, mode="file", window_s=0.0, hop_s=0.0
    )
    table = pa.table(
        {
            "id": pa.array(ids or [clip_id(uri, 0.0, 0.0) for uri in uris], pa.int64()),
            "uri": uris,
            "start_s": np.zeros(len(uris)),
            "end_s": np.full(len(uris), 5.0),
            "embedding": vectors_to_column(vectors.astype(np.float32)),
        }
        | {name: list(values) for name, values in (columns or {}).items()}
    )
    schema = embedding_schema(settings, [table.schema.field(name) for name in columns or {}])
    edges = np.linspace(0, len(uris), shards + 1).astype(int)
    fresh = [f"{generation:06d}-{number:06d}" for number in range(shards)]
    plan = {
        "generation": generation,
        "settings": settings.model_dump(),
        "shards": [{"name": name} for name in [*kept, *fresh]],
        "files": [],
    }
    run = {"fingerprint": fingerprint, "dim": vectors.shape[1], "encoder": encoder, "corpus_root": root}
    write_run(directory, run)
    assert plans(directory).create(generation, plan)
    for number, name in enumerate(fresh):
        piece = table.slice(edges[number], edges[number + 1] - edges[number]).cast(schema)
        made = {"fingerprint": fingerprint, "manifest": "m", "precision": precision}
        origin = ShardOrigin(inputs=piece.num_rows, audio_s=0.0, **made)
        commit_shard(directory, name, ShardTables(piece), origin)
    return EmbeddingSet.open(directory)


def tiny_encoder(directory: Path, seed: int = 0) -> "AudioEncoder":
    """A saved, untrained encoder that makes vectors of 32 dimensions in no time."""
    from audiomae.model.audiomae import AudioMAEConfig
    from audiomae.model.encoder import AudioEncoder, EncoderConfig

    backbone = AudioMAEConfig(embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_heads=2)
    encoder = AudioEncoder.from_config(EncoderConfig(backbone=backbone), seed=seed)
    encoder.save(directory)
    return encoder


def make_release(
    index_dir: Path | str,
    sets: Sequence[EmbeddingSet],
    delete: Sequence[int] = (),
    undelete: Sequence[int] = (),
    remove: Sequence[str] = (),
    save_encoder: Callable[[Path], Any] | None = None,
    **settings: Any,
) -> Release | None:
    """What build_index.py does, in this process and without a bound on recall; no encoder unless one is saved."""
    config = BuildOptions(**{"recall": 0, "queries": 20, "filter_queries": 0, "map": False} | settings)
    base = release.resolve_or_none(index_dir)
    request = Request(np.array(delete, np.int64), np.array(undelete, np.int64), tuple(remove))
    work = make_plan(sets, base, request, config)
    if work is None:
        return None
    fingerprint = base.fingerprint if base else sets[0].fingerprint
    facts = {"fingerprint": fingerprint, "dim": int(base.info["dim"]) if base else sets[0].dim}

    def save_none(target: Path) -> None:
        storage.write_json(target / "config.json", {"fingerprint": fingerprint})

    return build.run_build(work, str(index_dir), config, build.run_here, save_encoder or save_none, facts)
