"""Tests of a model on synthetic inputs at set-up, before any record is used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dptrainer.clipping.factory import deterministic_copy, self_test, synthetic_like
from dptrainer.validate import isolation_test

# What a model raises when it is not called in the way that the probe guesses.
_NOT_MY_CALL = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError)


def probe(model: nn.Module, inputs: Sequence[object], replay: Sequence[nn.Module] = ()) -> bool:
    """Test isolation and clipping of ``model(*inputs)`` on synthetic inputs; False where that is not possible.

    A model that cannot be called with these inputs, or that draws random numbers outside of layers whose randomness can
    be switched off, is not tested. The model and the random streams stay as they were.

    Args:
        model: in the state in which training will start.
        inputs: positional inputs with the right shapes and types; their floating-point values are not used.
        replay: as for :class:`~dptrainer.clipping.BookKeeping`.

    Raises:
        PrivacyViolation: one example reaches another's output (DP033), a buffer follows the data (DP013), or clipping
            differs from the reference (DP019, DP030).
    """
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if not tensors or len(tensors) != len(inputs) or not _runs_repeatably(model, tensors):
        return False
    device = next(model.parameters()).device
    example = [tensor.to(device) for tensor in tensors]
    isolation_test(model, example)
    self_test(model, example, replay=replay)
    return True


def _runs_repeatably(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    device = next(model.parameters()).device
    twin = deterministic_copy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            example = synthetic_like([tensor.to(device) for tensor in inputs])
            first, second = tree_leaves(twin(*example)), tree_leaves(twin(*example))
        except _NOT_MY_CALL:
            return False
    pairs = [(a, b) for a, b in zip(first, second, strict=False) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return bool(pairs) and all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
