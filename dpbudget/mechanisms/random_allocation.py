"""Random allocation (balls in bins): every record takes part in exactly one of ``steps`` steps, chosen at random."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dpbudget._record import HexFloat
from dpbudget.errors import InvalidParameter, NotComputable
from dpbudget.mechanisms.base import Adjacency, Direction, DominatingPair, Mechanism, Tails, unproved
from dpbudget.mechanisms.gaussian import MAX_NOISE_MULTIPLIER, MIN_NOISE_MULTIPLIER

if TYPE_CHECKING:
    from dpbudget.mechanisms.base import Array

_LARGEST_ORDER = 48


@dataclass(frozen=True)
class RandomAllocationPair(DominatingPair):
    """P = the mean over i of N(e_i, sigma^2 I) against Q = N(0, sigma^2 I), in ``steps`` dimensions.

    Its loss has no tails in closed form; its moments have bounds, which is what the accountant ``rdp`` needs.
    """

    steps: int
    sigma: float

    def tails(self, losses: Array, direction: Direction) -> Tails:
        """Refused: only moments are bounded."""
        raise NotComputable(
            "random allocation has bounds of its moments only, not of its loss tails",
            hint='use the accountant "rdp"',
            code="DP062",
        )

    def log_moment(self, tilt: float, direction: Direction) -> float:
        """Upper bound of log E exp(tilt L), L the loss of ``direction`` under its first law; Renyi order tilt + 1.

        Remove, at an integer order a: a! / t^a times the coefficient of z^a in
        (sum_j exp(j (j - 1) / (2 sigma^2)) z^j / j!)^t, which is E_Q (P / Q)^a exactly; between integers by convexity
        of the logarithm of a moment. Add: the mean of likelihood ratios is at least their geometric mean, so the moment
        is at most exp(c / (2 sigma^2) + c^2 / (2 t sigma^2)) (Feldman and Shenfeld 2025; docs/mechanisms.md).

        Raises:
            InvalidParameter: tilt is not a finite number > 0.
        """
        if not 0.0 < tilt < math.inf:
            raise InvalidParameter(f"tilt must be a finite number > 0, got {tilt!r}")
        with_all = tilt * (tilt + 1.0) / (2.0 * self.sigma**2)  # one step alone takes every record
        if direction == "add":
            return (tilt + tilt * tilt / self.steps) / (2.0 * self.sigma**2) * (1.0 + 1e-14)
        order = tilt + 1.0
        below = math.floor(order)
        if below >= _LARGEST_ORDER:
            return with_all * (1.0 + 1e-14)
        moments = _log_moments(self.steps, self.sigma)
        share = order - below
        value = moments[below] * (1.0 - share) + moments[below + 1] * share
        return min(value, with_all) * (1.0 + 1e-14)


@lru_cache(maxsize=16)
def _log_moments(steps: int, sigma: float) -> tuple[float, ...]:
    """Logarithms of E_Q (P / Q)^a at the integers a = 0 .. 48, with 60 digits; all terms are positive."""
    import mpmath

    with mpmath.workdps(60):
        size, scale = _LARGEST_ORDER + 1, 1 / (2 * mpmath.mpf(sigma) ** 2)
        base = [mpmath.exp(j * (j - 1) * scale) / mpmath.factorial(j) for j in range(size)]
        power = _power(base, steps)
        logs = [
            mpmath.log(mpmath.factorial(a)) - a * mpmath.log(mpmath.mpf(steps)) + mpmath.log(power[a])
            for a in range(size)
        ]
        # Orders 0 and 1 have moment 1; the rest is at least 1.
        return tuple(0.0 if a < 2 else max(float(value), 0.0) * (1.0 + 1e-15) + 1e-40 for a, value in enumerate(logs))


def _power(base: list[Any], exponent: int) -> list[Any]:
    """A truncated power series to a positive integer power, by squaring."""
    result = None
    while True:
        if exponent & 1:
            result = base if result is None else _product(result, base)
        exponent >>= 1
        if not exponent:
            assert result is not None  # noqa: S101 - the highest bit is 1
            return result
        base = _product(base, base)


def _product(first: list[Any], second: list[Any]) -> list[Any]:
    return [sum(first[j] * second[k - j] for j in range(k + 1)) for k in range(len(first))]


class RandomAllocation(Mechanism):
    """Gaussian sums in ``steps`` steps, every record in one of them, uniform and independent; one use is one pass.

    Guarantee: dominated by the mean of N(e_i, sigma^2 I) against N(0, sigma^2 I) under add-remove and zero-out
    adjacency, also when gradients are adaptive (Chua et al. 2025, balls and bins; Feldman and Shenfeld 2025). Only
    moments of that pair are bounded, so that the accountant ``rdp`` counts it. Replace-one adjacency is refused.
    """

    kind: Literal["random-allocation"] = "random-allocation"
    noise_multiplier: HexFloat = Field(ge=MIN_NOISE_MULTIPLIER, le=MAX_NOISE_MULTIPLIER)
    steps: int = Field(ge=1, le=10**9)

    def dominating_pair(self, adjacency: Adjacency) -> RandomAllocationPair:
        """The mixture pair in ``steps`` dimensions."""
        if adjacency is Adjacency.REPLACE_ONE:
            raise unproved(self, adjacency, "use add-remove or zero-out adjacency")
        return RandomAllocationPair(self.steps, self.noise_multiplier)
