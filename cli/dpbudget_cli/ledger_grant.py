"""``dpbudget ledger grant`` and ``dpbudget ledger lower``: new totals, signed by the owner."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import click

from dpbudget.errors import InvalidParameter
from dpbudget_cli import _output as out
from dpbudget_cli._files import write_new
from dpbudget_cli._keys import shown
from dpbudget_cli._options import DELTA, EPSILON, JSON
from dpbudget_cli._owner import REQUEST, key_options, open_for_owner
from dpbudget_cli.ledger_show import standing_json
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget.ledger.ledger import Ledger
    from dpbudget.ledger.signing import Signer
    from dpbudget.ledger.state import LedgerState
    from dpbudget.plan import Budget

RAISED = (
    "What was released before keeps its own total; the new one is a guarantee only if this raise does not depend on it."
)


@click.command("grant", cls=Leaf)
@click.argument("path")
@click.option("--epsilon", type=EPSILON, metavar="E", help="The new total epsilon; as it was if not given.")
@click.option("--delta", type=DELTA, metavar="D", help="The new total delta; as it was if not given.")
@REQUEST
@key_options
@JSON
def grant(
    path: str,
    epsilon: float | None,
    delta: float | None,
    request: str | None,
    owner_key: str | None,
    writer_key: str | None,
    passphrase_fd: int | None,
    as_json: bool,
) -> None:
    """Raise the total of the ledger PATH. It is the owner's to sign, and verify says that it happened.

    Examples:
      dpbudget ledger grant budget.ledger --epsilon 5
      dpbudget ledger grant budget.ledger --epsilon 6 --delta 2e-5 --json
    """
    ledger, owner = _open(path, request, owner_key, writer_key, passphrase_fd)
    with ledger:
        before, after = _totals(ledger, epsilon, delta)
        if after.epsilon < before[0] or after.delta < before[1]:
            raise InvalidParameter(
                f"epsilon {after.epsilon:g} and delta {after.delta:g} are not above {before[0]:g} and {before[1]:g}",
                code="DP052",
                hint="take a budget back with dpbudget ledger lower",
            )
        charged = any(run.charged for run in ledger.state.runs.values())
        notes = [RAISED] if charged else []
        if after.epsilon > before[0] and _lacks_delta(ledger.state, after):
            notes.append(
                "warning: no delta is left, so no plan can use the new epsilon; raise it too: "
                f"dpbudget ledger grant {shown(path)} --delta D"
            )
        _change(ledger, after, owner, request)
        _report(ledger, before, notes, request, as_json)


@click.command("lower", cls=Leaf)
@click.argument("path")
@click.option("--epsilon", type=EPSILON, metavar="E", help="The new total epsilon; as it was if not given.")
@click.option("--delta", type=DELTA, metavar="D", help="The new total delta; as it was if not given.")
@REQUEST
@key_options
@JSON
def lower(
    path: str,
    epsilon: float | None,
    delta: float | None,
    request: str | None,
    owner_key: str | None,
    writer_key: str | None,
    passphrase_fd: int | None,
    as_json: bool,
) -> None:
    """Take back what is not in use of the ledger PATH. What is spent stays spent.

    Examples:
      dpbudget ledger lower budget.ledger --epsilon 4
      dpbudget ledger lower budget.ledger --epsilon 4 --json
    """
    ledger, owner = _open(path, request, owner_key, writer_key, passphrase_fd)
    with ledger:
        before, after = _totals(ledger, epsilon, delta)
        if after.epsilon > before[0] or after.delta > before[1]:
            raise InvalidParameter(
                f"epsilon {after.epsilon:g} and delta {after.delta:g} are not below {before[0]:g} and {before[1]:g}",
                code="DP052",
                hint="raise a budget with dpbudget ledger grant",
            )
        _change(ledger, after, owner, request)
        _report(ledger, before, [], request, as_json)


def _open(
    path: str, request: str | None, owner_key: str | None, writer_key: str | None, passphrase_fd: int | None
) -> tuple[Ledger, Signer | None]:
    """The ledger and the owner's key; for a request the ledger alone, opened for reading."""
    if request is None:
        return open_for_owner(path, owner_key, writer_key, passphrase_fd)
    from dpbudget._surface import open_ledger

    return open_ledger(path), None


def _lacks_delta(state: LedgerState, after: Budget) -> bool:
    """Whether the portfolios have all of delta, and none of them can take more epsilon."""
    if not state.portfolios:
        return False
    newest = state.portfolios[-1]
    taken = sum((Fraction(portfolio.delta) for portfolio in state.portfolios), Fraction(0))
    return Fraction(after.delta) <= taken and (newest.frozen or newest.epsilon is not None)


def _change(ledger: Ledger, after: Budget, owner: Signer | None, request: str | None) -> None:
    if owner is not None:
        ledger.change_budget(after, owner=owner)
    elif request is not None:
        write_new(request, ledger.request_budget(after))


def _totals(ledger: Ledger, epsilon: float | None, delta: float | None) -> tuple[tuple[float, float], Budget]:
    from dpbudget.plan import Budget

    before = ledger.state.epsilon, ledger.state.delta
    after = Budget(epsilon=before[0] if epsilon is None else epsilon, delta=before[1] if delta is None else delta)
    if (after.epsilon, after.delta) == before:
        raise InvalidParameter(
            f"the total is epsilon {before[0]:g} and delta {before[1]:g} already",
            code="DP064",
            hint="pass --epsilon or --delta with another value",
        )
    return before, after


def _report(ledger: Ledger, before: tuple[float, float], notes: list[str], request: str | None, as_json: bool) -> None:
    if request is not None:
        if as_json:
            out.emit_json({"request": request, "notes": notes})
        else:
            out.emit_table([("request", request)])
            out.talk(f"Nothing is written yet. The owner signs: dpbudget key sign {request} OUT --owner-key FILE")
        return
    state = ledger.state
    left = standing_json(ledger)["left"]
    if as_json:
        out.emit_json(
            {
                "epsilon": state.epsilon,
                "delta": state.delta,
                "before": {"epsilon": before[0], "delta": before[1]},
                "left": left,
                "head": str(ledger.head),
                "notes": notes,
            }
        )
        return
    out.emit_table(
        [
            ("budget", f"epsilon {state.epsilon:g}, delta {state.delta:g}"),
            ("before", f"epsilon {before[0]:g}, delta {before[1]:g}"),
            ("plannable", f"epsilon {left['epsilon']:.9g}, delta {left['delta']:.9g}"),
            ("head", ledger.head),
        ]
    )
    for note in notes:
        out.talk(note)
