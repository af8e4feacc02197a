"""Per-sample gradients of any module: it is run again on what a layer kept, record by record.

The gradient of record i is the vector-Jacobian product of the module's forward on that record alone with the gradient
b_i that the batch's backward gave its output; vmap does all records at once (Horace He & Richard Zou, functorch, 2021).
That is exact if the module treats records one by one, and whether it does is checked: its output must come out the same
record by record, always, and the per-sample gradients must add up to autograd's own, where a module's call is new.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Container
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastdp.errors import PrivacyError
from fastdp.gradients import Formed, PerSample, rows_in
from fastdp.precision import Autocast, coarsest, wide
from fastdp.rules import Slot
from fastdp.state import kept
from fastdp.uses import Use

# Of the largest element: what may be rounded differently between a batch and a single record. bfloat16 rounds each
# operation to 2^-9; a random number or another record moves an output by about its own size.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9, torch.bfloat16: 2.0**-4}

# Of the terms of a sum, in epsilons: what is left where they cancel.
CANCELLED = {torch.float32: 8, torch.float64: 8, torch.bfloat16: 2}

CHECKED_CALLS = 3  # of each module, in full: a batch more of its forward and backward


@dataclasses.dataclass(eq=False)
class Call(Use):
    """One call of a `Unit`: detached arguments, floating outputs, and their gradients (None where there was none)."""

    unit: Unit
    arguments: tuple[Any, Any]
    outputs: list[Tensor]
    autocast: Autocast = dataclasses.field(default_factory=Autocast)
    b: list[Tensor | None] = dataclasses.field(init=False)

    def parts(self, managed: Container[Tensor], rows: int, dtype: torch.dtype) -> list[PerSample]:
        return [Formed(p, 0, rows_in(p), g) for p, g in self.unit.formed(self, rows).items() if p in managed]

    def inputs(self, rows: int) -> list[Tensor]:
        leaves = tree_leaves(self.arguments)
        dims = self.unit.record_dims(leaves, rows)
        return [_first(x, dim) for x, dim in zip(leaves, dims, strict=True) if isinstance(x, Tensor)]

    def gradients(self, rows: int) -> list[Tensor]:
        dims = self.unit.output_dims(self.outputs, rows)
        return [_first(b, dim) for b, dim in zip(self.b, dims, strict=True) if b is not None]

    def precision(self, parameters: list[Tensor]) -> torch.dtype:
        """The coarsest type that the module computes in; PrivacyError if there is no rule for it."""
        dtypes = [x.dtype for x in (*_floating(self.arguments), *self.outputs, *parameters)]
        return coarsest(self.layer, [*dtypes, *self.autocast.dtypes.values()])


class Unit:
    """A module as a function of its own parameters and of its inputs."""

    def __init__(
        self, layer: str, module: nn.Module, slots: list[Slot], pause: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.layer, self.module, self._slots = layer, module, slots
        self._pause = pause
        self._shared: set[int] = set()  # inputs, by their number, that were seen without a record in each row
        self._loop = False
        self._checks_left = CHECKED_CALLS

    def record_dims(self, leaves: list[Any], rows: int) -> list[int | None]:
        """The dimension of each input that counts records; None for what all records share."""
        dims: list[int | None] = []
        for i, x in enumerate(leaves):
            dim = self._dim(i, last=2)
            has_records = isinstance(x, Tensor) and x.dim() > dim and x.shape[dim] == rows
            if isinstance(x, Tensor) and not has_records:
                self._shared.add(i)
            # A mask whose size happens to be the batch's stays what it was in the batches before.
            dims.append(dim if has_records and i not in self._shared else None)
        return dims

    def output_dims(self, outputs: list[Tensor], rows: int) -> list[int]:
        dims = [self._dim(i, last=0) for i in range(len(outputs))]
        for y, dim in zip(outputs, dims, strict=True):
            if y.dim() <= dim or y.shape[dim] != rows:
                raise PrivacyError(
                    f"{self.layer}: an output of shape {list(y.shape)} has no dimension of the batch's {rows} records; "
                    "give it inputs of each record, `positions.expand(len(x), -1)` for positions that all share"
                )
        return dims

    def _dim(self, i: int, last: int) -> int:
        """Where the i-th tensor has its records. last: the last one with torch's layout [T, B, F] of sequences."""
        if isinstance(self.module, nn.RNNBase):  # hidden states are [layers, B, H] in either layout
            return 0 if i == 0 and self.module.batch_first else 1
        if isinstance(self.module, nn.MultiheadAttention):  # query, key, value; masks and weights are [B, ...]
            return 1 if i <= last and not self.module.batch_first else 0
        return 0

    def formed(self, call: Call, rows: int) -> dict[Tensor, Tensor]:
        """Per-sample gradients of each parameter -> [rows, numel]."""
        call.check_unchanged()
        leaves, spec = tree_flatten(call.arguments)
        in_dims = self.record_dims(leaves, rows)
        out_dims = self.output_dims(call.outputs, rows)
        if all(dim is None for dim in in_dims):
            raise PrivacyError(f"{self.layer}: no input has a dimension of the batch's {rows} records")
        b = [torch.zeros_like(y) if g is None else g for y, g in zip(call.outputs, call.b, strict=True)]
        parameters = [p.detach() for _, _, p in self._slots]
        precision = call.precision(parameters)

        def one(records: list[Any], b: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            """Gradients and outputs of one record; its tensors come without the dimension of records."""
            full = [x if d is None else x.unsqueeze(d) for x, d in zip(records, in_dims, strict=True)]

            def forward(*parameters: Tensor) -> tuple[Tensor, ...]:
                args, kwargs = tree_unflatten(full, spec)
                return tuple(y.squeeze(d) for y, d in zip(self._run(parameters, args, kwargs), out_dims, strict=True))

            outputs, pull, *_ = torch.func.vjp(forward, *parameters)
            return pull(tuple(b)), outputs

        # vmap knows attention by its parts only.
        backend = sdpa_kernel(SDPBackend.MATH)
        with self._pause(), kept(self.module), torch.enable_grad(), call.autocast.again(), backend:
            gradients, outputs = self._all_records(one, leaves, in_dims, b, out_dims, rows)
            for y, again, dim in zip(call.outputs, outputs, out_dims, strict=True):
                self._check_output(_first(y, dim), again, TOLERANCE[precision])
            if self._checks_left:
                self._checks_left -= 1
                self._check_sum([wide(g) for g in gradients], tree_unflatten(leaves, spec), b, precision)
        found: dict[Tensor, Tensor] = {}
        for (_, _, p), g in zip(self._slots, gradients, strict=True):
            g = wide(g.reshape(rows, -1))
            found[p] = found[p] + g if p in found else g
        return found

    def _all_records(
        self,
        one: Callable[..., Any],
        leaves: list[Any],
        in_dims: list[int | None],
        b: list[Tensor],
        out_dims: list[int],
        rows: int,
    ) -> tuple[list[Tensor], list[Tensor]]:
        if not self._loop:
            try:
                batched = torch.func.vmap(one, in_dims=(in_dims, out_dims), randomness="same")
                gradients, outputs = batched(leaves, b)
                return list(gradients), list(outputs)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                warnings.warn(
                    f"fastdp: {self.layer} ({type(self.module).__name__}) is run in a loop over records, which is "
                    f"slow: vmap cannot ({' '.join(str(error).split())[:120]})",
                    stacklevel=2,
                )
                self._loop = True
        results = []
        for i in range(rows):
            records = [x if d is None else x.select(d, i) for x, d in zip(leaves, in_dims, strict=True)]
            try:
                results.append(one(records, [x.select(d, i) for x, d in zip(b, out_dims, strict=True)]))
            except (RuntimeError, ValueError, NotImplementedError) as error:
                raise PrivacyError(
                    f"{self.layer}: {type(self.module).__name__} cannot be run on a single record: "
                    f"{' '.join(str(error).split())[:120]}"
                ) from error
        gradients, outputs = zip(*results, strict=True)
        return [_dense(torch.stack(x)) for x in zip(*gradients, strict=True)], [
            torch.stack(x) for x in zip(*outputs, strict=True)
        ]

    def _run(self, parameters: tuple[Tensor, ...], args: Any, kwargs: Any) -> list[Tensor]:
        """The module's forward, without hooks, with other values of its own parameters."""
        for (holder, key, _), value in zip(self._slots, parameters, strict=True):
            holder._parameters[key] = value  # type: ignore[assignment]
        try:
            return _floating(self.module.forward(*args, **kwargs))
        finally:
            for holder, key, p in self._slots:
                holder._parameters[key] = p

    def _check_output(self, y: Tensor, again: Tensor, tolerance: float) -> None:
        if not _close(y, again, tolerance):
            raise PrivacyError(
                f"{self.layer}: {type(self.module).__name__} gave another output when it was run again record by "
                f"record for its own parameters ({', '.join(key for _, key, _ in self._slots)}): it draws random "
                "numbers, keeps state or mixes records (put those parameters into a module of their own, or nn.Dropout "
                "beside it)"
            )

    def _check_sum(self, gradients: list[Tensor], arguments: Any, b: list[Tensor], precision: torch.dtype) -> None:
        """Against the sum that autograd gives for the whole batch, with the parameters themselves in their places."""
        parameters = [p for _, _, p in self._slots]
        outputs = self._run(tuple(parameters), *arguments)
        used = [(y, g) for y, g in zip(outputs, b, strict=True) if y.requires_grad]
        sums: list[Tensor | None] = [None] * len(parameters)
        if used:
            ys, gs = zip(*used, strict=True)
            sums = [g if g is None else _dense(g) for g in torch.autograd.grad(ys, parameters, gs, allow_unused=True)]
        # Of what cancels to nothing, the bias before a normalisation say, rounding is left: 1e-6 of float32's terms.
        inputs = [x.abs().median().item() for x in _floating(arguments) if x.numel()]  # not of a hostile record
        terms = sum(g.abs().sum().item() for g in b) * max([1.0, *inputs])
        rounding = CANCELLED[precision] * torch.finfo(precision).eps * terms if math.isfinite(terms) else 0.0
        seen: set[Tensor] = set()
        for p, whole in zip(parameters, sums, strict=True):
            parts = [g for q, g in zip(parameters, gradients, strict=True) if q is p]
            size = sum(g.abs().sum(0).max().item() if g.numel() else 0.0 for g in parts)
            if p in seen or not size < float("inf"):  # counted already; hostile records, which clipping drops
                continue
            seen.add(p)
            total = torch.stack([g.sum(0) for g in parts]).sum(0)
            difference = total if whole is None else total - whole
            if not difference.abs().max().item() <= 2 * TOLERANCE[precision] * size + rounding:
                raise PrivacyError(
                    f"{self.layer}: the gradients of {type(self.module).__name__} record by record do not add up to "
                    "that of the batch: it mixes records, or uses its parameters in a way that is not seen"
                )


def _floating(output: Any) -> list[Tensor]:
    return [y for y in tree_leaves(output) if isinstance(y, Tensor) and y.is_floating_point()]


def _dense(x: Tensor) -> Tensor:
    return x.to_dense() if x.is_sparse else x


def _first(x: Tensor, dim: int | None) -> Tensor:
    return x if dim is None else x.movedim(dim, 0)


def _close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Whether y is x to a tolerance, of x's largest finite element; what is not finite must be so in both."""
    if x.shape != y.shape:
        return False
    if x.numel() == 0:
        return True
    size, difference = _largest(x), _largest(x - y)
    if math.isfinite(size) and math.isfinite(difference):
        return difference <= tolerance * size
    # Hostile records. To select the others in every batch would take longer than all the rest of a CNN's step.
    finite = x.isfinite()
    if not torch.equal(finite, y.isfinite()):
        return False
    x, y = x[finite], y[finite]
    return x.numel() == 0 or _largest(x - y) <= tolerance * _largest(x)


def _largest(x: Tensor) -> float:
    """Largest absolute value; NaN if x holds one, which aminmax gives as both of its results."""
    low, high = x.aminmax()
    return max(-low.item(), high.item())
