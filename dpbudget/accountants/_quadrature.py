"""Trapezoid grids for moments of one sampled Gaussian step, with proved error bounds.

With z = t the moment is M(t) = int phi W e^{t L}, W the step's own density against the standard normal phi (``_law``),
and it is summed as 1 + int phi W [e^{t L} - 1] with the linear part taken without cancellation. Proofs:
docs/accounting.md, "x-grid".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dpbudget._numerics import truncate_mantissa
from dpbudget.accountants._law import Array, Law, losses_at, posterior, posteriors

#: A grid with more nodes is refused. A real tilt that needs more than the second number is of no use to anyone.
MAX_NODES, MAX_REAL_NODES = 1 << 18, 1 << 14
_ANGLES = np.linspace(0.1, 3.1, 31)
_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
# The few float operations of a bound cannot spoil more than this.
_SLACK = 1.0 + 1e-9
# Grids below this many nodes are not worth a sharper bound of the strip.
_FEW_NODES = 200
_SHARP_ANGLES = np.geomspace(0.02, 3.0, 16)
_SHARP_CELLS = 240


@dataclass(frozen=True)
class Grid:
    """Nodes ``k * step`` (exact in floating point) of the trapezoid rule, and the angle its error bound uses.

    Attributes:
        nodes: x, increasing.
        step: h.
        angle: theta in (0, pi); the strip has half-width y = theta / m.
        shift: m.
        log_swell: bound of log int |W e^{tL}|(x + iy) dx - y^2/2 for |u| <= ``u_max``, but for :func:`shrink_of`; None
            for the plain bound log M(c) + |u| theta (twice theta where a record is replaced).
        u_max: largest |u| for which ``log_swell`` holds.
    """

    nodes: Array
    step: float
    angle: float
    shift: float
    log_swell: float | None = None
    u_max: float = math.inf

    def log_strip_factor(self) -> float:
        """Logarithm of 2 exp(y^2 / 2) / (exp(2 pi y / step) - 1), y = angle / m: error per unit of integral."""
        height = self.angle / self.shift
        exponent = 2.0 * math.pi * height / self.step
        return math.log(2.0) + 0.5 * height * height - exponent - math.log(-math.expm1(-exponent)) + 1e-9

    def log_strip(self, law: Law, u: Array, log_moment: float) -> Array:
        """Log of the trapezoid rule's error for W e^{tL}, t = c + iu with |u| <= u_max, but for :func:`shrink_of`.

        ``log_moment`` is an upper bound of log int W e^{cL}.
        """
        if self.log_swell is None:
            inside: Array = log_moment + np.abs(u) * (self.angle * turns_of(law))
        else:
            inside = np.full(u.shape, self.log_swell)
        return inside + self.log_strip_factor()


def turns_of(law: Law) -> float:
    """How many factors of the integrand turn with the imaginary part of x."""
    return 2.0 if law.side == "replace" else 1.0


def shrink_of(law: Law, tilt: float | Array, angle: float | Array) -> Array:
    """Log of the factor by which negative powers and the cut may exceed their values on the real line.

    -c log cos(theta/2) for |1 + r|^{-c} and -log cos(v/2), v = theta / (m width), for the cut; infinite from v = pi on.
    """
    value = np.zeros(np.broadcast(tilt, angle).shape)
    if law.side != "remove":
        value = value - np.asarray(tilt) * (np.log(np.cos(0.5 * np.asarray(angle))) - 1e-12)
    if law.cut is not None:
        v = np.asarray(angle) / (law.shift * law.cut.width)
        inside = v < 3.1
        value = value + np.where(inside, -np.log(np.cos(0.5 * np.where(inside, v, 0.0))) + 1e-12, np.inf)
    return value


def choose_grid(law: Law, tilt: float, u_max: float, nats: float, sharp: bool = True) -> Grid | None:
    """The coarsest grid whose error bound is about exp(-nats) relative to M(tilt), for all |u| <= u_max.

    None where it would need more than MAX_NODES nodes. The choice is heuristic, the bound computed from it is not.
    """
    low, high = window(law, tilt, nats)
    angles = _angles_of(law)
    heights = angles / law.shift
    growth = nats + 0.5 * heights * heights + u_max * turns_of(law) * angles + shrink_of(law, tilt, angles)
    steps = 2.0 * math.pi * heights / growth
    best = int(np.argmax(steps))
    step, angle, swell = float(steps[best]), float(angles[best]), None
    if sharp and (high - low) / step > _FEW_NODES and u_max > 0.0:
        finer = _sharp_step(law, tilt, u_max, nats)
        if finer[0] > step:
            step, angle, swell = finer
    step = truncate_mantissa(step)
    first, last = math.floor(low / step), math.ceil(high / step)
    if law.side == "replace":
        first = -last  # the symmetric window lets the linear part of the loss cancel exactly
    if last - first >= (MAX_NODES if u_max > 0.0 or law.cut is not None else MAX_REAL_NODES):
        return None
    nodes = np.arange(first, last + 1, dtype=np.float64) * step
    return Grid(nodes, step, angle, law.shift, swell, math.inf if swell is None else u_max)


def _angles_of(law: Law) -> Array:
    """Angles to choose from; the cut has a pole at pi times its width."""
    if law.cut is None:
        return _ANGLES
    return _ANGLES * min(1.0, law.shift * law.cut.width * 3.0 / 3.1)


def window(law: Law, tilt: float, nats: float) -> tuple[float, float]:
    """Where the tilted density exceeds about exp(-nats) of its peak."""
    radius = math.sqrt(2.0 * nats)
    if law.cut is not None:
        at = law.cut.at
        beyond = math.sqrt(at * at + 2.0 * nats) + 2.0 * law.cut.width
        high = max(beyond, (1.0 + 2.0 * tilt) * law.shift - 1.0 / law.cut.width + radius)
        return (-high if law.side == "replace" else -radius), high
    if law.side == "remove":
        return -radius, (1.0 + tilt) * law.shift + radius
    if law.side == "add":
        return add_mode(law.rate, law.shift, tilt) - radius, law.shift + radius
    high = (1.0 + 2.0 * tilt) * law.shift + radius
    low = max((1.0 + tilt) * law.shift, 0.0) + radius
    while high - low > 0.05 * high:  # the farther record pulls by c m p-, which falls to the right
        middle = 0.5 * (low + high)
        pull = (1.0 + tilt) * law.shift + tilt * law.shift * posterior(law.rate, -law.shift, middle)
        low, high = (middle, high) if middle - radius < pull else (low, middle)
    return -high, high


def _sharp_step(law: Law, tilt: float, u_max: float, nats: float) -> tuple[float, float, float]:
    """(step, angle, log_swell) of the best strip with |u| arg(1 + r) averaged over x, not replaced by its maximum.

    On the line x + iy the argument of 1 + r is atan2(p sin theta, 1 - p + p cos theta), increasing in the posterior p.
    Upper Riemann sums of W e^{cL} e^{|u| arg} over cells: the weight of a cell is at most its larger end times
    exp(cell/2 * largest slope), the argument is taken at the end where it is larger.
    """
    angles, turns = np.minimum(_SHARP_ANGLES, _angles_of(law)[-1]), turns_of(law)
    low, high = window(law, tilt, nats + 3.0 + min(0.5 * u_max * turns, 2000.0))
    edges = np.linspace(low, high, _SHARP_CELLS + 1)
    losses = losses_at(law, edges)
    log_w = -0.5 * edges * edges - _LOG_SQRT_2PI + losses.log_weight + tilt * losses.loss
    width = float(edges[1] - edges[0])
    near, far = posteriors(law, edges)
    sine, cosine = np.sin(angles)[:, None], np.cos(angles)[:, None]

    def turn(p: Array) -> Array:
        return np.asarray(np.arctan2(p * sine, (1.0 - p) + p * cosine) * (1.0 + 1e-11), dtype=np.float64)

    turned = turn(near[None, 1:])
    if law.side == "replace":
        turned = turned + turn(far[None, :-1])
    slope = np.maximum(np.abs(edges[1:]), np.abs(edges[:-1])) + (1.0 + 2.0 * tilt) * law.shift
    if law.cut is not None:
        slope = slope + law.cut.kept(edges[1:])[1] / law.cut.width
    log_cell = np.maximum(log_w[1:], log_w[:-1]) + 0.5 * width * slope + math.log(width)
    swell = _log_sum(log_cell[None, :] + u_max * turned)
    # Beyond the ends the argument is at most the angle; on the left it falls with p unless a record is replaced.
    top = float(log_w.max())
    at_left = moment_tails(law, (low, high), tilt, (log_w[0] - top, -np.inf))
    at_right = moment_tails(law, (low, high), tilt, (-np.inf, log_w[-1] - top))
    with np.errstate(divide="ignore"):
        left, right = np.log(at_left) + top, np.log(at_right) + top
    left_turn = turns * angles if law.side == "replace" else turn(near[None, :1])[:, 0]
    swell = np.logaddexp(np.logaddexp(swell, left + u_max * left_turn), right + u_max * turns * angles)
    swell = swell + 1e-6 + 1e-13 * tilt * float(np.abs(losses.loss).max())
    heights = angles / law.shift
    log_mass = float(_log_sum(log_w[None, :])[0]) + math.log(width)
    growth = nats + 0.5 * heights * heights + np.maximum(swell - log_mass, 0.0) + shrink_of(law, tilt, angles)
    steps = 2.0 * math.pi * heights / growth
    best = int(np.argmax(steps))
    return float(steps[best]), float(angles[best]), float(swell[best])


def _log_sum(exponent: Array) -> Array:
    """Log of the sum of exponentials along the last axis."""
    top = exponent.max(axis=-1)
    value: Array = top + np.log(np.exp(exponent - top[..., None]).sum(axis=-1))
    return value


def add_mode(rate: float, shift: float, tilt: float) -> float:
    """The mode of exp(-x^2 / 2) (1 + r)^(-tilt), to a tenth: the root of x + tilt m p(x) = 0 in [-tilt m, 0]."""
    low, high = -tilt * shift, 0.0
    while high - low > 0.1:
        middle = 0.5 * (low + high)
        if middle + tilt * shift * posterior(rate, shift, middle) < 0.0:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def normal_tail(x: float) -> float:
    """Upper bound of P(N(0, 1) > x): phi(x) / x for x > 0, and never more than 1."""
    return min(math.exp(-0.5 * x * x - _LOG_SQRT_2PI) / x * _SLACK, 1.0) if x > 0.0 else 1.0


def correction_tails(law: Law, grid: Grid) -> tuple[float, float]:
    """Bounds of the weight of 1 and of |r| outside the window (sums over the dropped nodes included)."""
    left, right = -float(grid.nodes[0]), float(grid.nodes[-1])
    of_one = normal_tail(left) + normal_tail(right)
    return of_one, law.rate * (of_one + normal_tail(right - grid.shift))


def moment_tails(
    law: Law, ends: tuple[float, float], tilt: float | Array, log_edges: tuple[float | Array, float | Array]
) -> Array:
    """Bound of the weight of W e^{cL} outside the window [ends], for each tilt.

    Args:
        law: the step.
        ends: first and last node; beyond them the tilted density w = phi W e^{cL} must fall.
        tilt: c, one or an array.
        log_edges: log w at the first and at the last node, less the scale of the answer.

    Returns:
        The bounds; infinite where the window is too small for one.
    """
    left, right = ends
    c = np.asarray(tilt, dtype=np.float64)
    pull = c * law.shift
    if law.side == "remove":
        slope_left, slope_right = -left + 0.0 * c, right - law.shift - pull
    elif law.side == "add":
        slope_left = -left - pull * posterior(law.rate, law.shift, left)
        slope_right = right + pull * posterior(law.rate, law.shift, right)
    else:
        slope_left = -left + 0.0 * c
        slope_right = right - law.shift - pull - pull * posterior(law.rate, -law.shift, right)
    if law.cut is not None:  # d log omega / dx = -(1 - omega) / width
        slope_right = slope_right + float(law.cut.kept(np.array([right]))[1][0]) / law.cut.width
    fine = (slope_left > 1e-3) & (slope_right > 1e-3)
    # Log-concave with curvature >= 1 beyond the edge (or under a majorant that is), hence <= w / slope.
    tails = np.exp(np.minimum(log_edges[0], 700.0)) / np.maximum(slope_left, 1e-3)
    tails = tails + np.exp(np.minimum(log_edges[1], 700.0)) / np.maximum(slope_right, 1e-3)
    answer: Array = np.where(fine, tails * _SLACK, np.inf)
    return answer
