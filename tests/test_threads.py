"""The collectives in shared memory under ThreadSanitizer, with threads for ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent.parent / "csrc"


def test_no_data_race_in_shared_memory(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not SOURCES.is_dir():
        pytest.skip("no C++ compiler, or not run in the sources")
    program = tmp_path / "threads"
    flags = ["-std=gnu++20", "-O1", "-g", "-fsanitize=thread", "-Wno-tsan", "-pthread"]
    sources = [Path(__file__).with_name("threads.cpp"), SOURCES / "comm" / "sum.cpp"]
    built = subprocess.run([compiler, *flags, *sources, "-o", program], capture_output=True, text=True, timeout=300)
    if "cannot find" in built.stderr and "tsan" in built.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    # Without a fixed layout of memory: older ThreadSanitizers do not know the kernel's.
    setarch = ["setarch", "-R"] if shutil.which("setarch") else []
    ran = subprocess.run([*setarch, program], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stdout + ran.stderr
