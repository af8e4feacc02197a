"""P7 and P12: what saved models, copies, forks and prints must not show."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from loops import MODELS

from fastdp import PrivacyError


def test_saved_models_hold_parameters_and_nothing_else(loop) -> None:
    _, module, optimizer, loader = loop
    plain_keys = MODELS["mlp"]().state_dict().keys()
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    optimizer.step()
    assert module.state_dict().keys() == plain_keys
    with_engine, without = io.BytesIO(), io.BytesIO()
    torch.save(module.state_dict(), with_engine)
    twin = MODELS["mlp"]()
    twin.load_state_dict(module.state_dict())
    torch.save(twin.state_dict(), without)
    assert len(with_engine.getvalue()) == len(without.getvalue())
    for p in module.parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
        assert p.grad is None


def test_copies_and_pickles_are_plain_modules(loop) -> None:
    _, module, optimizer, loader = loop
    x, y = next(iter(loader))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        loss = F.cross_entropy(twin(x), y)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in twin.parameters())
    F.cross_entropy(module(x), y).backward()
    optimizer.step()


def test_key_is_nowhere_to_be_seen(loop) -> None:
    engine, _, optimizer, loader = loop
    secret = bytes(optimizer._key.tensor().tolist())
    for shown in (repr(engine), repr(optimizer), repr(vars(loader.sampler)), str(vars(engine)), repr(engine.plan)):
        assert str(list(secret))[1:-1] not in shown and secret.hex() not in shown
    assert secret not in pickle.dumps(optimizer.state_dict())
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(PrivacyError, match="not pickled or copied"):
            copied(loader)


FORKED = """
import os, signal, torch
from torch.utils.data import DataLoader, TensorDataset
from fastdp import PrivacyEngine, PrivacyError
module = torch.nn.Linear(6, 3)
_, _, loader = PrivacyEngine(seed=1).make_private(
    module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
    data_loader=DataLoader(TensorDataset(torch.randn(60, 6)), batch_size=12))
child = os.fork()
if child == 0:
    signal.alarm(30)
    try:
        next(iter(loader))
    except PrivacyError as error:
        os.write(1, str(error).encode())
    os._exit(0)
os.waitpid(child, 0)
"""


def test_a_forked_process_cannot_repeat_the_noise() -> None:
    # One thread: a forked child would wait for those of its parent's OpenMP team.
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, env=alone)
    assert "repeat the noise" in done.stdout, done.stderr
