from __future__ import annotations

import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given
from hypothesis import strategies as st

from dptrainer.noise import chacha
from dptrainer.noise.chacha import BLOCK_BYTES, FORMAT, fill, keystream

KEY = bytes(range(32))


def reference_block(key: bytes, counter: int, nonce: bytes) -> bytes:
    """RFC 8439, 2.3, written out: the independent oracle of these tests."""

    def quarter(s: list[int], a: int, b: int, c: int, d: int) -> None:
        for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[x] = (s[x] + s[y]) & 0xFFFFFFFF
            s[z] ^= s[x]
            s[z] = ((s[z] << turn) | (s[z] >> (32 - turn))) & 0xFFFFFFFF

    start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574]
    start += [*struct.unpack("<8I", key), counter, *struct.unpack("<3I", nonce)]
    s = list(start)
    for _ in range(10):
        for column in range(4):
            quarter(s, column, 4 + column, 8 + column, 12 + column)
        for a, b, c, d in ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
            quarter(s, a, b, c, d)
    return struct.pack("<16I", *((x + y) & 0xFFFFFFFF for x, y in zip(s, start, strict=True)))


# RFC 8439, 2.3.2 and appendix A.1: key, counter, nonce, keystream block.
VECTORS = [
    (
        bytes(range(32)).hex(),
        1,
        "000000090000004a00000000",
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        "00" * 32,
        0,
        "00" * 12,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        "00" * 32,
        1,
        "00" * 12,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        "00" * 31 + "01",
        1,
        "00" * 12,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        "00ff" + "00" * 30,
        2,
        "00" * 12,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    (
        "00" * 32,
        0,
        "00" * 11 + "02",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
]


@pytest.mark.parametrize(("key", "counter", "nonce", "block"), VECTORS)
def test_the_oracle_and_openssl_reproduce_the_vectors_of_rfc_8439(
    key: str, counter: int, nonce: str, block: str
) -> None:
    assert reference_block(bytes.fromhex(key), counter, bytes.fromhex(nonce)).hex() == block
    initial = struct.pack("<I", counter) + bytes.fromhex(nonce)
    cipher = Cipher(ChaCha20(bytes.fromhex(key), initial), mode=None).encryptor()
    assert cipher.update(bytes(64)).hex() == block


@pytest.mark.parametrize("block", [0, 1, 5, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63, 2**64 - 1])
@pytest.mark.parametrize("stream", [0, 3, 2**32 - 1])
def test_a_block_stands_where_its_address_says(block: int, stream: int) -> None:
    nonce = struct.pack("<III", stream, block >> 32, FORMAT)
    assert keystream(KEY, stream, block, 1) == reference_block(KEY, block & 0xFFFFFFFF, nonce)


@given(st.integers(0, 2**33), st.integers(0, 5), st.integers(0, 5))
def test_seeking_equals_reading_on(first: int, skip: int, count: int) -> None:
    whole = keystream(KEY, 1, first, skip + count)
    assert whole[skip * BLOCK_BYTES :] == keystream(KEY, 1, first + skip, count)


@pytest.mark.parametrize("edge", [2**32, 2**33, 7 * 2**32])
def test_the_counter_never_wraps_inside_a_nonce(edge: int) -> None:
    across = keystream(KEY, 4, edge - 3, 6)
    single = b"".join(keystream(KEY, 4, edge - 3 + i, 1) for i in range(6))
    assert across == single
    assert len({bytes(across[i : i + 64]) for i in range(0, len(across), 64)}) == 6


def test_long_requests_are_the_same_stream_across_internal_pieces() -> None:
    blocks = (len(chacha._ZEROS) // BLOCK_BYTES) * 2 + 3
    whole = keystream(KEY, 9, 10, blocks)
    for at in (0, 16383, 16384, 16385, blocks - 1):
        assert whole[at * 64 : at * 64 + 64] == keystream(KEY, 9, 10 + at, 1)


def test_fill_overwrites_what_was_there() -> None:
    buffer = bytearray(b"\xff" * 128)
    fill(buffer, KEY, 0, 0)
    assert buffer == keystream(KEY, 0, 0, 2)


def test_streams_and_keys_do_not_share_words() -> None:
    seen = [np.frombuffer(keystream(KEY, stream, 0, 64), dtype="<u8") for stream in range(8)]
    seen += [np.frombuffer(keystream(bytes(32), 0, 0, 64), dtype="<u8")]
    words = np.concatenate(seen)
    assert len(np.unique(words)) == len(words)


@pytest.mark.parametrize(
    ("stream", "first", "size"), [(-1, 0, 64), (2**32, 0, 64), (0, -1, 64), (0, 2**64, 64), (0, 0, 63)]
)
def test_an_address_outside_the_layout_is_refused(stream: int, first: int, size: int) -> None:
    with pytest.raises(ValueError, match="no such keystream"):
        fill(bytearray(size), KEY, stream, first)
