"""Embedding sets, tiny encoders and releases for tests of what comes after embedding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from audiomae import storage
from audiomae.artifacts import releases as release
from audiomae.artifacts.embeddings import EmbeddingSet, ShardOrigin, ShardTables, commit_shard, write_run
from audiomae.artifacts.releases import Release
from audiomae.artifacts.tables import EmbedSettings, embedding_schema, vectors_to_column
from audiomae.corpus.manifest import clip_id
from audiomae.search import build
from audiomae.search.build_plan import BuildOptions, make_plan

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
            "id": pa.array([clip_id(uri, 0.0, 0.0) for uri in uris], pa.int64()),
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
    storage.write_json(directory / "manifest" / f"plan-{generation:06d}.json", plan)
    for number, name in enumerate(fresh):
        piece = table.slice(edges[number], edges[number + 1] - edges[number]).cast(schema)
        origin = ShardOrigin(inputs=piece.num_rows, audio_s=0.0, fingerprint=fingerprint, manifest="m")
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
    index_dir: Path, sets: Sequence[EmbeddingSet], delete: Sequence[int] = (), **settings: Any
) -> Release | None:
    """What build_index.py does, in this process and without an encoder or a look at recall."""
    config = BuildOptions(**settings)
    base = release.resolve_or_none(index_dir)
    work = make_plan(sets, base, np.array(delete, dtype=np.int64), config)
    if work is None:
        return None
    parts_dir = str(index_dir / "parts")
    for part in work.parts:
        build.write_rows(part, parts_dir)
    trained = None
    if work.spec.kind == "ivf":
        base_trained = str(work.base.path / "trained.faiss") if work.base else ""
        trained = base_trained or build.train(work.spec, work.parts, parts_dir, config.seed)
        for part in work.parts:
            build.index_part(part, parts_dir, trained)
    with release.staging(index_dir) as staging:
        dim = int(base.info["dim"]) if base else sets[0].dim
        build.assemble(work, parts_dir, trained, dim, staging)
        fingerprint = base.fingerprint if base else sets[0].fingerprint
        storage.write_json(staging / "encoder" / "config.json", {"fingerprint": fingerprint})
        spec = work.spec if work.spec.nprobe > 1 else work.spec.model_copy(update={"nprobe": 8})
        facts = {
            "fingerprint": fingerprint,
            "dim": dim,
            "rows": 0,
            "corpora": work.corpora,
            "spec": spec.model_dump(),
            "recall": {"value": 1.0},
        }
        return release.publish(index_dir, staging, facts, base)
