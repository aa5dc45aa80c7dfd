"""The loader that ``make_private`` returns: a ``DataLoader`` to look at, private Poisson batches to iterate over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, default_collate

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.data import Collate, check_dataset, check_sampler
from dptrainer.opacus._options import known_options, unsupported
from dptrainer.opacus._spending import Draws, steps_of_epoch
from dptrainer.private import PrivateLoader


class PoissonBatches(Sampler[list[int]]):
    """Stands where a ``DataLoader`` has its batch sampler, and gives no index: which records were drawn is private.

    Opacus's ``UniformWithReplacementSampler``, with its arguments: a loader with this batch sampler, given to
    ``make_private``, says by which rate to draw.

    Args:
        num_samples: size of the dataset.
        sample_rate: probability of each record.
        generator: refused unless None; batches are drawn from the ledger's key.
        steps: steps of an epoch; 1 / sample_rate, rounded up, if not given.
    """

    @known_options
    def __init__(
        self,
        *,
        num_samples: int,
        sample_rate: float,
        generator: torch.Generator | None = None,
        steps: int | None = None,
    ) -> None:
        _check(generator, distributed=False, batch_first=True)
        if not 0.0 < sample_rate <= 1.0:
            raise InvalidParameter(
                f"sample_rate is a probability in (0, 1], got {sample_rate!r}", code="DP008", hint="batch size / size"
            )
        self.num_samples, self.sample_rate = num_samples, sample_rate
        self._steps = steps_of_epoch(sample_rate) if steps is None else steps

    def __len__(self) -> int:
        """Steps of an epoch."""
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        """Refused.

        Raises:
            PrivacyViolation: always (DP021).
        """
        raise PrivacyViolation(
            "the indices of a private batch are drawn when its step is charged, and given to nobody",
            code="DP021",
            hint="iterate over the loader that make_private returned",
        )


class DPDataLoader(DataLoader[Any]):
    """Poisson batches of a dataset; it gives them once ``make_private`` has bound it to a ledger.

    Every record enters every batch with probability ``sample_rate``, exactly ``batch size / dataset size`` where it is
    made from a ``DataLoader``. Items are read in this process: a worker that fetched ahead would draw before the step
    is charged.

    Args:
        dataset: map-style.
        sample_rate: probability of each record.
        collate_fn: as for a ``DataLoader``.
        drop_last: has no effect, since no Poisson batch is incomplete.
        generator: refused unless None; batches are drawn from the ledger's key.
        distributed: refused.
        batch_first: examples in dimension 0; other layouts are refused.
        rand_on_empty: has no effect. A synthetic example stands in for an empty batch, and its gradient is dropped.
    """

    @known_options
    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        sample_rate: float,
        collate_fn: Collate | None = None,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        distributed: bool = False,
        batch_first: bool = True,
        rand_on_empty: bool = False,
    ) -> None:
        check_dataset(dataset)
        _check(generator, distributed, batch_first)
        size = len(dataset)  # type: ignore[arg-type]  # checked above: map-style, with a length
        batches = PoissonBatches(num_samples=size, sample_rate=sample_rate)
        self._set_up(dataset, Draws(size, sample_rate, len(batches)), collate_fn)

    def _set_up(self, dataset: Dataset[Any], draws: Draws, collate_fn: Collate | None) -> None:
        self.draws, self.sample_rate, self.distributed = draws, draws.rate, False
        self._private: PrivateLoader | None = None
        self._keep: object = None
        self._on_detach: Callable[[], None] | None = None
        self._items: int | None = None
        batches = PoissonBatches(num_samples=draws.size, sample_rate=draws.rate, steps=draws.steps)
        super().__init__(dataset, batch_sampler=batches, collate_fn=collate_fn)

    @classmethod
    @known_options
    def from_data_loader(
        cls,
        data_loader: DataLoader[Any],
        *,
        distributed: bool = False,
        generator: torch.Generator | None = None,
        batch_first: bool = True,
        rand_on_empty: bool = False,
    ) -> Self:
        """The Poisson loader with the dataset, the batch size and the collation of another loader.

        Raises:
            PrivacyViolation: it has weights or a sampler of its own (DP022), or a dataset without indices (DP024).
            InvalidParameter: it has no batch size, or an option cannot be kept (DP009, DP065).
        """
        _check(generator, distributed, batch_first)
        made = cls.__new__(cls)
        made._set_up(data_loader.dataset, draws_of(data_loader), data_loader.collate_fn)
        return made

    def bind(self, private: PrivateLoader, *, keep: object, on_detach: Callable[[], None] | None = None) -> None:
        """Give this loader its batches; called by ``make_private``, which also names what must live as long."""
        self._private, self._keep, self._on_detach = private, keep, on_detach

    def in_pieces(self, physical_batch_size: int) -> DPDataLoader:
        """The same private batches in pieces of at most ``physical_batch_size`` examples; see BatchMemoryManager."""
        pieces = self._bound().in_pieces(physical_batch_size)
        made = type(self).__new__(type(self))
        made._set_up(self.dataset, self.draws, self.collate_fn)
        made._items = math.ceil(self.draws.steps * self.draws.rate * self.draws.size / physical_batch_size)
        made.bind(pieces, keep=self._keep, on_detach=self._on_detach)
        return made

    def __len__(self) -> int:
        """Steps of an epoch; in pieces, the items that these steps have on average."""
        return self.draws.steps if self._items is None else max(self._items, self.draws.steps)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch's iterator class belongs to its workers
        """The batches of one epoch, each charged to the ledger before it is drawn.

        Raises:
            PrivacyViolation: the loader was never given to ``make_private`` (DP021).
            PlanExhausted: the plan is used up (DP050); the model is unchanged.
            BudgetExceeded: the budget of the ledger is (DP052).
        """
        return iter(self._bound())

    @property
    def step_complete(self) -> bool:
        """Whether the last ``optimizer.step()`` ended a step, and was not one of several physical batches."""
        return self._bound().step_complete

    @property
    def step_ends(self) -> bool:
        """Whether the batch that was given out last is the last of its step."""
        return self._bound().step_ends

    def detach(self) -> None:
        """Take every guard off model and optimizer, to go on with public data; this loader is then dead."""
        self._bound().detach()
        if self._on_detach is not None:
            self._on_detach()

    def _bound(self) -> PrivateLoader:
        if self._private is None:
            raise PrivacyViolation(
                "this loader draws no batch yet: none of its steps would be charged",
                code="DP021",
                hint="pass it to PrivacyEngine.make_private, and iterate over the loader that comes back",
            )
        return self._private


def draws_of(loader: DataLoader[Any]) -> Draws:
    """Size, batch size and steps of an epoch of a user's loader.

    Raises:
        PrivacyViolation: weights or a sampler of one's own (DP022), or a dataset without indices (DP024).
        InvalidParameter: it has no batch size, or no batch (DP009).
    """
    if isinstance(loader, DPDataLoader):
        return loader.draws
    if not isinstance(loader, DataLoader):
        raise InvalidParameter(
            f"data_loader is {type(loader).__name__}, not a torch DataLoader",
            code="DP024",
            hint="pass DataLoader(dataset, batch_size=...); its dataset, batch size and collate_fn are used",
        )
    check_dataset(loader.dataset)
    size = len(loader.dataset)  # type: ignore[arg-type]  # checked above
    inner = loader.batch_sampler
    if isinstance(inner, PoissonBatches):
        return Draws(size, inner.sample_rate, len(inner))
    check_sampler(loader)
    batch = inner.batch_size if isinstance(inner, BatchSampler) else loader.batch_size
    if batch is None:
        raise InvalidParameter(
            "the loader gives single items and has no batch size",
            code="DP009",
            hint="DataLoader(dataset, batch_size=...)",
        )
    steps = len(loader)
    if steps == 0:
        raise InvalidParameter(
            f"the loader gives no batch: drop_last=True, with {size} records and a batch size of {batch}",
            code="DP009",
            hint="take a smaller batch size",
        )
    return Draws(size, min(batch, size) / size, steps)


def private_collate(loader: DataLoader[Any]) -> Collate | None:
    """The user's collation; None for torch's own, which the records know how to take at once."""
    collate: Any = loader.collate_fn
    return None if collate is default_collate else collate


def _check(generator: object, distributed: bool, batch_first: bool) -> None:
    if generator is not None:
        raise unsupported("generator: whoever knows its seed knows every batch", "leave it out")
    if distributed:
        raise unsupported("distributed=True", "the facade trains in one process")
    if batch_first is not True:
        raise unsupported("batch_first=False", "put the examples in dimension 0")
