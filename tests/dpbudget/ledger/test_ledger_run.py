"""Runs: a receipt exists only behind a durable lease, every step once, and nothing beyond the plan."""

from __future__ import annotations

import copy
import gc
import hashlib
import hmac
import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ledgerkit import OWNER, SumFilter, export_bytes, make_ledger, make_plan, reopen, snapshot_of

from dpbudget.curve import Bounds
from dpbudget.errors import (
    BudgetExceeded,
    DPBudgetError,
    InvalidParameter,
    PlanExhausted,
    PrivacyViolation,
    ReceiptSpent,
    StorageFailed,
    Tampered,
)
from dpbudget.ledger import run as run_module
from dpbudget.ledger.entries import read
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.noise_keys import LeaseKey, commitment_matches, run_ratchet
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.run import MAX_LEASE_STEPS, Run, default_lease_steps
from dpbudget.ledger.store.reader import read_ledger
from dpbudget.meter import Meter
from dpbudget.plan import Phase, rate_from_float


def records(ledger: Ledger, kind: str) -> list[dict[str, Any]]:
    return [record for entry in snapshot_of(ledger).entries if (record := read(entry.line))["type"] == kind]


def lease_keys(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The first key of every lease that is taken from now on."""
    kept: list[bytes] = []

    class Kept(LeaseKey):
        def __init__(self, *facts: Any) -> None:
            super().__init__(*facts)
            kept.append(self.reveal())

    monkeypatch.setattr(run_module, "LeaseKey", Kept)
    return kept


def started(steps: int = 4, *, path: Path | None = None, **options: Any) -> tuple[Ledger, Run]:
    ledger = make_ledger(path)
    return ledger, ledger.start(ledger.sign_plan(make_plan(steps), owner=OWNER), **options)


# --- what a receipt says ---------------------------------------------------------------------------------------------


def test_a_run_hands_out_every_step_once_and_stops() -> None:
    ledger, run = started(5, lease_steps=2)
    assert [receipt.step for receipt in run] == [0, 1, 2, 3, 4]
    assert (run.planned, run.charged, run.remaining) == (5, 5, 0)
    assert list(run) == []
    ledger.close()


def test_a_receipt_carries_the_facts_of_the_signed_plan() -> None:
    phases = (
        Phase(rate_k=rate_from_float(0.01), noise_multiplier=1.0, steps=2),
        Phase(rate_k=rate_from_float(0.5), noise_multiplier=2.0, steps=1),
    )
    ledger = make_ledger()
    plan = make_plan(phases=phases, clip_norm=0.5, nominal_size=60, max_parameters=77)
    run = ledger.start(ledger.sign_plan(plan, owner=OWNER))
    first, second, third = run
    assert [first.noise_multiplier, second.noise_multiplier, third.noise_multiplier] == [1.0, 1.0, 2.0]
    assert third.rate == 0.5
    assert third.expected_batch_size == 30
    assert (third.clip_norm, third.nominal_size, third.max_parameters, third.steps) == (0.5, 60, 77, 3)
    assert third.plan_digest == ledger.state.runs[run.run_id].statement
    assert third.adjacency == plan.adjacency


def test_the_lease_on_disk_commits_to_the_key_and_the_nonce_of_its_receipts(monkeypatch: pytest.MonkeyPatch) -> None:
    first_keys = lease_keys(monkeypatch)
    ledger, run = started(4, lease_steps=2)
    receipts = [run.next_receipt() for _ in range(4)]
    keys = [receipt.use("grad-noise") for receipt in receipts]
    leases = records(ledger, "lease")
    assert [lease["first"] for lease in leases] == [0, 2]
    for lease, key in zip(leases, first_keys, strict=True):
        assert commitment_matches(lease["commitment"], key)
        assert hashlib.sha256(b"dpbudget/lease-key/v1\0" + key).hexdigest() == lease["commitment"]
    for receipt, key in zip(receipts, keys, strict=True):
        assert receipt.lease_nonce.hex() == leases[receipt.step // 2]["nonce"]
        link = first_keys[receipt.step // 2]
        for _ in range(receipt.step % 2):
            link = hmac.new(link, b"next", hashlib.sha256).digest()
        assert key == hmac.new(link, b"step", hashlib.sha256).digest()
    assert len(set(keys)) == len({receipt.fresh for receipt in receipts}) == 4


def test_fresh_bytes_are_drawn_after_the_lease_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, run = started(2, lease_steps=1)
    drawn: list[tuple[int, int]] = []
    genuine = os.urandom

    def watched(count: int) -> bytes:
        drawn.append((count, ledger.state.runs[run.run_id].charged))
        return genuine(count)

    monkeypatch.setattr(run_module.os, "urandom", watched)
    run.next_receipt()
    assert [charged for count, charged in drawn if count == 16] == [1]
    assert [charged for count, charged in drawn if count == 32] == [0, 0]  # nonce and key of the lease


def test_settles_hold_the_fresh_bytes_and_the_digest_that_was_given() -> None:
    ledger, run = started(3, lease_steps=3)
    first = run.next_receipt()
    run.settle(first, "ab" * 32)
    second = run.next_receipt()
    run.close()
    settles = records(ledger, "settle")
    assert [(s["step"], s["fresh"], s["output"]) for s in settles] == [
        (0, first.fresh.hex(), "ab" * 32),
        (1, second.fresh.hex(), None),
    ]
    assert records(ledger, "reserve")[0]["count"] == 2
    assert records(ledger, "close")[0]["unspent"] == 1


def test_a_digest_comes_before_the_next_receipt_and_is_a_digest() -> None:
    _, run = started(3, lease_steps=3)
    first = run.next_receipt()
    for bad in ("", "AB" * 32, "zz" * 32, "ab" * 31):
        with pytest.raises(InvalidParameter, match="SHA-256"):
            run.settle(first, bad)
    run.next_receipt()
    with pytest.raises(InvalidParameter, match="not the newest"):
        run.settle(first, "ab" * 32)


# --- leases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "size"), [(1, 1), (49, 1), (99, 1), (100, 2), (1000, 20), (3200, 64), (10**6, MAX_LEASE_STEPS)]
)
def test_the_size_of_a_lease_follows_from_the_public_plan_alone(steps: int, size: int) -> None:
    assert default_lease_steps(steps) == size


def test_the_whole_lease_is_charged_when_its_first_step_is_released() -> None:
    ledger, run = started(6, lease_steps=4)
    run.next_receipt()
    assert run.charged == ledger.state.runs[run.run_id].charged == 4
    assert run.remaining == 5


def test_the_last_lease_ends_with_the_plan() -> None:
    ledger, run = started(5, lease_steps=3)
    assert len(list(run)) == 5
    assert [lease["count"] for lease in records(ledger, "lease")] == [3, 2]


@pytest.mark.parametrize("size", [0, -1, 5])
def test_a_lease_size_outside_the_plan_is_refused(size: int) -> None:
    with pytest.raises(InvalidParameter, match="must hold 1 to 4"):
        started(4, lease_steps=size)


@pytest.mark.parametrize("seconds", [0.0, 7.0])
def test_issued_receipts_reach_the_disk_with_the_next_lease_and_never_by_the_clock(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How long a step takes depends on its private batch, so a flush by the clock would write batch sizes down.
    assert not hasattr(run_module, "time")
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    ledger, run = started(9, lease_steps=4)
    reserved = []
    for _ in range(9):
        run.next_receipt()
        now[0] += seconds
        reserved.append(ledger.state.runs[run.run_id].reserved)
    assert reserved == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    run.close()
    assert [record["count"] for record in records(ledger, "reserve")] == [4, 4, 1]


def test_a_step_beyond_the_plan_is_refused_with_its_numbers() -> None:
    ledger, run = started(3)
    assert len(list(run)) == 3
    before = ledger.head
    with pytest.raises(PlanExhausted, match=r"step 4 of 3 is not in the plan; .*epsilon 1 at delta 5e-07") as caught:
        run.next_receipt()
    assert caught.value.code == "DP050"
    assert ledger.head == before


def test_the_claim_of_a_portfolio_is_joint_and_stands_in_its_first_lease_alone() -> None:
    ledger = make_ledger()
    first, second = (ledger.sign_plan(make_plan(2, epsilon=0.75), owner=OWNER) for _ in range(2))
    a, b = ledger.start(first), ledger.start(second)
    b.next_receipt()
    a.next_receipt()
    b.next_receipt()
    assert [record["claim"] for record in records(ledger, "lease")] == [(1.5).hex(), None, None]


def test_a_claim_that_does_not_fit_charges_nothing() -> None:
    ledger = make_ledger()
    run_id = ledger.sign_plan(make_plan(2, epsilon=2.0), owner=OWNER)

    class Dearer(SumFilter):
        def joint_claim(self, plans: Any, delta: float) -> float:
            return 3.5

    ledger._filter = Dearer()
    with pytest.raises(BudgetExceeded, match=r"claim epsilon 3\.5 .*; 3 is left"):
        ledger.start(run_id).next_receipt()
    assert ledger.state.runs[run_id].charged == 0
    assert not ledger.state.portfolios[0].frozen


def test_a_plan_that_joins_while_the_claim_is_computed_is_in_the_claim() -> None:
    ledger = make_ledger()
    run_id = ledger.sign_plan(make_plan(2), owner=OWNER)
    calls: list[int] = []

    class Slow(SumFilter):
        def joint_claim(self, plans: Any, delta: float) -> float:
            calls.append(len(plans))
            if len(calls) == 1:
                ledger.sign_plan(make_plan(2, epsilon=0.5), owner=OWNER)  # through the ledger's own filter
            return super().joint_claim(plans, delta)

    run = Run(ledger._journal, run_id, filter=Slow(), meter=None, lease_steps=None)
    run.next_receipt()
    assert calls == [1, 2]
    assert ledger.state.portfolios[0].claim == 1.5


# --- several holders of one run --------------------------------------------------------------------------------------


def test_two_holders_of_one_run_get_different_steps() -> None:
    ledger, first = started(8, lease_steps=2)
    second = ledger.start(first.run_id, lease_steps=2)
    steps = [run.next_receipt().step for run in (first, second, first, second, second, first)]
    assert steps == [0, 2, 1, 3, 4, 6]
    first.close()
    second.close()
    assert ledger.state.runs[first.run_id].charged == 8
    assert ledger.state.runs[first.run_id].reserved == 6


def test_threads_that_share_a_run_never_get_one_step_twice() -> None:
    ledger, run = started(300, lease_steps=7)
    steps: list[int] = []
    problems: list[BaseException] = []

    def work() -> None:
        try:
            steps.extend(receipt.step for receipt in run)
        except DPBudgetError as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert sorted(steps) == list(range(300))
    ledger.close()


def test_a_new_process_goes_on_at_the_first_step_without_a_lease(tmp_path: Path) -> None:
    ledger, run = started(10, path=tmp_path / "ledger", lease_steps=4)
    assert [run.next_receipt().step for _ in range(2)] == [0, 1]
    del run  # as a crash would: nothing is written any more
    ledger._journal.close()
    with reopen(tmp_path / "ledger") as again:
        run_id = next(iter(again.state.runs))
        assert [receipt.step for receipt in again.start(run_id)] == [4, 5, 6, 7, 8, 9]
        assert again.state.runs[run_id].charged == 10


def test_a_copied_ledger_run_twice_gives_other_keys_nonces_and_fresh_bytes(tmp_path: Path) -> None:
    ledger, run = started(4, path=tmp_path / "a")
    ledger.close()
    shutil.copy(tmp_path / "a", tmp_path / "b")
    taken = []
    for name in ("a", "b"):
        # Without marks, as on two machines: on one, the second is refused (test_ledger_high_water).
        with reopen(tmp_path / name, high_water=False) as copied:
            receipt = copied.start(run.run_id).next_receipt()
            taken.append((receipt.step, receipt.use("grad-noise"), receipt.lease_nonce, receipt.fresh))
    (step_a, *secrets_a), (step_b, *secrets_b) = taken
    assert step_a == step_b  # the fork of history is not preventable, the repeated noise is
    assert not set(secrets_a) & set(secrets_b)


def test_a_backup_that_is_put_back_where_nothing_remembers_draws_other_noise(tmp_path: Path) -> None:
    ledger, run = started(4, path=tmp_path / "ledger")
    run_id = run.run_id
    ledger.close()
    shutil.copy(tmp_path / "ledger", tmp_path / "backup")
    taken = []
    for _ in range(2):
        with reopen(tmp_path / "ledger", high_water=False) as again, again.start(run_id, lease_steps=1) as rerun:
            receipt = rerun.next_receipt()
            taken.append((receipt.step, receipt.use("grad-noise"), receipt.lease_nonce, receipt.fresh))
        shutil.copy(tmp_path / "backup", tmp_path / "ledger")
    (step_a, *secrets_a), (step_b, *secrets_b) = taken
    assert step_a == step_b == 0
    assert not set(secrets_a) & set(secrets_b)


def test_an_older_copy_put_back_under_an_open_ledger_is_refused(tmp_path: Path) -> None:
    _, run = started(8, path=tmp_path / "ledger", lease_steps=1)
    run.next_receipt()
    backup = (tmp_path / "ledger").read_bytes()
    run.next_receipt()
    run.next_receipt()
    with open(tmp_path / "ledger", "r+b") as file:  # same inode, older bytes
        file.write(backup)
        file.truncate(len(backup))
    with pytest.raises((Tampered, StorageFailed)):
        run.next_receipt()


# --- keys and forks --------------------------------------------------------------------------------------------------


def test_closing_a_run_ends_its_receipts() -> None:
    _, run = started(4, lease_steps=2)
    receipt, later = run.next_receipt(), run.next_receipt()
    newest = run.next_receipt()
    assert receipt.use("grad-noise") != newest.use("grad-noise")
    run.close()
    run.close()
    with pytest.raises(ReceiptSpent, match="erased"):
        later.use("grad-noise")
    with pytest.raises(PrivacyViolation, match="closed") as caught:
        run.next_receipt()
    assert caught.value.code == "DP078"


def test_the_key_of_a_step_dies_with_its_receipt_and_what_nobody_holds_is_forgotten() -> None:
    _, run = started(4, lease_steps=1)
    old = run.next_receipt()
    key = old.key
    run.next_receipt()
    assert len(key.reveal()) == 32  # still needed by the receipt
    buffer = key._key
    del old, key
    gc.collect()
    assert buffer == bytes(32)
    assert len(run._journal.keys[run.run_id]) == 1


def test_a_step_leaves_nothing_of_its_key_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    first_keys = lease_keys(monkeypatch)
    _, run = started(4, lease_steps=4)
    first = run.next_receipt()
    assert run._held is not None
    ready = run._held.keys._key
    assert ready is not None
    made = bytes(run_ratchet(first_keys[0], 4))
    assert (first.key.reveal(), ready[:32], ready[32:]) == (made[:32], bytes(32), made[32:])
    second = run.next_receipt()
    assert (second.key.reveal(), ready[:64], ready[64:]) == (made[32:64], bytes(64), made[64:])
    assert len(first.use("grad-noise")) == 32  # a receipt that outlives the next one still pays for its step
    run.close()
    assert ready == bytes(128)


def test_the_first_key_of_a_lease_is_erased_before_the_first_receipt_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LeaseKey] = []

    class Seen(LeaseKey):
        def __init__(self, *facts: Any) -> None:
            super().__init__(*facts)
            made.append(self)
            self.buffer = self._key

    monkeypatch.setattr(run_module, "LeaseKey", Seen)
    _, run = started(4, lease_steps=2)
    receipt = run.next_receipt()
    assert made[0]._key is None
    assert made[0].buffer == bytes(32)  # type: ignore[attr-defined]
    assert any(receipt.key.reveal())


def test_a_lease_of_more_steps_than_keys_are_kept_for_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="must hold 1 to 65536"):
        started(10**6, lease_steps=65537)


def test_receipts_and_keys_are_never_copied() -> None:
    _, run = started(2)
    receipt = run.next_receipt()
    for hidden in (receipt, receipt.key):
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dumps(hidden)
        with pytest.raises(TypeError, match="never pickled"):
            copy.copy(hidden)
    assert receipt.key.reveal().hex() not in repr(receipt) + repr(receipt.key) + repr(run)


def in_a_child(work: Callable[[], str]) -> str:
    """What ``work`` returns, or the code of what it raises, in a forked child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = work()
        except DPBudgetError as error:
            answer = error.code
        except BaseException as error:
            answer = repr(error)
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(child, 0)
    return answer


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_everything_refuses_in_a_forked_child_and_the_parent_goes_on(tmp_path: Path) -> None:
    ledger, run = started(8, path=tmp_path / "ledger", lease_steps=4)
    receipt = run.next_receipt()

    def word(act: Callable[[], object]) -> Callable[[], str]:
        return lambda: str(act() or "done")

    refused: list[Callable[[], object]] = [
        run.next_receipt,
        lambda: receipt.use("grad-noise"),
        lambda: run.settle(receipt),
        lambda: ledger.start(run.run_id).next_receipt(),
        lambda: ledger.sign_plan(make_plan(), owner=OWNER),
        lambda: export_bytes(ledger),
        lambda: list(run),
    ]
    for act in refused:
        assert in_a_child(word(act)) == "DP076"
    assert in_a_child(word(ledger.close)) == "done"  # closes nothing of its parent
    assert receipt.use("grad-noise")
    assert [later.step for later in run] == [1, 2, 3, 4, 5, 6, 7]
    ledger.close()
    snapshot = read_ledger(tmp_path / "ledger")
    assert read(snapshot.entries[-1].line)["type"] == "settle"


# --- the rest of the surface -----------------------------------------------------------------------------------------


def test_live_epsilon_is_that_of_the_charged_steps() -> None:
    meter = Meter((2, 4), (Bounds(0.2, 0.3), Bounds(0.8, 1.0)), 5e-7, 1.0)
    ledger = make_ledger()
    run_id = ledger.sign_plan(make_plan(4), owner=OWNER)
    run = ledger.start(run_id, meter=meter, lease_steps=2)
    assert run.epsilon() == Bounds(0.0, 0.0)
    run.next_receipt()
    assert run.epsilon() == Bounds(0.2, 0.3)  # one step is released, two are charged
    assert ledger.start(run_id).epsilon() is None


def test_a_run_is_a_context_and_an_error_in_it_still_settles() -> None:
    ledger, run = started(4, lease_steps=4)

    def train() -> None:
        with run:
            run.next_receipt()
            raise RuntimeError("training")

    with pytest.raises(RuntimeError, match="training"):
        train()
    assert run.closed
    assert ledger.state.runs[run.run_id].reserved == 1
    assert [record["unspent"] for record in records(ledger, "close")] == [3]


def test_an_unused_run_leaves_no_trace() -> None:
    ledger, run = started(4)
    before = ledger.head
    run.close()
    assert ledger.head == before
    assert not ledger.state.portfolios[0].frozen


def test_closing_the_ledger_closes_its_runs() -> None:
    ledger, run = started(4, lease_steps=4)
    receipt = run.next_receipt()
    ledger.close()
    ledger.close()
    assert run.closed
    with pytest.raises(ReceiptSpent):
        receipt.use("grad-noise")
    with pytest.raises(InvalidParameter, match="closed"):
        run.next_receipt()


def test_a_plan_names_its_newest_run_with_steps_left() -> None:
    ledger = make_ledger()
    plan = make_plan(1)
    first = ledger.sign_plan(plan, owner=OWNER)
    second = ledger.sign_plan(plan, owner=OWNER)
    assert ledger.start(plan).run_id == second
    assert len(list(ledger.start(second))) == 1
    assert ledger.start(plan).run_id == first
    with pytest.raises(InvalidParameter) as caught:
        ledger.start(make_plan(7))
    assert caught.value.code == "DP081"
    with pytest.raises(InvalidParameter, match="has no run"):
        ledger.start("00" * 16)


def test_no_record_depends_on_anything_but_plan_and_randomness() -> None:
    """Two ledgers of the same plan differ in random values and what hangs from them alone."""

    def shape(ledger: Ledger) -> list[dict[str, Any]]:
        random = {"prev", "nonce", "commitment", "fresh", "run", "statement", "dataset"}
        return [
            {name: value for name, value in json.loads(entry.line).items() if name not in random}
            for entry in snapshot_of(ledger).entries
        ]

    ledgers = []
    for _ in range(2):
        ledger, run = started(20, lease_steps=4)
        with run:
            assert sum(isinstance(receipt, Receipt) for receipt in run) == 20
        ledgers.append(ledger)
    assert shape(ledgers[0]) == shape(ledgers[1])
