"""What a training loop does to one batch, written down so that it can be done again on other records."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._guards import CompileContext
from torch.utils._pytree import tree_leaves, tree_map_only

from fastdp.device import random_states, restore_random_states
from fastdp.errors import refuse_compiled
from fastdp.precision import Autocast
from fastdp.state import State


class Random:
    """Where the generators stood."""

    def __init__(self) -> None:
        self._states = random_states(), random.getstate(), np.random.get_state()

    def restore(self) -> None:
        ours, python, numbers = self._states
        restore_random_states(ours)
        random.setstate(python)
        np.random.set_state(numbers)


class Tape:
    """The torch functions called on one batch, so that the step can be computed again on other records.

    is_active: whether functions are to be written down now. on_backward: called before a loss's backward().
    """

    def __init__(
        self, rows: int, is_active: Callable[[Tape], bool], on_backward: Callable[[Tensor, Tensor | None], None]
    ) -> None:
        self.rows, self.on_backward = rows, on_backward
        self.calls: list[tuple[Any, Any, Any, Any]] = []  # function, args, kwargs, result
        self._autocast: list[Autocast] = []  # that each of them ran in
        self.drew = False  # random numbers were drawn in the last replay
        self.modules: set[Any] = set()  # autograd's nodes of the root module's outputs
        self._is_active = is_active
        self._sources: list[tuple[Tensor, Tensor]] = []  # as marked, and its value
        self._begun: tuple[Any, Any, Random] = ((), {}, Random())  # the root module's current call
        self._randoms: dict[int, Random] = {}  # by the number of a call of the root module: what it drew from
        self.state: State | None = None  # of the root module before its first call

    @property
    def active(self) -> bool:
        return self._is_active(self)

    def begin(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        """The root module is called."""
        if self.state is None:
            self.state = State(root)
        self._begun = (args, kwargs, Random())

    def end(self, root: Any, output: Any) -> None:
        """It returned."""
        args, kwargs, self._randoms[len(self.calls)] = self._begun
        self.add_call(root, args, kwargs, output)

    def add_call(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        self.calls.append((func, args, kwargs, result))
        self._autocast.append(Autocast())

    def add_source(self, x: Tensor) -> Tensor:
        marked = mark(x, self)
        self._sources.append((marked, plain(x).detach().clone()))
        return marked

    def replay(self, change: Callable[[Tensor], Tensor]) -> tuple[dict[int, Any], list[Any]]:
        """What the functions make of changed records: by the id of what they made, and numbers taken out of torch."""
        known: dict[int, Any] = {id(marked): change(value).clone() for marked, value in self._sources}
        values: list[Any] = []
        start, self.drew = random_states(), False
        for number, (func, args, kwargs, result) in enumerate(self.calls):
            if number in self._randoms:
                self.drew |= _drew_since(start)
                self._randoms[number].restore()
                start = random_states()
            args, kwargs = tree_map_only(Tensor, lambda x: known.get(id(x), x), (args, kwargs))
            with self._autocast[number].again():
                again = func(*args, **kwargs)
            for x, y in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(x, Tensor):
                    known[id(x)] = y
                elif isinstance(y, np.ndarray):
                    values.append(y.tobytes())
                elif isinstance(y, (int, float, bool, complex, torch.Size)):
                    values.append(y)
        self.drew |= _drew_since(start)
        return known, values


def _drew_since(states: list[Tensor]) -> bool:
    return not all(map(torch.equal, random_states(), states))


class Taped(Tensor):
    """A tensor whose functions are written down on its tape. Only those of probed batches are."""

    _tape: Tape

    # A loop prints, saves and copies it as it would any other tensor, after the tape has ended too.

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else plain(self), spec)  # a number, as `item` on the tape

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return str(plain(self).__repr__(**kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(plain(self), memo)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if CompileContext.current_compile_id() is not None:
            refuse_compiled()
        tape = next(x._tape for x in tree_leaves((args, kwargs)) if isinstance(x, Taped))
        active = tape.active
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.backward:
                if active:
                    tape.on_backward(args[0], kwargs.get("gradient", args[1] if len(args) > 1 else None))
                return func(*args, **kwargs)  # type: ignore[no-untyped-call]
            result = func(*args, **kwargs)
            if not active:
                return result
            result = tree_map_only(Tensor, lambda x: mark(x, tape), result)
            tape.add_call(func, args, kwargs, result)
            return result


def mark(x: Tensor, tape: Tape) -> Tensor:
    taped = x if isinstance(x, Taped) else x.as_subclass(Taped)
    taped._tape = tape
    return taped


def plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)
