"""What the tests of the second verifier share: both verdicts on one export, and ledgers that any keys sign again."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpbudget.errors import DPBudgetError
from dpbudget.ledger.entries import Entry
from dpbudget.ledger.head import sign_head
from dpbudget.ledger.journal import replay
from dpbudget.ledger.signing import RECORD_TYPE, STATEMENT_TYPE, Signer, sign_envelope
from dpbudget.ledger.store.base import Snapshot
from dpbudget.ledger.store.jsonl import read_export, write_export
from dpbudget.ledger.tree import NO_LEAF, Frontier, leaf_hash

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "dpbudget" / "ledger")]
import verifier  # noqa: E402
from ledgerkit import OWNER, WRITER, make_plan  # noqa: E402

#: A run, two epsilons, a delta of 2^-20 and zero, as they stand in records.
RUN, EPSILON, HALF, DELTA, ZERO = "ab" * 16, (2.0).hex(), (1.0).hex(), (2.0**-20).hex(), (0.0).hex()


def ours(export: bytes) -> dict[str, Any] | None:
    """What the package says of an export; None for a refusal."""
    try:
        snapshot = read_export(export)
        state, head = replay(snapshot.entries, snapshot.note, OWNER.public)
    except DPBudgetError:
        return None
    return {
        "root": head.root,
        "epsilon": state.epsilon,
        "delta": state.delta,
        "claims": [portfolio.claim for portfolio in state.portfolios if portfolio.claim is not None],
        "charged": {run_id: run.charged for run_id, run in state.runs.items()},
        "noise": {
            run_id: [value for value in (run.commitment, run.entropy) if value is not None]
            for run_id, run in state.runs.items()
            if run.commitment is not None
        },
        "owner": state.owner.hex,
        "writer": state.writer.hex,
    }


def theirs(export: bytes) -> dict[str, Any] | None:
    """What the second verifier says; whatever it raises is a refusal."""
    try:
        return dict(verifier.verify(export, OWNER.public.raw))
    except RecursionError:
        raise
    except Exception:
        return None


def agree(export: bytes) -> bool:
    found = ours(export)
    assert theirs(export) == found
    return found is not None


def exported(entries: Sequence[Entry], note: bytes) -> bytes:
    file = io.BytesIO()
    write_export(Snapshot(tuple(entries), note, (note,)).reading(), file)
    return file.getvalue()


def canonical(value: Any) -> bytes:
    """Canonical JSON of anything, valid or not."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


class History:
    """A ledger written record by record: fields as they stand in the file, each envelope by whom the test says."""

    def __init__(self, filter: str = "portfolio", *, owner: str = OWNER.public.hex, **facts: Any) -> None:
        self.entries: list[Entry] = []
        self._tree, self._last, self._drawn = Frontier(), NO_LEAF, 0
        genesis = {"dataset": "dd" * 32, "adjacency": "add-remove", "unit": "example", "public_data": False}
        genesis |= {"epsilon": EPSILON, "delta": DELTA, "filter": filter, "owner": owner, "writer": WRITER.public.hex}
        self.add("genesis", OWNER, **(genesis | facts))

    def add(self, kind: str, *signers: Signer, envelope: bytes | None = None, **fields: Any) -> History:
        record = {"v": 1, "type": kind, "seq": len(self.entries), "prev": self._last.hex(), **fields}
        line = canonical(record)
        self.entries.append(Entry(line, sign_envelope(line, RECORD_TYPE, *signers) if signers else envelope))
        self._last = leaf_hash(line)
        self._tree = self._tree.append(self._last)
        return self

    def renyi(self, *allowances: str) -> History:
        """The second record of a ledger with the filter rdp: an order for each allowance, with equal shares."""
        orders = [(2.0 + at).hex() for at in range(len(allowances))]
        return self.add("renyi", OWNER, orders=orders, shares=[1] * len(orders), allowances=list(allowances))

    def portfolio(self, index: int = 1, *, epsilon: Any = None, delta: Any = DELTA) -> History:
        return self.add("portfolio", OWNER, index=index, epsilon=epsilon, delta=delta)

    def plan(
        self, run: str = RUN, *, portfolio: int | None = None, steps: Sequence[int] = (4,), **facts: Any
    ) -> History:
        """A plan with one phase for each of ``steps``; other facts are put into its predicate as they are."""
        ledger_id = leaf_hash(self.entries[0].line).hex()
        predicate = make_plan(delta=2.0**-20).to_jsonable() | facts
        if "phases" not in facts:
            predicate["phases"] = [predicate["phases"][0] | {"steps": count} for count in steps]
        rdp = json.loads(self.entries[0].line)["filter"] == "rdp"
        statement = {
            "_type": "https://in-toto.io/Statement/v1",
            "predicate": predicate,
            "predicateType": "urn:dpbudget:rdp-plan:v1" if rdp else "urn:dpbudget:plan:v1",
            "subject": [{"name": f"dpbudget-run/{run}", "digest": {"sha256": ledger_id}}],
        }
        payload = canonical(statement)
        place = portfolio if portfolio is not None else 0 if rdp else 1
        digest = hashlib.sha256(payload).hexdigest()
        envelope = sign_envelope(payload, STATEMENT_TYPE, OWNER)
        return self.add("plan", envelope=envelope, run=run, statement=digest, portfolio=place)

    def rdp_plan(self, *costs: Sequence[Any], steps: Sequence[int] = (4,), **facts: Any) -> History:
        """A plan with a row of costs for each phase, and tails of nothing."""
        tails = {"tails": [ZERO] * len(costs), "factors": [ZERO] * len(costs)}
        return self.plan(steps=steps, **(tails | {"costs": list(costs)} | facts))

    def lease(self, first: int = 0, count: int = 1, *, run: str = RUN, claim: Any = None, **drawn: Any) -> History:
        self._drawn += 1
        random = {"nonce": f"{2 * self._drawn:064x}", "commitment": f"{2 * self._drawn + 1:064x}"}
        return self.add("lease", run=run, first=first, count=count, claim=claim, **(random | drawn))

    def head(self, writer: Signer = WRITER) -> bytes:
        return sign_head(leaf_hash(self.entries[0].line).hex(), self._tree.size, self._tree.root, writer).note.encode()

    def export(self, writer: Signer = WRITER) -> bytes:
        return exported(self.entries, self.head(writer))

    def holds(self, writer: Signer = WRITER) -> bool:
        """What both verifiers say."""
        return agree(self.export(writer))
