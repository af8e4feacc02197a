"""What must be the same on all ranks before they train together: what is not is named, with two ranks' values.

Other records, or the same in another order, are more than a mistake: sampling is by number, and a record that two ranks
have under different numbers could be in one batch twice, which is twice what the noise hides.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import math
import random
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from fastdp.comm import Communicator
from fastdp.device import random_states, restore_random_states
from fastdp.errors import CommError
from fastdp.plan import Plan
from fastdp.stacked import Records

LOOKED_AT = 64  # records
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of functions, in the repr of what has one
TOLERANCE = 1e-4  # of a record's floating-point numbers, which ranks may have computed themselves, with other roundings


def check(
    comm: Communicator,
    plan: Plan,
    module: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[Any],
    account: Mapping[str, object],
) -> None:
    """CommError, the same on all ranks, if one differs from rank 0."""
    mine = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)} | dict(account)
    mine["len(dataset)"] = len(loader.dataset)  # type: ignore[arg-type]
    mine["optimizer"] = type(optimizer).__name__
    names = {p: name for name, p in module.named_parameters()}
    for i, group in enumerate(optimizer.param_groups):
        mine |= {f"param_groups[{i}][{k!r}]": _setting(v) for k, v in group.items() if k != "params"}
        mine[f"param_groups[{i}]['params']"] = [names.get(p, "") for p in group["params"]]
    for name, m in module.named_modules():
        mine[f"module '{name}'" if name else "module"] = f"{type(m).__qualname__}({ADDRESS.sub('', m.extra_repr())})"
    state = [*module.named_parameters(), *module.named_buffers()]
    mine["module: order of parameters"] = [name for name, _ in state]
    for name, x in state:
        mine[f"module.{name}"] = f"{x.dtype}{list(x.shape)}{'' if x.requires_grad else ', no gradient'}"
    (first, records), *others = comm.allgather_object((mine, fingerprints(loader)))
    for rank, (other, theirs) in enumerate(others, 1):
        for name in {**first, **other}:
            a, b = (x.get(name, "none") for x in (other, first))
            if a != b:
                raise CommError(f"ranks disagree: {name}: {a!r} on rank {rank}, {b!r} on rank 0")
        for i, a, b in zip(_looked_at(loader), theirs, records, strict=True):
            if not a.is_like(b):
                raise CommError(
                    f"ranks disagree: dataset[{i}]: another record on rank {rank} than on rank 0: must be the same "
                    "records, in the same order"
                )


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Of one record. exact: a digest of its whole numbers; total, size: the sum of the others, and of their sizes."""

    exact: bytes
    total: float = 0.0
    size: float = 0.0

    def is_like(self, other: Fingerprint) -> bool:
        limit = TOLERANCE * max(self.size, other.size)
        same = self.total == other.total or math.isnan(self.total + other.total)
        return self.exact == other.exact and (same or abs(self.total - other.total) <= limit)


def fingerprints(loader: DataLoader[Any]) -> list[Fingerprint]:
    """Of some records, evenly spread: all numbers where they are tensors. Of other datasets only whole numbers, labels
    say; and none where workers read them, since files may have to be opened there. What is drawn meanwhile, for random
    transforms, is the same on all ranks."""
    states, python, numbers = random_states(), random.getstate(), np.random.get_state()
    try:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        return [_fingerprint(*_place(loader.dataset, i), loader.num_workers == 0) for i in _looked_at(loader)]
    finally:
        restore_random_states(states)
        random.setstate(python)
        np.random.set_state(numbers)


def _looked_at(loader: DataLoader[Any]) -> list[int]:
    n = len(loader.dataset)  # type: ignore[arg-type]
    count = min(n, LOOKED_AT)
    return [i * (n - 1) // max(1, count - 1) for i in range(count)]


def _place(dataset: Any, i: Any) -> tuple[Any, Any]:
    """The dataset of the user's own that holds a record, and the record's number there."""
    while type(dataset) in (Subset, ConcatDataset):
        if type(dataset) is Subset:
            dataset, i = dataset.dataset, dataset.indices[i]
        else:
            part = bisect.bisect_right(dataset.cumulative_sizes, i)
            before = dataset.cumulative_sizes[part - 1] if part else 0
            dataset, i = dataset.datasets[part], i - before
        i = int(i) if isinstance(i, (Tensor, np.integer)) else i
    return dataset, i


def _fingerprint(dataset: Any, i: Any, may_read: bool) -> Fingerprint:
    digest, total, size = hashlib.blake2b(repr(i).encode(), digest_size=8), 0.0, 0.0
    are_tensors = type(dataset) in (TensorDataset, Records)
    record: Any = ()
    if are_tensors:
        record = tuple(x[i] if isinstance(x, Tensor) else x[torch.tensor([i])] for x in dataset.tensors)
    elif may_read:
        record = dataset[i]
    leaves, shape = tree_flatten(record)
    digest.update(repr(shape).encode())
    for x in leaves:
        word = _whole_numbers(x)
        digest.update(b"%d:" % len(word) + word)
        if are_tensors and not word:
            x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
            x = x.detach().to_dense().double() if x.layout is not torch.strided else x.detach().double()
            total, size = total + x.sum().item(), size + x.abs().sum().item()
    return Fingerprint(digest.digest(), total, size)


def _whole_numbers(x: object) -> bytes:
    """Those in a leaf of a record; none of what holds others."""
    if isinstance(x, Tensor) and not x.is_floating_point() and not x.is_complex():
        x = x.detach().cpu()
        x = (x if x.layout is torch.strided else x.to_dense()).numpy()
    if isinstance(x, (np.ndarray, np.generic)):
        return f"{x.dtype}{list(x.shape)}".encode() + x.tobytes() if x.dtype.kind in "iub" else b""
    return repr(x).encode() if isinstance(x, int) else b""


def _setting(x: object) -> object:
    """Of an optimizer's: numbers, texts, and lists of them. Others by their type: their repr may hold an address."""
    if isinstance(x, Tensor):
        return x.tolist()
    if isinstance(x, (list, tuple)):
        return [_setting(each) for each in x]
    return x if x is None or isinstance(x, (bool, int, float, str)) else type(x).__name__
