"""An interrupt at any instruction, and threads that meet: no step twice, none uncounted, and the run goes on."""

from __future__ import annotations

import gc
import shutil
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from ledgerkit import OWNER, make_ledger, make_plan, reopen, snapshot_in

from dpbudget.errors import InvalidParameter, PrivacyViolation, ReceiptSpent, StorageFailed
from dpbudget.ledger.entries import read
from dpbudget.ledger.journal import replay
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.noise_keys import LeaseKey
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.run import Run
from dpbudget.ledger.store.reader import read_ledger

PLACES = {
    ("run.py", "_next_receipt"),
    ("run.py", "_take_lease"),
    ("run.py", "_write_lease"),
    ("run.py", "_write_issued"),
    ("run.py", "close"),
    ("run.py", "_write_close"),
    ("noise_keys.py", "ratchet"),
    ("noise_keys.py", "take"),
    ("journal.py", "transact"),
    ("sqlite.py", "transaction"),
    ("sqlite.py", "_begin"),
    ("sqlite.py", "_commit"),
}


class Interrupt(KeyboardInterrupt):
    """As Ctrl-C would raise, between two instructions."""


class Tracer:
    """Raises :class:`Interrupt` before the ``target``-th instruction of the functions in PLACES."""

    def __init__(self, target: int) -> None:
        self.target, self.seen = target, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if (Path(code.co_filename).name, code.co_name) not in PLACES:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self.step

    def step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            self.seen += 1
            if self.seen == self.target:
                sys.settrace(None)
                raise Interrupt
        return self.step


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("interrupts") / "ledger"
    with make_ledger(path) as ledger:
        ledger.sign_plan(make_plan(5), owner=OWNER)
    return path


def interrupted_at(target: int, path: Path, before: int) -> tuple[bool, list[int], Path]:
    """Take ``before`` receipts, interrupt the next at one instruction, then go on to the end."""
    ledger = reopen(path, high_water=False)  # every trial begins from the same copy
    run = ledger.start(next(iter(ledger.state.runs)), lease_steps=2)
    steps = [run.next_receipt().step for _ in range(before)]
    tracer, previous = Tracer(target), sys.gettrace()
    sys.settrace(tracer)
    hit = False
    try:
        steps.append(run.next_receipt().step)
    except Interrupt:
        hit = True
    finally:
        sys.settrace(previous)
    assert not locked(path)
    steps += [receipt.step for receipt in run]
    ledger.close()
    return hit, steps, path


def locked(path: Path) -> bool:
    """Whether another connection is kept from writing."""
    other = sqlite3.connect(path, timeout=0.0, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        return False
    except sqlite3.OperationalError:
        return True
    finally:
        other.close()


def instructions(path: Path, signed: Path, before: int, stride: int) -> Iterator[list[int]]:
    """One trial for every ``stride``-th instruction, until none is left to interrupt."""
    for target in range(1, 2000, stride):
        shutil.copy(signed, path)
        hit, steps, _ = interrupted_at(target, path, before)
        yield steps
        if not hit:
            return


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_instruction_loses_at_most_a_lease_and_repeats_no_step(
    stride: int, before: int, signed: Path, tmp_path: Path
) -> None:
    trials = 0
    for steps in instructions(tmp_path / "ledger", signed, before, stride):
        trials += 1
        assert len(set(steps)) == len(steps)
        snapshot = read_ledger(tmp_path / "ledger")
        records = [read(entry.line) for entry in snapshot.entries]
        charged = sum(record["count"] for record in records if record["type"] == "lease")
        assert charged == 5
        assert len(steps) >= 3  # of the 5; an interrupt costs at most the lease of 2
        settled = {record["step"] for record in records if record["type"] == "settle"}
        assert settled >= set(steps)
    assert trials > 40 // stride


class Handler(Tracer):
    """Calls ``use`` before the ``target``-th instruction, as a signal handler would, and swallows what it raises."""

    def __init__(self, target: int, use: Callable[[], object]) -> None:
        super().__init__(target)
        self.use = use
        self.got: list[object] = []

    def step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            self.seen += 1
            if self.seen == self.target:
                sys.settrace(None)
                with suppress(StorageFailed):
                    self.got.append(self.use())
                sys.settrace(self)
        return self.step


def handled_at(target: int, path: Path, what: str) -> tuple[bool, list[Receipt], Receipt | None]:
    """Whether the handler ran, all receipts that anybody got, and the one of the step that it ran in."""
    ledger = reopen(path, high_water=False)
    return handled_in(ledger, ledger.start(next(iter(ledger.state.runs)), lease_steps=2), target, what)


def handled_in(ledger: Ledger, run: Run, target: int, what: str) -> tuple[bool, list[Receipt], Receipt | None]:
    use = {"next_receipt": run.next_receipt, "close": run.close, "close the ledger": ledger.close}[what]
    receipts, last = [run.next_receipt(), run.next_receipt()], None
    handler, previous = Handler(target, use), sys.gettrace()
    sys.settrace(handler)
    try:
        with suppress(StorageFailed, PrivacyViolation, InvalidParameter):  # closed in between
            last = run.next_receipt()
    finally:
        sys.settrace(previous)
    receipts += [receipt for receipt in (*handler.got, last) if isinstance(receipt, Receipt)]
    with suppress(PrivacyViolation, InvalidParameter, StorageFailed):
        receipts += list(run)
    with suppress(StorageFailed):
        ledger.close()
    return handler.seen >= target, receipts, last


@pytest.mark.parametrize("what", ["next_receipt", "close", "close the ledger"])
@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_handler_in_the_middle_of_a_step_gets_no_step_twice(
    stride: int, what: str, signed: Path, tmp_path: Path
) -> None:
    path, trials = tmp_path / "ledger", 0
    for target in range(1, 3000, stride):
        shutil.copy(signed, path)
        ran, receipts, last = handled_at(target, path, what)
        records = [read(entry.line) for entry in read_ledger(path).entries]
        charged = sum(record["count"] for record in records if record["type"] == "lease")
        steps = [receipt.step for receipt in receipts]
        assert len(set(steps)) == len(steps) <= charged
        if last is not None and what != "next_receipt":
            closed = ran and charged < 5
            assert not (closed and usable(last))  # a closed run hands out nothing that is alive
        if not ran:
            break
        trials += 1
    assert trials > 100 // stride


@pytest.mark.parametrize("what", ["next_receipt", "close", "close the ledger"])
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_ledger_in_memory_is_no_different(stride: int, what: str) -> None:
    trials = 0
    for target in range(1, 3000, stride):
        ledger = make_ledger()
        run = ledger.start(ledger.sign_plan(make_plan(5), owner=OWNER), lease_steps=2)
        ran, receipts, _ = handled_in(ledger, run, target, what)
        steps = [receipt.step for receipt in receipts]
        assert len(set(steps)) == len(steps) <= ledger.state.charged
        replay(snapshot_in(ledger).entries, snapshot_in(ledger).note, OWNER.public)
        if not ran:
            break
        trials += 1
    assert trials > 100 // stride


def test_a_close_that_is_interrupted_is_finished_by_the_next_one(signed: Path, tmp_path: Path) -> None:
    path, hits = tmp_path / "ledger", 0
    for target in range(1, 400):
        shutil.copy(signed, path)
        ledger = reopen(path, high_water=False)
        run = ledger.start(next(iter(ledger.state.runs)), lease_steps=2)
        receipt, tracer, previous = run.next_receipt(), Tracer(target), sys.gettrace()
        sys.settrace(tracer)
        try:
            run.close()
        except Interrupt:
            hits += 1
        finally:
            sys.settrace(previous)
        run.close()
        assert not usable(receipt)
        ledger.close()
        assert [record for entry in read_ledger(path).entries if (record := read(entry.line))["type"] == "close"]
        if tracer.seen < target:
            break
    assert hits > 20


def test_a_run_that_nobody_holds_is_closed_with_its_ledger(signed: Path, tmp_path: Path) -> None:
    shutil.copy(signed, tmp_path / "ledger")
    ledger = reopen(tmp_path / "ledger", high_water=False)
    receipt = ledger.start(next(iter(ledger.state.runs)), lease_steps=2).next_receipt()
    gc.collect()
    ledger.close()
    assert not usable(receipt)


def test_a_key_that_is_erased_while_it_is_read_gives_nothing() -> None:
    key = LeaseKey()
    held = key._key
    assert held is not None
    key.wipe()
    assert held == bytes(32)
    with pytest.raises(ReceiptSpent, match="erased"):
        key.reveal()


def usable(receipt: Receipt) -> bool:
    try:
        receipt.use("grad-noise")
    except ReceiptSpent:
        return False
    return True


def test_an_interrupt_while_a_key_is_made_is_no_second_error() -> None:
    half_made = LeaseKey.__new__(LeaseKey)
    half_made.__del__()
    half_made.wipe()


class Meeting(str):
    """A purpose at whose look-ups two threads wait for each other: both look before either marks."""

    __slots__ = ()
    counts = threading.local()
    barriers = (threading.Barrier(2, timeout=5), threading.Barrier(2, timeout=5))

    def __hash__(self) -> int:
        index = getattr(self.counts, "index", 0)
        self.counts.index = index + 1
        self.barriers[index].wait()
        return super().__hash__()


def test_two_threads_that_use_one_receipt_at_once_get_its_key_once() -> None:
    ledger = make_ledger()
    run = ledger.start(ledger.sign_plan(make_plan(4), owner=OWNER), lease_steps=4)
    receipt, purpose = run.next_receipt(), Meeting("grad-noise")
    outcomes: list[str] = []

    def work() -> None:
        try:
            receipt.use(purpose)
            outcomes.append("used")
        except ReceiptSpent:
            outcomes.append("refused")

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused", "used"]


def test_a_thread_that_waited_for_close_begins_no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = make_ledger()
    run = ledger.start(ledger.sign_plan(make_plan(6), owner=OWNER), lease_steps=2)
    run.next_receipt()
    caught: list[BaseException] = []
    passed = threading.Event()
    genuine = type(run)._guard

    def guard(self: Any) -> None:
        genuine(self)
        passed.set()

    def work() -> None:
        try:
            run.next_receipt()
        except PrivacyViolation as error:
            caught.append(error)

    monkeypatch.setattr(type(run), "_guard", guard)
    with run._lock:  # as close() holds it
        thread = threading.Thread(target=work)
        thread.start()
        assert passed.wait(5)
        run.close()
    thread.join()
    assert [error.code for error in caught] == ["DP078"]  # type: ignore[attr-defined]
    assert ledger.state.runs[run.run_id].charged == 2
