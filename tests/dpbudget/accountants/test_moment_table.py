"""Tables of real moments: above the truth, close to it, for every side and behind cuts."""

from __future__ import annotations

import random

import mpmath
import numpy as np
import pytest
from replace_one_oracle import log_moment_of

from dpbudget.accountants._cutting import dropped_mass
from dpbudget.accountants._law import Cut, Law
from dpbudget.accountants._moment_table import GRID_RATIO, MomentTable, join, step_rows
from dpbudget.accountants._phases import Phase
from dpbudget.accountants._tilted_step import TiltedStep
from dpbudget.mechanisms import SubsampledGaussianPair


def cases():
    rng = random.Random(11)
    found = []
    for side in ("remove", "add", "replace"):
        found += [
            (side, 10 ** rng.uniform(-6, -0.01), 10 ** rng.uniform(-1.5, 0.6), 10 ** rng.uniform(-2, 1.2))
            for _ in range(8)
        ]
    return found


@pytest.mark.parametrize(("side", "rate", "shift", "middle"), cases())
def test_upper_bounds_are_above_the_truth_and_within_1e_8_of_it(side, rate, shift, middle):
    tilts = middle * GRID_RATIO ** np.arange(-12, 12)
    upper, slope, bend = step_rows(Law(rate, shift, side), tilts)
    for k in (0, 23):
        true = log_moment_of(Law(rate, shift, side), float(tilts[k]))
        assert true - 1e-16 <= upper[k] <= true * (1 + 1e-8) + 1e-15
    assert np.all(slope > 0)
    assert np.all(bend > -1e-9 * slope)


@pytest.mark.parametrize(("rate", "shift", "tilt", "cut"), [
    (1e-3, 1.0, 20.0, Cut(6.0, 0.02)),
    (1e-4, 1.5, 5.0, Cut(8.0, 0.05)),
    (0.05, 0.5, 60.0, Cut(7.0, 0.01)),
])  # fmt: skip
@pytest.mark.parametrize("side", ["remove", "replace"])
def test_moments_behind_a_cut_are_those_of_what_is_left(side, rate, shift, tilt, cut):
    law = Law(rate, shift, side, cut)
    upper = step_rows(law, np.array([0.5 * tilt, tilt]))[0]
    for value, at in zip(upper, (0.5 * tilt, tilt), strict=True):
        true = log_moment_of(law, at)
        # A table leaves the dropped mass in: it bounds from above.
        assert true - 1e-16 <= value <= true + dropped_mass(law) + 1e-8 * abs(true)


def test_slopes_and_bends_are_the_derivatives():
    law, c = Law(0.01, 0.9, "remove"), 4.0
    upper, slope, bend = step_rows(law, np.array([c - 1e-3, c, c + 1e-3]))
    assert slope[1] == pytest.approx((upper[2] - upper[0]) / 2e-3, rel=1e-5)
    assert bend[1] == pytest.approx((upper[2] - 2 * upper[1] + upper[0]) / 1e-6, rel=1e-2)


def test_a_table_adds_its_phases_and_searches_around_the_least_tilt():
    phases = [Phase(SubsampledGaussianPair(0.01, s), n) for s, n in ((1.0, 100), (2.0, 50))]
    table = MomentTable(phases, "remove")
    rows = table.around(1.0, lambda r: np.abs(np.log(r.tilts) - np.log(30.0)))
    assert rows.tilts[8] < 30.0 < rows.tilts[-8]
    assert rows.upper == pytest.approx(100 * rows.steps[0] + 50 * rows.steps[1], rel=1e-12)
    assert join([rows]) is rows
    taken = rows.take(np.array([3, 5]))
    assert np.array_equal(taken.upper, rows.upper[[3, 5]])


def test_without_a_grid_convexity_bounds_the_moments():
    upper = step_rows(Law(0.25, 1000.0, "remove"), np.array([1e4]))[0]
    gaussian = 0.5 * 1e4 * (1e4 + 1) * 1e6
    with mpmath.workdps(40):
        assert upper[0] >= gaussian + mpmath.log(mpmath.mpf("0.25"))
    assert upper[0] <= gaussian * (1 + 1e-11)


def test_a_cut_holds_far_beyond_the_range_of_doubles():
    # The logistic falls below every float 700 widths beyond the cut, where e^{cL} has not begun to matter yet.
    law = Law(1e-3, 2.0, "remove", Cut(5.5, 1 / 1242))
    step = TiltedStep(law, 300.0, 0.0, 45.0)
    value, error = step.log_moment()
    true = 642.762724528018  # mpmath
    assert abs(value - true) <= 1e-12 * true
    assert error < 1e-9
    assert step_rows(law, np.array([300.0]))[0][0] >= true * (1 - 1e-14)
