"""Conv1D of Hugging Face transformers: known by its name, checked by the function that it calls."""

import sys
import types

import pytest
import torch
from clipping_oracle import assert_equal_to_the_oracle, refused
from torch import nn

from dptrainer.clipping import BookKeeping


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(11)


def double(forward):
    """A class of the library's name; the library itself need not be installed."""

    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf = nf
            self.weight = nn.Parameter(torch.randn(nx, nf) / 3)
            self.bias = nn.Parameter(torch.randn(nf))

    Conv1D.forward = forward
    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    return Conv1D


def as_released(self, x):
    return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


def real():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
@pytest.mark.parametrize("make", [lambda: double(as_released), real], ids=["double", "real"])
def test_a_transposed_linear_layer(make, shape):
    kind = make()
    model = nn.Sequential(kind(5, 6), nn.Tanh(), kind(5, 5))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert BookKeeping(model, clip_norm=1.0).replayed == ()
    assert_equal_to_the_oracle(model, [torch.randn(5, *shape)])
    model[0].weight.requires_grad_(False)
    assert_equal_to_the_oracle(model, [torch.randn(5, *shape)])


def test_another_forward_under_that_name_is_refused():
    model = double(lambda self, x: x @ self.weight + self.bias)(5, 6)
    engine = BookKeeping(nn.Sequential(model), clip_norm=1.0)
    engine.begin(3)
    assert "0.weight" in refused("DP019", lambda: engine._model(torch.randn(3, 4, 6)))
    scaled = double(lambda self, x: torch.addmm(self.bias, x, self.weight, alpha=2))(5, 6)
    engine = BookKeeping(nn.Sequential(scaled), clip_norm=1.0)
    engine.begin(3)
    refused("DP019", lambda: engine._model(torch.randn(3, 6)))


def test_a_small_gpt2_has_rules_for_everything():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = transformers.GPT2LMHeadModel(config)

        def forward(self, tokens):
            return self.inner(tokens, use_cache=False).logits

    model = Logits().train()
    assert BookKeeping(model, clip_norm=1.0).replayed == ()
    assert_equal_to_the_oracle(model, [torch.randint(0, 11, (3, 6))], single=1e-5)


def test_the_library_is_not_imported():
    assert isinstance(sys.modules.get("dptrainer"), types.ModuleType)
    source = sys.modules["dptrainer.clipping.rules.huggingface"]
    assert "transformers" not in vars(source)
