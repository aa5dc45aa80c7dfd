"""Tests of a model and its loss on synthetic inputs at set-up, before any record is used."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.clipping.engine import trainable_parameters
from dptrainer.clipping.factory import deterministic_copy, learn_arguments, self_test, synthetic_like
from dptrainer.draws import ConstantDraws, without_dropout
from dptrainer.isolation import isolation_test, seeded
from dptrainer.state_probe import probe_state
from dptrainer.untested import NOT_MY_CALL, call_twin, failure, tell_untested
from dptrainer.validation import check
from dptrainer.validation.problem import a_few

#: Synthetic records: a prime, so that it is not easily a divisor of another dimension.
_ROWS = 7

#: Said where no test was possible.
UNTESTED = (
    "the model could not be called with synthetic inputs, or does not repeat itself on them (random numbers from "
    "elsewhere than torch, a counter, memory), so it was not tested for mixing examples."
)
UNTESTED_CLIPPING = (
    "the model draws random numbers that a test cannot switch off or repeat, so examples were tested for mixing, and "
    "clipping was not compared with single examples."
)

Call = tuple[tuple[Any, ...], dict[str, Any]]


def probe_batch(
    model: nn.Module, batch: object, replay: Sequence[nn.Module] = (), *, note: Callable[[str], None] | None = None
) -> bool:
    """Test ``model`` with a batch as people pass it on: ``model(*batch[:-1])``, ``model(**batch)`` and the like.

    Args:
        model: in the state in which training will start.
        batch: one collated synthetic record.
        replay: as for :class:`~dptrainer.clipping.BookKeeping`.
        note: is told if the model could be called in none of these ways, and so was not tested.

    Returns:
        Whether it was tested.

    Raises:
        PrivacyViolation: as :func:`probe`.
    """
    if any(probe(model, args, replay, named=named, note=note) for args, named in calls_with(batch)):
        return True
    tell_untested(UNTESTED + _why_not(model, batch), note)
    return False


def _why_not(model: nn.Module, batch: object) -> str:
    """What the model says to a batch that is passed on in the usual way."""
    args, named = next(calls_with(batch), ((), {}))
    return failure(partial(call_twin, model, args, named)) if args or named else ""


def probe_again(model: nn.Module, optimizer: torch.optim.Optimizer, test: Callable[[], object]) -> None:
    """Look at a model as at set-up, after a module, ``forward`` or hook of it was exchanged.

    Raises:
        PrivacyViolation: as at set-up.
    """
    check(model, optimizer)
    device = next(model.parameters()).device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext():
        test()


def calls_with(batch: object) -> Iterator[Call]:
    """Ways in which a model may be called with a batch, the usual one first."""
    if isinstance(batch, Tensor):
        yield (batch,), {}
    elif isinstance(batch, Mapping):
        yield (), {name: value for name, value in batch.items() if name != "labels"}
        yield (), dict(batch)
        yield from (((value,), {}) for name, value in batch.items() if isinstance(value, Tensor) and name != "labels")
    elif isinstance(batch, tuple | list) and batch:
        if isinstance(batch[0], Mapping):
            yield from calls_with(batch[0])
        yield tuple(batch[:-1]), {}
        yield tuple(batch), {}
        yield (batch[0],), {}


def probe(
    model: nn.Module,
    inputs: Sequence[object],
    replay: Sequence[nn.Module] = (),
    *,
    named: Mapping[str, object] | None = None,
    note: Callable[[str], None] | None = None,
) -> bool:
    """Test isolation and clipping of ``model(*inputs, **named)`` on synthetic inputs; False where that is not possible.

    A model that cannot be called with these inputs, or that draws random numbers from elsewhere than torch, is not
    tested. Dropout is off, and what else is drawn from torch is replaced by constants where clipping is tested; where
    that does not help, examples are tested for isolation, and ``note`` is told that clipping was not. The model and
    the random streams stay as they were.

    Args:
        model: in the state in which training will start.
        inputs: positional inputs with the right shapes and types; their values are not used.
        replay: as for :class:`~dptrainer.clipping.BookKeeping`.
        named: inputs by name, likewise.
        note: is told which parameters get no gradient, and which attributes keep values of examples.

    Raises:
        PrivacyViolation: one example reaches another's output (DP033), a buffer, parameter or attribute follows the
            data (DP013), or clipping differs from the reference (DP019, DP030).
    """
    record = _record(model, [*inputs, *(named or {}).values()])
    if record is None:
        return False
    with passed_by_name(model, len(inputs), tuple(named or ())):
        examples = (example for example in synthetic_examples(record) if _outputs(model, example) is not None)
        example = next(examples, None)
        lengths = _with_lengths(record)
        lengths = lengths if lengths is not None and _takes(model, lengths) else None
        example = lengths if example is None else example
        if example is None or not _probe_values(model, example, replay, note):
            return False
        if lengths is not None and lengths is not example:
            _probe_values(model, lengths, replay, lambda said: None)  # it was said
    return True


def _probe_values(
    model: nn.Module, example: Sequence[Tensor], replay: Sequence[nn.Module], note: Callable[[str], None] | None
) -> bool:
    """:func:`probe` with these values; False where the model does not repeat itself on them."""
    probe_state(model, example, note)
    if not _runs_repeatably(model, example):
        return False
    isolation_test(model, example)
    with _fixed_draws(model, example) as fixed:
        if fixed:
            _alone_as_in_company(model, example)
            _clips_as_it_should(model, example, replay)
    if not fixed:
        _learn_arguments(model, example, replay)
        tell_untested(UNTESTED_CLIPPING, note)
    if note is not None:
        _note_unused(model, example, note)
    return True


def callable_with(
    model: nn.Module, inputs: Sequence[object], named: Mapping[str, object]
) -> tuple[list[Tensor], int, tuple[str, ...]] | None:
    """Synthetic values for a call of this kind, how many of them are positional, and the names of the others.

    None where the model cannot be called like this.

    Args:
        model: the model.
        inputs: positional inputs for one collated record, of the right shapes and types.
        named: inputs by name, likewise.
    """
    record = _record(model, [*inputs, *named.values()])
    if record is None:
        return None
    with passed_by_name(model, len(inputs), tuple(named)):
        examples = [*synthetic_examples(record), *(each for each in [_with_lengths(record)] if each is not None)]
        example = next((example for example in examples if _outputs(model, example) is not None), None)
    return None if example is None else (example, len(inputs), tuple(named))


def _record(model: nn.Module, values: Sequence[object]) -> list[Tensor] | None:
    """One record on the model's device; None where it is not made of tensors with one row each."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors or len(tensors) != len(values) or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return None
    device = next(model.parameters()).device
    return [tensor.to(device) for tensor in tensors]


def _takes(model: nn.Module, example: Sequence[Tensor]) -> bool:
    """Whether the model can be called with these values; tried on the CPU, where an index out of range is an error."""
    on_cpu = copy.deepcopy(model).cpu() if example[0].is_cuda else model
    return _outputs(on_cpu, [tensor.to(next(on_cpu.parameters()).device) for tensor in example]) is not None


def _alone_as_in_company(model: nn.Module, example: Sequence[Tensor]) -> None:
    """The output for one example must not follow how many there are.

    Raises:
        PrivacyViolation: it does (DP033).
    """
    inputs = synthetic_like(example)
    together, count = _outputs(model, inputs), len(inputs[0])
    for index in range(count):
        single = _outputs(model, [tensor[index : index + 1] for tensor in inputs])
        if together is None or single is None or len(single) != len(together):
            return  # some models do not take a single example
        for all_rows, row in zip(together, single, strict=True):
            if all_rows.shape[1:] != row.shape[1:] or all_rows.shape[:1] != (count,) or row.shape[:1] != (1,):
                continue
            # Another shape is another order of summation, but never another size.
            size = float(all_rows.abs().max())
            if not torch.allclose(all_rows[index], row[0], rtol=1e-2, atol=1e-3 * size + 1e-6):
                raise PrivacyViolation(
                    "the output for one example changes with how many others are in the batch.",
                    hint="remove the division by the size of the batch, and places that its examples compete for.",
                    code="DP033",
                )


def _clips_as_it_should(model: nn.Module, example: Sequence[Tensor], replay: Sequence[nn.Module]) -> None:
    """The self-test of the engine, for a model that is known to run without it.

    Raises:
        PrivacyViolation: as :func:`~dptrainer.clipping.factory.self_test`, or it cannot run at all (DP030).
    """
    try:
        self_test(model, example, replay=replay)
    except NOT_MY_CALL as error:
        if isinstance(error, PrivacyViolation | InvalidParameter):
            raise
        raise PrivacyViolation(
            f"the model runs on synthetic inputs, but not while it is clipped: {error}",
            hint="give every layer one row for each example; name a module that picks rows in replay=[module].",
            code="DP030",
        ) from error


def _learn_arguments(model: nn.Module, example: Sequence[Tensor], replay: Sequence[nn.Module]) -> None:
    """Which arguments of replayed modules carry examples, where no self-test finds it out."""
    paths = {id(module): name for name, module in model.named_modules()}
    twin = deterministic_copy(model)
    with contextlib.suppress(*NOT_MY_CALL), seeded(twin):
        learn_arguments(model, twin, example, [twin.get_submodule(paths[id(module)]) for module in replay])


def _note_unused(model: nn.Module, example: Sequence[Tensor], note: Callable[[str], None]) -> None:
    """Say which trainable parameters no output depends on: they work, but noise is all that they will ever get."""
    twin = deterministic_copy(model)
    parameters = trainable_parameters(twin)
    with torch.enable_grad(), seeded(twin):
        leaves = tree_leaves(twin(*_copies(synthetic_like(example))))
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        weights = [torch.ones_like(leaf) for leaf in outputs]
        if not outputs:
            return
        found = torch.autograd.grad(outputs, list(parameters.values()), weights, allow_unused=True)
    unused = [name for name, gradient in zip(parameters, found, strict=True) if gradient is None]
    if unused:
        note(
            f"DP015 {a_few(unused)} got no gradient from synthetic inputs; noise alone will move what stays without. "
            "Fix: freeze it with requires_grad_(False), or remove it."
        )


def synthetic_examples(record: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Batches shaped like a batch of one record, the most telling first; the model may refuse some.

    Integers are ones followed by zeros, as many as differ between examples: any table has these rows, any mask leaves
    something, and a bag of them differs too. Then ones, then zeros. If integers were left as zeros, all examples would
    be one and the same, and nothing could be seen to mix.
    """
    shapes = [(_ROWS, *tensor.shape[1:]) for tensor in record]
    bits = [_staircase(shape) for shape in shapes]
    for integers in (bits, [torch.ones_like(b) for b in bits], [torch.zeros_like(b) for b in bits]):
        yield [
            tensor.new_zeros(shape) if tensor.is_floating_point() or tensor.is_complex() else whole.to(tensor)
            for tensor, shape, whole in zip(record, shapes, integers, strict=True)
        ]
        if all(tensor.is_floating_point() for tensor in record):
            return


def _with_lengths(record: Sequence[Tensor]) -> list[Tensor] | None:
    """A batch in which one integer for each example is its length: different ones, in no order, none of them zero.

    Zero is no length, and of equal lengths nobody sees that examples are sorted by them. None where there is no such
    input.
    """
    if not any(_is_whole(tensor) and tensor.dim() == 1 for tensor in record):
        return None
    longest = min((tensor.shape[1] for tensor in record if tensor.dim() > 1), default=_ROWS)
    places = torch.tensor([2, 5, 0, 6, 3, 1, 4])  # a permutation of the rows
    values = 1 + (places * (longest - 1)) // (_ROWS - 1)
    batch, *_ = synthetic_examples(record)
    return [values.to(t) if _is_whole(t) and t.dim() == 1 else t for t in batch]


def _is_whole(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def _staircase(shape: tuple[int, ...]) -> Tensor:
    """int64 of ``shape``: row i is 1 in its first few places, all of them in row 0, one in row 1, half in row 2."""
    places = torch.Size(shape[1:]).numel()
    if len(shape) == 1 or places < 2:
        return (torch.arange(shape[0]) % 2).reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
    ones = torch.tensor([places, 1, (places + 1) // 2]).repeat(_ROWS)[: shape[0]]
    return (torch.arange(places) < ones.unsqueeze(1)).long().view(shape)


@contextmanager
def passed_by_name(model: nn.Module, positional: int, names: tuple[str, ...]) -> Iterator[None]:
    """Within the block, positional inputs of ``model`` beyond the first few arrive under these names."""
    if not names:
        yield
        return

    def rename(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if len(args) != positional + len(names):
            return None  # renamed before: a replay passes here again
        return args[:positional], {**kwargs, **dict(zip(names, args[positional:], strict=True))}

    handle = model.register_forward_pre_hook(rename, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _outputs(model: nn.Module, example: Sequence[Tensor], *earlier: Sequence[Tensor]) -> list[Tensor] | None:
    """Outputs of a fresh copy for ``example`` after it has seen ``earlier``; None if it cannot be called like this."""
    twin = deterministic_copy(model)
    with torch.no_grad():
        try:
            for before in earlier:
                with seeded(twin):
                    twin(*_copies(before))
            with seeded(twin):
                found = tree_leaves(twin(*_copies(example)))
        except NOT_MY_CALL:
            return None
    return [leaf.nan_to_num() for leaf in found if isinstance(leaf, Tensor)]


def _copies(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Inputs that the model may write into."""
    return [tensor.clone() for tensor in inputs]


def _runs_repeatably(model: nn.Module, example: Sequence[Tensor]) -> bool:
    """Whether the same inputs and random numbers give the same outputs, whatever was seen before.

    Raises:
        PrivacyViolation: what was seen before makes a difference (DP013).
    """
    inputs = list(synthetic_like(example))
    others = [t * -1.5 + 1.0 if t.is_floating_point() else t.flip(0) for t in inputs]
    after_same, after_same_again = _outputs(model, inputs, inputs), _outputs(model, inputs, inputs)
    after_others = _outputs(model, inputs, others)
    if not after_same or not after_same_again or not after_others:
        return False
    if not _all_equal(after_same, after_same_again):
        return False
    if not _all_equal(after_same, after_others):
        raise PrivacyViolation(
            "what the model computes depends on inputs that it saw in an earlier forward pass, so the influence of an "
            "example does not end with its step.",
            hint="keep no running statistics, memory bank or hidden state in the model's attributes.",
            code="DP013",
        )
    alone = _outputs(model, inputs)
    return alone is not None and _all_equal(alone, after_same)


@contextmanager
def _fixed_draws(model: nn.Module, example: Sequence[Tensor]) -> Iterator[bool]:
    """Within the block nothing that is drawn tells two passes apart, if it yields True; otherwise nothing helped."""
    # That two passes drew the same may be chance, that the stream stood still is not.
    if _draws_nothing(model, example, stream_too=True):
        yield True
        return
    with ConstantDraws():  # type: ignore[no-untyped-call]  # torch does not annotate it
        fixed = _draws_nothing(model, example)
        if fixed:
            yield True
    if not fixed:
        yield False


def _draws_nothing(model: nn.Module, example: Sequence[Tensor], *, stream_too: bool = False) -> bool:
    """Whether the outputs do not depend on the random stream; with ``stream_too``, whether it does not move either."""
    twin, inputs = deterministic_copy(model), synthetic_like(example)
    with torch.no_grad(), seeded(twin):
        try:
            before = _stream(inputs[0])
            first, second = tree_leaves(twin(*_copies(inputs))), tree_leaves(twin(*_copies(inputs)))
            if stream_too and not _all_equal(before, _stream(inputs[0])):
                return False
        except NOT_MY_CALL:
            return False
    return _all_equal(*([t.nan_to_num() for t in leaves if isinstance(t, Tensor)] for leaves in (first, second)))


def _stream(placed: Tensor) -> list[Tensor]:
    """Where torch's random streams stand, that of the device of ``placed`` included."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(placed.device)] if placed.is_cuda else [])]


def _all_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------------- losses


class _WithLoss(nn.Module):
    """Model and per-example loss as one module of (inputs, named inputs, target) -> [B]."""

    def __init__(
        self, model: nn.Module, loss: Callable[[Any, Any, int], Tensor], positional: int, names: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.model = model
        self._loss, self._positional, self._names = loss, positional, names
        self.training = model.training

    def forward(self, *tensors: Tensor) -> Tensor:
        """[B] losses."""
        *inputs, target = tensors
        named = dict(zip(self._names, inputs[self._positional :], strict=True))
        outputs = self.model(*inputs[: self._positional], **named)
        return self._loss(outputs, target, target.shape[0])


def probe_loss(
    model: nn.Module,
    loss: Callable[[Any, Any, int], Tensor],
    inputs: Sequence[object],
    named: Mapping[str, object],
    target: object,
) -> bool:
    """Test on synthetic records that the loss of one example follows from that example; False if not possible.

    Args:
        model: a model that keeps examples apart.
        loss: (outputs, target, batch size) -> one value per example.
        inputs: positional inputs of the model for one collated record, of the right shapes and types.
        named: its inputs by name, likewise.
        target: what the loss compares with, likewise.

    Raises:
        PrivacyViolation: one example's loss changes with another example, or with how many there are (DP033).
    """
    values = [*inputs, *named.values(), target]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) != len(values) or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return False
    device = next(model.parameters()).device
    whole = _WithLoss(copy.deepcopy(model), loss, len(inputs), tuple(named))
    for example in synthetic_examples([tensor.to(device) for tensor in tensors]):
        if _outputs(whole, example) is None:
            continue
        with _fixed_draws(whole, example) as fixed:
            if fixed:
                _compare_losses(whole, example)
                return True
    return False


def _compare_losses(whole: nn.Module, example: Sequence[Tensor]) -> None:
    twin, inputs = deterministic_copy(whole), synthetic_like(example)
    with torch.no_grad(), without_dropout():
        together = twin(*inputs)
        for index, loss in enumerate(together):
            try:
                alone = twin(*[t[index : index + 1] for t in inputs])
            except (*NOT_MY_CALL, PrivacyViolation, InvalidParameter):
                alone = loss.new_full((1,), float("nan"))  # a loss that needs company
            if not torch.allclose(alone, loss, rtol=1e-3, atol=1e-5, equal_nan=True):
                raise PrivacyViolation(
                    "the loss of one example changes with the other examples of the batch; clipping each gradient does "
                    "not bound one example's influence.",
                    hint="compare outputs and targets of equal shape (no [B, 1] with [B]), and remove statistics over "
                    "the batch, in-batch negatives and division by its size.",
                    code="DP033",
                )
