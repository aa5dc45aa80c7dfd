"""Upper bounds of log moments of a composition, and what they alone say: the Renyi (Chernoff) bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from dpbudget._numerics import UNIT, log_expm1, log_kappa, minimize_unimodal
from dpbudget.accountants._law import Array, Law, law_of
from dpbudget.accountants._moment_table import MomentTable, Rows, log_kappas
from dpbudget.accountants._phases import GaussianPair, Phase, Use
from dpbudget.accountants._tilted_step import TiltedStep
from dpbudget.mechanisms import Direction

#: Tilts (Renyi order minus one) that a search visits.
MIN_TILT, MAX_TILT = 1e-9, 1e9
# Sums of a few rounded terms: relative padding of every upper bound below.
_PAD = 64.0 * UNIT


def log_moment_bounds(pair: GaussianPair, tilt: float, direction: Direction) -> tuple[float, float]:
    """Certified (lower, upper) bounds of log E exp(tilt L) of one step, tilt > 0; lower is 0 where nothing is known.

    The upper bound is the quadrature's value plus its error bound, and never more than convexity in the rate gives:
    M <= 1 - q + q exp(tilt (tilt + 1) d^2 / 2), d the distance of the means, which needs no quadrature.
    """
    law = law_of(pair, direction)
    gaussian = 0.5 * tilt * (tilt + 1.0) * law.square_distance
    if law.plain:
        return gaussian * (1.0 - _PAD), gaussian * (1.0 + _PAD)
    if gaussian > 1.0:
        ceiling = max(log_expm1(gaussian) + math.log(pair.rate), -745.0)
        ceiling = ceiling + math.log1p(math.exp(-ceiling)) if ceiling > 0.0 else math.log1p(math.exp(ceiling))
    else:
        ceiling = math.log1p(pair.rate * math.expm1(gaussian))
    # Where the ceiling is small, gaussian <= -log(rate) <= 45, so its logarithm is off by at most 16 u * 90.
    ceiling *= 1.0 + 1e-12
    step = TiltedStep(law, tilt, 0.0, _accuracy(law, tilt))
    if not step.usable:
        return 0.0, ceiling
    value, error = step.log_moment()
    if not math.isfinite(value) or error > 0.5:
        return 0.0, ceiling
    return max(value + math.log1p(-error), 0.0), min((value + error) * (1.0 + _PAD), ceiling)


def _accuracy(law: Law, tilt: float) -> float:
    """Nats of quadrature accuracy: relative to M - 1, which is about min(tilt, 1) min(q, q^2 chi^2) when small."""
    chi = math.expm1(min(law.square_distance, 60.0))
    scale = min(tilt, 1.0) * law.rate * min(1.0, law.rate * chi)
    return 40.0 - math.log(scale)


class MomentBound:
    """K(c) >= log E exp(c L) of a composition in one direction, remembered between calls."""

    def __init__(self, phases: Sequence[Use], direction: Direction) -> None:
        self.phases, self.direction = tuple(phases), direction
        self._bounds = [_bound_of(use, direction) for use in self.phases]
        phases_only = [use for use in self.phases if isinstance(use, Phase)]
        self._table = MomentTable(phases_only, direction) if len(phases_only) == len(self.phases) else None
        self._known: dict[float, float] = {}

    def __call__(self, tilt: float) -> float:
        """Upper bound of K(tilt), tilt > 0; finite unless the product overflows."""
        value = self._known.get(tilt)
        if value is None:
            terms = [use.count * bound(tilt) for use, bound in zip(self.phases, self._bounds, strict=True)]
            value = self._known[tilt] = math.fsum(terms) * (1.0 + _PAD)
        return value

    def epsilon_at(self, tilt: float, log_delta: float) -> float:
        """Upper bound of epsilon from the moment at ``tilt``: the root of kappa(c) exp(K(c) - c epsilon) = delta."""
        kappa = log_kappa(tilt)
        bound = self(tilt)
        return (bound + kappa - log_delta) / tilt + _PAD * (bound + abs(kappa) + abs(log_delta)) / tilt

    def log_delta_at(self, tilt: float, epsilon: float) -> float:
        """Upper bound of log delta(epsilon) from the moment at ``tilt``."""
        kappa = log_kappa(tilt)
        bound = self(tilt)
        return bound + kappa - tilt * epsilon + _PAD * (bound + abs(kappa) + tilt * epsilon)

    def best_epsilon(self, log_delta: float, tolerance: float = 1e-4) -> tuple[float, float]:
        """(epsilon, tilt) of the smallest bound found; valid whatever the search found. May be negative."""

        # K(c) + log kappa(c) is convex, hence the bound is quasi-convex in c.
        def rough(rows: Rows) -> Array:
            return np.asarray((rows.upper + log_kappas(rows.tilts) - log_delta) / rows.tilts, dtype=np.float64)

        return self._search(lambda tilt: self.epsilon_at(tilt, log_delta), rough, self._start(log_delta), tolerance)

    def best_log_delta(self, epsilon: float, tolerance: float = 1e-4) -> tuple[float, float]:
        """(log delta, tilt) of the smallest bound found."""

        def rough(rows: Rows) -> Array:
            return np.asarray(rows.upper + log_kappas(rows.tilts) - rows.tilts * epsilon, dtype=np.float64)

        start = self._start(-0.5 * epsilon - 1.0)
        return self._search(lambda tilt: self.log_delta_at(tilt, epsilon), rough, start, tolerance)

    def _start(self, log_delta: float) -> float:
        """The best tilt if the composition were Gaussian with its variance at tilt 0, within sane limits."""
        variance = math.fsum(_variance(use) for use in self.phases)
        return min(max(math.sqrt(-2.0 * log_delta / max(variance, 1e-300)), 1e-4), 30.0)

    def _search(
        self,
        function: Callable[[float], float],
        rough: Callable[[Rows], Array],
        start: float,
        tolerance: float,
    ) -> tuple[float, float]:
        """The least value; a table of tilts shows where, if all pairs are Gaussian."""
        if self._table is not None:
            rows = self._table.around(start, rough)
            start = float(rows.tilts[int(np.argmin(rough(rows)))])
        log_tilt, value = minimize_unimodal(
            lambda log_c: function(math.exp(log_c)), math.log(start), math.log(MIN_TILT), math.log(MAX_TILT), tolerance
        )
        return value, math.exp(log_tilt)


def _bound_of(use: Use, direction: Direction) -> Callable[[float], float]:
    """Upper bound of one use's log moment: by quadrature, by the pair's own moments, or from its tails."""
    if isinstance(use, Phase):
        pair = use.pair
        return lambda tilt: log_moment_bounds(pair, tilt, direction)[1]
    own = getattr(use.pair, "log_moment", None)
    if own is not None:
        return lambda tilt: float(own(tilt, direction))
    from dpbudget.accountants._pld_moment import lattice_log_moment

    return lattice_log_moment(use.pair, direction)


def _variance(use: Use) -> float:
    """A guess of the variance of the total loss of these uses."""
    if isinstance(use, Phase):
        return use.count * use.pair.rate**2 * math.expm1(min(use.pair.sigma**-2, 3.0))
    return float(use.count)
