"""bench/roofline.py: its checks, with the emulator in the place of a GPU, and the page without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import roofline
import torch

from fastdp import cuda

CPU = torch.device("cpu")
CASES = {case.name: case for case in roofline.CASES}
PAGE = Path(roofline.__file__).with_suffix(".md")


@pytest.mark.usefixtures("on_emulator")
@pytest.mark.parametrize("name", CASES)
def test_kernels_pass_their_checks(name: str) -> None:
    roofline.check(CASES[name], CPU)


def off(x: torch.Tensor, relative: float) -> None:
    """The greatest element, by a little; of integers, by 1."""
    x[x.argmax()] += x.max() * relative if x.is_floating_point() else 1


# Which function of fastdp.cuda, and by how much: 2.3e-16 and 1.2e-7 are of one bit at least.
WRONG = {
    "sq_norms": ("sq_norms", 1e-10),
    "clip_factors": ("clip_factors", 2.3e-16),
    "clip_sum, rows held": ("clip_sum", 1e-4),
    "clip_sum, rows staged": ("clip_sum", 1e-4),
    "clip_sum, read twice": ("clip_sum", 1e-4),
    "sum_rows": ("sum_rows", 1e-4),
    "scale_rows": ("scale_rows", 1.2e-7),
    "linear_sq_norms, one position": ("linear_sq_norms", 1e-10),
    "linear_sq_norms, Gram matrices": ("linear_sq_norms", 1e-10),
    "embedding_sq_norms": ("embedding_sq_norms", 1e-10),
    "gaussian_noise": ("add_noise", 1.2e-7),
    "noise_step, SGD": ("noise_step", 1e-4),
    "noise_step, Adam": ("noise_step", 1e-4),
    "poisson_sample": ("poisson_sample", 0.0),
}


def spoil(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One element of what the case's function gives, or of what it writes, is wrong; noise_step's sum before it."""
    function, relative = WRONG[name]
    right: Callable[..., Any] = getattr(cuda, function)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        given = [x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.float32]
        if function == "noise_step":
            off(given[0], relative)
            return right(*args, **kwargs)
        result = right(*args, **kwargs)
        of = given[-1] if result is None else result[0] if function == "clip_factors" else result
        off((of[1] if isinstance(of, tuple) else of).view(-1), relative)
        return result

    monkeypatch.setattr(cuda, function, wrong)


@pytest.mark.usefixtures("on_emulator")
@pytest.mark.parametrize("name", CASES)
def test_checks_find_what_is_a_little_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, name)
    with pytest.raises(AssertionError):
        roofline.check(CASES[name], CPU)


class Timed:
    """As if there were a GPU: the emulator's, what is timed as small as what is checked, and times given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        small = [
            replace(case, sizes={axis: (of[1], of[1]) for axis, of in case.sizes.items()}) for case in roofline.CASES
        ]
        monkeypatch.setattr(roofline, "CASES", small)
        monkeypatch.setattr(roofline, "this_gpu", lambda device: ("a GPU", roofline.L4 | {"memory": 1e9}))
        monkeypatch.setattr(roofline, "microseconds", self.microseconds)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def microseconds(self, call: Callable[[], object], device: torch.device) -> float:
        call()
        self.calls += 1
        return 1000.0


@pytest.mark.usefixtures("on_emulator")
def test_a_wrong_kernel_ends_the_script_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = Timed(monkeypatch)
    spoil(monkeypatch, "scale_rows")
    with pytest.raises(SystemExit, match=r"^scale_rows: AssertionError: ") as error:
        roofline.main(tmp_path / "page.md")
    assert isinstance(error.value.code, str)  # printed, and status 1
    assert timed.calls == 0 and not (tmp_path / "page.md").exists()


@pytest.mark.usefixtures("on_emulator")
def test_the_measured_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(monkeypatch)
    roofline.main(tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "\n\nMeasured on a GPU, copies at 0.001 TB/s, after all checks had passed.\n\n" in text
    assert "not run" not in text and "No GPU" not in text and timed.calls == len(CASES)
    assert "| B = 5, D = 20_000 |" in text and "| 1,000, 40% |" in text  # 4 * 5 * 20,000 + 8 * 5 bytes at 1 GB/s


def test_times_are_medians_in_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            events.append(self)
            self.number = len(events)

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, end: Event) -> float:
            return float(self.number if end.number == self.number + 1 else -1)  # in ms: 1, 3, ..., 39

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(roofline, "FLUSH_BYTES", 64)
    assert roofline.microseconds(lambda: order.append("call"), CPU) == 20_000.0
    assert order == ["call"] * 3 + ["event", "call", "event"] * 20 + ["wait"]


def test_a_gpus_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "FLUSH_BYTES", 4000)
    monkeypatch.setattr(roofline, "microseconds", lambda call, device: (call(), 2.0)[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="X", major=9, minor=0))
    name, rates = roofline.this_gpu(CPU)  # 4000 bytes read, and written
    assert name == "X" and rates == {"memory": 4e9, "fp32": 33.5e12, "fp64": 17e12, "int32": 16.75e12}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="X", major=7, minor=5))
    with pytest.raises(SystemExit, match=r"X: compute capability 7.5: must be one of \[\(9, 0\), \(8, 9\), \(8, 0\)\]"):
        roofline.this_gpu(CPU)


def test_floors_by_hand() -> None:
    of = {name: case.work(*case.at(0)) for name, case in CASES.items()}
    # 256 rows of a million floats and 256 doubles: 1,024,002,048 bytes
    assert roofline.floor(of["sq_norms"], roofline.H100) == (pytest.approx(305.672, rel=1e-5), "memory")
    assert roofline.floor(of["sq_norms"], roofline.L4) == (pytest.approx(3413.34, rel=1e-5), "memory")
    # 10 pairs of 4 tiles of 64: of 1536 columns 4096 multiply-adds and 128 conversions, and 4096 products, 64,921,600;
    # of the bias, 256 conversions and sums and a square in 768 columns, 393,984; 64 times
    assert of["linear_sq_norms, Gram matrices"]["fp64"] == 64 * (64_921_600 + 393_984)
    assert roofline.floor(of["linear_sq_norms, Gram matrices"], roofline.H100) == (
        pytest.approx(245.89, rel=1e-4),
        "fp64",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_the_page_is_what_the_script_writes(tmp_path: Path) -> None:
    roofline.main(tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
