"""What charging before release costs: one step of a run on SQLite, by steps a lease, and replay by a verifier.

``python -m tests.benchmarks.ledger`` prints medians over interleaved runs of one process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import dpbudget
from dpbudget.ledger.journal import replay
from dpbudget.ledger.signing import Ed25519Signer
from dpbudget.ledger.store.reader import read_ledger

STEPS, ROUNDS, LEASES = 400, 5, (1, 8, 20, 64)


def spend(folder: Path, lease_steps: int) -> tuple[float, float, int]:
    """Seconds a step, seconds of a full replay, and records."""
    owner, writer = Ed25519Signer.generate(), Ed25519Signer.generate()
    budget = dpbudget.Budget(epsilon=3.0, delta=1e-5)
    path = folder / f"{lease_steps}-{time.monotonic_ns()}.ledger"
    with dpbudget.create_ledger(path, budget=budget, owner=owner, writer=writer, whole_budget=True) as ledger:
        plan = dpbudget.calibrate(epsilon=3.0, delta=1e-5, dataset_size=1000, batch_size=1000, steps=STEPS)
        run = ledger.start(ledger.sign_plan(plan, owner=owner), lease_steps=lease_steps)
        begin = time.perf_counter()
        for _ in run:
            pass
        spent = time.perf_counter() - begin
        run.close()
    snapshot = read_ledger(path)
    begin = time.perf_counter()
    replay(snapshot.entries, snapshot.note, owner.public)
    return spent / STEPS, time.perf_counter() - begin, len(snapshot.entries)


def main() -> None:
    """One table: steps a lease, microseconds a step, replay."""
    seconds: dict[int, list[tuple[float, float, int]]] = {lease: [] for lease in LEASES}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(ROUNDS):
            for lease in LEASES:
                seconds[lease].append(spend(Path(name), lease))
    print(f"{'steps a lease':>13}{'us a step':>12}{'min':>8}{'max':>8}{'replay us a record':>20}")
    for lease, rows in seconds.items():
        step = [1e6 * row[0] for row in rows]
        read = statistics.median(1e6 * row[1] / row[2] for row in rows)
        print(f"{lease:>13}{statistics.median(step):>12.0f}{min(step):>8.0f}{max(step):>8.0f}{read:>20.0f}")


if __name__ == "__main__":
    main()
