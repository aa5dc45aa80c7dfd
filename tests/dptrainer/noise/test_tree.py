"""The noise of a pass: every prefix sum has that of its nodes, every node has its own, and no word is used twice."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpbudget import epsilon_of, plan_for
from dpbudget._truncation import CAP, truncation_delta
from dpbudget.accountants import get_accountant
from dpbudget.errors import DPBudgetError, PrivacyViolation, ReceiptSpent
from dpbudget.ledger.receipt import Receipt
from dpbudget.mechanisms import Adjacency, Charge, TreeAggregated
from dptrainer.noise import tree
from dptrainer.noise.gaussian import standard_gaussian
from dptrainer.noise.keys import Purpose
from dptrainer.noise.nodes import averaged_nodes, levels, plain_nodes
from dptrainer.noise.tree import SecureTreeNoise, check_tree_size, node_scale
from dptrainer.values import ClippedSum

NewReceipt = Callable[..., Receipt]


def zeros(*sizes: int, dtype: torch.dtype = torch.float64) -> ClippedSum:
    return ClippedSum({f"p{i}": torch.zeros(n, dtype=dtype) for i, n in enumerate(sizes)}, 1.0)


def whole(**changes: Any) -> dict[str, Any]:
    return {"rate_k": 1 << 64, "max_parameters": 1 << 30, **changes}


@pytest.fixture
def fixed_key(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The step key of every receipt, so that noise can be drawn again and statistics do not vary."""
    secret = hashlib.sha256(b"tree").digest()

    def same(receipt: Receipt, purpose: Purpose) -> bytes:
        receipt.use(purpose.value)
        return secret

    monkeypatch.setattr(tree, "step_key", same)
    return secret


# ---------------------------------------------------------------------- the noise


@pytest.mark.parametrize("averaged", [False, True])
def test_the_noise_of_prefix_sums_is_that_of_their_nodes(
    new_receipt: NewReceipt, fixed_key: bytes, averaged: bool
) -> None:
    """Telescoping: what steps hand out adds up to the nodes of the prefix, drawn here from their addresses."""
    noise = SecureTreeNoise(averaged=averaged).open(new_receipt(**whole(noise_multiplier=0.7, clip_norm=3.0)), 20)
    sizes, rooms, std = (23, 4, 1), (30, 10, 10), node_scale(0.7, 3.0, 20)
    total = [torch.zeros(n, dtype=torch.float64) for n in sizes]
    weights: dict[int, float] = {}
    for step in range(1, 21):
        for part, released in zip(total, noise.privatise(zeros(*sizes)).grads.values(), strict=True):
            part += released
        for number, weight in (averaged_nodes if averaged else plain_nodes)(step):
            weights[number] = weights.get(number, 0.0) + weight
        for param_id, (size, room, part) in enumerate(zip(sizes, rooms, total, strict=True)):
            nodes = [
                weight * std * standard_gaussian(fixed_key, param_id, size, offset=number * room)
                for number, weight in weights.items()
            ]
            torch.testing.assert_close(part, torch.stack(nodes).sum(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("averaged", [False, True])
def test_the_variance_of_a_prefix_is_the_nodes_variance_times_that_of_its_bits(
    new_receipt: NewReceipt, fixed_key: bytes, averaged: bool
) -> None:
    """One for each bit of its length that is set, or 1 / (2 - 2^-l) for bit l where nodes are averaged."""
    count = 20_000
    facts = whole(noise_multiplier=1.3, clip_norm=1.5)
    noise = SecureTreeNoise(averaged=averaged).open(new_receipt(**facts), 16)
    prefix = torch.zeros(count, dtype=torch.float64)
    node = math.sqrt(5) * 1.3 * 1.5  # 16 steps have 5 levels
    for step in range(1, 17):
        one = noise.privatise(zeros(count)).grads["p0"]
        prefix += one
        bits = [bit for bit in range(5) if step >> bit & 1]
        variance = sum(1 / (2 - 2.0**-bit) for bit in bits) if averaged else len(bits)
        for found, std in ((prefix, node * math.sqrt(variance)), (one, noise.std)):
            squares = float((found / std).square().sum())
            assert abs(squares - count) < 6 * math.sqrt(2 * count), step


def test_the_noise_of_a_step_is_that_of_its_node_and_those_it_takes_in(new_receipt: NewReceipt) -> None:
    noise, found = SecureTreeNoise(averaged=False).open(new_receipt(**whole()), 8), []
    for _ in range(8):
        noise.privatise(zeros(1))
        found.append((noise.std / node_scale(1.0, 1.0, 8)) ** 2)
    assert found == [pytest.approx(k) for k in (1, 2, 1, 3, 1, 2, 1, 4)]


def test_the_noises_of_nodes_are_independent(new_receipt: NewReceipt, fixed_key: bytes) -> None:
    count, steps = 20_000, 8
    noise = SecureTreeNoise(averaged=False).open(new_receipt(**whole()), steps)
    prefixes = torch.stack([noise.privatise(zeros(count)).grads["p0"] for _ in range(steps)]).cumsum(0)
    nodes = [prefixes[t - 1] - (prefixes[(t & (t - 1)) - 1] if t & (t - 1) else 0) for t in range(1, steps + 1)]
    off_diagonal = torch.corrcoef(torch.stack(nodes)) - torch.eye(steps, dtype=torch.float64)
    assert float(off_diagonal.abs().max()) < 6 / math.sqrt(count)


def test_a_sum_in_float32_is_rounded_once(new_receipt: NewReceipt, fixed_key: bytes) -> None:
    exact, rounded = (SecureTreeNoise().open(new_receipt(**whole()), 8) for _ in range(2))
    for _ in range(8):
        grad = torch.randn(33, dtype=torch.float32)
        noise = exact.privatise(zeros(33)).grads["p0"]
        released = rounded.privatise(ClippedSum({"p0": grad.clone()}, 1.0)).grads["p0"]
        assert released.dtype == torch.float32
        assert torch.equal(released, (grad.double() + noise).float())


@pytest.mark.parametrize(("averaged", "nodes"), [(False, 13), (True, 13 + 6 + 3 + 1)])
def test_no_word_is_used_for_two_nodes_two_parameters_or_two_passes(
    new_receipt: NewReceipt, monkeypatch: pytest.MonkeyPatch, averaged: bool, nodes: int
) -> None:
    blocks: dict[tuple[bytes, int, int], tuple[int, int, float]] = {}
    real = tree.add_gaussian_

    def watched(out: torch.Tensor, key: bytes, param_id: int, std: float, *, offset: int = 0) -> torch.Tensor:
        room = 10 * -(-out.numel() // 10)
        owner = (passes, param_id, offset / room)
        for block in range(offset // 10, -(-(offset + out.numel()) // 10)):
            assert blocks.setdefault((key, param_id, block), owner) == owner
        return real(out, key, param_id, std, offset=offset)

    monkeypatch.setattr(tree, "add_gaussian_", watched)
    shared, fresh = new_receipt().key, os.urandom(16)
    for passes in range(3):
        facts = whole(key=shared, step=passes, fresh=fresh)
        noise = SecureTreeNoise(averaged=averaged).open(new_receipt(**facts), 13)
        for _ in range(13):
            noise.privatise(zeros(1, 9, 10, 11, 40))
    owners = set(blocks.values())
    assert len(owners) == 3 * 5 * nodes  # every node of every parameter of every pass, each with blocks of its own


def test_a_pass_of_one_step_is_one_gaussian_release(new_receipt: NewReceipt, fixed_key: bytes) -> None:
    noise = SecureTreeNoise().open(new_receipt(**whole(noise_multiplier=2.0)), 1)
    assert torch.equal(noise.privatise(zeros(50)).grads["p0"], 2.0 * standard_gaussian(fixed_key, 0, 50))


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-3, 1e6), st.floats(1e-6, 1e12), st.integers(1, 1 << 24))
def test_the_noise_of_a_node_is_never_below_what_the_plan_says(sigma: float, clip: float, steps: int) -> None:
    exact = levels(steps) * (Fraction(sigma) * Fraction(clip)) ** 2
    assert exact <= Fraction(node_scale(sigma, clip, steps)) ** 2 <= exact * (1 + Fraction(1, 1 << 49))


def test_a_noise_without_a_usable_scale_is_refused() -> None:
    for sigma, clip, steps in ((1e300, 1e300, 4), (1e200, 1.7e108, 1 << 20), (0.0, 1.0, 4)):
        with pytest.raises(PrivacyViolation, match="noise scale") as caught:
            node_scale(sigma, clip, steps)
        assert caught.value.code == "DP005"


# ---------------------------------------------------------------------- what it costs


@pytest.mark.parametrize(("steps", "passes"), [(1, 1), (2, 3), (100, 1), (100, 5), (4096, 2)])
def test_a_plan_without_sampling_costs_what_the_tree_mechanism_costs(steps: int, passes: int) -> None:
    """The tree's own accounting is for zero-out; adding a record to a uniform allocation costs the same."""
    sigma, accountant = 4.0, get_accountant("prv")
    node = node_scale(sigma, 1.0, steps)
    mechanism = TreeAggregated(noise_multiplier=node, steps=steps)
    own = accountant.curve([Charge(mechanism, passes)], Adjacency.ZERO_OUT).epsilon(1e-6)
    for adjacency in (Adjacency.ADD_REMOVE, Adjacency.ZERO_OUT):
        planned = epsilon_of([(1.0, sigma, passes)], delta=1e-6, adjacency=adjacency)
        assert planned.upper == pytest.approx(own.upper, rel=1e-9)
    plan = plan_for(noise_multiplier=sigma, delta=1e-6, dataset_size=1000, batch_size=1000, steps=passes)
    assert own.upper <= plan.claim.epsilon <= own.upper * (1 + 1e-6)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("steps", [1, 2, 7, 64, 1 << 20])
def test_the_tail_that_a_plan_charges_covers_that_of_the_tree(sigma: float, steps: int) -> None:
    """Unreachable mass of the nodes of one record, with its shift split among pairs in several ways."""
    height, reach, pairs = levels(steps), 1.0 / sigma, 60
    charged = truncation_delta([(1.0, sigma, 1)], height * 2 * pairs)
    generator = np.random.default_rng(1)
    splits = [np.eye(pairs)[0], np.full(pairs, pairs**-0.5), *(generator.dirichlet(np.full(pairs, 0.1), 20) ** 0.5)]
    for split in splits:
        shift = reach / math.sqrt(height) * split
        mass = np.exp(-0.5 * CAP**2) * np.expm1(CAP * shift - 0.5 * shift**2)
        assert height * float(mass.sum()) <= charged


def test_a_tree_with_more_values_than_the_plan_charges_is_refused_with_the_number_to_plan_with() -> None:
    grads = {"w": torch.zeros(15), "b": torch.zeros(3)}  # 16 and 4 values, since they are drawn in pairs
    check_tree_size(grads, 100, 7 * 20)
    with pytest.raises(PrivacyViolation, match="7 nodes of 20 values in a pass of 100 steps") as caught:
        check_tree_size(grads, 100, 7 * 20 - 1)
    assert (caught.value.code, "max_parameters=140" in caught.value.hint) == ("DP018", True)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("clipped", "facts", "code"),
    [
        (ClippedSum({"p0": torch.zeros(4)}, 1.0000001), {}, "DP031"),
        (ClippedSum({"p0": torch.zeros(4)}, math.nan), {}, "DP031"),
        (ClippedSum({}, 1.0), {}, "DP018"),
        (ClippedSum({"p0": torch.zeros(4)}, 1.0), {"max_parameters": 11}, "DP018"),
        (ClippedSum({"p0": torch.tensor([1.0, math.inf])}, 1.0), {}, "DP019"),
        (ClippedSum({"p0": torch.zeros(4, dtype=torch.float16)}, 1.0), {}, "DP019"),
        (ClippedSum({"p0": torch.zeros(4)}, 1.0, {"bits": torch.zeros(1)}), {}, "DP019"),
    ],
)
def test_what_the_plan_does_not_cover_gets_no_noise_and_ends_the_pass(
    new_receipt: NewReceipt, clipped: ClippedSum, facts: dict[str, Any], code: str
) -> None:
    noise = SecureTreeNoise().open(new_receipt(**whole(**facts)), 4)
    before = {name: grad.clone() for name, grad in clipped.grads.items()}
    with pytest.raises(PrivacyViolation) as caught:
        noise.privatise(clipped)
    assert caught.value.code == code
    assert caught.value.hint
    assert all(torch.equal(before[name], grad) for name, grad in clipped.grads.items())
    with pytest.raises(ReceiptSpent, match="is over, after 0 of 4 steps"):
        noise.privatise(ClippedSum({"p0": torch.zeros(1)}, 1.0))


@pytest.mark.parametrize(
    "other", [zeros(4), zeros(4, 3, 1), zeros(3, 4), ClippedSum({"p0": torch.zeros(4), "q": torch.zeros(3)}, 1.0)]
)
def test_parameters_that_change_within_a_pass_end_it(new_receipt: NewReceipt, other: ClippedSum) -> None:
    noise = SecureTreeNoise().open(new_receipt(**whole()), 4)
    noise.privatise(zeros(4, 3))
    with pytest.raises(PrivacyViolation, match="within a pass") as caught:
        noise.privatise(other)
    assert caught.value.code == "DP031"
    with pytest.raises(ReceiptSpent):
        noise.privatise(zeros(4, 3))


def test_a_pass_has_no_more_steps_than_were_planned(new_receipt: NewReceipt) -> None:
    noise = SecureTreeNoise().open(new_receipt(**whole()), 3)
    for _ in range(3):
        noise.privatise(zeros(2))
    extra = zeros(2)
    with pytest.raises(ReceiptSpent, match="after 3 of 3 steps") as caught:
        noise.privatise(extra)
    assert caught.value.code == "DP077"
    assert not extra.grads["p0"].any()


def test_a_receipt_pays_for_one_pass(new_receipt: NewReceipt) -> None:
    receipt = new_receipt(**whole())
    SecureTreeNoise().open(receipt, 3).close()
    with pytest.raises(ReceiptSpent) as caught:
        SecureTreeNoise().open(receipt, 3)
    assert caught.value.code == "DP077"


def test_a_receipt_of_a_plan_that_samples_is_refused_unused(new_receipt: NewReceipt) -> None:
    receipt = new_receipt(**whole(rate_k=(1 << 64) - 1))
    with pytest.raises(PrivacyViolation) as caught:
        SecureTreeNoise().open(receipt, 3)
    assert caught.value.code == "DP026"
    assert not receipt.was_used("grad-noise")


def test_an_error_while_noise_is_drawn_ends_the_pass(new_receipt: NewReceipt, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = SecureTreeNoise().open(new_receipt(**whole()), 4)

    def interrupted(*args: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tree, "add_gaussian_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            noise.privatise(zeros(4))
    with pytest.raises(ReceiptSpent):
        noise.privatise(zeros(4))


def test_the_key_is_erased_when_the_pass_ends_and_never_leaves_the_process(new_receipt: NewReceipt) -> None:
    noise = SecureTreeNoise().open(new_receipt(**whole()), 4)
    held = noise._key._key
    assert held is not None
    assert any(held)
    assert held.hex() not in repr(noise) + repr(vars(noise))
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(noise)
    noise.close()
    noise.close()
    assert not any(held)
    with pytest.raises(ReceiptSpent):
        noise.privatise(zeros(2))


def test_a_pass_ends_with_the_key_of_its_lease(new_receipt: NewReceipt) -> None:
    receipt = new_receipt(**whole())
    noise = SecureTreeNoise().open(receipt, 4)
    noise.privatise(zeros(2))
    assert receipt.key.lifetime is not None
    receipt.key.lifetime.end()  # what closing the run does
    with pytest.raises(ReceiptSpent) as caught:
        noise.privatise(zeros(2))
    assert caught.value.code == "DP076"


def test_a_forked_child_draws_no_noise_of_the_pass(new_receipt: NewReceipt) -> None:
    noise = SecureTreeNoise().open(new_receipt(**whole()), 4)
    noise.privatise(zeros(2))
    pid = os.fork()
    if pid == 0:
        try:
            noise.privatise(zeros(2))
        except DPBudgetError as error:
            os._exit(0 if error.code == "DP076" and noise._key._key is None else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    noise.privatise(zeros(2))
