"""The history of a budget keeps every step, in order, however many runs take turns."""

from __future__ import annotations

import random
from collections import Counter

from dpbudget.ledger.entries import Entry, draft
from dpbudget.report.history import MOST_EVENTS, MOST_STRETCHES, History

RUNS = [f"{i:032x}" for i in range(9)]


def lease(run: str, count: int) -> Entry:
    fields = {"run": run, "nonce": "0" * 64, "commitment": "0" * 64, "first": 0, "count": count, "claim": None}
    return Entry(draft("lease", seq=0, prev=bytes(32), **fields))


def note() -> Entry:
    return Entry(draft("note", seq=0, prev=bytes(32), event="checked"))


def reserve() -> Entry:
    return Entry(draft("reserve", seq=0, prev=bytes(32), run=RUNS[0], step=0, count=1))


def seen(entries: list[Entry]) -> History:
    history = History()
    for entry in entries:
        history.see(entry)
    return history


def test_leases_that_follow_each_other_are_one_stretch() -> None:
    history = seen([lease(RUNS[0], 3), reserve(), lease(RUNS[0], 4), note(), lease(RUNS[0], 5), lease(RUNS[1], 6)])
    found = [(part.first, part.last, part.steps) for part in history.spending()]
    assert found == [(0, 2, {RUNS[0]: 7}), (4, 4, {RUNS[0]: 5}), (5, 5, {RUNS[1]: 6})]
    assert [(event.record, event.kind, event.about) for event in history.events] == [(3, "note", "checked")]


def test_runs_that_take_turns_for_long_are_merged_without_losing_a_step() -> None:
    chance = random.Random(1)
    spent = [(chance.choice(RUNS), chance.randint(1, 9)) for _ in range(20_000)]
    entries = [lease(run, count) for run, count in spent]
    entries.insert(7000, note())
    history = seen(entries)
    found = history.spending()
    assert len(found) <= MOST_STRETCHES
    total: Counter[str] = Counter()
    for part in found:
        total.update(part.steps)
    truth: Counter[str] = Counter()
    for run, count in spent:
        truth[run] += count
    assert total == truth
    assert [part.first for part in found] == sorted(part.first for part in found)
    # Nothing is merged across the note.
    assert not [part for part in found if part.first < 7000 < part.last]


def test_single_events_beyond_the_most_are_counted() -> None:
    history = seen([note()] * (MOST_EVENTS + 5))
    assert (len(history.events), history.unheard) == (MOST_EVENTS, 5)
