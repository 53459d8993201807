"""Which index suits how many vectors and how much memory. Deciding costs nothing: no index library is loaded here."""

import math
import re
from typing import Literal

from pydantic import Field

from audiomae.config import StrictConfig, shown_as
from audiomae.errors import ConfigError, UserError

FLAT_MAX_ROWS = 20_000  # up to here an exact scan takes about a millisecond
ROWS_PER_LIST = 30  # k-means wants as many to train a list


class BuildOptions(StrictConfig):
    """How an index is built."""

    recall: float = Field(0.95, ge=0, description="recall@10 that held-out queries must reach, or nothing is published")
    memory_gib: float | None = Field(
        None, gt=0, description="RAM that the index may take where it is served, in GiB; null = no limit"
    )
    index: str | None = Field(
        None,
        description="a FAISS factory string instead of the choice by size: Flat, IVF4096,SQ8, IVF,RaBitQfs, HNSW32,SQ8",
        json_schema_extra=shown_as("FACTORY"),
    )
    rows_per_part: int = Field(250_000, gt=0, description="rows of one build task, which holds them in memory")
    min_parts: int = Field(2, gt=0, description="number of parts that even a small build is cut into")
    segment_rows: int = Field(16_000_000, gt=0, description="most rows of a segment")
    fan_in: int = Field(4, ge=2, description="as many segments of about one size (within a factor of 4) become one")
    flat_max_rows: int = Field(
        FLAT_MAX_ROWS,
        ge=100,
        description="up to this many rows the vectors are searched exhaustively, without an index before them",
    )
    compact_share: float = Field(
        0.1, ge=0, le=1, description="share of deleted rows above which a segment is written again without them"
    )
    queries: int = Field(500, gt=0, description="held-out queries to measure recall with")
    filter_queries: int = Field(40, ge=0, description="queries to measure filtered recall with, for every filter")
    map: bool = Field(True, description="draw the map of the sounds that the page shows")
    keep_versions: int = Field(3, ge=1, description="how many versions stay when a build is done")
    allow_mixed_precision: bool = Field(
        False, description="index vectors computed in different precisions together; release.json records it"
    )
    seed: int = Field(0, description="seed of the training sample and of k-means")


class IndexSpec(StrictConfig):
    """What an index is made of and how it is searched.

    Attributes:
        kind: the row store alone (`flat`), inverted lists before it (`ivf`), or a graph per segment (`hnsw`).
        factory: FAISS's own description of it ("" for the row store alone).
        nlist, nprobe: how many inverted lists there are, and how many a search looks at.
        refine: how many candidates per hit are rescored on the row store.
        effort: efSearch of a graph.
        caution: how much wider than a normal distribution the filter planner takes lists to be; a build measures it.
        bytes_in_memory: what a vector costs in RAM (the row store is mapped and not counted).
    """

    kind: Literal["flat", "ivf", "hnsw"]
    factory: str = ""
    nlist: int = 0
    nprobe: int = 0
    refine: int = 1
    effort: int = 0
    caution: float = 1.0
    bytes_in_memory: int = 0


def choose(
    num_vectors: int,
    dim: int,
    memory_gib: float | None = None,
    flat_max_rows: int = FLAT_MAX_ROWS,
    factory: str | None = None,
) -> IndexSpec:
    """The index for this many vectors within this much memory.

    Small ones are the float16 row store alone. Larger ones are an inverted file with one bit a component and fast
    scanning (RaBitQ), whose candidates are rescored on the row store: of all that was measured (docs/scale.md) it is
    the smallest and, at equal recall, no slower than any that takes ten times the memory. `nprobe` and `refine` are a
    start; a build tunes them to the recall asked for.

    Args:
        num_vectors, dim: how many of which length.
        memory_gib: what the served index may take; None for any.
        flat_max_rows: up to so many rows the row store is searched exhaustively.
        factory: a FAISS factory string instead: "Flat", "IVF4096,SQ8", "IVF,RaBitQfs" (lists by size), "HNSW32,SQ8".

    Raises:
        ConfigError: a factory string of another kind. UserError: it does not fit, with the least memory that would do.
    """
    if factory is None and num_vectors <= flat_max_rows:
        return IndexSpec(kind="flat")
    spec = _from_factory(factory or "IVF,RaBitQfs", num_vectors, dim)
    needed = num_vectors * spec.bytes_in_memory + spec.nlist * dim * 2
    if memory_gib is not None and needed > memory_gib * 2**30:
        raise UserError(
            f"{num_vectors:,} vectors of {dim} dimensions need at least {needed / 2**30:.2f} GiB of index memory "
            f"as {spec.factory}, got --memory-gib {memory_gib}: allow more, or split the corpus over several indexes"
        )
    return spec


def lists_for(num_vectors: int) -> int:
    """How many inverted lists suit so many vectors: near sqrt(N), and no more than can be trained.

    With one-bit codes preparing a list for a query costs as much as scanning 200 of its rows, so fewer and larger
    lists than the usual 4 sqrt(N) are no slower to search, and several times faster to train and to fill.
    """
    return min(2 ** round(math.log2(math.sqrt(num_vectors))), 2 ** int(math.log2(num_vectors / ROWS_PER_LIST)))


def _from_factory(factory: str, num_vectors: int, dim: int) -> IndexSpec:
    if factory == "Flat":
        return IndexSpec(kind="flat")
    found = re.fullmatch(r"IVF(\d*),(RaBitQfs|RaBitQ|SQfp16|SQ8|SQ4|Flat)", factory)
    if found:
        nlist = int(found[1] or lists_for(num_vectors))
        codec = found[2]
        size = {
            "RaBitQfs": math.ceil(dim / 8) + 8,
            "RaBitQ": math.ceil(dim / 8) + 8,
            "SQfp16": 2 * dim,
            "SQ8": dim,
            "SQ4": math.ceil(dim / 2),
            "Flat": 4 * dim,
        }[codec]
        padding = math.ceil(16 * nlist / num_vectors * size) if codec == "RaBitQfs" else 0  # blocks of 32 rows
        refine = {"SQfp16": 1, "Flat": 1, "SQ8": 2}.get(codec, 4)
        return IndexSpec(
            kind="ivf",
            factory=f"IVF{nlist},{codec}",
            nlist=nlist,
            nprobe=1,
            refine=refine,
            bytes_in_memory=size + 8 + padding,
        )
    found = re.fullmatch(r"HNSW(\d+)(?:,(Flat|SQfp16|SQ8))?", factory)
    if found:
        code = {"SQfp16": 2 * dim, "SQ8": dim}.get(found[2] or "Flat", 4 * dim)
        size = code + int(found[1]) * 2 * 4 + 24
        refine = 2 if found[2] == "SQ8" else 1
        return IndexSpec(kind="hnsw", factory=factory, refine=refine, effort=32, bytes_in_memory=size)
    raise ConfigError(
        f"--index {factory}: expected Flat, IVF<lists>,<codes> with codes RaBitQfs, RaBitQ, SQfp16, SQ8, SQ4 or Flat "
        "(IVF, without a number for lists by size), or HNSW<links> with ,SQ8 or ,SQfp16 after it"
    )
