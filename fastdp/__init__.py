"""Differentially private training for PyTorch at the price of training without."""

from importlib.metadata import PackageNotFoundError, version

from fastdp import _kernels, accounting, comm, ops
from fastdp.engine import PrivacyEngine
from fastdp.errors import ArgumentError, CommError, PrivacyError

try:
    __version__ = version("fastdp")
except PackageNotFoundError:  # run from a build tree
    __version__ = _kernels.__version__

__all__ = ["ArgumentError", "CommError", "PrivacyEngine", "PrivacyError", "__version__", "accounting", "comm", "ops"]
