"""The claim in plain words: short, complete, and true to the numbers."""

from __future__ import annotations

from itertools import product

import pytest
from reportkit import Shelf

from dpbudget.curve import Bounds
from dpbudget.mechanisms import Adjacency
from dpbudget.report.document import AttackPart, Ends
from dpbudget.report.words import MOST_WORDS, percent, small, span, statement, word_count

NAMES = ["one", "two", "phases", "rdp", "users", "waiting", "empty", "changed"]
ENDS = Ends.of(Bounds(0.012345678, 0.123456789))
ATTACK = AttackPart(
    advantage=ENDS, tpr_at_1_percent_fpr=ENDS, tpr_at_1_permille_fpr=ENDS, right_guess_from_even_odds=ENDS
)


@pytest.mark.parametrize("name", NAMES)
def test_a_statement_has_at_most_two_hundred_words(shelf: Shelf, name: str) -> None:
    assert word_count(shelf.report(name).statement) <= MOST_WORDS


@pytest.mark.parametrize(
    ("adjacency", "unit", "kind"), list(product(Adjacency, ("example", "user"), ("portfolio", "rdp")))
)
def test_so_has_the_longest_statement_of_every_kind(shelf: Shelf, adjacency: Adjacency, unit: str, kind: str) -> None:
    # Runs of both accountants, both modes of noise and many rates have the longest words.
    runs = (*shelf.report("two").runs, *shelf.report("users").runs)
    said = statement(
        epsilon=ENDS,
        delta=1.23456e-5,
        adjacency=adjacency,
        unit=unit,
        filter=kind,
        runs=runs,
        checked_by=("prv", "rdp"),
        attack=ATTACK,
        scope="spent",
    )
    assert word_count(said) <= MOST_WORDS
    assert unit in said[0]


def test_a_statement_names_everything_that_decides_the_privacy(shelf: Shelf) -> None:
    said = " ".join(shelf.report("one").statement)
    run = shelf.report("one").runs[0]
    phase, epsilon = run.plan.phases[0], shelf.report("one").epsilon
    assert epsilon is not None
    for fact in (
        "one example", "add-remove", "neighbours", "delta 1e-5", "prv version 1", "checked by rdp", "T = 20 of 20",
        "q = 0.05", f"sigma = {phase.noise_multiplier:.6g}", "C = 1", "Poisson", "secure", "Released", "checkpoint",
        "Not covered", "tuning", "preprocessing", "public weights", "dishonest code, keys or operating system",
        "1 % false alarms",
    ):  # fmt: skip
        assert fact in said, fact


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("users", "one user, with all rows"),
        ("users", "they differ in one user"),
        ("users", "exact (integers"),
        ("users", "which of two users"),
        ("two", "takes part in every step (q = 1)"),
        ("rdp", "Renyi filter"),
        ("rdp", "depend on earlier outputs"),
        ("two", "in 2 runs"),
        ("waiting", "nothing was released"),
        ("waiting", "1 plan is signed"),
        ("empty", "nothing was planned"),
    ],
)
def test_what_is_special_is_said(shelf: Shelf, name: str, fact: str) -> None:
    assert fact in " ".join(shelf.report(name).statement)


def test_numbers_are_rounded_against_the_guarantee() -> None:
    assert percent(0.0123451) == "1.24 %"
    assert small(1.2345671e-5) == "1.23457e-5"
    assert small(0.0) == "0"
    assert span([0.5, 0.25, 0.5]) == "0.25 to 0.5"
    assert span([0.5]) == "0.5"


def test_every_mode_of_noise_adjacency_and_unit_has_words() -> None:
    from dpbudget.plan import NOISE_MODES, UNITS
    from dpbudget.report import words

    assert set(words.NOISE) == set(words._NOISE) == set(NOISE_MODES)
    assert set(words._KIND) == set(UNITS)
    assert set(words._NEIGHBOURS) == set(Adjacency)
