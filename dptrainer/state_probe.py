"""What a forward pass leaves behind in a model, seen on synthetic inputs: everything that is kept is a release.

The watch on buffers during training goes by torch's version counters, which ``.data`` and NumPy views go around. Here
the values themselves are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.factory import deterministic_copy, synthetic_like
from dptrainer.isolation import seeded
from dptrainer.validation.problem import a_few

Values = dict[str, list[Tensor]]


def probe_state(model: nn.Module, example: Sequence[Tensor], note: Callable[[str], None] | None = None) -> None:
    """Pass two synthetic batches through a copy, and compare what the model holds after the first and the second.

    Only the second counts: tables that are filled once for a length are no trace of an example.

    Args:
        model: can be called with ``example``.
        example: positional inputs [B, ...].
        note: is told of attributes that keep values of examples; they are no part of a state dict.

    Raises:
        PrivacyViolation: a parameter or buffer changed (DP013).
    """
    twin = deterministic_copy(model)
    first = synthetic_like(example)
    second = [t * -1.5 + 1.0 if t.is_floating_point() else t.flip(0) for t in first]
    with torch.no_grad():
        _run(twin, first)
        saved, held = _saved(twin), _held(twin)
        _run(twin, second)
        changed = _changed(saved, _saved(twin))
        kept = _changed(held, _held(twin))
    if changed:
        raise PrivacyViolation(
            f"{a_few(changed)}: values that forward computes from the examples are written into what is saved with the "
            "model, without noise.",
            hint="call .eval() on that layer, or keep no statistics of the data.",
            code="DP013",
        )
    if kept and note is not None:
        note(
            f"DP013 the model keeps values of examples in {a_few(kept)}, which a state dict leaves out. Fix: do not "
            "print or publish them, and save model.state_dict(), not the model."
        )


def _run(twin: nn.Module, inputs: Sequence[Tensor]) -> None:
    with seeded(twin):
        twin(*[tensor.clone() for tensor in inputs])


def _saved(model: nn.Module) -> Values:
    """Copies of all parameters and buffers, those that no state dict holds included."""
    values: Values = {f'parameter "{name}"': [p.detach().clone()] for name, p in model.named_parameters()}
    return values | {f'buffer "{name}"': [b.detach().clone()] for name, b in model.named_buffers()}


def _held(model: nn.Module) -> Values:
    """Copies of the tensors in ordinary attributes, also in lists and mappings."""
    found: Values = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not attribute.startswith("_") and not isinstance(value, nn.Module):
                tensors = [leaf.detach().clone() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
                found[f'"{name}.{attribute}"' if name else f'"{attribute}"'] = tensors
    return found


def _changed(before: Values, after: Values) -> list[str]:
    return [name for name in {**before, **after} if not _same(before.get(name, []), after.get(name, []))]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(first, second, strict=True)
    )
