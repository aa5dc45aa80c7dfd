"""Text: a character LSTM at epsilon = 3, delta = 1e-5, next-character accuracy and perplexity with and without privacy.

What it shows. A language model needs a decision that images do not: what is one record? Here it is **one chunk of 17
characters**, so the guarantee hides whether a single chunk was in the data, and nothing longer: for what stands in
fifty chunks epsilon is fifty times as large. If people wrote the texts, make a person the record.

The text is the help that Python itself ships (``pydoc_data.topics``, about half a million characters). The vocabulary
is the fixed list of printable ASCII characters, not the characters that occur: which occur would be a release, and
others become spaces. Chunks have one length that was chosen beforehand, so that nothing is padded.

Settings. The gradients of 512 chunks are added before noise, every one clipped to a norm far below its usual one, and
SGD with momentum goes on through the noise. The text and its held-out tenth are declared public, which is why metrics
may be printed and why settings could be chosen on them; on private data each trial, and each look at a metric, would
cost budget. The seed fixes split, order and initial weights; batches and noise of the private run cannot be seeded.

Run: ``python docs/examples/char_lstm.py [--seed 0] [--quick] [--folder EMPTY_FOLDER]``
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import string
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dpbudget
import dptrainer

EPSILON, DELTA = 3.0, 1e-5
LENGTH, WIDTH = 16, 64  # characters that a chunk predicts; width of the LSTM
BATCH, STEPS, CLIP_NORM, LEARNING_RATE = 512, 150, 0.1, 10.0


def load(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """(train, held out), nine tenths and one tenth of the chunks, both declared public; [N, 16] codes and the next."""
    places = {character: place for place, character in enumerate(string.printable)}
    text = "\n".join(pydoc_data.topics.topics.values())
    codes = torch.tensor([places.get(character, places[" "]) for character in text])
    chunks = codes[: len(codes) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    chunks = chunks[torch.randperm(len(chunks), generator=torch.Generator().manual_seed(seed))]
    held_out, train = chunks[: len(chunks) // 10], chunks[len(chunks) // 10 :]
    return TensorDataset(train[:, :-1], train[:, 1:]), TensorDataset(held_out[:, :-1], held_out[:, 1:])


class CharacterModel(nn.Module):
    """Codes [B, T] to scores [B, V, T] of the next character, the shape that ``nn.CrossEntropyLoss`` expects."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(len(string.printable), WIDTH)
        self.memory = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, len(string.printable))

    def forward(self, codes: Tensor) -> Tensor:
        """Every chunk begins with an empty memory: state carried over would let chunks act on one another."""
        hidden, _ = self.memory(self.table(codes))
        scores: Tensor = self.head(hidden)
        return scores.transpose(1, 2)


def metrics(model: nn.Module, held_out: TensorDataset) -> tuple[float, float]:
    """(next-character accuracy, perplexity) on chunks that were declared public."""
    codes, following = held_out.tensors
    with torch.no_grad():
        scores = model(codes)
        accuracy = (scores.argmax(1) == following).float().mean()
        return float(accuracy), float(nn.functional.cross_entropy(scores, following).exp())


def without_privacy(train: TensorDataset, steps: int) -> nn.Module:
    """As many batches of the same size, without clipping and noise; allowed on data that were declared public."""
    model = CharacterModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    codes, following = train.tensors
    for _ in range(steps):
        batch = torch.randint(len(codes), (BATCH,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(codes[batch]), following[batch]).backward()
        optimizer.step()
    return model


def with_privacy(
    train: TensorDataset, batch: int, steps: int, folder: Path
) -> tuple[nn.Module, dptrainer.TrainingResult]:
    """Budget, plan, ledger, training."""
    owner, writer = dpbudget.new_key(folder / "owner.key"), dpbudget.new_key(folder / "writer.key")
    budget = dpbudget.Budget(epsilon=EPSILON, delta=DELTA)
    ledger = dpbudget.create_ledger(
        folder / "text.ledger", budget=budget, owner=owner, writer=writer, public_data=True, whole_budget=True
    )
    size = len(train)  # public here, as declared; otherwise a public nominal size
    plan = dpbudget.calibrate(
        epsilon=EPSILON, delta=DELTA, dataset_size=size, batch_size=batch, steps=steps, clip_norm=CLIP_NORM
    )
    run = dpbudget.start(ledger, ledger.sign_plan(plan, owner=owner))
    model = CharacterModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    result = dptrainer.PrivateTrainer(model, optimizer, nn.CrossEntropyLoss(), train, run).fit()
    run.close()
    ledger.close()
    return model, result


def main() -> None:
    """Train both ways and compare."""
    parser = argparse.ArgumentParser(description="A private character LSTM on the help texts of Python.")
    parser.add_argument("--seed", type=int, default=0, help="of split and initial weights; noise cannot be seeded")
    parser.add_argument("--quick", action="store_true", help="3 small steps, to see that it runs")
    parser.add_argument("--folder", type=Path, help="where keys and ledger stay; a temporary folder by default")
    options = parser.parse_args()
    warnings.simplefilter("error")  # a warning on a correct program is a bug
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # layers this small gain little from more
    train, held_out = load(options.seed)
    batch, steps = (8, 3) if options.quick else (BATCH, STEPS)
    with tempfile.TemporaryDirectory() as temporary:
        model, result = with_privacy(train, batch, steps, options.folder or Path(temporary))
    (accuracy, perplexity), (plain_accuracy, plain_perplexity) = (
        metrics(trained, held_out) for trained in (model, without_privacy(train, steps))
    )
    bound = dpbudget.round_up(result.claim)
    print(f"steps     {result.steps} of {result.planned}, {batch} chunks each on average")
    print(f"claim     epsilon <= {bound} at delta {result.delta:g}, for one chunk of {LENGTH + 1} characters")
    print(f"accuracy  {accuracy:.4f} with privacy, {plain_accuracy:.4f} without")
    print(f"perplexity {perplexity:.2f} with privacy, {plain_perplexity:.2f} without")


if __name__ == "__main__":
    main()
