"""One direction of a composition: certified intervals of its epsilon and delta."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dpbudget._numerics import UNIT, exp_up
from dpbudget.accountants._closed_form import gaussian_delta, gaussian_guess, one_step_delta
from dpbudget.accountants._contour import Contour
from dpbudget.accountants._cutting import COSTS, cut_laws, dropped_mass
from dpbudget.accountants._jump import log_delta_without_jumps, plan_jumps, split_at
from dpbudget.accountants._law import Array
from dpbudget.accountants._moment_bound import MomentBound
from dpbudget.accountants._moment_table import MomentTable, Rows, log_kappas
from dpbudget.accountants._phases import Phase
from dpbudget.accountants._plan_contour import (
    HIGH_PRICE,
    LOSS_PRICE,
    guess_epsilon,
    guess_log_delta,
    plan_contour,
)
from dpbudget.accountants._solve import DeltaBounds, bracket_epsilon, bracket_near
from dpbudget.mechanisms import Direction

if TYPE_CHECKING:
    from dpbudget.accountants.pld import DirectionLattice

Interval = tuple[float, float]

# Aimed at, relative to delta: sums in double precision gain nothing from less. A comparison needs far less.
_LOG_TOLERANCE, _ROUGH_TOLERANCE = math.log(1e-14), math.log(1e-3)
# A bracket of this relative width is not refined, one wider than the second is intersected with the fallback.
_GOOD, _FAIR, _POOR = 1e-10, 3e-10, 1e-6
# One narrower than this shows where epsilon is.
_ROUGH = 0.01
# One wider than this is intersected with a lattice of so many points.
_LATTICE, _LATTICE_SIZE = 1e-4, 1 << 16
# One wider than this after a cut is tried without its bulk.
_JUMPY = 2e-9
# Shares of epsilon that one step must lose to count as a jump.
_SPLITS = (0.5, 0.35, 0.25, 0.15, 0.1)
# What has no jump must be this much less than delta.
_LOG_NEGLIGIBLE = -9.0
_PASSES = 4
# Nodes of all contours together after which one question asks for no further contour: about a second.
_MAX_NODES = 90_000
# Below exp(-746) no float but 0 and the smallest one is left.
_VANISHED = -746.0
_PAD = 64.0 * UNIT
# Over which a closed form is differentiated.
_NUDGE = 1e-6


class DirectionCurve:
    """P against Q ("remove") or Q against P ("add")."""

    def __init__(self, phases: tuple[Phase, ...], direction: Direction) -> None:
        self._phases, self._direction = phases, direction
        self._table = MomentTable(phases, direction)
        self._closed = self._closed_form()
        #: The tilt of the last plain contour: a start for the other direction.
        self.tilt: float | None = None
        self._nodes = 0

    def _closed_form(self) -> DeltaBounds | None:
        """delta(epsilon) where no contour is needed: no sampling at all, or a single step."""
        if all(law.plain for law in self._table.laws):
            return partial(gaussian_delta, self._phases)
        if len(self._phases) == 1 and self._phases[0].count == 1:
            return partial(one_step_delta, self._phases[0].pair, direction=self._direction)
        return None

    def _largest_loss(self) -> float:
        """Upper bound of the total loss; finite for adding a record, whose absence is never certain."""
        return math.fsum(
            phase.count * law.largest_loss() for phase, law in zip(self._phases, self._table.laws, strict=True)
        )

    # -- epsilon ---------------------------------------------------------------------------------------------------

    def epsilon(self, delta: float) -> Interval:
        """Certified bounds of this direction's epsilon at ``delta``."""
        return self.epsilon_between(delta, delta)

    def epsilon_between(self, smaller: float, delta: float) -> Interval:
        """(lower end at ``delta``, upper end at ``smaller`` <= delta), for little more than the price of one."""
        self._nodes = 0
        answer, contour = self._solve(smaller)
        if smaller == delta:
            return answer
        if contour is None or _is_wider(answer, _GOOD):
            return self._solve(delta)[0][0], answer[1]
        return bracket_near(contour, delta, answer[0], answer[1])[0], answer[1]

    def _solve(self, delta: float) -> tuple[Interval, Contour | None]:
        """Bounds of epsilon at ``delta``, and the last plain contour they come from."""
        rows, chernoff = self._rows_at_delta(self._table, math.log(delta))
        ceiling = min(chernoff, self._largest_loss())
        if ceiling <= 0.0:
            return (0.0, 0.0), None
        if self._closed is not None:
            guess = gaussian_guess(self._phases, delta) if self._table.laws[0].plain else 0.0
            return bracket_epsilon(self._closed, delta, ceiling, guess), None
        if not _is_wider((0.0, ceiling), _GOOD):
            return (0.0, ceiling), None
        answer, contour = self._refine(self._table, rows, delta, (0.0, ceiling))
        if _is_wider(answer, _FAIR):
            answer = self._refine_cut(delta, answer)
        if _is_wider(answer, _POOR):
            answer = _intersect(answer, self._fallback_epsilon(delta, answer[1]))
        if _is_wider(answer, _LATTICE):
            answer = _intersect(answer, self._lattice().epsilon(delta))
        return answer, contour

    def rough_epsilon(self, delta: float) -> float:
        """Saddle-point estimate of epsilon, no bound."""
        rows, chernoff = self._rows_at_delta(self._table, math.log(delta))
        return min(max(guess_epsilon(rows, math.log(delta)), 1e-3 * chernoff), max(chernoff, 0.0))

    def estimate_log_delta(self, epsilon: float, tolerance: float) -> tuple[float, float]:
        """Estimates of log delta and of its derivative, as good as asked where a plain contour works; no bound."""
        if self._closed is not None and not self._table.laws[0].plain:
            # One sampled step: no contour is short, but the closed form is at hand.
            here, there = (self._closed(value)[1] for value in (epsilon, epsilon + _NUDGE))
            if here > 1e-300 and there < here:
                return math.log(here), math.log(there / here) / _NUDGE
        rows, chernoff = self._rows_at_epsilon(self._table, epsilon)
        log_delta = min(guess_log_delta(rows, epsilon), chernoff)
        contour = plan_contour(self._table, rows, epsilon, log_delta, math.log(tolerance))
        return (-math.inf, -1.0) if contour is None else contour.log_delta(epsilon)

    def _rows_at_delta(self, table: MomentTable, log_delta: float) -> tuple[Rows, float]:
        """Tilts around the best one for ``log_delta``, and the Renyi bound of epsilon over them."""

        def bound(rows: Rows) -> Array:
            kappa = log_kappas(rows.tilts)
            size = rows.upper + np.abs(kappa) + abs(log_delta)
            value: Array = (rows.upper + kappa - log_delta + _PAD * size) / rows.tilts
            return value

        rows = table.around(table.start(log_delta), bound)
        return rows, float(bound(rows).min())

    def _refine_cut(self, delta: float, answer: Interval) -> Interval:
        """The same with rare outputs dropped and charged, which allows tilts that suit a rare large loss."""
        middle = 0.5 * sum(answer)
        if _is_wider(answer, _POOR):
            middle = max(answer[0], 1e-2 * answer[1])
        counts = [phase.count for phase in self._phases]
        known = not _is_wider(answer, _ROUGH)
        for cost in COSTS if known else (COSTS[0], *COSTS):
            laws = cut_laws(self._table.laws, counts, middle, delta, cost)
            if laws is None:
                break
            table = MomentTable(self._phases, self._direction, laws)
            rows, _ = self._rows_at_delta(table, math.log(delta))
            before = answer
            answer, _ = self._refine(table, rows, delta, answer)
            known = not _is_wider(answer, _ROUGH)
            if known and _is_wider(answer, _JUMPY):
                middle = 0.5 * sum(answer)
                answer = self._refine_jumps(table, delta, answer)
            # What a larger cost could still gain is not worth it below a thousandth of the tolerated width.
            if not _is_wider(answer, max(3.0 * cost, _JUMPY)) or (known and answer == before):
                break
        return answer

    def _refine_jumps(self, table: MomentTable, delta: float, answer: Interval) -> Interval:
        """The contour of at least one rare large loss, for one phase with a cut."""
        if len(table.laws) > 1 or table.laws[0].side != "remove" or self._nodes > _MAX_NODES:
            return answer
        (law,), (phase,) = table.laws, table.phases
        log_delta = math.log(delta)
        low = answer[0]
        moments = table.around(table.start(log_delta), lambda rows: rows.upper - rows.tilts * low)
        splits = [split_at(law, share * low) for share in _SPLITS]
        log_rest, index = min((log_delta_without_jumps(law, phase.count, s, low), k) for k, s in enumerate(splits))
        if log_rest > log_delta + _LOG_NEGLIGIBLE:
            return answer
        rest = exp_up(log_rest) + phase.count * dropped_mass(law)
        contour = plan_jumps(law, phase.count, splits[index], moments, low, log_delta + _LOG_TOLERANCE, rest)
        if contour is not None:
            self._nodes += contour.nodes
            answer = _intersect(answer, bracket_near(contour, delta, 0.5 * sum(answer), answer[1]))
        return answer

    def _refine(
        self, table: MomentTable, rows: Rows, delta: float, answer: Interval
    ) -> tuple[Interval, Contour | None]:
        """Contours, each planned at the last one's answer, until the bracket is good or stops improving."""
        ceiling, log_delta, used = answer[1], math.log(delta), None
        price = LOSS_PRICE if table is self._table else HIGH_PRICE
        guess = min(max(guess_epsilon(rows, log_delta), 1e-3 * ceiling), ceiling)
        # Where rare outputs may be cut, a first plain contour that is not good enough shows where to cut.
        first_only = table is self._table and self._direction == "remove"
        for _ in range(1 if first_only else _PASSES):
            if self._nodes > _MAX_NODES:
                break
            contour = plan_contour(table, rows, guess, log_delta, _LOG_TOLERANCE, price)
            if contour is None:
                break
            self._nodes += contour.nodes
            before, used, self.tilt = answer[1] - answer[0], contour, contour.tilt
            answer = _intersect(answer, bracket_near(contour, delta, guess, ceiling))
            if not _is_wider(answer, _GOOD) or answer[1] - answer[0] > 0.5 * before:
                break
            moved = 0.5 * (answer[0] + answer[1])
            if abs(moved - guess) <= 1e-3 * moved:
                break
            guess = moved
        return answer, used

    def _fallback_epsilon(self, delta: float, ceiling: float) -> Interval:
        """Post-processing: no better than its worst step alone, no worse than without sampling."""
        lower = 0.0
        for phase in self._phases:
            step = partial(one_step_delta, phase.pair, direction=self._direction)
            lower = max(lower, bracket_epsilon(step, delta, ceiling)[0])
        upper = bracket_epsilon(partial(gaussian_delta, self._phases), delta, ceiling)[1]
        finest = MomentBound(self._phases, self._direction).best_epsilon(math.log(delta))[0]
        return lower, max(min(upper, finest), lower)

    def _lattice(self) -> DirectionLattice:
        """The discretised law, for compositions whose characteristic function decays too slowly for any contour."""
        from dpbudget.accountants.pld import DirectionLattice

        pairs = tuple((phase.pair, phase.count) for phase in self._phases)
        return DirectionLattice(pairs, self._direction, 1e-3, _LATTICE_SIZE)

    # -- delta -----------------------------------------------------------------------------------------------------

    def delta(self, epsilon: float) -> Interval:
        """Certified bounds of this direction's delta at ``epsilon``."""
        if self._closed is not None:
            return self._closed(epsilon)
        if epsilon >= self._largest_loss():
            return 0.0, 0.0
        rows, chernoff = self._rows_at_epsilon(self._table, epsilon)
        answer = (0.0, exp_up(min(chernoff, 0.0)))
        if chernoff < _VANISHED:
            return answer
        log_delta = min(guess_log_delta(rows, epsilon), chernoff)
        contour = plan_contour(self._table, rows, epsilon, log_delta, _LOG_TOLERANCE)
        if contour is not None:
            answer, self.tilt = _intersect(answer, contour.delta(epsilon)), contour.tilt
        if answer[1] - answer[0] > _POOR * answer[1]:
            lower = max(one_step_delta(phase.pair, epsilon, self._direction)[0] for phase in self._phases)
            answer = _intersect(answer, (lower, gaussian_delta(self._phases, epsilon)[1]))
        if answer[1] - answer[0] > _LATTICE * answer[1]:
            answer = _intersect(answer, self._lattice().delta(epsilon))
        return answer

    def _rows_at_epsilon(
        self, table: MomentTable, epsilon: float, start: float | None = None, enough: float = -math.inf
    ) -> tuple[Rows, float]:
        """Tilts around the best one for ``epsilon``, and the Renyi bound of log delta over them."""

        def bound(rows: Rows) -> Array:
            kappa = log_kappas(rows.tilts)
            size = rows.upper + np.abs(kappa) + rows.tilts * epsilon
            value: Array = rows.upper + kappa - rows.tilts * epsilon + _PAD * size
            return value

        rows = table.around(start or table.start(-0.5 * epsilon - 1.0), bound, enough)
        return rows, float(bound(rows).min())

    def is_within(self, epsilon: float, delta: float, start: float | None = None) -> bool:
        """Whether this direction is proved (epsilon, delta)-DP by a few cheap bounds; False decides nothing.

        ``start`` is a tilt near the best one, if known.
        """
        if self._closed is not None:
            return self._closed(epsilon)[1] < delta
        if epsilon >= self._largest_loss():
            return True
        rows, chernoff = self._rows_at_epsilon(self._table, epsilon, start, math.log(delta))
        if chernoff < math.log(delta):
            return True
        log_delta = min(guess_log_delta(rows, epsilon), chernoff)
        contour = plan_contour(self._table, rows, epsilon, log_delta, _ROUGH_TOLERANCE)
        return contour is not None and contour.delta(epsilon)[1] < delta


def _is_wider(interval: Interval, relative: float) -> bool:
    return interval[1] - interval[0] > relative * max(1.0, interval[1])


def _intersect(first: Interval, second: Interval) -> Interval:
    """Both hold, so their intersection does; crossed ends would mean that a proof or the arithmetic is wrong."""
    low, high = max(first[0], second[0]), min(first[1], second[1])
    if low > high:
        raise ArithmeticError(f"certified intervals {first} and {second} do not meet")
    return low, high
