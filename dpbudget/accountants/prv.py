"""The exact accountant: two-sided, certified epsilon from the inverted law of the privacy loss.

``prv`` stands for privacy-loss random variable. Each direction of the dominating pair is one certified contour sum
(``_contour``); compositions with a closed form use it (``_closed_form``). Where no useful contour exists the answer
falls back to proved bounds that are merely wide: above, the Renyi bound and the mechanism without sampling; below, the
worst single step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dpbudget.accountants._direction import DirectionCurve, Interval
from dpbudget.accountants._phases import Phase, check_delta, check_epsilon, phases_of
from dpbudget.curve import Bounds, PrivacyCurve
from dpbudget.mechanisms import Adjacency, Charge

#: Delta is evaluated at no larger epsilon.
_FARTHEST = 1e18


class PRVAccountant:
    """Certified brackets, typically 1e-11 wide, for compositions of (Poisson-sampled) Gaussians.

    Both directions of the dominating pair are bounded and the larger counts; every adjacency.
    """

    name = "prv"
    version = 1

    def curve(self, charges: Sequence[Charge], adjacency: Adjacency) -> PRVCurve:
        """The privacy curve of the composition; raises InvalidParameter or NotComputable as the base contract says."""
        return PRVCurve(phases_of(charges, adjacency))


class PRVCurve(PrivacyCurve):
    """The privacy profile of one composition; answers are certified intervals, wide where little is known."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        phases = tuple(phases)
        self._directions: list[DirectionCurve] = []
        if not phases:
            return
        self._directions.append(DirectionCurve(phases, "remove"))
        if not all(phase.pair.symmetric for phase in phases):
            self._directions.append(DirectionCurve(phases, "add"))

    def epsilon(self, delta: float) -> Bounds:
        """Smallest epsilon >= 0 at ``delta``; raises InvalidParameter (DP002) for delta outside (0, 1)."""
        delta = check_delta(delta)
        return self._larger(
            lambda one: one.epsilon(delta), lambda one, low: one.is_within(low, delta, self._directions[0].tilt)
        )

    def epsilon_between(self, smaller: float, delta: float) -> Bounds:
        """The lower end of epsilon at ``delta`` and the upper end at ``smaller`` <= delta.

        These are the ends of a plan's epsilon, whose noise costs part of delta. Raises InvalidParameter (DP002).
        """
        smaller, delta = check_delta(smaller), check_delta(delta)
        return self._larger(
            lambda one: one.epsilon_between(smaller, delta),
            lambda one, low: one.is_within(low, smaller, self._directions[0].tilt),
        )

    def rough_epsilon(self, delta: float) -> float:
        """Saddle-point estimate of epsilon, typically within one percent; a start for searches and no bound."""
        return self._directions[0].rough_epsilon(check_delta(delta)) if self._directions else 0.0

    def estimate_log_delta(self, epsilon: float, tolerance: float = 1e-11) -> tuple[float, float]:
        """Estimates of log delta(epsilon) and its derivative from the costlier direction; for searches, no bound."""
        if not self._directions:
            return -math.inf, -1.0
        return self._directions[0].estimate_log_delta(check_epsilon(epsilon), tolerance)

    def delta(self, epsilon: float) -> Bounds:
        """Smallest delta at ``epsilon``; raises InvalidParameter (DP001) unless epsilon is finite and >= 0."""
        epsilon = check_epsilon(epsilon)
        nearest = min(epsilon, _FARTHEST)
        answer = self._larger(
            lambda one: one.delta(nearest), lambda one, low: one.is_within(nearest, low, self._directions[0].tilt)
        )
        # Delta falls as epsilon grows, so the upper end holds beyond; nothing is left of the lower one there.
        return answer if epsilon <= _FARTHEST else Bounds(0.0, answer.upper)

    def _larger(
        self,
        ask: Callable[[DirectionCurve], Interval],
        is_less: Callable[[DirectionCurve, float], bool],
    ) -> Bounds:
        """Bounds of the maximum over directions; the second need only be shown to be less where it is."""
        if not self._directions:
            return Bounds(0.0, 0.0)
        low, high = ask(self._directions[0])
        for other in self._directions[1:]:
            if low > 0.0 and is_less(other, low):
                continue
            interval = ask(other)
            low, high = max(low, interval[0]), max(high, interval[1])
        return Bounds(low, high)
