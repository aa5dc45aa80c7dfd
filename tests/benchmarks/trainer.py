"""What a private step costs beside the same step without privacy, ours and every peer's, on CPU.

``python -m tests.benchmarks.trainer [--models a,b,...] [--rows ours,nonpriv,...] [--pairs 30] [--threads 2]
[--no-memory]``

Each model's rows take turns in one process, each step right after a non-private one; printed are medians, and the
median ratio of wall time (with quartiles) and of processor time. Slow rows take fewer turns. Peak memory is measured in
a fresh process for each row: growth of the resident set (VmHWM) over three steps, from the moment when the model exists
and the libraries have been used once. Of our step the ratio of processor
time without its noise is printed too, and the noise's share of it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from dptrainer.noise.gaussian import add_gaussian_
from tests.benchmarks.step_models import CASES, Case
from tests.benchmarks.step_rows import ROWS, Ours, Step, build

#: Rows that run in every round; the others in every third, and in two rounds if a step takes over 2 s.
EVERY_ROUND = ("ours",)

Sample = tuple[float, float, float, float, float]  # wall and processor seconds, the same of the plain step, noise


def timed(step: Step) -> tuple[float, float]:
    """Wall and processor seconds of one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(case: Case, rows: list[str], rounds: int) -> dict[str, list[Sample] | str]:
    """Samples of each row, in turns, each after a non-private step."""
    plain = build("nonpriv", case)
    assert not isinstance(plain, str), plain
    steps = {name: build(name, case) for name in rows}
    found: dict[str, list[Sample] | str] = {n: s if isinstance(s, str) else [] for n, s in steps.items()}
    for turn in range(rounds):
        for name, step in steps.items():
            samples = found[name]
            if isinstance(step, str) or isinstance(samples, str):
                continue
            if name not in EVERY_ROUND and (turn % 3 or (samples[1:] and samples[0][0] > 2.0)):
                continue
            base = timed(plain)
            spent = timed(step)
            noise = step.noise.seconds if isinstance(step, Ours) else 0.0
            samples.append((*spent, *base, noise))
    return found


def peak_memory(model: str, row: str) -> str:
    """MiB, from a fresh process."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.trainer", "--peak", model, row]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().rpartition("\n")[2] if done.returncode == 0 else "-"


def _status(field: str) -> float:
    text = Path("/proc/self/status").read_text()
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(field)) / 1024


def show_peak(model: str, row: str) -> None:
    """Print the growth of this process over three steps of a row."""
    case = CASES[model]
    torch.nn.functional.conv2d(torch.ones(4, 4, 8, 8), torch.ones(4, 4, 3, 3, requires_grad=True)).sum().backward()
    step = ROWS[row](case)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    print(f"{_status('VmHWM') - before:.0f}")


COLUMNS = ("row", "ms", "CPU ms", "ratio", "quartiles", "CPU ratio", "no noise", "noise", "peak+ MiB", "n")
LAYOUT = "{:<18}{:>9}{:>9}{:>8}   {:<15}{:>10}{:>10}{:>7}{:>11}{:>4}"


def line(name: str, samples: list[Sample], peak: str) -> str:
    """One row of the table."""
    wall, cpu = (f"{1e3 * statistics.median(s[i] for s in samples):.2f}" for i in (0, 1))
    ratios = [s[0] / s[2] for s in samples]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    cpu_ratio = f"{statistics.median(s[1] / s[3] for s in samples):.2f}"
    silent = noise = ""
    if samples[0][4]:
        silent = f"{statistics.median((s[1] - s[4]) / s[3] for s in samples):.2f}"
        noise = f"{100 * statistics.median(s[4] / s[1] for s in samples):.0f} %"
    spread = f"{low:.2f} to {high:.2f}"
    return LAYOUT.format(name, wall, cpu, f"{middle:.2f}", spread, cpu_ratio, silent, noise, peak, len(samples))


def show(model: str, rows: list[str], rounds: int, memory: bool) -> None:
    """The table of one model."""
    case = CASES[model]
    print(f"\n({model}) {case.name}")
    print(LAYOUT.format(*COLUMNS))
    found = compare(case, rows, rounds)
    plain: list[Sample] = [
        (*s[2:4], *s[2:4], 0.0) for samples in found.values() if not isinstance(samples, str) for s in samples
    ]
    for name, samples in {"nonpriv": plain, **found}.items():
        if isinstance(samples, str):
            print(f"{name:<18}{samples}")
        elif samples:
            print(line(name, samples, peak_memory(model, name) if memory else "-"), flush=True)


def noise_nanoseconds(count: int) -> tuple[float, float]:
    """Median nanoseconds a value of (``add_(torch.randn)``, secure noise), float32 in place."""
    target = torch.zeros(count)
    rows: list[tuple[float, float]] = []
    for _ in range(9):
        begin = time.perf_counter()
        target.add_(torch.randn(count))
        middle = time.perf_counter()
        add_gaussian_(target, bytes(32), 0, 1.0)
        rows.append((middle - begin, time.perf_counter() - middle))
    usual, secure = (statistics.median(column) / count * 1e9 for column in zip(*rows, strict=True))
    return usual, secure


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "ROW"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(chosen.threads)
    if chosen.peak:
        show_peak(*chosen.peak)
        return
    print(f"torch {torch.__version__}, {chosen.threads} threads, {chosen.pairs} rounds")
    rows = [name for name in chosen.rows.split(",") if name != "nonpriv"]
    for model in chosen.models.split(","):
        show(model, rows, chosen.pairs, not chosen.no_memory)
    for count in (10**6, 10**7):
        usual, secure = noise_nanoseconds(count)
        print(f"\nnoise, {count:.0e} values: add_(randn) {usual:.1f} ns, secure {secure:.1f} ns")


if __name__ == "__main__":
    main()
