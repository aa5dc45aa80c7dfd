"""Ed25519, DSSE and signed notes against published vectors, and every way in which they could be bent."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
from typing import Any

import pytest
from ledgerkit import OWNER, STRANGER, WRITER

from dpbudget._record import encode
from dpbudget.errors import Tampered
from dpbudget.ledger.head import key_hash, origin_of, read_head, sign_head, verifier_key
from dpbudget.ledger.signing import (
    RECORD_TYPE,
    STATEMENT_TYPE,
    Ed25519Signer,
    PublicKey,
    open_envelope,
    pae,
    sign_envelope,
    strict_base64,
)

P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P
L = 2**252 + 27742317777372353535851937790883648493

# RFC 8032 section 7.1, tests 1 to 3: seed, public key, message, signature.
RFC8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("seed", "public", "message", "signature"), RFC8032)
def test_the_vectors_of_rfc_8032_hold(seed: str, public: str, message: str, signature: str) -> None:
    signer = Ed25519Signer.from_seed(bytes.fromhex(seed))
    text = bytes.fromhex(message)
    assert signer.public.hex == public
    assert signer.sign(text).hex() == signature
    assert signer.public.verify(text, bytes.fromhex(signature))
    assert not signer.public.verify(text + b"x", bytes.fromhex(signature))


def test_a_signature_cannot_be_restated_with_s_plus_the_group_order() -> None:
    signature = OWNER.sign(b"message")
    s = int.from_bytes(signature[32:], "little")
    restated = signature[:32] + (s + L).to_bytes(32, "little")
    assert OWNER.public.verify(b"message", signature)
    assert not OWNER.public.verify(b"message", restated)


@pytest.mark.parametrize("size", [0, 32, 63, 65, 128])
def test_a_signature_of_another_length_is_refused(size: int) -> None:
    assert not OWNER.public.verify(b"m", bytes(size))


def test_every_flipped_bit_of_a_signature_is_refused() -> None:
    signature = OWNER.sign(b"message")
    for bit in range(512):
        flipped = bytearray(signature)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not OWNER.public.verify(b"message", bytes(flipped))


def add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Affine addition on edwards25519."""
    (x1, y1), (x2, y2) = a, b
    t = D * x1 * x2 * y1 * y2 % P
    return (x1 * y2 + x2 * y1) * pow(1 + t, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - t, -1, P) % P


def times(count: int, point: tuple[int, int]) -> tuple[int, int]:
    total = (0, 1)
    while count:
        if count & 1:
            total = add(total, point)
        point, count = add(point, point), count >> 1
    return total


def lift(y: int) -> tuple[int, int] | None:
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * pow(2, (P - 1) // 4, P) % P
    return (x, y) if x * x % P == square else None


def torsion() -> set[tuple[int, int]]:
    """The eight points whose order divides 8: multiples of L P for a point P outside the prime subgroup."""
    for y in range(2, 100):
        point = lift(y)
        if point is not None:
            generator = times(L, point)
            group = {times(k, generator) for k in range(8)}
            if len(group) == 8:
                return group
    raise AssertionError("no generator found")


def test_all_eight_points_of_small_order_are_refused_as_keys() -> None:
    group = torsion()
    assert all(times(8, point) == (0, 1) for point in group)
    for x, y in group:
        with pytest.raises(Tampered, match="small order"):
            PublicKey((y | (x & 1) << 255).to_bytes(32, "little"))


@pytest.mark.parametrize("excess", [0, 1, 2, 3, 18])
def test_a_key_that_is_not_reduced_is_refused(excess: int) -> None:
    for sign in (0, 1):
        with pytest.raises(Tampered, match="canonical"):
            PublicKey((P + excess | sign << 255).to_bytes(32, "little"))


def test_a_key_off_the_curve_is_refused() -> None:
    y = next(y for y in range(2, 100) if lift(y) is None)
    with pytest.raises(Tampered, match="not a point of the curve"):
        PublicKey(y.to_bytes(32, "little"))


@pytest.mark.parametrize("text", ["", "00", "D75A" + "00" * 30, "zz" * 32, " " + "ab" * 32, "ab" * 33])
def test_a_key_has_one_spelling(text: str) -> None:
    with pytest.raises(Tampered):
        PublicKey.from_hex(text)


def test_keys_compare_by_value_and_signers_hide() -> None:
    assert PublicKey(OWNER.public.raw) == OWNER.public != WRITER.public
    assert len({OWNER.public, PublicKey(OWNER.public.raw)}) == 1
    assert OWNER.public.key_id == hashlib.sha256(OWNER.public.raw).hexdigest()
    assert (b"\x01" * 32).hex() not in repr(OWNER)
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(OWNER)


def test_the_pre_authentication_encoding_is_that_of_the_dsse_specification() -> None:
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("http://example.com/HelloWorld", b"hello world") == expected


def test_an_envelope_gives_back_what_was_signed() -> None:
    envelope = sign_envelope(b'{"a":1}', RECORD_TYPE, OWNER)
    assert open_envelope(envelope, RECORD_TYPE, OWNER.public) == b'{"a":1}'
    value = json.loads(envelope)
    signature = base64.b64decode(value["signatures"][0]["sig"])
    assert OWNER.public.verify(pae(RECORD_TYPE, b'{"a":1}'), signature)


def test_an_envelope_of_another_key_or_type_is_refused() -> None:
    envelope = sign_envelope(b"{}", RECORD_TYPE, OWNER)
    with pytest.raises(Tampered, match="not by the owner") as caught:
        open_envelope(envelope, RECORD_TYPE, STRANGER.public)
    assert caught.value.code == "DP072"
    with pytest.raises(Tampered, match="envelope of type"):
        open_envelope(envelope, STATEMENT_TYPE, OWNER.public)


def bent(change: Any) -> bytes:
    value = json.loads(sign_envelope(b"{}", RECORD_TYPE, OWNER))
    change(value)
    return encode(value)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(extra=1),
        lambda v: v.pop("payload"),
        lambda v: v.update(payload=None),
        lambda v: v.update(payload=v["payload"].rstrip("=")),
        lambda v: v.update(payload="e3 0="),
        lambda v: v.update(payload="e31="),  # other unused bits, same bytes
        lambda v: v.update(signatures=[]),
        lambda v: v.update(signatures=v["signatures"] * 2),
        lambda v: v.update(signatures="x"),
        lambda v: v.update(signatures=["x"]),
        lambda v: v["signatures"][0].pop("keyid"),
        lambda v: v["signatures"][0].update(alg="none"),
        lambda v: v["signatures"][0].update(sig=""),
        lambda v: v["signatures"][0].update(keyid=STRANGER.public.key_id),
        lambda v: v["signatures"][0].update(sig=base64.b64encode(STRANGER.sign(pae(RECORD_TYPE, b"{}"))).decode()),
    ],
)
def test_a_bent_envelope_is_refused(change: Any) -> None:
    with pytest.raises(Tampered):
        open_envelope(bent(change), RECORD_TYPE, OWNER.public)


def test_an_envelope_with_a_space_is_refused() -> None:
    envelope = sign_envelope(b"{}", RECORD_TYPE, OWNER)
    with pytest.raises(Tampered):
        open_envelope(envelope.replace(b":", b": ", 1), RECORD_TYPE, OWNER.public)


@pytest.mark.parametrize("text", ["====", "A", "AA", "AAA", "AB==", "AAB=", "AA==\n", "A-_=", "é", None, 5, ["AA=="]])
def test_base64_has_one_spelling(text: object) -> None:
    with pytest.raises(Tampered):
        strict_base64(text)


def test_the_note_of_the_go_checksum_database_verifies() -> None:
    # golang.org/x/mod/sumdb/note, the example of the package's documentation.
    vkey = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    text = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
    signature = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
    name, digest, data = vkey.split("+", 2)
    key = PublicKey(base64.b64decode(data)[1:])
    blob = base64.b64decode(signature)
    assert key_hash(name, key).hex() == digest
    assert blob[:4].hex() == digest
    assert key.verify(text.encode(), blob[4:])


LEDGER = "0123456789abcdef" * 4


def test_a_head_is_a_checkpoint_note() -> None:
    head = sign_head(LEDGER, 7, b"\x05" * 32, WRITER)
    lines = head.note.split("\n")
    assert lines[0] == origin_of(LEDGER) == "dpbudget.ledger/0123456789abcdef"
    assert lines[1:4] == ["7", base64.b64encode(b"\x05" * 32).decode(), ""]
    assert lines[4].startswith(f"— {lines[0]} ")
    assert lines[5:] == [""]
    assert read_head(head.note.encode(), LEDGER, WRITER.public) == head
    assert str(head) == f"7:{'05' * 32}"
    name, digest, key = verifier_key(LEDGER, WRITER.public).split("+", 2)
    assert name == origin_of(LEDGER)
    assert base64.b64decode(key) == b"\x01" + WRITER.public.raw
    assert digest == hashlib.sha256(name.encode() + b"\n\x01" + WRITER.public.raw).hexdigest()[:8]


def test_every_changed_byte_of_a_note_is_refused() -> None:
    note = sign_head(LEDGER, 12, b"\x05" * 32, WRITER).note.encode()
    for at in range(len(note)):
        for mask in (0x01, 0x20):
            changed = note[:at] + bytes([note[at] ^ mask]) + note[at + 1 :]
            with pytest.raises(Tampered):
                read_head(changed, LEDGER, WRITER.public)


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n + "\n",
        lambda n: n[:-1],
        lambda n: n + n.split("\n\n")[1],  # a second signature
        lambda n: n.replace("\n7\n", "\n07\n"),
        lambda n: n.replace("\n7\n", "\n7\nextension\n"),
        lambda n: n.replace("\n", "\r\n"),
        lambda n: "",
        lambda n: n * 40,
    ],
)
def test_a_note_of_another_form_is_refused(change: Any) -> None:
    note = sign_head(LEDGER, 7, b"\x05" * 32, WRITER).note
    with pytest.raises(Tampered):
        read_head(change(note).encode(), LEDGER, WRITER.public)


def test_a_head_of_another_ledger_or_writer_is_refused() -> None:
    head = sign_head(LEDGER, 7, b"\x05" * 32, WRITER)
    with pytest.raises(Tampered, match="belongs to"):
        read_head(head.note.encode(), "f" * 64, WRITER.public)
    with pytest.raises(Tampered, match="not the writer's"):
        read_head(head.note.encode(), LEDGER, STRANGER.public)
