"""The checks and the repair of modules, as the facade needs them."""

from __future__ import annotations

import copy

from torch import nn

from dptrainer.validation import Problem, check, fix, validate

__all__ = ["check", "problems", "repaired"]


def problems(model: nn.Module) -> list[Problem]:
    """Every problem of a model: ``code``, ``reason`` and ``fix``."""
    return validate(model)


def repaired(model: nn.Module) -> nn.Module:
    """A copy in which what has an obvious repair is repaired."""
    return fix(copy.deepcopy(model))
