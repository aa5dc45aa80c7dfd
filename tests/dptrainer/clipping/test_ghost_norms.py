"""Norms from Gram matrices are bounds: terms that cancel, numbers that are not finite, coarse products."""

import functools

import pytest
import torch
from clipping_oracle import norm
from torch import nn
from torch.nn import functional as F

from dptrainer.clipping import BookKeeping, native
from dptrainer.clipping.ghost import Ghost
from dptrainer.clipping.rules import conv, conv_methods, linear

WAYS = {
    "gram, library": conv_methods.BY_GRAM[0],
    "gram, patches": conv_methods.BY_GRAM[1],
    "patches, library": conv_methods.BY_PATCH_NORMS[0],
    "patches": conv_methods.BY_PATCH_NORMS[1],
}


@pytest.fixture(params=WAYS)
def made(monkeypatch, request):
    """Every Ghost form that a rule makes; convolutions are made to choose it, in each of its ways."""
    forms = []
    if request.param != "gram, library" and native.LIBRARY.get() is None:
        pytest.skip(native.LIBRARY.status)

    def make(*args, **options):
        forms.append(Ghost(*args, **options))
        return forms[-1]

    monkeypatch.setattr(linear, "Ghost", make)
    monkeypatch.setattr(conv, "Ghost", make)
    monkeypatch.setattr(conv, "cheapest", lambda *_: WAYS[request.param])
    return forms


KINDS = {
    "linear": (lambda: nn.Linear(300, 300, bias=False), (2, 300), (2, 300)),
    "convolution": (lambda: nn.Conv1d(64, 64, 1, bias=False), (64, 2), (64, 2)),
    "transposed": (lambda: nn.ConvTranspose1d(64, 64, 1, bias=False), (64, 2), (64, 2)),
}


def clipped(model, x, grads, clip_norm):
    """The clipped sum where ``grads`` are the gradients of the outputs."""
    engine = BookKeeping(model, clip_norm=clip_norm)
    with engine.record(len(x)):
        values = (model(x) * grads).flatten(1).sum(1)
    return engine.backward(values).grads


def cancelling(kind, rest):
    """Two positions whose gradients cancel up to the part ``rest``, times 1000; and one ordinary example."""
    make, shape, out = KINDS[kind]
    torch.manual_seed(0)
    x, grads = torch.randn(2, *shape) * 30, torch.randn(2, *out) * 30
    dim = 1 if kind == "linear" else 2
    first, second = x[:1].select(dim, 0), x[:1].select(dim, 1)
    second.copy_(first + rest * torch.randn_like(first))
    grads[:1].select(dim, 1).copy_(-grads[:1].select(dim, 0))
    return make(), x, grads


@pytest.mark.parametrize("rest", [1.0, 1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_an_example_whose_terms_cancel_moves_the_sum_by_at_most_c(kind, rest, made):
    model, x, grads = cancelling(kind, rest)
    alone = clipped(model, x[:1], grads[:1], 1e12)
    true = norm(alone)
    clip_norm = max(true / 3, 1e-6)
    found = norm(clipped(model, x[:1], grads[:1], clip_norm))
    assert found <= clip_norm
    # Neither un-clipped nor clipped to nothing: where the bound is loose, the gradient is instantiated.
    assert found >= 0.99 * min(clip_norm, true)
    assert len(made) == 2
    assert len(made[0]._instantiated) == (0 < rest <= 1e-4 or rest == 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_instantiated_examples_and_the_others_add_up(kind, made):
    model, x, grads = cancelling(kind, 1e-5)
    whole = clipped(model, x, grads, 1e12)["weight"].double()
    parts = sum(clipped(model, x[i : i + 1], grads[i : i + 1], 1e12)["weight"].double() for i in range(2))
    assert len(made[0]._instantiated) == 1
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("place", ["input", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_example_that_is_not_finite_contributes_nothing(kind, place, bad, made):
    make, shape, out = KINDS[kind]
    model, x, grads = make(), torch.randn(3, *shape), torch.randn(3, *out)
    expected = clipped(model, x[1:], grads[1:], 0.5)["weight"]
    (x if place == "input" else grads)[0, 0] = bad
    found = clipped(model, x, grads, 0.5)["weight"]
    assert bool(found.isfinite().all())
    if bad != 1e38:
        torch.testing.assert_close(found, expected)
    assert norm({"": found - expected}) <= 0.5
    if bad != 1e38:  # see LARGEST_OPERAND
        assert all(len(form._instantiated) == 0 for form in made)


@pytest.mark.parametrize("size", [6e26, 1e28, 1e37, 3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_weighted_gradients_that_underflow_do_not_loosen_the_bound(kind, size, made):
    """Beside an activation of 1e37 a clipped gradient is 1e-43, of which float32 keeps two digits."""
    make, shape, out = KINDS[kind]
    for share in (0.5, 0.7, 0.9):
        x, grads = torch.zeros(1, *shape), torch.full((1, *out), 1e-6 / size)
        (grads if kind == "transposed" else x)[0, :, 0] = size * share
        if kind == "transposed":
            x.fill_(1e-6 / size)
        assert norm(clipped(make(), x, grads, 1e-6)) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_coarse_convolutions_do_not_loosen_the_bound(kind, made):
    """All products round up in bfloat16: 1 + 3/2^9 becomes 1 + 4/2^9."""
    make, shape, out = KINDS[kind]
    places = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "bf16"
        x, grads = torch.full((1, *shape), 1 + 3 * 2.0**-9), torch.full((1, *out), 1 + 3 * 2.0**-9)
        assert norm(clipped(make(), x, grads, 10.0)) <= 10.0
        assert [place.fp32_precision for place in places] == ["bf16", "bf16"]
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def test_float64_stays_float64(made):
    model, x, grads = cancelling("linear", 1e-3)
    model, x, grads = model.double(), x.double(), grads.double()
    true = torch.einsum("bto,bti->boi", grads, x)
    clip_norm = float(true[0].norm()) / 3
    found = clipped(model, x[:1], grads[:1], clip_norm)["weight"]
    torch.testing.assert_close(found, true[0] / 3, rtol=1e-4, atol=0.0)
    assert len(made[0]._instantiated) == 0


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_padding_does_not_change_the_bound_on_a_norm(kind, made):
    """One long record of the batch decides how far all are padded; 600 crafted ones moved by 1.7 C."""
    signs = torch.tensor([1.0, -1.0]).repeat(8).view(1, 16, 1)
    x = torch.randn(1, 1, 600) + torch.randn(1, 16, 600) / 200
    grads = signs.expand(1, 16, 600).contiguous()
    make = nn.Linear if kind == "linear" else functools.partial(nn.Conv1d, kernel_size=1)
    found = []
    for more in (0, 56):
        padded = [F.pad(t, (0, 0, 0, more)) for t in (x, grads)]
        padded = [t if kind == "linear" else t.transpose(1, 2).contiguous() for t in padded]
        found.append(clipped(make(600, 600, bias=False), *padded, 1e-3)["weight"])
    assert len(made) == 2
    assert norm({"": found[0] - found[1]}) <= 1e-5 * 1e-3


@pytest.mark.parametrize("length", [9, 20, 35, 66])
@pytest.mark.parametrize("channels", [1, 3])
def test_instantiated_gradients_have_the_same_bits_wherever_the_example_lies(length, channels):
    """Else an example whose terms cancel to the last digit would move with the others of its batch."""
    for out in (1, 3, 8):
        x, grads = torch.randn(9, channels, length), torch.randn(9, out, length - 2)
        geometry = conv_methods.Geometry(torch.Size((out, channels, 3)), (1,), (0,), (1,), 1)
        whole = conv_methods.by_loop(geometry, x, grads)
        for i in range(9):
            assert torch.equal(
                conv_methods.by_loop(geometry, x[i : i + 1].clone(), grads[i : i + 1].clone())[0], whole[i]
            )
