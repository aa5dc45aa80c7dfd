"""Sums over many nodes by transforms, against the sums themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpbudget.accountants._fourier import PAIRWISE, _terms, turn_along


def direct(losses, weights, step, count):
    u = np.arange(count + 1).astype(np.longdouble) * np.longdouble(step)
    phase = np.multiply.outer(u, losses.astype(np.longdouble))
    return (np.exp(1j * phase) - 1) @ weights.astype(np.clongdouble)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 600), st.floats(-2, 2), st.floats(-5, 1), st.booleans())
def test_transforms_agree_with_direct_sums_within_their_bound(seed, count, log_step, log_scale, falling):
    rng = np.random.default_rng(seed)
    losses = np.sort(rng.standard_normal(200) * 10**log_scale)
    losses = losses[::-1] if falling else losses
    weights = rng.random(200)
    turned = turn_along(losses, weights, np.zeros(200), 10**log_step, count)
    u = np.arange(count + 1) * 10**log_step
    error = np.abs(turned.value - direct(losses, weights, 10**log_step, count))
    # The losses' own rounding turns a phase by |u L| roundoffs; 4 of them are the caller's to add.
    own = 4 * 2.0**-53 * u * float(weights @ np.abs(losses))
    assert np.all(error <= turned.linear * u + turned.constant + own + 1e-18)


def test_small_losses_keep_their_relative_accuracy():
    losses, weights = np.linspace(-1e-9, 2e-9, 400), np.full(400, 1 / 400)
    turned = turn_along(losses, weights, np.zeros(400), 1.0, 500)
    assert turned.constant == 0.0
    true = direct(losses, weights, 1.0, 500)
    assert np.abs(turned.value - true)[1:].max() <= 1e-13 * np.abs(true).max()


def test_errors_of_the_weights_are_counted():
    losses, weights = np.linspace(-1.0, 2.0, 50), np.full(50, 0.02)
    exact = turn_along(losses, weights, np.zeros(50), 3.0, 64)
    rough = turn_along(losses, weights, np.full(50, 1e-6), 3.0, 64)
    assert rough.constant >= exact.constant + 1e-6 * 2 * 0.9


@pytest.mark.parametrize("nu", [0.1, 0.5, 1.0])
def test_the_taylor_remainder_is_negligible(nu):
    terms = _terms(nu)
    assert nu**terms / float(np.prod(np.arange(1.0, terms + 1))) <= 2e-17


@pytest.mark.parametrize("size", [200, 5000, 200_000, 1 << 21])
def test_numpy_adds_pairwise_as_the_bounds_assume(size):
    rng = np.random.default_rng(size)
    values = rng.random(size)
    true = np.sum(values.astype(np.longdouble))
    for total in (values.sum(), np.add.reduceat(values, [0])[0], np.stack([values, values]).sum(axis=1)[1]):
        assert abs(total - true) <= PAIRWISE * 2.0**-53 * true


@pytest.mark.parametrize("size", [1 << 8, 1 << 14, 1 << 19])
def test_numpys_transform_is_within_the_roundoffs_that_the_bounds_assume(size):
    rng = np.random.default_rng(size)
    values = rng.random(size) * np.exp(-20 * rng.random(size))
    computed = np.conj(np.fft.rfft(values))
    for k in (0, 1, 7, size // 5, size // 2):
        # The phase 2 pi k g / n is reduced in integers first.
        phase = 2 * np.longdouble("3.14159265358979323846264338327950288") * ((np.arange(size) * k) % size) / size
        true = (values * np.exp(1j * phase)).sum()
        assert abs(computed[k] - true) <= 8 * np.log2(size) * 2.0**-53 * values.sum()
