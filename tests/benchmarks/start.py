"""What a user waits for before anything happens: imports and first answers, each in a fresh process.

``python -m tests.benchmarks.start`` prints the median, minimum and maximum of several processes.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 9
CLI = "from dpbudget_cli.main import main; main()"
COMMANDS: dict[str, list[str]] = {
    "python -c pass": ["-c", "pass"],
    "import dpbudget": ["-c", "import dpbudget"],
    "dpbudget --help": ["-c", CLI, "--help"],
    "dpbudget calibrate --epsilon 3": ["-c", CLI, "calibrate", "--epsilon", "3"],
    "import dptrainer": ["-c", "import dptrainer; dptrainer.PrivateTrainer"],
}


def main() -> None:
    """Interleave the commands, so that a busy moment hits all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, arguments in COMMANDS.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - begin)
    print(f"{'command':<34}{'median ms':>10}{'min':>8}{'max':>8}")
    for name, values in seconds.items():
        shown = [1e3 * f(values) for f in (statistics.median, min, max)]
        print(f"{name:<34}{shown[0]:>10.0f}{shown[1]:>8.0f}{shown[2]:>8.0f}")


if __name__ == "__main__":
    main()
