"""One epoch on Adult, loading of batches included, against plain PyTorch's shuffled epoch of the same size."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fastdp import PrivacyEngine, data
from fastdp.models import build_model
from fastdp.options import Options
from fastdp.train import loss_of


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def bench_epoch_of_adult_against_torch(pair, benchmark, threads: int) -> None:
    table, options = data.load("adult"), Options()
    records = TensorDataset(table.train_features, table.train_labels)
    n, width = table.train_features.shape

    def made() -> tuple[torch.nn.Module, torch.optim.SGD]:
        module = build_model(options.model, (width,), table.outputs)
        return module, torch.optim.SGD(module.parameters(), lr=options.learning_rate, momentum=options.momentum)

    plain, plain_optimizer = made()
    private, optimizer = made()
    private, optimizer, loader = PrivacyEngine().make_private(
        module=private,
        optimizer=optimizer,
        data_loader=DataLoader(records, batch_size=options.batch_size),
        noise_multiplier=1.0,
        max_grad_norm=options.max_grad_norm,
    )

    def plain_epoch() -> None:
        order = torch.randperm(n)
        for ids in order.split(options.batch_size):
            plain_optimizer.zero_grad()
            loss_of(plain(table.train_features[ids]), table.train_labels[ids]).backward()
            plain_optimizer.step()

    def private_epoch() -> None:
        for features, labels in loader:
            optimizer.zero_grad()
            loss_of(private(features), labels).backward()
            optimizer.step()

    pair(plain_epoch, private_epoch, tuple, rounds=5)
    benchmark.extra_info["records_per_s"] = n / benchmark.stats.stats.median
