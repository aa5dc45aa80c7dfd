"""Step keys: one secret for each release and purpose, derived from a receipt and never stored."""

from __future__ import annotations

from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.step_keys import LABEL, Purpose, encode_info, expand

__all__ = ["LABEL", "Purpose", "encode_info", "step_key"]


def step_key(receipt: Receipt, purpose: Purpose) -> bytes:
    """The 32-byte key of one step and purpose, as :mod:`dpbudget.ledger.step_keys` derives it.

    A copied file, a restored backup or a second process holds another lease key and other fresh bytes, so it never
    repeats the noise.

    Raises:
        ReceiptSpent: the receipt was used for this purpose before (DP077), or in a forked process (DP076).
    """
    info = encode_info(purpose, receipt.lease_nonce, receipt.step, receipt.fresh)
    return expand(receipt.use(purpose.value), info)
