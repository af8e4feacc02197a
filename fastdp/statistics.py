"""Statistics of the training rows, for the columns whose contract asks for them and does not declare them.

They are sums of a vector per row: of whole numbers of 1/GRID, so that they are exact in any order, and clamped by what
is declared, so that no vector is longer than `sensitivity`. Gaussian noise is drawn once, from the system's generator,
where they come together; what is made of the noisy sums costs nothing more (Dwork & Roth 2014, A.1 and 2.1).
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from fastdp.columns import Array, Column, Schema

GRID: Final = 1 << 24
SMALLEST_DEVIATION: Final = 1e-3  # of numbers in [0, 1]

Sums = Mapping[str, list[int]]


def sums(values: Mapping[str, Array], schema: Schema) -> Sums:
    """Of rows' codes or numbers [n] by column: of a number's presence, itself and its square; of each code's presence.

    Numbers are scaled to [0, 1]. Missing ones (NaN, -1) add nothing.
    """
    return {column.name: _sums(column, values[column.name]) for column in _asked(schema)}


def _sums(column: Column, cells: Array) -> list[int]:
    if column.spellings is not None:
        counts = np.bincount(cells[cells >= 0], minlength=len(column.values))
        return [int(count) * GRID for count in counts]
    scaled = column.scaled(cells[~np.isnan(cells)])
    on_grid = [np.rint(part * GRID).astype(np.int64) for part in (scaled, scaled**2)]
    return [len(scaled) * GRID, *(int(part.sum()) for part in on_grid)]


def _length(column: Column) -> int:
    return 3 if column.spellings is None else len(column.values)


def _asked(schema: Schema) -> list[Column]:
    return [column for column in schema.columns if column.name in schema.unknown]


def added(parts: Iterable[Sums]) -> Sums:
    """Of all rows, from those of parts."""
    total: dict[str, list[int]] = {}
    for part in parts:
        for name, numbers in part.items():
            total[name] = [a + b for a, b in zip(numbers, total.get(name, [0] * len(numbers)), strict=True)]
    return total


def sensitivity(schema: Schema) -> float:
    """The length of the longest vector that a row can add: three numbers in [0, 1] a column, or a one."""
    return math.sqrt(sum(1 if column.spellings is not None else 3 for column in _asked(schema)))


def release(total: Sums, schema: Schema) -> dict[str, Any]:
    """What the manifest says of them, with noise if the contract says "dp"; `columns` as [statistics] there."""
    how = schema.preparation
    deviation = how.noise_multiplier * sensitivity(schema)
    total = {column.name: total.get(column.name, [0] * _length(column)) for column in _asked(schema)}  # of no rows
    known = noisy(total, deviation) if how.statistics == "dp" else total
    columns = {column.name: _statistics(column, known[column.name], deviation) for column in _asked(schema)}
    mechanism = {"mechanism": "Gaussian", "sensitivity": sensitivity(schema), "noise_multiplier": how.noise_multiplier}
    return {"dp": how.statistics == "dp", **(mechanism if how.statistics == "dp" else {}), "columns": columns}


def placeholders(schema: Schema) -> dict[str, Any]:
    """As `release`, of nothing: to see whether a contract can take them."""
    columns = {column.name: _statistics(column, [0] * _length(column), 0.0) for column in _asked(schema)}
    return {"dp": False, "columns": columns}


def noisy(total: Sums, deviation: float) -> Sums:
    """With Gaussian noise of that standard deviation, where a number of `total` is one of 1/GRID.

    It is rounded to the grid before it is added, which is the same as afterwards: only the sum shows.
    """
    generator = secrets.SystemRandom()
    return {
        name: [n + round(generator.gauss(0.0, deviation) * GRID) for n in numbers] for name, numbers in total.items()
    }


def _statistics(column: Column, known: list[int], noise: float) -> dict[str, float | str]:
    """Of the sums; noise: their standard deviation."""
    if column.spellings is not None:
        counts = {text: known[code] for text, code in column.spellings.items()}
        return {"mode": max(counts, key=lambda text: counts[text])}
    count = max(known[0] / GRID, 1.0)
    mean = min(max(known[1] / GRID / count, 0.0), 1.0)
    # No deviation is smaller than what the noise may have made of it.
    smallest = max(SMALLEST_DEVIATION**2, noise / count)
    variance = min(max(known[2] / GRID / count - mean**2, smallest), 1.0)
    found: dict[str, float | str] = {"mean": mean, "deviation": math.sqrt(variance)}
    return {name: found[name] for name in column.statistics}


def declared(config: str, released: Mapping[str, Any] | None) -> str:
    """The contract's text with these statistics in it."""
    if released is None:
        return config
    how = "with noise" if released["dp"] else "without noise: NOT PRIVATE, not to be published"
    lines = [config.rstrip("\n"), "", f"# Computed by prepare, {how}."]
    for name, numbers in released["columns"].items():
        lines += [f"[statistics.{_quoted(name)}]", *(f"{key} = {_quoted(value)}" for key, value in numbers.items())]
    return "\n".join([*lines, ""])


def _quoted(value: float | str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
