"""Whether tensors are those of the private batch that was given out last, or of what was computed from it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves


class GivenBatch:
    """Recognises the tensors of one batch and views of them by their storage, and keeps none of them alive.

    A copy, on another device for example, is not recognised: this finds a mistake, it proves nothing.
    """

    def __init__(self) -> None:
        #: By identity, which no other storage can take while it is referred to.
        self._storages: dict[int, StorageWeakRef] = {}

    def remember(self, batch: object) -> None:
        """This batch was given out; the one before is forgotten."""
        self._storages = {}
        self.add(batch)

    def add(self, values: object) -> None:
        """These belong to it too."""
        for tensor in _tensors(values):
            reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # of torch
            self._storages[reference.cdata] = reference

    def is_among(self, values: object) -> bool:
        """Whether one of the tensors among ``values`` shares its memory with the batch."""
        return bool(self._storages) and any(t.untyped_storage()._cdata in self._storages for t in _tensors(values))


def _tensors(values: object) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.layout is torch.strided and t.numel()]
