"""The columns that a corpus brings along: their names, their types, and how a person declares them.

Values keep their spelling. A column becomes numbers only if every value is written the one way that number would be
written back (`7`, `-0.5`, not `007`, `1.10`, `12e3` or twenty digits), or if its type is declared (`--types fold=int`).
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from audiomae.config import nearest
from audiomae.corpus.paths import name_to_uri
from audiomae.errors import ConfigError, ListingError

RESERVED = frozenset(
    {
        "id",
        "uri",
        "start_s",
        "end_s",
        "embedding",
        "decode_note",
        "size",
        "content_id",
        "tar_offset",
        "segment_start_s",
        "segment_end_s",
        "shard",
        "corpus",
    }
)
"""Column names of the manifest, the embedding table and the items table; a source's own go by `listing_<name>`."""

ARROW_TYPES: dict[str, pa.DataType] = {
    "text": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
}
EXACT_FLOAT_INTS = 2**53
NULL_WORDS = (
    "NA",
    "N/A",
    "n/a",
    "na",
    "<NA>",
    "#N/A",
    "null",
    "NULL",
    "Null",
    "None",
    "none",
    "nil",
    "nan",
    "NaN",
    "NAN",
)
NUMBER_LIKE = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
PLAIN_INT = r"^(0|-?[1-9][0-9]{0,18})$"
SHORT_FLOAT = r"^-?(0|[1-9][0-9]*)\.([0-9]*[1-9]|0)$"
SHORT_FLOAT_LENGTH = 16  # at most 15 digits: such a decimal survives the way to a double and back


def own_names(names: Iterable[str], keep: Iterable[str] = ()) -> dict[str, str]:
    """Names as a source has them -> as the manifest has them: ours but for `keep` set aside, no two alike."""
    names = list(names)
    taken = {name for name in names if name and name not in RESERVED} | RESERVED
    result: dict[str, str] = {}
    for number, name in enumerate(names, 1):
        if name and (name not in RESERVED or name in keep):
            result[name] = name
            continue
        free = base = f"listing_{name}" if name else f"column_{number}"
        count = 2
        while free in taken:
            free, count = f"{base}_{count}", count + 1
        taken.add(free)
        result[name] = free
    return result


def check_names(src: str, names: Iterable[str]) -> None:
    """Refuse a table in which a name comes twice."""
    seen: set[str] = set()
    twice = sorted({name for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
    if twice:
        raise ListingError(f"{src}: column {twice[0]!r} comes twice; rename one, so that none of its values is lost")


def check_declared(src: str, types: Mapping[str, str], names: Iterable[str]) -> None:
    """Refuse a declared column that the source does not have."""
    names = list(names)
    for name in types:
        if name not in names:
            raise ConfigError(f"types: {src} has no column {name!r}{nearest(name, names)}")
        if name == "uri":
            raise ConfigError("types: the column 'uri' is always text")


def declare(src: str, table: pa.Table, types: Mapping[str, str]) -> pa.Table:
    """The table with the declared types.

    Raises:
        ListingError: naming the column and the first value that is no such thing.
    """
    for name, kind in types.items():
        if name in table.column_names:
            column = cast(src, name, table[name], kind)
            table = table.set_column(table.column_names.index(name), name, column)
    return table


def cast(src: str, name: str, column: pa.ChunkedArray, kind: str) -> pa.ChunkedArray:
    """A column as a declared type."""
    if kind == "text":
        return to_text(column)
    target = ARROW_TYPES[kind]
    try:
        return column.cast(target)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    for value in column.unique().to_pylist():
        try:
            pa.array([value]).cast(target)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise ListingError(f"{src}: types: column {name!r} is declared {kind}, but {value!r} is none") from None
    raise ListingError(f"{src}: types: column {name!r} of type {column.type} cannot be read as {kind}")


def to_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any column as text: numbers as Python writes them, nested values as JSON."""
    kind = column.type
    if pa.types.is_string(kind):
        return column
    if pa.types.is_floating(kind):
        return _mapped(column, lambda value: repr(float(value)))
    if pa.types.is_nested(kind):
        return _mapped(column, lambda value: json.dumps(value, ensure_ascii=False, default=str))
    return column.cast(pa.string())


def _mapped(column: pa.ChunkedArray, function: Any) -> pa.ChunkedArray:
    values = [None if value is None else function(value) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(values, pa.string())])


def clean_text(text: str) -> str:
    r"""Text that can be stored: half surrogates, which stand for undecodable bytes of a name, become `\xNN`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return name_to_uri(text.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:
            return text.encode("utf-8", "backslashreplace").decode()
    return text


# --- columns of a Parquet file ----------------------------------------------------------------------------------------


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column in the types that every later stage takes: one kind of text, no dictionaries, no raw bytes."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return plain(pa.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type))
    if pa.types.is_dictionary(kind):
        decoded = [chunk.dictionary_decode() for chunk in column.chunks]
        return plain(pa.chunked_array(decoded, kind.value_type))
    if pa.types.is_run_end_encoded(kind):
        return plain(pa.chunked_array([pc.run_end_decode(chunk) for chunk in column.chunks], kind.value_type))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    if pa.types.is_null(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.string())
    if pa.types.is_float16(kind):
        return column.cast(pa.float32())
    if pa.types.is_fixed_size_binary(kind):
        return _mapped(column, bytes.hex)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        try:
            return column.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return _mapped(column, name_to_uri)
    return column


# --- the type of a text column ----------------------------------------------------------------------------------------


class TextColumn:
    """Watches a column of text go by and says at the end what it is: int64, float64 or text."""

    def __init__(self) -> None:
        self.is_int = self.is_float = self.is_number = True
        self.example = ""
        self._whole = self._point_zero = self._seen = False

    def look(self, column: pa.ChunkedArray) -> None:
        """Take some more of its values into account."""
        if not self.is_number or column.null_count == len(column):
            return
        column = column.drop_null()
        self._seen = True
        if not _all(pc.match_substring_regex(column, NUMBER_LIKE)):
            self.is_number = self.is_int = self.is_float = False
            return
        whole = pc.match_substring_regex(column, PLAIN_INT)
        self.is_int = self.is_int and _all(whole) and _casts(column, pa.int64())
        self.is_float = self.is_float and self._survives(column, whole)

    def type(self) -> pa.DataType:
        """What fits all values without loss."""
        if self._seen and self.is_int:
            return pa.int64()
        return pa.float64() if self._seen and self.is_float else pa.string()

    @property
    def kept_as_text(self) -> bool:
        """Whether all values are numbers of which some would lose their spelling."""
        return self._seen and self.is_number and not (self.is_int or self.is_float)

    def _survives(self, column: pa.ChunkedArray, whole: pa.ChunkedArray) -> bool:
        length = pc.utf8_length(column)
        decimal = pc.and_(pc.match_substring_regex(column, SHORT_FLOAT), pc.less_equal(length, SHORT_FLOAT_LENGTH))
        safe = pc.or_(decimal, pc.and_(whole, pc.less(length, SHORT_FLOAT_LENGTH)))
        for value in column.filter(pc.invert(safe)).to_pylist():
            if value.lstrip("-").isdigit():
                kept = str(int(value)) == value and abs(int(value)) <= EXACT_FLOAT_INTS
            else:
                kept = repr(float(value)) == value
            if not kept:
                self.example = value
                return False
        self._whole = self._whole or bool(pc.any(whole).as_py())
        self._point_zero = self._point_zero or bool(pc.any(pc.ends_with(column, ".0")).as_py())
        if self._whole and self._point_zero:  # 1 and 1.0 would become one
            self.example = "1 beside 1.0"
            return False
        return True


def _all(mask: pa.ChunkedArray) -> bool:
    return bool(pc.all(mask).as_py())


def _casts(column: pa.ChunkedArray, kind: pa.DataType) -> bool:
    try:
        column.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True
