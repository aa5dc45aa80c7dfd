"""The closed schema of records: every field of every type missing, superfluous, mistyped and out of range."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgerkit import committed_ledger, lived_in_ledger, rdp_ledger, snapshot_of

from dpbudget._record import encode
from dpbudget.errors import Tampered
from dpbudget.ledger.entries import FIELDS, build, read

RUN, DIGEST = "ab" * 16, "cd" * 32
GOOD: dict[str, dict[str, Any]] = {
    "genesis": {
        "dataset": DIGEST,
        "adjacency": "add-remove",
        "unit": "example",
        "epsilon": 3.0,
        "delta": 1e-6,
        "filter": "portfolio",
        "owner": DIGEST,
        "writer": DIGEST,
        "public_data": False,
    },
    "portfolio": {"index": 1, "delta": 5e-7, "epsilon": None},
    "renyi": {"orders": [2.0, 8.0], "shares": [1, 3], "allowances": [2.5, -1.0]},
    "budget": {"epsilon": 4.0, "delta": 1e-6, "allowances": None},
    "rekey": {"role": "writer", "old": DIGEST, "key": "ef" * 32},
    "note": {"event": "checked"},
    "plan": {"run": RUN, "statement": DIGEST, "portfolio": 1},
    "commit": {"run": RUN, "commitment": DIGEST},
    "entropy": {"run": RUN, "value": DIGEST},
    "lease": {"run": RUN, "nonce": DIGEST, "commitment": DIGEST, "first": 0, "count": 1, "claim": 1.5},
    "reserve": {"run": RUN, "step": 0, "count": 1},
    "settle": {"run": RUN, "step": 0, "fresh": RUN, "output": None},
    "close": {"run": RUN, "first": 0, "unspent": 0},
}
PLACES = [(kind, name) for kind in GOOD for name in ("v", "type", "seq", "prev", *GOOD[kind])]


def good(kind: str) -> dict[str, Any]:
    return dict(json.loads(build(kind, seq=0, prev=bytes(32), **GOOD[kind])))


def test_the_table_and_this_test_know_the_same_types_and_fields() -> None:
    assert {kind: set(fields) for kind, fields in FIELDS.items()} == {kind: set(f) for kind, f in GOOD.items()}


@pytest.mark.parametrize("kind", GOOD)
def test_a_record_reads_back_what_was_built(kind: str) -> None:
    record = good(kind)
    assert read(encode(record)) == record
    assert record["v"] == 1
    assert record["type"] == kind


@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_a_missing_field_is_refused(kind: str, name: str) -> None:
    record = good(kind)
    del record[name]
    with pytest.raises(Tampered):
        read(encode(record))


@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_a_renamed_field_is_refused(kind: str, name: str) -> None:
    record = good(kind)
    record[name + "_"] = record.pop(name)
    with pytest.raises(Tampered):
        read(encode(record))


@pytest.mark.parametrize("kind", GOOD)
def test_a_superfluous_field_is_refused(kind: str) -> None:
    with pytest.raises(Tampered, match="with fields"):
        read(encode({**good(kind), "comment": "x"}))


WRONG: list[Any] = [
    True,
    -1,
    2**53 - 1,
    "",
    "x",
    "AB" * 16,
    "AB" * 32,
    [],
    {},
    "nan",
    "0x1p+0",
    "-0x1.0000000000000p+0",
]


@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_a_value_of_another_kind_or_range_is_refused(kind: str, name: str) -> None:
    for value in WRONG:
        allowed = (
            (name == "seq" and value == 2**53 - 1)
            or (name == "public_data" and value is True)
            or (name in ("first", "step", "count", "index", "portfolio", "unspent") and False)
        )
        if not allowed:
            with pytest.raises(Tampered):
                read(encode({**good(kind), name: value}))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("reserve", "count", 0),  # nothing to charge
        ("reserve", "count", -3),  # a refund
        ("reserve", "count", 2**50),
        ("lease", "count", 0),
        ("lease", "count", -1),
        ("lease", "claim", (-1.0).hex()),
        ("lease", "claim", (2e6).hex()),
        ("genesis", "epsilon", (0.0).hex()),
        ("genesis", "delta", (0.0).hex()),
        ("genesis", "delta", (1.0).hex()),
        ("genesis", "epsilon", "inf"),
        ("genesis", "epsilon", "0x1.8p+1"),  # C's spelling of 3.0
        ("genesis", "epsilon", "0X1.8000000000000p+1"),
        ("genesis", "adjacency", "add_remove"),
        ("genesis", "unit", "token"),
        ("genesis", "filter", "renyi"),
        ("renyi", "orders", [(1.0).hex()]),
        ("renyi", "orders", (2.0).hex()),
        ("renyi", "orders", [[(2.0).hex()]]),
        ("renyi", "orders", [2]),
        ("renyi", "shares", [0]),
        ("renyi", "shares", [True]),
        ("renyi", "shares", [1] * 65),
        ("renyi", "allowances", [None]),
        ("renyi", "allowances", [(2e6).hex()]),
        ("budget", "allowances", []),
        ("budget", "epsilon", None),
        ("rekey", "role", "auditor"),
        ("note", "event", "the loss was 0.3"),
        ("lease", "count", [1]),
        ("genesis", "public_data", 1),
        ("portfolio", "index", 0),
        ("portfolio", "index", 10_001),
        ("portfolio", "delta", None),
        ("close", "unspent", -1),
        ("settle", "fresh", "ab" * 15),
        ("settle", "output", "ab" * 16),
        ("plan", "v", 2),
        ("plan", "v", True),
        ("plan", "type", "refund"),
        ("plan", "portfolio", -1),
        ("plan", "type", None),
        ("plan", "prev", "0" * 63),
    ],
)
def test_a_hostile_value_is_refused(kind: str, name: str, value: Any) -> None:
    with pytest.raises(Tampered) as caught:
        read(encode({**good(kind), name: value}))
    assert caught.value.code == "DP082"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"v":1,"v":1}',
        b'{"a":NaN}',
        b'{"a":1e400}',
        b'{"a":1.0}',
        b'{"a":99999999999999999999}',
        b'{"a":"\\ud800"}',
        b"\xef\xbb\xbf{}",
        b'{"a":' + b"[" * 4000,
        b'{"a":"' + b"x" * 5000 + b'"}',
        b"\xff\xfe",
    ],
)
def test_what_is_not_a_canonical_record_is_refused(line: bytes) -> None:
    with pytest.raises(Tampered) as caught:
        read(line)
    assert caught.value.code == "DP082"


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(line: bytes) -> None:
    with pytest.raises(Tampered):
        read(line)


@settings(deadline=None)
@given(st.sampled_from(sorted(GOOD)), st.data())
def test_a_record_with_a_changed_byte_reads_differently_or_not_at_all(kind: str, data: st.DataObject) -> None:
    line = encode(good(kind))
    at, byte = data.draw(st.integers(0, len(line) - 1)), data.draw(st.integers(0, 255))
    changed = line[:at] + bytes([byte]) + line[at + 1 :]
    try:
        record = read(changed)
    except Tampered:
        return
    assert (record == good(kind)) == (changed == line)
    assert encode(record) == changed


def test_a_value_without_a_canonical_form_cannot_be_built() -> None:
    for value in ("é", 2**60, [object()], float("nan"), -0.0):
        with pytest.raises((Tampered, ValueError)):
            build("reserve", seq=0, prev=bytes(32), run=value, step=0, count=1)


def test_every_type_occurs_in_a_lived_in_ledger_and_is_short() -> None:
    made = lived_in_ledger(), rdp_ledger(), committed_ledger()
    lines = [entry.line for ledger in made for entry in snapshot_of(ledger).entries]
    assert {read(line)["type"] for line in lines} == set(FIELDS)
    assert max(map(len, lines)) < 1024


def test_no_record_holds_what_a_ledger_must_never_tell() -> None:
    forbidden = {"batch", "loss", "norm", "time", "timestamp", "size", "data", "gradient", "comment", "text"}
    assert not forbidden & {name for fields in FIELDS.values() for name in fields}
