"""Randomised response on a finite alphabet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from dpbudget._record import HexFloat
from dpbudget.mechanisms._atoms import AtomicPair
from dpbudget.mechanisms.base import Adjacency, Mechanism, unproved


@dataclass(frozen=True)
class RandomisedResponsePair(AtomicPair):
    """The answers of two people with different truths: losses epsilon, -epsilon and 0 (k - 2 other answers)."""

    epsilon: float
    categories: int

    @property
    def symmetric(self) -> bool:
        """Always: exchanging the two truths exchanges P and Q."""
        return True

    def outcomes(self) -> Sequence[tuple[Any, Any]]:
        """The truth of P, the truth of Q, and all other answers together."""
        import mpmath

        lie = 1 / (mpmath.exp(mpmath.mpf(self.epsilon)) + self.categories - 1)
        truth = mpmath.exp(mpmath.mpf(self.epsilon)) * lie
        return (truth, lie), (lie, truth), ((self.categories - 2) * lie, (self.categories - 2) * lie)

    def losses(self) -> Sequence[Any]:
        """Exactly epsilon, -epsilon, 0."""
        import mpmath

        return mpmath.mpf(self.epsilon), -mpmath.mpf(self.epsilon), mpmath.mpf(0)


class RandomisedResponse(Mechanism):
    """Every person answers truly with probability e^epsilon / (e^epsilon + k - 1), else one of the k - 1 other answers.

    Guarantee: the exact pair of two truths under replace-one adjacency (Warner 1965; Kairouz, Oh and Viswanath 2016),
    and under zero-out adjacency, where a person without a record answers as one fixed category would. Under add-remove
    adjacency the number of answers itself tells whether a person takes part, so no pair exists.
    """

    kind: Literal["randomised-response"] = "randomised-response"
    epsilon: HexFloat = Field(gt=0.0, le=700.0)
    categories: int = Field(default=2, ge=2, le=1 << 50)

    def dominating_pair(self, adjacency: Adjacency) -> RandomisedResponsePair:
        """The pair of two truths; add-remove adjacency is refused (DP062)."""
        if adjacency is Adjacency.ADD_REMOVE:
            raise unproved(self, adjacency, "use replace-one adjacency: the number of answers is public")
        return RandomisedResponsePair(self.epsilon, self.categories)
