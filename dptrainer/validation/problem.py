"""One reason why a model or an optimizer cannot be trained privately, and how names are written in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Problem:
    """One reason why the model or optimizer cannot be trained privately.

    Attributes:
        module_name: the layer's or parameter's name in the model; "" for the model as a whole or the optimizer.
        code: stable code, a key of ``dpbudget.errors.CODES``.
        reason: what is wrong, with names and values.
        fix: the way out, in one line.
    """

    module_name: str
    code: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.code} {self.reason} Fix: {self.fix}"


def layer_title(name: str, module: nn.Module) -> str:
    """How messages name a module: ``layer "1" (BatchNorm1d)``, ``the model (Linear)``."""
    kind = type(module).__name__
    return f'layer "{name}" ({kind})' if name else f"the model ({kind})"


def a_few(names: Sequence[str]) -> str:
    """The first four names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
