"""The final report as a signed statement: who verified which history, what came out, and what to know beside it.

An in-toto Statement v1 in a DSSE envelope, whose subject is the Merkle root of the ledger. It is as good as the key
that signed it and proves nothing beyond that: whoever holds the ledger verifies it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpbudget._record import MAX_STATEMENT_BYTES, decode, encode, float_to_hex, hex_to_float
from dpbudget._verdict import Report
from dpbudget.errors import InvalidParameter, Tampered
from dpbudget.ledger.signing import STATEMENT_TYPE, PublicKey, Signer, open_envelope, sign_envelope

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:dpbudget:report:v1"
#: Warnings that a statement has room for, of so many characters each; the raises of totals come first.
MAX_WARNINGS, _MAX_WARNING = 500, 900
_FLOATS = ("epsilon_lower", "epsilon_upper", "delta", "total_epsilon", "total_delta")


@dataclass(frozen=True)
class Attestation:
    """What a verifier signed.

    Attributes:
        ledger_id: which ledger.
        head: ``size:root`` of the history that was verified.
        filter: ``portfolio`` or ``rdp``.
        adjacency, unit: which datasets are neighbours, and whose presence is protected: ``example`` or ``user``.
        epsilon_lower, epsilon_upper: bounds of epsilon at ``delta``; the upper one is the guarantee.
        delta: see :class:`Report`.
        total_epsilon, total_delta: what the owner granted.
        steps, runs: charged steps and signed plans.
        checked_by: the accountants that recomputed epsilon.
        anchored: whether a head from outside was found in the history.
        warnings: what the report warned of, in words: above all a total that was raised after steps were charged, and
            is a guarantee only if the raise did not depend on their outputs. Whoever passes the epsilon on passes
            these on too.
    """

    ledger_id: str
    head: str
    filter: str
    adjacency: str
    unit: str
    epsilon_lower: float
    epsilon_upper: float
    delta: float
    total_epsilon: float
    total_delta: float
    steps: int
    runs: int
    checked_by: tuple[str, ...]
    anchored: bool
    warnings: tuple[str, ...]


def attest(report: Report, signer: Signer) -> bytes:
    """The signed statement of a verification that held.

    Raises:
        InvalidParameter: the report does not hold, or the owner's key was not known from outside (DP072).
    """
    if not report.ok or report.epsilon is None or report.delta is None or report.budget is None or not report.trusted:
        raise InvalidParameter(
            "only a ledger that holds under a trusted owner's key is attested",
            code="DP072",
            hint="verify it with the owner's public key first",
        )
    size, _, root = (report.head or "").partition(":")
    predicate: dict[str, Any] = {
        "adjacency": report.adjacency,
        "anchored": report.anchored,
        "checked_by": list(report.checked_by),
        "delta": float_to_hex(report.delta),
        "epsilon_lower": float_to_hex(report.epsilon.lower),
        "epsilon_upper": float_to_hex(report.epsilon.upper),
        "filter": report.filter,
        "ledger": report.ledger_id,
        "runs": len(report.runs),
        "size": int(size),
        "steps": report.steps,
        "total_delta": float_to_hex(report.budget[1]),
        "total_epsilon": float_to_hex(report.budget[0]),
        "unit": report.unit,
        "warnings": _warnings(report),
    }
    statement = {
        "_type": STATEMENT,
        "predicate": predicate,
        "predicateType": PREDICATE,
        "subject": [{"digest": {"sha256": root}, "name": f"dpbudget-ledger/{report.ledger_id}"}],
    }
    return sign_envelope(encode(statement), STATEMENT_TYPE, signer)


def read_attestation(data: bytes, trust: PublicKey) -> Attestation:
    """The attestation that the key ``trust`` signed.

    Raises:
        Tampered: another key (DP072), a changed byte (DP071), or no such statement (DP082).
    """
    value = decode(open_envelope(data, STATEMENT_TYPE, trust), max_bytes=MAX_STATEMENT_BYTES)
    predicate = value.get("predicate")
    if value.get("_type") != STATEMENT or value.get("predicateType") != PREDICATE or not isinstance(predicate, dict):
        raise Tampered("not the statement of a verification", code="DP082")
    try:
        root = value["subject"][0]["digest"]["sha256"]
        floats = {name: hex_to_float(predicate[name]) for name in _FLOATS}
        size, steps, runs = (_count(predicate[name]) for name in ("size", "steps", "runs"))
        found = Attestation(
            ledger_id=str(predicate["ledger"]),
            head=f"{size}:{root}",
            filter=str(predicate["filter"]),
            adjacency=str(predicate["adjacency"]),
            unit=str(predicate["unit"]),
            steps=steps,
            runs=runs,
            checked_by=tuple(map(str, predicate["checked_by"])),
            anchored=predicate["anchored"] is True,
            warnings=_texts(predicate["warnings"]),
            **floats,
        )
    except (KeyError, TypeError, IndexError):
        raise Tampered("the statement of a verification lacks a field", code="DP082") from None
    if value["subject"] != [{"digest": {"sha256": root}, "name": f"dpbudget-ledger/{found.ledger_id}"}]:
        raise Tampered("the subject of the statement is not its ledger", code="DP082")
    return found


def _warnings(report: Report) -> list[str]:
    """The report's warnings in the characters that a statement may hold; what is left out is counted, never hidden."""
    kept, left = report.warnings[:MAX_WARNINGS], report.warnings[MAX_WARNINGS:]
    found = ["".join(char if " " <= char <= "~" else "?" for char in text[:_MAX_WARNING]) for text in kept]
    return [*found, f"{len(left)} more warnings: verify the ledger itself"] if left else found


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise Tampered("the warnings of the statement are no texts", code="DP082")
    return tuple(value)


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise Tampered("a count of the statement is no count", code="DP082")
    return value
