"""For every test: high-water marks of ledgers go to a folder of its own, never to the user's; a database server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres_server import Server, running, why_not


@pytest.fixture(autouse=True)
def _own_marks(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("marks")
    monkeypatch.setenv("DPBUDGET_STATE", str(folder))
    return folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """A PostgreSQL server of this session; the test is skipped where none can be started."""
    pytest.importorskip("psycopg")
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with running() as server:
        yield server
