"""Ranks with a GPU each, which is the emulator: gpus.py ITS_MODULE [lock]. Sums go by way of the CPU's memory, with
copies that a stand-in makes as late as it may, or by torch.distributed, with gloo in NCCL's place."""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastdp
from fastdp import ArgumentError, CommError, cuda, gpusum


class LateCopies:
    """What has not been waited for holds NaN."""

    def __init__(self, device: torch.device) -> None:
        self.downs: list[tuple[Tensor, Tensor]] = []
        self.ups: list[tuple[Tensor, Tensor]] = []
        self.begun = self.locked = 0

    def lock(self, host: Tensor) -> None:
        self.locked += host.nbytes

    def begin(self) -> None:
        assert not self.downs and not self.ups, "begin() in the midst"
        self.begun += 1

    def down(self, source: Tensor, host: Tensor) -> int:
        assert host.nbytes <= gpusum.SEGMENT_BYTES
        host.fill_(float("nan"))
        self.downs.append((source, host))
        return len(self.downs)

    def wait(self, copied: int) -> None:
        for source, host in self.downs[:copied]:
            if source.numel():
                host.copy_(source)
                source.fill_(float("nan"))  # it may be written to now
        self.downs[:copied] = [(x[:0], y[:0]) for x, y in self.downs[:copied]]

    def up(self, host: Tensor, to: Tensor) -> None:
        self.ups.append((host, to))

    def end(self) -> None:
        assert all(x.numel() == 0 for x, _ in self.downs), "a copy down was not waited for"
        for host, to in self.ups:
            to.copy_(host)
        self.downs.clear()
        self.ups.clear()


def trained(c: fastdp.comm.Communicator) -> list[Tensor]:
    torch.manual_seed(5 + c.rank)  # all take rank 0's model
    module = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3))
    torch.manual_seed(5)
    data = TensorDataset(torch.randint(0, 9, (60, 3)), torch.randint(0, 3, (60,)))
    module, optimizer, loader = fastdp.PrivacyEngine(seed=3).make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9),
        data_loader=DataLoader(data, batch_size=12),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        comm=c,
    )
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    c.barrier()
    return [p.detach().clone() for p in module.parameters()]


def check_equal(c: fastdp.comm.Communicator, got: list[Tensor], want: list[Tensor]) -> None:
    for p, q in zip(got, want, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    bits = b"".join(p.numpy().tobytes() for p in got)
    assert len(set(c.allgather_object(bits))) == 1, "ranks disagree"


c = fastdp.comm.init(timeout=30)
want = trained(c)
with pytest.raises(ArgumentError, match=r"comm.algorithm='nccl': must be another for a model on the CPU"):
    trained(fastdp.comm.init(timeout=30, algorithm="nccl"))

spec = importlib.util.spec_from_file_location("fastdp._cuda", sys.argv[1])
assert spec and spec.loader
emulated = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emulated)
cuda.kernels = lambda: emulated  # type: ignore[assignment]
cuda.DEVICE = "cpu"
torch.Tensor.cpu = lambda x: x.detach().clone()  # type: ignore[method-assign]  # other memory, as a GPU's is


def cannot(host: Tensor) -> None:
    raise CommError("cannot be locked")


if sys.argv[2:] == ["lock"]:
    gpusum.GpuCopies = lambda device: SimpleNamespace(lock=cannot) if c.rank == 1 else LateCopies(device)  # type: ignore[assignment,misc]
    with pytest.raises(CommError, match="cannot be locked"):  # on rank 0 in the first step, by rank 1's words
        trained(fastdp.comm.init(timeout=30))
    print(f"refused: rank {c.rank}", flush=True)
    sys.exit(0)

made: list[LateCopies] = []
gpusum.GpuCopies = lambda device: made.append(LateCopies(device)) or made[-1]  # type: ignore[assignment,misc,func-returns-value]
for segment_bytes in (1 << 20, 64):
    gpusum.SEGMENT_BYTES = segment_bytes
    check_equal(c, trained(fastdp.comm.init(timeout=30)), want)
    assert made[-1].begun == 5 and made[-1].locked > 500
check_equal(c, trained(fastdp.comm.init(timeout=30, shared_memory=False, algorithm="ring")), want)

gpusum.Nccl = functools.partial(gpusum.Nccl, backend="gloo")  # type: ignore[assignment,misc]
for _ in range(2):  # the second beside the group that is there
    check_equal(c, trained(fastdp.comm.init(timeout=30, algorithm="nccl")), want)
assert len(made) == 3 and dist.is_initialized()


def disagree(*_: Any) -> int:
    return 7


dist.get_world_size = disagree  # type: ignore[assignment]
with pytest.raises(CommError, match=rf"this is rank {c.rank} of 7, not rank {c.rank} of {c.size} as in comm"):
    trained(fastdp.comm.init(timeout=30, algorithm="nccl"))
print(f"done: rank {c.rank}", flush=True)
