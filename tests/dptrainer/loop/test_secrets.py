"""No key leaves the process: not in checkpoints, ledgers, logs, reprs or tracebacks, whatever form it might take."""

from __future__ import annotations

import base64
import io
import logging
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import OWNER, linear_data, linear_model, make_ledger, make_plan, make_run, reopen

from dpbudget.ledger import noise_keys
from dpbudget.ledger.noise_keys import KeyBytes, LeaseKey
from dptrainer.checkpoint import load_checkpoint, save_checkpoint
from dptrainer.noise import boxmuller, gaussian, keys, native
from dptrainer.noise.keys import Purpose, step_key
from dptrainer.trainer import PrivateTrainer
from dptrainer.tree import TreeTrainer
from dptrainer.values import ClippedSum


def forms(key: bytes) -> list[bytes]:
    """A key as it might be written, in whole or from its eighth byte on."""
    found = []
    for part in (bytes(key), bytes(key)[8:]):
        shown = [part.hex(), part.hex().upper(), part.hex(" "), part.hex(":"), repr(part)[2:-1], str(list(part))[1:-1]]
        shown += [base64.b64encode(part).decode().rstrip("="), base64.urlsafe_b64encode(part).decode().rstrip("=")]
        shown += [str(int.from_bytes(part, "little")), str(int.from_bytes(part, "big"))]
        found += [part, *(text.encode() for text in shown)]
    return found


class Watched:
    """The keys that a process had, and where they turned up."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()

    def expect_none_in(self, content: bytes | str) -> None:
        raw = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
        assert self.keys, "no key was seen: nothing was tested"
        assert [form for key in self.keys for form in forms(key) if form in raw] == []


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Every key that is drawn or derived from here on."""
    found, ratchet, expand, init = Watched(), noise_keys.run_ratchet, keys.expand, LeaseKey.__init__

    def run_ratchet(key: bytes, count: int) -> bytearray:
        made = ratchet(key, count)
        found.keys.update(bytes(made[at : at + 32]) for at in range(0, len(made), 32))
        return made

    def drawn(self: LeaseKey, *given: Any) -> None:
        init(self, *given)
        found.keys.add(bytes(self.reveal()))

    def expanded(key: bytes, info: bytes) -> KeyBytes:
        made = expand(key, info)
        found.keys.update((bytes(key), bytes(made)))
        return made

    monkeypatch.setattr(noise_keys, "run_ratchet", run_ratchet)
    monkeypatch.setattr(LeaseKey, "__init__", drawn)
    monkeypatch.setattr(keys, "expand", expanded)
    return found


def test_the_search_finds_every_form() -> None:
    found, key = Watched(), os.urandom(32)
    found.keys.add(key)
    found.expect_none_in(os.urandom(1000))
    for form in forms(key):
        with pytest.raises(AssertionError):
            found.expect_none_in(b"before" + form + b"after")


def parts(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


@pytest.mark.parametrize("compiled", [True, False])
def test_training_leaves_no_key_in_ledger_checkpoint_log_or_output(
    tmp_path: Path,
    watched: Watched,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
) -> None:
    made = native.LIBRARY.get() if compiled else None
    monkeypatch.setattr(native, "kernel_for", lambda values: made)
    caplog.set_level(logging.DEBUG)
    ledger = make_ledger(tmp_path / "ledger")
    run = ledger.start(ledger.sign_plan(make_plan(), owner=OWNER), lease_steps=2)
    model = linear_model()
    optimizer = parts(model)
    trainer = PrivateTrainer(model, optimizer, F.cross_entropy, linear_data(), run)
    result = trainer.fit()
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, run=run, head=str(ledger.head))
    load_checkpoint(tmp_path / "checkpoint", linear_model(seed=9), run=run)
    logging.getLogger("test").debug("%r %r %r %r", run, trainer, result, ledger)
    run.close()
    assert len(watched.keys) >= 2 * 4 + 2  # two purposes a step, two leases
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        watched.expect_none_in(path.read_bytes())
    watched.expect_none_in(caplog.text)
    watched.expect_none_in("".join(capfd.readouterr()))
    watched.expect_none_in(repr(reopen(tmp_path / "ledger")))


def failing(*given: Any, **named: Any) -> Any:
    raise MemoryError("induced")


def trained_by(trainer: Any, rate: float = 0.5, named: Any = None, **changes: Any) -> Callable[[], object]:
    def fit() -> object:
        model = linear_model()
        run = make_run(rate=rate, **changes)
        return trainer(model, parts(model), F.cross_entropy, linear_data(), run, **(named or {})).fit()

    return fit


FAILURES = [
    (trained_by(PrivateTrainer), "dptrainer.noise.gaussian.fill"),
    (trained_by(PrivateTrainer), "dptrainer.noise.boxmuller._radii"),
    (trained_by(PrivateTrainer), "dptrainer.noise.gaussian.disjoint"),
    (trained_by(PrivateTrainer), "dptrainer.noise.source.add_gaussians_"),
    (trained_by(PrivateTrainer), "dptrainer.sampling.keystream"),
    (trained_by(PrivateTrainer), "dptrainer.sampling._dense"),
    (trained_by(PrivateTrainer), "dptrainer.noise.source.NoisySum"),
    (trained_by(PrivateTrainer, sigma=10.0, noise="exact"), "dptrainer.noise.rounded.ziv.settle"),
    (trained_by(PrivateTrainer, sigma=10.0, noise="exact"), "dptrainer.noise.exact.add_rounded_"),
    (trained_by(TreeTrainer, rate=1.0, named={"steps_per_pass": 4}), "dptrainer.noise.tree.add_gaussian_"),
    (trained_by(TreeTrainer, rate=1.0, named={"steps_per_pass": 4}), "dptrainer.allocation.keystream"),
]


@pytest.mark.parametrize(("fit", "place"), FAILURES)
def test_tracebacks_show_no_key_even_with_the_variables_of_every_frame(
    fit: Callable[[], object],
    place: str,
    watched: Watched,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(native, "kernel_for", lambda values: None)
    monkeypatch.setattr(place, failing)
    with pytest.raises(MemoryError) as caught:
        fit()
    logging.getLogger("test").exception("failed", exc_info=caught.value)
    watched.expect_none_in(caplog.text)
    lines = list(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert any("secret bytes>" in line for line in lines), "no frame held a key: nothing was tested"
    watched.expect_none_in("".join(lines))


def test_what_holds_keys_words_or_private_sums_shows_none_of_them(watched: Watched) -> None:
    receipt = make_run().next_receipt()
    key = step_key(receipt, Purpose.GRAD_NOISE)
    private = torch.tensor([0.12345678])
    clipped = ClippedSum({"w": private}, 1.0, {"bits": private})
    bench = boxmuller.Workbench(128)
    bench.words[:] = os.urandom(64 * 128)
    bench.box_muller(128)
    words = KeyBytes(bench.words[:32])
    watched.keys.add(bytes(words))
    piece = gaussian._Piece(private, 0, 0)
    shown = f"{receipt!r} {receipt.key!r} {key!r} {key} {[key]!r} {clipped!r} {clipped} {bench!r} {piece!r}"
    shown += f" {native.LIBRARY!r} {native.LIBRARY.get()!r} {words!r} %s %r" % (key, key)
    watched.expect_none_in(shown)
    assert "0.1234" not in shown
    assert "sensitivity 1.0" in shown


def test_keys_go_into_no_pickle() -> None:
    receipt = make_run().next_receipt()
    for secret in (receipt, receipt.key):
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dump(secret, io.BytesIO())
