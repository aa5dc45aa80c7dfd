"""Keys, ledgers, plans and verification: the whole way by commands, and every exit code on it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpbudget._verify import verify
from dpbudget.ledger.keys import load_key, load_public_key
from dpbudget.ledger.ledger import Ledger

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
SMALL = ("--dataset-size", "100", "--batch-size", "20", "--steps", "20")


class TestKeys:
    def test_a_new_key_is_private_and_its_public_half_is_shown(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("key", "new", "a.key", "--json")
        assert answer.code == 0
        assert (empty / "a.key").stat().st_mode & 0o777 == 0o600
        assert answer.json["public"] == load_key(empty / "a.key").public.hex
        for source in ("a.key", "a.key.pub", answer.json["public"]):
            assert run_cli("key", "show", source, "--json").json["public"] == answer.json["public"]

    def test_an_encrypted_key_needs_its_passphrase_from_a_descriptor(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("key", "new", "a.key", "--passphrase-fd", str(_pipe(b"open sesame\n")), "--json")
        assert answer.code == 0
        assert b"ENCRYPTED" in (empty / "a.key").read_bytes()
        assert run_cli("key", "show", "a.key").code == 4
        wrong = run_cli("key", "show", "a.key", "--passphrase-fd", str(_pipe(b"wrong\n")))
        assert (wrong.code, "DP070" in wrong.err) == (4, True)
        right = run_cli("key", "show", "a.key", "--passphrase-fd", str(_pipe(b"open sesame")), "--json")
        assert right.json["public"] == answer.json["public"]

    def test_one_descriptor_opens_the_keys_of_both_roles(self, run_cli: Cli, empty: Path) -> None:
        run_cli("key", "new", "owner.key", "--passphrase-fd", str(_pipe(b"one")))
        run_cli("key", "new", "writer.key", "--passphrase-fd", str(_pipe(b"two")))
        keys = ("--owner-key", "owner.key", "--writer-key", "writer.key")
        facts = ("--epsilon", "3", "--delta", "1e-5", *keys)
        assert run_cli("ledger", "init", "b.ledger", *facts).code == 4
        assert run_cli("ledger", "init", "b.ledger", *facts, "--passphrase-fd", str(_pipe(b"one\ntwo\n"))).code == 0
        plan = ("plan", "new", "--ledger", "b.ledger", *SMALL)
        assert run_cli(*plan, "--passphrase-fd", str(_pipe(b"two"))).code == 4
        assert run_cli(*plan, "--passphrase-fd", str(_pipe(b"two\none"))).code == 0

    def test_nothing_is_overwritten(self, run_cli: Cli, folder: Path, seen: Seen) -> None:
        before = seen(folder)
        for name in ("owner.key", "train.csv"):
            answer = run_cli("key", "new", name)
            assert (answer.code, "DP074" in answer.err) == (2, True)
        assert seen(folder) == before


def _pipe(data: bytes) -> int:
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    return reader


class TestInit:
    def test_without_keys_it_makes_both_and_says_what_that_means(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("ledger", "init", "b.ledger", "--epsilon", "3", "--delta", "1/100000", "--json")
        assert answer.code == 0
        assert answer.json["keys"] == [
            "b.ledger.owner.key", "b.ledger.owner.key.pub", "b.ledger.writer.key", "b.ledger.writer.key.pub"
        ]  # fmt: skip
        assert (answer.json["epsilon"], answer.json["delta"]) == (3.0, 1e-5)
        assert answer.json["plan_delta"] == 5e-6
        assert any("Two ledgers" in note for note in answer.json["notes"])
        assert any("one person" in note for note in answer.json["notes"])
        assert answer.json["head"].startswith("2:")

    def test_with_keys_of_two_people_it_makes_none(self, run_cli: Cli, empty: Path) -> None:
        for name in ("owner.key", "writer.key"):
            run_cli("key", "new", name)
        keys = ("--owner-key", "owner.key", "--writer-key", "writer.key")
        answer = run_cli("ledger", "init", "b.ledger", "--epsilon", "3", "--delta", "1e-5", *keys, "--json")
        assert answer.json["keys"] == []
        assert not any("one person" in note for note in answer.json["notes"])
        with Ledger.open("b.ledger", trust=load_public_key("owner.key.pub")) as ledger:
            assert ledger.trusted

    def test_facts_of_the_data_go_into_the_ledger(self, run_cli: Cli, empty: Path) -> None:
        facts = ("--adjacency", "zero-out", "--public-data", "--whole-budget")
        run_cli("ledger", "init", "b.ledger", "--epsilon", "3", "--delta", "1e-5", *facts)
        shown = run_cli("ledger", "show", "b.ledger", "--json").json
        assert (shown["adjacency"], shown["public_data"]) == ("zero-out", True)
        assert shown["portfolios"][0]["delta"] == 1e-5

    @pytest.mark.parametrize("place", ["missing/b.ledger", "train.csv", "."])
    def test_a_refused_ledger_leaves_no_key_behind(self, run_cli: Cli, folder: Path, seen: Seen, place: str) -> None:
        before = seen(folder)
        answer = run_cli("ledger", "init", place, "--epsilon", "3", "--delta", "1e-5")
        assert answer.code in {2, 4}
        assert "Fix:" in answer.err
        assert seen(folder) == before

    def test_one_key_for_both_roles_is_refused(self, run_cli: Cli, folder: Path, seen: Seen) -> None:
        before = seen(folder)
        keys = ("--owner-key", "owner.key", "--writer-key", "owner.key")
        answer = run_cli("ledger", "init", "b.ledger", "--epsilon", "3", "--delta", "1e-5", *keys)
        assert (answer.code, "DP080" in answer.err) == (2, True)
        assert seen(folder) == before


class TestPlans:
    def test_a_plan_takes_what_is_left_unless_told(self, run_cli: Cli, empty: Path) -> None:
        run_cli("ledger", "init", "b.ledger", "--epsilon", "3", "--delta", "1e-5", "--whole-budget")
        answer = run_cli("plan", "new", "--ledger", "b.ledger", *SMALL, "--json")
        assert answer.code == 0
        assert 2.9999 < answer.json["epsilon"]["upper"] <= 3.0
        assert answer.json["delta"] == 1e-5
        assumed = {item["name"]: item["value"] for item in answer.json["assumed"]}
        assert (assumed["epsilon"], assumed["delta"]) == (3.0, 1e-5)
        shown = run_cli("plan", "show", "--ledger", "b.ledger", answer.json["run"][:6], "--json").json["runs"]
        assert [run["run"] for run in shown] == [answer.json["run"]]
        assert shown[0]["phases"][0]["noise_multiplier"] == answer.json["noise_multiplier"]

    def test_a_second_plan_is_calibrated_beside_the_first(self, run_cli: Cli, empty: Path) -> None:
        run_cli("ledger", "init", "b.ledger", "--epsilon", "3", "--delta", "1e-5", "--whole-budget")
        first = run_cli("plan", "new", "--ledger", "b.ledger", *SMALL, "--epsilon", "2", "--json").json
        second = run_cli("plan", "new", "--ledger", "b.ledger", *SMALL, "--json").json
        assert first["epsilon"]["upper"] <= 2.0
        assert 1.0 < second["epsilon"]["upper"] < 3.0  # joint composition beats addition
        third = run_cli("plan", "new", "--ledger", "b.ledger", *SMALL)
        assert (third.code, "DP052" in third.err) == (3, True)
        with Ledger.open("b.ledger") as ledger:
            assert list(ledger.state.runs) == [first["run"], second["run"]]

    def test_a_plan_beyond_the_budget_is_refused_and_nothing_written(
        self, run_cli: Cli, folder: Path, seen: Seen
    ) -> None:
        before = seen(folder)
        answer = run_cli("plan", "new", "--ledger", "budget.ledger", *SMALL, "--epsilon", "2.9")
        assert (answer.code, "DP052" in answer.err) == (3, True)
        assert seen(folder) == before

    def test_a_given_noise_is_used_as_it_is(self, run_cli: Cli, folder: Path) -> None:
        answer = run_cli("plan", "new", "--ledger", "budget.ledger", *SMALL, "--noise-multiplier", "9", "--json")
        assert (answer.code, answer.json["noise_multiplier"]) == (0, 9.0)
        both = run_cli("plan", "new", "--ledger", "budget.ledger", *SMALL, "--noise-multiplier", "9", "--epsilon", "1")
        assert (both.code, "DP064" in both.err) == (2, True)

    def test_only_the_owner_signs(self, run_cli: Cli, folder: Path, seen: Seen) -> None:
        before = seen(folder)
        answer = run_cli("plan", "new", "--ledger", "budget.ledger", *SMALL, "--owner-key", "owner.key")
        assert (answer.code, "DP080" in answer.err) == (2, True)
        answer = run_cli("plan", "new", "--ledger", "budget.ledger", *SMALL, "--writer-key", "owner.key")
        assert (answer.code, "DP080" in answer.err) == (2, True)
        assert seen(folder) == before

    def test_keys_named_after_their_role_beside_the_ledger_are_found(self, run_cli: Cli, empty: Path) -> None:
        for name in ("owner.key", "writer.key"):
            run_cli("key", "new", name)
        keys = ("--owner-key", "owner.key", "--writer-key", "writer.key")
        run_cli("ledger", "init", "b.ledger", "--epsilon", "3", "--delta", "1e-5", *keys)
        assert run_cli("plan", "new", "--ledger", "b.ledger", *SMALL).code == 0

    def test_an_unknown_run_is_refused_with_the_known_ones(self, run_cli: Cli, folder: Path) -> None:
        answer = run_cli("plan", "show", "--ledger", "budget.ledger", "zz")
        assert (answer.code, "DP081" in answer.err) == (2, True)
        with Ledger.open("budget.ledger") as ledger:
            assert next(iter(ledger.state.runs)) in answer.err


class TestVerify:
    @pytest.mark.parametrize("words", [("ledger", "verify"), ("verify",)], ids=" ".join)
    def test_a_sound_ledger_has_the_fields_of_the_contract(
        self, run_cli: Cli, folder: Path, words: tuple[str, ...]
    ) -> None:
        answer = run_cli(*words, "budget.ledger", "--trust", "budget.ledger.owner.key.pub", "--json")
        report = verify("budget.ledger", trust=load_public_key("budget.ledger.owner.key.pub"))
        assert answer.code == 0
        assert answer.json["ok"] is True
        assert answer.json["problems"] == []
        assert answer.json["head"] == report.head
        assert set(answer.json) >= {"ok", "epsilon", "delta", "steps", "head", "problems"}

    def test_an_export_verifies_like_the_ledger(self, run_cli: Cli, folder: Path) -> None:
        head = run_cli("ledger", "export", "budget.ledger", "out.jsonl", "--json").json["head"]
        answer = run_cli("verify", "out.jsonl", "--expect-head", head, "--json")
        assert (answer.code, answer.json["head"], answer.json["anchored"]) == (0, head, True)

    def test_every_flipped_byte_of_an_export_is_noticed(self, run_cli: Cli, folder: Path) -> None:
        run_cli("ledger", "export", "budget.ledger", "out.jsonl")
        data = (folder / "out.jsonl").read_bytes()
        for position in range(0, len(data), 97):
            changed = bytearray(data)
            changed[position] ^= 1
            (folder / "out.jsonl").write_bytes(changed)
            answer = run_cli("verify", "out.jsonl", "--json")
            assert answer.code in {1, 4}, position

    def test_a_foreign_owner_is_tampering(self, run_cli: Cli, folder: Path) -> None:
        answer = run_cli("verify", "budget.ledger", "--trust", "owner.key.pub", "--json")
        assert answer.code == 1
        assert "DP072" in answer.json["problems"][0]

    def test_a_missed_anchor_is_a_verdict_of_its_own(self, run_cli: Cli, folder: Path) -> None:
        answer = run_cli("verify", "budget.ledger", "--expect-head", f"2:{'0' * 64}", "--json")
        assert (answer.code, answer.json["ok"], answer.json["anchored"]) == (5, False, False)

    def test_reading_changes_nothing(self, run_cli: Cli, folder: Path, seen: Seen) -> None:
        before = seen(folder)
        for words in (["verify"], ["ledger", "verify"], ["ledger", "show"]):
            assert run_cli(*words, "budget.ledger").code == 0
        assert run_cli("plan", "show", "--ledger", "budget.ledger").code == 0
        assert seen(folder) == before

    def test_an_edited_row_of_the_store_is_noticed(self, run_cli: Cli, folder: Path) -> None:
        with sqlite3.connect("budget.ledger") as store:
            table, column = _text_column(store)
            store.execute(f"UPDATE {table} SET {column} = replace({column}, X'2265', X'2266')")
        store.close()
        answer = run_cli("verify", "budget.ledger")
        assert answer.code in {1, 4}
        assert "Traceback" not in answer.out + answer.err


def _text_column(store: sqlite3.Connection) -> tuple[str, str]:
    """The table and column that hold the records."""
    for (table,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        for column in [row[1] for row in store.execute(f"PRAGMA table_info({table})")]:
            value = store.execute(f"SELECT {column} FROM {table} LIMIT 1").fetchone()
            if value and isinstance(value[0], bytes) and value[0].startswith(b"{"):
                return table, column
    raise AssertionError("no column holds records")
