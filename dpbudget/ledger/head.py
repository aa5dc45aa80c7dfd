"""The signed head: size and root of the ledger as a C2SP checkpoint in a signed note, so that standard tools read it.

::

    dpbudget.ledger/<first 16 hexadecimal digits of the ledger id>
    <size>
    <base64 of the root>

    — <origin> <base64 of key hash (4 bytes) || Ed25519 signature of the three lines above>

A store and an export hold the note with this one signature line. On its way a checkpoint may collect lines of other
keys (C2SP signed-note), such as cosignatures of witnesses (C2SP tlog-cosignature): :func:`read_checkpoint` and
:func:`check_cosignature` read those.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass

from dpbudget._record import MAX_INTEGER
from dpbudget.errors import Tampered
from dpbudget.ledger.signing import PublicKey, Signer, strict_base64

# C2SP signed-note, "Signature types": Ed25519 over the text, and timestamped Ed25519 of a witness.
_ED25519, _COSIGNATURE = b"\x01", b"\x04"
_NOTE = re.compile(
    r"(?P<text>(?P<origin>dpbudget\.ledger/[0-9a-f]{16})\n(?P<size>0|[1-9][0-9]{0,15})\n(?P<root>[A-Za-z0-9+/]{43}=)\n)"
    r"\n— (?P<name>[\x21-\x7e]+) (?P<sig>[A-Za-z0-9+/=]+)\n"
)
MAX_NOTE_BYTES = 1024
# Any log's checkpoint without extension lines; the text ends before the last empty line.
_CHECKPOINT = re.compile(r"(?P<origin>[^\x00-\x1f]+)\n(?P<size>0|[1-9][0-9]{0,15})\n(?P<root>[A-Za-z0-9+/]{43}=)\n")
_KEY_NAME = re.compile(r"[^\s+\x00-\x1f]+")  # no plus, no space of Unicode, no control character
_SIGNATURE_LINE = re.compile(r"— (?P<name>[^ ]+) (?P<sig>[A-Za-z0-9+/]+={0,2})")
#: Signature lines that a reader of signed notes must accept (C2SP signed-note, "Format"), and no more.
MAX_SIGNATURES = 16
#: Room for as many signatures of a post-quantum algorithm, of nearly 5 kB each before base64.
MAX_CHECKPOINT_BYTES = 1 << 17
_MAX_KEY_BYTES = 512


@dataclass(frozen=True)
class Head:
    """What an outsider remembers to recognise the ledger later.

    Attributes:
        size: number of records.
        root: Merkle root, 64 hexadecimal digits.
        note: the signed note, with its final line feed.
    """

    size: int
    root: str
    note: str

    def __str__(self) -> str:
        return f"{self.size}:{self.root}"


def origin_of(ledger_id: str) -> str:
    """The checkpoint origin and key name of a ledger."""
    return f"dpbudget.ledger/{ledger_id[:16]}"


@dataclass(frozen=True)
class VerifierKey:
    """A key with the name under which it signs notes.

    Attributes:
        name: what stands in its signature lines.
        key: the Ed25519 key.
        cosigner: whether it is a witness, whose signatures carry a time (type 0x04); else it signs the text (0x01).
    """

    name: str
    key: PublicKey
    cosigner: bool = False

    @property
    def hash(self) -> bytes:
        """The 4 bytes that begin its signatures."""
        return _key_hash(self.name, _COSIGNATURE if self.cosigner else _ED25519, self.key)

    def __str__(self) -> str:
        encoded = (_COSIGNATURE if self.cosigner else _ED25519) + self.key.raw
        return f"{self.name}+{self.hash.hex()}+{base64.b64encode(encoded).decode('ascii')}"


def key_hash(name: str, key: PublicKey) -> bytes:
    """C2SP signed-note key hash: the first 4 bytes of SHA-256(name || 0x0A || 0x01 || key)."""
    return _key_hash(name, _ED25519, key)


def _key_hash(name: str, kind: bytes, key: PublicKey) -> bytes:
    return hashlib.sha256(name.encode("utf-8") + b"\n" + kind + key.raw).digest()[:4]


def verifier_key(ledger_id: str, key: PublicKey) -> str:
    """The writer's key in the form that witnesses and Go's sumdb/note read: name+hash+base64."""
    return str(VerifierKey(origin_of(ledger_id), key))


def parse_verifier_key(text: str) -> VerifierKey:
    """The key in ``text``, of the form name+hash+base64 (C2SP signed-note, "Verifier keys"): inverse of ``str``.

    Raises:
        Tampered: another form, another algorithm than Ed25519 (types 0x01 and 0x04), a hash that is not the key's, or
            no key at all (DP080, DP082).
    """
    # The name has no plus sign, and base64 may have some.
    name, _, rest = text.partition("+") if len(text) <= _MAX_KEY_BYTES else ("", "", "")
    digest, _, encoded = rest.partition("+")
    data = strict_base64(encoded)
    if not _KEY_NAME.fullmatch(name) or data[:1] not in (_ED25519, _COSIGNATURE):
        raise Tampered(f"{text[:80]!r} is not an Ed25519 verifier key of the form name+hash+base64", code="DP082")
    found = VerifierKey(name, PublicKey(data[1:]), cosigner=data[:1] == _COSIGNATURE)
    if found.hash.hex() != digest:
        raise Tampered(f"the hash {digest[:16]!r} is not that of the verifier key of {name}", code="DP080")
    return found


def sign_head(ledger_id: str, size: int, root: bytes, writer: Signer) -> Head:
    """The head of a ledger of ``size`` records, signed by the writer."""
    origin = origin_of(ledger_id)
    text = f"{origin}\n{size}\n{base64.b64encode(root).decode('ascii')}\n"
    blob = key_hash(origin, writer.public) + writer.sign(text.encode("utf-8"))
    return Head(size, root.hex(), f"{text}\n— {origin} {base64.b64encode(blob).decode('ascii')}\n")


def key_hint(note: bytes) -> bytes:
    """The key hash that the last signature line of a note names; empty where there is none."""
    try:
        return base64.b64decode(note.rstrip(b"\n").rpartition(b" ")[2][:8])[:4]
    except ValueError:
        return b""


def read_head(note: bytes, ledger_id: str, writer: PublicKey) -> Head:
    """The head that ``writer`` signed for this ledger.

    Raises:
        Tampered: not in the one form of :func:`sign_head` (DP082), of another ledger, or not the writer's (DP071).
    """
    try:
        match = _NOTE.fullmatch(note.decode("utf-8")) if len(note) <= MAX_NOTE_BYTES else None
    except UnicodeDecodeError:
        match = None
    if match is None:
        raise Tampered("the head is not a signed checkpoint note", code="DP082")
    origin, size, root = match["origin"], int(match["size"]), strict_base64(match["root"])
    if origin != origin_of(ledger_id) or match["name"] != origin:
        raise Tampered(f"the head belongs to {origin}, the ledger is {origin_of(ledger_id)}")
    blob = strict_base64(match["sig"])
    text = match["text"].encode("utf-8")
    if size > MAX_INTEGER or blob[:4] != key_hash(origin, writer) or not writer.verify(text, blob[4:]):
        raise Tampered("the signature of the head is not the writer's")
    return Head(size, root.hex(), match[0])


def read_checkpoint(note: bytes, ledger_id: str, writer: PublicKey) -> Head:
    """The head that ``writer`` signed, out of a note that may carry signature lines of other keys.

    Those are ignored, as C2SP signed-note demands; they prove nothing here (:func:`check_cosignature` does). The head
    comes back with the note in the form that the ledger keeps, with the writer's line alone.

    Raises:
        Tampered: not a checkpoint note of at most 16 well-formed signature lines (DP082), another ledger's, or not
            signed by the writer exactly once (DP071).
    """
    text, lines = _split(note)
    ours = VerifierKey(origin_of(ledger_id), writer)
    blob = _signature_of(ours, lines)
    line = f"— {ours.name} {base64.b64encode(blob).decode('ascii')}\n"
    return read_head(f"{text}\n{line}".encode(), ledger_id, writer)


def check_cosignature(note: bytes, witness: str) -> int:
    """When a witness cosigned this checkpoint, in seconds since 1970-01-01 UTC (C2SP tlog-cosignature, Ed25519).

    A witness states that at this time the head was the largest consistent one that it had seen of this origin. The
    origin and the writer's signature are for :func:`read_checkpoint` to check.

    Args:
        note: a checkpoint with all its signature lines.
        witness: the witness's verifier key, name+hash+base64, got by another way than the note.

    Raises:
        Tampered: the key is not a witness's (DP080), the note is not a checkpoint (DP082), or it does not carry exactly
            one valid cosignature of this key (DP071).
    """
    key = parse_verifier_key(witness)
    if not key.cosigner:
        raise Tampered(f"the verifier key of {key.name} signs notes and does not cosign them", code="DP080")
    text, lines = _split(note)
    blob = _signature_of(key, lines)
    time, signature = int.from_bytes(blob[4:12], "big"), blob[12:]
    message = f"cosignature/v1\ntime {time}\n{text}".encode()
    # 2^63 - 1 is the last time that the format knows.
    if time >> 63 or not key.key.verify(message, signature):
        raise Tampered(f"the cosignature of {key.name} does not verify")
    return time


def _split(note: bytes) -> tuple[str, list[tuple[str, bytes]]]:
    """Text and signature lines of a checkpoint: names, and key hashes with signatures."""
    try:
        decoded = note.decode("utf-8") if len(note) <= MAX_CHECKPOINT_BYTES else ""
    except UnicodeDecodeError:
        decoded = ""
    text, blank, signatures = decoded.rpartition("\n\n")
    lines = signatures.split("\n")
    if not blank or not _CHECKPOINT.fullmatch(text + "\n") or lines.pop() or not 1 <= len(lines) <= MAX_SIGNATURES:
        raise Tampered("not a signed checkpoint note of at most 16 signatures", code="DP082")
    return text + "\n", [_signature_line(line) for line in lines]


def _signature_line(line: str) -> tuple[str, bytes]:
    match = _SIGNATURE_LINE.fullmatch(line)
    blob = strict_base64(match["sig"]) if match else b""
    if match is None or not _KEY_NAME.fullmatch(match["name"]) or len(blob) < 5:
        raise Tampered(f"{line[:80]!r} is not a signature line of a note", code="DP082")
    return match["name"], blob


def _signature_of(key: VerifierKey, lines: list[tuple[str, bytes]]) -> bytes:
    """Key hash and signature of the one line that claims to be ``key``'s; name and hash together name a key."""
    found = [blob for name, blob in lines if name == key.name and blob[:4] == key.hash]
    if len(found) != 1:
        raise Tampered(f"the note has {len(found)} signatures of {key.name}, not one")
    return found[0]
