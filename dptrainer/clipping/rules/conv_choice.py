"""Which method a convolution takes: the fastest on synthetic tensors of its shape, measured once.

Never on data, and never by the batch size, which is private: the probe has a fixed number of examples, and what is
timed is processor time. The choice is cached by shape, type, device and number of threads.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor

from dptrainer.clipping.per_example import Dense, chunks, fits, row_squares
from dptrainer.clipping.rules.conv_methods import (
    BY_GRAM,
    BY_PATCH_NORMS,
    Geometry,
    Method,
    Norms,
    by_channels_last,
    by_groups,
    by_loop,
    by_patches,
    by_unfolding,
    by_windows,
    compiled_for,
    compiled_rows,
    positions,
)

#: Examples of the synthetic batches on which the methods are timed: all of them on the first, those that come near the
#: fastest on one that is larger where that takes no longer than so many seconds.
_PROBE, _LARGER, _SECONDS, _NEAR = 8, 64, 0.02, 2.0
#: Largest Gram matrix of input positions of one example, in elements; most places of norms alone, whose bound grows
#: with them until gradients are instantiated after all.
_MOST_GRAM, _MOST_PLACES = 1 << 18, 1 << 9

Choice = Method | Norms
_CHOICES: dict[tuple[object, ...], Choice] = {}


def methods(geometry: Geometry, activation: Tensor, grad: Tensor) -> list[Method]:
    """The exact methods that apply."""
    found: list[Method] = [by_loop, by_groups, by_windows]
    if grad.dim() < 5:
        found.append(by_unfolding)
    if geometry.groups == 1:
        found.append(by_channels_last)
    if compiled_for(activation, grad) is not None:
        found.append(by_patches)
    return found


def _seconds(actions: Mapping[Choice, Callable[[], object]], device: torch.device) -> dict[Choice, float]:
    """Best processor time of each, of three rounds in which they take turns, after a warm-up."""
    best = dict.fromkeys(actions, float("inf"))
    for attempt in range(4):
        for name, action in actions.items():
            spent = _once(action, device)
            best[name] = min(best[name], spent) if attempt else best[name]
    return best


def _once(action: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.process_time()
        action()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _instantiated(method: Method, times: int, geometry: Geometry, activation: Tensor, grad: Tensor) -> None:
    """What one example's gradients cost in a step: their computation, their norm, their share of the sum."""
    weights = torch.ones(len(grad), device=grad.device)
    for _ in range(times):
        parts = list(chunks(len(grad), geometry.weight))
        if method is by_patches:
            rows = [compiled_rows(geometry, activation[part], grad[part])[0] for part in parts]
            continue
        rows = [method(geometry, activation[part], grad[part]) for part in parts]
        for piece in rows:
            row_squares(piece)
    Dense(rows, owned=True).weighted_sum(weights)


def _by_norms(way: Norms, geometry: Geometry, activation: Tensor, grad: Tensor) -> None:
    way.of(geometry, activation, grad)
    way.total(geometry, activation, grad, torch.ones(len(grad), device=grad.device))


def norms(geometry: Geometry, activation: Tensor, grad: Tensor) -> list[Norms]:
    """The ways to norms alone that apply: Gram matrices of bearable size, without groups, and compiled code."""
    found: list[Norms] = []
    compiled = compiled_for(activation, grad) is not None
    if geometry.groups == 1 and positions(geometry, activation) ** 2 <= _MOST_GRAM:
        found += BY_GRAM if compiled else BY_GRAM[:1]
    few = grad.shape[2:].numel() <= _MOST_PLACES
    return found + list(BY_PATCH_NORMS) if compiled and few else found


def cheapest(geometry: Geometry, activation: Tensor, grad: Tensor) -> Choice:
    """The fastest for this geometry and per-example shape, of :func:`methods` and :func:`norms`."""
    key = (geometry, activation.shape[1:], grad.shape[1:], activation.dtype, activation.device, torch.get_num_threads())
    if key not in _CHOICES:
        timed = _timed(geometry, activation, grad, _PROBE, None)
        best = min(timed.values())
        finalists = [choice for choice, seconds in timed.items() if seconds <= _NEAR * best]
        larger = min(_LARGER, int(_PROBE * _SECONDS / best))
        if len(finalists) > 1 and larger > _PROBE:
            timed = _timed(geometry, activation, grad, larger, finalists)
        _CHOICES[key] = min(finalists, key=lambda choice: timed[choice])
    return _CHOICES[key]


def _timed(
    geometry: Geometry, activation: Tensor, grad: Tensor, examples: int, among: list[Choice] | None
) -> dict[Choice, float]:
    """Seconds of every choice, or of those named, for so many synthetic examples of the shape of these."""
    # linspace and not randn: the probe must not move the random streams of the training program.
    probe = [
        torch.linspace(-1, 1, examples * t.shape[1:].numel(), dtype=t.dtype, device=t.device)
        .view(examples, *t.shape[1:])
        .contiguous()
        for t in (activation, grad)
    ]
    keeps = fits(geometry.weight, sum(t.shape[1:].numel() for t in probe))
    pages = _page_seconds() * examples * geometry.weight.numel() * grad.element_size() / mmap.PAGESIZE
    times = 1 if keeps else 2
    actions: dict[Choice, Callable[[], object]] = {
        **{method: partial(_instantiated, method, times, geometry, *probe) for method in methods(geometry, *probe)},
        **{way: partial(_by_norms, way, geometry, *probe) for way in norms(geometry, *probe)},
    }
    chosen = {name: action for name, action in actions.items() if among is None or name in among}
    found = _seconds(chosen, grad.device)
    kept = pages if keeps and grad.device.type == "cpu" else 0.0
    return {name: seconds + (0.0 if isinstance(name, Norms) else kept) for name, seconds in found.items()}


@cache
def _page_seconds() -> float:
    """Half of what a fresh page costs: kept rows are often, not always, in memory fetched from the system anew."""
    pages, best = 1024, float("inf")
    for _ in range(3):
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
            start = time.process_time()
            for page in range(pages):
                memory[page * mmap.PAGESIZE] = 1
            best = min(best, time.process_time() - start)
    return best / pages / 2
