"""How a listing is to be read where the default is not meant: plain values, nothing heavy is loaded here."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from audiomae.config import StrictConfig, shown_as

CHANNEL = r"^(mix|left|right|[0-9]{1,3})$"  # which channel of a recording is heard
TypeName = Literal["text", "int", "float", "bool", "date", "timestamp"]


def _parse_types(value: Any) -> Any:
    """`label=int,fold=text` as a mapping; what is none already."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return parts
    pairs: dict[str, str] = {}
    for part in (piece for item in parts for piece in str(item).split(",")):
        name, equals, kind = part.strip().rpartition("=")
        if not equals or not name:
            raise ValueError(f"{part!r} is not COLUMN=TYPE, for example label=int")
        pairs[name] = kind
    return pairs


def _parse_words(value: Any) -> Any:
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return parts
    return tuple(word.strip() for part in parts for word in str(part).split(",") if word.strip())


ColumnTypes = Annotated[dict[str, TypeName], BeforeValidator(_parse_types)]
"""`{"label": "int"}`, on the command line `label=int,fold=text`."""
NullWords = Annotated[tuple[str, ...], BeforeValidator(_parse_words)]
"""`("NA", "null")`, on the command line `NA,null`."""


class ReadAs(StrictConfig):
    """How the columns of a source are read where the default is not meant."""

    types: ColumnTypes = Field(
        {},
        description="types of the listing's columns, such as label=int fold=text (also float, bool, date, timestamp)",
        json_schema_extra=shown_as("COLUMN=TYPE"),
    )
    null_words: NullWords = Field(
        (),
        description="unquoted words of a CSV that mean a missing value, such as NA null",
        json_schema_extra=shown_as("WORD"),
    )
