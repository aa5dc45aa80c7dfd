"""The lines of figures, as numbers: guarantees on a grid, each point a bound by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpbudget.curve import Bounds, PrivacyCurve
from dpbudget.risk import Profile, as_probability, power_bound

#: Beyond this log-likelihood ratio no threshold is tried: exp would overflow.
_FARTHEST = 700.0


class Remembered(PrivacyCurve):
    """A curve of which each delta is asked once: the figures of a report share most of their questions."""

    def __init__(self, curve: PrivacyCurve) -> None:
        self._curve, self._known = curve, dict[float, Bounds]()

    def epsilon(self, delta: float) -> Bounds:
        """That of the curve."""
        return self._curve.epsilon(delta)

    def delta(self, epsilon: float) -> Bounds:
        """That of the curve."""
        if epsilon not in self._known:
            self._known[epsilon] = self._curve.delta(epsilon)
        return self._known[epsilon]


class PairCurve(PrivacyCurve):
    """All that one pair (epsilon, delta) says: the profile of the worst mechanism that has it.

    Upper ends only: delta(e) = delta for e >= epsilon, else 1 - (1 - delta) (1 + e^e) / (1 + e^epsilon), which is what
    the trade-off function of the pair gives (Kairouz, Oh and Viswanath 2015).
    """

    def __init__(self, epsilon: float, delta: float) -> None:
        self._epsilon, self._delta = epsilon, delta

    def epsilon(self, delta: float) -> Bounds:
        """The pair's epsilon at its delta or a larger one; infinite below."""
        return Bounds(0.0, self._epsilon if delta >= self._delta else math.inf)

    def delta(self, epsilon: float) -> Bounds:
        """The largest delta that a mechanism with this pair can have, rounded up."""
        if epsilon >= self._epsilon:
            return Bounds(0.0, self._delta)
        # (1 + e^a) / (1 + e^b) for a <= b without overflow.
        ratio = (math.exp(-self._epsilon) + math.exp(epsilon - self._epsilon)) / (math.exp(-self._epsilon) + 1.0)
        kept = (1.0 - self._delta) * ratio * (1.0 - 1e-14)
        return Bounds(0.0, min(max(1.0 - kept, self._delta), 1.0))

    def tpr_at(self, fpr: float) -> Bounds:
        """Largest true positive rate, in closed form: 1 minus :func:`pair_line`."""
        alpha = as_probability("fpr", fpr)
        upper = (1.0 - pair_line(alpha, self._epsilon, self._delta)) * (1.0 + 1e-14)
        return Bounds(alpha, min(max(upper, alpha), 1.0))

    def trade_off(self, alphas: Sequence[float]) -> tuple[Bounds, ...]:
        """Smallest type II error at each type I error; the lower end is the guarantee."""
        rates = [self.tpr_at(alpha) for alpha in alphas]
        return tuple(Bounds(max(1.0 - rate.upper - 1e-16, 0.0), 1.0 - rate.lower) for rate in rates)


def epsilon_grid(epsilon: float, points: int) -> list[float]:
    """Evenly spaced epsilons from 0 to a quarter beyond ``epsilon``."""
    end = 1.25 * max(epsilon, 1e-3)
    return [end * i / (points - 1) for i in range(points)]


def least_false_negatives(
    curve: PrivacyCurve, epsilon: float, false_positives: Sequence[float], points: int
) -> list[float]:
    """Lower bounds of the type II error from one grid of thresholds; each threshold is a line below the true curve.

    Args:
        curve: the profile.
        epsilon: where its delta is small, so that thresholds beyond a quarter more are of no use.
        false_positives: type I errors in [0, 1].
        points: how many thresholds, about, on each of two grids; an odd number.
    """
    profile = Profile(curve.delta)
    # Evenly spaced thresholds, every second one of the drawn profile's, and others that are dense near 1, where a
    # strong guarantee is decided.
    even = [x for x in epsilon_grid(epsilon, points)[::2] if x <= _FARTHEST]
    dense = [even[-1] * (i / (points // 2)) ** 3 for i in range(points // 2)]
    xs = sorted({sign * x for x in (*even, *dense) for sign in (-1.0, 1.0)})
    return [max(0.0, *(1.0 - power_bound(profile, alpha, x) for x in xs)) for alpha in false_positives]


def kink(epsilon: float, delta: float) -> float:
    """The type I error at which the two lines of one pair (epsilon, delta) meet."""
    return (1.0 - delta) / (1.0 + math.exp(min(epsilon, _FARTHEST)))


def pair_line(alpha: float, epsilon: float, delta: float) -> float:
    """What one pair says: max(0, 1 - delta - e^epsilon alpha, e^-epsilon (1 - delta - alpha))."""
    steep = 1.0 - delta - math.exp(min(epsilon, _FARTHEST)) * alpha
    return max(0.0, steep, math.exp(-epsilon) * (1.0 - delta - alpha))
