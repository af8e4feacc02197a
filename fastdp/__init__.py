"""Differentially private training for PyTorch at the price of training without."""

from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout after `pip install .`, `import fastdp` finds the checkout first, where nothing was built: then all the
# rest is read from the package that was installed.
if not any((Path(__file__).parent / f"_kernels{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
    try:
        __path__ = [str(distribution("fastdp").locate_file("fastdp"))]
    except PackageNotFoundError:
        raise ImportError("fastdp is not built: run `pip install .` in its checkout") from None

if TYPE_CHECKING:
    from fastdp import accounting, comm, ops
    from fastdp.engine import PrivacyEngine
    from fastdp.errors import ArgumentError, CommError, PrivacyError
    from fastdp.rules import fix, validate

__all__ = [
    "ArgumentError",
    "CommError",
    "PrivacyEngine",
    "PrivacyError",
    "__version__",
    "accounting",
    "comm",
    "fix",
    "ops",
    "validate",
]

_MODULES = ("accounting", "comm", "ops")
_HOMES = {
    "PrivacyEngine": "engine",
    **dict.fromkeys(("ArgumentError", "CommError", "PrivacyError"), "errors"),
    **dict.fromkeys(("fix", "validate"), "rules"),
}


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used (PEP 562): spark_jobs needs the column contract, and no torch."""
    if name in _MODULES:
        return import_module(f"fastdp.{name}")
    if name in _HOMES:
        value = getattr(import_module(f"fastdp.{_HOMES[name]}"), name)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module 'fastdp' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    try:
        return version("fastdp")
    except PackageNotFoundError:  # run from a build tree
        from fastdp import _kernels

        return _kernels.__version__
