"""What every record of a step finds in the model as the first one did: attributes, parameters, buffers.

A record whose gradient follows what an earlier one left behind is no function of itself, and exact noise rests on that.
What forward assigns to attributes of modules is taken back after each record. What it writes into tensors is refused
at the end of the step, before anything is released.
"""

from __future__ import annotations

import copy
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.guard import every_module

#: Where torch keeps parameters, buffers, modules and hooks: changes there are refused and not taken back.
_TORCH = frozenset(vars(nn.Module()))
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: (module, what of it, name)
_Place = tuple[nn.Module, str, str]


class Standing:
    """The state of modules as it is now. Objects that their attributes refer to are out of its sight.

    Args:
        roots: the model, and a criterion that is a module; with everything inside them.
    """

    def __init__(self, *roots: nn.Module) -> None:
        self._roots = roots
        modules = self._modules()
        self._tables = [_Table(vars(module)) for module in modules]
        self._tables += [_Table(value) for module in modules for value in _own(module) if _is_table(value)]
        self._tensors = self._found()
        #: The tensors are referred to, so that no other can take the identity of one that is replaced.
        self._marks = {place: _mark(tensor) for place, tensor in self._tensors.items()}

    def put_back(self) -> None:
        """Give attributes, and the lists, dicts and sets that they hold, what they held at construction."""
        for table in self._tables:
            table.put_back()

    def check(self) -> None:
        """Compare parameters, buffers and tensors in attributes with those at construction, to the bit.

        Raises:
            PrivacyViolation: one was changed, replaced, added or removed: a parameter that trains (DP031), or
                something else (DP013).
        """
        found = self._found()
        for place in {**self._tensors, **found}:
            before, now = self._tensors.get(place), found.get(place)
            if before is None or now is not before or _mark(now) != self._marks[place]:
                raise self._refusal(place, before if now is None else now)

    def _modules(self) -> list[nn.Module]:
        return list(dict.fromkeys(module for root in self._roots for module in every_module(root)))

    def _found(self) -> dict[_Place, Tensor]:
        found: dict[_Place, Tensor] = {}
        for module in self._modules():
            found |= {(module, "parameter", name): p for name, p in module._parameters.items() if p is not None}
            found |= {(module, "buffer", name): b for name, b in module._buffers.items() if b is not None}
            for name, value in vars(module).items():
                if name in _TORCH or not (isinstance(value, Tensor) or _is_table(value) or isinstance(value, tuple)):
                    continue
                leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
                found |= {(module, "attribute", f"{name}[{i}]" if i else name): leaf for i, leaf in enumerate(leaves)}
        return found

    def _refusal(self, place: _Place, tensor: Tensor | None) -> PrivacyViolation:
        module, kind, local = place
        names = [name for root in self._roots for name, held in root.named_modules() if held is module]
        name = ".".join(part for part in (*names[:1], local) if part)
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            return PrivacyViolation(
                f'parameter "{name}" was changed during forward, from private data and without noise.',
                hint="let only the optimizer change parameters.",
                code="DP031",
            )
        kind = "frozen parameter" if kind == "parameter" else kind
        return PrivacyViolation(
            f'{kind} "{name}" was updated during forward, from private data and without noise.',
            hint="call .eval() on that layer, or replace it by one that keeps no statistics; fill tables that are made "
            "once by a call with synthetic inputs before training.",
            code="DP013",
        )


class _Table:
    """A dict, list or set, and what it held at construction."""

    def __init__(self, held: Any) -> None:
        self._held, self._before = held, copy.copy(held)

    def put_back(self) -> None:
        held, before = self._held, self._before
        if not self._changed():
            return
        if isinstance(held, list):
            held[:] = before
        else:
            held.clear()
            held.update(before)

    def _changed(self) -> bool:
        held, before = self._held, self._before
        if isinstance(held, set):
            return bool(held != before)
        # By identity: equality of tensors is no truth value.
        if len(held) != len(before) or any(map(is_not, held, before)):
            return True
        return isinstance(held, dict) and any(map(is_not, held.values(), before.values()))


def _own(module: nn.Module) -> list[Any]:
    return [value for name, value in vars(module).items() if name not in _TORCH]


def _is_table(value: object) -> bool:
    return type(value) in (dict, list, set)


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Version and a sum of the bits: the version alone does not see what is written through ``.data`` or NumPy."""
    version = 0 if tensor.is_inference() else tensor._version
    plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.layout == torch.strided
    if not plain or tensor.is_meta or tensor.is_nested or tensor.is_quantized or not tensor.numel():
        return version, 0
    values = tensor.detach()
    values = torch.view_as_real(values) if values.is_complex() else values
    return version, _sum_of_bits(values.contiguous().view(-1))


def _sum_of_bits(row: Tensor) -> int:
    """The bits of a row as integers, added up modulo 2^64: eight bytes at a time as far as they go."""
    together = 8 // row.element_size()
    whole = row.numel() // together * together if row.storage_offset() % together == 0 else 0
    rest = row[whole:].view(_BITS[row.element_size()]).sum(dtype=torch.int64)
    return int(row[:whole].view(torch.int64).sum() + rest)
