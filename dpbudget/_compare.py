"""One schedule, counted in every way: our accountants, the conventions of other tools, other samplings, groups.

No other tool is imported. What one of them would report is computed from its published formula and defaults, the Renyi
moments being our certified ones; tests compare with the tools where they are installed. Everything is in real
arithmetic: the bounded tail of a noise generator belongs to plans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from dpbudget._calibrate import _load, make_phases
from dpbudget._checks import as_adjacency, as_count, as_delta
from dpbudget._conventions import central_limit, classic_rdp, dp_accounting_rdp, opacus_prv, opacus_rdp
from dpbudget._search import narrow
from dpbudget.curve import Bounds, PrivacyCurve
from dpbudget.errors import InvalidParameter, NotComputable
from dpbudget.mechanisms import Adjacency, Charge, Gaussian, ShuffledEpoch
from dpbudget.mechanisms.gaussian import MIN_NOISE_MULTIPLIER
from dpbudget.plan import Phase

#: ``certified``: proved, and every error term bounded. ``upper bound``: a proved formula, as another tool evaluates it
#: in floating point. ``not a bound``: an approximation, which may be below what is spent.
Standing = Literal["certified", "upper bound", "not a bound"]

#: What TensorFlow Privacy's statement takes for granted unless it is told otherwise.
_MICROBATCHES = "which halves the noise by default (microbatches)"
#: Largest group that is asked for.
MAX_GROUP = 10**6
#: Questions for a bracket of a group's epsilon, and how much of delta may be left over, relatively.
_STRIDES, _LEFT_OVER = 12, 3e-8


@dataclass(frozen=True)
class Row:
    """One way to count.

    Attributes:
        name: a stable word for it.
        epsilon: what it states; infinite where it has no answer.
        standing: what that is worth.
        question: ``same``, or in which way it answers another one than ours.
        note: one line about it.
    """

    name: str
    epsilon: float
    standing: Standing
    question: str
    note: str


@dataclass(frozen=True)
class Comparison:
    """All rows beside the certified answer.

    Attributes:
        certified: bounds of epsilon by the accountant ``prv``.
    """

    certified: Bounds
    rows: tuple[Row, ...]


def compare(
    phases: Sequence[tuple[float, float, int]],
    *,
    delta: float,
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    group: int | None = None,
    loader: tuple[int, int, Fraction] | None = None,
) -> Comparison:
    """The epsilon at ``delta`` of a schedule of (sampling rate, noise multiplier, steps), counted in every way.

    Args:
        phases: the schedule.
        delta: in (0, 1).
        adjacency: which datasets are neighbours; the conventions of other tools are those of add-remove.
        group: size of a group of records whose presence is to be protected together.
        loader: (dataset size, batch size, epochs) from which a data loader of Opacus makes its own rate and steps; of a
            schedule of one phase.

    Raises:
        InvalidParameter: a value is out of range (DP002 to DP009).
        NotComputable: the certified accountant has no answer (DP062, DP063).
    """
    checked, delta, relation = make_phases(phases), as_delta(delta), as_adjacency(adjacency)
    charges = [phase.charge for phase in checked]
    curve = _load("prv").curve(charges, relation)
    certified = curve.epsilon(delta)
    rows = _own(charges, checked, relation, delta, certified)
    if relation is not Adjacency.REPLACE_ONE:
        rows += _conventions(checked, charges, delta, certified, curve)
        if loader is not None and len(checked) == 1:
            rows.append(_opacus_loader(checked[0], delta, *loader))
    passes = _passes(checked)
    rows += _shuffled(checked, passes, delta)
    if relation is not Adjacency.REPLACE_ONE:
        rows.append(_tf_once(checked, passes, delta))
    if group is not None:
        rows.append(_group(curve, checked, relation, delta, as_count("group", group, MAX_GROUP), certified))
    return Comparison(certified, tuple(rows))


def _own(
    charges: list[Charge], phases: tuple[Phase, ...], relation: Adjacency, delta: float, certified: Bounds
) -> list[Row]:
    """Our accountants; ``certified`` is the answer of the first."""
    closed = all(phase.rate == 1.0 for phase in phases) or sum(phase.steps for phase in phases) == 1
    notes = {
        "prv": "closed form, in 60 digits" if closed else "contour integral, both ends bounded",
        "pld": "discretised losses, independent of prv",
        "rdp": "Renyi moments at the best real order, best conversion",
    }
    rows = []
    for name, note in notes.items():
        try:
            found = certified if name == "prv" else _load(name).curve(charges, relation).epsilon(delta)
        except NotComputable as error:
            rows.append(Row(name, math.inf, "certified", "same", f"no answer: {error.message}"))
        else:
            rows.append(Row(name, found.upper, "certified", "same", note))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# What other tools would report
# ---------------------------------------------------------------------------------------------------------------------


def _conventions(
    phases: tuple[Phase, ...], charges: list[Charge], delta: float, certified: Bounds, curve: PrivacyCurve
) -> list[Row]:
    from dpbudget.accountants._moment_bound import MomentBound
    from dpbudget.accountants._phases import phases_of

    moment = MomentBound(phases_of(charges, Adjacency.ADD_REMOVE), "remove")
    limit = central_limit(phases, delta)
    below = 1.0 - limit / certified.lower if certified.lower > 0.0 else 0.0
    harm = f"understates by {100.0 * below:.1f} % here" if below > 0.0 else "may understate, though not here"
    upper: Standing = "upper bound"
    return [
        Row("opacus-rdp", opacus_rdp(moment, delta), upper, "same", "Opacus by default: its orders, improved conversion"
        ),
        Row("opacus-prv", opacus_prv(curve, delta), upper, "same", "Opacus, accountant prv: adds 0.01 to its estimate"),
        Row(
            "dp-accounting-rdp", dp_accounting_rdp(moment, delta), upper, "same",
            "dp-accounting, RdpAccountant: its orders, improved conversion",
        ),
        Row(
            "tf-poisson", dp_accounting_rdp(moment, delta), upper, "same",
            f"TensorFlow Privacy's statement, Poisson, {_MICROBATCHES}",
        ),
        Row(
            "classic-rdp", classic_rdp(moment, delta), upper, "same",
            "the conversion of Mironov (2017), in older tools and tutorials",
        ),
        Row("gdp", limit, "not a bound", "same", f"central limit (Bu et al. 2020), Opacus's gdp: {harm}"),
    ]  # fmt: skip


def _opacus_loader(phase: Phase, delta: float, size: int, batch: int, epochs: Fraction) -> Row:
    batches = -(-size // batch)
    steps = max(int(float(epochs) / (1.0 / batches)), 1)
    (own,) = make_phases([(1.0 / batches, phase.noise_multiplier, steps)])
    found = _load("prv").curve([own.charge], Adjacency.ADD_REMOVE).epsilon(delta)
    note = f"Opacus's loader: rate 1/{batches}, {steps} steps, in place of {batch}/{size}, {phase.steps}"
    return Row("opacus-loader", found.upper, "certified", "whole batches", note)


# ---------------------------------------------------------------------------------------------------------------------
# Other samplings, and groups
# ---------------------------------------------------------------------------------------------------------------------


def _passes(phases: tuple[Phase, ...]) -> list[int]:
    """Passes over the data of each phase. One has as many batches as hold all records, the last of them smaller."""
    return [math.ceil(phase.steps / math.ceil(1.0 / phase.rate - 1e-6)) for phase in phases]


def _shuffled(phases: tuple[Phase, ...], passes: list[int], delta: float) -> list[Row]:
    """Batches of shuffled passes: what as many batches cost where every record is once in each pass, for certain."""
    charges = [
        Charge(ShuffledEpoch(inner=Gaussian(noise_multiplier=phase.noise_multiplier)), count)
        for phase, count in zip(phases, passes, strict=True)
    ]
    total = sum(passes)
    words = f"every record once in {f'each of {total} passes' if total > 1 else 'one pass'}, no amplification"
    rows = []
    for name, relation in (("shuffled", Adjacency.ZERO_OUT), ("shuffled-replace", Adjacency.REPLACE_ONE)):
        rows.append(Row(name, _upper(charges, relation, delta), "certified", f"shuffled batches, {relation}", words))
    return rows


def _upper(charges: list[Charge], relation: Adjacency, delta: float) -> float:
    """Certified epsilon, infinite where there is no answer: half of the smallest noise, say, under replacement."""
    try:
        return _load("prv").curve(charges, relation).epsilon(delta).upper
    except (InvalidParameter, NotComputable):
        return math.inf


def _tf_once(phases: tuple[Phase, ...], passes: list[int], delta: float) -> Row:
    """What TensorFlow Privacy's statement prints for records that occur once per epoch, by its default accountant."""

    def moment(order: float) -> float:
        """The logarithm of E exp(order L) of a Gaussian a pass, in closed form."""
        return sum(
            count * 0.5 * order * (order + 1.0) / phase.noise_multiplier**2
            for phase, count in zip(phases, passes, strict=True)
        )

    note = f"TensorFlow Privacy's statement, once per epoch, {_MICROBATCHES}"
    epsilon = dp_accounting_rdp(moment, delta)
    return Row("tf-once-per-epoch", epsilon, "upper bound", f"shuffled batches, {Adjacency.ZERO_OUT}", note)


def _group(
    curve: PrivacyCurve, phases: tuple[Phase, ...], relation: Adjacency, delta: float, size: int, one: Bounds
) -> Row:
    """Certified for all records of a group together, by the better of two bounds; ``one`` is epsilon of one record."""
    chained = one.upper if size == 1 else size * _chain(curve, size, delta, one)
    whole = _whole(phases, relation, delta, size)
    note = f"{size} steps between neighbours" if chained <= whole else "without amplification, sensitivity of the group"
    return Row("group", min(chained, whole), "certified", f"{size} records together", note)


def _whole(phases: tuple[Phase, ...], relation: Adjacency, delta: float, size: int) -> float:
    """Epsilon of a group that is in every batch; infinite where that has no answer."""
    if min(phase.noise_multiplier for phase in phases) < size * MIN_NOISE_MULTIPLIER:
        return math.inf
    charges = [Charge(Gaussian(noise_multiplier=phase.noise_multiplier / size), phase.steps) for phase in phases]
    return _upper(charges, relation, delta)


def _chain(curve: PrivacyCurve, size: int, delta: float, one: Bounds) -> float:
    """An e with delta(e) (1 + exp(e) + ... + exp((size - 1) e)) <= delta; infinite where none was found.

    Along size neighbours, P_0(S) <= exp(size e) P_size(S) + delta(e) (1 + ... + exp((size - 1) e)) (cf. Vadhan 2017,
    Lemma 2.2), for every e that fits; the search ends at one that was seen to.
    """
    if size * curve.delta(0.0).upper <= delta:
        return 0.0
    log_delta = math.log(delta) - 1e-9

    def excess(log_epsilon: float) -> float:
        """The logarithm of the sum over delta."""
        epsilon = math.exp(log_epsilon)
        upper = curve.delta(epsilon).upper
        factor = (size - 1) * epsilon + math.log(-math.expm1(-size * epsilon)) - math.log(-math.expm1(-epsilon))
        return math.log(upper) + factor - log_delta if upper > 0.0 else -math.inf

    x, stride = math.log(max(one.upper, 1e-9)), 0.5
    low = here = (x, excess(x))
    for _ in range(_STRIDES):
        if here[1] <= 0.0:
            break
        x, stride = min(x + stride, 700.0), 2.0 * stride
        low, here = here, (x, excess(x))
    if here[1] > 0.0:
        return math.inf
    return math.exp(narrow(excess, low, here, _LEFT_OVER) if low[1] > 0.0 else here[0])
