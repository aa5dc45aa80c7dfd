"""Requests: an owner whose key never meets the ledger's machine signs plans and totals all the same."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest
from ledgerkit import HALF_DELTA, OWNER, STRANGER, WRITER, SumFilter, make_ledger, make_plan, reopen

from dpbudget._record import decode, encode
from dpbudget.errors import BudgetExceeded, DPBudgetError, InvalidParameter, Tampered
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.requests import MAX_REQUEST_BYTES, read_request, sign_request
from dpbudget.plan import Budget


def spent_ledger() -> Ledger:
    """The first portfolio is frozen at 1 of 3."""
    ledger = make_ledger()
    with ledger.start(ledger.sign_plan(make_plan(), owner=OWNER)) as run:
        run.next_receipt()
    return ledger


@pytest.mark.parametrize("kind", ["portfolio", "rdp"])
def test_a_plan_signed_elsewhere_runs_like_one_signed_here(kind: str) -> None:
    ledger = make_ledger(kind=kind)
    run_id, request = ledger.request_plan(make_plan())
    assert ledger.state.runs == {}
    (wish,) = read_request(request)
    assert (wish.kind, wish.run_id, wish.ledger_id) == ("plan", run_id, ledger.id)
    assert ledger.apply_request(sign_request(request, OWNER)) == run_id
    with ledger.start(run_id) as run:
        assert [receipt.step for receipt in run] == [0, 1, 2, 3]


def test_a_request_opens_the_next_portfolio_where_the_newest_is_frozen() -> None:
    ledger = spent_ledger()
    run_id, request = ledger.request_plan(make_plan(delta=ledger.plan_delta))
    assert [wish.kind for wish in read_request(request)] == ["portfolio", "plan"]
    ledger.apply_request(sign_request(request, OWNER))
    assert ledger.state.portfolios[-1].runs == (run_id,)


def test_a_plan_for_an_open_portfolio_outlives_other_records() -> None:
    ledger = make_ledger()
    _, request = ledger.request_plan(make_plan())
    signed = sign_request(request, OWNER)
    ledger.note("checked")
    ledger.apply_request(signed)
    assert len(ledger.state.runs) == 1


def test_a_request_that_names_a_place_in_the_chain_is_refused_when_it_is_taken() -> None:
    ledger = spent_ledger()
    _, request = ledger.request_plan(make_plan(delta=ledger.plan_delta))
    raised = ledger.request_budget(Budget(epsilon=5.0, delta=1e-6))
    ledger.note("checked")
    size = ledger.state.size
    for late in (request, raised):
        with pytest.raises(InvalidParameter, match="went on since") as caught:
            ledger.apply_request(sign_request(late, OWNER))
        assert caught.value.code == "DP081"
    assert ledger.state.size == size


def test_totals_signed_elsewhere_take_their_place() -> None:
    for kind in ("portfolio", "rdp"):
        ledger = make_ledger(kind=kind)
        assert ledger.apply_request(sign_request(ledger.request_budget(Budget(epsilon=5.0, delta=2e-6)), OWNER)) is None
        assert (ledger.state.epsilon, ledger.state.delta) == (5.0, 2e-6)


@pytest.mark.parametrize("signer", [WRITER, STRANGER])
def test_another_signature_is_refused(signer: object) -> None:
    ledger = make_ledger()
    _, request = ledger.request_plan(make_plan())
    with pytest.raises(Tampered):
        ledger.apply_request(sign_request(request, signer))  # type: ignore[arg-type]
    with pytest.raises(Tampered):
        ledger.apply_request(request)
    assert ledger.state.runs == {}


def test_a_request_is_checked_before_the_owner_is_troubled() -> None:
    ledger = make_ledger()
    with pytest.raises(BudgetExceeded, match="what fits"):
        ledger.request_plan(make_plan(epsilon=3.5))
    with pytest.raises(InvalidParameter, match="delta"):
        ledger.request_plan(make_plan(delta=HALF_DELTA / 2))
    with pytest.raises(InvalidParameter, match="below"):
        spent_ledger().request_budget(Budget(epsilon=0.5, delta=1e-6))


def test_what_fitted_when_it_was_asked_for_is_checked_again_when_it_is_written() -> None:
    ledger = make_ledger()
    _, request = ledger.request_plan(make_plan(epsilon=2.0))
    ledger.sign_plan(make_plan(epsilon=2.0), owner=OWNER)
    with pytest.raises(BudgetExceeded):
        ledger.apply_request(sign_request(request, OWNER))


def test_a_request_of_another_ledger_and_one_that_was_used_are_refused() -> None:
    ledger, other = make_ledger(), make_ledger()
    _, request = ledger.request_plan(make_plan())
    signed = sign_request(request, OWNER)
    with pytest.raises(InvalidParameter, match="the request is for the ledger"):
        other.apply_request(signed)
    ledger.apply_request(signed)
    with pytest.raises(Tampered, match="has a plan already"):
        ledger.apply_request(signed)


def lines_of(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + data,
        lambda data: lines_of(data)[1] + lines_of(data)[0],
        lambda data: lines_of(data)[0],
        lambda data: data + b"x",
        lambda data: b"x" * (MAX_REQUEST_BYTES + 1),
        lambda data: data.replace(b"vnd.in-toto", b"vnd.in-tutu"),
        lambda data: encode({**decode(lines_of(data)[1][:-1], max_bytes=1 << 20), "payload": "e30="}) + b"\n",
    ],
)
def test_what_is_no_request_is_refused(change: Callable[[bytes], bytes]) -> None:
    ledger = spent_ledger()
    _, request = ledger.request_plan(make_plan(delta=ledger.plan_delta))
    signed = sign_request(request, OWNER)
    with pytest.raises(Tampered):
        read_request(change(request))
    with pytest.raises(DPBudgetError):
        ledger.apply_request(change(signed))
    assert len(ledger.state.portfolios) == 1


def test_a_request_needs_no_writer_and_leaves_the_ledger_alone(tmp_path: object) -> None:
    path = tmp_path / "ledger"  # type: ignore[operator]
    make_ledger(path).close()
    before = path.read_bytes()
    with Ledger.open(path, filter=SumFilter(), trust=OWNER.public) as reader:
        run_id, request = reader.request_plan(make_plan())
    assert path.read_bytes() == before
    with reopen(path) as ledger:
        assert ledger.apply_request(sign_request(request, OWNER)) == run_id


# --- the numbers of an rdp ledger are made by whoever asks ----------------------------------------------------------


def with_payload(request: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The request with another payload, which its maker may choose freely."""
    line = decode(request[:-1], max_bytes=1 << 21)
    payload = decode(base64.b64decode(line["payload"]), max_bytes=1 << 20)
    change(payload)
    return encode({**line, "payload": base64.b64encode(encode(payload)).decode()}) + b"\n"


def lowered(name: str) -> Callable[[dict[str, Any]], None]:
    def change(statement: dict[str, Any]) -> None:
        column = statement["predicate"][name]
        half = (float.fromhex(column[0][0] if name == "costs" else column[0]) * (1 - 1e-6)).hex()
        if name == "costs":
            column[0][0] = half
        else:
            column[0] = half

    return change


def raised(record: dict[str, Any]) -> None:
    record["allowances"][1] = (float.fromhex(record["allowances"][1]) + 1e-6).hex()


@pytest.mark.parametrize("name", ["costs", "tails", "factors"])
def test_costs_that_are_no_bounds_are_refused_though_the_owner_signed_them(name: str) -> None:
    ledger = make_ledger(kind="rdp")
    _, request = ledger.request_plan(make_plan())
    with pytest.raises(InvalidParameter, match="costs below what is certified"):
        ledger.apply_request(sign_request(with_payload(request, lowered(name)), OWNER))
    assert ledger.state.runs == {}
    ledger.apply_request(sign_request(request, OWNER))


def test_allowances_beyond_the_totals_are_refused_though_the_owner_signed_them() -> None:
    ledger = make_ledger(kind="rdp")
    request = ledger.request_budget(Budget(epsilon=5.0, delta=1e-6))
    with pytest.raises(InvalidParameter, match="allowances beyond what is certified"):
        ledger.apply_request(sign_request(with_payload(request, raised), OWNER))
    assert ledger.state.epsilon == 3.0
    ledger.apply_request(sign_request(request, OWNER))
    assert ledger.state.epsilon == 5.0
