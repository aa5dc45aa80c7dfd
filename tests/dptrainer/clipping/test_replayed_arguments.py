"""What a replayed module shares among examples is decided at set-up, and no example decides whether a step raises."""

import pytest
import torch
from clipping_oracle import clipped, microbatch, norm
from torch import nn
from torch.nn import functional as F

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping import BookKeeping, self_test
from dptrainer.clipping import replay as replay_module
from dptrainer.clipping.arguments import arguments_of
from dptrainer.clipping.factory import deterministic_copy, learn_arguments
from dptrainer.clipping.vector_replay import same_rows
from dptrainer.probe import probe

T, D = 8, 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(11)


class Placed(nn.Module):
    """A unit with a table [T, d] that all examples share."""

    def __init__(self, *, gate=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D) / 2)
        self.gate = nn.Parameter(torch.zeros(D)) if gate else None

    def forward(self, x, places):
        return x @ self.weight + (places @ self.weight if self.gate is None else places * self.gate)


class Model(nn.Module):
    def __init__(self, *, gate=False, by_name=False):
        super().__init__()
        self.unit, self.head, self.by_name = Placed(gate=gate), nn.Linear(D, 2), by_name
        self.register_buffer("places", torch.randn(T, D))

    def forward(self, x):
        h = self.unit(x, places=self.places) if self.by_name else self.unit(x, self.places)
        return self.head(h.tanh().mean(1))


def difference(first, second):
    return norm({name: first[name].double() - second[name].double() for name in first})


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("looped", [False, True])
def test_a_batch_of_t_examples_is_clipped_like_any_other_after_a_set_up(by_name, gate, looped, monkeypatch):
    if looped:
        monkeypatch.setattr(replay_module, "replay_vectorised", lambda *args: None)
    model = Model(by_name=by_name, gate=gate)
    self_test(model, [torch.zeros(1, T, D)])
    for batch in (T, T - 1, T, T + 1, 1):  # the first private batch has T examples
        x = torch.randn(batch, T, D)
        expected = microbatch(model, [x], 0.1)
        assert difference(clipped(model, [x], 0.1), expected) <= 1e-5 * norm(expected)


def test_a_gate_of_zero_hides_the_shared_table_from_the_outputs_but_not_from_the_set_up():
    model = Model(gate=True)  # the outputs do not depend on the table, and the gradient of the gate does
    self_test(model, [torch.zeros(1, T, D)])
    x = torch.randn(T, T, D)
    assert difference(clipped(model, [x], 1e-2), clipped(model, [x[1:]], 1e-2)) > 0
    assert difference(clipped(model, [x], 1e-2), microbatch(model, [x], 1e-2)) <= 1e-6


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6, 1e9, 1e30])
@pytest.mark.parametrize("set_up", [True, False])
def test_a_huge_record_that_makes_it_t_examples_moves_the_sum_by_at_most_c(scale, set_up):
    model = Model()
    if set_up:
        self_test(model, [torch.zeros(1, T, D)])
    others = torch.randn(T - 1, T, D)
    found = []
    for x in (others, torch.cat([others, scale * torch.randn(1, T, D)])):
        engine = BookKeeping(model, clip_norm=0.1)
        engine.begin(len(x))
        model(x).sum().backward()
        found.append(engine.finish("sum").grads)
        engine.detach()
    assert difference(*found) <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize("looped", [False, True])
def test_without_a_set_up_a_first_batch_of_t_examples_is_told_by_its_outputs(looped, monkeypatch):
    if looped:
        monkeypatch.setattr(replay_module, "replay_vectorised", lambda *args: None)
    model, x = Model(), torch.randn(T, T, D)
    expected = microbatch(model, [x], 0.1)
    assert difference(clipped(model, [x], 0.1), expected) <= 1e-5 * norm(expected)


def test_calls_of_one_module_may_use_an_argument_differently():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(D, D) / 2)

        def forward(self, x, other, own):
            return x @ self.weight + (other.unsqueeze(1) if own else other) @ self.weight.square()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit = Both()
            self.register_buffer("places", torch.randn(T, D))

        def forward(self, x):
            return self.unit(x, self.places, False) + self.unit(x.tanh(), x[:, 0], True).tanh()

    model = Twice()
    self_test(model, [torch.zeros(1, T, D)])
    for batch in (T, 1, 2, T + 1):
        x = torch.randn(batch, T, D)
        expected = microbatch(model, [x], 0.1)
        assert difference(clipped(model, [x], 0.1), expected) <= 1e-5 * norm(expected)


def test_an_argument_of_examples_with_another_number_of_rows_is_refused():
    model = Model()
    self_test(model, [torch.zeros(1, T, D)])
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(5)
    model(torch.randn(4, T, D)).sum().backward()
    with pytest.raises(PrivacyViolation, match="number of rows") as caught:
        engine.finish("sum")
    assert caught.value.code == "DP030"


def test_the_set_up_learns_for_the_model_what_its_copy_was_given():
    model = Model()
    assert learn_arguments(model, deterministic_copy(model), [torch.zeros(1, T, D)]) == ("unit",)
    known = arguments_of(model.unit)._seen
    ((calls),) = known.values()
    assert [seen.carries for seen in calls[0]] == [True, False]


def test_a_model_that_draws_is_learnt_although_no_self_test_runs():
    class Noisy(Model):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5)

    model = Noisy()
    assert probe(model, [torch.zeros(1, T, D)], note=lambda said: None)
    assert arguments_of(model.unit)._seen


# ---------------------------------------------------------------------- an example that does not come out again


class Sometimes(nn.Module):
    """Gives something else the second time, for examples with a negative first entry."""

    def __init__(self):
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.ones(D)), [0]

    def forward(self, x):
        self.calls[0] += 1
        again = float(self.calls[0] > 1)
        return x * self.scale + again * (x[:, :1] < 0)


@pytest.mark.parametrize("looped", [False, True])
def test_an_example_that_does_not_come_out_again_contributes_nothing_and_raises_nothing(looped, monkeypatch):
    if looped:
        monkeypatch.setattr(replay_module, "replay_vectorised", lambda *args: None)
    model = nn.Sequential(nn.Linear(D, D), Sometimes())
    nn.init.eye_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    x = torch.randn(6, D).abs()
    expected = microbatch(model, [x], 0.1)
    x = torch.cat([x, -x[:1]])
    model[1].calls[0] = 0
    found = clipped(model, [x], 0.1)
    assert difference(found, expected) <= 1e-5 * norm(expected)
    model[1].calls[0] = 0
    assert norm(clipped(model, [-x[:1]], 0.1)) == 0  # alone: it would tell of itself by an error


def test_a_module_that_never_repeats_itself_is_refused():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64))

        def forward(self, x):
            return F.dropout(x * self.scale, 0.5)

    with pytest.raises(PrivacyViolation, match="same output twice"):
        clipped(nn.Sequential(nn.Linear(D, 64), Dropped()), [torch.randn(3, D)], 1.0)


def test_dropout_that_the_self_test_switched_off_is_still_refused_in_training():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.drop = nn.Parameter(torch.ones(64)), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(x * self.scale)

    model = nn.Sequential(nn.Linear(D, 64), Dropped())
    self_test(model, [torch.zeros(1, D)])
    with pytest.raises(PrivacyViolation, match="same output twice"):
        clipped(model, [torch.randn(3, D)], 1.0)


def test_rows_are_compared_by_their_own_size():
    recorded = torch.tensor([[1e6, 1.0], [1.0, 1.0], [0.0, 0.0], [float("inf"), 1.0], [float("nan"), 1.0]])
    found = recorded.clone()
    assert same_rows(found, recorded, 1e-3).all()
    found[:, 1] += 0.01
    assert same_rows(found, recorded, 1e-3).tolist() == [True, False, False, False, False]
    found[:, 1] = float("nan")
    assert not same_rows(found, recorded, 1e-3).any()


# ---------------------------------------------------------------------- autocast


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.inner = nn.Parameter(torch.randn(8)), nn.Linear(8, 4)

    def forward(self, x):
        return self.inner(x * self.gate.sigmoid())


def under_autocast(model, x, clip_norm, dtype):
    engine = BookKeeping(model, clip_norm=clip_norm)
    engine.begin(len(x))
    with torch.autocast("cpu", dtype):
        output = model(x)
    output.float().square().sum().backward()
    found = engine.finish("sum").grads
    engine.detach()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("looped", [False, True])
def test_a_replay_runs_under_the_autocast_of_the_forward_pass(dtype, looped, monkeypatch):
    if looped:
        monkeypatch.setattr(replay_module, "replay_vectorised", lambda *args: None)
    model = Gate()
    for trial in range(20):
        x = torch.randn(1 + trial % 5, 8)
        rows = []
        for one in x.split(1):
            with torch.autocast("cpu", dtype):
                output = model(one)
            rows.append(torch.autograd.grad(output.float().square().sum(), list(model.parameters())))
        factors = [min(1.0, 0.5 / float(torch.cat([g.flatten() for g in row]).norm())) for row in rows]
        expected = {
            name: sum(factor * row[at] for factor, row in zip(factors, rows, strict=True))
            for at, (name, _) in enumerate(model.named_parameters())
        }
        assert difference(under_autocast(model, x, 0.5, dtype), expected) <= 0.05 * norm(expected)


def test_one_more_example_moves_a_replay_under_autocast_by_at_most_c():
    model = Gate()
    for scale in (1.0, 1e2, 1e4):
        x = torch.cat([torch.randn(6, 8), scale * torch.randn(1, 8)])
        found = [under_autocast(model, rows, 0.5, torch.bfloat16) for rows in (x, x[:-1])]
        assert difference(*found) <= 0.5 * (1 + 1e-5)


def test_the_batch_size_does_not_round_a_replay_under_autocast():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.gate = nn.Linear(64, 64), nn.Parameter(torch.randn(64) / 10)

        def forward(self, x):
            return x + self.inner(x) * self.gate

    def gradients(x):
        engine = BookKeeping(model, clip_norm=1.0)
        with engine.record(len(x)):
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x)
            losses = output.float().square().sum(1)
        found = engine.per_example(losses)
        engine.detach()
        return found["gate"].dense(slice(0, 1))

    model, x = Shifted(), torch.randn(40, 64)
    assert all(torch.allclose(gradients(x[:size]), gradients(x), rtol=1e-5) for size in (1, 2, 16))
