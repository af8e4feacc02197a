"""Trains on the ranks it is started on and prints, as JSON, what must not depend on how many they are.

With an argument: the mode of clipping, secure, or an algorithm of the all-reduce.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdp

torch.set_num_threads(1)
mode = (*sys.argv[1:], "flat")[0]
algorithm = mode if mode in ("ring", "tree", "shared", "mpi") else "auto"
comm = fastdp.comm.init(timeout=30.0, algorithm=algorithm)
how = {"secure_mode": True} if mode == "secure" else {"clipping": mode} if mode != algorithm else {}


def private(module: nn.Module, data: TensorDataset, batch_size: int, **kwargs):
    engine = fastdp.PrivacyEngine(seed=11)
    return engine, *engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9),
        data_loader=DataLoader(data, batch_size=batch_size),
        max_grad_norm=1.0,
        comm=comm,
        **how,
        **kwargs,
    )


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def trained() -> dict[str, object]:
    """Batches, and parameters after 30 steps from another start on each rank; 40 records, so that ranks run empty."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.randint(0, 3, (40,))
    torch.manual_seed(100 + comm.rank)  # rank 0's parameters must win
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    engine, module, optimizer, loader = private(
        module, TensorDataset(x, y, torch.arange(40)), batch_size=4, noise_multiplier=0.5
    )
    batches, empty = [], 0
    for _ in range(3):
        for features, labels, ids in loader:
            optimizer.zero_grad()
            F.cross_entropy(module(features), labels).backward()
            optimizer.step()
            mine = ids.tolist() if loader.rows else []
            empty += not mine
            batches.append(sorted(functools.reduce(operator.iadd, comm.allgather_object(mine), [])))
    digests = comm.allgather_object(digest(*module.parameters()))
    assert len(set(digests)) == 1, "ranks disagree"
    assert len(set(comm.allgather_object(engine.get_epsilon(1e-5)))) == 1
    return {
        "batches": batches,
        "parameters": torch.cat([p.detach().flatten() for p in module.parameters()]).tolist(),
        "epsilon": engine.get_epsilon(1e-5),
        "empty_slices": sum(comm.allgather_object(empty)),
    }


def noise_only() -> dict[str, object]:
    """Updates of a model whose gradients are all zero: the noise, once in total whatever the number of ranks."""
    module = nn.Linear(30, 20)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    data = TensorDataset(torch.zeros(50, 30))
    sigma, batch = 1.5, 10
    _, module, optimizer, loader = private(module, data, batch, noise_multiplier=sigma, loss_reduction="sum")
    optimizer.param_groups[0].update(lr=1.0, momentum=0.0)
    updates = []
    for _ in range(40):
        for (features,) in loader:
            with torch.no_grad():
                for p in module.parameters():
                    p.zero_()
            optimizer.zero_grad()
            (0.0 * module(features)).sum().backward()
            optimizer.step()
            updates.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    u = torch.stack(updates)
    variance = u.double().square().mean().item() / (sigma / batch) ** 2
    return {"noise": digest(u), "variance": variance, "draws": u.numel()}


facts = {**trained(), **noise_only()}
if comm.rank == 0:
    json.dump(facts, sys.stdout)
