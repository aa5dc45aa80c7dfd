"""Where the facade finds the checks and the repair of modules."""

from __future__ import annotations

import copy
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn


def _home() -> Any:
    """The module with ``check``, ``validate`` and, where there is one, ``fix``."""
    return import_module("dptrainer.validation" if find_spec("dptrainer.validation") else "dptrainer.validate")


def check(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises PrivacyViolation if model or optimizer cannot be trained privately."""
    _home().check(model, optimizer)


def problems(model: nn.Module) -> list[Any]:
    """Every problem of a model: ``code``, ``reason`` and ``fix``."""
    found: list[Any] = _home().validate(model)
    return found


def repaired(model: nn.Module) -> nn.Module:
    """A copy in which what has an obvious repair is repaired; a plain copy where this version repairs nothing."""
    twin = copy.deepcopy(model)
    fix = getattr(_home(), "fix", None)
    fixed: nn.Module = twin if fix is None else fix(twin)
    return fixed
