"""A model whose forward pass is compiled: the oracle's sums, the eager engine's refusals, or no compiling at all."""

from __future__ import annotations

import copy

import pytest
import torch
from clipping_oracle import losses, microbatch, norm, row_loss, typical_norm
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping import BookKeeping
from dptrainer.clipping.compiled import CompiledForward, Settings

# What the compiler itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)


def compiled(model, clip_norm=1.0, backend="aot_eager", dynamic=None):
    """An engine for the model, and its compiled forward pass."""
    forward = CompiledForward(model, Settings(backend, dynamic))
    return BookKeeping(model, clip_norm=clip_norm, compiled=forward), forward


def sums_of(engine, inputs, call=None):
    batch = inputs[0].shape[0]
    with engine.record(batch):
        values = losses(call or engine.call, inputs, torch.arange(batch))
    return engine.backward(values).grads


def assert_close(found, expected, tolerance=1e-6):
    assert list(found) == list(expected)
    scale = norm(expected)
    assert scale > 1e-4, "the test says nothing about a zero gradient"
    difference = norm({name: found[name].double() - expected[name].double() for name in expected})
    assert difference <= tolerance * scale, f"relative error {difference / scale:.2e}"


class Decoder(nn.Module):
    """Embeddings of tokens and of one row of positions, attention, a norm that is called twice, a tied head."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 6), nn.Embedding(4, 6)
        self.norm, self.mix, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 11)
        self.out.weight = self.tokens.weight

    def forward(self, x):
        h = self.norm(self.tokens(x) + self.places(torch.arange(x.shape[1]).unsqueeze(0)))
        q, k, v = self.mix(h).chunk(3, -1)
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(self.norm(h))


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(9, 5, mode="sum"), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.bag(input=x)))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


MODELS = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), (6, 5), 0),
    "one layer": (lambda: nn.Linear(5, 3), (6, 5), 0),
    "convolutions": (convolutions, (5, 2, 4, 4), 0),
    "decoder": (Decoder, (5, 4), 11),
    "bags by name": (Bags, (6, 4), 9),
}


@pytest.mark.parametrize("kind", MODELS)
def test_sums_are_those_of_a_loop_over_single_examples(kind):
    build, shape, values = MODELS[kind]
    model = build()
    inputs = [torch.randint(0, values, shape) if values else torch.randn(shape)]
    clip_norm = typical_norm(model, inputs)
    expected = microbatch(model, inputs, clip_norm)
    engine, forward = compiled(model, clip_norm)
    assert_close(sums_of(engine, inputs), expected)
    assert_close(sums_of(engine, inputs), expected)
    assert forward.reason is None
    assert counters["stats"]["unique_graphs"] == 2, "one graph, its recording form, and each compiled once"
    engine.detach()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["perceptron", "decoder"])
def test_one_graph_serves_batches_of_all_sizes_after_the_second(kind):
    build, shape, values = MODELS[kind]
    model = build()
    engine, _ = compiled(model, 0.3)
    for size in (6, 9, 5, 12, 7, 3):
        x = torch.randint(0, values, (size, *shape[1:])) if values else torch.randn(size, *shape[1:])
        assert_close(sums_of(engine, [x]), microbatch(model, [x], 0.3))
    assert counters["aot_autograd"]["total"] == 2


def test_a_model_may_be_called_twice_and_with_arguments_by_name():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x, *, scale):
            return {"out": (self.two(torch.tanh(self.one(x))), scale)}

    model, x = Twice(), torch.randn(6, 4)

    def both(call):
        return call(x, scale=2.0)["out"][0] + call(x * 2, scale=1.0)["out"][0] ** 2

    found = []
    for engine in (BookKeeping(model, clip_norm=0.2), compiled(model, 0.2)[0]):
        with engine.record(6):
            values = row_loss(both(engine.call), torch.arange(6))
        found.append(engine.backward(values).grads)
        engine.detach()
    assert_close(found[1], found[0])


def test_an_example_moves_the_sum_by_at_most_the_clipping_norm():
    model, x = convolutions(), 30 * torch.randn(8, 2, 4, 4)
    engine, forward = compiled(model, 0.01)

    def total(rows):
        with engine.record(len(rows)):
            values = losses(engine.call, [x[rows]], rows)
        return engine.backward(values).grads

    whole = total(torch.arange(8))
    for left_out in range(8):
        without = total(torch.tensor([i for i in range(8) if i != left_out]))
        # Up to the rounding of sums over other shapes.
        assert norm({name: whole[name] - without[name] for name in whole}) <= 0.01 * (1 + 1e-6)
    assert forward.reason is None


def test_an_example_with_infinite_gradients_contributes_nothing():
    model, x = MODELS["perceptron"][0](), torch.randn(6, 5)
    engine, _ = compiled(model, 0.3)
    expected = microbatch(model, [x[:5]], 0.3)
    x[5] = float("inf")
    assert_close(sums_of(engine, [x]), expected)


def test_half_precision_under_autocast_is_that_of_the_eager_engine():
    found = {}
    for kind in ("eager", "compiled"):
        torch.manual_seed(1)
        model, x = Decoder(), torch.randint(0, 11, (5, 4))
        engine, forward = compiled(model, 0.5) if kind == "compiled" else (BookKeeping(model, clip_norm=0.5), None)
        with engine.record(5), torch.autocast("cpu", torch.bfloat16):
            out = engine.call(x)
            values = row_loss(out.float(), torch.arange(5))
        assert out.dtype == torch.bfloat16
        found[kind] = engine.backward(values).grads
        assert all(value.dtype == torch.float32 for value in found[kind].values())
        if forward is not None:
            assert forward.reason is None
            with engine.record(5), torch.autocast("cpu", torch.bfloat16):
                engine.call(x).float().square().mean().backward()
            engine.begin(5)
            with torch.autocast("cpu", torch.bfloat16):
                loss = engine.call(x).float().square().mean()
            loss.backward()
            with pytest.raises(PrivacyViolation, match="DP030"):
                engine.finish("mean")  # the rounding of a mean in half precision follows the size of the batch
    assert_close(found["compiled"], found["eager"], 2e-2)


def test_what_lies_before_the_model_gets_its_gradient():
    model, x = MODELS["perceptron"][0](), torch.randn(6, 5)
    found = []
    for engine in (BookKeeping(model, clip_norm=0.2), compiled(model, 0.2)[0]):
        given = x.clone().requires_grad_()
        sums_of(engine, [given.sin()])
        found.append(given.grad)
        engine.detach()
    torch.testing.assert_close(found[1], found[0])
    assert found[0].abs().sum() > 0


def test_a_layer_under_no_grad_contributes_nothing():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            with torch.no_grad():
                h = self.body(x)
            return self.last(h)

    model, x = Half(), torch.randn(6, 4)
    engine, forward = compiled(model, 0.2)
    assert_close(sums_of(engine, [x]), microbatch(model, [x], 0.2))
    assert forward.reason is None


class Outside(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.last(self.first(x)), self.first.weight)


class Overwrites(Outside):
    def forward(self, x):
        h = self.first(x) * 2
        out = self.last(h)
        h += 1
        return out + h


class Places(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.table(torch.arange(5)) * x.unsqueeze(2)).mean(1)


class Counts(Outside):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        h = self.first(x)
        self.seen += h.detach().sum(0)
        return self.last(h)


class ForwardOnly(Outside):
    def forward(self, x):
        return self.last.forward(self.first(x))


@pytest.mark.parametrize(
    ("build", "x", "code"),
    [
        (Outside, torch.randn(6, 4), "DP019"),
        (ForwardOnly, torch.randn(6, 4), "DP019"),
        (Overwrites, torch.randn(6, 4), "DP019"),
        (Places, torch.randn(5, 5), "DP030"),
        (Counts, torch.randn(6, 4), "DP013"),
    ],
)
def test_what_the_eager_engine_refuses_is_refused(build, x, code):
    said = []
    for engine in (BookKeeping(build(), clip_norm=1.0), compiled(build())[0]):
        with pytest.raises(PrivacyViolation, match=code) as caught:
            sums_of(engine, [x])
        said.append(str(caught.value))
        assert not engine.batch_is_open
        engine.detach()
    assert said[0] == said[1]


def test_a_trainable_parameter_of_nobody_is_refused():
    alien = nn.Parameter(torch.ones(4))

    class Uses(Outside):
        def forward(self, x):
            return self.last(self.first(x) * alien)

    engine, _ = compiled(Uses())
    with pytest.raises(PrivacyViolation, match="DP031"):
        sums_of(engine, [torch.randn(6, 4)])


def test_a_second_backward_pass_and_one_after_the_batch_are_refused():
    model = MODELS["perceptron"][0]()
    engine, forward = compiled(model)
    engine.begin(6)
    out = engine.call(torch.randn(6, 5))
    out.sum().backward(retain_graph=True)
    with pytest.raises(PrivacyViolation, match="DP031"):
        out.sum().backward(retain_graph=True)
    engine.abort()
    engine.begin(6)
    out = engine.call(torch.randn(6, 5))
    engine.abort()
    with pytest.raises(PrivacyViolation, match="DP031"):
        out.sum().backward()
    assert forward.reason is None


class Toggled(Places):
    """Looks up positions only when told to; five of them, which may be taken for the rows of a batch of five."""

    late = False

    def forward(self, x):
        return super().forward(x) if self.late else self.last(x[:, :4])


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_a_compiler_that_is_told_to_leave_code_alone_leaves_the_guard_in_place(stance):
    model = Toggled()
    engine, forward = compiled(model, 0.2)
    sums_of(engine, [torch.randn(5, 5)])
    with torch.compiler.set_stance(stance):
        x = torch.randn(5, 5)
        assert_close(sums_of(engine, [x]), microbatch(model, [x], 0.2))
        model.late = True
        with pytest.raises(PrivacyViolation, match="DP030"):
            sums_of(engine, [x])
    assert "leave code as it is" in forward.reason


def test_inside_what_the_compiler_keeps_away_from_the_model_runs_uncompiled():
    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    model, x = MODELS["perceptron"][0](), torch.randn(6, 5)
    engine, forward = compiled(model, 0.2)
    with Nothing():
        found = sums_of(engine, [x])
    assert_close(found, microbatch(model, [x], 0.2))
    assert forward.reason


class Gentle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-0.01, 0.01)


class OwnBackward(Outside):
    def forward(self, x):
        return self.last(Gentle.apply(self.first(x)))


class Asks(Outside):
    def forward(self, x):
        h = self.first(x)
        if h.requires_grad:
            h.register_hook(lambda grad: 2 * grad)
        return self.last(h)


class Changes(Outside):
    def forward(self, x):
        h = self.first(x)
        h += 1
        h[:, 0] = 2 * h[:, 1]
        return self.last(h if h.requires_grad else h.detach())


@pytest.mark.parametrize("build", [OwnBackward, Asks, Changes])
def test_outputs_of_layers_require_a_gradient_for_the_compiler_too(build):
    model, x = build(), torch.randn(6, 4)
    engine, forward = compiled(model, 0.2)
    assert_close(sums_of(engine, [x]), microbatch(model, [x], 0.2))
    assert (forward.reason is None) == (build is Changes)


def test_a_gradient_of_the_inputs_alone_is_a_backward_pass_too():
    model = MODELS["perceptron"][0]()
    for engine in (BookKeeping(model, clip_norm=1.0), compiled(model)[0]):
        x = torch.randn(6, 5, requires_grad=True)
        engine.begin(6)
        (grad,) = torch.autograd.grad(engine.call(x).square().mean(), x)
        with pytest.raises(PrivacyViolation, match="DP031"):
            engine.call((x + grad).detach()).square().mean().backward()
        engine.detach()


def test_a_model_that_is_checkpointed_as_a_whole_runs_uncompiled_meanwhile():
    model, x = MODELS["perceptron"][0](), torch.randn(6, 5)
    engine, forward = compiled(model, 0.2)
    found = sums_of(engine, [x], lambda x: checkpoint(engine.call, x, use_reentrant=False))
    assert_close(found, microbatch(model, [x], 0.2))
    assert_close(sums_of(engine, [x]), found)
    assert forward.reason is None


@pytest.mark.parametrize("dynamic", [True, False])
def test_what_the_compiler_has_to_say_of_a_batch_is_not_said(dynamic, capfd, caplog):
    """It names sizes: "size mismatch at index 0. expected 5, actual 7"."""
    model = MODELS["decoder"][0]()
    engine, forward = compiled(model, 0.3, dynamic=dynamic)
    forward.rehearse = lambda: None
    with torch._dynamo.config.patch(recompile_limit=1):
        for size in (5, 7, 9):
            x = torch.randint(0, 11, (size, 4))
            assert_close(sums_of(engine, [x]), microbatch(model, [x], 0.3))
    assert (forward.reason is None) == dynamic
    assert capfd.readouterr() == ("", "")
    # Traces are written by whoever sets TORCH_TRACE.
    assert not [record for record in caplog.records if record.name != "torch.__trace"]


def test_a_rehearsal_that_was_interrupted_is_held_again():
    model, x, held = MODELS["perceptron"][0](), torch.randn(6, 5), []
    engine, forward = compiled(model, 0.2)
    forward._untried = True

    def rehearse():
        held.append(forward.reason)
        if len(held) == 1:
            forward.reason = "it is compared with"
            raise KeyboardInterrupt

    forward.rehearse = rehearse
    with pytest.raises(KeyboardInterrupt):
        sums_of(engine, [x])
    for _ in range(2):
        assert_close(sums_of(engine, [x]), microbatch(model, [x], 0.2))
    assert held == [None, None]
    assert forward.reason is None


class Branches(Outside):
    def forward(self, x):
        h = self.first(x)
        return self.last(h if float(h.detach().sum()) > 1e9 else torch.tanh(h))


class Checkpointed(Outside):
    def forward(self, x):
        return self.last(checkpoint(lambda h: torch.tanh(self.first(h)), x, use_reentrant=False))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(x * self.scale)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.last = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.rnn(x.unsqueeze(1))[0][:, -1])


@pytest.mark.parametrize("build", [Branches, Checkpointed, Bare, Recurrent])
def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(build):
    model, x = build(), torch.randn(6, 4)
    engine, forward = compiled(model, 0.2)
    expected = microbatch(model, [x], 0.2)
    assert_close(sums_of(engine, [x]), expected)
    assert_close(sums_of(engine, [x]), expected)
    assert forward.reason


def test_a_backend_that_fails_leaves_the_sums_as_they_are():
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    model, x = MODELS["perceptron"][0](), torch.randn(6, 5)
    engine, forward = compiled(model, 0.2, backend=broken)
    assert_close(sums_of(engine, [x]), microbatch(model, [x], 0.2))
    assert "no compiler here" in forward.reason


def test_freezing_a_layer_or_hooking_it_compiles_the_model_that_it_is_then():
    model, x = MODELS["perceptron"][0](), torch.randn(6, 5)
    engine, forward = compiled(model, 0.2)
    sums_of(engine, [x])
    model[0].requires_grad_(False)
    assert_close(sums_of(engine, [x]), microbatch(model, [x], 0.2))
    model[0].requires_grad_(True)
    handle = model[1].register_forward_hook(lambda module, args, output: output * 3)
    assert_close(sums_of(engine, [x]), microbatch(model, [x], 0.2))
    handle.remove()
    assert_close(sums_of(engine, [x]), microbatch(model, [x], 0.2))
    assert forward.reason is None


def test_dropout_is_drawn_anew_for_each_batch_and_once_for_forward_and_backward():
    model = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    x = torch.ones(4, 5)
    engine, forward = compiled(model, 1e6)
    outputs = []
    for _ in range(2):
        engine.begin(4)
        out = engine.call(x)
        out.sum().backward()
        grads = engine.finish("sum").grads
        outputs.append(out.detach())
        # The last layer's gradient is the sum of what it was given, so its bias and output tell the mask.
        given = grads["2.weight"][0]
        torch.testing.assert_close(given @ model[2].weight[0] + 4 * model[2].bias[0], out[:, 0].sum())
    assert not torch.equal(outputs[0], outputs[1])
    assert forward.reason is None


def test_a_copy_of_the_model_is_a_plain_model():
    model, x = MODELS["perceptron"][0](), torch.randn(6, 5)
    engine, _ = compiled(model)
    engine.begin(6)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), engine.call(x))
    twin(x).sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    engine.detach()
