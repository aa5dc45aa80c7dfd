"""``dpbudget run``: hand ledger, run and key file to a script of your own, by the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpbudget.curve import round_up, show_delta
from dpbudget.errors import Unreadable
from dpbudget_cli import _output as out
from dpbudget_cli._keys import BY_DESCRIPTOR, ask_passphrase, key_path, read_passphrases, require_ledger, shown
from dpbudget_cli._keys import PASSPHRASE_FD as PASSPHRASES
from dpbudget_cli._launch import find_program, launch
from dpbudget_cli._options import JSON
from dpbudget_cli._runs import choose_run, used_up
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget.ledger.signing import Ed25519Signer
    from dpbudget.ledger.state import RunState


@click.command("run", cls=Leaf, context_settings={"allow_interspersed_args": False})
@click.option("--ledger", "path", required=True, metavar="PATH", help="The ledger that holds the plan.")
@click.option("--plan", "run_id", metavar="RUN", help="The run, if several have steps left.")
@click.option("--writer-key", metavar="FILE", help="PATH.writer.key or writer.key beside it if not given.")
@PASSPHRASES
@JSON
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND [ARG]...")
def command(
    path: str,
    run_id: str | None,
    writer_key: str | None,
    passphrase_fd: int | None,
    as_json: bool,
    words: tuple[str, ...],
) -> None:
    """Run COMMAND with a run of the ledger PATH in its environment; in it, dpbudget.start_from_environment() begins.

    The variables are DPBUDGET_LEDGER, DPBUDGET_RUN and DPBUDGET_WRITER_KEY, the path of the key and nothing of what
    is in it. No shell reads COMMAND; signals go to it, and its exit code is the exit code. With --json its standard
    output goes to standard error. Every process that starts the run takes steps of its own: under torchrun, start it
    where RANK is 0.

    Examples:
      dpbudget run --ledger budget.ledger -- python train.py
      dpbudget run --ledger budget.ledger --json -- python train.py --lr 0.1
    """
    from dpbudget._environment import LEDGER, PASSPHRASE_FD, RUN, WRITER_KEY

    require_ledger(path)
    key = key_path(writer_key, path, "writer")
    signer, secret = _opened(key, read_passphrases(passphrase_fd))
    before, _ = _look_up(path, run_id, signer)
    if before.charged >= before.plan.steps:
        raise used_up(f"run {before.run_id} has used up its {before.plan.steps} steps; nothing was run", shown(path))
    find_program(words[0])
    claim = before.plan.claim
    out.talk(f"run {before.run_id}: {before.charged} of {before.plan.steps} steps charged")
    out.talk(f"the plan claims epsilon {round_up(claim.epsilon)} at delta {show_delta(claim.delta)}")
    code = launch(
        words,
        {LEDGER: _absolute(path), RUN: before.run_id, WRITER_KEY: os.path.abspath(key)},
        to_stderr=as_json,
        secret=None if secret is None else (PASSPHRASE_FD, secret),
    )
    _report(before, *_look_up(path, before.run_id), code, as_json)
    sys.exit(code)


def _look_up(path: str, run_id: str | None, signer: Ed25519Signer | None = None) -> tuple[RunState, str]:
    """The run as it stands, and the ledger's head.

    Args:
        path: of the ledger.
        run_id: as :func:`choose_run`.
        signer: must be the ledger's writer, if given.

    Raises:
        InvalidParameter: there is no such run (DP081), or the key is not that of the ledger's writer (DP080).
    """
    from dpbudget.ledger.journal import check_writer
    from dpbudget.ledger.ledger import Ledger

    with Ledger.open(path) as ledger:
        if signer is not None:
            check_writer(ledger.state, signer)
        return ledger.state.runs[choose_run(ledger.state, run_id, ledger=shown(path))], str(ledger.head)


def _absolute(location: str) -> str:
    """A location that holds in every folder."""
    from dpbudget.ledger.store.postgres_url import is_database

    return location if is_database(location) else str(Path(location).absolute())


def _opened(key: str, given: tuple[bytes, ...]) -> tuple[Ed25519Signer, bytes | None]:
    """The writer's key, and the passphrase that opens it; None for a key without one.

    Raises:
        Unreadable: missing, unsafe, or no passphrase opens it (DP070, DP073).
    """
    from dpbudget.ledger.keys import load_key
    from dpbudget_cli._keys import _kept_passphrase

    try:
        return load_key(key), None
    except Unreadable as error:
        if "needs a passphrase" not in error.message:
            raise
        refusal = error
    tried = given
    if not tried and (kept := _kept_passphrase(key)) is not None:
        tried = (kept,)
    elif not tried and sys.stdin.isatty():
        tried = (ask_passphrase(),)
    if not tried:
        raise Unreadable(refusal.message, code=refusal.code, hint=BY_DESCRIPTOR)
    for passphrase in tried:
        try:
            return load_key(key, passphrase), passphrase
        except Unreadable as error:
            refusal = error
    raise refusal


def _report(before: RunState, after: RunState, head: str, code: int, as_json: bool) -> None:
    taken = after.charged - before.charged
    if not as_json:
        out.talk(f"run {after.run_id}: {after.charged} of {after.plan.steps} steps charged, {taken} meanwhile")
        out.talk(f"head {head}")
        return
    claim = after.plan.claim
    out.emit_json(
        {
            "run": after.run_id,
            "charged_before": before.charged,
            "charged": after.charged,
            "planned": after.plan.steps,
            "claim": {"epsilon": claim.epsilon, "delta": claim.delta},
            "head": head,
            "exit_code": code,
        }
    )
