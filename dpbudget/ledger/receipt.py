"""What a run hands to the trainer: the right to release one step, and the key of its noise.

A receipt exists only after the lease that holds its step was durably committed. It works once for each purpose, in the
process that took the lease, and never prints or pickles its key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from dpbudget.errors import ReceiptSpent
from dpbudget.grid import Grid, grid_for
from dpbudget.ledger.noise_keys import SecretKey
from dpbudget.mechanisms import Adjacency
from dpbudget.plan import NoiseMode

#: The purposes of a step; after both of them its key is good for nothing.
_RELEASE = frozenset({"sampling", "grad-noise"})


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
        fresh: 16 bytes drawn from the operating system after the commit; they stand in the settle record. Zeros where
            the run's key is committed.
        key: the step's secret key; erased once both noise and sampling were derived from it, and with the receipt.
        committed: the key is that of the whole run, fixed before its first step.
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
    key: SecretKey = field(repr=False)
    committed: bool = False
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
        """Mark the receipt as used for ``purpose`` and return the step's key for the derivation.

        Raises:
            ReceiptSpent: the receipt was used for this purpose before (DP077), its key was erased with its run, or this
                is a forked process (DP076).
        """
        self.key.check_process()
        if purpose in self._used:
            raise self._spent(purpose)
        key = self.key.reveal()
        # One atomic operation: of two threads that ask at once, one is refused.
        mine = object()
        if self._used.setdefault(purpose, mine) is not mine:
            raise self._spent(purpose)
        if self._used.keys() >= _RELEASE:
            self.key.wipe()
        return key

    def _spent(self, purpose: str) -> ReceiptSpent:
        return ReceiptSpent(
            f"receipt of step {self.step} of run {self.run_id} was already used for {purpose}",
            hint="take a new receipt for every release; the same noise on two gradients cancels",
        )

    def was_used(self, purpose: str) -> bool:
        """Whether :meth:`use` was called for ``purpose``."""
        return purpose in self._used

    def __reduce__(self) -> NoReturn:
        raise TypeError("a receipt is never pickled or copied: it works once, in one process")
