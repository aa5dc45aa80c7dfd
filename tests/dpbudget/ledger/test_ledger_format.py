"""docs/ledger-format.md against the code: a verifier written from the page alone, and a golden ledger."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgerkit import OWNER, export_bytes, lived_in_ledger

from dpbudget._record import float_to_hex
from dpbudget.errors import Tampered
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


# --- a stranger's verifier: the page, the standard library and Ed25519 ------------------------------------------------


class Refused(Exception):
    pass


def need(condition: object, why: str) -> None:
    if not condition:
        raise Refused(why)


def parse(line: bytes) -> dict[str, Any]:
    value = json.loads(line.decode("ascii"))
    again = json.dumps(value, sort_keys=True, separators=(",", ":"))
    need(isinstance(value, dict) and again.encode() == line, "canonical")
    return dict(value)


def number(text: str) -> Fraction:
    need(float.fromhex(text).hex() == text, "float")
    return Fraction(float.fromhex(text))


def unbase64(text: str) -> bytes:
    data = base64.b64decode(text, validate=True)
    need(base64.b64encode(data).decode() == text, "base64")
    return data


def root_of(hashes: list[bytes]) -> bytes:
    if len(hashes) == 1:
        return hashes[0]
    split = 1 << (len(hashes) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + root_of(hashes[:split]) + root_of(hashes[split:])).digest()


def unseal(envelope: bytes, kind: str, owner: bytes) -> bytes:
    value = parse(envelope)
    (signature,) = value["signatures"]
    need(value["payloadType"] == kind and signature["keyid"] == hashlib.sha256(owner).hexdigest(), "envelope")
    payload = unbase64(value["payload"])
    pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    check(owner, unbase64(signature["sig"]), pae)
    return payload


def check(key: bytes, signature: bytes, message: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except InvalidSignature:
        raise Refused("signature") from None


def stranger_verify(export: bytes, trusted_owner: bytes) -> dict[str, Any]:
    """What was spent, by the rules of the page; Refused for anything that breaks them."""
    need(export.endswith(b"\n"), "end")
    lines = iter(export[:-1].split(b"\n"))
    hashes: list[bytes] = []
    genesis: dict[str, Any] = {}
    portfolios: list[dict[str, Any]] = []
    runs: dict[str, dict[str, Any]] = {}
    unique: list[str] = []

    def left_for(own: dict[str, Any] | None) -> Fraction:
        others = (p["claim"] if p["claim"] is not None else p["epsilon"] or 0 for p in portfolios if p is not own)
        return number(genesis["epsilon"]) - sum(others)

    for line in lines:
        r = parse(line)
        if "note" in r:
            break
        kind, last = r["type"], hashes[-1].hex() if hashes else "0" * 64
        need(r["v"] == 1 and r["seq"] == len(hashes) and r["prev"] == last, "chain")
        need((kind == "genesis") == (not hashes), "genesis first")
        hashes.append(hashlib.sha256(b"\x00" + line).digest())
        if kind == "genesis":
            genesis = r
            need(bytes.fromhex(r["owner"]) == trusted_owner and r["writer"] != r["owner"], "keys")
        if kind in ("genesis", "portfolio"):
            need(unseal(next(lines), "application/vnd.dpbudget.record.v1+json", trusted_owner) == line, "sealed line")
        if kind == "portfolio":
            need(r["index"] == len(portfolios) + 1, "index")
            need(not portfolios or portfolios[-1]["claim"] is not None, "previous not frozen")
            epsilon = None if r["epsilon"] is None else number(r["epsilon"])
            need(epsilon is None or epsilon <= left_for(None), "epsilon left")
            portfolios.append({"delta": number(r["delta"]), "epsilon": epsilon, "claim": None})
            need(sum(p["delta"] for p in portfolios) <= number(genesis["delta"]), "delta left")
        elif kind == "plan":
            payload = unseal(next(lines), "application/vnd.in-toto+json", trusted_owner)
            need(hashlib.sha256(payload).hexdigest() == r["statement"], "statement")
            statement = parse(payload)
            subject = {"name": "dpbudget-run/" + r["run"], "digest": {"sha256": hashes[0].hex()}}
            need(statement["subject"] == [subject], "subject")
            plan = statement["predicate"]
            need(r["run"] not in runs and r["portfolio"] == len(portfolios), "place")
            need(portfolios[-1]["claim"] is None, "frozen")
            need(number(plan["claim"]["delta"]) == portfolios[-1]["delta"], "delta")
            need(plan["adjacency"] == genesis["adjacency"] and plan["unit"] == genesis["unit"], "unit")
            need(plan["nominal_size"], "size")
            steps = sum(phase["steps"] for phase in plan["phases"])
            runs[r["run"]] = {"steps": steps, "charged": 0, "leases": [], "portfolio": portfolios[-1]}
        elif kind == "lease":
            run = runs[r["run"]]
            need(r["first"] == run["charged"] and r["count"] >= 1, "contiguous")
            need(r["first"] + r["count"] <= run["steps"], "beyond the plan")
            own = run["portfolio"]
            need((own["claim"] is None) == (r["claim"] is not None), "claim")
            if r["claim"] is not None:
                claim = number(r["claim"])
                need(claim <= left_for(own) and (own["epsilon"] is None or claim <= own["epsilon"]), "budget")
                own["claim"] = claim
            run["charged"] += r["count"]
            run["leases"].append({"first": r["first"], "end": run["charged"], "reserved": r["first"], "settled": None})
            unique += ["n" + r["nonce"], "c" + r["commitment"]]
        elif kind != "genesis":
            run, step = runs[r["run"]], r["first"] if kind == "close" else r["step"]
            (lease,) = (held for held in run["leases"] if held["first"] <= step < held["end"])
            if kind == "reserve":
                need(step == lease["reserved"] and 1 <= r["count"] <= lease["end"] - step, "reserve")
                lease["reserved"] += r["count"]
            elif kind == "settle":
                need(step < lease["reserved"], "not reserved")
                need(lease["settled"] is None or step > lease["settled"], "settled")
                lease["settled"] = step
                unique.append("f" + r["fresh"])
                if step == lease["end"] - 1:
                    run["leases"].remove(lease)
            else:
                need(kind == "close" and step == lease["first"], "close")
                need(r["unspent"] == lease["end"] - lease["reserved"], "unspent")
                run["leases"].remove(lease)
    need(len(unique) == len(set(unique)), "repeated randomness")
    need(next(lines, None) is None, "after the head")
    note = unbase64(r["note"]).decode()
    text, signature = note.split("\n\n")
    origin = "dpbudget.ledger/" + hashes[0].hex()[:16]
    need(text == f"{origin}\n{len(hashes)}\n{base64.b64encode(root_of(hashes)).decode()}", "head")
    writer = bytes.fromhex(genesis["writer"])
    blob = unbase64(signature.removeprefix(f"— {origin} ").removesuffix("\n"))
    need(blob[:4] == hashlib.sha256(origin.encode() + b"\n\x01" + writer).digest()[:4], "key hash")
    check(writer, blob[4:], text.encode() + b"\n")
    return {"claims": [p["claim"] for p in portfolios], "charged": {name: run["charged"] for name, run in runs.items()}}


def verify(export: bytes) -> tuple[LedgerState, Head]:
    snapshot = read_export(export)
    return replay(snapshot.entries, snapshot.note, OWNER.public)


@pytest.mark.parametrize("export", [GOLDEN, export_bytes(lived_in_ledger())], ids=["golden", "new"])
def test_a_verifier_written_from_the_page_agrees(export: bytes) -> None:
    found = stranger_verify(export, OWNER.public.raw)
    state, _ = verify(export)
    assert found["charged"] == {run.run_id: run.charged for run in state.runs.values()}
    assert found["claims"] == [portfolio.claim for portfolio in state.portfolios]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(GOLDEN) - 1), st.integers(1, 255))
def test_both_verifiers_refuse_the_same_changes(at: int, mask: int) -> None:
    changed = GOLDEN[:at] + bytes([GOLDEN[at] ^ mask]) + GOLDEN[at + 1 :]
    with pytest.raises(Tampered):
        verify(changed)
    with pytest.raises((Refused, ValueError, KeyError, TypeError, AttributeError)):
        stranger_verify(changed, OWNER.public.raw)


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
