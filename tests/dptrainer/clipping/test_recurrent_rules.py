"""RNN, GRU, LSTM and their cells: per-example gradients from the gates, against a loop over single examples."""

import copy
import re

import pytest
import torch
from clipping_oracle import assert_equal_to_the_oracle, clipped, losses, microbatch, norm, refused
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping import BookKeeping, self_test

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
KINDS = (nn.RNN, nn.GRU, nn.LSTM)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(7)


def states_of(state):
    return state if isinstance(state, tuple) else (state,)


class Sequences(nn.Module):
    """A layer above (so that gradients of the input count), all outputs and final states used."""

    def __init__(self, layer, use=("output", "state")):
        super().__init__()
        self.below, self.layer, self.use = nn.Linear(3, 3), layer, use

    def forward(self, x, *initial):
        x = self.below(x)
        first = self.layer.batch_first
        x = x if first else x.transpose(0, 1)
        if initial:
            given = tuple(state.transpose(0, 1).contiguous() for state in initial)
            output, state = self.layer(x, given if len(given) > 1 else given[0])
        else:
            output, state = self.layer(x)
        found = []
        if "output" in self.use:
            found.append((output if first else output.transpose(0, 1)).flatten(1))
        for index, one in enumerate(states_of(state)):
            if "state" in self.use or f"state{index}" in self.use:
                found.append(one.transpose(0, 1).flatten(1))
        return torch.cat(found, 1)


class Packed(nn.Module):
    def __init__(self, layer, enforce_sorted=False):
        super().__init__()
        self.below, self.layer, self.sorted = nn.Linear(3, 3), layer, enforce_sorted

    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.below(x), lengths, batch_first=True, enforce_sorted=self.sorted)
        output, state = self.layer(packed)
        padded, _ = pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])
        return torch.cat([padded.flatten(1), *(one.transpose(0, 1).flatten(1) for one in states_of(state))], 1)


def in_a_private_batch(model, inputs):
    engine = BookKeeping(model, clip_norm=1.0)
    with engine.record(len(inputs[0])):
        output = model(*inputs)
    engine.detach()
    return output


OPTIONS = [
    {},
    {"bias": False},
    {"bidirectional": True},
    {"num_layers": 2},
    {"num_layers": 2, "bidirectional": True, "bias": False},
]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_recurrent_layer_with_examples_in_either_dimension(kind, options, batch_first):
    model = Sequences(kind(3, 4, batch_first=batch_first, **options))
    assert BookKeeping(model, clip_norm=1.0).replayed == ()
    assert_equal_to_the_oracle(model, [torch.randn(5, 6, 3)])


@pytest.mark.parametrize("options", [{}, {"bias": False, "bidirectional": True}, {"num_layers": 2}], ids=str)
def test_an_lstm_with_projections(options):
    assert_equal_to_the_oracle(
        Sequences(nn.LSTM(3, 4, proj_size=2, batch_first=True, **options)), [torch.randn(5, 6, 3)]
    )


def test_a_relu_network():
    layer = nn.RNN(3, 4, num_layers=2, nonlinearity="relu", bidirectional=True, batch_first=True)
    assert_equal_to_the_oracle(Sequences(layer), [torch.randn(5, 6, 3)])


@pytest.mark.parametrize("shape", [(1, 6), (4, 4), (5, 1)])
def test_one_example_as_many_steps_as_examples_and_one_step(shape):
    assert_equal_to_the_oracle(Sequences(nn.LSTM(3, 4, batch_first=False)), [torch.randn(*shape, 3)])


@pytest.mark.parametrize("use", [("output",), ("state0",), ("state1",)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_of_one_result_alone(kind, use):
    if use == ("state1",) and kind is not nn.LSTM:
        use = ("state",)
    assert_equal_to_the_oracle(
        Sequences(kind(3, 4, 2, batch_first=True, bidirectional=True), use), [torch.randn(5, 6, 3)]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_given_initial_states(kind):
    initial = [torch.randn(5, 4, 4) for _ in range(2 if kind is nn.LSTM else 1)]
    model = Sequences(kind(3, 4, 2, batch_first=True, bidirectional=True))
    assert_equal_to_the_oracle(model, [torch.randn(5, 6, 3), *initial])


class Carried(nn.Module):
    """The state of one half of the sequence starts the other, as in truncated training without the cut."""

    def __init__(self, kind):
        super().__init__()
        self.layer = kind(3, 4, batch_first=True)

    def forward(self, x):
        first, state = self.layer(x[:, :3])
        second, _ = self.layer(x[:, 3:], state)
        return torch.cat([first, second], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_two_calls_with_a_carried_state_add_up_with_their_cross_terms(kind):
    assert_equal_to_the_oracle(Carried(kind), [torch.randn(5, 7, 3)])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_of_unequal_length(kind, options):
    assert_equal_to_the_oracle(Packed(kind(3, 4, **options)), [torch.randn(5, 6, 3), torch.tensor([2, 6, 1, 4, 6])])


def test_packed_sequences_that_are_sorted_and_projected():
    model = Packed(nn.LSTM(3, 4, proj_size=2, bidirectional=True), enforce_sorted=True)
    assert_equal_to_the_oracle(model, [torch.randn(4, 5, 3), torch.tensor([5, 4, 4, 1])])


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_in_a_private_batch_is_that_of_the_layer(kind):
    for model, inputs in (
        (Sequences(kind(3, 4, 3, bidirectional=True)), [torch.randn(5, 6, 3)]),
        (Packed(kind(3, 4, 2, bidirectional=True)), [torch.randn(3, 6, 3), torch.tensor([3, 6, 1])]),
    ):
        plain = model(*inputs)
        torch.testing.assert_close(in_a_private_batch(model, inputs), plain, rtol=1e-5, atol=1e-6)
        assert torch.equal(model(*inputs), plain), "outside an open batch the layer is PyTorch's own"


def test_dropout_between_layers_is_drawn_once():
    model, x = Sequences(nn.LSTM(3, 4, 3, dropout=0.5, batch_first=True)).double(), torch.randn(4, 6, 3).double()
    torch.manual_seed(1)
    plain = model(x)
    (expected,) = torch.autograd.grad(plain.sum(), [model.layer.weight_hh_l0])
    torch.manual_seed(1)
    engine = BookKeeping(model, clip_norm=1e6)
    engine.begin(4)
    output = model(x)
    output.sum().backward()
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(engine.finish("sum").grads["layer.weight_hh_l0"], expected)


@pytest.mark.parametrize(
    "frozen", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l1", "bias_hh_l0", r".*_l0", r"weight_.*", r".*_l0_reverse"]
)
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_partly_frozen_layer(kind, frozen):
    model = Sequences(kind(3, 4, 2, batch_first=True, bidirectional=True))
    for name, parameter in model.layer.named_parameters():
        parameter.requires_grad_(not re.fullmatch(frozen, name))
    model.below.requires_grad_(False)
    assert_equal_to_the_oracle(model, [torch.randn(4, 5, 3)])


def test_tied_layers_add_up():
    model = Sequences(nn.LSTM(4, 4, 2, batch_first=True))
    model.below = nn.Linear(3, 4)
    model.layer.weight_hh_l1 = model.layer.weight_hh_l0
    assert_equal_to_the_oracle(model, [torch.randn(4, 5, 3)])


def test_weights_that_are_computed_are_replayed():
    model = Sequences(parametrizations.weight_norm(nn.GRU(3, 4, batch_first=True), "weight_hh_l0"))
    assert BookKeeping(model, clip_norm=1.0).replayed == ("layer",)
    assert_equal_to_the_oracle(model, [torch.randn(4, 5, 3)], single=3e-6)


# ---------------------------------------------------------------------- what one example may do to the others


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_an_example_that_is_not_finite_contributes_nothing_and_leaves_the_others_alone(kind, bad):
    for model, extra in (
        (Sequences(kind(3, 4, 2, bidirectional=True)), []),
        (Packed(kind(3, 4, bidirectional=True)), [torch.tensor([4, 2, 6, 3])]),
    ):
        x = torch.randn(4, 6, 3)
        expected = microbatch(model, [x[:3], *(t[:3] for t in extra)], 0.05)
        x[3, 1] = bad
        found = clipped(model, [x, *extra], 0.05)
        if bad == 3e38:  # finite or not, at most C
            assert norm({n: found[n].double() - expected[n] for n in expected}) <= 0.05 * (1 + 1e-5)
        else:
            assert norm({n: found[n].double() - expected[n] for n in expected}) <= 1e-5 * norm(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_example_changes_the_contribution_of_another(kind):
    for model, extra in (
        (Sequences(kind(3, 4, 2, bidirectional=True)), []),
        (Packed(kind(3, 4, bidirectional=True)), [torch.tensor([4, 2, 6, 3])]),
    ):
        model, x = model.double(), torch.randn(4, 6, 3).double()
        for j in (0, 2):
            other, lengths = x.clone(), [t.clone() for t in extra]
            other[j] = torch.randn(6, 3) * 30
            for t in lengths:
                t[j] = 5
            kept = [i for i in range(4) if i != j]
            first, second = (rows_of(model, inputs, kept, 0.05) for inputs in ([x, *extra], [other, *lengths]))
            assert norm({n: second[n] - first[n] for n in first}) <= 1e-12 * norm(first)


def rows_of(model, inputs, kept, clip):
    """The clipped sum of the whole batch, in which only the examples ``kept`` have a loss."""
    engine = BookKeeping(model, clip_norm=clip)
    mask = torch.zeros(len(inputs[0])).index_fill(0, torch.tensor(kept), 1.0)
    with engine.record(len(inputs[0])):
        values = losses(model, inputs, torch.arange(len(inputs[0]))) * mask
    found = engine.backward(values).grads
    engine.detach()
    return found


def test_one_example_moves_the_update_by_at_most_c():
    for kind in KINDS:
        found = clipped(Sequences(kind(3, 4, 2, bidirectional=True)), [torch.randn(1, 30, 3) * 100], 0.1)
        assert norm(found) <= 0.1


def test_a_batch_in_the_dimension_of_time_is_refused():
    """batch_first was forgotten: the layer runs over the examples."""
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4))
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(5)
    model(torch.randn(5, 6, 3))[0].sum().backward()
    assert "batch_first" in refused_hint(engine)
    engine.detach()


def refused_hint(engine):
    with pytest.raises(PrivacyViolation) as caught:
        engine.finish("sum")
    assert caught.value.code == "DP030"
    return caught.value.hint


def test_the_weights_of_the_layer_used_directly_are_refused():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0] + self.layer.bias_ih_l0[:4]

    engine = BookKeeping(Direct(), clip_norm=1.0)
    engine.begin(2)
    assert "bias_ih_l0" in refused("DP019", lambda: engine._model(torch.randn(2, 5, 3)))


def test_a_parameter_as_an_initial_state_is_refused():
    class Started(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.layer = nn.Linear(4, 2), nn.GRU(3, 4, batch_first=True)

        def forward(self, x):
            output, _ = self.layer(x, self.start.weight.view(1, 2, 4) if self.viewed else self.start.weight)
            return self.start(output)

    for viewed in (True, False):
        model = Started()
        model.viewed = viewed
        engine = BookKeeping(model, clip_norm=1.0)
        engine.begin(1)
        x = torch.randn(2, 5, 3) if viewed else torch.randn(5, 3)
        if not viewed:
            model.start = nn.Linear(4, 1)
            engine.begin(1)
        refused("DP019", lambda model=model, x=x: model(x))


# ---------------------------------------------------------------------- checkpointing, copies, exceptions


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.layer, self.above = nn.Linear(3, 3), kind(3, 4, 2, batch_first=True), nn.Linear(4, 2)
            self.saves = True

        def inner(self, x):
            return torch.tanh(self.layer(x)[0])

        def forward(self, x):
            h = self.below(x)
            h = checkpoint(self.inner, h, use_reentrant=reentrant) if self.saves else self.inner(h)
            return self.above(h)

    model = Checkpointed()
    x = torch.randn(4, 5, 3)
    found = clipped(model, [x], 0.05)
    model.saves = False
    expected = microbatch(model, [x], 0.05)
    assert norm({n: found[n].double() - expected[n] for n in expected}) <= 1e-5 * norm(expected)
    assert torch.overrides._len_torch_function_stack() == 0


def test_an_exception_inside_the_layer_leaves_everything_as_it_was():
    model = Sequences(nn.LSTM(3, 4, batch_first=True))
    engine = BookKeeping(model, clip_norm=1.0)
    with pytest.raises(RuntimeError), engine.record(2):
        model.layer(torch.randn(2, 5, 7))
    with pytest.raises(RuntimeError), engine.record(2):
        model(torch.randn(2, 5, 4))
    assert torch.overrides._len_torch_function_stack() == 0
    assert all(p.requires_grad for p in model.parameters())
    twin = copy.deepcopy(model)
    x = torch.randn(2, 5, 3)
    assert torch.equal(twin(x), model(x))


def test_an_output_changed_in_place_afterwards():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0].relu_()

    model, x = InPlace().double(), torch.randn(4, 5, 3).double()
    found, expected = clipped(model, [x], 0.05), microbatch(model, [x], 0.05)
    assert norm({n: found[n] - expected[n] for n in expected}) <= 1e-10 * norm(expected)


def test_autocast_computes_the_recurrence_in_the_type_of_the_weights():
    model, x = Sequences(nn.LSTM(3, 4, batch_first=True)), torch.randn(4, 5, 3)
    engine = BookKeeping(model, clip_norm=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(x)
        with engine.record(4):
            output = model(x)
        values = output.float().square().sum(1)
    torch.testing.assert_close(output.float(), plain.float(), rtol=0.05, atol=0.02)
    assert 0 < norm(engine.backward(values).grads) <= 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_pass_is_refused(kind):
    model = Sequences(kind(3, 4, batch_first=True))
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(2)
    loss = model(torch.randn(2, 5, 3)).sum()
    loss.backward(retain_graph=True)
    refused("DP031", loss.backward)


def test_the_self_test_accepts_recurrent_layers():
    for kind in KINDS:
        self_test(Sequences(kind(3, 4, 2, dropout=0.3)), [torch.zeros(2, 6, 3)])


# ---------------------------------------------------------------------- cells


class Unrolled(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.below, self.cell = nn.Linear(3, 3), cell

    def forward(self, x):
        x, state, outputs = self.below(x), None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


CELLS = [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("cell", CELLS, ids=str.split("lstm gru tanh relu"))
def test_a_cell_called_at_every_step(cell, steps, bias):
    model = Unrolled(cell(3, 4, bias=bias))
    assert BookKeeping(model, clip_norm=1.0).replayed == ()
    assert_equal_to_the_oracle(model, [torch.randn(5, steps, 3)])
    x = torch.randn(5, steps, 3)
    torch.testing.assert_close(in_a_private_batch(model.float(), [x]), model(x))


def test_a_partly_frozen_cell():
    model = Unrolled(nn.GRUCell(3, 4))
    model.cell.weight_ih.requires_grad_(False)
    model.cell.bias_hh.requires_grad_(False)
    assert_equal_to_the_oracle(model, [torch.randn(5, 4, 3)])
