"""Handing a role to a new key: one record, signed by the old key and by the new one."""

from __future__ import annotations

from functools import partial

from dpbudget.errors import InvalidParameter
from dpbudget.ledger.journal import Draft, Journal
from dpbudget.ledger.signing import RECORD_TYPE, Signer, sign_envelope
from dpbudget.ledger.state import LedgerState


def change_key(journal: Journal, role: str, *, new: Signer, by: Signer) -> None:
    """Write the rekey record of ``role``; a new writer signs the head of this very transaction.

    Raises:
        InvalidParameter: ``by`` may not do this, or ``new`` was used before (DP080).
    """
    _check_keys(journal.state, role, new, by)

    def write(draft: Draft) -> None:
        _check_keys(draft.state, role, new, by)
        old = draft.state.owner if role == "owner" else draft.state.writer
        draft.add("rekey", seal=partial(_seal, by, new), role=role, old=old.hex, key=new.public.hex)

    journal.transact(write, writer=new if role == "writer" else None)


def _seal(by: Signer, new: Signer, line: bytes) -> bytes:
    return sign_envelope(line, RECORD_TYPE, by, new)


def _check_keys(state: LedgerState, role: str, new: Signer, by: Signer) -> None:
    if role not in ("owner", "writer"):
        raise InvalidParameter(f"role {role[:40]!r} is not owner or writer", code="DP080", hint="name one of both")
    may = (state.owner,) if role == "owner" else (state.writer, state.owner)
    if by.public not in may:
        names = "the owner" if role == "owner" else "the writer or the owner"
        raise InvalidParameter(
            f"the key {by.public.hex} cannot hand over the {role}'s role",
            code="DP080",
            hint=f"sign with the key of {names}, whose public half is {' or '.join(key.hex for key in may)}",
        )
    if new.public in {*state.owners, *state.writers}:
        raise InvalidParameter(
            f"the key {new.public.hex} was used in this ledger before", code="DP080", hint="make a new key"
        )
