"""The noise that a plan states is the noise that ``dpbudget train`` adds: no other source is asked in any step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpbudget._verify import verify
from dpbudget.errors import PrivacyViolation
from dptrainer.noise.exact import ExactNoise
from dptrainer.noise.source import SecureNoise

Cli = Callable[..., Any]
TOTAL = ("--epsilon", "3", "--delta", "1e-5", "--whole-budget")
SIZES = ("--dataset-size", "40", "--batch-size", "10", "--steps", "10", "--epsilon", "2", "--max-parameters", "50000")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The mode of the source that each release asked for noise."""
    found: list[str] = []
    for source in (ExactNoise, SecureNoise):
        privatise = source.privatise

        def seen(self: Any, *args: Any, _call: Any = privatise, _mode: str = source.mode, **more: Any) -> Any:
            found.append(_mode)
            return _call(self, *args, **more)

        monkeypatch.setattr(source, "privatise", seen)
    return found


@pytest.mark.parametrize("noise", ["secure", "exact"])
@pytest.mark.parametrize("model", ["linear", "mlp", "cnn"])
def test_every_model_trains_with_the_noise_of_its_plan(
    run_cli: Cli, folder: Path, asked: list[str], model: str, noise: str
) -> None:
    random = np.random.default_rng(3)
    np.savez("images.npz", x=random.random((40, 8, 8)), y=np.arange(40) % 2)
    assert run_cli("ledger", "init", "one.ledger", *TOTAL).code == 0
    plan = run_cli("plan", "new", "--ledger", "one.ledger", *SIZES, "--noise", noise, "--json").json
    assert plan["noise"] == noise
    line = ("train", "--ledger", "one.ledger", "--data", "images.npz", "--classes", "2", "--model", model, "--json")
    answer = run_cli(*line, "--hidden", "4", "--physical-batch-size", "8")
    assert answer.code == 0, answer.err
    assert asked == [noise] * 10
    (run,) = verify("one.ledger").runs
    assert (run.noise, run.charged) == (noise, 10)
    assert f"add-remove, {noise} noise" in Path(answer.json["card"]).read_text(encoding="utf-8")


@pytest.mark.parametrize("noise", ["secure", "exact"])
def test_users_get_the_noise_of_the_plan_or_an_answer_before_any_charge(
    run_cli: Cli, folder: Path, asked: list[str], noise: str
) -> None:
    assert run_cli("ledger", "init", "users.ledger", *TOTAL, "--unit", "user").code == 0
    assert run_cli("plan", "new", "--ledger", "users.ledger", *SIZES, "--noise", noise).code == 0
    rows = [f"u{number % 20},{number % 7},{number % 2}" for number in range(60)]
    Path("rows.csv").write_text("\n".join(["who,a,label", *rows, ""]), encoding="utf-8")
    line = ("train", "--ledger", "users.ledger", "--data", "rows.csv", "--target", "label", "--classes", "2")
    answer = run_cli(*line, "--user-column", "who", "--max-examples", "2")
    if answer.code == 0:
        assert asked == [noise] * 10
    else:
        assert (answer.code, asked, verify("users.ledger").steps) == (2, [], 0)
        assert "Fix: " in answer.err


def test_a_loop_of_ones_own_under_an_exact_plan_is_refused_with_both_ways_out(run_cli: Cli, folder: Path) -> None:
    """``make_private`` clips whole batches, of which no integers can be made."""
    import torch

    import dpbudget
    import dptrainer

    assert run_cli("ledger", "init", "one.ledger", *TOTAL).code == 0
    assert run_cli("plan", "new", "--ledger", "one.ledger", *SIZES, "--noise", "exact").code == 0
    model, data = torch.nn.Linear(3, 2), torch.utils.data.TensorDataset(torch.zeros(9, 3), torch.zeros(9).long())
    writer = dpbudget.load_key("one.ledger.writer.key")
    with dpbudget.open_ledger("one.ledger", writer=writer) as ledger, dpbudget.start(ledger) as run:
        with pytest.raises(PrivacyViolation, match="DP054") as refused:
            dptrainer.make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), data, run=run)
        assert run.charged == 0
    assert "dpbudget train" in refused.value.hint
    assert "sign a plan with secure noise" in refused.value.hint
