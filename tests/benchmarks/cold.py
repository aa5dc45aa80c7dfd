"""Fresh processes: how long one answer takes from nothing, and its peak memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

W1 = "--sample-rate 256/60000 --noise-multiplier 1.1 --steps 14062 --delta 1e-5"
OPACUS = (
    "from opacus.accountants import RDPAccountant as A\n"
    "a = A()\na.history = [(1.1, 256 / 60000, 14062)]\nprint(a.get_epsilon(1e-5))"
)
DP_ACCOUNTING = (
    "import dp_accounting as d\nfrom dp_accounting import rdp\n"
    "e = d.SelfComposedDpEvent(d.PoissonSampledDpEvent(256 / 60000, d.GaussianDpEvent(1.1)), 14062)\n"
    "print(rdp.RdpAccountant().compose(e).get_epsilon(1e-5))"
)


def run(command: list[str]) -> tuple[float, float]:
    """(seconds, peak MiB) of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[:3]} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def cold_starts(rounds: int) -> list[tuple[str, float, float]]:
    """(name, median seconds, peak MiB), interleaved."""
    script = str(Path(sys.executable).with_name("dpbudget"))
    commands = {
        "dpbudget epsilon": [script, "epsilon", *W1.split()],
        "import opacus, RDP answer": [sys.executable, "-W", "ignore", "-c", OPACUS],
        "import dp_accounting, RDP answer": [sys.executable, "-c", DP_ACCOUNTING],
    }
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            try:
                seen[name].append(run(command))
            except RuntimeError:
                continue
    return [
        (name, statistics.median(t for t, _ in runs), max(m for _, m in runs)) for name, runs in seen.items() if runs
    ]


if __name__ == "__main__":
    for name, seconds, peak in cold_starts(5):
        print(f"{name:34} {seconds:6.2f} s {peak:6.0f} MiB")
