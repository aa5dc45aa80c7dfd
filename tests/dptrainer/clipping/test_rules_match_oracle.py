"""Every layer rule against a loop over single examples, in float64 and float32."""

import pytest
import torch
from clipping_oracle import assert_equal_to_the_oracle
from torch import nn

from dptrainer.clipping import BookKeeping, native
from dptrainer.clipping.ghost import Ghost
from dptrainer.clipping.rules import conv, conv_choice, conv_methods, linear, rule_for


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


class Reshape(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.reshape(x.shape[0], *self.shape)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inner", [(), (7,), (3, 4)])
def test_linear(inner, bias):
    model = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))
    assert_equal_to_the_oracle(model, [torch.randn(5, *inner, 6)])


def test_a_large_linear_over_positions_is_instantiated_in_chunks(monkeypatch):
    monkeypatch.setattr("dptrainer.clipping.per_example.CHUNK_ELEMENTS", 64)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))
    assert_equal_to_the_oracle(model, [torch.randn(5, 2, 12)])


def test_a_large_linear_over_few_positions_takes_its_norm_from_gram_matrices(monkeypatch):
    made = []
    monkeypatch.setattr(linear, "Ghost", lambda *a, **k: made.append(a) or Ghost(*a, **k))
    model = nn.Sequential(nn.Linear(130, 150), nn.Tanh(), nn.Linear(150, 3))
    assert_equal_to_the_oracle(model, [torch.randn(5, 3, 130)], single=2e-4)
    assert len(made) >= 2


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_a_partly_frozen_layer(frozen):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model.get_parameter(frozen).requires_grad_(False)
    assert_equal_to_the_oracle(model, [torch.randn(4, 3, 6)])


CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 2, "stride": 3, "padding": 1},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "groups": 2, "padding": 1},
    {"kernel_size": 3, "groups": 4, "stride": 2, "dilation": 2, "padding": 2},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "bias": False},
    {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "stride": 2},
    {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"},
    {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"},
]


METHODS = {
    "loop": conv_methods.by_loop,
    "groups": conv_methods.by_groups,
    "unfolding": conv_methods.by_unfolding,
    "windows": conv_methods.by_windows,
    "channels last": conv_methods.by_channels_last,
    "patches": conv_methods.by_patches,
    "gram": conv_methods.BY_GRAM[0],
    "gram, patch sum": conv_methods.BY_GRAM[1],
    "patch norms": conv_methods.BY_PATCH_NORMS[0],
    "patch norms and sum": conv_methods.BY_PATCH_NORMS[1],
}


def cases(options, without=()):
    """Every method with every option that it is for."""
    one_group = ("gram", "gram, patch sum", "channels last")
    return [
        pytest.param(option, method, id=f"{method}-{option}")
        for option in options
        for method in METHODS
        if method not in without and (option.get("groups", 1) == 1 or method not in one_group)
    ]


COMPILED = ("patches", "gram, patch sum", "patch norms", "patch norms and sum")  # for float32 in one or two dimensions


def assert_equal_by(method, monkeypatch, model, inputs):
    """With one method, whatever would be chosen. Norms of forms that are not kept are bounds: smaller factors."""
    if method in COMPILED and native.LIBRARY.get() is None:
        pytest.skip(native.LIBRARY.status)
    used = []

    def chosen(_geometry, activation, _grad):
        if method in COMPILED and activation.dtype == torch.float64:
            return conv_methods.by_windows
        used.append(method)
        return METHODS[method]

    monkeypatch.setattr(conv, "cheapest", chosen)
    assert_equal_to_the_oracle(model, inputs, single=2e-4 if isinstance(METHODS[method], conv_methods.Norms) else 1e-6)
    assert used


def test_compiled_convolutions_refuse_what_they_are_not_for():
    geometry = conv_methods.Geometry(torch.Size((2, 1, 3, 3)), (1, 1), (0, 0), (1, 1), 1)
    for a, g in (
        (torch.zeros(1, 1, 5, 5, dtype=torch.float64), torch.zeros(1, 2, 3, 3, dtype=torch.float64)),
        (torch.zeros(1, 1, 5, 10)[..., ::2], torch.zeros(1, 2, 3, 3)),
        (torch.zeros(1, 1, 5, 5, 5), torch.zeros(1, 2, 3, 3, 3)),
    ):
        with pytest.raises(ValueError, match="float32"):
            conv_methods.by_patches(geometry, a, g)


@pytest.mark.filterwarnings("ignore:Using padding=.same.")  # about speed, from torch
@pytest.mark.parametrize(("options", "method"), cases(CONVOLUTIONS))
@pytest.mark.parametrize("dims", [1, 2])
def test_convolution(dims, options, method, monkeypatch):
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    assert_equal_by(
        method, monkeypatch, nn.Sequential(kind(4, 4, **options), nn.Tanh()), [torch.randn(3, 4, *(9, 8)[:dims])]
    )


@pytest.mark.parametrize(("options", "method"), cases(CONVOLUTIONS[:6], without=["unfolding", *COMPILED]))
def test_convolution_in_three_dimensions(options, method, monkeypatch):
    assert_equal_by(
        method, monkeypatch, nn.Sequential(nn.Conv3d(4, 4, **options), nn.Tanh()), [torch.randn(3, 4, 6, 5, 6)]
    )


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("padding", ["same", 1])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_every_padding_mode_with_dilation(mode, padding):
    layer = nn.Conv2d(3, 4, (2, 3), dilation=(2, 1), padding=padding, padding_mode=mode)
    assert_equal_to_the_oracle(nn.Sequential(layer, nn.Tanh()), [torch.randn(3, 3, 7, 6)], single=2e-4)


TRANSPOSED = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": 3, "output_padding": 2},
    {"stride": 2, "groups": 2, "bias": False},
    {"stride": 1, "dilation": 3, "output_padding": 2, "padding": 1},  # an output padding above the stride
    {"stride": 2, "dilation": 2, "groups": 4, "output_padding": 1, "padding": 2},
]


@pytest.mark.parametrize(("options", "method"), cases(TRANSPOSED))
@pytest.mark.parametrize("dims", [1, 2])
def test_transposed_convolution(dims, options, method, monkeypatch):
    transposed(dims, options, method, monkeypatch)


@pytest.mark.parametrize(("options", "method"), cases(TRANSPOSED[2:5], without=["unfolding", *COMPILED]))
def test_transposed_convolution_in_three_dimensions(options, method, monkeypatch):
    transposed(3, options, method, monkeypatch)


def transposed(dims, options, method, monkeypatch):
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    model = nn.Sequential(kind(4, 8, 3, **options), nn.Tanh())
    assert BookKeeping(model, clip_norm=1.0).replayed == ()
    assert_equal_by(method, monkeypatch, model, [torch.randn(3, 4, *(4, 3, 2)[:dims])])


class Sized(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(3, 2, 3, stride=3)

    def forward(self, x):
        return self.up(x, output_size=[x.shape[2] * 3 + 1])


def test_transposed_convolution_to_an_output_size():
    assert_equal_to_the_oracle(Sized(), [torch.randn(4, 3, 5)], single=2e-4)


def test_unequal_strides_and_kernels():
    model = nn.Sequential(nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), nn.Tanh())
    assert_equal_to_the_oracle(model, [torch.randn(3, 2, 9, 8)])


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("method", [conv_methods.by_loop, conv_methods.by_channels_last, conv_methods.by_patches])
def test_a_large_convolution_is_instantiated_in_chunks(method, kept, monkeypatch):
    monkeypatch.setattr("dptrainer.clipping.per_example.CHUNK_ELEMENTS", 16)
    double = conv_methods.by_loop if method is conv_methods.by_patches else method
    monkeypatch.setattr(conv, "cheapest", lambda _, a, __: double if a.dtype == torch.float64 else method)
    if not kept:
        monkeypatch.setattr("dptrainer.clipping.per_example.fits", lambda *_: False)
    assert_equal_to_the_oracle(nn.Sequential(nn.Conv2d(5, 6, 3), nn.Tanh()), [torch.randn(5, 5, 3, 3)])


def test_the_method_is_chosen_without_moving_the_random_stream():
    conv_choice._CHOICES.clear()
    geometry = conv_methods.Geometry(torch.Size((2, 1, 3, 3)), (1, 1), (0, 0), (1, 1), 1)
    before = torch.get_rng_state()
    chosen = conv_choice.cheapest(geometry, torch.zeros(2, 1, 5, 5), torch.zeros(2, 2, 3, 3))
    assert chosen in METHODS.values()
    assert torch.equal(before, torch.get_rng_state())
    assert len(conv_choice._CHOICES) == 1


def test_the_choice_knows_neither_the_batch_size_nor_the_data(monkeypatch):
    """The batch size is private, and a method that it decided would show in the time of a step."""
    seen = []

    def timed(actions, _device):
        seen.extend(action.args[-2:] for action in actions.values())
        return {name: 1.0 + at for at, name in enumerate(actions)}

    monkeypatch.setattr(conv_choice, "_seconds", timed)
    geometry = conv_methods.Geometry(torch.Size((2, 1, 3, 3)), (1, 1), (0, 0), (1, 1), 1)
    conv_choice._CHOICES.clear()
    for batch in (1, 2, 999):
        conv_choice.cheapest(geometry, torch.randn(batch, 1, 5, 5), torch.randn(batch, 2, 3, 3))
    conv_choice._CHOICES.clear()
    first = seen[0]
    assert [len(t) for t in first] == [8, 8]
    given = (geometry, torch.zeros(1, 1, 5, 5), torch.zeros(1, 2, 3, 3))
    assert len(seen) == len(conv_choice.methods(*given)) + len(conv_choice.norms(*given))
    assert all(torch.equal(a, b) for probe in seen for a, b in zip(probe, first, strict=True))


@pytest.mark.parametrize("padding_idx", [None, 0, 3])
def test_embedding_with_repeated_indices(padding_idx):
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=padding_idx), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.normal_()  # a padding row that is not zero would receive a gradient
    assert_equal_to_the_oracle(model, [torch.randint(0, 5, (4, 12))])


def test_embedding_of_one_index_per_example():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    assert_equal_to_the_oracle(model, [torch.randint(0, 5, (6,))])


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode, padding_idx):
    model = nn.Sequential(nn.EmbeddingBag(6, 3, mode=mode, padding_idx=padding_idx), nn.Linear(3, 2))
    assert_equal_to_the_oracle(model, [torch.randint(0, 6, (4, 9))])


class Bags(nn.Module):
    """Ragged bags: indices of length sum(lengths), and where each bag starts."""

    def __init__(self, mode, last):
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(6, 3, mode=mode, include_last_offset=last, padding_idx=2), last
        self.out = nn.Linear(3, 2)

    def forward(self, index, length):
        kept = [row[: int(n)] for row, n in zip(index, length, strict=True)]
        offsets = torch.cumsum(torch.tensor([0] + [len(k) for k in (kept if self.last else kept[:-1])]), 0)
        return self.out(self.bag(torch.cat(kept), offsets))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_ragged_bags_with_offsets(mode, last):
    """One of the bags is empty."""
    assert_equal_to_the_oracle(Bags(mode, last), [torch.randint(0, 6, (4, 8)), torch.tensor([3, 8, 0, 5])])


def test_a_bag_and_a_layer_that_share_their_table():
    bag, out = nn.EmbeddingBag(6, 3, mode="max"), nn.Linear(3, 6, bias=False)
    out.weight = bag.weight
    assert_equal_to_the_oracle(nn.Sequential(bag, nn.Tanh(), out), [torch.randint(0, 6, (4, 5))])


class WeightedBag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 3, mode="sum")

    def forward(self, index, weight):
        return self.bag(index, per_sample_weights=weight)


def test_weighted_bags():
    assert_equal_to_the_oracle(WeightedBag(), [torch.randint(0, 6, (4, 8)), torch.randn(4, 8)])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LayerNorm(6), (6,)),
        (nn.LayerNorm(6), (4, 6)),
        (nn.LayerNorm((4, 6)), (4, 6)),
        (nn.LayerNorm((4, 6), bias=False), (3, 4, 6)),
        (nn.RMSNorm(6), (4, 6)),
        (nn.RMSNorm((4, 6), eps=1e-3), (4, 6)),
        (nn.GroupNorm(2, 6), (6, 5)),
        (nn.GroupNorm(3, 6), (6, 4, 5)),
        (nn.GroupNorm(3, 6), (6,)),
        (nn.InstanceNorm1d(4, affine=True), (4, 7)),
        (nn.InstanceNorm2d(4, affine=True), (4, 3, 3)),
        (nn.InstanceNorm3d(4, affine=True), (4, 3, 2, 3)),
    ],
    ids=str,
)
def test_norm_layers(layer, shape):
    for p in layer.parameters():
        nn.init.normal_(p)
    width = int(torch.tensor(shape).prod())
    model = nn.Sequential(nn.Linear(4, width), Reshape(*shape), layer, nn.Tanh())
    # GroupNorm over one channel of one position is constant in its input, so float32 has less to give there.
    assert_equal_to_the_oracle(model, [torch.randn(5, 4)], single=3e-6)


def test_no_rule_for_a_subclass_with_its_own_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(Doubled(4, 3), nn.Linear(3, 2))
    assert rule_for(model[0]) is None
    assert BookKeeping(model, clip_norm=1.0).replayed == ("0",)
    assert_equal_to_the_oracle(model, [torch.randn(4, 4)])


def test_no_rule_for_a_patched_forward():
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight * 2, layer.bias)
    assert rule_for(layer) is None


def test_a_subclass_that_keeps_forward_keeps_the_rule():
    class Named(nn.Linear):
        pass

    assert rule_for(Named(2, 2)) is not None
