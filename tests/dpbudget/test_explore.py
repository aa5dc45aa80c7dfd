"""A sweep before training: estimates beside certified answers, and a frontier beside its definition."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dpbudget
from dpbudget import calibrate, get_accountant, noise_for
from dpbudget._explore import Cell, Sweep, explore
from dpbudget._search import near_noise
from dpbudget.curve import PrivacyCurve
from dpbudget.errors import DPBudgetError
from dpbudget.mechanisms import Adjacency
from dpbudget.plan import Phase

LAW = {"delta": 1e-5, "dataset_size": 60000}


def certified(sweep: Sweep, cell: Cell, **facts: Any) -> float:
    plan = calibrate(
        epsilon=sweep.epsilon,
        delta=sweep.delta,
        dataset_size=sweep.dataset_size,
        batch_size=cell.batch_size,
        epochs=cell.epochs,
        **facts,
    )
    return plan.phases[0].noise_multiplier


def made_up(cells: list[Cell]) -> Sweep:
    return Sweep(3.0, 1e-5, 1000, (1,), (Fraction(1),), tuple(cells))


class TestEstimates:
    @pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 8.0, 30.0])
    @pytest.mark.parametrize(("size", "most"), [(60000, 60000), (60000, 2048), (1437, 1437)])
    def test_an_estimate_is_within_one_percent_of_the_certified_noise(
        self, epsilon: float, size: int, most: int
    ) -> None:
        sweep = explore(epsilon=epsilon, dataset_size=size, max_batch=most, points=7)
        for cell in random.Random(size).sample(sweep.cells, 4):
            assert cell.noise_multiplier == pytest.approx(certified(sweep, cell), rel=0.01)

    @pytest.mark.slow
    @pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0, 3.0, 8.0, 20.0])
    @pytest.mark.parametrize(("size", "most"), [(200, 200), (1437, 1437), (60000, 60000), (1000000, 8192)])
    def test_no_cell_of_many_is_off_by_more(self, epsilon: float, size: int, most: int) -> None:
        sweep = explore(epsilon=epsilon, dataset_size=size, max_batch=most)
        for cell in random.Random(size).sample(sweep.cells, 40):
            assert cell.noise_multiplier == pytest.approx(certified(sweep, cell), rel=0.01)

    @pytest.mark.parametrize("far", [0.5, 1.1, 1.4])
    def test_a_start_far_off_leads_to_the_same_noise(self, far: float) -> None:
        """Also where the first step leads down to the least noise, at which epsilon is much too large."""
        rate, steps, delta = 7 / 60000, 1029, 5.5e-6
        exact = noise_for(epsilon=1.0, delta=delta, sample_rate=rate, steps=steps)

        def curve(sigma: float) -> PrivacyCurve:
            charge = Phase(rate_k=round(rate * 2**64), noise_multiplier=sigma, steps=steps).charge
            return get_accountant("prv").curve([charge], Adjacency.ADD_REMOVE)

        found = near_noise(curve, 1.0, lambda _: delta, (far * exact, 1.5), 0.5 * exact, 1e-5)
        assert found is not None
        assert found[0] == pytest.approx(exact, rel=0.01)

    def test_no_noise_is_looked_for_below_the_steps_that_are_needed(self) -> None:
        facts = {"epsilon": 3.0, "max_batch": 4096, "points": 6, **LAW}
        whole, part = explore(**facts), explore(min_steps=500, **facts)
        for one, other in zip(whole.cells, part.cells, strict=True):
            assert (other.noise_multiplier is None) == (other.steps < 500)
            if other.noise_multiplier is not None:
                assert other.noise_multiplier == pytest.approx(one.noise_multiplier, rel=5e-3)
        frontiers = ([member.cell.batch_size for member in sweep.frontier(500)] for sweep in (whole, part))
        assert next(frontiers) == next(frontiers)

    @pytest.mark.parametrize("adjacency", ["zero-out", "replace-one"])
    def test_other_adjacencies_and_exact_noise_are_estimated_too(self, adjacency: str) -> None:
        facts = {"adjacency": adjacency, "noise": "exact", "max_parameters": 1000}
        sweep = explore(epsilon=2.0, dataset_size=5000, points=3, **facts)
        for cell in sweep.cells[::2]:
            assert cell.noise_multiplier == pytest.approx(certified(sweep, cell, **facts), rel=0.01)

    def test_where_the_tail_asks_for_more_noise_than_epsilon_the_tail_decides(self) -> None:
        sweep = explore(epsilon=1000.0, batch_sizes=[20000], epochs=[10], **LAW)
        for cell in sweep.cells:
            assert cell.noise_multiplier == pytest.approx(certified(sweep, cell), rel=0.01)

    def test_one_step_has_an_estimate(self) -> None:
        sweep = explore(epsilon=2.0, batch_sizes=[600, 60000], epochs=[Fraction(1, 100)], **LAW)
        assert [cell.steps for cell in sweep.cells] == [1, 1]
        for cell in sweep.cells:
            assert cell.noise_multiplier == pytest.approx(certified(sweep, cell), rel=0.01)

    def test_a_delta_that_covers_no_tail_has_no_noise_and_no_frontier(self) -> None:
        sweep = explore(epsilon=3.0, dataset_size=60000, delta=1e-60)
        assert {cell.noise_multiplier for cell in sweep.cells} == {None}
        assert sweep.frontier(1) == ()
        assert sweep.chosen(1) is None


class TestShape:
    def test_cells_are_every_batch_size_of_every_length(self) -> None:
        told = []
        sweep = explore(
            epsilon=3.0,
            batch_sizes=[512, 64, 512],
            epochs=[2.5, Fraction(1, 3)],
            progress=lambda: told.append(1),
            **LAW,
        )
        assert (sweep.batch_sizes, sweep.epochs) == ((64, 512), (Fraction(1, 3), Fraction(5, 2)))
        places = [(cell.batch_size, cell.epochs) for cell in sweep.cells]
        assert places == [(batch, length) for length in sweep.epochs for batch in sweep.batch_sizes]
        assert len(told) == 4
        assert sweep.kind == "numerical"
        for cell in sweep.cells:
            assert cell.steps == math.ceil(cell.epochs * 60000 / cell.batch_size)
            assert cell.records == cell.steps * cell.batch_size
            assert cell.noise_multiplier is not None
            assert cell.signal == cell.batch_size / cell.noise_multiplier

    def test_a_default_sweep_ends_at_the_limits_and_has_the_default_delta(self) -> None:
        sweep = explore(epsilon=3.0, dataset_size=60000, max_batch=4096, max_epochs=40, points=5)
        assert (sweep.batch_sizes[-1], sweep.epochs[-1]) == (4096, 40)
        assert len(sweep.cells) == 25
        assert sweep.delta == 60000**-1.1

    @pytest.mark.parametrize(
        ("facts", "code"),
        [
            ({"epsilon": 0.0}, "DP001"),
            ({"epsilon": 1e-4}, "DP001"),
            ({"dataset_size": 0}, "DP009"),
            ({"batch_sizes": [60001]}, "DP008"),
            ({"epochs": [0]}, "DP009"),
            ({"points": 1}, "DP009"),
            ({"points": 41}, "DP009"),
            ({"batch_sizes": range(1, 202), "epochs": range(1, 11)}, "DP009"),
            ({"delta": 1.0}, "DP002"),
            ({"adjacency": "swap"}, "DP062"),
        ],
    )
    def test_what_is_out_of_range_is_refused_by_its_code(self, facts: dict[str, Any], code: str) -> None:
        with pytest.raises(DPBudgetError) as raised:
            explore(**{"epsilon": 3.0, **LAW, **facts})
        assert raised.value.code == code

    def test_it_is_a_public_name(self) -> None:
        assert dpbudget.explore is explore
        assert dpbudget.Sweep is Sweep


CELLS = st.lists(
    st.builds(
        Cell,
        st.integers(1, 6),
        st.just(Fraction(1)),
        st.integers(1, 6),
        st.one_of(st.none(), st.sampled_from([0.5, 1.0, 2.0, 3.0])),
    ),
    max_size=12,
)


class TestFrontier:
    @given(CELLS, st.integers(1, 6))
    def test_a_member_is_beaten_by_nothing_and_all_else_is(self, cells: list[Cell], least: int) -> None:
        found = [member.cell for member in made_up(cells).frontier(least)]
        useful = [cell for cell in cells if cell.steps >= least and cell.signal > 0.0]

        def beats(one: Cell, other: Cell) -> bool:
            no_worse = one.signal >= other.signal and one.records <= other.records
            return no_worse and (one.signal, one.records) != (other.signal, other.records)

        best = [cell for cell in useful if not any(beats(other, cell) for other in useful)]
        assert {(cell.signal, cell.records) for cell in found} == {(cell.signal, cell.records) for cell in best}
        assert [cell.records for cell in found] == sorted({cell.records for cell in found})

    def test_a_member_says_what_it_brings_and_costs_beside_the_last(self) -> None:
        first, second = made_up([Cell(2, Fraction(1), 3, 1.0), Cell(3, Fraction(1), 3, 1.0)]).frontier(3)
        assert (first.more_signal, first.more_records) == (None, None)
        assert (second.more_signal, second.more_records) == (0.5, 0.5)

    def test_of_cells_whose_compute_is_the_same_the_one_with_most_signal_stands(self) -> None:
        """Steps are whole: half an epoch of 60000 records in batches of 20, 36, 47 and 62 is not the same number."""
        cells = [Cell(batch, Fraction(1, 2), -(-30000 // batch), 0.5) for batch in (20, 36, 47, 62)]
        assert {cell.records for cell in cells} == {30000, 30024, 30033, 30008}
        (member,) = made_up(cells).frontier(400)
        assert (member.cell.batch_size, member.more_signal) == (62, None)

    def test_equal_compute_is_measured_from_the_least_so_that_many_small_rises_count(self) -> None:
        rising = [Cell(1000 + 9 * k, Fraction(1), 1, 1.0) for k in range(5)]
        assert [member.cell.batch_size for member in made_up(rising).frontier(1)] == [1009, 1027, 1036]

    def test_the_chosen_one_is_the_cheapest_with_the_share(self) -> None:
        sweep = made_up([Cell(batch, Fraction(1), 10, 1.0) for batch in (50, 89, 90, 95, 100)])
        chosen = sweep.chosen(10)
        assert chosen is not None
        assert chosen.cell.batch_size == 90
        assert sweep.chosen(10, share=0.5) == sweep.frontier(10)[0]
        assert sweep.chosen(11) is None

    def test_larger_batches_at_equal_steps_bring_less_and_less(self) -> None:
        """What the frontier of a real sweep shows: signal per step rises with compute, and its rise falls off."""
        batches = [300 * 2**k for k in range(7)]
        sweep = explore(epsilon=3.0, batch_sizes=batches, epochs=[2.5 * 2**k for k in range(7)], **LAW)
        members = sweep.frontier(500)
        assert [member.cell.batch_size for member in members] == batches
        assert {member.cell.steps for member in members} == {500}
        gains = [member.more_signal for member in members[1:] if member.more_signal is not None]
        assert len(gains) == 6
        assert gains == sorted(gains, reverse=True)
        assert gains[-1] < 0.05 < 0.4 < gains[0]
