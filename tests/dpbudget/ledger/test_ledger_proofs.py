"""Inclusion and consistency proofs against the recursive definitions of RFC 9162 and the vectors of CT."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymerkle import ConsistencyProof, InclusionProof, InmemoryTree
from test_ledger_tree import LEAVES, ROOTS

from dpbudget.errors import InvalidParameter, Tampered
from dpbudget.ledger.proofs import (
    check_consistency,
    consistency_proof,
    inclusion_proof,
    inclusion_proofs,
    root_from_inclusion,
)
from dpbudget.ledger.tree import EMPTY_ROOT, Frontier, leaf_hash

# --- RFC 9162 section 2.1, word by word: over the entries D[0] to D[n-1], not over hashes -----------------------------

Entries = Sequence[bytes]


def split_of(n: int) -> int:
    """The largest power of two smaller than n (k < n <= 2k)."""
    k = 1
    while 2 * k < n:
        k *= 2
    return k


def mth(d: Entries) -> bytes:
    """Section 2.1.1."""
    if not d:
        return hashlib.sha256().digest()
    if len(d) == 1:
        return hashlib.sha256(b"\x00" + d[0]).digest()
    k = split_of(len(d))
    return hashlib.sha256(b"\x01" + mth(d[:k]) + mth(d[k:])).digest()


def path(m: int, d: Entries) -> list[bytes]:
    """Section 2.1.3.1."""
    if len(d) == 1:
        return []
    k = split_of(len(d))
    if m < k:
        return [*path(m, d[:k]), mth(d[k:])]
    return [*path(m - k, d[k:]), mth(d[:k])]


def subproof(m: int, d: Entries, b: bool) -> list[bytes]:
    """Section 2.1.4.1."""
    if m == len(d):
        return [] if b else [mth(d)]
    k = split_of(len(d))
    if m <= k:
        return [*subproof(m, d[:k], b), mth(d[k:])]
    return [*subproof(m - k, d[k:], False), mth(d[:k])]


def entries_of(count: int) -> list[bytes]:
    return [b"entry %d" % at for at in range(count)]


def hashes_of(lines: Entries) -> list[bytes]:
    return [leaf_hash(line) for line in lines]


@pytest.mark.parametrize("size", [*range(1, 20), 31, 32, 33, 63, 65, 100])
def test_every_inclusion_proof_is_that_of_the_definition(size: int) -> None:
    lines = entries_of(size)
    leaves, root = hashes_of(lines), mth(lines)
    batch = list(inclusion_proofs(leaves, range(size)))
    for index in range(size):
        assert list(batch[index]) == path(index, lines)
        assert inclusion_proof([*leaves, b"later"], index, size) == batch[index]
        assert root_from_inclusion(leaves[index], index, size, batch[index]) == root


@pytest.mark.parametrize("size", [*range(1, 20), 31, 32, 33, 63, 65])
def test_every_consistency_proof_is_that_of_the_definition(size: int) -> None:
    lines = entries_of(size)
    leaves = hashes_of(lines)
    for old in range(1, size + 1):
        proof = consistency_proof(leaves, old, size)
        assert list(proof) == subproof(old, lines, True)
        check_consistency(old, mth(lines[:old]), size, mth(lines), proof)


# The reference proofs of the certificate-transparency project for its eight leaves: (index, size) and (old, size).
NODES = {
    name: bytes.fromhex(name)
    for name in (
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "b08693ec2e721597130641e8211e7eedccb4c26413963eee6c1e2ed16ffb1a5f",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    )
}


def nodes(*prefixes: str) -> tuple[bytes, ...]:
    return tuple(next(node for name, node in NODES.items() if name.startswith(prefix)) for prefix in prefixes)


INCLUSION = [
    ((0, 1), nodes()),
    ((0, 8), nodes("96a2", "5f08", "6b47")),
    ((5, 8), nodes("bc1a", "ca85", "d37e")),
    ((2, 3), nodes("fac5")),
    ((1, 5), nodes("6e34", "5f08", "bc1a")),
]
CONSISTENCY = [
    ((1, 1), nodes()),
    ((1, 8), nodes("96a2", "5f08", "6b47")),
    ((6, 8), nodes("0ebc", "ca85", "d37e")),
    ((2, 5), nodes("5f08", "bc1a")),
    ((6, 7), nodes("0ebc", "b086", "d37e")),
    ((2, 8), nodes("5f08", "6b47")),
]


@pytest.mark.parametrize(("where", "proof"), INCLUSION)
def test_the_inclusion_proofs_of_certificate_transparency_hold(where: tuple[int, int], proof: tuple[bytes]) -> None:
    index, size = where
    leaves = hashes_of(LEAVES)
    assert inclusion_proof(leaves, index, size) == proof
    assert root_from_inclusion(leaves[index], index, size, proof).hex() == ROOTS[size - 1]


@pytest.mark.parametrize(("sizes", "proof"), CONSISTENCY)
def test_the_consistency_proofs_of_certificate_transparency_hold(sizes: tuple[int, int], proof: tuple[bytes]) -> None:
    old, size = sizes
    assert consistency_proof(hashes_of(LEAVES), old, size) == proof
    check_consistency(old, bytes.fromhex(ROOTS[old - 1]), size, bytes.fromhex(ROOTS[size - 1]), proof)


# --- pymerkle: another implementation of the same trees ---------------------------------------------------------------


LINES = st.lists(st.binary(max_size=8), min_size=1, max_size=70)


@settings(deadline=None, max_examples=40)
@given(LINES, st.data())
def test_pymerkle_has_the_same_roots_and_inclusion_proofs(lines: list[bytes], data: st.DataObject) -> None:
    tree, leaves, size = InmemoryTree(algorithm="sha256"), hashes_of(lines), len(lines)
    tree.append_entries(lines)
    index = data.draw(st.integers(0, size - 1))
    # pymerkle counts leaves from 1 and puts the leaf itself before its path.
    theirs: InclusionProof = tree.prove_inclusion(index + 1, size)
    assert theirs.path == [leaves[index], *inclusion_proof(leaves, index, size)]
    assert root_from_inclusion(leaves[index], index, size, theirs.path[1:]) == tree.get_root(size) == mth(lines)


@settings(deadline=None, max_examples=40)
@given(LINES, st.data())
def test_pymerkle_proves_consistency_between_the_same_roots(lines: list[bytes], data: st.DataObject) -> None:
    tree, leaves, size = InmemoryTree(algorithm="sha256"), hashes_of(lines), len(lines)
    tree.append_entries(lines)
    old = data.draw(st.integers(1, size))
    ours = mth(lines[:old]), mth(lines)
    check_consistency(old, ours[0], size, ours[1], consistency_proof(leaves, old, size))
    # pymerkle cuts the grown tree where RFC 9162 does not (m < k for m <= k), so that its paths are others.
    theirs: ConsistencyProof = tree.prove_consistency(old, size)
    theirs.verify(*ours, prior_size=old, later_size=size)
    assert (tree.get_root(old), tree.get_root(size)) == ours


# --- what must be refused ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 70), st.data())
def test_an_inclusion_proof_holds_for_its_place_alone(size: int, data: st.DataObject) -> None:
    lines = entries_of(size)
    leaves, root = hashes_of(lines), mth(lines)
    index = data.draw(st.integers(0, size - 1))
    proof = inclusion_proof(leaves, index, size)
    other = data.draw(st.integers(0, size - 1).filter(lambda at: at != index) if size > 1 else st.just(0))
    if size > 1:
        assert not leads_to(root, leaves[index], other, size, proof)
        assert not leads_to(root, leaves[other], index, size, proof)
        at = data.draw(st.integers(0, len(proof) - 1))
        flipped = bytes([proof[at][0] ^ 1]) + proof[at][1:]
        assert not leads_to(root, leaves[index], index, size, (*proof[:at], flipped, *proof[at + 1 :]))
        assert not leads_to(root, leaves[index], index, size, (*proof[:at], *proof[at + 1 :]))
        assert not leads_to(root, leaves[index], index, size, proof[::-1]) or proof == proof[::-1]
    assert not leads_to(root, leaves[index], index, size, (*proof, root))


def leads_to(root: bytes, leaf: bytes, index: int, size: int, proof: Sequence[bytes]) -> bool:
    try:
        return root_from_inclusion(leaf, index, size, proof) == root
    except Tampered:
        return False


@settings(deadline=None)
@given(st.integers(2, 70), st.data())
def test_a_bent_consistency_proof_is_refused(size: int, data: st.DataObject) -> None:
    lines = entries_of(size)
    leaves, root = hashes_of(lines), mth(lines)
    old = data.draw(st.integers(1, size - 1))
    proof, old_root = consistency_proof(leaves, old, size), mth(lines[:old])
    at = data.draw(st.integers(0, len(proof) - 1))
    flipped = bytes([proof[at][0] ^ 1]) + proof[at][1:]
    bent = [
        (old, old_root, size, root, (*proof[:at], flipped, *proof[at + 1 :])),
        (old, old_root, size, root, (*proof[:at], *proof[at + 1 :])),
        (old, old_root, size, root, (*proof, root)),
        (old, old_root, size, root, ()),
        (old, mth(lines[: old - 1]), size, root, proof),
        (old, old_root, size, old_root, proof),
        (old, old_root, old, root, proof),
        (size, root, old, old_root, proof),
        (0, old_root, size, root, ()),
    ]
    for case in bent:
        with pytest.raises(Tampered) as caught:
            check_consistency(*case)
        assert caught.value.code == "DP071"


def test_a_rewritten_history_has_no_consistency_proof() -> None:
    lines = entries_of(20)
    changed = [*lines[:7], b"changed", *lines[8:]]
    for old in range(8, 20):
        proof = consistency_proof(hashes_of(changed), old, 20)
        with pytest.raises(Tampered, match="continue"):
            check_consistency(old, mth(lines[:old]), 20, mth(changed), proof)


def test_every_tree_continues_the_empty_one_and_itself() -> None:
    leaves = hashes_of(entries_of(5))
    for size in range(6):
        assert consistency_proof(leaves, 0, size) == consistency_proof(leaves, size, size) == ()
        root = mth(entries_of(size))
        check_consistency(0, EMPTY_ROOT, size, root, ())
        check_consistency(size, root, size, root, ())
    for bad in ((0, bytes(32), 3, bytes(32)), (0, EMPTY_ROOT, 0, bytes(32)), (2, bytes(32), 2, EMPTY_ROOT)):
        with pytest.raises(Tampered):
            check_consistency(*bad, ())
    with pytest.raises(Tampered):
        check_consistency(3, root, 3, root, (root,))


@pytest.mark.parametrize(
    "call",
    [
        lambda: inclusion_proof([bytes(32)] * 3, 3, 3),
        lambda: inclusion_proof([bytes(32)] * 3, -1, 3),
        lambda: inclusion_proof([bytes(32)] * 3, 0, 4),
        lambda: inclusion_proof([], 0, 0),
        lambda: inclusion_proof([bytes(32)], False, 1),
        lambda: list(inclusion_proofs([bytes(32)] * 2, [0, 2])),
        lambda: consistency_proof([bytes(32)] * 3, 2, 4),
        lambda: consistency_proof([bytes(32)] * 3, 3, 2),
        lambda: consistency_proof([bytes(32)] * 3, -1, 2),
        lambda: consistency_proof([bytes(32)] * 3, True, 2),
    ],
)
def test_proofs_of_what_does_not_exist_are_not_made(call: Callable[[], object]) -> None:
    with pytest.raises(InvalidParameter):
        call()


@pytest.mark.parametrize(
    ("leaf", "index", "size", "proof"),
    [
        (bytes(32), 0, 0, ()),
        (bytes(32), 1, 1, ()),
        (bytes(32), -1, 1, ()),
        (bytes(32), True, 2, (bytes(32),)),
        (bytes(32), 0, 2**53, ()),
        (bytes(31), 0, 1, ()),
        (bytes(32), 0, 2, (bytes(33),)),
        (bytes(32), 0, 2**53 - 1, (bytes(32),) * 1000),
    ],
)
def test_an_inclusion_proof_out_of_range_is_refused(leaf: bytes, index: int, size: int, proof: Sequence[bytes]) -> None:
    with pytest.raises(Tampered) as caught:
        root_from_inclusion(leaf, index, size, proof)
    assert caught.value.code == "DP071"


def test_a_hundred_thousand_proofs_hash_the_tree_once() -> None:
    leaves = [at.to_bytes(32, "big") for at in range(100_000)]
    tree = Frontier()
    for leaf in leaves:
        tree = tree.append(leaf)
    begin = time.process_time()
    proofs = list(inclusion_proofs(leaves, range(len(leaves))))
    assert time.process_time() - begin < 10  # about a second; room for a busy machine
    for index in range(0, len(leaves), 997):
        assert root_from_inclusion(leaves[index], index, len(leaves), proofs[index]) == tree.root
