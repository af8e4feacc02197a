"""The CUDA kernels without a GPU: their bodies on the CPU under sanitizers, what nvcc makes of them, and fastdp/cuda.py
on an emulated fastdp._cuda."""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdp import ArgumentError, cuda, native, ops, reference

HERE = Path(__file__).parent / "cuda"
CSRC = HERE.parent.parent / "csrc"
KEY = torch.arange(32, dtype=torch.uint8)


def run_suites(folder: Path, *flags: str, arguments: tuple[str, ...] = ()) -> list[Path]:
    """Builds both halves of host.cpp and runs them, at once: the programs."""
    if (os.environ.get("CXX") or shutil.which("g++")) is None or not CSRC.is_dir():
        pytest.skip("no C++ compiler, or not run in the sources")
    # Without a fixed layout of memory: older sanitizers do not know the kernel's.
    setarch = ["setarch", "-R"] if shutil.which("setarch") else []

    def run(suites: int) -> Path:
        program = folder / f"host{suites}"
        for command in (
            [HERE / "build.sh", program, f"-DFASTDP_SUITES={suites}", *flags],
            [*setarch, program, *arguments],
        ):
            ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
            assert ran.returncode == 0, ran.stdout + ran.stderr
        assert ran.stdout == "done\n", ran.stdout + ran.stderr
        return program

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(run, (1, 2)))


# Of csrc/cuda, what only a GPU runs, and what holds no body.
NO_BODIES = {"api.h", "api-inl.h", "context.h", "launcher.h"}


def coverage_of(program: Path) -> list[dict[str, Any]]:
    """gcov's, of the files that host.cpp is made of."""
    command = ["gcov", "--json-format", "--stdout", next(program.parent.glob(f"{program.name}-host.gcda"))]
    run = subprocess.run(command, cwd=program.parent, capture_output=True, text=True, timeout=300, check=True)
    return [file for line in run.stdout.splitlines() for file in json.loads(line)["files"]]


def test_bodies_against_the_oracle_under_sanitizers(tmp_path: Path) -> None:
    """And every line of them is run."""
    programs = run_suites(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "--coverage")
    if shutil.which("gcov") is None:
        pytest.skip("no gcov: the tests passed, but which lines they ran is not known")
    times: dict[tuple[str, int], int] = {}  # of all instantiations together
    for file in (file for program in programs for file in coverage_of(program)):
        if Path(file["file"]).parent.name == "cuda" and Path(file["file"]).parent.parent.name == "csrc":
            for line in file["lines"]:
                place = Path(file["file"]).name, line["line_number"]
                times[place] = times.get(place, 0) + line["count"]
    assert {name for name, _ in times} >= {path.name for path in (CSRC / "cuda").glob("*.h")} - NO_BODIES
    assert [place for place, count in times.items() if count == 0 and place[0] not in NO_BODIES] == []


def test_bodies_have_no_data_race(tmp_path: Path) -> None:
    run_suites(tmp_path, "-fsanitize=thread", "-Wno-tsan", "-DFASTDP_ONLY_THREADS", arguments=("threads",))


# Of each body, at most: registers of a thread, bytes of static shared memory. On compute capability 8.0 and 9.0.
LIMITS = {
    "AddNoise": (48, 0),
    "AddPartial": (32, 1024),
    "AddTiles": (40, 32),
    "ClipFactors": (26, 0),
    "ClipSumHeld": (128, 4176),
    "ClipSumStaged": (48, 512),
    "CountsToPlaces": (30, 64),
    "EmbeddingSquares": (56, 128),
    "GramTile": (210, 16416),
    "NoiseStep": (56, 0),
    "ProductSquares": (32, 32),
    "Sample": (56, 0),
    "ScaleRows": (30, 0),
    "SquareNorms": (56, 64),
    "SumPieces": (30, 0),
    "SumRows": (76, 0),
}


def find_nvcc() -> str:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None or not CSRC.is_dir():
        pytest.skip("no nvcc, or not run in the sources")
    return nvcc


def test_bodies_on_a_gpu(tmp_path: Path) -> None:
    """The same suites, as far as there is one: without, that they compile for it."""
    sources = [CSRC / f"{name}.cpp" for name in ("dispatch", "isa_scalar", "ops", "threads")]
    gpu = subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0 if shutil.which("nvidia-smi") else False
    flags = ["-std=c++20", "-O1", "-fmad=false", "-arch=native" if gpu else "-arch=sm_90"]
    command = [find_nvcc(), *flags, HERE / "gpu.cu", *sources, "-o", tmp_path / "gpu"]
    built = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([tmp_path / "gpu"], capture_output=True, text=True, timeout=600)
    if ran.returncode == 3:
        pytest.skip(f"compiled, and not run: {ran.stdout.strip()}")
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stdout + ran.stderr


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_nvcc_keeps_all_in_registers(architecture: str, tmp_path: Path) -> None:
    flags = ["-std=c++20", "-O3", "-fmad=false", "-Xptxas", "-v", f"-arch=sm_{architecture}", "-cubin"]
    command = [find_nvcc(), *flags, CSRC / "cuda" / "kernels.cu", "-o", tmp_path / "kernels.cubin"]
    built = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0 and "warning" not in built.stderr, built.stderr
    kernels = re.findall(
        r"Compiling entry function '_ZN6fastdp4cuda6kernelINS0_(\d+)(\w*)'.*?"
        r"(\d+ bytes stack frame, \d+ bytes spill stores, \d+ bytes spill loads).*?Used (\d+) registers([^\n]*)",
        built.stderr,
        re.DOTALL,
    )
    assert {name[: int(length)] for length, name, *_ in kernels} == set(LIMITS)
    for length, name, spilled, registers, rest in kernels:
        body = name[: int(length)]
        shared = re.search(r"(\d+) bytes smem", rest)
        assert spilled == "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", (name, spilled)
        assert int(registers) <= LIMITS[body][0], (name, registers)
        assert int(shared[1] if shared else 0) <= LIMITS[body][1], (name, rest)


# ---- fastdp/cuda.py, with the emulator in the place of a GPU


@pytest.mark.usefixtures("on_emulator")
class TestOnTheEmulator:
    @pytest.mark.parametrize("dtype", cuda.DTYPES)
    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (5, 33), (40, 1000), (3, 40_000)])
    def test_norms_and_clipped_sums(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        g = torch.randn(shape).to(dtype)
        torch.testing.assert_close(cuda.sq_norms(g), reference.sq_norms(g), rtol=1e-12, atol=0)
        want = reference.clip_sum(g, 2.0)
        torch.testing.assert_close(cuda.clip_sum(g, 2.0).double(), want, rtol=1e-5, atol=1e-5)

    def test_factors_and_sums(self) -> None:
        g = torch.randn(40, 300)
        g[3, 5] = math.nan
        sq = cuda.sq_norms(g)
        for gamma in (None, 0.01):
            factors, _ = cuda.clip_factors(sq, torch.float32, 0.5, 1.0, gamma)
            assert torch.equal(factors, native.clip_factors(sq, torch.float32, 0.5, 1.0, gamma)[0])
            got, want = torch.ones(300), torch.ones(300)
            cuda.sum_rows(g, factors, got, add=True)
            native.sum_rows(g, factors, want, add=True)
            torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("dtype", cuda.DTYPES)
    @pytest.mark.parametrize("positions", [(), (1,), (40,)])
    def test_norms_of_linear_layers(self, positions: tuple[int, ...], dtype: torch.dtype) -> None:
        a, b = (torch.randn(5, *positions, n).to(dtype) for n in (33, 20))
        for bias in (True, False):
            want = reference.linear_sq_norms(a, b, bias)
            torch.testing.assert_close(cuda.linear_sq_norms(a, b, bias), want, rtol=1e-10, atol=0)

    def test_norms_of_embeddings(self) -> None:
        index, b = torch.randint(0, 4, (6, 9)), torch.randn(6, 9, 5)
        index[0, 0] = -1  # of no table, but no padding either
        for padding in (None, 3, -1):
            got, want = cuda.embedding_sq_norms(index, b, padding), reference.embedding_sq_norms(index, b, padding)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=0)

    def test_noise_has_the_cpus_bits(self) -> None:
        x, y = torch.ones(1000), torch.ones(1000)
        cuda.add_noise(x, 0.5, KEY, 3, 17)
        native.add_noise(y, 0.5, KEY, 3, 17)
        assert torch.equal(x, y)

    def test_a_step_has_the_cpus_bits(self) -> None:
        h = native._kernels.SgdStep(
            std=1.0, scale=0.1, weight_decay=0.01, lr=0.1, momentum=0.9, dampening=0.0, nesterov=True, first=False
        )
        flat, results = torch.randn(5000), []
        p, velocity = torch.randn(4000), torch.randn(4000)
        for step in (cuda.noise_step, native.noise_step):
            mine, state = p.clone(), velocity.clone()
            step(h, [(mine.data_ptr(), state.data_ptr(), 0, 4000, 16)], flat, KEY, 5)
            results.append((mine, state))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b) and not torch.equal(a, p)

    def test_batches_are_the_cpus(self) -> None:
        for n, rate in ((0, 0.5), (10_000, 0.01), (5000, 1.0), (5000, 0.0)):
            ids, total = cuda.poisson_sample(n, rate, KEY, 2, torch.device("cpu"))
            want = native.poisson_sample(n, rate, KEY, 2)
            assert total.tolist() == [len(want)] and torch.equal(ids[: len(want)], want)

    def test_wrong_arguments(self) -> None:
        g, a, b = torch.randn(4, 6), torch.randn(2, 1, 6), torch.randn(2, 1, 5)
        wide = torch.zeros(2, 1, 1, 4)
        for call, match in (
            (lambda: cuda.sq_norms(g[0]), r"g.shape=\[6\]: must be"),
            (lambda: cuda.sq_norms(g.double()), "g.dtype=torch.float64: must be float32, bfloat16 or float16 on a GPU"),
            (lambda: cuda.sq_norms(g.t()), "g.stride"),
            (lambda: cuda.clip_sum(g, -1.0), "max_norm=-1.0"),
            (lambda: cuda.clip_sum(g, 1.0, torch.zeros(5)), "out="),
            (lambda: cuda.clip_sum(g, 1.0, g[0]), "out=.in g.s memory"),
            (lambda: cuda.linear_sq_norms(g, g[:2], True), "b="),
            (lambda: cuda.embedding_sq_norms(g, g[:, None], None), "index="),
            (lambda: cuda.convolution_gradients(a, a[:1], 1, (1,), (0,), (1,), a[:, :, None]), "b="),
            (lambda: cuda.convolution_gradients(a, b, 1, (1,), (0,), (1,), wide[..., ::2]), "out.stride"),
            (lambda: cuda.embedding_sq_norms(g.long().t(), g.t()[:, :, None], None), "index.stride"),
            (lambda: cuda.add_noise(g.t(), 1.0, KEY, 0, 0), "x.stride"),
            (lambda: cuda.add_noise(g, 1e-40, KEY, 0, 0), "std=1e-40"),
            (lambda: cuda.add_noise(g, 1.0, KEY[:5], 0, 0), "key="),
            (lambda: cuda.add_noise(g, 1.0, KEY, -1, 0), "step=-1"),
            (lambda: cuda.add_noise(g, 1.0, KEY, 0, -1), "offset=-1"),
            (lambda: cuda.poisson_sample(-1, 0.5, KEY, 0, torch.device("cpu")), "n=-1"),
            (lambda: cuda.poisson_sample(5, 1.5, KEY, 0, torch.device("cpu")), "rate=1.5"),
        ):
            with pytest.raises(ArgumentError, match=match):
                call()


def test_without_cuda_kernels_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastdp._cuda", None)
    with pytest.raises(
        ArgumentError, match=r"device='cuda': must be cpu: this build has no CUDA kernels .*FASTDP_CUDA=ON"
    ):
        cuda.kernels()
    with pytest.raises(ArgumentError, match=r"g.device='cpu': must be cuda"):
        cuda.sq_norms(torch.ones(2, 2))


def test_cuda_tensors_reach_these_functions() -> None:
    for name in set(ops.__all__) - {"random_key"}:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdp::{name}", "CUDA")
    assert ops.sq_norms
