"""Finds records that are coupled: a model or a loss in which one record's gradient depends on the others.

Clipping bounds what a record adds through its own gradient only. At the first training batch of two records or more,
one row is replaced by synthetic ones: the model's outputs for the other rows, and the loss's gradients with respect to
them, must not move. The model is run again for that. The loss is the user's own code: it is replayed from a tape of the
torch functions that were called on the batch and on the model's outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fastdp.errors import PrivacyError

# Rows of a matrix product may be rounded differently when another row changes; a coupling is larger by far.
TOLERANCE = 1e-4

# Synthetic rows, as multiples of the row they replace: a mild one, and one that a maximum would notice.
STRENGTHS = (-0.5, -8.0)

_MEANS_OVER_COUNTED = (F.cross_entropy, F.nll_loss)


class Probe:
    """Checks the root module and the loss once, at the first batch with two records or more; then does nothing."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.model_checked = False
        self.loss_checked = False
        self.ignore_index: int | None = None  # a label that would leave its record out of the loss's mean
        self._tape: Tape | None = None
        self._rng_before = torch.get_rng_state()
        root.register_forward_pre_hook(self.before, with_kwargs=True)
        root.register_forward_hook(self.after, with_kwargs=True)

    def __deepcopy__(self, memo: Any) -> Probe:
        return self  # a copy of the module is another one, for which these hooks do nothing

    def __reduce__(self) -> tuple[Callable[[], Inert], tuple[()]]:
        return Inert, ()

    def watch(self, batch: Any, rows: int) -> Any:
        """Sees each batch before the training loop does; hands it on, on tape if there is something to probe."""
        if self.ignore_index is not None:
            for x in tree_leaves(batch):
                if isinstance(x, Tensor) and x.dtype == torch.int64 and bool((x == self.ignore_index).any()):
                    _refuse_ignored(self.ignore_index)
        self._tape = None
        if self.loss_checked or rows < 2:
            return batch
        self._tape = tape = Tape(self, rows)
        return tree_map_only(Tensor, lambda x: tape.add_source(x, is_output=False), batch)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is not self.root or self._tape is None:
            return None
        self._rng_before = torch.get_rng_state()
        return tree_map_only(Tensor, _plain, (args, kwargs))

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        tape = self._tape
        if module is not self.root or tape is None or not torch.is_grad_enabled():
            return None
        if not self.model_checked:
            self._check_model(args, kwargs, output, tape.rows)
            self.model_checked = True
        return tree_map_only(Tensor, lambda x: tape.add_source(x, is_output=True), output)

    def _check_model(self, args: Any, kwargs: Any, output: Any, rows: int) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != rows):
                raise PrivacyError(
                    f"module: an output of shape {list(leaf.shape)} for a batch of {rows} records cannot be probed: "
                    "return one row per record and compute the loss outside"
                )
        for strength in STRENGTHS:
            again = self._run_again(args, kwargs, rows, strength)
            for was, now in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(was, Tensor) and not _close(was.detach()[1:], now[1:]):
                    raise PrivacyError(
                        "module: its output for a record depends on the other records of the batch, "
                        "so clipping one record's gradient does not bound its influence"
                    )

    def _run_again(self, args: Any, kwargs: Any, rows: int, strength: float) -> Any:
        """The module on changed inputs with the same random numbers; its buffers stay as they are now."""
        buffers = [(b, b.clone()) for b in self.root.buffers()]
        tape, self._tape = self._tape, None
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._rng_before)
                args, kwargs = tree_map_only(Tensor, lambda x: replace_first_row(x, rows, strength), (args, kwargs))
                return self.root(*args, **kwargs)
        finally:
            self._tape = tape
            for b, value in buffers:
                b.data.copy_(value)


class Tape:
    """The torch functions called on one batch and its outputs, so that the loss can be computed again."""

    def __init__(self, probe: Probe, rows: int) -> None:
        self.probe, self.rows = probe, rows
        self.sources: list[tuple[Tensor, Tensor, bool]] = []  # (as marked, value, is an output of the module)
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def add_source(self, x: Tensor, is_output: bool) -> Tensor:
        marked = _mark(x, self)
        self.sources.append((marked, _plain(x).detach().clone(), is_output))
        return marked

    def check(self, loss: Tensor, gradient: Tensor | None) -> None:
        """Called by loss.backward(), before it."""
        if not any(is_output for _, _, is_output in self.sources):
            return
        for func, args, kwargs, _ in self.calls:
            if func in _MEANS_OVER_COUNTED and kwargs.get("reduction", "mean") == "mean":
                self._check_counted_mean(args, kwargs)
        was = self._gradients(loss, gradient, None)
        if not was:  # another model's loss
            return
        for strength in STRENGTHS:
            for before, after in zip(was, self._gradients(loss, gradient, strength), strict=True):
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

    def _gradients(self, loss: Tensor, gradient: Tensor | None, strength: float | None) -> list[Tensor]:
        """Gradients of the replayed loss with respect to the module's outputs; none if it does not depend on them."""
        known: dict[int, Any] = {}
        leaves = []
        for marked, original, is_output in self.sources:
            x = original if strength is None else replace_first_row(original, self.rows, strength)
            if is_output:
                leaves.append(x.clone().requires_grad_(x.is_floating_point()))
                x = leaves[-1]
            known[id(marked)] = x.clone()  # functions may change it in place
        leaves = [x for x in leaves if x.requires_grad]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)  # a loss that draws random numbers draws the same in every replay
            for func, args, kwargs, result in self.calls:
                args, kwargs = tree_map_only(Tensor, lambda x: known.get(id(x), x), (args, kwargs))
                for x, y in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    known[id(x)] = y
            again = known.get(id(loss))
            if again is None or not again.requires_grad:
                raise PrivacyError("loss: it cannot be replayed from the model's outputs; use torch functions on them")
            grads = torch.autograd.grad(again, leaves, gradient, allow_unused=True)
        return [g for g in grads if g is not None]


class Inert:
    """What hooks become in a pickled module: nothing."""

    def before(self, *args: Any) -> None: ...

    def after(self, *args: Any) -> None: ...


class _Taped(Tensor):
    """A tensor whose functions are written down on its tape. Only those of the first training batch are."""

    _tape: Tape

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tape = next(x._tape for x in tree_leaves((args, kwargs)) if isinstance(x, _Taped))
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.backward:
                if not tape.probe.loss_checked:
                    tape.check(args[0], kwargs.get("gradient", args[1] if len(args) > 1 else None))
                return func(*args, **kwargs)  # type: ignore[no-untyped-call]
            result = func(*args, **kwargs)
            if not any(isinstance(x, Tensor) for x in tree_leaves(result)) or tape.probe.loss_checked:
                return result
            result = tree_map_only(Tensor, lambda x: _mark(x, tape), result)
            tape.calls.append((func, args, kwargs, result))
            return result


def _mark(x: Tensor, tape: Tape) -> Tensor:
    taped = x if isinstance(x, _Taped) else x.as_subclass(_Taped)
    taped._tape = tape
    return taped


def _plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)


def replace_first_row(x: Tensor, rows: int, strength: float) -> Tensor:
    """A copy of a tensor of one row per record with a synthetic first row, of values that its kind allows."""
    if x.dim() == 0 or x.shape[0] != rows or x.dtype == torch.bool:
        return x
    x = _plain(x).detach().clone()
    if not x.is_floating_point():  # another record's label or token, or the neighbouring one
        first = x[0]
        others = x[1:].flatten()
        other = others[(others != first.flatten()[0]).nonzero().flatten()[:1]]
        x[0] = other[0] if len(other) else torch.where(first == 0, first + 1, first - 1)
        return x
    first = x[0].nan_to_num(0.0, 0.0, 0.0)
    probabilities = bool((x >= 0).all()) and bool((x <= 1).all())
    x[0] = 0.75 - 0.5 * first if probabilities else 0.25 + strength * first
    return x


def _close(x: Tensor, y: Tensor) -> bool:
    if not x.is_floating_point():
        return bool((x == y).all())
    finite = x.isfinite()
    if not torch.equal(finite, y.isfinite()):
        return False
    x, y = x[finite], y[finite]  # hostile records are dropped later; here they only must not spread
    scale = x.abs().max().item() if x.numel() else 0.0
    return bool(((x - y).abs() <= TOLERANCE * scale).all())


def _refuse_ignored(index: int) -> None:
    raise PrivacyError(
        f"loss: a label is ignore_index={index}, and the mean over the others couples the records: "
        "use reduction='sum' and loss_reduction='sum'"
    )
