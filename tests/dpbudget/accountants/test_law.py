"""Losses of one step at a node, on every side and behind a cut, against mpmath."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpbudget.accountants._cutting import cut_laws, dropped_mass
from dpbudget.accountants._law import Cut, Law, law_of, losses_at, posteriors
from dpbudget.mechanisms import ReplaceOneGaussianPair, SubsampledGaussianPair

SIDES = ("remove", "add", "replace")
CUT = Cut(5.0, 0.03)


def true_losses(law, x):
    """(density of the step's law against the reference, loss, share that the cut keeps) in 60 digits."""
    q, m, x = mpmath.mpf(law.rate), mpmath.mpf(law.shift), mpmath.mpf(float(x))
    near = 1 - q + q * mpmath.exp(m * x - m * m / 2)
    far = 1 - q + q * mpmath.exp(-m * x - m * m / 2)
    kept = 1 if law.cut is None else 1 / (1 + mpmath.exp((x - mpmath.mpf(law.cut.at)) / mpmath.mpf(law.cut.width)))
    if law.side == "add":
        return mpmath.mpf(1), -mpmath.log(near), kept
    return near, mpmath.log(near) - (mpmath.log(far) if law.side == "replace" else 0), kept


@example("remove", -1.0, -0.625, 27.0, True)  # the cut keeps a share below the normal numbers
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SIDES), st.floats(-7, -0.001), st.floats(-0.7, 2.3), st.floats(-12, 30), st.booleans())
def test_losses_and_weights_lie_within_their_error_bounds(side, log_rate, log_sigma, x, cut):
    law = Law(10**log_rate, 10**-log_sigma, side, CUT if cut and side != "add" else None)
    one = losses_at(law, np.array([x]))
    with mpmath.workdps(60):
        density, loss, kept = true_losses(law, x)
        assert abs(one.loss[0] - loss) <= one.loss_error[0] + 1e-50
        if one.weight[0] < 1e250:
            assert abs(one.weight[0] - density * kept) <= one.weight_error[0] * density * kept + 1e-280
        assert abs(one.log_weight[0] - mpmath.log(density * kept)) <= (
            one.weight_error[0] + 8 * 2.0**-53 * abs(one.log_weight[0]) + 1e-15
        )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("rate", "shift"), [(1e-7, 1.0), (0.01, 2.0), (0.4, 0.05), (0.999, 0.7)])
def test_the_mean_loss_is_summed_from_deviations_without_cancellation(side, rate, shift):
    law = Law(rate, shift, side)
    x = np.arange(-500, 501) * 0.03125
    one = losses_at(law, x)
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi) * 0.03125
    assert one.deviation.min() >= 0.0
    with mpmath.workdps(20):
        true = mpmath.quad(
            lambda y: mpmath.npdf(y) * true_losses(law, y)[0] * true_losses(law, y)[1], mpmath.linspace(-12, 12, 7)
        )
    assert float(density @ one.deviation) == pytest.approx(float(true), rel=1e-11)


def test_the_replace_one_loss_is_odd():
    law = Law(0.01, 0.9, "replace")
    x = np.linspace(0.0, 30.0, 200)
    assert np.array_equal(losses_at(law, x).loss, -losses_at(law, -x).loss)


def test_posteriors_fall_and_rise_with_the_output():
    near, far = posteriors(Law(0.01, 0.9, "replace"), np.linspace(-9, 9, 50))
    assert np.all(np.diff(near) > 0)
    assert np.all(np.diff(far) < 0)
    assert not posteriors(Law(0.01, 0.9, "remove"), np.linspace(-9, 9, 50))[1].any()


def test_each_pair_has_its_law():
    sampled = SubsampledGaussianPair(0.1, 2.0)
    assert law_of(sampled, "add") == Law(0.1, 0.5, "add")
    assert law_of(ReplaceOneGaussianPair(0.1, 2.0), "add").side == "replace"
    assert law_of(SubsampledGaussianPair(1.0, 2.0), "add").plain
    assert law_of(ReplaceOneGaussianPair(0.1, 2.0), "remove").square_distance == 1.0
    assert law_of(sampled, "add").largest_loss() == pytest.approx(-math.log(0.9))
    assert math.isinf(law_of(sampled, "remove").largest_loss())


@pytest.mark.parametrize(("at", "width"), [(3.0, 0.01), (6.0, 0.05), (9.0, 0.002)])
@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.5])
def test_the_dropped_mass_is_a_tight_upper_bound(rate, at, width):
    law = Law(rate, 0.8, "remove", Cut(at, width))
    with mpmath.workdps(40):
        q, m = mpmath.mpf(rate), mpmath.mpf("0.8")

        def dropped(x):
            return ((1 - q) * mpmath.npdf(x) + q * mpmath.npdf(x - m)) / (1 + mpmath.exp(-(x - at) / width))

        true = mpmath.quad(dropped, [at - 60 * width, at - 10 * width, at, at + 10 * width, at + 1, at + 5, at + 20])
    assert true <= dropped_mass(law) <= 1.5 * true


def test_cuts_cost_what_they_may_and_only_where_a_loss_is_unbounded():
    law = Law(1e-3, 1.0, "remove")
    (cut,) = cut_laws([law], [100], 0.5, 1e-8, 1e-9)
    assert 100 * dropped_mass(cut) <= 1e-4 * 1e-8
    assert cut_laws([Law(1e-3, 1.0, "add")], [100], 0.5, 1e-8, 1e-9) is None
    assert dropped_mass(law) == 0.0
    assert dropped_mass(Law(1e-3, 1.0, "remove", Cut(0.5, 0.1))) == 1.0
