"""A first draft of a column contract, from the first rows of a table, for people who know the table to correct.

What it takes from the rows is private, which a contract must not be: each line that holds such ends with `MARK`.
Names of columns and the layout of the file are taken to be public.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fastdp import pieces
from fastdp.cells import decoded, parse
from fastdp.columns import Column, Layout, Schema
from fastdp.errors import require
from fastdp.peek import ROWS, Sample, sample
from fastdp.schema import MARK
from fastdp.transform import Source

if TYPE_CHECKING:
    import pyarrow as pa

NULLS: Final = ("", "?", "-", ".", "na", "n/a", "#n/a", "nan", "null", "none")  # in lower case
CATEGORIES: Final = 60  # more different texts than these are no vocabulary
CLASSES: Final = 20  # more are no label; nor a vocabulary, if no two cells are equal
BOOLEANS: Final = (["0", "1"], ["false", "true"])  # that a contract takes undeclared
LARGEST: Final = math.nextafter(1e300, 0)  # bound that a contract takes

HEADER: Final = (
    "# a guess: the first row has no number and no equal cells; "
    "if it is a row of the table, the names below are private"
)
NO_HEADER: Final = "# a guess: the first row has numbers or equal cells; the columns are named by their places"


@dataclass(frozen=True)
class Found:
    """What a column of the sample holds."""

    texts: list[str]  # different ones, without those that mean missing; of numbers with fractions, none
    nulls: list[str]  # different ones that mean missing; "" stands for a null, too
    bounds: list[float]  # of the finite ones, if nine tenths of the cells are numbers and two differ; else empty
    infinite: bool = False  # whether others of the numbers are not finite
    mixed: bool = False  # whether others of the cells are no numbers
    repeats: bool = False  # whether two cells are equal

    @property
    def can_be_label(self) -> bool:
        return 2 <= len(self.texts) <= CLASSES and not self.nulls

    @property
    def can_be_category(self) -> bool:
        most = CATEGORIES if self.repeats else CLASSES
        return bool(self.texts) and 2 <= len(self.texts) + bool(self.nulls) <= most


def draft(sources: list[Source]) -> str:
    """TOML that parse_schema accepts once one column is the label, which it is already where that may be guessed.

    Raises:
        ArgumentError: if the first file that has rows cannot be read or has no two columns that can be used, or if the
            columns of other files have other names.
    """
    sampled = ((source, sample(source)) for source in sources)
    empty = sources[0], Sample({}, Counter(), Layout())
    source, first = next((pair for pair in sampled if pair[1].rows or pair[1].unread), empty)
    unread = ", ".join(f"{count} {why}" for why, count in sorted(first.unread.items()))
    bound = f"a table with rows that can be read, not {unread}" if unread else "a table with a row, below its header"
    require(first.rows > 0, "input", source.path, bound)
    schema = Schema("", False, tuple(Column(name, "category") for name in first.columns), first.layout)
    for other in sources:
        pieces.cut(other, schema)  # looks for the columns' names
    columns = {name: _find(cells) for name, cells in first.columns.items()}
    used = [name for name, column in columns.items() if column.bounds or column.can_be_category]
    require(len(used) >= 2, "input", source.path, f"a table with two columns or more that vary and can be used: {used}")
    label = next((name for name in reversed(used) if columns[name].can_be_label), None)
    nulls = {"", *itertools.chain(*(column.nulls for column in columns.values()))}
    lines = [
        f"# A draft from up to {ROWS} rows of {_text(source.name)}. Of other files, only the columns' names were read.",
        "# A line that is marked private tells of these rows, and no epsilon covers it: put there what is known of the",
        '# table without looking, and take the mark off; or make it DP, as stats = "dp" in [prepare] makes means,',
        "# deviations and modes. Names of columns and the layout of the file are taken to be public. Cells of other",
        "# rows that are unlike these are errors, unless `missing` or `other` says what they stand for. A column that",
        '# says whose row it is has the type "user".',
        "format = 1",
        f"name = {_text(source.name.split('/')[-1].split('.')[0])}",
        "",
        "[file]",
        *(_file_lines(first.layout) if source.kind == "csv" else ()),
        f"nulls = {_list(sorted(nulls))}  {MARK}",
    ]
    if unread:
        advice = ". Cells that hold line feeds need multiline = true" if "quotes" in first.unread else ""  # only of CSV
        lines.append(f"# Rows that cannot be read: {unread}{advice}  {MARK}")
    for name, column in columns.items():
        lines += ["", "[[column]]", f"name = {_text(name)}", *_column_lines(column, name == label)]
    if label is None:
        why = 'No guess at the label: one column must have the type "label", or "target" if it has bounds'
        lines += ["", f"# {why}  {MARK}"]
    return "\n".join([*lines, ""])


def _file_lines(layout: Layout) -> list[str]:
    header, why = ("true", HEADER) if layout.header else ("false", NO_HEADER)
    lines = [why, f"header = {header}", f"delimiter = {_text(layout.delimiter)}"]
    return [*lines, f"comment = {_text(layout.comment)}"] if layout.comment else lines


def _column_lines(column: Found, is_label: bool) -> list[str]:
    values = f"values = {_list(column.texts)}  {MARK}"
    if is_label:
        return [f'type = "label"  {MARK}', "# a guess: the last column of few different texts, none missing", values]
    if not column.nulls and [text.lower() for text in column.texts] in BOOLEANS:
        return [f'type = "boolean"  {MARK}', *([] if column.texts in BOOLEANS else [values])]
    if column.bounds:
        lines = [f'type = "number"  {MARK}', f"bounds = [{', '.join(map(_number, column.bounds))}]  {MARK}"]
        if column.infinite:
            lines.append(f"# NaN or infinite cells are errors; there are some  {MARK}")
        if column.mixed:
            lines.append(f"# cells that are no numbers are errors; there are some  {MARK}")
        return [*lines, f'missing = "indicator"  {MARK}'] if column.nulls else lines
    if column.can_be_category and column.nulls:
        nulls = _text(column.nulls[0]) if len(column.nulls) == 1 else _list(column.nulls)
        values = f"values = [{', '.join([*map(_text, column.texts), nulls])}]  {MARK}"
        return [f'type = "category"  {MARK}', values, f"missing = {_text(column.nulls[0])}  {MARK}"]
    if column.can_be_category:
        return [f'type = "category"  {MARK}', values]
    why = "one value at most, or neither texts nor numbers nor booleans"
    if len(column.texts) > 1:
        why = 'too many different texts for a vocabulary; if they say whose row it is: type = "user"'
    return [f'type = "ignore"  {MARK}', f"# {why}  {MARK}"]


def _find(cells: pa.Array) -> Found:
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = decoded(cells)
    whole = pa.types.is_integer(cells.type) or pa.types.is_boolean(cells.type)
    if pa.types.is_floating(cells.type) or pa.types.is_decimal(cells.type):
        numbers = cells.drop_null().cast(pa.float64(), safe=False).to_pylist()
        return Found([], [""] if cells.null_count else [], *_bounds(numbers))
    if not whole and str(cells.type) not in ("string", "large_string", "string_view"):
        return Found([], [], [])
    counted = pc.utf8_trim_whitespace(cells.cast(pa.string())).fill_null("").value_counts()
    counts = dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True))
    nulls = sorted(text for text in counts if text.lower() in NULLS)
    texts = sorted(set(counts).difference(nulls))
    repeats = any(counts[text] > 1 for text in texts)
    if any(re.fullmatch("0[0-9]+", text) for text in texts):  # a zip code's, say; a number has no such
        return Found(texts, nulls, [], repeats=repeats)
    values, _ = parse(Column("", "number"), pa.array(texts, pa.string()), Layout(nulls=()))
    numbers = {text: value for text, value in zip(texts, values.tolist(), strict=True) if not math.isnan(value)}
    if 10 * sum(counts[text] for text in numbers) < 9 * sum(counts[text] for text in texts):
        return Found(texts, nulls, [], repeats=repeats)
    in_order = sorted(texts, key=lambda text: (numbers.get(text, math.inf), text))
    return Found(in_order, nulls, *_bounds([*numbers.values()]), len(numbers) < len(texts), repeats)


def _bounds(numbers: list[float]) -> tuple[list[float], bool]:
    """The least and the greatest finite one, if they differ; and whether there are others."""
    finite = [min(max(number, -LARGEST), LARGEST) for number in numbers if math.isfinite(number)]
    low, high = min(finite, default=0), max(finite, default=0)
    return [low, high] if low < high else [], len(finite) < len(numbers)


def _text(text: str) -> str:
    """A TOML string on one line, of characters that can be seen; what a file's name has that is none, is lost."""
    quoted = json.dumps(text.encode(errors="replace").decode(), ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in quoted)


def _list(texts: list[str]) -> str:
    return f"[{', '.join(map(_text, texts))}]"


def _number(number: float) -> str:
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)
