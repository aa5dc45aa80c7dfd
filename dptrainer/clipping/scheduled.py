"""A clipping threshold that follows a public schedule, under a plan with one clipping norm.

With the threshold C_t of step t, example i contributes (C / C_t) min(1, C_t / ||g_i||) g_i, of norm at most the plan's
C, and takes the receipt's noise. Multiplied by C_t / C afterwards, that is the sum of gradients clipped to C_t with
noise of standard deviation sigma C_t (Abadi et al. 2016, Algorithm 1): what a plan with clipping norm C_t would give at
that step, at the same cost, since the last product is post-processing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dpbudget.errors import InvalidParameter, Unreadable
from dptrainer.clipping.engine import LARGEST_CLIP_NORM, SMALLEST_CLIP_NORM, clip_factors, usable_factors
from dptrainer.clipping.policy import Clipping, total
from dptrainer.values import NoisySum

if TYPE_CHECKING:
    from dpbudget.ledger.receipt import Receipt

#: How far a threshold may be from the plan's C: beyond, factors would leave the normal range of float32.
FARTHEST = 2.0**16


class ScheduledClipping(Clipping):
    """Clips to C_t, a public function of the step.

    Guarantee: that of the plan, whatever the schedule says, as long as **no private quantity decides it**: a threshold
    that follows the data belongs in :class:`~dptrainer.QuantileClipping`, which pays for it.

    Args:
        schedule: from which step of the run (counted from 0) on which threshold holds, ``{0: 1.0, 500: 0.5}``; or a
            function of the step. Within [C / 65536, 65536 C] of the plan's C.

    Raises:
        InvalidParameter: no threshold for step 0, or one out of range (DP007). Of a function's answers that is known
            at each step, before its noise.
    """

    def __init__(self, schedule: Mapping[int, float] | Callable[[int], float]) -> None:
        self._step = 0
        self._steps: list[tuple[int, float]] = []
        if callable(schedule):
            self._function = schedule
            return
        if not isinstance(schedule, Mapping) or not schedule or any(type(s) is not int or s < 0 for s in schedule):
            raise _refusal(f"{schedule!r:.80} is neither a function of the step nor thresholds by first step")
        self._steps = sorted(schedule.items())
        self._function = self._at
        if self._steps[0][0] != 0:
            raise _refusal(f"the first threshold holds from step {self._steps[0][0]} on, and none before")
        for _, threshold in self._steps:
            _checked(threshold, SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM)

    @property
    def threshold(self) -> float:
        """C_t of the next step."""
        return float(self._function(self._step))

    def check(self, names: object, clip_norm: float) -> None:
        """Refuse a schedule that strays too far from this C.

        Raises:
            InvalidParameter: (DP007).
        """
        for _, threshold in self._steps or [(0, self._function(self._step))]:
            _within(threshold, clip_norm)

    def factors(self, squared: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
        """See :class:`~dptrainer.clipping.policy.Clipping`; the factors carry the rescaling to the plan's C."""
        now = _within(self._function(self._step), clip_norm)
        return dict.fromkeys(squared, usable_factors(clip_factors(total(squared), now) / self.unit(clip_norm)))

    def unit(self, clip_norm: float) -> float:
        """C_t / C: from the released unit to that of the gradients."""
        return _within(self._function(self._step), clip_norm) / clip_norm

    def released(self, noisy: NoisySum, receipt: Receipt) -> None:
        """Go on to the step after the receipt's."""
        self._step = receipt.step + 1

    def state_dict(self) -> dict[str, Any]:
        """The next step; not the schedule, which is code."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved step.

        Raises:
            Unreadable: it is not one (DP091).
        """
        step = state.get("step")
        if type(step) is not int or step < 0:
            raise Unreadable("no step of a clipping schedule is saved here", code="DP091", hint="load its state_dict()")
        self._step = step

    def _at(self, step: int) -> float:
        return next(threshold for first, threshold in reversed(self._steps) if first <= step)


def _within(threshold: object, clip_norm: float) -> float:
    low, high = max(clip_norm / FARTHEST, SMALLEST_CLIP_NORM), min(clip_norm * FARTHEST, LARGEST_CLIP_NORM)
    return _checked(threshold, low, high)


def _checked(threshold: object, low: float, high: float) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not low <= threshold <= high:
        raise _refusal(f"a threshold of the schedule is {threshold!r}, outside [{low:.3g}, {high:.3g}]")
    return float(threshold)


def _refusal(what: str) -> InvalidParameter:
    return InvalidParameter(what, code="DP007", hint="ScheduledClipping({0: 1.0, 500: 0.5}), near the plan's clip_norm")
