"""For every test: high-water marks of ledgers go to a folder of its own, never to the user's."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_marks(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("marks")
    monkeypatch.setenv("DPBUDGET_STATE", str(folder))
    return folder
