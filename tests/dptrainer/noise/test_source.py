from __future__ import annotations

import math
import os
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpbudget.errors import PrivacyViolation, ReceiptSpent
from dpbudget.ledger.noise_keys import LeaseKey
from dpbudget.ledger.receipt import Receipt
from dptrainer.noise import native
from dptrainer.noise.gaussian import standard_gaussian
from dptrainer.noise.keys import Purpose, step_key
from dptrainer.noise.source import SecureNoise, noise_scale
from dptrainer.values import ClippedSum

NewReceipt = Callable[..., Receipt]


def zeros(*sizes: int, sensitivity: float = 1.0) -> ClippedSum:
    return ClippedSum({f"p{i}": torch.zeros(n) for i, n in enumerate(sizes)}, sensitivity)


def test_a_sum_gets_the_noise_of_its_receipt_scaled_to_the_plan(new_receipt: NewReceipt) -> None:
    key, fresh = LeaseKey(), os.urandom(16)
    facts = {"key": key, "fresh": fresh, "noise_multiplier": 3.0, "clip_norm": 0.5}
    clipped = ClippedSum({"w": torch.ones(40), "b": torch.full((3,), -2.0)}, 0.5)
    noisy = SecureNoise().privatise(clipped, new_receipt(**facts))
    secret = step_key(new_receipt(**facts), Purpose.GRAD_NOISE)
    assert list(noisy.grads) == ["w", "b"]
    assert torch.equal(noisy.grads["w"], (1.0 + 1.5 * standard_gaussian(secret, 0, 40)).float())
    assert torch.equal(noisy.grads["b"], (-2.0 + 1.5 * standard_gaussian(secret, 1, 3)).float())


def test_noise_has_the_absolute_scale_of_the_plan(new_receipt: NewReceipt) -> None:
    # Chi-squared of a zero gradient: catches noise after averaging, or multiplied by a number of workers.
    noisy = SecureNoise().privatise(zeros(100_000, sensitivity=2.0), new_receipt(noise_multiplier=0.75, clip_norm=2.0))
    squares = float((noisy.grads["p0"].double() / 1.5).square().sum())
    assert abs(squares - 100_000) < 6 * math.sqrt(2 * 100_000)


def test_a_receipt_pays_for_one_release(new_receipt: NewReceipt) -> None:
    receipt = new_receipt()
    SecureNoise().privatise(zeros(4), receipt)
    second = zeros(4)
    with pytest.raises(ReceiptSpent) as caught:
        SecureNoise().privatise(second, receipt)
    assert caught.value.code == "DP077"
    assert not second.grads["p0"].any()


def test_two_receipts_never_give_the_same_noise(new_receipt: NewReceipt) -> None:
    shared = LeaseKey()
    released = [SecureNoise().privatise(zeros(8), new_receipt(key=shared, step=s)).grads["p0"] for s in (0, 0, 1)]
    assert not torch.equal(released[0], released[1])
    assert not torch.equal(released[0], released[2])


def test_a_sum_clipped_more_tightly_still_gets_the_full_noise(new_receipt: NewReceipt) -> None:
    noisy = SecureNoise().privatise(zeros(50_000, sensitivity=0.25), new_receipt(clip_norm=4.0))
    assert float(noisy.grads["p0"].std()) == pytest.approx(4.0, rel=0.03)


@pytest.mark.parametrize(
    ("clipped", "facts", "code"),
    [
        (zeros(3, sensitivity=1.0000001), {}, "DP031"),
        (zeros(3, sensitivity=math.inf), {}, "DP031"),
        (zeros(3, sensitivity=math.nan), {}, "DP031"),
        (zeros(3, sensitivity=0.0), {}, "DP031"),
        (zeros(6, 5), {"max_parameters": 10}, "DP018"),
        (zeros(5, 5), {"max_parameters": 10}, "DP018"),  # six pairs, where the plan's tail is charged for five
        (zeros(1, 1, 1), {"max_parameters": 3}, "DP018"),
        (zeros(), {}, "DP018"),
        (ClippedSum({"w": torch.zeros(2, dtype=torch.bfloat16)}, 1.0), {}, "DP019"),
        (ClippedSum({"w": torch.zeros(2, requires_grad=True)}, 1.0), {}, "DP019"),
    ],
)
def test_what_the_plan_does_not_cover_is_refused_before_noise(
    new_receipt: NewReceipt, clipped: ClippedSum, facts: dict[str, object], code: str
) -> None:
    receipt = new_receipt(**facts)
    before = {name: grad.clone() for name, grad in clipped.grads.items()}
    with pytest.raises(PrivacyViolation) as caught:
        SecureNoise().privatise(clipped, receipt)
    assert caught.value.code == code
    assert not receipt.was_used("grad-noise")
    assert all(torch.equal(before[n], g) for n, g in clipped.grads.items())


@pytest.mark.parametrize(("sizes", "most"), [((5, 5), 11), ((5, 5), 12), ((3,), 3), ((1, 1, 1), 5), ((4, 6), 10)])
def test_as_many_pairs_as_the_plan_is_charged_for_are_drawn(
    new_receipt: NewReceipt, sizes: tuple[int, ...], most: int
) -> None:
    assert len(SecureNoise().privatise(zeros(*sizes), new_receipt(max_parameters=most)).grads) == len(sizes)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 70_000])
def test_a_sum_that_is_not_finite_is_not_released_and_its_receipt_is_spent(
    new_receipt: NewReceipt, monkeypatch: pytest.MonkeyPatch, compiled: bool, bad: float, place: int
) -> None:
    made = native.LIBRARY.get() if compiled else None
    monkeypatch.setattr(native, "kernel_for", lambda values: made)
    receipt, clipped = new_receipt(), zeros(9, 70_001)
    clipped.grads["p1"][place] = bad
    with pytest.raises(PrivacyViolation, match="not finite; nothing was released") as caught:
        SecureNoise().privatise(clipped, receipt)
    assert caught.value.code == "DP019"
    with pytest.raises(ReceiptSpent):
        SecureNoise().privatise(zeros(9, 70_001), receipt)


@given(st.floats(1e-3, 1e6), st.floats(1e-6, 1e12))
def test_the_noise_scale_is_never_below_the_exact_product(sigma: float, clip: float) -> None:
    exact = Fraction(sigma) * Fraction(clip)
    scale = noise_scale(sigma, clip)
    assert Fraction(scale) >= exact
    assert Fraction(math.nextafter(scale, 0.0)) < exact


@pytest.mark.parametrize(("sigma", "clip"), [(0.0, 1.0), (1e-200, 1e-200), (1e300, 1e300), (math.nan, 1.0)])
def test_a_useless_noise_scale_is_refused(sigma: float, clip: float) -> None:
    with pytest.raises(PrivacyViolation, match="noise scale"):
        noise_scale(sigma, clip)
