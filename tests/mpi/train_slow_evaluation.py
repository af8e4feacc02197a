"""A training run whose evaluation takes longer than a rank's patience."""

from __future__ import annotations

import sys
import time

from fastdp import metrics, train

evaluate = metrics.evaluate


def slow(*args):
    time.sleep(6.0)
    return evaluate(*args)


metrics.evaluate = slow
sys.exit(train.main(["--epochs", "2", "--timeout", "4", "--output", sys.argv[1]]))
