"""What the bounded tail of the noise generator costs, charged to delta.

A Box-Muller pair whose radius comes from a 64-bit uniform never leaves the disc of radius
``CAP = sqrt(2 * 64 * ln 2)`` standard deviations, so some outputs are possible under one dataset and impossible under
its neighbour. For steps with inclusion probability q_t and noise multiplier sigma_t in d dimensions, with
R_t = 1 / sigma_t, CAP - R_t >= sqrt(3) and n_t uses,

    delta_total <= F * delta_ideal + sum_t n_t q_t [ CAP exp(-CAP^2/2) sqrt(ceil(d/2)) R_t + exp(-(CAP - R_t)^2/2) ],
    F = (1 - 2^-64)^(-ceil(d/2) * T).

Where a record is replaced, R_t = 2 / sigma_t and the sum counts three times. ``docs/accounting.md``, section "Truncated
noise", has the proof. The ideal mechanism is in real arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

RADIUS_BITS = 64
CAP = math.sqrt(2.0 * RADIUS_BITS * math.log(2.0))
#: Truncation may use at most this share of delta; beyond it the plan is refused.
MAX_SHARE = 0.01
# Relative slack that covers the rounding of the few operations below.
_PAD = 1.0 + 1e-12


def truncation_delta(steps: Iterable[tuple[float, float, int]], bounded: int, replace: bool = False) -> float:
    """Upper bound of the additive part, over ``(rate, noise_multiplier, count)`` phases; infinite where unproved.

    Args:
        steps: the phases.
        bounded: most values of bounded noise in a step; 0 where the noise has no bound (``exact``).
        replace: neighbours differ by the replacement of a record instead of its presence.
    """
    if bounded == 0:
        return 0.0
    pairs = (bounded + 1) // 2
    total = 0.0
    for rate, sigma, count in steps:
        shift = (2.0 if replace else 1.0) / sigma
        if CAP - shift < math.sqrt(3.0) * _PAD:
            return math.inf
        spread = CAP * math.exp(-0.5 * CAP * CAP) * math.sqrt(pairs) * shift
        lump = math.exp(-0.5 * (CAP - shift) ** 2)
        total += (3 if replace else 1) * count * rate * (spread + lump)
    return total * _PAD


def truncation_factor_log(count: int, bounded: int) -> float:
    """Upper bound of log F for ``count`` steps in total, of at most ``bounded`` values of bounded noise each."""
    # -log(1 - x) <= x + x^2 for 0 <= x <= 1/2, with x = 2^-64 the second term is below the padding.
    return count * ((bounded + 1) // 2) * 2.0**-RADIUS_BITS * _PAD
