"""Accountants on twelve workloads: bracket, width and median time. ``python -m tests.benchmarks.accounting``."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "dpbudget" / "accountants"))
from accounting_cases import WORKLOADS, Workload

from dpbudget.accountants import Accountant, get_accountant
from dpbudget.curve import Bounds
from dpbudget.mechanisms import Adjacency

REPETITIONS = 5


def measure(accountant: Accountant, workload: Workload) -> tuple[Bounds, float]:
    """The bounds of epsilon and the median milliseconds of a fresh curve and one question."""
    times = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        bounds = accountant.curve(workload.charges, Adjacency.ADD_REMOVE).epsilon(workload.delta)
        times.append((time.perf_counter() - start) * 1e3)
    return bounds, statistics.median(times)


def main() -> None:
    """Print the table."""
    prv, rdp = get_accountant("prv"), get_accountant("rdp")
    print(f"{'':4} {'lower':>20} {'upper':>20} {'width':>9} {'prv ms':>8} {'rdp':>12} {'rdp ms':>8}")
    for workload in WORKLOADS:
        bounds, exact_ms = measure(prv, workload)
        renyi, renyi_ms = measure(rdp, workload)
        print(
            f"{workload.name:4} {bounds.lower:20.14g} {bounds.upper:20.14g} {bounds.width:9.1e} {exact_ms:8.1f}"
            f" {renyi.upper:12.6g} {renyi_ms:8.1f}"
        )


if __name__ == "__main__":
    main()
