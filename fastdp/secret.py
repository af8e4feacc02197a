"""The key of a run: 256 bits from the operating system that privacy rests on."""

from __future__ import annotations

import os
from typing import NoReturn

import torch
from torch import Tensor

from fastdp.errors import PrivacyError


class SecretKey:
    """Neither printed, pickled nor copied, and useless in a forked child, which would repeat its parent's noise."""

    def __init__(self, secret: bytes) -> None:
        self._tensor = torch.frombuffer(bytearray(secret), dtype=torch.uint8)
        self._process = os.getpid()

    def tensor(self) -> Tensor:
        """uint8[32]."""
        if os.getpid() != self._process:
            raise PrivacyError("a forked process would repeat the noise of its parent: call make_private in it instead")
        return self._tensor

    def __repr__(self) -> str:
        return "SecretKey(...)"

    def __reduce__(self) -> NoReturn:
        raise PrivacyError(
            "a run's key is not pickled or copied: save the model's and the optimizer's state_dict instead"
        )
