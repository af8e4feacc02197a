"""What several test files need: the source of truth is fastdp/reference.py, not this file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loops import MODELS, data, private

HERE = Path(__file__).parent


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
