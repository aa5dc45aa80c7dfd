"""Every row of what cannot be trained privately: the code, the name and the way out."""

import re
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.ao.quantization import MinMaxObserver
from torch.nn.utils import parametrizations

from dpbudget.errors import CODES, PrivacyViolation
from dptrainer.isolation import isolation_test
from dptrainer.validation import check, validate


def wrap(*layers):
    return nn.Sequential(nn.Linear(4, 4), *layers)


def tables(**options):
    return nn.Sequential(nn.Embedding(5, 4, **options), nn.Linear(4, 2))


class NormAndActivation(nn.BatchNorm1d):
    def forward(self, x):
        return torch.relu(super().forward(x))


class Gated(nn.Module):
    """Has a bare parameter, so no rule fits, and it is run again as a whole."""

    def __init__(self, dropout):
        super().__init__()
        self.gate, self.dropout = nn.Parameter(torch.ones(4)), nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(x * self.gate)


def old_weight_norm(layer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def quantised(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that these modules will move
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})[0]


def scripted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(model)


ROWS = {
    "batch norm": (lambda: wrap(nn.BatchNorm1d(4)), "DP010", "1", "GroupNorm(1, 4)"),
    "batch norm 2d": (
        lambda: nn.Sequential(nn.Conv2d(1, 96, 3), nn.BatchNorm2d(96)),
        "DP010",
        "1",
        "GroupNorm(24, 96)",
    ),
    "sync batch norm": (lambda: wrap(nn.SyncBatchNorm(4)), "DP010", "1", "GroupNorm"),
    "frozen batch norm in train mode": (lambda: wrap(nn.BatchNorm1d(4).requires_grad_(False)), "DP010", "1", ".eval()"),
    "batch norm without statistics": (
        lambda: wrap(nn.BatchNorm1d(4, track_running_stats=False).eval()).train(),
        "DP010",
        "1",
        "GroupNorm",
    ),
    "instance norm with statistics": (
        lambda: wrap(nn.InstanceNorm1d(4, track_running_stats=True)),
        "DP013",
        "1",
        "track_running_stats=False",
    ),
    "eval mode": (lambda: wrap().eval(), "DP014", "", "model.train()"),
    "nothing trainable": (lambda: wrap().requires_grad_(False), "DP018", "", "requires_grad_"),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "DP018", "weight", "float32"),
    "sparse": (lambda: tables(sparse=True), "DP019", "0", "sparse=False"),
    "max norm": (lambda: tables(max_norm=1.0), "DP010", "0", "max_norm=None"),
    "by frequency": (lambda: tables(scale_grad_by_freq=True), "DP010", "0", "scale_grad_by_freq=False"),
    "half precision": (lambda: wrap().bfloat16(), "DP018", "0.weight", "autocast"),
    "without values": (lambda: wrap().to("meta"), "DP018", "0.weight", "to_empty"),
    "batch norm with an activation": (lambda: wrap(NormAndActivation(4)), "DP010", "1", "replace it by GroupNorm"),
    "lazy": (lambda: wrap(nn.LazyLinear(3)), "DP018", "1", "synthetic inputs"),
    "lazy batch norm": (lambda: wrap(nn.LazyBatchNorm1d()), "DP018", "1", "synthetic inputs"),
    "old weight norm": (lambda: wrap(old_weight_norm(nn.Linear(4, 2))), "DP019", "1", "parametrizations.weight_norm"),
    "old spectral norm": (lambda: wrap(nn.utils.spectral_norm(nn.Linear(4, 2))), "DP019", "1", "remove_spectral_norm"),
    "spectral norm": (
        lambda: wrap(parametrizations.spectral_norm(nn.Linear(4, 2))),
        "DP019",
        "1.parametrizations.weight.0",
        "remove_parametrizations",
    ),
    "quantised": (lambda: wrap(quantised(nn.Linear(4, 2))), "DP019", "1", "quantise afterwards"),
    "observed": (lambda: wrap(MinMaxObserver()), "DP013", "1", "quantise afterwards"),
    "a compiled part": (lambda: wrap(torch.compile(nn.Linear(4, 2), backend="eager")), "DP019", "1", "as a whole"),
    "scripted": (lambda: scripted(wrap()), "DP019", "", "scripted"),
    "data parallel": (lambda: nn.DataParallel(wrap()), "DP019", "", "pass the module inside it"),
    "data parallel part": (lambda: wrap(nn.DataParallel(nn.Linear(4, 2))), "DP019", "1", "pass the module inside it"),
    "dropout in a replay": (lambda: wrap(Gated(0.1)), "DP019", "1.dropout", "set its dropout to 0"),
    "bag by frequency": (lambda: wrap(nn.EmbeddingBag(5, 4, scale_grad_by_freq=True)), "DP010", "1", "scale_grad"),
}


@pytest.mark.parametrize("row", ROWS)
def test_every_problem_has_a_code_a_name_and_a_fix(row):
    build, code, name, fix = ROWS[row]
    model = build()
    found = validate(model)
    first = found[0]
    assert (first.code, first.module_name) == (code, name)
    assert fix in first.fix
    assert first.code in CODES
    with pytest.raises(PrivacyViolation) as caught:
        check(model)
    assert caught.value.code == code
    assert fix in str(caught.value)


def test_a_batch_norm_that_is_frozen_and_in_eval_mode_is_allowed():
    model = wrap(nn.BatchNorm1d(4).requires_grad_(False))
    model[1].eval()
    assert validate(model) == []
    model[1].weight.requires_grad_(True)
    assert [p.code for p in validate(model)] == ["DP010"]


def test_a_good_model_and_optimizer_have_no_problem():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.InstanceNorm2d(4, affine=True), nn.Flatten(),
        nn.Dropout(0.1), nn.Linear(64, 2),
    )  # fmt: skip
    model[0].requires_grad_(False)
    for optimizer in (torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam(model[1:].parameters())):
        assert validate(model, optimizer) == []
        check(model, optimizer)


def test_the_optimizer_must_hold_exactly_the_trainable_parameters():
    model, other = wrap(nn.Linear(4, 2)), wrap(nn.Linear(4, 2))
    foreign = torch.optim.SGD(other.parameters(), 0.1)
    assert [p.code for p in validate(model, foreign)] == ["DP011"]
    assert "none belong" in validate(model, foreign)[0].reason
    mixed = torch.optim.SGD([*model.parameters(), *other[0].parameters()], 0.1)
    assert "2 of them foreign." in validate(model, mixed)[0].reason
    part = torch.optim.SGD(model[0].parameters(), 0.1)
    found = validate(model, part)
    assert [p.code for p in found] == ["DP012"]
    assert "1.weight, 1.bias" in found[0].reason
    model[1].requires_grad_(False)
    assert validate(model, part) == []


def test_what_is_no_optimizer_of_torch_is_named():
    model = wrap()
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(model.parameters(), 0.1))
    (problem,) = validate(model, schedule)
    assert (problem.code, "ConstantLR" in problem.reason) == ("DP011", True)
    (problem,) = validate(model, torch.optim.SparseAdam(model.parameters()))
    assert (problem.code, problem.fix) == ("DP019", "use Adam.")


def test_a_model_of_many_faults_lists_every_one():
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(5, 4, max_norm=1.0, scale_grad_by_freq=True, sparse=True),
            "norm": nn.BatchNorm2d(4),
            "lazy": nn.LazyLinear(2),
            "short": nn.Linear(4, 2).half(),
            "instance": nn.InstanceNorm2d(4, track_running_stats=True),
            "gated": Gated(0.5),
        }
    ).eval()
    model["gated"].train()
    found = [(p.module_name, p.code) for p in validate(model, torch.optim.LBFGS([nn.Parameter(torch.zeros(1))]))]
    assert found == [
        ("words", "DP010"), ("words", "DP010"), ("words", "DP019"), ("norm", "DP010"), ("lazy", "DP018"),
        ("instance", "DP013"), ("short.weight", "DP018"), ("short.bias", "DP018"), ("gated.dropout", "DP019"),
        ("", "DP014"), ("", "DP011"), ("", "DP017"),
    ]  # fmt: skip


def test_layers_that_keep_examples_apart_have_no_problem():
    model = nn.ModuleList(
        [
            nn.LSTM(4, 3), nn.GRU(4, 3), nn.MultiheadAttention(4, 2), nn.Bilinear(3, 4, 2), nn.ReLU(inplace=True),
            nn.Dropout(0.5, inplace=True), nn.LocalResponseNorm(2), nn.InstanceNorm2d(4), nn.LayerNorm(4),
            parametrizations.weight_norm(nn.Linear(4, 4)), parametrizations.orthogonal(nn.Linear(4, 4)),
            nn.Embedding(5, 4, padding_idx=0),
        ]
    )  # fmt: skip
    assert validate(model, torch.optim.AdamW(model.parameters())) == []


def test_distributed_wrappers_are_refused_with_a_word_on_noise():
    class DistributedDataParallel(nn.Module):  # stands in for torch's own, which needs a process group
        __module__ = "torch.nn.parallel.distributed"

        def __init__(self, module):
            super().__init__()
            self.module = module

    (problem,) = validate(DistributedDataParallel(wrap()))
    assert problem.code == "DP019"
    assert "every rank would add whole noise" in problem.reason
    assert "one process" in problem.fix


def test_public_names_are_never_hidden_by_modules_of_the_same_name():
    import dptrainer

    assert [n for n in dptrainer.__all__ if isinstance(getattr(dptrainer, n), types.ModuleType)] == []
    assert dptrainer.validate(wrap()) == []


def test_lbfgs_is_refused():
    model = wrap()
    assert [p.code for p in validate(model, torch.optim.LBFGS(model.parameters()))] == ["DP017"]


def test_check_lists_every_problem():
    model = wrap(nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)).eval()
    model[1].train()
    with pytest.raises(PrivacyViolation) as caught:
        check(model, torch.optim.LBFGS(model.parameters()))
    text = str(caught.value)
    assert all(code in text for code in ("DP010", "DP013", "DP014", "DP017"))
    assert text.count("Fix:") == 4
    assert caught.value.code == "DP010"


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, 4))

    def forward(self, x):
        return x + self.table


class WithPositions(nn.Module):
    """A transformer as people write it: bare parameters beside layers that draw dropout."""

    def __init__(self, own):
        super().__init__()
        self.add = Positions() if own else None
        self.positions = None if own else nn.Parameter(torch.zeros(6, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x):
        return self.layer(x + self.positions if self.add is None else self.add(x))


def test_dropout_beside_bare_parameters_is_told_of_them_and_the_way_out_once():
    with pytest.raises(PrivacyViolation) as caught:
        check(WithPositions(own=False))
    text = str(caught.value)
    assert "inside the model (WithPositions)" in text
    assert "give positions a module" in text
    assert [text.count(word) for word in ("draws dropout", "Fix:", "dptrainer.fix")] == [4, 1, 1]
    assert validate(WithPositions(own=True)) == []  # the way out works


# ---------------------------------------------------------------------- isolation


class Mixes(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(4, 4), mix, nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.mix(self.first(x)))


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


MIXERS = {
    "mean over the batch": lambda x: x + x.mean(0),
    "neighbour": lambda x: x + x.roll(1, 0),
    "attention over the batch": lambda x: torch.softmax(x @ x.T, 1) @ x,
    "maximum": lambda x: x / x.abs().max(),
    "sorting": lambda x: x.sort(0).values,
    "cumulative": lambda x: x.cumsum(0),
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_layer_that_mixes_examples_is_found_and_named(mixer):
    model = Mixes(Call(MIXERS[mixer]))
    with pytest.raises(PrivacyViolation, match="'mix'") as caught:
        isolation_test(model, [torch.zeros(2, 4)])
    assert caught.value.code == "DP033"


def test_batch_norm_in_train_mode_mixes_examples():
    with pytest.raises(PrivacyViolation) as caught:
        isolation_test(Mixes(nn.BatchNorm1d(4, track_running_stats=False)), [torch.zeros(2, 4)])
    assert caught.value.code == "DP033"
    with pytest.raises(PrivacyViolation) as caught:
        isolation_test(Mixes(nn.BatchNorm1d(4)), [torch.zeros(2, 4)])
    assert caught.value.code == "DP013"


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.5), nn.Linear(4, 2)), torch.zeros(2, 4)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True)), torch.zeros(1, 3, 5, 5)),
        (nn.Sequential(nn.Embedding(9, 4), nn.LSTM(4, 3, batch_first=True)), torch.randint(0, 9, (4, 6))),
        (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), torch.zeros(3, 5, 4)),
    ],
    ids=["dense", "convolution", "recurrent", "transformer"],
)
def test_a_model_that_keeps_examples_apart_passes_and_is_left_as_it_was(model, example):
    state, values = torch.get_rng_state(), {n: v.clone() for n, v in model.state_dict().items()}
    isolation_test(model, [example])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(values[n], v) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_an_index_that_reaches_another_example_is_found():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, x):
            return self.embed(x).mean(1) * x.float().var()

    with pytest.raises(PrivacyViolation, match="in the model itself"):
        isolation_test(Counts(), [torch.arange(8).view(4, 2)])


def test_a_model_without_one_row_per_example_is_refused():
    with pytest.raises(PrivacyViolation) as caught:
        isolation_test(nn.Sequential(nn.Linear(4, 2), Call(lambda x: x.sum())), [torch.zeros(2, 4)])
    assert caught.value.code == "DP030"


@pytest.mark.parametrize("channels", [1, 3, 4, 6, 16, 64, 96, 1024])
def test_the_group_norm_that_is_proposed_for_a_batch_norm_is_not_constant_without_positions(channels):
    problem = validate(wrap(nn.BatchNorm1d(channels)))[0]
    groups = int(re.search(r"GroupNorm\((\d+), ", problem.fix)[1])
    assert channels % groups == 0
    if channels > 1:
        assert nn.GroupNorm(groups, channels)(torch.randn(5, channels)).abs().max() > 0.1


def test_the_page_of_what_trains_names_every_code_of_the_trainer():
    page = (Path(__file__).resolve().parents[2] / "docs" / "what-trains.md").read_text(encoding="utf-8")
    assert {code for code in CODES if "DP010" <= code <= "DP034"} <= set(re.findall(r"DP\d{3}", page))


def test_one_number_for_each_example_is_a_row_too():
    isolation_test(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), [torch.zeros(2, 4)])
    with pytest.raises(PrivacyViolation, match="DP033"):
        isolation_test(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0), Call(lambda x: x - x.mean())), [torch.zeros(2, 4)])
