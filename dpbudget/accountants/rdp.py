"""The Renyi accountant: one moment per order, the best real order, the best conversion that uses one moment."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpbudget._numerics import exp_up
from dpbudget.accountants._moment_bound import MomentBound
from dpbudget.accountants._phases import Use, check_delta, check_epsilon, mixed_uses_of
from dpbudget.curve import Bounds, PrivacyCurve
from dpbudget.mechanisms import Adjacency, Charge, Direction

DIRECTIONS: tuple[Direction, Direction] = ("remove", "add")


class RDPAccountant:
    """Upper bounds from Renyi moments; the lower end of every answer is 0.

    log A(alpha) of the sampled Gaussian (Mironov, Talwar and Zhang 2019) is integrated at real alpha > 1 with a
    certified error, heterogeneous steps are added, and delta <= kappa(a) exp(K(a) - a epsilon), a = alpha - 1
    (Canonne, Kamath and Steinke 2020, Proposition 12). Typically 5 to 11 percent above the exact epsilon. Other pairs
    give their own ``log_moment`` or have it bounded from their tails, where their losses are bounded.
    """

    name = "rdp"
    version = 1

    def curve(self, charges: Sequence[Charge], adjacency: Adjacency) -> RDPCurve:
        """The privacy curve of the composition; raises InvalidParameter or NotComputable as the base contract says."""
        return RDPCurve(mixed_uses_of(charges, adjacency))


class RDPCurve(PrivacyCurve):
    """What the moments of both directions prove about a composition."""

    def __init__(self, phases: Sequence[Use]) -> None:
        self._phases = tuple(phases)
        symmetric = all(use.pair.symmetric for use in self._phases)
        self._moments = [
            MomentBound(self._phases, direction) for direction in (DIRECTIONS[:1] if symmetric else DIRECTIONS)
        ]

    def epsilon(self, delta: float) -> Bounds:
        """[0, upper]; every upper is proved, in both directions. Raises InvalidParameter for delta outside (0, 1)."""
        log_delta = math.log(check_delta(delta))
        if not self._phases:
            return Bounds(0.0, 0.0)
        best = max(moment.best_epsilon(log_delta)[0] for moment in self._moments)
        return Bounds(0.0, max(best, 0.0))

    def delta(self, epsilon: float) -> Bounds:
        """[0, upper], upper at most 1. Raises InvalidParameter for epsilon that is not finite and >= 0."""
        epsilon = check_epsilon(epsilon)
        if not self._phases:
            return Bounds(0.0, 0.0)
        best = max(moment.best_log_delta(epsilon)[0] for moment in self._moments)
        return Bounds(0.0, min(exp_up(min(best, 0.0)), 1.0))

    def best_order(self, delta: float) -> float:
        """The Renyi order alpha > 1 that gives ``epsilon(delta).upper``; raises InvalidParameter for a bad delta."""
        log_delta = math.log(check_delta(delta))
        if not self._phases:
            return math.inf
        return 1.0 + max(moment.best_epsilon(log_delta) for moment in self._moments)[1]
