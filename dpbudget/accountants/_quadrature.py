"""Trapezoid grids for moments of one subsampled Gaussian step, with proved error bounds.

Everything is in units of the noise: under Q the output x is standard normal, m = 1 / sigma, and the likelihood ratio is
1 + r(x) with r(x) = q (exp(m x - m^2 / 2) - 1). With z = 1 + t (remove) or z = -t (add), Re t = c > 0, the moment is
M(t) = E_Q (1 + r)^z, and it is summed as 1 + E_Q[(1 + r)^z - 1 - z r]. Proofs: docs/accounting.md, "x-grid".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpbudget._numerics import truncate_mantissa
from dpbudget.mechanisms import Direction

Array = npt.NDArray[np.float64]

#: A grid with more nodes is refused; no useful tilt needs one.
MAX_NODES = 1 << 14
_ANGLES = np.linspace(0.1, 3.1, 31)
_LOG_COS = np.log(np.cos(_ANGLES / 2.0))
_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
# The few float operations of a bound cannot spoil more than this.
_SLACK = 1.0 + 1e-9


@dataclass(frozen=True)
class Grid:
    """Nodes ``k * step`` (exact in floating point) of the trapezoid rule, and the angle its error bound uses."""

    nodes: Array
    step: float
    angle: float
    shift: float  # m = 1 / sigma

    def log_strip_factor(self) -> float:
        """Logarithm of 2 exp(y^2 / 2) / (exp(2 pi y / step) - 1), y = angle / m: error per unit of integral."""
        height = self.angle / self.shift
        exponent = 2.0 * math.pi * height / self.step
        return math.log(2.0) + 0.5 * height * height - exponent - math.log(-math.expm1(-exponent)) + 1e-9


def choose_grid(rate: float, shift: float, tilt: float, direction: Direction, u_max: float, nats: float) -> Grid | None:
    """The coarsest grid whose error bound is about exp(-nats) relative to M(tilt), for all |u| <= u_max.

    None where it would need more than MAX_NODES nodes. The choice is heuristic, the bound computed from it is not.
    """
    heights = _ANGLES / shift
    growth = nats + 0.5 * heights * heights + u_max * _ANGLES
    if direction == "add":
        growth -= tilt * _LOG_COS
    steps = 2.0 * math.pi * heights / growth
    best = int(np.argmax(steps))
    step = truncate_mantissa(float(steps[best]))
    radius = math.sqrt(2.0 * nats)
    if direction == "remove":
        low, high = -radius, (1.0 + tilt) * shift + radius
    else:
        low, high = add_mode(rate, shift, tilt) - radius, shift + radius
    first, last = math.floor(low / step), math.ceil(high / step)
    if last - first >= MAX_NODES:
        return None
    return Grid(np.arange(first, last + 1, dtype=np.float64) * step, step, float(_ANGLES[best]), shift)


def add_mode(rate: float, shift: float, tilt: float) -> float:
    """The mode of exp(-x^2 / 2) (1 + r)^(-tilt): the root of x + tilt m p(x) = 0 in [-tilt m, 0], to 1 % of a unit."""
    low, high = -tilt * shift, 0.0
    while high - low > 0.01:
        middle = 0.5 * (low + high)
        if middle + tilt * shift * posterior(rate, shift, middle) < 0.0:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def posterior(rate: float, shift: float, x: float) -> float:
    """p(x) = q e^a / (1 - q + q e^a), a = m x - m^2 / 2: probability that the record was sampled, given output x."""
    if rate >= 1.0:
        return 1.0
    exponent = math.log(rate) - math.log1p(-rate) + shift * x - 0.5 * shift * shift
    return 1.0 / (1.0 + math.exp(-exponent)) if exponent > -700.0 else math.exp(exponent)


def normal_tail(x: float) -> float:
    """Upper bound phi(x) / x of P(N(0, 1) > x), x > 0."""
    return math.exp(-0.5 * x * x - _LOG_SQRT_2PI) / x * _SLACK


def correction_tails(rate: float, grid: Grid) -> tuple[float, float]:
    """Bounds of the weight of 1 and of |r| outside the window (sums over the dropped nodes included)."""
    left, right = -float(grid.nodes[0]), float(grid.nodes[-1])
    of_one = normal_tail(left) + normal_tail(right)
    return of_one, rate * (of_one + normal_tail(right - grid.shift))


def moment_tails(
    rate: float, grid: Grid, tilt: float, direction: Direction, log_edges: tuple[float, float], log_scale: float
) -> float:
    """Bound of the weight of |1 + r|^z outside the window, divided by exp(log_scale).

    Args:
        rate: q.
        grid: the grid; beyond its ends the tilted density w = phi (1 + r)^z must fall.
        tilt: c.
        direction: which divergence.
        log_edges: log w at the first and at the last node.
        log_scale: the divisor's logarithm.

    Returns:
        The bound; infinite if the window is too small for it.
    """
    left, right = float(grid.nodes[0]), float(grid.nodes[-1])
    if direction == "remove":
        slope_left, slope_right = -left, right - (1.0 + tilt) * grid.shift
    else:
        pull = tilt * grid.shift
        slope_left = -left - pull * posterior(rate, grid.shift, left)
        slope_right = right + pull * posterior(rate, grid.shift, right)
    if slope_left <= 1e-3 or slope_right <= 1e-3:
        return math.inf
    # Log-concave with curvature >= 1 beyond the edge (for "remove": under a majorant that is), hence <= w / slope.
    tails = math.exp(min(log_edges[0] - log_scale, 700.0)) / slope_left
    tails += math.exp(min(log_edges[1] - log_scale, 700.0)) / slope_right
    return tails * _SLACK
