"""The public names of dptrainer, and the whole path from budget to verification."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from loopkit import linear_data, linear_model

import dpbudget
import dptrainer
from dpbudget.errors import PlanExhausted


def test_the_exports_of_the_trainer_are_what_is_declared() -> None:
    assert sorted(dptrainer.__all__) == dptrainer.__all__
    assert sorted(dptrainer._HOMES) == dptrainer.__all__
    for name in dptrainer.__all__:
        value = getattr(dptrainer, name)
        assert value.__doc__
        assert len(value.__doc__) > 20, name
    assert set(dptrainer.__all__) <= set(dir(dptrainer))


def test_an_unknown_name_of_the_trainer_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'make_privat'"):
        dptrainer.make_privat


def test_importing_the_package_alone_loads_no_torch() -> None:
    program = "import dptrainer, sys; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "False"


def test_from_budget_to_verification(tmp_path: Path) -> None:
    owner = dpbudget.new_key(tmp_path / "owner.key")
    writer = dpbudget.new_key(tmp_path / "writer.key")
    path = tmp_path / "a.ledger"
    budget = dpbudget.Budget(epsilon=3.0, delta=1e-5)
    plan = dpbudget.calibrate(epsilon=3.0, delta=1e-5, dataset_size=400, batch_size=100, epochs=5)
    with dpbudget.create_ledger(path, budget=budget, owner=owner, writer=writer, whole_budget=True) as ledger:
        run = dpbudget.start(ledger, ledger.sign_plan(plan, owner=owner))
        model = linear_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model, optimizer, loader = dptrainer.make_private(model, optimizer, linear_data(397), run=run)
        assert loader.epsilon is not None
        assert loader.epsilon.upper == 0.0
        taken = 0
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            taken += 1
        assert taken == plan.steps == 20
        assert loader.epsilon.upper <= 3.0
        with pytest.raises(PlanExhausted):
            next(iter(loader))
        run.close()
        loader.detach()
    report = dpbudget.verify(path, trust=owner.public)
    assert report.ok
    assert report.epsilon.upper <= 3.0
    assert report.epsilon.lower > 2.9
