"""One schedule counted in every way: each row is what it says it is."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import mpmath
import pytest

from dpbudget._calibrate import epsilon_of
from dpbudget._compare import Comparison, Row, compare
from dpbudget._conventions import central_limit
from dpbudget.accountants import get_accountant
from dpbudget.errors import DPBudgetError
from dpbudget.mechanisms import Adjacency, Charge, Gaussian
from dpbudget.plan import Phase

#: dp-accounting's discretised losses print 2.981 for it, and 29.054 for one Gaussian a pass.
MNIST = [(256 / 60000, 0.695, 2344)]
SCHEDULES = {
    "mnist": MNIST,
    "two phases": [(0.01, 1.0, 500), (0.02, 1.5, 500)],
    "no sampling": [(1.0, 8.0, 60)],
    "one step": [(0.1, 1.2, 1)],
}


def row(found: Comparison, name: str) -> Row:
    (one,) = [item for item in found.rows if item.name == name]
    return one


def test_the_figures_of_one_known_schedule() -> None:
    found = compare(MNIST, delta=1e-5, loader=(60000, 256, Fraction(10)))
    assert row(found, "prv").epsilon == pytest.approx(2.981, abs=5e-4)
    assert row(found, "shuffled").epsilon == pytest.approx(29.054, abs=5e-4)
    assert row(found, "tf-poisson").epsilon == row(found, "dp-accounting-rdp").epsilon
    assert row(found, "tf-once-per-epoch").epsilon >= row(found, "shuffled").epsilon
    assert "10 passes" in row(found, "shuffled").note
    assert row(found, "opacus-loader").epsilon == epsilon_of([(1 / 235, 0.695, 2350)], delta=1e-5).upper
    assert row(found, "classic-rdp").epsilon > row(found, "opacus-rdp").epsilon > row(found, "rdp").epsilon


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_all_that_is_called_a_bound_bounds_and_the_rest_is_named(name: str) -> None:
    found = compare(SCHEDULES[name], delta=1e-5, group=3)
    assert found.certified == epsilon_of(SCHEDULES[name], delta=1e-5)
    assert len({item.name for item in found.rows}) == len(found.rows)
    for item in found.rows:
        if item.standing != "not a bound" and item.question == "same":
            assert item.epsilon >= found.certified.lower, item.name
    assert [item.name for item in found.rows if item.standing == "not a bound"] == ["gdp"]


def test_the_central_limit_says_that_it_understates() -> None:
    found = compare(MNIST, delta=1e-5)
    limit = row(found, "gdp")
    assert limit.epsilon < 0.74 * found.certified.lower
    assert "understates by 26.6 % here" in limit.note
    many = compare([(0.5, 60.0, 5000)], delta=1e-5)
    assert "understates" in row(many, "gdp").note or "though not here" in row(many, "gdp").note


def test_the_central_limit_is_that_of_bu_and_others() -> None:
    with mpmath.workdps(30):
        mu = mpmath.mpf(256) / 60000 * mpmath.sqrt(2344 * mpmath.expm1(mpmath.mpf(0.695) ** -2))
        found = central_limit((Phase(rate_k=round(256 / 60000 * 2**64), noise_multiplier=0.695, steps=2344),), 1e-5)
        first = mpmath.ncdf(mu / 2 - found / mu)
        assert float(first - mpmath.exp(found) * mpmath.ncdf(-mu / 2 - found / mu)) == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize("sigma", [1e-3, 0.02, 1e6])
def test_the_central_limit_of_extreme_noise_is_no_error(sigma: float) -> None:
    found = central_limit((Phase(rate_k=1 << 60, noise_multiplier=sigma, steps=100),), 1e-5)
    assert found >= 0.0
    assert math.isinf(found) == (sigma < 0.1)


class TestOtherQuestions:
    @pytest.mark.parametrize("adjacency", ["zero-out", "replace-one"])
    def test_less_noise_than_a_question_may_have_is_a_row_without_an_answer(self, adjacency: str) -> None:
        found = compare([(0.5, 1e-3, 10)], delta=1e-5, group=3, adjacency=adjacency)
        assert math.isinf(row(found, "shuffled-replace").epsilon)  # half of the noise
        assert math.isfinite(row(found, "shuffled").epsilon)

    def test_a_group_that_delta_covers_spends_no_epsilon(self) -> None:
        assert row(compare([(1e-9, 10.0, 10)], delta=1e-5, group=1000), "group").epsilon == 0.0

    def test_without_sampling_a_group_of_k_has_a_k_th_of_the_noise(self) -> None:
        found = compare([(1.0, 20.0, 9)], delta=1e-6, group=4)
        exact = epsilon_of([(1.0, 5.0, 9)], delta=1e-6)
        assert exact.lower <= row(found, "group").epsilon <= exact.upper
        assert row(found, "group").question == "4 records together"

    def test_a_group_of_one_is_one_record(self) -> None:
        found = compare(MNIST, delta=1e-5, group=1)
        assert row(found, "group").epsilon == pytest.approx(found.certified.upper, rel=1e-6)
        assert row(found, "group").epsilon >= found.certified.lower

    def test_under_sampling_the_chain_of_neighbours_holds_at_its_own_delta(self) -> None:
        found = compare(MNIST, delta=1e-5, group=4)
        one = row(found, "group").epsilon / 4
        curve = get_accountant("prv").curve(
            [Phase(rate_k=round(256 / 60000 * 2**64), noise_multiplier=0.695, steps=2344).charge], Adjacency.ADD_REMOVE
        )
        spent = curve.delta(one).upper * math.fsum(math.exp(i * one) for i in range(4))
        assert 0.999e-5 < spent <= 1e-5

    def test_shuffled_batches_cost_a_gaussian_a_pass(self) -> None:
        found = compare([(0.01, 2.0, 250)], delta=1e-5)
        for name, relation in (("shuffled", Adjacency.ZERO_OUT), ("shuffled-replace", Adjacency.REPLACE_ONE)):
            curve = get_accountant("prv").curve([Charge(Gaussian(noise_multiplier=2.0), 3)], relation)
            assert row(found, name).epsilon == curve.epsilon(1e-5).upper
            assert row(found, name).question == f"shuffled batches, {relation}"

    @pytest.mark.parametrize(("rate", "steps", "passes"), [(1.0, 3, 3), (0.3, 9, 3), (1 / 235, 2350, 10), (0.5, 1, 1)])
    def test_passes_are_counted_in_whole_batches(self, rate: float, steps: int, passes: int) -> None:
        note = row(compare([(rate, 3.0, steps)], delta=1e-5), "shuffled").note
        assert ("once in one pass," if passes == 1 else f"once in each of {passes} passes,") in note

    def test_under_replace_one_the_conventions_of_others_are_left_out(self) -> None:
        found = compare(MNIST, delta=1e-5, adjacency="replace-one", loader=(60000, 256, Fraction(10)))
        assert [item.name for item in found.rows] == ["prv", "pld", "rdp", "shuffled", "shuffled-replace"]
        assert found.certified == epsilon_of(MNIST, delta=1e-5, adjacency="replace-one")


@pytest.mark.parametrize(
    ("facts", "code"),
    [({"delta": 0.0}, "DP002"), ({"group": 0}, "DP009"), ({"group": 10**7}, "DP009"), ({"adjacency": "x"}, "DP062")],
)
def test_what_is_out_of_range_is_refused_by_its_code(facts: dict[str, Any], code: str) -> None:
    with pytest.raises(DPBudgetError) as raised:
        compare(MNIST, **{"delta": 1e-5, **facts})
    assert raised.value.code == code
