"""Arbitrary-precision oracles (mpmath) for tests: slow, independent of the floating-point accountants.

They share no formula with them beyond the definition of the dominating pair: moments are integrals of the likelihood
ratio itself (no cancellation-free rewriting is needed at 60 digits), the contour has its own tilt, step and cut, and
their accuracy is a choice of digits and nodes, checked by halving steps, not a proof. Nothing here is claimed.

P = (1 - q) N(0, s^2) + q N(1, s^2) against Q = N(0, s^2); "remove" is the divergence of P from Q, "add" of Q from P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mpmath

Direction = str  # "remove" or "add"
Step = tuple[float, float, int]  # (rate q, noise multiplier s, count)


def log_moment(rate: float, sigma: float, tilt: Any, direction: Direction, digits: int = 50) -> Any:
    """The oracle for log E exp(tilt L), L one step's privacy loss; log A(alpha) of Renyi order alpha at tilt alpha - 1.

    ``tilt`` may be complex. Trapezoid rule in x; the integrand is analytic in a strip of half-width pi s^2 and the step
    is chosen for ``digits`` digits.
    """
    with mpmath.workdps(digits + 15):
        return mpmath.log(_moment(rate, sigma, mpmath.mpmathify(tilt), direction, digits))


def delta(steps: Sequence[Step], epsilon: float, direction: Direction, digits: int = 20) -> Any:
    """The oracle for compositions: the inverse Laplace integral of the moment generating function.

    (1 / pi) Int_0^inf Re[M(c + iu) exp(-epsilon (c + iu)) / ((c + iu)(c + 1 + iu))] du for any c > 0, here with c at
    0.8 of the saddle point, cut where the terms vanish, with a step that is halved until ``digits`` digits agree.

    Raises:
        ArithmeticError: the sum did not settle in 8 halvings or needs more than 4096 nodes.
    """
    with mpmath.workdps(digits + 15):
        tilt = mpmath.mpf(0.8) * _saddle(steps, epsilon, direction)

        def term(u: Any) -> Any:
            return mpmath.re(_integrand(steps, epsilon, mpmath.mpc(tilt, u), direction, digits))

        step = 2 * mpmath.pi * tilt / 40
        previous = step * (term(mpmath.mpf(0)) / 2 + _ray(term, step, step, digits))
        for _ in range(8):
            current = (previous + step * _ray(term, step / 2, step, digits)) / 2
            if abs(current - previous) <= mpmath.mpf(10) ** -digits * abs(current):
                return current / mpmath.pi
            previous, step = current, step / 2
        raise ArithmeticError("the contour sum did not settle")


def delta_one_step(rate: float, sigma: float, epsilon: float, direction: Direction, digits: int = 50) -> Any:
    """Hockey-stick divergence of one step, from normal tails where the likelihood ratio crosses e^epsilon."""
    with mpmath.workdps(digits + 350):
        q, s, e = mpmath.mpf(rate), mpmath.mpf(sigma), mpmath.exp(mpmath.mpf(epsilon))
        if direction == "remove":
            cut = s * s * mpmath.log((e - 1 + q) / q) + mpmath.mpf(1) / 2
            return q * _tail((cut - 1) / s) - (e - 1 + q) * _tail(cut / s)
        if 1 / e <= 1 - q:
            return mpmath.mpf(0)
        cut = s * s * mpmath.log((1 / e - 1 + q) / q) + mpmath.mpf(1) / 2
        return (1 - e * (1 - q)) * _tail(-cut / s) - e * q * _tail((1 - cut) / s)


def delta_two_steps(rate: float, sigma: float, epsilon: float, direction: Direction, digits: int = 20) -> Any:
    """The oracle for two steps without any contour: the expectation over the first loss of the one-step closed form.

    delta_2(epsilon) = E_first[delta_1(epsilon - L)], where delta_1 at a negative argument y is
    1 - e^y (1 - delta'(-y)), delta' being the other direction.
    """
    other = "add" if direction == "remove" else "remove"
    with mpmath.workdps(digits + 10):
        q, s = mpmath.mpf(rate), mpmath.mpf(sigma)

        def integrand(x: Any) -> Any:
            ratio = 1 - q + q * mpmath.exp((2 * x - 1) / (2 * s * s))
            density = mpmath.npdf(x, 0, s) * (ratio if direction == "remove" else 1)
            loss = mpmath.log(ratio) if direction == "remove" else -mpmath.log(ratio)
            rest = mpmath.mpf(epsilon) - loss
            if rest >= 0:
                return density * delta_one_step(q, s, rest, direction, 0)
            return density * (1 - mpmath.exp(rest) * (1 - delta_one_step(q, s, -rest, other, 0)))

        edge = s * mpmath.sqrt(2 * mpmath.log(10) * (digits + 5))
        cuts = mpmath.linspace(-edge, edge + 1, 25)
        return mpmath.quad(integrand, cuts)


def delta_gaussian(mu: float, epsilon: float, digits: int = 50) -> Any:
    """Privacy profile of N(mu, 1) against N(0, 1): Balle and Wang 2018, Theorem 8."""
    with mpmath.workdps(digits + 350):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        return _tail(e / m - m / 2) - mpmath.exp(e) * _tail(e / m + m / 2)


def _tail(z: Any) -> Any:
    return mpmath.erfc(z / mpmath.sqrt(2)) / 2


def _moment(rate: Any, sigma: Any, tilt: Any, direction: Direction, digits: int) -> Any:
    q, s = mpmath.mpf(rate), mpmath.mpf(sigma)
    power = 1 + tilt if direction == "remove" else -tilt
    real, imag = mpmath.re(power), abs(mpmath.im(power))
    nats = mpmath.mpf(digits + 8) * mpmath.log(10)
    edge = s * mpmath.sqrt(2 * nats)
    # Half the distance to the singularities; the shifted integrand is larger by at most exp(growth).
    height = mpmath.pi / 2
    growth = (s * height) ** 2 / 2 + imag * height + abs(real) * mpmath.log(2)
    step = 2 * mpmath.pi * height * s * s / (nats + growth)
    low = mpmath.floor((-edge + min(real, 0)) / step)
    high = mpmath.ceil((edge + max(real, 1)) / step)
    total, factor, ratio = mpmath.mpf(0), mpmath.exp(step / (s * s)), None
    for j in range(int(low), int(high) + 1):
        x = j * step
        ratio = q * mpmath.exp((2 * x - 1) / (2 * s * s)) if ratio is None else ratio * factor
        total += mpmath.exp(-x * x / (2 * s * s) + power * mpmath.log(1 - q + ratio))
    return total * step / (s * mpmath.sqrt(2 * mpmath.pi))


def _integrand(steps: Sequence[Step], epsilon: float, t: Any, direction: Direction, digits: int) -> Any:
    value = mpmath.exp(-mpmath.mpf(epsilon) * t) / (t * (t + 1))
    for rate, sigma, count in steps:
        value *= _moment(rate, sigma, t, direction, digits + 10) ** count
    return value


def _ray(term: Any, start: Any, step: Any, digits: int) -> Any:
    """Sum of term(start + k step), k >= 0, until five terms in a row are negligible."""
    total, largest, quiet = mpmath.mpf(0), mpmath.mpf(0), 0
    for k in range(4096):
        value = term(start + k * step)
        total += value
        largest = max(largest, abs(value))
        quiet = quiet + 1 if abs(value) <= mpmath.mpf(10) ** -(digits + 5) * largest else 0
        if quiet == 5:
            return total
    raise ArithmeticError("the integrand decays too slowly for this oracle")


def _saddle(steps: Sequence[Step], epsilon: float, direction: Direction) -> Any:
    """The c > 0 that minimises K(c) - c epsilon - log(c (c + 1)), to about 1 %, by golden section in log c."""

    def height(log_c: float) -> Any:
        c = mpmath.exp(log_c)
        total = -c * epsilon - mpmath.log(c * (c + 1))
        for rate, sigma, count in steps:
            total += count * mpmath.log(_moment(rate, sigma, c, direction, 10))
        return total

    with mpmath.workdps(30):
        points = [mpmath.mpf(k) / 2 for k in range(-14, 9)]
        values = [height(point) for point in points]
        best = min(range(len(points)), key=lambda k: values[k])
        low, high = points[max(best - 1, 0)], points[min(best + 1, len(points) - 1)]
        for _ in range(8):
            first, second = low + (high - low) * 0.382, low + (high - low) * 0.618
            if height(first) < height(second):
                high = second
            else:
                low = first
        return mpmath.exp((low + high) / 2)
