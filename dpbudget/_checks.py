"""One check per privacy parameter: its range, its code and the way out, for Python and command line alike."""

from __future__ import annotations

import math
import operator
from difflib import get_close_matches
from fractions import Fraction
from typing import Literal, SupportsIndex, cast

from dpbudget._guarantee import as_delta as as_delta
from dpbudget._guarantee import as_epsilon as as_epsilon
from dpbudget._guarantee import as_real
from dpbudget.errors import InvalidParameter
from dpbudget.mechanisms import Adjacency
from dpbudget.mechanisms.gaussian import MAX_NOISE_MULTIPLIER, MIN_NOISE_MULTIPLIER
from dpbudget.plan import NOISE_MODES, UNITS, NoiseMode, Unit, rate_from_float

AccountantName = Literal["prv", "rdp"]
#: The accountants whose answers a plan may claim; the first is the default.
ACCOUNTANTS: tuple[AccountantName, ...] = ("prv", "rdp")
#: Accountants that answer questions and are never claimed.
FURTHER_ACCOUNTANTS = ("pld",)


def as_noise_multiplier(value: object) -> float:
    """A noise multiplier in [1e-3, 1e6]; raises InvalidParameter (DP006 for zero, else DP005)."""
    number = as_real(value)
    if number == 0.0:
        raise InvalidParameter(
            "noise multiplier 0: epsilon is infinite and nothing is protected",
            code="DP006",
            hint="let calibrate choose the noise; a baseline without privacy is trained without this package",
        )
    if number is None or not MIN_NOISE_MULTIPLIER <= number <= MAX_NOISE_MULTIPLIER:
        raise InvalidParameter(
            f"noise multiplier must lie in [{MIN_NOISE_MULTIPLIER:g}, {MAX_NOISE_MULTIPLIER:g}], got {value!r}",
            code="DP005",
            hint="it is the noise standard deviation divided by the clipping norm; 0.5 to 20 is usual",
        )
    return number


def as_clip_norm(value: object) -> float:
    """A clipping norm in (0, 1e12]; raises InvalidParameter (DP007)."""
    number = as_real(value)
    if number is None or not 0.0 < number <= 1e12:
        raise InvalidParameter(
            f"clipping norm must be a finite number in (0, 1e12], got {value!r}",
            code="DP007",
            hint="a typical start is 1.0",
        )
    return number


def as_rate(value: object) -> int:
    """The integer k of a sampling rate k / 2^64 in (0, 1]; raises InvalidParameter (DP008)."""
    number = as_real(value)
    return rate_from_float(cast(float, value) if number is None else number)


def as_count(name: str, value: object, largest: int) -> int:
    """A whole number in [1, largest]; raises InvalidParameter (DP009) that names the parameter."""
    if not isinstance(value, bool):
        try:
            count = operator.index(cast(SupportsIndex, value))
        except TypeError:
            count = 0
        if 1 <= count <= largest:
            return count
    raise InvalidParameter(
        f"{name} must be a whole number in [1, {largest:g}], got {value!r}",
        code="DP009",
        hint=f"pass {name} as a positive whole number",
    )


def as_epochs(value: object) -> Fraction:
    """Epochs as an exact positive rational, at most 1e9; raises InvalidParameter (DP009).

    A float stands for its shortest decimal, so that 0.1 means one tenth and not the binary number above it.
    """
    if isinstance(value, Fraction):
        epochs = Fraction(value)
    else:
        number = as_real(value)
        epochs = Fraction(0) if number is None or not math.isfinite(number) else Fraction(repr(number))
    if not 0 < epochs <= 10**9:
        raise InvalidParameter(
            f"epochs must be a positive number of at most 1e9, got {_plain(value)}",
            code="DP009",
            hint="pass how often each record is expected to be used, such as 10",
        )
    return epochs


def as_adjacency(value: object) -> Adjacency:
    """An adjacency or its name; raises InvalidParameter (DP062)."""
    for relation in Adjacency:
        if value == relation:
            return relation
    raise InvalidParameter(
        f"unknown adjacency {value!r}", code="DP062", hint=_choose(value, [str(item) for item in Adjacency])
    )


def as_unit(value: object) -> Unit:
    """A unit of privacy; raises InvalidParameter (DP062)."""
    for unit in UNITS:
        if value == unit:
            return unit
    raise InvalidParameter(f"unknown unit of privacy {value!r}", code="DP062", hint=_choose(value, list(UNITS)))


def as_noise_mode(value: object) -> NoiseMode:
    """A mode of the noise; raises InvalidParameter (DP060)."""
    for mode in NOISE_MODES:
        if value == mode:
            return mode
    raise InvalidParameter(f"unknown noise {value!r}", code="DP060", hint=_choose(value, list(NOISE_MODES)))


def as_accountant(value: object) -> AccountantName:
    """The name of an accountant that may be claimed; raises InvalidParameter (DP061)."""
    for name in ACCOUNTANTS:
        if value == name:
            return name
    raise InvalidParameter(f"unknown accountant {value!r}", code="DP061", hint=_choose(value, ACCOUNTANTS))


def as_any_accountant(value: object) -> str:
    """The name of an accountant for a question, claimed by plans or not; raises InvalidParameter (DP061)."""
    if value in FURTHER_ACCOUNTANTS:
        return str(value)
    known = (*ACCOUNTANTS, *FURTHER_ACCOUNTANTS)
    if value in ACCOUNTANTS:
        return as_accountant(value)
    raise InvalidParameter(f"unknown accountant {value!r}", code="DP061", hint=_choose(value, known))


def did_you_mean(word: str, known: list[str] | tuple[str, ...]) -> str:
    """``Did you mean X?`` for the closest known word, else the empty string."""
    close = get_close_matches(word.lower(), [item.lower() for item in known], n=1, cutoff=0.5)
    return next((f"Did you mean {item}?" for item in known if close and item.lower() == close[0]), "")


def _choose(value: object, known: list[str] | tuple[str, ...]) -> str:
    return f"choose {', '.join(known)}. {did_you_mean(str(value), known)}".strip()


def _plain(value: object) -> str:
    return str(value) if isinstance(value, Fraction) else repr(value)
