"""For every test: high-water marks of ledgers go to a folder of its own, never to the user's; a database server."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres_server import Server, running, why_not

# Before anything loads torch or numpy, and for the processes that tests start: models this small gain nothing from
# threads, and beside other work they lose a hundredfold by them. A test of threads sets their number itself.
for _library in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_library, "1")


def pytest_collection_finish() -> None:
    """What importing and collecting made, more than a million objects, is looked through no more.

    Every trainer that is made searches all objects for trainable tensors, and the garbage collector does for garbage.
    A test that means a tensor of its module to be found thaws it.
    """
    gc.collect()
    gc.freeze()


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
