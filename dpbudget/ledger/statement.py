"""The plan statement: what the owner signs to allow one run, as an in-toto Statement v1.

In a ledger with the filter ``rdp`` the predicate also carries the table of what a step of each phase costs, so that the
rules add integers and compute nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from dpbudget._record import MAX_STATEMENT_BYTES, decode, encode
from dpbudget._renyi import PhaseCost
from dpbudget.errors import InvalidParameter, Tampered
from dpbudget.ledger.renyi import costs_from_jsonable, costs_to_jsonable
from dpbudget.plan import Plan

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:dpbudget:plan:v1"
RDP_PREDICATE = "urn:dpbudget:rdp-plan:v1"
_COLUMNS = frozenset({"costs", "tails", "factors"})


def plan_statement(plan: Plan, *, ledger_id: str, run_id: str, costs: Sequence[PhaseCost] | None = None) -> bytes:
    """Canonical bytes of the statement that allows ``plan`` once, as run ``run_id`` of one ledger.

    The subject names ledger and run, so that the writer can neither carry a signed plan into another ledger nor run it
    a second time. ``costs`` is the table of an ``rdp`` ledger, one entry a phase.

    Raises:
        InvalidParameter: the statement would be larger than a record holds (DP009).
    """
    columns = {} if costs is None else costs_to_jsonable(costs)
    payload = encode(
        {
            "_type": STATEMENT,
            "predicate": {**plan.to_jsonable(), **columns},
            "predicateType": PREDICATE if costs is None else RDP_PREDICATE,
            "subject": [_subject(ledger_id, run_id)],
        }
    )
    if len(payload) > MAX_STATEMENT_BYTES:
        raise InvalidParameter(
            f"the statement of a plan of {len(plan.phases)} phases would have {len(payload)} bytes; "
            f"{MAX_STATEMENT_BYTES} are the most",
            code="DP009",
            hint="plan with fewer phases, as several runs",
        )
    return payload


def read_statement(
    payload: bytes, *, ledger_id: str, run_id: str, orders: int | None = None
) -> tuple[Plan, tuple[PhaseCost, ...] | None]:
    """The plan of a statement made for this ledger and run, and its table where the ledger has ``orders``.

    Raises:
        Tampered: not canonical, another type, another ledger or run, or not a valid plan (DP082, DP071).
    """
    value = decode(payload, max_bytes=MAX_STATEMENT_BYTES)
    if set(value) != {"_type", "predicate", "predicateType", "subject"}:
        raise Tampered("a plan statement has _type, predicateType, predicate and subject", code="DP082")
    if value["_type"] != STATEMENT or value["predicateType"] != (PREDICATE if orders is None else RDP_PREDICATE):
        raise Tampered(f"statement of unknown type {str(value['predicateType'])[:80]!r}", code="DP082")
    if value["subject"] != [_subject(ledger_id, run_id)]:
        raise Tampered(f"the plan of run {run_id} was signed for another ledger or run")
    predicate = value["predicate"]
    if not isinstance(predicate, dict):
        raise Tampered("the predicate of a plan statement is an object", code="DP082")
    names = _COLUMNS if orders is not None else frozenset[str]()
    facts = {name: item for name, item in predicate.items() if name not in names}
    plan = Plan.from_jsonable(facts)
    # Fields left to their defaults would give one plan two spellings.
    if plan.to_jsonable() != facts:
        raise Tampered(f"the plan of run {run_id} is not in canonical form", code="DP082")
    if orders is None:
        return plan, None
    return plan, costs_from_jsonable(predicate, phases=len(plan.phases), orders=orders)


def statement_digest(payload: bytes) -> str:
    """SHA-256 of the statement, as the plan record names it."""
    return hashlib.sha256(payload).hexdigest()


def plan_subject(statement: Mapping[str, Any]) -> tuple[str, str]:
    """Ledger and run that a statement names; raises :class:`Tampered` (DP082) where it names none."""
    subject = statement.get("subject")
    try:
        ledger_id, name = subject[0]["digest"]["sha256"], subject[0]["name"]  # type: ignore[index]
        run_id = name.removeprefix("dpbudget-run/")
    except (TypeError, KeyError, IndexError, AttributeError):
        raise Tampered("a plan statement names one ledger and one run", code="DP082") from None
    if subject != [_subject(ledger_id, run_id)] or "predicate" not in statement:
        raise Tampered("a plan statement names one ledger and one run", code="DP082")
    return ledger_id, run_id


def _subject(ledger_id: str, run_id: str) -> dict[str, Any]:
    return {"digest": {"sha256": ledger_id}, "name": f"dpbudget-run/{run_id}"}
