"""RFC 6962 Merkle tree over the raw bytes of records, kept as a compact frontier.

The frontier holds one hash for every set bit of the size, so that appending a record costs O(log n) hashes and the
state of a ledger of a million records is twenty hashes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

#: Hash of the tree without leaves (RFC 6962 section 2.1).
EMPTY_ROOT = hashlib.sha256(b"").digest()
#: What the first record names as its predecessor.
NO_LEAF = bytes(32)


def leaf_hash(line: bytes) -> bytes:
    """SHA-256(0x00 || line); the prefix keeps a leaf from passing for a node (RFC 6962 section 2.1)."""
    return hashlib.sha256(b"\x00" + line).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right) (RFC 6962 section 2.1)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, slots=True)
class Frontier:
    """The tree of ``size`` leaves as the roots of its complete subtrees, largest first.

    Attributes:
        size: number of leaves.
        peaks: one hash for every set bit of ``size``, from the highest bit down.
    """

    size: int = 0
    peaks: tuple[bytes, ...] = ()

    def append(self, leaf: bytes) -> Frontier:
        """The tree with one more leaf."""
        peaks = self.peaks
        # Every trailing one bit of the size is a complete subtree as large as the carried one.
        carry, size = leaf, self.size
        while size & 1:
            carry = node_hash(peaks[-1], carry)
            peaks = peaks[:-1]
            size >>= 1
        return Frontier(self.size + 1, (*peaks, carry))

    @property
    def root(self) -> bytes:
        """The Merkle tree hash: the peaks bagged from the right."""
        if not self.peaks:
            return EMPTY_ROOT
        root = self.peaks[-1]
        for peak in reversed(self.peaks[:-1]):
            root = node_hash(peak, root)
        return root
