"""P7 and P12: what saved models, copies, forks and prints must not show."""

from __future__ import annotations

import copy
import io
import os
import pickle

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


def test_a_forked_process_cannot_repeat_the_noise(loop) -> None:
    _, _, _, loader = loop
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the parent's OpenMP threads are not there: the child would wait for them
            next(iter(loader))
            os.write(write, b"drew")
        except PrivacyError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"repeat the noise" in os.read(read, 1000)
    os.close(read)
    os.close(write)
