"""What verification costs: a ledger of a million records, as a file and as an export, on one core.

``python -m tests.benchmarks.verify [--records N]`` makes the ledger once, then verifies it in fresh processes: newest
head, every owner signature, every rule, epsilon by two accountants. It prints seconds and peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import dpbudget
from dpbudget.ledger.entries import Entry
from dpbudget.ledger.head import sign_head
from dpbudget.ledger.signing import Ed25519Signer
from dpbudget.ledger.store.sqlite import SqliteStore
from dpbudget.ledger.tree import Frontier, leaf_hash

CHILD = """
import json, re, sys, time
begin = time.perf_counter()
import dpbudget
from dpbudget.ledger.keys import load_public_key
report = dpbudget.verify(sys.argv[1], trust=load_public_key(sys.argv[2]))
seconds = time.perf_counter() - begin
# The peak of the memory map, which begins anew at exec; getrusage would tell that of the parent too.
peak = int(re.search(r"VmHWM:\\s+([0-9]+)", open("/proc/self/status").read())[1]) / 1024
print(json.dumps({"ok": report.ok, "steps": report.steps, "seconds": seconds, "peak_mib": peak}))
"""


def grow(path: Path, owner: Ed25519Signer, writer: Ed25519Signer, records: int, lease: int) -> None:
    """A ledger with one plan and ``records`` records: leases of ``lease`` steps, each reserved and settled."""
    steps = records * lease // (lease + 2)
    plan = dpbudget.calibrate(epsilon=3.0, delta=1e-5, dataset_size=10**8, batch_size=100, steps=steps)
    with dpbudget.create_ledger(
        path, budget=dpbudget.Budget(epsilon=3.0, delta=1e-5), owner=owner, writer=writer, whole_budget=True
    ) as ledger:
        run_id = ledger.sign_plan(plan, owner=owner)
        with ledger.start(run_id, lease_steps=lease) as run:
            for _ in range(lease):
                run.next_receipt()
        state, tree, last = ledger.state, ledger.state.tree, ledger.state.last
    first, entries = lease, []

    def add(line: str) -> None:
        nonlocal tree, last
        data = line.encode("ascii")
        last = leaf_hash(data)
        tree = tree.append(last)
        entries.append(Entry(data))

    while first + lease <= steps:
        common = f'"prev":"{last.hex()}","run":"{run_id}","seq":{tree.size},'
        add(
            f'{{"claim":null,"commitment":"{os.urandom(32).hex()}","count":{lease},"first":{first},'
            f'"nonce":"{os.urandom(32).hex()}",{common}"type":"lease","v":1}}'
        )
        common = f'"prev":"{last.hex()}","run":"{run_id}","seq":{tree.size},'
        add(f'{{"count":{lease},{common}"step":{first},"type":"reserve","v":1}}')
        for step in range(first, first + lease):
            common = f'"prev":"{last.hex()}","run":"{run_id}","seq":{tree.size},'
            fresh = os.urandom(16).hex()
            add(f'{{"fresh":"{fresh}","output":null,{common}"step":{step},"type":"settle","v":1}}')
        first += lease
    assert isinstance(tree, Frontier)
    head = sign_head(state.genesis.ledger_id, tree.size, tree.root, writer)
    store = SqliteStore.open(path)
    with store.transaction() as transaction:
        transaction.append(entries, head.note.encode(), size=tree.size, keep=True)
    store.close()


def measure(target: Path, key: Path) -> dict[str, float]:
    """One verification in a fresh process on one core."""
    pin = ["taskset", "-c", "0"] if sys.platform == "linux" else []
    done = subprocess.run([*pin, sys.executable, "-c", CHILD, str(target), str(key)], capture_output=True, check=True)
    answer: dict[str, float] = json.loads(done.stdout)
    assert answer["ok"], answer
    return answer


def main() -> None:
    """One line for the file and one for the export, for long and for short leases."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    owner, writer = Ed25519Signer.generate(), Ed25519Signer.generate()
    print(f"{'ledger':>8}{'lease':>7}{'MB':>7}{'s':>8}{'min':>7}{'max':>7}{'peak MiB':>10}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        key = folder / "owner.pub"
        key.write_text(f"dpbudget-ed25519 {owner.public.hex}\n")
        for lease in (64, 1):
            path, export = folder / f"{lease}.ledger", folder / f"{lease}.jsonl"
            grow(path, owner, writer, chosen.records, lease)
            begin = time.perf_counter()
            with dpbudget.open_ledger(path, writer=writer) as ledger:
                ledger.export(export)
            print(f"  export written in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
            for target in (path, export):
                rows = [measure(target, key) for _ in range(chosen.rounds)]
                seconds = [row["seconds"] for row in rows]
                peak = max(row["peak_mib"] for row in rows)
                kind = "file" if target is path else "export"
                print(
                    f"{kind:>8}{lease:>7}{target.stat().st_size / 1e6:>7.0f}{statistics.median(seconds):>8.2f}"
                    f"{min(seconds):>7.2f}{max(seconds):>7.2f}{peak:>10.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
