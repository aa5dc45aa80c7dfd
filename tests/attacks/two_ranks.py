"""One rank of a group that trains on records of zeros; prints the released moves of the weights. Attack 22.

A model that averages gradients over ranks is refused: every rank would add whole noise to a step that all of them
share. What is left is one model a rank, each with its own steps of the plan.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F
from attackkit import reopen
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from dpbudget.errors import PrivacyViolation
from dptrainer import PrivateTrainer


def main(rank: int, folder: Path, steps: int) -> None:
    """Take ``steps`` steps of the ledger's only run, beside another rank that does the same."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meeting")
    data = TensorDataset(torch.zeros(40, 50, dtype=torch.float64), torch.zeros(40, dtype=torch.int64))
    linear = torch.nn.Linear(50, 10, bias=False, dtype=torch.float64)
    model, optimizer = linear, torch.optim.SGD(linear.parameters(), lr=1.0)
    shared = DistributedDataParallel(torch.nn.Linear(50, 10, bias=False, dtype=torch.float64))
    weights = [linear.weight.detach().clone()]

    def keep(taken: int, epsilon: object) -> bool:
        weights.append(linear.weight.detach().clone())
        return taken < steps

    with reopen(folder / "ledger") as ledger:
        run = ledger.start(next(iter(ledger.state.runs)), lease_steps=1)
        refused = ""
        try:
            PrivateTrainer(shared, torch.optim.SGD(shared.parameters(), lr=1.0), F.cross_entropy, data, run)
        except PrivacyViolation as error:
            refused = error.code
        PrivateTrainer(model, optimizer, F.cross_entropy, data, run, callbacks=[keep]).fit()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    print(json.dumps({"refused": refused, "moved": torch.stack(weights).diff(dim=0).tolist()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
