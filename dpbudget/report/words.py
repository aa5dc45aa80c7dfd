"""The report in plain words: what is claimed, on which assumptions, and what is not covered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dpbudget.curve import round_down, round_up, show_delta
from dpbudget.mechanisms import Adjacency
from dpbudget.report.document import AttackPart, Ends, PlanPart, RunPart

#: More words than this a statement never has.
MOST_WORDS = 200
#: What must be true for the claim to hold (docs/threat-model.md).
ASSUMPTIONS = (
    ("Code", "The training code releases nothing of the data but what goes through a receipt of the ledger."),
    ("Keys", "Owner and writer keep their keys, and the owner's public key reached you by another way than this page."),
    ("Machine", "The operating system's randomness is sound, and what was synced to disk survived."),
    ("Cryptography", "SHA-256, Ed25519, HKDF and ChaCha20 are sound; observers are computationally bounded."),
    ("One ledger", "The owner keeps one ledger for these data. A second one would not be seen here."),
)
#: What the number does not promise.
NOT_COVERED = (
    ("Tuning", "models, settings and results that were tried or measured on the same data outside this ledger."),
    ("Preprocessing", "features, filters, vocabularies and scales that were computed from the data."),
    ("Public weights", "pretrained weights that training began with, and whatever they had learned."),
    ("Several records of one person", "the promise is for one record; k records of one person are a group of k."),
    ("The population", "what the model says about people in general, whether or not they are in the data."),
    ("Side channels", "how long a step took, memory, files and logs of the machine."),
)
_KIND = {"example": "one example, a row of the dataset", "user": "one user, with all rows of that user"}
_NEIGHBOURS = {
    Adjacency.ADD_REMOVE: "one of them has one {unit} more",
    Adjacency.ZERO_OUT: "one {unit} is replaced by nothing; the size is public",
    Adjacency.REPLACE_ONE: "they differ in one {unit}",
}
#: What each mode of noise leaves to say.
NOISE = {
    "secure": "secure (ChaCha20; its bounded tail is charged, rounding to floating point is not covered)",
    "exact": "exact (integer sums and noise, certified to the bit)",
}


#: The same in a few words.
_NOISE = {
    "secure": "secure (ChaCha20; tail charged, rounding not covered)",
    "exact": "exact (integers, to the bit)",
}


def neighbours(adjacency: Adjacency, unit: str) -> str:
    """When two datasets are neighbours, as the end of a sentence."""
    return _NEIGHBOURS[adjacency].format(unit=unit)


def statement(
    *,
    epsilon: Ends | None,
    delta: float | None,
    adjacency: Adjacency | None,
    unit: str | None,
    filter: str | None,
    runs: Sequence[RunPart],
    checked_by: Sequence[str],
    attack: AttackPart | None,
    scope: str,
) -> tuple[str, ...]:
    """The claim in at most :data:`MOST_WORDS` words, one string a paragraph, each begun by its subject and a colon."""
    if epsilon is None or delta is None or adjacency is None or unit is None:
        return ("No claim: this ledger does not hold, and no epsilon that it states may be relied on.",)
    who = f"Protected: {_KIND[unit]}. Datasets are neighbours if {neighbours(adjacency, unit)} ({adjacency})."
    rdp = filter == "rdp"
    if epsilon.upper == 0.0:
        return who, _waiting(runs)
    begun = [run for run in runs if run.charged]
    return (
        who,
        _promise(epsilon, delta, begun, checked_by, rdp=rdp),
        *_attacker(attack, scope, adjacency, unit),
        _made(begun, rdp=rdp),
        "Released: the noised gradient sum of every charged step, so every checkpoint and model of them.",
        "Not covered: tuning, preprocessing or selection on the same data outside this ledger; pretrained public "
        "weights; several records of one person; dishonest code, keys or operating system.",
    )


def _waiting(runs: Sequence[RunPart]) -> str:
    if not runs:
        return "Promise: nothing was planned or released under this budget yet."
    return (
        f"Promise: nothing was released under this budget yet. {_count(len(runs), 'plan')} signed; what they may claim "
        "once they begin stands below."
    )


def _promise(epsilon: Ends, delta: float, runs: Sequence[RunPart], checked_by: Sequence[str], *, rdp: bool) -> str:
    names = sorted({(run.plan.claim.accountant, run.plan.claim.accountant_version) for run in runs})
    proved = " and ".join(f"{name} version {version}" for name, version in names)
    others = [name for name in checked_by if name not in dict(names)]
    checked = f", checked by {' and '.join(others)}" if others else ""
    return (
        f"Promise: all that was released is (epsilon, delta)-differentially private, epsilon at most "
        f"{round_up(epsilon.upper)} at delta {small(delta)}; in the worst case nothing below "
        f"{round_down(epsilon.lower)} is true. Accountant: {'Renyi filter; of plans ' if rdp else ''}{proved}{checked}."
    )


def _attacker(attack: AttackPart | None, scope: str, adjacency: Adjacency, unit: str) -> Iterable[str]:
    if attack is None or scope not in ("spent", "pair"):
        return
    caught, begin = percent(attack.tpr_at_1_percent_fpr.upper), "In other words: who sees all this and guesses"
    if adjacency is Adjacency.REPLACE_ONE:
        told = f"which of two {unit}s was used, wrong for 1 % of one"
        yield f"{begin} {told}, is right for at most {caught} of the other."
    else:
        yield f"{begin} whether the {unit} was used, with 1 % false alarms, finds at most {caught} of those that were."


def _made(runs: Sequence[RunPart], *, rdp: bool) -> str:
    plans = [run.plan for run in runs]
    charged, planned = sum(run.charged for run in runs), sum(run.planned for run in runs)
    steps = f"T = {charged:,} of {planned:,} planned steps" + (f" in {len(runs)} runs" if len(runs) > 1 else "")
    modes = " and ".join(_NOISE[mode] for mode in sorted({plan.noise for plan in plans}, reverse=True))
    chosen = " Steps may depend on earlier outputs." if rdp else ""
    return (
        f"Made by: {steps}. {_sampling(plans)}. Gradients are clipped to norm C = "
        f"{span(plan.clip_norm for plan in plans)}; Gaussian noise has sigma = "
        f"{span(phase.noise_multiplier for plan in plans for phase in plan.phases)} times C, {modes}.{chosen}"
    )


def _sampling(plans: Sequence[PlanPart]) -> str:
    units = " or ".join(sorted({plan.unit for plan in plans}))
    rates = [phase.sample_rate for plan in plans for phase in plan.phases]
    if set(rates) == {1.0}:
        return f"Every {units} takes part in every step (q = 1)"
    return f"Every {units} enters every batch independently (Poisson sampling) with probability q = {span(rates)}"


def span(values: Iterable[float]) -> str:
    """One value, or the least and the largest of several, in six digits."""
    found = sorted(set(values))
    low, high = f"{found[0]:.6g}", f"{found[-1]:.6g}"
    return low if low == high else f"{low} to {high}"


def small(probability: float) -> str:
    """A delta, never rounded down: ``1e-5``."""
    return show_delta(probability).replace("e-0", "e-") if probability > 0.0 else "0"


def percent(share: float) -> str:
    """A share that is an upper bound, in three digits."""
    return f"{round_up(100.0 * share, 3)} %"


def _count(number: int, name: str) -> str:
    return f"{number} {name} is" if number == 1 else f"{number} {name}s are"


def word_count(paragraphs: Iterable[str]) -> int:
    """Words between white space."""
    return sum(len(paragraph.split()) for paragraph in paragraphs)
