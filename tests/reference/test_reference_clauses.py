"""Every clause of docs/ledger-format.md that a stranger could misread: the page's word, by both verifiers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dpbudget.ledger.head import VerifierKey
from dpbudget.ledger.signing import _D, _P, _SMALL_ORDER_Y

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "dpbudget" / "ledger")]
from bothkit import DELTA, EPSILON, HALF, RUN, ZERO, History, agree, canonical, exported  # noqa: E402
from ledgerkit import NEXT_OWNER, NEXT_WRITER, OWNER, STRANGER, WRITER, make_plan  # noqa: E402


def one_run() -> History:
    return History().portfolio().plan()


def test_the_ledgers_of_this_file_hold_before_anything_is_changed_in_them() -> None:
    assert one_run().lease(claim=HALF).lease(1).holds()
    assert History("rdp").renyi(EPSILON).rdp_plan([HALF]).lease(count=2).holds()


# --- canonical JSON, floats, rates ----------------------------------------------------------------------------------

ODD_FLOATS = [
    "-0x0.0p+0",  # minus zero does not exist
    "0x0.0p-0",
    "0x0p+0",
    "0x0.0000000000000p+0",
    "0x0.0000000000000p-1022",
    "-0x0.0000000000000p-1022",
    "0x1p+0",
    "0x1.8p+1",
    "0x1.80000000000000p+1",
    "0x1.8000000000000p1",
    "0x1.8000000000000p+01",
    "0x1.8000000000000p-0",
    "0x1.8000000000000P+1",
    "0X1.8000000000000p+1",
    "0x1.ABCDEF0000000p+1",
    "+0x1.8000000000000p+1",
    " 0x1.8000000000000p+1",
    "0x1.8000000000000p+1 ",
    "0x0.8000000000000p+1",  # 1, spelt as a subnormal
    "0x0.8000000000000p-1021",
    "0x1.0000000000000p-1023",  # a subnormal, spelt as a normal
    "0x1.0000000000001p-1023",  # rounded
    "0x1.0000000000000p-1075",  # rounded to zero
    "0x1.0000000000000p-9999",
    "0x1.0000000000000p+1024",  # beyond the largest
    "0x1.0000000000000p+9999",
    "0x1.0000000000000p+10000",
    "0x3.0000000000000p+0",
    "3.0",
    "inf",
    "nan",
    "-inf",
    "",
]


@pytest.mark.parametrize("spelling", ODD_FLOATS)
def test_a_float_has_one_spelling(spelling: str) -> None:
    assert not History().portfolio().plan(clip_norm=spelling).holds()
    assert not History("rdp").renyi(spelling).holds()
    assert not History("rdp").renyi(EPSILON).rdp_plan([spelling]).holds()


@pytest.mark.parametrize("value", [2.0**-1022, 2.0**-1074, 2.0**-1022 - 2.0**-1074, 1e12, 0.1])
def test_normal_exponents_end_at_minus_1022_and_subnormals_begin_there(value: float) -> None:
    assert History().portfolio().plan(clip_norm=value.hex()).holds()


def test_the_largest_float_has_the_exponent_1023() -> None:
    claim = make_plan(delta=2.0**-20).claim.to_jsonable()
    for spelling, fine in (("0x1.fffffffffffffp+1023", True), ("0x1.0000000000000p+1024", False)):
        assert History().portfolio().plan(claim=claim | {"epsilon": spelling}).holds() is fine


@pytest.mark.parametrize(
    ("rate", "fine"),
    [
        (1, True),
        (2**53 - 1, True),
        (2**53, True),
        (2**53 + 1, False),  # 54 significant bits
        (2**53 + 2, True),
        (2**54 - 1, False),
        ((2**53 - 1) << 11, True),
        ((2**54 - 1) << 10, False),
        (2**64 - 1, False),
        (2**64, True),
        (2**64 + 2**12, False),  # beyond one
        (0, False),
    ],
)
def test_a_sampling_rate_is_exactly_one_binary64(rate: int, fine: bool) -> None:
    phase = make_plan().to_jsonable()["phases"][0]
    assert History().portfolio().plan(phases=[phase | {"rate_k": f"{rate:017x}"}]).holds() is fine


@pytest.mark.parametrize("spelling", ["0" * 16 + "A", "1", "0" * 15 + "1", "0" * 17 + "1", "0x" + "0" * 14 + "1", 1])
def test_a_sampling_rate_has_17_digits(spelling: Any) -> None:
    phase = make_plan().to_jsonable()["phases"][0]
    assert not History().portfolio().plan(phases=[phase | {"rate_k": spelling}]).holds()


# --- filters and their second record --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["portfolio", "rdp"])
def test_a_ledger_may_end_after_genesis(kind: str) -> None:
    assert History(kind).holds()


def test_the_second_record_of_an_rdp_ledger_is_renyi_and_of_another_one_never() -> None:
    budget = {"epsilon": HALF, "delta": DELTA, "allowances": None}
    rekey = {"role": "writer", "old": WRITER.public.hex, "key": NEXT_WRITER.public.hex}
    for kind, fine in (("portfolio", True), ("rdp", False)):
        assert History(kind).add("note", event="checked").holds() is fine
        assert History(kind).add("budget", OWNER, **budget).holds() is fine
        assert History(kind).add("rekey", OWNER, NEXT_WRITER, **rekey).holds(NEXT_WRITER) is fine
        assert History(kind).renyi(EPSILON).holds() is not fine
        assert not History(kind).add("note", event="checked").renyi(EPSILON).holds()
        assert not History(kind).renyi(EPSILON).renyi(EPSILON).holds()
    assert not History("rdp").renyi(EPSILON).portfolio().holds()
    assert not History("rdp").rdp_plan([HALF]).holds()


@pytest.mark.parametrize(("count", "fine"), [(1, False), (2, True), (3, False)])
def test_new_totals_have_one_allowance_for_each_order(count: int, fine: bool) -> None:
    history = History("rdp").renyi(EPSILON, EPSILON)
    history.add("budget", OWNER, epsilon=HALF, delta=DELTA, allowances=[HALF] * count)
    assert history.holds() is fine


@pytest.mark.parametrize("kind", ["portfolio", "rdp"])
def test_allowances_are_null_exactly_with_the_filter_portfolio(kind: str) -> None:
    for allowances in (None, [HALF], []):
        history = History(kind) if kind == "portfolio" else History(kind).renyi(EPSILON)
        history.add("budget", OWNER, epsilon=HALF, delta=DELTA, allowances=allowances)
        assert history.holds() is (allowances == (None if kind == "portfolio" else [HALF]))


# --- the account ----------------------------------------------------------------------------------------------------


def test_the_account_is_checked_after_lease_and_budget_and_not_at_renyi() -> None:
    negative = "-" + HALF
    assert History("rdp").renyi(negative, negative).holds()
    assert History("rdp").renyi(negative).rdp_plan([ZERO]).holds()
    assert not History("rdp").renyi(negative).rdp_plan([ZERO]).lease().holds()
    assert History("rdp").renyi(negative, ZERO).rdp_plan([HALF, ZERO]).lease().holds()
    for last, fine in ((negative, False), (ZERO, True)):
        history = History("rdp").renyi(EPSILON, EPSILON)
        history.add("budget", OWNER, epsilon=HALF, delta=DELTA, allowances=[negative, last])
        assert history.holds() is fine


def test_the_first_charged_steps_belong_to_the_first_phase() -> None:
    dear, cheap = [(3.0).hex()], [HALF]
    assert not History("rdp").renyi(EPSILON).rdp_plan(dear, cheap, steps=(1, 1)).lease().holds()
    history = History("rdp").renyi(EPSILON).rdp_plan(cheap, dear, steps=(1, 1)).lease()
    assert history.holds()
    assert not history.lease(1).holds()
    assert History("rdp").renyi(EPSILON).rdp_plan(cheap, dear, steps=(2, 1)).lease(count=2).holds()


def test_an_order_whose_cost_is_unknown_is_lost_once_its_phase_is_charged_and_not_before() -> None:
    plan = History("rdp").renyi(EPSILON, EPSILON).rdp_plan([ZERO, (0.5).hex()], [None, HALF], steps=(2, 2))
    assert plan.lease(count=2).holds()
    assert plan.lease(2).holds()  # the second order has room for two halves and a whole
    assert not plan.lease(3).holds()


@pytest.mark.parametrize("cost", [0, False, 0.0, "", [], {}, "-" + HALF, "0x0p+0", {ZERO: 1}])
def test_a_cost_is_a_float_that_is_not_negative_or_null(cost: Any) -> None:
    plan = History("rdp").renyi(EPSILON)
    assert not plan.rdp_plan([cost]).holds()
    assert not History("rdp").renyi(EPSILON).rdp_plan([ZERO], tails=[cost]).holds()
    assert not History("rdp").renyi(EPSILON).rdp_plan([ZERO], factors=[cost]).holds()
    assert not History("rdp").renyi(EPSILON).rdp_plan(cost).holds()
    assert not History("rdp").renyi(EPSILON).rdp_plan([ZERO], costs=cost).holds()


@pytest.mark.parametrize("tail", [None, (2.0**-20).hex()])
def test_tails_are_never_null_and_take_a_hundredth_of_delta(tail: Any) -> None:
    plan = History("rdp").renyi(EPSILON).rdp_plan([ZERO], tails=[tail])
    assert plan.holds() is (tail is not None)
    if tail is not None:
        assert not plan.lease().holds()


def test_sums_are_rounded_up_once_a_phase_and_bounds_down() -> None:
    third = (1.0 / 3.0 * 2.0**-90).hex()  # its multiples by 2^100 are no integers
    bound = -(-3 * int(float.fromhex(third) * 2**160) // 2**60)
    for units, fine in ((bound, True), (bound - 1, False)):
        history = History("rdp").renyi((units / 2**100).hex()).rdp_plan([third]).lease().lease(1).lease(2)
        assert history.holds() is fine


# --- keys -----------------------------------------------------------------------------------------------------------


def key_with(y: int) -> str:
    return y.to_bytes(32, "little").hex()


def off_the_curve() -> str:
    square = next(
        y for y in range(2, 99) if pow((y * y - 1) * pow(_D * y * y + 1, -1, _P), (_P - 1) // 2, _P) == _P - 1
    )
    return key_with(square)


UNSAFE_KEYS = {
    "off the curve": off_the_curve(),
    "not canonical": key_with(_P + 3),
    "not canonical, with a sign": key_with(_P + 3 + 2**255),
    **{f"small order {at}": key_with(y) for at, y in enumerate(sorted(_SMALL_ORDER_Y))},
    **{f"small order {at}, with a sign": key_with(y + 2**255) for at, y in enumerate(sorted(_SMALL_ORDER_Y))},
}


@pytest.mark.parametrize("name", UNSAFE_KEYS)
def test_a_key_that_never_signs_is_checked_too(name: str) -> None:
    def replaced_at_once(writer: str) -> History:
        rekey = {"role": "writer", "old": writer, "key": NEXT_WRITER.public.hex}
        return History(writer=writer).add("rekey", OWNER, NEXT_WRITER, **rekey)

    assert replaced_at_once(STRANGER.public.hex).holds(NEXT_WRITER)
    assert not replaced_at_once(UNSAFE_KEYS[name]).holds(NEXT_WRITER)
    assert not History(owner=UNSAFE_KEYS[name]).holds()
    for role, old in (("owner", OWNER), ("writer", WRITER)):
        rekey = {"role": role, "old": old.public.hex, "key": UNSAFE_KEYS[name]}
        assert not History().add("rekey", old, OWNER, **rekey).holds()


def test_a_signature_whose_s_is_not_reduced_is_refused() -> None:
    order = 2**252 + 27742317777372353535851937790883648493
    made: list[bytes] = []

    class Restating:
        public = OWNER.public

        def sign(self, message: bytes) -> bytes:
            signature = OWNER.sign(message)
            restated = int.from_bytes(signature[32:], "little") + order
            made.append(signature)
            return signature[:32] + restated.to_bytes(32, "little")

    assert not History().add("portfolio", Restating(), index=1, delta=DELTA, epsilon=None).holds()
    assert made


def test_the_roles_of_genesis_have_two_keys_and_no_key_comes_back() -> None:
    assert not History(writer=OWNER.public.hex).holds(OWNER)
    there = {"role": "owner", "old": OWNER.public.hex, "key": NEXT_OWNER.public.hex}
    back = {"role": "owner", "old": NEXT_OWNER.public.hex, "key": OWNER.public.hex}
    across = {"role": "writer", "old": WRITER.public.hex, "key": OWNER.public.hex}
    history = History().add("rekey", OWNER, NEXT_OWNER, **there)
    assert history.holds()
    assert not history.add("rekey", NEXT_OWNER, OWNER, **back).holds()
    history = History().add("rekey", OWNER, NEXT_OWNER, **there)
    assert not history.add("rekey", NEXT_OWNER, OWNER, **across).holds(OWNER)


# --- leases, settles, head ------------------------------------------------------------------------------------------


def test_nonces_and_commitments_are_compared_among_themselves_alone() -> None:
    same = "77" * 32
    settle = {"run": RUN, "output": None}
    history = one_run().lease(claim=HALF, nonce=same, commitment=same)
    assert history.holds()
    assert not one_run().lease(claim=HALF, nonce=same).lease(1, nonce=same).holds()
    assert not one_run().lease(claim=HALF, commitment=same).lease(1, commitment=same).holds()
    assert one_run().lease(claim=HALF, nonce=same).lease(1, commitment=same).holds()
    history.add("reserve", run=RUN, step=0, count=1).add("settle", step=0, fresh=same[:32], **settle)
    history.lease(1).add("reserve", run=RUN, step=1, count=1)
    assert history.holds()
    assert not history.add("settle", step=1, fresh=same[:32], **settle).holds()


FIXED, GIVEN, ZEROS = "99" * 32, "5e" * 32, "0" * 32


def committed() -> History:
    return one_run().add("commit", run=RUN, commitment=FIXED).add("entropy", run=RUN, value=GIVEN)


def test_a_run_commits_once_before_its_first_lease_and_gets_its_entropy_once() -> None:
    commit, entropy = {"run": RUN, "commitment": "88" * 32}, {"run": RUN, "value": "6f" * 32}
    assert one_run().add("commit", **commit).holds()
    assert committed().holds()
    assert not one_run().lease(claim=HALF).add("commit", **commit).holds()
    assert not committed().add("commit", **commit).holds()
    assert not one_run().add("commit", **commit).add("commit", **commit).holds()
    assert not one_run().add("entropy", **entropy).holds()
    assert not committed().add("entropy", **entropy).holds()
    assert not History().portfolio().add("commit", **commit).holds()
    assert not one_run().add("commit", **{**commit, "run": "cd" * 16}).holds()


def test_a_lease_of_a_committed_run_has_its_commitment_and_comes_after_the_entropy() -> None:
    assert committed().lease(claim=HALF, commitment=FIXED).lease(1, commitment=FIXED).holds()
    assert not committed().lease(claim=HALF).holds()
    waiting = one_run().add("commit", run=RUN, commitment=FIXED)
    assert not waiting.lease(claim=HALF, commitment=FIXED).holds()
    nonce = {"nonce": "77" * 32, "commitment": FIXED}
    assert not committed().lease(claim=HALF, **nonce).lease(1, **nonce).holds()


def test_a_settle_of_a_committed_run_has_no_bytes_of_its_own() -> None:
    for fresh, good in ((ZEROS, True), ("0" * 31 + "1", False), ("ab" * 16, False)):
        history = committed().lease(claim=HALF, count=2, commitment=FIXED).add("reserve", run=RUN, step=0, count=2)
        history.add("settle", run=RUN, step=0, fresh=fresh, output=None)
        assert history.holds() is good
        if good:
            assert history.add("settle", run=RUN, step=1, fresh=fresh, output=None).holds()


def test_what_a_run_commits_to_is_in_no_other_run() -> None:
    other = "cd" * 16
    two = one_run().plan(other).lease(claim=HALF, commitment=FIXED)
    assert not two.add("commit", run=other, commitment=FIXED).holds()
    two = committed().plan(other)
    assert two.holds()
    assert not two.lease(claim=HALF, run=other, commitment=FIXED).holds()
    two = committed().plan(other).add("commit", run=other, commitment=FIXED)
    assert not two.holds()
    # The entropy is the auditor's, who may give the same one twice.
    two = committed().plan(other).add("commit", run=other, commitment="88" * 32)
    assert two.add("entropy", run=other, value=GIVEN).holds()


def test_a_portfolio_that_declares_no_epsilon_is_bounded_by_what_the_others_leave() -> None:
    assert one_run().lease(claim=EPSILON).holds()
    assert not one_run().lease(claim=(2.5).hex()).holds()
    declared = History().portfolio(epsilon=HALF).plan()
    assert not declared.lease(claim=(1.5).hex()).holds()


def test_a_head_in_an_export_has_one_signature_line() -> None:
    history = one_run()
    note = history.head()
    text, _, lines = note.decode().partition("\n\n")
    assert agree(exported(history.entries, note))
    witness = VerifierKey("witness.example/1", NEXT_WRITER.public)
    other = f"— {witness.name} {lines.split(' ')[2]}"
    for more in (lines + lines, lines + other, other + lines, "", other, lines + "\n", lines.rstrip("\n")):
        assert not agree(exported(history.entries, f"{text}\n\n{more}".encode()))


def test_an_export_ends_with_one_head_and_its_line_feed() -> None:
    export = one_run().export()
    last = export.splitlines(keepends=True)[-1]
    for changed in (export + last, export[:-1], export + b"\n", export + b" ", last, b"", b"\n", last + export):
        assert not agree(changed)
    assert not agree(export.replace(b"\n", b"\r\n"))
    assert not agree(b"\xef\xbb\xbf" + export)
    assert not agree(canonical({"note": ""}) + b"\n")
