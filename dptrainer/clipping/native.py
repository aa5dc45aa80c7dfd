"""``rows.c``, ``patches.c`` and ``recurrence.c`` compiled (:mod:`dptrainer.native`), for float32 on the CPU.

What is done here is what a library does badly: many small products, sums of squares in float64, rows that are found by
a key. Results differ from PyTorch's by the rounding of float32 alone. A function is used only if the library gives
PyTorch's results on a few shapes when it is loaded.
"""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dptrainer.native import Native, threads

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("rows.c", "patches.c", "recurrence.c"))
#: Unlike noise, gradients may use fused multiply-adds: their last bits are nobody's contract.
_FLAGS = ("-O3", "-std=gnu99", "-fno-math-errno", "-fno-trapping-math")
#: Numbers, multiply-adds, and cells of an LSTM for each thread: some twenty microseconds.
_NUMBERS, _PRODUCTS, _SQUASHED = 1 << 15, 1 << 20, 1 << 11


class Plane(NamedTuple):
    """What a two-dimensional convolution is beside its tensors."""

    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


class _Convolution(ctypes.Structure):
    """``struct convolution`` of ``patches.c``."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "batch", "groups", "channels", "outs", "height", "width", "kernel_height", "kernel_width", "out_height",
            "out_width", "stride_y", "stride_x", "pad_y", "pad_x", "dilation_y", "dilation_x",
        )
    )  # fmt: skip


_PTR, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_FUNCTIONS: dict[str, Sequence[type]] = {
    "row_squares": (_PTR, _LONG, _LONG, _PTR, _INT),
    "weighted_sum": (_PTR, _PTR, _LONG, _LONG, _PTR, _INT, _INT),
    "scaled": (_PTR, _PTR, _LONG, _LONG, _PTR, _INT),
    "add_equal": (_PTR, _PTR, _PTR, _LONG, _LONG, _PTR, _INT, ctypes.c_uint64, _PTR, _PTR, _PTR),
    "add_squares": (_PTR, _PTR, _LONG, _LONG, _PTR, _LONG),
    "add_rows": (_PTR, _PTR, _PTR, _PTR, _LONG, _LONG, _PTR, _LONG, _LONG),
    "row_sums": (_PTR, _LONG, _LONG, _PTR, _INT),
    "convolution_rows": (_PTR, _PTR, _PTR, _PTR, _PTR, _PTR, _INT),
    "lstm_forward": (_PTR, _PTR, _PTR, _PTR, _PTR, _LONG, _INT),
    "lstm_backward": (_PTR, _PTR, _PTR, _PTR, _PTR, _PTR, _PTR, _LONG, _LONG, _INT),
    "convolution_sum": (_PTR, _PTR, _PTR, _PTR, _PTR, _INT),
}


class Kernels:
    """The compiled functions. Tensors are contiguous, on the CPU, float32 where nothing else is said.

    What is allocated takes device and type from what is given, never from the program's defaults.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        library.add_equal.restype = _LONG
        for name in ("add_squares", "add_rows", "convolution_rows", "convolution_sum"):
            getattr(library, name).restype = _INT
        # Where rows are put must not be the choice of those who made the records.
        self._factor = secrets.randbits(64) | 1

    def row_squares(self, rows: Tensor) -> Tensor:
        """[B] float64 squared norms of [B, d]."""
        found = rows.new_empty(len(rows), dtype=torch.float64)
        share = threads(rows.numel(), _NUMBERS)
        self._library.row_squares(rows.data_ptr(), *rows.shape, found.data_ptr(), share)
        return found

    def weighted_sum(self, rows: Tensor, weights: Tensor, total: Tensor, *, add: bool) -> None:
        """``total`` [d] = or += sum_i weights[i] rows[i], of [B, d]; NaN and inf count as 0."""
        share = threads(rows.numel(), _NUMBERS)
        addresses = (rows.data_ptr(), weights.data_ptr(), *rows.shape, total.data_ptr())
        self._library.weighted_sum(*addresses, int(not add), share)

    def scaled(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """``rows`` [B, d] times ``weights`` [B], or as they are, with 0 in place of NaN and inf."""
        found = torch.empty_like(rows)
        factors = None if weights is None else weights.data_ptr()
        share = threads(rows.numel(), _NUMBERS)
        self._library.scaled(rows.data_ptr(), factors, *rows.shape, found.data_ptr(), share)
        return found

    def add_equal(self, example: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [N, d] of equal (example, index), int64, added up: ([n] example, [n] index, [n, d])."""
        count, width = rows.shape
        bits = max(1, (2 * count - 1).bit_length())
        slots, examples, indices = (index.new_empty(size) for size in (1 << bits, count, count))
        values = rows.new_empty(count, width)
        found = self._library.add_equal(
            example.data_ptr(), index.data_ptr(), rows.data_ptr(), count, width,
            slots.data_ptr(), bits, self._factor, examples.data_ptr(), indices.data_ptr(), values.data_ptr(),
        )  # fmt: skip
        return examples[:found], indices[:found], values[:found]

    def add_squares(self, example: Tensor, rows: Tensor, total: Tensor) -> None:
        """``total[example[t]]`` += ||rows[t]||^2, float64.

        Raises:
            IndexError: an example is not one of ``total``.
        """
        addresses = (example.data_ptr(), rows.data_ptr())
        if not self._library.add_squares(*addresses, *rows.shape, total.data_ptr(), len(total)):
            raise IndexError("an example is out of range")

    def add_rows(self, entries: tuple[Tensor, Tensor, Tensor], weights: Tensor, table: Tensor) -> None:
        """``table[index[t]]`` += weights[example[t]] rows[t] of (example, index, rows); NaN and inf count as 0.

        Raises:
            IndexError: an example or an index is out of range.
        """
        example, index, rows = entries
        addresses = (t.data_ptr() for t in (example, index, weights, rows))
        if not self._library.add_rows(*addresses, *rows.shape, table.data_ptr(), len(weights), len(table)):
            raise IndexError("an example or an index is out of range")

    def lstm_forward(self, gates: Tensor, c: Tensor, c_next: Tensor, tanh_c: Tensor, h: Tensor) -> None:
        """A step on gates i, f, o, g [4, B, H], which are squashed in place: c', tanh c', h = o tanh c', all [B, H]."""
        addresses = (t.data_ptr() for t in (gates, c, c_next, tanh_c, h))
        self._library.lstm_forward(*addresses, c.numel(), threads(c.numel(), _SQUASHED))

    def lstm_backward(self, saved: tuple[Tensor, ...], incoming: Tensor, dh: Tensor, dc: Tensor, found: Tensor) -> None:
        """The gradients [B, 4H] of the gates i, f, g, o before squashing; ``dh`` and ``dc`` [B, H] go on in place.

        Args:
            saved: (gates [4, B, H] as i, f, o, g; c before the step; tanh of c after it).
            incoming: what is added to ``dh``.
            dh: of the state after the step; the product with the weight that comes next is the caller's.
            dc: of the cell after the step, and then of that before it.
            found: where the gradients go.
        """
        addresses = (t.data_ptr() for t in (*saved, incoming, dh, dc, found))
        self._library.lstm_backward(*addresses, *dh.shape, threads(dh.numel(), 4 * _SQUASHED))

    def row_sums(self, rows: Tensor) -> Tensor:
        """[B] sums of [B, d], taken in float64."""
        found = rows.new_empty(len(rows))
        share = threads(rows.numel(), _NUMBERS)
        self._library.row_sums(rows.data_ptr(), *rows.shape, found.data_ptr(), share)
        return found

    def convolution_rows(self, plane: Plane, activation: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """([B, O, C / groups, h, w] weight gradients of a convolution of [B, C, H, W], [B] float64 squared norms).

        Raises:
            MemoryError: the work space of a thread could not be had.
        """
        rows = grad.new_empty(*grad.shape[:2], activation.shape[1] // plane.groups, *plane.kernel)
        squared = grad.new_empty(len(grad), dtype=torch.float64)
        self._convolution(plane, activation, grad, (rows.data_ptr(), squared.data_ptr(), None))
        return rows, squared

    def convolution_norms(self, plane: Plane, activation: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """([B] squared norms of the same, [B, T] sums over groups of ||patch|| ||gradient|| at T places), float64.

        Raises:
            MemoryError: the work space of a thread could not be had.
        """
        squared = grad.new_empty(len(grad), dtype=torch.float64)
        sizes = grad.new_empty(len(grad), grad.shape[2:].numel(), dtype=torch.float64)
        self._convolution(plane, activation, grad, (None, squared.data_ptr(), sizes.data_ptr()))
        return squared, sizes

    def add_convolutions(self, plane: Plane, activation: Tensor, grad: Tensor, weights: Tensor, total: Tensor) -> None:
        """``total`` [O, C / groups, h, w] += sum_i weights[i] (gradient of example i); NaN and inf count as 0.

        Raises:
            MemoryError: the work space of a thread could not be had.
        """
        described, share = _described(plane, activation, grad)
        addresses = (activation.data_ptr(), grad.data_ptr(), weights.data_ptr(), total.data_ptr())
        if not self._library.convolution_sum(ctypes.byref(described), *addresses, share):
            raise MemoryError("the weighted sum of gradients of a convolution")

    def _convolution(
        self, plane: Plane, activation: Tensor, grad: Tensor, found: tuple[int | None, int, int | None]
    ) -> None:
        described, share = _described(plane, activation, grad)
        addresses = (activation.data_ptr(), grad.data_ptr(), *found)
        if not self._library.convolution_rows(ctypes.byref(described), *addresses, share):
            raise MemoryError("per-example gradients of a convolution")


def _described(plane: Plane, activation: Tensor, grad: Tensor) -> tuple[_Convolution, int]:
    """The structure, and how many threads are worth while."""
    (batch, channels, height, width), (_, outs, *places) = activation.shape, grad.shape
    inner = channels // plane.groups
    described = _Convolution(
        batch, plane.groups, inner, outs // plane.groups, height, width, *plane.kernel, *places,
        *plane.stride, *plane.padding, *plane.dilation,
    )  # fmt: skip
    return described, threads(grad.numel() * inner * plane.kernel[0] * plane.kernel[1], _PRODUCTS)


def _line(first: float, last: float, count: int) -> Tensor:
    return torch.linspace(first, last, count, dtype=torch.float32)  # whatever the program's default is


def _agrees(kernels: Kernels) -> bool:
    """Whether the library gives PyTorch's results on a few shapes."""
    rows = _line(-1.0, 2.0, 7 * 331).view(7, 331)
    weights, total = _line(0.0, 1.0, 7), rows.new_full((331,), 7.0)
    for add in (False, True):
        kernels.weighted_sum(rows, weights, total, add=add)
    example, index = torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([2, 2, 2, 0, 0, 1])
    added = kernels.add_equal(example, index, rows[:6])
    table, squares = rows.new_zeros(3, 331), torch.zeros(2, dtype=torch.float64)
    kernels.add_rows(added, weights, table)
    kernels.add_squares(added[0], added[2], squares)
    unique = torch.stack([rows[0] + rows[1], rows[2], rows[3] + rows[4], rows[5]])
    pairs = [
        (kernels.row_squares(rows), rows.double().square().sum(1)),
        (kernels.row_sums(rows), rows.sum(1)),
        (total, 2.0 * weights @ rows),
        (kernels.scaled(rows, weights), rows * weights.unsqueeze(1)),
        (kernels.scaled(rows, None), rows),
        (torch.stack(added[:2]), torch.tensor([[0, 1, 1, 0], [2, 2, 0, 1]])),
        (added[2], unique),
        (table, torch.stack([weights[1] * unique[2], weights[0] * unique[3], weights[1] * unique[1]])),
        (squares, unique.double().square().sum(1)[[0, 1]] + unique.double().square().sum(1)[[3, 2]]),
        *_convolution_pairs(kernels),
    ]  # fmt: skip
    alike = all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)
    return alike and _leaves_out(kernels) and _shares_agree(kernels) and _lstm_agrees(kernels)


def _lstm_agrees(kernels: Kernels) -> bool:
    """Whether a step of an LSTM is that of autograd, also far from 0."""
    given = torch.cat([_line(-9.0, 9.0, 100).sin() * size for size in (1e-3, 0.5, 3.0, 100.0)]).view(4, 4, 25)
    gates, c = given.transpose(0, 1).contiguous(), _line(-2.0, 2.0, 100).view(4, 25)
    u, v = _line(-1.0, 1.0, 100).view(4, 25), _line(2.0, 1.0, 100).view(4, 25)
    with torch.enable_grad():
        leaves = gates.clone().requires_grad_(), c.clone().requires_grad_()
        (i, f, o), g = leaves[0][:3].sigmoid(), leaves[0][3].tanh()
        after = f * leaves[1] + i * g
        h = o * after.tanh()
        d_gates, d_c = torch.autograd.grad((h * u).sum() + (after * v).sum(), leaves)
    found = [torch.empty_like(c) for _ in range(3)]
    kernels.lstm_forward(gates, c, *found)
    dh, dc, columns = torch.zeros_like(u), v.clone(), c.new_empty(4, 100)
    kernels.lstm_backward((gates, c, found[1]), u, dh, dc, columns)
    order = [0, 1, 3, 2]
    pairs = [(found[0], after), (found[1], after.tanh()), (found[2], h), (dh, u), (dc, d_c)]
    pairs.append((columns.view(4, 4, 25), d_gates[order].transpose(0, 1)))
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in pairs)


def _shares_agree(kernels: Kernels) -> bool:
    """Whether threads that share the work leave nothing out and take nothing twice."""
    times = 110  # enough work for several
    rows = _line(-1.0, 2.0, 3 * 331).view(3, 331).repeat(times, 1)
    weights = _line(0.0, 1.0, len(rows))
    total, grads = rows.new_full((331,), 7.0), rows.new_ones(18, 4, 3, 2)
    kernels.weighted_sum(rows, weights, total, add=False)
    plane, activation, grad = _convolution_case()
    found, squared = kernels.convolution_rows(plane, activation, grad)
    many = (plane, activation.repeat(times, 1, 1, 1), grad.repeat(times, 1, 1, 1))
    kernels.add_convolutions(*many, weights, grads)
    all_found, all_squared = kernels.convolution_rows(*many)
    norms, sizes = kernels.convolution_norms(*many)
    pairs = [
        (kernels.row_squares(rows), rows.double().square().sum(1)),
        (kernels.row_sums(rows), rows.sum(1)),
        (kernels.scaled(rows, weights), rows * weights.unsqueeze(1)),
        (total, weights @ rows),
        (all_found, found.repeat(times, 1, 1, 1, 1)),
        (all_squared, squared.repeat(times)),
        (norms, squared.repeat(times)),
        (sizes, kernels.convolution_norms(plane, activation, grad)[1].repeat(times, 1)),
        (grads, 1.0 + torch.tensordot(weights.view(times, 3).sum(0), found, 1)),
    ]
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in pairs)


def _leaves_out(kernels: Kernels) -> bool:
    """Whether NaN and inf count as 0, in vectors and in what is left beside them, and make a norm not finite."""
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, 40, 130):
            rows, weights, sums = _line(1.0, 1.0, 262).view(2, 131), _line(0.0, 1.0, 2), _line(0.0, 0.0, 131)
            rows[0, place] = bad
            kernels.weighted_sum(rows, weights, sums, add=True)
            table, clean = rows.new_zeros(1, 131), kernels.scaled(rows, weights)
            kernels.add_rows((torch.arange(2), torch.zeros(2, dtype=torch.int64), rows), weights, table)
            plane, planes, weight = Plane(1, (1, 1), (1, 1), (0, 0), (1, 1)), rows.view(2, 1, 1, 131), rows.new_zeros(1)
            kernels.add_convolutions(plane, planes, planes, weights, weight)
            squares = kernels.row_squares(rows)
            if [*sums, *table[0]] != [1.0] * 262 or clean.sum() != 131.0 or weight != 131.0 or squares[0].isfinite():
                return False
    return True


def _convolution_case() -> tuple[Plane, Tensor, Tensor]:
    activation = _line(-9.0, 9.0, 3 * 8 * 7 * 6).view(3, 8, 7, 6).sin()
    grad = _line(-2.0, 1.0, 3 * 18 * 4 * 4).view(3, 18, 4, 4).cos()
    return Plane(2, (3, 2), (2, 1), (1, 0), (1, 2)), activation, grad


def _convolution_pairs(kernels: Kernels) -> list[tuple[Tensor, Tensor]]:
    plane, activation, grad = _convolution_case()
    found, squared = kernels.convolution_rows(plane, activation, grad)
    norms, sizes = kernels.convolution_norms(plane, activation, grad)
    expected = torch.stack([_one(plane, a, g) for a, g in zip(activation, grad, strict=True)])
    squares, weights = expected.double().square().flatten(1).sum(1), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float32)
    total = expected.new_ones(expected.shape[1:])
    kernels.add_convolutions(plane, activation, grad, weights, total)
    return [
        (found, expected),
        (squared, squares),
        (norms, squares),
        (sizes, _sizes(plane, activation, grad)),
        (total, 1.0 + torch.tensordot(weights, expected, 1)),
    ]


def _one(plane: Plane, activation: Tensor, grad: Tensor) -> Tensor:
    """The weight gradient of one example from its unfolded patches."""
    patches = F.unfold(activation.unsqueeze(0), plane.kernel, plane.dilation, plane.padding, plane.stride)
    parts = zip(patches[0].chunk(plane.groups), grad.flatten(1).chunk(plane.groups), strict=True)
    return torch.cat([g @ p.t() for p, g in parts]).view(grad.shape[0], -1, *plane.kernel)


def _sizes(plane: Plane, activation: Tensor, grad: Tensor) -> Tensor:
    patches = F.unfold(activation, plane.kernel, plane.dilation, plane.padding, plane.stride)
    parts = zip(patches.double().chunk(plane.groups, 1), grad.double().flatten(2).chunk(plane.groups, 1), strict=True)
    return torch.stack([p.norm(dim=1) * g.norm(dim=1) for p, g in parts]).sum(0)


def _text() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in _SOURCES)


def library() -> Native[Kernels]:
    """A library of which nothing was asked yet."""
    return Native("clipping", _text, _FLAGS, Kernels, _agrees)


LIBRARY = library()


def kernels(*tensors: Tensor) -> Kernels | None:
    """The compiled functions if the tensors are contiguous float32 on the CPU, else None."""
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return None
        if tensor.is_neg():  # its memory holds the opposite
            return None
    return LIBRARY.get()
