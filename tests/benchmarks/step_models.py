"""The models on which private steps are timed: layers as common papers use them, data random and of fixed shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mnist_cnn() -> nn.Module:
    """Two convolutions and two linear layers, 26 thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """GroupNorm, ReLU, convolution, twice, beside a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(16, inner), nn.GroupNorm(16, outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        skip = self.shortcut(y if isinstance(self.shortcut, nn.Conv2d) else x)
        return skip + self.conv2(F.relu(self.norm2(self.conv1(y))))


def wide_resnet() -> nn.Module:
    """WRN-16-4 with GroupNorm, 2.75 million parameters."""
    widths = [16, 64, 128, 256]
    blocks = []
    for stage in range(3):
        inner, outer = widths[stage : stage + 2]
        blocks += [Residual(inner, outer, 1 if stage == 0 else 2), Residual(outer, outer, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), *blocks,
        nn.GroupNorm(16, 256), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


class MeanOverTokens(nn.Module):
    """[B, T, d] to [B, d]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def bag_of_words() -> nn.Module:
    """An embedding, a mean and two linear layers, 0.16 million parameters."""
    return nn.Sequential(
        nn.Embedding(10_000, 16), MeanOverTokens(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)
    )  # fmt: skip


class LSTMClassifier(nn.Module):
    """Embedding, LSTM, the last state to two classes, 1.08 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(10_000, 100), nn.Linear(100, 2)
        self.lstm: nn.Module = nn.LSTM(100, 100, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embedding(x))[0][:, -1])


class Block(nn.Module):
    """Causal attention and a two-layer network, each after a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Four blocks of width 256 over 8,192 words, input and output embeddings untied, 7.3 million parameters."""

    positions: Tensor

    def __init__(self, words: int = 8192, width: int = 256, length: int = 128) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(words, width), nn.Linear(width, words, bias=False)
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(4)], nn.LayerNorm(width))
        rate = torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
        angle = torch.arange(length).unsqueeze(1) * rate
        self.register_buffer("positions", torch.cat([angle.sin(), angle.cos()], 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(self.embedding(x) + self.positions))


def mlp() -> nn.Module:
    """784-2048-2048-10, 5.8 million parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)
    )


class LoRA(nn.Module):
    """A frozen linear layer and a trainable correction of rank 8."""

    def __init__(self, width: int, rank: int = 8) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.base(x) + self.up(self.down(x)))


def lora_stack() -> nn.Module:
    """Eight frozen layers with adapters and a head, 0.106 million trainable parameters."""
    return nn.Sequential(*[LoRA(768) for _ in range(8)], MeanOverTokens(), nn.Linear(768, 10))


@dataclass(frozen=True)
class Case:
    """A model with its batch.

    Attributes:
        name: what the table says.
        make: builds it.
        batch: examples a step.
        inputs: random inputs of n examples.
        classes: number of classes, of each token if ``tokens``.
        tokens: positions with a target, 0 for one target an example.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: int
    inputs: Callable[[int], Tensor]
    classes: int
    tokens: int = 0

    def data(self, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of ``count`` examples."""
        shape = (count, self.tokens) if self.tokens else (count,)
        return self.inputs(count), torch.randint(0, self.classes, shape)

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        """[B] one loss an example, the mean over its tokens."""
        if not self.tokens:
            return F.cross_entropy(output, target, reduction="none")
        return F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none").view(target.shape).mean(1)


def _words(vocabulary: int) -> Callable[[int], Tensor]:
    return lambda count: torch.randint(0, vocabulary, (count, 128))


def _images(*shape: int) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, *shape)


CASES = {
    "a": Case("MNIST CNN, B 256", mnist_cnn, 256, _images(1, 28, 28), 10),
    "b": Case("WRN-16-4 GroupNorm, B 32", wide_resnet, 32, _images(3, 32, 32), 10),
    "c1": Case("Embedding(10k,16) + 2 FC, B 64 x 128", bag_of_words, 64, _words(10_000), 2),
    "c2": Case("Embedding(10k,100) + LSTM(100), B 64 x 128", LSTMClassifier, 64, _words(10_000), 2),
    "d": Case("decoder, 4 layers of 256, V 8192, B 16 x 128", Decoder, 16, _words(8192), 8192, tokens=128),
    "e": Case("MLP 784-2048-2048-10, B 512", mlp, 512, _images(1, 28, 28), 10),
    "e128": Case("MLP 784-2048-2048-10, B 128", mlp, 128, _images(1, 28, 28), 10),
    "f": Case("8 x frozen Linear(768) + LoRA r 8, B 32 x 64", lora_stack, 32, _images(64, 768), 10),
}
