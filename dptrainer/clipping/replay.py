"""Per-example gradients of a module without a rule: it is run again, under vmap or one example at a time.

The module is a unit: everything inside it is differentiated together, so bare parameters, parametrisations and layers
with a forward of their own are right without a rule. The replay must repeat what the forward pass computed; where it
does not (dropout, an internal counter) it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.vector_replay import replay_vectorised


@dataclass(frozen=True)
class UnitCall:
    """One forward call of a unit, with the gradients that came back to its outputs.

    Attributes:
        name: the unit's name in the model.
        args: positional arguments; tensors with B rows are cut into examples, everything else is shared.
        kwargs: keyword arguments, likewise.
        outputs: the tensors it returned, in order.
        grads: for each of them the gradient, or None where none came back.
        batch_size: B >= 1.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    batch_size: int


def replay(unit: nn.Module, call: UnitCall, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Local parameter name -> [B, *shape] gradients of each example.

    Raises:
        PrivacyViolation: (DP019) the replay computes something else than the forward pass did; (DP030) an output does
            not have one slice per example.
    """
    at_once = replay_vectorised(unit, call.args, call.kwargs, call.outputs, call.grads, call.batch_size, parameters)
    if at_once is not None:
        return at_once
    fixed = {name: p.detach() for name, p in unit.named_parameters() if name not in parameters}
    fixed |= {name: buffer.detach().clone() for name, buffer in unit.named_buffers()}
    live = {name: p.detach().requires_grad_() for name, p in parameters.items()}

    def gradient(index: int, square_is_shared: bool) -> list[Tensor]:
        def cut(leaf: Any) -> Any:
            return _example(leaf, index, call.batch_size, square_is_shared)

        args, kwargs = tree_map(cut, (call.args, dict(call.kwargs)))
        with torch.enable_grad():
            result = functional_call(unit, {**fixed, **live}, args, kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return _one_gradient(call, outputs, index, list(live.values()))

    shared = False
    try:
        first = gradient(0, shared)
    except (RuntimeError, ValueError, AssertionError, PrivacyViolation):
        # As many positions as examples: a mask [T, T] looks like rows of examples. The output tells which it is.
        if not _has_square(call):
            raise
        shared = True
        first = gradient(0, shared)
    rows = [first, *(gradient(index, shared) for index in range(1, call.batch_size))]
    return {name: torch.stack(list(grads)) for name, grads in zip(live, zip(*rows, strict=True), strict=True)}


def _is_square(leaf: Any, batch_size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.shape == (batch_size, batch_size)


def _has_square(call: UnitCall) -> bool:
    return any(_is_square(leaf, call.batch_size) for leaf in tree_leaves((call.args, dict(call.kwargs))))


def _example(leaf: Any, index: int, batch_size: int, square_is_shared: bool) -> Any:
    """A batch of one, where the leaf is a tensor with one row per example."""
    if square_is_shared and _is_square(leaf, batch_size):
        return leaf
    if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch_size:
        return leaf[index : index + 1]
    return leaf


def _one_gradient(call: UnitCall, outputs: list[Tensor], index: int, live: list[Tensor]) -> list[Tensor]:
    """Gradients of one example, zero where a parameter was not used."""
    roots, cotangents = [], []
    if len(outputs) != len(call.outputs):
        raise _differs(call)
    for single, whole, grad in zip(outputs, call.outputs, call.grads, strict=True):
        if grad is None:
            continue
        dim = _batch_dim(call, single, whole)
        _compare(call, single.detach(), whole.narrow(dim, index, 1))
        if single.requires_grad:
            roots.append(single)
            cotangents.append(grad.narrow(dim, index, 1).to(single.dtype))
    if not roots:
        return [torch.zeros_like(p) for p in live]
    found = torch.autograd.grad(roots, live, cotangents, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(live, found, strict=True)]


def _batch_dim(call: UnitCall, single: Tensor, whole: Tensor) -> int:
    """The dimension in which one example has size 1 and the batch has size B."""
    if single.dim() == whole.dim():
        expected = list(single.shape)
        for dim, size in enumerate(whole.shape):
            if size == call.batch_size and expected[dim] == 1:
                rest = [*expected[:dim], size, *expected[dim + 1 :]]
                if rest == list(whole.shape):
                    return dim
    raise PrivacyViolation(
        f'module "{call.name}" returned shape {list(single.shape)} for one example, and for the batch a shape in which '
        "no dimension counts the examples.",
        hint="keep the examples in dimension 0 of its inputs and outputs.",
        code="DP030",
    )


def _compare(call: UnitCall, single: Tensor, whole: Tensor) -> None:
    """The replayed output must be the recorded one up to rounding, wherever both are finite."""
    both = single.isfinite() & whole.isfinite()
    difference = torch.where(both, single - whole, torch.zeros_like(single)).abs()
    size = torch.where(both, whole, torch.zeros_like(whole)).abs()
    if difference.numel() and difference.max() > 1e-3 * size.max() + 1e-6:
        raise _differs(call)


def _differs(call: UnitCall) -> PrivacyViolation:
    return PrivacyViolation(
        f'module "{call.name}" has no rule and does not give the same output twice (dropout, or state).',
        hint="set its dropout to 0, move the dropout out of it, or register a rule for it with @rule.",
        code="DP019",
    )
