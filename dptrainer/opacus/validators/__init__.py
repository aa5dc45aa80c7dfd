"""Validation and repair of modules under Opacus's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from dptrainer.opacus.validators.errors import UnsupportedModuleError
from dptrainer.opacus.validators.module_validator import ModuleValidator

Targets = type[nn.Module] | Sequence[type[nn.Module]]
Validator = Callable[[Any], list[UnsupportedModuleError]]
Fixer = Callable[..., nn.Module]


def register_module_validator(target_class_or_classes: Targets) -> Callable[[Validator], Validator]:
    """Registers a function of a module that returns its problems, beside the checks that are always made."""

    def register(validator: Validator) -> Validator:
        ModuleValidator.VALIDATORS.update(dict.fromkeys(_classes(target_class_or_classes), validator))
        return validator

    return register


def register_module_fixer(target_class_or_classes: Targets) -> Callable[[Fixer], Fixer]:
    """Registers a function of a module that returns its replacement; it goes before the built-in ones."""

    def register(fixer: Fixer) -> Fixer:
        ModuleValidator.FIXERS.update(dict.fromkeys(_classes(target_class_or_classes), fixer))
        return fixer

    return register


def _classes(targets: Targets) -> tuple[type[nn.Module], ...]:
    return tuple(targets) if isinstance(targets, Sequence) else (targets,)


__all__ = ["ModuleValidator", "register_module_fixer", "register_module_validator"]
