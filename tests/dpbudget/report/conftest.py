"""Ledgers of every kind, made once for all tests of reports."""

from __future__ import annotations

import pytest
from reportkit import Shelf, fill


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """one run; two runs in one portfolio; portfolios and changes; rdp; users; nothing begun; nothing at all."""
    shelf = Shelf(tmp_path_factory.mktemp("ledgers"))
    fill(shelf)
    return shelf
