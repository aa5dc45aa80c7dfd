"""Large private batches on small memory: the same step, a piece at a time."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader

from dpbudget.errors import PrivacyViolation
from dptrainer.opacus._options import known_options
from dptrainer.opacus.data_loader import DPDataLoader
from dptrainer.opacus.optimizers import DPOptimizer


class BatchMemoryManager:
    """Within the block, batches come in pieces of at most ``max_physical_batch_size`` examples.

    ::

        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as pieces:
            for x, y in pieces:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()

    ``optimizer.step()`` clips and adds up each piece, and moves at the last one of a batch, with noise once. The sum is
    that of the whole batch. A batch that is left midway is dropped, never released in part. A learning rate schedule
    advances only where ``pieces.step_complete`` is true (DP034): how many pieces a batch has is private.

    Args:
        data_loader: as ``make_private`` returned it.
        max_physical_batch_size: most examples at once.
        optimizer: as ``make_private`` returned it.

    Raises:
        PrivacyViolation: loader or optimizer is not a private one (DP021, DP032).
        InvalidParameter: the size is not a positive integer (DP009).
    """

    @known_options
    def __init__(
        self, *, data_loader: DataLoader[Any], max_physical_batch_size: int, optimizer: torch.optim.Optimizer
    ) -> None:
        self._pieces = wrap_data_loader(
            data_loader=data_loader, max_batch_size=max_physical_batch_size, optimizer=optimizer
        )

    def __enter__(self) -> DPDataLoader:
        return self._pieces

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


@known_options
def wrap_data_loader(
    *, data_loader: DataLoader[Any], max_batch_size: int, optimizer: torch.optim.Optimizer
) -> DPDataLoader:
    """The loader of :class:`BatchMemoryManager`, without a block."""
    if not isinstance(data_loader, DPDataLoader):
        raise PrivacyViolation(
            f"data_loader is a {type(data_loader).__name__} and draws no private batches",
            code="DP021",
            hint="pass the loader that make_private returned",
        )
    if not isinstance(optimizer, DPOptimizer):
        raise PrivacyViolation(
            f"the {type(optimizer).__name__} is not a private optimizer",
            code="DP032",
            hint="pass the optimizer that make_private returned",
        )
    return data_loader.in_pieces(max_batch_size)
