"""Which records are in a step's batch, and the loader that hands each rank its share of them.

Every rank computes the same global list of record ids from (key, step) and takes its own slice: nothing is
communicated, and the batches are the same for any number of ranks (P2).
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from fastdp import native
from fastdp.errors import ArgumentError, PrivacyError, require
from fastdp.plan import Plan
from fastdp.secret import SecretKey
from fastdp.stacked import Records, Stacked


class BatchSampler:
    """Record ids of each step, for one rank.

    records: how many the data set has; key: the same on all ranks; rank, size: of the communicator.
    """

    def __init__(self, plan: Plan, records: int, key: SecretKey, rank: int = 0, size: int = 1) -> None:
        self.plan, self.records, self.rank, self.size = plan, records, rank, size
        self._key = key
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def global_batch(self, step: int, epoch: int, position: int) -> Tensor:
        """Ids of all ranks' records -> int64, ascending if Poisson. `position`: step within the epoch."""
        plan = self.plan
        if plan.poisson_sampling:
            # Not by torch's dispatcher, which takes 0.1 ms when the caches hold a training step.
            return native.poisson_sample(self.records, plan.sample_rate, self._key.tensor(), step)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._order[position * plan.batch_size : (position + 1) * plan.batch_size]

    def local_batch(self, step: int, epoch: int, position: int) -> Tensor:
        """This rank's slice of the global batch: sizes differ by at most one record."""
        ids = self.global_batch(step, epoch, position)
        return ids[len(ids) * self.rank // self.size : len(ids) * (self.rank + 1) // self.size]

    def _shuffled(self, epoch: int) -> Tensor:
        # Not a domain of the generator: nothing private rests on the order, and the key cannot be got back from it.
        digest = hashlib.blake2b(
            b"%d" % epoch, digest_size=8, key=bytes(self._key.tensor().tolist()), person=b"fastdp shuffle"
        )
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little") >> 1)
        return torch.randperm(self.records, generator=generator)


class PrivateLoader:
    """Iterates like the DataLoader it replaces: one batch a step, this rank's records of it.

    An epoch has `plan.steps_per_epoch` steps; iterating again goes on with the next steps. A batch that has no record
    on this rank comes as one record of zeros, so that the training loop needs no special case; the engine gives it a
    factor of 0, and `rows` of it is 0. A batch of more than `piece` records comes in pieces of nearly equal size.
    """

    def __init__(self, loader: DataLoader[Any], sampler: BatchSampler, piece: int | None = None) -> None:
        self.dataset = loader.dataset
        self.sampler = sampler
        self.batch_size = sampler.plan.batch_size
        self.drawn = 0  # batches begun since the start
        self.pieces = 0  # handed out since the start
        self.more = False  # the last piece handed out is not the last of its batch
        self.epochs = 0  # iterations begun
        self.rows = 0  # this rank's records in the last piece
        self._piece = piece
        self._position = 0  # of the next batch in its epoch
        self.on_batch: Callable[[Any, int], Any] = lambda batch, rows: batch  # sees each batch before the loop does
        self._loader = loader

    def __repr__(self) -> str:
        return f"<fastdp.PrivateLoader: {len(self)} steps an epoch, {self.batch_size} expected records a step>"

    def __len__(self) -> int:
        return self.sampler.plan.steps_per_epoch

    def skip(self, epochs: int, steps: int) -> None:
        """Go on after so many whole epochs and steps of the next, as if they had been drawn."""
        self.drawn, self.epochs, self._position = epochs * len(self) + steps, epochs, steps

    def __iter__(self) -> Iterator[Any]:
        epoch, self.epochs = self.epochs, self.epochs + 1
        if self.more:
            raise PrivacyError("data_loader: an iteration was left in the middle of a batch's pieces")
        first, position, self._position = self.drawn, self._position, 0
        more: deque[bool] = deque()  # of pieces that were drawn ahead

        def pieces() -> Iterator[Tensor]:
            for i in range(position, len(self)):
                ids = self.sampler.local_batch(first - position + i, epoch, i)
                count = 1 if self._piece is None else max(1, math.ceil(len(ids) / self._piece))
                more.extend([True] * (count - 1) + [False])
                yield from ids.tensor_split(count)

        for number, (rows, batch) in enumerate(self._fetch(pieces()), self.pieces):
            if number != self.pieces:
                raise PrivacyError("data_loader: two iterations at once would use the same random batches twice")
            self.pieces += 1
            self.drawn += not self.more
            self.more = more.popleft()
            self.rows = rows
            yield self.on_batch(batch, rows)

    def _fetch(self, ids: Iterator[Tensor]) -> Iterator[tuple[int, Any]]:
        loader, dataset = self._loader, self.dataset
        plain = loader.collate_fn is default_collate and loader.num_workers == 0
        if plain and (type(dataset) is TensorDataset or type(dataset) is Records):
            for chosen in ids:  # the same as below without a Python call per record
                yield len(chosen), [_rows_or_zeros(t, chosen) for t in dataset.tensors]
            return
        sizes: deque[int] = deque()

        def lists() -> Iterator[list[int]]:
            for chosen in ids:
                sizes.append(len(chosen))
                yield chosen.tolist() or [0]  # record 0 gives the shape only: its values become zeros below

        batches: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=_Once(lists()),
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
        )
        for batch in batches:
            rows = sizes.popleft()
            yield rows, batch if rows else tree_map(_blank, batch)


def _blank(x: Any) -> Any:
    """What stands in for a record's value in an empty batch; nothing of the record may show."""
    if isinstance(x, Tensor):
        return torch.zeros_like(x)
    if x is None or isinstance(x, (str, bytes, bool, int, float, complex)):
        return None if x is None else type(x)()
    raise PrivacyError(f"data_loader: an empty batch cannot be made of a {type(x).__name__}: use tensors")


class _Once:
    """A batch sampler that is iterated once, as one epoch of a DataLoader does."""

    def __init__(self, lists: Iterator[list[int]]) -> None:
        self._lists = lists

    def __iter__(self) -> Iterator[list[int]]:
        return self._lists


def _rows_or_zeros(t: Tensor | Stacked, ids: Tensor) -> Tensor:
    if isinstance(t, Tensor) and t.is_cpu and len(ids):
        return t.index_select(0, ids)  # half the time of t[ids]
    return t[ids] if len(ids) else torch.zeros(1, *t.shape[1:], dtype=t.dtype)


def check_loader(loader: DataLoader[Any]) -> tuple[int, int]:
    """(number of records, batch size) of a loader whose sampling we can replace; ArgumentError otherwise."""
    require(isinstance(loader, DataLoader), "data_loader", type(loader).__name__, "a torch.utils.data.DataLoader")
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ArgumentError(
            "data_loader.dataset", type(dataset).__name__, "map-style: records are drawn by their index"
        )
    require(loader.batch_size is not None, "data_loader.batch_size", None, "an int: the expected batch size")
    sampler = loader.sampler
    plain = type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement)
    require(
        plain,
        "data_loader.sampler",
        type(sampler).__name__,
        "torch's sequential or random sampler: any other would change the sampling rate that is accounted",
    )
    assert loader.batch_size is not None
    return len(dataset), loader.batch_size
