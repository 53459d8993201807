"""The vector index itself: training, encoding, mapped inverted lists, scanning. The only package that imports faiss.

A segment holds every vector once as float16, in row order (`vectors.faiss`, memory-mapped): the *row store*. It
answers exact searches, gives any vector back, rescores what an approximate index proposes, and is what every index is
built from, so an index built in parts, in one piece or again has the same bytes.

Before it stands, in larger releases, an inverted file: one quantiser for all segments of a release (`trained.faiss`,
its centroids as float16), and for each segment the list of every row (`assign.npy`) and the codes of every list
(`lists.bin`, with the places of the lists in `layout.npy`). `lists.bin` is mapped as well, whatever the codes are
(also those that FAISS itself cannot map), so that any number of processes of one machine share one copy.

FAISS ids are row numbers within a segment; clip ids lie beside them.
"""

from audiomae.search.index.encoding import (
    ADD_BATCH,
    ASSIGN_FILE,
    LAYOUT_FILE,
    LISTS_FILE,
    SHAPE_FILE,
    TRAIN_ROWS_PER_LIST,
    TRAINED_FILE,
    assign,
    encode,
    neighbours_together,
    train,
)
from audiomae.search.index.graph import (
    INDEX_FILE,
    Graph,
    build_graph,
)
from audiomae.search.index.lists import (
    Lists,
    OldLists,
    OldQuantiser,
    Quantiser,
    Refined,
    Selection,
    shares_of_lists,
)
from audiomae.search.index.store import (
    VECTORS_FILE,
    Ranked,
    RowStore,
    can_use_gpus,
    read_index,
    threads,
    to_rows,
    write_row_store,
)

__all__ = [
    "ADD_BATCH",
    "ASSIGN_FILE",
    "INDEX_FILE",
    "LAYOUT_FILE",
    "LISTS_FILE",
    "SHAPE_FILE",
    "TRAINED_FILE",
    "TRAIN_ROWS_PER_LIST",
    "VECTORS_FILE",
    "Graph",
    "Lists",
    "OldLists",
    "OldQuantiser",
    "Quantiser",
    "Ranked",
    "Refined",
    "RowStore",
    "Selection",
    "assign",
    "build_graph",
    "can_use_gpus",
    "encode",
    "neighbours_together",
    "read_index",
    "shares_of_lists",
    "threads",
    "to_rows",
    "train",
    "write_row_store",
]
