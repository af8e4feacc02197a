"""PrivacyEngine: turns a module, an optimizer and a loader into their differentially private counterparts."""

from __future__ import annotations

import hashlib
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fastdp import accounting, alike, cuda, gpusum, layers, ledger, native, sharded, watch
from fastdp.clipping import GradientSum, Span, flat_numel, spans_of
from fastdp.comm import Communicator
from fastdp.device import on_gpu
from fastdp.errors import ArgumentError, PrivacyError, require
from fastdp.launch import launched_ranks
from fastdp.optimizer import PrivateOptimizer
from fastdp.plan import CLIPPINGS, Clipping, Plan, bounds_of_layers
from fastdp.probe import Probe
from fastdp.sampling import BatchSampler, PrivateLoader, check_loader
from fastdp.secret import SecretKey


class Target(NamedTuple):
    """What the noise was calibrated for."""

    epsilon: float
    delta: float


class PrivacyEngine:
    """One private training run and what it has spent.

    accountant: "pld" or "rdp". seed: for tests only; the run is reproducible and therefore not private.
    ledger: a file that holds what the run spends, whatever ends it (fastdp/ledger.py). If it exists, the run goes on:
        what is in it is spent, a calibrated run has so many steps less, and `optimizer.steps` begins there. The key is
        always new. Save and load the state_dicts of model and optimizer yourself. None: spent is known in memory only.
    secure_mode: harden the noise against floating-point attacks (Mironov 2012; Jin et al. 2022): each value is the sum
        of four normals over 2 (Holohan & Braghin 2021, arXiv:2107.10138), and the noised sum is rounded to a multiple
        of a power of two, about 1/1024 of the noise. No guarantee is claimed for it. The same here and in make_private.
        What Opacus calls so, noise from a cryptographic generator, is what every run has.
    prior: what these records were used for before, {(noise multiplier, sample rate): count} of Gaussian mechanisms, the
        statistics of a prepared table for example: part of every epsilon, and of what noise is calibrated for.
    """

    def __init__(
        self,
        accountant: accounting.AccountantName = "pld",
        seed: int | None = None,
        ledger: str | os.PathLike[str] | None = None,
        secure_mode: bool = False,
        prior: Mapping[accounting.Event, int] | None = None,
    ) -> None:
        require(isinstance(secure_mode, bool), "secure_mode", secure_mode, "True or False")
        require(
            seed is None or (isinstance(seed, int) and 0 <= seed < 2**63), "seed", seed, "None or an int in [0, 2^63)"
        )
        self.seed, self._secure_mode = seed, secure_mode
        self.ledger = accounting.Ledger(accountant, prior)
        self._ledger_path = None if ledger is None else Path(ledger)
        self.plan: Plan | None = None
        self._dimension = 0

    def __repr__(self) -> str:
        return f"<fastdp.PrivacyEngine: {self.plan or 'make_private not called yet'}>"

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | Mapping[str, float],
        poisson_sampling: bool = True,
        clipping: Clipping = "flat",
        loss_reduction: Literal["mean", "sum"] = "mean",
        max_physical_batch_size: int | None = None,
        dataset_size: int | None = None,
        comm: Communicator | None = None,
        secure_mode: bool = False,
    ) -> tuple[nn.Module, PrivateOptimizer, PrivateLoader]:
        """Make `optimizer.step()` a step of DP-SGD (Abadi et al. 2016, arXiv:1607.00133); the loop stays as it is.

        module: comes back as itself, with hooks; `fastdp.validate(module)` lists what each part of it will use.
        data_loader: a plain DataLoader; its `batch_size` is the expected size of the Poisson batches over all ranks.
        noise_multiplier: noise standard deviation over C. max_grad_norm: C, the bound on what a record adds to a step's
            sum of gradients, over all layers: the sensitivity in each mode of clipping, rounding included.
        clipping: what a record adds of its gradient g; nothing if that is not finite.
            "flat": g min(1, C / |g|) (Abadi et al. 2016).
            "per_layer": of each layer, g_l min(1, C_l / |g_l|) with C_l = C / sqrt(L) (McMahan et al. 2018,
            arXiv:1710.06963). max_grad_norm may map the layers' names, as `module.named_modules()` has them, to C_l of
            your own; then C = sqrt(sum C_l^2). A layer is what `fastdp.validate` lists; a parameter that several share
            counts as the first one's. The noise is sigma C on all of them.
            "automatic": g C / (|g| + 0.01), which has a norm below C (Bu et al. 2023, arXiv:2206.07136): all gradients
            count alike, and C but scales the learning rate.
        loss_reduction: whether the loss is the mean or the sum over the batch's records.
        max_physical_batch_size: records that a rank runs at once. A larger batch comes in pieces, one iteration of the
            loop each; `optimizer.step()` steps at the last one, and `optimizer.is_accumulating` is True before it.
        dataset_size: a public n for the sampling rate; None takes len(dataset) and treats it as public.
        comm: ranks that train together, all calling this with the same arguments; parameters start as rank 0's.
        secure_mode: as the engine's; True in either is enough.

        Guarantee: T steps are T compositions of the Poisson-subsampled Gaussian mechanism with the plan's rate and
        noise; `get_epsilon` is an upper bound under add/remove adjacency. Raises ArgumentError for what is not exact.
        """
        records, batch_size = self._check(data_loader, clipping, loss_reduction, max_physical_batch_size, secure_mode)
        spans = spans_of(module, optimizer)
        bounds = _bounds(max_grad_norm, clipping, spans) | {"secure_mode": secure_mode or self._secure_mode}
        plan = self._plan(records, batch_size, dataset_size, noise_multiplier, bounds, poisson_sampling, None)
        piece = max_physical_batch_size
        return self._build(plan, records, module, spans, optimizer, data_loader, loss_reduction, piece, comm)

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | Mapping[str, float],
        poisson_sampling: bool = True,
        clipping: Clipping = "flat",
        loss_reduction: Literal["mean", "sum"] = "mean",
        max_physical_batch_size: int | None = None,
        dataset_size: int | None = None,
        comm: Communicator | None = None,
        secure_mode: bool = False,
    ) -> tuple[nn.Module, PrivateOptimizer, PrivateLoader]:
        """`make_private` with the least noise for which `epochs` epochs cost (0.995 target_epsilon, target_epsilon].

        Steps beyond those epochs raise PrivacyError. Other arguments as for `make_private`.
        """
        require(isinstance(epochs, int) and epochs >= 1, "epochs", epochs, "an int >= 1")
        for name, value in (("target_epsilon", target_epsilon), ("target_delta", target_delta)):
            require(isinstance(value, numbers.Real), name, value, "a number")
        require(0 < target_delta < 1, "target_delta", target_delta, "in (0, 1)")
        records, batch_size = self._check(data_loader, clipping, loss_reduction, max_physical_batch_size, secure_mode)
        spans = spans_of(module, optimizer)
        bounds = _bounds(max_grad_norm, clipping, spans) | {"secure_mode": secure_mode or self._secure_mode}
        plan = self._plan(records, batch_size, dataset_size, 0.0, bounds, poisson_sampling, None)
        steps = epochs * plan.steps_per_epoch
        dimension = plan.normals(sum(s.numel for s in spans))
        tail = 0.0
        for _ in range(2):  # the second time, less delta is left, so the noise grows and its tail shrinks
            sigma = accounting.noise_multiplier(
                target_epsilon=target_epsilon,
                target_delta=target_delta - tail,
                sample_rate=plan.sample_rate if poisson_sampling else 1.0,
                steps=steps if poisson_sampling else epochs,
                accountant=self.ledger.accountant,
                prior=self.ledger.prior,
            )
            tail = accounting.tail_delta(sigma, steps, dimension)
            require(
                tail < 0.5 * target_delta,
                "target_delta",
                target_delta,
                f"> {2 * tail:.2g}, twice what the noise's cut tails use up at noise multiplier {sigma:.3g}",
            )
        plan = self._plan(records, batch_size, dataset_size, sigma, bounds, poisson_sampling, steps)
        target, piece = Target(target_epsilon, target_delta), max_physical_batch_size
        return self._build(plan, records, module, spans, optimizer, data_loader, loss_reduction, piece, comm, target)

    def get_epsilon(self, delta: float) -> float:
        """Upper bound on the epsilon spent so far at `delta`, the noise's cut tails included; 0.0 before any step.

        Raises PrivacyError before make_private if there is a ledger file: it is make_private that reads it.
        """
        if self.plan is None and self._ledger_path is not None and self._ledger_path.exists():
            raise PrivacyError(
                f"get_epsilon: call make_private first: it reads what {self._ledger_path} says was spent"
            )
        return self.ledger.epsilon_of_sampler(delta, self._dimension)

    @property
    def accountant(self) -> PrivacyEngine:
        """The engine keeps its own account; scripts for Opacus ask `engine.accountant.get_epsilon(delta)`."""
        return self

    def close(self) -> None:
        """End a run with a ledger file: what that reserved and did not use is given back, and no step can follow."""
        if isinstance(self.ledger, ledger.DurableLedger):
            self.ledger.close()

    def assumptions(self) -> list[str]:
        """What a reader of the epsilon must know, one line each; the first says so if the run is not private."""
        lines = [] if self.seed is None else [f"NOT PRIVATE: the noise is reproducible from seed {self.seed}"]
        if self.plan is not None and self.plan.noise_multiplier == 0:
            lines.append("NOT PRIVATE: no noise is added")
        return lines + ([] if self.plan is None else self.plan.assumptions())

    def _check(
        self,
        data_loader: DataLoader[Any],
        clipping: str,
        loss_reduction: str,
        max_physical_batch_size: int | None,
        secure_mode: bool,
    ) -> tuple[int, int]:
        require(self.plan is None, "make_private", "called twice", "called once per engine: one run, one ledger")
        require(clipping in CLIPPINGS, "clipping", clipping, f"one of {', '.join(map(repr, CLIPPINGS))}")
        require(loss_reduction in ("mean", "sum"), "loss_reduction", loss_reduction, "'mean' or 'sum'")
        piece = max_physical_batch_size
        whole = piece is None or (isinstance(piece, int) and not isinstance(piece, bool) and piece >= 1)
        require(whole, "max_physical_batch_size", piece, "None or an int >= 1")
        require(isinstance(secure_mode, bool), "secure_mode", secure_mode, "True or False")
        return check_loader(data_loader)

    def _plan(
        self,
        records: int,
        batch_size: int,
        dataset_size: int | None,
        noise_multiplier: float,
        bounds: dict[str, Any],
        poisson_sampling: bool,
        steps: int | None,
    ) -> Plan:
        if dataset_size is not None:
            require(poisson_sampling, "dataset_size", dataset_size, "None with poisson_sampling=False: no rate uses it")
        return Plan(
            dataset_size=records if dataset_size is None else dataset_size,
            batch_size=batch_size,
            noise_multiplier=noise_multiplier,
            poisson_sampling=poisson_sampling,
            size_from_data=dataset_size is None,
            steps=steps,
            **bounds,
        )

    def _build(
        self,
        plan: Plan,
        records: int,
        module: nn.Module,
        spans: list[Span],
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        loss_reduction: str,
        piece: int | None,
        comm: Communicator | None,
        target: Target | None = None,
    ) -> tuple[nn.Module, PrivateOptimizer, PrivateLoader]:
        if comm is None and launched_ranks() > 1:
            raise ArgumentError(
                "comm",
                None,
                "fastdp.comm.init() under mpirun, or fastdp.comm.init(MPI.COMM_SELF) for a model of this rank's own",
            )
        # mpi4py's own, say.
        require(comm is None or hasattr(comm, "agree"), "comm", comm, "None or what fastdp.comm.init() returns")
        watch.check_new(module)
        if on_gpu(spans[0].param):
            cuda.kernels()  # or an error now
            require(not plan.secure_mode, "secure_mode", True, "False on a GPU: the hardened noise is the CPU's only")
        elif comm is not None:
            require(not comm.by_nccl, "comm.algorithm", "nccl", "another for a model on the CPU")
        self._dimension = plan.normals(sum(s.numel for s in spans))
        rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
        key = self._shared_key(plan, module, optimizer, data_loader, loss_reduction, comm)
        gradient, shared, gpu_sum = _sums(plan, spans, optimizer, comm)
        loader = PrivateLoader(data_loader, BatchSampler(plan, records, key, rank, size), piece)
        self._open_ledger(plan, target, comm)
        try:
            spent = self.ledger.steps
            loader.skip(*(divmod(spent, len(loader)) if plan.poisson_sampling else (spent, 0)))
        except BaseException:
            self.close()
            raise
        recorder = layers.Recorder()  # from here on, nothing fails: the module is this engine's
        watch.attach(module, recorder)
        share, rest = divmod(plan.batch_size, size)
        sizes = frozenset((plan.batch_size, share, share + (rest > 0)))
        probe = Probe(module, recorder, loss_reduction == "mean", sizes)

        def on_batch(batch: Any, rows: int) -> Any:
            recorder.batch = loader.pieces
            return probe.watch(batch, rows)

        loader.on_batch = on_batch
        recorder.settle = lambda use: use.settle(gradient.views, max(loader.rows, 1), gradient.dtype)
        private = PrivateOptimizer(
            optimizer,
            plan=plan,
            gradient=gradient,
            recorder=recorder,
            probe=probe,
            loader=loader,
            ledger=self.ledger,
            key=key,
            loss_is_mean=loss_reduction == "mean",
            comm=comm if size > 1 else None,
            sharded=shared,
            gpu_sum=gpu_sum,
        )
        self.plan = plan
        return module, private, loader

    def _open_ledger(self, plan: Plan, target: Target | None, comm: Communicator | None) -> None:
        if self._ledger_path is None:
            return
        self.ledger = ledger.hold(self._ledger_path, self.ledger, plan.events, self.seed is not None, comm)
        if plan.events is None or target is None or not set(self.ledger.events) - {plan.event}:
            return
        # Other noise than this, or the same by another release of dp-accounting: what it costs in all decides.
        whole = accounting.Ledger(self.ledger.accountant, self.ledger.prior)
        for event, count in self.ledger.events.items():
            whole.step(*event, count)
        if plan.events > whole.steps:
            whole.step(*plan.event, plan.events - whole.steps)
        cost = whole.epsilon_of_sampler(target.delta, self._dimension)
        if not cost <= target.epsilon:
            self.close()
            bound = f"at most target_epsilon={target.epsilon} with the steps in {self._ledger_path}, of other noise"
            raise ArgumentError("ledger: epsilon", cost, bound)

    def _shared_key(
        self,
        plan: Plan,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        loss_reduction: str,
        comm: Communicator | None,
    ) -> SecretKey:
        """Rank 0's key, parameters and buffers on all ranks, after a check that they run the same plan."""
        secret = os.urandom(32) if self.seed is None else hashlib.sha256(b"fastdp test %d" % self.seed).digest()
        if comm is not None and comm.size > 1:
            account = {
                "accountant": self.ledger.accountant,
                "prior": self.ledger.prior,
                "seed": "none" if self.seed is None else "given",
                "ledger": "none" if self._ledger_path is None else "given",
                "loss_reduction": loss_reduction,
            }
            alike.check(comm, plan, module, optimizer, data_loader, account)
            secret = comm.bcast_object(secret, 0)
            with torch.no_grad():
                # Those that are frozen, too: gradients of different models must not be summed.
                for x in (*module.parameters(), *module.buffers()):
                    copy = x.data.cpu().contiguous()
                    comm.broadcast(copy.view(torch.uint8) if copy.dim() else copy.view(1).view(torch.uint8), 0)
                    x.data.copy_(copy)
        return SecretKey(secret)


def _sums(
    plan: Plan, spans: list[Span], optimizer: Optimizer, comm: Communicator | None
) -> tuple[GradientSum, sharded.Sharded | None, gpusum.Staged | gpusum.Nccl | None]:
    """Where the clipped sum is formed, and how ranks add theirs up. All of them call it."""
    shared, flat, on_gpus = None, None, on_gpu(spans[0].param)
    several = comm is not None and comm.size > 1
    if comm is not None and several and not on_gpus:
        if not plan.secure_mode and sharded.is_possible(comm, optimizer, spans):
            shared = comm.shard(optimizer, spans)
            flat = shared.flat
        else:
            flat = comm.empty(flat_numel(spans), native.sum_dtype(spans[0].dtype))
    gradient = GradientSum(spans, plan.max_grad_norm, plan.layer_bounds, plan.gamma, flat)
    return gradient, shared, gpusum.of(comm, gradient.flat) if comm is not None and several and on_gpus else None


def _bounds(max_grad_norm: float | Mapping[str, float], clipping: Clipping, spans: list[Span]) -> dict[str, Any]:
    """What of the plan is about clipping."""
    if clipping != "per_layer":
        require(
            not isinstance(max_grad_norm, Mapping), "max_grad_norm", max_grad_norm, "a number, or clipping per_layer"
        )
        return {"max_grad_norm": max_grad_norm, "clipping": clipping}
    c, layer_bounds = bounds_of_layers(max_grad_norm, dict.fromkeys(s.layer for s in spans))
    return {"max_grad_norm": c, "clipping": clipping, "layer_bounds": layer_bounds}
