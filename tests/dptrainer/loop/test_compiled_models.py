"""Models that come from ``torch.compile``, in the loops of their users: the same releases, and every guard in place."""

from __future__ import annotations

import logging
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import NoNoise, linear_data, make_run, private, refused, same, snapshot, step
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import TensorDataset

from dpbudget.errors import DPBudgetWarning
from dpbudget.ledger.receipt import Receipt
from dptrainer import PrivateTrainer, UserDataset, load_checkpoint, per_example_norms, save_checkpoint, validate
from dptrainer.noise import keys

# What the compiler itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step t draws the same records in every run; nothing was compiled before."""

    def drawn(receipt: Receipt, purpose: keys.Purpose) -> bytes:
        receipt.use(purpose.value)
        return bytes([receipt.step]) * 32

    monkeypatch.setattr("dptrainer.sampling.step_key", drawn)
    torch._dynamo.reset()
    counters.clear()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.LayerNorm(7), nn.Linear(7, 3))


def as_given(model: nn.Module, kind: str, backend: Any = "aot_eager", **options: Any) -> nn.Module:
    if kind == "wrapped":
        return torch.compile(model, backend=backend, **options)  # type: ignore[no-any-return]
    if kind == "in place":
        model.compile(backend=backend, **options)
    return model


def sums_of(kind: str, steps: int = 5, backend: Any = "aot_eager", model: Any = None, **facts: Any) -> tuple[Any, Any]:
    """Clipped sums of a loop, and its loader."""
    model, noise = network() if model is None else model, NoNoise()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shown = as_given(model, kind, backend)
    facts = {"loss_fn": nn.CrossEntropyLoss(), "note": lambda _: None} | facts
    returned, optimizer, loader = private(shown, optimizer, run=make_run(steps), noise=noise, **facts)
    assert returned is shown
    set_up = counters["aot_autograd"]["total"]
    for batch in loader:
        step(shown, optimizer, batch)
        optimizer.zero_grad()
    loader.compiled_later = counters["aot_autograd"]["total"] - set_up
    return noise.sums, loader


def assert_same(first: Any, second: Any, tolerance: float = 1e-5) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert list(one) == list(other)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["wrapped", "in place"])
@pytest.mark.parametrize(
    "facts", [{}, {"physical_batch_size": 7}, {"physical_batch_size": 40, "static_shapes": True}, {"views": 2}]
)
def test_the_releases_are_those_of_the_model_itself_and_nothing_is_compiled_after_set_up(
    kind: str, facts: dict[str, Any]
) -> None:
    expected, _ = sums_of("as it is", **facts)
    found, loader = sums_of(kind, **facts)
    assert_same(found, expected)
    assert loader.compiled
    assert loader.compiled_later == 0, "batches of all sizes run what was compiled at set-up"


@pytest.mark.parametrize("kind", ["wrapped", "in place"])
def test_a_trainer_releases_the_same(kind: str) -> None:
    found = []
    for given in ("as it is", kind):
        model, noise = network(), NoNoise()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = UserDataset(linear_data(), [str(i % 13) for i in range(40)], max_examples=4)
        trainer = PrivateTrainer(
            as_given(model, given), optimizer, nn.CrossEntropyLoss(), data, make_run(3, unit="user"), noise=noise,
            note=lambda _: None, physical_batch_size=13, static_shapes=True,
        )  # fmt: skip
        before = counters["aot_autograd"]["total"]
        trainer.fit()
        assert (before > 0) == (given == kind)
        assert counters["aot_autograd"]["total"] == before
        found.append(noise.sums)
    assert_same(found[1], found[0])


def test_evaluation_goes_where_the_program_sent_it_also_between_steps() -> None:
    seen: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(len(inputs))
        return graph.forward

    model = network()
    shown = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, loader = private(shown, optimizer, run=make_run(3), physical_batch_size=40, static_shapes=True)
    set_up, x = len(seen), torch.randn(9, 5)
    for batch in loader:
        step(shown, optimizer, batch)
        with torch.no_grad():
            shown.eval()
            torch.testing.assert_close(shown(x), model[3](model[2](model[1](model[0](x)))))
            shown.train()
    assert len(seen) == set_up + 1
    assert loader.compiled
    loader.detach()
    F.cross_entropy(shown(x), torch.zeros(9, dtype=torch.long)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "the model is free again"


@pytest.mark.parametrize("kind", ["wrapped", "in place"])
def test_the_backend_of_the_program_compiles_the_private_pass(kind: str) -> None:
    seen: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(len(inputs))
        return graph.forward

    _, loader = sums_of(kind, backend=backend)
    assert loader.compiled
    assert len(seen) == 1


def test_the_model_inside_and_the_one_shown_are_one() -> None:
    expected, _ = sums_of("as it is", steps=3)
    model, noise = network(), NoNoise()
    shown, optimizer = torch.compile(model, backend="aot_eager"), torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, loader = private(shown, optimizer, run=make_run(3), noise=noise, note=lambda _: None)
    for number, batch in enumerate(loader):
        step(model if number % 2 else shown, optimizer, batch)
        optimizer.zero_grad()
    assert_same(noise.sums, expected)
    assert list(noise.sums[0]) == [name for name, _ in model.named_parameters()]


def test_autocast_in_bfloat16_releases_what_the_model_itself_does() -> None:
    found = []
    for kind in ("as it is", "wrapped"):
        model, noise = network(), NoNoise()
        shown, optimizer = as_given(model, kind), torch.optim.SGD(model.parameters(), lr=0.1)
        _, _, loader = private(
            shown, optimizer, run=make_run(5), noise=noise, loss_reduction="sum", note=lambda _: None,
            physical_batch_size=40, static_shapes=True,
        )  # fmt: skip
        before = counters["aot_autograd"]["total"]
        for x, y in loader:
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(shown(x), y, reduction="sum")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert counters["aot_autograd"]["total"] - before == (kind == "wrapped"), "once, for half precision"
        found.append(noise.sums)
    assert_same(found[1], found[0], 2e-2)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out if float(x.detach().sum()) > 1e9 else out * 2


def test_what_cannot_be_compiled_is_said_at_set_up_and_released_all_the_same() -> None:
    said: list[str] = []
    torch.manual_seed(0)
    expected, _ = sums_of("as it is", model=Branches())
    found, loader = sums_of("wrapped", model=Branches(), note=said.append)
    assert_same(found, expected)
    assert not loader.compiled
    assert any("run uncompiled" in line for line in said)
    model = Branches()
    with pytest.warns(DPBudgetWarning, match="run uncompiled"):
        private(as_given(model, "wrapped"), torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=nn.CrossEntropyLoss())


@pytest.mark.parametrize("rows", [13, 2])
def test_a_compiler_that_is_wrong_is_found_at_set_up(rows: int) -> None:
    def wrong(graph: Any, inputs: Any) -> Any:
        return lambda *given: tuple(out * (1.5 if out.shape[:1] == (rows,) else 1) for out in graph.forward(*given))

    said: list[str] = []
    expected, _ = sums_of("as it is")
    found, loader = sums_of("wrapped", backend=wrong, note=said.append)
    assert_same(found, expected)
    assert not loader.compiled
    assert any("other gradients" in line for line in said)


def test_a_model_with_dropout_is_tried_out_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.3), nn.Linear(7, 3))
    _, loader = sums_of("wrapped", model=model)
    assert loader.compiled
    assert loader.compiled_later == 0
    _, loader = sums_of("wrapped", model=nn.Sequential(nn.Dropout(0.3), Branches()))
    assert not loader.compiled


def test_exact_noise_takes_no_compiled_model() -> None:
    model = network()
    run = make_run(2, noise="exact")
    with refused("DP019"):
        PrivateTrainer(
            as_given(model, "wrapped"), torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(),
            linear_data(), run, note=lambda _: None,
        )  # fmt: skip
    assert run.charged == 0


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out + out.mean(0)


@pytest.mark.parametrize("kind", ["wrapped", "in place"])
@pytest.mark.parametrize(("build", "code"), [(Mixes, "DP033"), (lambda: nn.Sequential(nn.BatchNorm1d(5)), "DP010")])
def test_the_tests_at_set_up_look_inside(kind: str, build: Any, code: str) -> None:
    run, model = make_run(2), build()
    with refused(code):
        private(as_given(model, kind), torch.optim.SGD(model.parameters(), lr=0.1), run=run)
    assert run.charged == 0


@pytest.mark.parametrize("when", ["before", "between", "within", "forward"])
def test_what_a_wrapper_does_around_the_model_is_refused(when: str) -> None:
    """Its hooks run outside of everything that is tested, and may mix the records."""
    model, run = network(), make_run(4)
    shown, optimizer = as_given(model, "wrapped"), torch.optim.SGD(model.parameters(), lr=0.1)

    def mix() -> None:
        if when == "forward":
            shown.forward = lambda x: model(x - x.mean(0))  # type: ignore[method-assign]
        else:
            shown.register_forward_hook(lambda module, args, output: output - output.mean(0))

    if when == "before":
        mix()
        with refused("DP019"):
            private(shown, optimizer, run=run, note=lambda _: None)
        assert run.charged == 0
        return
    _, _, loader = private(shown, optimizer, run=run, note=lambda _: None)
    with refused("DP019"):
        for number, batch in enumerate(loader):
            if number == 2:
                assert when == "within", "a change between batches is refused before the next one"
            if number == 2 or (number == 1 and when != "within"):
                before = snapshot(model)
                mix()
            if number != 1 or when == "within":
                step(shown, optimizer, batch)
    assert same(model, before)


def test_dynamic_sizes_as_the_program_asked_for_them() -> None:
    for dynamic, facts in ((True, {}), (False, {"physical_batch_size": 40, "static_shapes": True}), (False, {})):
        said: list[str] = []
        shown = torch.compile(network(), backend="aot_eager", dynamic=dynamic)
        loader = private(shown, loss_fn=nn.CrossEntropyLoss(), note=said.append, **facts)[2]
        assert loader.compiled == (dynamic or bool(facts))
        assert loader.compiled or any("static_shapes" in line for line in said)
        loader.detach()


def test_what_else_a_private_batch_trains_is_refused() -> None:
    model, head = network(), nn.Linear(3, 3)
    shown, optimizer = as_given(model, "wrapped"), torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, loader = private(shown, optimizer, run=make_run(3), note=lambda _: None)
    before = snapshot(model)
    with refused("DP031"):
        for x, y in loader:
            F.cross_entropy(head(shown(x)), y).backward()
            optimizer.step()
    assert same(model, before)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("how", ["a wrapper of one's own", "in place afterwards", "the step"])
def test_compiling_around_a_private_forward_pass_is_refused(how: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, loader = private(model, optimizer, run=make_run(3), note=lambda _: None)
    before, shown = snapshot(model), model
    if how == "a wrapper of one's own":
        shown = torch.compile(model, backend="aot_eager")
    elif how == "in place afterwards":
        model.compile(backend="aot_eager")

    def run(x: torch.Tensor, y: torch.Tensor) -> None:
        F.cross_entropy(shown(x), y).backward()

    run = torch.compile(run, backend="aot_eager") if how == "the step" else run
    with refused("DP019"):
        for batch in loader:
            run(*batch)
            optimizer.step()
    assert same(model, before)


def test_other_functions_take_a_compiled_model_for_what_is_inside(tmp_path: Any) -> None:
    model = network()
    shown = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert validate(shown, optimizer) == []
    batch = (torch.randn(4, 5), torch.arange(4) % 3)
    torch.testing.assert_close(
        per_example_norms(shown, nn.CrossEntropyLoss(), batch), per_example_norms(model, nn.CrossEntropyLoss(), batch)
    )
    run = make_run(3)
    _, _, loader = private(shown, optimizer, run=run, note=lambda _: None)
    for at, batch in enumerate(loader):
        step(shown, optimizer, batch)
        if at == 1:
            break
    save_checkpoint(tmp_path / "at", shown, optimizer, run=run)
    other = network()
    load_checkpoint(tmp_path / "at", other, torch.optim.SGD(other.parameters(), lr=0.1), run=run)
    assert same(other, snapshot(model))


def test_a_new_set_up_takes_over_a_compiled_model() -> None:
    model = network()
    model.compile(backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, first = private(model, optimizer, run=make_run(2), note=lambda _: None)
    _, _, second = private(model, optimizer, run=make_run(2), note=lambda _: None)
    with refused("DP021"):
        next(iter(first))
    for batch in second:
        step(model, optimizer, batch)
    assert second.compiled


class Deep(nn.Module):
    """Convolution, group norm, attention over places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.mix, self.last = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        q, k, v = self.mix(h).chunk(3, -1)
        out: torch.Tensor = self.last((h + F.scaled_dot_product_attention(q, k, v)).mean(1))
        return out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("half", [False, True])
def test_inductor_releases_what_the_model_itself_does(half: bool) -> None:
    found = []
    data = TensorDataset(torch.randn(40, 1, 6, 6), torch.arange(40) % 3)
    for kind in ("as it is", "wrapped"):
        torch.manual_seed(0)
        model, noise = Deep(), NoNoise()
        shown, optimizer = as_given(model, kind, "inductor"), torch.optim.SGD(model.parameters(), lr=0.1)
        _, _, loader = private(
            shown, optimizer, data, run=make_run(4), noise=noise, loss_reduction="sum", note=lambda _: None
        )
        for x, y in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = F.cross_entropy(shown(x), y, reduction="sum")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loader.compiled == (kind == "wrapped")
        found.append(noise.sums)
    assert counters["inductor"]["extern_calls"] > 0
    assert_same(found[1], found[0], 5e-2 if half else 1e-4)


@pytest.mark.slow
def test_a_compiler_that_makes_a_graph_for_every_size_does_not_log_the_sizes_of_private_batches() -> None:
    told: list[str] = []

    class Teller(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    model = network()
    shown = as_given(model, "wrapped", dynamic=False)
    data = TensorDataset(torch.randn(90, 5), torch.randint(0, 3, (90,)))
    trainer = PrivateTrainer(
        shown, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), data, make_run(20), note=told.append
    )
    told.clear()
    assert trainer._entry is not None
    trainer._entry.forward.reason = None  # set-up leaves such a model uncompiled
    logger, teller = logging.getLogger("torch._dynamo.convert_frame"), Teller()
    logger.addHandler(teller)
    try:
        trainer.fit()
    finally:
        logger.removeHandler(teller)
    assert told == []
    assert not logger.disabled
    assert counters["aot_autograd"]["total"] > 5  # it was compiled for several
