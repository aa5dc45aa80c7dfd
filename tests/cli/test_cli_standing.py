"""What is spent, promised and plannable, and what becomes of a plan when nothing usable is left."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dpbudget

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
LEDGER = "a.ledger"
NEW = ("plan", "new", "--ledger", LEDGER, "--batch-size", "20", "--steps", "20", "--max-parameters", "5000")
PLAN = (*NEW, "--dataset-size", "100")


def begin(ledger: str = LEDGER) -> None:
    """Charge the first lease of the newest plan."""
    writer = dpbudget.load_key(f"{ledger}.writer.key")
    with (
        dpbudget.open_ledger(ledger, writer=writer) as opened,
        dpbudget.start(opened, list(opened.state.runs)[-1]) as run,
    ):
        run.next_receipt()


def make(run_cli: Cli, *options: str) -> None:
    assert run_cli("ledger", "init", LEDGER, "--epsilon", "3", "--delta", "1e-5", *options).code == 0


def standing(run_cli: Cli) -> tuple[tuple[float, float], ...]:
    shown = run_cli("ledger", "show", LEDGER, "--json").json
    return tuple((shown[name]["epsilon"], shown[name]["delta"]) for name in ("spent", "promised", "left"))


@pytest.fixture
def used_up(run_cli: Cli, empty: Path) -> Path:
    """A ledger whose first portfolio began and took all of epsilon but the dust of rounding."""
    make(run_cli)
    assert run_cli(*PLAN).code == 0
    begin()
    return empty


def test_dust_is_not_planned_with(run_cli: Cli, used_up: Path, seen: Seen) -> None:
    with dpbudget.open_ledger(LEDGER) as ledger:
        assert 0 < ledger.state.remaining_epsilon < 1e-6
        assert ledger.state.remaining_delta > 0
    before = seen(used_up)
    for target in ((), ("--epsilon", "1e-9"), ("--noise-multiplier", "71343"), ("--steps", "5000")):
        answer = run_cli(*(PLAN[:-4] if "--steps" in target else PLAN), *target, "--dataset-size", "100")
        assert (answer.code, "DP052" in answer.err) == (3, True), target
        assert re.search(r"the plans take epsilon (2\.9999\d*|3) of 3; nothing usable is left", answer.err)
        assert f"Fix: the owner can raise the total: dpbudget ledger grant {LEDGER} --epsilon E\n" in answer.err
    assert seen(used_up) == before


def test_what_was_granted_on_top_of_dust_is_planned_with(run_cli: Cli, used_up: Path) -> None:
    assert run_cli("ledger", "grant", LEDGER, "--epsilon", "4").code == 0
    answer = run_cli(*PLAN, "--json").json
    assert 0.99 < answer["epsilon"]["upper"] <= 1.0 + 1e-6
    assert answer["delta"] == 2.5e-6


def test_left_means_the_same_before_and_after_a_plan_begins(run_cli: Cli, empty: Path) -> None:
    make(run_cli)
    assert standing(run_cli) == ((0.0, 0.0), (0.0, 0.0), (3.0, 5e-6))
    claim = run_cli(*PLAN, "--epsilon", "1", "--json").json["epsilon"]["upper"]
    spent, promised, plannable = standing(run_cli)
    assert (spent, promised) == ((0.0, 0.0), (claim, 5e-6))
    assert plannable == (pytest.approx(3.0 - claim), 5e-6)
    begin()
    spent, promised, plannable = standing(run_cli)
    assert (spent, promised) == ((claim, 5e-6), (0.0, 0.0))
    assert plannable == (pytest.approx(3.0 - claim), 2.5e-6)


def test_plans_of_one_portfolio_promise_their_joint_claim(run_cli: Cli, empty: Path) -> None:
    make(run_cli)
    claims = [run_cli(*PLAN, "--noise-multiplier", "4", "--json").json["epsilon"]["upper"] for _ in range(2)]
    _, (promised, _), (plannable, _) = standing(run_cli)
    assert max(claims) < promised < sum(claims)
    begin()
    (spent, _), _, _ = standing(run_cli)
    assert promised == pytest.approx(spent, abs=1e-8)
    assert plannable == pytest.approx(3.0 - promised)


def test_dust_is_shown_as_nothing(run_cli: Cli, used_up: Path) -> None:
    assert standing(run_cli)[2] == (0.0, 2.5e-6)
    table = run_cli("ledger", "show", LEDGER).out
    assert re.search(r"^spent +epsilon (2\.9999\d*|3), delta 5e-06$", table, re.MULTILINE)
    assert re.search(r"^promised +nothing$", table, re.MULTILINE)
    assert re.search(r"^plannable +epsilon 0, delta 2.5e-06$", table, re.MULTILINE)


def test_epsilon_without_delta_is_no_dead_end(run_cli: Cli, empty: Path) -> None:
    make(run_cli, "--whole-budget")
    assert run_cli(*PLAN).code == 0
    begin()
    both = run_cli(*PLAN)
    assert (both.code, f"dpbudget ledger grant {LEDGER} --epsilon E --delta D" in both.err) == (3, True)
    granted = run_cli("ledger", "grant", LEDGER, "--epsilon", "5")
    assert granted.code == 0
    assert "warning: no delta is left, so no plan can use the new epsilon; raise it too: " in granted.err
    assert f"dpbudget ledger grant {LEDGER} --delta D" in granted.err
    refused = run_cli(*PLAN)
    assert (refused.code, "DP052" in refused.err) == (3, True)
    assert "epsilon 2 is left, but no delta: the first portfolio took all of it" in refused.err
    assert f"Fix: dpbudget ledger grant {LEDGER} --delta D" in refused.err
    assert "no delta" not in run_cli("ledger", "grant", LEDGER, "--delta", "2e-5").err
    assert run_cli(*PLAN).code == 0


def test_a_raise_that_plans_can_use_is_not_warned_of(run_cli: Cli, used_up: Path) -> None:
    assert "no delta" not in run_cli("ledger", "grant", LEDGER, "--epsilon", "5").err


def test_no_plan_is_signed_for_an_assumed_dataset(run_cli: Cli, empty: Path, seen: Seen) -> None:
    make(run_cli)
    before = seen(empty)
    for more in ((), ("--epsilon", "1"), ("--noise-multiplier", "2")):
        answer = run_cli(*NEW, *more)
        assert (answer.code, "error DP064: --dataset-size is missing" in answer.err) == (2, True)
        assert "Fix: pass --dataset-size N, the public nominal size; a signed plan is not taken back" in answer.err
    assert seen(empty) == before
    (empty / "dpbudget.toml").write_text('accountant = "rdp"\ndataset_size = 100\n', encoding="utf-8")
    answer = run_cli(*NEW)
    assert (answer.code, "assumed dataset-size = 100 (set in " in answer.err) == (0, True)


def test_an_rdp_ledger_needs_the_dataset_size_too(run_cli: Cli, empty: Path) -> None:
    make(run_cli, "--filter", "rdp")
    answer = run_cli(*NEW, "--noise-multiplier", "3")
    assert (answer.code, "DP064" in answer.err, "--dataset-size" in answer.err) == (2, True, True)


def test_a_joint_claim_that_is_not_computable_leaves_nothing(
    run_cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(run_cli)
    assert run_cli(*PLAN, "--epsilon", "1").code == 0

    def fail(*_: object) -> float:
        raise dpbudget.errors.NotComputable("no")

    monkeypatch.setattr("dpbudget.filters.LedgerFilter.joint_claim", fail)
    shown = run_cli("ledger", "show", LEDGER, "--json").json
    assert (shown["promised"]["epsilon"], shown["left"]["epsilon"]) == (None, 0.0)
    assert "epsilon inf, delta 5e-06" in run_cli("ledger", "show", LEDGER).out
