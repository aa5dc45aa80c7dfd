from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Callable

import pytest

from dpbudget.errors import ReceiptSpent
from dpbudget.ledger.noise_keys import LeaseKey
from dpbudget.ledger.receipt import Receipt
from dptrainer.noise.keys import Purpose, encode_info, step_key

NewReceipt = Callable[..., Receipt]


def expand(key: bytes, info: bytes) -> bytes:
    """RFC 5869, 2.3 for one block: T(1) = HMAC(PRK, info || 0x01)."""
    return hmac.new(key, info + b"\x01", hashlib.sha256).digest()


@pytest.mark.parametrize("purpose", list(Purpose))
def test_a_step_key_is_hkdf_expand_of_the_documented_fields(new_receipt: NewReceipt, purpose: Purpose) -> None:
    nonce, fresh = os.urandom(32), os.urandom(16)
    receipt = new_receipt(lease_nonce=nonce, fresh=fresh, step=7)
    info = b"dpnoise/v1".ljust(16, b"\0") + purpose.value.encode().ljust(16, b"\0") + nonce
    info += struct.pack("<Q", 7) + fresh
    assert len(info) == 88
    assert encode_info(purpose, nonce, 7, fresh) == info
    assert step_key(receipt, purpose) == expand(receipt.key.reveal(), info)


def test_every_field_changes_the_key(new_receipt: NewReceipt) -> None:
    shared, fresh = LeaseKey(), os.urandom(16)
    base = {"key": shared, "fresh": fresh, "step": 3}
    variants = [
        base,
        {**base, "step": 4},
        {**base, "fresh": os.urandom(16)},
        {**base, "lease_nonce": os.urandom(32)},
        {**base, "key": LeaseKey()},
    ]
    keys = [step_key(new_receipt(**v), p) for v in variants for p in Purpose]
    assert len(set(keys)) == len(keys)


def test_a_copied_file_does_not_repeat_noise(new_receipt: NewReceipt) -> None:
    # A restored copy continues with the same lease nonce and step, but with its own lease key and fresh bytes.
    assert step_key(new_receipt(), Purpose.GRAD_NOISE) != step_key(new_receipt(), Purpose.GRAD_NOISE)


def test_a_receipt_gives_each_key_once(new_receipt: NewReceipt) -> None:
    receipt = new_receipt()
    step_key(receipt, Purpose.GRAD_NOISE)
    step_key(receipt, Purpose.SAMPLING)
    with pytest.raises(ReceiptSpent, match="already used for grad-noise") as caught:
        step_key(receipt, Purpose.GRAD_NOISE)
    assert caught.value.code == "DP077"


def test_a_forked_process_gets_no_key(new_receipt: NewReceipt) -> None:
    receipt = new_receipt()
    pid = os.fork()
    if pid == 0:
        try:
            step_key(receipt, Purpose.GRAD_NOISE)
        except ReceiptSpent as error:
            os._exit(0 if error.code == "DP076" else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(step_key(receipt, Purpose.GRAD_NOISE)) == 32


@pytest.mark.parametrize(("nonce", "step", "fresh"), [(31, 0, 16), (32, -1, 16), (32, 2**64, 16), (32, 0, 15)])
def test_a_field_of_the_wrong_width_is_refused(nonce: int, step: int, fresh: int) -> None:
    with pytest.raises(ValueError, match="lease nonce"):
        encode_info(Purpose.INIT, bytes(nonce), step, bytes(fresh))
