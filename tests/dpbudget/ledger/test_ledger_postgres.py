"""What PostgreSQL alone has: rights, settings, connections that break, superusers and replicas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ledgerkit import OWNER, WRITER, SumFilter, make_ledger, make_plan, reopen

import dpbudget
from dpbudget.errors import InvalidParameter, MissingExtra, StorageFailed, Tampered, Unreadable
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.store.postgres import PostgresStore
from tests.postgres_server import PASSWORD, Server, running, why_not

psycopg = pytest.importorskip("psycopg")


@pytest.fixture
def database(postgres_server: Server) -> str:
    return postgres_server.database()


@pytest.fixture
def url(postgres_server: Server, database: str) -> str:
    return postgres_server.url("team", database=database)


@pytest.fixture
def admin(postgres_server: Server, database: str) -> Iterator[Any]:
    with postgres_server.connect(database) as connection:
        yield connection


def signed(url: str, steps: int = 8) -> str:
    with make_ledger(url) as ledger:
        return ledger.sign_plan(make_plan(steps), owner=OWNER)


def role(postgres_server: Server, admin: Any, group: str) -> str:
    """A login with the rights of one group alone."""
    name = f"u{admin.info.backend_pid}_{group[-6:]}"
    admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}' IN ROLE {group}")
    return name


# --- rights ----------------------------------------------------------------------------------------------------------


def test_the_writers_role_spends_and_can_do_nothing_else(
    postgres_server: Server, database: str, url: str, admin: Any
) -> None:
    run_id = signed(url)
    name = role(postgres_server, admin, "dpbudget_writer")
    mine = postgres_server.url("team", database=database, user=name)
    with reopen(mine) as ledger, ledger.start(run_id, lease_steps=2) as run:
        assert run.next_receipt().step == 0
    with postgres_server.connect(database, user=name) as connection:
        for statement in (
            "UPDATE dpbudget.record SET line = 'x'",
            "DELETE FROM dpbudget.record",
            "INSERT INTO dpbudget.record VALUES ('team', 99, 'x', NULL)",
            "TRUNCATE dpbudget.record",
            "UPDATE dpbudget.ledger SET size = 0",
            "DELETE FROM dpbudget.head",
            "INSERT INTO dpbudget.ledger (name) VALUES ('mine')",
            "DROP TABLE dpbudget.record CASCADE",
            "CREATE TABLE dpbudget.other (x int)",
            "ALTER TABLE dpbudget.record DISABLE TRIGGER append_only",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)


def test_the_function_appends_at_the_end_alone(postgres_server: Server, database: str, url: str, admin: Any) -> None:
    signed(url)
    name = role(postgres_server, admin, "dpbudget_writer")
    with postgres_server.connect(database, user=name) as connection:
        for first, lines in ((0, ["x"]), (99, ["x"]), (3, [])):
            with pytest.raises(psycopg.errors.RaiseException):
                connection.execute(
                    "SELECT dpbudget.append('team', %s, %s::bytea[], %s::bytea[], 'n', true)",
                    (first, [line.encode() for line in lines], [None] * len(lines)),
                )


def test_not_even_the_owner_of_the_schema_changes_a_record_by_mistake(url: str, admin: Any) -> None:
    signed(url)
    for statement in ("UPDATE dpbudget.record SET seq = 7", "DELETE FROM dpbudget.record", "TRUNCATE dpbudget.record"):
        with pytest.raises(psycopg.errors.RaiseException, match="never changed"):
            admin.execute(statement)


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE dpbudget.record SET line = replace(line::text, 'a', 'b')::bytea WHERE seq = 1",
        "UPDATE dpbudget.record SET envelope = envelope || '\\x20' WHERE seq = 2",
        "DELETE FROM dpbudget.record WHERE seq = 1",
        "DELETE FROM dpbudget.record WHERE seq = 3",
        "DELETE FROM dpbudget.head WHERE size = 4",
        "INSERT INTO dpbudget.record SELECT ledger, 4, line, NULL FROM dpbudget.record WHERE seq = 3",
    ],
)
def test_rows_that_a_superuser_edits_are_noticed(url: str, admin: Any, edit: str) -> None:
    with make_ledger(url) as ledger:
        ledger.sign_plan(make_plan(), owner=OWNER)
        ledger.note("checked")
        assert ledger.state.size == 4
    admin.execute("ALTER TABLE dpbudget.record DISABLE TRIGGER append_only")
    admin.execute(edit)
    assert dpbudget.verify(url, trust=OWNER.public).exit_code == 1
    with pytest.raises(Tampered):
        reopen(url)


def test_a_reader_needs_no_more_than_the_readers_role(
    postgres_server: Server, database: str, url: str, admin: Any
) -> None:
    signed(url)
    mine = postgres_server.url("team", database=database, user=role(postgres_server, admin, "dpbudget_reader"))
    with Ledger.open(mine, trust=OWNER.public) as ledger:
        assert ledger.state.size == 3
    with pytest.raises((Unreadable, StorageFailed)):
        reopen(mine).start(next(iter(ledger.state.runs))).next_receipt()
    name = f"nobody{admin.info.backend_pid}"
    admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'")
    with pytest.raises(Unreadable, match="permission denied") as caught:
        Ledger.open(postgres_server.url("team", database=database, user=name))
    assert "dpbudget_reader" in caught.value.hint


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "local", "remote_write"])
def test_a_commit_that_may_be_lost_is_refused_at_connect(url: str, admin: Any, database: str, mode: str) -> None:
    run_id = signed(url)
    open_before = reopen(url)
    admin.execute(f"ALTER DATABASE {database} SET synchronous_commit = {mode}")
    with pytest.raises(Unreadable, match=f"synchronous_commit is {mode}") as caught:
        reopen(url)
    assert caught.value.code == "DP083"
    open_before._journal.store._connection.execute(f"SET synchronous_commit = {mode}")  # type: ignore[attr-defined]
    with pytest.raises(StorageFailed, match="synchronous_commit"):
        open_before.start(run_id).next_receipt()
    open_before.close()
    admin.execute(f"ALTER DATABASE {database} SET synchronous_commit = on")
    with reopen(url) as ledger:
        assert ledger.state.runs[run_id].charged == 0


def test_a_read_only_database_is_refused_for_writing_and_read(url: str, admin: Any, database: str) -> None:
    signed(url)
    admin.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    with pytest.raises(Unreadable, match="read-only"):
        reopen(url)
    with Ledger.open(url, trust=OWNER.public) as ledger:
        assert ledger.state.size == 3


def test_a_server_without_fsync_is_refused() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with running("-c fsync=off") as server, pytest.raises(Unreadable, match="fsync is off"):
        make_ledger(server.url())


# --- connections that break ------------------------------------------------------------------------------------------


def test_a_connection_that_is_cut_in_a_spend_poisons_and_releases_nothing(url: str, admin: Any) -> None:
    run_id = signed(url)
    ledger = reopen(url)
    run = ledger.start(run_id, lease_steps=1)
    assert run.next_receipt().step == 0
    store = ledger._journal.store
    admin.execute("SELECT pg_terminate_backend(%s)", (store._connection.info.backend_pid,))  # type: ignore[attr-defined]
    with pytest.raises(StorageFailed, match="nothing was released") as caught:
        run.next_receipt()
    assert caught.value.code == "DP075"
    with pytest.raises(StorageFailed, match="refuses to go on"):
        run.next_receipt()
    with reopen(url) as again:
        assert [receipt.step for receipt in again.start(run_id, lease_steps=1)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_connection_that_is_cut_between_write_and_commit_poisons(url: str, admin: Any) -> None:
    run_id = signed(url)
    ledger = reopen(url)
    store = ledger._journal.store
    assert isinstance(store, PostgresStore)

    def cut() -> None:
        with store.transaction():
            admin.execute("SELECT pg_terminate_backend(%s)", (store._connection.info.backend_pid,))

    with pytest.raises(StorageFailed, match="may or may not be on disk"):
        cut()
    with reopen(url) as again:
        assert again.state.runs[run_id].charged == 0


def test_a_server_that_dies_stops_the_run_and_what_it_committed_is_there() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with running() as server:
        run_id = signed(server.url())
        ledger = reopen(server.url())
        run = ledger.start(run_id, lease_steps=1)
        released = [run.next_receipt().step for _ in range(3)]
        server.kill()
        with pytest.raises(StorageFailed):
            run.next_receipt()
        assert released == [0, 1, 2]
        with pytest.raises(Unreadable, match=r"127\.0\.0\.1") as caught:
            reopen(server.url())
        assert PASSWORD not in str(caught.value)


# --- failover, names, locations --------------------------------------------------------------------------------------


def test_a_replica_that_lags_behind_is_refused_by_the_process_and_by_the_mark(url: str, admin: Any) -> None:
    run_id = signed(url)
    ledger = reopen(url)
    run = ledger.start(run_id, lease_steps=1)
    run.next_receipt()
    run.next_receipt()
    admin.execute("ALTER TABLE dpbudget.record DISABLE TRIGGER append_only")
    # The promoted replica never got the last transaction: lease, reserve and settle, and its head.
    head = admin.execute("SELECT max(size) FROM dpbudget.head").fetchone()[0]
    admin.execute("DELETE FROM dpbudget.record WHERE seq >= 4")
    admin.execute("DELETE FROM dpbudget.head WHERE size = %s", (head,))
    admin.execute("UPDATE dpbudget.ledger SET size = 4")
    with pytest.raises(Tampered):
        run.next_receipt()
    with pytest.raises(Tampered, match="it is an older one") as caught:
        reopen(url)
    assert caught.value.code == "DP079"


def test_two_ledgers_of_one_database_do_not_disturb_each_other(postgres_server: Server, database: str) -> None:
    urls = [postgres_server.url(name, database=database) for name in ("one", "two")]
    runs = [signed(url) for url in urls]
    ledgers = [reopen(url) for url in urls]
    spending = [ledger.start(run_id, lease_steps=1) for ledger, run_id in zip(ledgers, runs, strict=True)]
    for _ in range(3):
        assert spending[0].next_receipt().step == spending[1].next_receipt().step
    for ledger in ledgers:
        ledger.close()
    with pytest.raises(Unreadable, match="no ledger three") as caught:
        Ledger.open(postgres_server.url("three", database=database))
    assert "one, two" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"database": "nowhere"}, "DP070", "nowhere"),
        ({"user": "stranger"}, "DP070", "stranger"),
        ({"password": "wrong-secret"}, "DP070", "password"),
        ({"ledger": "Team"}, "DP070", "no name"),
        ({"ledger": "../x"}, "DP070", "no name"),
    ],
)
def test_a_wrong_location_is_refused_with_the_way_out_and_without_the_password(
    postgres_server: Server, change: dict[str, str], code: str, said: str
) -> None:
    facts = {"ledger": "team", **change}
    with pytest.raises((Unreadable, InvalidParameter), match=said) as caught:
        Ledger.open(postgres_server.url(facts.pop("ledger"), **facts))
    assert caught.value.code == code
    assert caught.value.hint
    for secret in (PASSWORD, "wrong-secret"):
        assert secret not in str(caught.value)


def test_a_database_without_ledgers_says_how_to_make_one(postgres_server: Server, database: str) -> None:
    with pytest.raises(Unreadable, match="holds no ledgers") as caught:
        Ledger.open(postgres_server.url(database=database))
    assert "dpbudget ledger init postgresql://admin@127.0.0.1" in caught.value.hint
    assert PASSWORD not in caught.value.hint


def test_another_schema_of_the_same_name_is_refused(postgres_server: Server, database: str, admin: Any) -> None:
    admin.execute("CREATE SCHEMA dpbudget")
    with pytest.raises(Unreadable, match="not 'dpbudget ledger schema 1'"):
        Ledger.open(postgres_server.url(database=database))
    with pytest.raises(Unreadable, match="not 'dpbudget ledger schema 1'"):
        make_ledger(postgres_server.url(database=database))


def test_without_the_driver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(MissingExtra) as caught:
        Ledger.open("postgresql://db/x#team")
    assert "dpbudget[postgres]" in caught.value.hint


def test_a_ledger_in_a_database_is_verified_like_a_file(url: str, tmp_path: Path) -> None:
    budget = dpbudget.Budget(epsilon=3.0, delta=1e-5)
    with dpbudget.create_ledger(url, budget=budget, owner=OWNER, writer=WRITER, whole_budget=True) as ledger:
        plan = dpbudget.calibrate(epsilon=3.0, delta=1e-5, dataset_size=1000, batch_size=1000, steps=20)
        with ledger.start(ledger.sign_plan(plan, owner=OWNER)) as run:
            for _ in run:
                pass
        ledger.export(tmp_path / "x.jsonl")
    report = dpbudget.verify(url, trust=OWNER.public, all_heads=True)
    assert report.ok
    assert report.heads is not None
    assert report.steps == 20
    assert dpbudget.verify(tmp_path / "x.jsonl", trust=OWNER.public).epsilon == report.epsilon
    assert SumFilter().joint_claim([plan], 1e-5) == plan.claim.epsilon


@pytest.mark.parametrize("swallowed", [True, False])
def test_a_ledger_used_again_inside_a_transaction_releases_nothing(url: str, swallowed: bool) -> None:
    """A signal handler that swallows its refusal: the outer spend must not pass for committed."""
    run_id = signed(url)
    ledger = reopen(url)
    store = ledger._journal.store
    assert isinstance(store, PostgresStore)

    def again() -> None:
        with store.transaction():
            raise KeyError("what the handler swallows")

    def outer() -> None:
        with store.transaction():
            if swallowed:
                with pytest.raises(StorageFailed, match="in the middle of a transaction"):
                    again()
            else:
                store._connection.execute("ROLLBACK")

    with pytest.raises(StorageFailed):
        outer()
    with pytest.raises(StorageFailed, match="refuses to go on"):
        ledger.start(run_id).next_receipt()
    with reopen(url) as fresh:
        assert fresh.state.runs[run_id].charged == 0
