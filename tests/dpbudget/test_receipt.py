"""Receipts and lease keys: once, in one process, never shown."""

from __future__ import annotations

import copy
import gc
import hashlib
import hmac
import os
import pickle

import pytest

from dpbudget.errors import ReceiptSpent
from dpbudget.ledger.noise_keys import LeaseKey, commitment_matches
from dpbudget.ledger.receipt import Receipt
from dpbudget.mechanisms import Adjacency


def make_receipt(key: LeaseKey | None = None) -> Receipt:
    return Receipt(
        run_id="ab" * 16, step=3, steps=10, rate_k=1 << 62, noise_multiplier=1.0, clip_norm=1.0, nominal_size=100,
        max_parameters=1000, noise="secure", adjacency=Adjacency.ADD_REMOVE, plan_digest="0" * 64,
        lease_nonce=bytes(32), fresh=bytes(16), key=key or LeaseKey(),
    )  # fmt: skip


def test_a_receipt_works_once_for_each_purpose():
    receipt = make_receipt()
    assert receipt.use("sampling") == receipt.use("grad-noise")
    assert receipt.was_used("sampling")
    with pytest.raises(ReceiptSpent) as caught:
        receipt.use("grad-noise")
    assert caught.value.code == "DP077"
    assert not receipt.was_used("init")


def test_the_key_of_a_receipt_is_erased_when_noise_and_sampling_are_derived():
    for order in (["sampling", "grad-noise"], ["grad-noise", "sampling"]):
        receipt = make_receipt()
        held = receipt.key._key
        receipt.use(order[0])
        assert any(held)
        receipt.use(order[1])
        assert held == bytes(32)
        for purpose, code in ((order[0], "DP077"), ("tie-break", "DP076")):
            with pytest.raises(ReceiptSpent) as caught:
                receipt.use(purpose)
            assert caught.value.code == code


def test_the_divisor_comes_from_the_public_nominal_size():
    assert make_receipt().expected_batch_size == 25.0


def test_a_receipt_and_its_key_are_never_copied_or_pickled():
    receipt = make_receipt()
    for value in (receipt, receipt.key, LeaseKey().ratchet(2)):
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="never pickled or copied"):
                attempt(value)


def test_no_representation_shows_the_key():
    receipt = make_receipt()
    secret = receipt.key.reveal()
    shown = repr(receipt) + str(receipt) + repr(receipt.key) + repr(vars(receipt.key).keys())
    assert secret.hex() not in shown
    assert repr(secret) not in shown
    assert "key" not in repr(receipt).replace("lease_key", "")


def test_the_commitment_binds_the_key():
    key = LeaseKey()
    assert key.commitment == hashlib.sha256(b"dpbudget/lease-key/v1\0" + key.reveal()).hexdigest()
    assert commitment_matches(key.commitment, key.reveal())
    assert not commitment_matches(key.commitment, LeaseKey().reveal())


def test_an_erased_key_gives_nothing():
    key = LeaseKey()
    key.wipe()
    key.wipe()
    with pytest.raises(ReceiptSpent, match="erased"):
        key.reveal()


def test_the_ratchet_is_hmac_of_the_key_before_and_gives_each_step_once():
    key = LeaseKey()
    link, expected = key.reveal(), []
    for _ in range(5):
        expected.append(hmac.new(link, b"step", hashlib.sha256).digest())
        link = hmac.new(link, b"next", hashlib.sha256).digest()
    keys = key.ratchet(5)
    buffer = keys._key
    assert [keys.take(offset).reveal() for offset in (2, 0, 1, 4, 3)] == [expected[i] for i in (2, 0, 1, 4, 3)]
    assert buffer == bytes(160)
    for taken in (0, 4, 5):  # and what was never there
        with pytest.raises(ReceiptSpent) as caught:
            keys.take(taken)
        assert caught.value.code == "DP077"


def test_what_ends_erases_its_secrets_and_those_that_come_too_late():
    key = LeaseKey()
    keys, derived = key.ratchet(2), key.beside(b"\x07" * 32)
    taken = keys.take(0)
    buffers = [secret._key for secret in (key, keys, derived, taken)]
    key.lifetime.end()
    key.lifetime.end()
    assert [any(buffer) for buffer in buffers] == [False] * 4
    late = derived.beside(b"\x08" * 32)
    for secret in (key, derived, taken, late):
        with pytest.raises(ReceiptSpent, match="erased") as caught:
            secret.reveal()
        assert caught.value.code == "DP076"
    with pytest.raises(ReceiptSpent, match="erased"):
        keys.take(1)


def test_a_secret_that_nobody_holds_is_overwritten_and_forgotten():
    key = LeaseKey()
    derived = key.beside(b"\x07" * 32)
    buffer, lifetime = derived._key, key.lifetime
    assert len(lifetime._secrets) == 2
    del derived
    gc.collect()
    assert buffer == bytes(32)
    assert len(lifetime._secrets) == 1


def test_two_keys_are_never_equal():
    assert len({LeaseKey().reveal() for _ in range(100)}) == 100


def test_a_forked_child_finds_no_key_while_its_parent_keeps_it():
    receipt = make_receipt()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = b"key"
        try:
            receipt.use("grad-noise")
        except ReceiptSpent as error:
            answer = error.code.encode()
        finally:
            os.write(writer, answer)
            os._exit(0)
    os.close(writer)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reader, 16) == b"DP076"
    os.close(reader)
    assert len(receipt.use("grad-noise")) == 32


def test_a_key_carried_over_a_process_boundary_is_refused_even_without_the_fork_handler(monkeypatch):
    key = LeaseKey()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(ReceiptSpent) as caught:
        key.reveal()
    assert caught.value.code == "DP076"
