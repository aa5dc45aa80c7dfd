"""``dpbudget key sign``: read what is asked for, and sign it, away from the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dpbudget.errors import InvalidParameter
from dpbudget_cli import _output as out
from dpbudget_cli._files import write_new
from dpbudget_cli._keys import PASSPHRASE_FD, load_signer, read_passphrases, shown
from dpbudget_cli._options import JSON
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget.ledger.requests import Wish
    from dpbudget.ledger.signing import Ed25519Signer


@click.command("sign", cls=Leaf)
@click.argument("request")
@click.argument("target", metavar="OUT")
@click.option("--owner-key", required=True, metavar="FILE", help="The owner's key.")
@click.option("--ledger", "path", metavar="PATH", help="The ledger or an export, to be checked; needed for rdp.")
@PASSPHRASE_FD
@JSON
def command(
    request: str, target: str, owner_key: str, path: str | None, passphrase_fd: int | None, as_json: bool
) -> None:
    """Show what REQUEST asks for and write it, signed, to the new file OUT. The ledger is not needed.

    A plan's claim is certified again before it is signed, and so are the costs and allowances of an rdp ledger. The
    owner's key can so stay on a machine of its own; dpbudget ledger apply writes OUT into the ledger.

    Examples:
      dpbudget key sign plan.request plan.signed --owner-key budget.ledger.owner.key
      dpbudget key sign plan.request plan.signed --owner-key budget.ledger.owner.key --json
    """
    from dpbudget.ledger.requests import MAX_REQUEST_BYTES, read_request, sign_request
    from dpbudget.ledger.store.files import as_path, read_regular

    data = read_regular(as_path(request), MAX_REQUEST_BYTES)
    wishes = read_request(data)
    shown = [_describe(wish) for wish in wishes]
    signer = load_signer(owner_key, read_passphrases(passphrase_fd))
    _check_numbers(wishes, path, signer)
    write_new(target, sign_request(data, signer))
    if as_json:
        out.emit_json({"signed": target, "by": signer.public.hex, "wishes": shown})
        return
    for facts in shown:
        out.emit_table(list(facts.items()))
    out.emit_table([("signed", target), ("by", signer.public.hex)])


def _check_numbers(wishes: list[Wish], path: str | None, signer: Ed25519Signer) -> None:
    """Check what the ledger claims so far, and the numbers of an rdp ledger by its orders (DP064 without it)."""
    from dpbudget.filters import LedgerFilter
    from dpbudget.ledger.admission import check_frozen
    from dpbudget.ledger.ledger import Ledger
    from dpbudget.ledger.requests import check_numbers

    numbered = [wish for wish in wishes if "costs" in wish.facts or wish.facts.get("allowances") is not None]
    if path is None:
        if numbered:
            raise InvalidParameter(
                "the request is for a ledger with the filter rdp, whose orders are needed to certify its numbers",
                code="DP064",
                hint="pass --ledger with the ledger or an export of it",
            )
        return
    with Ledger.open(path, trust=signer.public) as ledger:
        # What was frozen at less than it costs would be granted once more.
        check_frozen(ledger.state, LedgerFilter())
        for wish in wishes:
            if wish.kind == "plan" and wish.ledger_id != ledger.id:
                raise InvalidParameter(
                    f"the request is for the ledger {wish.ledger_id[:16]}…, and {shown(path)} is {ledger.id[:16]}…",
                    code="DP081",
                    hint="pass the ledger that it is for",
                )
            check_numbers(wish, ledger.state, LedgerFilter())


def _describe(wish: Wish) -> dict[str, Any]:
    """A wish in plain numbers; a plan that claims too little is refused (DP052)."""
    from dpbudget._record import hex_to_float
    from dpbudget.filters import LedgerFilter
    from dpbudget.ledger.claims import covers
    from dpbudget.ledger.requests import plan_of

    if wish.kind != "plan":
        described: dict[str, Any] = {"wish": "new totals" if wish.kind == "budget" else "another portfolio"}
        described |= {"record": wish.facts["seq"], "after": wish.facts["prev"]}
        for name in ("index", "epsilon", "delta"):
            if name in wish.facts:
                value = wish.facts[name]
                described[name] = hex_to_float(value) if isinstance(value, str) else value
        return described
    plan = plan_of(wish)
    certified = LedgerFilter().joint_claim((plan,), plan.claim.delta)
    if not covers(plan.claim.epsilon, certified):
        raise InvalidParameter(
            f"the plan claims epsilon {plan.claim.epsilon!r}, and {certified!r} is what it costs",
            code="DP052",
            hint="do not sign it; let it be made again",
        )
    return {
        "wish": "a plan",
        "ledger": wish.ledger_id,
        "run": wish.run_id,
        "epsilon": plan.claim.epsilon,
        "delta": plan.claim.delta,
        "adjacency": str(plan.adjacency),
        "dataset_size": plan.nominal_size,
        "steps": plan.steps,
        "phases": [[phase.rate, phase.noise_multiplier, phase.steps] for phase in plan.phases],
        "clip_norm": plan.clip_norm,
    }
