"""Verification by a third party: replay every record, recompute every number, compare, report.

Reads records only, writes nothing and needs no torch. What stands in the file is believed as far as it follows from the
records before it and from the owner's signature; every epsilon is computed again, by the accountant that the plan names
and by another one.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dpbudget._recompute import Clock, Recomputation, spent
from dpbudget._schedule import delta_warning
from dpbudget._verdict import Report, RunReport
from dpbudget.accountants import ACCOUNTANTS, get_accountant
from dpbudget.errors import InvalidParameter, Tampered
from dpbudget.ledger.entries import Entry
from dpbudget.ledger.head import Head, check_cosignature, read_checkpoint
from dpbudget.ledger.journal import begin, check_kept_heads, conclude
from dpbudget.ledger.rules import Machine
from dpbudget.ledger.signing import PublicKey
from dpbudget.ledger.state import LedgerState
from dpbudget.ledger.store.locate import Location, reading_at

__all__ = ["Report", "RunReport", "verify"]

#: What a file that nobody vouches for may take, so that a hostile one cannot keep a verifier busy.
UNTRUSTED_SECONDS = 6.0
#: A ledger keeps at most one head a record.
MAX_HEADS = 1_000_000
_ANCHOR = re.compile(r"([1-9][0-9]{0,15}):([0-9a-f]{64})")


def verify(
    location: Location,
    *,
    trust: PublicKey | None = None,
    expect_head: str | Sequence[str] | None = None,
    checkpoints: Sequence[bytes] = (),
    witnesses: Sequence[str] = (),
    all_heads: bool = False,
    time_limit: float | None = None,
) -> Report:
    """Verify a ledger or an export.

    Args:
        location: a ledger file, an export, or ``postgresql://...#name``; nothing is ever written to it.
        trust: the owner's public key, got by another way than this file. Without it the report says so: a key found
            inside the file proves nothing.
        expect_head: ``size:root`` of heads that were seen before; each must be part of this history. A cut tail or a
            rewritten history can be seen in no other way.
        checkpoints: signed notes of heads that were kept (``Ledger.head.note``), perhaps with cosignatures; each must
            be the writer's and part of this history.
        witnesses: verifier keys (name+hash+base64) of C2SP witnesses; each must have cosigned one of ``checkpoints``.
        all_heads: check the signature and place of every head that the store kept, not the newest alone.
        time_limit: seconds; what is not recomputed by then is reported as a problem. The default is no limit for a
            ledger of the trusted owner (from the rekey on that brought its key in), and 6 s for any other.

    Returns:
        The report; a ledger that does not hold is reported, not raised.

    Raises:
        Unreadable: missing or no ledger at all (DP070), or unsafe to read (DP083).
        InvalidParameter: ``expect_head`` is not of the form ``size:root`` or a checkpoint is no note (DP082), a witness
            without a checkpoint (DP064), or ``trust`` is no key (DP072).
    """
    if trust is not None and not isinstance(trust, PublicKey):
        raise InvalidParameter(
            f"trust is {trust!r:.80}, not a public key",
            code="DP072",
            hint="pass trust=dpbudget.load_public_key(FILE) with the owner's .pub file",
        )
    if not isinstance(location, str | os.PathLike):
        raise InvalidParameter(
            f"location is a {type(location).__name__}, not the place of a ledger",
            code="DP060",
            hint="verify what everybody sees: pass the path; a ledger in memory is exported first",
        )
    if witnesses and not checkpoints:
        raise InvalidParameter(
            "a witness cosigns a checkpoint, and none was given", code="DP064", hint="pass the checkpoint's file too"
        )
    return examine(location, trust, expect_head, checkpoints, witnesses, all_heads, time_limit).report


@dataclass(frozen=True)
class Examination:
    """A verdict, and what it was reached from.

    Attributes:
        report: the verdict.
        state: what follows from the records; None where they do not even hold together.
        clock: the time that was allowed, and is still running.
    """

    report: Report
    state: LedgerState | None
    clock: Clock


def examine(
    location: Location,
    trust: PublicKey | None = None,
    expect_head: str | Sequence[str] | None = None,
    checkpoints: Sequence[bytes] = (),
    witnesses: Sequence[str] = (),
    all_heads: bool = False,
    time_limit: float | None = None,
    *,
    see: Callable[[Entry], None] | None = None,
) -> Examination:
    """:func:`verify`, for those who tell more of a ledger than the verdict; ``see`` is shown every record in order.

    What was seen is worth something only when the verdict is reached: a record is seen before its rules are checked.
    """
    anchors = [*parse_anchors(expect_head), *map(anchor_of, checkpoints)]
    clock = Clock(UNTRUSTED_SECONDS if time_limit is None else time_limit)
    try:
        history = _replay(location, trust, anchors, all_heads, time_limit, see)
    except Tampered as error:
        return Examination(Report(ok=False, problems=(str(error),), trusted=trust is not None), None, clock)
    report = _judge(history, anchors, _check_notes(history.state, checkpoints, witnesses))
    return Examination(report, history.state, history.clock)


@dataclass(frozen=True)
class _History:
    """What a replay leaves to judge."""

    state: LedgerState
    head: Head
    roots: Mapping[int, bytes]
    kept: int | None
    clock: Clock


def _replay(
    location: Location,
    trust: PublicKey | None,
    anchors: Sequence[tuple[int, str]],
    all_heads: bool,
    time_limit: float | None,
    see: Callable[[Entry], None] | None,
) -> _History:
    with reading_at(location) as reading:
        _, owner, entries = begin(reading)
        vouched = trust is not None and owner == trust.hex
        limited = time_limit is None and not vouched
        clock = Clock(UNTRUSTED_SECONDS if limited else time_limit)
        watch = {size for size, _ in anchors}
        if all_heads:
            watch |= {_size_of(note) for note in _some(clock, reading.heads())}
        machine = Machine(LedgerState(trust=trust), watch=watch, remember=True)
        timed = _within(clock, entries, machine, limited=limited)
        machine.feed(timed if see is None else _seen(timed, see))
        if limited and machine.trusted:
            clock.lift()
        state, head = conclude(machine, reading.newest())
        kept = None
        if all_heads:
            roots = {**machine.roots, state.size: state.tree.root}
            kept = check_kept_heads(_some(clock, reading.heads()), state, roots)
    return _History(state, head, machine.roots, kept, clock)


def _some(clock: Clock, heads: Iterator[bytes]) -> Iterator[bytes]:
    """The kept heads, while there is time and as long as there can be so many."""
    for count, note in enumerate(heads):
        if count == MAX_HEADS or (not count & 63 and clock.over):
            raise Tampered(
                f"after {count} of the heads that the store kept there is no room or no time for more",
                hint="leave --all-heads out, or give more time (--time-limit)",
            )
        yield note


def _more_time(trust: PublicKey | None) -> str:
    if trust is None:
        return "give the owner's key (--trust), or more time (--time-limit)"
    return (
        "the trusted key is not the one that the ledger began with: if it came into the role later, give more time "
        "(--time-limit), or the first owner's key"
    )


def _within(clock: Clock, entries: Iterator[Entry], machine: Machine, *, limited: bool) -> Iterator[Entry]:
    """The entries while there is time; a trusted key that came into the role meanwhile vouches for all of them."""
    trust = machine.trust
    for index, entry in enumerate(entries):
        # What the owner signs may be a megabyte each.
        asked = entry.envelope is not None or not index & 63
        if asked and clock.over and not (limited and machine.trusted):
            raise Tampered(f"after {clock.seconds:g} s only {index} records were read", hint=_more_time(trust))
        yield entry


def _seen(entries: Iterator[Entry], see: Callable[[Entry], None]) -> Iterator[Entry]:
    for entry in entries:
        see(entry)
        yield entry


def _size_of(note: bytes) -> int:
    """The size that a kept head names, before its signature is looked at."""
    lines = note.split(b"\n", 2)
    return int(lines[1]) if len(lines) == 3 and lines[1].isdigit() and len(lines[1]) <= 16 else 0


def _judge(history: _History, anchors: Sequence[tuple[int, str]], forged: Sequence[str]) -> Report:
    state, head = history.state, history.head
    found = Recomputation(state, history.clock).run()
    missed = [*forged, *(problem for anchor in anchors if (problem := _missed(anchor, history)))]
    met = tuple(f"{size}:{root}" for size, root in anchors if not _missed((size, root), history))
    epsilon, delta = spent(state, history.clock)
    return Report(
        ok=not found.problems and not missed,
        problems=(*found.problems, *missed),
        warnings=(*_warnings(state, delta, anchored=bool(anchors)), *found.warnings),
        epsilon=None if found.problems else epsilon,  # a refuted claim is no upper bound
        delta=delta,
        budget=(state.epsilon, state.delta),
        filter=state.genesis.filter,
        adjacency=str(state.genesis.adjacency),
        unit=state.genesis.unit,
        steps=sum(run.charged for run in state.runs.values()),
        head=str(head),
        ledger_id=state.genesis.ledger_id,
        trusted=state.trusted,
        anchored=bool(met) and not missed,
        anchors=met,
        heads=history.kept,
        runs=tuple(
            RunReport(
                run.run_id,
                (run.plan.claim.epsilon, run.plan.claim.delta),
                run.plan.steps,
                run.charged,
                run.reserved,
                run.plan.noise,
                run.commitment,
                run.entropy,
            )
            for run in state.runs.values()
        ),
        checked_by=tuple(ACCOUNTANTS),
        _unanchored=not found.problems and bool(missed),
    )


def parse_anchors(expect_head: str | Sequence[str] | None) -> list[tuple[int, str]]:
    """Size and root of heads in the form ``size:root``.

    Raises:
        InvalidParameter: another form (DP082).
    """
    texts = [expect_head] if isinstance(expect_head, str) else list(expect_head or ())
    anchors = []
    for text in texts:
        match = _ANCHOR.fullmatch(text.strip())
        if match is None:
            raise InvalidParameter(
                f"expected head {text[:80]!r} is not of the form size:root",
                code="DP082",
                hint="pass the head that dpbudget printed, such as 12:9f86d0…",
            )
        anchors.append((int(match[1]), match[2]))
    return anchors


def anchor_of(note: bytes) -> tuple[int, str]:
    """Size and root that a checkpoint names, before its signature is looked at."""
    lines = note.split(b"\n", 3)
    size = _size_of(note)
    try:
        root = base64.b64decode(lines[2], validate=True) if len(lines) == 4 else b""
    except ValueError:
        root = b""
    if not size or len(root) != 32:
        raise InvalidParameter(
            "the checkpoint is not a signed note of a ledger's head",
            code="DP082",
            hint="pass the file that dpbudget ledger head --output wrote, or size:root",
        )
    return size, root.hex()


def _check_notes(state: LedgerState, checkpoints: Sequence[bytes], witnesses: Sequence[str]) -> list[str]:
    """What is wrong with the signatures of checkpoints and with the cosignatures that were demanded."""
    problems = []
    for note in checkpoints:
        failed = [error for writer in state.writers if (error := _refusal(read_checkpoint, note, state, writer))]
        if len(failed) == len(state.writers):
            problems.append(f"a checkpoint is not this ledger's: {failed[-1]}")
    for witness in witnesses:
        failed = [error for note in checkpoints if (error := _refusal(check_cosignature, note, witness))]
        if len(failed) == len(checkpoints):
            problems.append(f"no checkpoint carries the cosignature of {witness[:60]}: {failed[-1]}")
    return problems


def _refusal(check: Callable[..., object], note: bytes, *facts: object) -> str | None:
    arguments = (facts[0].genesis.ledger_id, *facts[1:]) if isinstance(facts[0], LedgerState) else facts
    try:
        check(note, *arguments)
    except Tampered as error:
        return error.message
    return None


def _missed(anchor: tuple[int, str], history: _History) -> str | None:
    """Why an outside head is not part of this history; None when it is."""
    size, root = anchor
    if size > history.state.size:
        return (
            f"the expected head has {size} records and this ledger {history.state.size}: its tail was cut, "
            "or it is older"
        )
    if history.roots[size].hex() != root:
        return f"the first {size} records do not have the expected root: this is another history"
    return None


def _warnings(state: LedgerState, delta: float, *, anchored: bool) -> list[str]:
    found = []
    if not state.trusted:
        found.append("the owner's key was taken from the file itself, which proves nothing; pass the trusted key")
    if not anchored:
        found.append("unanchored: a cut tail or a re-signed history cannot be seen without an expected head")
    if any(run.commitment is not None for run in state.runs.values()):
        found.append(
            "noise of a committed run follows from its plan key: of two copies that both went on, the difference of "
            "two releases has no noise. Keep every head, and ask that all of them are part of one history"
        )
    for before, after in zip(state.grants, state.grants[1:], strict=False):
        if after.charged and (after.epsilon > before.epsilon or after.delta > before.delta):
            pairs = (("epsilon", before.epsilon, after.epsilon), ("delta", before.delta, after.delta))
            raised = " and ".join(f"{name} {low:.10g} to {high:.10g}" for name, low, high in pairs if high != low)
            found.append(
                f"the owner raised {raised} at record {after.seq}, after {after.charged} steps were charged: what "
                "came before kept its own total, and the new one is a guarantee only if the raise did not depend on "
                "the outputs"
            )
    if (protects_nobody := _delta_against_sizes(state, delta)) is not None:
        found.append(protects_nobody)
    for run in state.runs.values():
        version = get_accountant(run.plan.claim.accountant).version
        if run.plan.claim.accountant_version != version:
            found.append(
                f"run {run.run_id} was planned with version {run.plan.claim.accountant_version} of "
                f"{run.plan.claim.accountant}; this is version {version}"
            )
    return found


def _delta_against_sizes(state: LedgerState, delta: float) -> str | None:
    """DP003 of the plan for which it is worst: its delta, or what all plans together spent, at its public size."""
    pairs = [(max(delta, run.plan.claim.delta), run.plan.nominal_size) for run in state.runs.values()]
    worst = max(pairs, key=lambda pair: pair[0] * (pair[1] or 0), default=None)
    return None if worst is None else delta_warning(*worst)
