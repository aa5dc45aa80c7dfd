"""What a Gaussian value costs on a CUDA device: ours beside PyTorch's generator, which has no secret key.

``python -m tests.benchmarks.noise_gpu [--counts 1e7,1e8,1e9] [--rounds 30]``

Every row takes its turn in every round, between two events of the device. Printed are the median milliseconds,
quartiles, values a second, the ratios to ``randn`` and to ``add_(randn)``, and what the row allocates at its peak
beside the tensor that it updates. ``ours`` is a whole request: table, launch, and the wait for the flag that says
whether all was finite.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from dptrainer.noise import gpu

KEY = bytes(32)
CUDA = torch.device("cuda")
Row = Callable[[], object]
#: At most so many times as long as ``randn`` and as ``add_(randn)``.
GOALS = 2.6, 1.25


def ours(targets: list[torch.Tensor]) -> Row:
    """The update in place of tensors, in one launch a type."""
    pieces = [(target, stream, 0) for stream, target in enumerate(targets)]
    return lambda: gpu.add(pieces, KEY, 1.0)


def in_float64(row: Row) -> Row:
    """With the arithmetic of the CPU, whatever the type of the tensors."""

    def run() -> None:
        with mock.patch.object(gpu, "_FLOAT32", (1.0, 0.0)):
            row()

    return run


def rows(count: int) -> dict[str, Row]:
    """Name -> the work."""
    target, scratch = torch.zeros(count, device=CUDA), torch.empty(count, device=CUDA)
    small = list(target.split(1000))
    found: dict[str, Row] = {
        "randn": lambda: torch.randn(count, device=CUDA),
        "normal_": lambda: scratch.normal_(),
        "add_(randn)": lambda: target.add_(torch.randn(count, device=CUDA)),
        "add_(normal_())": lambda: target.add_(scratch.normal_()),
        "copy_": lambda: scratch.copy_(target),
        "ours": ours([target]),
        "ours, float64 arithmetic": in_float64(ours([target])),
    }
    if len(small) <= 100_000:
        found["ours, tensors of 1000"] = ours(small)
    if count <= 200_000_000:
        found["ours, float64"] = ours([torch.zeros(count, dtype=torch.float64, device=CUDA)])
    return found


def measure(chosen: dict[str, Row], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every row in every round."""
    found: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in range(rounds + 3):
        for name, work in chosen.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            end.synchronize()
            if turn >= 3:  # the first rounds warm up
                found[name].append(begin.elapsed_time(end))
    return found


def peak(work: Row) -> float:
    """MiB that a row allocates at once."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / (1 << 20)


def show(count: int, rounds: int) -> None:
    """One table."""
    chosen = rows(count)
    found = measure(chosen, rounds)
    base = [statistics.median(found[name]) for name in ("randn", "add_(randn)")]
    print(f"\n{count:.0e} values, {rounds} rounds")
    print(f"{'row':<26}{'ms':>9}   {'quartiles':<18}{'G/s':>7}{'/ randn':>9}{'/ add_(randn)':>15}{'MiB':>9}")
    for name, times in found.items():
        low, middle, high = statistics.quantiles(times, n=4)
        spread = f"{low:.3f} to {high:.3f}"
        print(
            f"{name:<26}{middle:>9.3f}   {spread:<18}{count / middle / 1e6:>7.1f}{middle / base[0]:>9.2f}"
            f"{middle / base[1]:>15.2f}{peak(chosen[name]):>9.2f}",
            flush=True,
        )
    mine = statistics.median(found["ours"])
    for of, goal, time_of in zip(("randn", "add_(randn)"), GOALS, base, strict=True):
        print(f"ours / {of}: {mine / time_of:.2f}, goal {goal}: {'met' if mine <= goal * time_of else 'MISSED'}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", default="1e7,1e8,1e9")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA device: nothing was measured. docs/benchmarks.md has what is predicted.")
        return
    begin = time.perf_counter()
    gpu.check([torch.device("cuda", torch.cuda.current_device())])
    import triton

    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; kernels compiled and "
        f"tested after {time.perf_counter() - begin:.1f} s"
    )
    for count in arguments.counts.split(","):
        show(int(float(count)), arguments.rounds)


if __name__ == "__main__":
    main()
