"""What dropout and augmentation draw comes from the receipt: a published seed says nothing about it."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loopkit import linear_data, linear_model, make_run, private, refused
from torch import Tensor, nn
from torch.utils.data import Dataset

from dpbudget.ledger.replay import StepKey
from dpbudget.ledger.step_keys import Purpose
from dptrainer import PrivateTrainer, TreeTrainer, streams
from dptrainer.own_draws import BatchDraws
from dptrainer.replay import replayed_draws

CPU = torch.device("cpu")
ROWS = 40


def one_of_each() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


def seed_all(seed: int = 0) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


class Drawing(Dataset[Any]):
    """Keeps what every stream gives when the first record of a batch is read."""

    def __init__(self) -> None:
        self.data, self.drawn = linear_data(ROWS), [(0.0, 0.0, 0.0)]
        self.drawn.clear()

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.data[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        self.drawn.append(one_of_each())
        return [self.data[index] for index in indices]


Fit = Callable[[Drawing, Callable[[], object]], None]


def with_trainer(data: Drawing, between: Callable[[], object], size: int | None = None) -> None:
    model = linear_model()
    PrivateTrainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), data, make_run(rate=1.0),
        callbacks=[lambda steps, epsilon: between()], physical_batch_size=size,
    ).fit()  # fmt: skip


def with_loop(data: Drawing, between: Callable[[], object], size: int | None = None) -> None:
    model, optimizer, loader = private(data=data, physical_batch_size=size)
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        between()


def with_passes(data: Drawing, between: Callable[[], object]) -> None:
    model, run = linear_model(), make_run(steps=2, rate=1.0, max_parameters=1000)
    TreeTrainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), data, run, steps_per_pass=2,
        callbacks=[lambda steps, epsilon: between()],
    ).fit()  # fmt: skip


WAYS: list[Fit] = [with_trainer, with_loop, with_passes]
each_way = pytest.mark.parametrize("fit", WAYS)


def nothing() -> None:
    """Between two steps."""


@each_way
@pytest.mark.parametrize("between", [nothing, seed_all], ids=["seeded before", "seeded between steps"])
def test_a_seed_of_the_program_does_not_tell_what_a_batch_draws(fit: Fit, between: Callable[[], None]) -> None:
    seen: list[tuple[float, float, float]] = []
    for _ in range(2):
        data = Drawing()
        seed_all()
        fit(data, between)
        assert len(data.drawn) == 4
        seen += data.drawn
    for numbers in zip(*seen, strict=True):
        assert len(set(numbers)) == 8


@pytest.mark.parametrize("fit", [with_trainer, with_loop])
def test_every_physical_batch_draws_anew_though_the_loop_seeds_between(fit: Any) -> None:
    data = Drawing()
    fit(data, seed_all, size=10)
    for numbers in zip(*data.drawn, strict=True):
        assert len(set(numbers)) == len(data.drawn) >= 16


@each_way
def test_afterwards_the_streams_of_the_program_go_on_as_if_nothing_had_been_drawn(fit: Fit) -> None:
    seed_all(7)
    expected = [one_of_each(), one_of_each()]
    seed_all(7)
    assert one_of_each() == expected[0]
    fit(Drawing(), nothing)
    assert one_of_each() == expected[1]


def standing() -> tuple[bytes, object, int, bytes]:
    """Where every stream of the program stands."""
    state = np.random.get_state(legacy=False)["state"]  # type: ignore[call-overload]  # of NumPy's stubs
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), state["pos"], state["key"].tobytes()


@pytest.mark.parametrize("size", [None, 10])
@pytest.mark.parametrize("fit", [with_trainer, with_loop])
def test_where_the_streams_stand_after_a_step_does_not_tell_how_much_its_batch_drew(fit: Any, size: int | None) -> None:
    seed_all(7)
    seen = [standing()]
    fit(Drawing(), lambda: seen.append(standing()), size=size)
    assert len(seen) >= 5
    assert len(set(map(hash, seen))) == 1


def test_where_the_streams_stand_after_a_step_of_a_pass_tells_nothing() -> None:
    seed_all(7)
    seen = [standing()]
    with_passes(Drawing(), lambda: seen.append(standing()))
    assert len(seen) == 5
    assert len(set(map(hash, seen))) == 1


class Seeding(Drawing):
    """Seeds everything for each batch that is read, as datasets do whose augmentation shall be the same every time."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        found = super().__getitems__(indices)
        seed_all()
        return found


@each_way
def test_a_dataset_that_seeds_does_not_tell_what_the_model_draws(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float, float]] = []

    def drawing(self: nn.Linear, x: Tensor) -> Tensor:
        drawn.append(one_of_each())
        return F.linear(x, self.weight, self.bias)

    monkeypatch.setattr(nn.Linear, "forward", drawing)
    data = Seeding()
    fit(data, nothing)
    trained = drawn[-4:]
    for numbers in zip(*trained, strict=True):
        assert len(set(numbers)) == 4
    seed_all()
    assert not set(one_of_each()) & {number for numbers in trained for number in numbers}


def test_a_generator_of_another_kind_that_numpy_was_given_comes_back() -> None:
    before, other = np.random.get_bit_generator(), np.random.PCG64(5)  # type: ignore[attr-defined]
    np.random.set_bit_generator(other)  # type: ignore[attr-defined]
    try:
        with_trainer(Drawing(), nothing)
        assert np.random.get_bit_generator() is other  # type: ignore[attr-defined]
    finally:
        np.random.set_bit_generator(before)  # type: ignore[attr-defined]


def test_a_loop_that_is_left_early_or_fails_gives_the_streams_back() -> None:
    seed_all(3)
    expected = one_of_each()
    seed_all(3)
    for _ in private()[2]:
        break
    assert one_of_each() == expected

    def fail() -> None:
        raise KeyError

    seed_all(3)
    with pytest.raises(KeyError):
        with_trainer(Drawing(), fail)
    assert one_of_each() == expected


def test_of_two_loaders_at_once_the_last_to_end_gives_the_streams_back() -> None:
    seed_all(3)
    expected = one_of_each()
    seed_all(3)
    first, second = (iter(loader) for loader in (private()[2], private()[2]))
    next(first), next(second)
    first.close()  # type: ignore[attr-defined]
    assert one_of_each() != expected  # the second has a batch out, which may still draw
    second.close()  # type: ignore[attr-defined]
    assert one_of_each() == expected


def test_runs_in_several_threads_give_the_streams_back() -> None:
    failed: list[BaseException] = []

    def lend() -> None:
        try:
            for _ in range(2000):
                with streams.lent_streams(CPU):
                    streams.begin_short_streams(CPU, 5)
        except BaseException as error:
            failed.append(error)

    seed_all(3)
    expected, often = one_of_each(), sys.getswitchinterval()
    seed_all(3)
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lend) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(often)
    assert not failed
    assert one_of_each() == expected


class Dropping(nn.Module):
    """Keeps what dropout left, as many times as it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = linear_model(), nn.Dropout(0.5)
        self.masks: list[tuple[bool, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.masks.append(tuple((self.drop(torch.ones(64)) != 0).tolist()))
        return self.layer(x)  # type: ignore[no-any-return]  # of a module


def test_dropout_of_a_seeded_program_is_another_in_every_step_and_run() -> None:
    masks: list[tuple[bool, ...]] = []
    for _ in range(2):
        seed_all()
        model = Dropping()
        trainer = PrivateTrainer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), linear_data(ROWS),
            make_run(rate=1.0), note=lambda said: None,
        )  # fmt: skip
        model.masks.clear()  # of the tests at set-up
        trainer.fit()
        masks += model.masks
    assert len(masks) == len(set(masks)) == 8


def test_a_replay_finds_what_reading_a_batch_drew_beside_what_the_model_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    key = StepKey("0" * 64, "1" * 32, 0, Purpose.RECORD_DRAWS, 1 << 64, 1.0, 1.0, None, b"k" * 32)
    monkeypatch.setattr("dptrainer.own_draws.step_key", lambda receipt, purpose: key.key)
    data, drawn = Drawing(), []

    def drawing(self: nn.Linear, x: Tensor) -> Tensor:
        drawn.append(one_of_each())
        return F.linear(x, self.weight, self.bias)

    monkeypatch.setattr(nn.Linear, "forward", drawing)
    with_trainer(data, nothing, size=10)
    for batch in range(4):  # of the last step, whose key is that of all others here
        with replayed_draws(key, batch=batch, reading=True):
            assert one_of_each() == data.drawn[batch - 4]
        with replayed_draws(key, batch=batch):
            assert one_of_each() == drawn[batch - 4]


# ---------------------------------------------------------------------- the streams themselves


@pytest.fixture
def lent() -> Iterator[None]:
    with streams.lent_streams(CPU):
        yield


def secret(seed: int = 1) -> bytearray:
    return bytearray(random.Random(seed).randbytes(streams.SECRET_BYTES))


@pytest.mark.usefixtures("lent")
def test_torch_draws_from_a_twister_whose_whole_state_is_secret() -> None:
    words = np.frombuffer(secret(), dtype="<u4")[:624]
    oracle = np.random.MT19937()
    oracle.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    streams.begin_streams(CPU, secret())
    drawn = torch.empty(3000, dtype=torch.int32)
    for place in range(len(drawn)):  # one by one: whole vectors are drawn in another order
        drawn[place : place + 1].random_()
    assert np.array_equal(drawn.numpy(), oracle.random_raw(3000) & 0x7FFFFFFF)


@pytest.mark.usefixtures("lent")
@pytest.mark.parametrize("byte", [3, 4, 4 * 311, 4 * 624 - 1])
def test_every_word_of_the_state_counts(byte: int) -> None:
    def drawn(words: bytearray) -> Tensor:
        streams.begin_streams(CPU, words)
        return torch.rand(2000)

    other = secret()
    other[byte] ^= 0x80
    assert torch.equal(drawn(secret()), drawn(secret()))
    assert not torch.equal(drawn(secret()), drawn(other))


@pytest.mark.usefixtures("lent")
@pytest.mark.parametrize("begin", [lambda n: streams.begin_streams(CPU, secret(n)), lambda n: streams.begin_short_streams(CPU, n * 0x1_0001_0001)])  # fmt: skip  # noqa: E501
def test_begun_streams_are_a_function_of_the_words_alone(begin: Callable[[int], None]) -> None:
    begin(1)
    first = one_of_each()
    one_of_each()
    begin(1)
    assert one_of_each() == first
    begin(2)
    assert not set(one_of_each()) & set(first)


def test_an_unknown_form_of_state_is_refused_and_not_seeded_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_initial_words", lambda seed: np.zeros(624, dtype=np.uint64))
    streams._twister_offset.cache_clear()
    try:
        for set_up in (with_trainer, with_loop, with_passes):
            data = Drawing()
            with refused("DP016"):
                set_up(data, nothing)
            assert not data.drawn
    finally:
        streams._twister_offset.cache_clear()


def test_the_key_of_a_batch_is_forgotten_with_it_and_its_words_are_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytearray] = []
    monkeypatch.setattr("dptrainer.own_draws.begin_streams", lambda device, words: kept.append(words))
    draws = BatchDraws()
    draws.begin(make_run().next_receipt(), CPU)
    assert kept == [bytearray(streams.SECRET_BYTES)]
    assert draws._key
    draws.close()
    assert draws._key == b""


def test_words_of_two_batches_of_a_receipt_and_of_two_receipts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    monkeypatch.setattr("dptrainer.own_draws.begin_streams", lambda device, words: seen.append(bytes(words)))
    run, draws = make_run(), BatchDraws()
    for receipt in (run.next_receipt(), run.next_receipt()):
        for _ in range(2):
            draws.begin(receipt, CPU)
            draws.go_on(CPU)
    assert len(set(seen)) == 8
    assert all(len(set(words)) > 200 for words in seen)


def test_a_receipt_gives_its_draws_once() -> None:
    receipt = make_run().next_receipt()
    BatchDraws().open(receipt)
    with refused("DP077"):
        BatchDraws().open(receipt)


def test_rows_of_tensors_are_read_without_streams_of_their_own_and_the_model_draws_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[bool] = []
    monkeypatch.setattr(
        "dptrainer.own_draws.begin_batch", lambda key, number, device, reading=False: begun.append(reading)
    )
    draws, receipt = BatchDraws(), make_run().next_receipt()
    for reading in (True, False):
        draws.begin(receipt, CPU, reading=reading)
        draws.go_on(CPU)
    assert begun == [True, False, False]


def test_callbacks_find_no_key_of_what_was_drawn() -> None:
    model, keys = linear_model(), []
    trainer = PrivateTrainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), linear_data(), make_run(rate=1.0),
        callbacks=[lambda steps, epsilon: keys.append(trainer._draws._key)],
    )  # fmt: skip
    trainer.fit()
    assert keys == [b""] * 4
