"""`python -m fastdp.train`, slowed down, with a diary of every step that was about to be released.

Arguments: the folder of the diary, then those of the trainer.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path

from fastdp import train
from fastdp.optimizer import PrivateOptimizer

diary = Path(sys.argv[1])
release = PrivateOptimizer._step
file = os.open(diary / f"steps.{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def observed(self: PrivateOptimizer, step: int) -> None:
    key = hashlib.sha256(bytes(self._key.tensor().tolist())).hexdigest()
    os.write(file, f"{self.steps} {key}\n".encode())
    time.sleep(0.02)
    release(self, step)


PrivateOptimizer._step = observed  # type: ignore[method-assign]
sys.exit(train.main(sys.argv[2:]))
