"""Which index suits how many vectors and how much memory. Deciding costs nothing: no index library is loaded here."""

import math
from typing import Literal

from pydantic import Field

from audiomae.config import StrictConfig
from audiomae.errors import UserError

FLAT_MAX_ROWS = 20_000  # up to here an exact scan takes about a millisecond


class BuildOptions(StrictConfig):
    """How an index is built."""

    recall: float = Field(0.95, ge=0, description="recall@10 that held-out queries must reach, or nothing is published")
    memory_gib: float | None = Field(
        None, gt=0, description="RAM that the index may take where it is served, in GiB; null = no limit"
    )
    rows_per_part: int = Field(250_000, gt=0, description="rows of one build task, which holds them in memory")
    min_parts: int = Field(2, gt=0, description="into how many parts even a small build is cut")
    flat_max_rows: int = Field(
        FLAT_MAX_ROWS,
        ge=100,
        description="up to this many rows the vectors are searched exhaustively, without an index before them",
    )
    compact_share: float = Field(
        0.1, ge=0, le=1, description="share of deleted rows above which everything is rebuilt without them"
    )
    queries: int = Field(500, gt=0, description="held-out queries to measure recall with")
    keep_parts: bool = Field(True, description="leave the parts of the newest build in INDEX/parts")
    seed: int = Field(0, description="of the training sample and k-means")


class IndexSpec(StrictConfig):
    """What an index is made of and how it is searched.

    `factory` is FAISS's own description of it ("" for the row store alone); `refine` times k candidates are rescored
    exactly; `bytes_in_memory` is what a vector costs in RAM (the row store is mapped and not counted).
    """

    kind: Literal["flat", "ivf"]
    factory: str = ""
    nlist: int = 0
    nprobe: int = 0
    refine: int = 1
    bytes_in_memory: int = 0


def choose(
    num_vectors: int, dim: int, memory_gib: float | None = None, flat_max_rows: int = FLAT_MAX_ROWS
) -> IndexSpec:
    """The index for this many vectors within this much memory.

    The first that fits: the float16 row store alone (small), then an inverted file with 4 sqrt(N) lists and 16, 8 or
    4 bits a component. `nprobe` is a starting point; a build tunes it to the recall asked for.

    Raises:
        UserError: when nothing fits, with the least memory that would do.
    """
    if num_vectors <= flat_max_rows:
        return IndexSpec(kind="flat")
    nlist = min(2 ** round(math.log2(4 * math.sqrt(num_vectors))), 2 ** int(math.log2(num_vectors / 39)))
    budget = math.inf if memory_gib is None else memory_gib * 2**30
    needed = 0.0
    for codec, bits, refine in (("SQfp16", 16, 1), ("SQ8", 8, 2), ("SQ4", 4, 4)):
        per_vector = math.ceil(dim * bits / 8) + 8  # the code and the row number
        needed = num_vectors * per_vector + nlist * dim * 4
        if needed <= budget:
            factory = f"IVF{nlist},{codec}"
            return IndexSpec(
                kind="ivf", factory=factory, nlist=nlist, nprobe=1, refine=refine, bytes_in_memory=per_vector
            )
    raise UserError(
        f"{num_vectors:,} vectors of {dim} dimensions need at least {needed / 2**30:.2f} GiB of index memory, "
        f"got --memory-gib {memory_gib}: allow more, or split the corpus over several indexes"
    )
