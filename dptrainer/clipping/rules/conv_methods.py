"""Weight gradients of a convolution, example by example: exact methods that differ only in speed and memory.

Each takes the input [B, C, ...], the output gradient [B, O, ...] and the :class:`Geometry`. Which is fastest differs
up to 45-fold with the shape; :mod:`dptrainer.clipping.rules.conv_choice` times them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from dptrainer.clipping.ghost import sizes_of
from dptrainer.clipping.native import Kernels, Plane, kernels
from dptrainer.clipping.per_example import chunks, finite, joined

#: Elements of patches that are copied at a time, so that the product finds them in the cache.
_PATCHES = 1 << 18
_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True)
class Geometry:
    """What a weight gradient depends on beside the two tensors; hashable, so that choices can be cached by it."""

    weight: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def channels_last(self) -> tuple[int, ...]:
        """The weight's shape with the input channels last, [O, ..., C]."""
        return (self.weight[0], *self.weight[2:], self.weight[1])


#: Gives the rows [B, *weight].
Method = Callable[[Geometry, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Norms:
    """A way without rows.

    Attributes:
        of: -> ([B] squared norms, [B, T] ||patch|| ||gradient|| at each place), float64.
        total: also of weights [B] -> the weighted sum; NaN and inf count as 0, whose examples have weight 0.
        direct: whether the norms are those of gradients that were summed in their own type.
    """

    of: Callable[[Geometry, Tensor, Tensor], tuple[Tensor, Tensor]]
    total: Callable[[Geometry, Tensor, Tensor, Tensor], Tensor]
    direct: bool = False


def summed_over_examples(geometry: Geometry, activation: Tensor, grad: Tensor) -> Tensor:
    """[*weight]: the library's own weight gradient of the whole batch."""
    zeros = [0] * len(geometry.stride)
    weight = activation.new_empty(geometry.weight)
    found: Tensor = torch.ops.aten.convolution_backward(
        grad, activation, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, zeros,
        geometry.groups, (False, True, False),
    )[1]  # fmt: skip
    return found


def _plane(geometry: Geometry) -> Plane:
    """A convolution of one or two dimensions as one of two."""

    def pair(sizes: tuple[int, ...], filler: int) -> tuple[int, int]:
        return (filler, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])

    kernel, stride = pair(tuple(geometry.weight[2:]), 1), pair(geometry.stride, 1)
    return Plane(geometry.groups, kernel, stride, pair(geometry.padding, 0), pair(geometry.dilation, 1))


def compiled_for(activation: Tensor, grad: Tensor) -> Kernels | None:
    """The compiled functions, where they apply: one and two dimensions, float32 on the CPU, contiguous."""
    return kernels(activation, grad) if grad.dim() < 5 else None


def _compiled_for(activation: Tensor, grad: Tensor) -> Kernels:
    compiled = compiled_for(activation, grad)
    if compiled is None:
        raise ValueError("compiled code takes contiguous float32 on the CPU, of one or two dimensions")
    return compiled


def compiled_rows(geometry: Geometry, activation: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """([B, *weight], [B] float64 squared norms) by ``patches.c``; see :func:`compiled_for`."""
    rows, squares = _compiled(Kernels.convolution_rows, geometry, activation, grad)
    return rows.view(-1, *geometry.weight), squares


def patch_norms(geometry: Geometry, activation: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`gram_norms`, from gradients that never leave the cache; see :func:`compiled_for`."""
    return _compiled(Kernels.convolution_norms, geometry, activation, grad)


def library_sum(geometry: Geometry, activation: Tensor, grad: Tensor, weights: Tensor) -> Tensor:
    """[*weight]: sum_i weights[i] (gradient of example i), by the library's weight gradient of the whole batch."""
    scaled = finite(grad).mul_(weights.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1)))
    return summed_over_examples(geometry, finite(activation), scaled)


def patch_sum(geometry: Geometry, activation: Tensor, grad: Tensor, weights: Tensor) -> Tensor:
    """As :func:`library_sum`, by ``patches.c``, without copies of the batch; see :func:`compiled_for`."""
    compiled = _compiled_for(activation, grad)
    if grad.dim() == 3:
        activation, grad = activation.unsqueeze(2), grad.unsqueeze(2)
    total = grad.new_zeros(geometry.weight)
    compiled.add_convolutions(_plane(geometry), activation, grad, weights.to(grad.dtype), total)
    return total


def _compiled(
    function: Callable[[Kernels, Plane, Tensor, Tensor], tuple[Tensor, Tensor]],
    geometry: Geometry,
    activation: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    compiled = _compiled_for(activation, grad)
    if grad.dim() == 3:
        activation, grad = activation.unsqueeze(2), grad.unsqueeze(2)
    return function(compiled, _plane(geometry), activation, grad)


def by_patches(geometry: Geometry, activation: Tensor, grad: Tensor) -> Tensor:
    """[B, *weight]: :func:`compiled_rows` without the norms."""
    return compiled_rows(geometry, activation, grad)[0]


def by_loop(geometry: Geometry, activation: Tensor, grad: Tensor) -> Tensor:
    """[B, *weight]: the library's own weight gradient, one example at a time. Best where each example is much work.

    Of copies, since the library rounds by where its operands lie, and where an example lies follows from the others.
    """
    return torch.stack(
        [
            summed_over_examples(geometry, activation[i : i + 1].clone(), grad[i : i + 1].clone())
            for i in range(len(grad))
        ]
    )


def by_groups(geometry: Geometry, activation: Tensor, grad: Tensor) -> Tensor:
    """[B, *weight]: one grouped convolution in which input channels are the batch and examples are the groups.

    Rochette et al. (2019); stride and dilation change places.
    """
    batch, groups, (out, inner, *kernel) = grad.shape[0], geometry.groups, geometry.weight
    stacked = activation.reshape(batch * groups, inner, *activation.shape[2:]).transpose(0, 1)
    filters = grad.reshape(batch * out, 1, *grad.shape[2:])
    found: Tensor = _CONVOLUTIONS[grad.dim()](
        stacked, filters, None, geometry.dilation, geometry.padding, geometry.stride, batch * groups
    )
    for dim, size in enumerate(kernel, start=2):  # positions that a stride left over are not part of the kernel
        found = found.narrow(dim, 0, size)
    return found.reshape(inner, batch, out, *kernel).movedim(0, 2)


def by_unfolding(geometry: Geometry, activation: Tensor, grad: Tensor) -> Tensor:
    """[B, *weight]: patches [C * kernel, T] by :func:`torch.nn.functional.unfold`, one batched product. 1 and 2 dim."""
    if grad.dim() == 3:
        flat = Geometry(
            torch.Size((*geometry.weight[:2], 1, geometry.weight[2])),
            (1, *geometry.stride), (0, *geometry.padding), (1, *geometry.dilation), geometry.groups,
        )  # fmt: skip
        return by_unfolding(flat, activation.unsqueeze(2), grad.unsqueeze(2)).squeeze(3)
    patches = F.unfold(activation, tuple(geometry.weight[2:]), geometry.dilation, geometry.padding, geometry.stride)
    return _product(geometry, patches, grad)


def by_windows(geometry: Geometry, activation: Tensor, grad: Tensor) -> Tensor:
    """[B, *weight]: as by unfolding, the patches copied from a view of overlapping windows; any dimension."""
    padded = _zero_padded(geometry, activation)
    (batch, channels), kernel, places = padded.shape[:2], geometry.weight[2:], grad.shape[2:]
    windows = padded.as_strided(
        (batch, channels, *kernel, *places),
        (
            *padded.stride()[:2],
            *(step * d for step, d in zip(padded.stride()[2:], geometry.dilation, strict=True)),
            *(step * s for step, s in zip(padded.stride()[2:], geometry.stride, strict=True)),
        ),
    )
    shape = (channels * kernel.numel(), places.numel())
    pieces = [
        _product(geometry, windows[part].reshape(-1, *shape), grad[part])
        for part in chunks(batch, torch.Size(shape), _PATCHES)
    ]
    return joined(pieces)


def by_channels_last(geometry: Geometry, activation: Tensor, grad: Tensor) -> Tensor:
    """[B, O, ..., C]: patches [T, kernel * C], copied in runs of C numbers or more. Without groups, any dimension."""
    padded = _zero_padded(geometry, activation).movedim(1, -1).contiguous()
    batch, kernel, places = len(padded), geometry.weight[2:], grad.shape[2:]
    windows = padded.as_strided(
        (batch, *places, *kernel, padded.shape[-1]),
        (
            padded.stride(0),
            *(step * s for step, s in zip(padded.stride()[1:-1], geometry.stride, strict=True)),
            *(step * d for step, d in zip(padded.stride()[1:-1], geometry.dilation, strict=True)),
            1,
        ),
    )
    flat, shape = grad.flatten(2), (places.numel(), kernel.numel() * padded.shape[-1])
    found = grad.new_empty(batch, grad.shape[1], shape[1])
    for part in chunks(batch, torch.Size(shape), _PATCHES):
        torch.bmm(flat[part], windows[part].reshape(-1, *shape), out=found[part])
    return found.view(batch, *geometry.channels_last)


def _zero_padded(geometry: Geometry, activation: Tensor) -> Tensor:
    if not any(geometry.padding):
        return activation.contiguous()
    return F.pad(activation, [side for size in reversed(geometry.padding) for side in (size, size)])


def _product(geometry: Geometry, patches: Tensor, grad: Tensor) -> Tensor:
    """[B, *weight] from patches [B, C * kernel, T], group by group."""
    batch, groups, (out, inner, *kernel) = grad.shape[0], geometry.groups, geometry.weight
    patches = patches.view(batch * groups, -1, patches.shape[2])
    found = torch.bmm(grad.reshape(batch * groups, out // groups, -1), patches.transpose(1, 2))
    return found.view(batch, out, inner, *kernel)


def positions(geometry: Geometry, activation: Tensor) -> int:
    """Positions of one example's padded input."""
    sizes = (size + 2 * padding for size, padding in zip(activation.shape[2:], geometry.padding, strict=True))
    return torch.Size(sizes).numel()


def gram_norms(geometry: Geometry, activation: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """([B] squared norms, [B, T] ||patch|| ||gradient|| at each place), both float64. Without groups.

    The squared norm is sum_ts <patch_t, patch_s> <g_t, g_s>. Inner products of patches are sums, over the kernel, of
    inner products of input positions, so patches are never built. Float64 throughout: the terms may cancel. A few
    examples at a time, as many as a chunk has room for the matrices of.
    """
    parts = chunks(len(grad), torch.Size((positions(geometry, activation),) * 2))
    found = [_gram_norms(geometry, activation[part], grad[part]) for part in parts]
    return joined([squares for squares, _ in found]), joined([sizes for _, sizes in found])


def _gram_norms(geometry: Geometry, activation: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    padded = _zero_padded(geometry, activation).double().flatten(2)
    flat = grad.double().flatten(2)
    places, shape = grad.shape[2:], tuple(
        size + 2 * padding for size, padding in zip(activation.shape[2:], geometry.padding, strict=True)
    )  # fmt: skip
    inputs = torch.bmm(padded.transpose(1, 2), padded).view(-1, *shape, *shape)
    patches: Tensor | None = None
    for window in _windows(geometry, places):
        part = inputs[(slice(None), *window, *window)]
        patches = part.clone() if patches is None else patches.add_(part)
    assert patches is not None  # noqa: S101  (a kernel has at least one element)
    patches = patches.view(len(grad), places.numel(), -1)
    grads = torch.bmm(flat.transpose(1, 2), flat)
    sizes = sizes_of(patches.diagonal(dim1=1, dim2=2), grads.diagonal(dim1=1, dim2=2), grad.dtype)
    return torch.linalg.vecdot(patches.flatten(1), grads.flatten(1)), sizes


def _windows(geometry: Geometry, places: torch.Size) -> Iterator[tuple[slice, ...]]:
    """For each kernel element, the input positions that it meets."""
    kernel = geometry.weight[2:]
    for offset in product(*(range(size) for size in kernel)):
        yield tuple(
            slice(at * d, at * d + (count - 1) * s + 1, s)
            for at, d, s, count in zip(offset, geometry.dilation, geometry.stride, places, strict=True)
        )


BY_GRAM = (Norms(gram_norms, library_sum), Norms(gram_norms, patch_sum))
BY_PATCH_NORMS = (Norms(patch_norms, library_sum, direct=True), Norms(patch_norms, patch_sum, direct=True))
