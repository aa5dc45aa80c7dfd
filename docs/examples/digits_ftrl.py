"""DP-FTRL beside DP-SGD: digits at epsilon = 3, delta = 1e-5, without counting on sampling, and with it.

What it shows. ``TreeTrainer`` takes whole passes: every image is in one of eight batches of each pass, and the noise of
these batches is correlated, so that most of it cancels in the weights. Its guarantee holds against whoever knows in
which batch each image is or would be. ``PrivateTrainer`` draws Poisson samples of the same expected size and counts on
their secrecy, which takes less noise at equal epsilon; the line "beside" shows what it reaches.

One ledger holds both runs. Their plans are signed before either is run, so that they share its budget tightly: the last
line is what a verifier recomputes for both together.

Settings. scikit-learn's digits (1,797 images of 8 x 8 pixels), a linear model, pixels scaled by public constants; eight
steps a pass, a power of two, because then a single node of the tree is left in the weights at its end; momentum, which
averages noise that cancels a few steps later; a small clipping norm. They were tried out on these public data, for
both trainers alike.

The guarantee is for one record, here one image: adding or removing it. The data set and its held-out fifth are declared
public, which is why accuracies may be printed.

Run: ``python docs/examples/digits_ftrl.py [--seed 0] [--quick] [--folder EMPTY_FOLDER]``
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

import dpbudget
import dptrainer

EPSILON, DELTA = 3.0, 1e-5
PASSES, STEPS_PER_PASS = 8, 8
CLIP_NORM, LEARNING_RATE, MOMENTUM = 0.2, 5.0, 0.9


@dataclass(frozen=True)
class Trained:
    """Both models, the result of the first, and what the ledger of both claims."""

    ftrl: nn.Module
    sgd: nn.Module
    result: dptrainer.TrainingResult
    together: float


def load(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """(train, held out), four fifths and one fifth, both declared public; pixels run from 0 to 16."""
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16 - 0.3, torch.tensor(digits)
    train, held_out = train_test_split(torch.arange(len(x)), test_size=0.2, random_state=seed, stratify=y)
    return TensorDataset(x[train], y[train]), TensorDataset(x[held_out], y[held_out])


def linear_model() -> nn.Module:
    """650 parameters, all zero: the loss is convex, so there is nothing to initialise."""
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum; on the gradients of a pass it is DP-FTRL with momentum."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


def accuracy(model: nn.Module, held_out: TensorDataset) -> float:
    """Share of correct answers on records that were declared public."""
    inputs, labels = held_out.tensors
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).float().mean())


def without_privacy(train: TensorDataset, steps: int) -> nn.Module:
    """The same model without clipping and noise; allowed on data that were declared public."""
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=MOMENTUM)
    inputs, labels = train.tensors
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def with_privacy(train: TensorDataset, passes: int, steps: int, folder: Path) -> Trained:
    """Two plans for one budget, and both trainings: ``passes`` of ``steps`` each, and as many Poisson samples."""
    owner, writer = dpbudget.new_key(folder / "owner.key"), dpbudget.new_key(folder / "writer.key")
    budget = dpbudget.Budget(epsilon=2 * EPSILON, delta=DELTA)
    ledger = dpbudget.create_ledger(
        folder / "digits.ledger", budget=budget, owner=owner, writer=writer, public_data=True, whole_budget=True
    )
    size = len(train)  # public here, as declared; otherwise a public nominal size
    whole = dpbudget.calibrate(  # rate 1, and a pass is a step of the plan
        epsilon=EPSILON, delta=DELTA, dataset_size=size, batch_size=size, steps=passes, clip_norm=CLIP_NORM
    )
    sampled = dpbudget.calibrate(
        epsilon=EPSILON, delta=DELTA, dataset_size=size, batch_size=size // steps, steps=passes * steps,
        clip_norm=CLIP_NORM,
    )  # fmt: skip
    runs = [ledger.sign_plan(plan, owner=owner) for plan in (whole, sampled)]
    ftrl, beside, loss_fn = linear_model(), linear_model(), nn.CrossEntropyLoss()
    with dpbudget.start(ledger, runs[0]) as run:
        result = dptrainer.TreeTrainer(ftrl, sgd(ftrl), loss_fn, train, run, steps_per_pass=steps).fit()
    with dpbudget.start(ledger, runs[1]) as run:
        dptrainer.PrivateTrainer(beside, sgd(beside), loss_fn, train, run).fit()
    ledger.close()
    report = dpbudget.verify(folder / "digits.ledger", trust=owner.public)
    return Trained(ftrl, beside, result, report.epsilon.upper)


def main() -> None:
    """Train in three ways and compare."""
    parser = argparse.ArgumentParser(description="DP-FTRL on scikit-learn's digits, beside DP-SGD.")
    parser.add_argument("--seed", type=int, default=0, help="of the split; noise and batches cannot be seeded")
    parser.add_argument("--quick", action="store_true", help="one pass of 3 steps, to see that it runs")
    parser.add_argument("--folder", type=Path, help="where keys and ledger stay; a temporary folder by default")
    options = parser.parse_args()
    warnings.simplefilter("error")  # a warning on a correct program is a bug
    torch.set_num_threads(1)  # 650 parameters gain nothing from more
    train, held_out = load(options.seed)
    passes, steps = (1, 3) if options.quick else (PASSES, STEPS_PER_PASS)
    with tempfile.TemporaryDirectory() as temporary:
        trained = with_privacy(train, passes, steps, options.folder or Path(temporary))
    ordinary = without_privacy(train, 3 if options.quick else 200)
    print(
        f"steps     {trained.result.steps} of {passes * steps}, in passes of {steps}: {trained.result.charged} charged"
    )
    bound = dpbudget.round_up(trained.result.claim)
    print(f"claim     epsilon <= {bound} at delta {trained.result.delta:g}, for one image")
    print(f"accuracy  {accuracy(trained.ftrl, held_out):.4f} with privacy, {accuracy(ordinary, held_out):.4f} without")
    print(f"beside    {accuracy(trained.sgd, held_out):.4f} with DP-SGD on Poisson samples, at the same claim")
    print(f"ledger    epsilon <= {dpbudget.round_up(trained.together)} for both runs together")


if __name__ == "__main__":
    main()
