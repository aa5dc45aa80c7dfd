"""The verdict of a verification: what holds, what does not, what nobody can know from the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpbudget.curve import Bounds, round_down, round_up, show_delta

#: Plans that a summary names one by one.
_MOST_SHOWN = 10


@dataclass(frozen=True)
class RunReport:
    """One signed plan and what became of it.

    Attributes:
        run_id: the run.
        claim: epsilon and delta that the plan claims for itself.
        steps: planned steps.
        charged: steps that stand in durable leases, whether or not they were released.
        released: steps whose receipt is recorded as issued.
        noise: mode of its noise: ``secure`` is certified in real arithmetic, ``exact`` down to the bit.
        commitment: what the run's noise key is committed to; None for fresh keys, a new one in every lease.
        entropy: what an auditor added after the commitment; None before.
    """

    run_id: str
    claim: tuple[float, float]
    steps: int
    charged: int
    released: int
    noise: str
    commitment: str | None = None
    entropy: str | None = None

    @property
    def noise_keys(self) -> str:
        """``fresh`` or ``committed``."""
        return "fresh" if self.commitment is None else "committed"


@dataclass(frozen=True)
class Report:
    """The verdict on one ledger.

    Attributes:
        ok: everything holds, and every demanded anchor was met.
        problems: what does not hold, in words; empty exactly when everything holds.
        warnings: what a reader should know all the same.
        epsilon: what all runs together spent at ``delta``: the upper end is the guarantee (the sum of the recorded
            claims; in an ``rdp`` ledger the total or the odometer, whichever is less), the lower end was computed for
            the mechanisms in real arithmetic. None where a claim does not hold.
        delta: the deltas of the portfolios that were begun, together; in an ``rdp`` ledger the total.
        budget: the owner's total epsilon and delta.
        filter: ``portfolio`` or ``rdp``.
        adjacency: which datasets are neighbours.
        unit: whose presence is protected, one ``example`` or one ``user``.
        steps: charged steps of all runs.
        head: ``size:root`` of the newest signed head.
        ledger_id: leaf hash of the first record.
        trusted: the owner's key came from outside.
        anchored: a head from outside was found in this history.
        anchors: the heads from outside that were found, as ``size:root``.
        heads: how many kept heads were checked; None where that was not asked for.
        runs: every signed plan.
        checked_by: names of the accountants that recomputed epsilon.
    """

    ok: bool
    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    epsilon: Bounds | None = None
    delta: float | None = None
    budget: tuple[float, float] | None = None
    filter: str | None = None
    adjacency: str | None = None
    unit: str | None = None
    steps: int = 0
    head: str | None = None
    ledger_id: str | None = None
    trusted: bool = False
    anchored: bool = False
    anchors: tuple[str, ...] = ()
    heads: int | None = None
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
            "filter": self.filter,
            "adjacency": self.adjacency,
            "unit": self.unit,
            "steps": self.steps,
            "head": self.head,
            "ledger": self.ledger_id,
            "trusted": self.trusted,
            "anchored": self.anchored,
            "anchors": list(self.anchors),
            "heads": self.heads,
            "checked_by": list(self.checked_by),
            "runs": [
                {
                    "run": run.run_id,
                    "epsilon": run.claim[0],
                    "delta": run.claim[1],
                    "planned": run.steps,
                    "charged": run.charged,
                    "released": run.released,
                    "noise": run.noise,
                    "noise_keys": run.noise_keys,
                    "commitment": run.commitment,
                    "entropy": run.entropy,
                }
                for run in self.runs
            ],
        }

    def summary(self) -> str:
        """The verdict in a few lines of plain words."""
        lines = ["VALID" if self.ok else "NOT VALID" if self.exit_code == 1 else "VALID, BUT NOT ANCHORED"]
        if self.epsilon is not None and self.epsilon.upper == 0.0 and self.steps == 0:
            lines[0] += ": nothing spent yet"
            lines += self._claims()
        elif self.epsilon is not None and self.budget is not None and self.delta is not None:
            lines[0] += f": epsilon <= {round_up(self.epsilon.upper, 10)} at delta {show_delta(self.delta)}"
            checked_by = " and ".join(self.checked_by)
            lines.append(f"  lower bound {round_down(self.epsilon.lower, 10)}; recomputed by {checked_by}")
            lines.append(f"  for one {self.unit} of the dataset, {self.adjacency} neighbours")
            lines.append(f"  budget epsilon {self.budget[0]:g}, delta {self.budget[1]:g}; {self.steps} steps charged")
            lines += self._arithmetic()
            lines.append(
                "  every epsilon assumes honest training code, key and operating system (docs/threat-model.md)"
            )
        if self.head:
            lines.append(f"  head {self.head}")
        lines += self._noise_keys()
        lines += [f"  anchored by the head {anchor}" for anchor in self.anchors]
        if self.heads is not None:
            lines.append(f"  all {self.heads} heads that the store kept are the writer's and part of this history")
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines += [f"  note: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _arithmetic(self) -> list[str]:
        """What each mode of noise leaves out of the claim."""
        left_out = {
            "secure": "bounded tail charged; rounding of sums and noise to floating point is not covered",
            "exact": "integer sums and noise; the claim holds down to the bit",
        }
        used = {mode: sum(run.noise == mode for run in self.runs if run.charged) for mode in left_out}
        return [
            f"  {mode} noise{f' in {count} runs' if min(used.values()) else ''}: {left_out[mode]}"
            for mode, count in used.items()
            if count
        ]

    def _noise_keys(self) -> list[str]:
        """Where the noise of every run comes from."""
        committed = [run for run in self.runs if run.commitment is not None]
        fresh = len(self.runs) - len(committed)
        lines = [f"  noise keys of {fresh} run{'s' * (fresh > 1)}: fresh, a new one in every lease"] if fresh else []
        for run in committed[:_MOST_SHOWN]:
            after = f"with the entropy {run.entropy}" if run.entropy else "without an auditor's entropy yet"
            lines.append(f"  noise keys of run {run.run_id}: committed to {run.commitment}, {after}")
        more = len(committed) - _MOST_SHOWN
        return lines + ([f"  and of {more} more runs: committed (--json lists them)"] if more > 0 else [])

    def _claims(self) -> list[str]:
        """What the signed plans may claim once they begin, and of which budget."""
        lines = [
            f"  run {run.run_id} may claim epsilon {round_up(run.claim[0])} at delta {show_delta(run.claim[1])} "
            f"by {run.steps} steps"
            for run in self.runs[:_MOST_SHOWN]
        ]
        more = len(self.runs) - len(lines)
        lines += [f"  and {more} more plans: dpbudget ledger plans"] if more > 0 else []
        lines += [] if self.runs else ["  no plan is signed in yet"]
        if self.budget is not None:
            lines.append(f"  budget epsilon {self.budget[0]:g}, delta {self.budget[1]:g}")
        lines.append(f"  for one {self.unit} of the dataset, {self.adjacency} neighbours")
        return lines
