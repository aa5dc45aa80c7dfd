"""Secret keys of the noise, as one process holds them: never shown, gone in a forked child, overwritten after use.

The **ratchet** gives forward secrecy within a lease. From the lease's key K_0, whose commitment is in the ledger,
follow

    K_{t+1} = HMAC-SHA256(K_t, "next")          and the key of the lease's step t,  M_t = HMAC-SHA256(K_t, "step")

All M_t are computed when the lease is taken, and every K_t is overwritten; M_t leaves with the receipt of its step.
What memory shows at a step is the keys of receipts that are still held, and of steps that are still to come.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import weakref
from typing import NoReturn

from dpbudget.errors import ReceiptSpent

KEY_BYTES = 32
_ERASED = bytes(KEY_BYTES)
#: What a forked child must not take along.
_live: weakref.WeakSet[Lifetime] = weakref.WeakSet()


class KeyBytes(bytes):
    """The bytes of a key, for derivation and ciphers; as text, also among the variables of a traceback, they hide."""

    def __repr__(self) -> str:
        return f"<{len(self)} secret bytes>"

    __str__ = __repr__


class Lifetime:
    """How long some secrets may live: until their run or ledger is closed, and never in a forked child."""

    def __init__(self) -> None:
        self.ended = False
        # By identity, and no WeakSet, whose iteration fails where another thread adds to it.
        self._secrets: dict[int, weakref.ref[Secret]] = {}
        _live.add(self)

    def add(self, secret: Secret) -> None:
        """Hold a secret as long as this lasts; one that comes too late is erased at once."""
        self._secrets[id(secret)] = weakref.ref(secret)
        if self.ended:
            secret.wipe()

    def forget(self, secret: Secret) -> None:
        """A secret that nobody holds any more."""
        self._secrets.pop(id(secret), None)

    def end(self) -> None:
        """Erase all secrets, those on their way included; what an interrupt left undone is done by the next call."""
        self.ended = True
        for held in list(self._secrets.values()):
            secret = held()
            if secret is not None:
                secret.wipe()


class Secret:
    """Secret bytes that leave this process in no form: a crash loses them, a fork drops them, nothing copies them.

    Overwriting is best effort, since Python may have copied them.

    Attributes:
        lifetime: ends this secret and others of its lease.
    """

    # What an interrupt in the middle of __init__ leaves for __del__.
    _key: bytearray | None = None
    lifetime: Lifetime | None = None

    def __init__(self, key: bytearray, lifetime: Lifetime | None = None) -> None:
        self._key, self._pid = key, os.getpid()
        self.lifetime = Lifetime() if lifetime is None else lifetime
        self.lifetime.add(self)

    def check_process(self) -> None:
        """Refuse in a forked process (ReceiptSpent, DP076)."""
        if os.getpid() != self._pid:
            self.wipe()
            raise ReceiptSpent(
                f"noise key of process {self._pid} asked for in process {os.getpid()}",
                code="DP076",
                hint="open the ledger in the process that trains; a fork would repeat its parent's noise",
            )

    def wipe(self) -> None:
        """Overwrite and drop the bytes (best effort); idempotent."""
        # Dropped first: an interrupt in between must not leave a key of zeros that works.
        held, self._key = self._key, None
        if held is not None:
            held[:] = bytes(len(held))

    def __del__(self) -> None:
        self.wipe()
        if self.lifetime is not None:
            self.lifetime.forget(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: hidden>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a noise key is never pickled or copied: a second holder would repeat its noise")

    def _copy(self, first: int, count: int) -> bytearray:
        """Some of the bytes; raises ReceiptSpent (DP076) in a forked process and after :meth:`wipe`."""
        self.check_process()
        held = self._key
        found = bytearray() if held is None else held[first : first + count]
        if held is None or self._key is not held:  # erased, perhaps while it was copied
            raise ReceiptSpent("this noise key was erased", code="DP076", hint="take the next receipt")
        return found


class SecretKey(Secret):
    """A key of 32 bytes."""

    def reveal(self) -> KeyBytes:
        """The key, for derivation only; raises ReceiptSpent (DP076) in a forked process and after :meth:`wipe`."""
        return KeyBytes(self._copy(0, KEY_BYTES))

    def beside(self, key: bytes) -> SecretKey:
        """Another key that ends with the run of this one, or has ended with it."""
        return SecretKey(bytearray(key), self.lifetime)


class LeaseKey(SecretKey):
    """The key K_0 of one process and one lease, from ``os.urandom``; its commitment stands in the lease record."""

    def __init__(self, lifetime: Lifetime | None = None) -> None:
        super().__init__(bytearray(os.urandom(KEY_BYTES)), lifetime)

    @property
    def commitment(self) -> str:
        """SHA-256("dpbudget/lease-key/v1" || 0x00 || K_0), 64 hexadecimal digits; hiding, since K_0 is uniform."""
        return lease_commitment(self.reveal())

    def ratchet(self, count: int) -> StepKeys:
        """The keys of the lease's first ``count`` steps; whoever needs K_0 no more wipes it."""
        return StepKeys(run_ratchet(self.reveal(), count), self.lifetime)


class StepKeys(Secret):
    """The keys M_t of the steps of a lease, each of which leaves once."""

    def take(self, offset: int) -> SecretKey:
        """The key of the lease's step ``offset``, which is kept here no longer.

        Raises:
            ReceiptSpent: it was taken before (DP077), erased, or this is a forked process (DP076).
        """
        first = KEY_BYTES * offset
        taken = self._copy(first, KEY_BYTES)
        if not any(taken):
            raise ReceiptSpent(f"the key of step {offset} of the lease was taken", hint="take the next receipt")
        key, held = SecretKey(taken, self.lifetime), self._key
        if held is not None:
            held[first : first + KEY_BYTES] = _ERASED
        return key


def lease_commitment(key: bytes) -> str:
    """What a lease record says of its key."""
    return hashlib.sha256(b"dpbudget/lease-key/v1\0" + key).hexdigest()


def commitment_matches(commitment: str, key: bytes) -> bool:
    """Whether a revealed key is the one that a lease committed to (constant time)."""
    return hmac.compare_digest(lease_commitment(key), commitment)


def run_ratchet(key: bytes, count: int) -> bytearray:
    """The keys M_0 to M_{count-1} of a lease, one after the other, from its key K_0."""
    link, found = bytearray(key), bytearray(KEY_BYTES * count)
    try:
        for first in range(0, len(found), KEY_BYTES):
            found[first : first + KEY_BYTES] = hmac.digest(link, b"step", "sha256")
            link[:] = hmac.digest(link, b"next", "sha256")
    finally:
        link[:] = _ERASED
    return found


def _drop_in_child() -> None:
    for lifetime in list(_live):
        lifetime.end()


os.register_at_fork(after_in_child=_drop_in_child)
