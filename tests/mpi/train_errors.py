"""Runs the trainer's main with each of many bad arguments in one process; rank 0 prints [arguments, status, stderr]."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path

import torch

import fastdp
from fastdp import data, train
from fastdp import run as run_module

cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
comm = fastdp.comm.init(timeout=30.0)
results = []


def run(arguments: list[str]) -> None:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = train.main(arguments)
        except SystemExit as end:
            status = end.code
    texts = comm.allgather_object((status, err.getvalue()))
    results.append([arguments, [s for s, _ in texts], "".join(t for _, t in texts)])


for case in cases:
    run(case)

whole = data.load("adult")
features = whole.train_features.clone()
features[7, 3] = float("nan")
data.load = lambda *args: dataclasses.replace(whole, train_features=features)
run(["--output", str(folder / "nan")])

data.load = lambda *args: whole
run_module.build_model = lambda *args: torch.nn.Sequential(torch.nn.BatchNorm1d(166), torch.nn.Linear(166, 1))
run(["--output", str(folder / "batchnorm")])

if comm.size > 1:
    labels = whole.train_labels.clone()
    labels[5] = 1 - labels[5] if comm.rank == 1 else labels[5]
    data.load = lambda *args: dataclasses.replace(whole, train_labels=labels)
    run(["--output", str(folder / "mixture")])

if comm.rank == 0:
    json.dump(results, sys.stdout)
