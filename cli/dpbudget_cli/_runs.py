"""Which run of a ledger a command means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpbudget.errors import InvalidParameter, PlanExhausted

if TYPE_CHECKING:
    from dpbudget.ledger.state import LedgerState


def used_up(message: str, ledger: str) -> PlanExhausted:
    """The refusal of a step beyond a plan, with what to type next about the ledger."""
    return PlanExhausted(
        message,
        hint=f"stop here; whether some of the budget is left for another plan says dpbudget ledger show {ledger}",
    )


def choose_run(state: LedgerState, text: str | None, *, ledger: str, but: str | None = None) -> str:
    """The named run, else the only one with steps left; the newest where none has, which is refused later (DP050).

    Args:
        state: of the ledger.
        text: the run's id, or the beginning of it.
        ledger: its location, as it may be shown.
        but: a run that is not meant, whatever is left of it.

    Raises:
        InvalidParameter: there is none, or more than one (DP081).
    """
    from dpbudget_cli.plan_show import find_run

    if text is not None:
        return find_run(tuple(state.runs), text)
    runs = [run for run in state.runs.values() if run.run_id != but]
    unfinished = [run.run_id for run in runs if run.charged < run.plan.steps]
    if len(unfinished) == 1:
        return unfinished[0]
    if runs and not unfinished:
        return runs[-1].run_id
    if not unfinished:
        raise InvalidParameter(
            "no plan is signed into this ledger yet",
            code="DP081",
            hint=f"sign one in: dpbudget plan new --ledger {ledger}",
        )
    raise InvalidParameter(
        f"{len(unfinished)} runs of this ledger have steps left",
        code="DP081",
        hint=f"name one with --plan: {', '.join(f'{run} ({_left(state, run)})' for run in unfinished)}",
    )


def _left(state: LedgerState, run_id: str) -> str:
    """By which somebody tells one run from another: its length, and what is left of it."""
    run = state.runs[run_id]
    return f"{run.plan.steps - run.charged} of {run.plan.steps} steps left"
