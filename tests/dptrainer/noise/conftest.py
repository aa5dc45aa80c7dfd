"""Receipts without a ledger."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from dpbudget.ledger.noise_keys import LeaseKey
from dpbudget.ledger.receipt import Receipt
from dpbudget.mechanisms import Adjacency


@pytest.fixture
def new_receipt() -> Callable[..., Receipt]:
    def make(**changes: object) -> Receipt:
        facts: dict[str, object] = {
            "run_id": "run",
            "step": 0,
            "steps": 10,
            "rate_k": 1 << 63,
            "noise_multiplier": 1.0,
            "clip_norm": 1.0,
            "nominal_size": 100,
            "max_parameters": 1 << 20,
            "noise": "secure",
            "adjacency": Adjacency.ADD_REMOVE,
            "plan_digest": "0" * 64,
            "lease_nonce": bytes(32),
            "fresh": os.urandom(16),
            "key": LeaseKey(),
        }
        return Receipt(**{**facts, **changes})  # type: ignore[arg-type]

    return make
