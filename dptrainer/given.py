"""Whether tensors are those of the private batch that was given out last."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils._pytree import tree_leaves


class GivenBatch:
    """Recognises the tensors of one batch and views of them, and keeps none of them alive.

    A copy, on another device for example, is not recognised: this finds a mistake, it proves nothing.
    """

    def __init__(self) -> None:
        self._tensors: list[weakref.ref[Tensor]] = []

    def remember(self, batch: object) -> None:
        """This batch was given out; the one before is forgotten."""
        self._tensors = [weakref.ref(leaf) for leaf in _tensors(batch)]

    def is_among(self, values: object) -> bool:
        """Whether one of the tensors among ``values`` shares its memory with the batch."""
        alive = [tensor for reference in self._tensors if (tensor := reference()) is not None]
        places = {_place(tensor) for tensor in alive}
        return any(_place(tensor) in places for tensor in _tensors(values))


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.numel()]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
