"""One forward and one backward pass a step: what bypasses the engine, what changes in place, what adds up."""

import copy
import pickle

import pytest
import torch
from clipping_oracle import assert_equal_to_the_oracle, clipped, losses, microbatch, norm, refused, small, step
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dptrainer.clipping import BookKeeping, add_clipped


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


# ---------------------------------------------------------------------- one forward, one backward


@pytest.mark.parametrize("retain", [True, False])
def test_two_backward_passes_in_one_step_are_refused(retain):
    model, x = small(), torch.randn(4, 6)
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(4)
    loss = model(x).sum()
    loss.backward(retain_graph=retain)
    second = loss if retain else model(x).sum()
    refused("DP031", second.backward)


def test_a_backward_pass_after_the_step_is_refused():
    model = small()
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(4)
    loss = model(torch.randn(4, 6)).sum()
    engine.abort()
    refused("DP031", loss.backward)


def test_a_step_without_a_backward_pass_or_without_begin_is_refused():
    model = small()
    engine = BookKeeping(model, clip_norm=1.0)
    refused("DP031", engine.finish)
    engine.begin(4)
    model(torch.randn(4, 6))
    refused("DP031", engine.finish)


def test_several_losses_of_one_backward_pass_add_up():
    model, x = small(), torch.randn(4, 6)
    engine = BookKeeping(model, clip_norm=1e6)
    engine.begin(4)
    (model(x).sum() + 2 * model(x * 2).square().sum()).backward()
    found = engine.finish("sum")
    (model(x).sum() + 2 * model(x * 2).square().sum()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found.grads[name], p.grad, rtol=1e-5, atol=1e-5)


def test_a_partial_sum_is_dropped_when_the_next_batch_begins():
    model, x, y = small(), torch.randn(4, 6), torch.randint(0, 3, (4,))
    engine = BookKeeping(model, clip_norm=1.0)
    expected = step(engine, model, x, y)
    engine.begin(4)
    F.cross_entropy(model(torch.randn(4, 6) * 9), y).backward()
    again = step(engine, model, x, y)
    assert all(torch.equal(again.grads[n], g) for n, g in expected.grads.items())


def test_dropout_is_drawn_once():
    model = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5), nn.Linear(20, 3))
    x, y = torch.randn(4, 6), torch.randint(0, 3, (4,))
    engine = BookKeeping(model, clip_norm=1e6)
    torch.manual_seed(8)
    found = step(engine, model, x, y, "sum")
    torch.manual_seed(8)
    F.cross_entropy(model(x), y, reduction="sum").backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found.grads[name], p.grad, rtol=1e-5, atol=1e-5)


def test_forward_without_backward_has_no_effect():
    model, x, y = small(), torch.randn(4, 6), torch.randint(0, 3, (4,))
    engine = BookKeeping(model, clip_norm=0.2)
    expected = step(engine, model, x, y)
    engine.begin(4)
    model(torch.randn(9, 6))  # validation in train mode
    with torch.no_grad():
        model(torch.randn(7, 6))
    model.eval()
    model(torch.randn(5, 6))
    model.train()
    F.cross_entropy(model(x), y).backward()
    found = engine.finish("mean")
    assert all(torch.equal(found.grads[n], g) for n, g in expected.grads.items())


# ---------------------------------------------------------------------- gradients that would bypass the engine


def test_a_penalty_on_parameters_in_the_loss_is_refused_and_discarded():
    model, x = small(), torch.randn(4, 6)
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(4)
    (model(x).sum() + model[0].weight.square().sum()).backward()
    assert "0.weight" in refused("DP031", lambda: engine.finish("sum"))
    assert model[0].weight.grad is None


def test_a_layer_called_outside_the_model_is_refused():
    model, x = small(), torch.randn(4, 6)
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(4)
    (model(x).sum() + model[0](x).sum()).backward()
    refused("DP031", lambda: engine.finish("sum"))


def test_training_in_eval_mode_is_refused():
    model, x = small().eval(), torch.randn(4, 6)
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(4)
    model(x).sum().backward()
    refused("DP014", engine.finish)
    assert model[0].weight.grad is None
    engine.begin(4)
    model(x)
    refused("DP014", engine.finish)


def test_zero_grad_between_forward_and_step_is_harmless():
    model, x, y = small(), torch.randn(4, 6), torch.randint(0, 3, (4,))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(4)
    loss = F.cross_entropy(model(x), y)
    model.zero_grad(set_to_none=False)
    loss.backward()
    assert norm(engine.finish("mean").grads) > 0


# ---------------------------------------------------------------------- in place, checkpointing, hooks


def test_in_place_activations_after_a_hooked_layer():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.GroupNorm(1, 3), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(48, 4), nn.LeakyReLU(inplace=True), nn.Linear(4, 2),
    )  # fmt: skip
    assert_equal_to_the_oracle(model, [torch.randn(4, 1, 6, 6)])


def test_in_place_activation_of_a_first_layer_over_positions():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    assert_equal_to_the_oracle(model, [torch.randn(4, 3, 6)])


def test_an_input_overwritten_after_use_is_refused():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = self.first(x)
            y = self.second(x)
            x += y
            return x

    assert "second" in refused("DP019", lambda: clipped(Overwrites(), [torch.randn(4, 6)], 1.0))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 6))
            self.last = nn.Linear(6, 2)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            return self.last(torch.tanh(checkpoint(self.block, h, use_reentrant=reentrant)))

    class Plain(Checkpointed):
        def forward(self, x):
            return self.last(torch.tanh(self.block(torch.tanh(self.first(x)))))

    model, x = Checkpointed(), torch.randn(4, 3, 6)
    plain = Plain()
    plain.load_state_dict(model.state_dict())
    expected = clipped(plain, [x], 0.1)
    found = clipped(model, [x], 0.1)
    assert norm(expected) > 0.1
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class Nested(nn.Module):
    """Reentrant checkpoints up to the output, in each other and one after another."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        def inner(h):
            return self.last(torch.tanh(h))

        def outer(h):
            return checkpoint(inner, torch.tanh(self.middle(h)), use_reentrant=True)

        h = checkpoint(torch.tanh, self.first(x), use_reentrant=True)
        return checkpoint(outer, h, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # said of the inner one
def test_a_reentrant_checkpoint_may_be_the_last_block_and_stand_in_another():
    model = Nested()
    x, index = torch.randn(4, 6), torch.arange(4)
    rows = []
    for i in range(4):  # backward() and not autograd.grad(), which reentrant checkpointing refuses
        losses(model, [x[i : i + 1]], index[i : i + 1]).sum().backward()
        rows.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    expected = {name: sum(row[name] * min(1.0, 0.1 / norm(row)) for row in rows) for name in rows[0]}
    found = clipped(model, [x], 0.1)
    assert norm(expected) > 0.1
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # said of the inner one
def test_two_backward_passes_through_reentrant_checkpoints_are_refused():
    model = Nested()
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(4)
    first, second = model(torch.randn(4, 6)), model(torch.randn(4, 6))
    first.sum().backward()
    refused("DP031", lambda: second.sum().backward())
    engine.detach()


def test_checkpointing_of_the_first_layer():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    model, x = First(), torch.randn(4, 6)
    expected = microbatch(model, [x], 0.1)
    found = clipped(model, [x], 0.1)
    assert norm({n: found[n].double() - expected[n] for n in expected}) <= 1e-6 * norm(expected)


def test_a_users_hook_that_changes_an_output_is_part_of_the_model():
    model = small()
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    assert_equal_to_the_oracle(model, [torch.randn(4, 6)])


def test_an_exception_in_forward_leaves_the_model_as_it_was():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.fail = nn.Linear(6, 3), True

        def forward(self, x):
            if self.fail:
                raise RuntimeError("out of memory")
            return self.inner(x)

    model, x = Fails(), torch.randn(4, 6)
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(4)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(x)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.overrides._len_torch_function_stack() == 0
    model.fail = False
    engine.begin(4)
    model(x).sum().backward()
    assert norm(engine.finish("sum").grads) > 0


def test_an_exception_that_the_model_catches_loses_no_gradient():
    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = nn.Linear(6, 3), nn.Linear(5, 3)

        def forward(self, x):
            try:
                return self.other(x)
            except RuntimeError:
                return self.inner(x)

    assert_equal_to_the_oracle(Catches(), [torch.randn(4, 6)])


def test_a_replayed_module_that_calls_itself():
    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)

        def forward(self, x, depth=2):
            return x if depth == 0 else torch.tanh(self.inner(self(x * self.scale, depth - 1)))

    assert_equal_to_the_oracle(nn.Sequential(nn.Linear(6, 6), Tree(), nn.Linear(6, 2)), [torch.randn(4, 6)])


def test_the_model_is_untouched_between_steps():
    model, x, y = small(), torch.randn(4, 6), torch.randint(0, 3, (4,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = BookKeeping(model, clip_norm=1.0)
    step(engine, model, x, y)
    assert type(model) is nn.Sequential
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    F.cross_entropy(model(x), y).backward()  # outside begin and finish: an ordinary model
    assert all(p.grad is not None for p in model.parameters())
    engine.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_copies_and_pickles_of_the_model_have_no_engine():
    model, x = small(), torch.randn(4, 6)
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(x).sum().backward()
        assert all(p.grad is not None for p in twin.parameters())
    model(x).sum().backward()
    assert norm(engine.finish("sum").grads) > 0


# ---------------------------------------------------------------------- reductions, scales, physical batches


def test_mean_and_sum_and_vector_and_scaled_losses_agree():
    model, x, y = small(), torch.randn(5, 6), torch.randint(0, 3, (5,))
    engine = BookKeeping(model, clip_norm=0.2)
    mean, total = step(engine, model, x, y, "mean"), step(engine, model, x, y, "sum")
    with engine.record(5):
        values = F.cross_entropy(model(x), y, reduction="none")
    vector = engine.backward(values)
    engine.begin(5)
    (F.cross_entropy(model(x), y) * 1024).backward()
    scaled = engine.finish("mean", loss_scale=1024.0)
    for other in (total, vector, scaled):
        for name, g in mean.grads.items():
            torch.testing.assert_close(other.grads[name], g, rtol=1e-5, atol=1e-7)


def test_physical_batches_add_up_to_the_logical_one():
    model, x, y = small(), torch.randn(7, 6), torch.randint(0, 3, (7,))
    engine = BookKeeping(model, clip_norm=0.2)
    whole = step(engine, model, x, y)
    parts = [step(engine, model, x[rows], y[rows]) for rows in (slice(0, 3), slice(3, 7))]
    together = add_clipped(*parts)
    assert together.sensitivity == 0.2
    for name, g in whole.grads.items():
        torch.testing.assert_close(together.grads[name], g, rtol=1e-5, atol=1e-7)


def test_physical_batches_that_disagree_are_refused():
    model, x, y = small(), torch.randn(4, 6), torch.randint(0, 3, (4,))
    first = step(BookKeeping(model, clip_norm=0.2), model, x, y)
    second = step(BookKeeping(model, clip_norm=0.3), model, x, y)
    refused("DP031", lambda: add_clipped(first, second))


def test_autocast_sums_in_float32_and_keeps_the_bound():
    model, x, y = small(), torch.randn(4, 5, 6), torch.randint(0, 3, (4, 5))
    engine = BookKeeping(model, clip_norm=0.05)
    for batch in (4, 1):
        engine.begin(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x[:batch]).float().transpose(1, 2), y[:batch], reduction="sum")
        loss.backward()
        result = engine.finish("sum")
        assert all(g.dtype == torch.float32 for g in result.grads.values())
        if batch == 1:
            assert norm(result.grads) <= 0.05
            assert norm(result.grads) > 0.0499


def test_dictionaries_in_and_out():
    class Dictionary(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small()

        def forward(self, *, batch):
            return {"logits": self.inner(input=batch["x"]), "size": len(batch["x"])}

    model, x, y = Dictionary(), torch.randn(4, 6), torch.randint(0, 3, (4,))
    expected = step(BookKeeping(model.inner, clip_norm=0.2), model.inner, x, y)
    engine = BookKeeping(model, clip_norm=0.2)
    engine.begin(4)
    F.cross_entropy(model(batch={"x": x})["logits"], y).backward()
    found = engine.finish("mean")
    for name, g in expected.grads.items():
        torch.testing.assert_close(found.grads[f"inner.{name}"], g)
