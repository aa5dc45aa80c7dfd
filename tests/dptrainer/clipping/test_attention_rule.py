"""MultiheadAttention: per-example gradients from its projections, against a loop over single examples."""

import pytest
import torch
from clipping_oracle import assert_equal_to_the_oracle, clipped, losses, microbatch, norm, refused, step
from torch import nn
from torch.utils.checkpoint import checkpoint

from dptrainer.clipping import BookKeeping, self_test

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 4, 8, 2


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(9)


class Attends(nn.Module):
    """Layers below for each input, all outputs used; ``inputs`` is how many of query, key and value differ."""

    def __init__(self, inputs=1, batch_first=True, call=None, **options):
        super().__init__()
        self.to_query = nn.Linear(6, WIDTH)
        self.to_key = nn.Linear(6, options.get("kdim", WIDTH))
        self.to_value = nn.Linear(6, options.get("vdim", WIDTH))
        self.attend = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **options)
        for name, parameter in self.attend.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)
        self.inputs, self.first, self.call = inputs, batch_first, call or {}

    def masks(self, x, length):
        call = dict(self.call)
        if call.pop("padded", False):
            lengths = torch.tensor([2, 9, 3])[: len(x)] if len(x) > 1 else (x[:, 0, 0] > 0).long() + 2
            call["key_padding_mask"] = torch.arange(length) >= lengths.unsqueeze(1)
        if call.pop("causal", False):
            call["attn_mask"] = torch.triu(torch.ones(QUERIES, length, dtype=torch.bool), 1)
        if call.pop("each", False):
            call["attn_mask"] = x.sum((1, 2)).repeat_interleave(HEADS)[:, None, None] * torch.linspace(
                0, 1, length, dtype=x.dtype
            ).expand(QUERIES, length)
        return call

    def forward(self, x, y):
        def turn(t):
            return t if self.first else t.transpose(0, 1)

        query = turn(self.to_query(x))
        key = query if self.inputs == 1 else turn(self.to_key(y))
        value = key if self.inputs < 3 else turn(self.to_value(y))
        call = self.masks(x, QUERIES if self.inputs == 1 else KEYS)
        output, weights = self.attend(query, key, value, **call)
        found = [turn(output).flatten(1)]
        return torch.cat(found if weights is None else [*found, weights.flatten(1)], 1)


def batch():
    x = torch.randn(BATCH, QUERIES, 6)
    x[:, 0, 0] = torch.tensor([-1.0, 1.0, 2.0])
    return [x, torch.randn(BATCH, KEYS, 6)]


LAYERS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    {"kdim": 5, "vdim": 7},
]
CALLS = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"causal": True},
    {"causal": True, "need_weights": False},
    {"causal": True, "is_causal": True, "need_weights": False},
    {"each": True},
    {"each": True, "need_weights": False},
]


def agrees(model, inputs):
    assert BookKeeping(model, clip_norm=1.0).replayed == ()
    plain = model(*inputs)
    engine = BookKeeping(model, clip_norm=1.0)
    with engine.record(BATCH):
        recorded = model(*inputs)
    engine.detach()
    torch.testing.assert_close(recorded, plain)
    assert_equal_to_the_oracle(model, inputs, single=3e-6)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("inputs", [1, 2, 3])
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_self_and_cross_attention_of_every_kind_of_layer(options, inputs, batch_first):
    agrees(Attends(3 if "kdim" in options else inputs, batch_first, **options), batch())


@pytest.mark.parametrize("options", LAYERS[2:4], ids=str)
@pytest.mark.parametrize("call", CALLS[1:], ids=str)
def test_masks_and_weights(call, options):
    if "is_causal" in call:
        options = {}
    agrees(Attends(1, call=call, **options), batch())


@pytest.mark.parametrize("call", [{}, {"causal": True}, {"need_weights": False}], ids=str)
@pytest.mark.parametrize("inputs", [1, 2])
def test_padded_keys(inputs, call):
    """The mask of an example depends on it, so it is made from the input in the batch of one too."""
    model = Attends(inputs, call={"padded": True, **call})
    model.masks = lambda x, length: {
        **{k: v for k, v in call.items() if k != "causal"},
        "key_padding_mask": torch.arange(length) >= 2 + (x[:, 0, 0] > 0).long().unsqueeze(1),
        **({"attn_mask": torch.triu(torch.ones(QUERIES, length, dtype=torch.bool), 1)} if "causal" in call else {}),
    }
    agrees(model, batch())


def test_as_many_positions_as_examples():
    x = torch.randn(QUERIES, QUERIES, 6)
    assert_equal_to_the_oracle(Attends(1, False, {"causal": True}), [x, x], single=3e-6)


def test_the_weights_of_the_attention_alone_have_a_gradient():
    class Weights(Attends):
        def forward(self, x, y):
            return self.attend(self.to_query(x), self.to_key(y), self.to_value(y))[1]

    assert_equal_to_the_oracle(Weights(3), batch(), single=1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_is_drawn_once_and_as_the_layer_draws_it(need_weights):
    model = Attends(1, call={"need_weights": need_weights}, dropout=0.5).double()
    inputs = [t.double() for t in batch()]
    torch.manual_seed(2)
    plain = losses(model, inputs, torch.arange(BATCH)).sum()
    expected = torch.autograd.grad(plain, list(model.attend.parameters()))
    torch.manual_seed(2)
    found = clipped(model, inputs, 1e6)
    for (name, _), value in zip(model.attend.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found["attend." + name], value)


@pytest.mark.parametrize(
    "frozen", [["in_proj_weight"], ["in_proj_bias"], ["out_proj.weight"], ["bias_k", "out_proj.bias"]], ids=str
)
def test_a_partly_frozen_layer(frozen):
    model = Attends(2, add_bias_kv=True)
    model.to_query.requires_grad_(False)
    for name in frozen:
        model.attend.get_parameter(name).requires_grad_(False)
    agrees(model, batch())


def test_a_layer_used_twice_and_tied_projections_add_up():
    class Twice(Attends):
        def forward(self, x, y):
            query, key = self.to_query(x), self.to_key(y)
            once, _ = self.attend(query, key, key)
            again, _ = self.attend(once, once, once)
            return again

    agrees(Twice(), batch())


class Encoder(nn.Module):
    def __init__(self, layers=2, **options):
        super().__init__()
        self.below = nn.Linear(6, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 7, dropout=0.0, batch_first=True, **options)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.layers(self.below(x), mask=mask, is_causal=True)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_encoder_has_rules_for_everything(norm_first):
    model = Encoder(norm_first=norm_first)
    assert BookKeeping(model, clip_norm=1.0).replayed == ()
    assert_equal_to_the_oracle(model, [torch.randn(4, 5, 6)], single=1e-5)
    self_test(model.float(), [torch.randn(2, 5, 6)])


def test_a_decoder_with_cross_attention():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.below = nn.Linear(6, WIDTH)
            self.layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 7, dropout=0.0, batch_first=True)

        def forward(self, x, y):
            x, y = self.below(x), self.below(y)
            return self.layer(x, y)

    agrees(Decoder(), batch())


def test_an_attention_that_is_kept_in_eval_mode_takes_no_fast_path():
    class First(nn.Module):
        """The inputs need no gradient and the weights are frozen while the graph is built."""

        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(6, HEADS, dropout=0.5, batch_first=True).eval()

        def forward(self, x):
            return self.attend(x, x, x)[0]

    model, x = First().double(), torch.randn(4, 5, 6).double()
    found, expected = clipped(model, [x], 0.05), microbatch(model, [x], 0.05)
    assert norm({n: found[n] - expected[n] for n in expected}) <= 1e-10 * norm(expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    class Checkpointed(Attends):
        saves = True

        def forward(self, x, y):
            query = self.to_query(x)
            run = super().forward
            del query
            return checkpoint(run, x, y, use_reentrant=reentrant) if self.saves else run(x, y)

    model, inputs = Checkpointed(), batch()
    inputs[0].requires_grad_()  # reentrant checkpointing needs it
    found = clipped(model, inputs, 0.05)
    model.saves = False
    expected = microbatch(model, inputs, 0.05)
    assert norm({n: found[n].double() - expected[n] for n in expected}) <= 1e-5 * norm(expected)
    assert torch.overrides._len_torch_function_stack() == 0


# ---------------------------------------------------------------------- what one example may do to the others


def test_an_example_that_is_not_finite_contributes_nothing():
    model, inputs = Attends(2), batch()
    expected = microbatch(model, [t[:2] for t in inputs], 0.05)
    inputs[0][2, 1] = float("nan")
    found = clipped(model, inputs, 0.05)
    assert norm({n: found[n].double() - expected[n] for n in expected}) <= 1e-5 * norm(expected)


def test_an_example_without_any_key_left_contributes_nothing():
    model, inputs = Attends(1), batch()
    expected = microbatch(model, [t[:2] for t in inputs], 0.05)
    model.call = {"key_padding_mask": torch.tensor([[False] * QUERIES, [False] * QUERIES, [True] * QUERIES])}
    found = clipped(model, inputs, 0.05)
    assert norm({n: found[n].double() - expected[n] for n in expected}) <= 1e-5 * norm(expected)


def test_no_example_changes_the_contribution_of_another():
    model, inputs = Attends(2).double(), [t.double() for t in batch()]
    for j in range(BATCH):
        other = [t.clone() for t in inputs]
        for t in other:
            t[j] = torch.randn(t[j].shape) * 20
        kept = torch.ones(BATCH).index_fill(0, torch.tensor(j), 0.0)
        found = []
        for given in (inputs, other):
            engine = BookKeeping(model, clip_norm=0.05)
            with engine.record(BATCH):
                values = losses(model, given, torch.arange(BATCH)) * kept
            found.append(engine.backward(values).grads)
            engine.detach()
        assert norm({n: found[1][n] - found[0][n] for n in found[0]}) <= 1e-12 * norm(found[0])


def test_one_example_moves_the_update_by_at_most_c():
    for clip_norm in (0.01, 1.0):
        assert norm(clipped(Encoder(), [torch.randn(1, 9, 6) * 50], clip_norm)) <= clip_norm


def test_examples_in_the_dimension_of_positions_are_refused():
    """batch_first was forgotten, so the layer attends over the examples."""

    class Forgot(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(6, HEADS)

        def forward(self, x):
            return self.attend(x, x, x)[0]

    engine = BookKeeping(Forgot(), clip_norm=1.0)
    x = torch.randn(4, 5, 6)
    refused("DP030", lambda: step(engine, lambda t: engine._model(t).flatten(1), x, torch.zeros(4, dtype=torch.long)))


def test_positions_that_all_examples_share_are_not_examples():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(6, HEADS)

        def forward(self, x):
            table = torch.arange(x.shape[1] * 24.0).view(4, x.shape[1], 6)
            return x + self.attend(table, table, table)[0].mean(0)

    engine = BookKeeping(Positions(), clip_norm=1.0)
    engine.begin(5)
    refused("DP030", lambda: engine._model(torch.randn(5, 5, 6)))


@pytest.mark.parametrize("own", [True, False])
def test_a_parameter_as_an_input_is_refused(own):
    """Its gradient would be lost: the function that is replaced is not seen by the guard."""

    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.attend = nn.Embedding(6, 6), nn.MultiheadAttention(6, HEADS, batch_first=True)

        def forward(self, x):
            mask = self.attend.out_proj.weight if own else self.table.weight
            return self.attend(x, x, x, attn_mask=mask)[0] + self.table(torch.zeros(len(x), 6, dtype=torch.long))

    engine = BookKeeping(Biased(), clip_norm=1.0)
    engine.begin(4)
    refused("DP019", lambda: engine._model(torch.randn(4, 6, 6)))


def test_a_projection_that_was_replaced_is_replayed():
    class Low(nn.Linear):
        def __init__(self, given):
            super().__init__(given, given)
            self.extra = nn.Parameter(torch.zeros(1))

    model = Attends()
    model.attend.out_proj = Low(WIDTH)
    assert "attend" in BookKeeping(model, clip_norm=1.0).replayed
