"""What is said where a test at set-up was not possible, and how the call with synthetic values failed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dpbudget.errors import DPBudgetError, DPBudgetWarning
from dptrainer.clipping.factory import deterministic_copy
from dptrainer.isolation import seeded

# What a model raises when it is not called in the way that the probe guesses.
NOT_MY_CALL = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError)


def tell_untested(what: str, note: Callable[[str], None] | None) -> None:
    """Say that a test at set-up was not possible: to ``note``, or as a warning, but never in silence.

    Clipping bounds nobody's influence in a model that mixes examples, so whoever uses it must know that nobody looked.
    """
    if note is None:
        warnings.warn(f"{what} Pass note=print to read this as a note.", DPBudgetWarning, stacklevel=callers_level())
    else:
        note(what)


def callers_level() -> int:
    """The ``stacklevel`` of the first line that is not of this package, for a warning of the function that asks."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    return level


def failure(call: Callable[[], object]) -> str:
    """How a call with synthetic values fails, to be added to a message; empty where it does not.

    What this package refuses is left to be refused where it happens.
    """
    try:
        call()
    except DPBudgetError:
        return ""
    except NOT_MY_CALL as error:
        said = str(error).strip().partition("\n")[0].rstrip(".")
        return f" The call failed: {type(error).__name__}: {said:.200}."
    return ""


def call_twin(model: nn.Module, args: Sequence[object], named: Mapping[str, object]) -> Any:
    """What a copy of the model gives for one synthetic record; the model and the random streams stay as they were."""
    twin = deterministic_copy(model)
    values, more = _on_device_of(model, (tuple(args), dict(named)))
    with torch.no_grad(), seeded(twin):
        return twin(*values, **more)


def _on_device_of(model: nn.Module, values: Any) -> Any:
    device = next(model.parameters()).device
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, values)


def why_untested(
    model: nn.Module,
    loss: Callable[[Any, Any, int], Tensor],
    inputs: Sequence[object],
    named: Mapping[str, object],
    target: object,
) -> str:
    """What model or loss say to one synthetic record, to be added to a message; empty where they take it."""
    return failure(lambda: loss(call_twin(model, inputs, named), _on_device_of(model, target), 1))
