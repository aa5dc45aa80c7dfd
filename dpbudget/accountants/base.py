"""The contract of an accountant: a pure function from charges to a privacy curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dpbudget.curve import PrivacyCurve
from dpbudget.mechanisms import Adjacency, Charge

__all__ = ["Accountant", "Charge"]


class Accountant(Protocol):
    """Counting is pure: no state, no history; the same charges give the same curve."""

    @property
    def name(self) -> str:
        """The name by which plans and the command line choose it."""

    @property
    def version(self) -> int:
        """Raised when an answer could change by more than its bracket."""

    def curve(self, charges: Sequence[Charge], adjacency: Adjacency) -> PrivacyCurve:
        """The privacy curve of the composition of ``charges``.

        Raises:
            NotComputable: a mechanism or adjacency is not supported (DP062).
        """
