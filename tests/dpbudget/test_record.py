"""Canonical bytes: one spelling for every value, everything else refused."""

from __future__ import annotations

import json
import math
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpbudget._record import (
    MAX_INTEGER,
    HexFloat,
    Record,
    decode,
    encode,
    float_to_hex,
    hex_to_float,
    hex_to_rate,
    rate_to_hex,
)
from dpbudget.errors import Tampered

printable = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20)
scalars = st.none() | st.booleans() | st.integers(-MAX_INTEGER, MAX_INTEGER) | printable
values = st.dictionaries(printable, scalars | st.lists(scalars, max_size=4), max_size=6)


@given(values)
def test_what_is_encoded_is_read_back(value):
    assert decode(encode(value)) == value


@given(values)
def test_the_encoding_is_that_of_rfc_8785_for_this_subset(value):
    reference = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert encode(value) == reference


@given(values, st.data())
def test_any_other_byte_string_is_refused_or_means_something_else(value, data):
    line = bytearray(encode(value))
    position = data.draw(st.integers(0, len(line) - 1))
    line[position] ^= data.draw(st.integers(1, 255))
    try:
        assert encode(decode(bytes(line))) == bytes(line) != encode(value)
    except Tampered:
        pass


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_with_the_one_error_or_are_canonical(line):
    try:
        value = decode(line)
    except Tampered:
        return
    assert encode(value) == line


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"null",
        b'{"a":1.0}',
        b'{"a":1e3}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-0}',
        b'{"a":01}',
        b'{"a":1e999999}',
        b'{"a":9007199254740992}',
        b'{"a":' + b"9" * 400 + b"}",
        b'{"a":1,"a":1}',
        b'{"b":1,"a":1}',
        b'{"a": 1}',
        b'{"a":1}\n',
        b' {"a":1}',
        b'\xef\xbb\xbf{"a":1}',
        b'{"a":"\\u0041"}',
        b'{"a":"\\ud800"}',
        b'{"a":"\\n"}',
        b'{"a":"\xc3\xa9"}',
        b'{"a":"\x7f"}',
        b'{"a":tru}',
        b'{"a":1}}',
        b'{"a":{"b":{"c":{"d":{}}}}}',
    ],
)
def test_the_strict_reader_refuses(line):
    with pytest.raises(Tampered) as caught:
        decode(line)
    assert caught.value.code == "DP082"


@pytest.mark.parametrize(
    "line", [b'{"a":' + b"[" * 4_000_000, b"{" * 5_000_000, b'{"a":"' + b"x" * 60_000_000 + b'"}', b"9" * 10_000_000]
)
def test_bombs_are_refused_quickly_in_little_memory(line):
    tracemalloc.start()
    begin = time.monotonic()
    with pytest.raises(Tampered):
        decode(line, max_bytes=1 << 20)
    assert time.monotonic() - begin < 5
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "value", [{"a": 1.0}, {"a": b"x"}, {1: 2}, {"a": "\n"}, {"é": 1}, {"a": 2**53}, {"a": object()}]
)
def test_what_has_no_canonical_form_is_not_written(value):
    with pytest.raises(ValueError):
        encode(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_travel_exactly(value):
    if value == 0 and math.copysign(1, value) < 0:
        with pytest.raises(ValueError, match="no canonical spelling"):
            float_to_hex(value)
    else:
        assert hex_to_float(float_to_hex(value)) == value


@pytest.mark.parametrize(
    "text",
    ["1.0", "0x1p+0", "0x1.8p+1", "0X1.0000000000000p+0", "nan", "inf", "-0x0.0p+0", "0x1.0000000000000p+9999",
     "0x1.0000000000000p+00", "0x1.000000000000Ap+0", " 0x1.0000000000000p+0", "0x2.0000000000000p+0",
     "", "0x1.00000000000000p+0"],
)  # fmt: skip
def test_other_spellings_of_floats_are_refused(text):
    with pytest.raises(Tampered):
        hex_to_float(text)


@given(st.integers(1, 1 << 64))
def test_rates_travel_as_seventeen_digits(rate_k):
    text = rate_to_hex(rate_k)
    assert len(text) == 17
    assert hex_to_rate(text) == rate_k


@pytest.mark.parametrize(
    "text", ["0" * 17, "1" + "0" * 15 + "1" + "0", "10000000000000001", "f" * 17, "0" * 16, "0000000000000000A"]
)
def test_other_spellings_of_rates_are_refused(text):
    with pytest.raises(Tampered):
        hex_to_rate(text)


class Sample(Record):
    """A small record."""

    name: str
    size: HexFloat
    count: int = 1


def test_a_record_is_frozen_closed_and_strict():
    record = Sample(name="a", size=0.5)
    with pytest.raises(ValueError, match="frozen"):
        record.name = "b"
    for wrong in ({"name": "a", "size": 0.5, "extra": 1}, {"name": 1, "size": 0.5}, {"name": "a", "size": math.nan}):
        with pytest.raises(ValueError):
            Sample(**wrong)
    with pytest.raises(ValueError):
        Sample(name="a", size=0.5, count=True)


@given(printable, st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: x != 0), st.integers(0, 10**6))
def test_equal_records_have_equal_bytes_and_digests(name, size, count):
    record = Sample(name=name, size=size, count=count)
    again = Sample.parse(record.encode())
    assert again == record
    assert again.digest() == record.digest()
    assert record.replace(count=count + 1).digest() != record.digest()


def test_a_record_with_an_unknown_or_missing_field_is_refused():
    for line in (b'{"count":1,"name":"a","other":1,"size":"0x1.0000000000000p-1"}', b'{"count":1,"name":"a"}'):
        with pytest.raises(Tampered, match="Sample field"):
            Sample.parse(line)
