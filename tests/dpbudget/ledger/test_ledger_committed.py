"""Runs whose noise is committed: the rules, one broken at a time; the keys; the anchor without which nothing starts."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ledgerkit import OWNER, committed_run, make_ledger, make_plan, plan_key, reopen, snapshot_of
from test_ledger_interrupts import handled_in, usable
from test_ledger_run import in_a_child
from test_ledger_state import R1, add, lease, planned

from dpbudget._verify import verify
from dpbudget.errors import (
    DPBudgetError,
    InvalidParameter,
    ReceiptSpent,
    StorageFailed,
    Tampered,
    Unanchored,
    Unreadable,
    UnsafeKeyFile,
)
from dpbudget.ledger.auditor import new_auditor_key
from dpbudget.ledger.entries import read
from dpbudget.ledger.high_water import HighWater
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.noise_keys import LeaseKey
from dpbudget.ledger.plan_key import PlanKey, load_plan_key, new_plan_key, plan_commitment
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.replay import RunReplay
from dpbudget.ledger.run import Run
from dpbudget.ledger.sealed import SealedKeys
from dpbudget.ledger.state import LedgerState
from dpbudget.ledger.step_keys import Purpose, encode_committed_info, encode_info, expand, info_of

FIXED, GIVEN, NONE = "99" * 32, "5e" * 32, "0" * 32


def refused(act: Callable[[], object], kind: type[DPBudgetError], code: str, match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        act()
    assert caught.value.code == code
    assert caught.value.hint


def records(ledger: Ledger, *kinds: str) -> list[dict[str, Any]]:
    return [record for entry in snapshot_of(ledger).entries if (record := read(entry.line))["type"] in kinds]


def bytes_of(key: PlanKey) -> bytes:
    return key.reveal()


# --- the rules, on records that anybody could write -------------------------------------------------------------------


def committed(state: LedgerState | None = None) -> LedgerState:
    return add(state or planned(), "commit", run=R1, commitment=FIXED)


def ready() -> LedgerState:
    return add(committed(), "entropy", run=R1, value=GIVEN)


def leased() -> LedgerState:
    state = add(ready(), "lease", run=R1, nonce="aa" * 32, commitment=FIXED, first=0, count=2, claim=1.0)
    return add(state, "reserve", run=R1, step=0, count=2)


def test_a_committed_run_is_in_the_state_with_its_commitment_and_its_entropy() -> None:
    run = leased().runs[R1]
    assert (run.commitment, run.entropy, run.charged) == (FIXED, GIVEN, 2)
    assert run.ready == ready().size
    assert planned().runs[R1].commitment is None


@pytest.mark.parametrize(
    ("act", "problem"),
    [
        (lambda: committed(lease(planned(), R1, 0, 2, claim=1.0)), "after 2 steps"),
        (lambda: committed(committed()), "a second commit"),
        (lambda: committed(ready()), "a second commit"),
        (lambda: add(planned(), "commit", run="22" * 16, commitment=FIXED), "unknown run"),
        (lambda: add(planned(), "entropy", run=R1, value=GIVEN), "committed to no noise key"),
        (lambda: add(ready(), "entropy", run=R1, value="6f" * 32), "a second entropy"),
        (lambda: add(planned(), "entropy", run="22" * 16, value=GIVEN), "unknown run"),
        (lambda: lease(committed(), R1, 0, 2, claim=1.0), "before the auditor's entropy"),
        (lambda: lease(ready(), R1, 0, 2, claim=1.0), "with another commitment"),
        (lambda: add(leased(), "settle", run=R1, step=0, fresh="cc" * 16, output=None), "bytes of its own"),
    ],
)
def test_a_record_that_breaks_a_rule_of_committed_runs_is_refused(act: Callable[[], object], problem: str) -> None:
    with pytest.raises(Tampered, match=problem) as caught:
        act()
    assert caught.value.code == "DP071"


def test_a_settle_of_a_committed_run_has_zeros() -> None:
    state = add(leased(), "settle", run=R1, step=0, fresh=NONE, output=None)
    assert add(state, "settle", run=R1, step=1, fresh=NONE, output="ab" * 32).runs[R1].leases == ()


# --- the keys ---------------------------------------------------------------------------------------------------------


def derived(key: bytes, entropy: str, statement: str, purpose: str, step: int) -> bytes:
    """HKDF (RFC 5869) by hand: extract with the entropy as the salt, expand over the documented fields."""
    extracted = hmac.new(bytes.fromhex(entropy), key, hashlib.sha256).digest()
    info = b"dpnoise/c1".ljust(16, b"\0") + purpose.encode().ljust(16, b"\0") + bytes.fromhex(statement)
    info += struct.pack("<QQ", step, 0)
    assert len(info) == 80
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def key_of(receipt: Receipt, purpose: Purpose) -> bytes:
    return expand(receipt.use(purpose.value), info_of(receipt, purpose))


def test_all_noise_follows_from_the_plan_key_the_entropy_and_the_step() -> None:
    ledger = make_ledger()
    run = committed_run(ledger, make_plan(5), lease_steps=2)
    statement = ledger.state.runs[run.run_id].statement
    for receipt in run:
        for purpose in (Purpose.SAMPLING, Purpose.GRAD_NOISE):
            assert key_of(receipt, purpose) == derived(b"\x07" * 32, GIVEN, statement, purpose, receipt.step)
        assert (receipt.committed, receipt.fresh) == (True, bytes(16))
    run.close()
    assert {record["fresh"] for record in records(ledger, "settle")} == {NONE}
    assert {record["commitment"] for record in records(ledger, "commit", "lease")} == {plan_commitment(b"\x07" * 32)}
    assert len({record["nonce"] for record in records(ledger, "lease")}) == 3


def test_modes_purposes_steps_plans_and_entropies_never_share_a_key() -> None:
    keys = []
    for entropy in (GIVEN, "6f" * 32):
        for byte in (7, 8):
            ledger = make_ledger()
            run = committed_run(ledger, make_plan(2, epsilon=0.5), key=plan_key(byte), entropy=entropy)
            again = committed_run(ledger, make_plan(2, epsilon=0.5), key=plan_key(byte + 2), entropy=entropy)
            for receipt in (*run, *again):
                keys += [expand(receipt.key.reveal(), info_of(receipt, purpose)) for purpose in Purpose]
    assert len(set(keys)) == len(keys) == 16 * len(Purpose)
    secret, same = b"\x07" * 32, b"\x09" * 32
    fresh = {expand(secret, encode_info(purpose, same, 3, bytes(16))) for purpose in Purpose}
    fixed = {expand(secret, encode_committed_info(purpose, same, 3)) for purpose in Purpose}
    assert len(fresh | fixed) == 2 * len(Purpose)


@pytest.mark.parametrize(("statement", "step", "attempt"), [(31, 0, 0), (32, -1, 0), (32, 2**64, 0), (32, 0, 2**64)])
def test_a_field_of_the_wrong_width_is_refused(statement: int, step: int, attempt: int) -> None:
    with pytest.raises(ValueError, match="statement digest"):
        encode_committed_info(Purpose.INIT, bytes(statement), step, attempt)


def test_a_resumed_run_goes_on_with_the_noise_of_its_key_and_repeats_no_step(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "ledger")
    run = committed_run(ledger, make_plan(8), lease_steps=3)
    statement = ledger.state.runs[run.run_id].statement
    first = [run.next_receipt().step for _ in range(2)]
    head, run_id = str(ledger.head), run.run_id
    del run  # as a crash would
    ledger._journal.close()
    with reopen(tmp_path / "ledger") as again, again.start(run_id, plan_key=plan_key(), expect_head=head) as resumed:
        steps = []
        for receipt in resumed:
            steps.append(receipt.step)
            assert key_of(receipt, Purpose.GRAD_NOISE) == derived(
                b"\x07" * 32, GIVEN, statement, "grad-noise", receipt.step
            )
    assert first + steps == [0, 1, 3, 4, 5, 6, 7]


def test_a_digest_goes_to_the_newest_step_though_all_have_the_same_fresh_bytes() -> None:
    ledger = make_ledger()
    run = committed_run(ledger, make_plan(4), lease_steps=4)
    first, second = run.next_receipt(), run.next_receipt()
    with pytest.raises(InvalidParameter, match="not the newest"):
        run.settle(first, "ab" * 32)
    run.settle(second, "cd" * 32)
    run.close()
    assert [record["output"] for record in records(ledger, "settle")] == [None, "cd" * 32]


def test_keys_of_a_committed_run_are_overwritten_when_a_step_is_over_and_when_the_run_is() -> None:
    ledger = make_ledger()
    run = committed_run(ledger, make_plan(4), lease_steps=4)
    receipt, other = run.next_receipt(), run.next_receipt()
    assert run._run_key is not None
    assert run._held is not None
    held = [receipt.key._key, other.key._key, run._run_key._key, run._held.keys._key]
    assert all(map(any, held))  # type: ignore[arg-type]
    receipt.use("sampling")
    receipt.use("grad-noise")
    assert held[0] == bytes(32)
    run.close()
    assert held == [bytes(32)] * 4
    with pytest.raises(ReceiptSpent, match="erased") as caught:
        other.use("grad-noise")
    assert caught.value.code == "DP076"


def test_a_plan_key_is_never_shown_copied_or_carried_into_a_fork(tmp_path: Path) -> None:
    ledger, key = make_ledger(tmp_path / "ledger"), plan_key()
    run = committed_run(ledger, make_plan(4), key=key, lease_steps=2)
    receipt = run.next_receipt()
    held = key._key
    for hidden in (key, run._run_key, receipt, receipt.key, run._held.keys):  # type: ignore[union-attr]
        assert "07" * 8 not in repr(hidden)
        for act in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="never pickled"):
                act(hidden)
    assert in_a_child(lambda: str(key.reveal())) == "DP076"
    assert in_a_child(lambda: str(receipt.use("grad-noise"))) == "DP076"
    assert in_a_child(lambda: str(run.next_receipt())) == "DP076"
    assert in_a_child(lambda: str(held == bytes(32))) == "True"
    assert len(receipt.use("grad-noise")) == 32
    key.wipe()
    assert held == bytes(32)
    assert [later.step for later in run] == [1, 2, 3]  # the run holds what it needs


# --- committing -------------------------------------------------------------------------------------------------------


def test_a_run_is_committed_once_and_before_its_first_step() -> None:
    ledger = make_ledger()
    run_id = ledger.sign_plan(make_plan(4, epsilon=0.5), owner=OWNER)
    other = ledger.sign_plan(make_plan(4, epsilon=0.5), owner=OWNER)
    refused(lambda: ledger.add_entropy(run_id, GIVEN), InvalidParameter, "DP084", "not committed")
    ledger.commit(run_id, plan_key())
    refused(lambda: ledger.commit(run_id, plan_key(8)), InvalidParameter, "DP084", "is committed to")
    refused(lambda: ledger.commit(other, plan_key()), InvalidParameter, "DP084", "has this plan key")
    refused(lambda: ledger.commit("00" * 16, plan_key(9)), InvalidParameter, "DP081", "no run")
    for bad in ("", "AB" * 32, "ab" * 31, "zz" * 32):
        refused(lambda bad=bad: ledger.add_entropy(run_id, bad), InvalidParameter, "DP082", "hexadecimal")  # type: ignore[misc]
    ledger.add_entropy(run_id, GIVEN)
    refused(lambda: ledger.add_entropy(run_id, "6f" * 32), InvalidParameter, "DP084", "has its entropy")
    refused(lambda: ledger.add_entropy("00" * 16, GIVEN), InvalidParameter, "DP081", "no run")
    ledger.start(other).next_receipt()
    refused(lambda: ledger.commit(other, plan_key(8)), InvalidParameter, "DP084", "are charged, with fresh")


def test_the_plan_key_is_sealed_before_it_is_committed_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auditor = new_auditor_key(tmp_path / "auditor.key")
    kept = SealedKeys(tmp_path / "noise.sealed", auditor.public)
    ledger = make_ledger(tmp_path / "ledger")
    run_id, size = ledger.sign_plan(make_plan(4), owner=OWNER), ledger.state.size + 1

    def fail(number: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("dpbudget.ledger.sealed.os.fsync", fail)
        with pytest.raises(DPBudgetError) as caught:
            ledger.commit(run_id, plan_key(), keep_keys=kept)
        assert caught.value.code == "DP075"
    assert ledger.state.runs[run_id].commitment is None
    ledger.commit(run_id, plan_key(), keep_keys=SealedKeys(tmp_path / "other.sealed", auditor.public))
    assert ledger.state.size == size
    (line,) = (tmp_path / "other.sealed").read_bytes().splitlines()
    assert (json.loads(line)["type"], json.loads(line)["run"]) == ("plan-key", run_id)


def test_an_auditor_replays_any_step_of_a_committed_run_settled_or_not(tmp_path: Path) -> None:
    auditor = new_auditor_key(tmp_path / "auditor.key")
    kept = SealedKeys(tmp_path / "noise.sealed", auditor.public)
    ledger = make_ledger(tmp_path / "ledger")
    run_id = ledger.sign_plan(make_plan(4), owner=OWNER)
    ledger.commit(run_id, plan_key(), keep_keys=kept)
    ledger.add_entropy(run_id, GIVEN)
    run = ledger.start(run_id, plan_key=plan_key(), expect_head=str(ledger.head), lease_steps=2)
    expected = {}
    for receipt in (run.next_receipt() for _ in range(3)):
        expected[receipt.step] = key_of(receipt, Purpose.GRAD_NOISE), key_of(receipt, Purpose.SAMPLING)
        run.settle(receipt, "ab" * 32)
    ledger._journal.close()  # as a crash would: the third step has no settle
    replay = RunReplay.read(tmp_path / "ledger", trust=OWNER.public)
    for step, keys in expected.items():
        found = [replay.step_key(step, use, sealed=kept.path, auditor=auditor) for use in ("grad-noise", "sampling")]
        assert tuple(one.key for one in found) == keys
        assert found[0].output == (None if step == 2 else "ab" * 32)
    strange = new_auditor_key(tmp_path / "other.key")
    refused(lambda: replay.step_key(0, "grad-noise", sealed=kept.path, auditor=strange), Tampered, "DP085", "not open")
    refused(lambda: replay.step_key(0, "init", sealed=kept.path, auditor=auditor), InvalidParameter, "DP060", "purpose")


def test_a_sealed_plan_key_that_is_not_the_committed_one_is_found(tmp_path: Path) -> None:
    auditor = new_auditor_key(tmp_path / "auditor.key")
    kept = SealedKeys(tmp_path / "noise.sealed", auditor.public)
    ledger = make_ledger(tmp_path / "ledger")
    run = committed_run(ledger, make_plan(2))
    run.next_receipt()
    ledger.close()
    kept.prepare()
    kept.keep("plan-key", ledger=ledger.id, run=run.run_id, commitment=plan_key().commitment, key=b"\x08" * 32)
    replay = RunReplay.read(tmp_path / "ledger", trust=OWNER.public)
    refused(
        lambda: replay.step_key(0, "grad-noise", sealed=kept.path, auditor=auditor), Tampered, "DP085", "commits to"
    )


# --- starting: fail closed --------------------------------------------------------------------------------------------


@pytest.fixture
def waiting(tmp_path: Path) -> tuple[Ledger, str]:
    ledger = make_ledger(tmp_path / "ledger")
    run_id = ledger.sign_plan(make_plan(4), owner=OWNER)
    ledger.commit(run_id, plan_key())
    return ledger, run_id


def test_a_committed_run_starts_with_all_that_it_needs_and_with_nothing_less(
    waiting: tuple[Ledger, str], tmp_path: Path
) -> None:
    ledger, run_id = waiting
    early = str(ledger.head)

    def start(**facts: Any) -> Run:
        return ledger.start(run_id, **{"plan_key": plan_key(), "expect_head": str(ledger.head), **facts})

    refused(start, InvalidParameter, "DP084", "no entropy")
    ledger.add_entropy(run_id, GIVEN)
    before = ledger.state.size
    refused(lambda: start(plan_key=None), InvalidParameter, "DP084", "none was given")
    refused(lambda: ledger.start(run_id), InvalidParameter, "DP084", "none was given")
    refused(lambda: start(plan_key=plan_key(8)), InvalidParameter, "DP084", "not the one")
    refused(lambda: start(expect_head=None), InvalidParameter, "DP084", "needs an expected head, and none was given")
    refused(lambda: start(expect_head=early), InvalidParameter, "DP084", "from before the entropy")
    refused(lambda: start(expect_head="12"), InvalidParameter, "DP082", "size:root")
    refused(lambda: start(expect_head=f"{before}:{'00' * 32}"), Unanchored, "DP079", "another history")
    refused(lambda: start(expect_head=f"{before + 1}:{'00' * 32}"), Unanchored, "DP079", "an older copy")
    kept = SealedKeys(tmp_path / "noise.sealed", new_auditor_key(tmp_path / "auditor.key").public)
    refused(lambda: start(keep_keys=kept), InvalidParameter, "DP084", "no other key to keep")
    assert not kept.path.exists()
    assert ledger.state.size == before
    assert [receipt.step for receipt in start()] == [0, 1, 2, 3]


def test_a_run_with_fresh_keys_takes_no_plan_key_and_may_have_an_expected_head() -> None:
    ledger = make_ledger()
    run_id = ledger.sign_plan(make_plan(4), owner=OWNER)
    head = str(ledger.head)
    refused(lambda: ledger.start(run_id, plan_key=plan_key()), InvalidParameter, "DP084", "has fresh noise keys")
    refused(lambda: ledger.start(run_id, expect_head="3:" + "00" * 32), Unanchored, "DP079", "another history")
    assert not ledger.start(run_id, expect_head=head).next_receipt().committed


def test_a_committed_run_needs_a_high_water_mark(waiting: tuple[Ledger, str], tmp_path: Path) -> None:
    ledger, run_id = waiting
    ledger.add_entropy(run_id, GIVEN)
    head = str(ledger.head)
    ledger.close()
    with reopen(tmp_path / "ledger", high_water=False) as unmarked:
        refused(
            lambda: unmarked.start(run_id, plan_key=plan_key(), expect_head=head),
            InvalidParameter,
            "DP084",
            "needs a high-water mark",
        )
    (tmp_path / "file").touch()
    with reopen(tmp_path / "ledger", high_water=HighWater(tmp_path / "file" / "no")) as unwritable:
        with pytest.raises(StorageFailed, match="mark of the ledger cannot be kept") as caught:
            unwritable.start(run_id, plan_key=plan_key(), expect_head=head)
        assert caught.value.code == "DP075"
        assert unwritable.state.charged == 0


def test_a_mark_that_is_lost_in_the_middle_of_a_run_releases_nothing_more(
    waiting: tuple[Ledger, str], tmp_path: Path
) -> None:
    ledger, run_id = waiting
    ledger.add_entropy(run_id, GIVEN)
    marks = HighWater(tmp_path / "marks")
    head = str(ledger.head)
    ledger.close()
    with reopen(tmp_path / "ledger", high_water=marks) as again:
        run = again.start(run_id, plan_key=plan_key(), expect_head=head, lease_steps=1)
        run.next_receipt()
        shutil.rmtree(marks.folder)
        marks.folder.touch()
        with pytest.raises(StorageFailed, match="cannot be kept"):
            run.next_receipt()
        assert again.state.charged == 2  # charged and lost, as in a crash
        marks.folder.unlink()
        assert run.next_receipt().step == 2


def test_of_two_processes_one_commits_and_the_other_does_not_start_with_fresh_keys(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "ledger")
    run_id = ledger.sign_plan(make_plan(4), owner=OWNER)
    with reopen(tmp_path / "ledger") as other:
        stale = other.start(run_id)
        ledger.commit(run_id, plan_key())
        refused(stale.next_receipt, InvalidParameter, "DP084", "committed to a plan key meanwhile")
        assert other.state.charged == 0
        with pytest.raises(InvalidParameter, match="is committed to"):
            other.commit(run_id, plan_key(8))


@pytest.mark.parametrize("what", ["next_receipt", "close", "close the ledger"])
@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_handler_in_the_middle_of_a_committed_step_repeats_nothing_and_leaves_nothing_alive(
    stride: int, what: str
) -> None:
    trials = 0
    for target in range(1, 3000, stride):
        ledger = make_ledger()
        run = committed_run(ledger, make_plan(5), lease_steps=2)
        ran, receipts, _ = handled_in(ledger, run, target, what)
        steps = [receipt.step for receipt in receipts]
        assert len(set(steps)) == len(steps) <= ledger.state.charged
        assert not any(usable(receipt) for receipt in receipts)  # the ledger is closed by now
        assert run._run_key is not None
        assert run._run_key._key is None
        if not ran:
            break
        trials += 1
    assert trials > 100 // stride


# --- copies, backups, processes ---------------------------------------------------------------------------------------


def step_keys(path: Path, run_id: str, head: str, **facts: Any) -> dict[int, bytes]:
    with reopen(path, **facts) as ledger, ledger.start(run_id, plan_key=plan_key(), expect_head=head) as run:
        return {receipt.step: key_of(receipt, Purpose.GRAD_NOISE) for receipt in run}


def test_a_backup_put_back_on_the_machine_that_spent_is_refused(tmp_path: Path) -> None:
    path, backup = tmp_path / "ledger", tmp_path / "backup"
    ledger = make_ledger(path)
    run = committed_run(ledger, make_plan(4), lease_steps=1)
    head = str(ledger.head)
    shutil.copy(path, backup)
    run.next_receipt()
    ledger.close()
    shutil.copy(backup, path)
    refused(lambda: step_keys(path, run.run_id, head), Tampered, "DP079", "it is an older one")


def test_a_backup_on_another_machine_is_refused_under_the_newest_head(tmp_path: Path) -> None:
    path, backup = tmp_path / "ledger", tmp_path / "backup"
    ledger = make_ledger(path)
    run = committed_run(ledger, make_plan(4), lease_steps=1)
    old = str(ledger.head)
    shutil.copy(path, backup)
    run.next_receipt()
    newest = str(ledger.head)
    ledger.close()
    elsewhere = HighWater(tmp_path / "elsewhere")
    refused(lambda: step_keys(backup, run.run_id, newest, high_water=elsewhere), Unanchored, "DP079", "older copy")
    # What no file can prevent, and the threat model says: under a head from before, the copy repeats the noise.
    repeated = step_keys(backup, run.run_id, old, high_water=elsewhere)
    original = step_keys(path, run.run_id, newest)
    assert set(original) < set(repeated)
    assert all(repeated[step] == key for step, key in original.items())
    # The two histories are then told apart by any head of the other.
    report = verify(backup, trust=OWNER.public, expect_head=newest)
    assert (report.ok, report.anchored) == (False, False)


@pytest.mark.parametrize("mode", ["fresh", "committed"])
def test_two_processes_with_one_ledger_and_one_key_never_draw_the_same_noise(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "ledger"
    ledger = make_ledger(path)
    if mode == "committed":
        run_id = committed_run(ledger, make_plan(40), lease_steps=1).run_id
    else:
        run_id = ledger.sign_plan(make_plan(40), owner=OWNER)
    head = str(ledger.head)
    ledger.close()

    def work(name: str) -> None:
        key = plan_key() if mode == "committed" else None  # of this process: a fork would drop its parent's
        with reopen(path) as own, own.start(run_id, plan_key=key, expect_head=head, lease_steps=3) as run:
            keys = [key_of(receipt, Purpose.GRAD_NOISE).hex() for receipt in run]
        (tmp_path / name).write_text("\n".join(keys))

    children = []
    for name in ("one", "two"):
        child = os.fork()
        if child == 0:
            work(name)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    keys = [key for name in ("one", "two") for key in (tmp_path / name).read_text().split()]
    assert len(keys) == len(set(keys)) == 40


# --- the file of the plan key -----------------------------------------------------------------------------------------


def test_a_plan_key_file_is_encrypted_and_opens_with_its_passphrase_alone(tmp_path: Path) -> None:
    place = tmp_path / "plan.key"
    made = new_plan_key(place, b"secret")
    assert place.stat().st_mode & 0o777 == 0o600
    assert load_plan_key(place, b"secret").reveal() == made.reveal()
    assert made.reveal().hex() not in place.read_text()
    assert made.commitment == hashlib.sha256(b"dpbudget/plan-key/v1\0" + made.reveal()).hexdigest()
    refused(lambda: load_plan_key(place, b"Secret"), Unreadable, "DP070", "passphrase is wrong")
    refused(lambda: load_plan_key(place, None), Unreadable, "DP070", "needs a passphrase")
    refused(lambda: new_plan_key(place, b"secret"), InvalidParameter, "DP074", "exists")
    refused(lambda: new_plan_key(tmp_path / "x", b""), InvalidParameter, "DP073", "needs a passphrase")
    place.chmod(0o640)
    refused(lambda: load_plan_key(place, b"secret"), UnsafeKeyFile, "DP073", "mode 0640")


def test_a_plan_key_file_that_was_changed_does_not_open(tmp_path: Path) -> None:
    place = tmp_path / "plan.key"
    new_plan_key(place, b"secret")
    line = place.read_bytes()
    record = json.loads(line)
    for changed in (
        {**record, "salt": "00" * 16},
        {**record, "sealed": "00" * 48},
        {**record, "sealed": record["sealed"][::-1]},
        {**record, "v": 2},
        {**record, "type": "dpbudget-step-key"},
        {**record, "more": 1},
        {**record, "salt": 7},
        {**record, "salt": "00" * 15},
    ):
        place.write_text(json.dumps(changed, sort_keys=True, separators=(",", ":")) + "\n")
        refused(lambda: load_plan_key(place, b"secret"), Unreadable, "DP070", "does not open|is no plan key")
    for garbage in (b"", b"x", line[:-9], line + line):
        place.write_bytes(garbage)
        refused(lambda: load_plan_key(place, b"secret"), Unreadable, "DP070", "is no plan key")


def test_two_plan_keys_are_never_equal_and_no_lease_key_commits_as_one(tmp_path: Path) -> None:
    keys = [new_plan_key(tmp_path / f"{number}.key", b"secret") for number in range(3)]
    assert len({bytes_of(key) for key in keys}) == 3
    assert LeaseKey().commitment != plan_commitment(LeaseKey().reveal())
    assert plan_commitment(b"\x07" * 32) != hashlib.sha256(b"dpbudget/lease-key/v1\0" + b"\x07" * 32).hexdigest()


# --- what verification says -------------------------------------------------------------------------------------------


def test_verify_says_of_every_run_where_its_noise_comes_from(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "ledger")
    fresh = ledger.sign_plan(make_plan(2, epsilon=0.5), owner=OWNER)
    waits = ledger.sign_plan(make_plan(2, epsilon=0.5), owner=OWNER)
    ledger.commit(waits, plan_key(9))
    run = committed_run(ledger, make_plan(2, epsilon=0.5))
    ledger.close()
    report = verify(tmp_path / "ledger", trust=OWNER.public)
    said = report.summary()
    assert "noise keys of 1 run: fresh, a new one in every lease" in said
    assert f"noise keys of run {waits}: committed to {plan_key(9).commitment}, without an auditor's entropy yet" in said
    assert f"noise keys of run {run.run_id}: committed to {plan_key().commitment}, with the entropy {GIVEN}" in said
    assert any("of two copies that both went on" in warning for warning in report.warnings)
    rows = {row["run"]: (row["noise_keys"], row["commitment"], row["entropy"]) for row in report.to_json()["runs"]}
    assert rows == {
        fresh: ("fresh", None, None),
        waits: ("committed", plan_key(9).commitment, None),
        run.run_id: ("committed", plan_key().commitment, GIVEN),
    }
    assert not any("two copies" in warning for warning in verify_fresh(tmp_path))


def verify_fresh(folder: Path) -> tuple[str, ...]:
    with make_ledger(folder / "fresh.ledger") as ledger:
        ledger.sign_plan(make_plan(2), owner=OWNER)
    return verify(folder / "fresh.ledger", trust=OWNER.public).warnings


def test_a_report_of_many_committed_runs_names_the_first_ten(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "ledger")
    for number in range(12):
        ledger.commit(ledger.sign_plan(make_plan(2, epsilon=0.1), owner=OWNER), plan_key(number))
    ledger.close()
    said = verify(tmp_path / "ledger", trust=OWNER.public).summary()
    assert said.count("noise keys of run ") == 10
    assert "and of 2 more runs: committed" in said
    assert "noise keys of 0" not in said
