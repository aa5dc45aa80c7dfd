"""Step keys: one secret for each release and purpose, derived from a receipt and never stored."""

from __future__ import annotations

from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.step_keys import LABEL, Purpose, encode_info, expand, info_of

__all__ = ["LABEL", "Purpose", "encode_info", "step_key"]


def step_key(receipt: Receipt, purpose: Purpose) -> bytes:
    """The 32-byte key of one step and purpose, as :mod:`dpbudget.ledger.step_keys` derives it.

    With fresh keys a copied file, a restored backup or a second process holds another lease key and other fresh bytes,
    so it never repeats the noise. With a committed key it would: such runs need an outside anchor
    (docs/threat-model.md).

    Raises:
        ReceiptSpent: the receipt was used for this purpose before (DP077), or in a forked process (DP076).
    """
    return expand(receipt.use(purpose.value), info_of(receipt, purpose))
