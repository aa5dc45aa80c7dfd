"""Live epsilon: a table of what the first steps of a plan cost, made before training so that a step costs nothing."""

from __future__ import annotations

from itertools import accumulate

from dpbudget._calibrate import _load
from dpbudget._search import QuickCurve
from dpbudget.curve import Bounds, PrivacyCurve
from dpbudget.errors import NotComputable
from dpbudget.meter import Meter
from dpbudget.plan import Plan

#: A composition of fewer steps than this has a rugged law, which costs seconds to invert; a meter leaves them out.
_FEW_STEPS = 10


def build_meter(plan: Plan, *, points: int = 16) -> Meter:
    """A monotone table of epsilon by number of steps, of at most ``points`` + 1 entries.

    Guarantee: every upper end is a certified bound at the plan's delta, bounded noise tail included, and the last one
    is the bound behind the plan's claim. Epsilon grows with the steps, so an entry may take the smallest upper end at
    or after it and the largest lower end at or before it.

    Raises:
        NotComputable: the accountant cannot bound the whole plan (DP062, DP063).
    """
    accountant = _load(plan.claim.accountant)
    delta = plan.claim.delta
    ideal = plan.ideal_delta(delta)

    def answer(steps: int) -> Bounds:
        return _between(accountant.curve(plan.first(steps).charges, plan.adjacency), ideal, delta)

    rows = {plan.steps: answer(plan.steps)}
    for steps in _step_points(plan, points):
        if _is_hard(rows[min(rows)]):
            break
        try:
            rows[steps] = answer(steps)
        except NotComputable:
            break
    try:
        rows.setdefault(1, answer(1))  # one step has a closed form
    except NotComputable:
        pass
    table = tuple(sorted(rows))
    return Meter(
        steps=table, bounds=_monotone([rows[steps] for steps in table]), delta=delta, target=plan.claim.epsilon
    )


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
