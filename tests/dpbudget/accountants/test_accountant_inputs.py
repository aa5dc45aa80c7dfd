"""Names, bad input, empty compositions, light import."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import pytest
from accounting_cases import sampled

from dpbudget.accountants import ACCOUNTANTS, get_accountant
from dpbudget.errors import InvalidParameter
from dpbudget.mechanisms import Adjacency, Charge, Gaussian

ADD_REMOVE = Adjacency.ADD_REMOVE
NAMES = sorted(ACCOUNTANTS)


@pytest.fixture(params=NAMES)
def accountant(request):
    return get_accountant(request.param)


def test_an_accountant_is_chosen_by_name_and_carries_it(accountant):
    assert accountant.name in NAMES
    assert accountant.version == 1


@pytest.mark.parametrize(("typo", "suggestion"), [("prvs", "prv"), ("RDP", "rdp"), ("rpd", "rdp")])
def test_an_unknown_name_lists_the_choices_and_guesses_what_was_meant(typo, suggestion):
    with pytest.raises(InvalidParameter) as caught:
        get_accountant(typo)
    assert caught.value.code == "DP061"
    assert f"did you mean {suggestion!r}" in caught.value.hint
    assert "prv, rdp" in caught.value.hint


def test_a_name_like_nothing_known_gets_no_guess():
    with pytest.raises(InvalidParameter) as caught:
        get_accountant("zzzzzz")
    assert "did you mean" not in caught.value.hint


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, math.inf, "1e-5", None, True])
def test_delta_outside_its_range_is_refused(accountant, delta):
    curve = accountant.curve([sampled(0.01, 1.0, 10)], ADD_REMOVE)
    with pytest.raises(InvalidParameter, match=r"delta must lie in \(0, 1\)") as caught:
        curve.epsilon(delta)
    assert caught.value.code == "DP002"


@pytest.mark.parametrize("epsilon", [-1e-9, math.nan, math.inf, "1", None])
def test_epsilon_outside_its_range_is_refused(accountant, epsilon):
    curve = accountant.curve([sampled(0.01, 1.0, 10)], ADD_REMOVE)
    with pytest.raises(InvalidParameter, match="epsilon must be a finite number >= 0") as caught:
        curve.delta(epsilon)
    assert caught.value.code == "DP001"


@pytest.mark.parametrize("count", [-1, 1.5, math.nan, True, "3"])
def test_a_count_that_is_no_natural_number_is_refused(accountant, count):
    with pytest.raises(InvalidParameter, match="count of a charge must be an integer >= 0") as caught:
        accountant.curve([Charge(Gaussian(noise_multiplier=1.0), count)], ADD_REMOVE)
    assert caught.value.code == "DP009"


def test_replacing_a_record_costs_more_than_removing_one(accountant):
    charges = [sampled(0.01, 1.0, 10)]
    replaced = accountant.curve(charges, Adjacency.REPLACE_ONE).epsilon(1e-5)
    assert replaced.upper > accountant.curve(charges, ADD_REMOVE).epsilon(1e-5).upper


@pytest.mark.parametrize("charges", [[], [sampled(0.01, 1.0, 0)]])
def test_nothing_charged_is_nothing_spent(accountant, charges):
    curve = accountant.curve(charges, ADD_REMOVE)
    assert (curve.epsilon(1e-5).lower, curve.epsilon(1e-5).upper) == (0.0, 0.0)
    assert (curve.delta(0.0).lower, curve.delta(0.0).upper) == (0.0, 0.0)


def test_zero_out_has_the_answers_of_add_remove(accountant):
    charges = [sampled(0.01, 1.0, 100)]
    first = accountant.curve(charges, ADD_REMOVE).epsilon(1e-6)
    assert accountant.curve(charges, Adjacency.ZERO_OUT).epsilon(1e-6) == first


def test_the_order_and_grouping_of_charges_does_not_matter(accountant):
    grouped = [sampled(0.01, 1.0, 300), sampled(0.02, 2.0, 100)]
    split = [sampled(0.02, 2.0, 40), sampled(0.01, 1.0, 300), sampled(0.02, 2.0, 60)]
    first, second = (accountant.curve(charges, ADD_REMOVE).epsilon(1e-6) for charges in (grouped, split))
    assert first.upper == pytest.approx(second.upper, rel=1e-10)


def test_importing_the_package_loads_no_numerics():
    code = (
        "import sys, dpbudget.accountants\n"
        "heavy = {'scipy', 'torch', 'matplotlib', 'mpmath'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("epsilon", [1e6, 1e12, 1e18, 1e150, 1e300])
@pytest.mark.parametrize("steps", [[(2.0**-64, 0.12, 2)], [(1.0 - 2.0**-53, 0.12, 1)], [(1.0, 0.5, 3), (0.5, 0.12, 1)]])
def test_an_epsilon_beyond_all_losses_leaves_no_delta_and_raises_nothing(epsilon, steps):
    bounds = get_accountant("prv").curve([sampled(*step) for step in steps], Adjacency.ADD_REMOVE).delta(epsilon)
    assert 0.0 <= bounds.lower <= bounds.upper <= 1e-300


def test_no_warning_leaves_an_accountant_in_a_corner():
    charges = [sampled(2.0**-32, 0.12, 10**9), sampled(2.0**-16, 0.06, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bounds = get_accountant("prv").curve(charges, Adjacency.ADD_REMOVE).delta(1e6)
    assert bounds.upper <= 1e-300
