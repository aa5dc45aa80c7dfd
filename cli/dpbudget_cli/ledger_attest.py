"""``dpbudget ledger attest``: the final report, signed."""

from __future__ import annotations

import click

from dpbudget.curve import round_up, show_delta
from dpbudget.errors import Tampered, Unanchored
from dpbudget_cli import _output as out
from dpbudget_cli._documents import read_anchors
from dpbudget_cli._files import write_new
from dpbudget_cli._keys import PASSPHRASE_FD, load_signer, read_passphrases, shown
from dpbudget_cli._options import JSON
from dpbudget_cli.main import Leaf


@click.command("attest", cls=Leaf)
@click.argument("path")
@click.argument("target", metavar="OUT")
@click.option("--trust", required=True, metavar="KEY", help="The owner's public key: a .pub file or 64 digits.")
@click.option(
    "--key", "key_file", required=True, metavar="FILE", help="The key that signs: an auditor's, or the owner's."
)
@click.option(
    "--expect-head",
    multiple=True,
    metavar="HEAD",
    help="A head seen before, SIZE:ROOT or a checkpoint file. May be repeated.",
)
@PASSPHRASE_FD
@JSON
def command(
    path: str,
    target: str,
    trust: str,
    key_file: str,
    expect_head: tuple[str, ...],
    passphrase_fd: int | None,
    as_json: bool,
) -> None:
    """Verify the ledger PATH and write the verdict to the new file OUT, signed with your key (DSSE, in-toto).

    With --trust YOUR_KEY.pub, dpbudget verify reads OUT again. It is worth as much as your word; the ledger proves
    itself.

    Examples:
      dpbudget ledger attest budget.ledger report.dsse --trust budget.ledger.owner.key.pub --key owner.key
      dpbudget ledger attest budget.ledger r.dsse --trust budget.ledger.owner.key.pub --key owner.key --json
    """
    from dpbudget._attest import attest
    from dpbudget._verify import verify
    from dpbudget.ledger.keys import load_public_key

    signer = load_signer(key_file, read_passphrases(passphrase_fd))
    heads, notes = read_anchors(expect_head)
    report = verify(path, trust=load_public_key(trust), expect_head=heads, checkpoints=notes)
    if not report.ok:
        found = f"see all of it: dpbudget ledger verify {shown(path)}"
        if report.exit_code == Unanchored.exit_code:
            raise Unanchored(report.problems[0], hint=found)
        raise Tampered(f"the ledger does not hold: {report.problems[0]}", hint=found)
    data = attest(report, signer)
    write_new(target, data)
    if as_json:
        facts = {"attestation": target, "head": report.head, "signed_by": signer.public.hex}
        out.emit_json({**facts, "warnings": list(report.warnings)})
        return
    upper = round_up(report.epsilon.upper, 10) if report.epsilon else "unknown"
    out.emit_table(
        [
            ("attestation", target),
            ("epsilon", f"<= {upper} at delta {show_delta(report.delta or 0.0)}"),
            ("head", report.head),
            ("signed by", signer.public.hex),
        ]
    )
    for warning in report.warnings:
        click.echo(out.clean(f"  note: {warning}"))
