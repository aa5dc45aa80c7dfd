"""Checkpoints: the ledger decides what was spent."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import OWNER, linear_data, linear_model, make_ledger, make_plan, make_run, reopen, same, snapshot
from torch import nn

from dpbudget.errors import DPBudgetError, InvalidParameter, PlanExhausted, PrivacyViolation, Tampered, Unreadable
from dpbudget.ledger.run import Run
from dptrainer.checkpoint import load_checkpoint, save_checkpoint
from dptrainer.trainer import PrivateTrainer


def trained(run: Run, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = linear_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def enough(done: int, epsilon: Any) -> bool:
        return done < steps

    PrivateTrainer(model, optimizer, F.cross_entropy, linear_data(), run, callbacks=[enough]).fit()
    return model, optimizer


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = linear_model(seed=9)
    return model, torch.optim.Adam(model.parameters(), lr=0.5)


def test_a_checkpoint_restores_weights_and_optimizer(tmp_path: Path) -> None:
    run = make_run(steps=5)
    model, optimizer = trained(run, 3)
    head = str(run.kept_ledger.head)
    saved = save_checkpoint(tmp_path / "c", model, optimizer, run=run, head=head)
    assert (saved.steps, saved.run_id, saved.head) == (3, run.run_id, head)
    other, adam = fresh()
    assert load_checkpoint(tmp_path / "c", other, adam, run=run) == saved
    assert same(other, snapshot(model))
    assert adam.state_dict()["param_groups"][0]["lr"] == 0.01
    torch.testing.assert_close(adam.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_tied_weights_come_back_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight

    run, model, other = make_run(), Tied(), Tied()
    save_checkpoint(tmp_path / "c", model, torch.optim.SGD(model.parameters()), run=run)
    load_checkpoint(tmp_path / "c", other, run=run)
    assert other.second.weight is other.first.weight
    assert torch.equal(other.first.weight, model.first.weight)


def test_resuming_continues_where_the_ledger_stands_not_where_the_file_does(tmp_path: Path) -> None:
    path = tmp_path / "a.ledger"
    ledger = make_ledger(path)
    run = ledger.start(ledger.sign_plan(make_plan(steps=6), owner=OWNER), lease_steps=1)
    model, optimizer = trained(run, 2)
    save_checkpoint(tmp_path / "old", model, optimizer, run=run)
    PrivateTrainer(model, optimizer, F.cross_entropy, linear_data(), run, callbacks=[lambda s, e: s < 3]).fit()
    run.close()
    ledger.close()

    ledger = reopen(path)
    run = ledger.start(run.run_id, lease_steps=1)
    restored, adam = fresh()
    assert load_checkpoint(tmp_path / "old", restored, adam, run=run).steps == 2
    assert run.charged == 5  # rolling weights back gives no budget back
    result = PrivateTrainer(restored, adam, F.cross_entropy, linear_data(), run).fit()
    assert (result.steps, result.charged) == (1, 6)
    with pytest.raises(PlanExhausted):
        run.next_receipt()
    ledger.close()


def test_weights_with_more_steps_than_the_ledger_are_refused(tmp_path: Path) -> None:
    path, copy = tmp_path / "a.ledger", tmp_path / "backup.ledger"
    ledger = make_ledger(path)
    run_id = ledger.sign_plan(make_plan(steps=6), owner=OWNER)
    ledger.close()
    copy.write_bytes(path.read_bytes())
    ledger = reopen(path)
    run = ledger.start(run_id)
    model, optimizer = trained(run, 4)
    save_checkpoint(tmp_path / "c", model, optimizer, run=run)
    ledger.close()
    with reopen(copy, high_water=False) as older:  # on another machine; this one would refuse the copy itself
        other, _ = fresh()
        before = snapshot(other)
        with pytest.raises(PrivacyViolation, match="4 charged steps, but this ledger has 0") as caught:
            load_checkpoint(tmp_path / "c", other, run=older.start(run_id))
        assert caught.value.code == "DP051"
        assert same(other, before)


def test_weights_of_another_run_are_refused(tmp_path: Path) -> None:
    run = make_run()
    model, optimizer = trained(run, 1)
    save_checkpoint(tmp_path / "c", model, optimizer, run=run)
    with pytest.raises(PrivacyViolation, match="and this is run") as caught:
        load_checkpoint(tmp_path / "c", *fresh(), run=make_run())
    assert caught.value.code == "DP051"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_changed_file_is_refused_before_anything_is_loaded(tmp_path: Path, name: str) -> None:
    run = make_run()
    model, optimizer = trained(run, 1)
    save_checkpoint(tmp_path / "c", model, optimizer, run=run)
    file = tmp_path / "c" / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    other, adam = fresh()
    before = snapshot(other)
    with pytest.raises(Tampered, match=name):
        load_checkpoint(tmp_path / "c", other, adam, run=run)
    assert same(other, before)


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("code in a checkpoint was run",))


def test_a_pickle_in_place_of_the_optimizer_runs_no_code(tmp_path: Path) -> None:
    run = make_run()
    model, optimizer = trained(run, 1)
    saved = save_checkpoint(tmp_path / "c", model, optimizer, run=run)
    file = tmp_path / "c" / "optimizer.pt"
    torch.save({"state": Bomb()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "c" / "checkpoint.json").write_bytes(saved.replace(optimizer=digest).encode())
    with pytest.raises(Unreadable, match="UnpicklingError"):
        load_checkpoint(tmp_path / "c", *fresh(), run=run)


@pytest.mark.parametrize("damage", ["missing", "text", "field", "weights"])
def test_what_is_not_a_checkpoint_is_unreadable(tmp_path: Path, damage: str) -> None:
    run = make_run()
    model, optimizer = trained(run, 1)
    saved = save_checkpoint(tmp_path / "c", model, optimizer, run=run)
    sidecar = tmp_path / "c" / "checkpoint.json"
    if damage == "missing":
        sidecar.unlink()
    elif damage == "text":
        sidecar.write_text("{}")
    elif damage == "field":
        sidecar.write_bytes(saved.encode().replace(b'"steps":', b'"stepz":'))
    else:
        (tmp_path / "c" / "model.safetensors").unlink()
    with pytest.raises(Unreadable) as caught:
        load_checkpoint(tmp_path / "c", *fresh(), run=run)
    assert caught.value.code == "DP070"


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    run, (model, optimizer) = make_run(), fresh()
    save_checkpoint(tmp_path / "c", model, optimizer, run=run)
    with pytest.raises(InvalidParameter) as caught:
        save_checkpoint(tmp_path / "c", model, optimizer, run=run)
    assert caught.value.code == "DP074"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


def test_a_checkpoint_holds_no_key_and_no_privacy_number(tmp_path: Path) -> None:
    run = make_run()
    model, optimizer = trained(run, 1)
    saved = save_checkpoint(tmp_path / "c", model, optimizer, run=run)
    fields = {"format", "run_id", "plan_digest", "steps", "head", "weights", "optimizer", "extras"}
    assert set(type(saved).model_fields) == fields
    assert issubclass(PrivacyViolation, DPBudgetError)


def test_files_that_are_none_are_refused_in_one_kind_of_error(tmp_path: Path) -> None:
    """Whoever can write the folder writes its digests too; what is loaded is still no code and no riddle."""
    run = make_run()
    model, optimizer = fresh()
    for name, field in (("model.safetensors", "weights"), ("optimizer.pt", "optimizer")):
        folder = tmp_path / field
        saved = save_checkpoint(folder, model, optimizer, run=run)
        (folder / name).write_bytes(b"\x80\x04cposix\nsystem\n(S'touch pwned'\ntR.")
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / "checkpoint.json").write_bytes(saved.replace(**{field: digest}).encode())
        with pytest.raises(Unreadable, match="cannot be loaded"):
            load_checkpoint(folder, model, optimizer, run=run)
    save_checkpoint(tmp_path / "fine", model, optimizer, run=run)
    with pytest.raises(Unreadable, match="cannot be loaded"):
        load_checkpoint(tmp_path / "fine", nn.Linear(2, 2), run=run)
