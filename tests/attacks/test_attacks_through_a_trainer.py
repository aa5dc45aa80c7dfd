"""What attacks 13, 14, 35 and 40 mean where a model is trained."""

# ruff: noqa: E402 - torch is optional, and without it nothing below can be imported

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from attackkit import (
    OWNER,
    charged,
    export,
    make,
    plan,
    reopen,
    rows,
    signed,
)
from torch.utils.data import DataLoader, Dataset, TensorDataset
from trainkit import begin, new_model, some_data, train

from dpbudget.errors import ReceiptSpent, Unreadable
from dpbudget.ledger.run import Run
from dpbudget.ledger.store.jsonl import read_export
from dptrainer import load_checkpoint, save_checkpoint


class Greedy(Dataset[Any]):
    """Asks for receipts in the process of a DataLoader's worker."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return self.run.next_receipt().step


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_attack_13_a_worker_of_a_data_loader_gets_no_receipt(tmp_path: Path) -> None:
    ledger, run = begin(tmp_path / "ledger")
    run.next_receipt()
    with pytest.raises(ReceiptSpent, match="DP076"):
        list(DataLoader(Greedy(run), num_workers=1, multiprocessing_context="fork"))
    assert run.next_receipt().step == 1
    ledger.close()
    assert charged(tmp_path / "ledger") == 2


def test_attack_14_two_copies_of_a_ledger_add_different_noise_to_the_same_step(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger", tmp_path / "copy"
    run_id = signed(path, 1, dataset_size=40, batch_size=40)
    shutil.copy(path, copy)
    models = [new_model(), new_model()]
    for place, model in zip((path, copy), models, strict=True):
        with reopen(place, high_water=False) as ledger:
            train(model, ledger.start(run_id))
    # Nothing is left when one release is taken from the other, as it would be under equal noise.
    assert not any(torch.isclose(a, b).any() for a, b in zip(*(m.parameters() for m in models), strict=True))


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("file", ["optimizer.pt", "model.safetensors"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_attack_35_code_in_a_checkpoint_is_never_run(tmp_path: Path, file: str, form: str) -> None:
    ledger, run = begin(tmp_path / "ledger")
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    save_checkpoint(tmp_path / "kept", model, optimizer, run=run)
    exploded, buffer = tmp_path / "exploded", io.BytesIO()
    if form == "torch":
        torch.save({"state": Bomb(exploded)}, buffer)
    else:
        pickle.dump({"state": Bomb(exploded)}, buffer, protocol=2)
    (tmp_path / "kept" / file).write_bytes(buffer.getvalue())
    # The sidecar is not signed, so the attacker makes it agree.
    sidecar = tmp_path / "kept" / "checkpoint.json"
    facts = json.loads(sidecar.read_bytes())
    facts["optimizer" if file == "optimizer.pt" else "weights"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    sidecar.write_bytes(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode())
    with pytest.raises(Unreadable, match="cannot be loaded"):
        load_checkpoint(tmp_path / "kept", model, optimizer, run=run)
    assert not exploded.exists()
    ledger.close()


def _records(path: Path) -> list[dict[str, Any]]:
    """All records without what is random by its nature, or hangs from that."""
    random = {"prev", "run", "statement", "nonce", "commitment", "fresh"}
    found = [json.loads(entry.line) for entry in read_export(export(path)).entries]
    return [{name: value for name, value in record.items() if name not in random} for record in found]


def test_attack_40_neighbouring_datasets_leave_the_same_records_but_for_random_values(tmp_path: Path) -> None:
    everyone = some_data()
    without_one = TensorDataset(*(tensor[1:] for tensor in everyone.tensors))
    outlier = TensorDataset(everyone.tensors[0] * 1e6, everyone.tensors[1])
    seen = []
    for number, data in enumerate((everyone, without_one, outlier, some_data(7, seed=3))):
        path = tmp_path / f"{number}.ledger"
        with make(path, dataset="ab" * 32, high_water=False) as ledger:  # one id, four histories
            run_id = ledger.sign_plan(plan(60, dataset_size=40, batch_size=8), owner=OWNER)
            with ledger.start(run_id, lease_steps=5) as run:
                train(new_model(), run, data, physical_batch_size=3)
        seen.append((_records(path), len(rows(path, "SELECT * FROM head"))))
    assert len(seen[0][0]) > 60
    assert all(other == seen[0] for other in seen[1:])
