"""Accountants beside their peers, interleaved in one process: ``python -m tests.benchmarks.accounting [--quick]``.

Four tables: epsilon on twelve workloads, calibration of the noise multiplier, live epsilon of a plan, and cold starts.
Medians over rounds in which every cell runs once; a cell whose first call takes longer than the limit runs no more.
``--quick`` leaves out peers that take more than a second.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "dpbudget" / "accountants"))
sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))
import peers
from accounting_cases import WORKLOADS, Workload

from dpbudget._calibrate import calibrate, noise_for, plan_for
from dpbudget._live import build_meter
from dpbudget.accountants import get_accountant
from dpbudget.ledger.run import default_lease_steps
from dpbudget.mechanisms import Adjacency
from dpbudget.meter import Meter

ROUNDS, LIMIT_SECONDS = 7, 10.0
#: Peers left out by --quick.
SLOW = {"opacus prv", "dp-accounting pld", "prv_accountant 0.01"}
#: Exact noise multipliers for W1 to W3, from an independent contour script solved to 1e-12.
EXACT_NOISE = {
    ("W1", 0.5): 3.640439673, ("W1", 1): 2.024858411, ("W1", 3): 0.9684079236, ("W1", 8): 0.6557081639,
    ("W2", 0.5): 28.84128335, ("W2", 1): 15.32741908, ("W2", 3): 5.767354992, ("W2", 8): 2.575832602,
    ("W3", 0.5): 27.79475931, ("W3", 1): 14.57566019, ("W3", 3): 5.362730287, ("W3", 8): 2.352891223,
}  # fmt: skip


@dataclass
class Cell:
    """One question to one accountant, its last answer and its times in milliseconds."""

    ask: Callable[[], object]
    answer: object = None
    times: list[float] = field(default_factory=list)
    ended: str = ""

    def run(self) -> None:
        """Ask once, unless an earlier call failed or took too long."""
        if self.ended:
            return
        start = time.perf_counter()
        try:
            self.answer = self.ask()
        except ImportError:
            self.ended = "not installed"
            return
        except Exception as error:
            self.ended = type(error).__name__
            return
        self.times.append((time.perf_counter() - start) * 1e3)
        if self.times[-1] > LIMIT_SECONDS * 1e3:
            self.ended = f"> {LIMIT_SECONDS:g} s"

    @property
    def median(self) -> float:
        """Median milliseconds; NaN where there was no answer."""
        # The first call warms caches and imports.
        return statistics.median(self.times[1:] or self.times) if self.times else float("nan")

    @property
    def spread(self) -> str:
        """Quartiles of the times."""
        kept = sorted(self.times[1:] or self.times)
        return f"{kept[len(kept) // 4]:.1f}-{kept[(3 * len(kept)) // 4]:.1f}" if kept else ""


def interleave(rows: list[dict[str, Cell]], rounds: int) -> None:
    """Every cell once a round, so that a busy moment hits all alike."""
    for _ in range(rounds):
        for row in rows:
            for cell in row.values():
                cell.run()


def epsilon_row(workload: Workload, quick: bool) -> dict[str, Cell]:
    """Ours and every peer on one workload; a fresh curve each time."""
    prv, rdp = get_accountant("prv"), get_accountant("rdp")
    row = {
        "prv": Cell(lambda: prv.curve(workload.charges, Adjacency.ADD_REMOVE).epsilon(workload.delta)),
        "rdp": Cell(lambda: rdp.curve(workload.charges, Adjacency.ADD_REMOVE).epsilon(workload.delta)),
    }
    others = {**peers.BOUNDS, "prv_accountant 0.01": lambda s, d: peers.prv_accountant(s, d, 0.01)}
    del others["prv_accountant"]
    for name, peer in others.items():
        if not (quick and name in SLOW):
            row[name] = Cell(lambda peer=peer: peer(workload.steps, workload.delta)[1])
    return row


def show_epsilon(rounds: int, quick: bool) -> None:
    """Table 1."""
    rows = {w: epsilon_row(w, quick) for w in WORKLOADS}
    interleave(list(rows.values()), rounds)
    print("epsilon: ours certified (lower end, width), then milliseconds; peers: answer, milliseconds, times ours")
    for workload, row in rows.items():
        bounds, ours = row["prv"].answer, row["prv"]
        print(f"{workload.name:4} prv {bounds.lower:.13g} +{bounds.width:.1e} {ours.median:8.2f} ms ({ours.spread})")
        for name, cell in list(row.items())[1:]:
            answer = cell.answer.upper if hasattr(cell.answer, "upper") else cell.answer
            told = cell.ended or ("" if answer is None else f"{answer:.7g}")
            print(f"       {name:20} {told:>14} {cell.median:10.2f} ms {cell.median / ours.median:9.1f} x")


def calibration_row(workload: Workload, epsilon: float, quick: bool) -> dict[str, Cell]:
    """Noise multipliers for one target."""
    ((rate, _, steps),) = workload.steps
    row = {
        "ours": Cell(lambda: noise_for(epsilon=epsilon, delta=workload.delta, sample_rate=rate, steps=steps)),
        "opacus rdp": Cell(lambda: peers.opacus_noise(rate, steps, epsilon, workload.delta, "rdp")),
        "dp-accounting rdp": Cell(lambda: peers.dp_accounting_noise(rate, steps, epsilon, workload.delta, "rdp")),
    }
    if not quick:
        row["opacus prv"] = Cell(lambda: peers.opacus_noise(rate, steps, epsilon, workload.delta, "prv"))
        row["dp-accounting pld"] = Cell(lambda: peers.dp_accounting_noise(rate, steps, epsilon, workload.delta, "pld"))
    return row


def show_calibration(rounds: int, quick: bool) -> None:
    """Table 2."""
    by_name = {w.name: w for w in WORKLOADS}
    rows = {key: calibration_row(by_name[key[0]], key[1], quick) for key in EXACT_NOISE}
    interleave(list(rows.values()), rounds)
    print("\nnoise multiplier for a target epsilon: relative excess over the exact one, milliseconds, times ours")
    for (name, epsilon), row in rows.items():
        for peer, cell in row.items():
            excess = f"{cell.answer / EXACT_NOISE[name, epsilon] - 1:+.1e}" if cell.answer else cell.ended
            ratio = cell.median / row["ours"].median
            print(f"{name} {epsilon:4g} {peer:18} {excess:>10} {cell.median:10.2f} ms {ratio:8.1f} x")


def show_meter(rounds: int) -> None:
    """Table 3."""
    print("\nlive epsilon of a plan of 1e5 steps: points of the table, milliseconds")
    for rate, sigma in ((256 / 60000, 1.1), (0.01, 1.0), (1e-3, 1.0)):
        plan = plan_for(noise_multiplier=sigma, delta=1e-5, sample_rate=rate, steps=10**5)
        cell = Cell(lambda plan=plan: build_meter(plan))
        interleave([{"meter": cell}], rounds)
        print(
            f"rate {rate:.4g}, noise {sigma:g}: {len(cell.answer.steps)} points, {cell.median:.1f} ms ({cell.spread})"
        )
    print("read after every step, in leases of the usual size: milliseconds in all, and for each step")
    for facts in ((1437, 64, 20), (60000, 256, 10), (60000, 256, 427)):
        size, batch, epochs = facts
        plan = calibrate(epsilon=3.0, delta=1e-5, dataset_size=size, batch_size=batch, epochs=epochs)
        cell = Cell(lambda plan=plan: read_through(build_meter(plan), plan.steps))
        interleave([{"meter": cell}], rounds)
        print(f"{plan.steps} steps, table included: {cell.median:.0f} ms, {cell.median / plan.steps:.3f} ms a step")


def read_through(meter: Meter, steps: int) -> None:
    """What a training run asks: epsilon of the charged steps after each step."""
    lease = default_lease_steps(steps)
    for step in range(1, steps + 1):
        meter.epsilon(min(-(-step // lease) * lease, steps))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave out the slow peers")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    show_epsilon(arguments.rounds, arguments.quick)
    show_calibration(max(arguments.rounds // 2, 2), arguments.quick)
    show_meter(arguments.rounds)
    print("\ncold start on W1, fresh processes: median seconds, peak MiB")
    # From a small process: a child's peak memory counts what it had of its parent before it became another program.
    subprocess.run([sys.executable, str(Path(__file__).with_name("cold.py"))], check=True)


if __name__ == "__main__":
    main()
