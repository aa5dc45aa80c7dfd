"""A run that another process chose: ``dpbudget run`` names its ledger and key file to a script by the environment."""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING

from dpbudget.errors import InvalidParameter, Unreadable

if TYPE_CHECKING:
    from dpbudget.ledger.ledger import Ledger
    from dpbudget.ledger.plan_key import PlanKey
    from dpbudget.ledger.run import Run
    from dpbudget.ledger.sealed import SealedKeys
    from dpbudget.ledger.signing import Ed25519Signer

#: The ledger's path or location, the id of the run, and the path of the writer's key: never what is in it.
LEDGER, RUN, WRITER_KEY = "DPBUDGET_LEDGER", "DPBUDGET_RUN", "DPBUDGET_WRITER_KEY"
#: A file descriptor from which the key's passphrase can be read once, if the key has one.
PASSPHRASE_FD = "DPBUDGET_PASSPHRASE_FD"  # noqa: S105 - the name of a variable that holds a number
_MAX_PASSPHRASE = 4096


def start_from_environment(
    *,
    passphrase: bytes | None = None,
    lease_steps: int | None = None,
    keep_keys: SealedKeys | None = None,
    plan_key: PlanKey | None = None,
    expect_head: str | None = None,
) -> Run:
    """The run that ``dpbudget run`` was called for, started as :func:`dpbudget.start` does.

    ::

        dpbudget run --ledger team.ledger -- python train.py

    and in ``train.py``::

        run = dpbudget.start_from_environment()
        model, optimizer, loader = dptrainer.make_private(model, optimizer, dataset, run=run)

    Run and ledger are closed when the process ends, or earlier by ``run.close()``. Each process that calls it gets
    steps of its own: of several workers only the one that trains should.

    Args:
        passphrase: of the writer's key, where ``dpbudget run`` does not hand it over.
        lease_steps: as for :func:`dpbudget.start`.
        keep_keys: as for :func:`dpbudget.start`.
        plan_key: as for :func:`dpbudget.start`.
        expect_head: as for :func:`dpbudget.start`.

    Raises:
        InvalidParameter: the environment names no ledger (DP064), or the ledger has no such run (DP081).
        Unreadable: ledger or key cannot be read (DP070, DP073).
        Tampered: the ledger does not hold (DP071).
    """
    from dpbudget._surface import open_ledger, start

    location, run_id, key = (_variable(name) for name in (LEDGER, RUN, WRITER_KEY))
    ledger = open_ledger(location, writer=_writer(key, passphrase))
    try:
        run = start(
            ledger, run_id, lease_steps=lease_steps, keep_keys=keep_keys, plan_key=plan_key, expect_head=expect_head
        )
    except BaseException:
        ledger.close()
        raise
    atexit.register(_close, run, ledger)
    return run


def _close(run: Run, ledger: Ledger) -> None:
    """At the end of the process; harmless where the script did it."""
    with ledger:
        run.close()


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise InvalidParameter(
            f"{name} is not set, so nothing says which run this script is for",
            code="DP064",
            hint="start the script with dpbudget run --ledger PATH -- python SCRIPT, or open the ledger in it: "
            "dpbudget.start(dpbudget.open_ledger(PATH, writer=dpbudget.load_key(KEY)))",
        )
    return value


def _writer(path: str, passphrase: bytes | None) -> Ed25519Signer:
    from dpbudget.ledger.keys import load_key

    if passphrase is None and PASSPHRASE_FD in os.environ:
        passphrase = _handed_over(os.environ[PASSPHRASE_FD])
    return load_key(path, passphrase)


def _handed_over(number: str) -> bytes:
    """The passphrase that the calling process wrote for this one; it can be read once."""
    try:
        descriptor = os.dup(int(number))  # the number itself belongs to whoever opened it
        with os.fdopen(descriptor, "rb") as stream:
            found = stream.read(_MAX_PASSPHRASE)
    except (OSError, ValueError, OverflowError):
        found = b""
    if not found:
        raise Unreadable(
            f"the passphrase of the writer's key cannot be read from {PASSPHRASE_FD}={number:.20}",
            code="DP073",
            hint="it is handed over once, to the process that dpbudget run starts; in a process below that one pass "
            "start_from_environment(passphrase=...)",
        )
    return found
