"""Where accountant and ledger meet: ledgers that come with their filter, runs that come with their meter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dpbudget.errors import InvalidParameter, PlanExhausted
from dpbudget.filters import LedgerFilter
from dpbudget.ledger.ledger import Ledger
from dpbudget.mechanisms import Adjacency
from dpbudget.plan import Budget, Unit

if TYPE_CHECKING:
    from dpbudget.ledger.plan_key import PlanKey
    from dpbudget.ledger.run import Run
    from dpbudget.ledger.sealed import SealedKeys
    from dpbudget.ledger.signing import PublicKey, Signer


def create_ledger(
    path: str | Path | None,
    *,
    budget: Budget,
    owner: Signer,
    writer: Signer,
    adjacency: Adjacency = Adjacency.ADD_REMOVE,
    unit: Unit = "example",
    dataset: str | None = None,
    public_data: bool = False,
    whole_budget: bool = False,
    kind: Literal["portfolio", "rdp"] = "portfolio",
) -> Ledger:
    """Make a new ledger for one dataset, signed by its owner.

    Two ledgers for one dataset cannot be detected by anyone: the owner must issue one ``dataset`` id per dataset.

    Args:
        path: a file that does not exist yet, or ``postgresql://user@host/database#name``; None keeps the
            ledger in memory, where it ends with the process.
        budget: what all runs on this dataset may spend together.
        owner: signs the budget and the plans; may go offline afterwards.
        writer: signs every spend; cannot create budget.
        adjacency: neighbouring relation of every plan of this ledger.
        unit: whose presence is protected: one ``example``, or one ``user`` with all examples of that user.
        dataset: 64 hexadecimal digits that the owner issues (a keyed hash, never a plain hash of the data); random if
            not given.
        public_data: the owner declares the data public, so that metrics on it may be shown.
        whole_budget: let the first portfolio of plans use the whole budget; otherwise it gets half of delta.
        kind: ``portfolio`` composes plans that are signed before any of them is run; ``rdp`` lets every plan and every
            step be chosen after all before it, by Renyi accounting.

    Raises:
        InvalidParameter: the file exists (DP074).
        Unreadable: its place is unsafe (DP083).
    """
    return Ledger.create(
        path,
        budget=budget,
        owner=owner,
        writer=writer,
        adjacency=adjacency,
        unit=unit,
        dataset=dataset,
        public_data=public_data,
        whole_budget=whole_budget,
        kind=kind,
        filter=LedgerFilter(),
    )


def open_ledger(path: str | Path, *, writer: Signer | None = None, trust: PublicKey | None = None) -> Ledger:
    """Open a ledger after checking every record, signature and rule in it.

    Args:
        path: the ledger file.
        writer: the key that signs spends; None opens for reading only.
        trust: the owner's public key, got out of band; None takes the key that the file names.

    Raises:
        Tampered: anything in the file does not hold, or another owner signed it (DP071, DP072).
    """
    return Ledger.open(path, writer=writer, filter=LedgerFilter(), trust=trust)


def start(
    ledger: Ledger,
    run_id: str | None = None,
    *,
    lease_steps: int | None = None,
    keep_keys: SealedKeys | None = None,
    plan_key: PlanKey | None = None,
    expect_head: str | None = None,
) -> Run:
    """Start or resume a signed plan, with a meter for live epsilon.

    Args:
        ledger: opened with the writer's key.
        run_id: the run that ``sign_plan`` returned; None takes the only one that has steps left.
        lease_steps: steps charged together; the default follows from the plan alone.
        keep_keys: whoever opens this file can remove all noise: it keeps the noise keys, sealed to an auditor.
        plan_key: the key of a run whose noise is committed (``Ledger.commit``).
        expect_head: ``size:root`` of the newest head that you know by another way than the ledger, which must be part
            of it; a committed run needs it, since a copy would repeat its noise.

    Raises:
        PlanExhausted: every run has used up its plan (DP050).
        InvalidParameter: there is no run, or more than one has steps left (DP081); or something that a committed run
            needs is missing (DP084).
        Unanchored: ``expect_head`` is not part of this history (DP079).
    """
    from dpbudget._live import build_meter

    if not isinstance(ledger, Ledger):
        raise InvalidParameter(
            f"ledger is {ledger!r:.60}, not an open ledger",
            code="DP060",
            hint='ledger = dpbudget.open_ledger("my.ledger", writer=dpbudget.load_key("writer.key"))',
        )
    state = ledger.state
    if run_id is None:
        unfinished = [run.run_id for run in state.runs.values() if run.charged < run.plan.steps]
        if not unfinished and state.runs:
            raise PlanExhausted(
                f"every run of this ledger ({len(state.runs)}) has used up its plan",
                hint="sign another run where dpbudget ledger show says that some of the budget is left",
            )
        if not unfinished:
            raise InvalidParameter(
                "no plan is signed into this ledger yet",
                code="DP081",
                hint="run_id = ledger.sign_plan(dpbudget.calibrate(...), owner=owner), or dpbudget plan new",
            )
        if len(unfinished) > 1:
            raise InvalidParameter(
                f"{len(unfinished)} runs of this ledger have steps left",
                code="DP081",
                hint=f"name one: {', '.join(unfinished)}",
            )
        run_id = unfinished[0]
    if run_id not in state.runs:
        raise InvalidParameter(f"the ledger has no run {run_id!r}", code="DP081", hint="see dpbudget ledger show")
    meter = build_meter(state.runs[run_id].plan)
    return ledger.start(
        run_id, meter=meter, lease_steps=lease_steps, keep_keys=keep_keys, plan_key=plan_key, expect_head=expect_head
    )
