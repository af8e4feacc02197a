"""Finds records that are coupled: a model or a loss in which one record's gradient depends on the others.

Clipping bounds what a record adds through its own gradient only. So the first training batch is run again with half of
its records replaced by synthetic ones, several times: what each layer sees of the other half, input and gradient of the
output, must not move. Everything that the training loop did to the batch is replayed for that, from a tape of the torch
functions that were called on it, the model included.

A single record is run again as another one: buffers must not follow, and nothing may be left of it afterwards.

What this does not see: a `collate_fn` that mixes records before the loop gets them, code that couples records only in
batches other than the probed ones (the first, and one in each decade of steps), and tensors that the loop copies behind
the back of torch's function calls (`torch.tensor(x)`, `x.as_subclass(Tensor)`, `torch.from_dlpack(x)`, `w.data = x`);
and, in bfloat16, what moves the others by less than that rounds: 2 % of a column, 0.4 % of a layer's largest value.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fastdp.coupling import STRENGTHS, compare, compare_half, replace_rows, size
from fastdp.device import random_states, restore_random_states
from fastdp.errors import PrivacyError
from fastdp.layers import PLAIN, Inert, Recorder
from fastdp.scales import Scales
from fastdp.state import State
from fastdp.tape import Tape, mark, plain
from fastdp.uses import LayerUse, Use

PROBED_BATCHES = {1, 10, 100, 1000}

_MEANS_OVER_COUNTED = (F.cross_entropy, F.nll_loss)


class Probe:
    """Checks the root module and the loss at the first batch with two records or more, and now and then later.

    loss_is_mean: what the user said of the loss; the probe sees whether it is true.
    sizes: expected batch sizes, by which a loss may be divided: constants, whatever the batch.
    """

    def __init__(
        self, root: nn.Module, recorder: Recorder, loss_is_mean: bool, sizes: frozenset[int] = frozenset()
    ) -> None:
        self.root, self.recorder, self.loss_is_mean, self.scales = root, recorder, loss_is_mean, Scales(sizes)
        self.ignore_index: int | None = None  # a label that would leave its record out of the loss's mean
        self._batches = {True: 0, False: 0}  # of a single record, of more
        self._modes: set[tuple[bool, bool]] = set()  # where checked: root.training, and whether on a single record
        self._rows = 0
        self._needed = False  # in this step
        self._expected: int | None = None  # uses of layers that this step's probe saw
        self.tape: Tape | None = None
        self._replays = 0
        self._passed: Tape | None = None  # of this step, once it was probed
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
        self.tape = self._passed = None
        self.recorder.depth = 0
        self._needed, self._expected, self._rows = False, None, rows
        if rows < 1:
            return batch
        self._batches[rows == 1] += 1
        number = self._batches[rows == 1]
        self._needed = number in PROBED_BATCHES or self._mode not in self._modes or self.scales.undecided
        if not self._needed:
            return batch
        self.tape = tape = Tape(rows, lambda tape: self.tape is tape, self.check)
        _check_batch(batch, rows)
        return tree_map_only(Tensor, tape.add_source, batch)

    def discarded(self) -> None:
        """Called by zero_grad() after a backward: the next one is the step's, and is to be probed if that one was."""
        if self._passed is not None:
            self.tape, self._passed = self._passed, None
            self._needed, self._expected = True, None

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
        if module is not self.root:
            return None
        self.recorder.depth += 1
        if self.recorder.depth > 1 or not torch.is_grad_enabled() or self._rows < 1:
            return None
        if self.tape is None:
            # Training and evaluation mode are two models.
            self._needed = self._needed or (self._mode not in self._modes and self._expected is None)
            return None
        self.tape.begin(self.root, args, kwargs)
        return tree_map_only(Tensor, plain, (args, kwargs))

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        tape = self.tape
        if module is not self.root:
            return None
        self.recorder.depth = max(0, self.recorder.depth - 1)  # 0: a hook before ours raised
        if self.recorder.depth or tape is None or output is None or not torch.is_grad_enabled():
            return None
        given = [x.grad_fn for x in tree_leaves(output) if isinstance(x, Tensor)]
        output = tree_map_only(Tensor, lambda x: mark(x, tape), output)
        tape.modules.update(given, (x.grad_fn for x in tree_leaves(output) if isinstance(x, Tensor)))
        tape.end(self.root, output)
        return output

    def check(self, loss: Tensor, gradient: Tensor | None) -> None:
        """Called by loss.backward(), before it."""
        tape = self.tape
        assert tape is not None
        if not any(func is self.root for func, *_ in tape.calls):
            return  # another model's loss
        for func, args, kwargs, _ in tape.calls:
            if func in _MEANS_OVER_COUNTED and kwargs.get("reduction", "mean") == "mean":
                self._check_counted_mean(args, kwargs)
        self._check_functions(tape, loss)
        self.scales.check(tape, gradient, self._batches[False])
        base, values, buffers = self._replay(tape, loss, gradient, lambda x: x)
        if not base:
            return
        rows = tape.rows
        if rows == 1:
            self._check_single(tape, loss, gradient, base, buffers)
            self.passed(len(base))
            return
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        first, some = torch.arange(rows) < rows // 2, order < rows // 2
        halves = (first, ~first, some, ~some)
        for changed, strength in zip(halves, STRENGTHS, strict=True):

            def replace(x: Tensor, changed: Tensor = changed, strength: float = strength) -> Tensor:
                return replace_rows(x, changed, strength)

            other, other_values, other_buffers = self._replay(tape, loss, gradient, replace)
            compare(base, other, ~changed)
            if values != other_values:
                raise PrivacyError(
                    "a number was taken out of torch before backward() (.item(), float(), .numpy(), printing) and "
                    "depends on the records: keep it a tensor, or take it after backward()"
                )
            self._check_buffers(buffers, other_buffers)
        again, _, _ = self._replay(tape, loss, gradient, lambda x: x, after=replace)
        compare(base, again, torch.ones(rows, dtype=torch.bool))
        self._check_reduction(tape, loss, gradient, base, values)
        self.passed(len(base))

    def _check_single(
        self, tape: Tape, loss: Tensor, gradient: Tensor | None, base: list[Use], buffers: list[Tensor]
    ) -> None:
        one = torch.ones(1, dtype=torch.bool)
        for strength in sorted(set(STRENGTHS)):
            change = functools.partial(replace_rows, changed=one, strength=strength)
            _, _, other = self._replay(tape, loss, gradient, change)
            self._check_buffers(buffers, other)
        again, _, _ = self._replay(tape, loss, gradient, lambda x: x, after=change)
        compare(base, again, one)

    def _check_buffers(self, buffers: list[Tensor], others: list[Tensor]) -> None:
        """Not a bit of them may follow the records: running statistics with a small momentum move by little."""
        for name, was, now in zip(dict(self.root.named_buffers()), buffers, others, strict=True):
            if was.shape != now.shape or not bool(((was == now) | (was.isnan() & now.isnan())).all()):
                raise PrivacyError(f"module: buffer {name} is computed from the records and would leave un-noised")

    def _check_functions(self, tape: Tape, loss: Tensor) -> None:
        """What the loop does after the model is replayed function by function; a Function's own backward is not."""
        found: list[Any] = [loss.grad_fn]
        seen = {None, *tape.modules}
        while found:
            node = found.pop()
            if node in seen:
                continue
            seen.add(node)
            name = type(node).__name__.removesuffix("Backward")
            # A backward hook of the module itself is replayed with it; layers called beside it are refused by keep().
            known = name in ("BackwardHookFunction", "_Attach", "_Gates")
            if isinstance(node, torch.autograd.function.BackwardCFunction) and not known:
                raise PrivacyError(
                    f"loss: the backward of {name} is not torch's and cannot be replayed: call it in the module"
                )
            found.extend(next_node for next_node, _ in node.next_functions)

    def _check_counted_mean(self, args: Any, kwargs: Any) -> None:
        target = args[1] if len(args) > 1 else kwargs["target"]
        if target.is_floating_point():  # class probabilities: every record counts
            return
        self.ignore_index = int(kwargs.get("ignore_index", -100))
        if bool((target == self.ignore_index).any()):
            _refuse_ignored(self.ignore_index)

    def _check_reduction(
        self, tape: Tape, loss: Tensor, gradient: Tensor | None, base: list[Use], values: list[Any]
    ) -> None:
        """A mean over half of the records has gradients twice as large, a sum has the same."""
        half = tape.rows // 2
        if any(isinstance(u, LayerUse) and u.a.dim() and len(u.a) != tape.rows for u in base):
            return  # refused by step(), by its shape

        def keep(x: Tensor) -> Tensor:
            return x[:half].clone() if x.dim() and x.shape[0] == tape.rows else x

        try:
            smaller, _, _ = self._replay(tape, loss, gradient, keep)
        except (RuntimeError, ValueError, IndexError):
            return  # the loop has the batch's size as a constant: this cannot be seen
        if not tape.drew:
            compare_half(base, smaller, tape.rows, half)
        before = sum(size(b[:half]) for u in base for b in u.gradients(tape.rows))
        after = sum(size(b) for u in smaller for b in u.gradients(half))
        if before == 0.0 or after == 0.0:
            return
        is_mean = after / before > (tape.rows / half) ** 0.5
        if is_mean != self.loss_is_mean:
            found, said = ("mean", "sum") if is_mean else ("sum", "mean")
            raise PrivacyError(f"loss_reduction={said!r}: must be {found!r}, which is what the loss does")

    def _replay(
        self,
        tape: Tape,
        loss: Tensor,
        gradient: Tensor | None,
        change: Callable[[Tensor], Tensor],
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[list[Use], list[Any], list[Tensor]]:
        """What the layers recorded, the numbers taken out of torch, and the buffers, on changed records.

        after: how they were changed in a forward before this one, of which the module may remember something.
        """
        with self.untouched():
            if after is not None:
                tape.replay(after)
                _seed()
            known, values = tape.replay(change)
            again = known.get(id(loss))
            if again is None or not again.requires_grad:
                raise PrivacyError("loss: it cannot be replayed from the batch; use torch functions on it")
            gradient = known.get(id(gradient), gradient)
            # Parts of the loss that are not made of the batch, a penalty say, belong to one graph of all replays.
            torch.autograd.backward(again, gradient, retain_graph=True)
            buffers = [b.clone() for b in self.root.buffers()]
            return self.recorder.uses, values, buffers

    def passed(self, uses: int) -> None:
        self._modes.add(self._mode)
        self._needed, self._expected = False, uses
        self.tape, self._passed = None, self.tape

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Random numbers, the module's state, gradients and what the layers recorded are afterwards as before."""
        gradients = [(p, p.grad) for p in self.root.parameters()]
        python, numbers = random.getstate(), np.random.get_state()
        tape, self.tape = self.tape, None
        rows, self._rows = self._rows, 0  # the hooks above do nothing meanwhile
        recorder = self.recorder
        before = recorder.uses, recorder.backward, recorder.batch, recorder.depth
        state, ours = State(self.root), random_states()
        try:
            with torch.enable_grad():
                # What the loop draws is the same in every replay; what the module draws is what it drew.
                _seed()
                recorder.uses, recorder.backward = [], None
                # Of no batch, and of no other replay: what an earlier graph brings is refused.
                self._replays += 1
                recorder.batch, recorder.depth = -self._replays, 0
                if tape is not None and tape.state is not None:
                    tape.state.restore()
                yield
        finally:
            recorder.uses, recorder.backward, recorder.batch, recorder.depth = before
            state.restore()
            self.tape, self._rows = tape, rows
            restore_random_states(ours)
            random.setstate(python)
            np.random.set_state(numbers)
            for p, g in gradients:
                p.grad = g


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def _check_batch(batch: Any, rows: int) -> None:
    leaves = tree_leaves(batch)
    for x in leaves:
        if not isinstance(x, (Tensor, *PLAIN)):
            raise PrivacyError(
                f"data_loader: a batch with a {type(x).__name__} cannot be probed: use tuples, lists, dicts, tensors"
            )
    if not any(isinstance(x, Tensor) and x.dim() and x.shape[0] == rows for x in leaves):
        raise PrivacyError("data_loader: no tensor of the batch has a record in each row")


def _refuse_ignored(index: int) -> None:
    raise PrivacyError(
        f"loss: a label is ignore_index={index}, and the mean over the others couples the records: "
        "use reduction='sum' and loss_reduction='sum'"
    )
