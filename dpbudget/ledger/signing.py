"""Ed25519 keys and DSSE envelopes, as strictly as RFC 8032 allows.

One algorithm, one encoding: a key that is not a canonical point of large order, a signature whose S is not reduced, or
an envelope that is not byte for byte what :func:`sign_envelope` makes, is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from typing import NoReturn, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from dpbudget._record import decode, encode
from dpbudget.errors import InvalidParameter, Tampered
from dpbudget.ledger.entries import MAX_ENVELOPE_BYTES

RECORD_TYPE = "application/vnd.dpbudget.record.v1+json"
STATEMENT_TYPE = "application/vnd.in-toto+json"

# edwards25519 (RFC 8032 section 5.1): field, curve constant and group order.
_P = 2**255 - 19
_D = -121665 * pow(121666, -1, _P) % _P
_ORDER = 2**252 + 27742317777372353535851937790883648493
# The y coordinates of the eight points whose order divides 8: they verify signatures that nobody made.
_Y8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
_SMALL_ORDER_Y = frozenset({0, 1, _P - 1, _Y8, _P - _Y8})


class Verifier(Protocol):
    """Says whether a signature over a message was made with one key."""

    @property
    def key_id(self) -> str:
        """SHA-256 of the raw public key, 64 hexadecimal digits."""

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether ``signature`` is the key's over ``message``; never raises for bad input."""


class Signer(Protocol):
    """Signs with one Ed25519 key; the key itself may live in a file, an agent or a token."""

    @property
    def public(self) -> PublicKey:
        """The public half."""

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature of ``message``."""


class PublicKey:
    """A strict Ed25519 public key of 32 bytes.

    Raises:
        Tampered: not 32 bytes, not canonical, not on the curve, or of small order (DP080).
    """

    __slots__ = ("_key", "raw")

    def __init__(self, raw: bytes) -> None:
        problem = _key_problem(raw)
        if problem:
            raise Tampered(f"Ed25519 public key {bytes(raw)[:32].hex()} {problem}", code="DP080")
        self.raw = bytes(raw)
        self._key = Ed25519PublicKey.from_public_bytes(self.raw)

    @classmethod
    def from_hex(cls, text: str) -> PublicKey:
        """The key of 64 lower-case hexadecimal digits."""
        try:
            raw = bytes.fromhex(text)
        except ValueError:
            raw = b""
        if raw.hex() != text:
            raise Tampered(f"{text[:80]!r} is not a public key of 64 lower-case hexadecimal digits", code="DP080")
        return cls(raw)

    @property
    def hex(self) -> str:
        """The raw key, 64 hexadecimal digits."""
        return self.raw.hex()

    @property
    def key_id(self) -> str:
        """SHA-256 of the raw key, 64 hexadecimal digits."""
        return hashlib.sha256(self.raw).hexdigest()

    def verify(self, message: bytes, signature: bytes) -> bool:
        """RFC 8032 section 5.1.7 without cofactor; S below the group order, so nobody can restate a signature."""
        if len(signature) != 64 or int.from_bytes(signature[32:], "little") >= _ORDER:
            return False
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and other.raw == self.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"PublicKey({self.hex})"


def _key_problem(raw: bytes) -> str | None:
    if len(raw) != 32:
        return f"has {len(raw)} bytes instead of 32"
    y = int.from_bytes(raw, "little") & ((1 << 255) - 1)
    if y >= _P:
        return "is not in canonical form"
    if y in _SMALL_ORDER_Y:
        return "is a point of small order"
    # RFC 8032 section 5.1.3: x^2 = (y^2 - 1) / (d y^2 + 1) must be a square; the denominator is never zero.
    square = (y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P
    if pow(square, (_P - 1) // 2, _P) != 1:
        return "is not a point of the curve"
    return None


def check_signer(role: str, value: object) -> None:
    """Refuse what cannot sign, such as the name of a key file in place of the key (DP080); the value is not shown."""
    if not isinstance(getattr(value, "public", None), PublicKey) or not callable(getattr(value, "sign", None)):
        raise InvalidParameter(
            f"{role} is a {type(value).__name__}, not a key that can sign",
            code="DP080",
            hint=f'{role}=dpbudget.load_key("{role}.key")',
        )


class Ed25519Signer:
    """A private key held in this process; never printed and never pickled."""

    __slots__ = ("_key", "_public")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self._public = PublicKey(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    @classmethod
    def generate(cls) -> Ed25519Signer:
        """A new key from the operating system."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Ed25519Signer:
        """The key of a 32-byte seed (RFC 8032 section 5.1.5); for test vectors."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @property
    def public(self) -> PublicKey:
        """The public half."""
        return self._public

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of ``message`` (RFC 8032 section 5.1.6)."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"<Ed25519Signer of {self._public.hex}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is never pickled or copied")


def pae(payload_type: str, payload: bytes) -> bytes:
    """Pre-authentication encoding of DSSE version 1: what an envelope's signature covers."""
    kind = payload_type.encode("ascii")
    return b" ".join((b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload))


def sign_envelope(payload: bytes, payload_type: str, *signers: Signer) -> bytes:
    """The canonical DSSE envelope of ``payload`` with one signature of each signer, in order."""
    message = pae(payload_type, payload)
    signatures = [
        {"keyid": signer.public.key_id, "sig": base64.b64encode(signer.sign(message)).decode("ascii")}
        for signer in signers
    ]
    return encode(
        {
            "payload": base64.b64encode(payload).decode("ascii"),
            "payloadType": payload_type,
            "signatures": signatures,
        }
    )


def open_envelope(envelope: bytes, payload_type: str, *allowed: Verifier | Sequence[Verifier]) -> bytes:
    """The payload of an envelope that was signed as ``payload_type`` by exactly the keys in ``allowed``, in order.

    An element of ``allowed`` may be a sequence of keys of which one signs.

    Raises:
        Tampered: not canonical (DP082), another type or key (DP072), or a signature that does not verify (DP071).
    """
    value = decode(envelope, max_bytes=MAX_ENVELOPE_BYTES, max_depth=3)
    signatures = value.get("signatures")
    if set(value) != {"payload", "payloadType", "signatures"} or not isinstance(signatures, list):
        raise Tampered("not a DSSE envelope", code="DP082")
    if value["payloadType"] != payload_type:
        raise Tampered(f"envelope of type {str(value['payloadType'])[:80]!r}, expected {payload_type!r}", code="DP082")
    if len(signatures) != len(allowed):
        raise Tampered(f"an envelope with {len(signatures)} signatures, not {len(allowed)}", code="DP082")
    payload = strict_base64(value["payload"])
    message = pae(payload_type, payload)
    for signature, keys in zip(signatures, allowed, strict=True):
        _check_signature(signature, keys if isinstance(keys, Sequence) else (keys,), message)
    return payload


def _check_signature(signature: object, keys: Sequence[Verifier], message: bytes) -> None:
    if not isinstance(signature, dict) or set(signature) != {"keyid", "sig"}:
        raise Tampered("a signature of an envelope has keyid and sig", code="DP082")
    blob = strict_base64(signature["sig"])
    key = next((key for key in keys if key.key_id == signature["keyid"]), None)
    if key is None:
        raise Tampered(f"envelope signed by key {str(signature['keyid'])[:64]}, not by the owner", code="DP072")
    if not key.verify(message, blob):
        raise Tampered("the owner's signature does not verify")


def strict_base64(text: object) -> bytes:
    """Standard padded base64, accepted only in the one form that re-encodes to itself (DP082 otherwise)."""
    if isinstance(text, str):
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            data = None
        # Trailing bits that decoders ignore would make two spellings of one signature.
        if data is not None and base64.b64encode(data).decode("ascii") == text:
            return data
    raise Tampered("not canonical base64", code="DP082")
