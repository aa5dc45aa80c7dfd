"""One optimizer step, private in different ways: ours, by peers, and by hand.

A row is a function that builds everything for a :class:`~tests.benchmarks.step_models.Case` and returns the step.
Peers draw their noise with ``torch.normal``; ours takes a receipt and the plan's ``secure`` noise.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import dpbudget
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.run import Run
from dpbudget.ledger.signing import Ed25519Signer
from dptrainer.clipping import add_clipped, make_engine
from dptrainer.noise import native
from dptrainer.noise.source import SecureNoise
from dptrainer.sampling import PoissonSampler
from dptrainer.update import release
from dptrainer.values import ClippedSum, NoisySum
from tests.benchmarks.step_models import Case

Step = Callable[[], object]
RATE = 1e-3
#: Rows that keep every example's gradient: batch x parameters, twice where it is copied.
INSTANTIATING = {"opacus hooks", "opacus functorch", "opacus ew", "backpack", "vmap"}
MOST_BYTES = 8e9


def make_run(records: int = 1000, batch: int = 1000) -> Run:
    """A run with more steps than are measured, on a ledger in memory."""
    owner, writer = Ed25519Signer.generate(), Ed25519Signer.generate()
    plan = dpbudget.plan_for(
        noise_multiplier=20.0, delta=1e-5, dataset_size=records, batch_size=batch, steps=1000, max_parameters=10**8
    )
    ledger = dpbudget.Ledger.create(
        None,
        budget=dpbudget.Budget(epsilon=100.0, delta=1e-5),
        owner=owner,
        writer=writer,
        whole_budget=True,
        filter=dpbudget.PortfolioFilter(),
    )
    return ledger.start(ledger.sign_plan(plan, owner=owner))


def non_private(case: Case) -> Step:
    """The ordinary step."""
    model, (x, y) = case.make(), case.data(case.batch)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        case.losses(model(x), y).mean().backward()
        optimizer.step()

    return step


@dataclass
class TimedNoise:
    """Secure noise, with the processor seconds that it took."""

    inner: SecureNoise = field(default_factory=SecureNoise)
    seconds: float = 0.0

    def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
        begin = time.process_time()
        noisy = self.inner.privatise(clipped, receipt)
        self.seconds = time.process_time() - begin
        return noisy


class Ours:
    """The whole private step: lease and receipt, clip, secure noise, update."""

    def __init__(self, case: Case, pieces: int = 1, records: int = 0, poisson: bool = False) -> None:
        self.case, self.pieces, self.poisson, self.records = case, pieces, poisson, records
        native.LIBRARY.get()  # which a run does by itself within its first requests
        self.model, self.noise = case.make(), TimedNoise()
        self.x, self.y = case.data(records or case.batch)
        self.run = make_run(records, case.batch) if poisson else make_run()
        self.engine = make_engine(self.model, self.run.plan.clip_norm)
        self.optimizer = torch.optim.SGD((p for p in self.model.parameters() if p.requires_grad), lr=RATE)
        self.sampler = PoissonSampler()

    def clip(self, x: Tensor, y: Tensor) -> ClippedSum:
        with self.engine.record(len(x)):
            losses = self.case.losses(self.model(x), y)
        return self.engine.backward(losses)

    def __call__(self) -> None:
        self.optimizer.zero_grad()  # as the ordinary step does, and as the private loop does by itself
        receipt = self.run.next_receipt()
        x, y = self.x, self.y
        if self.poisson:
            chosen = torch.from_numpy(self.sampler.draw(receipt, self.records))
            x, y = x[chosen], y[chosen]
        elif self.records:
            chosen = torch.randperm(self.records)[: self.case.batch]
            x, y = x[chosen], y[chosen]
        size = -(-len(x) // self.pieces)
        clipped = self.clip(x[:size], y[:size])
        for start in range(size, len(x), size):
            clipped = add_clipped(clipped, self.clip(x[start : start + size], y[start : start + size]))
        release(self.model, clipped, receipt, self.noise)
        self.optimizer.step()


def _add_noise(parameters: list[nn.Parameter], sums: list[Tensor], batch: int) -> None:
    for parameter, total in zip(parameters, sums, strict=True):
        parameter.grad = (total + torch.normal(0.0, 20.0, total.shape)) / batch


def microbatches(case: Case) -> Step:
    """A loop over single examples, clipped by hand."""
    model, (x, y) = case.make(), case.data(case.batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=RATE)

    def step() -> None:
        sums = [torch.zeros_like(p) for p in parameters]
        for i in range(case.batch):
            loss = case.losses(model(x[i : i + 1]), y[i : i + 1]).sum()
            grads = torch.autograd.grad(loss, parameters)
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
            torch._foreach_add_(sums, torch._foreach_mul(grads, (1.0 / norm).clamp(max=1.0)))
        _add_noise(parameters, sums, case.batch)
        optimizer.step()

    return step


def _clip_rows(rows: list[Tensor]) -> list[Tensor]:
    norms = torch.stack([torch.linalg.vector_norm(r.flatten(1), dim=1) for r in rows])
    factors = (1.0 / torch.linalg.vector_norm(norms, dim=0)).clamp(max=1.0)
    return [torch.tensordot(factors, r, 1) for r in rows]


def vectorised(case: Case) -> Step:
    """``vmap`` over ``grad``, all examples at once."""
    model, (x, y) = case.make(), case.data(case.batch)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(named.values(), lr=RATE)

    def loss(chosen: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        output = functional_call(model, {**frozen, **chosen}, (one.unsqueeze(0),))
        return case.losses(output, target.unsqueeze(0)).sum()

    def step() -> None:
        live = {name: p.detach() for name, p in named.items()}
        rows = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(live, x, y)
        _add_noise(list(named.values()), _clip_rows([rows[name] for name in named]), case.batch)
        optimizer.step()

    return step


def _for_opacus(case: Case) -> nn.Module:
    model = case.make()
    if hasattr(model, "lstm"):
        from opacus.layers import DPLSTM

        model.lstm = DPLSTM(100, 100, batch_first=True)
    return model.train()


def opacus_mode(mode: str) -> Callable[[Case], Step]:
    """Opacus with instantiated per-sample gradients: ``hooks``, ``functorch`` or ``ew``."""

    def build(case: Case) -> Step:
        from opacus.grad_sample import wrap_model
        from opacus.optimizers import DPOptimizer

        model, (x, y) = (
            wrap_model(_for_opacus(case), mode, batch_first=True, loss_reduction="mean"),
            case.data(case.batch),
        )
        inner = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=RATE)
        optimizer = DPOptimizer(inner, noise_multiplier=20.0, max_grad_norm=1.0, expected_batch_size=case.batch)

        def step() -> None:
            optimizer.zero_grad()
            case.losses(model(x), y).mean().backward()
            optimizer.step()

        return step

    return build


def opacus_ghost(case: Case) -> Step:
    """Opacus ghost clipping: two backward passes."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    model = GradSampleModuleFastGradientClipping(_for_opacus(case), max_grad_norm=1.0, loss_reduction="mean")
    inner = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=RATE)
    optimizer = DPOptimizerFastGradientClipping(
        inner, noise_multiplier=20.0, max_grad_norm=1.0, expected_batch_size=case.batch
    )
    criterion = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss(reduction="mean"))
    x, y = case.data(case.batch)

    def step() -> None:
        optimizer.zero_grad()
        output = model(x)
        if case.tokens:
            loss = criterion(output.flatten(0, 1), y.flatten(), shape=output.shape)
        else:
            loss = criterion(output, y)
        loss.backward()
        optimizer.step()

    return step


def backpack(case: Case) -> Step:
    """BackPACK's ``BatchGrad``, clipped by hand; only chains of layers that it knows."""
    from backpack import backpack as collect
    from backpack import extend
    from backpack.extensions import BatchGrad

    model, (x, y) = extend(case.make()), case.data(case.batch)
    criterion = extend(nn.CrossEntropyLoss(reduction="sum"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        output = model(x)
        with collect(BatchGrad()):
            criterion(output.flatten(0, 1) if case.tokens else output, y.flatten()).backward()
        rows = [p.grad_batch for p in parameters]
        for p in parameters:
            del p.grad_batch
        _add_noise(parameters, _clip_rows(rows), case.batch)
        optimizer.step()

    return step


ROWS: dict[str, Callable[[Case], Step]] = {
    "nonpriv": non_private,
    "ours": Ours,
    "ours 4 pieces": lambda case: Ours(case, pieces=4),
    "ours drawn": lambda case: Ours(case, records=16 * case.batch),
    "ours poisson": lambda case: Ours(case, records=16 * case.batch, poisson=True),
    "opacus hooks": opacus_mode("hooks"),
    "opacus functorch": opacus_mode("functorch"),
    "opacus ew": opacus_mode("ew"),
    "opacus ghost": opacus_ghost,
    "backpack": backpack,
    "micro": microbatches,
    "vmap": vectorised,
}


def build(name: str, case: Case) -> Step | str:
    """The warm step of a row, or in a word why there is none."""
    if name in INSTANTIATING:
        needed = 4.0 * case.batch * sum(p.numel() for p in case.make().parameters() if p.requires_grad)
        if 2 * needed > MOST_BYTES:
            return f"skipped: {2 * needed / 1e9:.0f} GB"
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = ROWS[name](case)
            step()
    except ImportError as error:
        return f"not installed ({error.name})"
    except Exception as error:
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"
    return step
