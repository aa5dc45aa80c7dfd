"""The ledger behind one engine: plans from Opacus's arguments, their runs, and what they have spent.

The one place of dptrainer that asks an accountant. Plans are for ``zero-out`` neighbours: Opacus takes the size of the
dataset as public, and under that relation it is. The dominating pair, and so epsilon, are those of Poisson add-remove.
"""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dpbudget import Adjacency, Budget, Ledger, Plan, calibrate, create_ledger, load_key, new_key, open_ledger, plan_for
from dpbudget import start as start_run
from dpbudget.errors import BudgetExceeded, InvalidParameter
from dpbudget.filters import PortfolioFilter, ledger_renyi
from dpbudget.ledger.renyi import steps_that_fit
from dpbudget.ledger.run import Run
from dpbudget.ledger.signing import Ed25519Signer
from dpbudget.ledger.state import LedgerState, RunState

log = logging.getLogger("dptrainer.opacus")

Place = str | os.PathLike[str]
Kind = Literal["portfolio", "rdp"]

#: What ``make_private`` grants where Opacus grants anything.
ASSUMED_EPSILON = 8.0
#: Longest plan that is signed where no number of steps is given.
_MOST_STEPS = 10**6
#: A composition of fewer steps takes seconds to bound; the table that the run carries has a bound for it.
_FEW_STEPS = 10
_said: set[str] = set()


def say_once(text: str) -> None:
    """Tell the user something about the set-up that holds for the whole process, the first time."""
    if text not in _said:
        _said.add(text)
        log.warning(text)


@dataclass(frozen=True)
class Draws:
    """How the private loader draws; every number is public.

    Attributes:
        size: number of records.
        rate: inclusion probability of every record: batch size / size, where it comes from a user's loader.
        steps: steps of an epoch, as many as the user's loader had batches.
    """

    size: int
    rate: float
    steps: int


class Spending:
    """One ledger, in memory or in a file, and its runs.

    Args:
        accountant: ``prv`` or ``rdp``; certifies the plans.
        place: file of the ledger; opened if it exists. None keeps it in memory.
        budget: what ``make_private`` may spend in all; None assumes one.
    """

    def __init__(self, accountant: Literal["prv", "rdp"], place: Place | None, budget: Budget | None) -> None:
        self.accountant = accountant
        self._place = None if place is None else Path(place)
        self._budget = budget
        self._owner: Ed25519Signer | None = None
        self._ledger: Ledger | None = None
        self._mine: list[Run] = []
        self._asked: tuple[float, tuple[tuple[str, int], ...]] | None = None
        self._answer = 0.0

    @property
    def ledger(self) -> Ledger | None:
        """The ledger; None before the first ``make_private``, where no file of it exists."""
        if self._ledger is None and self._place is not None and self._place.exists():
            self._keep(self._reopened(self._place))
        return self._ledger

    @property
    def state(self) -> LedgerState | None:
        """What the ledger says now."""
        ledger = self.ledger
        return None if ledger is None else ledger.state

    def fixed_run(self, draws: Draws, *, epsilon: float, delta: float, epochs: int, clip_norm: float) -> Run:
        """The run of a plan for ``epochs``, with the least noise that keeps it within (epsilon, delta).

        In a ledger of a file, a plan that an earlier process began goes on.

        Raises:
            BudgetExceeded: the ledger has no room for it beside what was spent (DP052).
        """
        plan = calibrate(
            epsilon=epsilon,
            delta=delta,
            dataset_size=draws.size,
            sample_rate=draws.rate,
            steps=epochs * draws.steps,
            clip_norm=clip_norm,
            adjacency=Adjacency.ZERO_OUT,
            accountant=self.accountant,
        )
        ledger = self._opened("portfolio", Budget(epsilon=epsilon, delta=delta))
        earlier = [run.run_id for run in ledger.state.runs.values() if run.plan == plan]
        free = [run_id for run_id in earlier if run_id not in {run.run_id for run in self._mine}]
        return self._start(ledger, free[-1] if free else self._sign(ledger, plan))

    def open_run(self, draws: Draws, *, noise_multiplier: float, clip_norm: float) -> Run:
        """The run of a plan that lasts as long as the budget does, for at most a million steps.

        Raises:
            BudgetExceeded: not one step fits (DP052), or the ledger holds plans of fixed length.
        """
        budget = self._budget or Budget(epsilon=ASSUMED_EPSILON, delta=_usual_delta(draws.size))
        ledger = self._opened("rdp", budget)
        if self._budget is None and self._place is None:
            log.warning(
                "make_private names no number of steps: assumed a budget of epsilon %g at delta %.3g for this engine; "
                "training stops where it ends. Other: PrivacyEngine(budget=dpbudget.Budget(epsilon=..., delta=...)).",
                budget.epsilon,
                budget.delta,
            )
        if ledger.state.account is None:
            raise BudgetExceeded(
                "this engine's ledger holds a plan of fixed length, from make_private_with_epsilon, and its budget is "
                "promised to it",
                hint="make_private needs an engine of its own, whose budget comes on top for the people in the data",
            )
        one = self._planned(draws, noise_multiplier, clip_norm, ledger.state.delta, 1)
        whole = one.replace(phases=(one.phases[0].replace(steps=_MOST_STEPS),))
        costs = ledger_renyi.costs(one, ledger.state.account.terms.orders)
        steps = steps_that_fit(ledger.state.account, "", whole, costs, _MOST_STEPS)
        if steps == 0:
            raise BudgetExceeded(
                f"not one step with noise multiplier {noise_multiplier:g} and sampling rate {draws.rate:.3g} fits "
                f"epsilon {ledger.state.epsilon:g} at delta {ledger.state.delta:.3g}",
                hint="more noise, a smaller batch, or PrivacyEngine(budget=dpbudget.Budget(epsilon=..., delta=...))",
            )
        plan = self._planned(draws, noise_multiplier, clip_norm, ledger.state.delta, steps)
        return self._start(ledger, self._sign(ledger, plan))

    def _planned(self, draws: Draws, sigma: float, clip_norm: float, delta: float, steps: int) -> Plan:
        return plan_for(
            noise_multiplier=sigma,
            delta=delta,
            dataset_size=draws.size,
            sample_rate=draws.rate,
            steps=steps,
            clip_norm=clip_norm,
            adjacency=Adjacency.ZERO_OUT,
            accountant=self.accountant,
        )

    def withdraw(self, run: Run) -> None:
        """Forget a run whose set-up failed. A ledger in memory that holds nothing else goes with it."""
        self._mine.remove(run)
        run.close()
        if self._ledger is not None and not self._ledger.durable and not self._mine and not self.history():
            self._ledger.close()
            self._ledger = None

    # ------------------------------------------------------------------ what was spent

    def epsilon(self, delta: float | None) -> float:
        """Epsilon at ``delta`` of every step that this ledger has charged.

        A ledger of plans of fixed length: a certified upper bound, *if stopping here had been planned*. A ledger of
        ``make_private``: the least epsilon whose Renyi filter would have admitted what was spent.

        Raises:
            InvalidParameter: delta is not in (0, 1) (DP002), or too small for the noise that was drawn (DP053).
        """
        if delta is not None:
            delta = Budget(epsilon=1.0, delta=delta).delta  # checked
        state = self.state
        if state is None:
            return 0.0
        delta = state.delta if delta is None else delta
        if state.account is not None:
            if not state.account.tails_fit(delta):
                raise InvalidParameter(
                    f"delta {delta:g} is too small for the bounded tail of the noise that was drawn",
                    code="DP053",
                    hint=f"ask for a larger delta; that of the ledger is {state.delta:.3g}",
                )
            return ledger_renyi.admitting_epsilon(state.account.spent, state.account.terms, delta)
        begun = tuple(run for run in state.runs.values() if run.charged)
        if len(begun) == 1 and begun[0].charged < _FEW_STEPS and begun[0].plan.claim.delta == delta:
            for run in self._mine:
                bounds = run.epsilon() if run.run_id == begun[0].run_id else None
                if bounds is not None:
                    return bounds.upper
        asked = (delta, tuple((run.run_id, run.charged) for run in begun))
        if asked != self._asked:
            self._asked, self._answer = asked, _certified(begun, delta)
        return self._answer

    def history(self) -> list[tuple[float, float, int]]:
        """(noise multiplier, sampling rate, charged steps) of every run, as Opacus's accountants keep them."""
        runs = [] if self.state is None else list(self.state.runs.values())
        return [
            (phase.noise_multiplier, phase.rate, phase.steps)
            for run in runs
            if run.charged
            for phase in run.plan.first(run.charged).phases
        ]

    # ------------------------------------------------------------------ the ledger

    def _opened(self, kind: Kind, budget: Budget) -> Ledger:
        """The ledger: the one that is open, that of the file, or a new one."""
        return self.ledger or self._keep(self._created(kind, budget))

    def _keep(self, ledger: Ledger) -> Ledger:
        self._ledger = ledger
        weakref.finalize(self, ledger.close)
        say_once(
            "privacy is for one record of a dataset whose size is public (zero-out neighbours), as in Opacus; "
            "epsilon equals that of adding or removing a record under Poisson sampling."
        )
        return ledger

    def _created(self, kind: Kind, budget: Budget) -> Ledger:
        place = self._place
        if place is None:
            self._owner, writer = Ed25519Signer.generate(), Ed25519Signer.generate()
        else:
            self._owner, writer = (new_key(name) for name in _key_files(place))
            log.warning("new ledger %s, with its keys in %s and %s.", place, *_key_files(place))
        return create_ledger(
            place,
            budget=budget,
            owner=self._owner,
            writer=writer,
            adjacency=Adjacency.ZERO_OUT,
            whole_budget=kind == "portfolio",
            kind=kind,
        )

    def _reopened(self, place: Path) -> Ledger:
        self._owner, writer = (load_key(name) for name in _key_files(place))
        return open_ledger(place, writer=writer, trust=self._owner.public)

    def _sign(self, ledger: Ledger, plan: Plan) -> str:
        assert self._owner is not None  # noqa: S101 - there is no ledger without it
        return ledger.sign_plan(plan, owner=self._owner)

    def _start(self, ledger: Ledger, run_id: str) -> Run:
        # A lease costs nothing in memory, so that what is charged is what was drawn.
        lease = None if ledger.durable else 1
        fixed = ledger.state.account is None
        run = start_run(ledger, run_id, lease_steps=lease) if fixed else ledger.start(run_id, lease_steps=lease)
        self._mine.append(run)
        return run


def steps_of_epoch(sample_rate: float) -> int:
    """Batches of an epoch: 1 / rate rounded up, where it is not a whole number up to the rounding of the rate."""
    inverse = 1.0 / sample_rate
    return round(inverse) if abs(inverse - round(inverse)) <= 1e-9 * inverse else math.ceil(inverse)


def _key_files(place: Path) -> tuple[Path, Path]:
    """Beside the ledger: the key that signs plans, and the one that signs what is spent."""
    return place.with_name(f"{place.name}.owner"), place.with_name(f"{place.name}.writer")


def _certified(runs: Sequence[RunState], delta: float) -> float:
    """Epsilon of the charged steps of several runs; plans of one portfolio were fixed together and compose jointly.

    A later portfolio may depend on the outputs of earlier ones: their epsilons add up, each at its share of delta.
    The sum is rounded up.
    """
    portfolios = sorted({run.portfolio for run in runs})
    parts = [[run.plan.first(run.charged) for run in runs if run.portfolio == index] for index in portfolios]
    share = math.nextafter(delta / len(parts), 0.0) if len(parts) > 1 else delta
    claims = [PortfolioFilter().joint_claim(plans, share) for plans in parts]
    return math.nextafter(math.fsum(claims), math.inf) if len(claims) > 1 else sum(claims)


def _usual_delta(size: int) -> float:
    return float(size) ** -1.1 if size > 1 else 0.5
