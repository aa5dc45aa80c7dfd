"""Records of the ledger: a closed schema for every type, read by hand-written tables of fields.

A record is one line of canonical restricted JSON (:mod:`dpbudget._record`) of at most 4096 bytes: an object of plain
values, or of arrays of them where a table says so. Every type has
the fields ``v``, ``type``, ``seq`` and ``prev``; :data:`FIELDS` lists the others. An unknown version, type or field is
refused, and the meaning of a type never changes: what is new gets a new name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpbudget._record import MAX_INTEGER, MAX_STATEMENT_BYTES, decode, float_to_hex, hex_to_float
from dpbudget._renyi import MAX_ORDERS, MAX_SHARE
from dpbudget.errors import Tampered
from dpbudget.mechanisms import Adjacency
from dpbudget.plan import MAX_STEPS, UNITS

VERSION = 1
#: Types whose line the owner signs, the one that the old and the new key sign, and the one whose statement the owner
#: signs; each carries one envelope.
OWNER_SIGNED = frozenset({"genesis", "portfolio", "renyi", "budget"})
ENVELOPED = OWNER_SIGNED | {"rekey", "plan"}
#: What a note may say; free text could carry data.
NOTES = ("checked", "published", "restored", "imported", "incident", "retired")
#: What stands in the place of fresh bytes where the noise key of a run is committed.
NO_FRESH = "0" * 32
#: base64 of the largest statement, and room for the names and the signature around it.
MAX_ENVELOPE_BYTES = (MAX_STATEMENT_BYTES + 2) // 3 * 4 + 1024
#: More portfolios than anybody opens; the bound keeps the exact sums short.
MAX_PORTFOLIOS = 10_000

#: A check returns the reason for which a value is refused, or None.
Check = Callable[[Any], str | None]


class Entry(NamedTuple):
    """What the store keeps for one record.

    Attributes:
        line: the canonical bytes, without a line feed.
        envelope: the DSSE envelope of an owner-signed record or of a plan statement, else None.
    """

    line: bytes
    envelope: bytes | None = None


def _hex_digits(count: int) -> Check:
    pattern = re.compile(rf"[0-9a-f]{{{count}}}")

    def check(value: Any) -> str | None:
        ok = isinstance(value, str) and pattern.fullmatch(value)
        return None if ok else f"must be {count} lower-case hexadecimal digits"

    return check


def _integer(low: int, high: int) -> Check:
    def check(value: Any) -> str | None:
        # bool is a subclass of int, and True would pass for 1.
        return None if type(value) is int and low <= value <= high else f"must be an integer in [{low}, {high}]"

    return check


def _real(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> Check:
    def check(value: Any) -> str | None:
        if not isinstance(value, str):
            return "must be a hexadecimal float in a string"
        number = hex_to_float(value)
        inside = low <= number <= high and not (open_low and number == low) and not (open_high and number == high)
        return None if inside else f"must lie between {low:g} and {high:g}"

    return check


def _one_of(*names: str) -> Check:
    return lambda value: None if isinstance(value, str) and value in names else f"must be one of {', '.join(names)}"


def _list_of(inner: Check) -> Check:
    def check(value: Any) -> str | None:
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_ORDERS:
            return f"must be an array of 1 to {MAX_ORDERS} values"
        return next((problem for problem in map(inner, value) if problem), None)

    return check


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _optional(inner: Check) -> Check:
    return lambda value: None if value is None else inner(value)


_DIGEST, _RUN = _hex_digits(64), _hex_digits(32)
_EPSILON = _real(0.0, 1e6, open_low=True)
_DELTA = _real(0.0, 1.0, open_low=True, open_high=True)
_ALLOWANCE = _real(-1e300, 1e6)
#: Steps of a phase times phases of a plan.
MAX_STEP = MAX_STEPS * 1024

_COMMON: Mapping[str, Check] = {
    "v": _integer(VERSION, VERSION),
    "type": lambda _: None,
    "seq": _integer(0, MAX_INTEGER),
    "prev": _DIGEST,
}
#: The fields of each type besides ``v``, ``type``, ``seq`` and ``prev``; all are required, none other is allowed.
FIELDS: Mapping[str, Mapping[str, Check]] = {
    "genesis": {
        "dataset": _DIGEST,
        "adjacency": _one_of(*(adjacency.value for adjacency in Adjacency)),
        "unit": _one_of(*UNITS),
        "epsilon": _EPSILON,
        "delta": _DELTA,
        "filter": _one_of("portfolio", "rdp"),
        "owner": _DIGEST,
        "writer": _DIGEST,
        "public_data": _boolean,
    },
    "portfolio": {"index": _integer(1, MAX_PORTFOLIOS), "delta": _DELTA, "epsilon": _optional(_EPSILON)},
    "renyi": {
        "orders": _list_of(_real(1.0, 1e6, open_low=True)),
        "shares": _list_of(_integer(1, MAX_SHARE)),
        "allowances": _list_of(_ALLOWANCE),
    },
    "budget": {"epsilon": _EPSILON, "delta": _DELTA, "allowances": _optional(_list_of(_ALLOWANCE))},
    "rekey": {"role": _one_of("owner", "writer"), "old": _DIGEST, "key": _DIGEST},
    "note": {"event": _one_of(*NOTES)},
    "plan": {"run": _RUN, "statement": _DIGEST, "portfolio": _integer(0, MAX_PORTFOLIOS)},
    "commit": {"run": _RUN, "commitment": _DIGEST},
    "entropy": {"run": _RUN, "value": _DIGEST},
    "lease": {
        "run": _RUN,
        "nonce": _DIGEST,
        "commitment": _DIGEST,
        "first": _integer(0, MAX_STEP),
        "count": _integer(1, MAX_STEP),
        "claim": _optional(_real(0.0, 1e6)),
    },
    "reserve": {"run": _RUN, "step": _integer(0, MAX_STEP), "count": _integer(1, MAX_STEP)},
    "settle": {
        "run": _RUN,
        "step": _integer(0, MAX_STEP),
        "fresh": _hex_digits(32),
        "output": _optional(_DIGEST),
    },
    "close": {"run": _RUN, "first": _integer(0, MAX_STEP), "unspent": _integer(0, MAX_STEP)},
}


def build(kind: str, *, seq: int, prev: bytes, **fields: Any) -> bytes:
    """Canonical line of a record; floats are given as floats. Raises :class:`Tampered` for what no reader accepts."""
    line = draft(kind, seq=seq, prev=prev, **fields)
    read(line)
    return line


def draft(kind: str, *, seq: int, prev: bytes, **fields: Any) -> bytes:
    """What :func:`build` gives, unread: for a caller that reads it next, as the rules do."""
    record = {"v": VERSION, "type": kind, "seq": seq, "prev": prev.hex()}
    try:
        record.update((name, _plain(value)) for name, value in fields.items())
        return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError) as error:
        raise Tampered(f"{kind} record: {error}", code="DP082") from None


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float_to_hex(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def read(line: bytes) -> dict[str, Any]:
    """The fields of a record, checked against the schema of its type.

    Raises:
        Tampered: not canonical, or an unknown version, type, field or value (DP082).
    """
    record = decode(line, max_depth=2)
    kind = record.get("type")
    table = FIELDS.get(kind) if isinstance(kind, str) else None
    if type(record.get("v")) is not int or record["v"] != VERSION:
        raise Tampered(f"record of version {record.get('v')!r}; this reader knows version {VERSION}", code="DP082")
    if table is None:
        raise Tampered(f"record of unknown type {str(kind)[:40]!r}", code="DP082")
    if len(record) != len(table) + len(_COMMON):
        raise Tampered(f"{kind} record with fields {', '.join(record)[:200]}", code="DP082")
    for name, check in (*_COMMON.items(), *table.items()):
        if name not in record:
            raise Tampered(f"{kind} record without the field {name}", code="DP082")
        problem = check(record[name])
        if problem:
            raise Tampered(f"{kind} record, field {name} = {str(record[name])[:40]!r}: {problem}", code="DP082")
    return record


def kind_of(line: bytes) -> str | None:
    """The type that a line seems to be of, without reading it; None where it names none."""
    start = line.rfind(b'"type":"') + 8
    end = line.find(b'"', start)
    return line[start:end].decode("latin-1") if start >= 8 <= end else None
