"""How many records fit into memory at once: measured at set-up on synthetic ones, never by running out on private ones.

A loop that tries again with fewer examples after it ran out of memory lets private data decide whether it succeeds, and
lets a record that is drawn in a large batch be seen. Here the answer follows from shapes and a public bound alone.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dpbudget.errors import InvalidParameter
from dpbudget.plan import Plan
from dptrainer.clipping import BookKeeping, Grouping
from dptrainer.clipping.factory import deterministic_copy
from dptrainer.data import Records
from dptrainer.probe import calls_with
from dptrainer.untested import NOT_MY_CALL

#: Share of a bound that the measured step may take; the loss and the allocator have the rest.
_SHARE = 0.8


@dataclass(frozen=True)
class MemoryBound:
    """What one physical batch may allocate beside the model, its gradients and the optimizer's state.

    Args:
        bytes: at least 1.

    Raises:
        InvalidParameter: not a positive integer (DP009).
    """

    bytes: int

    def __post_init__(self) -> None:
        if type(self.bytes) is not int or self.bytes < 1:
            raise InvalidParameter(
                f"a memory bound is a positive number of bytes, got {self.bytes!r}",
                code="DP009",
                hint="MemoryBound(4 << 30) is 4 GiB",
            )


#: What ``physical_batch_size`` may be: a number of records, a bound, half of the memory there is, or no limit.
PhysicalSize = int | MemoryBound | Literal["auto"] | None


def checked_size(wanted: PhysicalSize) -> PhysicalSize:
    """What the caller asked for, if it is a positive integer, a bound, ``"auto"`` or None.

    Raises:
        InvalidParameter: otherwise (DP009).
    """
    if wanted is None or wanted == "auto" or isinstance(wanted, MemoryBound) or (type(wanted) is int and wanted >= 1):
        return wanted
    raise InvalidParameter(
        f"physical_batch_size must be a positive integer, got {wanted!r}",
        code="DP009",
        hint='leave it out to take every drawn batch whole, or pass "auto" or a MemoryBound',
    )


def physical_size(
    wanted: PhysicalSize,
    model: nn.Module,
    records: Records,
    plan: Plan,
    replay: Sequence[nn.Module] = (),
    *,
    batches: int = 1,
) -> int | None:
    """The largest number of records in one physical batch; None for no limit.

    A bound is turned into a number by running forward, backward and clipping on synthetic records of the shape of the
    first: on one, then on twice as many for as long as twice the allocated peak stays below four fifths of the bound,
    or until the plan's expected batch fits whole. The number depends on shapes, the plan and the bound alone.

    Args:
        wanted: what the caller asked for; ``"auto"`` bounds by half of the memory of the model's device, in use or not.
        model: in the state in which training will start; it is not changed.
        records: where the shapes come from. Records of different lengths are judged by the first.
        plan: the run's.
        replay: as for :class:`~dptrainer.clipping.BookKeeping`.
        batches: into how many the records that a receipt draws are divided.

    Raises:
        InvalidParameter: the model cannot be run on synthetic records, or a single record does not fit (DP009).
    """
    if wanted is None or isinstance(wanted, int):
        return wanted
    device = next(model.parameters()).device
    bound = wanted.bytes if isinstance(wanted, MemoryBound) else _installed(device) // 2
    expected = max(phase.rate for phase in plan.phases) * (plan.nominal_size or 1) / batches
    size, peak, enough = 1, _peak_of(model, records, 1, replay, device), 2.0 * expected + 16
    if peak > _SHARE * bound:
        raise InvalidParameter(
            f"a physical batch of one record does not fit into {bound} bytes",
            code="DP009",
            hint="raise the bound, use gradient checkpointing, or lower views or max_examples",
        )
    # Doubling a batch at most doubles its peak, so that no measurement exceeds the bound.
    while 2 * peak <= _SHARE * bound and size < enough:
        size, peak = 2 * size, _peak_of(model, records, 2 * size, replay, device)
    return size if peak <= bound else size // 2


def _installed(device: torch.device) -> int:
    """Bytes of memory of the device, whoever uses them: what is free at the moment is no public constant."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _peak_of(model: nn.Module, records: Records, size: int, replay: Sequence[nn.Module], device: torch.device) -> int:
    """Peak of allocated bytes over forward, backward and clipping of ``size`` synthetic records."""
    paths = {id(module): name for name, module in model.named_modules()}
    twin = deterministic_copy(model)
    engine = BookKeeping(twin, clip_norm=1.0, replay=[twin.get_submodule(paths[id(part)]) for part in replay])
    grouping = Grouping.views(size, records.most_rows)

    def widened(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == 1:
            return leaf.expand(grouping.rows, *leaf.shape[1:]).contiguous().to(device)
        return leaf

    batch = tree_map(widened, records.synthetic())
    for args, named in calls_with(batch):

        def step(args: tuple[Any, ...] = args, named: dict[str, Any] = named) -> None:
            engine.begin(grouping.rows, grouping=grouping)
            outputs = [t for t in tree_leaves(twin(*args, **named)) if isinstance(t, Tensor) and t.requires_grad]
            torch.stack([t.float().square().sum() for t in outputs]).sum().backward()  # type: ignore[no-untyped-call]
            engine.finish("sum")

        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
                step()  # methods are timed at the first call of a shape, with memory of their own
                return _peak(step, device)
        except NOT_MY_CALL:
            continue
        finally:
            engine.detach()
    raise InvalidParameter(
        "the model could not be run on synthetic records, so that no physical batch size follows from a memory bound",
        code="DP009",
        hint="pass physical_batch_size as a number",
    )


def _peak(run: Callable[[], None], device: torch.device) -> int:
    """Peak of the bytes that ``run`` holds at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _Allocations() as allocations:
        run()
    return int(allocations.peak)


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Counts the bytes of tensors that operations return, for as long as their storages live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return outputs

    def _freed(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.now -= size
