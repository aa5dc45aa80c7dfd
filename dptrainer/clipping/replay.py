"""Per-example gradients of a module without a rule: it is run again, under vmap or one example at a time.

The module is a unit: everything inside it is differentiated together, so bare parameters, parametrisations and layers
with a forward of their own are right without a rule. The replay must repeat what the forward pass computed. A module
that does not (dropout, an internal counter) is refused. One that does, but not for some example, is not stopped by it,
since an error would tell of that example: the example contributes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_unflatten

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.arguments import Layout, arguments_of, form_of
from dptrainer.clipping.vector_replay import replay_vectorised, same_rows

#: Gradients by local name, and [B] whether the replay of each example repeated the forward pass.
Replayed = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class UnitCall:
    """One forward call of a unit, with the gradients that came back to its outputs.

    Attributes:
        name: the unit's name in the model.
        args: positional arguments; which of their tensors are cut into examples, :mod:`.arguments` says.
        kwargs: keyword arguments, likewise.
        outputs: the tensors it returned, in order.
        grads: for each of them the gradient, or None where none came back.
        batch_size: B >= 1.
        ordinal: how many calls of the unit came before in this batch.
        autocast: device and type of the autocast that it ran under, or None.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    batch_size: int
    ordinal: int = 0
    autocast: tuple[str, torch.dtype] | None = None

    @property
    def tolerance(self) -> float:
        """Largest difference between replay and forward pass that is rounding, in units of a row's largest entry."""
        types = [leaf.dtype for leaf in tree_leaves((self.args, dict(self.kwargs), list(self.outputs))) if _real(leaf)]
        types += [] if self.autocast is None else [self.autocast[1]]
        return max(1e-3, *(16 * torch.finfo(dtype).eps for dtype in types)) if types else 1e-3


def _real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def replay(unit: nn.Module, call: UnitCall, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Local parameter name -> [B, *shape] gradients of each example.

    Those of an example whose output does not come out again are NaN: the engine gives it the factor 0.

    Raises:
        PrivacyViolation: (DP019) the replay has never computed what the forward pass did; (DP030) an output does
            not have one slice per example, or an argument another number of rows.
    """
    leaves, _, form = form_of(call.args, call.kwargs)
    known = arguments_of(unit)
    layouts = known.layouts(call.name, leaves, form, call.ordinal, call.batch_size)
    with _as_recorded(call.autocast):
        (grads, same), layout = _best(unit, call, parameters, layouts)
    if bool(same.any()):
        known.repeats = True
        known.note(leaves, form, call.ordinal, call.batch_size, layout)
    elif not known.repeats:
        raise _differs(call)
    return {name: torch.where(same.view(-1, *[1] * (rows.dim() - 1)), rows, torch.nan) for name, rows in grads.items()}


@contextmanager
def _as_recorded(autocast: tuple[str, torch.dtype] | None) -> Iterator[None]:
    if autocast is None:
        yield
        return
    # Without the cache, which would hold on to weights of a finished vmap.
    with torch.autocast(autocast[0], dtype=autocast[1], cache_enabled=False):
        yield


def _best(
    unit: nn.Module, call: UnitCall, parameters: Mapping[str, nn.Parameter], layouts: Sequence[Layout]
) -> tuple[Replayed, Layout]:
    """The replay under the layout that repeats the forward pass for most examples, and that layout.

    After a set-up there is no choice: one layout is given.

    Raises:
        Exception: of the first layout, where the unit runs under none.
    """
    best: tuple[Replayed, Layout] | None = None
    failure: Exception | None = None
    for layout in layouts:
        try:
            found = _under(unit, call, parameters, layout)
        except (RuntimeError, ValueError, AssertionError, PrivacyViolation) as error:
            failure = error if failure is None else failure
            continue
        if best is None or int(found[1].sum()) > int(best[0][1].sum()):
            best = found, layout
        if len(layouts) == 1 or bool(best[0][1].all()):
            break
    if best is None:
        assert failure is not None  # noqa: S101  (there is at least one layout)
        raise failure
    return best


def _under(unit: nn.Module, call: UnitCall, parameters: Mapping[str, nn.Parameter], layout: Layout) -> Replayed:
    """The replay with these arguments cut into examples: at once where that is sure, else one at a time."""
    at_once = replay_vectorised(
        unit, call.args, call.kwargs, call.outputs, call.grads, layout, parameters, call.tolerance
    )
    if at_once is not None:
        return at_once
    fixed = {name: p.detach() for name, p in unit.named_parameters() if name not in parameters}
    fixed |= {name: buffer.detach().clone() for name, buffer in unit.named_buffers()}
    live = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    leaves, spec, _ = form_of(call.args, call.kwargs)

    def gradient(index: int) -> tuple[list[Tensor], Tensor]:
        single = [leaf[index : index + 1] if cut else leaf for leaf, cut in zip(leaves, layout, strict=True)]
        args, kwargs = tree_unflatten(single, spec)
        with torch.enable_grad():
            result = functional_call(unit, {**fixed, **live}, args, kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return _one_gradient(call, outputs, index, list(live.values()))

    rows, same = zip(*(gradient(index) for index in range(call.batch_size)), strict=True)
    grads = {name: torch.stack(list(found)) for name, found in zip(live, zip(*rows, strict=True), strict=True)}
    return grads, torch.cat(same)


def _one_gradient(call: UnitCall, outputs: list[Tensor], index: int, live: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Gradients of one example, zero where a parameter was not used; and [1] whether its outputs came out again."""
    roots, cotangents = [], []
    if len(outputs) != len(call.outputs):
        raise _differs(call)
    same = torch.ones(1, dtype=torch.bool, device=live[0].device)
    for single, whole, grad in zip(outputs, call.outputs, call.grads, strict=True):
        if grad is None:
            continue
        dim = _batch_dim(call, single, whole)
        pair = (single.detach().transpose(0, dim), whole.narrow(dim, index, 1).transpose(0, dim))
        same &= same_rows(*pair, call.tolerance)
        if single.requires_grad:
            roots.append(single)
            cotangents.append(grad.narrow(dim, index, 1).to(single.dtype))
    if not roots:
        return [torch.zeros_like(p) for p in live], same
    found = torch.autograd.grad(roots, live, cotangents, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(live, found, strict=True)], same


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


def _differs(call: UnitCall) -> PrivacyViolation:
    return PrivacyViolation(
        f'module "{call.name}" has no rule and does not give the same output twice (dropout, or state).',
        hint="set its dropout to 0, move the dropout out of it, or register a rule for it with @rule.",
        code="DP019",
    )
