"""One contract for every store: SQLite, PostgreSQL and memory keep the same promises."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ledgerkit import OWNER, WRITER, SumFilter, export_bytes, lived_in_ledger, make_ledger, make_plan, rdp_ledger

from dpbudget.errors import InvalidParameter, StorageFailed, Tampered
from dpbudget.ledger.entries import Entry
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.store.base import LedgerStore, Snapshot
from dpbudget.ledger.store.locate import create_store, open_store, reading_at
from dpbudget.ledger.store.memory import MemoryStore

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
ONE, TWO, THREE = Entry(b"one", b"sealed"), Entry(b"two"), Entry(b"three")


@dataclass
class Place:
    """Where a store of one kind is made; ``location`` is None for one that nobody opens twice."""

    location: str | None
    make: Callable[[], LedgerStore]

    def again(self) -> LedgerStore:
        assert self.location is not None
        return open_store(self.location)


def place_of(kind: str, request: pytest.FixtureRequest, folder: Path) -> Place:
    if kind == "memory":
        return Place(None, MemoryStore)
    if kind == "sqlite":
        location = str(folder / "ledger")
    else:
        server = request.getfixturevalue("postgres_server")
        location = server.url("team", database=server.database())
    return Place(location, lambda: create_store(location))


@pytest.fixture(params=["sqlite", "postgres", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return place_of(request.param, request, tmp_path)


@pytest.fixture(params=["sqlite", "postgres"])
def lasting(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where records outlive their handle."""
    return place_of(request.param, request, tmp_path)


@pytest.fixture
def store(place: Place) -> Iterator[LedgerStore]:
    made = place.make()
    yield made
    made.close()


def put(store: LedgerStore, *entries: Entry, size: int, note: bytes = b"note", keep: bool = True) -> None:
    with store.transaction() as transaction:
        transaction.append(entries, note, size=size, keep=keep)


def all_of(store: LedgerStore) -> Snapshot:
    with store.reading() as reading:
        return Snapshot.of(reading)


def test_a_new_store_is_empty(store: LedgerStore) -> None:
    assert all_of(store) == Snapshot((), None, ())
    with store.transaction() as transaction:
        assert (list(transaction.read(0)), transaction.note()) == ([], None)


def test_what_is_appended_is_read_in_order_from_any_place(store: LedgerStore) -> None:
    put(store, ONE, TWO, size=2, note=b"first")
    put(store, THREE, size=3, note=b"second")
    with store.transaction() as transaction:
        assert [list(transaction.read(start)) for start in range(4)] == [[ONE, TWO, THREE], [TWO, THREE], [THREE], []]
        assert transaction.note() == b"second"
    assert all_of(store) == Snapshot((ONE, TWO, THREE), b"second", (b"first", b"second"))


def test_a_head_that_is_not_kept_gives_way_to_the_next(store: LedgerStore) -> None:
    put(store, ONE, size=1, note=b"kept")
    put(store, TWO, size=2, note=b"passing", keep=False)
    assert all_of(store).heads == (b"kept", b"passing")
    put(store, THREE, size=3, note=b"newest", keep=False)
    assert all_of(store).heads == (b"kept", b"newest")


def test_many_records_at_once_are_one_transaction(store: LedgerStore) -> None:
    entries = [Entry(b"%d" % number) for number in range(5000)]
    put(store, *entries, size=5000, note=b"all")
    assert all_of(store) == Snapshot(tuple(entries), b"all", (b"all",))


def test_an_exception_leaves_everything_as_it_was(store: LedgerStore) -> None:
    put(store, ONE, size=1)

    def fail() -> None:
        with store.transaction() as transaction:
            transaction.append([TWO], b"lost", size=2, keep=True)
            raise KeyError("a rule refuses")

    with pytest.raises(KeyError):
        fail()
    assert all_of(store) == Snapshot((ONE,), b"note", (b"note",))
    put(store, TWO, size=2)


def test_what_was_committed_is_there_for_the_next_process(lasting: Place) -> None:
    store = lasting.make()
    put(store, ONE, TWO, size=2)
    store.close()
    again = lasting.again()
    assert all_of(again).entries == (ONE, TWO)
    again.close()


def test_two_handles_see_each_other(lasting: Place) -> None:
    one, two = lasting.make(), lasting.again()
    put(one, ONE, size=1)
    with two.transaction() as transaction:
        assert list(transaction.read(0)) == [ONE]
        transaction.append([TWO], b"note", size=2, keep=True)
    assert all_of(one).entries == (ONE, TWO)
    one.close()
    two.close()


def test_the_lock_is_exclusive_and_waiting_for_it_ends(lasting: Place) -> None:
    one = lasting.make()
    two = type(one).open(lasting.location, busy_seconds=0.2)  # type: ignore[attr-defined]
    with one.transaction() as transaction:
        transaction.append([ONE], b"note", size=1, keep=True)
        with pytest.raises(StorageFailed, match="another process holds the lock"), two.transaction():
            raise AssertionError("two processes in one transaction")
    put(two, TWO, size=2)  # busy is no failure: the handle goes on
    assert all_of(one).entries == (ONE, TWO)
    one.close()
    two.close()


def test_a_reading_is_of_one_moment(lasting: Place) -> None:
    one, two = lasting.make(), lasting.again()
    put(one, ONE, size=1)
    with two.reading() as reading:
        assert list(reading.entries()) == [ONE]
        assert (reading.newest(), tuple(reading.heads())) == (b"note", (b"note",))
    put(one, TWO, size=2)
    assert all_of(two).entries == (ONE, TWO)
    one.close()
    two.close()


def test_a_closed_store_refuses_and_closing_again_is_harmless(store: LedgerStore) -> None:
    store.close()
    store.close()
    with pytest.raises(StorageFailed), store.transaction():
        raise AssertionError("a transaction of a closed store")


def test_an_existing_place_is_not_overwritten(lasting: Place) -> None:
    store = lasting.make()
    put(store, ONE, size=1)
    with pytest.raises(InvalidParameter, match="exists") as caught:
        lasting.make()
    assert caught.value.code == "DP074"
    assert all_of(store).entries == (ONE,)
    store.close()


def test_threads_take_turns(store: LedgerStore) -> None:
    def add() -> None:
        for _ in range(10):
            with store.transaction() as transaction:
                size = len(list(transaction.read(0)))
                transaction.append([Entry(b"%d" % size)], b"note", size=size + 1, keep=False)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all_of(store).entries == tuple(Entry(b"%d" % number) for number in range(40))


def test_a_forked_child_is_refused_and_the_parent_goes_on(lasting: Place) -> None:
    store = lasting.make()
    put(store, ONE, size=1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with store.transaction():
                pass
        except StorageFailed as error:
            status = 0 if "forked" in error.message else 2
        finally:
            store.close()
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    put(store, TWO, size=2)
    assert all_of(store).entries == (ONE, TWO)
    store.close()


# --- a ledger on top -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [lived_in_ledger, rdp_ledger])
def test_a_ledger_lives_the_same_life_everywhere(place: Place, fill: Callable[..., Ledger]) -> None:
    ledger = fill(place.location)
    state, data = ledger.state, export_bytes(ledger)
    ledger.close()
    if place.location is not None:
        with reading_at(place.location) as reading:
            assert len(list(reading.entries())) == state.size
        with Ledger.open(place.location, trust=OWNER.public) as again:
            assert export_bytes(again) == data
            assert again.state.runs == state.runs
    assert data.count(b"\n") > 15


def test_a_ledger_moves_from_store_to_store_by_its_export(lasting: Place, tmp_path: Path) -> None:
    with make_ledger(tmp_path / "old") as old:
        old.sign_plan(make_plan(), owner=OWNER)
        old.export(tmp_path / "old.jsonl")
        size = old.state.size
    moved = Ledger.import_export(
        tmp_path / "old.jsonl", str(lasting.location), writer=WRITER, trust=OWNER.public, filter=SumFilter()
    )
    with moved, moved.start(next(iter(moved.state.runs))) as run:
        assert [receipt.step for receipt in run] == [0, 1, 2, 3]
        assert moved.state.size > size + 1


def test_what_is_no_ledger_is_refused_whatever_the_store(lasting: Place) -> None:
    store = lasting.make()
    put(store, ONE, size=1)
    store.close()
    for writer in (None, WRITER):
        with pytest.raises(Tampered):
            Ledger.open(str(lasting.location), writer=writer)


def test_a_damaged_store_does_not_become_a_fine_looking_export(place: Place) -> None:
    ledger = make_ledger(place.location)
    put(ledger._journal.store, Entry(b"{}"), size=3)
    with pytest.raises(Tampered):
        ledger.export(io.BytesIO())
    ledger.close()
