"""Opacus's names for what is wrong with a module; all are errors of this package, with code and way out."""

from __future__ import annotations

from collections.abc import Sequence

from dpbudget.errors import PrivacyViolation


class UnsupportedError(PrivacyViolation, ValueError):
    """Something cannot be trained privately; nothing was charged or changed."""


class UnsupportedModuleError(UnsupportedError):
    """A module cannot be trained privately.

    Attributes:
        errors: every problem, where several were found.
    """

    errors: tuple[UnsupportedModuleError, ...] = ()

    @classmethod
    def of(cls, errors: Sequence[UnsupportedModuleError]) -> UnsupportedModuleError:
        """One error for several."""
        first, *others = errors
        more = "".join(f"\n  {error}" for error in others)
        whole = cls(first.message, hint=first.hint + more, code=first.code)
        whole.errors = tuple(errors)
        return whole


class ShouldReplaceModuleError(UnsupportedModuleError):
    """A layer that mixes examples; ``ModuleValidator.fix`` may know a replacement."""


class IllegalModuleConfigurationError(UnsupportedModuleError):
    """A module in a state in which it cannot be trained privately: eval mode, running statistics."""


class NotYetSupportedModuleError(UnsupportedModuleError):
    """A layer or parameter that this engine cannot clip."""
