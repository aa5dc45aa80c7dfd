"""The exact accountant: two-sided, certified epsilon from the inverted law of the privacy loss.

``prv`` stands for privacy-loss random variable. Each direction of the dominating pair is one certified contour sum
(``_contour``); compositions with a closed form use it (``_closed_form``). Where no useful contour exists the answer
falls back to proved bounds that are merely wide: above, the Renyi bound and the mechanism without sampling; below, the
worst single step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from dpbudget._numerics import exp_up
from dpbudget.accountants._closed_form import gaussian_delta, one_step_delta
from dpbudget.accountants._moment_bound import MomentBound
from dpbudget.accountants._phases import Phase, check_delta, check_epsilon, phases_of
from dpbudget.accountants._plan_contour import guess_epsilon, plan_contour
from dpbudget.accountants._solve import DeltaBounds, bracket_epsilon
from dpbudget.curve import Bounds, PrivacyCurve
from dpbudget.mechanisms import Adjacency, Charge, Direction, SubsampledGaussianPair

# Aimed at, relative to delta: sums in double precision gain nothing from less.
_TOLERANCE = 1e-14
# A bracket of this relative width is not refined, one wider than the second is intersected with the fallback.
_GOOD, _POOR = 1e-11, 1e-6
# One narrower than this shows where to plan the next contour.
_ROUGH, _PASSES = 0.01, 4
# Delta is evaluated at no larger epsilon; below exp(-746) no float but 0 and the smallest one is left.
_FARTHEST, _VANISHED = 1e18, -746.0
Interval = tuple[float, float]


class PRVAccountant:
    """Certified brackets, typically 1e-11 wide, for compositions of (Poisson-sampled) Gaussians.

    Both directions of the dominating pair are bounded and the larger counts; add-remove and zero-out adjacency.
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
        self._directions: list[_Direction] = []
        if not phases:
            return
        self._directions.append(_Direction(phases, "remove"))
        # The unsampled Gaussian is symmetric.
        if any(phase.pair.rate < 1.0 for phase in phases):
            self._directions.append(_Direction(phases, "add"))

    def epsilon(self, delta: float) -> Bounds:
        """Smallest epsilon >= 0 at ``delta``; raises InvalidParameter (DP002) for delta outside (0, 1)."""
        delta = check_delta(delta)
        return _larger([direction.epsilon(delta) for direction in self._directions])

    def delta(self, epsilon: float) -> Bounds:
        """Smallest delta at ``epsilon``; raises InvalidParameter (DP001) unless epsilon is finite and >= 0."""
        epsilon = check_epsilon(epsilon)
        answer = _larger([direction.delta(min(epsilon, _FARTHEST)) for direction in self._directions])
        # Delta falls as epsilon grows, so the upper end holds beyond; nothing is left of the lower one there.
        return answer if epsilon <= _FARTHEST else Bounds(0.0, answer.upper)


def _larger(intervals: list[Interval]) -> Bounds:
    """Bounds of the maximum; nothing was composed if the list is empty."""
    return Bounds(max((low for low, _ in intervals), default=0.0), max((high for _, high in intervals), default=0.0))


class _Direction:
    """One direction of a composition: P against Q ("remove") or Q against P ("add")."""

    def __init__(self, phases: tuple[Phase, ...], direction: Direction) -> None:
        self._phases, self._direction = phases, direction
        self._moments = MomentBound(phases, direction)
        self._closed = self._closed_form()

    def _closed_form(self) -> DeltaBounds | None:
        """delta(epsilon) where no contour is needed: no sampling at all, or a single step."""
        if all(phase.pair.rate >= 1.0 for phase in self._phases):
            return partial(gaussian_delta, self._phases)
        if len(self._phases) == 1 and self._phases[0].count == 1:
            return partial(_one_step, self._phases[0].pair, self._direction)
        return None

    def _largest_loss(self) -> float:
        """Upper bound of the total loss; finite for adding a record, whose absence is never certain."""
        if self._direction == "remove" or any(phase.pair.rate >= 1.0 for phase in self._phases):
            return math.inf
        total = math.fsum(-phase.count * math.log1p(-phase.pair.rate) for phase in self._phases)
        return total * (1.0 + 1e-14)

    def epsilon(self, delta: float) -> Interval:
        """Certified bounds of this direction's epsilon at ``delta``."""
        log_delta = math.log(delta)
        chernoff, index = self._moments.coarse_epsilon(log_delta)
        ceiling = min(chernoff, self._largest_loss())
        if ceiling <= 0.0:
            return 0.0, 0.0
        if self._closed is not None:
            return bracket_epsilon(self._closed, delta, ceiling)
        answer = self._refine(delta, index, (0.0, ceiling))
        if _is_wider(answer, _POOR):
            answer = _intersect(answer, self._fallback_epsilon(delta, answer[1]))
        if _is_wider(answer, _POOR):
            finest = self._moments.best_epsilon(log_delta)[0]
            answer = _intersect(answer, (0.0, max(finest, 0.0)))
        return answer

    def _refine(self, delta: float, index: int, answer: Interval) -> Interval:
        """Contours, each planned at the last one's answer, until the bracket is good or stops improving."""
        ceiling, log_delta = answer[1], math.log(delta)
        # Should a guess be off, the next is tried: the Renyi bound is a few percent high.
        guesses = [0.99 * ceiling, 0.94 * ceiling, guess_epsilon(self._moments, index, log_delta)]
        for _ in range(_PASSES):
            guess = min(max(guesses.pop(), 1e-3 * ceiling), ceiling)
            contour = plan_contour(self._moments, guess, log_delta, _TOLERANCE, index)
            if contour is not None:
                before = answer[1] - answer[0]
                answer = _intersect(answer, bracket_epsilon(contour.delta, delta, ceiling))
                if not _is_wider(answer, _GOOD):
                    break
                if not _is_wider(answer, _ROUGH):
                    if answer[1] - answer[0] > 0.5 * before:
                        break
                    guesses.append(0.5 * (answer[0] + answer[1]))
            if not guesses:
                break
        return answer

    def _fallback_epsilon(self, delta: float, ceiling: float) -> Interval:
        """Post-processing: no better than its worst step alone, no worse than without sampling."""
        lower = 0.0
        for phase in self._phases:
            step = partial(_one_step, phase.pair, self._direction)
            lower = max(lower, bracket_epsilon(step, delta, ceiling)[0])
        return lower, bracket_epsilon(partial(gaussian_delta, self._phases), delta, ceiling)[1]

    def delta(self, epsilon: float) -> Interval:
        """Certified bounds of this direction's delta at ``epsilon``."""
        if self._closed is not None:
            return self._closed(epsilon)
        if epsilon >= self._largest_loss():
            return 0.0, 0.0
        chernoff, index = self._moments.coarse_log_delta(epsilon)
        log_delta = min(chernoff, 0.0)
        answer = (0.0, exp_up(log_delta))
        if log_delta < _VANISHED:
            return answer
        # The Renyi bound of delta is typically a few nats high, which makes the tolerance a little coarser than meant.
        contour = plan_contour(self._moments, epsilon, log_delta - 3.0, _TOLERANCE, index)
        if contour is not None:
            answer = _intersect(answer, contour.delta(epsilon))
        if answer[1] - answer[0] > _POOR * answer[1]:
            lower = max(one_step_delta(phase.pair, epsilon, self._direction)[0] for phase in self._phases)
            answer = _intersect(answer, (lower, gaussian_delta(self._phases, epsilon)[1]))
        return answer


def _one_step(pair: SubsampledGaussianPair, direction: Direction, epsilon: float) -> Interval:
    return one_step_delta(pair, epsilon, direction)


def _is_wider(interval: Interval, relative: float) -> bool:
    return interval[1] - interval[0] > relative * max(1.0, interval[1])


def _intersect(first: Interval, second: Interval) -> Interval:
    """Both hold, so their intersection does; crossed ends would mean that a proof or the arithmetic is wrong."""
    low, high = max(first[0], second[0]), min(first[1], second[1])
    if low > high:
        raise ArithmeticError(f"certified intervals {first} and {second} do not meet")
    return low, high
