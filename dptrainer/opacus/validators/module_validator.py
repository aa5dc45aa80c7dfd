"""``ModuleValidator``: the checks of ``dptrainer.validate`` with Opacus's methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from dptrainer.opacus._validation import problems, repaired
from dptrainer.opacus.validators.errors import (
    IllegalModuleConfigurationError,
    NotYetSupportedModuleError,
    ShouldReplaceModuleError,
    UnsupportedModuleError,
)

_KINDS = {
    "DP010": ShouldReplaceModuleError,
    "DP013": IllegalModuleConfigurationError,
    "DP014": IllegalModuleConfigurationError,
}


class ModuleValidator:
    """Says what keeps a module from private training, and replaces what can be replaced.

    Attributes:
        VALIDATORS, FIXERS: further checks and replacements by class, see :mod:`dptrainer.opacus.validators`.
    """

    VALIDATORS: ClassVar[dict[type[nn.Module], Callable[[Any], list[UnsupportedModuleError]]]] = {}
    FIXERS: ClassVar[dict[type[nn.Module], Callable[..., nn.Module]]] = {}

    @classmethod
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[UnsupportedModuleError]:
        """Every problem that can be seen without running the module.

        Raises:
            UnsupportedModuleError: there is one, and ``strict`` is set.
        """
        found: list[UnsupportedModuleError] = [
            _KINDS.get(problem.code, NotYetSupportedModuleError)(problem.reason, hint=problem.fix, code=problem.code)
            for problem in problems(module)
        ]
        for part in module.modules():
            found += cls.VALIDATORS[type(part)](part) if type(part) in cls.VALIDATORS else []
        if strict and found:
            raise UnsupportedModuleError.of(found)
        return found

    @classmethod
    def is_valid(cls, module: nn.Module) -> bool:
        """Whether :meth:`validate` finds nothing."""
        return not cls.validate(module)

    @classmethod
    def fix(cls, module: nn.Module, **kwargs: Any) -> nn.Module:
        """A copy of the module in which layers that mix examples are replaced; as ``dptrainer.fix`` does in place.

        Recurrent layers and attention stay as they are: they train privately unmodified. Build the optimizer from the
        copy.

        Args:
            module: stays as it is.
            **kwargs: for the registered fixers, as in Opacus.
        """
        fixed = copy.deepcopy(module)
        if type(fixed) in cls.FIXERS:
            fixed = cls.FIXERS[type(fixed)](fixed, **kwargs)
        for parent in list(fixed.modules()):
            for name, child in list(parent.named_children()):
                if type(child) in cls.FIXERS:
                    setattr(parent, name, cls.FIXERS[type(child)](child, **kwargs))
        return repaired(fixed)

    @classmethod
    def fix_and_validate(cls, module: nn.Module, **kwargs: Any) -> nn.Module:
        """:meth:`fix`, then :meth:`validate`.

        Raises:
            UnsupportedModuleError: something is left that cannot be replaced.
        """
        fixed = cls.fix(module, **kwargs)
        cls.validate(fixed, strict=True)
        return fixed
