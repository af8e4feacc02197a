"""What must be the same on all ranks before they train together: what is not is named, with two ranks' values.

Other records, or the same in another order, are more than a mistake: sampling is by number, and a record that two ranks
have under different numbers could be in one batch twice, which is twice what the noise hides.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from fastdp.comm import Communicator
from fastdp.errors import CommError
from fastdp.plan import Plan
from fastdp.stacked import Records

LOOKED_AT = 64  # records


def check(
    comm: Communicator,
    plan: Plan,
    module: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[Any],
    account: Mapping[str, object],
) -> None:
    """CommError, the same on all ranks, if one differs from rank 0."""
    mine: dict[str, object] = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    mine["len(dataset)"] = len(loader.dataset)  # type: ignore[arg-type]
    mine["optimizer"] = type(optimizer).__name__
    for i, group in enumerate(optimizer.param_groups):
        mine |= {f"param_groups[{i}][{k!r}]": str(v) for k, v in group.items() if k != "params"}
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        mine[name] = f"{x.dtype}{list(x.shape)}{'' if x.requires_grad else ', no gradient'}"
    mine |= account
    mine[f"digest of {LOOKED_AT} records, which must be the same in the same order"] = fingerprint(loader)
    first, *others = comm.allgather_object(mine)
    for rank, other in enumerate(others, 1):
        for name in {**first, **other}:
            theirs, ours = (x.get(name, "none") for x in (other, first))
            if theirs != ours:
                raise CommError(f"ranks disagree: {name}: {theirs!r} on rank {rank}, {ours!r} on rank 0")


def fingerprint(loader: DataLoader[Any]) -> str:
    """Of a few records, evenly spread: all values where they are tensors. Of other datasets whole numbers and texts
    only, since transforms may be random; and none where workers read them, since files may have to be opened there."""
    digest = hashlib.blake2b(digest_size=8)
    with torch.random.fork_rng(devices=[]):
        for word in _words(loader.dataset, loader.num_workers == 0):
            digest.update(word)
    return digest.hexdigest()


def _words(dataset: Any, may_read: bool) -> list[bytes]:
    if type(dataset) is ConcatDataset:
        return [word for part in dataset.datasets for word in _words(part, may_read)]
    if type(dataset) is Subset:
        return [repr([int(i) for i in dataset.indices]).encode(), *_words(dataset.dataset, may_read)]
    ids = torch.linspace(0, len(dataset) - 1, min(len(dataset), LOOKED_AT), dtype=torch.float64).round().long()
    if type(dataset) in (TensorDataset, Records):
        return [_bytes(x[ids]) for x in dataset.tensors]
    leaves = tree_leaves([dataset[i] for i in ids.tolist()] if may_read else [])
    return [_bytes(x) if isinstance(x, Tensor) else repr(x).encode() for x in leaves if _is_exact(x)]


def _is_exact(x: object) -> bool:
    if isinstance(x, Tensor):
        return not x.is_floating_point() and not x.is_complex()
    return isinstance(x, (bool, int, str, bytes))


def _bytes(x: Tensor) -> bytes:
    x = x.detach().cpu().contiguous()
    head = f"{x.dtype}{list(x.shape)}".encode()
    return head + (x.view(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
