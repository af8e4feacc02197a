"""Models by name, or from the user's own code."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn

from fastdp import attributes
from fastdp.errors import ArgumentError, require

FORMS = "mlp:H1,H2,... with positive integers, logistic, or module:attribute"


def build_model(spec: str, record: Sequence[int], outputs: int, categories: Sequence[int] = ()) -> nn.Module:
    """A model of records of shape `record`, with `outputs` logits (or predictions) each.

    spec: `mlp:64,32`; `logistic`, without hidden layers; or module:attribute, an nn.Module, of which a copy is trained,
        or a callable(inputs: int, outputs: int) that returns one (so a subclass of nn.Module will do), where inputs is
        the number of features. With `categories`, the sizes of the vocabularies of a prepared table's codes, it is
        called with these too, and the model with features and codes.
    """
    kind, _, sizes = spec.partition(":")
    if kind != "mlp" and attributes.is_spec(spec):
        return _from_attribute(spec, record, outputs, categories)
    bound = "module:attribute: the table has codes of categories, which these models do not take"
    require(not categories, "model", spec, bound)
    hidden: list[int] = []
    if kind == "mlp":
        fields = sizes.split(",")
        good = all(field.isdecimal() and int(field) > 0 for field in fields)
        require(good, "model", spec, FORMS)
        hidden = [int(field) for field in fields]
    else:
        require(spec == "logistic", "model", spec, FORMS)
    layers: list[nn.Module] = [nn.Flatten()] if len(record) > 1 else []
    widths = [math.prod(record), *hidden]
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), nn.Tanh()]  # bounded: Papernot et al. 2020, arXiv:2007.14191
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def _from_attribute(spec: str, record: Sequence[int], outputs: int, categories: Sequence[int]) -> nn.Module:
    found = attributes.find("model", spec)
    given = "inputs: int, outputs: int" + (", category_sizes: tuple[int, ...]" if categories else "")
    expected = f"an nn.Module, or a callable({given}) that returns one"
    if isinstance(found, nn.Module):
        model = copy.deepcopy(found)
    else:
        require(callable(found), "model", spec, f"{expected}; it is a {type(found).__name__}")
        made = attributes.call(
            "model", spec, found, expected, math.prod(record), outputs, *([tuple(categories)] if categories else [])
        )
        require(isinstance(made, nn.Module), "model", spec, f"{expected}; it returned a {type(made).__name__}")
        model = made
    shape = "x".join(map(str, record))
    try:
        with torch.no_grad():
            codes = [torch.zeros(2, len(categories), dtype=torch.int32)] if categories else []
            made = model(torch.zeros(2, *record), *codes)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ArgumentError("model", spec, f"a model of records of {shape} features ({reason})") from error
    got = tuple(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
    bound = f"a model that gives [rows, {outputs}] for [rows, {shape}]; for 2 rows it gave {got}"
    require(got == (2, outputs), "model", spec, bound)
    return model
