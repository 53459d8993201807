"""The clips of a run as one table: where their features lie, what is known of them, their side of the split."""

from bisect import bisect_left, bisect_right

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from audiomae.config import nearest
from audiomae.errors import ConfigError
from audiomae.training.columns import CHUNK_ROWS, Texts, coded, starts, texts_of
from audiomae.training.recipe import DataConfig, Where
from audiomae.training.split import held_out

UNLABELLED = -1  # the class number of a clip whose class is not known

CORPUS_ROOT = "corpus_root"  # metadata of items.parquet: what its uris are relative to
LISTING_COLUMNS = ("uri", "size", "content_id")


def matches(table: pa.Table, where: Where, key: str) -> npt.NDArray[np.bool_]:
    """bool[N]: rows where every named column holds one of the given values (compared as text; no condition = no row).

    Raises:
        ConfigError: a column that the listing does not have. `key` names the config entry in the message.
    """
    keep = np.full(len(table), bool(where))
    for column, wanted in where.items():
        if column not in table.column_names:
            raise ConfigError(f"data.{key}: the corpus has no column {column!r}{nearest(column, table.column_names)}")
        values = {str(value) for value in (wanted if isinstance(wanted, list) else [wanted])}
        names, codes = coded(table[column])
        same = np.array([str(name) in values for name in [*names.to_pylist(), None]])
        keep &= same[codes]  # the last is for what is missing
    return keep


def build_items(clips: pa.Table, listing: pa.Table, config: DataConfig, seed: int) -> pa.Table:
    """Join cached clips with their listing rows and split them.

    Args:
        clips: from `read_clips`, without failed rows.
        listing: the corpus, one row per file.
        seed: of the split.

    Returns:
        Columns `uri, start_s, end_s, shard, first_frame, frames`, `label` and `caption` (dictionaries of strings, or
        null), `validation` (bool), in (uri, start) order. A file's clips are on one side. Excluded files are absent.
        What the clips say is not copied where all of them stay.
    """
    if config.exclude:
        listing = listing.filter(pa.array(~matches(listing, config.exclude, "exclude")))
    names, label_of = coded(_text_column(listing, config.label))
    labels, captions = texts_of(names, label_of), _captions(listing, config, (names, label_of))
    if config.val_filter:
        validation = matches(listing, config.val_filter, "val_filter")
    else:
        validation = held_out(listing["uri"], labels, config.val_fraction, seed)
    columns = {"uri": listing["uri"], "label": labels, "caption": captions}
    columns["validation"] = pa.array(validation)
    return _joined(in_order(clips.drop_columns(["error"]), "uri", "start_s"), in_order(pa.table(columns), "uri"))


def _captions(listing: pa.Table, config: DataConfig, labels: tuple[pa.Array, npt.NDArray[np.int32]]) -> pa.ChunkedArray:
    """Each file's own caption, else one made of its label."""
    given, given_of = coded(_text_column(listing, config.caption))
    if not config.label:
        return texts_of(given, given_of)
    names, label_of = labels
    made = pa.array([config.caption_template.format(label=label) for label in names.to_pylist()], pa.string())
    both, number = coded(pa.chunked_array([given, made]))  # a caption may read as one that is made
    number = np.append(number, np.int32(UNLABELLED))
    made_of = np.where(label_of == UNLABELLED, len(number) - 1, label_of + len(given))
    return texts_of(both, number[np.where(given_of == UNLABELLED, made_of, given_of)])


def in_order(table: pa.Table, *names: str) -> pa.Table:
    """The table sorted by these columns: itself where it is already, as listings and caches are."""
    greater, equal = np.zeros(max(0, len(table) - 1), bool), np.ones(max(0, len(table) - 1), bool)
    for name in names:
        before, after = table[name].slice(0, len(table) - 1), table[name].slice(1)
        greater |= equal & pc.greater(before, after).to_numpy(zero_copy_only=False)
        equal &= pc.equal(before, after).to_numpy(zero_copy_only=False)
    return table.sort_by([(name, "ascending") for name in names]) if greater.any() else table


def _joined(clips: pa.Table, files: pa.Table) -> pa.Table:
    """The clips of these files with the columns of their file. Both are sorted by uri, so they go by side by side."""
    uris, pieces = files["uri"], [clips.slice(0, 0)]
    for name in files.column_names[1:]:
        pieces[0] = pieces[0].append_column(name, files[name].slice(0, 0))
    for start in starts(len(clips)):
        part = clips.slice(start, CHUNK_ROWS)
        low, high = part["uri"][0].as_py(), part["uri"][-1].as_py()
        begin = bisect_left(range(len(uris)), low, key=lambda row: uris[row].as_py())
        end = bisect_right(range(len(uris)), high, lo=begin, key=lambda row: uris[row].as_py())
        some = files.slice(begin, end - begin)
        row = pc.index_in(part["uri"], some["uri"].combine_chunks())
        if row.null_count:
            part, row = part.filter(pc.is_valid(row)), row.drop_null()
        found = some.take(row)
        for name in files.column_names[1:]:
            part = part.append_column(name, found[name])
        pieces.append(part)
    return pa.concat_tables(pieces)


def same_items(some: pa.Table, others: pa.Table) -> bool:
    """Whether two tables of `build_items` say the same, one of them read from a file of this or an older version."""
    if some.column_names != others.column_names or len(some) != len(others):
        return False
    for name in some.column_names:
        if name not in ("label", "caption"):
            if not some[name].equals(others[name]):
                return False
            continue
        (names, codes), (other_names, other_codes) = numbered(some[name]), numbered(others[name])
        if not names.equals(other_names) or not np.array_equal(codes, other_codes):
            return False
    return True


def numbered(values: Texts) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """Distinct values in sorted order, and each row's number among them (`UNLABELLED` for None)."""
    names, codes = coded(values)
    order = pc.sort_indices(names)
    number = np.full(len(names) + 1, UNLABELLED, np.int64)
    number[order.to_numpy()] = np.arange(len(names))
    return names.take(order), number[codes]


def _text_column(listing: pa.Table, name: str | None) -> pa.ChunkedArray:
    if name is None or name not in listing.column_names:
        return pa.chunked_array([pa.nulls(len(listing), pa.string())])
    return pc.cast(listing[name], pa.string())
