"""The package as its users meet it: version, imports, and the README's examples."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastdp
from fastdp import _kernels, _mpi  # type: ignore[attr-defined]

README = Path(__file__).parent.parent / "README.md"


def test_one_version() -> None:
    assert fastdp.__version__ == _kernels.__version__ == _mpi.__version__


def test_import_is_light() -> None:
    """Neither MPI, nor the accountant's library, nor plots are loaded before they are needed."""
    code = (
        "import sys, torch; before = set(sys.modules); import fastdp\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(sorted(new & {'mpi4py', 'dp_accounting', 'matplotlib', 'scipy', 'rich', 'cyclopts'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL))
def test_readme_examples_run(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    if "engine" in names:
        assert 2.98 < float(capsys.readouterr().out) <= 3.0
    else:
        assert names["noisy"].shape == (10_000,)  # type: ignore[attr-defined]


def test_public_names() -> None:
    for name in ("sq_norms", "clip_sum", "clip_noise", "linear_sq_norms", "gaussian_noise_", "poisson_sample"):
        assert getattr(fastdp.ops, name).__doc__
    assert fastdp.PrivacyEngine.make_private.__doc__ and fastdp.PrivacyEngine.make_private_with_epsilon.__doc__
    assert fastdp.accounting.epsilon.__doc__ and fastdp.accounting.noise_multiplier.__doc__ and fastdp.comm.init.__doc__
