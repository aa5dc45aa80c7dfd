"""Whatever bytes are given: an answer or an error of the package, and nothing is accepted that was not there.

By default hypothesis bends valid inputs; ``make test-slow`` adds a minute of coverage-guided fuzzing for each reader.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpbudget.errors import DPBudgetError
from dpbudget.ledger.entries import Entry
from dpbudget.ledger.journal import replay
from tests.fuzz.mutations import damaged, relined, signed_again
from tests.fuzz.targets import _LEDGERS, OWNER, TARGETS, WRITER, survive

ROOT = Path(__file__).resolve().parents[2]
FILES = ("database", "key", "noise-key")
QUICK = [name for name in TARGETS if name not in FILES]
relaxed = settings(deadline=10_000, suppress_health_check=list(HealthCheck))
SEEN: dict[str, set[bytes]] = {name: set(target.seeds) for name, target in TARGETS.items()}


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_is_accepted(name: str) -> None:
    assert all(survive(name, seed) for seed in TARGETS[name].seeds)


@pytest.mark.parametrize("name", QUICK)
@settings(relaxed, max_examples=250)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_mean_what_they_say(name: str, data: st.DataObject) -> None:
    bent = data.draw(damaged(TARGETS[name].seeds))
    accepted = survive(name, bent)
    # A signature covers these wholly: only what was signed is accepted.
    if name in ("export", "envelope", "run-proof", "attestation"):
        assert not accepted or bent in SEEN[name]


@pytest.mark.parametrize("name", FILES)
@settings(relaxed, max_examples=60)
@given(data=st.data())
def test_damaged_files_are_refused_or_mean_what_they_say(name: str, data: st.DataObject) -> None:
    assert survive(name, data.draw(damaged(TARGETS[name].seeds))) in (True, False)


@pytest.mark.parametrize("name", ["export", "run-proof", "request"])
@settings(relaxed, max_examples=150)
@given(data=st.data())
def test_lines_that_were_moved_are_noticed(name: str, data: st.DataObject) -> None:
    bent = data.draw(relined(TARGETS[name].seeds))
    assert not survive(name, bent) or name == "request" or bent in SEEN[name]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["portfolio", "rdp", "committed"])
@settings(relaxed, max_examples=400)
@given(data=st.data())
def test_ledgers_that_were_signed_again_obey_the_rules_or_are_refused(which: int, data: st.DataObject) -> None:
    """With every hash and signature right, what is accepted still keeps within plans and totals."""
    entries, note = data.draw(signed_again(_LEDGERS[which].entries, OWNER, WRITER))
    try:
        state, head = replay(entries, note, OWNER.public)
    except DPBudgetError:
        return
    assert head.size == len(entries)
    assert state.remaining_epsilon >= 0
    assert state.remaining_delta >= 0
    assert state.account is None or state.account.fits
    for run in state.runs.values():
        assert 0 <= run.reserved <= run.charged <= run.plan.steps
        assert run.commitment is None or run.entropy is not None or run.charged == 0


@settings(relaxed, max_examples=200)
@given(st.binary(max_size=300), st.sampled_from(sorted(TARGETS)))
def test_noise_is_refused_everywhere(noise: bytes, name: str) -> None:
    assert survive(name, noise) in (True, False)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_minute_of_coverage_guided_fuzzing_finds_nothing(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has wheels for some platforms only")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", name, "--seconds", "60"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    said = done.stderr[-4000:]
    assert done.returncode == 0, said
    executed = re.search(r"number_of_executed_units: ([0-9]+)", said)
    assert executed is not None, said
    assert int(executed[1]) > 100
    coverage = [int(edges) for edges in re.findall(r"cov: ([0-9]+)", done.stderr)]
    assert coverage[-1] >= coverage[0] > 0
    assert not list(tmp_path.glob("crash-*"))


def test_the_targets_cover_every_reader_of_foreign_bytes() -> None:
    assert set(TARGETS) >= {"export", "record", "envelope", "head", "statement", "plan", "request", "database", "key"}
    assert Entry(b"x").envelope is None
