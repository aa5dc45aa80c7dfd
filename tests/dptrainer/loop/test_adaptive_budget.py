"""Training under an rdp ledger: the budget may end before the plan; the weights stay those of the last step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from loopkit import OWNER, WRITER, linear_data, linear_model

import dpbudget
from dpbudget.errors import BudgetExceeded
from dptrainer import PrivateTrainer, make_private


def adaptive_ledger(path: Path | None = None) -> tuple[dpbudget.Ledger, list[str]]:
    """Two plans that fit one by one, and not together."""
    budget = dpbudget.Budget(epsilon=5.0, delta=1e-5)
    ledger = dpbudget.create_ledger(path, budget=budget, owner=OWNER, writer=WRITER, kind="rdp")  # type: ignore[arg-type]
    plan = dpbudget.plan_for(
        noise_multiplier=4.0, dataset_size=40, batch_size=20, steps=30, delta=1e-5, max_parameters=100
    )
    ids = [ledger.sign_plan(plan, owner=OWNER) for _ in range(2)]
    return ledger, ids


def test_the_second_run_stops_where_the_budget_ends_with_its_weights_whole() -> None:
    ledger, (first, second) = adaptive_ledger()
    data = linear_data()
    for run_id in (first, second):
        model = linear_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = dpbudget.start(ledger, run_id)
        seen: list[torch.Tensor] = []

        def keep(steps: int, epsilon: object, model: torch.nn.Module = model, seen: list[torch.Tensor] = seen) -> None:
            seen.append(model.weight.detach().clone())  # type: ignore[union-attr,operator]

        trainer = PrivateTrainer(model, optimizer, torch.nn.CrossEntropyLoss(), data, run, callbacks=[keep])
        if run_id == first:
            assert trainer.fit().charged == 30
            continue
        with pytest.raises(BudgetExceeded, match="no Renyi order") as caught:
            trainer.fit()
        assert caught.value.exit_code == 3
        assert 0 < len(seen) < 30
        assert torch.equal(model.weight, seen[-1])
        assert ledger.state.runs[second].charged == len(seen)
    assert ledger.state.account is not None
    assert ledger.state.account.fits


def test_a_loop_of_ones_own_gets_the_same_refusal_before_its_batch() -> None:
    ledger, (first, second) = adaptive_ledger()
    with dpbudget.start(ledger, first) as run:
        for _ in run:
            pass
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = make_private(
        model, optimizer, linear_data(), run=dpbudget.start(ledger, second), loss_fn=torch.nn.CrossEntropyLoss()
    )
    taken, weights, ended = 0, model.weight.detach().clone(), False
    batches = iter(loader)
    while not ended:
        try:
            inputs, labels = next(batches)
        except BudgetExceeded:
            ended = True
            continue
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        taken, weights = taken + 1, model.weight.detach().clone()
    assert 0 < taken < 30
    assert torch.equal(model.weight, weights)
    assert ledger.state.runs[second].charged == taken
