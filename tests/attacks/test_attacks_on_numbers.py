"""Attacks 38 to 42: drifting floats, understated claims, leaking records, mixed adjacencies, two ledgers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from attackkit import (
    BUDGET,
    OWNER,
    THREAT_MODEL,
    as_is,
    call,
    export,
    forged,
    make,
    plan,
    problem,
    problem_of,
    reopen,
    signed,
    spend,
    spent,
    swap_statement,
    verify,
)

from dpbudget import Adjacency, Bounds, Plan, PortfolioFilter
from dpbudget.errors import InvalidParameter
from dpbudget.ledger.entries import FIELDS
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.store.jsonl import read_export

HERE = Path(__file__).resolve().parent
#: Made once on x86-64 with the keys of attackkit: what every machine must find in them, to the last bit.
GOLDEN = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["portfolio", "rdp"])
def test_attack_38_a_golden_ledger_has_the_same_numbers_on_every_platform(kind: str) -> None:
    path, expected = HERE / f"golden-{kind}.jsonl", GOLDEN[kind]
    report = verify(path)
    assert (report.ok, report.problems, report.filter) == (True, (), kind)
    with Ledger.open(path, trust=OWNER.public) as ledger:
        state = ledger.state
    assert [str(ledger.head), report.steps] == [expected["head"], expected["steps"]]
    assert [portfolio.claim and portfolio.claim.hex() for portfolio in state.portfolios] == expected["claims"]
    assert report.epsilon is not None
    if state.account is None:
        # The sum of the recorded claims; no machine computes another.
        assert Fraction(report.epsilon.upper) >= sum(Fraction(p.claim or 0) for p in state.portfolios)
        assert report.epsilon.upper.hex() == expected["upper"]
    else:
        # What a table costs is an integer in units of 2^-100.
        assert [str(spent) for spent in state.account.spent] == expected["spent"]
        assert all(type(spent) is int or spent is None for spent in state.account.spent)
        assert report.epsilon.upper == pytest.approx(float.fromhex(expected["upper"]), rel=1e-12)


_EXACT = PortfolioFilter.joint_bounds


def _drift(patch: pytest.MonkeyPatch, by: float) -> None:
    """Act as a machine whose elementary functions differ: all bounds are off by a factor."""

    def drifted(self: PortfolioFilter, plans: Sequence[Plan], delta: float) -> Bounds:
        bounds = _EXACT(self, plans, delta)
        return Bounds(bounds.lower * (1 + by), bounds.upper * (1 + by), bounds.kind)

    patch.setattr(PortfolioFilter, "joint_bounds", drifted)


@pytest.mark.parametrize("drift", [1e-15, -1e-15, 1e-12, -1e-12, 3e-10, -3e-10])
def test_attack_38_claims_hold_under_the_drift_of_another_machine_and_not_beyond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drift: float
) -> None:
    path = tmp_path / "ledger"
    spent(path, 2)
    _drift(monkeypatch, drift)
    assert problem(path) is None
    _drift(monkeypatch, 1e-7)
    assert problem(path) is not None


def test_attack_39_a_claim_below_the_records_is_refuted_though_all_is_signed_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    spent(path, 2)
    data = export(path)
    assert problem_of(forged(data), tmp_path) is None

    def understate(record: dict[str, Any], envelope: bytes | None) -> bytes | None:
        if record["type"] == "lease" and record["claim"] is not None:
            record["claim"] = (1.5).hex()
        return envelope

    (tmp_path / "edited.jsonl").write_bytes(forged(data, understate))
    printed = call("ledger", "verify", tmp_path / "edited.jsonl", "--trust", OWNER.public.hex, code=1)
    assert "portfolio 1 claims epsilon 1.5, below the truth: prv proves >= 2.99999999" in printed
    assert "epsilon <=" not in printed  # a refuted claim is shown as a bound nowhere
    assert verify(tmp_path / "edited.jsonl").epsilon is None


def test_attack_39_a_plan_that_claims_less_than_it_costs_is_refuted_though_the_owner_signs_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    spent(path, 2)

    def halve(predicate: dict[str, Any]) -> None:
        predicate["claim"]["epsilon"] = (1.5).hex()

    def edit(record: dict[str, Any], envelope: bytes | None) -> bytes | None:
        return swap_statement(record, envelope, OWNER, halve) if record["type"] == "plan" else envelope

    assert "claims epsilon 1.5, below the truth" in str(problem_of(forged(export(path), edit), tmp_path))


#: Every field that a record may have. Whoever adds one shows here that it tells nothing about the data.
WHITELIST = {
    "genesis": {"dataset", "adjacency", "unit", "epsilon", "delta", "filter", "owner", "writer", "public_data"},
    "portfolio": {"index", "delta", "epsilon"},
    "renyi": {"orders", "shares", "allowances"},
    "budget": {"epsilon", "delta", "allowances"},
    "rekey": {"role", "old", "key"},
    "note": {"event"},
    "plan": {"run", "statement", "portfolio"},
    "commit": {"run", "commitment"},
    "entropy": {"run", "value"},
    "lease": {"run", "nonce", "commitment", "first", "count", "claim"},
    "reserve": {"run", "step", "count"},
    "settle": {"run", "step", "fresh", "output"},
    "close": {"run", "first", "unspent"},
}


def test_attack_40_no_record_has_a_field_that_could_tell_of_the_data(tmp_path: Path) -> None:
    assert {kind: set(fields) for kind, fields in FIELDS.items()} == WHITELIST
    path = tmp_path / "ledger"
    run_id = spent(path, 2)
    data = export(path)
    for name, value in (("batch_size", 37), ("loss", (0.5).hex()), ("time", 1), ("comment", "37 records")):
        told = {"type": "reserve", "run": run_id, "step": 2, "count": 1, name: value}
        assert "DP082" in str(problem_of(forged(data, as_is, told), tmp_path))
    with reopen(path) as ledger, pytest.raises(InvalidParameter) as caught:
        ledger.note("the batch had 37 records")
    assert caught.value.code == "DP082"


def test_attack_41_a_run_for_other_neighbours_is_refused_in_an_add_remove_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    other = plan(adjacency=Adjacency.REPLACE_ONE, epsilon=2.0)
    with make(path) as ledger:
        before = ledger.head
        with pytest.raises(
            InvalidParameter, match="replace-one neighbours of one example in a ledger for add-remove"
        ) as caught:
            ledger.sign_plan(other, owner=OWNER)
        assert (caught.value.code, ledger.head) == ("DP062", before)
        run_id = ledger.sign_plan(plan(), owner=OWNER)
    spend(path, run_id, 1)

    def mix(predicate: dict[str, Any]) -> None:
        predicate["adjacency"] = "replace-one"

    def edit(record: dict[str, Any], envelope: bytes | None) -> bytes | None:
        return swap_statement(record, envelope, OWNER, mix) if record["type"] == "plan" else envelope

    # Though owner and writer sign it past the call that refuses it.
    found = problem_of(forged(export(path), edit), tmp_path)
    assert "plan for replace-one neighbours in a ledger for add-remove" in str(found)


def test_attack_42_two_ledgers_for_one_dataset_cannot_be_detected_and_everybody_is_told(tmp_path: Path) -> None:
    dataset = "da" * 32
    for name in ("one", "two"):
        # Each as on a machine of its own: with the same keys and totals both have one id, and one machine would tell.
        with make(tmp_path / name, dataset=dataset, high_water=False) as ledger:
            run_id = ledger.sign_plan(plan(), owner=OWNER)
        spend(tmp_path / name, run_id, 20, high_water=False)
        assert problem(tmp_path / name) is None  # each is valid; together they spent twice the budget
    ids = {json.loads(read_export(export(tmp_path / name)).entries[0].line)["dataset"] for name in ("one", "two")}
    assert ids == {dataset}
    warning = "Two ledgers for one dataset cannot be detected"
    assert warning in THREAT_MODEL.read_text(encoding="utf-8")
    arguments = ("--epsilon", str(BUDGET.epsilon), "--delta", str(BUDGET.delta))
    assert warning in call("ledger", "init", tmp_path / "three", *arguments)
    assert warning in call("ledger", "init", tmp_path / "four", *arguments, "--json")
    assert warning in " ".join((Ledger.create.__doc__ or "").split())
    assert signed(tmp_path / "five")  # and nothing stops a third
