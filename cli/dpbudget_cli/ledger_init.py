"""``dpbudget ledger init``: grant a budget for one dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpbudget.errors import InvalidParameter, Unreadable
from dpbudget_cli import _output as out
from dpbudget_cli._keys import PASSPHRASE_FD, load_signer, local_name, read_passphrases, shown
from dpbudget_cli._options import ADJACENCY, DELTA, EPSILON, JSON, UNIT
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget.ledger.ledger import Ledger
    from dpbudget.ledger.signing import Signer
    from dpbudget.plan import Budget

TWO_LEDGERS = "Two ledgers for one dataset cannot be detected: keep one ledger per dataset."
USERS_TRAIN = (
    "train with dpbudget train --user-column COL --max-examples K, or with dptrainer.UserDataset (docs/training.md)"
)
ONE_PERSON = "Owner and writer keys were made together, so both roles are one person until you hand a key over."


@click.command("init", cls=Leaf)
@click.argument("path")
@click.option("--epsilon", type=EPSILON, metavar="E", required=True, help="Total epsilon of all runs.")
@click.option("--delta", type=DELTA, metavar="D", required=True, help="Total delta of all runs, such as 1e-5.")
@click.option("--owner-key", metavar="FILE", help="Key that grants; PATH.owner.key is made if not given.")
@click.option("--writer-key", metavar="FILE", help="Key that spends; PATH.writer.key is made if not given.")
@click.option("--adjacency", type=ADJACENCY, default="add-remove", help="add-remove (default), zero-out, replace-one.")
@click.option("--unit", type=UNIT, default="example", help="example (default), or user with all of its examples.")
@click.option("--filter", "kind", default="portfolio", help="portfolio (default, tight) or rdp (adaptive).")
@click.option("--whole-budget", is_flag=True, help="Let the first portfolio of plans use all of delta, not half.")
@click.option("--public-data", is_flag=True, help="Declare that the data are public anyway.")
@PASSPHRASE_FD
@JSON
def command(
    path: str,
    epsilon: float,
    delta: float,
    owner_key: str | None,
    writer_key: str | None,
    adjacency: str,
    unit: str,
    kind: str,
    whole_budget: bool,
    public_data: bool,
    passphrase_fd: int | None,
    as_json: bool,
) -> None:
    """Make the ledger PATH (a file, or postgresql://...#name) with a budget for one dataset, signed by its owner.

    With the filter portfolio, plans that are signed before any of them runs are composed jointly, as tightly as is
    known, and portfolios add up. With rdp every plan and step may be chosen after all others, by Renyi accounting.

    Examples:
      dpbudget ledger init budget.ledger --epsilon 3 --delta 1e-5 --whole-budget
      dpbudget ledger init other.ledger --epsilon 8 --delta 1/100000 --json
    """
    from dpbudget.mechanisms import Adjacency
    from dpbudget.plan import Budget

    _check_filter(kind, whole_budget)
    budget = Budget(epsilon=epsilon, delta=delta)
    ledger, made = make_ledger(
        path,
        budget,
        keys={"owner": owner_key, "writer": writer_key},
        passphrases=read_passphrases(passphrase_fd),
        adjacency=Adjacency(adjacency),
        unit="user" if unit == "user" else "example",
        public_data=public_data,
        whole_budget=whole_budget,
        kind="rdp" if kind == "rdp" else "portfolio",
    )
    with ledger:
        _report(shown(path), ledger, budget, made, as_json)


def make_ledger(
    path: str, budget: Budget, *, keys: Mapping[str, str | None], passphrases: tuple[bytes, ...], **options: Any
) -> tuple[Ledger, list[str]]:
    """A new ledger, and the names of the files of the keys that were made for it. A refusal leaves nothing behind.

    Args:
        path: its place.
        budget: what it grants.
        keys: files of the keys of ``owner`` and ``writer``; one that is not named is made beside the ledger.
        passphrases: of encrypted keys.
        options: the others of :func:`dpbudget.create_ledger`.
    """
    from dpbudget._surface import create_ledger

    made: list[str] = []
    try:
        owner, writer = (_signer(path, keys.get(role), role, passphrases, made) for role in ("owner", "writer"))
        return create_ledger(path, budget=budget, owner=owner, writer=writer, **options), made
    except BaseException:
        for name in made:
            Path(name).unlink(missing_ok=True)
        raise


def _check_filter(kind: str, whole_budget: bool) -> None:
    """Raises InvalidParameter (DP062) for an unknown filter, or an option that the filter has no use for."""
    if kind not in ("portfolio", "rdp"):
        raise InvalidParameter(
            f"unknown filter {kind[:40]!r}",
            code="DP062",
            hint="choose portfolio (the default), or rdp where steps are chosen after the outputs of others",
        )
    if kind == "rdp" and whole_budget:
        raise InvalidParameter(
            "--filter rdp with --whole-budget: an rdp ledger has no portfolios, of which one could take the whole",
            code="DP062",
            hint="leave --whole-budget out",
        )


def _signer(ledger: str, given: str | None, role: str, passphrases: tuple[bytes, ...], made: list[str]) -> Signer:
    """The named key, or a new one beside the ledger, noted in ``made`` so that a failure can take it back."""
    if given is not None:
        return load_signer(given, passphrases)
    from dpbudget.ledger.keys import new_key

    ledger = local_name(ledger)
    place = Path(ledger)
    if place.exists() or place.is_symlink():
        raise InvalidParameter(
            f"{ledger} exists",
            code="DP074",
            hint=f"go on with it (dpbudget ledger show {shown(ledger)}), or choose another path; nothing was written",
        )
    if not place.parent.is_dir():
        raise Unreadable(f"the folder {place.parent} does not exist", hint="make the folder first")
    name = f"{ledger}.{role}.key"
    signer = new_key(name)
    made += [name, f"{name}.pub"]
    return signer


def _report(path: str, ledger: Ledger, budget: Budget, made: list[str], as_json: bool) -> None:
    genesis = ledger.state.genesis
    notes = [TWO_LEDGERS, *([ONE_PERSON] if len(made) > 2 else [])]
    notes += [f"The ledger protects users: {USERS_TRAIN}."] if genesis.unit == "user" else []
    if as_json:
        out.emit_json(
            {
                "ledger": path,
                "id": ledger.id,
                "epsilon": budget.epsilon,
                "delta": budget.delta,
                "plan_delta": ledger.plan_delta,
                "adjacency": str(genesis.adjacency),
                "unit": genesis.unit,
                "owner": genesis.owner.hex,
                "writer": genesis.writer.hex,
                "head": str(ledger.head),
                "keys": made,
                "notes": notes,
            }
        )
        return
    out.emit_table(
        [
            ("ledger", path),
            ("id", ledger.id),
            ("budget", f"epsilon {budget.epsilon:g}, delta {budget.delta:g}"),
            ("first portfolio", f"delta {ledger.plan_delta:g}"),
            ("adjacency", f"{genesis.adjacency} of one {genesis.unit}"),
            ("owner", genesis.owner.hex),
            ("writer", genesis.writer.hex),
            ("head", ledger.head),
            *(("key made", name) for name in made),
        ]
    )
    for note in notes:
        out.talk(note)
