"""The streams of random numbers that models and datasets draw from: lent to a run that begins them from secret words.

They are torch's on the CPU and on the device of the model, that of ``random`` and NumPy's global one. Generators of
other objects are not reached. They are lent while a batch is read and goes through the model, and at no other time:
where a stream stands tells how much was drawn, hence how many records, and programs save it (``torch.get_rng_state``).
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from dpbudget.errors import PrivacyViolation

#: 32-bit words of a Mersenne Twister (Matsumoto and Nishimura 1998), whose state torch keeps in 64 bits each.
_TWISTER = 624
#: Bytes of secret words that :func:`begin_streams` takes.
SECRET_BYTES = 4 * _TWISTER + 64  # 40 blocks of 64 bytes


class _Lent:
    """Whether the streams are lent, how often, and what the program gets back."""

    def __init__(self) -> None:
        self.times = 0
        self.plain: tuple[Any, ...] = ()
        self.bits: Any = None
        self.spare: Any = None
        self.states: dict[torch.device, torch.Tensor] = {}


_lent = _Lent()
_lock = threading.RLock()  # of one thread again and again, for the same reason


def _unlock() -> None:
    """A lock that another thread held when the process forked is held for ever."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


@contextmanager
def lent_streams(device: torch.device) -> Iterator[None]:
    """Within the block the streams may be begun anew; after the last of several they are where the first found them.

    Blocks may be left in any order, as those of two loaders in one loop are, and begun and left in several threads.
    """
    with _lock:
        _lend(device)
    try:
        yield
    finally:
        with _lock:
            _give_back()


def check_streams(device: torch.device) -> None:
    """Refuse a device or a PyTorch whose streams cannot be begun; nothing is charged or changed.

    Raises:
        PrivacyViolation: it is not known where they are, or in what form (DP016).
    """
    _generator(device)
    _twister_offset()


def _lend(device: torch.device) -> None:
    generators = {place: _generator(place) for place in (torch.device("cpu"), device)}
    first = not _lent.times
    _lent.times += 1  # at once: a loader that is collected as garbage gives back in the middle of this
    if first:
        _lent.plain = random.getstate()
        _lent.bits = np.random.get_bit_generator()  # type: ignore[attr-defined]  # not in its stubs
        # Another generator, and not the state of this one, which takes longer to read and may be of any kind.
        _lent.spare = _lent.spare or np.random.MT19937()  # made once: that takes longer than all else here
        np.random.set_bit_generator(_lent.spare)  # type: ignore[attr-defined]
    for place, generator in generators.items():
        if place not in _lent.states:
            _lent.states[place] = generator.get_state()


def _give_back() -> None:
    _lent.times -= 1
    if _lent.times:
        return
    random.setstate(_lent.plain)
    _forget()
    np.random.set_bit_generator(_lent.bits)  # type: ignore[attr-defined]
    for device, state in _lent.states.items():
        _generator(device).set_state(state)
    _lent.plain, _lent.bits, _lent.states = (), None, {}


def _forget() -> None:
    """Let the generator that stood in for NumPy's keep nothing of what it drew from."""
    if np.random.get_bit_generator() is _lent.spare:  # type: ignore[attr-defined]
        np.random.seed(0)
    else:  # somebody exchanged it meanwhile, and has what was drawn from
        _lent.spare = None


def begin_short_streams(device: torch.device, word: int) -> None:
    """Begin all streams as a function of a 64-bit word alone, within :func:`lent_streams`.

    torch on the CPU looks at 32 bits of it, ``random`` at all and NumPy at the upper half.
    """
    for place in {torch.device("cpu"), device}:
        _generator(place).manual_seed(word)
    random.seed(word)
    np.random.seed(word >> 32)


def begin_streams(device: torch.device, secret: bytearray) -> None:
    """Begin all streams as a function of secret words alone, within :func:`lent_streams`.

    torch's stream on the CPU gets a whole state of them, since 2^32 seeds could be tried one by one; those of
    ``random`` and NumPy 192 bits; a device's its 64.

    Args:
        device: of the model.
        secret: :data:`SECRET_BYTES` uniform bytes.

    Raises:
        PrivacyViolation: this PyTorch keeps its state in a form that is not known (DP016).
    """
    words, numbers = np.frombuffer(secret, dtype="<u4"), np.frombuffer(secret, dtype="<u8")
    state = torch.Generator().manual_seed(int(numbers[-8])).get_state()
    _twister_of(state)[:] = words[:_TWISTER]
    torch.default_generator.set_state(state)
    if device.type != "cpu":
        _generator(device).manual_seed(int(numbers[-7]))
    random.seed(int.from_bytes(secret[-48:-24], "little"))
    np.random.seed(words[-6:])


def _twister_of(state: torch.Tensor) -> NDArray[np.uint64]:
    """The words of the Mersenne Twister in a state of torch's generator on the CPU, a view."""
    start = _twister_offset()
    view: NDArray[np.uint64] = state.numpy()[start : start + 8 * _TWISTER].view("<u8")
    return view


@cache
def _twister_offset() -> int:
    """Where the words begin in a state: found, not assumed, by the words of a known seed.

    Raises:
        PrivacyViolation: nowhere (DP016).
    """
    seed = 20080517
    state = torch.Generator().manual_seed(seed).get_state().numpy()
    known = _initial_words(seed)
    for start in range(0, len(state) - 8 * _TWISTER + 1, 8):
        if np.array_equal(state[start : start + 8 * _TWISTER].view("<u8"), known):
            return start
    raise PrivacyViolation(
        f"torch {torch.__version__} keeps the state of its random numbers in a form that is not known here, and "
        "dropout needs a secret one",
        code="DP016",
        hint="install a PyTorch that is supported, see README.md",
    )


def _initial_words(seed: int) -> NDArray[np.uint64]:
    """The state that a 32-bit seed begins (``init_genrand`` of the authors' program of 2002)."""
    words = [seed]
    for index in range(1, _TWISTER):
        words.append((1812433253 * (words[-1] ^ (words[-1] >> 30)) + index) & 0xFFFFFFFF)
    return np.array(words, dtype=np.uint64)


def _generator(device: torch.device) -> torch.Generator:
    """The generator of a device from which operations draw that are given none.

    Raises:
        PrivacyViolation: it has none that is known (DP016).
    """
    if device.type == "cpu":
        return torch.default_generator
    module: Any = torch.get_device_module(device)
    if hasattr(module, "default_generators"):
        index = module.current_device() if device.index is None else device.index
        return cast(torch.Generator, module.default_generators[index])
    if device.type == "mps":
        return cast(torch.Generator, module._get_default_mps_generator())
    raise PrivacyViolation(
        f"nobody knows where operations on a device of type {device.type} take their random numbers from",
        code="DP016",
        hint="train on the CPU or on a CUDA device",
    )
