"""What the commands share about noise keys: whether they are kept, for whom, and the plan key of a committed run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dpbudget.errors import InvalidParameter, Unreadable
from dpbudget_cli._keys import ask_passphrase

if TYPE_CHECKING:
    from dpbudget.ledger.ledger import Ledger
    from dpbudget.ledger.plan_key import PlanKey
    from dpbudget.ledger.run import Run
    from dpbudget.ledger.sealed import SealedKeys

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class NoiseKeys:
    """What becomes of the noise keys of a run, for a replay: nothing, unless it was asked for."""

    keep: SealedKeys | None
    plan_key: PlanKey | None
    expect_head: str | None

    @property
    def replayable(self) -> bool:
        """Whether every step is settled with a hash of its output, to compare a replay with."""
        return self.keep is not None or self.plan_key is not None

    def start(self, ledger: Ledger, run_id: str, lease_steps: int | None = None) -> Run:
        """Start the run with them, and with leases of so many steps."""
        from dpbudget._surface import start

        return start(
            ledger,
            run_id,
            lease_steps=lease_steps,
            keep_keys=self.keep,
            plan_key=self.plan_key,
            expect_head=self.expect_head,
        )


def keep_options(command: _Command) -> _Command:
    """--keep-keys and --auditor."""
    for option in (
        click.option("--auditor", metavar="KEY", help="To whom the noise keys are sealed: a .pub file."),
        click.option(
            "--keep-keys", "keep_keys", metavar="FILE", help="Noise keys, sealed: opening them removes all noise."
        ),
    ):
        command = option(command)
    return command


def committed_options(command: _Command) -> _Command:
    """--plan-key and --expect-head."""
    for option in (
        click.option("--expect-head", metavar="HEAD", help="The newest head that you know, SIZE:ROOT."),
        click.option("--plan-key", metavar="FILE", help="The key of a committed run (ledger commit)."),
    ):
        command = option(command)
    return command


def kept_keys(keep_keys: str | None, auditor: str | None) -> SealedKeys | None:
    """Where the noise keys are kept; None for nowhere.

    Raises:
        InvalidParameter: one of the two was given without the other (DP064).
        Unreadable: the auditor's key is none (DP070).
    """
    if (keep_keys is None) != (auditor is None):
        raise InvalidParameter(
            "noise keys are kept in a file and for an auditor, and only one of both was given",
            code="DP064",
            hint="pass --keep-keys FILE and --auditor KEY, or neither: nobody can replay the noise then",
        )
    if keep_keys is None or auditor is None:
        return None
    from dpbudget.ledger.auditor import load_auditor_public_key
    from dpbudget.ledger.sealed import SealedKeys

    return SealedKeys(keep_keys, load_auditor_public_key(auditor))


def open_plan_key(path: str, passphrases: tuple[bytes, ...]) -> PlanKey:
    """The plan key of a file, by the first passphrase that opens it; a person at the terminal is asked for none given.

    Raises:
        Unreadable: missing, unsafe, no plan key, or no passphrase opens it (DP070, DP073).
    """
    from dpbudget.ledger.plan_key import load_plan_key

    refusal: Unreadable | None = None
    for passphrase in passphrases:
        try:
            return load_plan_key(path, passphrase)
        except Unreadable as error:
            refusal = error
    if refusal is not None:
        raise refusal
    return load_plan_key(path, ask_passphrase() if sys.stdin.isatty() else None)
