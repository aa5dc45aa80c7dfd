"""Moments of any law of a step, replace-one and cuts included: the densities themselves on a dense grid.

Extended precision and a trapezoid step far below every scale of the integrand; good to about 1e-13 where M - 1 is not
tiny.
"""

from __future__ import annotations

import numpy as np


def log_moment_of(law, tilt, step=2e-4):
    """log E exp(tilt L); ``tilt`` may be complex."""
    c = complex(tilt).real
    reach = (1 + 2 * c) * law.shift + 11
    high = reach if law.cut is None else min(reach, law.cut.at + 60 * law.cut.width + 3)
    x = np.arange(-int(reach / step), int(high / step) + 1).astype(np.longdouble) * np.longdouble(step)
    q, m = np.longdouble(law.rate), np.longdouble(law.shift)
    near = (1 - q) + q * np.exp(m * x - m * m / 2)
    far = (1 - q) + q * np.exp(-m * x - m * m / 2) if law.side == "replace" else np.ones_like(x)
    weight, loss = (np.ones_like(x), -np.log(near)) if law.side == "add" else (near, np.log(near) - np.log(far))
    kept = np.ones_like(x) if law.cut is None else 1 / (1 + np.exp((x - law.cut.at) / np.longdouble(law.cut.width)))
    exponent = -x * x / 2 + np.log(weight) + np.log(kept) + np.clongdouble(tilt) * loss
    top = exponent.real.max()
    moment = np.exp(exponent - top).sum() * np.longdouble(step) / np.sqrt(2 * np.longdouble(np.pi))
    value = np.log(moment) + top
    return value if isinstance(tilt, complex) else value.real
