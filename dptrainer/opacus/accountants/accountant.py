"""Accountants under Opacus's names: pure bookkeeping of (noise multiplier, sampling rate, steps), certified answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, ClassVar, Literal

from dpbudget import Adjacency, epsilon_of
from dpbudget.errors import InvalidParameter

_KNOWN = ("prv", "rdp")


class IAccountant:
    """Epsilon of steps that the caller reports. It charges nothing: training is charged by the engine's ledger.

    Attributes:
        history: (noise multiplier, sampling rate, steps), in order.
    """

    _mechanism: ClassVar[Literal["prv", "rdp"]]

    def __init__(self) -> None:
        self.history: list[tuple[float, float, int]] = []

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Count one step."""
        if self.history and self.history[-1][:2] == (noise_multiplier, sample_rate):
            sigma, rate, steps = self.history.pop()
            self.history.append((sigma, rate, steps + 1))
        else:
            self.history.append((noise_multiplier, sample_rate, 1))

    def get_epsilon(self, delta: float) -> float:
        """A certified upper bound at ``delta`` of what was counted, in real arithmetic; 0 for nothing.

        Raises:
            InvalidParameter: delta or a counted number is out of its range (DP002 to DP009).
        """
        if not self.history:
            return 0.0
        phases = [(rate, sigma, steps) for sigma, rate, steps in self.history]
        return epsilon_of(phases, delta=delta, adjacency=Adjacency.ZERO_OUT, accountant=self._mechanism).upper

    def __len__(self) -> int:
        """Steps counted."""
        return sum(steps for _, _, steps in self.history)

    @classmethod
    def mechanism(cls) -> str:
        """Name of the accountant."""
        return cls._mechanism

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[Any], None]:
        """A hook for ``optimizer.attach_step_hook`` that counts its steps here too."""

        def count(optimizer: Any) -> None:
            self.step(noise_multiplier=optimizer.noise_multiplier, sample_rate=sample_rate)

        return count

    def state_dict(self) -> dict[str, Any]:
        """What was counted, and by which accountant."""
        return {"history": deepcopy(self.history), "mechanism": self.mechanism()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, of either accountant: steps are steps.

        Raises:
            InvalidParameter: it has no history (DP091).
        """
        if not isinstance(state_dict, Mapping) or "history" not in state_dict:
            raise InvalidParameter(
                "the state has no history of steps", code="DP091", hint="pass what state_dict() returned"
            )
        self.history = [(float(sigma), float(rate), int(steps)) for sigma, rate, steps in state_dict["history"]]


class PRVAccountant(IAccountant):
    """Tight, by the privacy loss distribution, with proved bounds; the default everywhere."""

    _mechanism = "prv"


class RDPAccountant(IAccountant):
    """Renyi moments: looser, and simpler to audit."""

    _mechanism = "rdp"


class GaussianAccountant(IAccountant):
    """Opacus's ``gdp``, which may report less than is spent: refused."""

    def __init__(self) -> None:
        check_accountant("gdp")


def check_accountant(mechanism: object) -> Literal["prv", "rdp"]:
    """The name of an accountant whose answers may be claimed.

    Raises:
        InvalidParameter: another name, or one that may understate (DP061).
    """
    if mechanism == "prv":
        return "prv"
    if mechanism == "rdp":
        return "rdp"
    if mechanism == "gdp":
        raise InvalidParameter(
            'accountant "gdp" is a limit for infinitely many steps and may report less than is spent',
            code="DP061",
            hint="use prv, which is as tight and is an upper bound, or rdp",
        )
    raise InvalidParameter(
        f"unknown accountant {mechanism!r}", code="DP061", hint=f"choose one of {', '.join(_KNOWN)}; prv is the default"
    )


def create_accountant(mechanism: str) -> IAccountant:
    """The accountant of that name; raises InvalidParameter (DP061) for one that is not offered."""
    return PRVAccountant() if check_accountant(mechanism) == "prv" else RDPAccountant()
