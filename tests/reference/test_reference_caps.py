"""The size caps of docs/ledger-format.md, one under, at and over each: both verifiers, in bounded time."""

from __future__ import annotations

import base64
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from dpbudget._record import MAX_LINE_BYTES, MAX_STATEMENT_BYTES, decode
from dpbudget.errors import DPBudgetError, Tampered
from dpbudget.ledger.entries import MAX_ENVELOPE_BYTES, MAX_PORTFOLIOS
from dpbudget.ledger.rules import MAX_ALL_COSTS, MAX_ALL_PHASES, MAX_RUNS, Machine
from dpbudget.ledger.signing import Ed25519Signer, open_envelope, sign_envelope
from dpbudget.ledger.state import LedgerState
from dpbudget.ledger.store import jsonl

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "dpbudget" / "ledger")]
import verifier  # noqa: E402
from bothkit import DELTA, EPSILON, HALF, RUN, ZERO, History, canonical, ours, theirs  # noqa: E402
from ledgerkit import OWNER, make_plan  # noqa: E402

PHASE: dict[str, Any] = make_plan().to_jsonable()["phases"][0]
PAGE = (HERE.parents[1] / "docs" / "ledger-format.md").read_text(encoding="utf-8")


def up(value: float) -> float:
    return math.nextafter(value, math.inf)


def down(value: float) -> float:
    return math.nextafter(value, -math.inf)


def both(package: Any, other: Any) -> bool:
    """Whether both readers accept; they must say the same."""
    verdicts = []
    for read in (package, other):
        try:
            read()
            verdicts.append(True)
        except (DPBudgetError, ValueError):
            verdicts.append(False)
    assert verdicts[0] == verdicts[1]
    return verdicts[0]


def test_the_page_states_every_cap_of_the_code() -> None:
    for cap in (MAX_LINE_BYTES, MAX_ENVELOPE_BYTES, MAX_PORTFOLIOS, MAX_RUNS, MAX_ALL_PHASES, MAX_ALL_COSTS):
        assert str(cap) in PAGE
    assert (MAX_STATEMENT_BYTES, jsonl.MAX_EXPORT_BYTES) == (2**20, 2**30)
    assert "2^20 bytes" in PAGE
    assert "2^30 bytes" in PAGE


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_a_line_has_at_most_4096_bytes(over: int) -> None:
    line = canonical({"a": ""})
    line = canonical({"a": "x" * (MAX_LINE_BYTES + over - len(line))})
    assert len(line) == MAX_LINE_BYTES + over
    assert both(lambda: decode(line), lambda: verifier.parse(line)) is (over <= 0)


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_an_envelope_has_at_most_1399128_bytes(over: int) -> None:
    payload = b"x" * (MAX_STATEMENT_BYTES + 1)
    kind = "a" * (MAX_ENVELOPE_BYTES + over - len(sign_envelope(payload, "", OWNER)))
    envelope = sign_envelope(payload, kind, OWNER)
    assert len(envelope) == MAX_ENVELOPE_BYTES + over
    key = OWNER.public
    accepted = both(lambda: open_envelope(envelope, kind, key), lambda: verifier.unseal(envelope, kind, [key.raw]))
    assert accepted is (over <= 0)


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_a_statement_has_at_most_a_mebibyte(over: int) -> None:
    spellings = [(2.0**-at).hex() for at in (1, 10, 100)]  # each one byte longer than the one before

    def ledger(longer: int) -> tuple[History, int]:
        cells = [spellings[2]] * (longer // 2) + [spellings[1]] * (longer % 2)
        cells += [spellings[0]] * (64 * 650 - len(cells))
        rows = [cells[at : at + 64] for at in range(0, len(cells), 64)]
        history = History("rdp").renyi(*[EPSILON] * 64).rdp_plan(*rows, steps=[1] * 650)
        envelope = json.loads(history.entries[-1].envelope or b"")
        return history, len(base64.b64decode(envelope["payload"]))

    _, least = ledger(0)
    history, size = ledger(MAX_STATEMENT_BYTES + over - least)
    assert size == MAX_STATEMENT_BYTES + over
    assert len(history.entries[-1].envelope or b"") <= MAX_ENVELOPE_BYTES
    assert history.holds() is (over <= 0)


def test_an_export_has_at_most_a_gibibyte(monkeypatch: pytest.MonkeyPatch) -> None:
    export = History().export()
    for cap, fine in ((len(export) + 1, True), (len(export), True), (len(export) - 1, False)):
        monkeypatch.setattr(jsonl, "MAX_EXPORT_BYTES", cap)
        assert (ours(export) is not None) is fine

    class Long(bytes):
        def __len__(self) -> int:
            return self.said

    for said, fine in ((2**30 - 1, True), (2**30, True), (2**30 + 1, False)):
        longer = Long(export)
        longer.said = said
        assert (theirs(longer) is not None) is fine


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("orders", "fine"), [(1, True), (63, True), (64, True), (65, False)])
def test_a_ledger_has_at_most_64_orders(orders: int, fine: bool) -> None:
    assert History("rdp").renyi(*[EPSILON] * orders).holds() is fine
    history = History("rdp").renyi(*[EPSILON] * min(orders, 64))
    history.add("budget", OWNER, epsilon=HALF, delta=DELTA, allowances=[HALF] * orders)
    assert history.holds() is fine


def test_64_orders_in_their_longest_spelling_fit_a_line() -> None:
    orders = [1e5]
    while len(orders) < 64:
        orders.append(up(orders[-1]))
    allowances = ["-" + (2.0**-1022).hex()] * 63 + [(2.0**-1022).hex()]
    terms = {"orders": [order.hex() for order in orders], "shares": [10**6] * 64, "allowances": allowances}
    history = History("rdp").add("renyi", OWNER, **terms)
    assert 3900 < len(history.entries[-1].line) <= MAX_LINE_BYTES
    assert history.holds()


@pytest.mark.parametrize(("phases", "fine"), [(0, False), (1, True), (1023, True), (1024, True), (1025, False)])
def test_a_plan_has_at_most_1024_phases(phases: int, fine: bool) -> None:
    assert History().portfolio().plan(phases=[PHASE] * phases).holds() is fine


def test_a_lease_may_hold_every_step_of_the_longest_plan() -> None:
    most = 1024 * 10**9
    history = History().portfolio().plan(steps=[10**9] * 1024).lease(count=most, claim=HALF)
    history.add("reserve", run=RUN, step=0, count=most).add(
        "settle", run=RUN, step=most - 1, fresh="aa" * 16, output=None
    )
    assert history.holds()
    assert not History().portfolio().plan(steps=[10**9] * 1024).lease(count=most + 1, claim=HALF).holds()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("nominal_size", 1, 10**12),
        ("max_parameters", 1, 2**40),
        ("clip_norm", 2.0**-1074, 1e12),
        ("steps", 1, 10**9),
        ("noise_multiplier", 1e-3, 1e6),
        ("accountant_version", 1, 10**6),
        ("claim epsilon", 0.0, None),
    ],
)
def test_every_number_of_a_plan_has_its_range(name: str, low: Any, high: Any) -> None:
    def holds(value: Any) -> bool:
        value = value.hex() if isinstance(value, float) else value
        if name in PHASE:
            return History().portfolio().plan(phases=[PHASE | {name: value}]).holds()
        claim = make_plan(delta=2.0**-20).claim.to_jsonable()
        if name.split()[-1] in claim:
            return History().portfolio().plan(claim=claim | {name.split()[-1]: value}).holds()
        return History().portfolio().plan(**{name: value}).holds()

    near = (down(low), up(low)) if isinstance(low, float) else (low - 1, low + 1)
    assert [holds(value) for value in (near[0], low, near[1])] == [False, True, True]
    if high is not None:
        near = (down(high), up(high)) if isinstance(high, float) else (high - 1, high + 1)
        assert [holds(value) for value in (near[0], high, near[1])] == [True, True, False]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("epsilon", [(0.0, False), (2.0**-1074, True), (1e6, True), (up(1e6), False)]),
        ("delta", [(0.0, False), (2.0**-1074, True), (down(1.0), True), (1.0, False)]),
    ],
)
def test_every_total_has_its_range(name: str, values: list[tuple[float, bool]]) -> None:
    for value, fine in values:
        assert History(**{name: value.hex()}).holds() is fine  # type: ignore[arg-type]
        budget = {"epsilon": HALF, "delta": DELTA, "allowances": None} | {name: value.hex()}
        assert History().add("budget", OWNER, **budget).holds() is fine


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("orders", [(1.0, False), (up(1.0), True), (1e6, True), (up(1e6), False)]),
        ("shares", [(0, False), (1, True), (10**6, True), (10**6 + 1, False)]),
        ("allowances", [(up(-1e300), True), (-1e300, True), (down(-1e300), False), (1e6, True), (up(1e6), False)]),
    ],
)
def test_every_term_has_its_range(name: str, values: list[tuple[Any, bool]]) -> None:
    for value, fine in values:
        terms: dict[str, Any] = {"orders": [EPSILON], "shares": [1], "allowances": [HALF]}
        terms[name] = [value.hex() if isinstance(value, float) else value]
        assert History("rdp").add("renyi", OWNER, **terms).holds() is fine


# --- many -----------------------------------------------------------------------------------------------------------


def run_id(number: int) -> str:
    return f"{number:032x}"


@pytest.mark.slow
def test_ten_thousand_runs_and_not_one_more() -> None:
    history = History().portfolio()
    for number in range(MAX_RUNS - 1):
        history.plan(run_id(number))
    assert history.holds()
    assert history.plan(run_id(MAX_RUNS - 1)).holds()
    assert not history.plan(run_id(MAX_RUNS)).holds()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["portfolio", "rdp"])
def test_as_many_phases_as_there_may_be_and_not_one_more(kind: str) -> None:
    def add(history: History, number: int, phases: int) -> History:
        table = {"costs": [[ZERO]] * phases, "tails": [ZERO] * phases, "factors": [ZERO] * phases}
        return history.plan(run_id(number), steps=[1] * phases, **(table if kind == "rdp" else {}))

    def at(phases: int) -> History:
        history = History(kind).renyi(EPSILON) if kind == "rdp" else History().portfolio()
        for number in range(phases // 1024):
            add(history, number, 1024)
        return add(history, phases // 1024, phases % 1024) if phases % 1024 else history

    assert at(MAX_ALL_PHASES - 1).holds()
    history = at(MAX_ALL_PHASES)
    claim = None if kind == "rdp" else HALF
    assert history.holds()
    assert not add(history, 99, 1).holds()
    assert at(MAX_ALL_PHASES).lease(run=run_id(0), count=1024, claim=claim).holds()


@pytest.mark.slow
@pytest.mark.parametrize("orders", [31, 64])
def test_a_million_costs_of_phases_and_not_one_more(orders: int) -> None:
    def at(phases: int) -> History:
        history = History("rdp").renyi(*[EPSILON] * orders)
        for number in range(-(-phases // 1024)):
            count = min(1024, phases - 1024 * number)
            table = {"costs": [[None] * orders] * count, "tails": [ZERO] * count, "factors": [ZERO] * count}
            history.plan(run_id(number), steps=[1] * count, **table)
        return history

    most = MAX_ALL_COSTS // orders  # with 64 orders exactly a million
    assert at(most).holds()
    assert not at(most + 1).holds()


@pytest.mark.slow
def test_ten_thousand_portfolios_and_not_one_more() -> None:
    share = 2.0**-40
    claim = make_plan(delta=share).claim.to_jsonable()
    history = History()
    for number in range(1, MAX_PORTFOLIOS + 1):
        history.portfolio(number, delta=share.hex()).plan(run_id(number), portfolio=number, claim=claim)
        history.lease(run=run_id(number), claim=(2.0**-20).hex())
    machine = Machine(LedgerState(trust=OWNER.public), remember=True)
    machine.feed(history.entries)
    assert len(machine.state().portfolios) == MAX_PORTFOLIOS
    history.portfolio(MAX_PORTFOLIOS + 1, delta=share.hex())
    with pytest.raises(Tampered, match="index"):
        machine.feed(history.entries[-1:])
    # The second verifier sums all portfolios anew at every lease: its rule alone.
    index = verifier.FORMS["portfolio"]["index"]
    assert [index(MAX_PORTFOLIOS - 1), index(MAX_PORTFOLIOS), index(MAX_PORTFOLIOS + 1)] == [True, True, False]


@pytest.mark.slow
def test_forty_thousand_open_leases_are_closed_the_newest_first() -> None:
    """2.3 s; a search through the open leases at every close took 29 s."""
    leases = 40_000
    history = History().portfolio().plan(steps=[10**9]).lease(claim=HALF)
    for first in range(1, leases):
        history.lease(first)
    for first in reversed(range(leases)):
        history.add("close", run=RUN, first=first, unspent=1)
    machine = Machine(LedgerState(trust=OWNER.public))
    machine.feed(history.entries)
    assert machine.state().runs[RUN].leases == ()
    assert machine.state().runs[RUN].charged == leases


@pytest.mark.slow
def test_a_key_that_changes_two_thousand_times_is_followed_by_both() -> None:
    history, owner = History(), OWNER
    for number in range(2000):
        new = Ed25519Signer.from_seed(number.to_bytes(32, "big"))
        history.add("rekey", owner, new, role="owner", old=owner.public.hex, key=new.public.hex)
        owner = new
    assert ours(history.export())["owner"] == owner.public.hex  # type: ignore[index]
    assert history.holds()
