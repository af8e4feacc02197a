"""`module:attribute` on the command line: datasets and models from the user's own code."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from fastdp.errors import ArgumentError

FORM = "module:attribute, of a module that can be imported from here"


def is_spec(text: str) -> bool:
    """Whether `text` has the form of module:attribute."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", text) is not None


def find(argument: str, spec: str) -> Any:
    """The attribute; what the module itself raises comes through, with its traceback."""
    module, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()  # the module may be younger than the interpreter's look at the folder
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ArgumentError(argument, spec, f"{FORM} ({' '.join(str(error).split())})") from error
    if not hasattr(found, name):
        raise ArgumentError(argument, spec, f"{FORM}; {module} has no attribute {name}")
    return getattr(found, name)


def call(argument: str, spec: str, function: Callable[..., Any], expected: str, *values: Any) -> Any:
    """function(*values); ArgumentError if its signature does not allow that, `expected` says what would."""
    try:
        inspect.signature(function).bind(*values)
    except TypeError as error:
        raise ArgumentError(argument, spec, f"{expected} ({error})") from None
    except ValueError:  # no signature to be had, of a callable in C: then the call tells
        pass
    return function(*values)
