"""From charges to the numbers an accountant works on, with every input checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpbudget._pause import pause
from dpbudget.errors import InvalidParameter, NotComputable
from dpbudget.mechanisms import Adjacency, Charge, DominatingPair, ReplaceOneGaussianPair, SubsampledGaussianPair

#: The pairs that the quadrature of ``prv`` knows.
GaussianPair = SubsampledGaussianPair | ReplaceOneGaussianPair


@dataclass(frozen=True)
class Use:
    """``count`` >= 1 uses of one dominating pair."""

    pair: DominatingPair
    count: int


@dataclass(frozen=True)
class Phase(Use):
    """Uses of a sampled Gaussian pair."""

    pair: GaussianPair


def uses_of(charges: Sequence[Charge], adjacency: Adjacency) -> dict[DominatingPair, int]:
    """How often each distinct dominating pair is used, in order of first appearance; zero counts are dropped.

    Raises:
        InvalidParameter: a count is negative or no integer (DP009).
        NotComputable: a mechanism has no proved pair under ``adjacency`` (DP062).
    """
    counts: dict[DominatingPair, int] = {}
    for charge in charges:
        pause()
        if isinstance(charge.count, bool) or not isinstance(charge.count, int) or charge.count < 0:
            raise InvalidParameter(f"count of a charge must be an integer >= 0, got {charge.count!r}", code="DP009")
        pair = charge.mechanism.dominating_pair(adjacency)
        if charge.count:
            counts[pair] = counts.get(pair, 0) + charge.count
    return counts


def phases_of(charges: Sequence[Charge], adjacency: Adjacency) -> tuple[Phase, ...]:
    """The composition as sampled Gaussian pairs with their counts.

    Raises:
        InvalidParameter: a count is negative or no integer (DP009), or a pair lies outside its range (DP005, DP008).
        NotComputable: a mechanism has no pair under ``adjacency``, or a pair of a kind that is not supported (DP062).
    """
    return tuple(Phase(_check_pair(pair), count) for pair, count in uses_of(charges, adjacency).items())


def mixed_uses_of(charges: Sequence[Charge], adjacency: Adjacency) -> tuple[Use, ...]:
    """The composition with its Gaussian pairs checked and any other pairs as they are; errors as :func:`phases_of`."""
    return tuple(use_of(pair, count) for pair, count in uses_of(charges, adjacency).items())


def use_of(pair: DominatingPair, count: int) -> Use:
    """``count`` uses of ``pair``, a Phase where it is a Gaussian pair within its range; errors as :func:`phases_of`."""
    if isinstance(pair, SubsampledGaussianPair | ReplaceOneGaussianPair):
        return Phase(_check_pair(pair), count)
    return Use(pair, count)


def check_delta(delta: float) -> float:
    """``delta`` as a float in (0, 1), else InvalidParameter (DP002)."""
    if not _is_real(delta) or not 0.0 < delta < 1.0:
        raise InvalidParameter(f"delta must lie in (0, 1), got {delta!r}", code="DP002")
    return float(delta)


def check_epsilon(epsilon: float) -> float:
    """``epsilon`` as a finite float >= 0, else InvalidParameter (DP001)."""
    if not _is_real(epsilon) or not 0.0 <= epsilon < math.inf:
        raise InvalidParameter(f"epsilon must be a finite number >= 0, got {epsilon!r}", code="DP001")
    return float(epsilon)


def _is_real(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _check_pair(pair: DominatingPair) -> GaussianPair:
    if not isinstance(pair, SubsampledGaussianPair | ReplaceOneGaussianPair):
        raise NotComputable(
            f"the dominating pair {type(pair).__name__} is not supported by this accountant",
            code="DP062",
            hint="use the accountant pld, which takes every pair, or rdp",
        )
    if not 0.0 < pair.rate <= 1.0:
        raise InvalidParameter(f"sampling rate must lie in (0, 1], got {pair.rate!r}", code="DP008")
    if not 1e-3 <= pair.sigma <= 1e6:
        raise InvalidParameter(f"noise multiplier must lie in [1e-3, 1e6], got {pair.sigma!r}", code="DP005")
    return pair
