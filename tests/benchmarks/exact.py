"""What exact noise costs: a step of integer sums and rounded Gaussians beside the same step in floating point.

``python -m tests.benchmarks.exact [--rows a,b,...] [--pairs 15]``

Both clip one record at a time (:class:`~dptrainer.clipping.OneByOne`), take a receipt and update the model. The first
truncates gradients to integers and draws rounded Gaussians; the second adds the gradients in float32 and draws
``secure`` noise. They take turns in one process; printed are medians of wall milliseconds, of the ratio with quartiles,
and of the ordinary non-private step of the whole batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

import dpbudget
from dpbudget.grid import Grid, grid_for
from dpbudget.ledger.run import Run
from dpbudget.ledger.signing import Ed25519Signer
from dptrainer.clipping import OneByOne
from dptrainer.clipping.integers import LIBRARY, IntegerSums, sums_for
from dptrainer.noise.choice import source_for
from dptrainer.update import release
from tests.benchmarks.step_models import CASES, Case
from tests.benchmarks.step_rows import RATE, non_private

Step = Callable[[], object]
#: Records of a step: a quarter of a large batch is enough for a loop over records.
MOST_RECORDS = 64


class FloatSums(IntegerSums):
    """The same interface in float32: no grid, no check, one product and sum for each tensor."""

    def __init__(self, sizes: Sequence[int], grid: Grid, device: torch.device) -> None:
        super().__init__(sizes, grid, LIBRARY.get(), device)
        self.total = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        self._unit = grid.unit(1.0)
        self._ends = list(accumulate(sizes))
        self._rows = self.parts

    def add(self, values: Sequence[Tensor | None], factors: Sequence[float]) -> None:
        """``total += factor * values``."""
        for row, one, factor in zip(self._rows, values, factors, strict=True):
            if one is not None:
                row.add_(one.view(-1), alpha=factor * self._unit)


def float_sums(shapes: Mapping[str, torch.Size], grid: Grid, device: torch.device) -> IntegerSums:
    """As :func:`~dptrainer.clipping.integers.sums_for`."""
    return FloatSums([shape.numel() for shape in shapes.values()], grid, device)


def make_run(noise: str, parameters: int) -> Run:
    """A run with more steps than are measured, on a ledger in memory."""
    owner, writer = Ed25519Signer.generate(), Ed25519Signer.generate()
    plan = dpbudget.plan_for(
        noise_multiplier=20.0, delta=1e-5, dataset_size=1000, batch_size=1000, steps=1000, noise=noise,
        max_parameters=parameters,
    )  # fmt: skip
    ledger = dpbudget.Ledger.create(
        None,
        budget=dpbudget.Budget(epsilon=100.0, delta=1e-5),
        owner=owner,
        writer=writer,
        whole_budget=True,
        filter=dpbudget.PortfolioFilter(),
    )
    return ledger.start(ledger.sign_plan(plan, owner=owner))


def one_by_one(case: Case, records: int, noise: str) -> Step:
    """A private step of ``records`` records, each alone in the model."""
    model, (x, y) = case.make(), case.data(records)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RATE)
    size = 2 * sum(p.numel() for p in trained)
    run = make_run(noise, size)
    engine = OneByOne(model, clip_norm=1.0, sums=sums_for if noise == "exact" else float_sums)
    source = source_for(run.plan, None)

    def step() -> None:
        receipt = run.next_receipt()
        engine.begin(grid_for(receipt.noise_multiplier, receipt.max_parameters))
        for row in range(records):
            engine.add(case.losses(model(x[row : row + 1]), y[row : row + 1]))
        release(model, engine.finish(), receipt, source)
        optimizer.step()

    return step


def timed(step: Step) -> float:
    """Wall seconds of a step."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(CASES))
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.pairs} pairs")
    print(f"{'model':<34}{'records':>8}{'exact ms':>10}{'secure ms':>11}{'ratio (quartiles)':>24}{'ordinary ms':>13}")
    for name in arguments.rows.split(","):
        case = CASES[name]
        records = min(case.batch, MOST_RECORDS)
        steps = [one_by_one(case, records, "exact"), one_by_one(case, records, "secure"), non_private(case)]
        for step in steps:
            step()
        seconds = [[timed(step) for step in steps] for _ in range(arguments.pairs)]
        ratios = [row[0] / row[1] for row in seconds]
        low, middle, high = statistics.quantiles(ratios, n=4)
        exact, secure, ordinary = (statistics.median(1e3 * row[i] for row in seconds) for i in range(3))
        spread = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        print(f"{case.name:<34}{records:>8}{exact:>10.1f}{secure:>11.1f}{spread:>24}{ordinary:>13.1f}", flush=True)


if __name__ == "__main__":
    main()
