from __future__ import annotations

from collections.abc import Iterator

import pytest

from dptrainer import loop as loop_module


@pytest.fixture(autouse=True)
def _no_loop_outlives_its_test() -> Iterator[None]:
    yield
    for loop in list(loop_module._attached):
        loop.detach()
