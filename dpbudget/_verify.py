"""Verification by a third party: replay every record, recompute every number, compare, report.

Reads records only, writes nothing and needs no torch. What stands in the file is believed as far as it follows from the
records before it and from the owner's signature; every epsilon is computed again, by the accountant that the plan names
and by another one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from dpbudget.accountants import ACCOUNTANTS, get_accountant
from dpbudget.curve import Bounds, round_down, round_up, show_delta
from dpbudget.errors import DPBudgetError, InvalidParameter, Tampered
from dpbudget.filters import PortfolioFilter
from dpbudget.ledger.entries import Entry
from dpbudget.ledger.journal import replay
from dpbudget.ledger.signing import PublicKey
from dpbudget.ledger.state import LedgerState, Portfolio, RunState
from dpbudget.ledger.store.reader import read_ledger
from dpbudget.ledger.tree import Frontier, leaf_hash
from dpbudget.plan import Plan

_ANCHOR = re.compile(r"([1-9][0-9]{0,15}):([0-9a-f]{64})")


@dataclass(frozen=True)
class RunReport:
    """One signed plan and what became of it.

    Attributes:
        run_id: the run.
        claim: epsilon and delta that the plan claims for itself.
        steps: planned steps.
        charged: steps that stand in durable leases, whether or not they were released.
        released: steps whose receipt is recorded as issued.
    """

    run_id: str
    claim: tuple[float, float]
    steps: int
    charged: int
    released: int


@dataclass(frozen=True)
class Report:
    """The verdict on one ledger.

    Attributes:
        ok: everything holds, and the demanded anchor was met.
        problems: what does not hold, in words; empty exactly when everything holds.
        warnings: what a reader should know all the same.
        epsilon: what all runs together spent at ``delta``: the upper end is the sum of the recorded claims, the lower
            end was computed for the mechanisms in real arithmetic. None where a claim does not hold.
        delta: the deltas of the portfolios that were begun, together.
        budget: the owner's total epsilon and delta.
        steps: charged steps of all runs.
        head: ``size:root`` of the newest signed head.
        ledger_id: leaf hash of the first record.
        trusted: the owner's key came from outside.
        anchored: a head from outside was found in this history.
        runs: every signed plan.
        checked_by: names of the accountants that recomputed epsilon.
    """

    ok: bool
    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    epsilon: Bounds | None = None
    delta: float | None = None
    budget: tuple[float, float] | None = None
    steps: int = 0
    head: str | None = None
    ledger_id: str | None = None
    trusted: bool = False
    anchored: bool = False
    runs: tuple[RunReport, ...] = ()
    checked_by: tuple[str, ...] = ()
    _unanchored: bool = field(default=False, repr=False)

    @property
    def exit_code(self) -> int:
        """0 everything holds, 1 something does not, 5 valid in itself but the demanded anchor was not met."""
        if self.ok:
            return 0
        return 5 if self._unanchored else 1

    def to_json(self) -> dict[str, Any]:
        """The report as plain values, epsilon as ``{"lower", "upper", "kind"}``."""
        return {
            "ok": self.ok,
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "epsilon": self.epsilon
            and {"lower": self.epsilon.lower, "upper": self.epsilon.upper, "kind": self.epsilon.kind},
            "delta": self.delta,
            "budget": self.budget and {"epsilon": self.budget[0], "delta": self.budget[1]},
            "steps": self.steps,
            "head": self.head,
            "ledger": self.ledger_id,
            "trusted": self.trusted,
            "anchored": self.anchored,
            "checked_by": list(self.checked_by),
            "runs": [
                {
                    "run": run.run_id,
                    "epsilon": run.claim[0],
                    "delta": run.claim[1],
                    "planned": run.steps,
                    "charged": run.charged,
                    "released": run.released,
                }
                for run in self.runs
            ],
        }

    def summary(self) -> str:
        """The verdict in a few lines of plain words."""
        lines = ["VALID" if self.ok else "NOT VALID" if self.exit_code == 1 else "VALID, BUT NOT ANCHORED"]
        if self.epsilon is not None and self.budget is not None and self.delta is not None:
            lines[0] += f": epsilon <= {round_up(self.epsilon.upper, 10)} at delta {show_delta(self.delta)}"
            checked_by = " and ".join(self.checked_by)
            lines.append(f"  lower bound {round_down(self.epsilon.lower, 10)}; recomputed by {checked_by}")
            lines.append(f"  budget epsilon {self.budget[0]:g}, delta {self.budget[1]:g}; {self.steps} steps charged")
            lines.append(
                "  every epsilon assumes honest training code, key and operating system (docs/threat-model.md)"
            )
        if self.head:
            lines.append(f"  head {self.head}")
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines += [f"  note: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def verify(path: str | os.PathLike[str], *, trust: PublicKey | None = None, expect_head: str | None = None) -> Report:
    """Verify a ledger file or an export.

    Args:
        path: a ledger or an export; it is copied before it is opened and never written to.
        trust: the owner's public key, got by another way than this file. Without it the report says so: a key found
            inside the file proves nothing.
        expect_head: ``size:root`` of a head that was seen before; it must be part of this history. A cut tail or a
            rewritten history can be seen in no other way.

    Returns:
        The report; a ledger that does not hold is reported, not raised.

    Raises:
        Unreadable: the file is missing or no ledger at all (DP070), or unsafe to read (DP083).
        InvalidParameter: ``expect_head`` is not of the form ``size:root`` (DP082), or ``trust`` is no key (DP072).
    """
    if trust is not None and not isinstance(trust, PublicKey):
        raise InvalidParameter(
            f"trust is {trust!r:.80}, not a public key",
            code="DP072",
            hint="pass trust=dpbudget.load_public_key(FILE) with the owner's .pub file",
        )
    anchor = _parse_anchor(expect_head)
    snapshot = None
    try:
        snapshot = read_ledger(path)
        state, head = replay(snapshot.entries, snapshot.note, trust)
    except Tampered as error:
        return Report(ok=False, problems=(str(error),), trusted=trust is not None)
    problems = [problem for portfolio in state.portfolios for problem in _check_portfolio(state, portfolio)]
    missed = _check_anchor(anchor, snapshot.entries)
    begun = [portfolio for portfolio in state.portfolios if portfolio.frozen]
    return Report(
        ok=not problems and missed is None,
        problems=(*problems, *([missed] if missed else [])),
        warnings=tuple(_warnings(state, trusted=trust is not None, anchored=anchor is not None)),
        epsilon=None if problems else _spent(state, begun),  # a refuted claim is no upper bound
        delta=_sum_up(portfolio.delta for portfolio in begun) if begun else state.genesis.delta,
        budget=(state.genesis.epsilon, state.genesis.delta),
        steps=sum(run.charged for run in state.runs.values()),
        head=f"{head.size}:{head.root}",
        ledger_id=state.genesis.ledger_id,
        trusted=trust is not None,
        anchored=anchor is not None and missed is None,
        runs=tuple(_run_report(run) for run in state.runs.values()),
        checked_by=tuple(ACCOUNTANTS),
        _unanchored=not problems and missed is not None,
    )


def _run_report(run: RunState) -> RunReport:
    claim = run.plan.claim
    return RunReport(run.run_id, (claim.epsilon, claim.delta), run.plan.steps, run.charged, run.reserved)


def _check_portfolio(state: LedgerState, portfolio: Portfolio) -> list[str]:
    """Every claim of a portfolio against what the accountants compute."""
    problems = []
    for run_id in portfolio.runs:
        plan = state.runs[run_id].plan
        problems += _check_claim(f"plan of run {run_id}", (plan,), plan.claim.epsilon, portfolio.delta)
    if portfolio.claim is not None:
        label = f"portfolio {portfolio.index}"
        problems += _check_claim(label, state.plans_of(portfolio), portfolio.claim, portfolio.delta)
    return problems


def _check_claim(label: str, plans: Sequence[Plan], claim: float, delta: float) -> list[str]:
    """What speaks against a claim: the named accountant's bounds, the other's lower end, or both at odds."""
    named = PortfolioFilter().accountant_for(plans)
    answers: dict[str, Bounds] = {}
    for name in ACCOUNTANTS:
        try:
            answers[name] = PortfolioFilter(get_accountant(name)).joint_bounds(plans, delta)
        except DPBudgetError as error:
            return [f"{label}: {name} cannot recompute epsilon: {error.message}"]
    problems = []
    own = answers[named.name]
    if claim < own.lower:
        problems.append(
            f"{label} claims epsilon {claim:.12g}, below the truth: {named.name} proves >= {own.lower:.12g}"
        )
    elif claim < own.upper or own.kind != "certified":
        problems.append(
            f"{label} claims epsilon {claim:.12g}, which cannot be confirmed: {named.name} gives "
            f"[{own.lower:.12g}, {own.upper:.12g}] ({own.kind})"
        )
    for name, other in answers.items():
        if name != named.name and (claim < other.lower or other.lower > own.upper or other.upper < own.lower):
            problems.append(
                f"{label}: {name} gives [{other.lower:.12g}, {other.upper:.12g}], at odds with the claim {claim:.12g}"
            )
    return problems


def _sum_up(values: Iterable[float]) -> float:
    """The smallest float that is at least the exact sum: floats added one by one may end below it."""
    total = sum((Fraction(value) for value in values), Fraction())
    nearest = float(total)
    return nearest if nearest >= total else math.nextafter(nearest, math.inf)


def _spent(state: LedgerState, begun: Sequence[Portfolio]) -> Bounds:
    """Sum of the claims above; below, the lower bound of all plans as one composition at the sum of deltas.

    Adaptive choice between portfolios can only make the worst case worse, so the lower end holds for it too.
    """
    if not begun:
        return Bounds(0.0, 0.0)
    upper = _sum_up(portfolio.claim or 0.0 for portfolio in begun)
    plans = [plan for portfolio in begun for plan in state.plans_of(portfolio)]
    try:
        lower = PortfolioFilter(get_accountant("prv")).joint_bounds(plans, _sum_up(p.delta for p in begun)).lower
    except DPBudgetError:
        lower = 0.0
    return Bounds(min(lower, upper), upper)


def _parse_anchor(expect_head: str | None) -> tuple[int, str] | None:
    if expect_head is None:
        return None
    match = _ANCHOR.fullmatch(expect_head.strip())
    if match is None:
        raise InvalidParameter(
            f"expected head {expect_head[:80]!r} is not of the form size:root",
            code="DP082",
            hint="pass the head that dpbudget printed, such as 12:9f86d0…",
        )
    return int(match[1]), match[2]


def _check_anchor(anchor: tuple[int, str] | None, entries: Sequence[Entry]) -> str | None:
    """Why the outside head is not part of this history; None when it is, or when none was demanded."""
    if anchor is None:
        return None
    size, root = anchor
    if size > len(entries):
        return f"the expected head has {size} records and this ledger {len(entries)}: its tail was cut, or it is older"
    tree = Frontier()
    for entry in entries[:size]:
        tree = tree.append(leaf_hash(entry.line))
    if tree.root.hex() != root:
        return f"the first {size} records do not have the expected root: this is another history"
    return None


def _warnings(state: LedgerState, *, trusted: bool, anchored: bool) -> list[str]:
    found = []
    if not trusted:
        found.append("the owner's key was taken from the file itself, which proves nothing; pass the trusted key")
    if not anchored:
        found.append("unanchored: a cut tail or a re-signed history cannot be seen without an expected head")
    for run in state.runs.values():
        version = get_accountant(run.plan.claim.accountant).version
        if run.plan.claim.accountant_version != version:
            found.append(
                f"run {run.run_id} was planned with version {run.plan.claim.accountant_version} of "
                f"{run.plan.claim.accountant}; this is version {version}"
            )
    return found
