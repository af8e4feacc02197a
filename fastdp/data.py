"""Tables as tensors: a declared column contract (TOML) says what each column may hold, and how it becomes features.

Nothing here is computed from the records: bounds, vocabularies and bins are declared, so that the encoding of a row
depends on that row alone and costs no privacy (P11).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from fastdp.errors import ArgumentError, require

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

EMBEDDED: Final = ("adult",)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Table:
    """A data set ready for training. Features are finite; labels count classes from 0."""

    name: str
    train_features: torch.Tensor  # float32 [n, D]
    train_labels: torch.Tensor  # int64 [n]
    test_features: torch.Tensor  # float32 [m, D]
    test_labels: torch.Tensor  # int64 [m]
    feature_names: tuple[str, ...]  # D names: "age", "sex=Male", "age in [25, 30)"
    class_names: tuple[str, ...]
    size_is_public: bool  # whether n may be known to those who see the results

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


@dataclass(frozen=True)
class Column:
    """One column of the contract; adult.toml describes the fields."""

    name: str
    type: Literal["number", "category", "label", "ignore"]
    bounds: tuple[float, float] = (0.0, 0.0)
    scale: Literal["linear", "log", "none"] = "linear"
    bins: tuple[float, ...] = ()
    values: tuple[str, ...] = ()  # categories, or the first spelling of each class
    spellings: Mapping[str, int] | None = None  # what may stand in the raw file -> code

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features that `encode` makes of this column."""
        if self.type == "category":
            return tuple(f"{self.name}={value}" for value in self.values)
        if self.type != "number":
            return ()
        scaled = () if self.scale == "none" else (self.name,)
        if not self.bins:
            return scaled
        bins = itertools.pairwise((-math.inf, *self.bins, math.inf))
        return scaled + tuple(f"{self.name} in [{low:g}, {high:g})" for low, high in bins)

    def parse(self, texts: Sequence[str]) -> Array:
        """Raw texts to int64 codes (category, label) or float64 numbers.

        Raises:
            ArgumentError: naming column, row (from 0) and the value that is undeclared or no finite number.
        """
        if self.spellings is not None:
            codes = [self.spellings.get(text, -1) for text in texts]
            if -1 in codes:
                row = codes.index(-1)
                raise _cell_error(self.name, row, texts[row], f"one of {', '.join(map(repr, self.spellings))}")
            return np.array(codes, np.int64)
        numbers = np.empty(len(texts), np.float64)
        for row, text in enumerate(texts):
            try:
                numbers[row] = float(text)
            except ValueError:
                raise _cell_error(self.name, row, text, "a finite number") from None
        return self.check(numbers)

    def check(self, cells: Array) -> Array:
        """`cells` [n] unchanged if they are codes of the vocabulary, or finite numbers; ArgumentError as `parse`."""
        if self.spellings is None:
            bad, bound = ~np.isfinite(cells), "a finite number"
        else:
            bad, bound = (cells < 0) | (cells >= len(self.values)), f"a code in [0, {len(self.values)})"
        if bad.any():
            row = int(bad.argmax())
            raise _cell_error(self.name, row, cells[row].item(), bound)
        return cells

    def encode(self, cells: Array, out: npt.NDArray[np.float32]) -> None:
        """Write the features of `cells` [n], as from `parse`, into zeros `out` float32 [n, len(feature_names)]."""
        rows = np.arange(len(cells))
        self.check(cells)
        if self.type == "category":
            out[rows, cells] = 1
            return
        low, high = self.bounds
        clamped = np.clip(cells, low, high)
        if self.scale == "linear":
            out[:, 0] = (clamped - low) / (high - low)
        elif self.scale == "log":
            out[:, 0] = np.log1p(clamped - low) / math.log1p(high - low)
        if self.bins:
            out[rows, (self.scale != "none") + np.searchsorted(self.bins, clamped, side="right")] = 1


@dataclass(frozen=True)
class Schema:
    """A column contract."""

    name: str
    size_is_public: bool
    columns: tuple[Column, ...]

    @property
    def label(self) -> Column:
        """The label's column."""
        return next(column for column in self.columns if column.type == "label")

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of all features, in the order of `encode`."""
        return tuple(name for column in self.columns for name in column.feature_names)

    def encode(self, cells: Mapping[str, Array]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cells by column name, [n] each (as from `Column.parse`), to features float32 [n, D] and labels int64 [n].

        Raises:
            ArgumentError: naming column, row and value of the first bad cell.
        """
        labels = self.label.check(cells[self.label.name]).astype(np.int64)
        features = np.zeros((len(labels), len(self.feature_names)), np.float32)
        start = 0
        for column in self.columns:
            width = len(column.feature_names)
            if width:
                column.encode(cells[column.name], features[:, start : start + width])
            start += width
        return torch.from_numpy(features), torch.from_numpy(labels)


def load(name_or_path: str) -> Table:
    """A table by name: "adult" (UCI Adult, 32,561 training and 16,281 test rows, shipped with the package).

    Raises:
        ArgumentError: the name is unknown.
    """
    require(name_or_path in EMBEDDED, "data", name_or_path, f"one of {', '.join(map(repr, EMBEDDED))}")
    folder = resources.files("fastdp") / "datasets"
    schema = parse_schema((folder / f"{name_or_path}.toml").read_text(encoding="utf-8"))
    with (folder / f"{name_or_path}.npz").open("rb") as file, np.load(file, allow_pickle=False) as cells:
        used = [column.name for column in schema.columns if column.type != "ignore"]
        train, test = (
            schema.encode({column: cells[f"{split}.{column}"] for column in used}) for split in ("train", "test")
        )
    return Table(name_or_path, *train, *test, schema.feature_names, schema.label.values, schema.size_is_public)


def check_finite(features: torch.Tensor, feature_names: Sequence[str] | None = None) -> None:
    """Refuse NaN and Inf before training.

    Args:
        features: floating-point [n, D].
        feature_names: D names for the message; numbers otherwise.

    Raises:
        ArgumentError: naming the column, the row (from 0) and the value of the first such cell.
    """
    if bool(torch.isfinite(features).all()):
        return
    row, column = (int(i) for i in (~torch.isfinite(features)).nonzero()[0])
    name = feature_names[column] if feature_names is not None else column
    raise _cell_error(name, row, features[row, column].item(), "finite")


def parse_schema(text: str) -> Schema:
    """A column contract from the text of its TOML file.

    Raises:
        ArgumentError: naming the column, and the field that is missing, unknown or out of its bounds.
    """
    document = tomllib.loads(text)
    require(document.get("format") == 1, "format", document.get("format"), "1")
    columns = tuple(_parse_column(fields) for fields in document.get("column", []))
    names = [column.name for column in columns]
    require(len(set(names)) == len(names), "column", names, "of different names")
    labels = [column.name for column in columns if column.type == "label"]
    require(len(labels) == 1, "label", labels, "exactly one column")
    return Schema(str(document["name"]), bool(document.get("size_is_public", False)), columns)


_FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "number": frozenset({"bounds", "scale", "bins"}),
    "category": frozenset({"values"}),
    "label": frozenset({"values"}),
    "ignore": frozenset(),
}


def _parse_column(fields: Mapping[str, Any]) -> Column:
    name: Any = fields.get("name")
    kind: Any = fields.get("type")
    require(isinstance(name, str) and name != "", "column.name", name, "a name")
    require(kind in _FIELDS, f"{name}.type", kind, f"one of {', '.join(map(repr, _FIELDS))}")
    unknown = sorted(set(fields) - {"name", "type"} - _FIELDS[kind])
    require(not unknown, f"{name}", unknown, f"without fields that a {kind} does not have")
    if kind == "number":
        bounds: Any = fields.get("bounds")
        scale, bins = fields.get("scale", "linear"), fields.get("bins", [])
        ordered = isinstance(bounds, list) and len(bounds) == 2 and -math.inf < bounds[0] < bounds[1] < math.inf
        require(ordered, f"{name}.bounds", bounds, "[low, high], finite, low < high")
        require(scale in ("linear", "log", "none"), f"{name}.scale", scale, "'linear', 'log' or 'none'")
        edges = [bounds[0], *bins, bounds[1]]
        inside = all(a < b for a, b in itertools.pairwise(edges))
        require(inside, f"{name}.bins", bins, f"increasing and strictly inside {bounds}")
        return Column(name, "number", (float(bounds[0]), float(bounds[1])), scale, tuple(map(float, bins)))
    values = fields.get("values", [])
    if kind == "ignore":
        return Column(name, "ignore")
    groups = [value if isinstance(value, list) else [value] for value in values]
    spellings = {spelling: code for code, group in enumerate(groups) for spelling in group}
    unique = len(spellings) == sum(map(len, groups)) and all(groups) and all(isinstance(s, str) for s in spellings)
    require(len(groups) >= 2 and unique, f"{name}.values", values, "two or more different texts")
    return Column(name, kind, values=tuple(group[0] for group in groups), spellings=spellings)


def _cell_error(column: object, row: int, value: object, bound: str) -> ArgumentError:
    return ArgumentError(f"column {column!r}, row {row}", value, bound)
