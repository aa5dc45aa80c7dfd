"""``dpbudget key sign``: read what is asked for, and sign it, away from the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dpbudget.errors import InvalidParameter
from dpbudget_cli import _output as out
from dpbudget_cli._files import write_new
from dpbudget_cli._keys import PASSPHRASE_FD, load_signer, read_passphrases
from dpbudget_cli._options import JSON
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget.ledger.requests import Wish
    from dpbudget.ledger.state import LedgerState


@click.command("sign", cls=Leaf)
@click.argument("request")
@click.argument("target", metavar="OUT")
@click.option("--owner-key", required=True, metavar="FILE", help="The owner's key.")
@click.option("--ledger", "path", required=True, metavar="PATH", help="The ledger that it is for, or an export of it.")
@PASSPHRASE_FD
@JSON
def command(request: str, target: str, owner_key: str, path: str, passphrase_fd: int | None, as_json: bool) -> None:
    """Show what REQUEST asks for and write it, signed, to the new file OUT.

    All of it is checked first, by the ledger or by an export that was carried here: that it belongs there and nowhere
    else, that the ledger's claims are no less than what they cost, and that the plan claims what it costs. The owner's
    key can so stay on a machine of its own; dpbudget ledger apply writes OUT into the ledger.

    Examples:
      dpbudget key sign plan.request plan.signed --owner-key budget.ledger.owner.key --ledger budget.ledger
      dpbudget key sign plan.request plan.signed --owner-key budget.ledger.owner.key --ledger budget.ledger --json
    """
    from dpbudget.ledger.admission import check_owner
    from dpbudget.ledger.requests import MAX_REQUEST_BYTES, read_request, sign_request
    from dpbudget.ledger.store.files import as_path, read_regular

    data = read_regular(as_path(request), MAX_REQUEST_BYTES)
    wishes = read_request(data)
    state = _check(wishes, path)
    described = [_describe(wish, state.genesis.ledger_id) for wish in wishes]
    if not as_json:
        # Before the passphrase is asked for, so that whoever gives it has read this.
        for facts in described:
            out.emit_table(list(facts.items()))
    signer = load_signer(owner_key, read_passphrases(passphrase_fd))
    check_owner(state, signer)
    write_new(target, sign_request(data, signer, state))
    if as_json:
        out.emit_json({"signed": target, "by": signer.public.hex, "wishes": described})
    else:
        out.emit_table([("signed", target), ("by", signer.public.hex)])


def _check(wishes: list[Wish], path: str) -> LedgerState:
    """The ledger's state, once everything in the request is fit to be signed into it."""
    from dpbudget.filters import LedgerFilter
    from dpbudget.ledger.admission import check_frozen
    from dpbudget.ledger.ledger import Ledger
    from dpbudget.ledger.requests import check_numbers, check_place

    with Ledger.open(path) as ledger:
        state = ledger.state
    # What was frozen at less than it costs would be granted once more.
    check_frozen(state, LedgerFilter())
    for wish in wishes:
        check_place(wish, state)
        check_numbers(wish, state, LedgerFilter())
    return state


def _describe(wish: Wish, ledger_id: str) -> dict[str, Any]:
    """A wish in plain numbers; a plan that claims too little is refused (DP052)."""
    from dpbudget._record import hex_to_float
    from dpbudget._schedule import warn_of_delta
    from dpbudget.filters import LedgerFilter
    from dpbudget.ledger.claims import covers
    from dpbudget.ledger.requests import plan_of

    if wish.kind != "plan":
        described: dict[str, Any] = {"wish": "new totals" if wish.kind == "budget" else "another portfolio"}
        described |= {"ledger": ledger_id, "record": wish.facts["seq"], "after": wish.facts["prev"]}
        for name in ("index", "epsilon", "delta"):
            if name in wish.facts:
                value = wish.facts[name]
                described[name] = hex_to_float(value) if isinstance(value, str) else value
        return described
    plan = plan_of(wish)
    warn_of_delta(plan.claim.delta, plan.nominal_size)
    certified = LedgerFilter().joint_claim((plan,), plan.claim.delta)
    if not covers(plan.claim.epsilon, certified):
        raise InvalidParameter(
            f"the plan claims epsilon {plan.claim.epsilon!r}, and {certified!r} is what it costs",
            code="DP052",
            hint="do not sign it; let it be made again",
        )
    return {
        "wish": "a plan",
        "ledger": ledger_id,
        "run": wish.run_id,
        "epsilon": plan.claim.epsilon,
        "delta": plan.claim.delta,
        "adjacency": str(plan.adjacency),
        "unit": plan.unit,
        "dataset_size": plan.nominal_size,
        "steps": plan.steps,
        "phases": [[phase.rate, phase.noise_multiplier, phase.steps] for phase in plan.phases],
        "clip_norm": plan.clip_norm,
        "noise": plan.noise,
    }
