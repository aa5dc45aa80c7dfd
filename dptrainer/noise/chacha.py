"""The ChaCha20 keystream of RFC 8439, seekable by block and addressed so that no word is ever used twice.

A 96-bit nonce names what the words are for: ``stream u32 | high 32 bits of the block index | format u32``, each
little-endian. The 32-bit counter is the low half of the block index, so that a stream holds 2^64 blocks of 64 bytes
and a request is split where the counter would wrap. docs/adr/0003 binds the layout. The cipher itself is OpenSSL's,
through ``cryptography``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

#: Bytes of one block (RFC 8439, 2.3) and 32-bit words in it.
BLOCK_BYTES, BLOCK_WORDS = 64, 16
#: What the words are for, as the nonce has it: values in floating point and samples; pairs of rounded values; further
#: digits of such pairs. A different use of the words takes a different number.
FORMAT, ROUNDED, DIGITS = 1, 2, 3
_COUNTER_SPAN = 1 << 32
_ZEROS = memoryview(bytes(1 << 20))


def keystream(key: bytes, stream: int, first_block: int, blocks: int, *, layout: int = FORMAT) -> bytearray:
    """``64 * blocks`` bytes of keystream from block ``first_block`` of ``stream``.

    Any two requests agree where their blocks overlap (seek equals contiguous).

    Args:
        key: 32 secret bytes.
        stream: 0 <= stream < 2^32.
        first_block: 0 <= first_block < 2^64; the request must end at 2^64 at the latest.
        blocks: number of 64-byte blocks, at least 0.
        layout: the third word of the nonce.

    Raises:
        ValueError: an argument is out of its range.
    """
    out = bytearray(BLOCK_BYTES * blocks)
    fill(out, key, stream, first_block, layout=layout)
    return out


def fill(out: bytearray | memoryview, key: bytes, stream: int, first_block: int, *, layout: int = FORMAT) -> None:
    """Overwrite ``out``, a whole number of blocks, as :func:`keystream` would return it; nothing is copied."""
    blocks, rest = divmod(len(out), BLOCK_BYTES)
    if rest or not 0 <= stream < 1 << 32 or not 0 <= first_block <= first_block + blocks <= 1 << 64:
        raise ValueError(f"no such keystream: stream {stream}, block {first_block}, {len(out)} bytes")
    view = memoryview(out)
    for start, stop, high, counter in _spans(first_block, blocks):
        nonce = struct.pack("<IIII", counter, stream, high, layout)
        # OpenSSL's initial value is the counter (little-endian) followed by the nonce of RFC 8439, 2.3.
        encryptor = Cipher(ChaCha20(key, nonce), mode=None).encryptor()
        for begin in range(start * BLOCK_BYTES, stop * BLOCK_BYTES, len(_ZEROS)):
            end = min(begin + len(_ZEROS), stop * BLOCK_BYTES)
            encryptor.update_into(_ZEROS[: end - begin], view[begin:end])


def _spans(first_block: int, blocks: int) -> Iterator[tuple[int, int, int, int]]:
    """Split blocks where the 32-bit counter would wrap (RFC 8439, 2.3): ``(start, stop, high half, counter)``."""
    done = 0
    while done < blocks:
        high, counter = divmod(first_block + done, _COUNTER_SPAN)
        count = min(blocks - done, _COUNTER_SPAN - counter)
        yield done, done + count, high, counter
        done += count
