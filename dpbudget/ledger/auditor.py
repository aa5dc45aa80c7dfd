"""An auditor's key: what noise keys are sealed to, and what opens them.

A sealed key is what HPKE would make of it, from three parts of ``cryptography``: an ephemeral X25519 key and the
auditor's give a shared secret; HKDF-SHA256 makes of it, with both public keys as the salt, a key that is used once, by
ChaCha20-Poly1305 with a nonce of zeros. Whatever stands beside it in the clear is authenticated.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat

from dpbudget.errors import Tampered, Unreadable
from dpbudget.ledger.keys import WRONG_KIND, load_private, protection, read_public, write_key_pair
from dpbudget.ledger.store.files import as_path

_INFO = b"dpbudget/sealed-key/v1"
_NONCE = bytes(12)


@dataclass(frozen=True)
class AuditorPublicKey:
    """The public half of an auditor's key, to which noise keys are sealed.

    Attributes:
        raw: 32 bytes of X25519 (RFC 7748).
    """

    raw: bytes

    def __post_init__(self) -> None:
        try:
            X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(self.raw))
        except ValueError:  # of another length, or of small order
            raise Tampered(f"X25519 public key {self.raw[:32].hex()} is unusable", code="DP080") from None

    @property
    def hex(self) -> str:
        """64 hexadecimal digits."""
        return self.raw.hex()

    def seal(self, secret: bytes, beside: bytes) -> tuple[bytes, bytes]:
        """An ephemeral public key, and ``secret`` encrypted so that only the auditor opens it.

        Args:
            secret: what to seal.
            beside: what the seal is about, in the clear; must be the same when it is opened.
        """
        own = X25519PrivateKey.generate()
        ephemeral = own.public_key().public_bytes_raw()
        key = _wrapping_key(own.exchange(X25519PublicKey.from_public_bytes(self.raw)), ephemeral, self.raw)
        return ephemeral, ChaCha20Poly1305(key).encrypt(_NONCE, secret, beside)


class AuditorKey:
    """The private half: opens what was sealed. Never printed, never pickled."""

    def __init__(self, key: X25519PrivateKey) -> None:
        self._key = key
        self._public = AuditorPublicKey(key.public_key().public_bytes_raw())

    @property
    def public(self) -> AuditorPublicKey:
        """The public half."""
        return self._public

    def open(self, ephemeral: bytes, sealed: bytes, beside: bytes) -> bytes:
        """What :meth:`AuditorPublicKey.seal` sealed.

        Raises:
            Tampered: it was sealed to another key, or changed since (DP085).
        """
        try:
            shared = self._key.exchange(X25519PublicKey.from_public_bytes(ephemeral))
            return ChaCha20Poly1305(_wrapping_key(shared, ephemeral, self._public.raw)).decrypt(_NONCE, sealed, beside)
        except (InvalidTag, ValueError):
            raise Tampered(
                "the sealed noise key does not open: it was changed, or sealed to another key",
                code="DP085",
                hint="use the auditor's key that the run was started with, and the file as it was written",
            ) from None

    def __repr__(self) -> str:
        return f"<AuditorKey of {self._public.hex}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an auditor's key is never pickled or copied")


def new_auditor_key(path: str | os.PathLike[str], passphrase: bytes | None = None) -> AuditorKey:
    """Make an auditor's key; the private half goes to ``path`` (mode 0600), the public half to ``path`` + ".pub".

    Raises:
        InvalidParameter: a file of either name exists (DP074), or an empty passphrase (DP073).
        Unreadable: the folder cannot be written (DP070).
    """
    encryption, key = protection(passphrase), AuditorKey(X25519PrivateKey.generate())
    pem = key._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    write_key_pair(path, pem, f"dpbudget-x25519 {key.public.hex}")
    return key


def load_auditor_key(path: str | os.PathLike[str], passphrase: bytes | None = None) -> AuditorKey:
    """The private key of a file that only its owner, this user, can read.

    Raises:
        UnsafeKeyFile: as :func:`dpbudget.load_key` (DP073).
        Unreadable: missing, no auditor's key, or a wrong or missing passphrase (DP070).
    """
    key = load_private(path, passphrase)
    if not isinstance(key, X25519PrivateKey):
        raise Unreadable(f"{as_path(path)} is no auditor's key", hint=WRONG_KIND["ed25519"])
    return AuditorKey(key)


def load_auditor_public_key(source: str | os.PathLike[str]) -> AuditorPublicKey:
    """The public half from a ``.pub`` file, its line ``dpbudget-x25519 <hex>``, or 64 hexadecimal digits.

    Raises:
        Unreadable: no such key (DP070).
        Tampered: nothing can be sealed to it (DP080).
    """
    return AuditorPublicKey(bytes.fromhex(read_public(source, "x25519")))


def _wrapping_key(shared: bytes, ephemeral: bytes, public: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=ephemeral + public, info=_INFO).derive(shared)
