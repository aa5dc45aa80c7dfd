"""ledger watch: what is charged is shown as it arrives, from outside, without a key and without a trace."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dpbudget
from dpbudget.errors import Tampered, Unreadable
from dpbudget.ledger.rules import Machine
from dpbudget.ledger.run import Run
from dpbudget_cli import _watching
from dpbudget_cli._watching import LedgerView, changes

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(folder: Path) -> Iterator[Run]:
    """The started run of the prepared ledger, 20 steps, one a lease."""
    with (
        dpbudget.open_ledger("budget.ledger", writer=dpbudget.load_key("budget.ledger.writer.key")) as ledger,
        dpbudget.start(ledger) as started,
    ):
        yield started


class TestOnce:
    def test_it_shows_budget_and_runs_and_changes_nothing(self, run_cli: Cli, folder: Path, seen: Seen) -> None:
        before = seen(folder)
        answer = run_cli("ledger", "watch", "budget.ledger", "--once")
        assert answer.code == 0
        first, second = answer.out.splitlines()
        assert first.startswith("budget epsilon 3, delta 1e-05: spent 0, left ")
        assert second.endswith("0 of 20 steps charged, epsilon 0 of 1 (delta 1e-05)")
        assert (answer.err, seen(folder)) == ("", before)

    def test_as_json_it_is_one_object_with_the_numbers_of_ledger_show(self, run_cli: Cli, run: Run) -> None:
        for _ in range(12):
            run.next_receipt()
        answer = run_cli("ledger", "watch", "budget.ledger", "--once", "--json").json
        shown = run_cli("ledger", "show", "budget.ledger", "--json").json
        for name in ("budget", "spent", "promised", "left", "head"):
            assert answer[name] == shown[name]
        (row,) = answer["runs"]
        assert (row["run"], row["charged"], row["planned"], row["left"]) == (run.run_id, 12, 20, 8)
        live = run.epsilon()
        assert live is not None
        assert row["epsilon_so_far"]["upper"] == live.upper < row["claim"]["epsilon"]

    def test_an_rdp_ledger_has_no_total_to_tell(self, run_cli: Cli, empty: Path) -> None:
        assert run_cli("ledger", "init", "a.ledger", "--epsilon", "3", "--delta", "1e-5", "--filter", "rdp").code == 0
        answer = run_cli("ledger", "watch", "a.ledger", "--once")
        assert (answer.code, "dpbudget ledger show says what is left" in answer.out) == (0, True)

    def test_an_export_can_be_looked_at_too(self, run_cli: Cli, folder: Path) -> None:
        assert run_cli("ledger", "export", "budget.ledger", "budget.jsonl").code == 0
        ours, theirs = (
            run_cli("ledger", "watch", name, "--once", "--json").json for name in ("budget.ledger", "budget.jsonl")
        )
        assert ours == theirs

    @pytest.mark.parametrize(("name", "code"), [("missing.ledger", "DP070"), ("train.csv", "DP070"), (".", "DP083")])
    def test_what_is_no_ledger_is_refused(self, run_cli: Cli, folder: Path, name: str, code: str) -> None:
        answer = run_cli("ledger", "watch", name)
        assert (answer.code, code in answer.err) == (4, True)


class TestLooks:
    def test_only_what_is_new_is_fed_to_the_rules_and_a_look_without_news_reads_nothing(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        view = LedgerView("budget.ledger")
        assert view.look()
        assert view.state is not None
        with monkeypatch.context() as patched:
            patched.setattr("dpbudget.ledger.store.locate.reading_at", lambda path: pytest.fail("it was read"))
            assert not view.look()
        size, fed, feed = view.state.size, list[Any](), Machine.feed
        monkeypatch.setattr(Machine, "feed", lambda self, entries: feed(self, (fed.append(e) or e for e in entries)))
        run.next_receipt()
        fed.clear()  # what the run itself wrote
        assert view.look()
        assert len(fed) == view.state.size - size > 0

    def test_every_charge_is_seen_and_the_last_one_ends_it(self, run: Run) -> None:
        view = LedgerView("budget.ledger")
        looks, charged = changes(view, 0.001, None), []
        for _ in looks:
            charged.append(view.rows()[0].run.charged)
            if run.remaining:
                run.next_receipt()
        assert charged == list(range(21))
        assert view.finished

    def test_it_ends_after_the_seconds_that_were_asked_for(self, run: Run) -> None:
        assert len(list(changes(LedgerView("budget.ledger"), 0.001, 0.02))) == 1

    def test_a_long_ledger_is_looked_at_less_often(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        clock, pauses, looks = [0.0], [], iter([1.0, 2.0, 50.0, 0.0])

        def look(self: LedgerView) -> bool:
            clock[0] += next(looks)
            return True

        monkeypatch.setattr(LedgerView, "look", look)
        monkeypatch.setattr(_watching.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(_watching.time, "sleep", pauses.append)
        with pytest.raises(RuntimeError):  # the looks are used up
            list(changes(LedgerView("x"), 0.5, None))
        assert pauses == [0.5, 40.0, 60.0, 0.5]  # the first look loads libraries, and is no measure

    def test_a_ledger_that_is_put_back_or_rewritten_is_not_believed(self, run_cli: Cli, folder: Path) -> None:
        old = Path("budget.ledger").read_bytes()
        writer = dpbudget.load_key("budget.ledger.writer.key")
        with dpbudget.open_ledger("budget.ledger", writer=writer) as ledger, dpbudget.start(ledger) as run:
            run.next_receipt()
        view = LedgerView("budget.ledger")
        view.look()
        Path("budget.ledger").write_bytes(old)
        with pytest.raises(Tampered):
            view.look()
        Path("budget.ledger").unlink()
        with pytest.raises(Unreadable):
            view.look()


class TestWatching:
    def test_a_line_appears_for_every_change_while_another_process_trains(self, folder: Path) -> None:
        code = "from dpbudget_cli.main import main; main()"
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "PYTHONUNBUFFERED": "1"}
        words = ["ledger", "watch", "budget.ledger", "--interval", "0.01", "--json"]
        with subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True, env=env
        ) as child:
            assert child.stdout is not None
            answers = [json.loads(child.stdout.readline())]
            writer = dpbudget.load_key("budget.ledger.writer.key")
            with dpbudget.open_ledger("budget.ledger", writer=writer) as ledger, dpbudget.start(ledger) as run:
                for _ in run:
                    pass
            answers += [json.loads(line) for line in child.stdout]
        assert child.returncode == 0  # every plan is used up
        charged = [answer["runs"][0]["charged"] for answer in answers]
        assert (charged[0], charged[-1]) == (0, 20)
        assert charged == sorted(charged)

    def test_a_terminal_shows_a_table(self, folder: Path) -> None:
        ours, theirs = pty.openpty()
        code = "from dpbudget_cli.main import main; main()"
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "TERM": "xterm", "COLUMNS": "100"}
        words = ["ledger", "watch", "budget.ledger", "--seconds", "0.1"]
        pieces: list[bytes] = []
        with subprocess.Popen([sys.executable, "-c", code, *words], stdout=theirs, env=env) as child:
            os.close(theirs)
            reader = threading.Thread(target=_drain, args=(ours, pieces))
            reader.start()
            assert child.wait() == 0
            reader.join()
        seen = b"".join(pieces).decode()
        assert "epsilon so far" in seen
        assert "budget epsilon 3, delta 1e-05: spent 0, left" in seen


def _drain(descriptor: int, pieces: list[bytes]) -> None:
    while True:
        try:
            piece = os.read(descriptor, 65536)
        except OSError:
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(descriptor)
