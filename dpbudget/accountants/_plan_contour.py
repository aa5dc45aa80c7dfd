"""Choosing a contour: tilt, step and cut. Heuristics: the choice changes the width of an answer, not its validity.

The one proved number made here is the decay beyond the cut, from ``_decay``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from dpbudget._numerics import truncate_mantissa
from dpbudget.accountants._contour import Contour, Line
from dpbudget.accountants._cutting import dropped_mass
from dpbudget.accountants._decay import Decay
from dpbudget.accountants._law import Array, Law
from dpbudget.accountants._moment_table import MomentTable, Rows, join, log_kappas

#: Most nodes on the line that a contour may use.
MAX_LINE_NODES = 1 << 16
# Nats of amplitude between neighbouring tilts beyond which the table is made finer there.
_STEEP = 2.0
_FINER = 12
# A tilt may lose so many nats of amplitude against the saddle for the sake of a larger step, at this price a nat; the
# second price is that of hard cases, where amplitude is rounding.
_MAX_LOSS, LOSS_PRICE, HIGH_PRICE = 7.0, 0.2, 2.0
# How many tilts on each side bound the aliases.
_WITNESSES = 2


def saddles(rows: Rows) -> tuple[Array, Array]:
    """(epsilon, approximate log delta) whose saddle point each tilt is; a guide, not a bound."""
    c = rows.tilts
    epsilon = rows.slope - 1.0 / c - 1.0 / (1.0 + c)
    spread = np.maximum(rows.bend, 0.0) + c**-2 + (1.0 + c) ** -2
    log_delta = rows.upper - c * epsilon - np.log(c) - np.log1p(c) - 0.5 * np.log(2.0 * math.pi * spread)
    return epsilon, log_delta


def guess_epsilon(rows: Rows, log_delta: float) -> float:
    """Estimate of epsilon(delta) by the saddle-point approximation."""
    epsilon, approximate = saddles(rows)
    return float(np.interp(-log_delta, np.maximum.accumulate(-approximate), epsilon))


def guess_log_delta(rows: Rows, epsilon: float) -> float:
    """Estimate of log delta(epsilon) by the saddle-point approximation."""
    at, approximate = saddles(rows)
    return float(np.interp(epsilon, np.maximum.accumulate(at), approximate))


def plan_contour(
    table: MomentTable, rows: Rows, epsilon: float, log_delta: float, log_tolerance: float, price: float = LOSS_PRICE
) -> Contour | None:
    """A contour whose errors are about ``log_tolerance`` relative to delta near (epsilon, exp(log_delta)), or None.

    None where no tilt works or the nodes would be too many to be of use. ``rows`` are tilts around the saddle.
    """
    rows = _refined(table, rows, epsilon)
    target = log_tolerance + log_delta
    choice = tilt_and_period(rows, epsilon, target, price=price)
    if choice is None:
        return None
    best, period = choice
    tilt, log_top = float(rows.tilts[best]), float(rows.upper[best])
    step = truncate_mantissa(2.0 * math.pi / period)
    uses = [(law, phase.count) for law, phase in zip(table.laws, table.phases, strict=True)]
    gap = log_top - tilt * epsilon - target
    cut = _cut(uses, tilt, step, gap, rows.take(np.array([best])))
    below, above = witnesses(rows, best, epsilon, period)
    lost = math.fsum(count * dropped_mass(law) for law, count in uses)
    contour = Contour(uses, Line(tilt, step, cut[0], log_top, cut[1], below, above, lost))
    return contour if contour.usable else None


def _refined(table: MomentTable, rows: Rows, epsilon: float) -> Rows:
    """The rows, with finer ones about the saddle where the moments are steep."""
    height = rows.upper - rows.tilts * epsilon - np.log(rows.tilts) - np.log1p(rows.tilts)
    best = int(np.argmin(height))
    first, last = max(best - 1, 0), min(best + 1, len(height) - 1)
    if max(height[first], height[last]) < height[best] + _STEEP:
        return rows
    exponents = np.linspace(math.log(rows.tilts[first]), math.log(rows.tilts[last]), 2 * _FINER + 1)[1:-1]
    fine = table.rows(np.exp(exponents))
    together = join([rows, fine])
    return together.take(np.argsort(together.tilts, kind="stable"))


def tilt_and_period(
    rows: Rows, epsilon: float, log_target: float, log_mass: float = 0.0, price: float = LOSS_PRICE
) -> tuple[int, float] | None:
    """Index of the tilt with the least period B at which both alias sums are bounded by exp(log_target), and B.

    At the saddle itself the moments may explode just above (a rare large loss begins to dominate them), which makes the
    period long; a smaller tilt then costs little amplitude.
    """
    c, amplitude = rows.tilts, rows.upper - rows.tilts * epsilon
    least = float(np.min(amplitude - np.log(c) - np.log1p(c)))
    candidates = np.flatnonzero(amplitude - np.log(c) - np.log1p(c) <= least + _MAX_LOSS)
    excess = np.logaddexp(0.0, amplitude + log_kappas(c) - log_target)
    distance = c[None, :] - c[candidates][:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        periods = excess[None, :] / np.abs(distance)
    above = np.where(distance > 0.0, periods, np.inf).min(axis=1)
    below = np.where(distance < 0.0, periods, np.inf).min(axis=1)
    below = np.minimum(below, np.logaddexp(0.0, log_mass - log_target) / c[candidates])
    period = np.maximum(below, above)
    with np.errstate(invalid="ignore"):
        score = np.log(period) + price * (amplitude - np.log(c) - np.log1p(c))[candidates]
    best = int(np.argmin(score))
    return (int(candidates[best]), float(period[best])) if math.isfinite(period[best]) else None


def witnesses(
    rows: Rows, best: int, epsilon: float, period: float
) -> tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]:
    """The tilts on either side whose moments bound the aliases best."""
    bounds = rows.upper + log_kappas(rows.tilts)
    bounds += 64.0 * 2.0**-53 * (np.abs(rows.upper) + np.abs(bounds))
    terms = bounds - rows.tilts * epsilon - period * np.abs(rows.tilts - rows.tilts[best])

    def pick(indices: npt.NDArray[np.intp]) -> tuple[tuple[float, float], ...]:
        order = indices[np.argsort(terms[indices], kind="stable")[:_WITNESSES]]
        return tuple((float(rows.tilts[k]), float(bounds[k])) for k in order)

    index = np.arange(len(terms))
    return pick(index[:best]), pick(index[best + 1 :])


def _cut(uses: Sequence[tuple[Law, int]], tilt: float, step: float, gap: float, row: Rows) -> tuple[int, float]:
    """The last kept node and a log bound of |M / M(c)| beyond it: the earliest cut below exp(-gap), or the last."""
    decays = [
        None if law.plain else Decay(law, tilt, float(top)) for (law, _), top in zip(uses, row.steps[:, 0], strict=True)
    ]

    def fall(candidates: Array) -> Array:
        total = np.zeros(len(candidates))
        for (law, count), decay in zip(uses, decays, strict=True):
            if decay is None:
                total -= count * 0.5 * np.square(candidates * step) * law.square_distance * (1.0 - 1e-14)
            else:
                total += count * decay.log_rho(candidates * step)
        return total

    return earliest_cut(fall, step, gap, float(row.bend[0]))


def earliest_cut(fall: Callable[[Array], Array], step: float, gap: float, bend: float) -> tuple[int, float]:
    """(last kept node, log of the bound beyond it) for a bound ``fall`` of log |M / M(c)| from node k on."""
    guess = math.sqrt(2.0 * max(gap, 1.0) / max(bend, 1e-300)) / step
    first = min(max(guess, 4.0), MAX_LINE_NODES / 4.0)
    for ratios in (1.1 ** np.arange(13), 1.2 ** np.arange(12, math.log(MAX_LINE_NODES) / math.log(1.2))):
        candidates = np.unique(np.ceil(first * ratios))
        candidates = candidates[candidates <= max(MAX_LINE_NODES, candidates[0])]
        total = fall(candidates)
        enough = total - np.log(math.pi * step * (candidates - 1.0)) < -gap
        if enough.any():
            break
    best = int(np.argmax(enough)) if enough.any() else len(candidates) - 1
    return max(int(candidates[best]) - 1, 1), float(total[best])
