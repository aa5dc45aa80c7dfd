"""What a private step costs beside an ordinary one: lease, clipping, noise and update, on CPU.

``python -m tests.benchmarks.steps`` prints the median ratio over interleaved pairs of steps, with its quartiles, and
nanoseconds a value of the noise beside ``torch.randn``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dpbudget
from dpbudget.ledger.run import Run
from dpbudget.ledger.signing import Ed25519Signer
from dptrainer.clipping import make_engine
from dptrainer.noise.gaussian import add_gaussian_
from dptrainer.noise.source import SecureNoise
from dptrainer.update import release

PAIRS = 30


def mnist_cnn() -> nn.Module:
    """Two convolutions and two linear layers, 26 thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    """784-2048-2048-10, 5.8 million parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "a  MNIST CNN, B 256": (mnist_cnn, 256),
    "e  MLP, B 512": (mlp, 512),
    "e  MLP, B 128": (mlp, 128),
}


def make_run() -> Run:
    """A run with more steps than are measured, on a ledger in memory."""
    owner, writer = Ed25519Signer.generate(), Ed25519Signer.generate()
    plan = dpbudget.plan_for(noise_multiplier=20.0, delta=1e-5, dataset_size=1000, batch_size=1000, steps=1000)
    budget = dpbudget.Budget(epsilon=100.0, delta=1e-5)
    ledger = dpbudget.Ledger.create(
        None, budget=budget, owner=owner, writer=writer, whole_budget=True, filter=dpbudget.PortfolioFilter()
    )
    return ledger.start(ledger.sign_plan(plan, owner=owner))


def pair_of_steps(make: Callable[[], nn.Module], batch: int) -> list[tuple[float, float]]:
    """Seconds of (ordinary, private) steps, interleaved, after one warm-up of each."""
    plain, private, run = make(), make(), make_run()
    engine, noise = make_engine(private, run.plan.clip_norm), SecureNoise()
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (plain, private)]
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,))

    def ordinary() -> None:
        optimizers[0].zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizers[0].step()

    def charged() -> None:
        receipt = run.next_receipt()
        with engine.record(batch):
            losses: Tensor = F.cross_entropy(private(x), y, reduction="none")
        release(private, engine.backward(losses), receipt, noise)
        optimizers[1].step()

    rows = []
    for _ in range(PAIRS + 1):
        times = []
        for step in (ordinary, charged):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        rows.append((times[0], times[1]))
    run.close()
    return rows[1:]


def noise_nanoseconds(count: int) -> tuple[float, float]:
    """Median nanoseconds a value of (``add_(torch.randn)``, secure noise), float32 in place."""
    target = torch.zeros(count)
    rows: list[tuple[float, float]] = []
    for _ in range(9):
        begin = time.perf_counter()
        target.add_(torch.randn(count))
        middle = time.perf_counter()
        add_gaussian_(target, bytes(32), 0, 1.0)
        rows.append((middle - begin, time.perf_counter() - middle))
    return statistics.median(row[0] for row in rows) / count * 1e9, statistics.median(
        row[1] for row in rows
    ) / count * 1e9


def main() -> None:
    """Print both tables."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {PAIRS} pairs")
    print(f"{'model':<22}{'ordinary ms':>12}{'private ms':>12}{'ratio':>8}   quartiles")
    for name, (make, batch) in MODELS.items():
        rows = pair_of_steps(make, batch)
        low, middle, high = statistics.quantiles([b / a for a, b in rows], n=4)
        plain, private = (1e3 * statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:<22}{plain:>12.1f}{private:>12.1f}{middle:>8.2f}   {low:.2f} to {high:.2f}")
    for count in (10**6, 10**7):
        usual, secure = noise_nanoseconds(count)
        print(
            f"noise, {count:.0e} values: add_(randn) {usual:.1f} ns, secure {secure:.1f} ns, ratio {secure / usual:.2f}"
        )


if __name__ == "__main__":
    main()
