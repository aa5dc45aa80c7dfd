"""Images: a small convolutional network on digits at epsilon = 3, delta = 1e-5, and the same without privacy.

What it shows. An ordinary network trains privately as it is, once batches do not enter into it; and which choices make
it accurate although the noise is large (scikit-learn's digits, 1,797 images of 8 x 8 pixels, four fifths train):

* Full batches. At a given epsilon the noise stays and the signal grows with the batch.
* GroupNorm, never BatchNorm: an image is normalised by its own statistics. The second one, before the last layer,
  makes all images' features equally long, so that clipping treats them alike.
* Few parameters (2,890) and few steps: every parameter and every step is paid for with noise.
* A small clipping norm and a long step: only their product matters once nearly every gradient is clipped.
* Pixels are scaled by constants that are public knowledge (they run from 0 to 16), not by statistics of the images.

The guarantee is for one image. Data and held-out fifth are declared public, which is why an accuracy may be printed and
why settings could be chosen on them; on private data each trial, and each look at a metric, would cost budget. The
seed fixes split and initial weights; batches and noise come from the ledger's secret keys and cannot be seeded.

Run: ``python docs/examples/digits_cnn.py [--seed 0] [--quick] [--folder EMPTY_FOLDER]``
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

import dpbudget
import dptrainer

EPSILON, DELTA = 3.0, 1e-5
STEPS, CLIP_NORM, LEARNING_RATE = 50, 0.2, 15.0  # a step is at most learning rate x clipping norm = 3 long


def load(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """(train, held out), four fifths and one fifth, both declared public; images [N, 1, 8, 8]."""
    pixels, labels = load_digits(return_X_y=True)
    x = (torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3) * 2
    y = torch.tensor(labels)
    train, held_out = train_test_split(torch.arange(len(x)), test_size=0.2, random_state=seed, stratify=y)
    return TensorDataset(x[train], y[train]), TensorDataset(x[held_out], y[held_out])


def network() -> nn.Module:
    """One convolution and one linear layer, each behind a normalisation of its own image."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.GroupNorm(1, 256),
        nn.Linear(256, 10),
    )


def accuracy(model: nn.Module, held_out: TensorDataset) -> float:
    """Share of correct answers on images that were declared public."""
    images, labels = held_out.tensors
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def without_privacy(train: TensorDataset, steps: int) -> nn.Module:
    """The same network without clipping and noise; allowed on data that were declared public."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    images, labels = train.tensors
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def with_privacy(train: TensorDataset, steps: int, folder: Path) -> tuple[nn.Module, dptrainer.TrainingResult]:
    """Budget, plan, ledger, training."""
    owner, writer = dpbudget.new_key(folder / "owner.key"), dpbudget.new_key(folder / "writer.key")
    budget = dpbudget.Budget(epsilon=EPSILON, delta=DELTA)
    ledger = dpbudget.create_ledger(
        folder / "digits.ledger", budget=budget, owner=owner, writer=writer, public_data=True, whole_budget=True
    )
    size = len(train)  # public here, as declared; otherwise a public nominal size
    plan = dpbudget.calibrate(
        epsilon=EPSILON, delta=DELTA, dataset_size=size, batch_size=size, steps=steps, clip_norm=CLIP_NORM
    )
    run = dpbudget.start(ledger, ledger.sign_plan(plan, owner=owner))
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    result = dptrainer.PrivateTrainer(model, optimizer, nn.CrossEntropyLoss(), train, run).fit()
    run.close()
    ledger.close()
    return model, result


def main() -> None:
    """Train both ways and compare."""
    parser = argparse.ArgumentParser(description="A private convolutional network on scikit-learn's digits.")
    parser.add_argument("--seed", type=int, default=0, help="of split and initial weights; noise cannot be seeded")
    parser.add_argument("--quick", action="store_true", help="3 steps, to see that it runs")
    parser.add_argument("--folder", type=Path, help="where keys and ledger stay; a temporary folder by default")
    options = parser.parse_args()
    warnings.simplefilter("error")  # a warning on a correct program is a bug
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # layers this small gain little from more
    train, held_out = load(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        model, result = with_privacy(train, 3 if options.quick else STEPS, options.folder or Path(temporary))
    ordinary = without_privacy(train, 3 if options.quick else 60)
    print(f"steps     {result.steps} of {result.planned}, full batches")
    bound = dpbudget.round_up(result.claim)
    print(f"claim     epsilon <= {bound} at delta {result.delta:g}, for one image")
    print(f"accuracy  {accuracy(model, held_out):.4f} with privacy, {accuracy(ordinary, held_out):.4f} without")


if __name__ == "__main__":
    main()
