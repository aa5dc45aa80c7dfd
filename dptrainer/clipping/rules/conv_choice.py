"""Which method a convolution takes: the fastest on synthetic tensors of its shape, measured once.

Never on data, and never by the batch size, which is private: the probe has a fixed number of examples, and what is
timed is processor time. The choice is cached by shape, type, device and number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

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
    summed_over_examples,
)

#: Examples of the synthetic batch on which the methods are timed.
_PROBE = 8
#: Largest Gram matrix of input positions of one example, in elements.
_MOST_GRAM = 1 << 18

_CHOICES: dict[tuple[object, ...], Method | Norms] = {}


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


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Best processor time of three runs after a warm-up."""
    best = float("inf")
    cuda = device.type == "cuda"
    for attempt in range(4):
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter() if cuda else time.process_time()
        action()
        if cuda:
            torch.cuda.synchronize(device)
        spent = (time.perf_counter() if cuda else time.process_time()) - start
        best = min(best, spent) if attempt else best
    return best


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


def _by_norms(norms: Norms, geometry: Geometry, activation: Tensor, grad: Tensor) -> None:
    norms.of(geometry, activation, grad)
    summed_over_examples(geometry, activation, grad)


def norms(geometry: Geometry, activation: Tensor, grad: Tensor) -> list[Norms]:
    """The ways to norms alone that apply: Gram matrices of bearable size, without groups, and compiled code."""
    found: list[Norms] = []
    if geometry.groups == 1 and positions(geometry, activation) ** 2 <= _MOST_GRAM:
        found.append(BY_GRAM)
    if compiled_for(activation, grad) is not None:
        found.append(BY_PATCH_NORMS)
    return found


def cheapest(geometry: Geometry, activation: Tensor, grad: Tensor) -> Method | Norms:
    """The fastest for this geometry and per-example shape, of :func:`methods` and :func:`norms`."""
    key = (geometry, activation.shape[1:], grad.shape[1:], activation.dtype, activation.device, torch.get_num_threads())
    if key not in _CHOICES:
        # linspace and not randn: the probe must not move the random streams of the training program.
        probe = [
            torch.linspace(-1, 1, _PROBE * t.shape[1:].numel(), dtype=t.dtype, device=t.device)
            .view(_PROBE, *t.shape[1:])
            .contiguous()
            for t in (activation, grad)
        ]
        times = 1 if fits(geometry.weight, sum(t.shape[1:].numel() for t in probe)) else 2
        candidates: dict[Method | Norms, Callable[[], None]] = {
            **{m: partial(_instantiated, m, times, geometry, *probe) for m in methods(geometry, *probe)},
            **{n: partial(_by_norms, n, geometry, *probe) for n in norms(geometry, *probe)},
        }
        _CHOICES[key] = min(candidates, key=lambda method: _seconds(candidates[method], grad.device))
    return _CHOICES[key]
