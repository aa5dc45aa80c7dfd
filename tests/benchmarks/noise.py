"""What a Gaussian value costs on CPU: ours beside generators without a secret key, and Opacus's secure arithmetic.

``python -m tests.benchmarks.noise [--counts 1e6,1e7] [--rounds 15]``

A last table has the Poisson draw of a step, beside a uniform number for every record as Opacus draws it.

Every row takes its turn in every round, in one process. Printed are the median nanoseconds a value, quartiles, the best
round, the processor time of all threads, and the median over rounds of the ratio to ``torch.randn`` on as many threads
(generation) or to ``add_(normal_())`` (update in place). On a busy machine only processor time and the best round mean
anything. Ours starts from zeros, so its generation and its update are the same work on other memory. Opacus's
``secure_mode`` sums four normal values and halves the sum; here they come from torch's ordinary generator.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from dptrainer._binomial import distribution_floors
from dptrainer.noise import gaussian, native
from dptrainer.noise.chacha import fill
from dptrainer.sampling import poisson_indices

KEY = bytes(32)
Row = Callable[[], object]


def ours(target: torch.Tensor, kernel: native.Kernel | None) -> Row:
    """Update of ``target`` in place by one path, whatever the process would choose."""

    def run() -> None:
        if kernel is None:
            gaussian._add_by_tiles([(target, 0, 0)], KEY, 1.0, gaussian.numpy_threads(target.numel()))
        else:
            kernel.add([(target, 0, 0)], KEY, 1.0, torch.get_num_threads())

    return run


def rows(count: int, kernel: native.Kernel | None) -> dict[str, tuple[str, Row]]:
    """Name -> (what it is compared with, the work)."""
    target, scratch, generator = torch.zeros(count), torch.empty(count), np.random.Generator(np.random.SFC64(0))
    words = bytearray(64 * gaussian.BLOCKS)
    tiles = -(-count // (10 * gaussian.BLOCKS))
    found: dict[str, tuple[str, Row]] = {
        "torch.randn": ("torch.randn", lambda: torch.randn(count)),
        "normal_": ("torch.randn", lambda: scratch.normal_()),
        "numpy SFC64 float32": ("torch.randn", lambda: generator.standard_normal(count, dtype=np.float32)),
        "Opacus secure: sum of four": ("torch.randn", lambda: sum(torch.randn(count) for _ in range(4)) / 2),
        "add_(normal_())": ("add_(normal_())", lambda: target.add_(scratch.normal_())),
        "add_(randn)": ("add_(normal_())", lambda: target.add_(torch.randn(count))),
        "keystream alone": ("torch.randn", lambda: [fill(words, KEY, 0, i) for i in range(tiles)]),
        "ours, eager": ("both", ours(target, None)),
    }
    if kernel is not None:
        found["ours, compiled"] = ("both", ours(target, kernel))
    return found


def measure(chosen: dict[str, tuple[str, Row]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds of every row in every round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for turn in range(rounds + 1):
        for name, (_, work) in chosen.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if turn:  # the first round warms up
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def ratio(seconds: dict[str, list[tuple[float, float]]], name: str, base: str, against: str) -> str:
    """Median over rounds of wall and of processor time relative to ``base``, or nothing if that is another kind."""
    if against not in (base, "both"):
        return ""
    both = zip(seconds[name], seconds[base], strict=True)
    walls, cpus = zip(*((a[0] / b[0], a[1] / b[1]) for a, b in both), strict=True)
    return f"{statistics.median(walls):.2f} ({statistics.median(cpus):.2f})"


def show(count: int, threads: int, rounds: int, kernel: native.Kernel | None) -> None:
    """One table."""
    torch.set_num_threads(threads)
    chosen = rows(count, kernel)
    seconds = measure(chosen, rounds)
    print(f"\n{count:.0e} float32 values, {threads} thread{'s' * (threads > 1)}, {rounds} rounds: wall (processor)")
    print(f"{'row':<28}{'ns':>7}   {'quartiles':<16}{'best':>6}{'CPU ns':>8}{'/ randn':>15}{'/ add_(normal_)':>18}")
    for name, (against, _) in chosen.items():
        walls, cpus = ([1e9 / count * s[i] for s in seconds[name]] for i in (0, 1))
        low, middle, high = statistics.quantiles(walls, n=4)
        ratios = [ratio(seconds, name, base, against) for base in ("torch.randn", "add_(normal_())")]
        spread, cpu = f"{low:.2f} to {high:.2f}", statistics.median(cpus)
        print(
            f"{name:<28}{middle:>7.2f}   {spread:<16}{min(walls):>6.2f}{cpu:>8.2f}{ratios[0]:>15}{ratios[1]:>18}",
            flush=True,
        )


#: (population, sampling rate); a uniform number for every record needs memory for so many.
DRAWS = ((10**9, 1e-6), (10**9, 1e-4), (10**6, 1e-3), (60_000, 256 / 60_000), (50_000, 0.0625), (10**6, 0.05))
MOST_NUMBERS = 10**7


def show_draws(rounds: int) -> None:
    """Milliseconds of one step's Poisson draw: the first one with a rate, which makes its table, and those after it."""
    torch.set_num_threads(1)
    print(f"\nPoisson draw of a step, medians of {rounds}, ms")
    print(f"{'population':>12}{'rate':>10}{'batch':>9}{'first':>9}{'ours':>9}{'numbers for all':>17}")
    for population, rate in DRAWS:
        rate_k = round(rate * 2**64)
        distribution_floors.cache_clear()
        ours = seconds_of(lambda turn, k=rate_k, n=population: poisson_indices(turn.to_bytes(32), k, n), rounds)
        row = f"{population:>12.0e}{rate:>10.2g}{rate * population:>9.0f}{1e3 * ours[0]:>9.3f}"
        row += f"{1e3 * statistics.median(ours[1:]):>9.3f}"
        if population <= MOST_NUMBERS:
            other = seconds_of(lambda turn, q=rate, n=population: (torch.rand(n) < q).nonzero(), rounds)
            row += f"{1e3 * statistics.median(other[1:]):>17.3f}"
        print(row, flush=True)


def seconds_of(work: Callable[[int], object], rounds: int) -> list[float]:
    """Wall seconds of the first call and of every later one."""
    found = []
    for turn in range(rounds + 1):
        begin = time.perf_counter()
        work(turn)
        found.append(time.perf_counter() - begin)
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", default="1e6,1e7")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    kernel = native.LIBRARY.get()
    seconds = time.perf_counter() - begin
    print(f"torch {torch.__version__}; ours by {native.status()}, ready after {seconds:.2f} s")
    for count in arguments.counts.split(","):
        for threads in arguments.threads.split(","):
            show(int(float(count)), int(threads), arguments.rounds, kernel)
    show_draws(arguments.rounds)


if __name__ == "__main__":
    main()
