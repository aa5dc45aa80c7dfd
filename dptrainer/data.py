"""Records by index: which datasets can be sampled privately, how a batch is made, and what stands in for an empty one.

``len(dataset)`` is private under add-remove adjacency. It is read here to pick indices and for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate
from torch.utils.data.sampler import BatchSampler, RandomSampler, SequentialSampler

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dpbudget.ledger.run import Run
from dptrainer.clipping.grouping import Grouping
from dptrainer.sampling import Indices
from dptrainer.users import UserDataset

Collate = Callable[[list[Any]], Any]

_PLAIN_SAMPLERS = (RandomSampler, SequentialSampler)


class Records:
    """A map-style dataset, read by index.

    Args:
        dataset: has ``__len__`` and ``__getitem__``; one item is one record, the unit that privacy protects.
            A :class:`~dptrainer.users.UserDataset` has users for records.
        collate_fn: makes a batch of a list of items, with the records in dimension 0 of its tensors; default that of
            torch.
        views: K: how often each drawn record is read, for random augmentations in the dataset.

    Raises:
        PrivacyViolation: a loader was given (DP020), one with weights or a sampler of its own (DP022), or something
            without indices (DP024).
        InvalidParameter: the dataset is empty (DP009).
    """

    def __init__(self, dataset: Dataset[Any], collate_fn: Collate | None = None, *, views: int = 1) -> None:
        self._users = dataset if isinstance(dataset, UserDataset) else None
        examples: Any = dataset if self._users is None else self._users.examples
        check_dataset(examples)
        self._dataset, self._views = examples, checked_views(views)
        self._collate: Collate = default_collate if collate_fn is None else collate_fn
        self._whole = examples.tensors if type(examples) is TensorDataset and collate_fn is None else None

    @property
    def population(self) -> int:
        """Number of records, the unit of privacy. Private: for the sampler alone."""
        return len(self._dataset) if self._users is None else len(self._users)

    @property
    def may_draw(self) -> bool:
        """Whether reading runs code of the dataset or of a collation, which may draw random numbers."""
        return self._whole is None

    @property
    def most_rows(self) -> int:
        """Largest number of rows that one record can have in a batch: public."""
        return self._views * (1 if self._users is None else self._users.max_examples)

    def drawn(self, indices: Indices, fill_to: int | None = None) -> tuple[Any, Grouping | None]:
        """The records of ``indices``, collated; and which rows belong to one record, if not one each.

        Args:
            indices: none gives :meth:`synthetic`.
            fill_to: at least as many as the indices, public: the batch then has the rows of so many records; the last
                are zeros that count as nothing.

        Raises:
            PrivacyViolation: something in the collated batch cannot be filled up (DP023).
        """
        if fill_to is not None:
            return self._filled(indices, fill_to)
        if not len(indices):
            return self.synthetic(), None
        if self.most_rows == 1 and self._users is None:
            return self.batch(indices), None
        counts: tuple[int, ...] = (1,) * len(indices)
        if self._users is not None:
            indices, counts = self._users.chosen(indices)
        grouping = Grouping(tuple(count * self._views for count in counts), self.most_rows)
        return self.batch(np.repeat(indices, self._views)), grouping

    def _filled(self, indices: Indices, records: int) -> tuple[Any, Grouping]:
        most = self.most_rows
        batch, grouped = self.drawn(indices)
        counts = (1,) * len(indices) if grouped is None else tuple(grouped.counts)
        full, rest = divmod(records * most - sum(counts), most)
        padding = (most,) * full + ((rest,) if rest else ())
        rows = sum(counts)
        batch = tree_map(lambda leaf: _filled(leaf, rows if len(indices) else 1, rows, records * most), batch)
        return batch, Grouping(counts + padding, most, len(padding))

    def batch(self, indices: Indices) -> Any:
        """The examples of ``indices``, at least one, collated."""
        if self._whole is not None:
            chosen = torch.from_numpy(indices)
            return [tensor[chosen.to(tensor.device)] for tensor in self._whole]
        if hasattr(self._dataset, "__getitems__"):
            return self._collate(self._dataset.__getitems__(indices.tolist()))
        return self._collate([self._dataset[index] for index in indices.tolist()])

    def synthetic(self) -> Any:
        """A batch of one record with zeros in all its tensors: the shapes and types of the data, and no value of it."""
        return tree_map(lambda leaf: torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf, self._first())

    def _first(self) -> Any:
        return self._collate([self._dataset[0]])


def _filled(leaf: Any, given: int, kept: int, rows: int) -> Tensor:
    """The first ``kept`` of ``given`` rows of a tensor, and zeros up to ``rows``.

    Raises:
        PrivacyViolation: it has not one row a record (DP023).
    """
    if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != given:
        kind = type(leaf).__name__ if not isinstance(leaf, Tensor) else "tensor without one row a record"
        raise PrivacyViolation(
            f"static shapes fill batches up with rows of zeros, and the collated batch has a {kind} in it",
            code="DP023",
            hint="let collate_fn make tensors with the records in dimension 0, or leave static_shapes out",
        )
    return torch.cat([leaf[:kept], leaf.new_zeros(rows - kept, *leaf.shape[1:])])


def checked_fill(records: Records, physical_batch_size: int | None) -> int:
    """How many records static shapes fill batches up to; reads the shapes of one record.

    Raises:
        InvalidParameter: no physical batch size says how many rows (DP009).
        PrivacyViolation: a batch cannot be filled up (DP023).
    """
    if physical_batch_size is None:
        raise InvalidParameter(
            "static_shapes without physical_batch_size: nothing says how many rows a batch shall have",
            code="DP009",
            hint="pass physical_batch_size too, somewhat above the expected batch size",
        )
    records.drawn(np.empty(0, dtype=np.int64), physical_batch_size)
    return physical_batch_size


def check_unit(dataset: object, run: Run) -> None:
    """Refuse a run whose plan protects something else than one record of the dataset.

    Raises:
        PrivacyViolation: users are protected and records are examples, or the other way round (DP025).
    """
    unit = "user" if isinstance(dataset, UserDataset) else "example"
    if run.plan.unit != unit:
        raise PrivacyViolation(
            f"the plan protects one {run.plan.unit}, and one record of the dataset is one {unit}",
            code="DP025",
            hint="pass a UserDataset under a plan and ledger with unit='user', and any other dataset under 'example'",
        )


def checked_views(views: int) -> int:
    """``views`` if it is a positive integer.

    Raises:
        InvalidParameter: otherwise (DP009).
    """
    if type(views) is not int or not 1 <= views <= 1 << 16:
        raise InvalidParameter(
            f"views must be an integer in [1, 65536], got {views!r}",
            code="DP009",
            hint="leave it out for one row an example",
        )
    return views


def check_dataset(dataset: object) -> None:
    """Refuse what cannot be sampled record by record with the plan's probability; reads no record.

    Raises:
        PrivacyViolation: DP020, DP022 or DP024, see :class:`Records`.
        InvalidParameter: the dataset is empty (DP009).
    """
    if isinstance(dataset, DataLoader):
        sampler = check_sampler(dataset)
        order = "shuffled" if isinstance(sampler, RandomSampler) else "sequential"
        raise PrivacyViolation(
            f"a {order} DataLoader is not Poisson sampling, for which the plan was made",
            code="DP020",
            hint="pass loader.dataset (and collate_fn=loader.collate_fn); the private loader draws its own batches",
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise PrivacyViolation(
            f"{type(dataset).__name__} gives no record by index, and Poisson sampling picks records by index",
            code="DP024",
            hint="use a map-style dataset with __len__ and __getitem__",
        )
    if isinstance(dataset, tuple) and dataset and all(isinstance(part, Tensor) for part in dataset):
        raise PrivacyViolation(
            "the dataset is a tuple of tensors, whose items are whole columns and not records",
            code="DP024",
            hint="pass torch.utils.data.TensorDataset(inputs, labels)",
        )
    if len(dataset) == 0:
        raise InvalidParameter("the dataset has no record", code="DP009", hint="check how it was loaded")


def check_sampler(loader: DataLoader[Any]) -> object:
    """What orders the records of a loader over a map-style dataset, if it has neither weights nor a choice of its own.

    Raises:
        PrivacyViolation: another sampler (DP022), or a dataset without indices (DP024).
    """
    if isinstance(loader.dataset, IterableDataset):
        check_dataset(loader.dataset)
    # A loader with a batch sampler of its own has a sequential sampler, too, which it does not use.
    sampler: object = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    if type(sampler) not in _PLAIN_SAMPLERS:  # a subclass may do anything
        raise PrivacyViolation(
            f"your {type(sampler).__name__} would not be used; weighting or choosing records changes the privacy "
            "analysis",
            code="DP022",
            hint="pass the dataset itself, with the records that each person may contribute",
        )
    return sampler


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional inputs, named inputs and target of a batch.

    ``(input, ..., target)`` as a tuple or list; or a mapping whose entry ``labels`` is the target and whose other
    entries are named inputs of the model.

    Raises:
        InvalidParameter: the batch has another form (DP091).
    """
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    if isinstance(batch, Mapping) and "labels" in batch and len(batch) >= 2:
        return (), {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    raise InvalidParameter(
        f"a batch is {type(batch).__name__}; PrivateTrainer needs (input, ..., target) or a mapping with 'labels'",
        code="DP091",
        hint="pass torch.utils.data.TensorDataset(inputs, labels), or a collate_fn that gives one of these, or use "
        "make_private with your own loop",
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def own_copy(batch: Any) -> Any:
    """The batch with its tensors in memory of their own, contiguous.

    Views of a dataset have addresses and strides that follow from where a record stands, and libraries choose kernels
    by these; and what a model writes into one would change the dataset, other records too where windows overlap.
    """
    return tree_map(lambda leaf: _copied(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def _copied(tensor: Tensor) -> Tensor:
    dense = tensor.layout == torch.strided and not tensor.is_nested
    return tensor.clone(memory_format=torch.contiguous_format) if dense else tensor.clone()


def check_rows(batch: Any, rows: int) -> None:
    """Every tensor of a collated batch must have one row a record.

    Raises:
        PrivacyViolation: one has not (DP023); the message names no size, since both may be private.
    """
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not any(leaf.dim() > 0 and leaf.shape[0] == rows for leaf in tensors):
        raise PrivacyViolation(
            "no tensor of the collated batch has one row for each record that was drawn",
            code="DP023",
            hint="let collate_fn keep exactly the records it is given, in dimension 0",
        )
