"""The signed head: size and root of the ledger as a C2SP checkpoint in a signed note, so that standard tools read it.

::

    dpbudget.ledger/<first 16 hexadecimal digits of the ledger id>
    <size>
    <base64 of the root>

    — <origin> <base64 of key hash (4 bytes) || Ed25519 signature of the three lines above>
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass

from dpbudget._record import MAX_INTEGER
from dpbudget.errors import Tampered
from dpbudget.ledger.signing import PublicKey, Signer, strict_base64

# C2SP signed-note: signature type 0x01 is Ed25519.
_ED25519 = b"\x01"
_NOTE = re.compile(
    r"(?P<text>(?P<origin>dpbudget\.ledger/[0-9a-f]{16})\n(?P<size>0|[1-9][0-9]{0,15})\n(?P<root>[A-Za-z0-9+/]{43}=)\n)"
    r"\n— (?P<name>[\x21-\x7e]+) (?P<sig>[A-Za-z0-9+/=]+)\n"
)
MAX_NOTE_BYTES = 1024


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


def key_hash(name: str, key: PublicKey) -> bytes:
    """C2SP signed-note key hash: the first 4 bytes of SHA-256(name || 0x0A || 0x01 || key)."""
    return hashlib.sha256(name.encode("utf-8") + b"\n" + _ED25519 + key.raw).digest()[:4]


def verifier_key(ledger_id: str, key: PublicKey) -> str:
    """The writer's key in the form that witnesses and Go's sumdb/note read: name+hash+base64."""
    name = origin_of(ledger_id)
    return f"{name}+{key_hash(name, key).hex()}+{base64.b64encode(_ED25519 + key.raw).decode('ascii')}"


def sign_head(ledger_id: str, size: int, root: bytes, writer: Signer) -> Head:
    """The head of a ledger of ``size`` records, signed by the writer."""
    origin = origin_of(ledger_id)
    text = f"{origin}\n{size}\n{base64.b64encode(root).decode('ascii')}\n"
    blob = key_hash(origin, writer.public) + writer.sign(text.encode("utf-8"))
    return Head(size, root.hex(), f"{text}\n— {origin} {base64.b64encode(blob).decode('ascii')}\n")


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
