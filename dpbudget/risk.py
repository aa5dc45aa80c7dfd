"""What a privacy profile means for an attacker: trade-off, true positive rate, Bayes success, reconstruction.

Everything is a function of delta(epsilon), the larger one of both directions. For a threshold t > 0 on the likelihood
ratio let H(t) = sup over events of P(S) - t Q(S), again the larger of both directions, so that for epsilon >= 0

    H(e^epsilon) = delta(epsilon),      H(e^-epsilon) = 1 - e^-epsilon + e^-epsilon delta(epsilon).

H is convex as a supremum of lines, and the best test with false positive rate a has at most the true positive rate

    TPR(a) = inf over t > 0 of H(t) + a t

(Wasserman and Zhou 2010; Kairouz, Oh and Viswanath 2015; Dong, Roth and Su 2022, Proposition 2.12). Every t gives an
upper bound, the guarantee. Convexity bounds the infimum from below: between two evaluated points H + a t lies above the
lines through their neighbours. Both ends are therefore certified wherever delta is; the search only decides how close
they are. The lower end is what the symmetrised profile allows. Where one direction is cheaper at some thresholds, an
attack on one direction alone may reach less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from dpbudget._guarantee import as_real
from dpbudget._numerics import ELEMENTARY, UNIT
from dpbudget.curve import Bounds, Kind
from dpbudget.errors import InvalidParameter

#: The search ends at this relative gap between the bounds, or after so many questions to the profile.
_GAP, _QUESTIONS = 1e-6, 40
#: Distance of the last probes in log t: convexity leaves about half of its square as a relative gap.
_PROBE = 1e-3
#: Thresholds beyond exp(+-this) are not tried; they matter to rates below 1e-300 only.
_FARTHEST = 700.0
#: One exponential, three products and two sums of non-negative terms.
_ROUNDING = 2.0 * (ELEMENTARY + 8.0 * UNIT)


def as_probability(name: str, value: object) -> float:
    """A number in [0, 1]; raises InvalidParameter (DP009) that names it."""
    number = as_real(value)
    if number is None or not 0.0 <= number <= 1.0:
        raise InvalidParameter(
            f"{name} must be a probability in [0, 1], got {value!r}", hint=f"pass {name} as a number such as 0.01"
        )
    return number


@dataclass
class Profile:
    """The function H of the module's text, each delta asked once.

    Attributes:
        delta: bounds of delta at an epsilon >= 0, both directions.
    """

    delta: Callable[[float], Bounds]
    asked: dict[float, Bounds] = field(default_factory=dict)

    def height(self, x: float) -> Bounds:
        """Bounds of H(t), t = e^x, rounding included."""
        epsilon = abs(x)
        if epsilon not in self.asked:
            self.asked[epsilon] = self.delta(epsilon)
        bounds = self.asked[epsilon]
        scale, base = (1.0, 0.0) if x >= 0.0 else (math.exp(x), -math.expm1(x))
        low, high = base + scale * bounds.lower, base + scale * min(bounds.upper, 1.0)
        return Bounds(low * (1.0 - _ROUNDING), high * (1.0 + _ROUNDING), bounds.kind)

    @property
    def kind(self) -> Kind:
        """``certified`` if every delta asked was."""
        return "certified" if all(item.kind == "certified" for item in self.asked.values()) else "numerical"


def true_positive_rate(profile: Profile, fpr: float) -> Bounds:
    """Bounds of the largest true positive rate at false positive rate ``fpr``; the upper end holds for every attack.

    Raises:
        InvalidParameter: ``fpr`` is not in [0, 1] (DP009).
    """
    fpr = as_probability("fpr", fpr)
    if fpr == 1.0:
        return Bounds(1.0, 1.0)
    points: dict[float, Bounds] = {}

    def at(x: float) -> float:
        if x not in points:
            height, line = profile.height(x), math.exp(x) * fpr
            points[x] = Bounds(
                (height.lower + line) * (1.0 - _ROUNDING), (height.upper + line) * (1.0 + _ROUNDING), height.kind
            )
        return points[x].upper

    _descend(at, lambda: _gap(points, fpr))
    upper = min(1.0, *(point.upper for point in points.values()))
    return Bounds(min(max(_floor(points, fpr), fpr), upper), upper, profile.kind)


def power_bound(profile: Profile, fpr: float, x: float) -> float:
    """Upper bound of the true positive rate at ``fpr`` from the one threshold t = e^x; valid for every x."""
    return min(1.0, (profile.height(x).upper + math.exp(x) * fpr) * (1.0 + _ROUNDING))


def trade_off(profile: Profile, alpha: float) -> Bounds:
    """Bounds of the smallest type II error of a test with type I error ``alpha``; the *lower* end is the guarantee."""
    rate = true_positive_rate(profile, alpha)
    low, high = 1.0 - rate.upper, 1.0 - rate.lower
    return Bounds(max(low - UNIT, 0.0), min(high + UNIT, 1.0), rate.kind)


def bayes_success(profile: Profile, prior: float) -> Bounds:
    """Bounds of the probability that the best guess of membership is right, for a prior probability of membership.

    With m = max(prior, 1 - prior) it is m + (1 - m) delta(log(m / (1 - m))): the value of the best test,
    prior TPR + (1 - prior)(1 - FPR), is linear in P(S) and Q(S). A guess without any output is right with m.
    """
    prior = as_probability("prior", prior)
    most = max(prior, 1.0 - prior)
    rest = 1.0 - most
    if rest == 0.0:
        return Bounds(1.0, 1.0)
    bounds = profile.delta(max(math.log(most / rest), 0.0))
    # H is 1-Lipschitz in t, so that an error of the logarithm costs at most rest * t * error <= error.
    pad = 64.0 * UNIT
    low, high = most + rest * bounds.lower, most + rest * min(bounds.upper, 1.0)
    return Bounds(max(low - pad, most), min(high + pad, 1.0), bounds.kind)


def _descend(at: Callable[[float], float], gap: Callable[[], float]) -> None:
    """Evaluate ``at``, quasi-convex in x, ever closer to its minimum until the gap closes or nothing moves."""
    left, middle, right = _bracket(at)
    for _ in range(_QUESTIONS):
        if right - left <= 4.0 * _PROBE:
            break
        x = _parabola(at, left, middle, right)
        if abs(x - middle) < _PROBE:
            # The parabola has settled: two probes beside it bracket the minimum narrowly.
            for probe in (max(middle - _PROBE, -_FARTHEST), min(middle + _PROBE, _FARTHEST)):
                left, middle, right = _shrink(at, left, middle, right, probe)
            if gap() <= _GAP:
                return
            x = 0.5 * (left + middle) if middle - left > right - middle else 0.5 * (middle + right)
        left, middle, right = _shrink(at, left, middle, right, x)
        if gap() <= _GAP:
            return


def _bracket(at: Callable[[float], float]) -> tuple[float, float, float]:
    step = 0.5
    sign = 1.0 if at(step) <= at(-step) else -1.0
    before, here = -sign * step, 0.0
    if at(0.0) > at(sign * step):
        before, here = 0.0, sign * step
    while abs(here) < _FARTHEST:
        after = sign * min(abs(here) + step, _FARTHEST)
        if at(after) >= at(here):
            return min(before, after), here, max(before, after)
        before, here, step = here, after, 1.6 * step
    return min(before, here), here, max(before, here)


def _shrink(
    at: Callable[[float], float], left: float, middle: float, right: float, x: float
) -> tuple[float, float, float]:
    """The bracket after one more point."""
    if not left < x < right or x == middle:
        return left, middle, right
    if at(x) <= at(middle):
        return (left, x, middle) if x < middle else (middle, x, right)
    return (x, middle, right) if x < middle else (left, middle, x)


def _parabola(at: Callable[[float], float], left: float, middle: float, right: float) -> float:
    """The minimum of the parabola through three points; a golden section where it is useless."""
    one, two = middle - left, right - middle
    longer = middle - 0.38 * one if one > two else middle + 0.38 * two
    if min(one, two) <= 0.0 or max(one, two) > 8.0 * min(one, two):
        return longer
    rise, fall = (at(right) - at(middle)) / two, (at(middle) - at(left)) / one
    if not math.isfinite(rise - fall) or rise <= fall:
        return longer
    x = middle - (rise * one + fall * two) / (2.0 * (rise - fall))
    return x if left < x < right else longer


def _gap(points: dict[float, Bounds], slope: float) -> float:
    upper = min(1.0, *(point.upper for point in points.values()))
    return (upper - max(_floor(points, slope), slope)) / upper if upper > 0.0 else 0.0


def _floor(points: dict[float, Bounds], slope: float) -> float:
    """Lower bound of the infimum of a convex function of t = e^x, at all t > 0, from bounds at some x."""
    xs = sorted(points)
    ts = [math.exp(x) for x in xs]
    known = [points[x] for x in xs]
    # Outside the points H(t) >= 1 - t and H >= 0; and nothing is lower where the curve rises away from them already.
    left = right = 0.0
    if len(xs) > 1:
        left = known[0].lower if known[1].upper <= known[0].lower else 0.0
        right = known[-1].lower if known[-1].lower >= known[-2].upper else 0.0
    left = max(left, 1.0 - ts[0] * (1.0 - slope) - 16.0 * UNIT * (1.0 + ts[0]))
    floor = min(left, max(right, ts[-1] * slope * (1.0 - _ROUNDING)))
    for i in range(len(xs) - 1):
        floor = min(floor, _least_between(ts, known, i))
    return max(floor, 0.0)


def _least_between(ts: list[float], known: list[Bounds], i: int) -> float:
    """Lower bound on [ts[i], ts[i + 1]]: above the lines through the two points left of it, and the two right of it."""
    a, b = ts[i], ts[i + 1]
    # Each line by its values at a and b: the near point's lower end, the far point's upper end.
    lines = []
    if i > 0 and a > ts[i - 1]:
        share = (b - a) / (a - ts[i - 1])
        far = known[i].lower * (1.0 + share) - known[i - 1].upper * share
        lines.append((known[i].lower, far - 1e-14 * (1.0 + share) * known[i - 1].upper))
    if i + 2 < len(ts) and ts[i + 2] > b:
        share = (b - a) / (ts[i + 2] - b)
        far = known[i + 1].lower * (1.0 + share) - known[i + 2].upper * share
        lines.append((far - 1e-14 * (1.0 + share) * known[i + 2].upper, known[i + 1].lower))
    if not lines:
        return 0.0
    if len(lines) == 1:
        return min(lines[0])
    (p, q), (r, s) = lines
    ends = [max(p, r), max(q, s)]
    # The maximum of two lines is least at an end or where they cross.
    if (p - r) * (q - s) < 0.0:
        share = (p - r) / ((p - r) + (s - q))
        ends.append(min(p + share * (q - p), r + share * (s - r)) - 1e-15 * (abs(p) + abs(q) + abs(r) + abs(s)))
    return min(ends)
