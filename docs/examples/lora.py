"""Fine-tuning: LoRA adapters on a frozen transformer at epsilon = 3, delta = 1e-5, and the same without privacy.

What it shows. Knowledge from public data is free, and few trained parameters mean little noise. A small transformer
reads scikit-learn's digits as eight tokens, the rows of an image. It learns the digits 0 to 4, which play the public
data, in the ordinary way. Then it is frozen; low-rank adapters beside its linear layers (Hu et al. 2021) and a new head
learn the digits 5 to 9 privately. The frozen weights get no gradient, no clipping and no noise. With the head alone the
same run ends near 0.7: what lies between the layers has to move.

The adapters are two ``nn.Linear`` without bias, not two bare parameters: linear layers are clipped for a whole batch at
once, and a layer of your own would be replayed example by example, or needs ``dptrainer.rule``. The second one starts
at zero, so that training begins at the public model.

The guarantee is for one image of the digits 5 to 9. They and their held-out fifth are declared public in truth, which
is why an accuracy may be printed and why settings could be chosen on them; on private data each trial, and each look at
a metric, would cost budget. The seed fixes split, initial weights and the public training; batches and noise of the
private run cannot be seeded.

Run: ``python docs/examples/lora.py [--seed 0] [--quick] [--folder EMPTY_FOLDER]``
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dpbudget
import dptrainer

EPSILON, DELTA = 3.0, 1e-5
WIDTH, HEADS, DEPTH, RANK = 32, 4, 2, 4
STEPS, CLIP_NORM, LEARNING_RATE = 40, 0.2, 10.0  # full batches: at a given epsilon the signal grows with the batch


class Block(nn.Module):
    """Attention between the tokens of one image, then a network for each token; [B, T, W] to [B, T, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_network = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value: nn.Module = nn.Linear(WIDTH, 3 * WIDTH)
        self.out: nn.Module = nn.Linear(WIDTH, WIDTH)
        self.up: nn.Module = nn.Linear(WIDTH, 2 * WIDTH)
        self.down: nn.Module = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pre-norm, residual."""
        batch, length, _ = tokens.shape
        parts = self.query_key_value(self.norm_attention(tokens)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        tokens = tokens + self.out(mixed.reshape(batch, length, WIDTH))
        changed: Tensor = self.down(nn.functional.gelu(self.up(self.norm_network(tokens))))
        return tokens + changed


class Transformer(nn.Module):
    """Rows of an image [B, 8, 8] to scores [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, WIDTH), nn.Parameter(0.1 * torch.randn(8, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 5)

    def forward(self, rows: Tensor) -> Tensor:
        """Scores from the mean token."""
        scores: Tensor = self.head(self.norm(self.blocks(self.embed(rows) + self.place).mean(1)))
        return scores


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained map of rank ``RANK`` beside it: W x + B A x."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, RANK, bias=False)
        self.b = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        out: Tensor = self.base(x) + self.b(self.a(x))
        return out


def adapt(model: Transformer) -> Transformer:
    """Freeze ``model``, put an adapter beside each linear layer of its blocks, and give it a new head; in place."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(block, name, LoRALinear(layer))
    model.head = nn.Linear(WIDTH, 5)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return model


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Adapters and head."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def load(seed: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """(digits 0 to 4, four fifths of the digits 5 to 9, their held-out fifth), all declared public."""
    pixels, digits = load_digits(return_X_y=True)
    x = (torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 16 - 0.3) * 2
    y = torch.tensor(digits)
    others = torch.nonzero(y >= 5).flatten()
    train, held_out = train_test_split(others, test_size=0.2, random_state=seed, stratify=y[others])
    public = y < 5
    parts = ((x[public], y[public]), (x[train], y[train] - 5), (x[held_out], y[held_out] - 5))
    first, second, third = (TensorDataset(*part) for part in parts)
    return first, second, third


def ordinary_training(model: nn.Module, data: TensorDataset, steps: int) -> None:
    """Adam on batches of 128, no clipping, no noise; for data that are public, or declared so."""
    optimizer = torch.optim.Adam(trained_parameters(model), lr=3e-3)
    rows, labels = data.tensors
    for _ in range(steps):
        batch = torch.randint(len(rows), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(rows[batch]), labels[batch]).backward()
        optimizer.step()


def private_training(model: nn.Module, data: TensorDataset, steps: int, folder: Path) -> dptrainer.TrainingResult:
    """Budget, plan, ledger, training of what requires a gradient."""
    owner, writer = dpbudget.new_key(folder / "owner.key"), dpbudget.new_key(folder / "writer.key")
    budget = dpbudget.Budget(epsilon=EPSILON, delta=DELTA)
    ledger = dpbudget.create_ledger(
        folder / "adapters.ledger", budget=budget, owner=owner, writer=writer, public_data=True, whole_budget=True
    )
    size = len(data)  # public here, as declared; otherwise a public nominal size
    plan = dpbudget.calibrate(
        epsilon=EPSILON, delta=DELTA, dataset_size=size, batch_size=size, steps=steps, clip_norm=CLIP_NORM
    )
    run = dpbudget.start(ledger, ledger.sign_plan(plan, owner=owner))
    optimizer = torch.optim.SGD(trained_parameters(model), lr=LEARNING_RATE)
    result = dptrainer.PrivateTrainer(model, optimizer, nn.CrossEntropyLoss(), data, run).fit()
    run.close()
    ledger.close()
    return result


def accuracy(model: nn.Module, held_out: TensorDataset) -> float:
    """Share of correct answers on images that were declared public."""
    rows, labels = held_out.tensors
    with torch.no_grad():
        return float((model(rows).argmax(1) == labels).float().mean())


def main() -> None:
    """Pretrain, adapt, fine-tune both ways and compare."""
    parser = argparse.ArgumentParser(description="Private LoRA fine-tuning of a small transformer.")
    parser.add_argument("--seed", type=int, default=0, help="of split and initial weights; noise cannot be seeded")
    parser.add_argument("--quick", action="store_true", help="3 steps of each kind, to see that it runs")
    parser.add_argument("--folder", type=Path, help="where keys and ledger stay; a temporary folder by default")
    options = parser.parse_args()
    warnings.simplefilter("error")  # a warning on a correct program is a bug
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # layers this small gain little from more
    public, train, held_out = load(options.seed)
    model = Transformer()
    ordinary_training(model, public, 3 if options.quick else 150)
    private, ordinary = adapt(model), copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as temporary:
        result = private_training(private, train, 3 if options.quick else STEPS, options.folder or Path(temporary))
    ordinary_training(ordinary, train, 3 if options.quick else 150)
    trained, everything = (
        sum(parameter.numel() for parameter in parameters)
        for parameters in (trained_parameters(private), private.parameters())
    )
    print(f"trains    {trained} of {everything} parameters")
    bound = dpbudget.round_up(result.claim)
    print(f"steps     {result.steps} of {result.planned}, full batches")
    print(f"claim     epsilon <= {bound} at delta {result.delta:g}, for one image of the private half")
    print(f"accuracy  {accuracy(private, held_out):.4f} with privacy, {accuracy(ordinary, held_out):.4f} without")


if __name__ == "__main__":
    main()
