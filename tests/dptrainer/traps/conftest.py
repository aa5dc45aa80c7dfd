from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The kits of the neighbouring folders.
for folder in ("loop", "clipping"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))

from dptrainer import loop as loop_module  # noqa: E402


@pytest.fixture(autouse=True)
def _no_loop_outlives_its_test() -> Iterator[None]:
    yield
    for loop in list(loop_module._attached):
        loop.detach()
