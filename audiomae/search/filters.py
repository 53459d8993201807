"""Filters over the items table: `{"label": "rain", "take": {"gte": 2}}`, checked strictly, answered from flat arrays.

A filter is an object. Every key is a column and its value a condition; all must hold. The key `any` with a list of
filters holds when one of them does. A condition is a plain value (null for "has none") or an object of operators:

    eq, ne, in, not_in        the value is (not) this, or (not) among these; `ne` and `not_in` are exact complements,
                              so rows without a value satisfy them
    gt, gte, lt, lte          numbers, dates, times and text in the order of their code points
    is_null                   true or false
    contains                  text: this piece of it, upper and lower case apart; a list: this element

A value that a column cannot hold (text for a number, true for 1, 2**70, NaN) is an error rather than no match.
"""

import bisect
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audiomae.config import nearest
from audiomae.errors import FilterError

ANY = "any"
FEW_VALUES = 8
MAX_DEPTH = 8  # of `any` within `any`
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}
_NEGATED = {"ne": "eq", "not_in": "in"}
OPERATORS = ("eq", "ne", "in", "not_in", *_COMPARE, "is_null", "contains")
HINT = 'expected an object like {"label": "rain"} or {"take": {"gte": 2, "lt": 5}}'


@dataclass(frozen=True)
class Column:
    """One column of N rows, ready to be compared.

    Attributes:
        type: its Arrow type (of the values, where it was dictionary-encoded).
        values: what is compared, [N]: numbers; 0 or 1; ticks since an epoch; or codes into `dictionary` plus one, where
            0 stands for null. None for lists and other types, which are kept in `source`.
        valid: bool[N], which rows have a value; None for all, and for codes.
        dictionary: the distinct values in ascending order, for text and decimals.
        source: the column itself, for lists and other types.
    """

    type: pa.DataType
    values: np.ndarray | None
    valid: np.ndarray | None = None
    dictionary: pa.Array | None = None
    source: pa.Array | None = None

    def nulls(self) -> np.ndarray:
        """Which rows have no value, bool[N]."""
        if self.dictionary is not None and self.values is not None:
            return self.values == 0
        if self.source is not None:
            return _mask(pc.is_null(self.source))
        assert self.values is not None
        return np.zeros(len(self.values), bool) if self.valid is None else ~self.valid


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values, whether or not they are dictionary-encoded."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_coded(kind: pa.DataType) -> bool:
    """Whether a column of this type is compared by codes into its sorted distinct values."""
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(text or pa.types.is_decimal(kind))


def is_flat(kind: pa.DataType) -> bool:
    """Whether a column of this type is compared as an array of numbers."""
    return bool(
        pa.types.is_boolean(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or (pa.types.is_temporal(kind) and not pa.types.is_interval(kind))
    )


def encode_column(column: pa.ChunkedArray) -> Column:
    """A column of the items table, made ready to be compared."""
    kind = value_type(column.type)
    if is_coded(kind):
        return _encode_codes(column, kind)
    whole = column.combine_chunks()
    whole = whole if isinstance(whole, pa.Array) else pa.concat_arrays(whole.chunks)
    if not is_flat(kind):
        return Column(kind, None, source=whole)
    if pa.types.is_dictionary(whole.type):
        whole = whole.dictionary_decode()
    valid = None if whole.null_count == 0 else _mask(whole.is_valid())
    ticks = _as_numbers(whole)
    return Column(kind, ticks.fill_null(0).to_numpy(zero_copy_only=False), valid)


def _encode_codes(column: pa.ChunkedArray, kind: pa.DataType) -> Column:
    parts = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    parts = parts.unify_dictionaries()
    distinct = parts.chunk(0).dictionary if parts.num_chunks else pa.array([], kind)
    distinct = distinct.cast(pa.large_string()) if not pa.types.is_decimal(kind) else distinct
    order = pc.sort_indices(distinct).to_numpy()
    rank = np.empty(len(order) + 1, np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    rank[-1] = 0  # the place that -1 looks at
    codes = [rank[chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False)] for chunk in parts.chunks]
    smallest = np.min_scalar_type(len(order) + 1)
    joined = np.concatenate([np.zeros(0, smallest), *(part.astype(smallest) for part in codes)])
    return Column(kind, joined, dictionary=distinct.take(pa.array(order)))


def _as_numbers(values: pa.Array) -> pa.Array:
    kind = values.type
    if pa.types.is_boolean(kind):
        return values.cast(pa.uint8())
    if pa.types.is_temporal(kind):
        return values.view(pa.int32() if kind.bit_width == 32 else pa.int64())
    return values.cast(pa.float32()) if pa.types.is_float16(kind) else values


def mask(
    where: Mapping[str, Any], types: Mapping[str, pa.DataType], column: Callable[[str], Column]
) -> np.ndarray | None:
    """Which rows satisfy a filter, bool[N]; None for a filter without conditions, which leaves all of them.

    Args:
        where: the filter.
        types: the columns that may be named, with their Arrow types.
        column: gives a column by its name.

    Raises:
        FilterError: anything about the filter that does not fit the table.
    """
    check(where, types)
    return evaluate(where, types, column)


def check(where: Any, types: Mapping[str, pa.DataType], depth: int = 0) -> None:
    """Check a filter against the columns' types, without looking at any row.

    Raises:
        FilterError: unknown column or operator, a value the column cannot hold, an empty condition or alternative.
    """
    if not isinstance(where, Mapping):
        raise FilterError(f"a filter is an object, got {type(where).__name__}; {HINT}")
    if depth > MAX_DEPTH:
        raise FilterError(f"filter: 'any' is nested more than {MAX_DEPTH} deep")
    for name, condition in where.items():
        if name == ANY and isinstance(condition, Sequence) and not isinstance(condition, str):
            _check_alternatives(condition, types, depth)
        elif name not in types:
            raise FilterError(f"unknown filter column {name!r}{nearest(name, list(types))}")
        else:
            for key, operand in operators(name, condition).items():
                _operand(name, value_type(types[name]), key, operand)


def _check_alternatives(alternatives: Sequence[Any], types: Mapping[str, pa.DataType], depth: int) -> None:
    if not alternatives:
        raise FilterError("filter: 'any' needs at least one filter in its list")
    for alternative in alternatives:
        check(alternative, types, depth + 1)
        if not alternative:
            raise FilterError(f"filter: an alternative of 'any' has no condition; {HINT}")


def operators(column: str, condition: Any) -> Mapping[str, Any]:
    """The condition on a column as an object of operators."""
    if not isinstance(condition, Mapping):
        if isinstance(condition, list | tuple):
            raise FilterError(f'filter on {column!r}: a list needs an operator, as {{"in": {list(condition)!r}}}')
        return {"eq": condition}
    if not condition:
        raise FilterError(f"filter on {column!r}: a condition without operators; expected {', '.join(OPERATORS)}")
    for name in condition:
        if name not in OPERATORS:
            raise FilterError(f"filter on {column!r}: unknown operator {name!r}{nearest(str(name), list(OPERATORS))}")
    return condition


def evaluate(
    where: Mapping[str, Any], types: Mapping[str, pa.DataType], column: Callable[[str], Column]
) -> np.ndarray | None:
    """As `mask`, of a filter that was checked: operands are of the types in `types`, columns may be narrower."""
    found: np.ndarray | None = None
    for name, condition in where.items():
        if name == ANY and isinstance(condition, list | tuple):
            masks = [
                part for part in (evaluate(alternative, types, column) for alternative in condition) if part is not None
            ]
            these = [functools.reduce(np.logical_or, masks)]
        else:
            source, kind = column(name), value_type(types[name])
            fitted = {key: _operand(name, kind, key, given) for key, given in operators(name, condition).items()}
            these = [_apply(source, key, operand) for key, operand in fitted.items()]
        for mask in these:
            found = mask if found is None else found & mask
    return found


def _apply(column: Column, key: str, operand: Any) -> np.ndarray:
    if key in _NEGATED:
        return ~_apply(column, _NEGATED[key], operand)
    if key == "is_null" or operand is None:
        nulls = column.nulls()
        return nulls if operand is None or operand else ~nulls
    if column.source is not None:
        if pa.types.is_null(column.type) or key == "in":  # no row has a value
            return column.nulls() & (key == "in" and None in operand)
        return _contains_element(column.source, operand)
    assert column.values is not None
    if column.dictionary is not None:
        return _apply_codes(column.values, column.dictionary, key, operand)
    if key == "in":
        found = _among(column.values, [value for value in operand if value is not None])
    else:
        found = _COMPARE.get(key, operator.eq)(column.values, _same_kind(column.values, operand))
    found = found if column.valid is None else found & column.valid
    return found | column.nulls() if key == "in" and None in operand else found


def _same_kind(values: np.ndarray, operand: Any) -> Any:
    """0.1 as the 0.1 that a float32 column holds; whole numbers stay, as a narrower column compares with any."""
    return values.dtype.type(operand) if values.dtype.kind == "f" else operand


def _among(values: np.ndarray, wanted: list[Any]) -> np.ndarray:
    if len(wanted) <= 8:
        found = np.zeros(len(values), bool)
        for value in wanted:
            found |= values == _same_kind(values, value)
        return found
    return np.isin(values, np.array(wanted))


def _apply_codes(codes: np.ndarray, dictionary: pa.Array, key: str, operand: Any) -> np.ndarray:
    """Codes are ranks, so an order on values is an order on codes; 0 is null."""
    if key in ("eq", "in"):
        return _have_codes(codes, [_code(dictionary, value) for value in (operand if key == "in" else [operand])])
    if key == "contains":
        return _look_up(np.concatenate([[False], _mask(pc.match_substring(dictionary, operand))]), codes)
    side = bisect.bisect_left if key in ("gte", "lt") else bisect.bisect_right
    edge = side(_Sorted(dictionary), operand) + 1
    if edge >= 2 ** (8 * codes.dtype.itemsize):  # above every code that fits
        return codes > 0 if key in ("lt", "lte") else np.zeros(len(codes), bool)
    edge = codes.dtype.type(edge)
    return codes >= edge if key in ("gt", "gte") else (codes < edge) & (codes > 0)


def _have_codes(codes: np.ndarray, wanted: list[int]) -> np.ndarray:
    known = sorted({code for code in wanted if code >= 0})
    if len(known) <= FEW_VALUES:  # as many comparisons are faster than looking up
        found, same = np.zeros(len(codes), bool), np.empty(len(codes), bool)
        for code in known:
            found |= np.equal(codes, codes.dtype.type(code), out=same)
        return found
    largest = np.iinfo(codes.dtype).max if codes.dtype.itemsize < 4 else codes.max(initial=0)
    chosen = np.zeros(int(largest) + 1, bool)
    chosen[[code for code in known if code < len(chosen)]] = True
    return _look_up(chosen, codes)


def _look_up(chosen: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """`chosen[codes]` for codes that it has, faster."""
    if codes.dtype == np.uint8:
        table = np.zeros(256, bool)
        table[: len(chosen)] = chosen
        return np.frombuffer(bytearray(codes).translate(table.tobytes()), bool)
    found: np.ndarray = np.take(chosen, codes, mode="clip")  # bounds are not checked: a third of the time
    return found


def _code(dictionary: pa.Array, value: Any) -> int:
    """0 for null, the place of `value` plus one, or -1 when no row has it."""
    if value is None:
        return 0
    place = bisect.bisect_left(_Sorted(dictionary), value)
    return place + 1 if place < len(dictionary) and dictionary[place].as_py() == value else -1


class _Sorted(Sequence[Any]):
    """An Arrow array as a sequence of Python values, for `bisect`."""

    def __init__(self, values: pa.Array) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, place: Any) -> Any:
        return self._values[place].as_py()


def _contains_element(lists: pa.Array, element: Any) -> np.ndarray:
    found = np.zeros(len(lists), bool)
    elements = lists.flatten()
    if pa.types.is_dictionary(elements.type):
        elements = elements.dictionary_decode()
    hits = _mask(pc.equal(elements, pa.scalar(element, elements.type)).fill_null(False))
    found[pc.list_parent_indices(lists).to_numpy()[hits]] = True
    return found


def _operand(column: str, kind: pa.DataType, key: str, given: Any) -> Any:
    """The operand as a value of the column (text, number, ticks); None for null, a list for `in`."""
    key = _NEGATED.get(key, key)
    if key == "is_null":
        if not isinstance(given, bool):
            raise FilterError(f"filter on {column!r}: 'is_null' is true or false, got {given!r}")
        return given
    if key == "in":
        if not isinstance(given, list | tuple):
            raise FilterError(f"filter on {column!r}: 'in' needs a list, got {_short(given)}")
        return [None if value is None else _fit(column, kind, "in", value) for value in given]
    if key == "contains":
        return _piece(column, kind, given)
    if given is None:
        if key == "eq":
            return None
        raise FilterError(f"filter on {column!r}: {key!r} needs a value, got null")
    return _fit(column, kind, key, given)


def _piece(column: str, kind: pa.DataType, given: Any) -> Any:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        element = value_type(kind.value_type)
        return _fit(column, element, "contains", given, ticks=False)
    if not is_coded(kind) or pa.types.is_decimal(kind):
        raise FilterError(f"filter on {column!r} (type {kind}): 'contains' is for text and lists")
    return _fit(column, kind, "contains", given)


def _fit(column: str, kind: pa.DataType, key: str, given: Any, ticks: bool = True) -> Any:
    """`given` as a value of type `kind`, or a FilterError that says why not."""
    if isinstance(given, np.generic):
        given = given.item()
    fitted: Any
    try:
        if pa.types.is_boolean(kind):
            fitted = given if isinstance(given, bool) else None
        elif pa.types.is_decimal(kind):
            number = isinstance(given, int | float) and not isinstance(given, bool)
            fitted = pa.scalar(Decimal(str(given))).cast(kind).as_py() if number else None
        elif pa.types.is_integer(kind):
            fitted = _whole_number(kind, given)
        elif pa.types.is_floating(kind):
            fitted = _real_number(kind, given)
        elif is_coded(kind):
            fitted = given if isinstance(given, str) and given.encode() is not None else None
        elif pa.types.is_temporal(kind):
            fitted = _moment(kind, given, ticks)
        else:
            raise FilterError(f"filter on {column!r} (type {kind}): only 'is_null' and 'contains' (of lists) apply")
    except (pa.ArrowException, ValueError, OverflowError, ArithmeticError, NotImplementedError) as error:
        if isinstance(error, FilterError):
            raise
        raise _misfit(column, kind, key, given, str(error)) from None
    if fitted is None:
        raise _misfit(column, kind, key, given, _expected(kind))
    return fitted


def _whole_number(kind: pa.DataType, given: Any) -> int | None:
    if (
        isinstance(given, bool)
        or not isinstance(given, int | float)
        or given != given
        or given in (math.inf, -math.inf)
    ):
        return None
    return int(pa.scalar(int(given), kind).as_py()) if given == int(given) else None


def _real_number(kind: pa.DataType, given: Any) -> float | None:
    if isinstance(given, bool) or not isinstance(given, int | float) or given != given:
        return None
    number = float(given)
    limit = {16: 65504.0, 32: 3.4028235677973366e38}.get(kind.bit_width, math.inf)
    return number if math.isinf(number) or abs(number) <= limit else None


def _moment(kind: pa.DataType, given: Any, ticks: bool) -> Any:
    if not isinstance(given, str):
        return None
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        text = pa.array([given])
        try:
            found = text.cast(kind)
        except pa.ArrowInvalid:  # no offset given: UTC
            found = text.cast(pa.timestamp(kind.unit)).cast(kind)
    else:
        found = pa.array([given]).cast(kind)
    return found.view(pa.int32() if kind.bit_width == 32 else pa.int64())[0].as_py() if ticks else found[0].as_py()


def _expected(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "expected true or false"
    if pa.types.is_integer(kind):
        return "expected a whole number"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "expected a finite number"
    if pa.types.is_temporal(kind):
        return 'expected a date or time as text, such as "2025-01-31T12:00:00"'
    return "expected text"


def _misfit(column: str, kind: pa.DataType, key: str, given: Any, why: str) -> FilterError:
    return FilterError(f"filter on {column!r} (type {kind}): {key} {_short(given)} does not fit: {why}")


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _mask(found: pa.Array) -> np.ndarray:
    mask: np.ndarray = found.to_numpy(zero_copy_only=False)
    return mask
