"""Several processes and sudden death: what was released is never more than what is charged, and never twice."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ledgerkit import OWNER, make_ledger, make_plan, reopen
from spenders import released, spawn, spend

from dpbudget.errors import DPBudgetError
from dpbudget.ledger.journal import Draft
from dpbudget.ledger.ledger import Ledger

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def release_into(path: Path, run_id: str, log: Path, lease_steps: int) -> None:
    """Take receipts to the end and log every released step."""
    spend(str(path), lambda location: reopen(Path(location)), run_id, log, lease_steps=lease_steps)


def charged(path: Path) -> dict[str, int]:
    with Ledger.open(path, trust=OWNER.public) as ledger:
        return {run.run_id: run.charged for run in ledger.state.runs.values()}


def signed(path: Path, *sizes: int) -> list[str]:
    with make_ledger(path) as ledger:
        return [ledger.sign_plan(make_plan(steps, epsilon=0.5), owner=OWNER) for steps in sizes]


def test_four_processes_on_one_plan_release_exactly_its_steps(tmp_path: Path) -> None:
    path, log = tmp_path / "ledger", tmp_path / "log"
    (run_id,) = signed(path, 60)
    children = [spawn(lambda: release_into(path, run_id, log, 1)) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert sorted(released(log)) == list(range(60))
    assert charged(path) == {run_id: 60}


def test_processes_on_different_runs_of_one_ledger_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    runs = signed(path, 30, 30, 30)
    logs = [tmp_path / run_id for run_id in runs]
    children = [
        spawn(lambda run_id=run_id, log=log: release_into(path, run_id, log, 2))  # type: ignore[misc]
        for run_id, log in zip(runs, logs, strict=True)
    ]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    assert all(released(log) == list(range(30)) for log in logs)
    assert set(charged(path).values()) == {30}
    with Ledger.open(path, trust=OWNER.public) as ledger:
        assert ledger.state.portfolios[0].claim == 1.5


def test_without_the_lock_the_same_test_would_fail(tmp_path: Path) -> None:
    """The control: two processes that read before they lock take the same step, and the rules refuse the second."""
    path = tmp_path / "ledger"
    (run_id,) = signed(path, 60)
    ledgers = [reopen(path), reopen(path)]
    seen = [ledger.state.runs[run_id].charged for ledger in ledgers]
    assert seen == [0, 0]  # both believe that step 0 is free

    def take(first: int) -> Callable[[Draft], None]:
        nonce, commitment = os.urandom(32).hex(), os.urandom(32).hex()
        claim = 0.5 if first == 0 else None

        def write(draft: Draft) -> None:
            draft.add("lease", run=run_id, nonce=nonce, commitment=commitment, first=first, count=1, claim=claim)

        return write

    ledgers[0]._journal.transact(take(seen[0]))
    with pytest.raises(DPBudgetError, match="lease from step 0; the run is charged to step 1"):
        ledgers[1]._journal.transact(take(seen[1]))
    for ledger in ledgers:
        ledger.close()


def kill_loop(tmp_path: Path, rounds: int, lease_steps: int, seed: int) -> tuple[int, int]:
    """Kill a releasing process at random moments; total released and charged."""
    path, log = tmp_path / "ledger", tmp_path / "log"
    (run_id,) = signed(path, 100_000)
    moments = random.Random(seed)
    for _ in range(rounds):
        before = len(released(log))
        child = spawn(lambda: release_into(path, run_id, log, lease_steps))
        deadline = time.monotonic() + 20
        while len(released(log)) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert len(released(log)) <= charged(path)[run_id]
    steps = released(log)
    assert len(steps) == len(set(steps)), "a step was released twice"
    total = charged(path)[run_id]
    assert max(steps) < total
    return len(steps), total


@pytest.mark.parametrize("lease_steps", [1, 5])
def test_killed_at_any_moment_the_ledger_never_counts_less_than_was_released(tmp_path: Path, lease_steps: int) -> None:
    count, total = kill_loop(tmp_path, 10, lease_steps, seed=lease_steps)
    assert count >= 10
    assert total - count <= 10 * lease_steps  # and a crash wastes at most the rest of one lease


@pytest.mark.slow
@pytest.mark.parametrize("lease_steps", [1, 7])
def test_killed_three_hundred_times_the_ledger_never_counts_less(tmp_path: Path, lease_steps: int) -> None:
    for part in range(15):  # a new ledger each time, since every round verifies it from the start
        place = tmp_path / str(part)
        place.mkdir()
        count, total = kill_loop(place, 20, lease_steps, seed=1000 * lease_steps + part)
        assert count >= 20
        assert total - count <= 20 * lease_steps


def test_a_reader_beside_a_busy_writer_sees_whole_histories(tmp_path: Path) -> None:
    path, log = tmp_path / "ledger", tmp_path / "log"
    (run_id,) = signed(path, 400)
    child = spawn(lambda: release_into(path, run_id, log, 1))
    sizes, finished = [], 0
    while not finished:
        finished, _ = os.waitpid(child, os.WNOHANG)
        with Ledger.open(path, trust=OWNER.public) as ledger:
            sizes.append(ledger.head.size)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 1
    assert charged(path) == {run_id: 400}
