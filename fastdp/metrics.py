"""Figures of a model on the evaluation table. They are computed from its rows, and not covered by epsilon."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdp.columns import Column
from fastdp.stacked import Stacked

# Key in report.json -> how people write it. The first that a run has is its headline, the last is drawn beside it.
NAMES = {"accuracy": "accuracy", "auc": "AUC", "log_loss": "log-loss", "rmse": "RMSE", "r2": "R²"}

# A layer's outputs for all rows of a large table would not fit into memory.
ROWS = 16384


@torch.no_grad()
def evaluate(
    model: nn.Module,
    features: Tensor | Stacked,
    labels: Tensor | Stacked,
    target: Column | None = None,
    categories: Stacked | None = None,
) -> dict[str, float]:
    """Figures of `model` on `features` [m, D], and `categories` [m, K] if there are any; NaN where one is undefined.

    labels int64 [m]: accuracy and log-loss (nats), and for two classes the area under the ROC curve.
    labels float32 [m]: root mean squared error and R² of regression. With the `target` column, whose scaled values the
    labels are, in that column's unit; predictions outside of its bounds are clamped, as the targets were.
    """
    was_training = model.training
    model.eval()
    inputs = [x.split(ROWS) for x in (features, categories) if x is not None]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    outputs = torch.cat([model(*(x.to(device) for x in rows)).double().cpu() for rows in zip(*inputs, strict=True)])
    labels = torch.cat(list(labels.split(ROWS)))
    model.train(was_training)
    if labels.is_floating_point():
        return _of_regression(outputs.squeeze(1), labels.double(), target)
    if outputs.shape[1] > 1:
        return {
            "accuracy": (outputs.argmax(1) == labels).double().mean().item(),
            "log_loss": F.cross_entropy(outputs, labels).item(),
        }
    score = outputs.squeeze(1)
    return {
        "accuracy": ((score > 0) == (labels == 1)).double().mean().item(),
        "auc": area_under_roc(score, labels),
        "log_loss": F.binary_cross_entropy_with_logits(score, labels.double()).item(),
    }


def _of_regression(predicted: Tensor, truth: Tensor, target: Column | None) -> dict[str, float]:
    if target is not None:
        predicted, truth = (torch.from_numpy(target.unscaled(scaled.numpy())) for scaled in (predicted, truth))
    error = (predicted - truth).square().mean().item()
    variance = truth.var(correction=0).item()
    # Targets that are all the same have no variance to explain; the rounding of their mean may leave a little.
    undefined = truth.min() == truth.max()
    return {"rmse": math.sqrt(error), "r2": math.nan if undefined else 1 - error / variance}


def area_under_roc(score: Tensor, labels: Tensor) -> float:
    """Probability that a positive scores above a negative, ties half: Mann & Whitney's U over its largest value.

    NaN if there are no positives or no negatives.
    """
    from scipy.stats import rankdata

    positive = labels == 1
    p, n = int(positive.sum()), int((~positive).sum())
    if p == 0 or n == 0:
        return float("nan")
    ranks = torch.from_numpy(rankdata(score.numpy()))
    return ((ranks[positive].sum() - p * (p + 1) / 2) / (p * n)).item()


def describe(keys: list[str], evaluation: str, target: Column | None) -> str:
    """One sentence for the report: what the figures are of."""
    *most, last = [NAMES[key] for key in keys]
    text = f"{', '.join(most)} and {last} are of {evaluation} and not covered by epsilon"
    if target is not None:
        low, high = target.bounds
        text += f"; in the unit of {target.name!r}, targets and predictions clamped to [{low:g}, {high:g}]"
    return text
