"""Where noise may be made, and how it is asked for there; without a GPU and without Triton."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from dpbudget.errors import PrivacyViolation
from dpbudget.ledger.receipt import Receipt
from dptrainer.noise import gaussian, gpu
from dptrainer.noise.gaussian import add_gaussian_, add_gaussians_
from dptrainer.noise.source import SecureNoise
from dptrainer.trainer import PrivateTrainer
from dptrainer.values import ClippedSum
from tests.dptrainer.loop.loopkit import linear_data, linear_model, make_run, private, refused, unchanged

KEY = bytes(range(32))
CUDA = torch.device("cuda", 0)


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_reasons", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


# ---------------------------------------------------------------------------- refusals


def test_triton_is_not_loaded_before_a_gpu_asks_for_noise() -> None:
    program = (
        "import sys, torch; from dptrainer.noise.gaussian import add_gaussian_; from dptrainer import PrivateTrainer; "
        "add_gaussian_(torch.zeros(9), bytes(32), 0, 1.0); print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("kind", ["mps", "xpu", "meta"])
def test_an_accelerator_without_kernels_is_refused_with_the_way_out(kind: str) -> None:
    with pytest.raises(PrivacyViolation, match=f"noise cannot be made on {kind}: there are kernels") as caught:
        SecureNoise().check_devices([torch.device("cpu"), torch.device(kind)])
    assert caught.value.code == "DP016"
    assert "SecureNoise(generate_on_cpu=True)" in caught.value.hint
    SecureNoise(generate_on_cpu=True).check_devices([torch.device(kind)])


def test_a_gpu_without_triton_is_refused(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(PrivacyViolation, match="Triton is not installed") as caught:
        gpu.check([CUDA])
    assert caught.value.code == "DP016"
    assert "pip install 'dpbudget[gpu]'" in caught.value.hint


@pytest.mark.parametrize(
    ("agrees", "reason"),
    [(False, "gives other results than the CPU"), (OSError("no compiler"), r"not be compiled or run \(OSError\)")],
)
def test_kernels_that_fail_or_give_other_results_are_refused(
    untried: None, monkeypatch: pytest.MonkeyPatch, agrees: object, reason: str
) -> None:
    asked: list[torch.device] = []

    def test(device: torch.device) -> bool:
        asked.append(device)
        if isinstance(agrees, Exception):
            raise agrees
        return bool(agrees)

    monkeypatch.setattr(gpu, "agrees", test)
    monkeypatch.setitem(sys.modules, "triton", gpu)  # there, whatever it is
    for _ in range(2):
        with pytest.raises(PrivacyViolation, match=reason):
            gpu.check([CUDA])
    assert asked == [CUDA]


def test_a_device_is_tested_once_and_then_trusted(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(gpu, "agrees", lambda device: (asked.append(device), True)[1])
    monkeypatch.setitem(sys.modules, "triton", gpu)
    other = torch.device("cuda", 1)
    for _ in range(3):
        gpu.check([CUDA, other, CUDA])
    assert sorted(map(str, asked)) == ["cuda:0", "cuda:1"]


def test_interpreted_kernels_are_not_given_memory_of_a_gpu(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(PrivacyViolation, match="TRITON_INTERPRET"):
        gpu.check([CUDA])


def test_noise_is_never_recorded_into_a_graph_that_would_repeat_it(
    untried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_reasons", {CUDA: None})
    gpu.check([CUDA])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(PrivacyViolation, match="would repeat the noise"):
        gpu.check([CUDA])


def test_a_sum_where_no_noise_can_be_made_is_refused_before_its_receipt_is_used(
    new_receipt: Callable[..., Receipt],
) -> None:
    receipt = new_receipt()
    with pytest.raises(PrivacyViolation) as caught:
        SecureNoise().privatise(ClippedSum({"w": torch.zeros(4, device="meta")}, 1.0), receipt)
    assert caught.value.code == "DP016"
    assert not receipt.was_used("grad-noise")


def test_nothing_is_changed_where_one_of_the_devices_cannot_make_noise() -> None:
    here = torch.zeros(5)
    with pytest.raises(PrivacyViolation, match="meta"):
        add_gaussians_([here, torch.zeros(5, device="meta")], KEY, 1.0)
    assert not here.any()


def asking(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """What devices are asked about; none of them can make noise."""
    asked: list[torch.device] = []

    def refuse(devices: Iterable[torch.device]) -> None:
        asked.extend(devices)
        raise PrivacyViolation("no kernels", code="DP016", hint="none")

    monkeypatch.setattr(gpu, "check", refuse)
    return asked


@pytest.mark.parametrize("trainer", ["make_private", "PrivateTrainer"])
def test_a_trainer_asks_at_set_up_and_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch, trainer: str
) -> None:
    asked, model, run = asking(monkeypatch), linear_model(), make_run(rate=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unchanged(model), refused("DP016"):
        if trainer == "make_private":
            private(model, optimizer, run=run)
        else:
            PrivateTrainer(model, optimizer, torch.nn.CrossEntropyLoss(), linear_data(), run)
    assert asked == [p.device for p in model.parameters()]
    assert run.charged == 0
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_a_trainer_that_makes_its_noise_on_the_cpu_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, noise = asking(monkeypatch), SecureNoise(generate_on_cpu=True)
    model, run = linear_model(), make_run(rate=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    PrivateTrainer(model, optimizer, torch.nn.CrossEntropyLoss(), linear_data(), run, noise=noise).fit()
    assert asked == []


def test_noise_that_is_made_on_the_cpu_is_brought_back(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [add_gaussian_(torch.ones(50), KEY, i, 0.3) for i in range(2)]
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.clone())  # as of a tensor that was elsewhere
    found = [torch.ones(50), torch.ones(50)]
    assert add_gaussians_(found, KEY, 0.3, generate_on_cpu=True)
    assert all(map(torch.equal, found, expected))


# ---------------------------------------------------------------------------- launching


def test_a_row_says_where_a_tensor_is_and_where_its_noise_begins() -> None:
    pieces = [(torch.zeros(3), 7, 25), (torch.zeros(gpu.PROGRAM), 8, 10), (torch.zeros(1), 2**32 - 1, 10 * 2**64 - 1)]
    pieces.append((torch.zeros(gpu.PROGRAM), 9, 9))
    rows, programs = gpu.table(pieces, 0.1)
    bits = struct.unpack("<q", struct.pack("<d", 0.1))[0]
    at = [tensor.data_ptr() for tensor, _, _ in pieces]
    assert rows == [
        [0, at[0], 3, 2, 5, 7, bits],
        [1, at[1], gpu.PROGRAM, 1, 0, 8, bits],
        [2, at[2], 1, -1, 9, 2**32 - 1, bits],  # the last block there is, as int64
        [3, at[3], gpu.PROGRAM, 0, 9, 9, bits],
    ]
    assert programs == 5  # the last tensor begins within a block, and needs one more


@pytest.mark.parametrize(
    "piece",
    [
        (torch.zeros(2), -1, 0),
        (torch.zeros(2), 1 << 32, 0),
        (torch.zeros(2), 0, -1),
        (torch.zeros(2), 0, (10 << 64) - 1),
        (torch.zeros(4)[::2], 0, 0),
        (torch.zeros(2, dtype=torch.float16), 0, 0),
    ],
)
def test_a_tensor_whose_noise_no_kernel_can_make_is_refused(piece: Any) -> None:
    fine = torch.zeros(2)
    with pytest.raises(ValueError, match="no such noise"):
        gpu.add([(fine, 0, 0), piece], KEY, 1.0)
    with pytest.raises(ValueError, match="key of 31"):
        gpu.add([(fine, 0, 0)], KEY[1:], 1.0)
    assert not fine.any()


def test_a_parameter_that_reaches_beyond_its_counter_is_refused_before_any_noise() -> None:
    tensor, end = torch.zeros(20), 10 << 64
    with pytest.raises(ValueError, match="out of range"):
        add_gaussian_(tensor, KEY, 0, 1.0, offset=end - 19)
    assert not tensor.any()
    add_gaussian_(tensor, KEY, 0, 1.0, offset=end - 20)
    assert tensor.all()


def test_no_tensors_are_finite_and_take_no_launch() -> None:
    assert gpu.add([], KEY, 1.0)
    assert gpu.add([(torch.zeros(0), 0, 0)], KEY, 1.0)


def test_tensors_that_share_memory_are_done_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[int] = []
    monkeypatch.setattr(gpu, "add", lambda pieces, key, std: (launches.append(len(pieces)), len(launches) > 1)[1])
    base = torch.zeros(10)
    assert not gaussian._add_on_gpu([(base[:6], 0, 0), (base[5:], 1, 0)], KEY, 1.0)
    assert launches == [1, 1]  # also the second, though the first was not finite
    launches.clear()
    gaussian._add_on_gpu([(base[:5], 0, 0), (base[5:], 1, 0)], KEY, 1.0)
    assert launches == [2]
