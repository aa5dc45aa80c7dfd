"""Modules without a rule are replayed, under vmap or one example at a time, never skipped; rules can be added."""

import re
from pathlib import Path

import pytest
import torch
from clipping_oracle import assert_equal_to_the_oracle, clipped, losses, microbatch, norm
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.clipping import BookKeeping, VmapEngine, make_engine, rule, self_test
from dptrainer.clipping import replay as replay_module
from dptrainer.clipping.rules import _RULES
from dptrainer.clipping.vector_replay import replay_vectorised


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(5)


def with_its_own_forward(kind):
    """A subclass that could do anything in forward, so that the rule of its base does not hold for it."""

    class Own(kind):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    return Own


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x * self.scale


class Token(nn.Module):
    """A learned class token and positions, as in a vision transformer: bare parameters of the model itself."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.place = nn.ParameterList([nn.Parameter(torch.randn(1, 4, 4))])
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), self.inner(x)], 1) + self.place[0]
        return torch.tanh(h).mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.inner = with_its_own_forward(kind)(4, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(20, 2)

    def forward(self, x):
        states, last = self.inner(self.embed(x))
        last = last[0] if isinstance(last, tuple) else last
        return self.out(torch.cat([states[:, -1], last[0], last[3]], 1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.attend, self.out = (
            nn.Linear(6, 4),
            with_its_own_forward(nn.MultiheadAttention)(4, 2, batch_first=True),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        h = self.first(x)
        mixed, _ = self.attend(h, h, h, attn_mask=torch.triu(torch.full((x.shape[1],) * 2, -1e4, dtype=h.dtype), 1))
        return self.out(h + mixed)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.inner.self_attn = with_its_own_forward(nn.MultiheadAttention)(4, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 4), Scale(4), nn.ReLU(inplace=True), nn.Linear(4, 2)),
            lambda: torch.randn(5, 4),
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU()), lambda: torch.randn(5, 4)),
        (Token, lambda: torch.randn(5, 3, 4)),
        (lambda: Recurrent(nn.LSTM), lambda: torch.randint(0, 7, (3, 4))),
        (lambda: Recurrent(nn.GRU), lambda: torch.randint(0, 7, (3, 4))),
        (Attention, lambda: torch.randn(3, 5, 6)),
        (Attention, lambda: torch.randn(5, 5, 6)),
        (Residual, lambda: torch.randn(3, 5, 4)),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), lambda: torch.randn(5, 4)),
        (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 3)), nn.Tanh()), lambda: torch.randn(5, 4)),
    ],
    ids=str.split("bare prelu token lstm gru attention attention-square encoder weight-norm orthogonal"),
)
def test_modules_without_a_rule(model, data):
    assert_equal_to_the_oracle(model(), [data()], single=3e-6)


@pytest.mark.parametrize(
    ("model", "data", "vectorised"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), Scale(4)), lambda: torch.randn(5, 4), True),
        (Token, lambda: torch.randn(5, 3, 4), True),
        (Attention, lambda: torch.randn(3, 5, 6), True),
        (lambda: nn.Sequential(nn.PReLU(2), nn.Tanh()), lambda: torch.randn(3, 2, 4, 4), True),
        (lambda: Recurrent(nn.LSTM), lambda: torch.randint(0, 7, (3, 4)), False),
    ],
    ids=str.split("bare token attention prelu lstm"),
)
def test_a_replay_is_vectorised_where_that_is_sure_and_equal_to_the_loop(model, data, vectorised, monkeypatch):
    made, example = model(), data()
    answers = []

    def spy(*args):
        answers.append(replay_vectorised(*args))
        return answers[-1]

    monkeypatch.setattr(replay_module, "replay_vectorised", spy)
    at_once = clipped(made, [example], 1.0)
    assert [answer is not None for answer in answers] == [vectorised]
    monkeypatch.setattr(replay_module, "replay_vectorised", lambda *args: None)
    looped = clipped(made, [example], 1.0)
    for name, value in looped.items():
        torch.testing.assert_close(at_once[name], value)


def test_the_replayed_modules_are_named():
    assert BookKeeping(nn.Sequential(nn.Linear(4, 4), Scale(4)), clip_norm=1.0).replayed == ("1",)
    assert BookKeeping(Token(), clip_norm=1.0).replayed == ("",)
    assert BookKeeping(Attention(), clip_norm=1.0).replayed == ("attend",)
    assert BookKeeping(nn.Linear(2, 2), clip_norm=1.0).replayed == ()


def test_one_replayed_example_moves_the_update_by_at_most_c():
    for clip_norm in (0.01, 1.0):
        found = clipped(Token(), [torch.randn(1, 3, 4) * 50], clip_norm)
        assert norm(found) <= clip_norm


def test_a_replayed_example_that_is_not_finite_contributes_nothing():
    model, x = nn.Sequential(nn.Linear(4, 4), Scale(4), nn.Linear(4, 2)), torch.randn(4, 4)
    expected = microbatch(model, [x[:3]], 0.2)
    x[3, 1] = float("nan")
    found = clipped(model, [x], 0.2)
    assert norm({n: found[n].double() - expected[n] for n in expected}) <= 1e-6 * norm(expected)


def test_a_replayed_module_with_dropout_is_refused():
    attention = with_its_own_forward(nn.MultiheadAttention)
    model = nn.Sequential(nn.Linear(4, 4), attention(4, 2, dropout=0.5, batch_first=True))
    model[1].register_forward_pre_hook(lambda module, args: (args[0], args[0], args[0]))

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)[0]

    with pytest.raises(PrivacyViolation, match=r"inner\.1.*same output twice"):
        clipped(First(), [torch.randn(6, 5, 4)], 1.0)


def test_replay_of_a_foreign_module_is_refused():
    with pytest.raises(PrivacyViolation, match="not part of the model"):
        BookKeeping(nn.Linear(2, 2), clip_norm=1.0, replay=[nn.Linear(2, 2)])


# ---------------------------------------------------------------------- rules of one's own


@pytest.fixture
def _registry():
    before = dict(_RULES)
    yield
    _RULES.clear()
    _RULES.update(before)


@pytest.mark.usefixtures("_registry")
def test_a_rule_of_ones_own_replaces_the_replay():
    @rule(Scale)
    def scale_rule(layer, call):
        return {"scale": (call.grad * call.activation).flatten(1, -2).sum(1)}

    model = nn.Sequential(nn.Linear(4, 4), Scale(4), nn.Linear(4, 2))
    assert BookKeeping(model, clip_norm=1.0).replayed == ()
    assert_equal_to_the_oracle(model, [torch.randn(5, 3, 4)])
    self_test(model.float(), [torch.randn(2, 3, 4)])


@pytest.mark.usefixtures("_registry")
def test_a_wrong_rule_is_found_by_the_self_test():
    @rule(Scale)
    def forgets_the_input(layer, call):
        return {"scale": call.grad.sum(1)}

    with pytest.raises(PrivacyViolation, match=r"1\.scale"):
        self_test(nn.Sequential(nn.Linear(4, 4), Scale(4)), [torch.randn(2, 3, 4)])


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("answer", [{}, {"scale": torch.zeros(4)}, {"scale": torch.zeros(3, 4)}])
def test_a_rule_that_does_not_answer_for_its_parameter_is_refused(answer):
    rule(Scale)(lambda layer, call: answer)
    with pytest.raises(PrivacyViolation, match="per-example gradient of shape"):
        clipped(nn.Sequential(Scale(4)), [torch.randn(5, 4)], 1.0)


def test_a_rule_for_something_else_than_a_module_class_is_refused():
    with pytest.raises(InvalidParameter):
        rule(nn.Linear(2, 2))


@pytest.mark.usefixtures("_registry")
def test_the_example_in_the_documentation_runs():
    page = Path(__file__).parents[3] / "docs" / "extending.md"
    section = page.read_text(encoding="utf-8").split("@rule(MyLayer)", 1)[1]
    code = re.search(r"```python\n(.*?)```", section, re.S).group(1)
    assert len(code.splitlines()) <= 20
    names = {}
    exec(compile(code, str(page), "exec"), names)
    model = nn.Sequential(nn.Linear(4, 4), names["MyLayer"](4), nn.Linear(4, 2))
    assert BookKeeping(model, clip_norm=1.0).replayed == ()
    assert_equal_to_the_oracle(model, [torch.randn(5, 3, 4)])


# ---------------------------------------------------------------------- factory and reference


def test_the_factory_says_once_what_is_replayed():
    said = []
    engine = make_engine(nn.Sequential(nn.Linear(4, 4), Scale(4)), 1.0, note=said.append)
    assert engine.clip_norm == 1.0
    assert len(said) == 1
    assert '"1"' in said[0]
    make_engine(nn.Linear(4, 4), 1.0, note=said.append)
    assert len(said) == 1


def test_the_self_test_accepts_what_is_right_and_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 2))
    state, values = torch.get_rng_state(), {n: v.clone() for n, v in model.state_dict().items()}
    make_engine(model, 1.0, example=[torch.zeros(2, 1, 6, 6)])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(values[n], v) for n, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_self_test_finds_examples_in_another_dimension():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 2)

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    with pytest.raises(PrivacyViolation) as caught:
        self_test(TimeFirst(), [torch.randn(5, 5, 4)])  # as many steps as examples: only another batch size shows it
    assert caught.value.code == "DP030"


@pytest.mark.parametrize(
    "example", [[], [torch.zeros(())], [torch.zeros(2, 3), torch.zeros(3, 3)], [torch.zeros(0, 3)]]
)
def test_the_self_test_needs_an_example(example):
    with pytest.raises(InvalidParameter):
        self_test(nn.Linear(3, 2), example)


@pytest.mark.parametrize("chunk", [2, 32])
def test_the_vmap_reference_equals_the_oracle(chunk):
    model = nn.Sequential(nn.Linear(4, 4), Scale(4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    model[0].bias.requires_grad_(False)
    x, index = torch.randn(5, 3, 4).double(), torch.arange(5)

    def loss(output, i):
        return losses(lambda value: value, [output], i)

    expected = microbatch(model, [x], 0.05)
    result = VmapEngine(model, loss, clip_norm=0.05, chunk_size=chunk)([x], [index])
    assert list(result.grads) == list(expected)
    assert result.sensitivity == 0.05
    assert norm({n: result.grads[n] - expected[n] for n in expected}) <= 1e-10 * norm(expected)
    assert all(p.grad is None for p in model.parameters())


def test_the_vmap_reference_takes_dropout_empty_batches_and_refuses_ragged_ones():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    engine = VmapEngine(model, lambda out, y: F.cross_entropy(out, y, reduction="none"), clip_norm=0.1)
    y = torch.zeros(3, dtype=torch.long)
    assert 0 < norm(engine([torch.randn(3, 4)], [y]).grads) <= 0.3
    assert norm(engine([torch.randn(0, 4)], [y[:0]]).grads) == 0
    assert len(engine([torch.randn(0, 4)], [y[:0]]).grads) == 4
    with pytest.raises(PrivacyViolation):
        engine([torch.randn(2, 4)], [y])
