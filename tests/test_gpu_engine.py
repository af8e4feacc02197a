"""Training on a GPU, without one: on the emulator each step is the CPU's, and on tensors that hold nothing no step asks
what is in them, as it would by waiting for a GPU, or mixes in any of the CPU's."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import MODELS, data, private
from mpi import launch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fastdp
from fastdp import ArgumentError, cuda, device, gpusum, train
from fastdp.clipping import GradientSum, spans_of
from fastdp.plan import CLIPPINGS
from fastdp.probe import Probe
from fastdp.uses import EmbeddingUse, LinearUse


class Tokens(nn.Module):
    """An embedding with a padding index, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(3, 5, padding_idx=1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x > 0).long() + (x > 1).long()
        return self.out(self.table(ids).mean(1) + self.table(ids[:, :2]).sum(1))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv1d(2, 4, 2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv1d(4, 4, 3, groups=2, dilation=1)
        )
        self.outer = nn.Sequential(nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x.view(-1, 2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **how: Any) -> None:
        super().__init__()
        self.inner, self.outer = kind(2, 4, batch_first=True, **how), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x.view(-1, 3, 2))[0][:, -1, :4])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 2)
        return self.outer(self.inner(x, x, x, need_weights=False)[0].flatten(1))


class Scaled(nn.Module):
    """A module of the user's own, run again record by record."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x * self.scale))


KINDS: dict[str, Callable[[], nn.Module]] = {
    **MODELS,
    "tokens": Tokens,
    "images": Images,
    "lstm": lambda: Recurrent(nn.LSTM, bidirectional=True),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "attention": Attention,
    "scaled": Scaled,
}


LAUNCHES = ("sq_norms", "clip_factors", "sum_rows", "scale_rows", "linear_sq_norms", "embedding_sq_norms")
LAUNCHES += ("gaussian_noise", "noise_step")


def trained(module: nn.Module, optimizer: type[torch.optim.Optimizer], dataset: TensorDataset, **how: Any) -> Any:
    made = optimizer(module.parameters(), lr=0.1)
    _, module, made, loader = private(module, made, dataset, noise_multiplier=0.5, **how)
    for x, y in loader:
        made.zero_grad()
        F.cross_entropy(module(x), y).backward()
        made.step()
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_cpus(kind: str, clipping: str, request: pytest.FixtureRequest) -> None:
    module, dataset = KINDS[kind](), data(36)
    twin = copy.deepcopy(module)
    optimizer = torch.optim.Adam if clipping == "per_layer" else torch.optim.SGD
    how = {"clipping": clipping, "max_physical_batch_size": 7 if clipping == "automatic" else None}
    want = trained(module, optimizer, dataset, **how)
    request.getfixturevalue("on_emulator")
    launched = count_launches(request.getfixturevalue("emulated"), request.getfixturevalue("monkeypatch"))
    got = trained(twin, optimizer, dataset, **how)
    for p, q in zip(got, want, strict=True):
        assert (p - q).abs().max() <= 1e-5 * max(1.0, q.abs().max().item())
    assert launched["noise_step"] == 3 and launched["clip_factors"] >= 3


def count_launches(module: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    launched: dict[str, int] = {}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            launched[name] = launched.get(name, 0) + 1
            return getattr(module, name)(*args)

        return call

    made = SimpleNamespace(Element=module.Element, Place=module.Place, **{name: counted(name) for name in LAUNCHES})
    monkeypatch.setattr(cuda, "kernels", lambda: made)
    return launched


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"scaled", "attention"}))
def test_a_step_neither_waits_for_the_gpu_nor_mixes_in_tensors_of_the_cpu(
    kind: str, clipping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for steps that are probed, and modules that are run again, whose outputs are compared."""
    launched: list[str] = []
    kernels = SimpleNamespace(Element=int, Place=lambda *_: None)
    for name in LAUNCHES:
        setattr(kernels, name, lambda *_, name=name: launched.append(name))
    monkeypatch.setattr(cuda, "kernels", lambda: kernels)
    monkeypatch.setattr(cuda, "DEVICE", "meta")
    monkeypatch.setattr(Probe, "watch", lambda self, batch, rows: batch)
    monkeypatch.setattr(Probe, "check_step", lambda self: None)
    module = KINDS[kind]().to("meta")
    how = {"clipping": clipping, "noise_multiplier": 0.5, "max_physical_batch_size": 7}
    _, module, optimizer, loader = private(module, torch.optim.Adam(module.parameters()), data(), **how)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(module(x.to("meta")), y.to("meta")).backward()
        optimizer.step()
    assert launched.count("noise_step") == 5
    with pytest.raises(RuntimeError, match="meta"):  # it would be seen
        optimizer.gradient.flat.sum().item()
    with pytest.raises(RuntimeError, match="meta"):
        _ = optimizer.gradient.flat + torch.ones(1)


@pytest.mark.usefixtures("on_emulator")
def test_what_a_gpu_does_not_do_is_refused() -> None:
    module = nn.Linear(6, 3)
    with pytest.raises(ArgumentError, match="secure_mode=True: must be False on a GPU"):
        private(module, torch.optim.SGD(module.parameters(), lr=0.1), data(), secure_mode=True)
    module = module.double()
    with pytest.raises(
        ArgumentError, match="must be all float64, or float32 and bfloat16, on cpu; or these on one GPU"
    ):
        private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())


def test_ranks_sum_by_way_of_the_cpu_or_by_torch_distributed(emulated: ModuleType) -> None:
    assert launch.run("gpus.py", str(emulated.__file__), ranks=2).count("done: rank") == 2


def test_a_rank_that_cannot_lock_its_memory_tells_the_others(emulated: ModuleType) -> None:
    assert launch.start("gpus.py", str(emulated.__file__), "lock", ranks=2).stdout.count("refused: rank") == 2


def small_table() -> tuple[TensorDataset, TensorDataset]:
    training, evaluation = data(200), data(50)
    training.classes = ["a", "b", "c"]  # type: ignore[attr-defined]
    return training, evaluation


OPTIONS = ["--data", f"{__name__}:small_table", "--batch-size", "20", "--epochs", "1", "--noise-multiplier", "1"]
OPTIONS += ["--delta", "1e-3", "--seed", "1", "--device", "cuda"]


def status(arguments: list[str]) -> int:
    try:
        return train.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


def test_the_trainer_on_a_gpu_trains_the_cpus_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    torch.manual_seed(0)
    assert status([*OPTIONS[:-2], "--output", str(tmp_path / "cpu")]) == 0
    request.getfixturevalue("on_emulator")
    asked: list[str] = []
    monkeypatch.setattr(device, "of_rank", lambda name, comm: asked.append(name) or torch.device("cpu"))
    torch.manual_seed(0)
    assert status([*OPTIONS, "--output", str(tmp_path / "gpu")]) == 0
    models = [torch.load(tmp_path / where / "model.pt", weights_only=True) for where in ("cpu", "gpu")]
    for a, b in zip(*(m.values() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert asked == ["cuda"]
    assert json.loads((tmp_path / "gpu" / "report.json").read_text())["device"] == "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_trainer_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "fastdp._cuda", None)
    arguments = ["--device", "cuda", "--output", str(tmp_path / "run")]
    assert status(arguments) == 2
    assert "error: device='cuda': must be cpu: this build has no CUDA kernels" in capsys.readouterr().err
    monkeypatch.setattr(cuda, "kernels", lambda: None)
    assert status(arguments) == 2
    assert re.search(r"error: device='cuda': must be cpu: torch \S+ sees no GPU", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    assert status(["--all-reduce", "nccl"]) == 2
    assert "error: all_reduce='nccl': must be another without device cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "uuids", "numbers"),
    [(2, "ab", [0, 1]), (1, "ab", [0, 0]), (1, "aa", None), (3, "abc", [0, 1]), (1, "a on two hosts", [0, 0])],
)
def test_each_rank_of_a_host_has_a_gpu_of_its_own(
    gpus: int, uuids: str, numbers: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks that see so many; as launchers do, perhaps each its own one only."""
    monkeypatch.setattr(cuda, "kernels", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    seen = uuids if " " not in uuids else "aa"
    hosts = [0, 0] if " " not in uuids else [0, 1]
    made: list[torch.device | str] = []
    for rank in range(2):
        mine = lambda number, rank=rank: SimpleNamespace(uuid=seen[number if gpus > 1 else rank])  # noqa: E731
        chosen: list[int] = []
        monkeypatch.setattr(torch.cuda, "get_device_properties", mine)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        host = SimpleNamespace(rank=rank, local_rank=rank, host=hosts, allgather_object=lambda _: list(seen[:2]))
        try:
            made.append(device.of_rank("cuda", host))
            assert chosen == [made[-1].index]
        except ArgumentError as error:
            made.append(str(error))
    if numbers is None:
        assert made == ["device='cuda': must be cpu, or one GPU for each rank: ranks [0, 1] have the same"] * 2
    else:
        assert made == [torch.device("cuda", number) for number in numbers]


def test_a_rank_without_a_gpu_tells_the_others_before_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    host = SimpleNamespace(
        rank=0, local_rank=0, host=[0, 0], allgather_object=lambda mine: told.append(mine) or ["", "b"]
    )
    monkeypatch.setattr(cuda, "kernels", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="sees no GPU"):
        device.of_rank("cuda", host)
    assert told == [""]


class Tied(nn.Module):
    """An embedding's table is also a linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(3, 4), nn.Linear(4, 3)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table((x > 0).int()).sum(1))


HARD: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "tied": (Tied, {}),
    "unfused": (MODELS["mlp"], {"optimizer": torch.optim.RMSprop}),
    "bfloat16": (lambda: MODELS["mlp"]().bfloat16(), {"dtype": torch.bfloat16}),
    "one record": (Tokens, {"batch_size": 1}),
    "norms": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 3)), nn.GroupNorm(1, 2, eps=0.7), nn.RMSNorm(3, eps=0.5), nn.LayerNorm(3, eps=0.6),
            nn.Flatten(), nn.Linear(6, 3),
        ),
        {},
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, (2, 1), stride=(1, 2), padding=(2, 0)), nn.Tanh(),
            nn.Conv2d(4, 6, 2, groups=2, dilation=(2, 1), padding=1, padding_mode="circular"), nn.Flatten(1),
            nn.Unflatten(1, (6, -1, 1, 1)), nn.Conv3d(6, 3, (3, 1, 1), stride=2), nn.Flatten(2),
            nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        ),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_hostile_records_and_other_modules_are_the_cpus(
    name: str, clipping: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if clipping == "flat":
        monkeypatch.setattr(cuda, "WINDOWS_AT_ONCE", 100)  # convolutions take a few records at a time
    make, how = HARD[name]
    module, dtype, how = make(), how.get("dtype", torch.float32), dict(how)
    dataset = data(36, dtype=how.pop("dtype", torch.float32))
    if name not in ("tied", "one record"):
        dataset.tensors[0][5], dataset.tensors[0][11, 2] = torch.nan, torch.inf
        dataset.tensors[0][20] *= 1e18
    twin, optimizer = copy.deepcopy(module), how.pop("optimizer", torch.optim.SGD)
    want = trained(module, optimizer, dataset, clipping=clipping, **how)
    request.getfixturevalue("on_emulator")
    got = trained(twin, optimizer, dataset, clipping=clipping, **how)
    for p, q in zip(got, want, strict=True):
        assert q.isfinite().all() and p.dtype == dtype
        limit = 1e-5 if dtype == torch.float32 else 2**-7
        assert (p - q).abs().max() <= limit * max(1.0, q.abs().max().item())


@pytest.mark.usefixtures("on_emulator")
@pytest.mark.parametrize("b", [(1e30, -1e30, 0.0), (3e37, -1.5e37, -1.5e37), (1e15, -1e15 * (1 - 2.0**-20), 0.0)])
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_uses_of_a_row_that_cancel_are_added_up_before_they_are_scaled(b: tuple[float, ...], scale: float) -> None:
    """Else the factor of what is left would be that of terms which are far larger, and destroy others' sums."""
    table = nn.Embedding(4, 1)
    span = spans_of(table, torch.optim.SGD(table.parameters(), lr=0.1))
    ids = torch.tensor([[0, 1, 2]] * 100 + [[0, 0, 0]])
    gradients = torch.cat([torch.tensor([[1.0, 0.0, 0.0]]).expand(100, 3), torch.tensor([b])])[..., None]

    def total(records: slice) -> Tensor:
        sums = GradientSum(span, 1.0)
        use = EmbeddingUse("table", 0, [], table, ids[records])
        use.b = gradients[records].contiguous()
        sums.fill([use], len(use.a), len(use.a), scale, False)
        return sums.flat[:4].clone()

    moved = (total(slice(0, 101)) - total(slice(0, 100))).norm()
    assert moved <= 1.0 + 1e-5 * 100  # beside the rounding of the others' sum


@pytest.mark.usefixtures("on_emulator")
def test_positions_that_cancel_leave_no_more_than_c() -> None:
    """Their norm is what rounding leaves, for which the bounds of `linear_sq_norms` leave room."""
    layer = nn.Linear(12, 12, bias=False)
    span = spans_of(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    for seed in range(40):
        a, b = torch.randn(1, 4, 12), torch.randn(1, 4, 12) * 10 ** (seed % 12)
        a[:, 1::2], b[:, 1::2] = a[:, ::2], -b[:, ::2]
        b[:, 1] *= 1 - 2.0 ** -(seed % 30)
        use = LinearUse("layer", 0, [], layer, a)
        use.b = b
        sums = GradientSum(span, 1.0)
        sums.fill([use], 1, 1, 1.0, False)
        assert sums.flat.double().norm() <= 1.0


def test_steps_and_pieces_come_one_after_the_other_on_any_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    followed: list[Any] = []
    monkeypatch.setattr("fastdp.optimizer.done_so_far", lambda x: done.append(x.data_ptr()) or len(done))
    monkeypatch.setattr("fastdp.optimizer.follow", lambda before, x: followed.append(before))
    module = nn.Linear(6, 3)
    made = torch.optim.SGD(module.parameters(), lr=0.1)
    _, module, optimizer, loader = private(module, made, data(), max_physical_batch_size=7)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    assert len(followed) > 5 and followed == [None, *range(1, len(followed))]
    assert set(done) == {optimizer.gradient.flat.data_ptr()}


def test_copies_wait_for_the_gpu_and_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GpuCopies asks of torch.cuda, in order: "x<y" is stream x waiting for y."""
    asked: list[str] = []
    current = ["main"]

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.name = ("down", "up")[len([a for a in asked if a == "made"])] if device is not None else "main"
            asked.append("made")

        def wait_stream(self, other: Stream) -> None:
            asked.append(f"{self.name}<{other.name}")

        def record_event(self) -> Any:
            return SimpleNamespace(synchronize=lambda: asked.append(f"host<{self.name}"))

    class On:
        def __init__(self, stream: Stream) -> None:
            self.name = stream.name

        def __enter__(self) -> None:
            current.append(self.name)

        def __exit__(self, *_: object) -> None:
            current.pop()

    class Memory:
        def copy_(self, source: Any, non_blocking: bool) -> None:
            assert non_blocking
            asked.append(f"copy on {current[-1]}")

    main, device, memory = Stream(), torch.device("cuda", 0), Memory()
    asked.clear()
    runtime = SimpleNamespace(
        cudaHostRegister=lambda *what: asked.append(f"lock {what[1:]}") or 0,
        cudaHostUnregister=lambda address: asked.append("unlock"),
    )
    fakes = {"Stream": Stream, "stream": On, "current_stream": lambda _: main, "cudart": lambda: runtime}
    for name, fake in {**fakes, "device": lambda _: contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    copies = gpusum.GpuCopies(device)
    asked.clear()
    host = torch.zeros(4)
    copies.lock(host)
    del host
    assert asked == ["lock (16, 1)", "unlock"]
    asked.clear()
    copies.begin()
    copies.wait(copies.down(memory, memory))  # type: ignore[arg-type]
    copies.up(memory, memory)  # type: ignore[arg-type]
    copies.end()
    assert asked == ["down<main", "down<up", "copy on down", "host<down", "copy on up", "main<up"]
    monkeypatch.setattr(runtime, "cudaHostRegister", lambda *_: 2)
    with pytest.raises(fastdp.CommError, match="16 bytes of memory cannot be locked"):
        copies.lock(torch.zeros(4))


@pytest.mark.usefixtures("on_emulator")
def test_noise_and_batches_are_refused_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(x: Tensor) -> None:
        raise fastdp.PrivacyError("captured")

    monkeypatch.setattr(cuda, "_refuse_capture", refuse)
    key, x = torch.zeros(32, dtype=torch.uint8), torch.zeros(4)
    for call in (
        lambda: cuda.add_noise(x, 1.0, key, 0, 0),
        lambda: cuda.noise_step(None, [], x, key, 0),  # type: ignore[arg-type]
        lambda: cuda.poisson_sample(9, 0.5, key, 0, torch.device("cpu")),
    ):
        with pytest.raises(fastdp.PrivacyError, match="captured"):
            call()


class Own(nn.Module):
    """No layer of torch's: what the backward brings is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 3), Own])
def test_a_step_on_another_stream_than_its_backward_is_refused(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make()
    _, module, optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
    monkeypatch.setattr("fastdp.layers.stream_of", lambda _: 7)
    monkeypatch.setattr("fastdp.optimizer.stream_of", lambda _: 8)
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(fastdp.PrivacyError, match="on another CUDA stream than backward"):
        optimizer.step()
