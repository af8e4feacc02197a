"""The package as its users meet it: version, imports, and the README's examples."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi import launch

import fastdp
from fastdp import _kernels, _mpi  # type: ignore[attr-defined]

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PREDICT, LOOP, KERNELS, COLLECTIVES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_one_version() -> None:
    assert fastdp.__version__ == _kernels.__version__ == _mpi.__version__


def test_import_is_light() -> None:
    """Neither MPI, nor the accountant's library, nor plots are loaded before they are needed; by Spark, nor torch."""
    heavy = {"mpi4py", "dp_accounting", "matplotlib", "scipy", "rich", "cyclopts", "pyarrow"}
    for first, names in (
        ("import torch, fastdp; fastdp.PrivacyEngine, fastdp.ops, fastdp.comm, fastdp.validate", heavy),
        ("import fastdp, fastdp.schema, fastdp.files; fastdp.ArgumentError, dir(fastdp)", {*heavy, "torch"}),
    ):
        code = f"import sys; {first}\nprint({{m.split('.')[0] for m in sys.modules}} & {names})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "set()\n"


def test_all_public_names_are_there() -> None:
    for name in fastdp.__all__:
        assert getattr(fastdp, name) is not None and name in dir(fastdp)
    with pytest.raises(AttributeError, match="module 'fastdp' has no attribute 'nothing'"):
        _ = fastdp.nothing


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_readme_loop_alone_and_under_mpirun(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(LOOP, encoding="utf-8")
    if ranks == 1:
        subprocess.run([sys.executable, "script.py"], timeout=60, check=True)
        printed = capfd.readouterr().out
    else:
        printed = launch.run(str(tmp_path / "script.py"), ranks=ranks)
    assert 2.98 < float(printed) <= 3.0
    assert set(torch.load("model.pt")) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_the_readme_calls_the_kernels() -> None:
    names: dict[str, Any] = {}
    exec(compile(KERNELS, "README.md", "exec"), names)
    assert names["noisy"].shape == (10_000,) and names["sq"].shape == (256,)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_readme_calls_the_collectives(ranks: int, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(COLLECTIVES + "print(f'rows {rows.tolist()} {sums.tolist()} {x[0].item()}')\n")
    printed = launch.run(str(tmp_path / "script.py"), ranks=ranks)
    assert printed.count(f"rows [2, 7] {[[float(ranks)] * 4] * 2} {ranks * (ranks - 1) / 2}") == ranks, printed


def test_public_names() -> None:
    for name in fastdp.ops.__all__:
        assert getattr(fastdp.ops, name).__doc__
    assert fastdp.PrivacyEngine.make_private.__doc__ and fastdp.PrivacyEngine.make_private_with_epsilon.__doc__
    assert fastdp.accounting.epsilon.__doc__ and fastdp.accounting.noise_multiplier.__doc__ and fastdp.comm.init.__doc__
