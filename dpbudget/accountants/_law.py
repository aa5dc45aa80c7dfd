"""One step's dominating pair as the numerics see it: a rate, a shift in units of the noise, and a side.

Under the reference law the output x is standard normal and m = 1 / sigma. With a+-(x) = +-m x - m^2/2 and
r+-(x) = q (e^{a+-} - 1) the sides are

    remove:  P = (1 + r+),  Q = 1        L = log(1 + r+)
    add:     P = 1,  Q = (1 + r+)        L = -log(1 + r+)
    replace: P = (1 + r+),  Q = (1 + r-) L = log(1 + r+) - log(1 + r-)

as densities with respect to the reference, the loss taken under P. The moment is M(t) = E_P exp(t L).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dpbudget._numerics import UNIT
from dpbudget._pause import pause
from dpbudget.accountants._phases import GaussianPair
from dpbudget.mechanisms import Direction, ReplaceOneGaussianPair

Array = npt.NDArray[np.float64]
Side = Literal["remove", "add", "replace"]

# Exponents beyond this are kept as logarithms.
EXPONENT_CAP = 600.0


@dataclass(frozen=True)
class Cut:
    """Keeps an output x with probability omega(x) = 1 / (1 + e^{(x - at) / width}) and drops it otherwise.

    What is left of a step is a smaller measure; the dropped mass is charged to delta in full.
    """

    at: float
    width: float

    def kept(self, x: Array) -> tuple[Array, Array]:
        """(omega, 1 - omega), each within 20 roundoffs plus those of (x - at) / width, relative."""
        log_kept = self.log_kept(x)
        return np.exp(log_kept), np.exp(log_kept + (x - self.at) / self.width)

    def log_kept(self, x: Array) -> Array:
        """Log omega(x) for any x."""
        value: Array = -np.logaddexp(0.0, (x - self.at) / self.width)
        return value


@dataclass(frozen=True)
class Law:
    """One use of a pair in one direction.

    Attributes:
        rate: q in (0, 1]; 1 is a plain Gaussian step ("remove" only).
        shift: m = 1 / sigma.
        side: which loss.
        cut: outputs beyond which are dropped; None keeps all. Not for "add", whose losses are bounded.
    """

    rate: float
    shift: float
    side: Side
    cut: Cut | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing is sampled: moments are then closed forms."""
        return self.rate >= 1.0

    @property
    def square_distance(self) -> float:
        """Squared distance of the two Gaussian means without sampling, in units of the noise."""
        return self.shift * self.shift * (4.0 if self.side == "replace" else 1.0)

    def largest_loss(self) -> float:
        """Upper bound of the loss of one step; infinite for "remove" and for plain steps."""
        if self.plain or self.side == "remove":
            return math.inf
        if self.side == "add":
            return -math.log1p(-self.rate) * (1.0 + 1e-14)
        return math.inf


def law_of(pair: GaussianPair, direction: Direction) -> Law:
    """The law of one use of ``pair`` in ``direction``; the directions of a replace-one pair coincide."""
    if isinstance(pair, ReplaceOneGaussianPair):
        return Law(pair.rate, 1.0 / pair.sigma, "replace")
    return Law(pair.rate, 1.0 / pair.sigma, "remove" if pair.rate >= 1.0 else direction)


def posterior(rate: float, shift: float, x: float) -> float:
    """p(x) = q e^a / (1 - q + q e^a), a = m x - m^2 / 2: probability that the record was sampled, given output x."""
    if rate >= 1.0:
        return 1.0
    exponent = math.log(rate) - math.log1p(-rate) + shift * x - 0.5 * shift * shift
    return 1.0 / (1.0 + math.exp(-exponent)) if exponent > -700.0 else math.exp(exponent)


def posteriors(law: Law, x: Array) -> tuple[Array, Array]:
    """(p+, p-): the posterior at x for the two shifts; p- is 0 unless a record is replaced. 8 roundoffs or better."""
    offset = math.log(law.rate) - math.log1p(-law.rate) - 0.5 * law.shift * law.shift

    def of(shift: float) -> Array:
        exponent = np.clip(-offset - shift * x, -700.0, 700.0)
        value: Array = 1.0 / (1.0 + np.exp(exponent))
        return value

    return of(law.shift), of(-law.shift) if law.side == "replace" else np.zeros_like(x)


#: Shares that a cut keeps are exact to roundoffs from here on.
_TINY_SHARE = 1e-300


@dataclass(frozen=True)
class Losses:
    """Privacy losses of one step at nodes x, with bounds of their errors; all arrays have one entry a node.

    Attributes:
        log_weight: log of P's density against the reference, error below 8 roundoffs of it plus ``weight_error``.
        weight: P's density itself, not used where it would overflow.
        loss: L.
        deviation: an integrand whose mean under the reference is E L; it is >= 0 where nothing is cut.
        lost: density of what the cut drops, and ``lost_error`` its relative error; None where there is no cut.
        loss_error: absolute.
        weight_error: relative.
        deviation_error: absolute.
    """

    log_weight: Array
    weight: Array
    loss: Array
    deviation: Array
    loss_error: Array
    weight_error: Array
    deviation_error: Array
    lost: Array | None = None
    lost_error: Array | None = None


def losses_at(law: Law, x: Array) -> Losses:
    """The losses at ``x``; error analysis in docs/accounting.md, "Rounding"."""
    whole = _all_losses(law, x)
    if law.cut is None:
        return whole
    kept, dropped = law.cut.kept(x)
    exponent_error = 6.0 * UNIT * (np.abs(x) + abs(law.cut.at)) / law.cut.width + 32.0 * UNIT
    lost = whole.weight * dropped
    lost_error = whole.weight_error + exponent_error + 80.0 * UNIT
    shift_error = lost_error * np.abs(whole.loss) + whole.loss_error
    log_weight = whole.log_weight + law.cut.log_kept(x)
    # A share below the normal numbers has fewer digits than its relative error says: there the logarithm is used.
    tiny = kept < _TINY_SHARE
    return Losses(
        log_weight,
        np.where(tiny, np.exp(np.minimum(log_weight, EXPONENT_CAP)), whole.weight * kept),
        whole.loss,
        whole.deviation - lost * whole.loss,
        whole.loss_error,
        whole.weight_error
        + dropped * exponent_error
        + 40.0 * UNIT
        + np.where(tiny, 9.0 * UNIT * np.abs(log_weight), 0.0),
        whole.deviation_error + lost * shift_error + 4.0 * UNIT * np.abs(whole.deviation),
        lost,
        lost_error,
    )


def _all_losses(law: Law, x: Array) -> Losses:
    pause()
    if law.side == "replace":
        return _replace_losses(law, x)
    q, m = law.rate, law.shift
    exponent = m * x - 0.5 * m * m
    exponent_error = 5.0 * UNIT * (np.abs(m * x) + 0.5 * m * m)
    capped = np.minimum(exponent, EXPONENT_CAP)
    ratio = q * np.expm1(capped)
    jump = q * np.exp(capped)
    low = ratio < -0.5
    one_plus = np.where(low, (1.0 - q) + np.where(low, jump, 0.0), 1.0 + ratio)
    log_ratio = np.where(low, np.log(one_plus), np.log1p(np.maximum(ratio, -0.5)))
    # Beyond the cap 1 - q is below the roundoff of q exp(a); such nodes are used through their logarithm only.
    log_ratio += exponent - capped
    slope_error = jump / one_plus * exponent_error  # error of l that comes from the exponent's
    size = np.abs(log_ratio)
    deviation, deviation_error = _deviation(ratio, one_plus, log_ratio, law.side == "remove")
    loss_error = slope_error + 61.0 * UNIT * size
    if law.side == "remove":
        deviation_error += size * jump * exponent_error
        return Losses(log_ratio, one_plus, log_ratio, deviation, loss_error, slope_error + 45.0 * UNIT, deviation_error)
    deviation_error += np.abs(ratio) / one_plus * jump * exponent_error
    zero = np.zeros_like(x)
    return Losses(zero, np.ones_like(x), -log_ratio, deviation, loss_error, zero, deviation_error)


def _deviation(ratio: Array, one_plus: Array, log_ratio: Array, remove: bool) -> tuple[Array, Array]:
    """(1 + r) l - r or r - l with its rounding error; a series in r / (2 + r) where the difference would cancel."""
    near = np.abs(ratio) <= 0.25
    s = np.where(near, ratio / (2.0 + ratio), 0.0)
    square = s * s
    series = np.zeros_like(s)
    for k in range(19, 1, -2):
        series += 1.0 / k
        series *= square
    series *= 2.0 * s  # log(1 + r) - 2 s
    if remove:
        small = (2.0 * square + (1.0 + s) * series) / (1.0 - s)
        product = one_plus * log_ratio
        value = np.where(near, small, product - ratio)
        scale = np.abs(product)
    else:
        small = (2.0 * square - (1.0 - s) * series) / (1.0 - s)
        value = np.where(near, small, ratio - log_ratio)
        scale = np.abs(log_ratio)
    value = np.maximum(value, 0.0)
    return value, UNIT * np.where(near, 100.0 * value, 110.0 * (scale + np.abs(ratio)))


def _replace_losses(law: Law, x: Array) -> Losses:
    """The odd loss of the replace-one pair, from |x|, without cancellation near 0."""
    q, m = law.rate, law.shift
    far = m * np.abs(x)
    exponent_error = 5.0 * UNIT * (far + 0.5 * m * m)
    exponent = far - 0.5 * m * m
    capped = np.minimum(exponent, EXPONENT_CAP)
    below = (1.0 - q) + q * np.exp(-far - 0.5 * m * m)  # 1 + r of the farther mean
    # q (e^{a+} - e^{a-}) = q e^{-m^2/2} 2 sinh(m |x|)
    gap = q * np.where(far < 1.0, 2.0 * math.exp(-0.5 * m * m) * np.sinh(np.minimum(far, 1.0)),
                       np.exp(capped) - np.exp(-far - 0.5 * m * m))  # fmt: skip
    size = np.log1p(gap / below) + (exponent - capped)
    share = gap / (below + gap)  # 1 - e^{-|L|} up to the cap
    loss_error = share * (2.0 * exponent_error + 80.0 * UNIT) + 20.0 * UNIT * size
    positive = x >= 0.0
    weight = np.where(positive, below + gap, below)
    log_weight = np.log(weight) + np.where(positive, exponent - capped, 0.0)
    weight_error = exponent_error + 60.0 * UNIT
    deviation = 0.5 * gap * size
    deviation_error = deviation * (exponent_error + 60.0 * UNIT) + 0.5 * gap * loss_error
    loss = np.where(positive, size, -size)
    return Losses(log_weight, weight, loss, deviation, loss_error, weight_error, deviation_error)
