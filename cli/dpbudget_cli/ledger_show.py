"""``dpbudget ledger show``: what was granted, planned and spent."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import click

from dpbudget.curve import round_up, show_delta
from dpbudget_cli import _output as out
from dpbudget_cli._options import JSON
from dpbudget_cli._standing import standing
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget.ledger.ledger import Ledger
    from dpbudget.ledger.state import LedgerState


@click.command("show", cls=Leaf)
@click.argument("path")
@JSON
def command(path: str, as_json: bool) -> None:
    """Show the budget, the portfolios and the runs of the ledger PATH, after checking every record.

    Spent is what the portfolios that began take, promised what the signed plans that did not begin claim together,
    plannable what the next plan may add. The numbers are those that the ledger states; ledger verify computes them
    again.

    Examples:
      dpbudget ledger show budget.ledger
      dpbudget ledger show budget.ledger --json
    """
    from dpbudget.ledger.ledger import Ledger

    with Ledger.open(path) as ledger:
        if as_json:
            out.emit_json(describe(ledger))
            return
        state, genesis = ledger.state, ledger.state.genesis
        out.emit_table(
            [
                ("id", ledger.id),
                ("budget", f"epsilon {state.epsilon:g}, delta {state.delta:g}"),
                ("filter", genesis.filter),
                *_standing_rows(ledger),
                ("adjacency", f"{genesis.adjacency} of one {genesis.unit}"),
                ("data", "declared public" if genesis.public_data else "private"),
                ("owner", state.owner.hex),
                ("writer", state.writer.hex),
                ("records", state.size),
                ("head", ledger.head),
            ]
        )
        show_runs(state)


def standing_json(ledger: Ledger) -> dict[str, Any]:
    """``spent``, ``promised`` and ``left`` (what is plannable); of an rdp ledger the total, since its orders decide."""
    return standing_of(ledger.state)


def standing_of(state: LedgerState) -> dict[str, Any]:
    """The same of a state alone."""
    from dpbudget.ledger.admission import plan_delta_of

    if state.account is not None:
        return {"spent": None, "promised": None, "left": {"epsilon": state.epsilon, "delta": state.delta}}
    return standing(state, plan_delta_of(state)).to_json()


def _standing_rows(ledger: Ledger) -> list[tuple[str, str]]:
    if ledger.state.account is not None:
        return [("left", _left_of_orders(ledger.state))]
    return standing(ledger.state, ledger.plan_delta).rows()


def _left_of_orders(state: LedgerState) -> str:
    """Of an rdp ledger, the order with the most room."""
    known = [row for row in orders_json(state) if row["spent"] is not None]
    if not known:
        return "nothing: no Renyi order bounds what is spent"
    best = max(known, key=lambda row: float(row["allowance"]) - float(row["spent"]))
    return f"at Renyi order {best['order']:g}, {best['spent']:.6g} of {best['allowance']:.6g} is spent"


def orders_json(state: LedgerState) -> list[dict[str, Any]]:
    """What every Renyi order of an rdp ledger has spent (rounded up) and may spend; empty for a portfolio ledger."""
    account = state.account
    if account is None:
        return []
    from dpbudget._renyi import COST_BITS

    rows = zip(account.terms.orders, account.spent, account.terms.allowances, strict=True)
    return [
        {
            "order": order,
            "spent": spent and math.nextafter(float(Fraction(spent, 1 << COST_BITS)), math.inf),
            "allowance": allowance,
        }
        for order, spent, allowance in rows
    ]


def show_runs(state: LedgerState) -> None:
    """One line for every signed plan."""
    if not state.runs:
        out.talk("no plan is signed in yet: dpbudget plan new")
        return
    headers = ("run", "portfolio", "epsilon", "delta", "noise", "rate", "charged", "planned")
    rows = []
    for run in state.runs.values():
        claim, phase = run.plan.claim, run.plan.phases[0]
        more = "…" if len(run.plan.phases) > 1 else ""
        rows.append(
            (
                run.run_id,
                run.portfolio,
                round_up(claim.epsilon),
                show_delta(claim.delta),
                f"{phase.noise_multiplier:.6g}{more}",
                f"{phase.rate:.6g}{more}",
                run.charged,
                run.plan.steps,
            )
        )
    out.emit_columns(headers, rows)


def runs_json(state: LedgerState) -> list[dict[str, Any]]:
    """The JSON form of the signed plans."""
    return [
        {
            "run": run.run_id,
            "portfolio": run.portfolio,
            "epsilon": run.plan.claim.epsilon,
            "delta": run.plan.claim.delta,
            "accountant": run.plan.claim.accountant,
            "phases": [
                {"sample_rate": phase.rate, "noise_multiplier": phase.noise_multiplier, "steps": phase.steps}
                for phase in run.plan.phases
            ],
            "clip_norm": run.plan.clip_norm,
            "noise": run.plan.noise,
            "dataset_size": run.plan.nominal_size,
            "planned": run.plan.steps,
            "charged": run.charged,
            "noise_keys": run.keys,
        }
        for run in state.runs.values()
    ]


def describe(ledger: Ledger) -> dict[str, Any]:
    """The JSON form of a whole ledger."""
    state, genesis = ledger.state, ledger.state.genesis
    return {
        "id": ledger.id,
        "budget": {"epsilon": state.epsilon, "delta": state.delta},
        "filter": genesis.filter,
        **standing_json(ledger),
        "orders": orders_json(state),
        "grants": [
            {"record": grant.seq, "epsilon": grant.epsilon, "delta": grant.delta, "charged_before": grant.charged}
            for grant in state.grants
        ],
        "adjacency": str(genesis.adjacency),
        "unit": genesis.unit,
        "public_data": genesis.public_data,
        "owner": state.owner.hex,
        "writer": state.writer.hex,
        "records": state.size,
        "head": str(ledger.head),
        "portfolios": [
            {"index": p.index, "delta": p.delta, "epsilon": p.epsilon, "claim": p.claim, "runs": list(p.runs)}
            for p in state.portfolios
        ],
        "runs": runs_json(state),
    }
