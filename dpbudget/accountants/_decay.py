"""How fast the characteristic function of one tilted step must decay: a layer-cake bound.

A density whose level sets {f > y} are intervals is a mixture of uniform laws on them, so its characteristic function is
at most the mixture of |sin(v w / 2) / (v w / 2)| over the widths w. Cell minima of f give a step function below f, and
the missing mass counts in full. docs/accounting.md, "Cut of the u-sum", has the proof.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from dpbudget.accountants._law import Array, Law, losses_at, posterior, posteriors
from dpbudget.accountants._quadrature import add_mode, window

_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
_RADIUS = 8.0
_MIN_CELLS, _MAX_CELLS = 160, 1600
# Largest |sin y| / y beyond y = pi is 0.21723..., reached at y = 4.4934.
_LOBE = 0.21724
_SHRINK = 1.0 - 1e-6


class Decay:
    """Upper bounds rho(u) of |M(c + iv)| / M(c) over all |v| >= u, for one step at tilt c.

    Args:
        law: the step; it must sample.
        tilt: c > 0.
        log_moment: log M(c), or an upper bound of it (then rho is merely larger).
    """

    def __init__(self, law: Law, tilt: float, log_moment: float) -> None:
        self._law, self._tilt = law, tilt
        if law.side == "replace" or law.cut is not None:
            heights, widths = self._rugged_minorant(log_moment)
            cuts = _valleys(heights)
        else:
            self._power = 1.0 + tilt if law.side == "remove" else -tilt
            x = self._cells()
            heights, widths = self._minorant(x, log_moment)
            # The valley's cell is left out and the rest splits there into at most two pieces with one peak each.
            valley = self._valley()
            inside = (x[:-1] - 1e-6 <= valley) & (valley <= x[1:] + 1e-6)
            heights = np.where(inside, 0.0, heights)
            cuts = [int(np.argmax(inside))] if inside.any() else []
        edges = [0, *cuts, heights.size]
        layers = [_layers(heights[a:b], widths[a:b]) for a, b in pairwise(edges) if b > a]
        self._masses = np.concatenate([mass for mass, _ in layers])
        self._widths = np.concatenate([width for _, width in layers])

    def log_rho(self, u: Array) -> Array:
        """Log of rho(u) for each u > 0."""
        gain = _one_minus_envelope(np.multiply.outer(0.5 * u, self._widths)) @ self._masses
        value: Array = np.log1p(-np.clip(gain * _SHRINK, 0.0, 1.0 - 1e-15))
        return value

    def _cells(self) -> Array:
        law, tilt = self._law, self._tilt
        if law.side == "remove":
            low, high = -_RADIUS, (1.0 + tilt) * law.shift + _RADIUS
        else:
            low, high = add_mode(law.rate, law.shift, tilt) - _RADIUS, _RADIUS
        count = int(min(max(_MIN_CELLS, (high - low) * 12.0), _MAX_CELLS))
        return np.linspace(low, high, count + 1)

    def _minorant(self, x: Array, log_moment: float) -> tuple[Array, Array]:
        """Minima of the loss's density over the cells (at their ends, but for the valley), and widths in loss."""
        m, q = self._law.shift, self._law.rate
        exponent = m * x - 0.5 * m * m
        log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + exponent)
        log_density = (self._power + 1.0) * log_ratio - 0.5 * x * x - exponent
        log_density -= _LOG_SQRT_2PI + math.log(m * q) + log_moment
        log_density -= 2e-14 * np.abs((self._power + 1.0) * log_ratio)
        log_posterior = math.log(q) + exponent - log_ratio
        # l(x + d) - l(x) = log(1 + p(x) (e^(m d) - 1)): no cancellation.
        widths = np.log1p(np.exp(log_posterior[:-1]) * np.expm1(np.minimum(m * np.diff(x), 600.0)))
        heights = np.exp(np.minimum(np.minimum(log_density[:-1], log_density[1:]), 700.0))
        return heights * _SHRINK, widths * _SHRINK

    def _rugged_minorant(self, log_moment: float) -> tuple[Array, Array]:
        """The same for any law: minima by a bound of the slope, since valleys are not located."""
        law, c = self._law, self._tilt
        low, high = window(law, c, 0.5 * _RADIUS**2)
        x = np.linspace(low, high, int(min(max(4 * _MIN_CELLS, (high - low) * 40.0), 2 * _MAX_CELLS)) + 1)
        losses = losses_at(law, x)
        near, far = posteriors(law, x)
        rise = law.shift * (near + far)  # dL/dx
        log_density = -0.5 * x * x - _LOG_SQRT_2PI + losses.log_weight + c * losses.loss - np.log(rise) - log_moment
        log_density -= 2.0 * c * losses.loss_error
        width = float(x[1] - x[0])
        # d log f / dx = -x + m (1 + c) p+ + m c p- - (log rise)' - (1 - omega) / width of the cut. p+ rises and p-
        # falls; (log rise)' lies in [-m, m], and is m (1 - p+) where no record is replaced.
        drop = np.zeros_like(x) if law.cut is None else law.cut.kept(x)[1] / law.cut.width
        spread = law.shift if law.side == "replace" else 0.0
        bend = 0.0 if law.side == "replace" else 1.0
        highest = -x[:-1] + law.shift * ((1.0 + c + bend) * near[1:] + c * far[:-1] - bend) + spread - drop[:-1]
        lowest = -x[1:] + law.shift * ((1.0 + c + bend) * near[:-1] + c * far[1:] - bend) - spread - drop[1:]
        from_left = log_density[:-1] + np.minimum(lowest, 0.0) * width
        from_right = log_density[1:] - np.maximum(highest, 0.0) * width
        heights = np.exp(np.minimum(np.maximum(from_left, from_right), 700.0))
        # p+ + p- is at least the sum of both smaller ends over the cell.
        widths = law.shift * width * (near[:-1] + far[1:])
        return heights * _SHRINK, widths * _SHRINK

    def _valley(self) -> float:
        """Where the density of the loss has its only possible minimum in x; -inf if it has none.

        d log f / dx = (power + 1) m p(x) - x - m rises only where p (1 - p) > 1 / ((power + 1) m^2).
        """
        m, rate = self._law.shift, self._law.rate
        strength = (self._power + 1.0) * m**2
        if strength <= 4.0:
            return -math.inf
        root = math.sqrt(1.0 - 4.0 / strength)
        logit = math.log((1.0 + root) / 2.0) - math.log(2.0 / (strength * (1.0 + root)))  # of the larger p
        offset = math.log1p(-rate) - math.log(rate) + 0.5 * m**2
        low, high = (-logit + offset) / m, (logit + offset) / m
        for _ in range(80):
            middle = 0.5 * (low + high)
            if (self._power + 1.0) * m * posterior(rate, m, middle) - middle - m < 0.0:
                low = middle
            else:
                high = middle
        return 0.5 * (low + high)


def _valleys(heights: Array) -> list[int]:
    """Cells at which a step function starts to rise again: between two of them it has one peak."""
    rising = np.diff(heights) > 0.0
    return [int(k) + 1 for k in np.flatnonzero(rising[1:] & ~rising[:-1])]


def _layers(heights: Array, widths: Array) -> tuple[Array, Array]:
    """Masses and widths of the uniform laws that make up a step function with one peak."""
    order = np.argsort(-heights, kind="stable")
    levels = np.append(heights[order], 0.0)
    wide = np.cumsum(widths[order])
    return (levels[:-1] - levels[1:]) * wide, wide


def _one_minus_envelope(y: Array) -> Array:
    """Lower bound of 1 - sup_{v >= y} |sin v / v| for y >= 0, relatively accurate near 0."""
    safe = np.maximum(y, 1.0)
    value: Array = 1.0 - np.maximum(np.abs(np.sin(safe)) / safe, _LOBE)
    far = y > 1.0 / _LOBE
    value[far] = 1.0 - 1.0 / safe[far]
    near = y <= 1.0
    square = np.square(y[near])
    value[near] = square * (1.0 / 6.0 - square * (1.0 / 120.0 - square * (1.0 / 5040.0 - square / 362880.0)))
    return value
