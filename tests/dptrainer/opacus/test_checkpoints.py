"""Checkpoints of the facade: what is saved comes back, what was spent stays spent."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import opacus
import pytest
import torch
from opacuskit import loader, net, open_ended, parts, planned, refused, train

from dpbudget.errors import Unreadable
from dptrainer.opacus import PrivacyEngine


def test_weights_optimizer_state_and_what_the_user_added_come_back(tmp_path: Path) -> None:
    engine = PrivacyEngine()
    model = net()
    model, optimizer, batches = planned(
        engine, module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    )
    train(model, optimizer, batches)
    place = tmp_path / "model.pt"
    engine.save_checkpoint(path=place, module=model, optimizer=optimizer, checkpoint_dict={"epoch": 1})
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    momentum = optimizer.state[optimizer.params[0]]["momentum_buffer"].clone()
    train(model, optimizer, batches)
    assert not torch.equal(model.state_dict()["0.weight"], saved["0.weight"])
    rest = engine.load_checkpoint(path=place, module=model, optimizer=optimizer)
    assert rest["epoch"] == 1
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    assert torch.equal(optimizer.state[optimizer.params[0]]["momentum_buffer"], momentum)


def test_a_later_process_goes_on_with_ledger_and_checkpoint(tmp_path: Path) -> None:
    place, file = tmp_path / "run.ledger", tmp_path / "model.pt"
    engine = PrivacyEngine(ledger=place)
    model, optimizer, batches = planned(engine)
    train(model, optimizer, batches)
    engine.save_checkpoint(path=file, module=model, optimizer=optimizer)
    assert engine.ledger is not None
    engine.ledger.close()
    later: Any = PrivacyEngine(ledger=place)
    model, optimizer, batches = planned(later)
    later.load_checkpoint(path=file, module=model, optimizer=optimizer)
    assert len(later.accountant) == 12
    train(model, optimizer, batches)
    with refused("DP050"):
        train(model, optimizer, batches)
    later.ledger.close()


def test_make_private_goes_on_in_its_ledger_with_what_was_spent_before(tmp_path: Path) -> None:
    place = tmp_path / "run.ledger"
    spent = []
    for _ in range(2):
        engine: Any = PrivacyEngine(ledger=place)
        train(*open_ended(engine))
        spent.append(engine.get_epsilon(1e-3))
        engine.ledger.close()
    assert spent[1] > spent[0] * 1.05


def test_a_ledger_in_memory_does_not_know_the_steps_of_another_process(tmp_path: Path) -> None:
    engine = PrivacyEngine()
    model, optimizer, batches = planned(engine)
    train(model, optimizer, batches)
    engine.save_checkpoint(path=tmp_path / "model.pt", module=model, optimizer=optimizer)
    later = PrivacyEngine()
    model, optimizer, _ = planned(later)
    with refused("DP051") as caught:
        later.load_checkpoint(path=tmp_path / "model.pt", module=model, optimizer=optimizer)
    assert "ledger=" in caught.value.hint


def test_a_checkpoint_goes_through_a_buffer_too() -> None:
    engine = PrivacyEngine()
    model, optimizer, batches = planned(engine)
    train(model, optimizer, batches)
    file = io.BytesIO()
    engine.save_checkpoint(path=file, module=model, optimizer=optimizer)
    file.seek(0)
    engine.load_checkpoint(path=file, module=model, optimizer=optimizer)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code of the file ran",)


def test_no_code_of_a_file_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = PrivacyEngine()
    model, _, _ = planned(engine)
    torch.save({"module_state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Unreadable, match="DP091"):
        engine.load_checkpoint(path=tmp_path / "evil.pt", module=model)
    with refused("DP065"):
        engine.load_checkpoint(path=tmp_path / "evil.pt", module=model, torch_load_kwargs={"weights_only": False})
    assert capsys.readouterr().out == ""
    torch.save([1, 2], tmp_path / "other.pt")
    with pytest.raises(Unreadable, match="DP091"):
        engine.load_checkpoint(path=tmp_path / "other.pt", module=model)
    for spent in (
        {"mechanism": "ledger"},
        {"mechanism": "ledger", "charged": [1]},
        {"mechanism": "ledger", "charged": {"a": "b"}},
    ):
        content = {"module_state_dict": model.state_dict(), "privacy_accountant_state_dict": spent}
        torch.save(content, tmp_path / "bent.pt")
        with pytest.raises(Unreadable, match="does not say what was spent"):
            engine.load_checkpoint(path=tmp_path / "bent.pt", module=model)
    with pytest.raises(OSError, match="missing"):
        engine.load_checkpoint(path=tmp_path / "missing.pt", module=model)


@pytest.mark.filterwarnings("ignore:Secure RNG turned off")
def test_a_checkpoint_of_opacus_is_not_taken_as_paid(tmp_path: Path) -> None:
    theirs = opacus.PrivacyEngine()
    module, optimizer, _ = theirs.make_private(**parts(noise_multiplier=1.0, max_grad_norm=1.0))
    theirs.save_checkpoint(path=tmp_path / "theirs.pt", module=module, optimizer=optimizer)
    engine = PrivacyEngine()
    model, _, _ = planned(engine)
    with refused("DP051"):
        engine.load_checkpoint(path=tmp_path / "theirs.pt", module=model)


def test_the_state_of_the_accountant_is_checked_and_changes_nothing() -> None:
    engine = PrivacyEngine()
    model, optimizer, batches = planned(engine)
    early = engine.accountant.state_dict()
    train(model, optimizer, batches)
    late = engine.accountant.state_dict()
    engine.accountant.load_state_dict(early)
    engine.accountant.load_state_dict(late)
    assert len(engine.accountant) == 12
    with refused("DP051"):
        PrivacyEngine().accountant.load_state_dict(late)


def test_a_second_make_private_of_one_model_takes_the_first_ones_marks_off() -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    first = PrivacyEngine()
    _, _, old = planned(first, module=module, optimizer=optimizer)
    train(module, optimizer, old)
    state = module.state_dict()
    second = PrivacyEngine()
    _, _, new = planned(second, module=module, optimizer=optimizer)
    with refused("DP051"):
        module.load_state_dict(state)
    train(module, optimizer, new)
    assert (len(first.accountant), len(second.accountant)) == (12, 12)
    with refused("DP021"):
        train(module, optimizer, old)
    new.detach()
    module.load_state_dict(state)
    train(module, optimizer, loader())
