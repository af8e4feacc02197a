"""A data set in memory, ready for training, and what must be true of it before training may begin."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdp.accounting import Event
from fastdp.columns import CellError, Column
from fastdp.comm import Communicator
from fastdp.errors import ArgumentError, require
from fastdp.stacked import Records, Stacked


@dataclass(frozen=True)
class Table:
    """A data set ready for training. Features are finite; labels count classes from 0, or are regression targets.

    No class names: regression. `target` says how the targets were scaled, so that figures are in their own unit.
    Records may have any shape; D stands for it.
    """

    name: str
    train_features: Tensor | Stacked  # float32 [n, D]
    train_labels: Tensor | Stacked  # int64 [n], float32 for regression
    test_features: Tensor | Stacked  # float32 [m, D]
    test_labels: Tensor | Stacked  # as train_labels [m]
    feature_names: tuple[str, ...]  # D names: "age", "sex=Male", "age in [25, 30)"; or none
    class_names: tuple[str, ...]
    size_is_public: bool  # whether n may be known to those who see the results
    target: Column | None = None
    evaluation: str = "the evaluation table"  # where the evaluation rows come from
    assumptions: tuple[str, ...] = ()  # what a reader of the epsilon must know about this table
    train_categories: Stacked | None = None  # int32 [n, K]: codes that models get after the features
    test_categories: Stacked | None = None
    category_sizes: tuple[int, ...] = ()  # K vocabularies' sizes
    digest: str | None = None  # of a prepared table, which was checked when it was written
    schema: str | None = None  # text of the TOML file by which rows become features, if there is one; public
    unit: str = "row"  # what epsilon protects
    prior: Mapping[Event, int] = field(default_factory=dict)  # what the records were used for before, as of an engine
    statistics: str = ""  # that were computed of the records: a run goes on with no others

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for regression."""
        return len(self.class_names)

    @property
    def task(self) -> str:
        """What is learned: "binary", "multi-class" or "regression"."""
        return {0: "regression", 2: "binary"}.get(self.num_classes, "multi-class")

    @property
    def outputs(self) -> int:
        """Outputs of a model of this table: a logit per class, one for two classes, one for a target."""
        return self.num_classes if self.task == "multi-class" else 1

    @property
    def training(self) -> Records:
        """Features, categories if there are any, and the label of each training record."""
        inputs = (self.train_features, *([] if self.train_categories is None else [self.train_categories]))
        return Records(*inputs, self.train_labels)

    @property
    def declaration(self) -> str:
        """What its columns are; public."""
        return repr((self.feature_names, self.class_names, self.target, self.schema, self.statistics))


def check(table: Table) -> None:
    """Refuse a table that cannot be trained on; the user's code may have made it.

    Prepared tables are not read: their files hold what their schema allows, and `load` has compared the shapes.

    Raises:
        ArgumentError: naming what is wrong, with row and value.
    """
    tensors = (table.train_features, table.train_labels, table.test_features, table.test_labels)
    if table.digest is not None and all(isinstance(x, Stacked) for x in tensors):
        return
    require(table.num_classes != 1, "class_names", table.class_names, "two or more; none for regression")
    for split in ("train", "test"):
        features, labels = (_parts(getattr(table, f"{split}_{name}")) for name in ("features", "labels"))
        require(len(features) == len(labels), f"{split}_labels", f"{len(labels)} parts", f"{len(features)}")
        for x, y in zip(features, labels, strict=True):
            _check_split(table, split, x, y)


def _check_split(table: Table, split: str, features: Tensor, labels: Tensor) -> None:
    regression = table.task == "regression"
    kind = torch.float32 if regression else torch.int64
    for name, x in (("features", features), ("labels", labels)):
        plain = isinstance(x, Tensor) and x.layout is torch.strided and x.is_cpu and not x.requires_grad
        bound = "a dense tensor on the CPU that requires no gradient"
        require(plain, f"{split}_{name}", type(x).__name__, bound)
    rows, width = features.shape[0] if features.ndim >= 2 else 0, table.train_features.shape[1:]
    require(rows >= 1 and features.numel() > 0, f"{split}_features.shape", tuple(features.shape), "[rows >= 1, D >= 1]")
    require(features.shape[1:] == width, f"{split}_features.shape", tuple(features.shape), f"[rows, *{tuple(width)}]")
    require(features.dtype is torch.float32, f"{split}_features.dtype", features.dtype, "torch.float32")
    names, count = table.feature_names, features[0].numel()
    require(len(names) in (0, count), "feature_names", f"{len(names)} names", f"none, or {count}")
    require(labels.shape == (rows,), f"{split}_labels.shape", tuple(labels.shape), f"({rows},), one per record")
    require(labels.dtype is kind, f"{split}_labels.dtype", labels.dtype, f"{kind} for {table.task}")
    check_finite(features.flatten(1), table.feature_names or None)
    if regression:
        check_finite(labels[:, None], ("the label",))
    else:
        bad = (labels < 0) | (labels >= table.num_classes)
        if bool(bad.any()):
            row = int(bad.int().argmax())
            raise CellError("the label", row, labels[row].item(), f"a class in [0, {table.num_classes})")


def _parts(x: Tensor | Stacked) -> list[Tensor]:
    return x.parts if isinstance(x, Stacked) else [x]


def check_same(comm: Communicator, table: Table) -> None:
    """Refuse ranks that hold different tables: they would train on a mixture that no sampling rate describes.

    The digests travel between ranks like the gradients do, and are neither shown nor kept.

    Raises:
        ArgumentError: on all ranks, naming those that differ from rank 0.
    """
    if comm.size == 1:
        return
    digest = hashlib.blake2b(repr((table.declaration, table.digest)).encode())
    inputs = (table.train_features, table.test_features, table.train_categories, table.test_categories)
    for tensor in (*inputs, table.train_labels, table.test_labels):
        if tensor is None or (isinstance(tensor, Stacked) and table.digest is not None):
            continue  # the files' checksums are in table.digest
        for part in _parts(tensor):
            digest.update(repr((part.shape, part.dtype)).encode())
            digest.update(part.detach().contiguous().numpy().data)
    first, *others = comm.allgather_object((digest.digest(), len(table.train_labels), len(table.test_labels)))
    different = [(rank, n, m) for rank, (other, n, m) in enumerate(others, 1) if other != first[0]]
    if different:
        what = "; ".join(f"rank {rank} has {n} training and {m} evaluation rows" for rank, n, m in different)
        bound = f"the same on all ranks, value by value: rank 0 has {first[1]} training and {first[2]} evaluation rows"
        raise ArgumentError("data", what, bound)


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
    raise CellError(name, row, features[row, column].item(), "finite")
