"""What several test files need: the source of truth is fastdp/reference.py, not this file."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from loops import MODELS, data, private

from fastdp import cuda

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def key() -> torch.Tensor:
    return torch.arange(32, dtype=torch.uint8)


@pytest.fixture
def loop():
    """Engine, module, optimizer and loader of a small model without noise."""
    module = MODELS["mlp"]()
    return private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def at_isa(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Run Python code in a process whose kernels are those of one instruction set; returns what it prints."""

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "FASTDP_ISA": request.param},
            capture_output=True,
            text=True,
            timeout=120,
        )
        if "must be one of" in done.stderr and "FASTDP_ISA" in done.stderr:
            pytest.skip(f"this machine cannot run {request.param}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """fastdp._cuda, whose kernels are run by the emulator in tests/cuda."""
    pybind11 = pytest.importorskip("pybind11")
    if (os.environ.get("CXX") or shutil.which("g++")) is None or not CSRC.is_dir():
        pytest.skip("no C++ compiler, or not run in the sources")
    module = tmp_path_factory.mktemp("emulated") / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-shared", "-fPIC", "-std=gnu++20", "-O1", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]
    flags += ['-DFASTDP_VERSION="emulated"', f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    sources = [HERE / "cuda" / "emulated.cpp", CSRC / "cuda" / "bindings.cpp"]
    command = [os.environ.get("CXX", "g++"), *flags, *sources, "-o", module]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    spec = importlib.util.spec_from_file_location("fastdp._cuda", module)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def on_emulator(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are taken for a GPU's."""
    monkeypatch.setattr(cuda, "kernels", lambda: emulated)
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
