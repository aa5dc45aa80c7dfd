"""Charge before release, under SIGKILL at any moment: the ledger never knows of fewer steps than were released."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopkit import OWNER, make_ledger, make_plan, reopen

from dpbudget.errors import PlanExhausted
from dpbudget.ledger.run import default_lease_steps

HERE = Path(__file__).resolve().parent
STEPS = 2000


class Server:
    """The warm process of kill_server.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, ledger: Path, log: Path, run: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ledger": str(ledger), "log": str(log), "run": run}) + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def wait(self) -> int:
        return int(self._read())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    paths = os.pathsep.join([str(HERE.parents[2]), str(HERE)])
    process = subprocess.Popen(
        [sys.executable, str(HERE / "kill_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    with process:
        yield Server(process)
        assert process.stdin is not None
        process.stdin.close()


def sign(folder: Path, steps: int) -> tuple[Path, str]:
    path = folder / "fresh.ledger"
    with make_ledger(path) as ledger:
        return path, ledger.sign_plan(make_plan(steps), owner=OWNER)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return sign(tmp_path_factory.mktemp("kill"), STEPS)


def released_steps(log: Path) -> list[int]:
    if not log.exists():
        return []
    lines = log.read_bytes().split(b"\n")
    return [int(line) for line in lines[:-1]]  # O_APPEND writes of a few bytes are whole


def kill_once(server: Server, signed: tuple[Path, str], folder: Path, seed: int) -> tuple[int, int, Path, Path]:
    """One training, killed at a random moment: (released, charged, ledger, log)."""
    fresh, run_id = signed
    path, log = folder / f"{seed}.ledger", folder / f"{seed}.log"
    shutil.copy(fresh, path)
    chance = random.Random(seed)
    child = server.start(path, log, run_id)
    until = time.monotonic() + 20
    # Half of the kills come at the very start, the others after some releases.
    wanted = 0 if chance.random() < 0.3 else chance.randrange(1, 200)
    while len(released_steps(log)) < wanted and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(chance.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    steps = released_steps(log)
    assert steps == list(range(len(steps)))
    with reopen(path, high_water=False) as ledger:
        return len(steps), ledger.state.runs[run_id].charged, path, log


def check_kill(server: Server, signed: tuple[Path, str], folder: Path, seed: int) -> int:
    run_id = signed[1]
    released, charged, path, _ = kill_once(server, signed, folder, seed)
    assert charged >= released, f"{released} steps released, {charged} charged"
    assert charged - released <= default_lease_steps(STEPS)
    with reopen(path, high_water=False) as ledger:
        run = ledger.start(run_id)
        assert run.next_receipt().step == charged
        if seed % 5 == 0:
            assert [receipt.step for receipt in run] == list(range(charged + 1, STEPS))
            with pytest.raises(PlanExhausted):
                run.next_receipt()
    return released


def test_ten_kills_never_under_count(server: Server, signed: tuple[Path, str], tmp_path: Path) -> None:
    released = [check_kill(server, signed, tmp_path, seed) for seed in range(10)]
    assert max(released) > 0


@pytest.mark.slow
def test_fifty_kills_never_under_count(server: Server, signed: tuple[Path, str], tmp_path: Path) -> None:
    released = [check_kill(server, signed, tmp_path, 100 + seed) for seed in range(50)]
    assert sum(count > 0 for count in released) > 20


def test_a_killed_training_resumes_and_finishes_its_plan(server: Server, tmp_path: Path) -> None:
    signed = sign(tmp_path, 500)  # the kill comes within some 200 steps
    released, charged, path, log = kill_once(server, signed, tmp_path, seed=7)
    assert charged < 500
    server.start(path, log, signed[1])
    assert server.wait() == 0
    steps = released_steps(log)
    assert steps == [*range(released), *range(charged, 500)]  # what the crash left of its lease is never released
    with reopen(path, high_water=False) as ledger:
        assert ledger.state.runs[signed[1]].charged == 500
