"""``engine.accountant``: the ledger, looked at as Opacus looks at an accountant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from dptrainer.opacus._checkpoint import charged_of, refuse_unpaid
from dptrainer.opacus._options import unsupported
from dptrainer.opacus._spending import Spending


class LedgerAccountant:
    """What the engine's ledger has charged. Nothing can be added here, and nothing taken back.

    Args:
        spending: the engine's.
    """

    def __init__(self, spending: Spending) -> None:
        self._spending = spending

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """(noise multiplier, sampling rate, charged steps) of every run."""
        return self._spending.history()

    def __len__(self) -> int:
        """Steps charged."""
        return sum(steps for _, _, steps in self.history)

    def get_epsilon(self, delta: float | None = None) -> float:
        """See ``PrivacyEngine.get_epsilon``."""
        return self._spending.epsilon(delta)

    def mechanism(self) -> str:
        """``prv`` or ``rdp``: what certifies the plans."""
        return self._spending.accountant

    def state_dict(self) -> dict[str, Any]:
        """Charged steps by run."""
        return {"mechanism": "ledger", "history": self.history, "charged": charged_of(self._spending)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that this ledger has charged what the state says; it changes nothing.

        Raises:
            PrivacyViolation: it has not (DP051).
        """
        refuse_unpaid(self._spending, state_dict.get("charged", {}))

    def step(self, *, noise_multiplier: float, sample_rate: float) -> NoReturn:
        """Refused: steps are charged before they are drawn (DP065)."""
        raise unsupported(
            "accountant.step(): a step is charged by its loader before it is drawn", "iterate over the private loader"
        )
