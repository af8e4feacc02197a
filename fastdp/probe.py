"""Finds records that are coupled: a model or a loss in which one record's gradient depends on the others.

Clipping bounds what a record adds through its own gradient only. At the first training batch of two records or more,
one row is replaced by a synthetic one: the model's outputs for the other rows, and the loss's gradients with respect
to them, must not move. The model is run once more for that; the loss, which is the user's own code, is replayed from a
tape of the torch functions that were called on the model's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fastdp.errors import PrivacyError

# Rows of a matrix product may be rounded differently when another row changes; a coupling is larger by far.
TOLERANCE = 1e-4

_MEANS_OVER_COUNTED = (F.cross_entropy, F.nll_loss)


class Probe:
    """Hooks on the root module that check it and the loss once, then do nothing.

    rows: called at each training forward, tells how many records the current batch has.
    """

    def __init__(self, root: nn.Module, rows: Callable[[], int]) -> None:
        self.root, self._rows = root, rows
        self._rng_before = torch.get_rng_state()
        self._tape: Tape | None = None
        self.model_checked = False
        self.loss_checked = False
        self.ignore_index: int | None = None  # a label that would leave its record out of the loss's mean
        root.register_forward_pre_hook(self.before)
        root.register_forward_hook(self.after, with_kwargs=True)

    def __deepcopy__(self, memo: Any) -> Probe:
        return self

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        from fastdp.layers import Inert

        return Inert, ()

    def before(self, module: nn.Module, args: Any) -> None:
        if module is self.root and not self.loss_checked and torch.is_grad_enabled():
            self._rng_before = torch.get_rng_state()

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if module is not self.root or self.loss_checked or not torch.is_grad_enabled() or self._rows() < 2:
            return None
        if not self.model_checked:
            self._check_model(args, kwargs, output)
            self.model_checked = True
        self._tape = Tape(self, self._rows())
        return tree_map_only(Tensor, self._tape.watch, output)

    def _check_model(self, args: Any, kwargs: Any, output: Any) -> None:
        rows = self._rows()
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != rows):
                raise PrivacyError(
                    f"module: an output of shape {list(leaf.shape)} for a batch of {rows} records cannot be probed: "
                    "return one row per record and compute the loss outside"
                )
        buffers = [(b, b.clone()) for b in self.root.buffers()]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._rng_before)
            changed = tree_map(lambda x: replace_first_row(x, rows), (args, kwargs))
            again = self.root(*changed[0], **changed[1])
            for b, value in buffers:
                b.copy_(value)
        for was, now in zip(tree_leaves(output), tree_leaves(again), strict=True):
            if isinstance(was, Tensor) and not _close(was.detach()[1:], now[1:]):
                raise PrivacyError(
                    "module: its output for a record depends on the other records of the batch, "
                    "so clipping one record's gradient does not bound its influence"
                )

    def check_labels(self, batch: Any) -> None:
        """Refuse a batch with a label that the loss leaves out of its mean: the others would be weighted up."""
        if self.ignore_index is None:
            return
        for x in tree_leaves(batch):
            if isinstance(x, Tensor) and x.dtype == torch.int64 and bool((x == self.ignore_index).any()):
                _refuse_ignored(self.ignore_index)


class Tape:
    """The torch functions called on one batch's outputs, so that the loss can be computed again."""

    def __init__(self, probe: Probe, rows: int) -> None:
        self.probe, self.rows = probe, rows
        self.outputs: list[Tensor] = []
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def watch(self, output: Tensor) -> Tensor:
        self.outputs.append(_mark(output, self))
        return self.outputs[-1]

    def check(self, loss: Tensor, gradient: Tensor | None) -> None:
        """Called by loss.backward(), before it."""
        for func, args, kwargs, _ in self.calls:
            if func in _MEANS_OVER_COUNTED and kwargs.get("reduction", "mean") == "mean":
                self._check_counted_mean(args, kwargs)
        if not self._reaches(loss):
            raise PrivacyError("loss: it cannot be replayed from the model's outputs; use torch functions on them")
        was, now = (self._gradients(loss, gradient, change) for change in (lambda x, rows: x, replace_first_row))
        for before, after in zip(was, now, strict=True):
            if not _close(before[1:], after[1:]):
                raise PrivacyError(
                    "loss: a record's gradient depends on the other records (class weights under a mean, or a "
                    "normaliser computed from the data): use reduction='sum' and loss_reduction='sum'"
                )
        self.probe.loss_checked = True

    def _check_counted_mean(self, args: Any, kwargs: Any) -> None:
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        if weight is not None:
            raise PrivacyError(
                "loss: class weights under a mean are divided by the sum of the batch's weights, which couples its "
                "records: use reduction='sum' and loss_reduction='sum'"
            )
        self.probe.ignore_index = int(kwargs.get("ignore_index", -100))
        target = args[1] if len(args) > 1 else kwargs["target"]
        if not target.is_floating_point() and bool((target == self.probe.ignore_index).any()):
            _refuse_ignored(self.probe.ignore_index)

    def _reaches(self, loss: Tensor) -> bool:
        return any(loss is x for x in self.outputs) or any(
            loss is x for _, _, _, result in self.calls for x in tree_leaves(result)
        )

    def _gradients(self, loss: Tensor, gradient: Tensor | None, change: Callable[[Any, int], Any]) -> list[Tensor]:
        leaves = [change(_plain(x).detach(), self.rows).clone().requires_grad_() for x in self.outputs]
        known: dict[int, Any] = {id(x): leaf for x, leaf in zip(self.outputs, leaves, strict=True)}

        def value(x: Any) -> Any:
            if id(x) in known:
                return known[id(x)]
            return change(x, self.rows) if isinstance(x, Tensor) else x

        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)  # a loss that draws random numbers draws the same in both replays
            for func, args, kwargs, result in self.calls:
                again = func(*tree_map(value, args), **tree_map(value, kwargs))
                for x, y in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    known[id(x)] = y
            grads = torch.autograd.grad(known[id(loss)], leaves, gradient, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


class _Taped(Tensor):
    """A tensor whose functions are written down on its tape. Only the first training batch's outputs are."""

    _tape: Tape

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tape = next(x._tape for x in tree_leaves((args, kwargs)) if isinstance(x, _Taped))
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.backward:
                tape.check(args[0], kwargs.get("gradient", args[1] if len(args) > 1 else None))
                return func(*args, **kwargs)
            result = func(*args, **kwargs)
            if any(isinstance(x, Tensor) for x in tree_leaves(result)):
                result = tree_map_only(Tensor, lambda x: _mark(x, tape), result)
                tape.calls.append((func, args, kwargs, result))
            return result


def _mark(x: Tensor, tape: Tape) -> Tensor:
    taped = x if isinstance(x, _Taped) else x.as_subclass(_Taped)
    taped._tape = tape
    return taped


def _plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)


def replace_first_row(x: Any, rows: int) -> Any:
    """A copy of a tensor of one row per record with a synthetic first row, of values that its kind allows."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != rows or x.dtype == torch.bool:
        return x
    x = _plain(x).detach().clone()
    first = x[0]
    if not x.is_floating_point():  # another record's label or token, or the neighbouring one
        others = x[1:].flatten()
        other = others[(others != first.flatten()[0]).nonzero().flatten()[:1]]
        x[0] = other[0] if len(other) else torch.where(first == 0, first + 1, first - 1)
    elif bool((x >= 0).all()) and bool((x <= 1).all()):  # probabilities stay probabilities
        x[0] = 0.75 - 0.5 * first
    else:
        x[0] = 0.25 - 0.5 * first
    return x


def _close(x: Tensor, y: Tensor) -> bool:
    if not x.is_floating_point():
        return bool((x == y).all())
    scale = x.abs().max().item() if x.numel() else 0.0
    return bool(((x - y).abs() <= TOLERANCE * scale).all())


def _refuse_ignored(index: int) -> None:
    raise PrivacyError(
        f"loss: a label is ignore_index={index}, and the mean over the others couples the records: "
        "use reduction='sum' and loss_reduction='sum'"
    )
