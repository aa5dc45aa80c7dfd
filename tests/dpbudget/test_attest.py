"""A signed verdict says what the report said, its warnings included, and nothing else can be read from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dpbudget
from dpbudget._attest import MAX_WARNINGS, Attestation, attest, read_attestation
from dpbudget._record import encode
from dpbudget._verdict import Report
from dpbudget.curve import Bounds
from dpbudget.errors import InvalidParameter, Tampered
from dpbudget.ledger.signing import STATEMENT_TYPE, Ed25519Signer, open_envelope, sign_envelope
from dpbudget.plan import Budget

AUDITOR = Ed25519Signer.from_seed(b"\x0a" * 32)
REPORT = Report(
    ok=True,
    problems=(),
    warnings=("unanchored: nobody kept a head",),
    epsilon=Bounds(0.5, 1.0),
    delta=1e-6,
    budget=(3.0, 1e-6),
    filter="portfolio",
    adjacency="zero-out",
    unit="user",
    steps=7,
    head=f"3:{'ab' * 32}",
    ledger_id="cd" * 32,
    trusted=True,
    checked_by=("prv", "rdp"),
)


def signed(report: Report) -> Attestation:
    return read_attestation(attest(report, AUDITOR), AUDITOR.public)


@pytest.mark.parametrize("kind", ["portfolio", "rdp"])
@pytest.mark.parametrize("raised", [False, True])
def test_a_raise_after_spending_stands_in_the_signed_verdict_as_in_the_report(
    kind: Any, raised: bool, tmp_path: Path
) -> None:
    owner, writer = Ed25519Signer.generate(), Ed25519Signer.generate()
    # Full batches have a closed form.
    plan = dpbudget.calibrate(epsilon=0.5, delta=1e-5, dataset_size=1000, batch_size=1000, steps=4)
    path = tmp_path / "a.ledger"
    ledger = dpbudget.create_ledger(
        path, budget=Budget(epsilon=3.0, delta=1e-5), owner=owner, writer=writer, kind=kind, whole_budget=True
    )
    with ledger:
        if not raised:
            ledger.change_budget(Budget(epsilon=5.0, delta=1e-5), owner=owner)  # before any step: a mere decision
        run_id = ledger.sign_plan(plan, owner=owner)
        with dpbudget.start(ledger, run_id) as run:
            run.next_receipt()
        if raised:
            ledger.change_budget(Budget(epsilon=5.0, delta=1e-5), owner=owner)
    report = dpbudget.verify(path, trust=owner.public)
    assert report.ok
    found = signed(report)
    assert found.warnings == report.warnings
    assert found.total_epsilon == 5.0
    said = [warning for warning in found.warnings if "raised epsilon 3 to 5" in warning]
    assert len(said) == raised
    assert all("after 4 steps were charged" in warning or "after 1 steps were charged" in warning for warning in said)


def test_every_fact_of_the_report_comes_back() -> None:
    assert signed(REPORT) == Attestation(
        ledger_id="cd" * 32,
        head=f"3:{'ab' * 32}",
        filter="portfolio",
        adjacency="zero-out",
        unit="user",
        epsilon_lower=0.5,
        epsilon_upper=1.0,
        delta=1e-6,
        total_epsilon=3.0,
        total_delta=1e-6,
        steps=7,
        runs=0,
        checked_by=("prv", "rdp"),
        anchored=False,
        warnings=("unanchored: nobody kept a head",),
    )


def test_more_warnings_than_a_statement_holds_are_counted() -> None:
    many = tuple(f"{number} " + '"\\' * 1000 for number in range(MAX_WARNINGS + 7))
    found = signed(replace(REPORT, warnings=many))
    assert len(found.warnings) == MAX_WARNINGS + 1
    assert all(long.startswith(short) for long, short in zip(many, found.warnings[:-1], strict=False))
    assert found.warnings[-1].startswith("7 more warnings")


def test_a_warning_in_other_characters_is_signed_all_the_same() -> None:
    assert signed(replace(REPORT, warnings=("epsilon ≤ 3\n",))).warnings == ("epsilon ? 3?",)


@pytest.mark.parametrize("warnings", [None, "raised", [1], [None], {"0": "a"}, "absent"])
def test_a_verdict_whose_warnings_are_missing_or_no_texts_is_refused(warnings: Any) -> None:
    statement = json.loads(open_envelope(attest(REPORT, AUDITOR), STATEMENT_TYPE, AUDITOR.public))
    statement["predicate"]["warnings"] = warnings
    if warnings == "absent":
        del statement["predicate"]["warnings"]
    with pytest.raises(Tampered) as caught:
        read_attestation(sign_envelope(encode(statement), STATEMENT_TYPE, AUDITOR), AUDITOR.public)
    assert caught.value.code == "DP082"


@pytest.mark.parametrize("change", [{"ok": False}, {"trusted": False}, {"epsilon": None}])
def test_what_does_not_hold_or_nobody_vouches_for_is_not_attested(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match="trusted owner"):
        attest(replace(REPORT, **change), AUDITOR)
