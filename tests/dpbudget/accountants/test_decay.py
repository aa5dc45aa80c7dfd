"""The layer-cake bound of the characteristic function's decay, against the characteristic function itself."""

from __future__ import annotations

import math
import random

import mpmath
import numpy as np
import pytest

from dpbudget.accountants import exact
from dpbudget.accountants._decay import _LOBE, Decay, _layers, _one_minus_envelope
from dpbudget.accountants._law import Cut, Law
from dpbudget.accountants._tilted_step import TiltedStep


def random_steps():
    rng = random.Random(99)
    return [
        (
            10 ** rng.uniform(-5, -0.05),
            10 ** rng.uniform(-0.6, 1.0),
            10 ** rng.uniform(-1.5, 1.0),
            rng.choice(["remove", "add"]),
        )
        for _ in range(60)
    ]


@pytest.mark.parametrize(("rate", "sigma", "tilt", "direction"), random_steps())
def test_the_bound_is_above_the_modulus_at_every_later_frequency(rate, sigma, tilt, direction):
    spread = 1.0 / max(rate * math.sqrt(math.expm1(min(sigma**-2, 10.0))), 1e-3)
    u = np.geomspace(0.01 * spread, 3.0 * spread, 40)
    law = Law(rate, 1.0 / sigma, direction)
    step = TiltedStep(law, tilt, float(u[-1]), 45.0)
    if not step.usable:
        pytest.fail("the case has no grid")
    top = step.log_moment()[0]
    log_rho = Decay(law, tilt, top + 1e-12).log_rho(u)
    modulus = step.moments(u).log_moment.real - top
    later = np.maximum.accumulate(modulus[::-1])[::-1]
    assert np.all(later <= log_rho + 1e-9)
    assert np.all(np.diff(log_rho) <= 1e-12)


@pytest.mark.parametrize(
    ("law", "tilt"),
    [
        (Law(0.01, 1.0, "replace"), 3.0),
        (Law(1e-4, 1.6, "replace"), 1.5),
        (Law(0.4, 0.2, "replace"), 8.0),
        (Law(1e-3, 1.2, "remove", Cut(7.0, 0.02)), 12.0),
        (Law(0.05, 0.6, "replace", Cut(8.0, 0.03)), 6.0),
    ],
)
def test_the_bound_without_a_located_valley_is_above_the_modulus_too(law, tilt):
    spread = 1.0 / max(law.rate * math.sqrt(math.expm1(min(law.square_distance, 10.0))), 1e-3)
    u = np.geomspace(0.01 * spread, 3.0 * spread, 40)
    step = TiltedStep(law, tilt, float(u[-1]), 45.0)
    top = step.log_moment()[0]
    log_rho = Decay(law, tilt, top + 1e-12).log_rho(u)
    later = np.maximum.accumulate((step.moments(u).log_moment.real - top)[::-1])[::-1]
    assert np.all(later <= log_rho + 1e-9)
    assert log_rho[-1] < -1e-3


def test_the_bound_is_close_to_the_gaussian_decay_at_small_frequencies():
    rate, sigma, tilt = 0.1, 3.0, 3.0
    law = Law(rate, 1.0 / sigma, "remove")
    step = TiltedStep(law, tilt, 1.0, 45.0)
    top = step.log_moment()[0]
    modulus = step.moments(np.array([1.0])).log_moment.real[0] - top
    assert Decay(law, tilt, top).log_rho(np.array([1.0]))[0] < 0.5 * modulus


def test_a_loss_with_two_peaks_has_its_valley_found():
    # Rare and large: most mass near l = 0, some near l = 12, almost none between.
    rate, sigma, tilt = 1e-3, 0.25, 1.0
    top = float(exact.log_moment(rate, sigma, tilt, "remove", 20))
    decay = Decay(Law(rate, 1.0 / sigma, "remove"), tilt, top)
    valley = decay._valley()
    assert 1.0 < valley < 5.0

    def log_density(x):
        a = x / sigma - 0.5 / sigma**2
        log_ratio = math.log1p(rate * math.expm1(a))
        return (2.0 + tilt) * log_ratio - a - 0.5 * x * x

    assert log_density(valley) < min(log_density(valley - 0.1), log_density(valley + 0.1))


def test_the_envelope_is_above_every_later_value_of_sinc():
    y = np.linspace(1e-6, 40.0, 4000)
    sinc = np.abs(np.sin(y)) / y
    later = np.maximum.accumulate(sinc[::-1])[::-1]
    assert np.all(1.0 - _one_minus_envelope(y) >= later - 1e-15)


def test_the_envelope_is_relatively_accurate_at_zero():
    for y in (1e-8, 1e-4, 0.1, 0.7):
        with mpmath.workdps(40):
            true = float(1 - mpmath.sin(mpmath.mpf(y)) / y)
        value = float(_one_minus_envelope(np.array([y]))[0])
        assert value <= true * (1 + 1e-14)
        assert value == pytest.approx(true, rel=1e-5)


def test_the_first_lobe_of_sinc_is_below_its_constant():
    with mpmath.workdps(30):
        peak = mpmath.findroot(lambda v: mpmath.tan(v) - v, 4.49)
        assert abs(mpmath.sin(peak) / peak) < _LOBE


def test_layers_of_a_step_function_have_its_mass():
    heights, widths = np.array([1.0, 4.0, 3.0, 0.5]), np.array([0.2, 0.1, 0.4, 1.0])
    masses, wide = _layers(heights, widths)
    assert masses.sum() == pytest.approx(float(heights @ widths))
    assert list(wide) == pytest.approx([0.1, 0.5, 0.7, 1.7])
