"""Finds records that are coupled: a model or a loss in which one record's gradient depends on the others.

Clipping bounds what a record adds through its own gradient only. So the first training batch is run again with half of
its records replaced by synthetic ones, several times: what each layer sees of the other half, input and gradient of the
output, must not move. Everything that the training loop did to the batch is replayed for that, from a tape of the torch
functions that were called on it, the model included.

A single record is run again as another one: buffers must not follow, and nothing may be left of it afterwards.

What this does not see: a `collate_fn` that mixes records before the loop gets them, code that couples records only in
batches other than the probed ones (the first, and one in each decade of steps), and tensors that the loop copies behind
the back of torch's function calls (`torch.tensor(x)`, `x.as_subclass(Tensor)`, `torch.from_dlpack(x)`, `w.data = x`).
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import CompileContext
from torch.utils._pytree import tree_leaves, tree_map_only

from fastdp.errors import PrivacyError
from fastdp.layers import PLAIN, Inert, LinearUse, Recorder
from fastdp.persample import Call

# Rows of a matrix product may be rounded differently when another row changes. With half of the records replaced, a
# coupling moves the others by a sizeable part of themselves.
TOLERANCE = 1e-4

# Synthetic records are multiples of the ones they replace: mild ones, and ones that a maximum would notice.
STRENGTHS = (-0.5, -8.0, -0.5, -8.0)

PROBED_BATCHES = {1, 10, 100, 1000}

_MEANS_OVER_COUNTED = (F.cross_entropy, F.nll_loss)

_SCALINGS = {"div", "div_", "true_divide", "divide", "__truediv__", "__itruediv__"}
_SCALINGS |= {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"}


class Probe:
    """Checks the root module and the loss at the first batch with two records or more, and now and then later.

    loss_is_mean: what the user said of the loss; the probe sees whether it is true.
    sizes: expected batch sizes, by which a sum may be divided: constants, whatever the batch.
    """

    def __init__(
        self, root: nn.Module, recorder: Recorder, loss_is_mean: bool, sizes: frozenset[int] = frozenset()
    ) -> None:
        self.root, self.recorder, self.loss_is_mean, self.sizes = root, recorder, loss_is_mean, sizes
        self.undecided = False  # the last batch had just such a size
        self.ignore_index: int | None = None  # a label that would leave its record out of the loss's mean
        self._batches = {True: 0, False: 0}  # of a single record, of more
        self._modes: set[tuple[bool, bool]] = set()  # where checked: root.training, and whether on a single record
        self._rows = 0
        self._needed = False  # in this step
        self._expected: int | None = None  # uses of layers that this step's probe saw
        self._tape: Tape | None = None
        root.register_forward_pre_hook(self.before, with_kwargs=True)
        root.register_forward_hook(self.after, with_kwargs=True, always_call=True)

    def __deepcopy__(self, memo: Any) -> Probe:
        return self  # a copy of the module is another one, for which these hooks do nothing

    def __reduce__(self) -> tuple[Callable[[], Inert], tuple[()]]:
        return Inert, ()

    def watch(self, batch: Any, rows: int) -> Any:
        """Sees each batch before the training loop does; hands it on, on tape if there is something to probe."""
        if self.ignore_index is not None:
            for x in tree_leaves(batch):
                if isinstance(x, Tensor) and not x.is_floating_point() and bool((x == self.ignore_index).any()):
                    _refuse_ignored(self.ignore_index)
        self._tape = None
        self._needed, self._expected, self._rows = False, None, rows
        if rows < 1:
            return batch
        self._batches[rows == 1] += 1
        number = self._batches[rows == 1]
        self._needed = number in PROBED_BATCHES or self._mode not in self._modes or self.undecided
        if not self._needed:
            return batch
        self._tape = tape = Tape(self, rows)
        _check_batch(batch, rows)
        return tree_map_only(Tensor, tape.add_source, batch)

    @property
    def _mode(self) -> tuple[bool, bool]:
        return self.root.training, self._rows == 1

    def check_step(self) -> None:
        """Called by step(): what was to be probed in this step was, and the layers were used as the probe saw."""
        uses = len(self.recorder.uses)
        if (self._needed and uses) or (self._expected is not None and uses != self._expected):
            raise PrivacyError(
                "loss: it was not probed for coupled records; call the module given to make_private (not a part of "
                "it), and backward() once on a loss made of its outputs"
            )

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is not self.root or not torch.is_grad_enabled() or self._rows < 1:
            return None
        if self._tape is None:
            # Training and evaluation mode are two models.
            self._needed = self._needed or (self._mode not in self._modes and self._expected is None)
            return None
        self._tape.arguments = (args, kwargs)
        return tree_map_only(Tensor, _plain, (args, kwargs))

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        tape = self._tape
        if module is not self.root or tape is None or output is None or not torch.is_grad_enabled():
            return None
        given = [x.grad_fn for x in tree_leaves(output) if isinstance(x, Tensor)]
        output = tree_map_only(Tensor, lambda x: _mark(x, tape), output)
        tape.modules.update(given, (x.grad_fn for x in tree_leaves(output) if isinstance(x, Tensor)))
        tape.calls.append((self.root, *tape.arguments, output))
        return output

    def passed(self, uses: int) -> None:
        self._modes.add(self._mode)
        self._needed, self._expected = False, uses
        self._tape = None

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Random numbers, buffers, gradients and what the layers recorded are afterwards as they were before."""
        buffers = [(b, b.clone()) for b in self.root.buffers()]
        gradients = [(p, p.grad) for p in self.root.parameters()]
        python, numbers = random.getstate(), np.random.get_state()
        tape, self._tape = self._tape, None
        rows, self._rows = self._rows, 0  # the hooks above do nothing meanwhile
        uses, backward = self.recorder.uses, self.recorder.backward
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                # Dropout, layer drop and the like draw the same in every replay.
                torch.manual_seed(0)
                random.seed(0)
                np.random.seed(0)
                self.recorder.uses, self.recorder.backward = [], None
                yield
        finally:
            self.recorder.uses, self.recorder.backward = uses, backward
            self._tape, self._rows = tape, rows
            random.setstate(python)
            np.random.set_state(numbers)
            for p, g in gradients:
                p.grad = g
            for b, value in buffers:
                b.data.copy_(value)


class Tape:
    """The torch functions called on one batch, so that the step can be computed again on other records."""

    def __init__(self, probe: Probe, rows: int) -> None:
        self.probe, self.rows = probe, rows
        self.sources: list[tuple[Tensor, Tensor]] = []  # as marked, and its value
        self.calls: list[tuple[Any, Any, Any, Any]] = []  # function, args, kwargs, result
        self.arguments: tuple[Any, Any] = ((), {})  # of the root module's current call
        self.drew = False  # random numbers were drawn in the last replay
        self.modules: set[Any] = set()  # autograd's nodes of the root module's outputs

    def add_source(self, x: Tensor) -> Tensor:
        marked = _mark(x, self)
        self.sources.append((marked, _plain(x).detach().clone()))
        return marked

    def check(self, loss: Tensor, gradient: Tensor | None) -> None:
        """Called by loss.backward(), before it."""
        if not any(func is self.probe.root for func, *_ in self.calls):
            return  # another model's loss
        for func, args, kwargs, _ in self.calls:
            if func in _MEANS_OVER_COUNTED and kwargs.get("reduction", "mean") == "mean":
                self._check_counted_mean(args, kwargs)
        self._check_functions(loss)
        if not self.probe.loss_is_mean:
            self._check_divisions(gradient)
        base, values, buffers = self._replay(loss, gradient, lambda x: x)
        if not base:
            return
        rows = self.rows
        if rows == 1:
            self._check_single(loss, gradient, base, buffers)
            self.probe.passed(len(base))
            return
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        first, some = torch.arange(rows) < rows // 2, order < rows // 2
        halves = (first, ~first, some, ~some)
        for changed, strength in zip(halves, STRENGTHS, strict=True):

            def replace(x: Tensor, changed: Tensor = changed, strength: float = strength) -> Tensor:
                return replace_rows(x, changed, strength)

            other, other_values, other_buffers = self._replay(loss, gradient, replace)
            _compare(base, other, ~changed)
            if values != other_values:
                raise PrivacyError(
                    "loss: a number was taken out of torch before backward() (.item(), float(), .numpy()) and depends "
                    "on the records: keep it a tensor, or take it after backward()"
                )
            self._check_buffers(buffers, other_buffers)
        self._check_reduction(loss, gradient, base, values)
        self.probe.passed(len(base))

    def _check_single(
        self, loss: Tensor, gradient: Tensor | None, base: list[LinearUse | Call], buffers: list[Tensor]
    ) -> None:
        one = torch.ones(1, dtype=torch.bool)
        for strength in sorted(set(STRENGTHS)):
            change = functools.partial(replace_rows, changed=one, strength=strength)
            _, _, other = self._replay(loss, gradient, change)
            self._check_buffers(buffers, other)
        again, _, _ = self._replay(loss, gradient, lambda x: x)
        _compare(base, again, one)

    def _check_buffers(self, buffers: list[Tensor], others: list[Tensor]) -> None:
        """Not a bit of them may follow the records: running statistics with a small momentum move by little."""
        for name, was, now in zip(dict(self.probe.root.named_buffers()), buffers, others, strict=True):
            if not bool(((was == now) | (was.isnan() & now.isnan())).all()):
                raise PrivacyError(f"module: buffer {name} is computed from the records and would leave un-noised")

    def _check_functions(self, loss: Tensor) -> None:
        """What the loop does after the model is replayed function by function; a Function's own backward is not."""
        found: list[Any] = [loss.grad_fn]
        seen = {None, *self.modules}
        while found:
            node = found.pop()
            if node in seen:
                continue
            seen.add(node)
            name = type(node).__name__.removesuffix("Backward")
            # A backward hook of the module itself is replayed with it.
            if isinstance(node, torch.autograd.function.BackwardCFunction) and name != "BackwardHookFunction":
                raise PrivacyError(
                    f"loss: the backward of {name} is not torch's and cannot be replayed: call it in the module"
                )
            found.extend(next_node for next_node, _ in node.next_functions)

    def _check_counted_mean(self, args: Any, kwargs: Any) -> None:
        target = args[1] if len(args) > 1 else kwargs["target"]
        if target.is_floating_point():  # class probabilities: every record counts
            return
        self.probe.ignore_index = int(kwargs.get("ignore_index", -100))
        if bool((target == self.probe.ignore_index).any()):
            _refuse_ignored(self.probe.ignore_index)

    def _check_divisions(self, gradient: Tensor | None) -> None:
        """A sum divided by len(batch): one record more, and all the others' gradients shrink. Seen by the number."""
        scales = [] if gradient is None else [gradient]
        for func, args, kwargs, _ in self.calls:
            if getattr(func, "__name__", "") in _SCALINGS:
                scales += [x for x in tree_leaves((args, kwargs)) if not isinstance(x, _Taped)]
        found = self.rows > 1 and any(_is_count(x, self.rows) for x in scales)
        self.probe.undecided = found and self.rows in self.probe.sizes
        if found and not self.probe.undecided:
            raise PrivacyError(
                f"loss: it is multiplied or divided by {self.rows}, the number of records in the batch, which couples "
                "them: use reduction='mean' and loss_reduction='mean', or divide by the expected batch size"
            )

    def _check_reduction(
        self, loss: Tensor, gradient: Tensor | None, base: list[LinearUse | Call], values: list[Any]
    ) -> None:
        """A mean over half of the records has gradients twice as large, a sum has the same."""
        half = self.rows // 2
        if any(isinstance(u, LinearUse) and u.a.dim() and len(u.a) != self.rows for u in base):
            return  # refused by step(), by its shape

        def keep(x: Tensor) -> Tensor:
            return x[:half].clone() if x.dim() and x.shape[0] == self.rows else x

        try:
            smaller, numbers, _ = self._replay(loss, gradient, keep)
        except (RuntimeError, ValueError, IndexError):
            return  # the loop has the batch's size as a constant: this cannot be seen
        if not self.drew:
            _compare_half(base, smaller, self.rows, half)
        before = sum(_size(b[:half]) for u in base for b in u.gradients(self.rows))
        after = sum(_size(b) for u in smaller for b in u.gradients(half))
        if before == 0.0 or after == 0.0:
            return
        is_mean = after / before > (self.rows / half) ** 0.5
        if is_mean != self.probe.loss_is_mean:
            found, said = ("mean", "sum") if is_mean else ("sum", "mean")
            hidden = " (a division by len() or a shape is not seen: use reduction='mean')" if numbers != values else ""
            raise PrivacyError(f"loss_reduction={said!r}: must be {found!r}, which is what the loss does{hidden}")

    def _replay(
        self, loss: Tensor, gradient: Tensor | None, change: Callable[[Tensor], Tensor]
    ) -> tuple[list[LinearUse | Call], list[Any], list[Tensor]]:
        """What the layers recorded, the numbers taken out of torch, and the buffers, on changed records."""
        known: dict[int, Any] = {id(marked): change(value).clone() for marked, value in self.sources}
        values: list[Any] = []
        with self.probe.untouched():
            start = torch.get_rng_state()
            for func, args, kwargs, result in self.calls:
                args, kwargs = tree_map_only(Tensor, lambda x: known.get(id(x), x), (args, kwargs))
                for x, y in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(x, Tensor):
                        known[id(x)] = y
                    elif isinstance(y, np.ndarray):
                        values.append(y.tobytes())
                    elif isinstance(y, (int, float, bool, complex, torch.Size)):
                        values.append(y)
            self.drew = not torch.equal(torch.get_rng_state(), start)
            again = known.get(id(loss))
            if again is None or not again.requires_grad:
                raise PrivacyError("loss: it cannot be replayed from the batch; use torch functions on it")
            gradient = known.get(id(gradient), gradient)
            # Parts of the loss that are not made of the batch, a penalty say, belong to one graph of all replays.
            torch.autograd.backward(again, gradient, retain_graph=True)
            buffers = [b.clone() for b in self.probe.root.buffers()]
            return self.probe.recorder.uses, values, buffers


class _Taped(Tensor):
    """A tensor whose functions are written down on its tape. Only those of probed batches are."""

    _tape: Tape

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if CompileContext.current_compile_id() is not None:
            raise PrivacyError("torch.compile: compiled models and losses are not supported in this version")
        tape = next(x._tape for x in tree_leaves((args, kwargs)) if isinstance(x, _Taped))
        active = tape.probe._tape is tape
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.backward:
                if active:
                    tape.check(args[0], kwargs.get("gradient", args[1] if len(args) > 1 else None))
                return func(*args, **kwargs)  # type: ignore[no-untyped-call]
            result = func(*args, **kwargs)
            if not active:
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


def _check_batch(batch: Any, rows: int) -> None:
    leaves = tree_leaves(batch)
    for x in leaves:
        if not isinstance(x, (Tensor, *PLAIN)):
            raise PrivacyError(
                f"data_loader: a batch with a {type(x).__name__} cannot be probed: use tuples, lists, dicts, tensors"
            )
    if not any(isinstance(x, Tensor) and x.dim() and x.shape[0] == rows for x in leaves):
        raise PrivacyError("data_loader: no tensor of the batch has a record in each row")


def _compare(base: list[LinearUse | Call], other: list[LinearUse | Call], same: Tensor) -> None:
    if [u.layer for u in base] != [u.layer for u in other]:
        raise PrivacyError("module: which layers are used depends on the records")
    rows = len(same)
    for u, v in zip(reversed(base), reversed(other), strict=True):  # in the order of the forward
        for x, y in zip(u.inputs(rows), v.inputs(rows), strict=True):
            has_records = x.dim() > 0 and len(x) == rows
            if not has_records and isinstance(u, LinearUse):
                continue  # refused by step(), by its shape
            if has_records and x.shape == y.shape:  # what records share must not move at all
                x, y = x[same], y[same]
            if x.shape != y.shape or not _close(x, y):
                raise PrivacyError(
                    f"{u.layer}: its input for a record depends on the other records of the batch, "
                    "so clipping one record's gradient does not bound its influence"
                )
    for u, v in zip(base, other, strict=True):
        for x, y in zip(u.gradients(rows), v.gradients(rows), strict=True):
            if len(x) == rows and not _close(x[same], y[same]):
                raise PrivacyError(
                    f"{u.layer}: a record's gradient depends on the other records (class weights under a mean, a "
                    "normaliser computed from the data: use reduction='sum' and loss_reduction='sum'; or [B, 1] "
                    "broadcast against [B])"
                )


def _compare_half(base: list[LinearUse | Call], smaller: list[LinearUse | Call], rows: int, half: int) -> None:
    """A model that divides by the number of records: without half of them, the others' inputs would be far away."""
    for u, v in zip(base, smaller, strict=False):
        for x, y in zip(*(tree_leaves(w.a if isinstance(w, LinearUse) else w.arguments) for w in (u, v)), strict=False):
            if not isinstance(x, Tensor) or not x.is_floating_point() or u.layer != v.layer:
                continue
            if x.shape[:1] == (rows,) and y.shape == (half, *x.shape[1:]):
                x = x[:half]
                if bool((x - y).abs().max() > 0.05 * x.abs().max()):
                    raise PrivacyError(
                        f"{u.layer}: its input for a record depends on the number of records in the batch"
                    )


def _is_count(x: Any, rows: int) -> bool:
    """Whether a factor of the loss is the number of records, or one over it."""
    if isinstance(x, Tensor) and x.numel() == 1 and not x.is_complex():
        x = x.item()
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return False
    return any(math.isclose(abs(x), count, rel_tol=1e-6) for count in (rows, 1.0 / rows))


def _size(x: Tensor) -> float:
    return x.nan_to_num(0, 0, 0).abs().double().sum().item()


def replace_rows(x: Tensor, changed: Tensor, strength: float) -> Tensor:
    """A copy of a tensor of one row per record with synthetic rows where `changed`, of values that its kind allows."""
    if x.dim() == 0 or x.shape[0] != len(changed):
        return x
    x = x.clone()
    old = x[changed]
    if x.dtype == torch.bool:
        x[changed] = ~old
    elif not x.is_floating_point():  # other records' labels or tokens; where all are alike, the neighbouring one
        values = x.flatten()
        if bool((values == values[0]).all()):
            x[changed] = torch.where(old == 0, old + 1, old - 1)
        else:
            picks = torch.randint(len(values), (old.numel(),), generator=torch.Generator().manual_seed(int(strength)))
            x[changed] = values[picks].view(old.shape)
    else:
        old = old.nan_to_num(0.0, 0.0, 0.0)
        probabilities = bool((x >= 0).all()) and bool((x <= 1).all())
        x[changed] = 0.75 - 0.5 * old if probabilities else 0.25 + strength * old
    return x


def _close(x: Tensor, y: Tensor) -> bool:
    if not x.is_floating_point():
        return bool((x == y).all())
    finite = x.isfinite()
    if x.numel() == 0 or not torch.equal(finite, y.isfinite()):
        return x.numel() == 0
    # Hostile records are dropped later; here they only must not spread.
    sizes, differences = x.abs().masked_fill(~finite, 0.0), (x - y).abs().masked_fill(~finite, 0.0)
    # Each column by itself, so that a large one does not hide the others; to rounding of the largest.
    columns = sizes.amax(0) if x.dim() else sizes
    limits = TOLERANCE * columns + 8 * torch.finfo(x.dtype).eps * sizes.max()
    return bool((differences <= limits).all())


def _refuse_ignored(index: int) -> None:
    raise PrivacyError(
        f"loss: a label is ignore_index={index}, and the mean over the others couples the records: "
        "use reduction='sum' and loss_reduction='sum'"
    )
