"""Dropping outputs so rare that delta hardly notices, which tames the moments of rare large losses.

At a tilt that suits epsilon, moments may be ruled by losses that no one will ever see: a step's moment then explodes
(for small rates with a jump) and no useful contour is left. Dropping the outputs x beyond a point with probability
lambda in each of T steps changes delta by at most T lambda, since g <= 1 and what is left is a smaller measure. Choices
here are heuristic but for :func:`dropped_mass`, which is a bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from dpbudget.accountants._law import Cut, Law

#: Widths of epsilon, relative to max(1, epsilon), that cuts may cost; the first that is good enough counts.
COSTS = (3e-10, 3e-8, 3e-7)
_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
_LARGEST_TILT = 3000.0


def dropped_mass(law: Law) -> float:
    """Upper bound of the probability that one step's output is dropped; 0 without a cut.

    1 - omega(x) <= min(1, e^{(x - at)/w}); over N(mu, 1), with d = at - mu > 0 and 1/w > d, completing the square gives
    int <= phi(d) / d + phi(d) / (1/w - d).
    """
    if law.cut is None:
        return 0.0
    total = 0.0
    for share, mean in ((1.0 - law.rate, 0.0), (law.rate, law.shift)):
        distance = law.cut.at - mean
        room = 1.0 / law.cut.width - distance
        if distance <= 0.0 or room <= 0.0:
            return 1.0
        total += share * math.exp(-0.5 * distance * distance - _LOG_SQRT_2PI) * (1.0 / distance + 1.0 / room)
    return total * (1.0 + 1e-9)


def cut_laws(
    laws: Sequence[Law], counts: Sequence[int], epsilon: float, delta: float, cost: float
) -> tuple[Law, ...] | None:
    """The laws with cuts that widen epsilon by about ``cost``, sharp enough for the tilts that matter; or None."""
    sampled = [law for law in laws if not law.plain]
    if not sampled or any(law.side == "add" for law in sampled):
        return None
    # Beyond a tilt at which the bulk itself has a moment of a few nats no saddle lies.
    variance = math.fsum(
        count * law.rate**2 * math.expm1(min(law.square_distance, 3.0))
        for law, count in zip(laws, counts, strict=True)
        if not law.plain
    )
    tilt = min(3.0 / math.sqrt(max(variance, 1e-300)), *(_tilt_of_a_jump(law, epsilon) for law in sampled))
    # log delta falls by about the tilt per unit of epsilon.
    share = min(cost * max(1.0, epsilon) * tilt, 1e-4)
    answer = []
    for law, count in zip(laws, counts, strict=True):
        if law.plain:
            answer.append(law)
            continue
        cut = _cut_of(law, tilt, share * delta / (count * len(sampled)))
        if cut is None:
            return None
        answer.append(replace(law, cut=cut))
    return tuple(answer)


def _tilt_of_a_jump(law: Law, epsilon: float) -> float:
    """The tilt whose largest weight lies where a single step loses epsilon: x = c m p(x)."""
    growth = math.expm1(epsilon) if epsilon < 700.0 else math.inf
    exponent = math.log1p(growth / law.rate) if growth < math.inf else epsilon - math.log(law.rate)
    x = exponent / law.shift + 0.5 * law.shift
    posterior = -math.expm1(-epsilon) + law.rate * math.exp(-epsilon)
    return min(max(x / (law.shift * posterior), 1.0), _LARGEST_TILT)


def _cut_of(law: Law, tilt: float, mass: float) -> Cut | None:
    width = 1.0 / (law.shift * (1.0 + 2.0 * tilt) + 40.0)
    low, high = law.shift + 0.5, law.shift + 38.0
    if dropped_mass(replace(law, cut=Cut(high, width))) > mass:
        return None
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if dropped_mass(replace(law, cut=Cut(middle, width))) > mass else (low, middle)
    return Cut(high, width)
