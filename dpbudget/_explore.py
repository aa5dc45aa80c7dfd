"""Before training: what batch size and length of training cost in noise at one epsilon.

All of it is an estimate, kind ``numerical``, and not claimed; :func:`~dpbudget.calibrate` certifies the chosen row.

What a row is worth is its *signal-to-noise ratio per step*, batch size / noise multiplier. One step averages B clipped
gradients of norm at most C and adds noise of standard deviation sigma C / B in every direction. So B / sigma is the
largest that the average can be, C, over the noise along it: an upper limit, by which rows of one model compare, since
gradients that disagree lower all of them. Its inverse, sigma / B, is the effective noise whose fall with the batch size
says when a larger batch stops paying (De et al. 2022; Ponomareva et al. 2023; Räisä, Jälkö and Honkela 2024). Epsilon
depends on little but sigma / (q sqrt(T)) where sigma exceeds 2 (Sander, Stock and Sablayrolles 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from dpbudget._calibrate import _Draft, _draft, _first_guess
from dpbudget._checks import as_count, as_epochs, as_epsilon
from dpbudget._schedule import make_schedule
from dpbudget._search import near_noise, rough_noise
from dpbudget.errors import InvalidParameter
from dpbudget.mechanisms import Adjacency
from dpbudget.mechanisms.gaussian import MAX_NOISE_MULTIPLIER, MIN_NOISE_MULTIPLIER
from dpbudget.plan import DEFAULT_MAX_PARAMETERS, MAX_SIZE, MAX_STEPS

#: Batch sizes and lengths of a sweep if none are given, and how far below the largest both begin: cells of equal
#: numbers of steps then lie on diagonals.
POINTS, MOST_POINTS, _SPAN = 20, 40, 200
#: Points of each sweep where several are made, and cells that one may wait for.
FEWER_POINTS, MOST_CELLS = 12, 2000
#: Documented defaults: what rows may claim, the longest training that is looked at, and the fewest steps that a row
#: needs to count.
EPSILONS, MAX_EPOCHS, MIN_STEPS = (1.0, 3.0, 8.0), 100, 500
#: After so many cells without an answer none is looked for.
_HOPELESS = 20
#: Fewer steps than this are asked for roughly.
_FEW = 64
#: By which power of the noise epsilon falls, about.
_POWER = 1.5
#: What is left of a delta that does not cover the tail.
_NOTHING = 1e-320
#: The smallest epsilon that is swept.
LEAST_EPSILON = 1e-3
#: A row is enough if it has this share of the highest signal-to-noise ratio.
ENOUGH = 0.9
#: Compute that differs by less, relatively, is the same: steps are whole, so that equal lengths differ a little.
SAME_COMPUTE = 0.01


@dataclass(frozen=True)
class Cell:
    """One way to train within epsilon, with an estimate of its noise.

    Attributes:
        batch_size: expected number of records of a step.
        epochs: expected uses of each record that were asked for.
        steps: ceil(epochs * dataset_size / batch_size).
        noise_multiplier: estimate; None where there is none.
    """

    batch_size: int
    epochs: Fraction
    steps: int
    noise_multiplier: float | None

    @property
    def records(self) -> int:
        """Compute: the expected number of records that are processed."""
        return self.batch_size * self.steps

    @property
    def signal(self) -> float:
        """Signal-to-noise ratio per step, batch size / noise multiplier; 0 where the noise is not known."""
        return 0.0 if self.noise_multiplier is None else self.batch_size / self.noise_multiplier


@dataclass(frozen=True)
class Member:
    """A cell of the efficient frontier.

    Attributes:
        cell: nothing with as many steps as are needed has more signal for about as little compute.
        more_signal, more_records: relative to the member before it, by what share; None for the first.
    """

    cell: Cell
    more_signal: float | None
    more_records: float | None


@dataclass(frozen=True)
class Sweep:
    """All cells of batch sizes times lengths at one epsilon.

    Attributes:
        cells: every batch size of the first length, then of the next.
        kind: what the noise multipliers are.
    """

    epsilon: float
    delta: float
    dataset_size: int
    batch_sizes: tuple[int, ...]
    epochs: tuple[Fraction, ...]
    cells: tuple[Cell, ...]
    kind: Literal["numerical"] = "numerical"

    def frontier(self, min_steps: int = MIN_STEPS) -> tuple[Member, ...]:
        """The cells with at least ``min_steps`` steps that have more signal than any that needs no more compute.

        In the order of compute; of those whose compute is the same within 1 % only the one with most signal. How many
        steps a model needs is not a matter of privacy: as many as it takes to train it without. For a given number of
        them more compute is a larger batch, and what it brings falls off.
        """
        useful = [cell for cell in self.cells if cell.steps >= min_steps and cell.signal > 0.0]
        best: list[Cell] = []
        least = 0.0  # compute of the group that the last one stands for
        for cell in sorted(useful, key=lambda cell: (cell.records, -cell.signal)):
            if best and cell.signal <= best[-1].signal:
                continue
            if best and cell.records <= least * (1.0 + SAME_COMPUTE):
                best[-1] = cell
            else:
                best.append(cell)
                least = cell.records
        more = [(cell.signal / last.signal - 1.0, cell.records / last.records - 1.0) for last, cell in pairwise(best)]
        return tuple(Member(cell, *gain) for cell, gain in zip(best, [(None, None), *more], strict=False))

    def chosen(self, min_steps: int = MIN_STEPS, share: float = ENOUGH) -> Member | None:
        """The cheapest member of the frontier with ``share`` of its highest signal; None if no cell has the steps."""
        members = self.frontier(min_steps)
        best = max((member.cell.signal for member in members), default=0.0)
        return next((member for member in members if member.cell.signal >= share * best), None)


def explore(
    *,
    epsilon: float,
    dataset_size: int,
    delta: float | None = None,
    batch_sizes: Sequence[int] | None = None,
    epochs: Sequence[float | Fraction] | None = None,
    max_batch: int | None = None,
    max_epochs: float | Fraction = MAX_EPOCHS,
    min_steps: int = 1,
    points: int = POINTS,
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    max_parameters: int = DEFAULT_MAX_PARAMETERS,
    noise: str = "secure",
    progress: Callable[[], None] | None = None,
) -> Sweep:
    """The noise that every batch size and length of training needs for ``epsilon``: estimates, no guarantee.

    An estimate is within 1 % of the certified noise multiplier (tests compare the two), typically within 0.1 %.

    Args:
        epsilon: what each row may claim, at least 0.001.
        dataset_size: the public nominal size.
        delta: 1 / dataset_size^1.1 if not given.
        batch_sizes: exactly these; else ``points`` of them up to ``max_batch`` (the dataset).
        epochs: exactly these lengths; else ``points`` of them up to ``max_epochs``.
        max_batch: the largest batch that is of use.
        max_epochs: the longest training that is of use.
        min_steps: no noise is looked for in cells of fewer steps; those of a few rare records take longest.
        points: how many batch sizes and lengths are laid out, in [2, 40].
        adjacency: which datasets are neighbours.
        max_parameters: as in :func:`~dpbudget.calibrate`.
        noise: as in :func:`~dpbudget.calibrate`.
        progress: called after every cell.

    Raises:
        InvalidParameter: a value is out of range (DP001 to DP009), or a batch exceeds the dataset (DP008).
    """
    target, size = _as_target(epsilon), as_count("dataset size", dataset_size, MAX_SIZE)
    batches, lengths = _axes(size, batch_sizes, epochs, max_batch, as_epochs(max_epochs), points)
    least_steps = as_count("min steps", min_steps, MAX_STEPS)

    def draft(batch: int, length: Fraction) -> _Draft:
        schedule = make_schedule(dataset_size=size, batch_size=batch, epochs=length)
        return _draft(schedule, delta, 1.0, adjacency, "prv", max_parameters, noise)

    # From the largest batch, whose law is the smoothest, so that each cell is near one that is solved.
    known: dict[tuple[int, int], tuple[float, float]] = {}
    cells: dict[tuple[int, int], Cell] = {}
    tried = 0
    for column in reversed(range(len(batches))):
        for row in range(len(lengths)):
            one = draft(batches[column], lengths[row])
            steps, found = one.schedule.steps, None
            if steps >= least_steps and (known or tried < _HOPELESS):
                found = _solve(one, target, _neighbour(known, row, column))
                tried += 1
            if found is not None:
                known[row, column] = found
            sigma = None if found is None else found[0]
            cells[row, column] = Cell(batches[column], lengths[row], steps, sigma)
            if progress is not None:
                progress()
    return Sweep(
        epsilon=target,
        delta=draft(batches[0], lengths[0]).delta,
        dataset_size=size,
        batch_sizes=batches,
        epochs=lengths,
        cells=tuple(cells[key] for key in sorted(cells)),
    )


def _as_target(value: object) -> float:
    """An epsilon that a model could be trained with; raises InvalidParameter (DP001)."""
    target = as_epsilon(value)
    if target < LEAST_EPSILON:
        raise InvalidParameter(
            f"a sweep begins at epsilon {LEAST_EPSILON:g}, got {target:g}, at which noise drowns every batch",
            code="DP001",
            hint="pass a larger epsilon; dpbudget calibrate answers for this one",
        )
    return target


def _solve(draft: _Draft, target: float, start: tuple[float, float] | None) -> tuple[float, float] | None:
    """Estimates of the noise and of epsilon's power of it, from a neighbour's or from a rough start."""
    least, curve, delta = _least_noise(draft), draft.curve, draft.ideal_delta
    if least is None:
        return None
    guess = _first_guess(draft.schedule, target, draft.delta)
    if start is None:
        rough = rough_noise(curve, target, delta, guess)
        start = (guess, _POWER) if rough is None else (math.exp(rough[0]), _POWER)
    # Few steps have a law whose moments fall off slowly, and sums that grow with what is asked of them.
    tolerance = 1e-3 if draft.schedule.steps < _FEW else 1e-5
    # Rare large losses ask for more care than most laws need.
    found = near_noise(curve, target, delta, start, least, tolerance)
    return found or near_noise(curve, target, delta, (guess, _POWER), least, 1e-8)


def _least_noise(draft: _Draft) -> float | None:
    """The smallest noise whose bounded tail delta covers, which no epsilon goes below; None if none does."""
    low, high = math.log(MIN_NOISE_MULTIPLIER), math.log(MAX_NOISE_MULTIPLIER)
    if draft.ideal_delta(MAX_NOISE_MULTIPLIER) <= _NOTHING:
        return None
    while high - low > 1e-3:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if draft.ideal_delta(math.exp(middle)) > _NOTHING else (middle, high)
    return math.exp(high)


def _neighbour(known: dict[tuple[int, int], tuple[float, float]], row: int, column: int) -> tuple[float, float] | None:
    """A start from cells that are solved: log sigma continues as a plane through three of them, or a line."""
    beside, above, corner = known.get((row, column + 1)), known.get((row - 1, column)), known.get((row - 1, column + 1))
    if beside and above and corner:
        return beside[0] * above[0] / corner[0], above[1]
    if above:
        further = known.get((row - 2, column))
        return (above[0] ** 2 / further[0] if further else above[0]), above[1]
    if beside:
        further = known.get((row, column + 2))
        return (beside[0] ** 2 / further[0] if further else beside[0]), beside[1]
    # Where few steps are left out the first cell of a column has its like, of as many steps, aslant.
    aslant, further = known.get((row + 1, column + 1)), known.get((row + 2, column + 2))
    if aslant:
        return (aslant[0] ** 2 / further[0] if further else aslant[0]), aslant[1]
    return None


def _axes(
    size: int,
    batch_sizes: Sequence[int] | None,
    epochs: Sequence[float | Fraction] | None,
    max_batch: int | None,
    max_epochs: Fraction,
    points: int,
) -> tuple[tuple[int, ...], tuple[Fraction, ...]]:
    """Batch sizes and lengths in increasing order, those that would be too many steps left out."""
    if as_count("points", points, MOST_POINTS) < 2:
        raise InvalidParameter("points must be at least 2, got 1", hint="pass batch size and epochs themselves")
    largest = min(size, as_count("max batch", size if max_batch is None else max_batch, MAX_SIZE))
    if batch_sizes:
        batches = sorted({as_count("batch size", batch, MAX_SIZE) for batch in batch_sizes})
    else:
        batches = sorted({int(value) for value in _spread(max(1.0, largest / _SPAN), Fraction(largest), points)})
    if epochs:
        lengths = sorted({as_epochs(length) for length in epochs})
    else:
        lengths = sorted(set(_spread(float(max_epochs) / _SPAN, max_epochs, points)))
    if len(batches) * len(lengths) > MOST_CELLS:
        said = f"{len(batches)} batch sizes times {len(lengths)} lengths are more than {MOST_CELLS} cells"
        raise InvalidParameter(said, hint="pass fewer of them")
    return tuple(batch for batch in batches if lengths[-1] * size <= batch * MAX_STEPS) or (largest,), tuple(lengths)


def _spread(low: float, high: Fraction, points: int) -> list[Fraction]:
    """Numbers of two digits, evenly in their logarithms, up to ``high`` itself."""
    ratio = (float(high) / low) ** (1.0 / (points - 1))
    rounded = [Fraction(f"{low * ratio**index:.1e}") for index in range(points - 1)]
    return [*(value for value in rounded if value < high), high]
