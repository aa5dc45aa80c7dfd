"""Coverage-guided fuzzing of one reader: ``python -m tests.fuzz.run TARGET --seconds N`` (needs atheris).

Ends with the number of executions and of covered edges, and with exit code 0 exactly when nothing was found. The corpus
begins with valid inputs; findings are written to the current folder by libFuzzer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dpbudget"]):
    from tests.fuzz.targets import TARGETS, survive


def main() -> None:
    """Fuzz until the time is over or something is found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(TARGETS[chosen.target].seeds):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        flags = [f"-max_total_time={chosen.seconds}", "-timeout=10", "-rss_limit_mb=700", "-print_final_stats=1"]
        flags += [f"-max_len={max(4096, 2 * max(map(len, TARGETS[chosen.target].seeds)))}"]
        atheris.Setup([sys.argv[0], *flags, corpus], lambda data: survive(chosen.target, data) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
