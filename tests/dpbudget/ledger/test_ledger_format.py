"""docs/ledger-format.md against the code: types, fields, constants, and a golden ledger."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from ledgerkit import OWNER

from dpbudget._record import float_to_hex
from dpbudget.ledger.entries import FIELDS, MAX_ENVELOPE_BYTES, build
from dpbudget.ledger.head import Head
from dpbudget.ledger.journal import replay
from dpbudget.ledger.signing import RECORD_TYPE, STATEMENT_TYPE
from dpbudget.ledger.state import LedgerState
from dpbudget.ledger.store.jsonl import read_export
from dpbudget.ledger.store.sqlite import APPLICATION_ID, SCHEMA
from dpbudget.plan import Plan

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "ledger-format.md").read_text(encoding="utf-8")
THREATS = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
GOLDEN = Path(__file__).with_name("golden.jsonl").read_bytes()
GOLDEN_COMMITTED = Path(__file__).with_name("golden-committed.jsonl").read_bytes()


def verify(export: bytes) -> tuple[LedgerState, Head]:
    snapshot = read_export(export)
    return replay(snapshot.entries, snapshot.note, OWNER.public)


# --- the golden ledger -----------------------------------------------------------------------------------------------


def test_the_golden_ledger_still_verifies() -> None:
    state, head = verify(GOLDEN)
    assert str(head) == "30:b5154a6810015824fd226bf8c15800c1d076e604cee25db320d96ea8762df369"
    assert [run.charged for run in state.runs.values()] == [6, 2, 3]
    assert [portfolio.claim for portfolio in state.portfolios] == [2.0, 0.5]


def test_the_bytes_of_a_record_never_change() -> None:
    record = {"run": "11" * 16, "nonce": "22" * 32, "commitment": "33" * 32, "first": 0, "count": 3, "claim": 0.1}
    assert build("lease", seq=7, prev=b"\x44" * 32, **record) == (
        b'{"claim":"0x1.999999999999ap-4","commitment":"' + b"33" * 32 + b'","count":3,"first":0,"nonce":"'
        b"" + b"22" * 32 + b'","prev":"' + b"44" * 32 + b'","run":"' + b"11" * 16 + b'","seq":7,"type":"lease","v":1}'
    )


def test_the_golden_ledger_of_a_committed_run_still_verifies() -> None:
    state, head = verify(GOLDEN_COMMITTED)
    assert str(head) == "22:85b63237066f4723c51c61f2d32e4f596de4a44b7d542b0366c39e67626d3746"
    fresh, committed = state.runs.values()
    assert (fresh.commitment, fresh.entropy, fresh.charged) == (None, None, 4)
    assert committed.commitment == hashlib.sha256(b"dpbudget/plan-key/v1\0" + b"\x07" * 32).hexdigest()
    assert (committed.entropy, committed.charged) == ("5e" * 32, 4)


# --- the page --------------------------------------------------------------------------------------------------------


def table_of(kind: str) -> set[str]:
    section = re.search(rf"^### {kind}\n(.*?)^##", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None, f"docs/ledger-format.md has no section {kind}"
    return set(re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE))


def test_the_page_lists_every_type_and_every_field() -> None:
    assert set(re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)) == set(FIELDS)
    for kind, fields in FIELDS.items():
        assert table_of(kind) == set(fields)


def test_the_page_lists_every_field_of_a_plan() -> None:
    section = PAGE[PAGE.index("PLAN has exactly") : PAGE.index("## Tree and head")]
    rows = " ".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows)) == set(Plan.model_fields)


def test_the_page_states_the_constants_of_the_code() -> None:
    for text in (
        RECORD_TYPE,
        STATEMENT_TYPE,
        str(MAX_ENVELOPE_BYTES),
        f"0x{APPLICATION_ID:X}",
        "dpbudget/lease-key/v1",
        "dpbudget/plan-key/v1",
    ):
        assert text in PAGE
    for _, statement in SCHEMA:
        assert statement in PAGE
    assert float_to_hex(1e-6) in PAGE


FLOAT = re.compile(
    r"0x0\.0p\+0|-?0x1\.[0-9a-f]{13}p[+-](0|[1-9][0-9]{0,3})|-?0x0\.(?!0{13})[0-9a-f]{13}p-1022"
)  # the grammar of the page


@given(st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: str(x) != "-0.0"))
def test_every_float_has_the_spelling_of_the_page(value: float) -> None:
    assert FLOAT.fullmatch(float_to_hex(value))


def test_every_test_that_the_threat_model_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", THREATS))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 60
    assert {name for name in named if f"def {name}(" not in sources} == set()


def test_the_threat_model_says_what_cannot_be_seen() -> None:
    for sentence in ("Two ledgers for one dataset cannot be detected", "does not prove that the operator could not"):
        assert sentence in THREATS
