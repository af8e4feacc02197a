"""A run with a key from the operating system: ranks must draw one batch among them, and make the same noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdp

comm = fastdp.comm.init(timeout=30.0)
torch.set_num_threads(1)
torch.manual_seed(7)
data = TensorDataset(torch.randn(200, 5), torch.randint(0, 3, (200,)), torch.arange(200))
torch.manual_seed(comm.rank)
module = nn.Linear(5, 3)
module, optimizer, loader = fastdp.PrivacyEngine().make_private(
    module=module,
    optimizer=torch.optim.SGD(module.parameters(), lr=0.5),
    data_loader=DataLoader(data, batch_size=100),
    noise_multiplier=1.0,
    max_grad_norm=1.0,
    comm=comm,
)
for x, y, ids in loader:
    optimizer.zero_grad()
    F.cross_entropy(module(x), y).backward()
    optimizer.step()
    key = optimizer._key.tensor().tolist()  # of one run of a test: what draws one batch may be luck
    assert all(other == key for other in comm.allgather_object(key)), "ranks have keys of their own"
    drawn = [i for of in comm.allgather_object(ids.tolist()) for i in of]
    assert len(drawn) == len(set(drawn)) > 50, "ranks draw the same records"
    parameters = comm.allgather_object([p.tolist() for p in module.parameters()])
    assert all(p == parameters[0] for p in parameters), "ranks disagree"
print(f"equal: rank {comm.rank}", flush=True)
