"""One optimiser step, forward and backward included, against the same step of plain PyTorch.

`pytest --benchmark-only bench/bench_step.py` takes fastdp on all models, and its peers where they are quick. For all
peers on all models, their memory, a table and a figure,

    python bench/bench_step.py steps.json steps.svg

takes some 20 minutes on 2 cores, 7 with 0.35 as a third argument, which scales the rounds. Each peer runs on each model
in a process of its own, interleaved with plain PyTorch on the same batches.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from step_memory import peak_bytes
from step_models import MODELS
from step_peers import PEERS, TooLarge, Trainer, fastdp, plain, sgd
from torch import Tensor, nn

from fastdp import _kernels

SECONDS = 4.0  # of timed rounds for a peer on a model
THREADS = (1, 2)

Found = dict[str, dict[str, dict[str, Any]]]  # by model and peer


def adam(module: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr=0.001)


class Unfused(torch.optim.Adam):
    """A subclass, so that fastdp makes the noise first and calls this step."""


def unfused_adam(module: nn.Module) -> torch.optim.Adam:
    return Unfused(module.parameters(), lr=0.001)


def unwatched(batch: list[Tensor]) -> list[Tensor]:
    """For the plain step: fastdp writes down what is done to some of its loader's batches."""
    return [x.as_subclass(Tensor) for x in batch]


WITH_ADAM = "MLP 784-1024-1024-10"
ROUNDS = dict.fromkeys(MODELS, 30) | {"MLP 64-256-256-2": 100, "MLP 9-50-1": 100, "ResNet-8": 15, "LSTM": 6}


@pytest.mark.parametrize("threads", THREADS, indirect=True)
@pytest.mark.parametrize(("name", "make"), [*((name, sgd) for name in MODELS), (WITH_ADAM, adam)])
def bench_step_against_torch(pair, benchmark, name: str, make, threads: int) -> None:
    theirs, ours = plain(MODELS[name], make), fastdp(MODELS[name], make)
    pair(
        lambda batch: theirs.step(*unwatched(batch)),
        lambda batch: ours.step(*batch),
        lambda: (next(ours.batches),),
        rounds=ROUNDS[name],
    )
    if threads == 1 and make is sgd:  # memory is the same with more
        benchmark.extra_info |= memory(name, "fastdp")


@pytest.mark.parametrize("threads", THREADS, indirect=True)
def bench_adam_step_against_the_unfused_one(pair, threads: int) -> None:
    fused, unfused = fastdp(MODELS[WITH_ADAM], adam), fastdp(MODELS[WITH_ADAM], unfused_adam)
    pair(
        lambda _, batch: unfused.step(*batch),
        lambda batch, _: fused.step(*batch),
        lambda: (next(fused.batches), next(unfused.batches)),
        rounds=ROUNDS[WITH_ADAM],
    )


@pytest.mark.parametrize("threads", THREADS, indirect=True)
def bench_secure_step_against_the_usual_one(pair, threads: int) -> None:
    usual, secure = (fastdp(MODELS[WITH_ADAM], secure_mode=on) for on in (False, True))
    pair(
        lambda batch, _: usual.step(*batch),
        lambda _, batch: secure.step(*batch),
        lambda: (next(usual.batches), next(secure.batches)),
        rounds=ROUNDS[WITH_ADAM],
    )


@pytest.mark.filterwarnings("ignore")  # Opacus's own
@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("Opacus ghost", "MLP 784-1024-1024-10"),
        ("Opacus ghost", "MLP 64-256-256-2"),
        ("Opacus ghost", "CNN"),
        ("Opacus hooks", "CNN"),
        ("torch.func", "CNN"),
    ],
)
def bench_step_of_peers_against_torch(pair, peer: str, name: str, threads: int) -> None:
    if peer.startswith("Opacus"):
        pytest.importorskip("opacus")
    theirs, ours = plain(MODELS[name]), PEERS[peer](MODELS[name])
    pair(theirs.step, ours.step, lambda: next(ours.batches), rounds=10)


def memory(name: str, peer: str) -> dict[str, Any]:
    """Peaks in bytes and their ratio, on batches of one size."""
    model = MODELS[name]
    len(model.records)  # made now, so that they are not counted
    base = peak_bytes(lambda: plain(model))
    own = peak_bytes(lambda: fastdp(model, poisson_sampling=False) if peer == "fastdp" else PEERS[peer](model))
    return {"bytes": own, "plain_bytes": base, "bytes_ratio": own / base}


def race(ours: Trainer, theirs: Trainer, seconds: float) -> dict[str, Any]:
    """Median seconds of interleaved steps on the same batches: at least 5, as many as fit, at most 200."""
    times: tuple[list[float], list[float]] = ([], [])
    warmup, end = 2, float("inf")
    while len(times[0]) < warmup + 5 or (time.perf_counter() < end and len(times[0]) < 200):
        if len(times[0]) == warmup:
            end = time.perf_counter() + seconds
        batch = next(ours.batches)
        for taken, trainer, given in ((times[0], theirs, unwatched(batch)), (times[1], ours, batch)):
            start = time.perf_counter()
            trainer.step(*given)
            taken.append(time.perf_counter() - start)
    base, own = (statistics.median(taken[warmup:]) for taken in times)
    return {"seconds": own, "plain_seconds": base, "ratio": own / base, "rounds": len(times[0]) - warmup}


def measure(name: str, peer: str, seconds: float) -> dict[str, Any]:
    """A peer on a model, or why not."""
    warnings.simplefilter("ignore")
    try:
        found = memory(name, peer)
        for threads in THREADS:
            torch.set_num_threads(threads)
            found[f"threads {threads}"] = race(PEERS[peer](MODELS[name]), plain(MODELS[name]), seconds / len(THREADS))
        return found
    except TooLarge as reason:
        return {"not run": str(reason)}
    except Exception as error:
        return {"not run": type(error).__name__, "error": str(error)}


def measure_all(seconds: float) -> Found:
    from rich.progress import Progress

    found: Found = {name: {} for name in MODELS}
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # until set_num_threads
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler says when it starts and stops
    context = multiprocessing.get_context("spawn")
    with Progress() as bar:
        task = bar.add_task("", total=len(MODELS) * len(PEERS))
        for name, peer in itertools.product(MODELS, PEERS):
            bar.update(task, description=f"{name}: {peer}")
            with ProcessPoolExecutor(1, context) as pool:
                try:
                    entry = pool.submit(measure, name, peer, seconds).result()
                except BrokenProcessPool as error:  # killed, for memory perhaps
                    entry = {"not run": "its process ended", "error": str(error)}
            found[name][peer] = entry
            bar.console.print(f"{name}: {peer}: {cell(entry)}")
            bar.advance(task)
    return found


def machine() -> dict[str, Any]:
    information = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(": ")[2] for line in information.splitlines() if line.startswith("model name")]
    versions = {name: metadata.version(name) for name in ("torch", "opacus")}
    return {"processor": names[0] if names else "", "cores": os.cpu_count(), "isa": _kernels.isa(), **versions}


def print_table(found: Found) -> None:
    """Markdown: time as ratios at 1 / 2 threads, and memory as a ratio."""
    print("| one step, ratio to plain PyTorch: time at 1 / 2 threads, memory |", " | ".join(PEERS), "|")
    print("|---" * (1 + len(PEERS)) + "|")
    for name, by_peer in found.items():
        print(f"| {name}, batch {MODELS[name].batch} |", " | ".join(map(cell, by_peer.values())), "|")
    for name, by_peer in found.items():
        for peer, entry in by_peer.items():
            if "error" in entry:
                print(f"{name}, {peer}: {entry['not run']}: {entry['error']}")


def cell(entry: dict[str, Any]) -> str:
    if "not run" in entry:
        return f"not run: {entry['not run']}"
    time_ratios = " / ".join(shown(entry[f"threads {threads}"]["ratio"]) for threads in THREADS)
    return f"{time_ratios}, {shown(entry['bytes_ratio'])}"


def shown(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


COLORS = dict(zip(PEERS, ("#1f6fb4", "#8fb573", "#e0a458", "#b58db6"), strict=True))


def draw(found: Found, title: str, figure: Path) -> None:
    """Bars of the ratio at 2 threads, from 1; on white, or a dark page would swallow the text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "fastdp", "svg.fonttype": "path"}
    _, axes = plt.subplots(figsize=(8, 9))
    ratios = [ratio for place, by_peer in enumerate(found.values()) for ratio in draw_bars(axes, by_peer, place)]
    axes.set_xscale("log")
    axes.set_xlim(0.9 * min(ratios), 1.4 * max(ratios))
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), [f"{name}\nbatch {MODELS[name].batch}" for name in found])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("time of one training step, as a multiple of plain PyTorch's without privacy (log scale)")
    axes.set_title(title, fontsize=10, pad=28)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(
        [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()],
        COLORS,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(COLORS),
        frameon=False,
    )
    dateless = {"metadata": {"Date": None}} if figure.suffix == ".svg" else {}
    plt.savefig(figure, bbox_inches="tight", facecolor="white", **dateless)


def draw_bars(axes: Any, by_peer: dict[str, dict[str, Any]], place: int) -> list[float]:
    """A model's bars, each with its number; returns these, and 1."""
    height, ratios = 0.8 / len(PEERS), [1.0]
    for number, peer in enumerate(PEERS):
        entry, y = by_peer[peer], place + (number - (len(PEERS) - 1) / 2) * height
        if "not run" in entry:
            axes.text(1.04, y, f"not run: {entry['not run']}", va="center", fontsize=8, color="dimgray")
            continue
        ratio = entry["threads 2"]["ratio"]
        ratios.append(ratio)
        axes.barh(y, ratio - 1.0, height, left=1.0, color=COLORS[peer])
        weight = "bold" if peer == "fastdp" else "normal"
        axes.text(max(ratio, 1.0) * 1.04, y, shown(ratio), va="center", fontsize=8, weight=weight)
    return ratios


def main(results: Path, figure: Path, seconds: float) -> None:
    on = machine()
    found = measure_all(seconds)
    results.write_text(json.dumps({"machine": on, "steps": found}, indent=1) + "\n", encoding="utf-8")
    print_table(found)
    title = f"One step at 2 threads, torch {on['torch']}, {on['processor']} with {on['isa'].upper()}"
    draw(found, title, figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), SECONDS * float((sys.argv[3:] or ["1"])[0]))
