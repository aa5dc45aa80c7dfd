"""The tilted transform: its rounding against mpmath, its aliases, and compositions that can be written out."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest

from dpbudget.accountants._pld_fft import Lattice, _transform, certain_mass, chernoff, compose
from dpbudget.accountants._pld_law import Law


def law(step, masses, first=0, infinite=0.0):
    masses = np.array(masses, dtype=float)
    return Law(np.arange(first, first + len(masses)) * step, masses, infinite)


def exact_delta(step, masses, first, count, epsilon):
    """The delta of a lattice law's ``count``-fold convolution, in 50 digits."""
    with mpmath.workdps(50):
        total = [mpmath.mpf(1)]
        for _ in range(count):
            grown = [mpmath.mpf(0)] * (len(total) + len(masses) - 1)
            for i, a in enumerate(total):
                for j, b in enumerate(masses):
                    grown[i + j] += a * mpmath.mpf(b)
            total = grown
        losses = ((first * count + k) * mpmath.mpf(step) for k in range(len(total)))
        return mpmath.fsum(w * (1 - mpmath.exp(epsilon - t)) for w, t in zip(total, losses, strict=True) if t > epsilon)


@pytest.mark.parametrize("tilt", [0.5, 3.0, 20.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.77, 3.1])
def test_the_composition_of_a_lattice_law_is_enclosed(tilt, epsilon):
    step, masses, count = 0.125, [0.2, 0.3, 0.1, 0.35, 0.05], 12
    grid = Lattice(step, -64, 128, tilt, tilt - 4.0, tilt + 8.0)
    composed = compose([(law(step, masses, -2), count)], grid)
    truth = exact_delta(step, masses, -2, count, epsilon)
    assert composed.lower(epsilon) <= truth <= composed.upper(epsilon)


def test_small_deltas_are_accurate_relative_to_themselves():
    step, masses, count = 0.125, [0.9, 0.0999, 1e-4], 10
    grid = Lattice(step, -8, 64, 60.0, 30.0, 120.0)
    composed = compose([(law(step, masses), count)], grid)
    truth = exact_delta(step, masses, 0, count, 2.3)
    assert truth < 1e-30
    assert composed.lower(2.3) <= truth <= composed.upper(2.3)
    assert composed.upper(2.3) - composed.lower(2.3) <= 1e-9 * truth


@pytest.mark.parametrize("start", [-24, -8, 4, 20])
def test_a_window_that_is_too_small_widens_the_answer_and_keeps_it_valid(start):
    step, masses, count = 0.25, [0.25, 0.25, 0.25, 0.25], 8
    grid = Lattice(step, start, 16, 1.0, 0.25, 2.5)
    composed = compose([(law(step, masses, -1), count)], grid)
    for epsilon in (0.0, 1.0, 2.0, 4.0):
        truth = exact_delta(step, masses, -1, count, epsilon)
        assert composed.lower(epsilon) <= truth <= composed.upper(epsilon)


def test_the_window_bounds_hold_the_mass_outside():
    step, masses, count = 0.25, [0.25, 0.25, 0.25, 0.25], 8
    grid = Lattice(step, 4, 16, 1.0, 0.25, 2.5)
    composed = compose([(law(step, masses, -1), count)], grid)
    total = np.array([1.0])
    for _ in range(count):
        total = np.convolve(total, masses)
    index = np.arange(-count, len(total) - count)
    tilted = total * np.exp(index * step - composed.log_scale)
    assert float(tilted[index < 4].sum()) <= composed.left
    assert float(tilted[index >= 20].sum()) <= composed.right


@pytest.mark.parametrize("size", [1 << 12, 1 << 15])
def test_transforms_round_as_assumed(size):
    rng = np.random.default_rng(7)
    values = rng.random(size) * np.exp(-np.arange(size) / 100.0)
    spectrum = np.fft.rfft(values)
    norm = math.sqrt(float(values @ values))
    with mpmath.workdps(30):
        exact_values = [mpmath.mpf(v) for v in values[:4000].tolist()]
        assert float(values[4000:].sum()) < 1e-13 * norm
        for k in rng.integers(0, size // 2 + 1, 6).tolist():
            root = mpmath.expjpi(mpmath.mpf(-2 * k) / size)
            truth = mpmath.polyval(exact_values[::-1], root)
            # The assumption bounds the 2-norm of all errors, sqrt(size) of these; one entry is far below it.
            assert abs(mpmath.mpc(spectrum[k]) - truth) <= _transform(size) * norm + 1e-13 * norm
    back = np.fft.irfft(spectrum, size)
    assert float(np.linalg.norm(back - values)) <= 2.0 * _transform(size) * norm


def test_the_noise_bound_covers_what_a_power_of_the_transform_does():
    step, masses, count = 2.0**-6, [0.5, 0.2, 0.3], 64
    grid = Lattice(step, -128, 256, 2.0, -2.0, 6.0)
    composed = compose([(law(step, masses, -1), count)], grid)
    tilted = [m * math.exp(2.0 * step * k) for k, m in zip((-1, 0, 1), masses, strict=True)]
    with mpmath.workdps(40):
        total = [mpmath.mpf(1)]
        for _ in range(count):
            grown = [mpmath.mpf(0)] * (len(total) + 2)
            for i, a in enumerate(total):
                for j, b in enumerate(tilted):
                    grown[i + j] += a * mpmath.mpf(b)
            total = grown
        scale = mpmath.exp(-mpmath.mpf(composed.log_scale))
        found = composed.masses[128 - count : 128 + count + 1].tolist()
        error = mpmath.sqrt(mpmath.fsum((mpmath.mpf(f) - t * scale) ** 2 for f, t in zip(found, total, strict=True)))
        assert error <= composed.noise + composed.relative


def test_mass_at_infinity_is_that_of_at_least_one_such_step():
    parts = [(law(0.5, [0.6, 0.39], infinite=0.01), 3), (law(0.5, [0.998], infinite=0.002), 5)]
    low, high = certain_mass(parts)
    truth = 1 - mpmath.mpf(0.99) ** 3 * mpmath.mpf(0.998) ** 5
    assert low <= truth * (1 + 1e-14)
    assert truth * (1 - 1e-14) <= high
    assert high - low <= 1e-12


def test_moments_are_upper_bounds_at_any_tilt():
    masses = [0.2, 0.3, 0.5]
    for tilt in (-30.0, -0.5, 0.0, 1e-6, 2.0, 300.0):
        truth = 7 * mpmath.log(mpmath.fsum(m * mpmath.exp(mpmath.mpf(tilt) * k / 4) for k, m in enumerate(masses)))
        assert truth <= chernoff([(law(0.25, masses), 7)], tilt) <= truth + 1e-11 * (1 + abs(truth))
