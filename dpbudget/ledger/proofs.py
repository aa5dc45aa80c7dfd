"""Inclusion and consistency proofs of the ledger's Merkle tree (RFC 6962 section 2.1, RFC 9162 section 2.1).

An inclusion proof shows that one record stands at one place of the tree under a head; a consistency proof shows that a
tree only grew. Both are lists of node hashes. Everywhere here ``leaves`` are leaf hashes (:func:`leaf_hash` of every
line), not lines. Making proofs hashes the tree once; checking one hashes at most 2 log2(size) nodes.

Whoever makes a proof asks for what exists (:class:`InvalidParameter` otherwise); whoever checks one reads bytes of a
stranger (:class:`Tampered`, DP071).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

from dpbudget._record import MAX_INTEGER
from dpbudget.errors import InvalidParameter, Tampered
from dpbudget.ledger.tree import EMPTY_ROOT, node_hash

#: A tree of at most 2^53 - 1 leaves is no higher.
MAX_PATH = MAX_INTEGER.bit_length()


def inclusion_proof(leaves: Sequence[bytes], index: int, size: int) -> tuple[bytes, ...]:
    """Proof that leaf ``index`` stands in the tree of the first ``size`` leaves: siblings, from the leaf upwards.

    RFC 9162 section 2.1.3.1. For several leaves use :func:`inclusion_proofs`, which hashes the tree only once.

    Raises:
        InvalidParameter: ``size`` is not in [1, len(leaves)] or ``index`` not in [0, size) (DP009).
    """
    return next(inclusion_proofs(_prefix(leaves, size, least=1), (index,)))


def inclusion_proofs(leaves: Sequence[bytes], indices: Iterable[int]) -> Iterator[tuple[bytes, ...]]:
    """:func:`inclusion_proof` of every index, in that order, in the tree of all ``leaves``.

    Raises:
        InvalidParameter: an index is not in [0, len(leaves)) (DP009).
    """
    levels = _levels(leaves)
    for index in indices:
        if not _is_integer(index) or not 0 <= index < len(leaves):
            raise InvalidParameter(f"there is no leaf {index} among {len(leaves)}", hint="count leaves from 0")
        yield tuple(_siblings(levels, index))


def root_from_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes]) -> bytes:
    """Root of the tree of ``size`` leaves that has ``leaf`` at ``index``, if ``proof`` is right.

    The proof holds exactly if the result is the root of a trusted head of that size (RFC 9162 section 2.1.3.2).

    Raises:
        Tampered: index or size out of range, or a proof of another shape than the tree has at that index.
    """
    if not (_is_integer(index) and _is_integer(size)) or not 0 <= index < size <= MAX_INTEGER:
        raise Tampered(f"an inclusion proof for leaf {index} of {size}")
    _check_hashes((leaf, *proof))
    node, last, root = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            _misshapen(index, size)
        if node & 1 or node == last:
            root = node_hash(sibling, root)
            # A node without a right neighbour is carried up unchanged until it has a left one.
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            root = node_hash(root, sibling)
        node, last = node >> 1, last >> 1
    if last:
        _misshapen(index, size)
    return root


def consistency_proof(leaves: Sequence[bytes], old_size: int, size: int) -> tuple[bytes, ...]:
    """Proof that the tree of the first ``size`` leaves continues that of the first ``old_size`` (RFC 9162 2.1.4.1).

    The proof is empty where there is nothing to prove: ``old_size`` is 0 or ``size``.

    Raises:
        InvalidParameter: not 0 <= old_size <= size <= len(leaves) (DP009).
    """
    leaves = _prefix(leaves, size, least=0)
    if not _is_integer(old_size) or not 0 <= old_size <= size:
        raise InvalidParameter(f"a tree of {size} leaves does not continue one of {old_size}", hint="old size first")
    if old_size in (0, size):
        return ()
    levels = _levels(leaves)
    # The largest complete subtree that ends at the old size; where it is the whole old tree, its root is known.
    height = (old_size & -old_size).bit_length() - 1
    node = (old_size - 1) >> height
    start = () if node == 0 else (levels[height][node],)
    return (*start, *_siblings(levels[height:], node))


def check_consistency(old_size: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]) -> None:
    """Check that the tree with ``root`` continues the tree with ``old_root`` (RFC 9162 section 2.1.4.2).

    Every tree continues the empty one, and itself; the proof is then empty.

    Raises:
        Tampered: sizes out of range, a proof of another shape, or one that does not lead to both roots.
    """
    if not (_is_integer(old_size) and _is_integer(size)) or not 0 <= old_size <= size <= MAX_INTEGER:
        raise Tampered(f"a consistency proof from {old_size} to {size} leaves")
    _check_hashes((old_root, root, *proof))
    if old_size in (0, size):
        known = EMPTY_ROOT if old_size == 0 else root
        if proof or old_root != known or (size == 0 and root != EMPTY_ROOT):
            _inconsistent(old_size, size)
        return
    old, new = _roots_from_consistency(old_size, old_root, size, proof)
    if old != old_root or new != root:
        _inconsistent(old_size, size)


def _roots_from_consistency(old_size: int, old_root: bytes, size: int, proof: Sequence[bytes]) -> tuple[bytes, bytes]:
    node, last = old_size - 1, size - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    # A complete old tree is a node of the new one, and the proof leaves it out.
    path = proof if node else (old_root, *proof)
    if not path:
        _inconsistent(old_size, size)
    old = new = path[0]
    for sibling in path[1:]:
        if last == 0:
            _inconsistent(old_size, size)
        if node & 1 or node == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            new = node_hash(new, sibling)
        node, last = node >> 1, last >> 1
    if last:
        _inconsistent(old_size, size)
    return old, new


def _levels(leaves: Sequence[bytes]) -> list[list[bytes]]:
    """All nodes, from the leaves to the root; a last node without a right neighbour is carried up unchanged."""
    levels = [list(leaves)]
    while len(levels[-1]) > 1:
        below = levels[-1]
        above = [node_hash(below[at], below[at + 1]) for at in range(0, len(below) - 1, 2)]
        if len(below) & 1:
            above.append(below[-1])
        levels.append(above)
    return levels


def _siblings(levels: Sequence[Sequence[bytes]], node: int) -> Iterator[bytes]:
    for level in levels:
        if node ^ 1 < len(level):
            yield level[node ^ 1]
        node >>= 1


def _prefix(leaves: Sequence[bytes], size: int, *, least: int) -> Sequence[bytes]:
    if not _is_integer(size) or not least <= size <= len(leaves):
        raise InvalidParameter(f"a tree of {size} leaves out of {len(leaves)}", hint="name a size that was reached")
    return leaves[:size]


def _is_integer(value: object) -> bool:
    return type(value) is int  # True is no leaf


def _check_hashes(hashes: Sequence[bytes]) -> None:
    if len(hashes) > MAX_PATH + 2 or any(len(item) != 32 for item in hashes):
        raise Tampered("a Merkle proof is a short list of hashes of 32 bytes")


def _misshapen(index: int, size: int) -> NoReturn:
    raise Tampered(f"the inclusion proof does not have the shape of leaf {index} of {size}")


def _inconsistent(old_size: int, size: int) -> NoReturn:
    raise Tampered(
        f"the tree of {size} records is not shown to continue the one of {old_size}",
        hint="compare both heads with an export; a ledger that was cut or rewritten has no such proof",
    )
