"""``validate`` lists every problem; ``check`` raises them; ``check_step`` is what is asked again at every step."""

from __future__ import annotations

import torch
from torch import nn

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.engine import plain
from dptrainer.validation.layers import layer_problems
from dptrainer.validation.models import mode_problems, parameter_problems, replay_problems, wrapper_problems
from dptrainer.validation.optimizers import foreign_parameters, optimizer_problems
from dptrainer.validation.problem import Problem


def validate(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Problem]:
    """Every problem that can be seen without running the model, layer by layer; empty means none.

    What only a run can show, buffers that forward updates and layers that let examples meet, is found by the probes
    that :class:`~dptrainer.PrivateTrainer` and :func:`~dptrainer.make_private` make on synthetic inputs.

    Args:
        model: in the state in which training will start.
        optimizer: the optimizer that will step it, if it exists already.
    """
    found, model = list[Problem](), plain(model)
    for name, module in model.named_modules():
        found += wrapper_problems(name, module)
        found += layer_problems(name, module)
    found += parameter_problems(model)
    found += replay_problems(model)
    found += mode_problems(model)
    if optimizer is not None:
        found += optimizer_problems(model, optimizer)
    return found


def check(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Raises if :func:`validate` finds anything.

    Raises:
        PrivacyViolation: with the code and fix of the first problem, and all problems in the message.
    """
    found = validate(model, optimizer)
    if not found:
        return
    first, others = found[0], found[1:]
    message, hint = first.reason, first.fix
    if others:
        message += f" ({len(others)} more below.)"
        # One way out for many layers is said once.
        hint += "".join(f"\n  {p.code} {p.reason}" if p.fix == first.fix else f"\n  {p}" for p in others)
    raise PrivacyViolation(message, hint=hint, code=first.code)


def check_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that was given foreign parameters since it was checked; cheap enough for every step.

    Raises:
        PrivacyViolation: it holds parameters that are not the model's (DP011).
    """
    for problem in foreign_parameters(model, optimizer):
        raise PrivacyViolation(problem.reason, hint=problem.fix, code=problem.code)
