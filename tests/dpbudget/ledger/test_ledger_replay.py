"""Noise keys that are kept for an auditor: sealed before the lease, opened against the ledger, one step at a time."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ledgerkit import OWNER, make_ledger, make_plan

from dpbudget.errors import DPBudgetError, InvalidParameter, StorageFailed, Tampered, Unreadable, UnsafeKeyFile
from dpbudget.ledger import sealed as sealed_module
from dpbudget.ledger.auditor import (
    AuditorKey,
    AuditorPublicKey,
    load_auditor_key,
    load_auditor_public_key,
    new_auditor_key,
)
from dpbudget.ledger.keys import load_key, load_public_key, new_key
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.replay import RunReplay, StepKey
from dpbudget.ledger.run import Run
from dpbudget.ledger.sealed import SealedKeys, open_sealed, seal_line
from dpbudget.ledger.step_keys import Purpose

Started = tuple[Ledger, Run, SealedKeys, AuditorKey]


@pytest.fixture
def auditor(tmp_path: Path) -> AuditorKey:
    return new_auditor_key(tmp_path / "keys" / "auditor.key")


def started(tmp_path: Path, auditor: AuditorKey, steps: int = 5, **options: Any) -> tuple[Ledger, Run, SealedKeys]:
    ledger = make_ledger(tmp_path / "ledger")
    kept = SealedKeys(tmp_path / "noise.sealed", auditor.public)
    run = ledger.start(ledger.sign_plan(make_plan(steps), owner=OWNER), keep_keys=kept, **options)
    return ledger, run, kept


def lines_of(kept: SealedKeys) -> list[dict[str, Any]]:
    return [json.loads(line) for line in kept.path.read_bytes().splitlines()]


def derived(receipt: Receipt, purpose: str) -> bytes:
    """The step key, from RFC 5869 and the documented fields alone."""
    info = b"dpnoise/v1".ljust(16, b"\0") + purpose.encode().ljust(16, b"\0") + receipt.lease_nonce
    info += struct.pack("<Q", receipt.step) + receipt.fresh
    return hmac.new(receipt.use(purpose), info + b"\x01", hashlib.sha256).digest()


# --- keeping ---------------------------------------------------------------------------------------------------------


def test_the_key_of_a_lease_is_on_disk_before_its_lease_is(
    tmp_path: Path, auditor: AuditorKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, run, kept = started(tmp_path, auditor, lease_steps=2)
    seen: list[tuple[int, int, bool]] = []
    synced: list[int] = []
    genuine, sync = ledger._journal.transact, os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino) or sync(number))

    def watched(write: Callable[..., Any]) -> Any:
        seen.append((ledger.state.charged, len(lines_of(kept)), kept.path.stat().st_ino in synced))
        return genuine(write)

    monkeypatch.setattr(ledger._journal, "transact", watched)
    for _ in range(4):
        run.next_receipt()
    assert seen == [(0, 1, True), (2, 2, True)]


def test_nothing_is_kept_unless_it_was_asked_for(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "ledger")
    before = {path.name for path in tmp_path.iterdir()}
    with ledger.start(ledger.sign_plan(make_plan(3), owner=OWNER)) as run:
        assert len(list(run)) == 3
    assert {path.name for path in tmp_path.iterdir()} == before


def test_what_is_kept_says_which_lease_it_is_of_and_not_its_key(tmp_path: Path, auditor: AuditorKey) -> None:
    ledger, run, kept = started(tmp_path, auditor, lease_steps=5)
    receipt = run.next_receipt()
    (line,) = lines_of(kept)
    assert sorted(line) == ["auditor", "commitment", "ephemeral", "ledger", "run", "sealed", "type", "v"]
    assert (line["ledger"], line["run"], line["type"]) == (ledger.id, run.run_id, "lease-key")
    assert line["auditor"] == auditor.public.hex
    assert kept.path.stat().st_mode & 0o777 == 0o600
    assert receipt.key.reveal().hex() not in kept.path.read_text()


@pytest.mark.parametrize("failing", ["fsync", "write", "short"])
def test_a_key_that_cannot_be_kept_charges_and_releases_nothing_and_is_not_tried_again(
    tmp_path: Path, auditor: AuditorKey, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    ledger, run, _kept = started(tmp_path, auditor, lease_steps=1)
    run.next_receipt()
    calls: list[int] = []

    def fail(number: int, *rest: Any) -> int:
        calls.append(number)
        if failing == "short":
            return 1
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(sealed_module.os, "fsync" if failing == "fsync" else "write", fail)
        with pytest.raises(StorageFailed, match="could not be kept") as caught:
            run.next_receipt()
        assert caught.value.code == "DP075"
        assert caught.value.hint
    assert ledger.state.charged == 1
    with pytest.raises(StorageFailed, match="failed before"):
        run.next_receipt()
    assert len(calls) == 1
    assert ledger.state.charged == 1


def test_a_torn_line_spoils_none_of_its_neighbours(tmp_path: Path, auditor: AuditorKey) -> None:
    ledger, run, kept = started(tmp_path, auditor, lease_steps=1)
    receipts = [run.next_receipt()]
    with open(kept.path, "ab") as file:
        file.write(b'{"auditor":"0123')  # what a crash in the middle of a write leaves
    receipts.append(run.next_receipt())
    expected = [derived(receipt, "grad-noise") for receipt in receipts]
    ledger.close()
    replay = RunReplay.read(tmp_path / "ledger", run.run_id, trust=OWNER.public)
    found = [replay.step_key(step, "grad-noise", sealed=kept.path, auditor=auditor) for step in (0, 1)]
    assert [one.key for one in found] == expected


def test_processes_that_share_a_file_do_not_mix_their_lines(tmp_path: Path, auditor: AuditorKey) -> None:
    kept = SealedKeys(tmp_path / "noise.sealed", auditor.public)
    kept.prepare()
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            for index in range(25):
                digits = f"{number:02x}{index:02x}"
                kept.keep("lease-key", ledger="00" * 32, run="00" * 16, commitment=digits * 16, key=bytes(32))
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len({line["commitment"] for line in lines_of(kept)}) == 100


def _mode(path: Path) -> None:
    path.write_bytes(b"")
    path.chmod(0o640)


def _link(path: Path) -> None:
    path.with_name("other").write_bytes(b"")
    path.with_name("other").chmod(0o600)
    path.symlink_to("other")


def _second_name(path: Path) -> None:
    path.touch(0o600)
    os.link(path, path.with_name("other"))


@pytest.mark.parametrize("make", [_mode, _link, _second_name, lambda path: os.mkfifo(path, 0o600)])
def test_a_file_that_others_could_read_or_replace_is_refused_before_anything_is_charged(
    tmp_path: Path, auditor: AuditorKey, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "noise.sealed")
    ledger = make_ledger(tmp_path / "ledger")
    run_id = ledger.sign_plan(make_plan(), owner=OWNER)
    with pytest.raises(UnsafeKeyFile) as caught:
        ledger.start(run_id, keep_keys=SealedKeys(tmp_path / "noise.sealed", auditor.public))
    assert caught.value.code == "DP073"
    assert caught.value.hint


def test_a_file_of_another_user_is_refused(
    tmp_path: Path, auditor: AuditorKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = SealedKeys(tmp_path / "noise.sealed", auditor.public)
    kept.prepare()
    monkeypatch.setattr(sealed_module.os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(UnsafeKeyFile, match="belongs to user"):
        kept.prepare()


def test_a_file_that_is_removed_under_a_run_ends_it(tmp_path: Path, auditor: AuditorKey) -> None:
    ledger, run, kept = started(tmp_path, auditor, lease_steps=1)
    run.next_receipt()
    kept.path.unlink()
    with pytest.raises(Unreadable, match="No such file"):
        run.next_receipt()
    assert ledger.state.charged == 1
    with pytest.raises(Unreadable, match="make the folder first"):
        SealedKeys(tmp_path / "no" / "where", auditor.public).prepare()


def test_something_else_in_the_place_of_the_auditors_key_is_refused(tmp_path: Path) -> None:
    for wrong in ("auditor.key.pub", OWNER.public, None):
        with pytest.raises(InvalidParameter, match="not an auditor's public key") as caught:
            SealedKeys(tmp_path / "noise.sealed", wrong)  # type: ignore[arg-type]
        assert caught.value.code == "DP080"


# --- opening ---------------------------------------------------------------------------------------------------------


def test_an_auditor_gets_the_step_keys_that_the_run_used(tmp_path: Path, auditor: AuditorKey) -> None:
    ledger, run, kept = started(tmp_path, auditor, steps=7, lease_steps=3)
    expected = {}
    for receipt in run:
        expected[receipt.step] = (derived(receipt, "grad-noise"), derived(receipt, "sampling"))
        run.settle(receipt, f"{receipt.step:064x}")
    ledger.close()
    replay = RunReplay.read(tmp_path / "ledger", trust=OWNER.public)
    for step, keys in expected.items():
        noise, batch = (
            replay.step_key(step, purpose, sealed=kept.path, auditor=auditor)
            for purpose in ("grad-noise", Purpose.SAMPLING)
        )
        assert (noise.key, batch.key) == keys
        assert (noise.run_id, noise.step, noise.purpose) == (run.run_id, step, "grad-noise")
        assert noise.output == batch.output == f"{step:064x}"
        assert (noise.noise_multiplier, noise.clip_norm) == (1.0, 1.0)
        assert noise.rate_k == run.plan.phases[0].rate_k


def refused(act: Callable[[], object], kind: type[DPBudgetError], code: str, match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        act()
    assert caught.value.code == code
    assert caught.value.hint


def test_what_cannot_be_replayed_is_said(tmp_path: Path, auditor: AuditorKey) -> None:
    ledger, run, kept = started(tmp_path, auditor, steps=6, lease_steps=2)
    for _ in range(3):
        run.next_receipt()  # a third step, whose settle never reaches the disk
    ledger._journal.close()
    replay = RunReplay.read(tmp_path / "ledger", trust=OWNER.public)
    empty = tmp_path / "empty.sealed"
    empty.touch(0o600)
    strange = new_auditor_key(tmp_path / "other.key")

    def ask(step: int = 0, purpose: str = "grad-noise", where: Path = kept.path, key: AuditorKey = auditor) -> object:
        return replay.step_key(step, purpose, sealed=where, auditor=key)

    assert ask()
    refused(lambda: ask(2), Unreadable, "DP085", "has no settle record")
    refused(lambda: ask(5), Unreadable, "DP085", "was not charged")
    refused(lambda: ask(-1), Unreadable, "DP085", "was not charged")
    refused(lambda: ask(purpose="init"), InvalidParameter, "DP060", "unknown purpose 'init'")
    refused(lambda: ask(where=empty), Unreadable, "DP085", "holds no key of lease")
    refused(lambda: ask(key=strange), Tampered, "DP085", "does not open")
    refused(lambda: RunReplay.read(tmp_path / "ledger", "00"), InvalidParameter, "DP081", "no runs")
    foreign = new_key(tmp_path / "foreign.key").public
    refused(lambda: RunReplay.read(tmp_path / "ledger", trust=foreign), Tampered, "DP072", "belongs to owner")


def test_a_changed_byte_of_what_is_sealed_gives_no_key(tmp_path: Path, auditor: AuditorKey) -> None:
    facts = {"commitment": "ab" * 32, "ledger": "cd" * 32, "run": "ef" * 16, "type": "lease-key", "v": 1}
    line, place = seal_line(auditor.public, facts, b"\x07" * 32), tmp_path / "noise.sealed"
    place.write_bytes(line + b"\n")
    assert open_sealed(place, auditor, facts) == b"\x07" * 32
    for at in range(len(line)):
        for other in (line[at] ^ 1, line[at] ^ 2):
            place.write_bytes(line[:at] + bytes([other]) + line[at + 1 :] + b"\n")
            with pytest.raises((Tampered, Unreadable)) as caught:
                open_sealed(place, auditor, facts)
            assert caught.value.code == "DP085"


def test_the_key_of_one_lease_does_not_pass_for_that_of_another(tmp_path: Path, auditor: AuditorKey) -> None:
    ledger, run, kept = started(tmp_path, auditor, steps=4, lease_steps=2)
    list(run)
    ledger.close()
    first, second = kept.path.read_bytes().splitlines()
    replay = RunReplay.read(tmp_path / "ledger", trust=OWNER.public)
    commitments = [json.loads(line)["commitment"].encode() for line in (first, second)]
    kept.path.write_bytes(second.replace(commitments[1], commitments[0]) + b"\n")
    refused(
        lambda: replay.step_key(0, "grad-noise", sealed=kept.path, auditor=auditor), Tampered, "DP085", "does not open"
    )
    # Whoever trains may seal whatever they like; what the ledger commits to tells.
    facts = {"commitment": commitments[0].decode(), "ledger": ledger.id, "run": run.run_id, "type": "lease-key", "v": 1}
    kept.path.write_bytes(seal_line(auditor.public, facts, b"\x07" * 32) + b"\n")
    refused(
        lambda: replay.step_key(0, "grad-noise", sealed=kept.path, auditor=auditor), Tampered, "DP085", "commits to"
    )
    # A line in front that claims to be the same hides nothing.
    forged = second.replace(commitments[1], commitments[0])
    kept.path.write_bytes(forged + b"\n" + first + b"\n")
    assert replay.step_key(1, "grad-noise", sealed=kept.path, auditor=auditor).step == 1


# --- the auditor's key -----------------------------------------------------------------------------------------------


def test_an_auditors_key_is_a_file_like_a_signing_key(tmp_path: Path) -> None:
    made = new_auditor_key(tmp_path / "auditor.key", b"secret")
    assert (tmp_path / "auditor.key").stat().st_mode & 0o777 == 0o600
    again = load_auditor_key(tmp_path / "auditor.key", b"secret")
    assert again.public == made.public == load_auditor_public_key(tmp_path / "auditor.key.pub")
    assert load_auditor_public_key(made.public.hex) == made.public
    refused(lambda: load_auditor_key(tmp_path / "auditor.key"), Unreadable, "DP070", "needs a passphrase")
    refused(lambda: load_auditor_key(tmp_path / "auditor.key", b"wrong"), Unreadable, "DP070", "passphrase is wrong")
    refused(lambda: new_auditor_key(tmp_path / "auditor.key"), InvalidParameter, "DP074", "exists")
    refused(lambda: new_auditor_key(tmp_path / "x.key", b""), InvalidParameter, "DP073", "empty")
    (tmp_path / "auditor.key").chmod(0o644)
    refused(lambda: load_auditor_key(tmp_path / "auditor.key", b"secret"), UnsafeKeyFile, "DP073", "mode 0644")


def test_signing_keys_and_auditors_keys_do_not_pass_for_each_other(tmp_path: Path) -> None:
    new_auditor_key(tmp_path / "auditor.key")
    new_key(tmp_path / "owner.key")
    refused(lambda: load_auditor_key(tmp_path / "owner.key"), Unreadable, "DP070", "no auditor's key")
    refused(lambda: load_key(tmp_path / "auditor.key"), Unreadable, "DP070", "another algorithm")
    refused(lambda: load_public_key(tmp_path / "auditor.key.pub"), Unreadable, "DP070", "not a public key of the kind")
    refused(lambda: load_auditor_public_key(tmp_path / "owner.key.pub"), Unreadable, "DP070", "of the kind x25519")


@pytest.mark.parametrize("raw", [bytes(32), b"\x01" + bytes(31), bytes(31), (2**255 - 19).to_bytes(32, "little")])
def test_a_key_to_which_anybody_could_seal_and_open_is_refused(raw: bytes) -> None:
    with pytest.raises(Tampered, match="unusable") as caught:
        AuditorPublicKey(raw)
    assert caught.value.code == "DP080"


def test_two_seals_of_one_key_have_nothing_in_common(auditor: AuditorKey) -> None:
    (one, first), (two, second) = (auditor.public.seal(b"\x07" * 32, b"beside") for _ in range(2))
    assert one != two
    assert first != second
    assert auditor.open(one, first, b"beside") == auditor.open(two, second, b"beside") == b"\x07" * 32
    for ephemeral, sealed, beside in ((two, first, b"beside"), (one, first, b"other"), (bytes(32), first, b"beside")):
        refused(
            lambda e=ephemeral, s=sealed, b=beside: auditor.open(e, s, b),
            Tampered,
            "DP085",
            "does not open",  # type: ignore[misc]
        )


def test_the_seal_is_x25519_hkdf_and_chacha20_poly1305_as_the_page_says(auditor: AuditorKey) -> None:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    ephemeral, sealed = auditor.public.seal(b"\x07" * 32, b"beside")
    shared = auditor._key.exchange(X25519PublicKey.from_public_bytes(ephemeral))
    extracted = hmac.new(ephemeral + auditor.public.raw, shared, hashlib.sha256).digest()
    key = hmac.new(extracted, b"dpbudget/sealed-key/v1\x01", hashlib.sha256).digest()
    assert ChaCha20Poly1305(key).decrypt(bytes(12), sealed, b"beside") == b"\x07" * 32


def test_an_auditors_key_is_never_shown_or_copied(auditor: AuditorKey) -> None:
    secret = auditor._key.private_bytes_raw()
    assert secret.hex() not in repr(auditor) + repr(auditor.public)
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never pickled"):
            act(auditor)


# --- the file of one step key ----------------------------------------------------------------------------------------


@pytest.fixture
def step() -> StepKey:
    return StepKey(
        ledger_id="ab" * 32,
        run_id="cd" * 16,
        step=3,
        purpose=Purpose.GRAD_NOISE,
        rate_k=1 << 60,
        noise_multiplier=1.1,
        clip_norm=0.5,
        output="ef" * 32,
        key=b"\x07" * 32,
    )


def test_a_step_key_is_written_for_its_owner_alone_and_read_again(tmp_path: Path, step: StepKey) -> None:
    step.write(tmp_path / "step.key")
    assert (tmp_path / "step.key").stat().st_mode & 0o777 == 0o600
    again = StepKey.load(tmp_path / "step.key")
    assert vars(again) == vars(step)
    refused(lambda: step.write(tmp_path / "step.key"), InvalidParameter, "DP074", "exists")
    (tmp_path / "step.key").chmod(0o604)
    refused(lambda: StepKey.load(tmp_path / "step.key"), UnsafeKeyFile, "DP073", "mode 0604")


def test_what_is_no_step_key_is_refused(tmp_path: Path, step: StepKey) -> None:
    place = tmp_path / "step.key"
    step.write(place)
    line = place.read_bytes()
    for change in (
        (b'"grad-noise"', b'"grad"'),
        (b'"v":1', b'"v":2'),
        (b'"step":3', b'"step":-3'),
        (b'"step":3', b'"step":true'),
        (b'"' + b"07" * 32 + b'"', b'"' + b"07" * 31 + b'"'),
        (b'"' + b"ef" * 32 + b'"', b'"EF"'),
        (b'"' + b"cd" * 16 + b'"', b"7"),
        (b"{", b"{ "),
        (line, b""),
        (line, b"[]\n"),
    ):
        assert change[0] in line
        place.write_bytes(line.replace(*change))
        refused(lambda: StepKey.load(place), Unreadable, "DP070", "no step key")


def test_a_step_key_is_never_shown_or_copied(step: StepKey) -> None:
    assert "07" * 16 not in repr(step)
    assert repr(step.key) not in repr(step)
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never pickled"):
            act(step)
