"""The seven models of the benchmarks, in full size and shrunk, each with synthetic records and a loss per example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def mnist_cnn(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(width, 2 * width, 4, 2), nn.ReLU(inplace=True), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(32 * width, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


class Wide(nn.Module):
    """A block of a wide residual network, with group norm."""

    def __init__(self, before: int, after: int, stride: int, groups: int) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(groups, before), nn.GroupNorm(groups, after)
        self.down = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.keep = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.skip(h) + self.keep(F.relu(self.second(self.down(h))))


def wide_resnet(base: int, widen: int, groups: int, again: int = 1) -> nn.Module:
    """WRN-16: three stages of two blocks, of which ``again`` keep the width."""
    blocks, before = [], base
    for stage in range(3):
        after = base * widen * 2**stage
        blocks += [
            Wide(before, after, 1 if stage == 0 else 2, groups),
            *(Wide(after, after, 1, groups) for _ in range(again)),
        ]
        before = after
    head = [nn.GroupNorm(groups, before), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(3, base, 3, padding=1, bias=False), *blocks, *head, nn.Linear(before, 10))


class Words(nn.Module):
    def __init__(self, vocabulary: int, width: int, hidden: int) -> None:
        super().__init__()
        self.table, self.hidden, self.out = (
            nn.Embedding(vocabulary, width),
            nn.Linear(width, hidden),
            nn.Linear(hidden, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(self.table(x).mean(1))))


class Recurrent(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(vocabulary, width), nn.LSTM(width, width, batch_first=True)
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.table(x))
        return self.out(hidden[:, -1])


class DecoderBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.before(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Decoder(nn.Module):
    def __init__(self, vocabulary: int, width: int, length: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(DecoderBlock(width, heads) for _ in range(layers)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1]).unsqueeze(0))
        return self.out(self.norm(self.blocks(self.words(x) + places)))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


class LoRA(nn.Module):
    """A frozen layer with a trainable low-rank one beside it."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.a, self.b = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.frozen(x) + self.b(self.a(x)))


class Adapted(nn.Module):
    def __init__(self, width: int, rank: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(LoRA(width, rank) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(1)


def next_words(outputs: Tensor, target: Tensor) -> Tensor:
    """[B]: mean cross entropy over the positions of each example."""
    return F.cross_entropy(outputs.transpose(1, 2), target, reduction="none").mean(1)


def floats(rows: int, *shape: int) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))


def integers(rows: int, limit: int, *shape: int) -> Tensor:
    return torch.randint(0, limit, (rows, *shape), generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Bench:
    """A model and what it is trained on.

    Attributes:
        small, full: build the model, after a seed.
        small_inputs, full_inputs: [rows, ...] for a number of rows.
        targets: [rows, ...] for the number of rows and the inputs.
        loss: (outputs, target) -> [B].
    """

    small: Callable[[], nn.Module]
    full: Callable[[], nn.Module]
    small_inputs: Callable[[int], Tensor]
    full_inputs: Callable[[int], Tensor]
    targets: Callable[[Tensor], Tensor]
    loss: Callable[[Any, Any], Tensor]

    def model(self, *, full: bool = False) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.full() if full else self.small()

    def data(self, rows: int, *, full: bool = False) -> TensorDataset:
        inputs = self.full_inputs(rows) if full else self.small_inputs(rows)
        return TensorDataset(inputs, self.targets(inputs))


def _classes(count: int) -> Callable[[Tensor], Tensor]:
    return lambda inputs: torch.arange(len(inputs)) % count


def _cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target, reduction="none")


BENCHES = {
    "a MNIST CNN": Bench(
        lambda: mnist_cnn(4), lambda: mnist_cnn(16), lambda n: floats(n, 1, 28, 28), lambda n: floats(n, 1, 28, 28),
        _classes(10), _cross_entropy,
    ),
    "b WRN-16-4": Bench(
        lambda: wide_resnet(4, 1, 2, again=0), lambda: wide_resnet(16, 4, 16), lambda n: floats(n, 3, 8, 8),
        lambda n: floats(n, 3, 32, 32), _classes(10), _cross_entropy,
    ),
    "c1 embedding": Bench(
        lambda: Words(50, 8, 8), lambda: Words(10_000, 16, 16), lambda n: integers(n, 50, 12),
        lambda n: integers(n, 10_000, 128), _classes(2), _cross_entropy,
    ),
    "c2 LSTM": Bench(
        lambda: Recurrent(50, 8), lambda: Recurrent(10_000, 100), lambda n: integers(n, 50, 6),
        lambda n: integers(n, 10_000, 128), _classes(2), _cross_entropy,
    ),
    "d decoder": Bench(
        lambda: Decoder(32, 16, 8, 2, 2), lambda: Decoder(8192, 256, 128, 4, 8), lambda n: integers(n, 32, 8),
        lambda n: integers(n, 8192, 128), lambda x: x.roll(-1, 1), next_words,
    ),
    "e MLP": Bench(
        lambda: mlp(32), lambda: mlp(2048), lambda n: floats(n, 784), lambda n: floats(n, 784), _classes(10),
        _cross_entropy,
    ),
    "f LoRA": Bench(
        lambda: Adapted(16, 2, 3), lambda: Adapted(768, 8, 8), lambda n: floats(n, 5, 16), lambda n: floats(n, 64, 768),
        _classes(10), _cross_entropy,
    ),
}  # fmt: skip
