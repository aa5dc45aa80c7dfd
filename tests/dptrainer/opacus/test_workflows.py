"""The workflows that Opacus is taught with, each as its user would write it: one import differs, the loop is theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dptrainer.opacus import PrivacyEngine
from dptrainer.opacus.layers import DPLSTM
from dptrainer.opacus.utils.batch_memory_manager import BatchMemoryManager
from dptrainer.opacus.validators import ModuleValidator


@pytest.fixture(autouse=True)
def _same_weights_every_time() -> None:
    torch.manual_seed(0)


def bars(rows: int, size: int, channels: int = 1) -> TensorDataset:
    """Images with a bright bar, across (0) or down (1)."""
    labels = torch.arange(rows) % 2
    images = 0.3 * torch.randn(rows, channels, size, size)
    for image, label in zip(images, labels, strict=True):
        place = int(torch.randint(1, size - 1, ()))
        view = image if label == 0 else image.transpose(1, 2)
        view[:, place] += 2.0
    return TensorDataset(images, labels)


# ------------------------------------------------------------------------------------------- digits


class DigitNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 5, 2, padding=2)
        self.second = nn.Conv2d(8, 8, 3, 2)
        self.hidden = nn.Linear(8 * 3 * 3, 16)
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2, 1)
        x = F.relu(self.second(x)).flatten(1)
        return self.out(F.relu(self.hidden(x)))  # type: ignore[no-any-return]


def test_digits_with_a_noise_multiplier_of_ones_own() -> None:
    train_loader = DataLoader(bars(400, 16), batch_size=50, num_workers=0, pin_memory=False)
    test_loader = DataLoader(bars(64, 16), batch_size=64)
    model = DigitNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0)
    privacy_engine = PrivacyEngine(secure_mode=False)
    model, optimizer, train_loader = privacy_engine.make_private(
        module=model, optimizer=optimizer, data_loader=train_loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    criterion = nn.CrossEntropyLoss()
    epsilons = []
    for _ in range(7):
        model.train()
        losses = []
        for inputs, target in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(inputs), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        epsilons.append(privacy_engine.get_epsilon(delta=1e-4))
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test_loader)
    assert right >= 56
    assert 0.0 < epsilons[0] < epsilons[-1] < 8.0


# ------------------------------------------------------------------------------------------- small colour images


def convnet(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(16, classes),
    )


def test_colour_images_in_physical_batches_with_a_target_epsilon_and_a_schedule(tmp_path: Any) -> None:
    train_loader = DataLoader(bars(120, 8, 3), batch_size=12, shuffle=True)
    model = convnet(2)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
    assert ModuleValidator.validate(model, strict=False) == []
    model = ModuleValidator.fix(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    privacy_engine = PrivacyEngine()
    model, optimizer, train_loader = privacy_engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=train_loader,
        epochs=2,
        target_epsilon=8.0,
        target_delta=1e-4,
        max_grad_norm=1.2,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    criterion = nn.CrossEntropyLoss()
    for epoch in range(2):
        with BatchMemoryManager(
            data_loader=train_loader, max_physical_batch_size=5, optimizer=optimizer
        ) as memory_safe_loader:
            for images, target in memory_safe_loader:
                optimizer.zero_grad()
                output = model(images)
                assert len(images) <= 5
                criterion(output, target).backward()
                optimizer.step()
        schedule.step()
        privacy_engine.save_checkpoint(
            path=tmp_path / f"{epoch}.pt", module=model, optimizer=optimizer, checkpoint_dict={"epoch": epoch}
        )
    assert len(privacy_engine.accountant) == 20
    assert 7.9 < privacy_engine.get_epsilon(1e-4) <= 8.0
    assert privacy_engine.load_checkpoint(path=tmp_path / "0.pt", module=model, optimizer=optimizer)["epoch"] == 0


# ------------------------------------------------------------------------------------------- reviews


class Reviews(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Token lists of many lengths; the word 3 makes a review good."""

    def __init__(self, rows: int) -> None:
        self.items = []
        for row in range(rows):
            words = torch.randint(4, 50, (int(torch.randint(5, 12, ())),))
            if row % 2:
                words[0] = 3
            self.items.append((words, torch.tensor(row % 2)))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.items[index]


def padded(batch: list[tuple[Tensor, Tensor]], length: int = 12) -> tuple[Tensor, Tensor]:
    """To a fixed length: with the longest of the batch, one review would change the others' rows."""
    rows = torch.stack([F.pad(words, (0, length - len(words))) for words, _ in batch])
    return rows, torch.stack([label for _, label in batch])


class ReviewNet(nn.Module):
    def __init__(self, lstm: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8, padding_idx=0)
        self.lstm = lstm(8, 8, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(x))
        return self.out(states.amax(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("lstm", [nn.LSTM, DPLSTM], ids=["torch", "dp"])
def test_reviews_with_an_embedding_and_an_lstm(lstm: type[nn.Module]) -> None:
    train_loader = DataLoader(Reviews(60), batch_size=12, collate_fn=padded, shuffle=True)
    model = ReviewNet(lstm)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    privacy_engine = PrivacyEngine(accountant="rdp")
    model, optimizer, train_loader = privacy_engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=train_loader,
        noise_multiplier=1.5,
        max_grad_norm=1.0,
        poisson_sampling=True,
    )
    criterion = nn.CrossEntropyLoss()
    before = model.embedding.weight[3].detach().clone()
    for data, label in train_loader:
        optimizer.zero_grad()
        predictions = model(data).squeeze(1)
        loss = criterion(predictions, label)
        loss.backward()
        optimizer.step()
    assert len(privacy_engine.accountant) == 5
    assert not torch.equal(before, model.embedding.weight[3])


def test_reviews_as_a_bag_of_words_in_ghost_mode() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.hidden, self.out = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.hidden(self.emb(x).mean(1))))  # type: ignore[no-any-return]

    train_loader = DataLoader(Reviews(60), batch_size=6, collate_fn=padded)
    model = Pooled()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    privacy_engine = PrivacyEngine()
    model, optimizer, criterion, train_loader = privacy_engine.make_private(
        module=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        data_loader=train_loader,
        noise_multiplier=1.5,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
    )
    for data, label in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(data), label)
        loss.backward()
        optimizer.step()
    assert len(privacy_engine.accountant) == 10


# ------------------------------------------------------------------------------------------- names, letter by letter


class NameNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(28, 8)
        self.lstm = DPLSTM(8, 12, num_layers=2, batch_first=True)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor, hidden: Any = None) -> Tensor:
        states, _ = self.lstm(self.embedding(x), hidden)
        return self.out(states[:, -1])  # type: ignore[no-any-return]


def test_names_letter_by_letter_with_a_two_layer_lstm() -> None:
    letters = torch.randint(1, 28, (60, 6))
    train_loader = DataLoader(TensorDataset(letters, letters[:, -1] % 3), batch_size=6, shuffle=True)
    model = NameNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    privacy_engine = PrivacyEngine()
    model, optimizer, train_loader = privacy_engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=train_loader,
        target_epsilon=5.0,
        target_delta=8e-5,
        epochs=2,
        max_grad_norm=1.5,
    )
    criterion = nn.CrossEntropyLoss()
    for _ in range(2):
        for names, labels in train_loader:
            model.zero_grad()
            loss = criterion(model(names), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert privacy_engine.get_epsilon(delta=8e-5) <= 5.0
    assert len(privacy_engine.accountant) == 20


# ------------------------------------------------------------------------------------------- a generator


class Images(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((1, 8, 8), 0.1 * (index % 10))


def test_a_generator_learns_from_a_private_discriminator() -> None:
    dataloader: Any = DataLoader(Images(), batch_size=8, shuffle=True)
    netD = nn.Sequential(
        nn.Conv2d(1, 4, 4, 2, 1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(4, 8, 4, 2, 1),
        nn.GroupNorm(4, 8),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(8, 1, 2),
        nn.Sigmoid(),
        nn.Flatten(0),
    )
    netG = nn.Sequential(nn.ConvTranspose2d(5, 4, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 1, 4, 2, 1))
    optimizerD: Any = torch.optim.Adam(netD.parameters(), lr=2e-3, betas=(0.5, 0.999))
    optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-3, betas=(0.5, 0.999))
    privacy_engine = PrivacyEngine()
    netD, optimizerD, dataloader = privacy_engine.make_private(
        module=netD, optimizer=optimizerD, data_loader=dataloader, noise_multiplier=2.0, max_grad_norm=1.0
    )
    criterion = nn.BCELoss()
    first = [parameter.detach().clone() for parameter in netG.parameters()]
    for real in dataloader:
        optimizerD.zero_grad(set_to_none=True)
        size = real.size(0)
        error_real = criterion(netD(real), torch.ones(size))
        fake = netG(torch.randn(size, 5, 1, 1))
        error_fake = criterion(netD(fake.detach()), torch.zeros(size))
        (error_real + error_fake).backward()
        optimizerD.step()
        optimizerD.zero_grad(set_to_none=True)
        private = [parameter.detach().clone() for parameter in netD.parameters()]

        optimizerG.zero_grad()
        fake = netG(torch.randn(8, 5, 1, 1))  # a fixed number: that of the private batch is private
        criterion(netD(fake), torch.ones(8)).backward()
        optimizerG.step()
        assert all(torch.equal(p, now) for p, now in zip(private, netD.parameters(), strict=True))
    assert len(privacy_engine.accountant) == 5
    assert all(not torch.equal(a, b) for a, b in zip(first, netG.parameters(), strict=True))
