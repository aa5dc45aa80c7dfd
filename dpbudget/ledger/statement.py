"""The plan statement: what the owner signs to allow one run, as an in-toto Statement v1."""

from __future__ import annotations

import hashlib
from typing import Any

from dpbudget._record import MAX_STATEMENT_BYTES, decode, encode
from dpbudget.errors import Tampered
from dpbudget.plan import Plan

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:dpbudget:plan:v1"


def plan_statement(plan: Plan, *, ledger_id: str, run_id: str) -> bytes:
    """Canonical bytes of the statement that allows ``plan`` once, as run ``run_id`` of one ledger.

    The subject names ledger and run, so that the writer can neither carry a signed plan into another ledger nor run it
    a second time.
    """
    return encode(
        {
            "_type": STATEMENT,
            "predicate": plan.to_jsonable(),
            "predicateType": PREDICATE,
            "subject": [_subject(ledger_id, run_id)],
        }
    )


def read_statement(payload: bytes, *, ledger_id: str, run_id: str) -> Plan:
    """The plan of a statement made for this ledger and run.

    Raises:
        Tampered: not canonical, another type, another ledger or run, or not a valid plan (DP082, DP071).
    """
    value = decode(payload, max_bytes=MAX_STATEMENT_BYTES)
    if set(value) != {"_type", "predicate", "predicateType", "subject"}:
        raise Tampered("a plan statement has _type, predicateType, predicate and subject", code="DP082")
    if value["_type"] != STATEMENT or value["predicateType"] != PREDICATE:
        raise Tampered(f"statement of unknown type {str(value['predicateType'])[:80]!r}", code="DP082")
    if value["subject"] != [_subject(ledger_id, run_id)]:
        raise Tampered(f"the plan of run {run_id} was signed for another ledger or run")
    predicate = value["predicate"]
    if not isinstance(predicate, dict):
        raise Tampered("the predicate of a plan statement is an object", code="DP082")
    plan = Plan.from_jsonable(predicate)
    # Fields left to their defaults would give one plan two spellings.
    if plan.to_jsonable() != predicate:
        raise Tampered(f"the plan of run {run_id} is not in canonical form", code="DP082")
    return plan


def statement_digest(payload: bytes) -> str:
    """SHA-256 of the statement, as the plan record names it."""
    return hashlib.sha256(payload).hexdigest()


def _subject(ledger_id: str, run_id: str) -> dict[str, Any]:
    return {"digest": {"sha256": ledger_id}, "name": f"dpbudget-run/{run_id}"}
