"""Every example of docs/examples.md runs, says what it claims, and is about as accurate as the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "examples"
#: Epsilon of the example, and the least mean accuracy over three seeds with privacy and without.
EXAMPLES = {
    "breast_cancer": (1.0, 0.93, 0.96),
    "char_lstm": (3.0, 0.45, 0.46),
    "digits_cnn": (3.0, 0.945, 0.97),
    "digits_ftrl": (3.0, 0.90, 0.95),
    "lora": (3.0, 0.87, 0.95),
}
#: What each may use beside the standard library: the public names of the two packages, and the data.
ALLOWED = {"dpbudget", "dptrainer", "sklearn", "torch"}


def run(name: str, folder: Path, *options: str, timeout: float = 250) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *options],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")])},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def accuracies(output: str) -> tuple[float, float]:
    found = re.search(r"^accuracy +([01]\.\d{4}) with privacy, ([01]\.\d{4}) without$", output, re.MULTILINE)
    assert found, output
    return float(found[1]), float(found[2])


@pytest.mark.parametrize(
    "name", [name if name == "digits_cnn" else pytest.param(name, marks=pytest.mark.slow) for name in EXAMPLES]
)
def test_an_example_runs_and_states_its_claim_and_both_accuracies(name: str, tmp_path: Path) -> None:
    output = run(name, tmp_path, "--quick")
    claim = re.search(r"^claim +epsilon <= ([\d.]+) at delta 1e-05, for one \w+", output, re.MULTILINE)
    assert claim, output
    assert 0.99 * EXAMPLES[name][0] < float(claim[1]) <= EXAMPLES[name][0]
    assert re.search(r"^steps +3 of 3, ", output, re.MULTILINE), output
    assert all(0 < score <= 1 for score in accuracies(output))
    assert list(tmp_path.iterdir()) == []  # keys and ledger went to a temporary folder


def test_the_ledger_of_an_example_can_be_kept_and_verified(tmp_path: Path) -> None:
    import dpbudget

    run("breast_cancer", tmp_path, "--quick", "--folder", str(tmp_path))
    ledger = dpbudget.open_ledger(tmp_path / "patients.ledger")
    ledger.export(tmp_path / "patients.jsonl")
    ledger.close()
    trust = dpbudget.load_public_key(tmp_path / "owner.key.pub")
    report = dpbudget.verify(tmp_path / "patients.jsonl", trust=trust)
    assert report.ok
    assert report.steps == 3


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_uses_public_names_alone_and_is_on_the_page(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    modules = re.findall(r"^(?:from|import) (\S+)", text, re.MULTILINE)
    used = {module for module in modules if module.partition(".")[0] not in sys.stdlib_module_names}
    assert {module.partition(".")[0] for module in used} <= ALLOWED
    assert not [module for module in used if module.startswith(("dpbudget.", "dptrainer."))]
    assert f"(examples/{name}.py)" in (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_as_accurate_as_the_page_says(name: str, tmp_path: Path) -> None:
    reached = [accuracies(run(name, tmp_path, "--seed", str(seed), timeout=600)) for seed in range(3)]
    private, plain = (sum(scores) / len(reached) for scores in zip(*reached, strict=True))
    assert private >= EXAMPLES[name][1]
    assert plain >= EXAMPLES[name][2]
