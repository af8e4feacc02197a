"""Differentially private training for PyTorch at the price of training without."""

from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

# In a checkout after `pip install .`, `import fastdp` finds the checkout first, where nothing was built: then all the
# rest is read from the package that was installed.
if not any((Path(__file__).parent / f"_kernels{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
    try:
        __path__ = [str(distribution("fastdp").locate_file("fastdp"))]
    except PackageNotFoundError:
        raise ImportError("fastdp is not built: run `pip install .` in its checkout") from None

from fastdp import _kernels, accounting, comm, ops
from fastdp.engine import PrivacyEngine
from fastdp.errors import ArgumentError, CommError, PrivacyError
from fastdp.rules import fix, validate

try:
    __version__ = version("fastdp")
except PackageNotFoundError:  # run from a build tree
    __version__ = _kernels.__version__

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
