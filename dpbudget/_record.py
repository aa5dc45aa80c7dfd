"""Canonical bytes: the restricted JSON of ledger records and the frozen pydantic base of plans and reports.

Restricted JSON is printable ASCII (0x20 to 0x7e) keys and strings, integers of at most 2^53 - 1 in absolute value,
booleans, null, arrays and objects of bounded depth, and **no JSON floats**: a float is written as ``float.hex()`` in a
string. For this subset the encoding below equals RFC 8785 (JCS), so that any language reproduces the bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from dpbudget.errors import Tampered

MAX_INTEGER = 2**53 - 1
MAX_LINE_BYTES = 4096
MAX_STATEMENT_BYTES = 1 << 20
MAX_DEPTH = 4

_PRINTABLE = re.compile(r"[\x20-\x7e]*")
# C's %a and Go's %x differ from Python in digits and exponent, so the grammar of float.hex() is pinned: one leading
# digit, 13 fraction digits, a signed decimal exponent without leading zeros; zero alone is written 0x0.0p+0.
_HEX_FLOAT = re.compile(r"-?0x[01]\.[0-9a-f]{13}p[+-](?:0|[1-9][0-9]{0,3})|0x0\.0p\+0")
_RATE = re.compile(r"[01][0-9a-f]{16}")


def float_to_hex(value: float) -> str:
    """The one spelling of a finite float in a record, ``float.hex()``; raises ValueError for NaN, infinity and -0."""
    if not math.isfinite(value) or (value == 0.0 and math.copysign(1.0, value) < 0):
        raise ValueError(f"{value!r} has no canonical spelling")
    return float(value).hex()


def hex_to_float(text: str) -> float:
    """Inverse of :func:`float_to_hex`; any other spelling of the same number is refused with :class:`Tampered`."""
    if _HEX_FLOAT.fullmatch(text):
        try:
            value = float.fromhex(text)
        except OverflowError:
            value = math.inf
        if math.isfinite(value) and value.hex() == text:
            return value
    raise Tampered(f"{text[:40]!r} is not a canonical hexadecimal float", code="DP082")


def rate_to_hex(rate_k: int) -> str:
    """A sampling rate k / 2^64, 1 <= k <= 2^64, as 17 lower-case hexadecimal digits of k."""
    if not 1 <= rate_k <= 1 << 64:
        raise ValueError(f"rate_k must lie in [1, 2**64], got {rate_k}")
    return f"{rate_k:017x}"


def hex_to_rate(text: str) -> int:
    """Inverse of :func:`rate_to_hex`; raises :class:`Tampered` for anything else."""
    if _RATE.fullmatch(text):
        rate_k = int(text, 16)
        if 1 <= rate_k <= 1 << 64:
            return rate_k
    raise Tampered(f"{text[:40]!r} is not a sampling rate of 17 hexadecimal digits", code="DP082")


def encode(value: Mapping[str, Any]) -> bytes:
    """Canonical bytes of an object of restricted JSON; raises ValueError for what has no canonical form."""
    _check(value, depth=1)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def decode(line: bytes, *, max_bytes: int = MAX_LINE_BYTES, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Read one canonical object; every byte string but the canonical one is refused with :class:`Tampered`.

    Size is checked before parsing, numbers before conversion, and the re-encoded value is compared with the bytes, so
    duplicate keys, NaN, exponents, escapes, BOMs, booleans spelt as integers and stray spaces cannot pass.
    """
    if len(line) > max_bytes:
        raise Tampered(f"record of {len(line)} bytes; the limit is {max_bytes}", code="DP082")
    # json.loads recurses once a bracket: cap the nesting before it can exhaust the stack.
    if max(line.count(b"["), line.count(b"{")) > 8192 or not _depth_within(line, max_depth):
        raise Tampered(f"record nested deeper than {max_depth}", code="DP082")
    try:
        value = json.loads(line.decode("ascii"), parse_float=_refuse, parse_constant=_refuse, parse_int=_strict_int)
        if not isinstance(value, dict):
            raise ValueError("a record is a JSON object")
        if encode(value) != line:
            raise ValueError("not in canonical form")
    except (ValueError, RecursionError) as error:
        raise Tampered(f"not a canonical record: {error}", code="DP082") from None
    return value


def _depth_within(line: bytes, max_depth: int) -> bool:
    if line.count(b"[") + line.count(b"{") <= max_depth:
        return True  # no more brackets than levels, wherever they stand
    depth, in_string, escaped = 0, False, False
    for byte in line:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            if depth > max_depth:
                return False
        elif byte in b"]}":
            depth -= 1
    return True


def _refuse(token: str) -> Any:
    raise ValueError(f"{token[:20]!r}: floats are written as hexadecimal strings")


def _strict_int(token: str) -> int:
    # int() of a long digit string is quadratic, so the length is capped before conversion.
    if len(token) > 17:
        raise ValueError("integer beyond 2^53 - 1")
    return int(token)


def _check(value: Any, depth: int) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise ValueError(f"integer {value} beyond 2^53 - 1")
    elif isinstance(value, str):
        if not _PRINTABLE.fullmatch(value):
            raise ValueError("string with characters outside printable ASCII")
    elif isinstance(value, Mapping):
        if depth > MAX_DEPTH + 2:
            raise ValueError("nested too deeply")
        for key, item in value.items():
            if not isinstance(key, str) or not _PRINTABLE.fullmatch(key):
                raise ValueError("key outside printable ASCII")
            _check(item, depth + 1)
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        if depth > MAX_DEPTH + 2:
            raise ValueError("nested too deeply")
        for item in value:
            _check(item, depth + 1)
    else:
        raise ValueError(f"{type(value).__name__} has no canonical form")


def _float_in(value: Any) -> Any:
    return hex_to_float(value) if isinstance(value, str) else value


def _rate_in(value: Any) -> Any:
    return hex_to_rate(value) if isinstance(value, str) else value


def _exactly_one_float(rate_k: int) -> int:
    # Otherwise the accountant's float would not be the sampler's probability.
    if int(float(rate_k)) != rate_k:
        raise ValueError(f"{rate_k} / 2**64 is not exactly one float64")
    return rate_k


#: A finite float field that reads and writes the hexadecimal spelling.
HexFloat = Annotated[float, BeforeValidator(_float_in)]
#: The integer k of a sampling rate k / 2^64 that is exactly one float64, read and written as 17 hexadecimal digits.
RateK = Annotated[
    int,
    BeforeValidator(_rate_in),
    AfterValidator(_exactly_one_float),
    PlainSerializer(rate_to_hex, return_type=str),
]


class Record(BaseModel):
    """Base of plans, mechanisms and reports: frozen, strict, closed, without NaN or infinity.

    ``encode()`` gives the canonical bytes and ``digest()`` their SHA-256, so equal values have equal digests on every
    machine. Floats travel as hexadecimal strings.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    def to_jsonable(self) -> dict[str, Any]:
        """The value as restricted JSON (floats as hexadecimal strings, tuples as lists)."""
        plain = _plain(self.model_dump(mode="python"))
        assert isinstance(plain, dict)  # noqa: S101 - a model always dumps to an object
        return plain

    def encode(self) -> bytes:
        """Canonical bytes."""
        return encode(self.to_jsonable())

    def digest(self) -> str:
        """SHA-256 of the canonical bytes, 64 lower-case hexadecimal digits."""
        return hashlib.sha256(self.encode()).hexdigest()

    @classmethod
    def parse(cls, data: bytes, *, max_bytes: int = MAX_STATEMENT_BYTES) -> Self:
        """Read canonical bytes; anything else, unknown fields included, raises :class:`Tampered` (DP082)."""
        return cls.from_jsonable(decode(data, max_bytes=max_bytes))

    @classmethod
    def from_jsonable(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_jsonable`; raises :class:`Tampered` (DP082) for anything that is not a valid value."""
        try:
            # JSON mode of a strict model reads lists as tuples and strings as enums, and converts nothing else.
            return cls.model_validate_json(encode(value))
        except ValueError as error:
            problem = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            where = ".".join(str(part) for part in problem["loc"]) or "record"
            raise Tampered(f"{cls.__name__} field {where}: {problem['msg']}", code="DP082") from None

    def replace(self, **changes: Any) -> Self:
        """A copy with the given fields changed, validated like a new value."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def _plain(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        return float_to_hex(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no canonical form")
