"""Gaussian noise from the keystream: Box and Muller (1958) with 64 bits of radius and 32 bits of angle.

One 64-byte block gives five pairs: its first ten 32-bit words are five little-endian 64-bit integers k (radii), the
next five words are the integers a (angles), and the last word is unused. Pair p of a parameter is pair ``p % 5`` of
block ``p // 5``; element e is the cosine (e even) or sine (e odd) of pair ``e // 2``, with

    radius = sqrt(-2 ln U),  U = (k + 1) / 2^64 in (0, 1],      angle = 2 pi (a + 1/2) / 2^32.

**Tail.** The largest radius is sqrt(2 * 64 * ln 2) = 9.42; plans charge what lies beyond it to delta
(docs/adr/0002). A 24-bit uniform, as in usual float32 generators, would end at 5.77.

**Rounding.** All arithmetic is float64. The rounding of k and k + 1 disturbs ln U by at most 2^-52, which is relatively
large only where U is near 1, so above 1 - 2^-20 the logarithm is taken of the exact distance to 1. The relative error
of a radius is then below 2^-32 everywhere and of the order of 2^-52 typically, against 2^-24 for one float32 rounding.
The angle takes 2^32 equally spaced values, symmetric about both axes: given its radius, a pair lies on a circular grid
of spacing below 1.5e-9 radii. That grid and the rounding of sums are the floating-point effects that ``secure`` mode
does not cover.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from dptrainer.noise.chacha import BLOCK_BYTES, fill

#: Elements of one keystream block.
BLOCK_ELEMENTS = 10
# Blocks at a time: 128 KiB of keystream and about half a MiB of float64 work space, however large the tensor.
_CHUNK_BLOCKS = 1 << 11
_ANGLE_UNIT = math.pi / 2.0**31
# Above this U, -ln U is computed from the exact distance to 1.
_HEAD = 1.0 - 2.0**-20


def add_gaussian_(tensor: torch.Tensor, key: bytes, param_id: int, std: float, *, offset: int = 0) -> torch.Tensor:
    """Add ``std`` times standard Gaussian noise to ``tensor`` in place and return it.

    Element i of the flattened tensor receives element ``offset + i`` of the parameter's noise, so that a shard gets the
    same values as the whole. Product and sum are float64, rounded once to the tensor's type. Noise is generated on the
    CPU and copied for tensors elsewhere.

    Args:
        tensor: float32 or float64, any shape.
        key: the step key of purpose ``grad-noise``.
        param_id: 0 <= param_id < 2^32, different for every parameter under one key.
        std: standard deviation, finite and >= 0.
        offset: index of the tensor's first element in the whole parameter.

    Raises:
        ValueError: a type or range is wrong.
    """
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"noise is added in float32 or float64, not in {tensor.dtype}")
    if not 0.0 <= std < math.inf or offset < 0:
        raise ValueError(f"standard deviation {std!r} or offset {offset} is out of range")
    with torch.no_grad(), _one_thread():
        flat = tensor.detach().reshape(-1)  # a view where the memory allows, else a copy that is written back
        for start, noise in _chunks(key, param_id, offset, flat.numel()):
            flat[start : start + noise.numel()].add_(noise.to(flat.device), alpha=std)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(flat.view(tensor.shape))
    return tensor


def standard_gaussian(key: bytes, param_id: int, count: int, *, offset: int = 0) -> torch.Tensor:
    """``count`` standard Gaussian values as float64, the same that :func:`add_gaussian_` adds."""
    return add_gaussian_(torch.zeros(count, dtype=torch.float64), key, param_id, 1.0, offset=offset)


def _chunks(key: bytes, param_id: int, offset: int, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Noise of elements ``offset .. offset + count`` as ``(position, values)``; a piece is valid until the next one."""
    first, skip = divmod(offset, BLOCK_ELEMENTS)
    total = -(-(skip + count) // BLOCK_ELEMENTS) if count else 0
    bench = _Workbench(min(total, _CHUNK_BLOCKS))
    for done in range(0, total, _CHUNK_BLOCKS):
        blocks = min(_CHUNK_BLOCKS, total - done)
        if blocks < bench.blocks:
            bench = _Workbench(blocks)
        fill(bench.words, key, param_id, first + done)
        values = bench.box_muller()
        start = done * BLOCK_ELEMENTS - skip
        yield max(start, 0), values[max(-start, 0) : count - start]
    bench.erase()


class _Workbench:
    """Buffers for ``blocks`` keystream blocks, allocated once: page faults would cost more than the arithmetic."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.words = bytearray(BLOCK_BYTES * blocks)
        self._k = np.frombuffer(self.words, dtype="<u8").reshape(blocks, 8)[:, :5]
        # The same bits with a sign: k - 2^64 for k >= 2^63, and an angle of less than a half turn either way.
        self._signed_k = torch.from_numpy(np.frombuffer(self.words, dtype="<i8").reshape(blocks, 8)[:, :5])
        self._signed_a = torch.from_numpy(np.frombuffer(self.words, dtype="<i4").reshape(blocks, 16)[:, 10:15])
        self._radius, self._angle, self._spare = torch.empty((3, blocks, 5), dtype=torch.float64)
        self._pairs = torch.empty(blocks, 5, 2, dtype=torch.float64)

    def box_muller(self) -> torch.Tensor:
        """float64 [10 * blocks] from the words."""
        radius = self._radii()
        angle = self._angle.copy_(self._signed_a).add_(0.5).mul_(_ANGLE_UNIT)
        torch.mul(radius, torch.cos(angle, out=self._spare), out=self._pairs[:, :, 0])
        torch.mul(radius, angle.sin_(), out=self._pairs[:, :, 1])
        return self._pairs.view(-1)

    def _radii(self) -> torch.Tensor:
        """sqrt(-2 ln U), U = (k + 1) / 2^64."""
        uniform = self._radius.copy_(self._signed_k).mul_(2.0**-64)
        # Subtracting the floor adds 1 to the negative ones. Small k stay exact, so that the tail keeps all its bits.
        uniform.sub_(torch.floor(uniform, out=self._spare)).add_(2.0**-64)
        where = np.nonzero(uniform.numpy() > _HEAD) if float(uniform.max()) > _HEAD else None
        log = uniform.log_()
        if where is not None:
            distance = (np.uint64(2**64 - 1) - self._k[where]).astype(np.float64)  # (1 - U) 2^64, exact here
            log.numpy()[where] = np.log1p(distance * -(2.0**-64))
        radius: torch.Tensor = log.mul_(-2.0).sqrt_()
        return radius

    def erase(self) -> None:
        """Overwrite what the noise could be read from (best effort)."""
        self.words[:] = bytes(len(self.words))
        self._pairs.zero_()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch: pieces this small gain nothing from more, and on a busy machine lose a hundredfold."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
