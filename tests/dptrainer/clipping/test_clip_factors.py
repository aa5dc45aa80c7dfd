"""The clip factor, its range checks, and the guards around forward."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.clipping import BookKeeping, buffer_guard, clip_factors
from dptrainer.clipping.engine import LARGEST_CLIP_NORM, SMALLEST_CLIP_NORM, gradient_scale
from dptrainer.clipping.per_example import Dense, Lazy, Outer, TableRows, row_squares, summed

NORMS = st.floats(min_value=0.0, max_value=1e150, allow_subnormal=True)
CLIPS = st.floats(min_value=SMALLEST_CLIP_NORM, max_value=LARGEST_CLIP_NORM)


@given(NORMS, CLIPS)
@example(2.5577915639891756e36, 1e-6)
def test_a_factor_never_lets_a_norm_exceed_the_clip_even_in_float32(norm, clip):
    factor = clip_factors(torch.tensor([norm], dtype=torch.float64).square(), clip)
    assert 0.0 <= float(factor) <= 1.0
    assert float(factor) * norm <= clip
    assert float(factor.float()) * norm <= clip
    if norm <= clip * (1 - 2.0**-15):
        assert float(factor) == 1.0
    elif norm <= clip * 2.0**99:
        assert float(factor) * norm >= clip * (1 - 2.0**-14)
    elif norm >= clip * 2.0**101:
        assert float(factor) == 0.0


def test_a_norm_that_is_not_finite_gets_factor_zero_and_the_others_theirs():
    squares = torch.tensor([math.nan, math.inf, 4.0, 0.0, 1e300], dtype=torch.float64)
    factors = clip_factors(squares, 1.0)
    assert factors.tolist()[:2] == [0.0, 0.0]
    assert factors[2] == pytest.approx(0.5, rel=1e-4)
    assert factors[3] == 1.0
    assert clip_factors(torch.zeros(0, dtype=torch.float64), 1.0).shape == (0,)


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, 1e-9, 1e13, None, "1.0", True])
def test_a_clip_norm_out_of_range_is_refused_at_construction(bad):
    with pytest.raises(InvalidParameter, match="clip_norm") as caught:
        BookKeeping(nn.Linear(2, 2), clip_norm=bad)
    assert caught.value.code == "DP007"


@pytest.mark.parametrize("bad", [-1, 2.0, None, True])
def test_a_batch_size_is_a_count(bad):
    with pytest.raises(InvalidParameter, match="batch_size"):
        BookKeeping(nn.Linear(2, 2), clip_norm=1.0).begin(bad)


def test_reductions_and_scales_are_checked():
    assert gradient_scale("mean", 8, 1.0) == 8.0
    assert gradient_scale("sum", 8, 4.0) == 0.25
    for bad in (("average", 1.0), ("mean", 0.0), ("mean", math.nan), ("sum", math.inf)):
        with pytest.raises(InvalidParameter):
            gradient_scale(bad[0], 8, bad[1])


@pytest.mark.parametrize("width", [0, 1, 4095, 4096, 4097, 20000])
def test_row_squares_are_those_of_float64(width):
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(0)) * 7
    torch.testing.assert_close(row_squares(rows), rows.double().square().sum(1), rtol=2e-6, atol=0.0)


def test_small_terms_are_not_lost_in_a_long_row():
    rows = torch.full((1, 1 << 22), 1e-3)
    rows[0, 0] = 1e3
    expected = 1e6 + ((1 << 22) - 1) * float(torch.tensor(1e-3)) ** 2
    assert float(row_squares(rows)) == pytest.approx(expected, rel=2.0**-20)


def test_all_forms_of_per_example_gradients_say_the_same():
    torch.manual_seed(0)
    a, g, weights = torch.randn(5, 3).double(), torch.randn(5, 4).double(), torch.rand(5).double()
    dense = g.unsqueeze(2) * a.unsqueeze(1)
    lookups = (torch.arange(5).repeat_interleave(4), torch.arange(4).repeat(5))
    forms = [
        Dense(dense),
        Outer(g, a),
        Lazy(5, dense.shape[1:], lambda rows: dense[rows].clone()),
        TableRows.accumulate(5, dense.shape[1:], lookups, dense.reshape(-1, 3).clone()),
        summed([Dense(dense * 0.25), Outer(g, a * 0.75)]),
    ]
    for form in forms:
        assert form.shape == (4, 3)
        torch.testing.assert_close(form.squared_norms(), dense.square().sum((1, 2)))
        torch.testing.assert_close(form.dense(slice(1, 4)), dense[1:4])
        torch.testing.assert_close(form.weighted_sum(weights), torch.einsum("b,bij->ij", weights, dense))


# ---------------------------------------------------------------------- buffers and batch statistics


class RunningMean(nn.Module):
    """A home-made running statistic."""

    def __init__(self, replace):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.inner, self.replace = nn.Linear(4, 2), replace

    def forward(self, x):
        moved = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        if self.replace:
            self.mean = moved
        else:
            self.mean.copy_(moved)
        return self.inner(x - self.mean.clone())


@pytest.mark.parametrize("replace", [True, False])
def test_a_buffer_updated_in_forward_is_refused(replace):
    model = RunningMean(replace)
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(3)
    with pytest.raises(PrivacyViolation, match='"mean"') as caught:
        model(torch.randn(3, 4))
    assert caught.value.code == "DP013"
    assert all(p.requires_grad for p in model.parameters())
    assert torch.overrides._len_torch_function_stack() == 0
    with pytest.raises(PrivacyViolation, match='"mean"'), buffer_guard(model):
        model(torch.randn(3, 4))


def test_a_buffer_that_is_only_read_is_fine():
    model = nn.Sequential(nn.Linear(4, 2))
    model.register_buffer("table", torch.ones(2))
    with buffer_guard(model):
        model(torch.randn(3, 4)) * model.table


def test_batch_norm_is_refused_at_every_forward_in_train_mode_and_allowed_frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).requires_grad_(False), nn.Linear(4, 2))
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(3)
    with pytest.raises(PrivacyViolation, match='"1"') as caught:
        model(torch.randn(3, 4))
    assert caught.value.code == "DP010"
    assert float(model[1].running_mean.abs().sum()) == 0.0
    model[1].eval()
    engine.begin(3)
    model(torch.randn(3, 4)).sum().backward()
    assert len(engine.finish("sum").grads) == 4


def test_single_elements_of_a_table_are_added_up_within_a_unit():
    """An EmbeddingBag of mode "max" gives elements, not rows; the owner of two examples gets the sum of both."""
    torch.manual_seed(0)
    entries = (torch.arange(4).repeat_interleave(3), torch.tensor([0, 7, 14] * 4), torch.randn(12, 1))
    rows = TableRows(4, torch.Size((5, 3)), entries)
    expected = rows.dense(slice(0, 4)).reshape(2, 2, 5, 3).sum(1)
    owned = rows.owned_by(torch.tensor([0, 0, 1, 1]), 2)
    torch.testing.assert_close(owned.dense(slice(0, 2)), expected)
    torch.testing.assert_close(owned.squared_norms(), expected.double().square().sum((1, 2)))
