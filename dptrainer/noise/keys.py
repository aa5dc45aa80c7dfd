"""Step keys: one secret for each release and purpose, derived from a receipt and never stored."""

from __future__ import annotations

import struct
from enum import StrEnum

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from dpbudget.ledger.receipt import Receipt

#: First field of every derivation.
LABEL = b"dpnoise/v1"


class Purpose(StrEnum):
    """What a step key is for; keys of different purposes are independent."""

    GRAD_NOISE = "grad-noise"
    SAMPLING = "sampling"
    RECORD_DRAWS = "record-draws"
    INIT = "init"
    TIE_BREAK = "tie-break"


def step_key(receipt: Receipt, purpose: Purpose) -> bytes:
    """The 32-byte key of one step and purpose: HKDF-Expand with SHA-256 (RFC 5869, 2.3) of the lease's key.

    The info field is 88 bytes of fixed-width fields, so that no two inputs collide: ``"dpnoise/v1"`` and the purpose,
    each padded with zero bytes to 16; the 32-byte lease nonce; the step as u64, little-endian; the 16 fresh bytes that
    were drawn after the commit. A copied file, a restored backup or a second process holds another lease key or other
    fresh bytes, so it never repeats the noise.

    Raises:
        ReceiptSpent: the receipt was used for this purpose before (DP077), or in a forked process (DP076).
    """
    info = encode_info(purpose, receipt.lease_nonce, receipt.step, receipt.fresh)
    return HKDFExpand(algorithm=SHA256(), length=32, info=info).derive(receipt.use(purpose.value))


def encode_info(purpose: Purpose, lease_nonce: bytes, step: int, fresh: bytes) -> bytes:
    """The info field of :func:`step_key`.

    Raises:
        ValueError: a field does not have its fixed width.
    """
    if len(lease_nonce) != 32 or len(fresh) != 16 or not 0 <= step < 1 << 64:
        raise ValueError(f"lease nonce of {len(lease_nonce)} bytes, {len(fresh)} fresh bytes, step {step}")
    return struct.pack("<16s16s32sQ16s", LABEL, purpose.value.encode("ascii"), lease_nonce, step, fresh)
