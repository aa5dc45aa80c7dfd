from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dptrainer import loop as loop_module


@pytest.fixture(autouse=True)
def _no_loop_outlives_its_test() -> Iterator[None]:
    yield
    for loop in list(loop_module._attached):
        loop.detach()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small spend more time on waking threads than on numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
