"""What other tools would report, computed from their published formulas and defaults; none of them is imported.

``moment`` is log E exp(order L) of the losses L of the whole schedule, as a function of the order; ours is certified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dpbudget._numerics import exp_or_inf
from dpbudget.curve import PrivacyCurve
from dpbudget.mechanisms import SubsampledGaussianPair
from dpbudget.plan import Phase

#: Orders at which the tools look, by their defaults.
_TENTHS = tuple(1.0 + i / 10.0 for i in range(1, 100))
_OPACUS_ORDERS = (*_TENTHS, *map(float, range(12, 64)))
_DP_ACCOUNTING_ORDERS = (*_TENTHS, *map(float, range(11, 64)), 128.0, 256.0, 512.0, 1024.0)
#: What Opacus's prv accountant adds to epsilon and takes from delta, by default.
_PRV_EPSILON_ERROR, _PRV_DELTA_SHARE = 0.01, 1e-3


def opacus_rdp(moment: Callable[[float], float], delta: float) -> float:
    """Renyi divergence R at an order a gives R + log((a - 1)/a) - (log delta + log a)/(a - 1), least over orders.

    Canonne, Kamath and Steinke (2020), Proposition 12, at the orders of Opacus; ``moment`` is log E exp((a - 1) L).
    """
    return min(_improved(moment, order, delta) for order in _OPACUS_ORDERS)


def dp_accounting_rdp(moment: Callable[[float], float], delta: float) -> float:
    """As :func:`opacus_rdp` at the orders of dp-accounting, and 0 where the divergence is so small (its KL bound)."""
    found = math.inf
    for order in _DP_ACCOUNTING_ORDERS:
        divergence = moment(order - 1.0) / (order - 1.0)
        if delta * delta + math.expm1(-divergence) > 0.0:
            return 0.0
        if order > 1.01:
            found = min(found, _improved(moment, order, delta))
    return max(found, 0.0)


def classic_rdp(moment: Callable[[float], float], delta: float) -> float:
    """R + log(1/delta) / (a - 1) (Mironov 2017, Proposition 3), least over the orders of Opacus."""
    return min((moment(order - 1.0) - math.log(delta)) / (order - 1.0) for order in _OPACUS_ORDERS)


def _improved(moment: Callable[[float], float], order: float, delta: float) -> float:
    divergence = moment(order - 1.0) / (order - 1.0)
    return divergence + math.log1p(-1.0 / order) - (math.log(delta) + math.log(order)) / (order - 1.0)


def opacus_prv(curve: PrivacyCurve, delta: float) -> float:
    """What the algorithm of Gopi, Lee and Wutschitz (2021) states for errors 0.01 of epsilon and delta / 1000.

    Its discretisation is within those errors of the truth, which stands in for it here.
    """
    return curve.epsilon(delta * (1.0 - _PRV_DELTA_SHARE)).upper + _PRV_EPSILON_ERROR


def central_limit(phases: Sequence[Phase], delta: float) -> float:
    """Epsilon of N(mu, 1) against N(0, 1), mu^2 = sum of T q^2 (exp(1/sigma^2) - 1): the limit of many steps.

    Bu, Dong, Long and Su (2020), Corollary 4. It ignores how far from normal the losses of finitely many steps are.
    """
    from dpbudget.accountants._closed_form import gaussian_guess
    from dpbudget.accountants._phases import Phase as Uses

    squared = sum(phase.steps * phase.rate**2 * (exp_or_inf(phase.noise_multiplier**-2.0) - 1.0) for phase in phases)
    if not 0.0 < squared < 1e200:
        return math.inf if squared > 0.0 else 0.0
    return gaussian_guess((Uses(SubsampledGaussianPair(1.0, squared**-0.5), 1),), delta)
