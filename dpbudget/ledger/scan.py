"""A fast reader of the three types of records that make up nearly all of a long ledger.

:func:`scan` gives exactly what :func:`dpbudget.ledger.entries.read` gives, or None where it is not sure: then the slow
reader decides. It accepts only canonical bytes, because each expression below *is* the canonical form of its type: keys
in order, no white space, one spelling of every number, and hexadecimal digits of a fixed count.
"""

from __future__ import annotations

import re
from typing import Any

from dpbudget._record import MAX_INTEGER, MAX_LINE_BYTES
from dpbudget.ledger.entries import FIELDS, VERSION

_INTEGER = "(0|[1-9][0-9]{0,15})"
_DIGITS = "0123456789abcdef"


def _hexadecimal(count: int) -> str:
    # A dot repeated is one jump for the engine, where a class is a loop; the digits are looked at afterwards.
    return f'"(.{{{count}}})"'


_FORMS = {
    "settle": {"fresh": _hexadecimal(32), "output": f"(?:null|{_hexadecimal(64)})", "step": _INTEGER},
    "reserve": {"count": _INTEGER, "step": _INTEGER},
    "lease": {
        "claim": "null",
        "commitment": _hexadecimal(64),
        "count": _INTEGER,
        "first": _INTEGER,
        "nonce": _hexadecimal(64),
    },
}


def _compile(kind: str) -> tuple[re.Pattern[str], tuple[str, ...], tuple[str, ...]]:
    """The expression of a type, and the names of its text and integer groups in order."""
    fields = {
        **_FORMS[kind],
        "prev": _hexadecimal(64),
        "run": _hexadecimal(32),
        "seq": _INTEGER,
        "type": f'"{kind}"',
        "v": str(VERSION),
    }
    ordered = sorted(fields)
    expression = "{" + ",".join(f'"{name}":{fields[name]}' for name in ordered) + "}"
    grouped = [name for name in ordered if "(" in fields[name]]
    texts = tuple(name for name in grouped if fields[name] is not _INTEGER)
    return re.compile(re.escape("{") + expression[1:-1] + re.escape("}"), re.DOTALL), tuple(grouped), texts


_COMPILED = {kind: _compile(kind) for kind in _FORMS}
_AFTER_TYPE = f'","v":{VERSION}}}'


def scan(line: bytes) -> dict[str, Any] | None:
    """The record of a canonical lease without a claim, reserve or settle; None for every other line."""
    try:
        text = line.decode("ascii")
    except UnicodeDecodeError:
        return None
    kind = text[text.rfind('"type":"') + 8 : -len(_AFTER_TYPE)]
    compiled = _COMPILED.get(kind)
    if compiled is None or len(line) > MAX_LINE_BYTES:
        return None
    expression, names, texts = compiled
    match = expression.fullmatch(text)
    if match is None:
        return None
    record: dict[str, Any] = dict(zip(names, match.groups(), strict=True))
    for name in names:
        value = record[name]
        if name in texts:
            if value is not None and value.strip(_DIGITS):
                return None
        else:
            number = record[name] = int(value)
            if number > MAX_INTEGER:
                return None
    checks = FIELDS[kind]
    for name in ("count", "step", "first"):
        if name in record and checks[name](record[name]):
            return None
    record["type"], record["v"] = kind, VERSION
    if kind == "lease":
        record["claim"] = None
    return record
