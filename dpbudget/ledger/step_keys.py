"""Step keys: the secret of one step and one purpose, and the two ways in which it follows from what is committed to.

Both are HKDF-Expand with SHA-256 (RFC 5869, 2.3) to 32 bytes; every field has a fixed width and integers are
little-endian, so that no two inputs collide. Names are padded with zero bytes to 16.

* **fresh**, the default: of the key M_t of the lease's step t (:mod:`dpbudget.ledger.noise_keys`), with the info
  ``"dpnoise/v1" | purpose | lease nonce (32) | step u64 | fresh bytes (16)``.
"""

from __future__ import annotations

import struct
from enum import StrEnum

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

#: First field of the derivation.
LABEL = b"dpnoise/v1"


class Purpose(StrEnum):
    """What a step key is for; keys of different purposes are independent."""

    GRAD_NOISE = "grad-noise"
    SAMPLING = "sampling"
    INIT = "init"
    TIE_BREAK = "tie-break"


def expand(key: bytes, info: bytes) -> bytes:
    """The 32 bytes that follow from a key for one use."""
    return HKDFExpand(algorithm=SHA256(), length=32, info=info).derive(key)


def encode_info(purpose: Purpose, lease_nonce: bytes, step: int, fresh: bytes) -> bytes:
    """The info of a fresh step key, 88 bytes.

    Raises:
        ValueError: a field does not have its fixed width.
    """
    if len(lease_nonce) != 32 or len(fresh) != 16 or not 0 <= step < 1 << 64:
        raise ValueError(f"lease nonce of {len(lease_nonce)} bytes, {len(fresh)} fresh bytes, step {step}")
    return struct.pack("<16s16s32sQ16s", LABEL, purpose.value.encode("ascii"), lease_nonce, step, fresh)
