"""For the attacks that train: no guard on a model outlives its test."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_loop_outlives_its_test() -> Iterator[None]:
    yield
    loops = sys.modules.get("dptrainer.loop")  # without torch there is none
    for loop in list(loops._attached) if loops else ():
        loop.detach()
