"""Checkpoints with signature lines of other keys, cosignatures of witnesses, and the text form of keys."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable

import pytest
from ledgerkit import OWNER, STRANGER, WRITER, lived_in_ledger

from dpbudget.errors import Tampered
from dpbudget.ledger.head import (
    MAX_CHECKPOINT_BYTES,
    VerifierKey,
    check_cosignature,
    parse_verifier_key,
    read_checkpoint,
    read_head,
    sign_head,
    verifier_key,
)
from dpbudget.ledger.signing import Ed25519Signer

LEDGER = "ab" * 32
HEAD = sign_head(LEDGER, 7, bytes(range(32)), WRITER)
WITNESS, WITNESS_NAME, TIME = Ed25519Signer.from_seed(b"\x07" * 32), "witness.example/w1", 1679315147
WITNESS_KEY = str(VerifierKey(WITNESS_NAME, WITNESS.public, cosigner=True))


def line_of(name: str, blob: bytes) -> str:
    return f"— {name} {base64.b64encode(blob).decode()}\n"


def cosignature(time: int = TIME, text: str | None = None, *, name: str = WITNESS_NAME, said: int | None = None) -> str:
    """The line of the witness, written from C2SP tlog-cosignature."""
    body = HEAD.note.split("\n\n")[0] + "\n" if text is None else text
    signature = WITNESS.sign(f"cosignature/v1\ntime {time}\n{body}".encode())
    key_id = hashlib.sha256(name.encode() + b"\n\x04" + WITNESS.public.raw).digest()[:4]
    return line_of(name, key_id + (time if said is None else said).to_bytes(8, "big") + signature)


def note_of(*lines: str, head: str = HEAD.note) -> bytes:
    return (head + "".join(lines)).encode()


# --- the text form of keys --------------------------------------------------------------------------------------------

# The key of Go's checksum database and of its note package's example, and keys that public witnesses announce.
PUBLISHED = [
    ("sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8", False),
    ("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW", False),
    ("remora.n621.de+da77ade7+BOvN63jn/bLvkieywe8R6UYAtVtNbZpXh34x7onlmtw2", True),
    ("transparency.dev/DEV:witness-little-garden+d8042a87+BCtusOxINQNUTN5Oj8HObRkh2yHf/MwYaGX4CPdiVEPM", True),
    ("witness.navigli.sunlight.geomys.org+a3e00fe2+BNy/co4C1Hn1p+INwJrfUlgz7W55dSZReusH/GhUhJ/G", True),
]


@pytest.mark.parametrize(("text", "cosigner"), PUBLISHED)
def test_published_keys_are_read_and_written_back(text: str, cosigner: bool) -> None:
    key = parse_verifier_key(text)
    assert str(key) == text
    assert key.cosigner == cosigner
    assert key.name == text.split("+")[0]


def test_the_writers_key_is_read_back() -> None:
    ledger = lived_in_ledger()
    key = parse_verifier_key(ledger.witness_key)
    assert (key.name, key.key, key.cosigner) == (f"dpbudget.ledger/{ledger.id[:16]}", WRITER.public, False)
    assert verifier_key(ledger.id, WRITER.public) == str(key) == ledger.witness_key


def test_every_other_spelling_of_a_key_is_refused() -> None:
    """As Go's note package does: no proper part of the text and no changed character is a key."""
    text = PUBLISHED[1][0]
    for start in range(len(text)):
        for end in range(start, len(text) + 1):
            if (start, end) != (0, len(text)):
                with pytest.raises(Tampered):
                    parse_verifier_key(text[start:end])
    for at in range(len(text)):
        with pytest.raises(Tampered):
            parse_verifier_key(text[:at] + chr(ord(text[at]) + 1) + text[at + 1 :])


@pytest.mark.parametrize(
    "bend",
    [
        lambda text: text.replace("c74f20a3", "C74F20A3"),
        lambda text: text.replace("PeterNeumann", "Peter Neumann"),
        lambda text: text.replace("PeterNeumann", "Peter\u00a0Neumann"),
        lambda text: text + "\n",
        lambda text: text + "=",
        lambda text: "x" * 1000 + text,
        lambda text: "",
        lambda text: str(VerifierKey("n", OWNER.public)).replace("+AY", "+BY"),
        # ECDSA (0x02) and a post-quantum witness (0x06): one algorithm for every key.
        lambda text: "n+00000000+" + base64.b64encode(b"\x02" + bytes(64)).decode(),
        lambda text: "n+00000000+" + base64.b64encode(b"\x06" + bytes(64)).decode(),
        # A point of small order.
        lambda text: "n+00000000+" + base64.b64encode(b"\x01" + bytes(32)).decode(),
    ],
)
def test_a_bent_key_is_refused(bend: Callable[[str], str]) -> None:
    with pytest.raises(Tampered) as caught:
        parse_verifier_key(bend(PUBLISHED[1][0]))
    assert caught.value.code in {"DP080", "DP082"}


# --- lines of other keys ----------------------------------------------------------------------------------------------

OTHERS = [
    cosignature(),
    line_of("log.example/with-a-large-key", bytes(4) + bytes(2420)),
    line_of("ünïcode.example", b"12345"),
    # Our name with another key, and our key hash with another name: both are unknown keys (C2SP signed-note).
    line_of(f"dpbudget.ledger/{LEDGER[:16]}", b"\x00" * 68),
    line_of("other", base64.b64decode(HEAD.note.split(" ")[-1])),
]


def test_a_checkpoint_gives_the_head_that_the_ledger_keeps() -> None:
    text, ours = HEAD.note.split("\n\n")
    assert read_checkpoint(note_of(), LEDGER, WRITER.public) == HEAD == read_head(note_of(), LEDGER, WRITER.public)
    assert read_checkpoint(note_of(*OTHERS), LEDGER, WRITER.public) == HEAD
    mixed = f"{text}\n\n{OTHERS[1]}{OTHERS[0]}{ours}{OTHERS[2]}".encode()
    assert read_checkpoint(mixed, LEDGER, WRITER.public) == HEAD


def test_the_stored_head_stays_a_note_of_one_line() -> None:
    for other in OTHERS:
        with pytest.raises(Tampered):
            read_head(note_of(other), LEDGER, WRITER.public)


def test_sixteen_signatures_are_read_and_no_more() -> None:
    others = [line_of(f"key{at}", bytes(68)) for at in range(16)]
    assert read_checkpoint(note_of(*others[:15]), LEDGER, WRITER.public) == HEAD
    with pytest.raises(Tampered, match="at most 16"):
        read_checkpoint(note_of(*others), LEDGER, WRITER.public)


@pytest.mark.parametrize(
    "lines",
    [
        [HEAD.note.split("\n\n")[1]],  # twice ours
        ["\n"],
        ["— name \n"],
        ["— name AAAA\n"],  # fewer than 5 bytes
        ["— name AAAAAAB=\n"],
        ["— name AAAAAAA\n"],
        ["- name AAAAAAA=\n"],
        ["—  AAAAAAA=\n"],
        ["— a b AAAAAAA=\n"],
        ["— a+b AAAAAAA=\n"],
        ["— a\u2003b AAAAAAA=\n"],
        ["— a\x00 AAAAAAA=\n"],
        ["— a AAAAAAA=\r\n"],
        ["— a AAAAAAA="],
        ["— a AAAAAAA=\n", "\n"],
        [line_of("large", bytes(MAX_CHECKPOINT_BYTES))],
    ],
)
def test_a_line_that_is_not_well_formed_is_refused(lines: list[str]) -> None:
    with pytest.raises(Tampered):
        read_checkpoint(note_of(*lines), LEDGER, WRITER.public)


def test_a_checkpoint_without_the_writers_valid_line_is_refused() -> None:
    text = HEAD.note.split("\n\n")[0]
    theirs = sign_head(LEDGER, 7, bytes(range(32)), STRANGER).note
    for note in (f"{text}\n\n{cosignature()}".encode(), note_of(cosignature(), head=theirs)):
        with pytest.raises(Tampered, match="0 signatures"):
            read_checkpoint(note, LEDGER, WRITER.public)
    with pytest.raises(Tampered):
        read_checkpoint(note_of(cosignature()), "cd" * 32, WRITER.public)
    with pytest.raises(Tampered):
        read_checkpoint(note_of(), LEDGER, STRANGER.public)
    for note in (b"", b"\xff", HEAD.note.encode()[:-1], b"\n\n", f"{text}\nextension\n\n{OTHERS[0]}".encode()):
        with pytest.raises(Tampered):
            read_checkpoint(note, LEDGER, WRITER.public)


def test_every_changed_byte_of_text_and_own_line_is_refused() -> None:
    note = note_of(cosignature())
    for at in range(len(HEAD.note.encode())):
        changed = bytearray(note)
        changed[at] ^= 1
        with pytest.raises(Tampered):
            read_checkpoint(bytes(changed), LEDGER, WRITER.public)


# --- cosignatures -----------------------------------------------------------------------------------------------------


def test_a_cosignature_gives_its_time() -> None:
    assert check_cosignature(note_of(cosignature()), WITNESS_KEY) == TIME
    assert check_cosignature(note_of(*OTHERS), WITNESS_KEY) == TIME
    assert check_cosignature(note_of(cosignature(0)), WITNESS_KEY) == 0
    assert check_cosignature(note_of(cosignature(2**63 - 1)), WITNESS_KEY) == 2**63 - 1


EXAMPLE = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "— example.com/behind-the-sofa "
    "Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
    "— witness.example.com/w1 "
    "jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n"
)


def test_the_example_of_the_cosignature_specification_has_our_layout() -> None:
    # C2SP tlog-cosignature publishes no key with it; its text says time 1679315147.
    blob = base64.b64decode(EXAMPLE.strip().rsplit(" ", 1)[1])
    assert len(blob) == 4 + 8 + 64
    assert int.from_bytes(blob[4:12], "big") == TIME
    text = EXAMPLE.split("\n\n")[0] + "\n"
    # The witness of these tests cosigns the checkpoint of the example, between the lines that it has.
    assert check_cosignature((EXAMPLE + cosignature(text=text)).encode(), WITNESS_KEY) == TIME
    with pytest.raises(Tampered, match="0 signatures"):
        check_cosignature(EXAMPLE.encode(), WITNESS_KEY)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [cosignature(), cosignature()],
        [cosignature(), cosignature(TIME + 1)],
        [cosignature(said=TIME + 1)],
        [cosignature(name="witness.example/w2")],
        [cosignature(text="another text\n")],
        [cosignature(2**63)],
        [line_of(WITNESS_NAME, base64.b64decode(cosignature().split(" ")[-1])[:-1])],
        [line_of(WITNESS_NAME, base64.b64decode(cosignature().split(" ")[-1]) + b"\x00")],
        [line_of(WITNESS_NAME, base64.b64decode(cosignature().split(" ")[-1])[:5])],
    ],
)
def test_a_note_without_exactly_one_good_cosignature_is_refused(lines: list[str]) -> None:
    with pytest.raises(Tampered) as caught:
        check_cosignature(note_of(*lines), WITNESS_KEY)
    assert caught.value.code == "DP071"


def test_a_cosignature_of_another_text_or_key_is_refused() -> None:
    grown = sign_head(LEDGER, 8, bytes(range(32)), WRITER).note
    with pytest.raises(Tampered, match="does not verify"):
        check_cosignature(note_of(cosignature(), head=grown), WITNESS_KEY)
    with pytest.raises(Tampered, match="0 signatures"):
        check_cosignature(note_of(cosignature()), str(VerifierKey(WITNESS_NAME, STRANGER.public, cosigner=True)))
    with pytest.raises(Tampered, match="does not cosign") as caught:
        check_cosignature(note_of(cosignature()), str(VerifierKey(WITNESS_NAME, WITNESS.public)))
    assert caught.value.code == "DP080"
    with pytest.raises(Tampered):
        check_cosignature(b"no note", WITNESS_KEY)


def test_every_changed_byte_of_text_and_cosignature_is_refused() -> None:
    line = cosignature().encode()
    note = HEAD.note.encode() + line
    text = len(HEAD.note.split("\n\n")[0].encode()) + 1
    for at in (*range(text), *range(len(note) - len(line), len(note))):
        changed = bytearray(note)
        changed[at] ^= 1
        with pytest.raises(Tampered):
            check_cosignature(bytes(changed), WITNESS_KEY)
