"""A small CNN on MNIST with DP-SGD: `mpirun -n 2 python -m fastdp.examples.mnist --data FOLDER`, or without mpirun.

FOLDER holds MNIST's four files as they are published, gzipped (train-images-idx3-ubyte.gz and so on). The defaults are
the first recipe of Opacus's MNIST example; model and loop are what one would write for Opacus, but for the average of
the parameters, which is what is tested and saved.
"""

from __future__ import annotations

import gzip
import math
import sys
import zlib
from pathlib import Path
from typing import Annotated

import cyclopts
import numpy as np
import torch
import torch.nn.functional as F
from cyclopts import Parameter
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import fastdp
from fastdp.errors import ArgumentError, require

# Of the pixels of MNIST's training images in [0, 1]: published, and counted as public.
MEAN, STD = 0.1307, 0.3081

IMAGES, LABELS = 0x803, 0x801  # unsigned bytes, in 3 dimensions and in 1


def read_idx(path: Path, magic: int) -> Tensor:
    """A gzipped IDX file of bytes -> uint8, in the shape that its header declares.

    The header is big-endian int32: magic, whose last byte counts the dimensions, then the size of each.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArgumentError("data", str(path), f"a gzipped file of MNIST ({reason})") from error
    start = 4 + 4 * (magic & 0xFF)
    found = int.from_bytes(content[:4], "big")
    bound = f"an IDX file of magic {magic} with a header of {start} bytes, not magic {found} and {len(content)} bytes"
    require(len(content) >= start and found == magic, "data", str(path), bound)
    shape = [int(size) for size in np.frombuffer(content[4:start], ">i4")]
    size = len(content) - start
    bound = f"as long as its header says: shape {shape}, but {size} bytes follow"
    require(min(shape) >= 0 and math.prod(shape) == size, "data", str(path), bound)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def read_split(folder: Path, name: str) -> TensorDataset:
    """Images float32 [n, 1, 28, 28], normalised, and labels int64 [n] of one of the two splits: "train" or "t10k"."""
    images = read_idx(folder / f"{name}-images-idx3-ubyte.gz", IMAGES)
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz", LABELS)
    where = f"{folder}/{name}-*"
    require(images.shape[1:] == (28, 28), where, tuple(images.shape), "images of 28 by 28 pixels")
    require(len(images) == len(labels), where, f"{len(images)} images, {len(labels)} labels", "as many of each")
    require(len(labels) > 0 and int(labels.max()) <= 9, where, labels.unique().tolist(), "digits, labelled 0 to 9")
    return TensorDataset((images.unsqueeze(1) / 255 - MEAN) / STD, labels.long())


def read_mnist(folder: Path, comm: fastdp.comm.Communicator, limit: int | None) -> tuple[TensorDataset, TensorDataset]:
    """The first `limit` training images, and the test images; where one rank cannot read them, all end."""
    splits, problem = [], ""
    try:
        require(limit is None or limit >= 1, "limit", limit, ">= 1")
        splits = [read_split(folder, "train"), read_split(folder, "t10k")]
    except ArgumentError as error:
        problem = str(error)
    problems = [p for p in comm.allgather_object(problem) if p]
    if problems:
        sys.exit(f"fastdp.examples.mnist: error: {problems[0]}" if comm.rank == 0 else 1)
    train, test = splits
    return TensorDataset(*train[:limit]), test


def build_model() -> nn.Module:
    """The CNN of TF-Privacy's and Opacus's MNIST examples: 26,010 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3),  # [B, 16, 14, 14]
        nn.ReLU(),
        nn.MaxPool2d(2, stride=1),  # [B, 16, 13, 13]
        nn.Conv2d(16, 32, 4, stride=2),  # [B, 32, 5, 5]
        nn.ReLU(),
        nn.MaxPool2d(2, stride=1),  # [B, 32, 4, 4]
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset, comm: fastdp.comm.Communicator) -> float:
    """Share of `data` whose digit is found, each rank counting on its share."""
    images, labels = (t[comm.rank :: comm.size] for t in data.tensors)
    right = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(1000), labels.split(1000), strict=True)]
    return int(comm.all_reduce(torch.tensor(int(sum(right))))) / len(data)


app = cyclopts.App(name="fastdp.examples.mnist")


@app.default
def main(
    *,
    data: Annotated[Path, Parameter(help="Folder of MNIST's four gzipped IDX files.")],
    epochs: Annotated[int, Parameter(help="Expected passes over the training images.")] = 15,
    batch_size: Annotated[int, Parameter(help="Expected images per step, over all ranks.")] = 240,
    lr: Annotated[float, Parameter(help="Learning rate of SGD.")] = 0.25,
    noise_multiplier: Annotated[float, Parameter(help="Noise standard deviation over max_grad_norm.")] = 1.3,
    max_grad_norm: Annotated[float, Parameter(help="Bound on each image's gradient norm.")] = 1.5,
    delta: Annotated[float, Parameter(help="Probability with which the guarantee may fail.")] = 1e-5,
    limit: Annotated[int | None, Parameter(help="Train on the first so many images only.")] = None,
    save: Annotated[Path | None, Parameter(help="File for the model's parameters.")] = None,
    seed: Annotated[int | None, Parameter(help="For tests: reproducible and therefore NOT private.")] = None,
) -> None:
    """Train a small CNN on MNIST with differential privacy."""
    comm = fastdp.comm.init()
    train, test = read_mnist(data, comm, limit)
    if seed is None:
        torch.seed()  # or every run would start from the same parameters: torch's own seed is a constant
    else:
        torch.manual_seed(seed)
    net = build_model()

    engine = fastdp.PrivacyEngine(seed=seed)
    model, optimizer, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=lr),
        data_loader=DataLoader(train, batch_size=batch_size),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        comm=comm,
    )
    # Of what each step releases, so it costs no epsilon; it evens out the noise of about the last hundred.
    average = AveragedModel(
        model, avg_fn=lambda mean, new, steps: mean + (new - mean) * max(0.01, 1 / (int(steps) + 1))
    )
    for epoch in range(1, epochs + 1):
        for images, labels in loader:  # this rank's share of a Poisson sample
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            average.update_parameters(model)
        found = accuracy(average.module, test, comm)
        epsilon = math.ceil(1e4 * engine.get_epsilon(delta)) / 1e4  # an upper bound, so it is rounded up
        if comm.rank == 0:
            print(f"epoch {epoch}: test accuracy {found:.4f}, epsilon {epsilon:.4f}", flush=True)
    if comm.rank == 0:
        print(
            f"delta {delta:g}; accuracy is of the averaged parameters on the test images, and not covered by epsilon",
            *engine.assumptions(),
            sep="\n",
        )
        if save is not None:
            torch.save(average.module.state_dict(), save)


if __name__ == "__main__":
    app()
