"""Live epsilon: a table of what the first steps of a plan cost, made before training and finer where it is read."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from time import perf_counter

from dpbudget._calibrate import _load
from dpbudget._search import QuickCurve
from dpbudget.curve import Bounds, PrivacyCurve
from dpbudget.errors import NotComputable
from dpbudget.meter import Meter
from dpbudget.plan import Plan

#: A composition of fewer steps than this has a rugged law, which costs seconds to invert; a meter leaves them out.
_FEW_STEPS = 10
#: A meter is made finer where the next entry seems to exceed the truth by more than this share of it.
_TIGHT = 0.01
#: What that may take of the time of training: seconds at once, and for every step that was charged.
_AT_ONCE, _A_STEP = 0.1, 5e-4
#: One thread at a time refines, so that none sees epsilon fall. Not a field of what may be copied.
_REFINING = threading.Lock()


@dataclass
class _Finer:
    """The table as it has grown, and what that has cost.

    Attributes:
        table: replaced as a whole, so that threads see one table or the other.
        reached: up to here every answer is settled, so that epsilon never falls while steps are added.
        seconds: spent on further entries.
        costs: seconds that each entry took.
    """

    table: Meter
    costs: dict[int, float]
    reached: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class LiveMeter(Meter):
    """A meter that asks the accountant for further entries as training goes on.

    Guarantee: that of :class:`Meter`; every entry is certified by itself, and answers to growing numbers of steps grow.
    How tight they are follows from the time that the accountant takes, and never how true.
    """

    answer: Callable[[int], Bounds] = field(kw_only=True, repr=False, compare=False)
    finer: _Finer = field(kw_only=True, repr=False, compare=False)

    def epsilon(self, steps: int) -> Bounds:
        """As :meth:`Meter.epsilon`; within about 1 % of the truth as far as time allows."""
        if self.finer.reached < steps <= self.steps[-1]:
            with _REFINING:
                if self.finer.reached < steps:  # another thread may have been here
                    self._settle(steps)
        return self.finer.table.epsilon(steps)

    def _settle(self, steps: int) -> None:
        """Decide which entry answers for ``steps``: the next one of the table, or a new one before it."""
        finer = self.finer
        end = finer.table.steps[bisect_left(finer.table.steps, steps)]
        point = self._further_entry(steps, end)
        if point is not None:
            began = perf_counter()
            try:
                finer.table = _with_entry(finer.table, point, self.answer(point))
                end = point
            except NotComputable:
                pass
            finer.costs[point] = perf_counter() - began
            finer.seconds += finer.costs[point]
        finer.reached = end

    def _further_entry(self, steps: int, end: int) -> int | None:
        """A number of steps from ``steps`` on that is worth an entry, and that time is left for."""
        table = self.finer.table
        index = bisect_left(table.steps, end)
        if index == 0 or steps < _FEW_STEPS:
            return None
        before, low, high = table.steps[index - 1], table.bounds[index - 1].upper, table.bounds[index].upper
        if not 0.0 < low < high:
            return None
        # Between two entries epsilon is close to a power of the number of steps.
        power = math.log(high / low) / math.log(end / before)
        excess = power * math.log(end / steps)
        # Fewer steps take longer.
        cost = max(self.finer.costs.get(before, 0.0), self.finer.costs.get(end, 0.0) * end / steps, 1e-6)
        affordable = int((_AT_ONCE + _A_STEP * steps - self.finer.seconds) / cost)
        if excess <= math.log1p(_TIGHT) or affordable < 1:
            return None
        growth = max(math.log1p(_TIGHT), excess / (affordable + 1))
        point = int(steps * math.exp(growth / power))
        return point if steps <= point < end else None


def _with_entry(table: Meter, steps: int, found: Bounds) -> Meter:
    """The table with one entry more between two others, of which each end lies between theirs."""
    index = bisect_left(table.steps, steps)
    before, after = table.bounds[index - 1], table.bounds[index]
    upper = min(max(found.upper, before.upper), after.upper)
    lower = min(max(found.lower, before.lower), after.lower, upper)
    row = Bounds(lower, upper, found.kind)
    return Meter(
        steps=(*table.steps[:index], steps, *table.steps[index:]),
        bounds=(*table.bounds[:index], row, *table.bounds[index:]),
        delta=table.delta,
        target=table.target,
    )


def build_meter(plan: Plan, *, points: int = 16) -> Meter:
    """A monotone table of epsilon by number of steps, of at most ``points`` + 1 entries, which grows where it is read.

    Guarantee: every upper end is a certified bound at the plan's delta, bounded noise tail included, and the last one
    is the bound behind the plan's claim. Epsilon grows with the steps, so an entry may take the smallest upper end at
    or after it and the largest lower end at or before it.

    Raises:
        NotComputable: the accountant cannot bound the whole plan (DP062, DP063).
    """
    accountant = _load(plan.claim.accountant)
    delta = plan.claim.delta
    ideal, costs = plan.ideal_delta(delta), dict[int, float]()

    def answer(steps: int) -> Bounds:
        return _between(accountant.curve(plan.first(steps).charges, plan.adjacency), ideal, delta)

    def timed(steps: int) -> Bounds:
        began = perf_counter()
        found = answer(steps)
        costs[steps] = perf_counter() - began
        return found

    rows = {plan.steps: timed(plan.steps)}
    for steps in _step_points(plan, points):
        if _is_hard(rows[min(rows)]):
            break
        try:
            rows[steps] = timed(steps)
        except NotComputable:
            break
    try:
        rows.setdefault(1, answer(1))  # one step has a closed form
    except NotComputable:
        pass
    table = tuple(sorted(rows))
    bounds, target = _monotone([rows[steps] for steps in table]), plan.claim.epsilon
    plain = Meter(steps=table, bounds=bounds, delta=delta, target=target)
    return LiveMeter(table, bounds, delta, target, answer=answer, finer=_Finer(plain, costs))


def _between(curve: PrivacyCurve, smaller: float, delta: float) -> Bounds:
    """The lower end of epsilon at ``delta`` and its upper end at ``smaller`` <= delta."""
    if isinstance(curve, QuickCurve):
        return curve.epsilon_between(smaller, delta)
    upper = curve.epsilon(smaller)
    return Bounds(min(curve.epsilon(delta).lower, upper.upper), upper.upper, upper.kind)


def _is_hard(bounds: Bounds) -> bool:
    """Wide brackets are slow ones, and fewer steps only make them wider: the next entry's upper end holds there."""
    return 0.0 < bounds.lower < (1.0 - 1e-5) * bounds.upper


def _monotone(rows: list[Bounds]) -> tuple[Bounds, ...]:
    """Each end as tight as its neighbours allow."""
    uppers = list(accumulate((row.upper for row in reversed(rows)), min))[::-1]
    lowers = accumulate((row.lower for row in rows), max)
    return tuple(
        Bounds(min(lower, upper), upper, row.kind) for lower, upper, row in zip(lowers, uppers, rows, strict=True)
    )


def _step_points(plan: Plan, points: int) -> list[int]:
    """Numbers of steps below the whole between which epsilon grows about evenly (as their root), the largest first.

    Where the plan has phases, their ends too, as far as there are few.
    """
    total = plan.steps
    chosen = {round(total * (index / points) ** 2) for index in range(1, points)}
    if len(plan.phases) <= points:
        chosen |= set(accumulate(phase.steps for phase in plan.phases))
    return sorted((steps for steps in chosen - {total} if steps >= _FEW_STEPS), reverse=True)
