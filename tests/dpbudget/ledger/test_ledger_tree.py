"""The Merkle tree against the definition of RFC 6962 and the known vectors of Certificate Transparency."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpbudget.ledger.tree import EMPTY_ROOT, Frontier, leaf_hash


def naive_root(lines: list[bytes]) -> bytes:
    """RFC 6962 section 2.1, word by word."""
    if not lines:
        return hashlib.sha256().digest()
    if len(lines) == 1:
        return hashlib.sha256(b"\x00" + lines[0]).digest()
    split = 1
    while split * 2 < len(lines):
        split *= 2
    return hashlib.sha256(b"\x01" + naive_root(lines[:split]) + naive_root(lines[split:])).digest()


def frontier_of(lines: list[bytes]) -> Frontier:
    tree = Frontier()
    for line in lines:
        tree = tree.append(leaf_hash(line))
    return tree


LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
# The reference roots of the certificate-transparency project for these eight leaves.
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


@pytest.mark.parametrize("count", range(1, 9))
def test_the_roots_are_those_of_certificate_transparency(count: int) -> None:
    assert frontier_of(LEAVES[:count]).root.hex() == ROOTS[count - 1]


def test_the_empty_tree_has_the_hash_of_nothing() -> None:
    assert Frontier().root == EMPTY_ROOT == hashlib.sha256(b"").digest()


@settings(deadline=None)
@given(st.lists(st.binary(max_size=8), max_size=70))
def test_the_frontier_equals_the_recursive_definition(lines: list[bytes]) -> None:
    tree = frontier_of(lines)
    assert tree.root == naive_root(lines)
    assert tree.size == len(lines)
    assert len(tree.peaks) == len(lines).bit_count()


@settings(deadline=None)
@given(st.lists(st.binary(max_size=4), min_size=1, max_size=40), st.data())
def test_changing_one_leaf_changes_the_root(lines: list[bytes], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(lines) - 1))
    changed = [*lines[:at], lines[at] + b"x", *lines[at + 1 :]]
    assert frontier_of(changed).root != frontier_of(lines).root


def test_appending_leaves_the_old_tree_as_it_was() -> None:
    before = frontier_of(LEAVES[:5])
    before.append(leaf_hash(b"more"))
    assert before.root.hex() == ROOTS[4]
