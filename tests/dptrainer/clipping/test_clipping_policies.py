"""Flat, normalised, per layer, quantile: the sums against a loop over single examples, and the bound of each."""

import math

import pytest
import torch
from clipping_oracle import losses, norm
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.clipping import (
    BookKeeping,
    Clipping,
    FlatClipping,
    Grouping,
    NormalisedClipping,
    PerLayerClipping,
    QuantileClipping,
    add_clipped,
)
from dptrainer.clipping.engine import SHRINK

INPUTS = (torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64),)


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def run(net, clip_norm, clipping, inputs=INPUTS, index=None):
    engine = BookKeeping(net, clip_norm=clip_norm, clipping=clipping)
    with engine.record(len(inputs[0])):
        values = losses(net, inputs, torch.arange(len(inputs[0])) if index is None else index)
    found = engine.backward(values)
    engine.detach()
    return found


def single(net, inputs=INPUTS):
    """One dictionary of plain gradients an example."""
    parameters = dict(net.named_parameters())
    rows = []
    for i in range(len(inputs[0])):
        loss = losses(net, [t[i : i + 1] for t in inputs], torch.tensor([i])).sum()
        rows.append(dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)))
    return rows


def summed(rows):
    return {name: sum(row[name] for row in rows) for name in rows[0]}


def assert_close(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


def test_normalised_clipping_is_c_over_norm_plus_gamma():
    net = model()
    found = run(net, 0.3, NormalisedClipping(gamma=0.05))
    rows = [{n: g * 0.3 * SHRINK / (norm(row) + 0.05) for n, g in row.items()} for row in single(net)]
    assert_close(found.grads, summed(rows))
    assert found.sensitivity == 0.3


@given(st.floats(0, 1e30), st.floats(1e-6, 1e12), st.floats(1e-6, 1e6))
def test_a_normalised_contribution_stays_below_c_in_float32_too(size, clip, gamma):
    squared = {"w": torch.tensor([size], dtype=torch.float64).square()}
    factor = NormalisedClipping(gamma).factors(squared, clip)["w"]
    assert float(factor) * size <= clip
    assert float(factor.float()) * size <= clip


def test_per_layer_clipping_clips_each_layer_to_its_own_threshold():
    net = model()
    found = run(net, 0.5, PerLayerClipping({"0": 0.3, "2": 0.4}))
    rows = []
    for row in single(net):
        scaled = {}
        for layer, threshold in (("0", 0.3), ("2", 0.4)):
            part = {n: g for n, g in row.items() if n.startswith(layer)}
            scaled |= {n: g * min(1.0, threshold * SHRINK / norm(part)) for n, g in part.items()}
        rows.append(scaled)
    assert_close(found.grads, summed(rows))
    assert found.sensitivity == 0.5


def test_equal_thresholds_add_up_to_the_plan_and_no_example_exceeds_it():
    for count in range(1, 40):
        net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(count)])
        for clip_norm in (1e-5, 1 / 3, 1.0, 0.1, 7e11):
            policy = PerLayerClipping.equal(net, clip_norm)
            policy.check(dict(net.named_parameters()), clip_norm)
            assert math.sqrt(sum(v**2 for v in policy.thresholds.values())) == pytest.approx(clip_norm)
    net = model()
    one = run(net, 0.01, PerLayerClipping.equal(net, 0.01), (INPUTS[0][:1],))
    assert 0.0099 < norm(one.grads) <= 0.01


def test_thresholds_above_the_plan_and_parameters_without_one_are_refused():
    net = model()
    with pytest.raises(InvalidParameter, match="above the plan") as caught:
        BookKeeping(net, clip_norm=0.5, clipping=PerLayerClipping({"0": 0.3, "2": 0.4000001}))
    assert caught.value.code == "DP007"
    with pytest.raises(PrivacyViolation, match=r'"2\.weight"') as missing:
        BookKeeping(net, clip_norm=0.5, clipping=PerLayerClipping({"0": 0.3}))
    assert missing.value.code == "DP019"
    BookKeeping(net, clip_norm=0.5, clipping=PerLayerClipping({"0.weight": 0.3, "": 0.4})).detach()


@pytest.mark.parametrize(
    "policy",
    [NormalisedClipping(), PerLayerClipping({"": 0.3}), QuantileClipping(), PerLayerClipping({"0": 0.3, "2": 0.4})],
)
def test_a_broken_example_contributes_nothing_and_spoils_nobody(policy):
    net = model()
    broken = INPUTS[0].clone()
    broken[4, 0] = math.inf
    others = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    with_it = run(net, 0.5, policy, (broken,))
    without = run(net, 0.5, policy, (broken[others],), others)
    assert_close(with_it.grads, without.grads)


def test_the_vector_of_gradient_and_bit_of_one_example_has_norm_at_most_c():
    net = model()
    for scale in (1e-3, 1.0, 1e3):
        for initial in (1e-3, 0.7, 50.0):
            policy = QuantileClipping(share=0.3, initial=initial)
            found = run(net, 0.7, policy, (INPUTS[0][:1] * scale,))
            bit = next(iter(found.statistics.values()))
            both = math.hypot(norm(found.grads), float(bit))
            assert both <= 0.7
            assert abs(float(bit)) == pytest.approx(0.3 * 0.7)
            in_its_unit = {n: g * found.unit for n, g in found.grads.items()}
            own = norm(single(net, (INPUTS[0][:1] * scale,))[0])
            threshold = min(max(initial, 0.7 * 2**-16), 0.7 * 2**16)
            assert norm(in_its_unit) == pytest.approx(min(own, threshold), rel=1e-4)
            assert (float(bit) > 0) == (own <= threshold)


def test_the_bits_of_two_physical_batches_add_up_and_an_empty_one_adds_none():
    net, policy = model(), QuantileClipping(initial=0.2)
    engine = BookKeeping(net, clip_norm=1.0, clipping=policy)
    engine.begin(0)
    empty = engine.finish()
    engine.detach()
    assert float(next(iter(empty.statistics.values()))) == 0.0
    first, second = run(net, 1.0, policy, (INPUTS[0][:4],)), run(net, 1.0, policy, (INPUTS[0][4:],))
    whole = add_clipped(add_clipped(first, second), empty)
    below = sum(norm(row) <= 0.2 for rows in ((INPUTS[0][:4],), (INPUTS[0][4:],)) for row in single(net, rows))
    assert float(next(iter(whole.statistics.values()))) == pytest.approx((below - 4.5) * 2 * 0.1)
    with pytest.raises(PrivacyViolation, match="DP031"):
        add_clipped(first, run(net, 1.0, QuantileClipping(initial=0.3), (INPUTS[0][4:],)))


def test_a_policy_that_promises_too_much_is_held_to_the_plan_by_the_engine():
    class Greedy(Clipping):
        def factors(self, squared, clip_norm):
            return {group: 7.0 * factor for group, factor in super().factors(squared, clip_norm).items()}

    net = model()
    single_example = run(net, 0.01, Greedy(), (INPUTS[0][:1],))
    assert 0.0099 < norm(single_example.grads) <= 0.01


POLICIES = {
    "flat": FlatClipping(),
    "normalised": NormalisedClipping(1e-6),
    "per layer": PerLayerClipping({"0": 0.3, "2": 0.4}),
    "quantile below": QuantileClipping(initial=1e-3),
    "quantile above": QuantileClipping(initial=1e3, share=0.9),
}
GROUPINGS = {"rows": Grouping((1,) * 12), "views": Grouping.views(4, 3), "users": Grouping((1, 6, 2, 3), 6)}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("kind", GROUPINGS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_leaving_one_unit_out_moves_all_that_is_released_by_at_most_c(name, kind, scale):
    """In float32, over gradients and statistics together, whatever the size of the gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, target, units = torch.randn(12, 6) * scale, torch.randn(12, 3) * scale, GROUPINGS[kind]

    def released(kept):
        rows = [row for unit in kept for row in range(12)[units.ranges()[unit]]]
        engine = BookKeeping(net, clip_norm=0.5, clipping=POLICIES[name])
        engine.begin(len(rows), grouping=Grouping(tuple(units.counts[unit] for unit in kept), units.divisor))
        ((net(x[rows]) - target[rows]) ** 2).sum().backward()
        found = engine.finish("sum")
        engine.detach()
        return torch.cat([v.double().flatten() for v in (*found.grads.values(), *found.statistics.values())])

    everyone = list(range(units.units))
    whole = released(everyone)
    moves = [float((whole - released([u for u in everyone if u != left])).norm()) for left in everyone]
    # The difference of two sums has their rounding; what one unit adds has not.
    assert 0.2 < max(moves) <= 0.5 + 1e-6 * units.units


@pytest.mark.parametrize(
    "bad", [{"quantile": 0.0}, {"quantile": 1.0}, {"rate": 0.0}, {"share": 1.0}, {"initial": -1.0}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(InvalidParameter, match="DP007"):
        QuantileClipping(**bad)
    with pytest.raises(InvalidParameter, match="DP007"):
        NormalisedClipping(0.0)


def test_a_name_is_no_policy_and_the_refusal_names_them():
    with pytest.raises(InvalidParameter, match="'per_layer', which is no policy") as caught:
        BookKeeping(nn.Linear(2, 2), clip_norm=1.0, clipping="per_layer")
    assert "PerLayerClipping.equal" in caught.value.hint
