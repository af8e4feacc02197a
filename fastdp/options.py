"""What can be chosen for a run, on the command line or in a TOML file, and what a resumed run takes from its folder.

Everything on the command line can stand in a TOML file too (--config FILE, keys as the options without dashes:
`batch_size = 1024`). The command line wins; where a run is resumed, its own options stand for what is not given.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import cyclopts
from cyclopts import Parameter

import fastdp
from fastdp import folder
from fastdp.errors import ArgumentError, require
from fastdp.plan import Clipping

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]


def _whole(type_: Any, tokens: Sequence[cyclopts.Token]) -> int:
    """An integer as it stands: 1.5 epochs are not rounded to 2."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not an integer") from None


Whole = Annotated[int, Parameter(converter=_whole)]


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be chosen. The defaults were tuned on a split of Adult's training rows, not on its test rows."""

    data: str = "adult"
    """Table to train on: adult (UCI Adult, which ships with the package); a CSV, Parquet or Arrow file, or a folder of
    such, with --schema; a folder that spark_jobs/prepare.py wrote; or module:attribute, a fastdp.data.Table or a pair
    (training, evaluation) of datasets."""
    schema: Path | None = None
    "TOML file that declares the columns of a table in files: types, public bounds, vocabularies, label or target."
    evaluation_data: Path | None = None
    "File or folder of evaluation rows. Without it, rows of the table are held out, and epsilon does not protect them."
    evaluation_fraction: float | None = None
    "Share of rows held out where there is no --evaluation-data; 0.2 if not given. Row numbers decide which."
    verify: bool = False
    "Compare the files of a prepared folder with the checksums in its manifest; all of it is read."
    model: str = "mlp:32"
    """mlp:H1,H2,... (hidden layers), logistic, or module:attribute, an nn.Module or a callable(inputs, outputs), with
    the sizes of the vocabularies after them if a prepared table has codes, that returns one."""
    target_epsilon: float | None = None
    "Privacy budget; the noise is calibrated to it. 1.0 if no noise multiplier is given."
    delta: float | None = None
    """Probability with which the guarantee may fail. If not given, 1e-5; with 100,000 training records or more, the
    power of ten below 1/n."""
    noise_multiplier: float | None = None
    "Noise standard deviation over max_grad_norm, instead of a target epsilon."
    epochs: Whole = 20
    "Expected passes over the training table."
    batch_size: Whole = 1024
    "Expected records per step, over all ranks."
    max_physical_batch_size: Annotated[int | None, Parameter(converter=_whole)] = None
    "Records that a rank runs at once; a larger batch comes in pieces. The result is the same."
    max_grad_norm: float = 4.0
    "Bound on each record's gradient norm."
    clipping: Clipping = "flat"
    """How it is kept: flat, one norm of all layers; per_layer, the same share of the bound for each; automatic, all
    gradients are brought near the bound, short ones too."""
    secure_mode: bool = False
    "Harden the noise against floating-point attacks; no guarantee is claimed for it, and a step takes longer."
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    "torch's, with its defaults."
    lr: float | None = None
    "Learning rate at the start; 1.5 for sgd and 0.01 for the others if not given."
    lr_schedule: Literal["linear", "constant"] = "linear"
    "Linear falls to zero over the run."
    momentum: float = 0.0
    "Momentum of SGD."
    accountant: Literal["pld", "rdp"] = "pld"
    "How epsilon is computed; both are upper bounds, pld is tighter."
    shuffle: bool = False
    "Shuffled batches instead of Poisson samples: no amplification by sampling is claimed."
    device: Literal["cpu", "cuda"] = "cpu"
    "cuda: each rank has a GPU of its host. In a build with CUDA kernels, which no GPU has run yet."
    all_reduce: Literal["auto", "ring", "tree", "shared", "hierarchical", "mpi", "nccl"] = "auto"
    "Algorithm that sums gradients over ranks; nccl is for GPUs, whose sums go by way of the CPU's memory otherwise."
    timeout: float = 60.0
    "Seconds that a rank waits for the others before it gives up with an error."
    seed: Annotated[int | None, Parameter(converter=_whole)] = None
    "For tests: reproducible and therefore NOT private."
    output: Path | None = None
    "Folder for the model, the report, the ledger and checkpoints; runs/DATA-TIME if not given."
    profile: bool = False
    "Time the phases of a step on each rank. PRIVATE diagnostics, in OUTPUT/private; ranks wait for each other for it."
    tensorboard: bool = False
    "Write what is in metrics.jsonl for TensorBoard too, to OUTPUT/tensorboard."
    resume: str | None = None
    """Folder of a run to go on with, or auto: the newest one in runs/ (or --output) that was not finished, a new run if
    there is none. Steps after its last checkpoint are spent, and not done again."""
    checkpoint_every: float = 60.0
    "Seconds between checkpoints, which a run can be resumed from; SIGINT and SIGTERM leave one too."
    config: Path | None = None
    "TOML file of options, `batch_size = 1024`; the command line wins."

    @property
    def learning_rate(self) -> float:
        """The one given, or the optimizer's own default."""
        return (1.5 if self.optimizer == "sgd" else 0.01) if self.lr is None else self.lr

    @property
    def chosen_delta(self) -> float:
        """Once `run.load_table` has chosen it, unless it was given."""
        assert self.delta is not None
        return self.delta

    def plain(self) -> dict[str, Any]:
        """What was chosen, as TOML or JSON could hold it."""
        chosen = dataclasses.asdict(self).items()
        return {k: str(v) if isinstance(v, Path) else v for k, v in chosen if v is not None}


# What may differ between a run and its resumption: what is computed and spent does not depend on it.
HARMLESS: Final = {"all_reduce", "device", "timeout", "max_physical_batch_size", "profile", "tensorboard"}
CHANGEABLE: Final = HARMLESS | {"output", "resume", "checkpoint_every", "config"}

HELP: Final = "Train a differentially private model on a table, alone or under mpirun."


def check_options(options: Options) -> None:
    """Bounds that neither the table nor the engine knows."""
    require(options.delta is None or 0 < options.delta < 1, "delta", options.delta, "in (0, 1)")
    require(options.epochs >= 1, "epochs", options.epochs, ">= 1")
    require(0 < options.learning_rate < float("inf"), "lr", options.lr, "finite and > 0")
    require(0 <= options.momentum < 1, "momentum", options.momentum, "in [0, 1)")
    require(options.momentum == 0 or options.optimizer == "sgd", "momentum", options.momentum, "0 unless it is sgd's")
    require(options.max_grad_norm != 0, "max_grad_norm", options.max_grad_norm, "> 0: at 0 nothing is learned")
    seeded = options.seed is not None
    require(not seeded or 0 <= (options.seed or 0) < 2**63, "seed", options.seed, "in [0, 2^63)")
    target = options.target_epsilon
    require(target is None or 0 < target < float("inf"), "target_epsilon", target, "finite and > 0")
    both = target is not None and options.noise_multiplier is not None
    require(not both, "noise_multiplier", options.noise_multiplier, "absent when target_epsilon is given")

    on_gpus = options.all_reduce != "nccl" or options.device == "cuda"
    require(on_gpus, "all_reduce", options.all_reduce, "another without device cuda")
    there = not options.tensorboard or importlib.util.find_spec("tensorboard") is not None
    require(there, "tensorboard", True, "absent until it is installed: pip install tensorboard")
    require(options.checkpoint_every > 0, "checkpoint_every", options.checkpoint_every, "> 0")


app = cyclopts.App(name="fastdp.train", help=HELP, version=fastdp.__version__, suppress_keyboard_interrupt=False)


@app.default
def _take(*, options: Annotated[Options, Parameter(name="*")] = Options()) -> Options:
    return options


def parse(arguments: list[str] | None = None) -> Options | None:
    """The options of a command line; None if it asked for --help or --version, which are printed.

    Raises ArgumentError, or the parser's own CycloptsError.
    """
    options = _parse(arguments)
    if options is None:
        return None
    sources: list[Any] = []
    if options.config is not None:
        sources.append(_toml(options.config))
        options = _parse(arguments, *sources)
        assert options is not None
    if options.resume is None:
        return options
    path = folder.find(options.resume, options.output)
    if path is None:
        return dataclasses.replace(options, resume=None)
    saved = folder.options_of(path)
    given = _parse(arguments, *sources, cyclopts.config.Dict({k: v for k, v in saved.items() if k not in CHANGEABLE}))
    assert given is not None
    began = {**Options().plain(), **saved}
    chosen = given.plain()
    for name in (field.name for field in dataclasses.fields(given)):  # those that are None ("--lr none") too
        value = chosen.get(name)
        same = name in CHANGEABLE or value == began.get(name)
        bound = "absent" if began.get(name) is None else repr(began.get(name))
        require(same, name, value, f"{bound} as in the run that is resumed, {path}")
    return dataclasses.replace(given, resume=str(path), output=path)


def _parse(arguments: list[str] | None, *sources: Any) -> Options | None:
    app.config = sources
    # Errors and interrupts come to the caller, not to the library's panels.
    result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    return result if isinstance(result, Options) else None


def _toml(path: Path) -> cyclopts.config.Toml:
    require(path.is_file(), "config", str(path), "a TOML file")
    try:
        tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError("config", str(path), f"valid TOML ({error})") from error
    return cyclopts.config.Toml(path, must_exist=True)
