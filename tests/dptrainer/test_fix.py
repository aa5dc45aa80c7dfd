"""``dptrainer.fix``: what it repairs, what it keeps, what it says, and what it leaves for ``validate`` to list."""

import copy

import pytest
import torch
from test_validate import Gated, NormAndActivation, old_weight_norm
from torch import nn

import dptrainer
from dptrainer.clipping.factory import self_test
from dptrainer.isolation import isolation_test


def fixed(model):
    changes = []
    model = dptrainer.fix(model, note=changes.append)
    return model, changes


def block(norm):
    return nn.Sequential(nn.Conv2d(2, 8, 3), norm, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 3))


IMAGES = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0))

REPAIRED = {
    "batch norm": lambda: block(nn.BatchNorm2d(8)),
    "synchronised": lambda: block(nn.SyncBatchNorm(8)),
    "without weights": lambda: block(nn.BatchNorm2d(8, affine=False)),
    "without statistics": lambda: block(nn.BatchNorm2d(8, track_running_stats=False)),
    "frozen": lambda: block(nn.BatchNorm2d(8).requires_grad_(False)),
    "instance norm": lambda: block(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    "old weight norm": lambda: nn.Sequential(old_weight_norm(nn.Conv2d(2, 8, 3)), nn.Flatten(), nn.Linear(72, 3)),
    "dropout in a replay": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(25, 4), Gated(0.5), nn.Dropout(0.5)),
}


@pytest.mark.parametrize("case", REPAIRED)
def test_a_repaired_model_has_no_problem_and_keeps_examples_apart(case):
    model = REPAIRED[case]()
    assert dptrainer.validate(model) != []
    after, changes = fixed(model)
    assert after is model, "the model itself, changed in place"
    assert dptrainer.validate(after, torch.optim.SGD([p for p in after.parameters() if p.requires_grad])) == []
    assert changes
    assert all(change.before != change.after and change.module_name in str(change) for change in changes)
    isolation_test(after, [IMAGES])
    self_test(after, [IMAGES])


def test_a_second_time_changes_nothing():
    for build in REPAIRED.values():
        model, _ = fixed(build())
        before = copy.deepcopy(model).state_dict()
        assert fixed(model) == (model, [])
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_good_model_stays_as_it_is():
    model = block(nn.GroupNorm(2, 8))
    parts = list(model.modules())
    assert fixed(model) == (model, [])
    assert list(model.modules()) == parts


# ---------------------------------------------------------------------- batch norm to group norm


def test_weights_of_a_batch_norm_are_handed_over_so_that_an_optimizer_keeps_them():
    model = block(nn.BatchNorm2d(8, eps=1e-3, dtype=torch.float64))
    old = model[1]
    old.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = list(dict(model.named_parameters()))
    model, (change,) = fixed(model)
    new = model[1]
    assert type(new) is nn.GroupNorm
    assert (new.num_groups, new.num_channels, new.eps, new.affine) == (2, 8, 1e-3, True)
    assert new.weight is old.weight
    assert new.bias is old.bias
    assert (new.weight.dtype, new.weight.requires_grad, new.bias.requires_grad) == (torch.float64, False, True)
    assert list(dict(model.named_parameters())) == names
    assert [p.code for p in dptrainer.validate(model, optimizer)] == []
    assert (change.module_name, change.before, change.after) == ("1", "BatchNorm2d", "GroupNorm(2, 8)")
    assert change.outputs_change


def test_a_batch_norm_without_weights_becomes_a_group_norm_without():
    model, _ = fixed(block(nn.BatchNorm2d(8, affine=False)))
    assert model[1].weight is None
    assert model[1].bias is None
    assert not model[1].affine
    model(IMAGES)


def test_a_norm_under_two_names_and_a_tied_weight_stay_shared():
    shared = nn.BatchNorm1d(8)
    other = nn.BatchNorm1d(8)
    other.weight = shared.weight
    model = nn.Sequential(nn.Linear(4, 8), shared, nn.Sequential(shared, other), nn.Linear(8, 2))
    model, changes = fixed(model)
    assert model[1] is model[2][0]
    assert type(model[1]) is nn.GroupNorm
    assert model[2][1].weight is model[1].weight
    assert [change.module_name for change in changes] == ["1", "2.1"]


def test_a_model_that_is_itself_a_batch_norm_is_replaced():
    model, (change,) = fixed(nn.BatchNorm1d(8))
    assert type(model) is nn.GroupNorm
    assert change.module_name == ""
    assert dptrainer.validate(model) == []


def test_hooks_of_a_user_stay_and_their_handles_still_work():
    model, seen = block(nn.BatchNorm2d(8)), []
    handle = model[1].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    model, _ = fixed(model)
    model(IMAGES)
    assert seen == [nn.GroupNorm]
    handle.remove()
    model(IMAGES)
    assert len(seen) == 1


def test_a_frozen_norm_keeps_its_statistics_and_is_put_into_eval_mode():
    model = block(nn.BatchNorm2d(8).requires_grad_(False))
    model[1].running_mean.fill_(3.0)
    model, (change,) = fixed(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert not model[1].training
    assert float(model[1].running_mean[0]) == 3.0
    assert "model.train()" in change.remark


def test_a_norm_that_was_put_into_eval_mode_is_frozen_and_computes_the_same():
    model = block(nn.BatchNorm2d(8))
    model[1].eval()
    before = model(IMAGES)
    model, (change,) = fixed(model)
    assert torch.equal(model(IMAGES), before)
    assert not change.outputs_change
    assert dptrainer.validate(model) == []


def test_a_model_in_eval_mode_is_repaired_and_left_there():
    model, _ = fixed(block(nn.BatchNorm2d(8)).eval())
    assert type(model[1]) is nn.GroupNorm
    assert not any(module.training for module in model.modules())
    assert [p.code for p in dptrainer.validate(model)] == ["DP014"]
    assert dptrainer.validate(model.train()) == []


# ---------------------------------------------------------------------- settings


def test_a_lookup_computes_the_same_without_its_limit_on_norms():
    torch.manual_seed(0)
    words = torch.arange(6).view(2, 3)
    for build in (nn.Embedding, nn.EmbeddingBag):
        layer = build(6, 4, max_norm=0.5, scale_grad_by_freq=build is nn.Embedding, sparse=True)
        with torch.no_grad():
            expected = copy.deepcopy(layer)(words)
        model = nn.Sequential(layer, nn.Linear(4, 2))
        model, changes = fixed(model)
        torch.testing.assert_close(layer(words), expected)
        assert (layer.max_norm, layer.scale_grad_by_freq, layer.sparse) == (None, False, False)
        assert not any(change.outputs_change for change in changes)
        assert dptrainer.validate(model) == []


def test_an_instance_norm_keeps_no_statistics_and_trains_as_before():
    model = block(nn.InstanceNorm2d(8, affine=True, track_running_stats=True))
    expected = copy.deepcopy(model)(IMAGES)
    model, (change,) = fixed(model)
    torch.testing.assert_close(model(IMAGES), expected)
    assert not change.outputs_change
    assert not list(model.buffers())


def test_a_weight_norm_stays_a_weight_norm():
    layer = old_weight_norm(nn.Linear(4, 3))
    layer.weight_g.requires_grad_(False)
    x = torch.randn(2, 4)
    expected = layer(x)
    model, (change,) = fixed(nn.Sequential(layer))
    torch.testing.assert_close(model(x), expected)
    assert not change.outputs_change
    assert "optimizer" in change.remark
    assert [p.requires_grad for name, p in model.named_parameters() if "original0" in name] == [False]


# ---------------------------------------------------------------------- what stays


def test_what_cannot_be_repaired_is_left_and_listed():
    model = nn.Sequential(
        nn.Linear(4, 4),
        NormAndActivation(4),
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        nn.LazyLinear(2),
    )
    model.append(nn.LazyBatchNorm1d())
    model, changes = fixed(model)
    assert changes == []
    assert type(model[1]) is NormAndActivation
    assert [(p.module_name, p.code) for p in dptrainer.validate(model)] == [
        ("1", "DP010"), ("2.parametrizations.weight.0", "DP019"), ("3", "DP018"), ("4", "DP018"),
    ]  # fmt: skip


def test_in_place_activations_need_no_repair():
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.SiLU(inplace=True), nn.Linear(8, 2)
    )
    assert fixed(model) == (model, [])
    assert model[1].inplace
    self_test(model, [torch.zeros(3, 4)])


def test_a_repaired_model_trains():
    model, _ = fixed(block(nn.BatchNorm2d(8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert dptrainer.validate(model, optimizer) == []
    engine = dptrainer.make_engine(model, 1.0, example=[IMAGES])
    with engine.record(4):
        losses = nn.functional.cross_entropy(model(IMAGES), torch.arange(4) % 3, reduction="none")
    assert all(bool(total.any()) for total in engine.backward(losses).grads.values())
