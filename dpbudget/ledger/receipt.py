"""What a run hands to the trainer: the right to release one step, and the key of its noise.

A receipt exists only after the lease that holds its step was durably committed. It works once for each purpose, in the
process that took the lease, and never prints or pickles its key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import weakref
from dataclasses import dataclass, field
from typing import NoReturn

from dpbudget.errors import ReceiptSpent
from dpbudget.grid import Grid, grid_for
from dpbudget.mechanisms import Adjacency
from dpbudget.plan import NoiseMode

_live_keys: weakref.WeakSet[LeaseKey] = weakref.WeakSet()


class LeaseKey:
    """The 32-byte key K_run of one process and one lease, from ``os.urandom``.

    Its commitment stands in the lease record. The key leaves the process in no form: a crash loses it, a fork drops it,
    ``repr`` and pickling refuse it. Overwriting on :meth:`wipe` is best effort, since Python may have copied it.
    """

    # What an interrupt in the middle of __init__ leaves for __del__.
    _key: bytearray | None = None

    def __init__(self) -> None:
        self._key = bytearray(os.urandom(32))
        self._pid = os.getpid()
        _live_keys.add(self)

    @property
    def commitment(self) -> str:
        """SHA-256("dpbudget/lease-key/v1" || 0x00 || K_run), 64 hexadecimal digits; hiding, since K_run is uniform."""
        return hashlib.sha256(b"dpbudget/lease-key/v1\0" + self.reveal()).hexdigest()

    def reveal(self) -> bytes:
        """The key, for derivation only; raises ReceiptSpent (DP076) in a forked process and after :meth:`wipe`."""
        if os.getpid() != self._pid:
            self.wipe()
            raise ReceiptSpent(
                f"noise key of process {self._pid} asked for in process {os.getpid()}",
                code="DP076",
                hint="open the ledger in the process that trains; a fork would repeat its parent's noise",
            )
        held = self._key
        found = b"" if held is None else bytes(held)
        if held is None or self._key is not held:  # erased, perhaps while it was copied
            raise ReceiptSpent("the noise key of this lease was erased", code="DP076", hint="take the next receipt")
        return found

    def wipe(self) -> None:
        """Overwrite and drop the key (best effort)."""
        # Dropped first: an interrupt in between must not leave a key of zeros that works.
        held, self._key = self._key, None
        if held is not None:
            held[:] = bytes(len(held))

    def __del__(self) -> None:
        # A key lives as long as its run's current lease or a receipt of it, and no longer.
        self.wipe()

    def __repr__(self) -> str:
        return "<LeaseKey: hidden>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a lease key is never pickled or copied: a second holder would repeat its noise")


def _drop_keys_in_child() -> None:
    for key in list(_live_keys):
        key.wipe()


os.register_at_fork(after_in_child=_drop_keys_in_child)


@dataclass(frozen=True, eq=False)
class Receipt:
    """The right to release one charged step.

    Attributes:
        run_id: the run in the ledger.
        step: 0-based index of the step in the plan.
        steps: planned steps, T.
        rate_k: inclusion probability is ``rate_k / 2**64``.
        noise_multiplier: noise standard deviation / clipping norm.
        clip_norm: L2 bound C of every record's gradient.
        nominal_size: public dataset size n0; the divisor is ``rate * nominal_size``.
        max_parameters: largest number of trainable parameters.
        noise: mode of the plan's noise, ``secure`` or ``exact``.
        adjacency: neighbouring relation of the plan.
        plan_digest: SHA-256 of the signed plan statement.
        lease_nonce: 32 public random bytes of the lease.
        fresh: 16 bytes drawn from the operating system after the commit; they stand in the settle record.
        key: the lease's secret key.
    """

    run_id: str
    step: int
    steps: int
    rate_k: int
    noise_multiplier: float
    clip_norm: float
    nominal_size: int
    max_parameters: int
    noise: NoiseMode
    adjacency: Adjacency
    plan_digest: str
    lease_nonce: bytes
    fresh: bytes
    key: LeaseKey = field(repr=False)
    _used: dict[str, object] = field(default_factory=dict, repr=False)

    @property
    def rate(self) -> float:
        """Inclusion probability, exactly representable."""
        return self.rate_k / (1 << 64)

    @property
    def expected_batch_size(self) -> float:
        """Rate times public nominal size: the fixed divisor of the averaged gradient."""
        return self.rate * self.nominal_size

    @property
    def grid(self) -> Grid:
        """The integer grid of the step, of a plan with ``exact`` noise."""
        return grid_for(self.noise_multiplier, self.max_parameters)

    def use(self, purpose: str) -> bytes:
        """Mark the receipt as used for ``purpose`` and return the lease key for the derivation.

        Raises:
            ReceiptSpent: the receipt was used for this purpose before (DP077) or in a forked process (DP076).
        """
        key = self.key.reveal()
        # One atomic operation: of two threads that ask at once, one is refused.
        mine = object()
        if self._used.setdefault(purpose, mine) is not mine:
            raise ReceiptSpent(
                f"receipt of step {self.step} of run {self.run_id} was already used for {purpose}",
                hint="take a new receipt for every release; the same noise on two gradients cancels",
            )
        return key

    def was_used(self, purpose: str) -> bool:
        """Whether :meth:`use` was called for ``purpose``."""
        return purpose in self._used

    def __reduce__(self) -> NoReturn:
        raise TypeError("a receipt is never pickled or copied: it works once, in one process")


def commitment_matches(commitment: str, key: bytes) -> bool:
    """Whether a revealed key is the one that a lease committed to (constant time)."""
    expected = hashlib.sha256(b"dpbudget/lease-key/v1\0" + key).hexdigest()
    return hmac.compare_digest(expected, commitment)
