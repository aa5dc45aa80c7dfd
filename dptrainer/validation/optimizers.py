"""Problems of an optimizer: it must step exactly the trainable parameters, once per receipt."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dptrainer.clipping.engine import trainable_parameters
from dptrainer.validation.problem import Problem, a_few


def optimizer_problems(model: nn.Module, optimizer: object) -> Iterator[Problem]:
    """Everything about the optimizer that :func:`dptrainer.validate` lists."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        reason = f"the optimizer is {type(optimizer).__name__}, not a torch.optim.Optimizer."
        yield Problem("", "DP011", reason, "pass the optimizer itself, for example torch.optim.SGD(...).")
        return
    yield from foreign_parameters(model, optimizer)
    held, own = _held(optimizer), {id(p) for p in model.parameters()}
    left_out = [name for name, p in trainable_parameters(model).items() if id(p) not in held]
    if left_out and held & own:
        reason = f"the optimizer omits {a_few(left_out)}, which still require grad."
        yield Problem("", "DP012", reason, "freeze them with requires_grad_(False), or pass them to the optimizer.")
    if isinstance(optimizer, torch.optim.LBFGS):
        reason = "LBFGS evaluates the loss several times per step, and each evaluation is a release."
        yield Problem("", "DP017", reason, "use SGD or Adam.")
    if isinstance(optimizer, torch.optim.SparseAdam):
        reason = "SparseAdam takes sparse gradients alone, and noise is on every row."
        yield Problem("", "DP019", reason, "use Adam.")
    if any(kind.__module__.startswith("torch.distributed") for kind in type(optimizer).__mro__):
        reason = f"{type(optimizer).__name__} shares its state between ranks, each of which would add whole noise."
        yield Problem("", "DP019", reason, "train in one process, with an optimizer of torch.optim.")


def foreign_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Problem]:
    """Parameters that the optimizer would step with gradients that nobody clipped."""
    held, own = _held(optimizer), {id(p) for p in model.parameters()}
    foreign = len(held - own)
    if foreign:
        none = ", none belong to this model (was it built before the model was changed?)" if not held & own else ""
        reason = f"the optimizer holds {len(held)} tensors, {foreign} of them foreign{none}."
        yield Problem("", "DP011", reason, "build the optimizer from model.parameters() after the last change.")


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
