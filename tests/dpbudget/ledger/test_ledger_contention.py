"""Eight processes that ask for more than the plan has: together they release exactly its steps."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from ledgerkit import OWNER, WRITER, SumFilter, make_ledger, make_plan
from spenders import (
    Spendable,
    UnlockedCounter,
    assert_released_exactly,
    released,
    spawn,
    spend,
    spend_at_once,
)

from dpbudget.ledger.ledger import Ledger
from tests.postgres_server import Server

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
PROCESSES = 8


def open_ledger(location: str) -> Spendable:
    return Ledger.open(location, writer=WRITER, filter=SumFilter(), trust=OWNER.public)


def check_eight_writers(location: str, log: Path, asked: int, planned: int, lease_steps: int) -> None:
    with make_ledger(location) as ledger:
        run_id = ledger.sign_plan(make_plan(planned), owner=OWNER)
    steps = spend_at_once(location, open_ledger, run_id, log, processes=PROCESSES, asked=asked, lease_steps=lease_steps)
    assert_released_exactly(steps, planned)
    with Ledger.open(location, trust=OWNER.public) as ledger:
        assert ledger.state.runs[run_id].charged == planned


@pytest.mark.parametrize(
    ("asked", "planned", "lease_steps"),
    [
        (60, 480, 5),
        (500, 2000, 1),
        pytest.param(500, 4000, 1, marks=pytest.mark.slow),
    ],
)
def test_eight_writers_that_ask_for_more_release_exactly_the_plan(
    tmp_path: Path, asked: int, planned: int, lease_steps: int
) -> None:
    check_eight_writers(str(tmp_path / "ledger"), tmp_path / "log", asked, planned, lease_steps)


@pytest.mark.parametrize(
    ("asked", "planned", "lease_steps"),
    [(60, 480, 5), (60, 240, 1), pytest.param(500, 2000, 1, marks=pytest.mark.slow)],
)
def test_eight_writers_on_one_database_release_exactly_the_plan(
    tmp_path: Path, postgres_server: Server, asked: int, planned: int, lease_steps: int
) -> None:
    location = postgres_server.url("team", database=postgres_server.database())
    check_eight_writers(location, tmp_path / "log", asked, planned, lease_steps)


def kill(writer: int) -> None:
    os.kill(writer, signal.SIGKILL)
    status = os.waitpid(writer, 0)[1]
    assert status == signal.SIGKILL, f"a writer had ended by itself with status {status}; its error is on stdout"


def wait_for_a_release(log: Path, before: int) -> None:
    deadline = time.monotonic() + 20
    while len(released(log)) == before and time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.mark.parametrize("kills", [12, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lease_steps", [1, 5])
def test_writers_that_are_killed_among_others_undercount_nothing_and_stop_nobody(
    tmp_path: Path, lease_steps: int, kills: int
) -> None:
    """Who waits for the lock of a dead writer finds its journal, rolls it back and goes on."""
    chance, released_steps = random.Random(kills + lease_steps), 0
    for part in range(-(-kills // 40)):  # a new ledger now and then, since every writer verifies it from the start
        path, log = tmp_path / f"ledger-{part}", tmp_path / f"log-{part}"
        with make_ledger(path) as ledger:
            run_id = ledger.sign_plan(make_plan(100_000), owner=OWNER)
        work = partial(spend, str(path), open_ledger, run_id, log, lease_steps=lease_steps)
        writers = [spawn(work) for _ in range(3)]
        try:
            for _ in range(min(40, kills)):
                wait_for_a_release(log, len(released(log)))
                time.sleep(chance.uniform(0, 0.05))
                kill(writers.pop(chance.randrange(3)))
                writers.append(spawn(work))
        finally:
            while writers:  # or they would spend on beside the next tests
                kill(writers.pop())
        steps = released(log)
        with Ledger.open(path, trust=OWNER.public) as ledger:
            charged = ledger.state.runs[run_id].charged
        assert len(steps) == len(set(steps)), "a step was released twice"
        assert len(steps) <= charged <= len(steps) + (min(40, kills) + 3) * lease_steps
        assert all(step < charged for step in steps)
        released_steps += len(steps)
    assert released_steps >= kills


def test_eight_writers_without_a_lock_over_release_and_the_same_check_notices(tmp_path: Path) -> None:
    """The control: the same workers on a counter that reads, compares and writes without a lock."""
    path, log = tmp_path / "counter", tmp_path / "log"
    path.write_bytes(b"0")
    opener = partial(UnlockedCounter, allowed=240)
    steps = spend_at_once(str(path), opener, "run", log, processes=PROCESSES, asked=60)
    with pytest.raises(AssertionError, match="steps were released, 240 allowed"):
        assert_released_exactly(steps, 240)
