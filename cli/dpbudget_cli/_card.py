"""The model card that ``dpbudget train`` puts beside its weights: what is guaranteed, and how to check it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpbudget.curve import round_down, round_up, show_delta

if TYPE_CHECKING:
    from dpbudget.ledger.ledger import Ledger
    from dpbudget.plan import Plan
    from dpbudget_cli._heldout import Score
    from dptrainer.trainer import TrainingResult

_NEIGHBOURS = {
    "add-remove": "with and without any one {unit}",
    "zero-out": "with any one {unit} and with nothing in its place",
    "replace-one": "that differ in any one {unit}",
}
_UNIT = {"example": "record", "user": "user with all of that user's records"}


@dataclass(frozen=True)
class Facts:
    """What a run was, from its ledger; every field is public."""

    ledger: str
    ledger_id: str
    owner: str
    head: str
    run: str
    plan: Plan
    taken: int
    total_epsilon: float
    total_delta: float
    public_data: bool

    @classmethod
    def of(cls, ledger: Ledger, shown: str, result: TrainingResult) -> Facts:
        """The facts of a run that has just been trained, of a ledger at the location ``shown``."""
        state = ledger.state
        return cls(
            ledger=shown,
            ledger_id=ledger.id,
            owner=state.owner.hex,
            head=str(ledger.head),
            run=result.run_id,
            plan=state.runs[result.run_id].plan,
            taken=result.charged,
            total_epsilon=state.epsilon,
            total_delta=state.delta,
            public_data=state.genesis.public_data,
        )

    def guarantee(self) -> str:
        """The sentence that the weights are released with."""
        claim = self.plan.claim
        neighbours = _NEIGHBOURS[str(self.plan.adjacency)].format(unit=_UNIT[self.plan.unit])
        return (
            f"These weights are ({round_up(claim.epsilon)}, {show_delta(claim.delta)})-differentially private: the "
            f"probabilities of any outcome of this run on two datasets {neighbours} differ by at most a factor of "
            f"e^{round_up(claim.epsilon)}, but for a probability of {show_delta(claim.delta)}."
        )

    def metadata(self) -> dict[str, str]:
        """The facts as text, for the header of a safetensors file."""
        from dpbudget import __version__

        claim, plan = self.plan.claim, self.plan
        return {
            "dpbudget": __version__,
            "guarantee": self.guarantee(),
            "run": self.run,
            "epsilon": repr(claim.epsilon),
            "delta": repr(claim.delta),
            "accountant": claim.accountant,
            "adjacency": str(plan.adjacency),
            "unit": plan.unit,
            "plan": plan.digest(),
            "steps": f"{self.taken} of {plan.steps} charged",
            "ledger": self.ledger_id,
            "owner": self.owner,
            "head": self.head,
            "verify": self.verify_command(),
        }

    def verify_command(self) -> str:
        """What a reader runs on the ledger or its export."""
        return f"dpbudget verify {shlex.quote(self.ledger)} --trust {self.owner} --expect-head {self.head}"


def card(
    facts: Facts,
    weights: str,
    digest: str,
    *,
    model: str,
    init: str | None,
    public: float | None,
    score: Score | None,
    hold_out: float | None = None,
) -> str:
    """The card as Markdown.

    Args:
        facts: of the run, after its last record.
        weights: the file beside the card.
        digest: its SHA-256.
        model: what was trained, as the options say it.
        init: the file of the initial weights, if they were not drawn at random.
        public: accuracy on data that were declared public.
        score: accuracy on held-out records.
        hold_out: share of the records that were kept away from training by their own hash.
    """
    name = Path(weights).name
    lines = [
        f"# Model card of {name}",
        "",
        facts.guarantee(),
        "",
        f"The guarantee is that of the signed plan of run `{facts.run}`, however many of its steps were taken. It "
        "covers the weights and every checkpoint of that run together.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _rows(facts, digest, model, init, public, score, hold_out)),
        "",
        "## Verify it",
        "",
        "The ledger holds the plan with its owner's signature and a record of every step, charged before its noise was "
        "drawn. Whoever has it, or an export of it (`dpbudget ledger export`), recomputes epsilon without torch and "
        "without this file:",
        "",
        "```console",
        f"$ {facts.verify_command()}",
        "```",
        "",
        "`--trust` is the key of the data's owner: compare it with one that reached you by another way than this card. "
        "`--expect-head` shows a ledger that was cut or rewritten since. `dpbudget ledger prove "
        f"{shlex.quote(facts.ledger)} FILE --run {facts.run[:8]}` proves this run to somebody who may not see the "
        f"others; `dpbudget report {shlex.quote(facts.ledger)} --trust {facts.owner}` writes a page of all of them. "
        "The weights belong to the run if their SHA-256, and the run in their metadata, are those above.",
        "",
        "## Not covered",
        "",
        *(f"- {item}" for item in _not_covered(facts, init)),
        "",
    ]
    return "\n".join(lines)


def _rows(
    facts: Facts,
    digest: str,
    model: str,
    init: str | None,
    public: float | None,
    score: Score | None,
    hold_out: float | None,
) -> list[tuple[str, str]]:
    plan, rows = facts.plan, list[tuple[str, str]]()
    rows.append(("model", _code(model)))
    rows.append(("initial weights", "drawn at random" if init is None else _code(Path(init).name)))
    rows.append(("SHA-256", f"`{digest}`"))
    rows.append(("run", f"`{facts.run}`"))
    rows.append(("steps", f"{facts.taken} of {plan.steps} charged"))
    for number, phase in enumerate(plan.phases, start=1):
        part = f", phase {number} of {len(plan.phases)}" if len(plan.phases) > 1 else ""
        what = f"{phase.steps} steps, Poisson sampling with rate {phase.rate:.6g}, Gaussian noise of multiplier "
        rows.append((f"mechanism{part}", f"{what}{round_down(phase.noise_multiplier)}"))
    rows.append(("clipping norm", f"{plan.clip_norm:g} of each {_UNIT[plan.unit].split()[0]}'s gradient"))
    rows.append(("public size of the data", f"{plan.nominal_size} {plan.unit}s"))
    if hold_out is not None:
        rows.append(("kept from training", split_text(hold_out, _UNIT[plan.unit].split()[0])))
    rows.append(("accountant", f"{plan.claim.accountant}, {plan.adjacency}, {plan.noise} noise"))
    rows.append(("ledger", f"`{facts.ledger_id}`"))
    rows.append(("ledger's head", f"`{facts.head}`"))
    rows.append(("owner's key", f"`{facts.owner}`"))
    if public is not None:
        rows.append(("accuracy on public data", f"{public:.4f}"))
    if score is not None and score.accuracy is not None:
        rows.append(("accuracy on held-out data", accuracy_text(score)))
    return rows


def split_text(share: float, unit: str) -> str:
    """What a split by keyed hash is, and why the claim holds for both of its parts."""
    return (
        f"each {unit} with probability {share:g}, by a keyed hash of it alone: one {unit} more or less moves no other, "
        "so the claim holds for all of the data"
    )


def accuracy_text(score: Score) -> str:
    """``0.8720 +- 0.0210 (noise), paid for by run 3f9c``."""
    if score.accuracy is None or score.noise is None:
        return "too few records for the noise of its plan"
    if score.run is None:
        return f"{score.accuracy:.4f} (the data are declared public)"
    return f"{score.accuracy:.4f} +- {score.noise:.4f} by its noise, paid for by run {score.run[:8]}"


def _not_covered(facts: Facts, init: str | None) -> list[str]:
    total = f"at most epsilon {round_up(facts.total_epsilon)} at delta {show_delta(facts.total_delta)}"
    found = [
        f"Other runs on the same data, for example those from which this one was chosen. All runs of the ledger "
        f"together are covered by its budget, {total}.",
        "What was looked at in the data outside the ledger: columns, scaling or settings that were chosen by it.",
        "What follows about a person from the population as a whole, whether or not that person is in the data.",
    ]
    if facts.plan.unit == "example":
        found.append("Several records of one person: the guarantee is for one record.")
    if facts.plan.noise == "secure":
        found.append(
            "The rounding of sums and noise to floating point, which a plan with exact noise does without "
            "(`dpbudget plan new --noise exact`)."
        )
    if init is not None:
        found.append("The initial weights, unless they are public or come from a run of this ledger.")
    if facts.public_data:
        found.append("Metrics of the data, which their owner declared public.")
    return found


def _code(text: str) -> str:
    """A name as code in a Markdown table, whatever is in it."""
    return f"`{text.replace('`', '').replace('|', '').translate(dict.fromkeys(range(32)))}`"
