"""A fast reader of the three types of records that make up nearly all of a long ledger.

:func:`scan` gives exactly what :func:`dpbudget.ledger.entries.read` gives, or None where it is not sure: then the slow
reader decides. It accepts only canonical bytes, because each expression below *is* the canonical form of its type: keys
in order, no white space, one spelling of every number. The digits of ``prev`` and ``run`` alone are not looked at,
since the rules compare them with values that they know.
"""

from __future__ import annotations

import re
from binascii import Error, unhexlify
from collections.abc import Callable
from typing import Any

from dpbudget.ledger.entries import MAX_STEP, VERSION

_INTEGER = "(0|[1-9][0-9]{0,15})"


def _hexadecimal(count: int) -> str:
    # A dot repeated is one jump for the engine, where a class is a loop; the digits are looked at afterwards.
    return f'"(.{{{count}}})"'


def _compile(kind: str, **fields: str) -> re.Pattern[str]:
    fields = {
        **fields,
        "prev": _hexadecimal(64),
        "run": _hexadecimal(32),
        "seq": _INTEGER,
        "type": f'"{kind}"',
        "v": str(VERSION),
    }
    return re.compile(r"\{" + ",".join(f'"{name}":{fields[name]}' for name in sorted(fields)) + r"\}", re.DOTALL)


_SETTLE = _compile("settle", fresh=_hexadecimal(32), output=f"(?:null|{_hexadecimal(64)})", step=_INTEGER)
_RESERVE = _compile("reserve", count=_INTEGER, step=_INTEGER)
_LEASE = _compile(
    "lease",
    claim="null",
    commitment=_hexadecimal(64),
    count=_INTEGER,
    first=_INTEGER,
    nonce=_hexadecimal(64),
)


def _settle(text: str) -> dict[str, Any] | None:
    match = _SETTLE.fullmatch(text)
    if match is None:
        return None
    fresh, output, prev, run, seq, step = match.groups()
    number = int(step)
    # A seq of 16 digits may be beyond 2^53 - 1: the slow reader knows.
    if unhexlify(fresh).hex() != fresh or number > MAX_STEP or len(seq) > 15:
        return None
    if output is not None and unhexlify(output).hex() != output:
        return None
    return {
        "fresh": fresh,
        "output": output,
        "prev": prev,
        "run": run,
        "seq": int(seq),
        "step": number,
        "type": "settle",
        "v": VERSION,
    }


def _reserve(text: str) -> dict[str, Any] | None:
    match = _RESERVE.fullmatch(text)
    if match is None:
        return None
    count, prev, run, seq, step = match.groups()
    steps, number = int(count), int(step)
    if not 1 <= steps <= MAX_STEP or number > MAX_STEP or len(seq) > 15:
        return None
    return {"count": steps, "prev": prev, "run": run, "seq": int(seq), "step": number, "type": "reserve", "v": VERSION}


def _lease(text: str) -> dict[str, Any] | None:
    match = _LEASE.fullmatch(text)
    if match is None:
        return None
    commitment, count, first, nonce, prev, run, seq = match.groups()
    steps, number = int(count), int(first)
    if not 1 <= steps <= MAX_STEP or number > MAX_STEP or len(seq) > 15:
        return None
    if unhexlify(commitment).hex() != commitment or unhexlify(nonce).hex() != nonce:
        return None
    return {
        "claim": None,
        "commitment": commitment,
        "count": steps,
        "first": number,
        "nonce": nonce,
        "prev": prev,
        "run": run,
        "seq": int(seq),
        "type": "lease",
        "v": VERSION,
    }


#: The end of a line says of which type it is: no other type ends like this.
_BY_END: dict[bytes, Callable[[str], dict[str, Any] | None]] = {
    b'tle","v":1}': _settle,
    b'rve","v":1}': _reserve,
    b'ase","v":1}': _lease,
}


#: How lines of these types end.
ENDS = frozenset(_BY_END)


def scan(line: bytes) -> dict[str, Any] | None:
    """The record of a canonical lease without a claim, reserve or settle; None for every other line."""
    reader = _BY_END.get(line[-11:])
    if reader is None:
        return None
    try:
        return reader(line.decode("ascii"))
    except (Error, UnicodeDecodeError):
        return None
