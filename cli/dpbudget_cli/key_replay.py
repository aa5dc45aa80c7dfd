"""``dpbudget key replay``: open one sealed noise key, for an auditor who makes a step again."""

from __future__ import annotations

import click

from dpbudget_cli import _output as out
from dpbudget_cli._keys import PASSPHRASE_FD, load_auditor, read_passphrases
from dpbudget_cli._options import JSON, STEP
from dpbudget_cli.main import Leaf


@click.command("replay", cls=Leaf)
@click.argument("sealed")
@click.argument("target", metavar="OUT")
@click.option("--ledger", "path", required=True, metavar="PATH", help="The ledger of the run, or an export of it.")
@click.option("--auditor-key", required=True, metavar="FILE", help="The private key that SEALED is sealed to.")
@click.option("--step", type=STEP, required=True, metavar="T", help="The step, counted from 0.")
@click.option("--purpose", default="grad-noise", metavar="P", help="grad-noise (default), sampling or record-draws.")
@click.option("--run", "run_id", metavar="RUN", help="The run, if there are several.")
@click.option("--trust", metavar="KEY", help="The owner's public key: a .pub file or 64 hexadecimal digits.")
@PASSPHRASE_FD
@JSON
def command(
    sealed: str,
    target: str,
    path: str,
    auditor_key: str,
    step: int,
    purpose: str,
    run_id: str | None,
    trust: str | None,
    passphrase_fd: int | None,
    as_json: bool,
) -> None:
    """Open the noise key of one step in the file SEALED, and write it to the new file OUT (mode 0600).

    The ledger is checked first, and the key against what the ledger commits to. The key is never shown: that of
    grad-noise reveals the clipped sum of its step, that of sampling the records of its batch, that of record-draws what
    dropout and augmentation drew. dptrainer.replay makes batch and output again and compares; docs/recipes.md shows it.

    Examples:
      dpbudget key replay noise.sealed step.key --ledger budget.ledger --auditor-key auditor.key --step 0
      dpbudget key replay noise.sealed b.key --ledger b.ledger --auditor-key auditor.key --step 0 --purpose sampling
    """
    from dpbudget.ledger.keys import load_public_key
    from dpbudget.ledger.replay import RunReplay

    trusted = None if trust is None else load_public_key(trust)
    auditor = load_auditor(auditor_key, read_passphrases(passphrase_fd))
    replay = RunReplay.read(path, run_id, trust=trusted)
    found = replay.step_key(step, purpose, sealed=sealed, auditor=auditor)
    found.write(target)
    facts = {"key": target, "run": found.run_id, "step": found.step, "purpose": str(found.purpose)}
    if as_json:
        out.emit_json({**facts, "output": found.output, "trusted": trusted is not None})
        return
    out.emit_table([*facts.items(), ("output", found.output or "not recorded")])
    if trusted is None:
        out.talk("The owner's key was taken from the ledger itself, which proves nothing; pass --trust.")
    out.talk(f"Whoever has {target} can tell the clipped sum, or the batch, of the step: remove it when you are done.")
