"""The column contract as objects, and rows to arrays by it. fastdp/schema.py reads it and says what it means.

The encoding of a row depends on that row and on what is declared, on nothing else (P11).
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastdp.errors import ArgumentError

Array = npt.NDArray[Any]


class Reason(enum.IntEnum):
    """Why a row cannot be used."""

    GOOD = 0
    WIDTH = 1  # not as many cells as there are columns
    QUOTES = 2  # a quotation mark or a carriage return where none may stand
    ENCODING = 3  # not UTF-8
    LONG = 4
    MISSING = 5  # a missing cell, for which no value is declared
    UNKNOWN = 6  # a text outside the vocabulary
    NUMBER = 7  # no finite number
    SYNTAX = 8  # no JSON object, or with a member that is undeclared, or is neither text nor number nor boolean


class CellError(ArgumentError):
    """A cell that its column's contract forbids. `row` counts from 0, in the cells that were at hand."""

    def __init__(self, column: object, row: int, value: object, bound: str, file: str = "") -> None:
        super().__init__(f"column {column!r}, row {row}{file and f' of {file}'}", value, bound)
        self.cell = (column, row, value, bound)

    def at(self, first_row: int, file: str) -> CellError:
        """The same, where `first_row` rows of `file` stand before the cells that were at hand."""
        column, row, value, bound = self.cell
        return CellError(column, first_row + row, value, bound, file)


@dataclass(frozen=True)
class Column:
    """One column of the contract."""

    name: str
    type: Literal["number", "category", "boolean", "label", "target", "ignore", "user"]
    bounds: tuple[float, float] = (0.0, 0.0)
    scale: Literal["linear", "log", "none"] = "linear"
    bins: tuple[float, ...] = ()
    values: tuple[str, ...] = ()  # categories, or the first spelling of each class
    spellings: Mapping[str, int] | None = None  # what may stand in the raw file -> code
    other: int | None = None  # code that stands for a text outside the vocabulary
    missing: float | None = None  # number or code that stands for a missing cell; NaN or -1: `fill` says what does
    fill: Literal["declared", "indicator", "mean", "mode"] = "declared"  # indicator: a feature of its own
    is_code: bool = False  # a category without features: its code goes to the model
    standardize: bool = False  # the scaled number less its mean, divided by its deviation
    mean: float | None = None  # of scaled numbers, in [0, 1]; with the next two, the statistics of a column
    deviation: float | None = None  # of scaled numbers
    mode: int | None = None  # the most frequent code

    @property
    def statistics(self) -> tuple[str, ...]:
        """Which it needs."""
        if self.standardize:
            return ("mean", "deviation")
        return (self.fill,) if self.fill in ("mean", "mode") else ()

    @property
    def has_indicator(self) -> bool:
        """Whether missing cells have a feature of their own."""
        return self.fill == "indicator"

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features that `encode` makes of this column."""
        if self.type == "category" and not self.is_code:
            return tuple(f"{self.name}={value}" for value in self.values)
        if self.type == "boolean":
            return (self.name,)
        if self.type != "number":
            return ()
        names: tuple[str, ...] = () if self.scale == "none" else (self.name,)
        if self.bins:
            bins = itertools.pairwise((-math.inf, *self.bins, math.inf))
            names += tuple(f"{self.name} in [{low:g}, {high:g})" for low, high in bins)
        return (*names, f"{self.name} is missing") if self.has_indicator else names

    def check(self, cells: Array) -> Array:
        """`cells` [n] if they are codes of the vocabulary, or finite numbers (NaN where an indicator tells of it).

        Missing ones that parsing left to a statistic are filled in.

        Raises:
            CellError: naming column, row (from 0) and value of the first other cell.
        """
        if self.fill == "mean" and self.mean is not None:
            cells = np.where(np.isnan(cells), self.unscaled(np.float64(self.mean)), cells)
        if self.fill == "mode" and self.mode is not None:
            cells = np.where(cells == -1, self.mode, cells)
        if self.spellings is None:
            bad, bound = ~np.isfinite(cells), "a finite number"
            if self.has_indicator:
                bad &= ~np.isnan(cells)
        else:
            bad, bound = (cells < 0) | (cells >= len(self.values)), f"a code in [0, {len(self.values)})"
        if bad.any():
            row = int(bad.argmax())
            raise CellError(self.name, row, cells[row].item(), bound)
        return cells

    def scaled(self, cells: Array) -> Array:
        """`cells`, clamped to the bounds, in [0, 1]."""
        low, high = self.bounds
        above = np.clip(cells, low, high) - low
        return above / (high - low) if self.scale != "log" else np.log1p(above) / math.log1p(high - low)

    def unscaled(self, scaled: Array) -> Array:
        """The inverse of `scaled`; what lies outside [0, 1] is clamped."""
        low, high = self.bounds
        inside = np.clip(scaled, 0, 1)
        return low + (inside * (high - low) if self.scale != "log" else np.expm1(inside * math.log1p(high - low)))

    def encode(self, cells: Array, out: npt.NDArray[np.float32]) -> None:
        """Write the features of `cells` [n], codes or numbers, into zeros `out` float32 [n, len(feature_names)]."""
        rows: Array = np.arange(len(cells))
        cells = self.check(cells)
        if self.type == "boolean":
            out[:, 0] = cells
            return
        if self.type == "category":
            out[rows, cells] = 1
            return
        if self.has_indicator:
            missing = np.isnan(cells)
            out[missing, -1] = 1
            rows, cells = rows[~missing], cells[~missing]
        if self.scale != "none":
            scaled = self.scaled(cells)
            if self.standardize:
                assert self.mean is not None and self.deviation is not None
                scaled = (scaled - self.mean) / self.deviation
            out[rows, 0] = scaled
        if self.bins:
            # Values outside the bounds need no clamping here: the edges lie inside.
            out[rows, (self.scale != "none") + np.searchsorted(self.bins, cells, side="right")] = 1


@dataclass(frozen=True)
class Layout:
    """How cells are written in files."""

    header: bool = True
    delimiter: str = ","
    comment: str = ""
    strip: bool = True
    nulls: tuple[str, ...] = ("",)
    quotes: bool = True
    multiline: bool = False


@dataclass(frozen=True)
class Batch:
    """Encoded rows."""

    features: npt.NDArray[np.float32]  # [n, D]
    categories: npt.NDArray[np.int32]  # [n, K]
    labels: Array  # int64 [n] classes, or float32 [n] scaled targets; float32 NaN [n] where they are not read

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: Array) -> Batch:
        return Batch(self.features[chosen], self.categories[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Preparation:
    """How spark_jobs/prepare.py divides the rows."""

    test: float = 0.2  # share held out
    key: str = "fastdp"
    split_by: Literal["content", "place"] = "content"
    records_per_user: int = 1
    statistics: Literal["declared", "dp", "non-private"] = "declared"
    noise_multiplier: float = 0.0  # of "dp"


@dataclass(frozen=True)
class Schema:
    """A column contract."""

    name: str
    size_is_public: bool
    columns: tuple[Column, ...]
    layout: Layout = Layout()
    preparation: Preparation = Preparation()
    labelled: bool = True  # False: rows to predict; label, target and user are not read, and may be absent

    @property
    def used(self) -> tuple[Column, ...]:
        """All columns that are read."""
        unread = ("ignore",) if self.labelled else ("ignore", "label", "target", "user")
        return tuple(column for column in self.columns if column.type not in unread)

    @property
    def coded(self) -> tuple[Column, ...]:
        """The categories that are left as codes, in order."""
        return tuple(column for column in self.columns if column.is_code)

    @property
    def user(self) -> Column | None:
        """Whose record a row is, if that is declared."""
        return next((column for column in self.columns if column.type == "user"), None)

    @property
    def unit(self) -> Literal["row", "user", "record"]:
        """What epsilon protects; "record": one of several of a user."""
        if self.user is None:
            return "row"
        return "user" if self.preparation.records_per_user == 1 else "record"

    @property
    def unknown(self) -> tuple[str, ...]:
        """Columns whose statistics are not declared."""
        columns = (c.name for c in self.columns if any(getattr(c, what) is None for what in c.statistics))
        return tuple(columns)

    @property
    def label(self) -> Column:
        """The column of the label or target."""
        return next(column for column in self.columns if column.type in ("label", "target"))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of all features, in the order of `encode`."""
        return tuple(name for column in self.columns for name in column.feature_names)

    def encode(self, cells: Mapping[str, Array]) -> Batch:
        """Cells by column name, codes or numbers [n], encoded.

        Raises:
            CellError: naming column, row and value of the first bad cell.
        """
        labels = self._encode_labels(cells)
        features = np.zeros((len(labels), len(self.feature_names)), np.float32)
        start = 0
        for column in self.columns:
            width = len(column.feature_names)
            if width:
                column.encode(cells[column.name], features[:, start : start + width])
            start += width
        categories = np.empty((len(labels), len(self.coded)), np.int32)
        for i, column in enumerate(self.coded):
            categories[:, i] = column.check(cells[column.name])
        return Batch(features, categories, labels)

    def _encode_labels(self, cells: Mapping[str, Array]) -> Array:
        if not self.labelled:
            return np.full(len(next(iter(cells.values()))), np.nan, np.float32)
        labels = self.label.check(cells[self.label.name])
        is_target = self.label.type == "target"
        return self.label.scaled(labels).astype(np.float32) if is_target else labels.astype(np.int64)
