"""What would break the guarantee is refused by name: P1's guards, P4's one batch a step, P10's arguments."""

from __future__ import annotations

import copy
import re
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from loops import MODELS, data, private
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastdp import ArgumentError, PrivacyEngine, PrivacyError
from fastdp.optimizer import PrivateOptimizer


def test_a_step_needs_exactly_one_batch(loop) -> None:
    engine, module, optimizer, loader = loop
    with pytest.raises(PrivacyError, match="after 0 batches"):
        optimizer.step()
    batches = iter(loader)
    x, y = next(batches)
    F.cross_entropy(module(x), y).backward()
    optimizer.step()
    with pytest.raises(PrivacyError, match="after 0 batches"):
        optimizer.step()
    next(batches)
    x, y = next(batches)
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(PrivacyError, match="after 2 batches"):
        optimizer.step()
    assert engine.ledger.steps == 1


def test_a_step_without_backward_is_noise_and_is_accounted(loop) -> None:
    engine, module, optimizer, loader = loop
    before = copy.deepcopy(module.state_dict())
    next(iter(loader))
    with pytest.warns(UserWarning, match="12 records .* a step of noise alone, which is accounted for") as found:
        optimizer.step()
    assert found[0].filename == __file__
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())  # noise_multiplier is 0
    assert engine.ledger.steps == 1


def test_a_second_backward_is_refused(loop) -> None:
    _, module, optimizer, loader = loop
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(PrivacyError, match=r"second backward\(\) before optimizer.step"):
        F.cross_entropy(module(x), y).backward()
    optimizer.zero_grad()
    F.cross_entropy(module(x), y).backward()  # after zero_grad the first one no longer counts
    optimizer.step()


@pytest.mark.filterwarnings("ignore:.*a step of noise alone")
def test_a_backward_of_an_earlier_batch_is_refused() -> None:
    module = MODELS["logistic"]()  # of one layer: autograd itself does not miss the weights of the earlier step
    _, module, optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
    batches = iter(loader)
    x, y = next(batches)
    loss = F.cross_entropy(module(x), y)
    optimizer.step()
    next(batches)
    with pytest.raises(PrivacyError, match=r"backward\(\) through a forward of an earlier batch"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Using backward")  # torch's own advice
def test_gradients_that_are_a_graph_are_refused(loop) -> None:
    _, module, _, loader = loop
    x, y = next(iter(loader))
    with pytest.raises(PrivacyError, match=r"backward\(create_graph=True\) cannot be clipped"):
        F.cross_entropy(module(x), y).backward(create_graph=True)


def test_other_rows_than_the_loaders_are_refused(loop) -> None:
    _, module, optimizer, loader = loop
    x, y = next(iter(loader))
    with pytest.raises(PrivacyError, match="the first dimension of its input is not the batch's records"):
        F.cross_entropy(module(torch.cat([x, x])), torch.cat([y, y])).backward()
        optimizer.step()


def test_closures_and_new_groups_are_refused(loop) -> None:
    _, _module, optimizer, _ = loop
    with pytest.raises(ArgumentError, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ArgumentError, match="before make_private"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_an_exception_in_forward_leaves_parameters_trainable(loop) -> None:
    _, module, _optimizer, _loader = loop
    with pytest.raises(RuntimeError, match="shapes"):
        module(torch.randn(3, 5))
    assert all(p.requires_grad for p in module.parameters())


class Leaky(nn.Module):
    """Uses its layer's weight once as a module and once by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(x, self.layer.weight)


def test_a_gradient_by_another_way_is_refused_by_name() -> None:
    module = Leaky()
    _, module, optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(PrivacyError, match=r"layer\.weight: autograd delivered"):
        optimizer.step()


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.layer(x)
        x.mul_(2)
        return y


def test_an_input_changed_in_place_is_refused_by_name() -> None:
    module = ChangesItsInput()
    _, module, _optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
    x, y = next(iter(loader))
    with pytest.raises(PrivacyError, match="layer 'layer': its input or output gradient was changed"):
        F.cross_entropy(module(x), y).backward()


def linear() -> tuple[nn.Module, PrivateOptimizer, Tensor]:
    """A private layer, and a batch."""
    module = nn.Linear(6, 3)
    _, module, optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
    batches = iter(loader)
    for _ in range(3):  # beyond the batches that are probed, of which the loop has marked tensors
        x, y = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    return module, optimizer, next(batches)[0].as_subclass(Tensor)


@pytest.mark.parametrize("which", ["input", "output gradient"])
def test_what_is_changed_in_place_before_the_step_is_refused_by_name(which: str) -> None:
    module, optimizer, x = linear()
    y = module(x)
    g = torch.full_like(y, 1.0 / len(x))
    y.backward(g)
    (x if which == "input" else g).mul_(2)
    with pytest.raises(PrivacyError, match="module: its input or output gradient was changed"):
        optimizer.step()


def test_a_hook_that_would_see_paused_parameters_is_refused() -> None:
    module, _optimizer, x = linear()
    module.register_forward_pre_hook(lambda m, args: (args[0] * m.weight.sum(),))
    with pytest.raises(PrivacyError, match="module: a forward pre-hook registered after make_private"):
        module(x)
    assert all(p.requires_grad for p in module.parameters())


def test_other_values_in_a_parameters_place_are_refused() -> None:
    module, _optimizer, x = linear()
    with pytest.raises(PrivacyError, match=r"module\.weight: removed or replaced"):
        torch.func.functional_call(module, {"weight": torch.ones(3, 6)}, (x,))
    with torch.no_grad():  # an average of the weights, say
        torch.func.functional_call(module, {"weight": torch.ones(3, 6)}, (x,))


def test_a_call_on_another_thread_in_the_middle_of_one_is_refused() -> None:
    module = nn.Sequential(nn.Tanh(), nn.Linear(6, 3))
    raised: list[Exception] = []

    def beside(x: Tensor) -> None:
        try:
            with torch.no_grad():
                module(x)
        except PrivacyError as error:
            raised.append(error)

    def during(*_: object) -> None:
        if threading.current_thread() is threading.main_thread() and not raised:
            thread = threading.Thread(target=beside, args=(torch.randn(2, 6),))
            thread.start()
            thread.join()

    _, module, optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
    forward = nn.Linear.forward
    x, y = next(iter(loader))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda m, x: (during(), forward(m, x))[1])
        loss = F.cross_entropy(module(x), y)
    assert "layer '1': called on two threads at once" in str(raised[0])
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
            "module.1='BatchNorm1d': must be replaced",
        ),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)), "module.1='BatchNorm1d'"),
        (nn.Linear(6, 3).half(), "torch.float16 on cpu': must be all float64, or float32 and bfloat16"),
        (nn.Sequential(nn.Linear(6, 3).double(), nn.Linear(3, 3).bfloat16()), "torch.bfloat16 on cpu"),
        (nn.Linear(6, 3).requires_grad_(False), "at least one parameter"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(module: nn.Module, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as error:
        private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")  # torch.compile's own imports
def test_compiled_modules_are_refused_by_name() -> None:
    module = torch.compile(nn.Linear(6, 3))
    with pytest.raises(ArgumentError, match="compiled"):
        private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())


def test_optimizer_and_module_must_match() -> None:
    module, other = MODELS["mlp"](), nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match=r"parameter 0\.weight='absent'"):
        private(module, torch.optim.SGD(module[2].parameters(), lr=0.1), data())
    with pytest.raises(ArgumentError, match="parameters of the module only"):
        private(module, torch.optim.SGD([*module.parameters(), *other.parameters()], lr=0.1), data())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0: must be finite and >= 0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"max_grad_norm": "1"}, "max_grad_norm='1': must be a number"),
        ({"noise_multiplier": torch.tensor(1.0)}, "noise_multiplier=tensor(1.): must be a number"),
        ({"dataset_size": 100.5}, "dataset_size=100.5: must be an int"),
        ({"batch_size": 61}, "batch_size=61: must be in"),
        ({"clipping": "ghost"}, "clipping='ghost': must be one of 'flat', 'per_layer', 'automatic'"),
        ({"max_grad_norm": {"": 1.0}}, "max_grad_norm={'': 1.0}: must be a number, or clipping per_layer"),
        ({"max_grad_norm": [1.0], "clipping": "per_layer"}, "max_grad_norm=[1.0]: must be a number, or a mapping"),
        ({"max_grad_norm": {}, "clipping": "per_layer"}, "max_grad_norm['']='absent': must be given"),
        ({"max_grad_norm": {"": 0.0}, "clipping": "per_layer"}, "max_grad_norm['']=0.0: must be in [1e-30, 1e30]"),
        ({"max_grad_norm": {"": float("nan")}, "clipping": "per_layer"}, "max_grad_norm['']=nan: must be in"),
        ({"max_grad_norm": {"": "1"}, "clipping": "per_layer"}, "max_grad_norm['']='1': must be a number"),
        ({"max_grad_norm": {"fc": 1.0}, "clipping": "per_layer"}, "max_grad_norm['fc']=1.0: must be of a layer"),
        ({"max_grad_norm": -1.0, "clipping": "per_layer"}, "max_grad_norm=-1.0: must be finite and >= 0"),
        ({"loss_reduction": "none"}, "loss_reduction='none'"),
        ({"max_physical_batch_size": 0}, "max_physical_batch_size=0: must be None or an int >= 1"),
        ({"secure_mode": 1}, "secure_mode=1: must be True or False"),
        ({"dataset_size": 100, "poisson_sampling": False}, "dataset_size=100"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, object], message: str) -> None:
    module = nn.Linear(6, 3)
    with pytest.raises(ArgumentError) as error:
        private(module, torch.optim.SGD(module.parameters(), lr=0.1), data(), **kwargs)
    assert message in str(error.value)


def test_bad_modules_and_optimizers_are_named(loop) -> None:
    module = nn.Linear(6, 3)
    with pytest.raises(ArgumentError, match="optimizer='LBFGS'"):
        private(module, torch.optim.LBFGS(module.parameters()), data())
    with pytest.raises(ArgumentError, match=r"must be an nn\.Module"):
        private(nn.Linear, torch.optim.SGD(module.parameters(), lr=0.1), data())
    used = loop[1]
    with pytest.raises(ArgumentError, match="private already"):
        private(used, torch.optim.SGD(used.parameters(), lr=0.1), data())
    again = copy.deepcopy(used)
    private(again, torch.optim.SGD(again.parameters(), lr=0.1), data())


@pytest.mark.parametrize(("name", "value"), [("target_epsilon", "3"), ("target_delta", None), ("target_delta", 2.0)])
def test_bad_targets_are_named(name: str, value: object) -> None:
    module = nn.Linear(6, 3)
    with pytest.raises(ArgumentError, match=f"{name}={value!r}: must be"):
        PrivacyEngine().make_private_with_epsilon(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(data(), batch_size=4),
            **{"target_epsilon": 3.0, "target_delta": 1e-5, "epochs": 1, "max_grad_norm": 1.0, name: value},
        )


def test_a_penalty_in_the_loss_is_refused_with_the_cure(loop) -> None:
    _, module, optimizer, loader = loop
    x, y = next(iter(loader))
    penalty = sum(p.square().sum() for p in module.parameters())
    (F.cross_entropy(module(x), y) + 1e-3 * penalty).backward()
    with pytest.raises(PrivacyError, match="use the optimizer's weight_decay"):
        optimizer.step()


def test_an_engine_accounts_for_one_run(loop) -> None:
    engine = loop[0]
    module = nn.Linear(6, 3)
    with pytest.raises(ArgumentError, match="once per engine"):
        engine.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(data(), batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


CHANGES = {
    "0.weight: frozen or unfrozen": lambda m: m[0].weight.requires_grad_(False),
    "0.weight: removed or replaced": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.data.clone())),
    "0.weight: its dtype, shape, device or layout": lambda m: m.double(),
    "layout was changed": lambda m: setattr(m[0].weight, "data", m[0].weight.data.t().contiguous().t()),
    "get_float32_matmul_precision": lambda m: torch.set_float32_matmul_precision("medium"),
}

HAS_NEWER_SETTINGS = hasattr(torch.backends.cuda.matmul, "fp32_precision")
if HAS_NEWER_SETTINGS:
    CHANGES["fp32_precision=tf32"] = lambda m: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")


@pytest.mark.parametrize("message", CHANGES)
def test_changes_after_make_private_are_refused(message: str, loop) -> None:
    _, module, optimizer, loader = loop
    try:
        CHANGES[message](module)
        x, y = next(iter(loader))
        with pytest.raises(PrivacyError, match=re.escape(message)):  # in the call, or at last in the step
            F.cross_entropy(module(x.to(module[0].weight.dtype)), y).backward()
            optimizer.step()
    finally:
        if HAS_NEWER_SETTINGS:
            torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_parameter_unfrozen_later_gets_no_raw_gradient(optimizer: type[torch.optim.Optimizer]) -> None:
    module = MODELS["mlp"]()
    module[0].requires_grad_(False)
    _, module, private_optimizer, loader = private(module, optimizer(module.parameters(), lr=0.1), data())
    module[0].requires_grad_(True)
    before = module[0].weight.detach().clone()
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(PrivacyError, match=r"0\.weight: autograd delivered"):
        private_optimizer.step()
    assert torch.equal(module[0].weight, before)


def test_the_original_optimizer_steps_nothing() -> None:
    module = MODELS["mlp"]()
    original = torch.optim.SGD(module.parameters(), lr=0.1)
    _, module, _, loader = private(module, original, data())
    before = copy.deepcopy(module.state_dict())
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    original.step()
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_a_graph_from_before_the_step_is_not_used_with_the_new_parameters(loop) -> None:
    _, module, optimizer, loader = loop
    stale = (module[4].weight * module[4].weight).sum()
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_ranks_without_a_communicator_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    module = nn.Linear(6, 3)
    with pytest.raises(ArgumentError, match=r"comm=None: must be fastdp.comm.init\(\) under mpirun"):
        private(module, torch.optim.SGD(module.parameters(), lr=1.0), data())


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
def test_a_model_compiled_after_make_private_is_refused_by_name(loop) -> None:
    _, module, _, loader = loop
    x, _y = next(iter(loader))
    with pytest.raises(Exception, match=r"torch.compile: compiled models and losses are not supported"):
        torch.compile(module, backend="aot_eager")(x)


COMPILED = {
    "module": lambda m: torch.compile(m, backend="aot_eager"),
    "module in place": lambda m: m.compile(backend="aot_eager") or m,
    "part in place": lambda m: m[1].compile(backend="aot_eager") or m,
    "layer in place": lambda m: m[0].compile(backend="aot_eager") or m,
    "forward": lambda m: setattr(m, "forward", torch.compile(m.forward, backend="aot_eager")) or m,
    "forward of a part": lambda m: setattr(m[1], "forward", torch.compile(m[1].forward, backend="aot_eager")) or m,
    "forward of a layer": lambda m: setattr(m[0], "forward", torch.compile(m[0].forward, backend="aot_eager")) or m,
    "function around it": lambda m: torch.compile(lambda x: m(x) * 1.0, backend="aot_eager"),
}


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
@pytest.mark.parametrize("batch", [None, 0, 1])
@pytest.mark.parametrize("how", COMPILED)
def test_compiled_in_any_way_is_refused_by_name_or_exact(how: str, batch: int | None) -> None:
    """Before make_private (None), at the first batch, which is probed, and at one that is not."""
    torch._dynamo.reset()
    module = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 3))
    twin = copy.deepcopy(module)

    def train(module: nn.Module, batch: int | None) -> None:
        call = COMPILED[how](module) if batch is None and how != "function around it" else module
        module = call if isinstance(call, nn.Module) else module
        _, module, optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
        call = module
        for i, (x, y) in enumerate(loader):
            call = COMPILED[how](module) if i == batch else call
            optimizer.zero_grad()
            F.cross_entropy(call(x), y).backward()
            optimizer.step()

    torch.manual_seed(0)
    if (how, batch is None) in (("forward of a layer", False), ("function around it", True)):
        train(module, batch)  # the hooks are outside, or nothing is compiled
        torch.manual_seed(0)
        train(twin, -1)
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
        return
    message = r"must be (not compiled|nn\.Linear|nn.Linear with its own)|compiled models and losses are not supported"
    with pytest.raises(Exception, match=message):
        train(module, batch)


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
@pytest.mark.parametrize("batch", [0, 1])
def test_a_compiled_loss_is_refused_or_exact(batch: int) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(F.cross_entropy, backend="aot_eager")
    modules = [MODELS["mlp"]()]
    modules.append(copy.deepcopy(modules[0]))
    for module, losses in zip(modules, (compiled, F.cross_entropy), strict=True):
        torch.manual_seed(0)
        _, module, optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
        for i, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            if i == batch == 0:
                with pytest.raises(Exception, match="compiled models and losses are not supported"):
                    losses(module(x), y)
                return
            (losses if i >= batch else F.cross_entropy)(module(x), y).backward()
            optimizer.step()
    for p, q in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("before", [False, True])
def test_what_a_loop_does_with_the_loss_of_a_probed_batch(before: bool, tmp_path: Path) -> None:
    """Printed, copied and saved like any tensor; a number is not to be taken before backward, printing included."""
    module = MODELS["mlp"]()
    _, module, optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
    x, y = next(iter(loader))
    loss = F.cross_entropy(module(x), y)
    kept = loss.detach()
    if before:
        assert f"{loss:.3f}" == f"{kept.as_subclass(Tensor).item():.3f}"
        with pytest.raises(PrivacyError, match="a number was taken out of torch before backward"):
            loss.backward()
        return
    loss.backward()
    optimizer.step()
    assert f"{loss:.3f}" == f"{loss.item():.3f}" and "Taped" not in f"{loss!r} {x} {kept}"
    torch.save(kept, tmp_path / "loss.pt")
    for again in (torch.load(tmp_path / "loss.pt"), copy.deepcopy(kept)):
        assert type(again) is Tensor and torch.equal(again, kept)
