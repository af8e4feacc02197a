"""An optimizer's step that the ranks of a host take together: each sums, noises and steps a slice, for all of them.

Gradients and parameters lie in memory that they share, a copy for each rank; the optimizer's state too, one copy for
all, of which a rank writes the slice that it steps. So each does 1/P of the noise and of the arithmetic, in one pass,
and `optimizer.state_dict()` still has all of it, on any rank.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdp import _kernels, fused, native, sparse, window
from fastdp.clipping import Span, flat_numel
from fastdp.errors import ArgumentError, require

if TYPE_CHECKING:
    from fastdp.comm import Communicator

# Slices end where chunks of noise end (kChunk in csrc/kernels.h): none is made twice.
CHUNK = 256
MAX_BATCH = 1 << 53  # float64 has its inverse to the last digit


class Sharded:
    """Made by `Communicator.shard`, on all ranks alike. Moves the parameters to shared memory, each with a storage of
    its own; a parameter that is given another storage later is moved again at the next step."""

    def __init__(self, comm: Communicator, optimizer: Optimizer, spans: Sequence[Span]) -> None:
        dtypes = {s.dtype for s in spans}
        require(len(spans) > 0, "spans", list(spans), "of one parameter or more")
        require(dtypes in ({torch.float32}, {torch.float64}), "spans: dtypes", dtypes, "float32 or float64, of all")
        self._comm, self._optimizer = comm, optimizer
        self._spans: Mapping[nn.Parameter, Span] = {s.param: s for s in spans}
        self.dtype = spans[0].dtype
        self._numel = flat_numel(spans)
        nbytes = self._numel * self.dtype.itemsize
        with comm.whole("shard"):
            gradients, parameters = comm.segment(nbytes), comm.segment(nbytes)
        self.flat = gradients.tensor(self._numel, self.dtype)
        self._parameters, self._flat_address = parameters, self.flat.data_ptr()
        self._states: dict[str, Tensor] = {}
        ranks, rank = comm.local_size, comm.local_rank
        chunks = -(-self._numel // CHUNK)
        self._slice = chunks * rank // ranks * CHUNK, min(chunks * (rank + 1) // ranks * CHUNK, self._numel)
        sums = ranks if comm.hosts == 1 else 1  # between hosts, the sum is there before the step
        self._first_sum = gradients.part(0) if sums > 1 else self.flat.data_ptr()
        self._share = _kernels.StepShare(
            begin=self._slice[0],
            end=self._slice[1],
            sums=sums,
            sums_apart=gradients.part_bytes,
            copies=ranks,
            copies_apart=parameters.part_bytes,
            first_copy=-rank * parameters.part_bytes,
        )
        self._bring_home()

    def belongs_to(self, comm: Communicator) -> bool:
        return self._comm is comm

    def has(self, span: Span) -> bool:
        return self._spans.get(span.param) == span

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's, which must be the same on all ranks: each steps a slice for all of them."""
        return self._optimizer.param_groups

    def step(self, noise_std: float, batch_size: int, key: Tensor, step: int) -> None:
        """This rank's part of it; every rank of the host does its own, between two meetings."""
        require(self.flat.data_ptr() == self._flat_address, "sharded.flat", "moved", "in the memory that ranks share")
        self._adopt_states()
        for h, parameters in fused.steps(self._optimizer, self._spans, noise_std, batch_size, self._new_state):
            native.noise_step(h, parameters, self.flat, key, step, self._share, self._first_sum)

    def prepare(self) -> None:
        """Parameters to where the others write to them, and memory for the state that the optimizer needs. On all
        ranks, and before any steps."""
        self._bring_home()
        for name in fused.buffers(self._optimizer):
            if name not in self._states:
                self._states[name] = window.common(self._comm, self._numel, self.dtype)

    def leave(self) -> None:
        """Give each rank a state of its own, for an optimizer that steps all parameters by itself. On all ranks."""
        if not self._states:
            return
        for p in self._spans:
            for name in self._states:
                x = self._optimizer.state.get(p, {}).get(name)
                if x is not None:
                    self._optimizer.state[p][name] = x.clone()
        self._comm.barrier()
        self._states.clear()

    def _bring_home(self) -> None:
        own, width = self._parameters.part(self._comm.local_rank), self.dtype.itemsize
        # Addresses, not tensors: share_memory_() gives other memory to all tensors of a storage. Clones, since two may
        # have changed places.
        moved = [p for p, s in self._spans.items() if s.numel and p.data_ptr() != own + s.offset * width]
        for p, value in [(p, p.detach().clone()) for p in moved]:
            s = self._spans[p]
            home = self._parameters.tensor(s.numel, self.dtype, s.offset * width).view(s.shape)
            home.copy_(value)
            p.data = home

    def _adopt_states(self) -> None:
        """What the optimizer was loaded with, or made itself."""
        for name, flat in self._states.items():
            for p, s in self._spans.items():
                state = self._optimizer.state.get(p, {})
                x = state.get(name)
                if isinstance(x, Tensor) and x.data_ptr() != flat.data_ptr() + s.offset * flat.itemsize:
                    fused.check_state(self._optimizer, p, s.name)
                    state[name] = self._new_state(p, name, x)

    def _new_state(self, p: Tensor, name: str, value: Tensor | None = None) -> Tensor:
        """The state's place, where this rank's slice becomes `value`, or zeros."""
        s = self._spans[p]  # type: ignore[index]
        flat = self._states[name]
        begin, end = (min(max(at, s.offset), s.offset + s.numel) for at in self._slice)
        if value is None:
            flat[begin:end].zero_()
        else:
            flat[begin:end].copy_(value.detach().reshape(-1)[begin - s.offset : end - s.offset])
        return window.alone(flat, s.offset, s.numel).view(s.shape)


def is_possible(comm: Communicator, optimizer: Optimizer, spans: Sequence[Span]) -> bool:
    """Whether the ranks of a host can step together: memory that they share, an optimizer that the kernels know, and no
    wish for another sum than theirs."""
    dtypes = {s.dtype for s in spans}
    by_memory = comm.shares_memory and (comm.hosts > 1 or comm.algorithm in ("auto", "shared"))
    return by_memory and fused.is_fused(optimizer) and dtypes in ({torch.float32}, {torch.float64})


def check_step(
    comm: Communicator,
    sharded: Sharded,
    noise_std: float,
    batch_size: int,
    key: Tensor,
    step: int,
    tables: Mapping[Span, Tensor],
) -> None:
    """What `Communicator.reduce_noise_step` is called with."""
    require(isinstance(sharded, Sharded), "sharded", type(sharded).__name__, "what this communicator's shard() returns")
    require(sharded.belongs_to(comm), "sharded", "of another communicator", "made by this one's shard()")
    least, most = (1e-30, 1e30) if sharded.dtype == torch.float32 else (0.0, sys.float_info.max)
    is_number = isinstance(noise_std, (int, float)) and not isinstance(noise_std, bool)
    in_range = is_number and (noise_std == 0 or least <= noise_std <= most)
    require(in_range, "noise_std", noise_std, f"0 or in [{least}, {most}]")
    require(type(batch_size) is int and 1 <= batch_size <= MAX_BATCH, "batch_size", batch_size, f"in [1, {MAX_BATCH}]")
    require(isinstance(key, Tensor), "key", type(key).__name__, "a uint8[32] tensor")
    require(type(step) is int, "step", step, "an int")
    native.check_key(key, step)
    require(isinstance(tables, Mapping), "tables", type(tables).__name__, "a mapping of spans to rows")
    for span, rows in tables.items():
        known = isinstance(span, Span) and sharded.has(span) and len(span.shape) == 2
        require(known, "tables", span, "of spans of two dimensions that are sharded")
        name = f"tables[{span.name}]"
        sparse.check_rows(name, rows, span.shape[0])
        if len(rows) > 1 and not bool((rows[1:] > rows[:-1]).all()):
            raise ArgumentError(name, "not ascending", "ascending: a row that comes twice counts twice")


def digest(
    noise_std: float,
    batch_size: int,
    key: Tensor,
    step: int,
    groups: list[dict[str, Any]],
    tables: Mapping[Span, Tensor],
) -> int:
    """63 bits of what ranks that step together must all call with. groups: the optimizer's, of which parameters are
    left out; tables: of which the names count."""
    settings = [sorted((k, _plain(v)) for k, v in group.items() if k != "params") for group in groups]
    words = repr((float(noise_std), batch_size, step, settings, [s.offset for s in tables])).encode()
    mixed = hashlib.blake2b(words + key.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(mixed, "little") >> 1


def _plain(x: Any) -> Any:
    """Alike for what is the same number, whatever type it has."""
    if isinstance(x, (list, tuple)):
        return [_plain(each) for each in x]
    if isinstance(x, Tensor):
        return _plain(x.tolist())
    return float(x) if isinstance(x, (bool, int, float)) else x
