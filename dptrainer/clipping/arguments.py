"""Which arguments of a replayed module carry examples, and which are shared by all of them.

A tensor with B rows may be a row for each example, or a table [T, d] that all share, in a batch that happens to have T
examples. The size of one private batch must not decide that. It is decided at set-up, on synthetic batches of two sizes
(:func:`learn`): what has B rows in both carries examples, what has another number of rows is shared. Where no set-up
ran, the calls themselves tell, see :meth:`Arguments.layouts`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from dpbudget.errors import PrivacyViolation

#: For each leaf of the flattened arguments, whether it is cut into examples.
Layout = tuple[bool, ...]
#: Structure of the arguments, and the number of dimensions of each tensor among them.
_Form = tuple[str, tuple[int | None, ...]]


@dataclass
class _Seen:
    """What calls told of one argument: numbers of examples that it had as many rows as, and whether it once had not."""

    sizes: set[int] = field(default_factory=set)
    shared: bool = False

    @property
    def carries(self) -> bool | None:
        """Whether it carries examples; None while that is open."""
        if self.shared:
            return False
        return True if len(self.sizes) > 1 else None

    def note(self, rows: int, batch_size: int) -> None:
        """One more call. A single row is broadcast and tells nothing; what is decided stays so."""
        if self.carries is None and rows == batch_size > 1:
            self.sizes.add(batch_size)
        elif self.carries is None and rows not in (1, batch_size):
            self.shared = True


class Arguments:
    """What is known of the arguments of one module.

    Attributes:
        repeats: whether a replay has given what the forward pass gave. Only before that can a replay that fails for
            all examples be a fault of the module, rather than of the examples.
    """

    def __init__(self) -> None:
        self.repeats = False
        self._seen: dict[_Form, dict[int, list[_Seen]]] = {}

    def layouts(self, name: str, leaves: Sequence[Any], form: _Form, ordinal: int, batch_size: int) -> list[Layout]:
        """What the arguments of a call may mean, the most likely first; one layout where it is known.

        Without a set-up, a tensor with B rows is open until calls with another B were seen. It is then taken for
        examples, unless the replay agrees with the forward pass for more examples if it is shared.

        Args:
            name: of the module, for errors.
            leaves: its flattened arguments.
            form: see :func:`form_of`.
            ordinal: how many calls of the module came before in this batch.
            batch_size: B.

        Raises:
            PrivacyViolation: (DP030) an argument that carries examples has another number of rows.
        """
        rows = [leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves]
        known = self._known(form, ordinal, len(leaves))
        if any(carries and count not in (1, batch_size) for carries, count in zip(known, rows, strict=True)):
            raise PrivacyViolation(
                f'an argument of module "{name}" has another number of rows than the batch has examples.',
                hint="keep the examples in dimension 0, and give the model the whole batch: physical_batch_size "
                "splits it.",
                code="DP030",
            )
        likely = tuple(count == batch_size and carries is not False for count, carries in zip(rows, known, strict=True))
        open_ = [at for at, carries in enumerate(known) if carries is None and likely[at]]
        squares = {at for at in open_ if leaves[at].shape == (batch_size, batch_size)}
        first = likely.index(True) if any(likely) else 0
        found = [likely]
        for shared in (squares, {at for at in open_ if at != first}):
            other = tuple(carries and at not in shared for at, carries in enumerate(likely))
            if other not in found and batch_size > 1:
                found.append(other)
        return found

    def note(
        self, leaves: Sequence[Any], form: _Form, ordinal: int, batch_size: int, layout: Layout | None = None
    ) -> None:
        """Learn from a call, and from the layout under which it was replayed, if it was."""
        seen = self._seen.setdefault(form, {}).setdefault(ordinal, [_Seen() for _ in leaves])
        for at, (leaf, so_far) in enumerate(zip(leaves, seen, strict=True)):
            chance = layout is not None and not layout[at] and isinstance(leaf, Tensor)  # as many rows, but shared
            if isinstance(leaf, Tensor) and leaf.dim() and not (chance and leaf.shape[0] == batch_size):
                so_far.note(leaf.shape[0], batch_size)

    def _known(self, form: _Form, ordinal: int, count: int) -> list[bool | None]:
        """What this very call of each batch told; of a further one, what all others agree about."""
        calls = self._seen.get(form, {})
        if ordinal in calls:
            return [seen.carries for seen in calls[ordinal]]
        answers = [{seen[at].carries for seen in calls.values()} for at in range(count)]
        return [next(iter(found)) if len(found) == 1 else None for found in answers]


def form_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any, _Form]:
    """The flattened arguments, how to put them together again, and what identifies calls of the same kind."""
    leaves, spec = tree_flatten((args, dict(kwargs)))
    return leaves, spec, (str(spec), tuple(leaf.dim() if isinstance(leaf, Tensor) else None for leaf in leaves))


#: Known as long as the module lives: engines come and go, also between set-up and training.
_known: weakref.WeakKeyDictionary[nn.Module, Arguments] = weakref.WeakKeyDictionary()


def arguments_of(module: nn.Module) -> Arguments:
    """What is known of the arguments of ``module``; empty at first."""
    return _known.setdefault(module, Arguments())


def forget(module: nn.Module) -> Arguments:
    """Start anew."""
    _known[module] = Arguments()
    return _known[module]


def adopt(module: nn.Module, twin: nn.Module) -> None:
    """What is known of a copy is known of the module."""
    _known[module] = arguments_of(twin)


def learn(model: nn.Module, units: Sequence[str], batches: Sequence[Sequence[Tensor]]) -> None:
    """Run ``model`` on synthetic batches of different sizes, and note what its units are given.

    Args:
        model: a copy, without hooks of an engine.
        units: names of the modules that are replayed.
        batches: positional inputs of the model, with the examples in dimension 0.
    """

    def noting(known: Arguments, counts: dict[Arguments, int], size: int) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            leaves, _, form = form_of(args, kwargs)
            known.note(leaves, form, counts.get(known, 0), size)
            counts[known] = counts.get(known, 0) + 1

        return note

    modules = [model.get_submodule(name) for name in units]
    fresh = [forget(module) for module in modules]
    for inputs in batches:
        counts: dict[Arguments, int] = {}
        handles = [
            module.register_forward_pre_hook(noting(known, counts, len(inputs[0])), with_kwargs=True)
            for module, known in zip(modules, fresh, strict=True)
        ]
        try:
            with torch.no_grad():
                model(*[tensor.clone() for tensor in inputs])
        finally:
            for handle in handles:
                handle.remove()
