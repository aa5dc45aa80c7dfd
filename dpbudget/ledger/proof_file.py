"""Proofs to hand on: a run without the runs of other teams, and one head as the continuation of another.

**Run proof**, lines of canonical JSON, each ended by one line feed, nothing after the last::

    {"head": base64 of the signed note, "ledger": 64 digits, "records": N, "run": 32 digits,
     "type": "dpbudget-run-proof", "v": 1}
    {"envelope": text or null, "line": text, "path": [base64 of a hash, ...]}       N times, ascending by seq

The records shown are genesis, ``renyi``, every ``rekey``, the run's portfolio and plan, its commit and entropy where
there are, its leases and closes, and on demand its reserves and settles; ``path`` is the inclusion proof of the line at
its ``seq`` under the head, from the leaf's sibling upwards. Changing any byte makes the proof invalid. Leaving out a
record at the end does not: nothing here shows that a later record was hidden, so a run proof says "at least these
steps" (:attr:`RunProof.not_proved`).

**Consistency proof**, one line of canonical JSON without a line feed::

    {"new_size": M, "old_size": N, "path": [base64 of a hash, ...], "type": "dpbudget-consistency-proof", "v": 1}
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpbudget._record import decode, encode
from dpbudget.errors import InvalidParameter, Tampered
from dpbudget.ledger.entries import ENVELOPED, MAX_ENVELOPE_BYTES, Entry, kind_of, read
from dpbudget.ledger.head import Head, read_head
from dpbudget.ledger.proofs import (
    MAX_PATH,
    check_consistency,
    consistency_proof,
    inclusion_proofs,
    root_from_inclusion,
)
from dpbudget.ledger.run_proof import RunHistory, RunProof, Shown
from dpbudget.ledger.signing import PublicKey, strict_base64
from dpbudget.ledger.tree import leaf_hash

VERSION = 1
RUN_PROOF, CONSISTENCY_PROOF = "dpbudget-run-proof", "dpbudget-consistency-proof"
#: A million records of a run; what is larger is refused before it is parsed.
MAX_RECORDS, MAX_BYTES = 1_000_000, 1 << 30
_MAX_HEADER_BYTES = 8192
# The envelope and a record of at most 4096 bytes with their quotes escaped, and the path.
_MAX_LINE_BYTES = MAX_ENVELOPE_BYTES + 16384
#: What is shown whatever the run, and what is shown of it.
_COMMON = ("genesis", "renyi", "rekey")
_OF_RUN, _DETAILS = ("plan", "commit", "entropy", "lease", "close"), ("reserve", "settle")


def make_run_proof(entries: Iterable[Entry], note: bytes, run_id: str, *, with_settles: bool = False) -> bytes:
    """The proof of one run, out of a whole verified ledger.

    Args:
        entries: every record, in order.
        note: the signed head that covers exactly them.
        run_id: 32 hexadecimal digits.
        with_settles: show reserves and settles too, so that the noise of released steps can be replayed.

    Raises:
        InvalidParameter: no such run (DP081), or more than a million records to show (DP009).
        Tampered: these are not the records of a ledger, or the head does not cover exactly them.
    """
    leaves: list[bytes] = []
    shown: list[tuple[dict[str, Any], Entry]] = []
    portfolios: dict[int, tuple[dict[str, Any], Entry]] = {}
    kinds = (*_OF_RUN, *_DETAILS) if with_settles else _OF_RUN
    mark = f'"run":"{run_id}"'.encode()
    for entry in entries:
        leaves.append(leaf_hash(entry.line))
        kind = kind_of(entry.line)
        if kind == "portfolio":
            record = read(entry.line)
            portfolios[record["index"]] = record, entry
        elif kind in _COMMON or (kind in kinds and mark in entry.line):
            shown.append((read(entry.line), entry))
    plan = next((record for record, _ in shown if record["type"] == "plan"), None)
    if plan is None:
        raise InvalidParameter(f"the ledger has no run {run_id[:80]!r}", code="DP081", hint="see dpbudget ledger show")
    if plan["portfolio"] in portfolios:
        shown.append(portfolios[plan["portfolio"]])
    if len(shown) > MAX_RECORDS:
        raise InvalidParameter(f"run {run_id} has {len(shown)} records to show", hint="leave out the settles")
    shown.sort(key=lambda item: int(item[0]["seq"]))
    paths = inclusion_proofs(leaves, [record["seq"] for record, _ in shown])
    lines = [_record_line(entry, path) for (_, entry), path in zip(shown, paths, strict=True)]
    proof = b"".join((_header_line(leaves[0].hex(), note, run_id, len(lines)), *lines))
    # Nobody should be handed a proof that does not hold: the head of another size, or records that were not verified.
    check_run_proof(proof, PublicKey.from_hex(shown[0][0].get("owner", "")))
    return proof


def _header_line(ledger_id: str, note: bytes, run_id: str, count: int) -> bytes:
    facts = {"head": _base64(note), "ledger": ledger_id, "records": count, "run": run_id}
    return encode({**facts, "type": RUN_PROOF, "v": VERSION}) + b"\n"


def _record_line(entry: Entry, path: Sequence[bytes]) -> bytes:
    envelope = None if entry.envelope is None else entry.envelope.decode("ascii")
    return encode({"envelope": envelope, "line": entry.line.decode("ascii"), "path": list(map(_base64, path))}) + b"\n"


def check_run_proof(data: bytes, trust: PublicKey) -> RunProof:
    """What a run proof shows to someone who trusts the owner's key ``trust``; nothing of the ledger is needed.

    The trusted key must have signed genesis or this run's plan, the two records that name their ledger. A key that came
    into the role by a rekey vouches for the plans that it signed, and in a whole ledger for all before it.

    Raises:
        Tampered: not a run proof (DP082), another owner's (DP072), or a hash, a signature or a rule of the run does not
            hold (DP071).
    """
    if len(data) > MAX_BYTES or not data.endswith(b"\n") or data.count(b"\n") > MAX_RECORDS + 1:
        raise Tampered("not a run proof, or too large for one", code="DP082")
    first, *rest = data[:-1].split(b"\n")
    header = decode(first, max_bytes=_MAX_HEADER_BYTES, max_depth=1)
    _check_fields(header, {"head": str, "ledger": str, "records": int, "run": str, "type": str, "v": int})
    _check_type(header, RUN_PROOF)
    if header["records"] != len(rest):
        raise Tampered(f"a run proof of {header['records']} records with {len(rest)}")
    shown = [_shown(line) for line in rest]
    run = RunHistory(header["ledger"], header["run"])
    for item in shown:
        run.feed(item)
    # The newest writer's key is known only after the rekeys, and it signs the head that vouches for every record.
    head = read_head(strict_base64(header["head"]), header["ledger"], run.writer)
    for item in shown:
        root = root_from_inclusion(leaf_hash(item.line), item.record["seq"], head.size, item.path)
        if root.hex() != head.root:
            raise Tampered(f"record {item.record['seq']} is not part of the history under the head {head}")
    return run.conclude(head, trust)


def _shown(data: bytes) -> Shown:
    value = decode(data, max_bytes=_MAX_LINE_BYTES, max_depth=2)
    _check_fields(value, {"envelope": str | None, "line": str, "path": list})
    line, envelope = value["line"].encode("ascii"), value["envelope"]
    record = read(line)
    if (envelope is not None) != (record["type"] in ENVELOPED):
        raise Tampered(f"{record['type']} with a missing or a superfluous envelope")
    return Shown(record, line, None if envelope is None else envelope.encode("ascii"), _path(value["path"]))


def make_consistency_proof(entries: Iterable[Entry], old_size: int) -> bytes:
    """The proof that the head of all ``entries`` continues the head of the first ``old_size``.

    Raises:
        InvalidParameter: ``old_size`` is not in [0, number of entries] (DP009).
    """
    leaves = [leaf_hash(entry.line) for entry in entries]
    path = list(map(_base64, consistency_proof(leaves, old_size, len(leaves))))
    facts = {"new_size": len(leaves), "old_size": old_size, "path": path}
    return encode({**facts, "type": CONSISTENCY_PROOF, "v": VERSION})


def check_consistency_proof(data: bytes, old: Head, new: Head) -> None:
    """Check that the history under ``new`` begins with the whole history under ``old``.

    Both heads come from :func:`read_head` or :func:`read_checkpoint` of one ledger and its writer.

    Raises:
        Tampered: not a consistency proof (DP082), one for other sizes, or one that does not lead to both roots (DP071).
    """
    value = decode(data, max_bytes=_MAX_HEADER_BYTES, max_depth=2)
    _check_fields(value, {"new_size": int, "old_size": int, "path": list, "type": str, "v": int})
    _check_type(value, CONSISTENCY_PROOF)
    if (value["old_size"], value["new_size"]) != (old.size, new.size):
        raise Tampered(f"a proof from {value['old_size']} to {value['new_size']} records for {old.size} and {new.size}")
    roots = bytes.fromhex(old.root), bytes.fromhex(new.root)
    check_consistency(old.size, roots[0], new.size, roots[1], _path(value["path"]))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _path(items: Sequence[object]) -> tuple[bytes, ...]:
    if len(items) > MAX_PATH + 1:
        raise Tampered("a Merkle proof is a short list of hashes", code="DP082")
    return tuple(map(strict_base64, items))


def _check_fields(value: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    right = set(value) == set(types) and all(isinstance(value[name], kind) for name, kind in types.items())
    if not right or any(isinstance(item, bool) for item in value.values()):
        raise Tampered(f"a proof has other fields than {', '.join(sorted(types))}", code="DP082")


def _check_type(value: Mapping[str, Any], kind: str) -> None:
    if (value["type"], value["v"]) != (kind, VERSION):
        raise Tampered(f"not a {kind} of version {VERSION}", code="DP082")
