"""CSV and TSV listings as tables: every cell as it is written, numbers only where nothing is lost."""

import codecs
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from audiomae.corpus.columns import NULL_WORDS, TextColumn, check_declared, check_names, declare
from audiomae.corpus.notes import Notes
from audiomae.corpus.read_as import ReadAs
from audiomae.errors import ListingError
from audiomae.storage import open_stream

BLOCK_BYTES = 8 << 20
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
WIDE_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def tables(src: str, delimiter: str, read_as: ReadAs) -> Callable[[Notes], Iterator[pa.Table]]:
    """The rows, as a function. The file is read twice: for the type that fits the whole of each column, then for the
    rows. Columns are int64, float64, what was declared, or text."""
    state: list[tuple[pa.Schema, Notes]] = []

    def stream(notes: Notes) -> Iterator[pa.Table]:
        if not state:
            state.append(_schema(src, delimiter, read_as))
        schema, remarks = state[0]
        notes.take(remarks)
        for table in _text(src, delimiter, read_as.null_words):
            yield declare(src, table.cast(schema), read_as.types)

    return stream


def refuse_encoding(src: str) -> None:
    """Refuse a text file whose first bytes are those of UTF-16 or UTF-32."""
    with open_stream(src) as file:
        head = file.read(512)
    for mark, name in WIDE_ENCODINGS.items():
        if head.startswith(mark):
            raise ListingError(
                f"{src}: the file is {name}, expected UTF-8; save it as UTF-8 (iconv -f {name} -t UTF-8)"
            )
    zeros = head[1::2].count(0), head[0::2].count(0)
    if len(head) > 3 and max(zeros) > len(head) // 4:
        raise ListingError(f"{src}: the file looks like UTF-16, expected UTF-8; save it as UTF-8 (iconv -f UTF-16)")


def _text(src: str, delimiter: str, null_words: Sequence[str]) -> Iterator[pa.Table]:
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    read = pa.csv.ReadOptions(block_size=BLOCK_BYTES)
    names = _header(src, delimiter, parse, read)
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
        null_values=["", *null_words],
    )
    try:
        with open_stream(src) as file:
            table = None
            for batch in pa.csv.open_csv(file, parse_options=parse, read_options=read, convert_options=convert):
                table = pa.table(batch)
                yield table
        if table is not None and table.num_rows:
            _refuse_open_quote(src, table.slice(table.num_rows - 1).to_pylist()[0])
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise ListingError(f"{src}: not a readable CSV file: {_explained(error)}") from None


def _header(src: str, delimiter: str, parse: pa.csv.ParseOptions, read: pa.csv.ReadOptions) -> list[str]:
    try:
        refuse_encoding(src)
        with open_stream(src) as file:
            names: list[str] = pa.csv.open_csv(file, parse_options=parse, read_options=read).schema.names
    except (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeDecodeError, OSError) as error:
        raise ListingError(f"{src}: not a readable CSV file: {_explained(error)}") from None
    check_names(src, names)
    if "uri" not in names:
        for other, word in DELIMITERS.items():
            cells = [name.strip().strip('"') for name in names[0].split(other)] if len(names) == 1 else []
            if other != delimiter and "uri" in cells:
                expected = DELIMITERS[delimiter]
                raise ListingError(
                    f"{src}: its columns are separated by {word} ({names[0]!r}), expected {expected}; "
                    + ("name it .tsv" if other == "\t" else f"save it with {expected}")
                )
    return names


def _explained(error: Exception) -> str:
    text = str(error)
    if "invalid UTF8" in text or isinstance(error, UnicodeDecodeError):
        return (
            f"{text}: it is in another encoding, expected UTF-8; save it as UTF-8 (Latin-1: iconv -f LATIN1 -t UTF-8)"
        )
    if "straddling" in text:
        return f"a cell of more than {BLOCK_BYTES >> 20} MiB: is an opening quote never closed?"
    return text


def _refuse_open_quote(src: str, last_row: dict[str, Any]) -> None:
    """A quote that is never closed swallows the rest of the file, its last line break included."""
    for name, value in last_row.items():
        if isinstance(value, str) and value.endswith(("\n", "\r")):
            raise ListingError(
                f"{src}: not a readable CSV file: the last row's {name!r} runs on to the end of the file: an opening "
                f"quote before {value[:40]!r} is never closed"
            )


def _schema(src: str, delimiter: str, read_as: ReadAs) -> tuple[pa.Schema, Notes]:
    """The type that fits the whole of each column, and what is to be said of that."""
    columns: dict[str, TextColumn] = {}
    words: dict[str, int] = {}
    notes = Notes()
    for table in _text(src, delimiter, read_as.null_words):
        for name in table.column_names:
            column = columns.setdefault(name, TextColumn())
            if name in ("uri", *read_as.types):
                column.is_number = False
                continue
            column.look(table[name])
            if not column.is_number:
                found = table[name].filter(pc.is_in(table[name], pa.array(NULL_WORDS)))
                for word in found.unique().to_pylist():
                    words.setdefault(f"{name}\0{word}", 0)
    check_declared(src, read_as.types, columns)
    for name, column in columns.items():
        if column.kept_as_text:
            notes.add(
                "columns of numbers kept as text, because some would lose their spelling (types: NAME=float makes them "
                "numbers)",
                f"{name}: {column.example}",
            )
    if words:
        _note_null_words(src, delimiter, read_as, {key.split("\0")[1] for key in words}, notes)
    return pa.schema(
        [(name, column.type() if column.is_number else pa.string()) for name, column in columns.items()]
    ), notes


def _note_null_words(src: str, delimiter: str, read_as: ReadAs, words: set[str], notes: Notes) -> None:
    """Say which unquoted words that often stand for "missing" were kept: `null_words` would make them missing."""
    kept = [name for name in read_as.types if read_as.types[name] == "text"]
    both = zip(
        _text(src, delimiter, read_as.null_words),
        _text(src, delimiter, (*read_as.null_words, *words)),
        strict=True,
    )
    for as_text, as_null in both:
        for name in as_text.column_names:
            if name == "uri" or name in kept:
                continue
            column = as_text[name].filter(pc.and_(pc.is_null(as_null[name]), pc.is_valid(as_text[name])))
            for entry in column.value_counts().to_pylist():
                what = "unquoted words that may mean missing kept as text (null_words makes them missing)"
                notes.add(what, f"{name}: {entry['values']}", entry["counts"])
