"""The errors that fastdp raises on purpose. Each is one line that names the thing, its value and its bound."""

from __future__ import annotations


class ArgumentError(ValueError):
    """A bad argument: `name=value: must be bound`."""

    def __init__(self, name: str, value: object, bound: str) -> None:
        super().__init__(f"{name}={value!r}: must be {bound}")
        self.name, self.value, self.bound = name, value, bound

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, object, str]]:
        return ArgumentError, (self.name, self.value, self.bound)  # the base class would pass on the message alone


class PrivacyError(RuntimeError):
    """Going on would break a promise of the privacy guarantee, so the step is refused."""


class CommError(RuntimeError):
    """A collective failed: names the rank and the reason. The communicator is unusable afterwards."""


def require(condition: bool, name: str, value: object, bound: str) -> None:
    """Raise ArgumentError unless `condition` holds."""
    if not condition:
        raise ArgumentError(name, value, bound)


def refuse_compiled() -> None:
    raise PrivacyError("torch.compile: compiled models and losses are not supported in this version")


# torch.compile calls it while it compiles, instead of compiling it: an error raised by compiled code would send the
# caller back to uncompiled code, half of whose hooks ran.
refuse_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result
