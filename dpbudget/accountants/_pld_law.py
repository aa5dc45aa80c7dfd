"""Discrete laws of one privacy loss that are provably worse, or provably better, than a dominating pair.

The privacy profile h(y) = F(L > t) - y S(L > t), y = e^t, is convex and decreasing with h(0) = 1, and -S(L > t) is one
of its slopes. A positive measure with masses w_j at losses t_j and w_inf at +inf has the profile
g(y) = w_inf + sum_j w_j (1 - y / y_j)_+. If g >= h everywhere, replacing a step by the measure never lowers the delta
of a composition, whatever the other steps are; if g <= h it never raises it (docs/accounting-pld.md, "Domination").

``spread`` interpolates upper bounds of h at the nodes (connect the dots, Doroshenko et al. 2022); ``contract``
interpolates values that lie below h by at least the gap between h and its chord. Both then take the lower convex hull.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpbudget._numerics import UNIT

if TYPE_CHECKING:
    Index = np.typing.NDArray[np.int64]
    from dpbudget.mechanisms.base import Array, Direction, DominatingPair

# e^t is clipped here: S(L > t) <= e^-t is below every normal float beyond.
_LARGEST = 700.0
# Relative rounding of y * S (elementary function, product), and of the law's profile (docs, "Rounding of the masses").
_PRODUCT, _PROFILE = 24.0 * UNIT, 256.0 * UNIT
# Masses below are lost in underflow: added to the mass at +inf above, cut off below.
_TINY = 1e-290
# Passes of dropping all points above their neighbours' line before one full scan.
_PASSES = 60


@dataclass(frozen=True)
class Law:
    """A positive measure on losses: ``weights`` [N] at ``losses`` [N] (increasing) and ``infinite`` at +inf."""

    losses: Array
    weights: Array
    infinite: float

    def log_moment(self, tilt: float) -> float:
        """Logarithm of sum_j w_j e^(tilt t_j), without the mass at +inf, any real ``tilt``; see ``accuracy``."""
        exponents = tilt * self.losses
        largest = float(np.max(exponents))
        return largest + math.log(max(float(self.weights @ np.exp(exponents - largest)), 5e-324))

    def accuracy(self, tilt: float) -> float:
        """Absolute error bound of ``log_moment``: rounded exponents, and a sum of positive terms in any order."""
        reach = abs(tilt) * max(abs(float(self.losses[0])), abs(float(self.losses[-1])))
        return (len(self.losses) + 64.0 + 8.0 * reach) * UNIT


def spread(pair: DominatingPair, direction: Direction, nodes: Array) -> Law:
    """A law with profile >= h: upper bounds of h at ``nodes``, joined by lines; what lies above the nodes is at +inf.

    Args:
        pair: the dominating pair.
        direction: which of its two laws comes first.
        nodes: increasing finite losses, shape [N], N >= 2. The line to (0, 1) raises losses below the first one to it.
    """
    profile = upper_profile(pair, direction, nodes)
    # h falls, so a bound at a smaller y also holds further on.
    profile = np.minimum.accumulate(profile)
    kept, weights = _hull(nodes, profile, 1.0)
    return Law(nodes[kept], weights * (1.0 + _PROFILE), float(profile[-1]) * (1.0 + _PROFILE) + _TINY)


def contract(pair: DominatingPair, direction: Direction, nodes: Array) -> Law:
    """A law with profile <= h; losses beyond the last node count as nothing unless they are provably infinite.

    Args:
        pair: the dominating pair.
        direction: which of its two laws comes first.
        nodes: increasing finite losses, shape [N], N >= 2; those above 700 are not used.
    """
    nodes = nodes[: max(int(np.searchsorted(nodes, _LARGEST)), 2)]
    if nodes[1] > _LARGEST:
        return _nothing(nodes)
    tails = pair.tails(nodes, direction)
    ratios = np.exp(nodes)
    second_lower, second_upper = np.maximum(tails.second_lower, 0.0), np.minimum(tails.second_upper, 1.0)
    profile = tails.first_lower - ratios * second_upper * (1.0 + _PRODUCT) - 4.0 * UNIT * tails.first_lower
    profile = np.maximum(np.maximum.accumulate(profile[::-1])[::-1], 0.0)
    # Where S(L > t) = 0 the profile is constant from t on: an atom at +inf.
    certain = float(profile[-1]) if second_upper[-1] == 0.0 else 0.0
    profile = np.maximum((profile - certain) * (1.0 - 2.0 * UNIT), 0.0)
    # The tangent at each node, at the next one and at the one before: -S(L > t) is a slope of h at e^t.
    # e^b - e^a as e^b (1 - e^(a - b)), for a step from far below zero is no reason to overflow.
    lengths = -ratios[1:] * np.expm1(-np.diff(nodes))
    ahead = profile[:-1] - second_upper[:-1] * lengths * (1.0 + 2.0 * _PRODUCT) - 4.0 * UNIT * profile[:-1]
    back = (profile[1:] + second_lower[1:] * lengths * (1.0 - 2.0 * _PRODUCT)) * (1.0 - 4.0 * UNIT)
    index, points = _walk(profile.tolist(), ahead.tolist(), back.tolist())
    if len(index) < 2:
        return _nothing(nodes, certain)
    start = (points[0] + float(ratios[0] * second_lower[0]) * (1.0 - _PRODUCT)) * (1.0 - 2.0 * UNIT)
    kept, weights = _hull(nodes[index], np.array(points), start)
    return Law(nodes[index][kept], weights * (1.0 - _PROFILE), certain * (1.0 - _PROFILE))


def _walk(profile: list[float], ahead: list[float], back: list[float]) -> tuple[list[int], list[float]]:
    """A polygon below h with vertices at nodes; each of its sides lies below the tangent of h at one node.

    From a vertex a the side follows the tangent at i = a + 1 if a lies below it, else the one at a, and ends at i + 1.
    Along a smooth h the tangents at every other node are used; a kink between two nodes shifts the pattern.

    Args:
        profile: lower bounds of h, [N].
        ahead: lower bounds of the tangent at node k, taken at node k + 1, [N - 1].
        back: lower bounds of the tangent at node k + 1, taken at node k, [N - 1].
    """
    index, points = [0], [profile[0]]
    node, value, end = 0, profile[0], len(back)
    while value > _TINY:
        touch = node + 1 if node < end and value <= back[node] else node
        if touch >= end or ahead[touch] <= _TINY:
            # Down to zero at the touching point: below the tangent there, and zero is below h everywhere.
            if touch == node:
                points[-1] = 0.0
            else:
                index.append(touch)
                points.append(0.0)
            break
        node, value = touch + 1, ahead[touch]
        if node < end and 0.0 < value - back[node] <= 0.25 * (profile[node] - value) + 4.0 * UNIT * value:
            value = back[node]
        index.append(node)
        points.append(value)
    return index, points


def _nothing(nodes: Array, certain: float = 0.0) -> Law:
    return Law(nodes[:1], np.zeros(1), certain)


def upper_profile(pair: DominatingPair, direction: Direction, nodes: Array) -> Array:
    """Upper bounds of h at every node, in [0, 1], shape [N]."""
    tails = pair.tails(nodes, direction)
    ratios = np.exp(np.minimum(nodes, _LARGEST))
    product = ratios * np.maximum(tails.second_lower, 0.0) * (1.0 - _PRODUCT)
    profile = (tails.first_upper - product) * (1.0 + 4.0 * UNIT)
    # h >= 1 - y: what rounding left below it would only cost convexity.
    return np.clip(np.maximum(profile, -np.expm1(np.minimum(nodes, 0.0)) * (1.0 - 64.0 * UNIT)), 0.0, 1.0)


def lower_profile(pair: DominatingPair, direction: Direction, losses: Array) -> Array:
    """Lower bounds of h at every loss, in [0, 1], shape [N]; 0 where e^loss is too large."""
    tails = pair.tails(losses, direction)
    product = np.exp(np.minimum(losses, _LARGEST)) * np.minimum(tails.second_upper, 1.0) * (1.0 + _PRODUCT)
    profile = tails.first_lower * (1.0 - 4.0 * UNIT) - product * (1.0 + UNIT)
    # Beyond, only S = 0 still says something.
    known = (losses <= _LARGEST) | (tails.second_upper == 0.0)
    return np.where(known, np.clip(profile, 0.0, 1.0), 0.0)


def _hull(nodes: Array, values: Array, start: float) -> tuple[Index, Array]:
    """Indices and masses of the lower convex hull of the points (e^t, value), and (0, start).

    With d_k = v_(k-1) - v_k and q_k = d_k / (e^(t_k - t_(k-1)) - 1) (q of the first node 0) the mass is
    w_k = d_k + (q_k - q_(k+1)). A negative mass is a point above the line through its neighbours, hence no vertex of
    the hull: all of them may be dropped at once, until none is left.
    """
    kept = _before_last(nodes, values)
    for passes in itertools.count():  # every pass drops a point, and the last point stays
        weights = _masses(nodes[kept], values[kept], start)
        bad = weights < 0.0
        bad[-1] = False
        if not bad.any():
            weights[-1] = max(float(weights[-1]), 0.0)
            return kept, weights
        kept = _scan(kept[~bad], nodes, values, start) if passes == _PASSES else kept[~bad]
    raise AssertionError("unreachable")


def _before_last(nodes: Array, values: Array) -> Index:
    """Without the points above the hull's last side, which may be long: found from the slopes at once."""
    slopes = (values[:-1] - values[-1]) / -np.expm1(np.maximum(nodes[:-1] - nodes[-1], -_LARGEST))
    kept = np.arange(int(np.argmin(slopes)) + 2, dtype=np.int64)
    kept[-1] = len(nodes) - 1
    return kept


def _masses(nodes: Array, values: Array, start: float) -> Array:
    falls = np.append(start - values[0], values[:-1] - values[1:])
    growth = np.expm1(np.minimum(np.diff(nodes), _LARGEST))
    quotients = np.concatenate(([0.0], falls[1:] / growth, [0.0]))
    return np.asarray(falls + (quotients[:-1] - quotients[1:]))


def _scan(kept: Index, nodes: Array, values: Array, start: float) -> Index:
    """The hull by one pass from the left (Andrew 1979), where dropping one neighbour at a time would take long."""
    stack: list[int] = []
    for k in kept.tolist():
        while stack:
            middle = stack[-1]
            ahead = _quotient(nodes, values, middle, k)
            fall, behind = start - values[middle], 0.0
            if len(stack) > 1:
                fall, behind = values[stack[-2]] - values[middle], _quotient(nodes, values, stack[-2], middle)
            if fall + (behind - ahead) >= 0.0:
                break
            stack.pop()
        stack.append(k)
    return np.array(stack, dtype=np.int64)


def _quotient(nodes: Array, values: Array, left: int, right: int) -> float:
    return float((values[left] - values[right]) / math.expm1(min(nodes[right] - nodes[left], _LARGEST)))
