"""Runs whose noise key is committed: fixed before the run, mixed with an auditor's entropy, and good for a replay.

Three things happen in this order, and the ledger shows that they did: the writer commits to a plan key; the auditor,
who has seen the head with that commitment, gives 32 bytes; the run takes its first lease. The noise of every step
follows from the two, so that nobody can try keys or steps until the noise suits them: a step is charged before it is
seen.

The price is that **a copy of ledger and key file repeats the noise**, and the difference of two releases with one noise
has none. Such a run starts only under an outside anchor (:func:`ready_to_start`); what that shows and what it does not
is in docs/threat-model.md.
"""

from __future__ import annotations

import re
import weakref
from functools import partial

from dpbudget.errors import InvalidParameter, StorageFailed, Unanchored
from dpbudget.ledger.journal import Draft, Journal
from dpbudget.ledger.noise_keys import Lifetime
from dpbudget.ledger.plan_key import PlanKey, RunKey
from dpbudget.ledger.rules import Machine
from dpbudget.ledger.sealed import SealedKeys
from dpbudget.ledger.state import LedgerState, RunState

_HEAD = re.compile(r"([1-9][0-9]{0,15}):([0-9a-f]{64})")


def commit_run(journal: Journal, run_id: str, key: PlanKey, keep_keys: SealedKeys | None) -> None:
    """Commit a run to its plan key, which is sealed to the auditor first where that was asked for.

    Raises:
        InvalidParameter: no such run (DP081), or it has a commitment or charged steps (DP084).
        StorageFailed: the commitment, or the sealed key, could not be made durable (DP075).
    """
    journal.guard()
    commitment = key.commitment
    _check_fresh(_run(_refreshed(journal), run_id))
    if keep_keys is not None:
        keep_keys.prepare()
        ledger = journal.state.genesis.ledger_id
        keep_keys.keep("plan-key", ledger=ledger, run=run_id, commitment=commitment, key=key.reveal())
    journal.transact(partial(_write_commit, run_id, commitment))


def check_commit(state: LedgerState, run_id: str) -> None:
    """Refuse a run that cannot be committed, before a key is made for it (DP081, DP084)."""
    _check_fresh(_run(state, run_id))


def _write_commit(run_id: str, commitment: str, draft: Draft) -> None:
    _check_fresh(_run(draft.state, run_id))
    if any(run.commitment == commitment for run in draft.state.runs.values()):
        raise InvalidParameter(
            "another run of this ledger has this plan key", code="DP084", hint="make a key of its own for every run"
        )
    draft.add("commit", run=run_id, commitment=commitment)


def give_entropy(journal: Journal, run_id: str, value: str) -> None:
    """Write the auditor's entropy, 64 hexadecimal digits, after the commitment.

    Raises:
        InvalidParameter: no such run (DP081), no commitment, or entropy already (DP084), or no such digits (DP082).
    """
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise InvalidParameter(
            f"entropy {value[:80]!r} is not 64 lower-case hexadecimal digits",
            code="DP082",
            hint="pass the 32 random bytes of the auditor as digits",
        )
    journal.transact(partial(_write_entropy, run_id, value))


def _write_entropy(run_id: str, value: str, draft: Draft) -> None:
    run = _run(draft.state, run_id)
    if run.commitment is None:
        raise InvalidParameter(
            f"run {run_id} is not committed to a noise key",
            code="DP084",
            hint="commit first (dpbudget ledger commit): entropy that is known before could be chosen against",
        )
    if run.entropy is not None:
        raise InvalidParameter(
            f"run {run_id} has its entropy, {run.entropy}", code="DP084", hint="it is given once; start the run"
        )
    draft.add("entropy", run=run_id, value=value)


def ready_to_start(
    journal: Journal, run_id: str, key: PlanKey | None, expect_head: str | None, keep_keys: SealedKeys | None
) -> RunKey | None:
    """The key of a committed run; None for a run with fresh keys. Everything is checked before anything is charged.

    Args:
        journal: of the open ledger.
        run_id: the run.
        key: its plan key; None for a run with fresh keys.
        expect_head: ``size:root`` of the newest head that the caller knows by another way than the ledger. A committed
            run needs it, from after its entropy, and a high-water mark beside it.
        keep_keys: where fresh keys are kept; a plan key is sealed when it is committed.

    Raises:
        InvalidParameter: something of a committed run is missing or does not fit (DP084), or ``expect_head`` is no head
            (DP082).
        Unanchored: the head is not part of this history (DP079).
        StorageFailed: this machine cannot remember the newest head (DP075).
    """
    if key is None and expect_head is None and journal.state.runs[run_id].commitment is None:
        return None
    run = _refreshed(journal).runs[run_id]
    size = 0 if expect_head is None else _check_head(journal, expect_head)
    if run.commitment is None:
        if key is not None:
            raise InvalidParameter(
                f"run {run_id} has fresh noise keys, and a plan key was given",
                code="DP084",
                hint="leave the plan key out, or commit the run to it first (dpbudget ledger commit)",
            )
        return None
    if keep_keys is not None:
        raise InvalidParameter(
            f"run {run_id} takes all noise from its plan key, and there is no other key to keep",
            code="DP084",
            hint="leave keep_keys out; the plan key is sealed to an auditor when it is committed",
        )
    secret = _secret_of(journal, run, key)
    if size < run.ready:
        given = "none was given" if expect_head is None else f"one of {size} records is from before the entropy"
        raise InvalidParameter(
            f"a copy of run {run_id} would repeat its noise, so it needs an expected head, and {given}",
            code="DP084",
            hint="pass the newest head that you know by another way than this file (--expect-head SIZE:ROOT): the one "
            "that ledger entropy or the last session printed",
        )
    remember_head(journal)
    return secret


def remember_head(journal: Journal) -> None:
    """Make sure that this machine remembers the newest head, so that an older copy would be refused here.

    Raises:
        InvalidParameter: the ledger was opened without marks, or lives in memory (DP084).
        StorageFailed: the mark cannot be kept (DP075).
    """
    marks, head = journal.high_water, journal.head
    if marks is None or head is None:
        raise InvalidParameter(
            "a committed run needs a high-water mark, and this ledger has none",
            code="DP084",
            hint="keep the ledger in a file or a database, and open it with high_water=True",
        )
    ledger_id = journal.state.genesis.ledger_id
    known = marks.known(ledger_id)
    if known is None or known[0] < head.size:
        marks.raise_to(ledger_id, head)
        known = marks.known(ledger_id)
    if known is None or known[0] < head.size:
        raise StorageFailed(
            f"the high-water mark of the ledger cannot be kept in {marks.folder}; nothing was released",
            hint="make that folder writable, or name another one in DPBUDGET_STATE",
        )


def _secret_of(journal: Journal, run: RunState, key: PlanKey | None) -> RunKey:
    if key is None:
        raise InvalidParameter(
            f"run {run.run_id} is committed to a plan key, and none was given",
            code="DP084",
            hint="pass its key file (plan_key=dpbudget.load_plan_key(...), --plan-key FILE)",
        )
    if key.commitment != run.commitment:
        raise InvalidParameter(
            f"the plan key is not the one that run {run.run_id} is committed to",
            code="DP084",
            hint="pass the key file that dpbudget ledger commit wrote for this run",
        )
    if run.entropy is None:
        raise InvalidParameter(
            f"run {run.run_id} has no entropy of an auditor yet",
            code="DP084",
            hint="give the auditor the head with the commitment, and write the answer: dpbudget ledger entropy",
        )
    lifetime = Lifetime()
    journal.keys.setdefault(run.run_id, weakref.WeakSet()).add(lifetime)
    return key.of_run(run.entropy, lifetime)


def _check_head(journal: Journal, expect_head: str) -> int:
    """The size of an expected head, once it was found in the history."""
    match = _HEAD.fullmatch(expect_head.strip())
    if match is None:
        raise InvalidParameter(
            f"expected head {expect_head[:80]!r} is not of the form size:root",
            code="DP082",
            hint="pass the head that dpbudget printed, such as 12:9f86d0…",
        )
    size, root = int(match[1]), match[2]
    if size > journal.state.size:
        raise Unanchored(
            f"the expected head has {size} records and this ledger {journal.state.size}: it is an older copy",
            hint="find the newest copy: what was spent there is missing here; nothing was charged",
        )
    machine = Machine(LedgerState(trust=journal.state.trust), watch=(size,))
    with journal.reading() as reading:
        machine.feed(reading.entries())
    if machine.roots[size].hex() != root:
        raise Unanchored(
            f"the first {size} records do not have the expected root: this is another history",
            hint="find the ledger that the head belongs to; nothing was charged",
        )
    return size


def _refreshed(journal: Journal) -> LedgerState:
    if journal.writer is not None:
        journal.transact(lambda _: None)
    return journal.state


def _run(state: LedgerState, run_id: str) -> RunState:
    if run_id not in state.runs:
        raise InvalidParameter(f"the ledger has no run {run_id[:80]!r}", code="DP081", hint="sign the plan first")
    return state.runs[run_id]


def _check_fresh(run: RunState) -> None:
    if run.commitment is not None:
        raise InvalidParameter(
            f"run {run.run_id} is committed to the noise key {run.commitment}",
            code="DP084",
            hint="it is never replaced; go on with its key file, or sign another plan",
        )
    if run.charged:
        raise InvalidParameter(
            f"{run.charged} steps of run {run.run_id} are charged, with fresh noise keys",
            code="DP084",
            hint="a run commits before its first step; sign another plan",
        )
