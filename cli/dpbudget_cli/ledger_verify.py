"""``dpbudget ledger verify``: check every record and recompute every number."""

from __future__ import annotations

import os
import stat

import click

from dpbudget.curve import round_up, show_delta
from dpbudget.errors import InvalidParameter, Unanchored
from dpbudget_cli import _output as out
from dpbudget_cli._options import JSON, POSITIVE
from dpbudget_cli.main import Leaf


@click.command("verify", cls=Leaf)
@click.argument("path")
@click.option("--trust", metavar="KEY", help="The owner's public key: a .pub file or 64 hexadecimal digits.")
@click.option(
    "--expect-head",
    multiple=True,
    metavar="HEAD",
    help="A head seen before, SIZE:ROOT or a checkpoint file, which must be part of this history. May be repeated.",
)
@click.option("--all-heads", is_flag=True, help="Check every head that the store kept, not the newest alone.")
@click.option("--time-limit", type=POSITIVE, metavar="SECONDS", help="Give up after this; 6 without a trusted key.")
@JSON
@click.pass_context
def command(
    ctx: click.Context,
    path: str,
    trust: str | None,
    expect_head: tuple[str, ...],
    all_heads: bool,
    time_limit: float | None,
    as_json: bool,
) -> None:
    """Replay every record of a ledger or an export and recompute its epsilon with two accountants.

    A signed verdict (ledger attest) is checked against the signer's key in --trust.
    Reads only. Exits with 0 if everything holds, 1 if something does not, 5 if it is valid but --expect-head is not
    part of it. Without --trust the owner's key is taken from the file, which proves nothing.

    Examples:
      dpbudget ledger verify budget.ledger
      dpbudget ledger verify budget.ledger --trust budget.ledger.owner.key.pub
    """
    from dpbudget._verify import verify
    from dpbudget.ledger.keys import load_public_key

    if _is_attestation(path):
        _show_attestation(path, trust, expect_head, as_json)
        return
    report = verify(
        path,
        trust=None if trust is None else load_public_key(trust),
        expect_head=expect_head,
        all_heads=all_heads,
        time_limit=time_limit,
    )
    if as_json:
        out.emit_json(report.to_json())
    else:
        for line in report.summary().splitlines():
            click.echo(out.clean(line))
    ctx.exit(report.exit_code)


def _is_attestation(path: str) -> bool:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return stat.S_ISREG(os.fstat(file.fileno()).st_mode) and file.read(11) == b'{"payload":'
    except (OSError, ValueError):
        return False


def _show_attestation(path: str, trust: str | None, expect_head: tuple[str, ...], as_json: bool) -> None:
    from dpbudget._attest import read_attestation
    from dpbudget.ledger.entries import MAX_ENVELOPE_BYTES
    from dpbudget.ledger.keys import load_public_key
    from dpbudget.ledger.store.files import as_path, read_regular

    if trust is None:
        raise InvalidParameter(
            "a signed verdict is worth as much as its signer's key",
            code="DP072",
            hint="pass --trust with the public key of whoever signed it, got by another way than this file",
        )
    found = read_attestation(read_regular(as_path(path), MAX_ENVELOPE_BYTES), load_public_key(trust))
    if any(head.strip() != found.head for head in expect_head):
        raise Unanchored(f"the verdict is about the head {found.head}", hint="verify the ledger itself for other heads")
    facts = {
        "signed": True,
        "ledger": found.ledger_id,
        "head": found.head,
        "filter": found.filter,
        "epsilon": {"lower": found.epsilon_lower, "upper": found.epsilon_upper},
        "delta": found.delta,
        "budget": {"epsilon": found.total_epsilon, "delta": found.total_delta},
        "steps": found.steps,
        "anchored": found.anchored,
        "checked_by": list(found.checked_by),
    }
    if as_json:
        out.emit_json({"ok": True, **facts})
        return
    click.echo(f"SIGNED VERDICT: epsilon <= {round_up(found.epsilon_upper, 10)} at delta {show_delta(found.delta)}")
    out.emit_table([(name, value) for name, value in facts.items() if name not in ("signed", "epsilon", "delta")])
    out.talk("This is the signer's word; verify the ledger with this head to see for yourself.")
