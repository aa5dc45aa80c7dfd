"""Requests to an owner whose key never meets the ledger's machine.

::

    engineer   data = request_plan(...)          what shall be signed, without a signature
    owner      signed = sign_request(data, owner)    on a machine of the owner's, after reading it
    engineer   apply_request(journal, signed, ...)   under every rule that a present owner's signature would meet

A request is one or two lines, each a DSSE envelope with no signature yet: the statement of a plan, before it the record
that opens a portfolio where one must be opened, or the record of new totals. Records name their place in the chain, so
that a request with one is good as long as nothing else is written; a plan for an open portfolio stays good longer.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dpbudget._record import MAX_STATEMENT_BYTES, decode, hex_to_float
from dpbudget._renyi import PhaseCost
from dpbudget.errors import InvalidParameter, Tampered
from dpbudget.ledger import admission
from dpbudget.ledger.entries import MAX_ENVELOPE_BYTES, Entry, build, read
from dpbudget.ledger.journal import Draft, Journal
from dpbudget.ledger.renyi import costs_from_jsonable
from dpbudget.ledger.signing import (
    RECORD_TYPE,
    STATEMENT_TYPE,
    Signer,
    open_envelope,
    sign_envelope,
    strict_base64,
)
from dpbudget.ledger.state import LedgerState, SpendingFilter
from dpbudget.ledger.statement import plan_statement, plan_subject, statement_digest
from dpbudget.plan import Budget, Plan

MAX_REQUEST_BYTES = 2 * MAX_ENVELOPE_BYTES
_KINDS = ("portfolio", "budget")
# Half of what filters.ledger_renyi pads costs and allowances by.
_HALF_PAD = 2.0**-31
_WHENCE = "pass the file that --request wrote, or what dpbudget key sign made of it"


@dataclass(frozen=True)
class Wish:
    """One thing that an owner is asked to sign.

    Attributes:
        kind: ``plan``, ``portfolio`` or ``budget``.
        payload, payload_type: what the signature covers.
        facts: the record, or for a plan the predicate of its statement, in the ledger's spelling.
        ledger_id, run_id: of a plan; empty otherwise.
    """

    kind: str
    payload: bytes
    payload_type: str
    facts: dict[str, Any]
    ledger_id: str = ""
    run_id: str = ""


def request_plan(state: LedgerState, spending: SpendingFilter, plan: Plan) -> tuple[str, bytes]:
    """The run id and the request of a plan, which is checked as if the owner signed it now.

    Raises:
        BudgetExceeded: it does not fit (DP052).
        InvalidParameter: see :func:`admission.check_facts`.
    """
    admission.check_facts(state, plan)
    run_id, genesis = secrets.token_hex(16), state.genesis
    wishes, costs = [], None
    if state.account is not None:
        costs = admission.check_rdp(state, spending, plan, run_id)
    else:
        target = admission.check_portfolio(state, spending, plan)
        if target.opens:
            fields = {"index": target.portfolio.index, "delta": target.portfolio.delta, "epsilon": None}
            wishes.append(_unsigned(build("portfolio", seq=state.size, prev=state.last, **fields), RECORD_TYPE))
    payload = plan_statement(plan, ledger_id=genesis.ledger_id, run_id=run_id, costs=costs)
    wishes.append(_unsigned(payload, STATEMENT_TYPE))
    return run_id, b"\n".join(wishes) + b"\n"


def request_budget(state: LedgerState, budget: Budget, allowances: Sequence[float] | None) -> bytes:
    """The request of new totals."""
    fields = {"epsilon": budget.epsilon, "delta": budget.delta, "allowances": allowances}
    return _unsigned(build("budget", seq=state.size, prev=state.last, **fields), RECORD_TYPE) + b"\n"


def read_request(data: bytes) -> list[Wish]:
    """What a request, signed or not, asks for; no signature is checked.

    Raises:
        Tampered: not a request (DP082).
    """
    lines = data.split(b"\n")
    if len(data) > MAX_REQUEST_BYTES or lines.pop() != b"" or not 1 <= len(lines) <= 2:
        raise Tampered("a request is one or two lines, each an envelope", code="DP082", hint=_WHENCE)
    wishes = [_wish(line) for line in lines]
    if [wish.kind for wish in wishes] not in (["plan"], ["budget"], ["portfolio", "plan"]):
        raise Tampered("a request is a plan, a portfolio and a plan, or new totals", code="DP082")
    return wishes


def sign_request(data: bytes, owner: Signer, state: LedgerState | None = None) -> bytes:
    """The same request with the owner's signatures, whatever signatures it had.

    Args:
        data: the request.
        owner: the present owner of the ledger.
        state: the ledger that it is for, whose rules must admit what is signed; None leaves that to whoever applies it.

    Raises:
        Tampered: the rules refuse it (DP071, DP082).
    """
    wishes = read_request(data)
    envelopes = [sign_envelope(wish.payload, wish.payload_type, owner) for wish in wishes]
    if state is not None:
        _write_wishes(wishes, envelopes, Draft(state))
    return b"\n".join(envelopes) + b"\n"


def _write_wishes(wishes: Sequence[Wish], envelopes: Sequence[bytes], draft: Draft) -> None:
    """Draft what the owner signed, under the rules; a record must name its place."""
    for wish, envelope in zip(wishes, envelopes, strict=True):
        if wish.kind == "plan":
            index = draft.state.portfolios[-1].index if draft.state.portfolios else 0
            fields = {"run": wish.run_id, "statement": statement_digest(wish.payload), "portfolio": index}
            draft.add("plan", seal=partial(_kept, envelope), **fields)
        else:
            if (wish.facts["seq"], wish.facts["prev"]) != (draft.state.size, draft.state.last.hex()):
                raise _too_late()
            draft.put(Entry(wish.payload, envelope), wish.kind)


def check_place(wish: Wish, state: LedgerState) -> None:
    """Refuse a wish that is not for this ledger as it stands.

    A plan names its ledger. A record names its place in a chain, and an owner of several ledgers who signed it by one
    of them could find it in another.

    Raises:
        InvalidParameter: it is for another ledger, or the ledger went on since (DP081).
    """
    genesis = state.genesis
    if wish.kind == "plan":
        if wish.ledger_id != genesis.ledger_id:
            raise InvalidParameter(
                f"the request is for the ledger {wish.ledger_id[:16]}…, this one is {genesis.ledger_id[:16]}…",
                code="DP081",
                hint="pass the ledger that it is for, or make the request from this one",
            )
    elif (wish.facts["seq"], wish.facts["prev"]) != (state.size, state.last.hex()):
        raise InvalidParameter(
            f"the request is for record {wish.facts['seq']} of a ledger that is not this one, or not as it stands with "
            f"{state.size} records",
            code="DP081",
            hint="pass the ledger that it is for, as new as the request",
        )


def check_numbers(wish: Wish, state: LedgerState, spending: SpendingFilter) -> None:
    """Refuse a wish of an ``rdp`` ledger whose costs or allowances are no bounds.

    The rules only add these numbers, and whoever made the request made them too: who signs or writes it computes them
    again. Those of an honest machine differ from ours by far less than half of what both are padded by.

    Raises:
        InvalidParameter: a cost is below, or an allowance beyond, what is certified here (DP052).
    """
    account = state.account
    if account is None:
        return
    if wish.kind == "budget":
        budget = Budget(epsilon=hex_to_float(wish.facts["epsilon"]), delta=hex_to_float(wish.facts["delta"]))
        stated = [hex_to_float(text) for text in wish.facts["allowances"] or ()]
        most = spending.renyi_allowances(budget, account.terms)
        fine = len(stated) == len(most) and all(
            his <= mine + _HALF_PAD * max(1.0, abs(mine)) for his, mine in zip(stated, most, strict=True)
        )
    else:
        plan, orders = plan_of(wish), len(account.terms.orders)
        table = costs_from_jsonable(wish.facts, phases=len(plan.phases), orders=orders)
        fine = all(
            _at_least(his, mine) for his, mine in zip(table, spending.renyi_costs(plan, account.terms), strict=True)
        )
    if not fine:
        what = "allowances beyond" if wish.kind == "budget" else "costs below"
        raise InvalidParameter(
            f"the request states {what} what is certified here",
            code="DP052",
            hint="sign nothing of it; let the request be made again, by somebody else",
        )


def _at_least(his: PhaseCost, mine: PhaseCost) -> bool:
    pairs = [(his.tail, mine.tail), (his.factor, mine.factor)]
    for stated, own in zip(his.costs, mine.costs, strict=True):
        if stated is not None:
            pairs.append((stated, math.inf if own is None else own))
    return all(stated >= own * (1.0 - _HALF_PAD) for stated, own in pairs)


def plan_of(wish: Wish) -> Plan:
    """The plan of a wish for one."""
    return Plan.from_jsonable({name: wish.facts[name] for name in Plan.model_fields if name in wish.facts})


def apply_request(journal: Journal, spending: SpendingFilter, data: bytes) -> str | None:
    """Write what the owner signed; the run id of a plan, None for new totals.

    Raises:
        Tampered: a signature is not the owner's (DP071, DP072).
        InvalidParameter: the ledger went on since a record of the request was made, or the plan does not belong here.
        BudgetExceeded: the plan does not fit any more (DP052).
    """
    wishes, envelopes = read_request(data), data.splitlines()
    for wish, envelope in zip(wishes, envelopes, strict=True):
        open_envelope(envelope, wish.payload_type, journal.state.owner)
    plan = next((wish for wish in wishes if wish.kind == "plan"), None)
    seen = journal.state
    # Also new totals: on top of an understated claim they would grant once more what was spent.
    admission.check_frozen(seen, spending)
    for wish in wishes:
        check_numbers(wish, seen, spending)
    if plan is not None:
        _check_again(seen, spending, plan, opens=len(wishes) == 2)

    def write(draft: Draft) -> None:
        if draft.state.portfolios != seen.portfolios or draft.state.grants != seen.grants:
            raise _too_late()
        _write_wishes(wishes, envelopes, draft)

    journal.transact(write)
    return None if plan is None else plan.run_id


def _check_again(state: LedgerState, spending: SpendingFilter, wish: Wish, *, opens: bool) -> None:
    check_place(wish, state)
    plan = plan_of(wish)
    admission.check_facts(state, plan)
    if state.account is not None:
        admission.check_rdp(state, spending, plan, wish.run_id)
    elif admission.check_portfolio(state, spending, plan).opens != opens:
        raise _too_late()


def _kept(envelope: bytes, _line: bytes) -> bytes:
    return envelope


def _too_late() -> InvalidParameter:
    return InvalidParameter(
        "the ledger went on since the request was made, and its place in the chain is taken",
        code="DP081",
        hint="make the request again and let the owner sign it; nothing was written",
    )


def _unsigned(payload: bytes, payload_type: str) -> bytes:
    return sign_envelope(payload, payload_type)


def _wish(line: bytes) -> Wish:
    value = decode(line, max_bytes=MAX_ENVELOPE_BYTES, max_depth=3)
    if set(value) != {"payload", "payloadType", "signatures"}:
        raise Tampered("a line of a request is a DSSE envelope", code="DP082")
    payload, kind = strict_base64(value["payload"]), value["payloadType"]
    if kind == RECORD_TYPE:
        record = read(payload)
        if record["type"] not in _KINDS:
            raise Tampered(f"a request for a {record['type']} record", code="DP082")
        return Wish(record["type"], payload, RECORD_TYPE, record)
    if kind != STATEMENT_TYPE:
        raise Tampered(f"a request of the unknown type {str(kind)[:80]!r}", code="DP082")
    statement = decode(payload, max_bytes=MAX_STATEMENT_BYTES)
    ledger_id, run_id = plan_subject(statement)
    predicate = statement["predicate"]
    if not isinstance(predicate, dict):
        raise Tampered("the predicate of a plan statement is an object", code="DP082")
    return Wish("plan", payload, STATEMENT_TYPE, predicate, ledger_id, run_id)
