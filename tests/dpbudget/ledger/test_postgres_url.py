"""The location of a ledger in PostgreSQL: read as libpq reads it, and shown without anything that could be a secret."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpbudget.errors import InvalidParameter
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.store.locate import create_store, open_store
from dpbudget.ledger.store.postgres_url import PostgresUrl, is_database, show_location

psycopg = pytest.importorskip("psycopg")

SECRET = "s3cret"
HIDDEN = "postgresql://..."


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("postgresql://db/x#team", "postgresql://db/x#team"),
        ("postgres://me@db:5432/x", "postgres://me@db:5432/x"),
        (f"postgresql://me:{SECRET}@db:5432/x?sslmode=require#team", "postgresql://me@db:5432/x?sslmode=require#team"),
        (f"postgresql://:{SECRET}@db/x", "postgresql://db/x"),
        ("postgresql:///x?host=/run/postgresql", "postgresql:///x?host=/run/postgresql"),
        ("postgresql://[::1]:5432,b:1/x", "postgresql://[::1]:5432,b:1/x"),
        ("postgresql://%2Frun%2Fpg/x", "postgresql://%2Frun%2Fpg/x"),
        (f"postgresql://db/x?password={SECRET}", "postgresql://db/x"),
        (f"postgresql://db/x?pass%77ord={SECRET}", "postgresql://db/x"),
        (f"postgresql://db/x?sslpassword={SECRET}", "postgresql://db/x"),
        (f"postgresql://db/x?passfile={SECRET}&options={SECRET}", "postgresql://db/x"),
        (f"postgresql://db/x?oauth_client_secret={SECRET}&user=a%20b{SECRET[0]}", "postgresql://db/x?user=a%20bs"),
    ],
)
def test_what_is_no_secret_is_shown(location: str, shown: str) -> None:
    parsed = PostgresUrl.parse(location)
    assert parsed.shown == show_location(location) == shown
    assert SECRET not in repr(parsed)
    psycopg.conninfo.conninfo_to_dict(parsed.conninfo)  # libpq understands it too


@pytest.mark.parametrize(
    "mark", ["/", "#", "?", "@", " ", "\n", "/x#", "?x@", "\u2100", "[", "]", ":1/", "12/", "%zz@"]
)
def test_a_location_that_is_not_understood_whole_is_refused_and_not_shown(mark: str) -> None:
    location = f"postgresql://me:{SECRET}{mark}{SECRET}@db/x#team"
    shown = show_location(location)
    assert SECRET not in shown
    if shown == HIDDEN:
        with pytest.raises(InvalidParameter) as caught:
            Ledger.open(location)
        assert SECRET not in str(caught.value)
        assert "%40 for @" in caught.value.hint


@pytest.mark.parametrize(
    "location", ["postgresql://[", "postgresql://me:a\u2100b@db", "postgresql://a b", "postgres://@@"]
)
def test_odd_characters_raise_nothing_raw(location: str) -> None:
    assert show_location(location) in (HIDDEN, "postgresql://me@db")


@given(
    password=st.text(st.sampled_from("aZ0/?#@:%&=[]. \u2100"), min_size=1, max_size=12),
    around=st.sampled_from(
        [("postgresql://me:", "@db/x"), ("postgresql://:", "@db/x#team"), ("postgresql://db/x?password=", "&user=me"),
         ("postgresql://db?sslpassword=", "#team"), ("postgresql://db/x?user=me&pass%77ord=", "")]
    ),
)  # fmt: skip
def test_no_password_is_shown_however_it_is_spelt(password: str, around: tuple[str, str]) -> None:
    prefix, suffix = around
    marked = f"QX{password}XQ"
    shown = show_location(f"{prefix}{marked}{suffix}")
    assert "QX" not in shown
    assert "XQ" not in shown


def test_a_parameter_that_libpq_does_not_know_is_not_shown() -> None:
    location = f"postgresql://db/x?Password={SECRET}&user=me"
    assert show_location(location) == "postgresql://db/x?user=me"
    with pytest.raises(InvalidParameter) as caught:
        Ledger.open(location)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "location",
    [f"postgresql+psycopg://me:{SECRET}@db/x", f"Postgresql://me:{SECRET}@db/x", f"pgsql://me:{SECRET}@db/x",
     f" postgresql://me:{SECRET}@db/x", f"jdbc:postgresql://db/x?password={SECRET}", f"host=db password={SECRET}",
     f"dbname=x PASSWORD = {SECRET}", f"sslpassword={SECRET}", f"mysql://me:{SECRET}@db/x"],
)  # fmt: skip
def test_what_looks_like_another_databases_location_is_no_path(location: str, tmp_path: Path) -> None:
    for use in (create_store, open_store, is_database):
        with pytest.raises(InvalidParameter) as caught:
            use(location)
        assert SECRET not in str(caught.value)
        assert "postgresql://user@host/database#name" in caught.value.hint


@pytest.mark.parametrize("where", ["?dbname={}", "/{}"])
@pytest.mark.parametrize("inner", ["password%3Ds3cret", "postgresql://me:s3cret%40db/x"])
def test_a_database_that_is_named_like_a_connection_string_is_not_shown(where: str, inner: str) -> None:
    assert SECRET not in show_location("postgresql://db" + where.format(inner))


def test_a_location_of_a_database_is_told_from_a_path() -> None:
    assert is_database("postgres://x")
    assert not is_database(Path("postgresql"))


def test_a_name_that_leaves_its_folder_is_no_name() -> None:
    with pytest.raises(InvalidParameter, match="no name of a ledger"):
        PostgresUrl.parse("postgresql://db/x#../../owner")
