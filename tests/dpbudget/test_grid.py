"""The integer grid of exact noise: the ratio of noise to the longest vector, and what a plan charges."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dpbudget import calibrate
from dpbudget._calibrate import max_steps, plan_for
from dpbudget._targets import curve_of, max_batch_size
from dpbudget.errors import InvalidParameter
from dpbudget.grid import MAX_LOG2_WIDTH, MIN_LOG2_WIDTH, RESOLUTION, grid_for
from dpbudget.plan import Plan, joint_ideal_delta

SMALL = {"dataset_size": 1000, "batch_size": 100, "epochs": 5, "delta": 1e-5}


@given(st.floats(1e-3, 1e6), st.integers(1, 2**40))
@example(1e-3, 1)
@example(1e6, 2**40)
@example(0.5, 4)
def test_noise_and_longest_vector_have_at_least_the_ratio_of_the_plan(sigma: float, parameters: int) -> None:
    grid = grid_for(sigma, parameters)
    assert Fraction(4) ** grid.log2_width >= grid.bound * Fraction(sigma) ** 2
    # and the bound is the largest integer for which that holds
    assert Fraction(4) ** grid.log2_width < (grid.bound + 1) * Fraction(sigma) ** 2


@given(st.floats(1e-3, 1e6), st.integers(1, 2**40))
@example(0.5, 2**40)
def test_the_grid_is_the_coarsest_power_of_two_that_keeps_a_record_to_one_part_in_64(sigma: float, d: int) -> None:
    width = grid_for(sigma, d).log2_width
    wanted = RESOLUTION**2 * Fraction(sigma) ** 2 * d
    assert MIN_LOG2_WIDTH <= width <= MAX_LOG2_WIDTH
    assert width == MAX_LOG2_WIDTH or Fraction(4) ** width >= wanted
    assert width == MIN_LOG2_WIDTH or Fraction(4) ** (width - 1) < wanted


@given(st.floats(0.05, 100.0), st.integers(1, 2**36))
def test_the_sum_of_a_million_records_and_its_noise_fits_64_bits(sigma: float, parameters: int) -> None:
    grid = grid_for(sigma, parameters)
    longest = math.isqrt(grid.bound)
    assert (longest << 20) + (20 << grid.log2_width) < 1 << 63


def test_a_unit_times_the_width_is_the_standard_deviation_of_the_noise() -> None:
    grid = grid_for(1.3, 10**6)
    assert grid.unit(0.5) * 2**grid.log2_width == pytest.approx(1.3 * 0.5, rel=1e-15)


class TestPlans:
    def test_a_plan_with_exact_noise_charges_no_tail(self) -> None:
        exact = calibrate(epsilon=2.0, noise="exact", max_parameters=2**40, **SMALL)
        assert exact.noise == "exact"
        assert exact.bounded_values == 0
        # rounded down by the few units that the computation may lose
        assert joint_ideal_delta((exact,), 1e-5) == pytest.approx(1e-5, rel=1e-13)
        assert joint_ideal_delta((exact,), 1e-5) <= 1e-5

    def test_a_delta_that_is_too_small_for_secure_noise_is_enough_for_exact_noise(self) -> None:
        facts = {**SMALL, "delta": 1e-30}
        with pytest.raises(InvalidParameter, match="or plan exact noise") as caught:
            calibrate(epsilon=8.0, **facts)
        assert caught.value.code == "DP053"
        assert calibrate(epsilon=8.0, noise="exact", **facts).claim.epsilon <= 8.0

    def test_exact_noise_needs_no_more_of_it_than_secure_noise(self) -> None:
        sigma = {
            mode: calibrate(epsilon=2.0, noise=mode, **SMALL).phases[0].noise_multiplier for mode in ("secure", "exact")
        }
        assert sigma["exact"] <= sigma["secure"] <= sigma["exact"] * (1 + 1e-6)

    def test_every_way_to_a_plan_knows_the_mode(self) -> None:
        size = {"dataset_size": 1000, "delta": 1e-30}
        plan = plan_for(noise_multiplier=9.0, noise="exact", batch_size=100, steps=10, **size)
        assert plan.noise == "exact"
        assert max_steps(epsilon=plan.claim.epsilon, noise_multiplier=9.0, noise="exact", batch_size=100, **size) >= 10
        assert max_steps(epsilon=8.0, noise_multiplier=9.0, batch_size=100, **size) == 0
        assert max_batch_size(epsilon=8.0, noise_multiplier=9.0, noise="exact", steps=10, **size) > 0
        attack = calibrate(advantage=0.2, noise="exact", **{**SMALL, "delta": 1e-30})
        assert attack.noise == "exact"
        assert curve_of(attack).epsilon(1e-30).upper <= attack.claim.epsilon

    def test_an_unknown_mode_is_answered_with_the_known_ones(self) -> None:
        with pytest.raises(InvalidParameter, match="unknown noise 'exakt'") as caught:
            calibrate(epsilon=2.0, noise="exakt", **SMALL)
        assert "secure, exact" in caught.value.hint
        assert "Did you mean exact?" in caught.value.hint

    def test_the_mode_is_part_of_what_is_signed(self) -> None:
        plan = calibrate(epsilon=2.0, noise="exact", **SMALL)
        assert Plan.parse(plan.encode()) == plan
        assert plan.digest() != plan.replace(noise="secure").digest()
