"""Live epsilon: a monotone table of bounds by number of steps."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from dpbudget.curve import Bounds


@dataclass(frozen=True)
class Meter:
    """Epsilon at ``delta`` after any number of steps of one plan, **if stopping there had been planned**.

    The guarantee of a run is its plan's claim, whatever the meter shows. Between the tabled points the upper bound of
    the next point and the lower bound of the previous one hold, since epsilon grows with the number of steps.

    Attributes:
        steps: increasing numbers of steps, the last one the whole plan.
        bounds: epsilon at each of them.
        delta: the delta of the plan's claim.
        target: the plan's claimed epsilon.
    """

    steps: tuple[int, ...]
    bounds: tuple[Bounds, ...]
    delta: float
    target: float

    def epsilon(self, steps: int) -> Bounds:
        """Bounds after ``steps`` steps, 0 <= steps <= planned steps; exactly 0 before the first step."""
        if steps <= 0:
            return Bounds(0.0, 0.0)
        index = bisect_left(self.steps, steps)
        if index == len(self.steps):
            raise ValueError(f"{steps} steps are beyond the plan of {self.steps[-1]}")
        if self.steps[index] == steps:
            return self.bounds[index]
        lower = self.bounds[index - 1].lower if index else 0.0
        return Bounds(min(lower, self.bounds[index].upper), self.bounds[index].upper, self.bounds[index].kind)
