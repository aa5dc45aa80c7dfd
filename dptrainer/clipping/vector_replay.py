"""Per-example gradients of a module without a rule, all examples at once: ``torch.func.vmap`` over its replay.

It answers only where it is sure: the module vectorises, dimension 0 counts the examples, and the replayed outputs are
the recorded ones. Everything else is left to the loop over single examples, which also says what is wrong. Recurrent
layers go there directly: vmap over them takes an order of magnitude longer than the loop (docs/benchmarks.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def replay_vectorised(
    unit: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    batch_size: int,
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, Tensor] | None:
    """Local parameter name -> [B, *shape] gradients of each example, or None where the loop must answer.

    Args:
        unit: the module.
        args: positional arguments of the call; tensors with B rows are cut into examples, the rest is shared.
        kwargs: keyword arguments, likewise.
        outputs: the tensors it returned.
        grads: the gradient that came back to each output, or None.
        batch_size: B.
        parameters: its trainable parameters.
    """
    leaves, layout = tree_flatten((args, dict(kwargs)))
    if not _vectorises(unit, leaves, outputs, batch_size):
        return None
    dims = [0 if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch_size else None for leaf in leaves]
    fixed = {name: p.detach() for name, p in unit.named_parameters() if name not in parameters}
    fixed |= {name: buffer.detach().clone() for name, buffer in unit.named_buffers()}
    used = [index for index, found in enumerate(grads) if found is not None]

    def pulled_back(chosen: dict[str, Tensor], cotangents: list[Tensor], *single: Any) -> tuple[Tensor, list[Tensor]]:
        rows = [leaf if dim is None else leaf.unsqueeze(0) for leaf, dim in zip(single, dims, strict=True)]
        positional, named = tree_unflatten(rows, layout)
        result = functional_call(unit, {**fixed, **chosen}, positional, named)
        found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        picked = [found[index].squeeze(0) for index in used]
        total = sum(((out * g.to(out.dtype)).sum() for out, g in zip(picked, cotangents, strict=True)), torch.zeros(()))
        return total, picked

    live = {name: p.detach() for name, p in parameters.items()}
    cotangents = [g.detach() for g in grads if g is not None]
    run = vmap(grad(pulled_back, has_aux=True), in_dims=(None, 0, *dims), randomness="error")
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.filterwarnings(
                "ignore", "There is a performance drop"
            )  # a missing batching rule is slow, not wrong
            rows, again = run(live, cotangents, *leaves)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError):
        return None  # not every operation vectorises; the loop does the same work and names real faults
    same = all(_same(found, outputs[index]) for found, index in zip(again, used, strict=True))
    return {name: value.detach() for name, value in rows.items()} if same else None


def _vectorises(unit: nn.Module, leaves: list[Any], outputs: Sequence[Tensor], batch_size: int) -> bool:
    if batch_size < 2 or any(isinstance(module, nn.RNNBase) for module in unit.modules()):
        return False
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    # A square [B, B] may be a mask rather than rows of examples; the loop finds out which.
    if any(t.shape == (batch_size, batch_size) for t in tensors):
        return False
    return all(out.dim() > 0 and out.shape[0] == batch_size for out in outputs)


def _same(found: Tensor, recorded: Tensor) -> bool:
    """Equal up to rounding wherever both are finite."""
    if found.shape != recorded.shape:
        return False
    both = found.isfinite() & recorded.isfinite()
    difference = torch.where(both, found - recorded, torch.zeros_like(found)).abs()
    size = torch.where(both, recorded, torch.zeros_like(recorded)).abs()
    return not difference.numel() or bool(difference.max() <= 1e-3 * size.max() + 1e-6)
