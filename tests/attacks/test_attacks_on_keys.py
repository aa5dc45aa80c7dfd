"""Attacks 16 to 19: foreign keys, retired keys, confused algorithms, bent signatures and weak keys."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attackkit import (
    BUDGET,
    NEXT_OWNER,
    NEXT_WRITER,
    OWNER,
    STRANGER,
    WRITER,
    as_is,
    call,
    export,
    forged,
    make,
    plan,
    problem,
    problem_of,
    reopen,
    sealed,
    signed,
    spend,
    spent,
)
from cryptography.hazmat.primitives.asymmetric import ec

import dpbudget
from dpbudget.errors import InvalidParameter, Tampered
from dpbudget.ledger.head import key_hash, origin_of
from dpbudget.ledger.signing import RECORD_TYPE, STATEMENT_TYPE, PublicKey, pae
from dpbudget.ledger.store.jsonl import read_export

ORDER = 2**252 + 27742317777372353535851937790883648493


def test_attack_16_a_consistent_ledger_of_a_foreign_owner_is_refused_under_the_trusted_key(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = dpbudget.create_ledger(path, budget=BUDGET, owner=STRANGER, writer=WRITER, whole_budget=True)
    with ledger, ledger.start(ledger.sign_plan(plan(), owner=STRANGER)) as run:
        run.next_receipt()
    assert "DP072" in call("ledger", "verify", path, "--trust", OWNER.public.hex, code=1)
    assert "proves nothing" in call("ledger", "verify", path)  # without a trusted key the verdict says what it is worth
    with pytest.raises(Tampered) as caught:
        reopen(path)
    assert caught.value.code == "DP072"


def test_attack_17_the_writers_old_key_is_good_for_nothing_after_a_rekey(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    run_id = signed(path)
    old = reopen(path)  # still open with the old key while another process changes it
    with reopen(path) as ledger:
        ledger.rekey("writer", new=NEXT_WRITER, by=WRITER)
    with pytest.raises(InvalidParameter) as held:
        old.start(run_id).next_receipt()
    with pytest.raises(InvalidParameter) as opened:
        reopen(path)
    assert held.value.code == opened.value.code == "DP080"
    old.close()
    spend(path, run_id, 1, writer=NEXT_WRITER)
    assert problem(path) is None
    # A head that the retired key signs for more records than it had is not one.
    more = {"type": "note", "event": "checked"}
    assert problem_of(forged(export(path), writer=NEXT_WRITER), tmp_path) is None
    assert "head is not the writer's" in str(problem_of(forged(export(path), as_is, more, writer=WRITER), tmp_path))


def test_attack_17_the_owners_old_key_grants_nothing_after_a_rekey(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with make(path) as ledger:
        ledger.rekey("owner", new=NEXT_OWNER, by=OWNER)
        for act in (
            lambda: ledger.sign_plan(plan(), owner=OWNER),
            lambda: ledger.change_budget(dpbudget.Budget(epsilon=9.0, delta=1e-5), owner=OWNER),
        ):
            with pytest.raises(InvalidParameter) as caught:
                act()
            assert caught.value.code == "DP080"
        ledger.sign_plan(plan(), owner=NEXT_OWNER)
    assert problem(path, trust=NEXT_OWNER.public) is None

    def steal(record: dict[str, Any], envelope: bytes | None) -> bytes | None:
        return sealed(record, OWNER) if record["type"] == "budget" else envelope

    grant = {"type": "budget", "epsilon": (9.0).hex(), "delta": (1e-5).hex(), "allowances": None, "v": 1}
    assert "not by the owner" in str(problem_of(forged(export(path), steal, grant), tmp_path))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("keys") / "ledger"
    spent(path, 1)
    return export(path)


def _envelope_signature(data: bytes, change: Callable[[bytes, bytes], bytes], kind: str | None = None) -> bytes:
    """The export with the genesis envelope signed otherwise: ``change`` gets message and signature."""
    lines = data.splitlines(keepends=True)
    envelope = json.loads(lines[1])
    payload = base64.b64decode(envelope["payload"])
    (signature,) = envelope["signatures"]
    message = pae(kind or RECORD_TYPE, payload)
    signature["sig"] = base64.b64encode(change(message, base64.b64decode(signature["sig"]))).decode()
    envelope["payloadType"] = kind or envelope["payloadType"]
    lines[1] = json.dumps(envelope, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    return b"".join(lines)


def _ecdsa(message: bytes, _: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256

    return ec.generate_private_key(ec.SECP256R1()).sign(message, ec.ECDSA(SHA256()))


def _plus_order(_: bytes, signature: bytes) -> bytes:
    return signature[:32] + (int.from_bytes(signature[32:], "little") + ORDER).to_bytes(32, "little")


CONFUSED: dict[str, Callable[[bytes, bytes], bytes]] = {
    # The public key as the secret of a MAC, as JSON web tokens were broken.
    "hmac": lambda message, _: hmac.digest(OWNER.public.raw, message, "sha512"),
    "ecdsa": _ecdsa,
    "none": lambda message, _: b"",
    "payload without its type": lambda message, _: OWNER.sign(message.split(b" ", 4)[4]),
    "prehashed": lambda message, _: OWNER.sign(hashlib.sha512(message).digest()),
}
BENT: dict[str, Callable[[bytes, bytes], bytes]] = {
    "s plus the order": _plus_order,
    "s is zero": lambda _, signature: signature[:32] + bytes(32),
    "r is the identity": lambda _, signature: b"\x01" + bytes(31) + signature[32:],
    "a byte more": lambda _, signature: signature + b"\0",
    "a byte less": lambda _, signature: signature[:63],
    "empty": lambda *_: b"",
}


@pytest.mark.parametrize("name", CONFUSED)
def test_attack_18_a_signature_of_another_algorithm_is_refused(data: bytes, name: str, tmp_path: Path) -> None:
    assert "owner's signature" in str(problem_of(_envelope_signature(data, CONFUSED[name]), tmp_path))


def test_attack_18_a_signature_for_another_purpose_is_refused(data: bytes, tmp_path: Path) -> None:
    # Rightly signed by the owner, but as a plan statement.
    other = _envelope_signature(data, lambda message, _: OWNER.sign(message), STATEMENT_TYPE)
    assert "DP082" in str(problem_of(other, tmp_path))
    # A head under the key hash of another signature type of C2SP (0x04, a cosignature).
    snapshot = read_export(data)
    note = snapshot.note or b""
    text, origin = note.split(b"\n\n")[0] + b"\n", note.split(b"\n")[0].decode()
    typed = hashlib.sha256(origin.encode() + b"\n\x04" + WRITER.public.raw).digest()[:4]
    assert typed != key_hash(origin, WRITER.public)
    for prefix, refused in ((key_hash(origin, WRITER.public), False), (typed, True)):
        blob = base64.b64encode(prefix + WRITER.sign(text)).decode()
        head = text + f"\n— {origin} {blob}\n".encode()
        end = b'{"note":"' + base64.b64encode(head) + b'"}\n'
        found = problem_of(data[: data.rindex(b'{"note"')] + end, tmp_path)
        assert ("head is not the writer's" in str(found)) is refused
    assert origin == origin_of(origin.rpartition("/")[2] + "0" * 48)


@pytest.mark.parametrize("name", BENT)
def test_attack_19_a_bent_signature_is_refused(data: bytes, name: str, tmp_path: Path) -> None:
    assert problem_of(_envelope_signature(data, lambda message, signature: signature), tmp_path) is None
    assert "owner's signature" in str(problem_of(_envelope_signature(data, BENT[name]), tmp_path))


P = 2**255 - 19
Y8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
#: Points of small order, and encodings at or beyond the field's prime, each with both signs of x.
WEAK = [(y | sign << 255).to_bytes(32, "little") for y in (0, 1, P - 1, Y8, P - Y8, P, P + 1) for sign in (0, 1)]


@pytest.mark.parametrize("raw", WEAK, ids=lambda raw: raw.hex()[-4:] + raw.hex()[:4])
def test_attack_19_a_key_under_which_anything_verifies_owns_no_ledger(data: bytes, raw: bytes, tmp_path: Path) -> None:
    with pytest.raises(Tampered) as caught:
        PublicKey(raw)
    assert caught.value.code == "DP080"

    def give_away(record: dict[str, Any], envelope: bytes | None) -> bytes | None:
        if record["type"] == "genesis":
            record["owner"] = raw.hex()
        return envelope

    assert "DP080" in str(problem_of(forged(data, give_away), tmp_path))
