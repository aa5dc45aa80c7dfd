"""The main job on real data: plan, sign, train under the ledger, be refused, verify as a third party.

scikit-learn's digits (1,797 real images of 8 x 8 pixels) at epsilon = 3, delta = 1e-5, and the same model without
privacy beside it. The data set is declared public, so accuracies may be shown and five seeds may be run, each under a
ledger of its own; on private data every one of these runs, and every look at a metric, would be charged.

Settings. A linear model, because noise hurts per parameter; full batches, because at a given epsilon the signal grows
with the batch and the noise does not; a small clipping norm, so that every example counts alike; pixels scaled and
centred by public constants. Steps, clipping norm and learning rate were chosen by cross-validation inside the four
training fifths; the held-out fifth was not looked at for it. On private data such a search costs budget too: plan the
trials as runs of one portfolio, or search on public data of the same kind.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

import dpbudget
import dptrainer

EPSILON, DELTA, SEEDS = 3.0, 1e-5, 5
STEPS, CLIP_NORM, LEARNING_RATE = 30, 0.2, 100.0  # the step length is learning rate x clipping norm = 20


@dataclass(frozen=True)
class Split:
    """Four fifths to train on, one fifth held out; both declared public."""

    train: TensorDataset
    inputs: torch.Tensor
    labels: torch.Tensor


def load() -> Split:
    """Digits, scaled by constants that are public knowledge (pixels run from 0 to 16)."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32) / 16 - 0.3
    y = torch.tensor(labels)
    train, test = train_test_split(torch.arange(len(x)), test_size=0.2, random_state=0, stratify=y)
    return Split(TensorDataset(x[train], y[train]), x[test], y[test])


def linear_model() -> nn.Module:
    """650 parameters, all zero: the loss is convex, so there is nothing to initialise."""
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of the held-out fifth that is classified correctly."""
    with torch.no_grad():
        return float((model(split.inputs).argmax(1) == split.labels).float().mean())


def without_privacy(split: Split) -> float:
    """The same model and batches without clipping and noise, trained to the end; allowed on data declared public."""
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    inputs, labels = split.train.tensors
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return accuracy(model, split)


def plan_and_train(folder: Path, split: Split, console: Console) -> tuple[float, dpbudget.Ledger, str]:
    """One private run from budget to closed ledger; prints every station when the console is not quiet."""
    owner, writer = dpbudget.new_key(folder / "owner.key"), dpbudget.new_key(folder / "writer.key")
    ledger = dpbudget.create_ledger(
        folder / "digits.ledger",
        budget=dpbudget.Budget(epsilon=EPSILON, delta=DELTA),
        owner=owner,
        writer=writer,
        public_data=True,
        whole_budget=True,
    )
    console.print(f"[bold]ledger[/]   {ledger.id[:16]}… grants epsilon {EPSILON:g} at delta {DELTA:g} (owner-signed)")

    size = len(split.train)  # public here, as declared; otherwise a public nominal size
    plan = dpbudget.calibrate(
        epsilon=EPSILON, delta=DELTA, dataset_size=size, batch_size=size, steps=STEPS, clip_norm=CLIP_NORM
    )
    phase = plan.phases[0]
    console.print(
        f"[bold]plan[/]     {STEPS} steps at sampling rate {phase.rate:g} need noise multiplier "
        f"{phase.noise_multiplier:.6f}: epsilon <= {dpbudget.round_up(plan.claim.epsilon, 10)}"
    )
    run_id = ledger.sign_plan(plan, owner=owner)
    console.print(f"[bold]signed[/]   plan {plan.digest()[:16]}… as run {run_id[:16]}…")

    run = dpbudget.start(ledger, run_id)
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    with Progress(
        TextColumn("[bold]train[/]   "),
        BarColumn(40),
        MofNCompleteColumn(),
        TextColumn("epsilon {task.fields[epsilon]} of {task.fields[target]}"),
        console=console,
        disable=console.quiet,
    ) as progress:
        task = progress.add_task("train", total=STEPS, epsilon="0", target=dpbudget.round_up(plan.claim.epsilon))

        def show(steps: int, epsilon: dpbudget.Bounds | None) -> None:
            shown = dpbudget.round_up(epsilon.upper, 4) if epsilon else "?"
            progress.update(task, completed=steps, epsilon=shown)

        dptrainer.PrivateTrainer(model, optimizer, nn.CrossEntropyLoss(), split.train, run, callbacks=[show]).fit()

    try:
        run.next_receipt()
    except dpbudget.DPBudgetError as refusal:
        console.print(f"[bold]refused[/]  {refusal}", highlight=False)
    run.close()
    return accuracy(model, split), ledger, run_id


def verify_as_a_third_party(folder: Path, ledger: dpbudget.Ledger, console: Console) -> None:
    """Another process, with the export and the owner's public key and nothing else."""
    export, key = folder / "digits.jsonl", folder / "owner.key.pub"
    ledger.export(export)
    command = [str(Path(sys.executable).with_name("dpbudget")), "ledger", "verify", str(export), "--trust", str(key)]
    done = subprocess.run([*command, "--expect-head", str(ledger.head)], capture_output=True, text=True, check=False)
    console.print(f"[bold]verify[/]   dpbudget ledger verify {export.name} --trust {key.name} --expect-head …")
    console.print((done.stdout + done.stderr).rstrip(), highlight=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    """Run the demo; everything is written to a temporary folder."""
    warnings.simplefilter("error")  # a warning on a correct program is a bug
    torch.set_num_threads(1)  # a 650-parameter model gains nothing from more
    console, split = Console(width=120), load()
    reached = []
    for seed in range(SEEDS):
        with tempfile.TemporaryDirectory() as name:
            quiet = Console(quiet=True) if seed else console
            score, ledger, _ = plan_and_train(Path(name), split, quiet)
            reached.append(score)
            if not seed:
                verify_as_a_third_party(Path(name), ledger, console)
            ledger.close()
    private, public = sum(reached) / SEEDS, without_privacy(split)
    shown = ", ".join(f"{score:.3f}" for score in reached)
    console.print(f"[bold]accuracy[/] held-out fifth: {private:.4f} with privacy (mean of {SEEDS} runs: {shown})")
    console.print(f"         {public:.4f} without privacy (same model, not protected)")


if __name__ == "__main__":
    main()
