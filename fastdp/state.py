"""What a module and its parts hold, so that a forward that is run again starts from it and leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

# What every module has; hooks and parts are not a forward's to change.
_COMMON = frozenset(vars(nn.Module()))


class State:
    """Buffers, plain attributes and, if wanted, values of parameters, as they are now."""

    def __init__(self, module: nn.Module, parameters: bool = True) -> None:
        self._slots: list[tuple[nn.Module, dict[str, Tensor | None], set[str], dict[str, Any]]] = []
        self._values: dict[Tensor, Tensor] = {}
        for m in module.modules():
            attributes = {k: v for k, v in vars(m).items() if k not in _COMMON}
            self._slots.append((m, dict(m._buffers), set(m._non_persistent_buffers_set), attributes))
            tensors = (*attributes.values(), *m._parameters.values()) if parameters else ()
            for x in (*m._buffers.values(), *tensors):
                if isinstance(x, Tensor):
                    self._values[x] = x.detach().clone()

    def restore(self) -> None:
        """Each tensor in its place, with its value; what came since is gone."""
        for m, buffers, passing, attributes in self._slots:
            m._buffers.clear()
            m._buffers.update(buffers)
            m._non_persistent_buffers_set.clear()
            m._non_persistent_buffers_set.update(passing)
            for name in [k for k in vars(m) if k not in _COMMON and k not in attributes]:
                vars(m).pop(name)
            vars(m).update(attributes)
        for x, value in self._values.items():
            restore_value(x, value)


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """It holds afterwards what it held, but for parameters' values, which a forward that is run again leaves alone."""
    state = State(module, parameters=False)
    try:
        yield
    finally:
        state.restore()


def restore_value(x: Tensor, value: Tensor) -> None:
    """Only where it was changed: expanded tensors, which no forward changes, cannot be written to."""
    same = x.shape == value.shape and bool(((x == value) | ((x != x) & (value != value))).all())
    if not same:
        x.data = value.clone() if x.shape != value.shape else x.data.copy_(value)
