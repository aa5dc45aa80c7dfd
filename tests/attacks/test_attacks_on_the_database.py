"""Attacks 36 and 37: whoever owns the database edits its rows, or puts it back to an earlier time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from attackkit import OWNER, charged, head_of, make, plan, problem, reopen, rows, signed, spend, spent, verify

import dpbudget
from dpbudget.errors import Tampered
from tests.postgres_server import Server


def _replace(old: str, new: str) -> str:
    return f"UPDATE record SET line = CAST(replace(CAST(line AS TEXT), '{old}', '{new}') AS BLOB)"


EDITS = {
    "a charge lowered": _replace('"count":1', '"count":0'),
    "a step renumbered": _replace('"step":2', '"step":1'),
    "the budget raised": _replace('"epsilon":"0x1.8', '"epsilon":"0x1.9'),
    "a record deleted": "DELETE FROM record WHERE seq = 5",
    "the newest record deleted": "DELETE FROM record WHERE seq = (SELECT max(seq) FROM record)",
    "the plan deleted": "DELETE FROM record WHERE seq = 2",
    "all deleted": "DELETE FROM record",
    "a record inserted": "INSERT INTO record SELECT max(seq) + 1, line, envelope FROM record",
    "a record put below the first": "INSERT INTO record SELECT -1, line, envelope FROM record WHERE seq = 0",
    "a record moved": "UPDATE record SET seq = 999 WHERE seq = 4",
    "a signature dropped": "UPDATE record SET envelope = NULL WHERE seq = 2",
    "a signature moved": "UPDATE record SET envelope = (SELECT envelope FROM record WHERE seq = 0) WHERE seq = 2",
    "the newest head deleted": "DELETE FROM head WHERE size = (SELECT max(size) FROM head)",
    "all heads deleted": "DELETE FROM head",
    "the newest head replaced": "UPDATE head SET note = (SELECT note FROM head ORDER BY size LIMIT 1)",
}


@pytest.mark.parametrize("name", EDITS)
def test_attack_36_rows_edited_by_whoever_owns_the_database_are_noticed(tmp_path: Path, name: str) -> None:
    path = tmp_path / "ledger"
    run_id = spent(path, 3)
    before = rows(path, "SELECT * FROM record"), rows(path, "SELECT * FROM head")
    rows(path, EDITS[name])
    assert (rows(path, "SELECT * FROM record"), rows(path, "SELECT * FROM head")) != before
    assert problem(path) is not None
    with pytest.raises(Tampered):
        spend(path, run_id, 1, high_water=False)


def test_attack_36_an_older_head_that_was_replaced_is_noticed_where_all_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    spent(path, 3)
    rows(path, "UPDATE head SET note = (SELECT note FROM head ORDER BY size DESC LIMIT 1) WHERE size = 3")
    assert verify(path).ok
    assert verify(path, all_heads=True).exit_code == 1


def _by_bytes(path: Path, old: Path, size: int) -> None:
    path.write_bytes(old.read_bytes())


def _by_rows(path: Path, old: Path, size: int) -> None:
    rows(path, f"DELETE FROM record WHERE seq >= {size}", f"DELETE FROM head WHERE size > {size}")


@pytest.mark.parametrize("put_back", [_by_bytes, _by_rows])
def test_attack_37_an_older_state_put_back_under_an_open_ledger_releases_nothing(
    tmp_path: Path, put_back: Callable[[Path, Path, int], None]
) -> None:
    path, old = tmp_path / "ledger", tmp_path / "old"
    ledger = make(path)
    run = ledger.start(ledger.sign_plan(plan(), owner=OWNER), lease_steps=1)
    run.next_receipt()
    shutil.copy(path, old)
    size = ledger.head.size
    run.next_receipt()
    run.next_receipt()
    put_back(path, old, size)
    with pytest.raises(Tampered, match=rf"covers {size} records"):
        run.next_receipt()
    with pytest.raises(Tampered):
        ledger.export(tmp_path / "export")
    ledger._journal.close()
    assert charged(path) == 1  # nothing was added to the older state, and in itself it is consistent


@pytest.mark.parametrize("put_back", [_by_bytes, _by_rows])
def test_attack_37_a_failover_to_a_lagging_copy_is_refused_by_the_high_water_mark(
    tmp_path: Path, put_back: Callable[[Path, Path, int], None]
) -> None:
    path, old = tmp_path / "ledger", tmp_path / "old"
    run_id = signed(path)
    shutil.copy(path, old)
    size = int(head_of(path).partition(":")[0])
    spend(path, run_id, 2)
    head = head_of(path)
    put_back(path, old, size)
    for _ in range(2):  # a refusal does not lower the mark
        with pytest.raises(Tampered, match="it is an older one") as caught:
            reopen(path)
        assert caught.value.code == "DP079"
    assert verify(path).ok  # nothing in the copy itself tells
    assert verify(path, expect_head=head).exit_code == 5


# --- the same in PostgreSQL ------------------------------------------------------------------------------------------

POSTGRES_EDITS = {
    "a charge lowered": "UPDATE dpbudget.record SET "
    "line = replace(encode(line, 'escape'), 'count\":1', 'count\":0')::bytea",
    "a record deleted": "DELETE FROM dpbudget.record WHERE seq = 5",
    "the newest records deleted": "DELETE FROM dpbudget.record WHERE seq > 5",
    "a record moved": "UPDATE dpbudget.record SET seq = 999 WHERE seq = 4",
    "a signature dropped": "UPDATE dpbudget.record SET envelope = NULL WHERE seq = 2",
    "all heads deleted": "DELETE FROM dpbudget.head",
}


@pytest.fixture
def database(postgres_server: Server) -> tuple[str, str]:
    """The location of a ledger with three steps spent, and the name of its database."""
    name = postgres_server.database()
    url = postgres_server.url("team", database=name)
    spent(url, 3)  # type: ignore[arg-type]
    return url, name


@pytest.mark.parametrize("name", POSTGRES_EDITS)
def test_attack_36_rows_that_a_superuser_edits_in_postgresql_are_noticed(
    postgres_server: Server, database: tuple[str, str], name: str
) -> None:
    url, place = database
    with postgres_server.connect(place) as superuser:
        superuser.execute("ALTER TABLE dpbudget.record DISABLE TRIGGER append_only")
        superuser.execute(POSTGRES_EDITS[name])
    assert dpbudget.verify(url, trust=OWNER.public).exit_code == 1
    with pytest.raises(Tampered):
        reopen(url, high_water=False)  # type: ignore[arg-type]


def test_attack_37_failover_to_a_replica_that_lags_behind_is_refused(
    postgres_server: Server, database: tuple[str, str]
) -> None:
    """The promoted server has everything but the newest transactions, consistent in itself."""
    url, place = database
    ledger = reopen(url)  # type: ignore[arg-type]
    run_id = next(iter(ledger.state.runs))
    run = ledger.start(run_id, lease_steps=1)
    size, note = ledger.head.size, ledger.head.note
    run.next_receipt()
    with postgres_server.connect(place) as replica:
        replica.execute("ALTER TABLE dpbudget.record DISABLE TRIGGER append_only")
        replica.execute("DELETE FROM dpbudget.record WHERE seq >= %s", (size,))
        replica.execute("DELETE FROM dpbudget.head WHERE size > %s", (size,))
        replica.execute(
            "INSERT INTO dpbudget.head VALUES ('team', %s, false, %s) ON CONFLICT DO NOTHING",
            (size, note.encode()),
        )
        replica.execute("UPDATE dpbudget.ledger SET size = %s", (size,))
    with pytest.raises(Tampered):
        run.next_receipt()
    with pytest.raises(Tampered):  # its last reserves and settles have no place any more
        ledger.close()
    with pytest.raises(Tampered):
        reopen(url)  # type: ignore[arg-type]
