"""Cases in which released libraries let one example move the update by more than C, or lost a gradient in silence."""

import pytest
import torch
from clipping_oracle import assert_equal_to_the_oracle, clipped, losses, microbatch, norm, refused, small, step
from torch import nn
from torch.nn import functional as F

from dptrainer.clipping import BookKeeping, Grouping


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


# ---------------------------------------------------------------------- at most C, as a comparison of floats


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


AT_MOST_C = {
    "linear": (small, lambda: torch.randn(1, 6)),
    "sequence": (small, lambda: torch.randn(1, 9, 6)),
    "one index 50 times": (lambda: nn.Embedding(7, 4), lambda: torch.full((1, 50), 2)),
    "one index 50 times in a bag": (lambda: nn.EmbeddingBag(7, 4, mode="sum"), lambda: torch.full((1, 50), 2)),
    "tied": (Tied, lambda: torch.randint(0, 7, (1, 9))),
    "called twice": (Twice, lambda: torch.randn(1, 6)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="circular"), lambda: torch.randn(1, 2, 6, 6)),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), lambda: torch.randn(1, 2, 6, 6)),
    "replicate": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="replicate"), lambda: torch.randn(1, 2, 6, 6)),
    "norms": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), lambda: torch.randn(1, 2, 6, 6)),
}


@pytest.mark.parametrize("clip_norm", [1e-3, 0.1, 1.0, 7.3])
@pytest.mark.parametrize("case", AT_MOST_C)
def test_one_example_moves_the_update_by_at_most_c_exactly(case, clip_norm):
    build, data = AT_MOST_C[case]
    for _ in range(5):
        model, x = build(), data()
        engine = BookKeeping(model, clip_norm=clip_norm)
        with engine.record(1):
            values = 100.0 * losses(model, [x], torch.zeros(1))
        result = engine.backward(values)
        update = torch.cat([g.flatten() for g in result.grads.values()])
        assert float(update.norm()) <= clip_norm
        assert float(update.double().norm()) <= clip_norm
        assert float(update.norm()) > 0.9999 * clip_norm
        assert result.sensitivity == clip_norm


def test_cancelling_positions_do_not_lift_an_example_above_c():
    """Terms of 1e4 that cancel to almost nothing: norm and sum must come from the same rounded numbers."""
    model = nn.Linear(32, 32)
    a = torch.randn(1, 64, 32)
    x = torch.cat([a, a + 1e-4 * torch.randn_like(a)], 1) * 100
    signs = torch.cat([torch.ones(64), -torch.ones(64)]).view(1, 128, 1)
    engine = BookKeeping(model, clip_norm=1e-3)
    with engine.record(1):
        values = (model(x) * signs).sum((1, 2)) * 100
    update = torch.cat([g.flatten() for g in engine.backward(values).grads.values()])
    assert float(update.norm()) <= 1e-3


# ---------------------------------------------------------------------- parameters used in several places


def test_tied_weights_add_up_with_their_cross_terms():
    assert_equal_to_the_oracle(Tied(), [torch.randint(0, 7, (4, 9))])


def test_a_module_called_twice_adds_up_with_its_cross_terms():
    assert_equal_to_the_oracle(Twice(), [torch.randn(5, 6)])


def test_one_module_under_two_names_is_one_module():
    shared = nn.Linear(5, 5)
    model = nn.Sequential(nn.Linear(6, 5), shared, nn.Tanh(), shared)
    assert_equal_to_the_oracle(model, [torch.randn(4, 6)])


def test_tied_parameters_appear_once_and_in_model_order():
    found = clipped(Tied(), [torch.randint(0, 7, (3, 4))], 1.0)
    assert list(found) == ["embed.weight"]
    model = small()
    assert list(clipped(model, [torch.randn(3, 6)], 1.0)) == [n for n, _ in model.named_parameters()]


class Direct(nn.Module):
    """Weight tying by hand: the embedding's weight is used outside the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(torch.tanh(self.mix(self.embed(x))), self.embed.weight)


def test_a_weight_used_outside_its_layer_is_named():
    model, x = Direct(), torch.randint(0, 7, (4, 9))
    assert "embed.weight" in refused("DP019", lambda: clipped(model, [x], 1.0))
    assert all(p.requires_grad for p in model.parameters())


def test_a_weight_used_outside_its_layer_is_right_when_the_module_is_replayed():
    model = Direct()
    assert_equal_to_the_oracle(model, [torch.randint(0, 7, (4, 9))], replay=[model])


@pytest.mark.parametrize(
    "use",
    [
        lambda h, w: h @ w.T[:5],
        lambda h, w: h + w.sum(),
        lambda h, w: h * torch.stack([w, w])[0, 0, 0],
        lambda h, w: F.linear(input=h, weight=w[:, :5]),
        lambda h, w: torch.einsum("bi,i->b", h, w[0, :5]).unsqueeze(1),
    ],
)
def test_every_way_to_use_a_weight_directly_is_seen(use):
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 5)

        def forward(self, x):
            return use(self.inner(x), self.inner.weight)

    refused("DP019", lambda: clipped(Uses(), [torch.randn(5, 6)], 1.0))


def test_reading_a_weight_without_its_gradient_is_allowed():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 5)

        def forward(self, x):
            h = self.inner(x.to(self.inner.weight.dtype)) * self.inner.weight.shape[0]
            with torch.no_grad():
                size = self.inner.weight.norm()
            return h + size + self.inner.weight.detach().sum() + self.inner.weight.numel()

    assert_equal_to_the_oracle(Reads(), [torch.randn(5, 6)])


# ---------------------------------------------------------------------- examples that are not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("shape", [(6,), (4, 6)])
def test_an_example_without_a_finite_norm_contributes_exactly_nothing(bad, shape):
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    x = torch.randn(4, *shape)
    index = torch.tensor([0, 1, 3])
    engine = BookKeeping(model, clip_norm=0.5)

    def run(rows, scale):
        with engine.record(len(rows)):
            values = losses(model, [x[rows]], rows) * scale
        return engine.backward(values).grads

    expected = run(index, torch.ones(3))
    broken = torch.ones(4)
    broken[2] = bad
    found = run(torch.arange(4), broken)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-8)
    alone = run(torch.tensor([2]), torch.tensor([bad]))
    assert all(bool((g == 0).all()) for g in alone.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_input_cell_leaves_convolution_and_embedding_untouched(bad):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.embed, self.out = nn.Conv2d(1, 3, 3), nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, image, word):
            return self.out(torch.tanh(self.conv(image)).mean((2, 3)) + self.embed(word).sum(1))

    model = Two()
    image, word = torch.randn(4, 1, 6, 6), torch.randint(0, 5, (4, 3))
    expected = microbatch(model, [image[:3], word[:3]], 0.3)
    image[3, 0, 2, 2] = bad
    found = clipped(model, [image, word], 0.3)
    assert norm({n: found[n].double() - expected[n] for n in expected}) <= 1e-6 * norm(expected)


# ---------------------------------------------------------------------- parameters that the forward pass changes


class Writing(nn.Module):
    """A table of words, and what a forward pass does to it."""

    def __init__(self, write):
        super().__init__()
        self.table, self.out, self.write = nn.Parameter(torch.randn(9, 4) * 3.0), nn.Linear(4, 2), write

    def forward(self, word):
        with torch.no_grad():
            self.write(self, word)
        return self.out(torch.ones(len(word), 1) * self.out.weight.new_ones(4))


@pytest.mark.parametrize(
    "write",
    [
        lambda model, word: F.embedding(word, model.table, max_norm=1.0),  # rewrites the rows of the words that occur
        lambda model, word: model.out.bias.add_(word.float().mean()),
        lambda model, word: setattr(model, "table", nn.Parameter(model.table + word.sum())),
    ],
    ids=["max_norm", "in place", "replaced"],
)
def test_a_trained_parameter_that_forward_changes_is_refused_before_anything_is_released(write):
    model = Writing(write)
    engine = BookKeeping(model, clip_norm=1.0)

    def forward():
        with engine.record(3):
            model(torch.randint(0, 9, (3, 5)))

    assert "changed during forward" in refused("DP031", forward)


# ---------------------------------------------------------------------- empty batches, unused and frozen parameters


def test_an_empty_batch_gives_a_zero_for_every_parameter_with_or_without_a_pass():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(0)
    without = engine.finish()
    engine.begin(0)
    F.cross_entropy(model(torch.zeros(0, 1, 6, 6)), torch.zeros(0, dtype=torch.long)).backward()
    passed = engine.finish("mean")
    for result in (without, passed):
        assert {n: g.shape for n, g in result.grads.items()} == {n: p.shape for n, p in model.named_parameters()}
        assert all(bool((g == 0).all()) for g in result.grads.values())
        assert result.sensitivity == 1.0


def test_a_parameter_without_a_gradient_gets_a_zero_and_stays():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    model = Branch()
    assert_equal_to_the_oracle(model, [torch.randn(4, 6)])
    model = model.float()
    found = clipped(model, [torch.randn(4, 6)], 1.0)
    assert bool((found["unused.weight"] == 0).all())
    assert found["unused.weight"].dtype == torch.float32


def test_freezing_and_unfreezing_after_set_up_is_seen_at_the_next_step():
    model, x, y = small(), torch.randn(4, 6), torch.randint(0, 3, (4,))
    engine = BookKeeping(model, clip_norm=0.1)
    assert len(step(engine, model, x, y).grads) == 4
    model[0].requires_grad_(False)
    found = step(engine, model, x, y)
    assert list(found.grads) == ["2.weight", "2.bias"]
    assert norm(found.grads) > 0.1  # the norm no longer counts the frozen layer, so the rest is clipped less
    assert not model[0].weight.requires_grad
    model[0].requires_grad_(True)
    assert len(step(engine, model, x, y).grads) == 4


def test_a_model_without_trainable_parameters_is_refused():
    refused("DP018", lambda: BookKeeping(small().requires_grad_(False), clip_norm=1.0))


# ---------------------------------------------------------------------- what a row is


class Positions(nn.Module):
    def __init__(self, batched):
        super().__init__()
        self.word, self.place, self.out = nn.Embedding(7, 4), nn.Embedding(9, 4), nn.Linear(4, 2)
        self.batched = batched

    def forward(self, x):
        place = torch.arange(x.shape[1])
        return self.out(torch.tanh(self.word(x) + self.place(place.unsqueeze(0) if self.batched else place)))


def test_broadcast_position_ids_are_summed_per_example():
    assert_equal_to_the_oracle(Positions(True), [torch.randint(0, 7, (4, 6))])
    assert_equal_to_the_oracle(Positions(True), [torch.randint(0, 7, (6, 6))])


@pytest.mark.parametrize("length", [6, 4])
def test_positions_are_never_taken_for_examples_even_if_there_are_as_many(length):
    model = Positions(False)
    refused("DP030", lambda: clipped(model, [torch.randint(0, 7, (4, length))], 1.0))
    assert_equal_to_the_oracle(model, [torch.randint(0, 7, (4, length))], replay=[model])


def test_layers_after_broadcast_positions_see_examples():
    class Projected(Positions):
        def __init__(self):
            super().__init__(True)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            place = self.place(torch.arange(x.shape[1]).unsqueeze(0))
            return self.out(torch.tanh(self.word(x) + self.second(torch.tanh(self.first(place)))))

    assert_equal_to_the_oracle(Projected(), [torch.randint(0, 7, (4, 6))])


def test_an_initial_state_of_zeros_has_examples_as_rows():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.state = nn.Linear(6, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = torch.zeros(x.shape[0], 3, dtype=x.dtype)
            for t in range(x.shape[1]):
                h = torch.tanh(self.inner(x[:, t]) + self.state(h))
            return h

    assert_equal_to_the_oracle(Cell(), [torch.randn(4, 5, 6)])


def test_tokens_as_rows_are_refused():
    class Flattens(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x):
            return self.inner(x.flatten(0, 1)).view(*x.shape[:2], 3)

    message = refused("DP030", lambda: clipped(Flattens(), [torch.randn(4, 5, 6)], 1.0))
    assert "number of rows" in message
    assert "20" not in message, "the size of a drawn batch is private"


def test_a_batch_of_another_size_than_declared_is_refused():
    model = small()
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(5)
    model(torch.randn(4, 6)).sum().backward()
    refused("DP030", engine.finish)


def test_layers_without_a_batch_dimension_are_refused():
    engine = BookKeeping(nn.Conv2d(3, 3, 3), clip_norm=1.0)
    engine.begin(3)
    engine._model(torch.randn(3, 6, 6)).sum().backward()
    refused("DP030", engine.finish)


def test_a_norm_over_the_examples_is_refused():
    model = nn.Sequential(nn.Linear(6, 3), nn.LayerNorm((4, 3)))
    refused("DP010", lambda: clipped(model, [torch.randn(4, 6)], 1.0))


def test_a_loss_that_is_not_one_value_per_example_is_refused():
    model = small()
    engine = BookKeeping(model, clip_norm=1.0)
    with engine.record(4):
        value = model(torch.randn(4, 6)).mean()
    refused("DP030", lambda: engine.backward(value))


@pytest.mark.parametrize(("grad", "activation", "clip_norm"), [(2.6e-23, 1.8e19, 0.01), (1e-30, 1e30, 1e-3)])
def test_a_norm_is_no_smaller_where_one_factor_underflows_and_the_other_is_huge(grad, activation, clip_norm):
    """Float32 squares of 2.6e-23 are zero, and 1.8e19 times that is not."""
    model = nn.Linear(1, 1000, bias=False)
    engine = BookKeeping(model, clip_norm=clip_norm)
    engine.begin(2)
    (model(torch.full((2, 1), activation)) * grad).sum().backward()
    total = engine.finish("sum").grads["weight"].double()
    assert float(total.norm()) <= 2 * clip_norm


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("size", [6e26, 1e28, 1e37, 3e38])
def test_a_weighted_gradient_that_underflows_does_not_loosen_the_bound(size, views):
    """Beside an activation of 1e37 a clipped gradient is 1e-43, of which float32 keeps two digits."""
    model = nn.Linear(400, 300, bias=False)
    for share in (0.5, 0.7, 0.9):
        x = torch.zeros(views, 400)
        x[:, 0] = size * share
        engine = BookKeeping(model, clip_norm=1e-6)
        engine.begin(views, grouping=Grouping.views(1, views))
        (model(x) * (1e-6 / size)).sum().backward()
        assert float(engine.finish("sum").grads["weight"].double().norm()) <= 1e-6


@pytest.mark.parametrize("share", [1.0, 1.1, 1.3, 1.7])
def test_a_factor_that_float32_rounds_coarsely_after_unscaling_counts_as_zero(share):
    model = nn.Linear(30, 30, bias=False)
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(1)
    (model(torch.full((1, 30), 2.0**85)) * (share * 2.0**49)).sum().backward()
    assert float(engine.finish("sum", loss_scale=2.0**44).grads["weight"].double().norm()) <= 1.0


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e6])
def test_attention_rounds_no_example_by_the_number_of_others(scale):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3))
    for parameter in layer.self_attn.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(9, 5, 8)
    x[:3] *= scale

    def alone(batch):
        engine = BookKeeping(model, clip_norm=1.0)
        engine.begin(len(batch))
        (model(batch)[:1] * torch.tensor([1.0, -2.0, 0.5])).sum().backward()  # the first example's gradient alone
        return engine.finish("sum").grads

    first, whole = alone(x[:3]), alone(x)
    for name in first:
        torch.testing.assert_close(first[name], whole[name], rtol=1e-5, atol=1e-6)
