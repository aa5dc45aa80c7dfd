"""Per-example gradients to look at: for public and synthetic data, never for private ones.

A gradient, a norm or a second moment of a private example is private, and so is every number computed from it: a
histogram, a clipping threshold chosen by it, a plot. Nothing here adds noise, asks for a receipt or charges anything.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dptrainer.clipping import BookKeeping, PerExample
from dptrainer.clipping.engine import plain, trainable_parameters
from dptrainer.data import split_batch, to_device
from dptrainer.loop import refuse_open_batch
from dptrainer.losses import Loss, PerExampleLoss


def per_example_gradients(
    model: nn.Module, loss_fn: Loss, batch: Any, *, replay: Sequence[nn.Module] = ()
) -> dict[str, Tensor]:
    """Parameter name -> [B, *shape]: the gradient of each example's loss. For public or synthetic data only.

    **What it returns is private if the batch is**, without any noise. Second moments and variances over the examples
    follow: ``grads[name].square().mean(0)``, ``grads[name].var(0)``. Zeros where no gradient came.

    Args:
        model: stays as it is; layers in train or eval mode act as in that mode.
        loss_fn: criterion of (outputs, target), see :class:`~dptrainer.losses.PerExampleLoss`.
        batch: ``(input, ..., target)`` or a mapping with ``labels``, with the examples in dimension 0.
        replay: as for :class:`~dptrainer.clipping.BookKeeping`.

    Raises:
        PrivacyViolation: a private batch of this model is open (DP031); model or loss cannot be split into examples
            (DP019, DP030).
    """
    model = plain(model)
    size, found = _forms(model, loss_fn, batch, replay)
    return {
        name: found[name].dense(slice(0, size)) if name in found else parameter.new_zeros(size, *parameter.shape)
        for name, parameter in trainable_parameters(model).items()
    }


def per_example_norms(model: nn.Module, loss_fn: Loss, batch: Any, *, replay: Sequence[nn.Module] = ()) -> Tensor:
    """[B] float64: the Euclidean norm of each example's gradient over all trainable parameters.

    For public or synthetic data only: to choose a clipping norm before the plan is made. Most layers do not instantiate
    the gradients for it. Arguments and errors are those of :func:`per_example_gradients`.
    """
    size, found = _forms(model, loss_fn, batch, replay)
    squares = [form.squared_norms() for form in found.values()]
    return torch.stack(squares).sum(0).sqrt() if squares else torch.zeros(size, dtype=torch.float64)


def _forms(
    model: nn.Module, loss_fn: Loss, batch: Any, replay: Sequence[nn.Module]
) -> tuple[int, dict[str, PerExample]]:
    model = plain(model)
    refuse_open_batch(model)
    paths = {id(module): name for name, module in model.named_modules()}
    twin = copy.deepcopy(model)
    twin.training = True  # the engine records training alone; the layers inside keep their modes
    inputs, named, target = split_batch(to_device(batch, next(model.parameters()).device))
    size = len(target)
    engine = BookKeeping(twin, clip_norm=1.0, replay=[twin.get_submodule(paths[id(part)]) for part in replay])
    try:
        with torch.enable_grad(), engine.record(size):
            losses = PerExampleLoss(loss_fn)(twin(*inputs, **named), target, size)
        return size, engine.per_example(losses)
    finally:
        engine.detach()
