"""The optimizer that make_private returns: sum over ranks, noise once, the user's optimizer step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from fastdp import fused, gpusum, sparse
from fastdp.accounting import Ledger
from fastdp.clipping import GradientSum
from fastdp.comm import Communicator
from fastdp.device import done_so_far, follow, kernels, stream_of
from fastdp.errors import ArgumentError, PrivacyError
from fastdp.layers import Recorder
from fastdp.plan import Plan
from fastdp.probe import Probe
from fastdp.profile import Profile
from fastdp.sampling import PrivateLoader
from fastdp.secret import SecretKey
from fastdp.sharded import Sharded, digest


class PrivateOptimizer(Optimizer):
    """Wraps the user's optimizer: same param_groups, same state, so schedulers and state_dict work as before.

    `step()` wants exactly one batch (or piece) of the loader since the last call, and at most one backward().
    Parameters' `.grad` is None except while an unfused optimizer runs, when it holds the noised gradient.
    """

    def __init__(
        self,
        inner: Optimizer,
        *,
        plan: Plan,
        gradient: GradientSum,
        recorder: Recorder,
        probe: Probe,
        loader: PrivateLoader,
        ledger: Ledger,
        key: SecretKey,
        loss_is_mean: bool,
        comm: Communicator | None,
        sharded: Sharded | None = None,
        gpu_sum: gpusum.Staged | gpusum.Nccl | None = None,
    ) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self._share_state()
        self.plan, self.gradient, self.ledger = plan, gradient, ledger
        self.steps = loader.drawn  # of an earlier process, as its ledger has them
        self._pieces = 0
        self.profile: Profile | None = None
        self._wants_to_stop = False  # of this rank
        self.asked_to_stop = False  # of any rank, at the last step
        self._in_batch = False  # some pieces of the batch are in the sum, some are to come
        self._settings: list[dict[str, Any]] = []  # of the groups, at the last piece
        self._epochs_recorded = loader.epochs
        self._spans = {s.param: s for s in gradient.spans}
        self._one_dtype = all(s.dtype == gradient.dtype for s in gradient.spans)
        # Where each of the module's parameters hangs: name, the submodule's own dictionary, key, parameter, its span.
        self._slots = [
            (f"{prefix}.{key}" if prefix else key, m._parameters, key, p, self._spans.get(p))
            for prefix, m in probe.root.named_modules()
            for key, p in m._parameters.items()
            if p is not None
        ]
        self._recorder, self._probe, self._loader = recorder, probe, loader
        self._key, self._loss_is_mean, self._comm, self._sharded = key, loss_is_mean, comm, sharded
        self._gpu_sum = gpu_sum
        self._done: Any = None  # what the last step, or piece of one, has asked of a GPU

    def _share_state(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self._share_state()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "inner"):
            raise ArgumentError("param_group", sorted(param_group), "given to the optimizer before make_private")
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._recorder.uses:
            self._probe.discarded()
        self._recorder.clear()
        self.inner.zero_grad(set_to_none=True)

    # So that torch.amp.GradScaler gives its factor to the optimizer, `grad_scale`, instead of looking at `.grad`.
    _step_supports_amp_scaling = True

    @property
    def grad_scale(self) -> float:
        return 1.0

    @grad_scale.setter
    def grad_scale(self, value: Any) -> None:
        raise PrivacyError(
            "GradScaler: a scaled loss is clipped at another norm than max_grad_norm: use it with enabled=False, and "
            "bfloat16, which needs none"
        )

    @property
    def is_accumulating(self) -> bool:
        """Whether the loader's current piece is not the last of its batch: schedulers wait until it is."""
        return self._loader.more

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One DP-SGD step (Abadi et al. 2016, algorithm 1), or only its sum while `is_accumulating`.

        Raises PrivacyError where going on would break the guarantee; nothing of the batch is released then.
        """
        if closure is not None:
            raise ArgumentError("closure", closure, "None: it would evaluate the batch more than once")
        follow(self._done, self.gradient.flat)  # which they share, and they may be on other streams
        try:
            self._add_piece()
            if not self._in_batch:
                self._end_batch()
        finally:
            self._done = done_so_far(self.gradient.flat)

    def _add_piece(self) -> None:
        try:
            self._check()
            rows = self._loader.rows
            if rows and not self._recorder.uses:
                warnings.warn(
                    f"fastdp: step() without a gradient of this batch's {rows} records (no backward(), or zero_grad() "
                    "after it): a step of noise alone, which is accounted for",
                    stacklevel=5,  # the loop: between are step(), torch's wrapper and no_grad's
                )
            if self._recorder.streams - {stream_of(self.gradient.flat)}:
                raise PrivacyError("optimizer.step() on another CUDA stream than backward(): it would not wait for it")
            shown = max(rows, 1)
            scale = shown if self._loss_is_mean else 1.0
            self.gradient.fill(self._recorder.uses, shown, rows, scale, add=self._in_batch)
            self._pieces += 1
        finally:
            self._recorder.clear()
        self._mark("clip")
        self._in_batch = self._loader.more

    def _end_batch(self) -> None:
        self._record()  # before anything of the step leaves this process
        self._mark("ledger")
        step, self.steps = self.steps, self.steps + 1
        if self.profile is not None:
            self.profile.wait()
        self._step(step)
        self._mark("step")
        self.inner._opt_called = True  # type: ignore[attr-defined]  # what schedulers made before make_private look at

    def _mark(self, phase: str) -> None:
        if self.profile is not None:
            self.profile.mark(phase)

    def ask_to_stop(self) -> None:
        """On one rank, say in a signal handler: after its next step, `asked_to_stop` is True on all ranks."""
        self._wants_to_stop = True

    def _step(self, step: int) -> None:
        """The sum over ranks, noise and the optimizer's step, in one pass where it can be.

        The wish to stop travels with the gradients, so that all ranks learn of it at the same step.
        """
        plan, comm = self.plan, self._comm
        is_fused = self._one_dtype and fused.is_fused(self.inner) and not plan.secure_mode
        one_rank_step = self._noise_and_step if is_fused else self._noise_then_inner
        if comm is None:
            one_rank_step(step)
            self.asked_to_stop = self._wants_to_stop
            return
        comm.wish(self._wants_to_stop)
        key, flat, tables = self._key.tensor(), self.gradient.flat, self.gradient.tables
        if is_fused and self._sharded is not None:
            comm.reduce_noise_step(
                self._sharded,
                noise_std=plan.noise_std,
                batch_size=plan.batch_size,
                key=key,
                step=step,
                tables=tables if comm.hosts > 1 else {},
            )
            torch.autograd.graph.increment_version(list(self._spans))
        else:
            with comm.whole("optimizer.step()"):
                if self._sharded is not None:
                    self._sharded.leave()
                comm.agree(flat, digest(plan.noise_std, plan.batch_size, key, step, self.param_groups, tables))
                if self._gpu_sum is None:
                    sparse.sum_flat(comm, flat, tables)
                else:
                    self._gpu_sum.all_reduce(flat)
                self._mark("reduce")
                one_rank_step(step)
        self.asked_to_stop = comm.wished

    def _record(self) -> None:
        plan = self.plan
        if plan.poisson_sampling:
            self.ledger.step(*plan.event)
        elif self._loader.epochs > self._epochs_recorded:
            self.ledger.step(*plan.event, self._loader.epochs - self._epochs_recorded)
            self._epochs_recorded = self._loader.epochs

    def _check(self) -> None:
        if self._loader.pieces != self._pieces + 1:
            raise PrivacyError(
                f"step() after {self._loader.pieces - self._pieces} batches of the loader since the last step: "
                "each step must use exactly one of the loader that make_private returned: look at shapes in the "
                "dataset; to choose among batches is not accounted for, and this run ends here"
            )
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        if self._in_batch and settings != self._settings:
            raise ArgumentError(
                "optimizer.param_groups",
                "changed between the pieces of a batch",
                "left alone: call scheduler.step() only `if not optimizer.is_accumulating`",
            )
        self._settings = settings
        if self.plan.steps is not None and self.steps >= self.plan.steps:
            raise PrivacyError(f"step {self.steps + 1}: the noise was calibrated for {self.plan.steps} steps")
        self._check_parameters()
        epochs = self.plan.events
        if epochs is not None and not self.plan.poisson_sampling and self._loader.epochs > epochs:
            raise PrivacyError(f"epoch {self._loader.epochs}: the noise was calibrated for {epochs} epochs")
        self._probe.check_step()

    def _check_parameters(self) -> None:
        """What the user can change between make_private and a step, and must not."""
        flat = self.gradient.flat
        for name, holder, key, p, s in self._slots:
            if holder.get(key) is not p:
                raise PrivacyError(f"{name}: removed or replaced after make_private")
            if p.grad is not None:
                raise PrivacyError(
                    f"{name}: autograd delivered a gradient that did not come from its module's forward; "
                    "it cannot be clipped per record (for an L2 penalty, use the optimizer's weight_decay)"
                )
            if p.requires_grad != (s is not None):
                raise PrivacyError(f"{name}: frozen or unfrozen after make_private")
            if s is not None and (
                p.dtype != s.dtype or p.shape != s.shape or p.device != flat.device or not p.is_contiguous()
            ):
                raise PrivacyError(f"{name}: its dtype, shape, device or layout was changed after make_private")
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self._spans and (p.requires_grad or p.grad is not None):
                    raise PrivacyError("optimizer: it was given another parameter with a gradient after make_private")
        try:
            precision = torch.get_float32_matmul_precision()
        except RuntimeError:  # torch's newer settings, of which one is coarser
            precision = f"fp32_precision={torch.backends.cuda.matmul.fp32_precision}"
        if flat.dtype == torch.float32 and precision != "highest":
            raise PrivacyError(
                f"torch.get_float32_matmul_precision()={precision!r}: must be 'highest': "
                "coarser products round beyond what clipping leaves room for"
            )

    def _noise_and_step(self, step: int) -> None:
        """Noise and the optimizer's step in one pass over the parameters."""
        plan, flat, key = self.plan, self.gradient.flat, self._key.tensor()
        for h, parameters in fused.steps(self.inner, self._spans, plan.noise_std, plan.batch_size):
            kernels(flat).noise_step(h, parameters, flat, key, step)
        torch.autograd.graph.increment_version(list(self._spans))

    def _noise_then_inner(self, step: int) -> None:
        for s in self.gradient.spans:
            g = self.gradient.views[s.param]
            kernels(g).add_noise(g, self.plan.noise_std, self._key.tensor(), step, s.offset, self.plan.secure_mode)
            g /= self.plan.batch_size
            s.param.grad = g.to(s.dtype, copy=True)  # not a view: whoever saved it would save the whole buffer
        try:
            self.inner.step()
        finally:
            self.inner.zero_grad(set_to_none=True)
