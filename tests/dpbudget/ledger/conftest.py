"""What takes long to start and is shared by the ledger's tests of faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faultkit import Zygote, zygote_in


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """The process in which writes and syncs fail on demand."""
    with zygote_in(tmp_path_factory.mktemp("zygote")) as process:
        yield process
