"""The ledger's formats against published vectors and against implementations that know nothing of this package."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.json_format import Parse
from hypothesis import given
from hypothesis import strategies as st
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage
from ledgerkit import (
    NEXT_OWNER,
    OWNER,
    STRANGER,
    committed_ledger,
    export_bytes,
    lived_in_ledger,
    make_plan,
    rdp_ledger,
    snapshot_in,
)
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from dpbudget._record import MAX_INTEGER, decode, encode
from dpbudget.errors import Tampered
from dpbudget.ledger.entries import Entry, read
from dpbudget.ledger.signing import (
    RECORD_TYPE,
    STATEMENT_TYPE,
    Ed25519Signer,
    PublicKey,
    open_envelope,
    pae,
    sign_envelope,
)
from dpbudget.ledger.statement import plan_statement

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "ed25519_vectors.json").read_text(encoding="utf-8"))
NODE = shutil.which("node")


# --- Ed25519 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS["rfc8032"], ids=lambda vector: str(vector["name"]))
def test_the_five_vectors_of_rfc_8032_hold(vector: dict[str, str]) -> None:
    message, signature = bytes.fromhex(vector["message"]), bytes.fromhex(vector["signature"])
    signer = Ed25519Signer.from_seed(bytes.fromhex(vector["seed"]))
    assert signer.public.hex == vector["public"]
    assert signer.sign(message) == signature
    assert PublicKey.from_hex(vector["public"]).verify(message, signature)


@pytest.mark.parametrize("vector", VECTORS["speccheck"], ids=lambda vector: str(vector["what"]))
def test_each_vector_of_taming_the_many_eddsas_has_our_verdict(vector: dict[str, str]) -> None:
    """RFC 8032 leaves the cofactor open; ours is the equation without it, canonical R and S, no A of small order."""
    if vector["verdict"] == "key":
        with pytest.raises(Tampered, match="small order"):
            PublicKey.from_hex(vector["public"])
        return
    key = PublicKey.from_hex(vector["public"])
    accepted = key.verify(bytes.fromhex(vector["message"]), bytes.fromhex(vector["signature"]))
    assert accepted == (vector["verdict"] == "accept")


@pytest.mark.parametrize("vector", VECTORS["wycheproof"], ids=lambda vector: f"tcId {vector['id']}")
def test_wycheproof_agrees(vector: dict[str, str]) -> None:
    key = PublicKey.from_hex(vector["public"])
    accepted = key.verify(bytes.fromhex(vector["message"]), bytes.fromhex(vector["signature"]))
    assert accepted == (vector["result"] == "valid")


# --- DSSE: securesystemslib -------------------------------------------------------------------------------------------


def sslib_key(key: PublicKey) -> SSlibKey:
    return SSlibKey(key.key_id, "ed25519", "ed25519", {"public": key.hex})


def sslib_signer(seed: bytes) -> CryptoSigner:
    public = Ed25519Signer.from_seed(seed).public
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(seed), sslib_key(public))


def enveloped(entries: tuple[Entry, ...]) -> list[tuple[dict[str, Any], Entry]]:
    return [(read(entry.line), entry) for entry in entries if entry.envelope is not None]


def test_the_vector_of_the_dsse_protocol_holds_in_both_implementations() -> None:
    # secure-systems-lab/dsse, protocol.md: PAE of "hello world".
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("http://example.com/HelloWorld", b"hello world") == expected
    assert Envelope(b"hello world", "http://example.com/HelloWorld", {}).pae() == expected


def test_securesystemslib_verifies_every_envelope_of_a_ledger() -> None:
    for ledger in (lived_in_ledger(), rdp_ledger(), committed_ledger()):
        found = enveloped(snapshot_in(ledger).entries)
        kinds = {record["type"] for record, _ in found}
        assert kinds >= {"genesis", "plan"}
        for record, entry in found:
            envelope = Envelope.from_dict(json.loads(entry.envelope or b""))
            keys = [sslib_key(key) for key in (*ledger.state.owners, *ledger.state.writers)]
            signers = 2 if record["type"] == "rekey" else 1
            assert len(envelope.verify(keys, signers)) == len(envelope.signatures) == signers
            assert envelope.payload == entry.line or record["type"] == "plan"
            with pytest.raises(VerificationError):
                envelope.verify([sslib_key(STRANGER.public)], 1)


def test_an_envelope_of_securesystemslib_opens_once_it_is_canonical() -> None:
    statement = plan_statement(make_plan(), ledger_id="ab" * 32, run_id="cd" * 16)
    envelope = Envelope(statement, STATEMENT_TYPE, {})
    envelope.sign(sslib_signer(b"\x01" * 32))
    theirs = encode(envelope.to_dict())
    assert open_envelope(theirs, STATEMENT_TYPE, OWNER.public) == statement
    # Ed25519 is deterministic, and so is the canonical form: they are the very bytes that this package makes.
    assert theirs == sign_envelope(statement, STATEMENT_TYPE, OWNER)
    with pytest.raises(Tampered):
        open_envelope(json.dumps(envelope.to_dict()).encode(), STATEMENT_TYPE, OWNER.public)


def test_two_signatures_of_securesystemslib_open_as_a_rekey_does() -> None:
    envelope = Envelope(b"{}", RECORD_TYPE, {})
    for seed in (b"\x01" * 32, b"\x04" * 32):
        envelope.sign(sslib_signer(seed))
    assert encode(envelope.to_dict()) == sign_envelope(b"{}", RECORD_TYPE, OWNER, NEXT_OWNER)
    assert open_envelope(encode(envelope.to_dict()), RECORD_TYPE, OWNER.public, NEXT_OWNER.public) == b"{}"


# --- in-toto: the attestation library ---------------------------------------------------------------------------------


def test_the_attestation_library_reads_a_plan_statement() -> None:
    ledger = lived_in_ledger()
    plans = [(record, entry) for record, entry in enveloped(snapshot_in(ledger).entries) if record["type"] == "plan"]
    assert len(plans) == 3
    for record, entry in plans:
        payload = open_envelope(entry.envelope or b"", STATEMENT_TYPE, OWNER.public)
        message = Parse(payload, StatementMessage())
        Statement.copy_from_pb(message).validate()
        assert message.predicate_type == "urn:dpbudget:plan:v1"
        assert message.subject[0].name == f"dpbudget-run/{record['run']}"
        assert dict(message.subject[0].digest) == {"sha256": ledger.id}
        assert message.predicate["nominal_size"] == 1000


# --- canonical JSON: rfc8785 ------------------------------------------------------------------------------------------

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers(-MAX_INTEGER, MAX_INTEGER) | PRINTABLE
VALUES = st.dictionaries(PRINTABLE, SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(PRINTABLE, SCALARS))


@given(VALUES)
def test_rfc8785_encodes_every_restricted_value_to_the_same_bytes(value: dict[str, Any]) -> None:
    assert rfc8785.dumps(value) == encode(value)
    assert decode(rfc8785.dumps(value)) == value


def test_rfc8785_encodes_every_record_and_envelope_to_the_same_bytes() -> None:
    for ledger in (lived_in_ledger(), rdp_ledger(), committed_ledger()):
        for entry in snapshot_in(ledger).entries:
            for data in (entry.line, entry.envelope):
                assert data is None or rfc8785.dumps(json.loads(data)) == data


@pytest.mark.parametrize("value", [{"a": 0.5}, {"a": 1e300}, {"\u20ac": 1}, {"a": "\u00f6"}, {"a": "\n"}])
def test_what_rfc8785_also_knows_has_no_restricted_form(value: dict[str, Any]) -> None:
    theirs = rfc8785.dumps(value)
    with pytest.raises(ValueError):
        encode(value)
    with pytest.raises(Tampered):
        decode(theirs)


def test_the_order_of_keys_is_that_of_rfc_8785_section_3_2_3() -> None:
    # The ASCII keys of its example; "\r" and the others beyond printable ASCII have no restricted form.
    value = {"1": "One", "</script>": "Browser Challenge"}
    assert encode(value) == rfc8785.dumps(value) == b'{"1":"One","</script>":"Browser Challenge"}'


# --- Node: another language -------------------------------------------------------------------------------------------


def run_node(export: Path, owner: PublicKey) -> tuple[int, dict[str, Any]]:
    script = Path(__file__).parents[2] / "reference" / "verify_head.mjs"
    done = subprocess.run(
        [NODE or "", str(script), str(export), owner.hex], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


@pytest.mark.skipif(NODE is None, reason="Node is not installed")
def test_node_verifies_head_and_envelopes_of_an_export(tmp_path: Path) -> None:
    ledger = lived_in_ledger()
    ledger.export(tmp_path / "export.jsonl")
    head = ledger.head
    assert run_node(tmp_path / "export.jsonl", OWNER.public) == (
        0,
        {"size": head.size, "root": head.root, "envelopes": 6},
    )
    assert run_node(HERE / "golden.jsonl", OWNER.public)[0] == 0


@pytest.mark.skipif(NODE is None, reason="Node is not installed")
def test_node_refuses_another_owner_and_a_changed_export(tmp_path: Path) -> None:
    data = export_bytes(lived_in_ledger())
    export = tmp_path / "export.jsonl"
    export.write_bytes(data)
    assert run_node(export, STRANGER.public)[0] == 1
    note = data.rindex(b'"note":"') + 8
    for at in (data.index(b'"delta"') + 12, data.index(b'"payload"') + 40, data.index(b'"count"') + 8, len(data) - 40):
        changed = bytearray(data)
        changed[at] = ord("1") if changed[at] != ord("1") else ord("2")
        export.write_bytes(changed)
        assert run_node(export, OWNER.public)[0] == 1
    other = base64.b64decode(data[note : data.index(b'"', note)]).replace(b"\n30\n", b"\n31\n")
    export.write_bytes(data[:note] + base64.b64encode(other) + b'"}\n')
    assert run_node(export, OWNER.public)[0] == 1
