"""What ``compare`` says that other tools report is what they report, where they are installed."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import peers
import pytest

from dpbudget._compare import Comparison, compare

pytest.importorskip("dp_accounting", reason="the peers are extras of development")
pytest.importorskip("opacus")

SCHEDULES = {
    "mnist": ([(256 / 60000, 0.695, 2344)], 1e-5),
    "cifar": ([(4096 / 50000, 5.7, 2500)], 1e-5),
    "phases": ([(0.01, 1.0, 500), (0.02, 1.5, 500)], 1e-6),
    "plain": ([(1.0, 8.0, 60)], 1e-5),
    "short": ([(0.1, 1.2, 3)], 1e-4),
    "weak": ([(0.001, 4.0, 100)], 1e-5),
}
#: Name of a row, the peer, and how near it is: floating-point noise; what its grid is wrong by; orders whose series
#: does not converge, which dp-accounting leaves out.
ROWS = [
    ("opacus-rdp", peers.opacus_rdp, 1e-7),
    ("dp-accounting-rdp", peers.dp_accounting_rdp, 1e-4),
    ("tf-poisson", peers.dp_accounting_rdp, 1e-4),
    ("opacus-prv", peers.opacus_prv, 2e-3),
    ("gdp", peers.opacus_gdp, 1e-6),
]


@cache
def compared(schedule: str) -> Comparison:
    steps, delta = SCHEDULES[schedule]
    return compare(steps, delta=delta)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize(("name", "peer", "near"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_is_what_the_tool_reports(schedule: str, name: str, peer: peers.Peer, near: float) -> None:
    steps, delta = SCHEDULES[schedule]
    if schedule == "phases" and name == "gdp":
        pytest.skip("Opacus's gdp takes one phase")
    (row,) = [row for row in compared(schedule).rows if row.name == name]
    claimed = peer(steps, delta)[1]
    assert row.epsilon == pytest.approx(claimed, rel=near, abs=near)
    if name.endswith("rdp"):
        assert claimed >= row.epsilon * (1.0 - 1e-9), "our moments are bounds, so its own cannot be less"


@pytest.mark.parametrize(("sigma", "passes"), [(0.695, 10), (4.0, 1), (60.0, 300)])
def test_once_per_epoch_is_a_gaussian_a_pass_in_dp_accounting(sigma: float, passes: int) -> None:
    """TensorFlow Privacy asks dp-accounting's RdpAccountant for this event, and prints what it says."""
    (row,) = [row for row in compare([(0.01, sigma, 100 * passes)], delta=1e-5).rows if row.name == "tf-once-per-epoch"]
    assert row.epsilon == pytest.approx(peers.dp_accounting_rdp([(1.0, sigma, passes)], 1e-5)[1], rel=1e-7)


def test_the_loader_of_opacus_has_this_rate_and_so_many_steps() -> None:
    import torch
    from opacus.data_loader import DPDataLoader
    from torch.utils.data import DataLoader, TensorDataset

    plain = DataLoader(TensorDataset(torch.zeros(1437, 1)), batch_size=64)
    loader = DPDataLoader.from_data_loader(plain)
    found = compare([(64 / 1437, 2.0, 225)], delta=1e-5, loader=(1437, 64, Fraction(10)))
    (row,) = [row for row in found.rows if row.name == "opacus-loader"]
    assert loader.sample_rate == 1 / 23
    assert len(loader) * 10 == 230
    assert "rate 1/23, 230 steps, in place of 64/1437, 225" in row.note
