"""The independent oracle: one example at a time, plain autograd, clipped by hand. Shares no code with the engine."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping import BookKeeping


def row_loss(output, index):
    """Loss of each row, different for each row index so that a permutation of examples cannot go unseen."""
    flat = output.reshape(output.shape[0], -1)
    weights = torch.linspace(-1.0, 2.0, flat.shape[1], dtype=flat.dtype)
    return (torch.tanh(flat) * weights + 0.3 * flat.square()).mean(1) * (1.0 + index.to(flat.dtype))


def losses(model, inputs, index):
    return row_loss(model(*inputs), index)


def microbatch(model, inputs, clip_norm):
    """name -> sum over examples of min(1, C(1 - 2^-16)/norm) * gradient, by a loop of batches of one."""
    batch = inputs[0].shape[0]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    params = [p for p in model.parameters() if p.requires_grad]
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in zip(names, params, strict=True)}
    for i in range(batch):
        loss = losses(model, [t[i : i + 1] for t in inputs], torch.tensor([i])).sum()
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]
        norm = sum(float(g.double().square().sum()) for g in grads) ** 0.5
        factor = 1.0 if norm == 0 else min(1.0, clip_norm * (1 - 2.0**-16) / norm)
        for name, g in zip(names, grads, strict=True):
            sums[name] += factor * g.double()
    return sums


def norm(grads):
    return sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5


def clipped(model, inputs, clip_norm, **options):
    """The engine's answer by the per-example form."""
    batch = inputs[0].shape[0]
    engine = BookKeeping(model, clip_norm=clip_norm, **options)
    with engine.record(batch):
        values = losses(model, inputs, torch.arange(batch))
    result = engine.backward(values)
    engine.detach()
    return result.grads


def typical_norm(model, inputs):
    """The norm of a middle example, so that a clip norm of this size clips some and leaves others."""
    norms = []
    for i in range(inputs[0].shape[0]):
        params = [p for p in model.parameters() if p.requires_grad]
        loss = losses(model, [t[i : i + 1] for t in inputs], torch.tensor([i])).sum()
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        norms.append(sum(float(g.double().square().sum()) for g in grads if g is not None) ** 0.5)
    return sorted(norms)[len(norms) // 2] * 1.01 + 1e-6


def assert_equal_to_the_oracle(model, inputs, *, double=1e-10, single=1e-6, **options):
    """In float64 to 1e-10 and in float32 to 1e-6, relative to the norm of the sum."""
    for dtype, tolerance in ((torch.float64, double), (torch.float32, single)):
        model = model.to(dtype)
        given = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
        clip_norm = typical_norm(model, given)
        expected = microbatch(model, given, clip_norm)
        found = clipped(model, given, clip_norm, **options)
        assert list(found) == list(expected)
        scale = norm(expected)
        assert scale > 1e-4, "the test says nothing about a zero gradient"
        difference = norm({name: found[name].double() - expected[name] for name in expected})
        assert difference <= tolerance * scale, f"{dtype}: relative error {difference / scale:.2e}"


def small():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def step(engine, model, x, y, reduction="mean"):
    engine.begin(len(x))
    F.cross_entropy(model(x), y, reduction=reduction).backward()
    return engine.finish(reduction)


def refused(code, action):
    with pytest.raises(PrivacyViolation) as caught:
        action()
    assert caught.value.code == code
    assert caught.value.hint
    return str(caught.value)
