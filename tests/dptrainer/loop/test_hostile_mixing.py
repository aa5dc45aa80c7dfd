"""Models and losses through which one record moves the sum by more than the clipping norm: refused before any step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import NoNoise, linear_model, make_run
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from dpbudget.errors import DPBudgetWarning, PrivacyViolation
from dptrainer.private import make_private
from dptrainer.trainer import PrivateTrainer


class Named(Dataset[Any]):
    """Records as mappings, in the manner of Hugging Face."""

    def __init__(self, **columns: Tensor) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self._columns.items()}


class Mixing(nn.Module):
    """Takes the batch mean away, like a batch norm that is written by hand."""

    def __init__(self, *, noisy: bool = False) -> None:
        super().__init__()
        self.head, self._noisy = linear_model(), noisy

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.head(x)
        hidden = hidden - hidden.mean(0)
        return hidden + torch.randn_like(hidden) if self._noisy else hidden


class MixingWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x).mean(1)
        return self.head(hidden - hidden.mean(0))


class Remembering(nn.Module):
    """A running mean in an attribute that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.running = linear_model(), torch.zeros(5)

    def forward(self, x: Tensor) -> Tensor:
        self.running = 0.9 * self.running + 0.1 * x.detach().mean(0)
        return self.head(x - self.running)


class FirstPosition(nn.Module):
    """Takes the first row of a table lookup that all examples share: its whole gradient lands on one example."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(7, 4), nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1]).unsqueeze(0))[0]
        return self.head(torch.tanh(self.words(x) + places).mean(1))


class Drawing(nn.Module):
    """Draws from the random stream outside of a dropout layer, and keeps examples apart."""

    def __init__(self) -> None:
        super().__init__()
        self.head = linear_model()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + 0.1 * torch.randn_like(x))


def inputs() -> Tensor:
    return torch.randn(40, 5, generator=torch.Generator().manual_seed(0))


def words() -> Tensor:
    return torch.randint(0, 7, (40, 6), generator=torch.Generator().manual_seed(0))


def classes() -> Tensor:
    return torch.arange(40) % 3


def set_up(model: nn.Module, data: Dataset[Any], *, trainer: bool, loss: Any = None, **options: Any) -> Any:
    optimizer, run = torch.optim.SGD(model.parameters(), lr=0.1), make_run(1, rate=1.0, clip_norm=20.0)
    if trainer:
        return PrivateTrainer(model, optimizer, loss or nn.CrossEntropyLoss(), data, run, noise=NoNoise(), **options)
    return make_private(model, optimizer, data, run=run, noise=NoNoise(), **options)[2]


MIXING: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], Dataset[Any]]]] = {
    "floats": ("DP033", Mixing, lambda: TensorDataset(inputs(), classes())),
    "floats by name": ("DP033", Mixing, lambda: Named(x=inputs(), labels=classes())),
    "words": ("DP033", MixingWords, lambda: TensorDataset(words(), classes())),
    "words by name": ("DP033", MixingWords, lambda: Named(x=words(), labels=classes())),
    "a model that draws": ("DP033", lambda: Mixing(noisy=True), lambda: TensorDataset(inputs(), classes())),
    "memory": ("DP013", Remembering, lambda: TensorDataset(inputs(), classes())),
    "gradients booked on another": ("DP019", FirstPosition, lambda: TensorDataset(words(), classes())),
}


@pytest.mark.parametrize("trainer", [True, False])
@pytest.mark.parametrize("case", MIXING)
def test_a_model_that_lets_examples_meet_is_refused_at_set_up(case: str, trainer: bool) -> None:
    code, build, data = MIXING[case]
    with pytest.raises(PrivacyViolation) as caught:
        set_up(build(), data(), trainer=trainer)
    assert caught.value.code == code
    assert caught.value.hint


def test_a_model_without_targets_is_tested_too() -> None:
    with pytest.raises(PrivacyViolation, match="DP033"):
        set_up(Mixing(), TensorDataset(inputs()), trainer=False)


def contrastive(outputs: Tensor, _: Tensor) -> Tensor:
    z = F.normalize(outputs, dim=1)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)), reduction="none")


LOSSES: dict[str, tuple[int, Any, Tensor]] = {
    "[B, 1] against [B]": (1, nn.MSELoss(), classes().float()),
    "in-batch negatives": (3, contrastive, classes()),
    "batch statistics": (3, lambda o, y: (o - o.mean(0)).square().sum(1), classes()),
    "division by the size": (3, lambda o, y: F.cross_entropy(o, y, reduction="none") / len(o), classes()),
    "statistics of targets": (1, lambda o, y: (o.squeeze(1) - y / (1 + y.abs().sum())).square(), classes().float()),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("case", LOSSES)
def test_a_vector_of_losses_that_mixes_examples_is_refused(case: str) -> None:
    outputs, loss, target = LOSSES[case]
    with pytest.raises(PrivacyViolation, match="DP033"):
        set_up(linear_model(classes=outputs), TensorDataset(inputs(), target), trainer=True, loss=loss)


def test_what_keeps_examples_apart_is_accepted_and_the_random_stream_stays() -> None:
    before, said = torch.random.get_rng_state(), list[str]()
    for trainer in (True, False):
        set_up(linear_model(), TensorDataset(inputs(), classes()), trainer=trainer, note=said.append)
        set_up(linear_model(), Named(input=inputs(), labels=classes()), trainer=trainer, note=said.append)
        set_up(Drawing(), TensorDataset(inputs(), classes()), trainer=False, note=said.append)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [line for line in said if "loss_fn was not given" not in line] == []


def test_an_untested_model_is_mentioned() -> None:
    class NeedsMore(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = linear_model()

        def forward(self, x: Tensor, y: Tensor, *, scale: float) -> Tensor:
            return self.head(x) * scale

    said: list[str] = []
    set_up(NeedsMore(), TensorDataset(inputs(), classes()), trainer=False, note=said.append)
    about_the_model, _ = said
    assert "not tested" in about_the_model
    with pytest.warns(UserWarning, match="not tested"):
        set_up(NeedsMore(), TensorDataset(inputs(), classes()), trainer=False)
    with pytest.warns(UserWarning, match="nobody tested"):
        set_up(linear_model(), TensorDataset(inputs(), classes()), trainer=True, loss=_refuses_all)


@pytest.mark.parametrize("trainer", [True, False])
def test_a_model_that_does_not_take_the_records_is_quoted_at_the_line_that_passed_it(trainer: bool) -> None:
    state = torch.random.get_rng_state()
    with pytest.warns(DPBudgetWarning, match=r"The call failed: RuntimeError: .*[Dd]ouble.*\. Pass note") as caught:
        set_up(linear_model(), TensorDataset(inputs().double(), classes()), trainer=trainer)
    assert {warning.filename for warning in caught} == {__file__}
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_criterion_that_does_not_take_the_outputs_is_quoted() -> None:
    said: list[str] = []
    for data in (TensorDataset(inputs(), classes()), Named(input=inputs(), labels=classes())):
        set_up(linear_model(), data, trainer=False, loss_fn=_refuses_all, note=said.append)
        assert said[-1].endswith("The call failed: ValueError: this loss knows synthetic records from others.")


def _refuses_all(outputs: Tensor, target: Tensor) -> Tensor:
    raise ValueError("this loss knows synthetic records from others")
