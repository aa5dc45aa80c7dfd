"""``dpbudget ledger commit`` and ``ledger entropy``: noise that nobody can choose, for a replay of the whole run."""

from __future__ import annotations

import os

import click

from dpbudget_cli import _output as out
from dpbudget_cli._keys import PASSPHRASE_FD, ask_passphrase, key_path, load_signer, read_passphrases, require_ledger
from dpbudget_cli._noise_keys import keep_options, kept_keys, open_plan_key
from dpbudget_cli._options import JSON
from dpbudget_cli._owner import open_for_writer
from dpbudget_cli.main import Leaf

_WRITER_KEY = click.option(
    "--writer-key", metavar="FILE", help="The writer's key; PATH.writer.key, else writer.key beside PATH."
)


@click.command("commit", cls=Leaf)
@click.argument("path")
@click.argument("run")
@click.option("--key-file", required=True, metavar="FILE", help="The plan key; it is made here if the file is missing.")
@keep_options
@_WRITER_KEY
@PASSPHRASE_FD
@JSON
def commit(
    path: str,
    run: str,
    key_file: str,
    keep_keys: str | None,
    auditor: str | None,
    writer_key: str | None,
    passphrase_fd: int | None,
    as_json: bool,
) -> None:
    """Commit RUN of the ledger PATH to one key for all its noise, before its first step. It is never replaced.

    The key is made in --key-file, under a passphrase, and can remove all noise of the run, together with the ledger.
    Give the head that is printed to an auditor; their answer is written by dpbudget ledger entropy. A copy of ledger
    and key file repeats the noise, so training needs --expect-head too (docs/threat-model.md).

    Examples:
      dpbudget ledger commit budget.ledger 3f9c --key-file plan.key
      dpbudget ledger commit budget.ledger 3f9c --key-file plan.key --keep-keys noise.sealed --auditor auditor.key.pub
    """
    from dpbudget._surface import open_ledger
    from dpbudget.ledger.committed import check_commit
    from dpbudget.ledger.plan_key import new_plan_key
    from dpbudget_cli.plan_show import find_run

    keep = kept_keys(keep_keys, auditor)
    require_ledger(path)
    passphrases = read_passphrases(passphrase_fd)
    writer = load_signer(key_path(writer_key, path, "writer"), passphrases)
    with open_ledger(path, writer=writer) as ledger:
        found = find_run(tuple(ledger.state.runs), run)
        check_commit(ledger.state, found)  # before a key is made for nothing
        if os.path.lexists(key_file):
            key = open_plan_key(key_file, passphrases)
        else:
            key = new_plan_key(key_file, passphrases[0] if passphrases else ask_passphrase(twice=True))
        ledger.commit(found, key, keep_keys=keep)
        facts = {"run": found, "commitment": key.commitment, "key": key_file, "head": str(ledger.head)}
    key.wipe()
    if as_json:
        out.emit_json({**facts, "kept": keep_keys})
        return
    out.emit_table(list(facts.items()))
    out.talk("Give the head to the auditor, and ask for 32 random bytes: dpbudget ledger entropy writes them.")
    out.talk(f"Keep {key_file}, in one place: without it the run cannot be started, and a copy repeats its noise.")


@click.command("entropy", cls=Leaf)
@click.argument("path")
@click.argument("run")
@click.option("--value", required=True, metavar="HEX", help="The auditor's 32 random bytes, 64 hexadecimal digits.")
@_WRITER_KEY
@PASSPHRASE_FD
@JSON
def entropy(path: str, run: str, value: str, writer_key: str | None, passphrase_fd: int | None, as_json: bool) -> None:
    """Write what an auditor gives to the noise of RUN, once, after the run was committed.

    The auditor draws it after the head of dpbudget ledger commit has reached them, for example by openssl rand -hex 32,
    and finds it again in dpbudget verify. The head that is printed here is the first one for --expect-head.

    Examples:
      dpbudget ledger entropy budget.ledger 3f9c --value HEX
      dpbudget ledger entropy budget.ledger 3f9c --value HEX --json
    """
    from dpbudget_cli.plan_show import find_run

    with open_for_writer(path, writer_key, passphrase_fd) as ledger:
        found = find_run(tuple(ledger.state.runs), run)
        ledger.add_entropy(found, value)
        facts = {"run": found, "entropy": value, "head": str(ledger.head)}
    if as_json:
        out.emit_json(facts)
        return
    out.emit_table(list(facts.items()))
    out.talk("Keep the head elsewhere: the run starts with --expect-head and the newest one that you know.")
