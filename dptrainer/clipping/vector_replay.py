"""Per-example gradients of a module without a rule, all examples at once: ``torch.func.vmap`` over its replay.

It answers only where it is sure: the module vectorises, dimension 0 counts the examples, and replayed outputs are
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
    examples: Sequence[bool],
    parameters: Mapping[str, nn.Parameter],
    tolerance: float,
) -> tuple[dict[str, Tensor], Tensor] | None:
    """Local parameter name -> [B, *shape] gradients of each example, or None where the loop must answer.

    Args:
        unit: the module.
        args: positional arguments of the call.
        kwargs: keyword arguments.
        outputs: the tensors it returned.
        grads: the gradient that came back to each output, or None.
        examples: for each leaf of the flattened arguments whether its rows are examples; the rest is shared.
        parameters: its trainable parameters.
        tolerance: see :func:`same_rows`.

    Returns:
        The gradients, and [B] whether the replay of each example repeated the forward pass.
    """
    leaves, layout = tree_flatten((args, dict(kwargs)))
    size = next((leaf.shape[0] for leaf, cut in zip(leaves, examples, strict=True) if cut), 0)
    if not _vectorises(unit, outputs, size):
        return None
    dims = [0 if cut else None for cut in examples]
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
    if any(found.shape != outputs[index].shape for found, index in zip(again, used, strict=True)):
        return None
    same = torch.ones(size, dtype=torch.bool, device=outputs[0].device)
    for found, index in zip(again, used, strict=True):
        same &= same_rows(found.detach(), outputs[index], tolerance)
    return ({name: value.detach() for name, value in rows.items()}, same) if bool(same.any()) else None


def _vectorises(unit: nn.Module, outputs: Sequence[Tensor], batch_size: int) -> bool:
    if batch_size < 1 or any(isinstance(module, nn.RNNBase) for module in unit.modules()):
        return False
    return bool(outputs) and all(out.dim() > 0 and out.shape[0] == batch_size for out in outputs)


def same_rows(found: Tensor, recorded: Tensor, tolerance: float) -> Tensor:
    """[B]: whether each row is the recorded one up to rounding, measured by the size of that row and of no other.

    Args:
        found: [B, ...].
        recorded: [B, ...].
        tolerance: largest difference in units of the row's largest entry.
    """
    found, recorded = (t.reshape(t.shape[0], -1) for t in (found, recorded))
    if not found.shape[1]:
        return torch.ones(len(found), dtype=torch.bool, device=found.device)
    wide = torch.promote_types(torch.promote_types(found.dtype, recorded.dtype), torch.float32)
    found, recorded = found.to(wide), recorded.to(wide)
    finite = found.isfinite() & recorded.isfinite()
    zero = torch.zeros((), dtype=wide, device=found.device)
    size = torch.where(finite, recorded, zero).abs().amax(1, keepdim=True)
    close = torch.where(finite, (found - recorded).abs() <= tolerance * size + 1e-6, False)
    return (close | (found == recorded) | (found.isnan() & recorded.isnan())).all(1)
