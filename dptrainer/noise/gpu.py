"""Noise on CUDA devices by Triton kernels: where they can be had, how they are launched, why they are believed.

The kernels stand in :mod:`dptrainer.noise.triton_kernels`. Words and layout are those of the CPU, bit for bit; values
differ from the CPU's as the kernels' text says. Nothing is believed: the first use of a device compiles the kernels
(seconds; Triton keeps them on disk) and compares words, values and the report of finiteness with the CPU's. Triton is
imported by that first use, not before.

A step takes one launch for each type of tensor, however many tensors there are: a table of them goes to the device, 56
bytes a tensor, and a program finds its own by bisection. Beside the table, four bytes for the flag are allocated.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpbudget.errors import PrivacyViolation
from dptrainer.noise import boxmuller
from dptrainer.noise.boxmuller import BLOCK_ELEMENTS
from dptrainer.noise.chacha import FORMAT, keystream
from dptrainer.noise.native import Piece

_LOG = logging.getLogger(__name__)
#: Blocks of a tile, a lane each; tiles that one program does; warps that share them.
BLOCKS, TILES, WARPS = 128, 8, 4
#: Elements of one program.
PROGRAM = BLOCK_ELEMENTS * BLOCKS * TILES
#: Outside of this range a standard deviation times a float32 may leave float32.
_FLOAT32 = 2.0**-100, 2.0**100
_OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False, "sanitize_overflow": False}  # sums of words wrap

_lock = threading.Lock()
_reasons: dict[torch.device, str | None] = {}


def check(devices: Iterable[torch.device]) -> None:
    """Refuse devices that cannot make noise; the CPU can. The first call for a device compiles and tests the kernels.

    Raises:
        PrivacyViolation: (DP016). No noise was drawn.
    """
    for device in set(devices):
        reason = why_not(device)
        if reason is not None:
            raise PrivacyViolation(
                f"noise cannot be made on {device.type}: {reason}",
                code="DP016",
                hint="pip install 'dpbudget[gpu]' on a CUDA machine, or pass noise=SecureNoise(generate_on_cpu=True) "
                "to make it on the CPU",
            )


def why_not(device: torch.device) -> str | None:
    """Why ``device`` cannot make noise, in words, or None."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return "there are kernels for CUDA devices alone"
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "TRITON_INTERPRET=1 has Triton's kernels run on the CPU"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and every replay of it would repeat the noise"
    with _lock:
        if device not in _reasons:
            _reasons[device] = _try(device)
            _LOG.info("noise on %s: %s", device, _reasons[device] or "by Triton kernels")
        return _reasons[device]


def add(pieces: Sequence[Piece], key: bytes, std: float) -> bool:
    """Add ``std`` times the values of a stream to contiguous tensors of one device that share no memory.

    Args:
        pieces: (tensor of float32 or float64, stream, place of its first element in the stream).
        key: 32 bytes.
        std: factor of the values.

    Returns:
        Whether all that it was added to was finite; this waits for the device. If not, what there is now must not be
        released.

    Raises:
        ValueError: a tensor is not contiguous or of another type, or the key or a place is none that a stream has;
            nothing was changed.
    """
    pieces = [piece for piece in pieces if piece[0].numel()]
    _check_pieces(pieces, key)
    if not pieces:
        return True
    device = pieces[0][0].device
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    for dtype in (torch.float32, torch.float64):
        chosen = [piece for piece in pieces if piece[0].dtype is dtype]
        if chosen:
            _launch(chosen, flag, key, std, dtype)
    return not flag.item()


def words(key: bytes, stream: int, block: int, count: int, device: torch.device, *, last: int = FORMAT) -> bytes:
    """At least ``count`` blocks of keystream as the device makes them, for tests; ``last`` is the nonce's last word."""
    from dptrainer.noise import triton_kernels as kernels  # needs Triton

    lanes = 1 << (count - 1).bit_length()
    out = torch.empty(lanes, 16, dtype=torch.int32, device=device)
    with _on(device):
        kernels.keystream[(1,)](out, 1, _signed(block), stream, last, *_key_words(key), BLOCKS=lanes, **_OPTIONS)
    return out.cpu().numpy().tobytes()


def values(words: bytes, dtype: torch.dtype, device: torch.device) -> NDArray[Any]:
    """The values of a power of two of blocks of words, in the arithmetic of ``dtype``, for tests."""
    from dptrainer.noise import triton_kernels as kernels  # needs Triton

    given = torch.from_numpy(np.frombuffer(words, dtype="<i4").reshape(-1, 16).copy()).to(device)
    out = torch.empty(len(given), BLOCK_ELEMENTS, dtype=dtype, device=device)
    with _on(device):
        kernels.values[(1,)](given, out, ARITHMETIC=_triton_type(dtype), BLOCKS=len(given), **_OPTIONS)
    found: NDArray[Any] = out.cpu().numpy().reshape(-1)
    return found


# ---------------------------------------------------------------------------- launching


def _launch(pieces: Sequence[Piece], flag: torch.Tensor, key: bytes, std: float, dtype: torch.dtype) -> None:
    """One launch for tensors of one type."""
    from dptrainer.noise import triton_kernels as kernels  # needs Triton

    narrow = dtype is torch.float32 and (std == 0.0 or _FLOAT32[0] <= std <= _FLOAT32[1])
    rows, programs = table(pieces, _at_least_in_float32(std) if narrow else std)
    host = torch.tensor(rows, dtype=torch.int64, device="cpu")
    device = flag.device
    if device.type != "cpu":
        host = host.pin_memory()  # else the copy would wait for the device
    with _on(device):
        kernels.add_noise[(programs,)](
            host.to(device, non_blocking=True), len(rows), flag, 1, *_key_words(key),
            TARGET=_triton_type(dtype), ARITHMETIC=_triton_type(torch.float32 if narrow else torch.float64),
            BLOCKS=BLOCKS, TILES=TILES, **_OPTIONS,
        )  # fmt: skip


def table(pieces: Sequence[Piece], std: float) -> tuple[list[list[int]], int]:
    """The rows that ``add_noise`` reads, and how many programs do all of them."""
    rows, programs, bits = [], 0, struct.unpack("<q", struct.pack("<d", std))[0]
    for tensor, stream, offset in pieces:
        block, skip = divmod(offset, BLOCK_ELEMENTS)
        rows.append([programs, tensor.data_ptr(), tensor.numel(), _signed(block), skip, stream, bits])
        programs += -(-(skip + tensor.numel()) // PROGRAM)
    return rows, programs


def _check_pieces(pieces: Sequence[Piece], key: bytes) -> None:
    if len(key) != 32:
        raise ValueError(f"a key of {len(key)} bytes")
    for tensor, stream, offset in pieces:
        there = 0 <= stream < 1 << 32 and 0 <= offset <= (BLOCK_ELEMENTS << 64) - tensor.numel()
        if not (there and tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.float64)):
            raise ValueError(f"no such noise: stream {stream}, {tensor.numel()} values of {tensor.dtype} from {offset}")


def _key_words(key: bytes) -> tuple[int, ...]:
    """As int32: Triton takes the type of an argument from its size, and a kernel for each would show the key."""
    return struct.unpack("<8i", key)


def _signed(block: int) -> int:
    """A number below 2^64 as the int64 of the same bits."""
    return block - (1 << 64) if block >> 63 else block


def _at_least_in_float32(std: float) -> float:
    """The standard deviation rounded up, so that it is never below the plan's."""
    near = np.float32(std)
    return float(near if float(near) >= std else np.nextafter(near, np.float32(math.inf)))


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float64 if dtype is torch.float64 else tl.float32


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# ---------------------------------------------------------------------------- trust


def _try(device: torch.device) -> str | None:
    """Import, compile and test; in words what failed."""
    try:
        import triton  # noqa: F401 - whether it is there
    except ImportError:
        return "Triton is not installed"
    try:
        with torch.device("cpu"):  # whatever the program's default is
            same = agrees(device)
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise anything; none of it may end in bad noise
        _LOG.info("kernels on %s", device, exc_info=True)
        return f"Triton's kernels could not be compiled or run ({type(error).__name__})"
    return None if same else "what Triton built gives other results than the CPU"


def agrees(device: torch.device) -> bool:
    """Whether words are those of OpenSSL also where the counter wraps, values the CPU's, and NaN and inf reported."""
    key, large = bytes(range(32)), (1 << 31) - 21  # public: a test pattern
    for stream, block in ((7, large), ((1 << 32) - 1, (1 << 32) - 21), (0, (1 << 64) - 64)):
        if words(key, stream, block, 64, device) != bytes(keystream(key, stream, block, 64)):
            return False
    for dtype, std in ((torch.float32, 1.1), (torch.float64, 1.1), (torch.float32, 2.0**101)):
        sizes, offset = (PROGRAM + 3, 1, 11), BLOCK_ELEMENTS * large + 7
        starts = [torch.linspace(-2.0, 2.0, size, dtype=dtype) for size in sizes]
        found = [start.to(device, copy=True) for start in starts]
        if not add([(tensor, stream, offset) for stream, tensor in enumerate(found)], key, std):
            return False
        near = map(close, found, starts, range(len(sizes)), [offset] * len(sizes), [key] * 3, [std] * 3)
        if not all(near):
            return False
        found[0][-1] = math.inf
        found[2][0] = math.nan
        if add([(found[0], 0, 0)], key, std) or add([(found[1], 1, 0), (found[2], 2, 0)], key, std):
            return False
    return True


def close(found: torch.Tensor, start: torch.Tensor, stream: int, offset: int, key: bytes, std: float) -> bool:
    """Whether ``found`` is ``start`` with noise: in float64 to the bit, in float32 to 2^-21 radii and one rounding."""
    block, skip = divmod(offset, BLOCK_ELEMENTS)
    bench = boxmuller.Workbench(-(-(skip + start.numel()) // BLOCK_ELEMENTS))
    bench.words[:] = keystream(key, stream, block, bench.blocks)
    z = bench.box_muller(bench.blocks) * std
    radius = np.repeat(np.hypot(z[::2], z[1::2]), 2)[skip : skip + start.numel()]
    exact = start.numpy().astype(np.float64) + z[skip : skip + start.numel()]
    seen = found.cpu().numpy()
    if start.dtype is torch.float64 or not std <= _FLOAT32[1]:
        return np.array_equal(seen, exact.astype(seen.dtype))
    return bool((np.abs(seen - exact) <= 2.0**-21 * radius + 2.0**-24 * np.abs(exact)).all())
