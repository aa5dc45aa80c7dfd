"""Private and ordinary steps of models that were compiled, against the same steps as they are, in turns.

``python -m tests.benchmarks.compiled a e --rounds 20 --threads 1``: medians and quartiles of the ratio to the ordinary
step that ran just before, in wall time and in processor time, which says more on a machine that others use. A C++
compiler must be there; the first round takes up to a minute a model.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from dptrainer.clipping import make_engine
from dptrainer.clipping.compiled import CompiledForward, Settings
from dptrainer.update import release
from tests.benchmarks.step_models import CASES, Case
from tests.benchmarks.step_rows import RATE, Ours, non_private
from tests.benchmarks.trainer import timed


class OursCompiled(Ours):
    """The whole private step with a compiled forward pass."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.engine.detach()
        self.forward = CompiledForward(self.model, Settings("inductor"))
        self.engine = make_engine(self.model, self.run.plan.clip_norm, compiled=self.forward)

    def __call__(self) -> None:
        """One step."""
        self.optimizer.zero_grad()
        receipt = self.run.next_receipt()
        with self.engine.record(len(self.x)):
            losses = self.case.losses(self.engine.call(self.x), self.y)
        release(self.model, self.engine.backward(losses), receipt, self.noise)
        self.optimizer.step()
        assert self.forward.reason is None, self.forward.reason


def ordinary_compiled(case: Case) -> Callable[[], None]:
    """The step without privacy of a compiled model."""
    model, (x, y) = case.make(), case.data(case.batch)
    fast = torch.compile(model)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        case.losses(fast(x), y).mean().backward()
        optimizer.step()

    return step


def show(name: str, rounds: int) -> None:
    """One model: all rows in turns, each beside an ordinary step."""
    case = CASES[name]
    ordinary = non_private(case)
    rows = {
        "ordinary, compiled": ordinary_compiled(case),
        "private": Ours(case),
        "private, compiled": OursCompiled(case),
    }
    found: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
    base: list[tuple[float, float]] = []
    for number in range(rounds + 2):
        for row, step in rows.items():
            before, own = timed(ordinary), timed(step)
            if number >= 2:
                base.append(before)
                found[row].append((own[0] / before[0], own[1] / before[1]))
    wall, processor = (1e3 * statistics.median(one) for one in zip(*base, strict=True))
    print(f"{name}: ordinary {wall:.1f} ms, {processor:.1f} ms of processors")
    for row, ratios in found.items():
        print(f"  {row:20}", "   ".join(_quartiles(one) for one in zip(*ratios, strict=True)))


def _quartiles(ratios: tuple[float, ...]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.models:
        show(name, given.rounds)


if __name__ == "__main__":
    main()
