"""Attacks 13 to 15: forks, copies that run twice, and ledgers restored from a backup."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from attackkit import (
    OWNER,
    THREAT_MODEL,
    call,
    charged,
    ended,
    export,
    head_of,
    make,
    plan,
    reopen,
    signed,
    spawn,
    spend,
    spent,
    verify,
)

from dpbudget.errors import ReceiptSpent, Tampered
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.store.jsonl import read_export

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def _refused(act: Callable[[], object]) -> None:
    with pytest.raises(ReceiptSpent) as caught:
        act()
    assert caught.value.code == "DP076"


def test_attack_13_a_child_forked_after_the_start_gets_no_step_and_no_key(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = make(path)
    run = ledger.start(ledger.sign_plan(plan(), owner=OWNER), lease_steps=5)
    receipt = run.next_receipt()

    def try_everything() -> None:
        _refused(run.next_receipt)
        _refused(lambda: receipt.use("grad-noise"))
        _refused(lambda: ledger.note("checked"))
        assert receipt.key._key is None  # erased, not only refused
        run.close()

    assert ended(spawn(try_everything)) == 0
    assert len(receipt.use("grad-noise")) == 32
    assert [receipt.step for receipt in run] == list(range(1, 20))  # the parent goes on
    ledger.close()
    assert charged(path) == 20


def _take(path: Path, run_id: str) -> tuple[Receipt, bytes]:
    """One receipt on a machine that has seen nothing of the ledger, and its lease key."""
    with reopen(path, high_water=False) as ledger, ledger.start(run_id, lease_steps=1) as run:
        receipt = run.next_receipt()
        return receipt, receipt.key.reveal()


def test_attack_14_two_copies_that_both_run_share_no_randomness_and_a_witness_sees_the_fork(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger", tmp_path / "copy"
    run_id = signed(path)
    shutil.copy(path, copy)
    (one, key), (two, other) = _take(path, run_id), _take(copy, run_id)
    assert one.step == two.step == 0  # the same step, released twice
    assert len({key, other}) == len({one.fresh, two.fresh}) == len({one.lease_nonce, two.lease_nonce}) == 2
    witnessed = head_of(path)
    assert verify(path, expect_head=witnessed).anchored
    fork = verify(copy, expect_head=witnessed)
    assert (fork.exit_code, "another history" in fork.problems[0]) == (5, True)


def test_attack_14_on_one_machine_the_second_copy_is_refused(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger", tmp_path / "copy"
    run_id = signed(path)
    shutil.copy(path, copy)
    spend(path, run_id, 1)
    spend(copy, run_id, 3, high_water=False)
    with pytest.raises(Tampered, match="another history") as caught:
        reopen(copy)
    assert caught.value.code == "DP079"
    spend(path, run_id, 1)  # the first one goes on


def test_attack_14_a_resumed_snapshot_that_repeats_its_randomness_is_noticed_and_the_rest_is_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger"
    run_id = signed(path)
    # A clone whose kernel generator was not told that it is one draws the same bytes again.
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    spend(path, run_id, 2)
    report = verify(path)
    assert report.exit_code == 1
    assert "repeats the nonce" in report.problems[0]
    stated = " ".join(THREAT_MODEL.read_text(encoding="utf-8").split())
    assert (
        "virtual machine that is snapshotted and resumed gets new randomness (the kernel's VM generation id)" in stated
    )


def test_attack_15_an_old_ledger_restored_from_a_backup_is_refused(tmp_path: Path) -> None:
    path, backup = tmp_path / "ledger", tmp_path / "backup"
    run_id = spent(path, 1)
    shutil.copy(path, backup)
    spend(path, run_id, 4)
    head = head_of(path)
    shutil.copy(backup, path)
    had = len(read_export(export(path)).entries)
    with pytest.raises(Tampered, match=rf"has seen \d+ records of the ledger, and this copy has {had}") as caught:
        reopen(path)
    assert caught.value.code == "DP079"
    # Whoever kept a head sees it on any machine.
    call("ledger", "verify", path, "--trust", OWNER.public.hex, "--expect-head", head, code=5)
