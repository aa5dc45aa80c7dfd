"""Rows that count as one: against a loop over units, for every kind of layer and for rows that cancel each other."""

import pytest
import torch
from clipping_oracle import losses, norm
from torch import nn

from dpbudget.errors import InvalidParameter
from dptrainer.clipping import BookKeeping, Grouping
from dptrainer.clipping.engine import SHRINK

EVEN, UNEVEN, WITH_NONE = Grouping.views(4, 3), Grouping((1, 5, 2, 4), 5), Grouping((0, 6, 0, 3, 3), 6)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def floats(*shape):
    return torch.randn(12, *shape, generator=torch.Generator().manual_seed(3))


CASES = {
    "wide": (lambda: nn.Sequential(nn.Linear(4, 60), nn.Tanh(), nn.Linear(60, 90), nn.Linear(90, 2)), floats(4)),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), floats(4)),
    "sequence": (lambda: nn.Linear(4, 3), floats(7, 4)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten()), floats(2, 6, 6)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Flatten(), nn.Linear(20, 2)),
                  torch.arange(60).remainder(9).view(12, 5)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), floats(4)),
    "replayed": (Recurrent, floats(5, 4)),
    "tied": (Tied, floats(4)),
}  # fmt: skip


def oracle(model, inputs, grouping, clip_norm):
    """One unit at a time: its rows' losses summed, divided, differentiated, clipped."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    start = 0
    for count in grouping.counts:
        rows = slice(start, start + count)
        start += count
        if not count:
            continue
        loss = losses(model, [inputs[rows]], torch.arange(12)[rows]).sum() / grouping.divisor
        grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        factor = min(1.0, clip_norm * SHRINK / norm(grads))
        for name, grad in grads.items():
            total[name] += factor * grad
    return total


def found(model, inputs, grouping, clip_norm, mean=False):
    engine = BookKeeping(model, clip_norm=clip_norm)
    engine.begin(12, grouping=grouping)
    values = losses(model, [inputs], torch.arange(12))
    (values.mean() if mean else values.sum()).backward()
    result = engine.finish("mean" if mean else "sum")
    engine.detach()
    return result.grads


@pytest.mark.parametrize("grouping", [EVEN, UNEVEN, WITH_NONE], ids=["even", "uneven", "with none"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mean", [False, True])
def test_the_gradients_of_a_unit_are_added_before_the_norm(case, grouping, mean):
    build, inputs = CASES[case]
    torch.manual_seed(0)
    model = build().double()
    given = inputs.double() if inputs.is_floating_point() else inputs
    for clip_norm in (0.05, 1e6):
        expected, answer = oracle(model, given, grouping, clip_norm), found(model, given, grouping, clip_norm, mean)
        assert norm(expected) > 1e-4
        for name in expected:
            torch.testing.assert_close(answer[name], expected[name], rtol=1e-8, atol=1e-10)


def test_a_unit_is_clipped_once_however_many_rows_it_has():
    model = nn.Linear(4, 3)
    huge = floats(4) * 1e4
    for grouping in (Grouping((12,), 1), Grouping((12,), 12)):
        assert 0.49 < norm(found(model, huge, grouping, 0.5)) <= 0.5
    assert norm(found(model, huge, Grouping((1,) * 12), 0.5)) > 0.5


def test_rows_that_cancel_do_not_lift_a_unit_above_the_bound():
    """Two huge rows of opposite sign and a small one: what is summed is what the norm was taken of."""
    for layer, shape in ((nn.Linear(64, 32, bias=False), (12, 64)), (nn.Conv1d(8, 16, 3, bias=False), (12, 8, 9))):
        torch.manual_seed(0)
        x = torch.randn(shape)
        x[1:] = x[0]
        signs = torch.tensor([1e6, -1e6, 1.0] + [0.0] * 9)
        engine = BookKeeping(layer, clip_norm=1e-3)
        engine.begin(12, grouping=Grouping((3, 9)))
        out = layer(x).flatten(1)
        (out * torch.randn(out.shape[1]) * signs.unsqueeze(1)).sum().backward()
        assert norm(engine.finish("sum").grads) <= 1e-3
        engine.detach()


@pytest.mark.parametrize("cancelling", [1.0, 30.0, 1e3, 1e6, 1e12])
def test_norms_by_gram_matrices_are_never_too_small_and_exact_without_extreme_cancellation(cancelling):
    from dptrainer.clipping.grouping import SumOfOuters

    torch.manual_seed(0)
    grads, activations = torch.randn(5, 3, 40), torch.randn(5, 3, 50)
    grads[:, 0] *= cancelling
    grads[:, 1], activations[:, 1] = -grads[:, 0], activations[:, 0]
    grads[4, 2], activations[3, 0, 0] = float("inf"), float("nan")
    form = SumOfOuters(grads, activations, torch.full((5,), 3.0, dtype=torch.float64))
    exact = torch.bmm(grads.double().transpose(1, 2), activations.double()).flatten(1).square().sum(1)
    found = form.squared_norms()
    assert not found[3:].isfinite().any()
    assert (found[:3] >= exact[:3] * (1 - 1e-9)).all()
    if cancelling <= 10:
        torch.testing.assert_close(found[:3], exact[:3])
    weights = torch.where(found.isfinite(), 1 / found.sqrt(), torch.zeros_like(found))
    for unit in range(5):
        alone = torch.zeros_like(weights)
        alone[unit] = weights[unit] * (1 - 2.0**-16)
        assert float(form.weighted_sum(alone).double().norm()) <= 1.0


@pytest.mark.parametrize("more", [2, 5, 30])
def test_a_user_with_many_rows_does_not_move_the_norms_of_others(more):
    """Rows of the others nearly cancel, so that their norms are taken as larger, each by its own count."""
    torch.manual_seed(0)
    model, public = nn.Linear(256, 256, bias=False), 30
    base, direction = (v / v.norm() for v in torch.randn(2, 256))
    x, g = base.repeat(80, 1), torch.stack([65 * direction, -63 * direction] * 40)

    def total(rows, grads, counts):
        engine = BookKeeping(model, clip_norm=2.0 / public)
        engine.begin(len(rows), grouping=Grouping(counts, public))
        (model(rows) * grads).sum().backward()
        return engine.finish("sum").grads["weight"]

    extra = torch.randn(2, more, 256)
    with_user = total(torch.cat([x, extra[0]]), torch.cat([g, extra[1]]), (2,) * 40 + (more,))
    assert float((with_user - total(x, g, (2,) * 40)).norm()) <= 2.0 / public


def test_one_broken_row_drops_its_whole_unit_and_no_other():
    model = nn.Linear(4, 3)
    broken = floats(4)
    broken[4] = float("nan")
    answer = found(model, broken, EVEN, 1e6)
    others = torch.cat([broken[:3], broken[6:]])
    engine = BookKeeping(model, clip_norm=1e6)
    engine.begin(9, grouping=Grouping.views(3, 3))
    losses(model, [others], torch.tensor([0, 1, 2, 6, 7, 8, 9, 10, 11])).sum().backward()
    expected = engine.finish("sum").grads
    for name in expected:
        torch.testing.assert_close(answer[name], expected[name])


def test_large_layers_are_added_up_a_unit_at_a_time():
    torch.manual_seed(0)
    model = nn.Linear(3000, 800)  # 12 units would be 29 million elements
    x = torch.randn(12, 5, 3000)
    weights = torch.randn(800)
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(12, grouping=UNEVEN)
    (model(x) * weights).sum().backward()
    answer = engine.finish("sum").grads
    expected, start = torch.zeros(800, 3000), 0
    for count in UNEVEN.counts:
        rows = x[start : start + count].sum((0, 1)) / 5
        bias = weights * 5 * count / 5
        start += count
        grad = torch.outer(weights, rows)
        expected += grad * min(1.0, SHRINK / float((grad.square().sum() + bias.square().sum()).sqrt()))
    torch.testing.assert_close(answer["weight"], expected, rtol=1e-3, atol=1e-6)


def test_a_grouping_that_does_not_fit_the_batch_is_refused_without_naming_sizes():
    engine = BookKeeping(nn.Linear(2, 2), clip_norm=1.0)
    with pytest.raises(InvalidParameter, match="DP009") as caught:
        engine.begin(7, grouping=EVEN)
    assert not any(character.isdigit() for character in caught.value.message)
    with pytest.raises(InvalidParameter, match="DP009"):
        Grouping((1, -1))
    with pytest.raises(InvalidParameter, match="DP009"):
        Grouping((1,), 0)
