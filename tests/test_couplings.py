"""P1's last sentence: models and losses that couple the records of a batch are refused, others are not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from test_probe import make, mlp, run
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastdp import PrivacyError


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Attends(nn.Module):
    """Softmax over the records, a small coupling for most of them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.t() / 10, dim=1) @ x


def one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y, 3).float()


SEPARABLE = {
    "cross_entropy": F.cross_entropy,
    "CrossEntropyLoss": nn.CrossEntropyLoss(label_smoothing=0.1),
    "sum": lambda out, y: F.cross_entropy(out, y, reduction="sum"),
    "weighted_sum": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), reduction="sum"),
    "nll": lambda out, y: F.nll_loss(F.log_softmax(out, dim=1), y),
    "bce": lambda out, y: F.binary_cross_entropy(torch.sigmoid(out), one_hot(y)),
    "bce_logits": lambda out, y: F.binary_cross_entropy_with_logits(out, one_hot(y)),
    "mse": lambda out, y: F.mse_loss(out, one_hot(y)),
    "by_hand": lambda out, y: -out.log_softmax(1).gather(1, y[:, None]).mean() + 0.01 * out.square().sum(1).mean(),
    "in_place": lambda out, y: F.cross_entropy(out.mul_(0.5), y),
    "autocast_free_ops": lambda out, y: (out[torch.arange(len(out)), y] - 1).abs().mean(),
    "random": lambda out, y: F.cross_entropy(F.dropout(out, 0.3), y),
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_separable_losses_pass(name: str) -> None:
    run(mlp(), SEPARABLE[name], loss_reduction="sum" if name.endswith("sum") else "mean")


@pytest.mark.parametrize("middle", [nn.Dropout(0.5), nn.Softmax(dim=1), nn.Tanh()])
def test_separable_modules_pass(middle: nn.Module) -> None:
    run(mlp(middle), F.cross_entropy)


@pytest.mark.parametrize("middle", [Centred(), Attends()])
def test_modules_that_mix_records_are_refused(middle: nn.Module) -> None:
    with pytest.raises(PrivacyError, match="its input for a record depends on the other records"):
        run(mlp(middle), F.cross_entropy)


COUPLED = {
    "class_weights": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 2.0])), "class weights"),
    "nll_weights": (lambda out, y: F.nll_loss(out, y, torch.tensor([1.0, 2.0, 2.0])), "class weights"),
    "weights_by_hand": (
        lambda out, y: (F.cross_entropy(out, y, reduction="none") * (w := 1.0 + y)).sum() / w.sum(),
        "a record's gradient depends on the other records",
    ),
    "batch_normaliser": (lambda out, y: F.cross_entropy(out / out.std(), y), "depends on the other records"),
    "contrastive": (lambda out, y: F.cross_entropy(out @ out.t(), torch.arange(len(out))), "depends on the other"),
    "max": (lambda out, y: F.cross_entropy(out, y, reduction="none").max(), "depends on the other records"),
}


@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_couple_records_are_refused(name: str) -> None:
    loss, message = COUPLED[name]
    with pytest.raises(PrivacyError, match=message):
        run(mlp(), loss)


def test_ignored_labels_under_a_mean_are_refused_whenever_they_come() -> None:
    labels = torch.randint(0, 3, (60,))
    labels[::2] = -100
    with pytest.raises(PrivacyError, match="ignore_index=-100"):
        run(mlp(), F.cross_entropy, labels=labels)
    late = torch.randint(0, 3, (60,))
    module, optimizer, loader = make(mlp(), TensorDataset(torch.randn(60, 6), late))
    batches = iter(loader)
    x, y = next(batches)
    F.cross_entropy(module(x), y).backward()
    optimizer.step()
    late.fill_(-100)
    with pytest.raises(PrivacyError, match="ignore_index=-100"):
        next(batches)
    summed = nn.CrossEntropyLoss(reduction="sum")  # couples nothing
    run(mlp(), summed, labels=labels, loss_reduction="sum")


def masked_mean(out: Tensor, y: Tensor) -> Tensor:
    keep = (y > 0).float()
    return (F.cross_entropy(out, y, reduction="none") * keep).sum() / keep.sum()


def hardest(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none").topk(5).values.mean()


def weights_as_a_number(out: Tensor, y: Tensor) -> Tensor:
    w = 1.0 + y
    return (F.cross_entropy(out, y, reduction="none") * w).sum() / w.sum().item()


def bool_mask(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none")[y > 0].mean()


def clips_in_backward(out: Tensor, y: Tensor) -> Tensor:
    out.register_hook(lambda g: g / g.norm())
    return F.cross_entropy(out, y)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("loss", [masked_mean, hardest, weights_as_a_number, bool_mask, clips_in_backward])
def test_couplings_that_one_changed_row_may_not_show(loss, seed: int) -> None:
    torch.manual_seed(seed)
    with pytest.raises(PrivacyError, match=r"depends on|depend on|left torch|out of torch"):
        run(mlp(), loss)


def test_a_mask_that_counts_all_records_passes() -> None:
    run(mlp(), lambda out, y: (F.cross_entropy(out, y, reduction="none") * (y > 0)).mean())


class SequenceFirst(nn.Module):
    """Turns records into positions and back: with as many positions as records, every shape looks right."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :].expand(len(x), len(x), 6).transpose(0, 1)  # [T, B, 6], T = B
        return self.head(torch.tanh(self.layer(x)).transpose(0, 1).mean(1))


def test_layers_whose_rows_are_not_records_are_refused() -> None:
    with pytest.raises(PrivacyError, match="layer 'layer': "):
        run(SequenceFirst(), F.cross_entropy)


class ByCount(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 20 * x / len(x)


def test_a_model_that_divides_by_the_number_of_records_is_refused() -> None:
    with pytest.raises(PrivacyError, match="layer '2': its input for a record depends on the number of records"):
        run(mlp(ByCount()), F.cross_entropy)


@pytest.mark.parametrize("count", [len, lambda y: y.shape[0]])
def test_a_division_by_the_number_of_records_is_explained(count) -> None:
    with pytest.raises(PrivacyError, match=r"follows \d+, the number of records .*: use reduction='mean'"):
        run(mlp(), lambda out, y: F.cross_entropy(out, y, reduction="sum") / count(y))


class KeepsStatistics(nn.Module):
    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.layer = nn.Linear(6, 3)
        self.register_buffer("mean", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(1 - self.momentum).add_(self.momentum * x.detach().mean(0))
        return self.layer(x)


@pytest.mark.parametrize("batch_size", [20, 1])
@pytest.mark.parametrize("momentum", [0.1, 1e-6])
def test_buffers_computed_from_records_are_refused(momentum: float, batch_size: int) -> None:
    with pytest.raises(PrivacyError, match="buffer mean is computed from the records"):
        run(KeepsStatistics(momentum), F.cross_entropy, batch_size=batch_size, poisson_sampling=False)


class Remembers(nn.Module):
    """Hands something of a record to the next one."""

    last: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.last
        self.last = x.detach().mean(0)
        return x


def test_records_that_come_one_by_one_are_probed() -> None:
    with pytest.raises(PrivacyError, match="layer '2': its input for a record depends"):
        run(mlp(Remembers()), F.cross_entropy, batch_size=1, poisson_sampling=False)
    run(mlp(nn.Dropout(0.5)), F.cross_entropy, batch_size=1, poisson_sampling=False)


class Normalises(torch.autograd.Function):
    """The identity; its gradient is of norm 1, over all records together."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g / g.norm()


class Applies(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Normalises.apply(x)


def test_a_backward_that_couples_records_is_refused() -> None:
    with pytest.raises(PrivacyError, match="a record's gradient depends on the other records"):
        run(mlp(Applies()), F.cross_entropy)
    with pytest.raises(PrivacyError, match="the backward of Normalises"):
        run(mlp(), lambda out, y: F.cross_entropy(Normalises.apply(out), y))


def test_a_coupling_is_seen_beside_a_large_column() -> None:
    """Of raw columns: an income, and an indicator that is centred."""
    x = torch.randn(60, 6)
    x[:, 0] *= 1e4
    run(mlp(), F.cross_entropy, x=x)
    with pytest.raises(PrivacyError, match="layer '0': its input for a record depends"):
        run(mlp(), F.cross_entropy, x=x, prepare=lambda x: torch.cat([x[:, :1], x[:, 1:] - x[:, 1:].mean(0)], 1))


@pytest.mark.parametrize("said", ["mean", "sum"])
def test_a_wrong_loss_reduction_is_refused(said: str) -> None:
    real = "sum" if said == "mean" else "mean"
    with pytest.raises(PrivacyError, match=f"loss_reduction='{said}': must be '{real}'"):
        run(mlp(), nn.CrossEntropyLoss(reduction=real), loss_reduction=said)


SCALED = {
    "len": ("sum", lambda losses: losses.sum() / len(losses)),
    "shape": ("sum", lambda losses: losses.sum().mul(1 / losses.shape[0])),
    "in place": ("sum", lambda losses: losses.sum().div_(losses.numel())),
    "a tensor": ("sum", lambda losses: losses.sum() / torch.tensor(float(len(losses)))),
    "each": ("sum", lambda losses: (losses / len(losses)).sum()),
    "half": ("sum", lambda losses: losses.sum() / (2 * len(losses))),
    "root": ("sum", lambda losses: losses.sum() / len(losses) ** 0.5),
    "weights": ("sum", lambda losses: (losses * torch.full((len(losses),), 0.5 / len(losses))).sum()),
    "dot": ("sum", lambda losses: torch.full((len(losses),), 3.0 / len(losses)) @ losses),
    "mean": ("mean", lambda losses: losses.mean() * len(losses)),
    "mean over a constant": ("mean", lambda losses: losses.mean() * (len(losses) / 32)),
}


def train_on_squares(loss_of, loss_reduction: str, epochs: int = 1) -> Iterator[int]:
    """Yields the number of records of each step."""
    records = TensorDataset(torch.randn(100, 4))
    model, optimizer, loader = make(nn.Linear(4, 1), records, loss_reduction=loss_reduction)
    for _ in range(epochs):
        for (x,) in loader:
            optimizer.zero_grad()
            loss_of(model(x).squeeze(1).square()).backward()
            optimizer.step()
            yield len(x)


@pytest.mark.parametrize("name", SCALED)
def test_a_loss_scaled_by_the_number_of_records_is_refused(name: str) -> None:
    """To a replay the number is a constant; one record more, and the gradients of all others change."""
    reduction, loss_of = SCALED[name]
    steps = train_on_squares(loss_of, reduction)
    with pytest.raises(PrivacyError, match=r"loss: it is multiplied or divided by a number that follows \d+, the"):
        next(steps)
        next(steps)  # of another number of records


@pytest.mark.parametrize("divisor", [20, 7.0])
def test_a_sum_divided_by_a_constant_is_a_sum(divisor: float) -> None:
    sizes = list(train_on_squares(lambda losses: losses.sum() / divisor, "sum", epochs=8))
    assert 20 in sizes and len(sizes) == 40


class StartsFromTheFirst(nn.Module):
    """Normalises by statistics of the first batch, kept in one of four ways (Glow's ActNorm: in parameters)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.begun, self.attribute = how, False, torch.zeros(6)
        self.shift = nn.Parameter(torch.zeros(6))
        self.register_buffer("empty", None)

    def forward(self, x: Tensor) -> Tensor:
        if not self.begun:
            self.begun, mean = True, x.detach().mean(0)
            if self.how == "parameter":
                self.shift.data.copy_(mean)
            elif self.how == "attribute":
                self.attribute = mean
            elif self.how == "buffer":
                self.register_buffer("first", mean)
            else:
                self.empty = mean
        kept = {"parameter": self.shift, "attribute": self.attribute, "buffer": getattr(self, "first", 0.0)}
        return x - kept.get(self.how, self.empty) + 0 * self.shift


@pytest.mark.parametrize("how", ["parameter", "attribute", "buffer", "empty"])
def test_statistics_of_the_first_batch_are_refused(how: str) -> None:
    with pytest.raises(PrivacyError, match=r"on the other records|from the records|another output"):
        run(nn.Sequential(StartsFromTheFirst(how), mlp()), F.cross_entropy)


def test_codes_are_replaced_by_others_of_their_own_column() -> None:
    """A column may have fewer values than its neighbour: an embedding would have no row for the code of another."""
    sizes = (7, 2, 1)

    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(size, 3) for size in sizes)
            self.head = nn.Linear(9, 2)

        def forward(self, codes: Tensor) -> Tensor:
            return self.head(torch.cat([table(codes[:, i]) for i, table in enumerate(self.tables)], 1))

    codes = torch.stack([torch.arange(24) % size for size in sizes], 1)
    run(Embeds(), F.cross_entropy, x=codes, labels=torch.arange(24) % 2, batch_size=12)
