"""Hypothesis strategies for bytes that were nearly right: flipped, cut, doubled, spliced, and ledgers signed again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from dpbudget._record import encode
from dpbudget.ledger.entries import OWNER_SIGNED, Entry, read
from dpbudget.ledger.head import sign_head
from dpbudget.ledger.signing import RECORD_TYPE, Signer, sign_envelope
from dpbudget.ledger.tree import NO_LEAF, Frontier, leaf_hash

_PIECES = [b"", b"0", b"-1", b"9" * 17, b"1e400", b"NaN", b"null", b"true", b"[", b"]", b"{", b"}", b'"', b"\\", b"\n"]
_PIECES += [
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b" ",
    b",",
    b":",
    b"0x1.8p+1",
    b"=",
    b"A" * 64,
    b"==" * 9,
]
_VALUES: list[Any] = [0, 1, -1, 2**53 - 1, 2**62, True, None, "", "x", [], [0], {}, "0x0.0p+0", "0x1.8000000000000p+1"]
_VALUES += ["-0x1.0000000000000p+0", "ff" * 32, "00" * 32, "ab" * 16, "nan", "0x1.fffffffffffffp+1023", ["a"] * 70, 64]


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """A seed after one to four edits: pieces put in or over, ranges cut, doubled, moved or taken from another seed."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        kind = draw(st.integers(0, 5))
        if kind == 0:
            data = data[:at] + draw(st.sampled_from(_PIECES)) + data[at:]
        elif kind == 1:
            data = data[:at] + draw(st.sampled_from(_PIECES)) + data[end:]
        elif kind == 2:
            data = data[:at] + data[end:]
        elif kind == 3:
            data = data[:at] + data[at:end] + data[at:]
        elif kind == 4 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        else:
            other = draw(st.sampled_from(seeds))
            data = data[:at] + other[min(at, len(other)) :]
    return data


@st.composite
def relined(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """A seed with lines dropped, doubled, swapped or taken from another seed."""
    lines = draw(st.sampled_from(seeds)).splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 3))):
        if not lines:
            break
        one, two = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            del lines[one]
        elif kind == 1:
            lines.insert(two, lines[one])
        elif kind == 2:
            lines[one], lines[two] = lines[two], lines[one]
        else:
            lines[one] = draw(st.sampled_from(draw(st.sampled_from(seeds)).splitlines(keepends=True)))
    return b"".join(lines)


@st.composite
def signed_again(draw: st.DrawFn, entries: Sequence[Entry], owner: Signer, writer: Signer) -> tuple[list[Entry], bytes]:
    """A ledger with fields of a few records changed, records dropped or doubled, then chained and signed anew.

    No hash and no signature is wrong any more: only the schema and the rules are left to refuse.
    """
    records = [(json.loads(entry.line), entry.envelope) for entry in entries]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(records) - 1))
        kind = draw(st.integers(0, 4))
        record, envelope = records[at]
        if kind == 0 and len(records) > 1:
            del records[at]
        elif kind == 1:
            records.insert(draw(st.integers(0, len(records))), (dict(record), envelope))
        elif kind == 2:
            other = draw(st.integers(0, len(records) - 1))
            records[at], records[other] = records[other], records[at]
        else:
            name = draw(st.sampled_from(sorted(record)))
            number = record[name]
            near = [number + 1, number - 1, number * 2] if type(number) is int else []
            record = {**record, name: draw(st.sampled_from([*_VALUES, *near]))}
            records[at] = record, envelope
    return chained(records, owner, writer)


def chained(
    records: list[tuple[dict[str, Any], bytes | None]], owner: Signer, writer: Signer
) -> tuple[list[Entry], bytes]:
    made, tree, last = [], Frontier(), NO_LEAF
    for seq, (record, envelope) in enumerate(records):
        fixed = {**record, "seq": seq, "prev": last.hex()}
        line = json.dumps(fixed, sort_keys=True, separators=(",", ":")).encode("ascii")
        if str(fixed.get("type")) in OWNER_SIGNED:
            envelope = sign_envelope(line, RECORD_TYPE, owner)
        made.append(Entry(line, envelope))
        last = leaf_hash(line)
        tree = tree.append(last)
    first = leaf_hash(made[0].line).hex()
    return made, sign_head(first, tree.size, tree.root, writer).note.encode()


__all__ = ["chained", "damaged", "encode", "read", "relined", "signed_again"]
