"""Test of a criterion of one's own loop, on synthetic outputs: does it do what its declared reduction says?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.engine import Reduction, gradient_scale
from dptrainer.clipping.factory import deterministic_copy, synthetic_like
from dptrainer.isolation import seeded
from dptrainer.losses import Loss
from dptrainer.probe import synthetic_examples
from dptrainer.untested import NOT_MY_CALL, why_untested


def probe_criterion(model: nn.Module, criterion: Loss, reduction: Reduction, batch: object) -> bool:
    """Compare the gradients of a batch with those of its examples alone; False where the criterion cannot be called.

    Args:
        model: a model that keeps examples apart.
        criterion: function of (outputs, target), as the loop calls it.
        reduction: what it is declared to do over the examples.
        batch: one collated synthetic record: ``(input, ..., target)``, or a mapping with ``labels``.

    Raises:
        PrivacyViolation: the gradient of one example, times the batch size for a mean, depends on the other examples
            or on how many there are (DP030).
    """
    names, values = _named_values(batch)
    if not values or any(not isinstance(v, Tensor) or v.dim() == 0 or v.shape[0] != 1 for v in values):
        return False
    device = next(model.parameters()).device
    for example in synthetic_examples([value.to(device) for value in values]):
        *inputs, target = synthetic_like(example)
        outputs = _outputs(model, inputs, names)
        if outputs is None:
            continue
        target = _telling(target, outputs, criterion)
        try:
            together = _gradient(criterion, outputs, target, reduction)
        except NOT_MY_CALL:
            continue
        _compare(criterion, outputs, target, reduction, together)
        return True
    return False


def why_untested_criterion(model: nn.Module, criterion: Loss, batch: object) -> str:
    """What the criterion says to one synthetic record, to be added to a message; empty where it takes it."""
    names, values = _named_values(batch)
    if not values:
        return ""
    *inputs, target = values
    named = dict(zip(names, inputs, strict=True)) if names else {}
    return why_untested(model, lambda out, wanted, _: criterion(out, wanted), () if names else inputs, named, target)


def _named_values(batch: object) -> tuple[list[str], list[Any]]:
    """Names of the inputs, where they have some, and the inputs with the target behind them; nothing if unknown."""
    if isinstance(batch, Mapping) and "labels" in batch:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return list(inputs), [*inputs.values(), batch["labels"]]
    return [], list(batch) if isinstance(batch, tuple | list) and len(batch) >= 2 else []


def _outputs(model: nn.Module, inputs: Sequence[Tensor], names: Sequence[str]) -> Tensor | None:
    twin = deterministic_copy(model)
    try:
        with torch.no_grad(), seeded(twin):
            found = twin(**dict(zip(names, inputs, strict=True))) if names else twin(*inputs)
    except NOT_MY_CALL:
        return None
    return found if isinstance(found, Tensor) and found.dim() > 0 and len(found) == len(inputs[0]) else None


def _telling(target: Tensor, outputs: Tensor, criterion: Any) -> Tensor:
    """Targets of several classes, and some to ignore, since weights and counts of these are shared by a mean."""
    if target.is_floating_point():
        return target
    if target.dim() == 1 and outputs.dim() == 2 and outputs.shape[1] > 1:
        return torch.arange(len(target), device=target.device).remainder(outputs.shape[1]).to(target)
    ignored = getattr(criterion, "ignore_index", None)
    if isinstance(ignored, int) and target[0].numel() > 1:
        target = target.clone()
        target[0].view(-1)[-1] = ignored
    return target


def _gradient(criterion: Loss, outputs: Tensor, target: Tensor, reduction: Reduction) -> Tensor:
    leaf = outputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = criterion(leaf, target).sum()
        (found,) = torch.autograd.grad(loss, leaf)
    return found * gradient_scale(reduction, len(outputs), 1.0)


def _compare(criterion: Loss, outputs: Tensor, target: Tensor, reduction: Reduction, together: Tensor) -> None:
    for index in range(len(outputs)):
        single = slice(index, index + 1)
        try:
            alone = _gradient(criterion, outputs[single], target[single], reduction)[0]
        except NOT_MY_CALL:
            alone = torch.full_like(together[index], float("nan"))  # a loss that needs company
        # The scale of an example counts and not its rounding.
        size = float(together.abs().max().nan_to_num())
        if not torch.allclose(alone, together[index], rtol=1e-3, atol=1e-4 * size, equal_nan=True):
            raise PrivacyViolation(
                f'the gradient of one example depends on the others, or loss_reduction="{reduction}" is not what the '
                "loss does over the examples of a batch; clipping does not bound one example's influence.",
                hint='declare loss_reduction="mean" or "sum"; give outputs and targets the same shape; replace class '
                "weights, ignored targets and batch statistics in a mean by reduction='none' and a mean over examples.",
                code="DP030",
            )
