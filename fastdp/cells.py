"""Cells to values, by a declared schema, a batch of rows at a time; or the reason why a row cannot be used.

pyarrow does what touches every cell: stripping, looking up in the vocabulary, texts to numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastdp.columns import Array, CellError, Column, Layout, Reason, Schema
from fastdp.errors import require

if TYPE_CHECKING:  # 0.5 s to import, and only tables from files need it
    import pyarrow as pa


@dataclass(frozen=True)
class Parsed:
    """Rows of cells as values."""

    values: dict[str, Array]  # by column, as `parse` gives them
    users: pa.Array | None  # whose they are, if the schema has users: binary
    reasons: npt.NDArray[np.uint8]
    columns: npt.NDArray[np.int64]  # of the reason, as numbered in schema.used


def parse_rows(cells: Mapping[str, pa.Array], schema: Schema) -> Parsed:
    """The first column that a row cannot be used for gives the reason."""
    values: dict[str, Array] = {}
    whose = None
    rows = len(next(iter(cells.values())))
    reasons, columns = np.full(rows, Reason.GOOD, np.uint8), np.full(rows, -1, np.int64)
    for number, column in enumerate(schema.used):
        if column.type == "user":
            whose, found = users(column, cells[column.name], schema.layout)
        else:
            values[column.name], found = parse(column, cells[column.name], schema.layout)
        if found.any():
            new = (found != Reason.GOOD) & (reasons == Reason.GOOD)
            reasons[new], columns[new] = found[new], number
    return Parsed(values, whose, reasons, columns)


def parse(column: Column, cells: pa.Array, layout: Layout) -> tuple[Array, Array]:
    """A batch of a column to codes int64 [n] (of a vocabulary) or numbers float64 [n], and reasons uint8 [n].

    Missing cells are filled in as declared. Where the reason is not Reason.GOOD, the value means nothing.
    Raises ArgumentError if the column's type cannot hold what is declared.
    """
    import pyarrow as pa

    cells = decoded(cells)
    texts = str(cells.type) in ("string", "large_string", "string_view", "null")
    codes = column.spellings is not None
    whole = pa.types.is_integer(cells.type) or pa.types.is_boolean(cells.type)
    numbers = whole or pa.types.is_floating(cells.type) or pa.types.is_decimal(cells.type)
    bound = "texts, integers or booleans" if codes else "numbers, or texts that are"
    require(texts or (whole if codes else numbers), f"type of column {column.name!r}", str(cells.type), bound)
    if texts or codes:
        cells = cells.cast(pa.string())
    if codes:
        values, missing, reasons = _codes(column, cells, layout)
    else:
        values, missing, reasons = _numbers(cells, layout)
    if missing.any():
        if column.missing is None:
            reasons[missing] = Reason.MISSING
        else:
            values[missing] = column.missing
    return values, reasons


def users(column: Column, cells: pa.Array, layout: Layout) -> tuple[pa.Array, Array]:
    """A batch of a column that says whose row it is, as binary [n], null where missing, and reasons uint8 [n].

    Integers are their digits; texts are compared byte for byte: "7" and "07" are two users.

    Raises ArgumentError if the column's type does not tell users from each other.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = decoded(cells)
    texts = str(cells.type) in ("string", "large_string", "string_view", "null")
    exact = texts or pa.types.is_integer(cells.type)
    require(exact, f"type of column {column.name!r}", str(cells.type), "texts or integers")
    cells = cells.cast(pa.string())
    if layout.strip:
        cells = pc.utf8_trim_whitespace(cells)
    missing = pc.or_kleene(cells.is_null(), pc.is_in(cells, value_set=pa.array(layout.nulls, pa.string())))
    reasons = np.where(missing.to_numpy(zero_copy_only=False), Reason.MISSING, Reason.GOOD).astype(np.uint8)
    return pc.if_else(missing, pa.scalar(None, pa.string()), cells).cast(pa.binary()), reasons


def decoded(cells: pa.Array) -> pa.Array:
    """The cells themselves, of a dictionary's."""
    import pyarrow as pa

    if not pa.types.is_dictionary(cells.type):
        return cells
    texts = str(cells.type.value_type) == "string_view"  # polars writes it, and take() does not know it
    return (cells.dictionary.cast(pa.string()) if texts else cells.dictionary).take(cells.indices)


def _codes(column: Column, texts: pa.Array, layout: Layout) -> tuple[Array, Array, Array]:
    """Codes, which are missing, reasons."""
    import pyarrow as pa
    import pyarrow.compute as pc

    assert column.spellings is not None
    # Nulls that are spellings of a value are values.
    meaning = {text: -1 for text in layout.nulls} | dict(column.spellings)
    if layout.strip:  # many files have a blank before each cell: looking these up at once saves trimming them
        meaning |= {f" {text}": code for text, code in meaning.items()}
    known = pa.array([*meaning], pa.string())
    codes = np.array([*meaning.values(), -2], np.int64)
    missing = texts.is_null().to_numpy(zero_copy_only=False)

    def look_up(some: pa.Array) -> Array:
        found: Array = codes[pc.index_in(some, value_set=known).fill_null(len(known)).to_numpy()]
        return found

    values = look_up(texts)
    rest = np.flatnonzero(values == -2)
    if layout.strip and len(rest):
        values[rest] = look_up(pc.utf8_trim_whitespace(texts.take(pa.array(rest))))
    missing |= values == -1
    unknown = (values == -2) & ~missing
    if column.other is not None:
        values[unknown] = column.other
        unknown[:] = False
    return values, missing, np.where(unknown, Reason.UNKNOWN, Reason.GOOD).astype(np.uint8)


def _numbers(cells: pa.Array, layout: Layout) -> tuple[Array, Array, Array]:
    """Numbers, which are missing, reasons."""
    import pyarrow as pa
    import pyarrow.compute as pc

    typed = not pa.types.is_string(cells.type)
    if not typed:
        if layout.strip:
            cells = pc.utf8_trim_whitespace(cells)
        null = pc.is_in(cells, value_set=pa.array(layout.nulls, pa.string()))
        cells = pc.if_else(null, pa.scalar(None, pa.string()), cells)
        cells = _readable(cells)
    missing = cells.is_null().to_numpy(zero_copy_only=False)
    values: Array = cells.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    values = values if values.flags.writeable else values.copy()
    for number in _null_numbers(layout) if typed else ():
        missing |= np.isnan(values) if math.isnan(number) else values == number
    bad = ~np.isfinite(values) & ~missing
    return values, missing, np.where(bad, Reason.NUMBER, Reason.GOOD).astype(np.uint8)


@functools.cache
def _null_numbers(layout: Layout) -> list[float]:
    """The nulls that are numbers: of a typed column they are no texts."""
    import pyarrow as pa

    return [pa.scalar(text).cast(pa.float64()).as_py() for text in map(str.strip, layout.nulls) if is_number(text)]


def _readable(texts: pa.Array) -> pa.Array:
    """`texts`, with "nan" in place of those that are no numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if _all_numbers(texts):
        return texts
    different = texts.dictionary_encode()
    bad = pa.array(_no_numbers(different.dictionary), pa.string())
    return pc.if_else(pc.is_in(texts, value_set=bad), "nan", texts)


def _no_numbers(texts: pa.Array) -> list[str]:
    """Those that are no numbers, by halving what has some: Arrow tells of one at a time."""
    if _all_numbers(texts):
        return []
    if len(texts) == 1:
        return [texts[0].as_py()]
    half = len(texts) // 2
    return _no_numbers(texts[:half]) + _no_numbers(texts[half:])


def _all_numbers(texts: pa.Array) -> bool:
    import pyarrow as pa

    try:
        texts.cast(pa.float64(), safe=False)
    except pa.ArrowInvalid:
        return False
    return True


def is_number(text: str) -> bool:
    """Whether Arrow reads it as one."""
    import pyarrow as pa

    return _all_numbers(pa.array([text.strip()], pa.string()))


def cell_error(column: Column, reason: int, row: int, value: object) -> CellError:
    """What to tell about a cell that cannot be used."""
    bound = "a finite number, or one of [file] nulls"
    if reason == Reason.MISSING:
        bound = "there: no value is declared for missing cells of this column"
        if column.type in ("label", "target"):
            bound = f"there: a {column.type} may not be missing"
    elif reason == Reason.UNKNOWN:
        bound = f"one of {', '.join(map(repr, column.spellings or ()))}"
    return CellError(column.name, row, value, bound)


def parse_or_raise(cells: Mapping[str, pa.Array], schema: Schema) -> dict[str, Array]:
    """The values of `parse_rows`; CellError about the first row, counted from 0, that cannot be used."""
    parsed = parse_rows(cells, schema)
    if parsed.reasons.any():
        row = int(parsed.reasons.astype(bool).argmax())
        column = schema.used[parsed.columns[row]]
        value = cells[column.name][row].as_py()
        value = value.strip() if schema.layout.strip and isinstance(value, str) else value
        raise cell_error(column, parsed.reasons[row], row, value)
    return parsed.values
