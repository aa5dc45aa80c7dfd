"""Tabular records: logistic regression on breast cancer measurements at epsilon = 1, delta = 1e-5, and without privacy.

What it shows. How to scale columns when the data are private, and that a small model on few records can still be
useful at a strong guarantee: 569 patients (scikit-learn's bundled Wisconsin data), 455 of them train.

Scaling. Subtracting the mean and dividing by the standard deviation *of the records* would release two numbers a
column that nobody paid for. The bounds below are round figures that follow from what is measured: a nucleus radius in
pixels of a fixed microscope, 2 pi r and pi r^2 of it, ratios between 0 and 1. Here they were checked against the
published table of ranges; with private records such a table would need another source. Values beyond them are cut off.
A square root of the scaled value spreads the many small ones; it is the same for everyone, so it is free.

The guarantee is for one record, here one patient: adding or removing it. The data set and its held-out fifth are
declared public, which is why an accuracy may be printed and why settings could be chosen by cross-validation on it; on
private data each trial, and each look at a metric, would cost budget.

Run: ``python docs/examples/breast_cancer.py [--seed 0] [--quick] [--folder EMPTY_FOLDER]``
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset

import dpbudget
import dptrainer

EPSILON, DELTA = 1.0, 1e-5
STEPS, CLIP_NORM, LEARNING_RATE = 60, 1.0, 3.0  # full batches: at a given epsilon the signal grows with the batch

# One bound a measurement, in the order of the columns: radius, texture, perimeter, area, smoothness, compactness,
# concavity, concave points, symmetry, fractal dimension; for the mean, its standard error and the worst nuclei.
LOWEST = [5, 5, 30, 80, 0.05, 0, 0, 0, 0.1, 0.04] + 10 * [0] + [5, 5, 30, 80, 0.05, 0, 0, 0, 0.1, 0.04]
HIGHEST = [30, 40, 190, 2800, 0.2, 0.5, 0.5, 0.2, 0.3, 0.1]
HIGHEST += [3, 5, 20, 500, 0.03, 0.15, 0.4, 0.05, 0.08, 0.03]
HIGHEST += [40, 50, 250, 5000, 0.25, 1, 1.3, 0.3, 0.6, 0.2]


def load(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """(train, held out), four fifths and one fifth, both declared public; inputs [N, 30] in [-1, 1]."""
    table, malignant_or_benign = load_breast_cancer(return_X_y=True)
    low, high = torch.tensor(LOWEST), torch.tensor(HIGHEST)
    scaled = ((torch.tensor(table, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    x, y = 2 * scaled.sqrt() - 1, torch.tensor(malignant_or_benign)
    train, held_out = train_test_split(torch.arange(len(x)), test_size=0.2, random_state=seed, stratify=y)
    return TensorDataset(x[train], y[train]), TensorDataset(x[held_out], y[held_out])


def logistic_regression() -> nn.Module:
    """62 parameters, all zero: the loss is convex, so there is nothing to initialise."""
    model = nn.Linear(30, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def accuracy(model: nn.Module, held_out: TensorDataset) -> float:
    """Share of correct answers on records that were declared public."""
    inputs, labels = held_out.tensors
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).float().mean())


def without_privacy(train: TensorDataset, steps: int) -> nn.Module:
    """The same model without clipping and noise; allowed on data that were declared public."""
    model = logistic_regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    inputs, labels = train.tensors
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def with_privacy(train: TensorDataset, steps: int, folder: Path) -> tuple[nn.Module, dptrainer.TrainingResult]:
    """Budget, plan, ledger, training. Returns the average of the last half of the models, which costs nothing."""
    owner, writer = dpbudget.new_key(folder / "owner.key"), dpbudget.new_key(folder / "writer.key")
    budget = dpbudget.Budget(epsilon=EPSILON, delta=DELTA)
    ledger = dpbudget.create_ledger(
        folder / "patients.ledger", budget=budget, owner=owner, writer=writer, public_data=True, whole_budget=True
    )
    size = len(train)  # public here, as declared; otherwise a public nominal size
    plan = dpbudget.calibrate(
        epsilon=EPSILON, delta=DELTA, dataset_size=size, batch_size=size, steps=steps, clip_norm=CLIP_NORM
    )
    run = dpbudget.start(ledger, ledger.sign_plan(plan, owner=owner))
    model = logistic_regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    average = AveragedModel(model)

    def average_the_last_half(step: int, epsilon: dpbudget.Bounds | None) -> None:
        if 2 * step > steps:  # every noisy model is covered by the claim already, and so is any function of them
            average.update_parameters(model)

    trainer = dptrainer.PrivateTrainer(
        model, optimizer, nn.CrossEntropyLoss(), train, run, callbacks=[average_the_last_half]
    )
    result = trainer.fit()
    run.close()
    ledger.close()
    return average, result


def main() -> None:
    """Train both ways and compare."""
    parser = argparse.ArgumentParser(description="Private logistic regression on scikit-learn's breast cancer data.")
    parser.add_argument("--seed", type=int, default=0, help="of the split; noise and batches cannot be seeded")
    parser.add_argument("--quick", action="store_true", help="3 steps, to see that it runs")
    parser.add_argument("--folder", type=Path, help="where keys and ledger stay; a temporary folder by default")
    options = parser.parse_args()
    warnings.simplefilter("error")  # a warning on a correct program is a bug
    torch.set_num_threads(1)  # 62 parameters gain nothing from more
    train, held_out = load(options.seed)
    steps = 3 if options.quick else STEPS
    with tempfile.TemporaryDirectory() as temporary:
        model, result = with_privacy(train, steps, options.folder or Path(temporary))
    ordinary = without_privacy(train, 3 if options.quick else 2000)
    print(f"steps     {result.steps} of {result.planned}, full batches")
    bound = dpbudget.round_up(result.claim)
    print(f"claim     epsilon <= {bound} at delta {result.delta:g}, for one patient")
    print(f"accuracy  {accuracy(model, held_out):.4f} with privacy, {accuracy(ordinary, held_out):.4f} without")


if __name__ == "__main__":
    main()
