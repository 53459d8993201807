"""The clips of a run as one table: where their features lie, what is known of them, their side of the split."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from audiomae.config import nearest
from audiomae.errors import ConfigError
from audiomae.training.losses import UNLABELLED
from audiomae.training.recipe import DataConfig, Where
from audiomae.training.split import held_out

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
        values = wanted if isinstance(wanted, list) else [wanted]
        present = np.array([str(value) for value in table[column].to_pylist()])
        keep &= np.isin(present, [str(value) for value in values])
    return keep


def build_items(clips: pa.Table, listing: pa.Table, config: DataConfig, seed: int) -> pa.Table:
    """Join cached clips with their listing rows and split them.

    Args:
        clips: from `read_clips`, without failed rows.
        listing: the corpus, one row per file.
        seed: of the split.

    Returns:
        Columns `uri, start_s, end_s, shard, first_frame, frames`, `label` (string or null), `caption` (string or null),
        `validation` (bool), in (uri, start) order. A file's clips are on one side. Excluded files are absent.
    """
    if config.exclude:
        listing = listing.filter(pa.array(~matches(listing, config.exclude, "exclude")))
    columns = {"uri": listing["uri"]}
    columns["label"] = _text_column(listing, config.label)
    captions = _text_column(listing, config.caption)
    if config.label:
        made = [
            None if label is None else config.caption_template.format(label=label)
            for label in columns["label"].to_pylist()
        ]
        captions = pc.coalesce(captions, pa.array(made, pa.string()))
    columns["caption"] = captions
    if config.val_filter:
        validation = matches(listing, config.val_filter, "val_filter")
    else:
        validation = held_out(listing["uri"].to_pylist(), columns["label"].to_pylist(), config.val_fraction, seed)
    columns["validation"] = pa.array(validation)
    items = clips.drop_columns(["error"]).join(pa.table(columns), "uri", join_type="inner")
    return items.sort_by([("uri", "ascending"), ("start_s", "ascending")]).combine_chunks()


def numbered(values: Sequence[str | None]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Distinct values in sorted order, and each row's number among them (`UNLABELLED` for None)."""
    names = sorted({value for value in values if value is not None})
    number = {name: index for index, name in enumerate(names)}
    return names, np.array([UNLABELLED if value is None else number[value] for value in values], np.int64)


def _text_column(listing: pa.Table, name: str | None) -> pa.ChunkedArray:
    if name is None or name not in listing.column_names:
        return pa.chunked_array([pa.nulls(len(listing), pa.string())])
    return pc.cast(listing[name], pa.string())
