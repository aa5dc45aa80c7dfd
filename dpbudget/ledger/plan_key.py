"""The plan key of a run whose noise is committed: made before the run, kept for its resume, never replaced.

Whoever has it, and the ledger, can remove all noise of the run. Its file is one line of canonical JSON::

    {"salt": 32 digits, "sealed": 96 digits, "type": "dpbudget-plan-key", "v": 1}

``sealed`` is the key under ChaCha20-Poly1305 with a nonce of zeros, beside the canonical bytes of the other fields; the
wrapping key is scrypt (N = 2^15, r = 8, p = 1) of the passphrase and the random salt, and so is used once.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from dpbudget._record import decode, encode
from dpbudget.errors import InvalidParameter, Tampered, Unreadable
from dpbudget.ledger.keys import read_private_file, write_key_pair
from dpbudget.ledger.noise_keys import KEY_BYTES, Lifetime, Secret, SecretKey
from dpbudget.ledger.store.files import as_path

_TYPE = {"type": "dpbudget-plan-key", "v": 1}
_NONCE = bytes(12)


class PlanKey(SecretKey):
    """The key K_plan that fixes all noise of one run, together with entropy that an auditor gives afterwards.

    It is held as other noise keys are: a fork drops it, ``repr`` and pickling refuse it, :meth:`wipe` overwrites it.
    """

    @property
    def commitment(self) -> str:
        """SHA-256("dpbudget/plan-key/v1" || 0x00 || K_plan), 64 hexadecimal digits; hiding, since K_plan is uniform."""
        return plan_commitment(self.reveal())

    def of_run(self, entropy: str, lifetime: Lifetime) -> RunKey:
        """The key that all step keys of the run are derived from."""
        return RunKey(bytearray(run_secret(self.reveal(), entropy)), self.commitment, lifetime)


class RunKey(SecretKey):
    """The key of a committed run while it trains; takes the place of the key of a lease and of those of its steps."""

    def __init__(self, key: bytearray, commitment: str, lifetime: Lifetime) -> None:
        super().__init__(key, lifetime)
        self.commitment = commitment

    def for_lease(self, lifetime: Lifetime) -> RunKey:
        """A copy that ends with a lease."""
        return RunKey(bytearray(self.reveal()), self.commitment, lifetime)

    def ratchet(self, count: int) -> SharedKey:
        """No ratchet: every step key follows from this key, on which the replay of any step rests."""
        return SharedKey(bytearray(self.reveal()), self.lifetime)


class SharedKey(Secret):
    """The key of a committed run, handed to each receipt as a copy of its own."""

    def take(self, offset: int) -> SecretKey:
        """A copy for one receipt, which erases it; raises ReceiptSpent (DP076) in a forked process and once erased."""
        return SecretKey(self._copy(0, KEY_BYTES), self.lifetime)


def plan_commitment(key: bytes) -> str:
    """What a commit record says of the plan key."""
    return hashlib.sha256(b"dpbudget/plan-key/v1\0" + key).hexdigest()


def run_secret(key: bytes, entropy: str) -> bytes:
    """HKDF-Extract with SHA-256 (RFC 5869, 2.2): the salt is the auditor's entropy, the secret the plan key."""
    return hmac.digest(bytes.fromhex(entropy), key, "sha256")


def new_plan_key(path: str | os.PathLike[str], passphrase: bytes) -> PlanKey:
    """Make a plan key and write it, encrypted, to a new file of mode 0600.

    Raises:
        InvalidParameter: the file exists (DP074), or the passphrase is empty (DP073).
        Unreadable: the folder cannot be written (DP070).
    """
    if not passphrase:
        raise InvalidParameter(
            "a plan key needs a passphrase: it can remove all noise of its run", code="DP073", hint="give one"
        )
    key, salt = PlanKey(bytearray(os.urandom(KEY_BYTES))), os.urandom(16)
    header = {**_TYPE, "salt": salt.hex()}
    sealed = ChaCha20Poly1305(_wrapping_key(passphrase, salt)).encrypt(_NONCE, key.reveal(), encode(header))
    write_key_pair(path, encode({**header, "sealed": sealed.hex()}) + b"\n", None)
    return key


def load_plan_key(path: str | os.PathLike[str], passphrase: bytes | None) -> PlanKey:
    """The plan key of a file that only its owner, this user, can read.

    Raises:
        UnsafeKeyFile: a symbolic link, not a regular file, of another user, or open to group or world (DP073).
        Unreadable: missing, no plan key, or a wrong or missing passphrase (DP070).
    """
    place = as_path(path)
    try:
        record = decode(read_private_file(place).removesuffix(b"\n"), max_depth=1)
        salt, sealed = _fields(record)
    except Tampered:
        raise Unreadable(f"{place} is no plan key", hint="make it with dpbudget ledger commit") from None
    if passphrase is None:
        raise Unreadable(f"the key {place} needs a passphrase", hint="give the passphrase that the key was made with")
    try:
        cipher = ChaCha20Poly1305(_wrapping_key(passphrase, salt))
        return PlanKey(bytearray(cipher.decrypt(_NONCE, sealed, encode({**_TYPE, "salt": salt.hex()}))))
    except InvalidTag:
        raise Unreadable(
            f"the plan key {place} does not open: the passphrase is wrong, or the file was changed",
            hint="give the passphrase that the key was made with",
        ) from None


def _fields(record: dict[str, object]) -> tuple[bytes, bytes]:
    salt, sealed = record.get("salt"), record.get("sealed")
    known = set(record) == {*_TYPE, "salt", "sealed"} and {name: record[name] for name in _TYPE} == _TYPE
    if not known or not isinstance(salt, str) or not isinstance(sealed, str):
        raise Tampered("another document")
    if not re.fullmatch("[0-9a-f]{32}", salt) or not re.fullmatch("[0-9a-f]{96}", sealed):
        raise Tampered("other digits")
    return bytes.fromhex(salt), bytes.fromhex(sealed)


def _wrapping_key(passphrase: bytes, salt: bytes) -> bytes:
    return Scrypt(salt=salt, length=32, n=1 << 15, r=8, p=1).derive(passphrase)
