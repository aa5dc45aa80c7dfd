"""The whole way with a ledger in PostgreSQL: init, plan, spend, export, import, verify; no password in any output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dpbudget
from tests.postgres_server import PASSWORD, Server

Cli = Callable[..., Any]
SMALL = ("--dataset-size", "100", "--batch-size", "20", "--steps", "20", "--max-parameters", "5000")


def test_a_ledger_in_a_database_from_init_to_verify(run_cli: Cli, empty: Path, postgres_server: Server) -> None:
    url = postgres_server.url("team", database=postgres_server.database())
    said = [run_cli("ledger", "init", url, "--epsilon", "3", "--delta", "1e-5", "--whole-budget", "--json")]
    assert said[0].json["keys"][0] == "team.owner.key"
    assert said[0].json["ledger"].startswith("postgresql://admin@127.0.0.1:")
    said.append(run_cli("plan", "new", "--ledger", url, *SMALL, "--epsilon", "1", "--json"))
    with (
        dpbudget.open_ledger(url, writer=dpbudget.load_key("team.writer.key")) as ledger,
        dpbudget.start(ledger, said[1].json["run"]) as run,
    ):
        run.next_receipt()
    said.append(run_cli("ledger", "runs", url, "--json"))
    assert said[-1].json["runs"][0]["charged"] == 1
    said.append(run_cli("ledger", "export", url, "team.jsonl"))
    for target in (url, "team.jsonl"):
        said.append(run_cli("verify", target, "--trust", "team.owner.key.pub", "--json"))
        assert said[-1].json["ok"]
        assert said[-1].json["steps"] == 1
    other = postgres_server.url("copy", database=postgres_server.database())
    keys = ("--writer-key", "team.writer.key", "--trust", "team.owner.key.pub")
    said.append(run_cli("ledger", "import", "team.jsonl", other, *keys))
    assert said[-1].code == 0
    assert run_cli("verify", other, "--trust", "team.owner.key.pub").code == 0
    said.append(run_cli("ledger", "init", url, "--epsilon", "3", "--delta", "1e-5"))
    assert (said[-1].code, "DP074" in said[-1].err) == (2, True)
    assert not [answer for answer in said if PASSWORD in answer.out + answer.err]


def test_a_wrong_database_is_refused_with_the_next_command(run_cli: Cli, empty: Path, postgres_server: Server) -> None:
    url = postgres_server.url("team", database=postgres_server.database())
    for line in (("verify", url), ("ledger", "show", url), ("ledger", "head", url)):
        answer = run_cli(*line)
        assert (answer.code, "dpbudget ledger init" in answer.err) == (4, True)
        assert PASSWORD not in answer.out + answer.err
