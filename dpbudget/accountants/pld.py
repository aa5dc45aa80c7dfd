"""The accountant for every dominating pair: certified brackets from discretised privacy losses.

``pld`` stands for privacy loss distribution. It asks a pair for nothing but its loss tails, and shares no numerics with
``prv``, so each checks the other. A pessimistic and an optimistic lattice law stand in for every step (``_pld_law``),
a tilted FFT composes them (``_pld_fft``), and ``_pld_plan`` chooses the lattice. One single use needs no lattice.

Where no transform of the allowed length is useful the answer is wide: above a moment bound, below the worst single use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dpbudget._numerics import exp_or_inf
from dpbudget.accountants._phases import check_delta, check_epsilon, uses_of
from dpbudget.accountants._pld_fft import Composed, Lattice, certain_mass, compose
from dpbudget.accountants._pld_law import contract, lower_profile, spread, upper_profile
from dpbudget.accountants._pld_plan import Outline, lattice, outline
from dpbudget.accountants._solve import bracket_epsilon
from dpbudget.curve import Bounds, PrivacyCurve
from dpbudget.errors import InvalidParameter
from dpbudget.mechanisms import Adjacency, Charge, Direction, DominatingPair

if TYPE_CHECKING:
    from dpbudget.mechanisms.base import Array

Interval = tuple[float, float]
Pairs = tuple[tuple[DominatingPair, int], ...]
# Delta is evaluated at no larger epsilon; no lattice is built for a delta below exp(-690).
_FARTHEST, _VANISHED = 1e18, -690.0
# Losses above are not told from each other by the search for a single use.
_LARGEST_LOSS = 1e9


class PLDAccountant:
    """Certified brackets for compositions of any mechanisms whose dominating pairs answer their loss tails.

    Both directions of the pairs are composed separately and the larger delta counts.

    Args:
        relative_width: aimed width of a bracket of epsilon relative to epsilon, in [1e-9, 1].
        largest_transform: longest FFT, a power of two in [2^12, 2^24]; memory is about 80 bytes times it.

    Raises:
        InvalidParameter: an argument is out of range (DP009).
    """

    name = "pld"
    version = 1

    def __init__(self, relative_width: float = 1e-4, largest_transform: int = 1 << 20) -> None:
        if not 1e-9 <= relative_width <= 1.0:
            raise InvalidParameter(f"relative_width must lie in [1e-9, 1], got {relative_width!r}", code="DP009")
        if largest_transform not in [1 << k for k in range(12, 25)]:
            raise InvalidParameter(
                f"largest_transform must be a power of two in [2^12, 2^24], got {largest_transform!r}", code="DP009"
            )
        self._width, self._largest = float(relative_width), largest_transform

    def curve(self, charges: Sequence[Charge], adjacency: Adjacency) -> PLDCurve:
        """The privacy curve of the composition; raises InvalidParameter or NotComputable as the base contract says."""
        return PLDCurve(tuple(uses_of(charges, adjacency).items()), self._width, self._largest)


class PLDCurve(PrivacyCurve):
    """The privacy profile of one composition; answers are certified intervals, wide where little is known."""

    def __init__(self, pairs: Pairs, relative_width: float, largest_transform: int) -> None:
        directions: list[Direction] = []
        if pairs:
            directions = ["remove"] if all(pair.symmetric for pair, _ in pairs) else ["remove", "add"]
        self._directions = [DirectionLattice(pairs, d, relative_width, largest_transform) for d in directions]

    def epsilon(self, delta: float) -> Bounds:
        """Smallest epsilon >= 0 at ``delta``; raises InvalidParameter (DP002) for delta outside (0, 1).

        Both ends are infinite where outputs that tell everything are likelier than ``delta``.
        """
        delta = check_delta(delta)
        return _larger([direction.epsilon(delta) for direction in self._directions])

    def delta(self, epsilon: float) -> Bounds:
        """Smallest delta at ``epsilon``; raises InvalidParameter (DP001) unless epsilon is finite and >= 0."""
        epsilon = check_epsilon(epsilon)
        answer = _larger([direction.delta(min(epsilon, _FARTHEST)) for direction in self._directions])
        return answer if epsilon <= _FARTHEST else Bounds(0.0, answer.upper)


def _larger(intervals: list[Interval]) -> Bounds:
    """Bounds of the maximum; nothing was composed if the list is empty."""
    return Bounds(max((low for low, _ in intervals), default=0.0), max((high for _, high in intervals), default=0.0))


class DirectionLattice:
    """One direction of a composition: P against Q ("remove") or Q against P ("add")."""

    def __init__(self, pairs: Pairs, direction: Direction, relative_width: float, largest: int) -> None:
        self._pairs, self._direction, self._width, self._largest = pairs, direction, relative_width, largest
        self._single = sum(count for _, count in pairs) == 1

    def epsilon(self, delta: float) -> Interval:
        """Certified bounds of this direction's epsilon at ``delta``."""
        if self._single:
            return self._epsilon_of_one(delta)
        plan = outline(self._pairs, self._direction, math.log(delta))
        left = delta - plan.certain
        if left <= 0.0:
            # Outputs that tell everything may be as likely as delta.
            return (math.inf if self._certain(plan) >= delta else 0.0), math.inf
        ceiling = plan.ceiling(math.log(left))
        if ceiling <= 0.0:
            return 0.0, 0.0
        composed = self._compose(plan, ceiling, self._width * ceiling)
        bounds = partial(self._bounds, plan, composed)
        low, high = bracket_epsilon(bounds, delta, ceiling)
        return min(low, high), high

    def delta(self, epsilon: float) -> Interval:
        """Certified bounds of this direction's delta at ``epsilon``."""
        if self._single:
            return self._one_use(epsilon)
        log_delta = _VANISHED
        for _ in range(3):
            plan = outline(self._pairs, self._direction, log_delta)
            log_delta = min(plan.log_delta(epsilon), 0.0) - 6.0
            if log_delta < _VANISHED:
                low, high = self._bounds(plan, [], epsilon)
                return min(max(low, self._certain(plan)), high), high
        tilt_scale = max(plan.ceiling(log_delta), 1e-9)
        composed = self._compose(plan, epsilon, self._width * min(tilt_scale, max(epsilon, 0.1 * tilt_scale)))
        return self._bounds(plan, composed, epsilon)

    def _compose(self, plan: Outline, epsilon: float, width: float) -> list[Composed]:
        """The pessimistic and the optimistic composition; without what is not useful."""
        grid = lattice(plan, epsilon, width, self._largest)
        if grid is None:
            return []
        windows = [(float(law.losses[0]), float(law.losses[-1])) for law, _ in plan.uses]
        answers: list[Composed] = []
        for build in (spread, contract):
            uses = [
                (build(pair, self._direction, _nodes(grid, window)), count)
                for (pair, count), window in zip(self._pairs, windows, strict=True)
            ]
            if all(law.weights.any() for law, _ in uses):
                answers.append(compose(uses, grid))
        return answers

    def _bounds(self, plan: Outline, composed: list[Composed], epsilon: float) -> Interval:
        """The composition's bounds, intersected with a moment bound above and the worst single use below."""
        upper = min(exp_or_inf(plan.log_delta(epsilon)) * (1.0 + 1e-12) + plan.certain + 5e-324, 1.0)
        at = np.array([epsilon])
        lower = max(float(lower_profile(pair, self._direction, at)[0]) for pair, _ in self._pairs)
        if composed:
            upper = min(upper, composed[0].upper(epsilon))
        if len(composed) > 1:
            lower = max(lower, composed[1].lower(epsilon))
        if lower > upper:
            raise ArithmeticError(f"certified bounds {lower!r} and {upper!r} of delta({epsilon!r}) are crossed")
        return lower, upper

    def _certain(self, plan: Outline) -> float:
        """Lower bound of the mass of outputs that tell everything."""
        pairs = zip(self._pairs, plan.uses, strict=True)
        return certain_mass([(contract(pair, self._direction, law.losses), n) for (pair, n), (law, _) in pairs])[0]

    def _one_use(self, epsilon: float) -> Interval:
        at, pair = np.array([epsilon]), self._pairs[0][0]
        low = float(lower_profile(pair, self._direction, at)[0])
        return low, max(float(upper_profile(pair, self._direction, at)[0]), low)

    def _epsilon_of_one(self, delta: float) -> Interval:
        ceiling = 1.0
        while self._one_use(ceiling)[1] > delta:
            ceiling *= 2.0
            if ceiling > _LARGEST_LOSS:
                return (math.inf if self._surely_above(delta) else 0.0), math.inf
        return bracket_epsilon(self._one_use, delta, ceiling)

    def _surely_above(self, delta: float) -> bool:
        """Whether delta(t) >= ``delta`` for every t: S has nothing left at a loss where F still has that much."""
        tails = self._pairs[0][0].tails(np.array([_LARGEST_LOSS]), self._direction)
        return bool(tails.second_upper[0] == 0.0 and tails.first_lower[0] >= delta)


def _nodes(grid: Lattice, window: Interval) -> Array:
    first = math.floor(window[0] / grid.step)
    last = max(math.ceil(window[1] / grid.step), first + 1)
    return np.asarray(np.arange(first, last + 1) * grid.step)
