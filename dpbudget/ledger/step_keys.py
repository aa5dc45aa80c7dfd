"""Step keys: the secret of one step and one purpose, and the two ways in which it follows from what is committed to.

Both are HKDF-Expand with SHA-256 (RFC 5869, 2.3) to 32 bytes; every field has a fixed width and integers are
little-endian, so that no two inputs collide. Names are padded with zero bytes to 16.

* **fresh**, the default: of the key M_t of the lease's step t (:mod:`dpbudget.ledger.noise_keys`), with the info
  ``"dpnoise/v1" | purpose | lease nonce (32) | step u64 | fresh bytes (16)``;
* **committed**, for a run whose key was fixed before its first step: of HKDF-Extract of the plan key with the auditor's
  entropy as the salt, with the info ``"dpnoise/c1" | purpose | SHA-256 of the plan's statement (32) | step u64 |
  attempt u64``. Nothing in it is chosen by whoever trains. The attempt is 0: a step of a ledger is charged once.
"""

from __future__ import annotations

import struct
from enum import StrEnum
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from dpbudget.ledger.noise_keys import KeyBytes

if TYPE_CHECKING:
    from dpbudget.ledger.receipt import Receipt

#: First fields of the two derivations.
LABEL, COMMITTED_LABEL = b"dpnoise/v1", b"dpnoise/c1"


class Purpose(StrEnum):
    """What a step key is for; keys of different purposes are independent."""

    GRAD_NOISE = "grad-noise"
    SAMPLING = "sampling"
    RECORD_DRAWS = "record-draws"
    INIT = "init"
    TIE_BREAK = "tie-break"


def expand(key: bytes, info: bytes) -> KeyBytes:
    """The 32 bytes that follow from a key for one use."""
    return KeyBytes(HKDFExpand(algorithm=SHA256(), length=32, info=info).derive(key))


def encode_info(purpose: Purpose, lease_nonce: bytes, step: int, fresh: bytes) -> bytes:
    """The info of a fresh step key, 88 bytes.

    Raises:
        ValueError: a field does not have its fixed width.
    """
    if len(lease_nonce) != 32 or len(fresh) != 16 or not 0 <= step < 1 << 64:
        raise ValueError(f"lease nonce of {len(lease_nonce)} bytes, {len(fresh)} fresh bytes, step {step}")
    return struct.pack("<16s16s32sQ16s", LABEL, purpose.value.encode("ascii"), lease_nonce, step, fresh)


def encode_committed_info(purpose: Purpose, statement: bytes, step: int, attempt: int = 0) -> bytes:
    """The info of a committed step key, 80 bytes.

    Raises:
        ValueError: a field does not have its fixed width.
    """
    if len(statement) != 32 or not 0 <= step < 1 << 64 or not 0 <= attempt < 1 << 64:
        raise ValueError(f"statement digest of {len(statement)} bytes, step {step}, attempt {attempt}")
    return struct.pack("<16s16s32sQQ", COMMITTED_LABEL, purpose.value.encode("ascii"), statement, step, attempt)


def info_of(receipt: Receipt, purpose: Purpose) -> bytes:
    """The info with which a receipt's key is expanded for a purpose."""
    if receipt.committed:
        return encode_committed_info(purpose, bytes.fromhex(receipt.plan_digest), receipt.step)
    return encode_info(purpose, receipt.lease_nonce, receipt.step, receipt.fresh)
