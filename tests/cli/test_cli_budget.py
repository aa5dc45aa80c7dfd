"""Budgets that change, keys that rotate, notes, heads and moved ledgers, by commands."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import dpbudget
from dpbudget.ledger.head import VerifierKey
from dpbudget.ledger.keys import load_public_key
from dpbudget.ledger.requests import request_budget, sign_request
from dpbudget.ledger.signing import PublicKey

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
LEDGER = "budget.ledger"
SMALL = ("--dataset-size", "100", "--batch-size", "20", "--steps", "20", "--max-parameters", "5000")


def test_a_grant_raises_the_total_and_verify_goes_on(run_cli: Cli, folder: Path) -> None:
    answer = run_cli("ledger", "grant", LEDGER, "--epsilon", "5", "--json").json
    assert (answer["epsilon"], answer["delta"]) == (5.0, 1e-5)
    assert answer["before"] == {"epsilon": 3.0, "delta": 1e-5}
    assert answer["left"]["epsilon"] == pytest.approx(2.0)  # of the whole-budget portfolio's 3, a plan has 1
    assert run_cli("ledger", "show", LEDGER, "--json").json["budget"]["epsilon"] == 5.0
    report = run_cli("verify", LEDGER, "--trust", f"{LEDGER}.owner.key.pub", "--json").json
    assert (report["ok"], report["budget"]["epsilon"]) == (True, 5.0)


def test_grant_does_not_lower_and_lower_does_not_grant(run_cli: Cli, folder: Path, seen: Seen) -> None:
    before = seen(folder)
    for command, epsilon in (("grant", "2"), ("lower", "4"), ("grant", "3"), ("lower", "3"), ("lower", "2.5")):
        answer = run_cli("ledger", command, LEDGER, "--epsilon", epsilon)
        assert answer.code == 2, (command, epsilon)
        assert "Fix:" in answer.err
    assert run_cli("ledger", "lower", LEDGER).code == 2
    assert seen(folder) == before


def test_only_the_owner_grants(run_cli: Cli, folder: Path) -> None:
    answer = run_cli("ledger", "grant", LEDGER, "--epsilon", "5", "--owner-key", f"{LEDGER}.writer.key")
    assert (answer.code, "DP080" in answer.err) == (2, True)


def test_a_rotated_writer_replaces_the_old_one(run_cli: Cli, folder: Path) -> None:
    answer = run_cli("key", "rotate", "writer", LEDGER, "--new-key", "writer2.key", "--json").json
    assert answer["new"] == load_public_key("writer2.key.pub").hex
    refused = run_cli("plan", "new", "--ledger", LEDGER, *SMALL, "--epsilon", "1")
    assert (refused.code, "DP080" in refused.err) == (2, True)
    plan = run_cli("plan", "new", "--ledger", LEDGER, *SMALL, "--epsilon", "1", "--writer-key", "writer2.key")
    assert plan.code == 0, plan.err
    assert run_cli("verify", LEDGER, "--trust", f"{LEDGER}.owner.key.pub", "--all-heads").code == 0


def test_a_lost_writer_is_replaced_by_the_owner(run_cli: Cli, folder: Path) -> None:
    (folder / f"{LEDGER}.writer.key").unlink()
    assert run_cli("key", "rotate", "writer", LEDGER, "--new-key", "w.key").code == 4
    assert run_cli("key", "rotate", "writer", LEDGER, "--new-key", "w.key", "--lost").code == 0
    assert run_cli("ledger", "note", LEDGER, "incident", "--writer-key", "w.key").code == 0


def test_a_rotated_owner_is_a_root_of_trust_like_the_first(run_cli: Cli, folder: Path) -> None:
    assert run_cli("key", "rotate", "owner", LEDGER, "--new-key", "owner2.key").code == 0
    for trust, code in ((f"{LEDGER}.owner.key.pub", 0), ("owner2.key.pub", 0), ("owner.key.pub", 1)):
        assert run_cli("verify", LEDGER, "--trust", trust).code == code
    assert run_cli("ledger", "grant", LEDGER, "--epsilon", "5").code == 2
    assert run_cli("ledger", "grant", LEDGER, "--epsilon", "5", "--owner-key", "owner2.key").code == 0


@pytest.mark.parametrize("line", ["rotate auditor b --new-key n", "rotate owner b --new-key n --lost"])
def test_a_role_that_cannot_be_rotated_is_refused_before_a_key_is_made(run_cli: Cli, folder: Path, line: str) -> None:
    answer = run_cli("key", *line.split())
    assert (answer.code, "DP080" in answer.err) == (2, True)
    assert not (folder / "n").exists()


def test_a_note_is_a_word_of_the_list(run_cli: Cli, folder: Path) -> None:
    assert run_cli("ledger", "note", LEDGER, "published").code == 0
    answer = run_cli("ledger", "note", LEDGER, "accuracy was 93 %")
    assert (answer.code, "DP082" in answer.err, "published" in answer.err) == (2, True, True)


def test_a_head_is_shown_kept_and_demanded_later(run_cli: Cli, folder: Path) -> None:
    head = run_cli("ledger", "head", LEDGER, "--output", "head.txt", "--json").json
    assert (folder / "head.txt").read_text(encoding="utf-8") == head["note"]
    assert head["head"] == f"{head['size']}:{head['root']}"
    assert head["writer_key"].startswith("dpbudget.ledger/")
    assert run_cli("ledger", "head", LEDGER, "--output", "head.txt").code == 2
    assert run_cli("ledger", "note", LEDGER, "checked").code == 0
    report = run_cli("verify", LEDGER, "--expect-head", head["head"], "--json").json
    assert (report["anchored"], report["anchors"]) == (True, [head["head"]])
    wrong = f"{head['size']}:{'0' * 64}"
    assert run_cli("verify", LEDGER, "--expect-head", head["head"], "--expect-head", wrong).code == 5


def test_an_exported_ledger_moves_and_the_old_copy_may_not_spend_here(run_cli: Cli, folder: Path) -> None:
    assert run_cli("ledger", "export", LEDGER, "b.jsonl").code == 0
    keys = ("--writer-key", f"{LEDGER}.writer.key", "--trust", f"{LEDGER}.owner.key.pub")
    answer = run_cli("ledger", "import", "b.jsonl", "moved.ledger", *keys)
    assert (answer.code, "retire the other" in answer.err) == (0, True)
    assert run_cli("verify", "moved.ledger", "--trust", f"{LEDGER}.owner.key.pub").code == 0
    refused = run_cli("ledger", "note", LEDGER, "checked")
    assert (refused.code, "DP079" in refused.err) == (1, True)
    assert run_cli("ledger", "import", "b.jsonl", "moved.ledger", *keys).code != 0


def test_plans_and_runs_are_listed(run_cli: Cli, folder: Path) -> None:
    (plan,) = run_cli("ledger", "plans", LEDGER, "--json").json["plans"]
    (run,) = run_cli("ledger", "runs", LEDGER, "--json").json["runs"]
    counts = {"planned": 20, "charged": 0, "released": 0, "left": 20, "open_leases": 0}
    assert run == {"run": plan["run"], "noise_keys": "fresh", **counts}
    assert "planned" in run_cli("ledger", "runs", LEDGER).out


def test_an_rdp_ledger_is_made_planned_and_verified(run_cli: Cli, empty: Path) -> None:
    init = ("ledger", "init", "a.ledger", "--epsilon", "6", "--delta", "1e-5", "--filter", "rdp")
    assert run_cli(*init, "--whole-budget").code == 2
    assert run_cli("ledger", "init", "a.ledger", "--epsilon", "6", "--delta", "1e-5", "--filter", "gdp").code == 2
    assert run_cli(*init).code == 0
    plan = ("plan", "new", "--ledger", "a.ledger", *SMALL)
    assert run_cli(*plan).code == 2
    assert run_cli(*plan, "--noise-multiplier", "3").code == 0
    refused = run_cli(*plan, "--noise-multiplier", "0.8")
    assert (refused.code, "no Renyi order has room" in refused.err) == (3, True)
    least = refused.err.split("a noise multiplier of ")[1].split(";")[0]
    assert 0.8 < float(least) < 3
    assert run_cli(*plan, "--noise-multiplier", str(0.999 * float(least))).code == 3
    assert run_cli(*plan, "--noise-multiplier", least, "--request", "fits.req").code == 0
    report = run_cli("verify", "a.ledger", "--trust", "a.ledger.owner.key.pub", "--json").json
    assert (report["ok"], report["filter"]) == (True, "rdp")
    assert "at Renyi order" in run_cli("ledger", "show", "a.ledger").out
    shown = run_cli("ledger", "show", "a.ledger", "--json").json
    assert (shown["filter"], len(shown["orders"]), shown["orders"][0]["spent"]) == ("rdp", 15, 0)
    assert shown["grants"] == [{"record": 0, "epsilon": 6.0, "delta": 1e-5, "charged_before": 0}]
    assert run_cli("ledger", "grant", "a.ledger", "--epsilon", "7").code == 0


def test_a_plan_that_does_not_fit_is_told_what_would(run_cli: Cli, folder: Path) -> None:
    plan = ("plan", "new", "--ledger", LEDGER, *SMALL)
    refused = run_cli(*plan, "--epsilon", "4")
    assert refused.code == 3
    hint = refused.err.split("what fits: ")[1]
    steps, noise = hint.split("at most ")[1].split()[0], hint.split("multiplier of at least ")[1].split(";")[0]
    assert 1 <= int(steps) < 20
    assert run_cli(*plan, "--noise-multiplier", noise.split()[0].rstrip(".;,")).code == 0


def test_an_auditor_signs_the_verdict_and_anybody_reads_it_again(run_cli: Cli, folder: Path) -> None:
    assert run_cli("key", "new", "auditor.key").code == 0
    head = run_cli("ledger", "head", LEDGER, "--json").json["head"]
    attest = ("ledger", "attest", LEDGER, "r.dsse", "--trust", f"{LEDGER}.owner.key.pub", "--key", "auditor.key")
    assert run_cli(*attest).code == 0
    assert run_cli(*attest).code == 2  # nothing is overwritten
    report = run_cli("verify", "r.dsse", "--trust", "auditor.key.pub", "--json").json
    assert (report["ok"], report["head"], report["budget"]["epsilon"]) == (True, head, 3.0)
    assert (report["adjacency"], report["unit"]) == ("add-remove", "example")
    assert [warning[:10] for warning in report["warnings"]] == ["unanchored"]
    assert run_cli("verify", "r.dsse").code == 2
    assert run_cli("verify", "r.dsse", "--trust", "owner.key.pub").code == 1
    assert run_cli("verify", "r.dsse", "--trust", "auditor.key.pub", "--expect-head", head).code == 0
    assert run_cli("verify", "r.dsse", "--trust", "auditor.key.pub", "--expect-head", "1:" + "0" * 64).code == 5
    data = bytearray((folder / "r.dsse").read_bytes())
    for at in range(11, len(data), 97):
        changed = data.copy()
        changed[at] ^= 1
        (folder / "changed.dsse").write_bytes(changed)
        assert run_cli("verify", "changed.dsse", "--trust", "auditor.key.pub").code in (1, 4)


def test_a_raise_after_spending_is_told_to_whoever_signs_or_reads_the_verdict(run_cli: Cli, folder: Path) -> None:
    with dpbudget.open_ledger(LEDGER, writer=dpbudget.load_key(f"{LEDGER}.writer.key")) as ledger:
        dpbudget.start(ledger, next(iter(ledger.state.runs))).next_receipt()
    assert run_cli("ledger", "grant", LEDGER, "--epsilon", "5").code == 0
    trust = ("--trust", f"{LEDGER}.owner.key.pub")
    assert run_cli("key", "new", "auditor.key").code == 0
    signed = run_cli("ledger", "attest", LEDGER, "r.dsse", *trust, "--key", "auditor.key")
    read = run_cli("verify", "r.dsse", "--trust", "auditor.key.pub")
    for answer in (signed, read):
        assert "raised epsilon 3 to 5" in answer.out
        assert "only if the raise did not depend on the outputs" in answer.out
    again = run_cli("ledger", "attest", LEDGER, "s.dsse", *trust, "--key", "auditor.key", "--json").json
    assert again["warnings"] == run_cli("verify", "s.dsse", "--trust", "auditor.key.pub", "--json").json["warnings"]


def test_a_ledger_that_does_not_hold_is_not_attested(run_cli: Cli, folder: Path) -> None:
    attest = ("ledger", "attest", LEDGER, "r.dsse", "--key", "owner.key")
    answer = run_cli(*attest, "--trust", "owner.key.pub")
    assert (answer.code, "does not hold" in answer.err) == (1, True)
    head = run_cli("ledger", "head", LEDGER, "--json").json["head"]
    wrong = f"{head.split(':')[0]}:{'0' * 64}"
    missed = run_cli(*attest, "--trust", f"{LEDGER}.owner.key.pub", "--expect-head", wrong)
    assert (missed.code, "DP079" in missed.err) == (5, True)
    assert not (folder / "r.dsse").exists()


def test_an_owner_reads_of_a_delta_that_protects_nobody_before_signing(run_cli: Cli, folder: Path) -> None:
    made = run_cli("ledger", "init", "loose.ledger", "--epsilon", "3", "--delta", "0.1", "--whole-budget")
    assert made.code == 0
    asked = run_cli("plan", "new", "--ledger", "loose.ledger", *SMALL, "--epsilon", "1", "--request", "loose.req")
    assert asked.err.count("warning DP003") == 1
    sign = ("--owner-key", "loose.ledger.owner.key", "--ledger", "loose.ledger")
    answer = run_cli("key", "sign", "loose.req", "loose.signed", *sign)
    assert (answer.code, answer.err.count("warning DP003 delta 0.1 allows publishing 10 of 100 records")) == (0, 1)


def test_an_owner_elsewhere_signs_a_plan_and_new_totals(run_cli: Cli, folder: Path) -> None:
    owner = folder / f"{LEDGER}.owner.key"
    owner.rename(folder / "safe.key")
    assert run_cli("plan", "new", "--ledger", LEDGER, *SMALL, "--epsilon", "1").code == 2  # another owner.key
    asked = run_cli("plan", "new", "--ledger", LEDGER, *SMALL, "--epsilon", "1", "--request", "p.req", "--json").json
    sign = ("--owner-key", "safe.key", "--ledger", LEDGER)
    shown = run_cli("key", "sign", "p.req", "p.signed", *sign, "--json").json
    assert (shown["wishes"][0]["wish"], shown["wishes"][0]["run"]) == ("a plan", asked["run"])
    assert run_cli("ledger", "apply", LEDGER, "p.signed", "--json").json["run"] == asked["run"]
    assert run_cli("ledger", "grant", LEDGER, "--epsilon", "5", "--request", "g.req").code == 0
    assert run_cli("ledger", "apply", LEDGER, "g.req").code == 1
    told = run_cli("key", "sign", "g.req", "g.signed", *sign)
    with dpbudget.open_ledger(LEDGER) as ledger:
        assert (told.code, ledger.id in told.out) == (0, True)
    assert run_cli("ledger", "apply", LEDGER, "g.signed", "--json").json["epsilon"] == 5.0
    assert run_cli("ledger", "apply", LEDGER, "g.signed").code == 2
    assert run_cli("key", "sign", "g.req", "late.signed", *sign).code == 2  # the ledger went on


def test_new_totals_are_not_signed_by_the_place_of_another_ledger_of_the_same_owner(run_cli: Cli, folder: Path) -> None:
    """Both ledgers are the owner's; by the first it would have signed what raises the second."""
    keys = ("--owner-key", f"{LEDGER}.owner.key", "--writer-key", f"{LEDGER}.writer.key")
    assert run_cli("ledger", "init", "other.ledger", "--epsilon", "1", "--delta", "1e-6", *keys).code == 0
    assert run_cli("ledger", "grant", "other.ledger", "--epsilon", "50", "--request", "g.req").code == 0
    sign = ("key", "sign", "g.req", "g.signed", "--owner-key", f"{LEDGER}.owner.key")
    refused = run_cli(*sign, "--ledger", LEDGER)
    assert (refused.code, "not this one" in refused.err) == (2, True)
    assert run_cli(*sign).code == 2  # and never without a ledger to read it by
    assert not (folder / "g.signed").exists()
    assert run_cli(*sign, "--ledger", "other.ledger").code == 0


def test_what_is_no_request_is_not_signed(run_cli: Cli, folder: Path) -> None:
    for name in ("train.csv", LEDGER, "owner.key", "missing"):
        answer = run_cli("key", "sign", name, "x.signed", "--owner-key", "owner.key", "--ledger", LEDGER)
        assert answer.code in (1, 4), name
    assert not (folder / "x.signed").exists()


def test_a_run_is_proved_without_the_ledger(run_cli: Cli, folder: Path) -> None:
    head = run_cli("ledger", "head", LEDGER, "--output", "head.txt", "--json").json
    run = run_cli("ledger", "runs", LEDGER, "--json").json["runs"][0]["run"]
    assert run_cli("ledger", "prove", LEDGER, "run.proof", "--run", run[:8]).code == 0
    assert run_cli("ledger", "prove", LEDGER, "run.proof", "--run", run[:8]).code == 2
    for line in (("--run", run, "--since", "2"), (), ("--details", "--since", "1"), ("--run", "nothing")):
        assert run_cli("ledger", "prove", LEDGER, "x.proof", *line).code == 2
    verify = ("verify", "run.proof", "--trust", f"{LEDGER}.owner.key.pub")
    proof = run_cli(*verify, "--json").json
    assert (proof["run"], proof["charged"], proof["planned"], proof["head"]) == (run, 0, 20, head["head"])
    assert "PROVED" in run_cli(*verify, "--expect-head", head["head"]).out
    assert run_cli(*verify, "--expect-head", "1:" + "0" * 64).code == 5
    assert run_cli("verify", "run.proof").code == 2
    assert run_cli("verify", "run.proof", "--trust", "owner.key.pub").code == 1
    data = (folder / "run.proof").read_bytes()
    (folder / "bad.proof").write_bytes(data.replace(b'"records":', b'"records" :', 1))
    assert run_cli("verify", "bad.proof", *verify[2:]).code == 1


def test_a_head_is_proved_to_continue_an_older_one(run_cli: Cli, folder: Path) -> None:
    old = run_cli("ledger", "head", LEDGER, "--json").json
    assert run_cli("ledger", "note", LEDGER, "checked").code == 0
    new = run_cli("ledger", "head", LEDGER, "--json").json
    assert run_cli("ledger", "prove", LEDGER, "c.proof", "--since", str(old["size"])).code == 0
    heads = ("--expect-head", old["head"], "--expect-head", new["head"])
    assert "CONSISTENT" in run_cli("verify", "c.proof", *heads).out
    assert run_cli("verify", "c.proof", *heads[:2]).code == 2
    forged = ("--expect-head", old["head"], "--expect-head", f"{new['size']}:{'0' * 64}")
    assert run_cli("verify", "c.proof", *forged).code == 1


def test_a_checkpoint_file_anchors_and_a_witness_is_demanded(run_cli: Cli, folder: Path) -> None:
    assert run_cli("ledger", "head", LEDGER, "--output", "head.txt").code == 0
    assert run_cli("ledger", "note", LEDGER, "checked").code == 0
    report = run_cli("verify", LEDGER, "--expect-head", "head.txt", "--json").json
    assert (report["ok"], report["anchored"]) == (True, True)
    note = (folder / "head.txt").read_text(encoding="utf-8")
    signature = note.rsplit(" ", 1)[1]
    other = signature[:20] + ("A" if signature[20] != "A" else "B") + signature[21:]
    (folder / "forged.txt").write_text(note.replace(signature, other), encoding="utf-8")
    forged = run_cli("verify", LEDGER, "--expect-head", "forged.txt", "--json")
    assert (forged.code, forged.json["anchored"]) == (5, False)
    assert run_cli("verify", LEDGER, "--expect-head", "train.csv").code == 2
    witness = "witness.example+e3a2e6b2+BAAA"
    assert run_cli("verify", LEDGER, "--expect-head", "head.txt", "--witness", witness).code == 5
    assert run_cli("verify", LEDGER, "--witness", witness).code == 2


def test_a_checkpoint_file_anchors_a_proof_and_a_signed_verdict(run_cli: Cli, folder: Path) -> None:
    run = run_cli("ledger", "runs", LEDGER, "--json").json["runs"][0]["run"]
    old = run_cli("ledger", "head", LEDGER, "--output", "head.txt", "--json").json
    assert run_cli("ledger", "prove", LEDGER, "run.proof", "--run", run).code == 0
    owner = f"{LEDGER}.owner.key.pub"
    attest = ("ledger", "attest", LEDGER, "r.dsse", "--key", "owner.key", "--trust", owner)
    assert run_cli(*attest, "--expect-head", "head.txt").code == 0
    assert run_cli("verify", "r.dsse", "--trust", "owner.key.pub", "--json").json["anchored"] is True
    assert run_cli("ledger", "note", LEDGER, "checked").code == 0
    assert run_cli("ledger", "head", LEDGER, "--output", "later.txt").code == 0
    for document, key in (("run.proof", owner), ("r.dsse", "owner.key.pub")):
        verify = ("verify", document, "--trust", key, "--expect-head")
        assert run_cli(*verify, "head.txt").code == 0
        missed = run_cli(*verify, "later.txt")
        assert (missed.code, missed.out, "DP079" in missed.err) == (5, "", True)
        assert run_cli(*verify, "head.txt", "--expect-head", "later.txt").code == 5
        assert run_cli(*verify, "train.csv").code == 2
        assert run_cli(*verify, "12").code == 2
    assert run_cli("ledger", "prove", LEDGER, "c.proof", "--since", str(old["size"])).code == 0
    joined = run_cli("verify", "c.proof", "--expect-head", "head.txt", "--expect-head", "later.txt")
    assert "CONSISTENT" in joined.out


def test_a_witness_is_demanded_of_a_proof_too(run_cli: Cli, folder: Path) -> None:
    """What an option asks for is checked or refused, whatever document is verified."""
    head = run_cli("ledger", "head", LEDGER, "--output", "head.txt", "--json").json
    run = run_cli("ledger", "runs", LEDGER, "--json").json["runs"][0]["run"]
    assert run_cli("ledger", "prove", LEDGER, "run.proof", "--run", run).code == 0
    seed = Ed25519PrivateKey.from_private_bytes(bytes(32))
    witness = VerifierKey("witness.example", PublicKey(seed.public_key().public_bytes_raw()), cosigner=True)
    note = (folder / "head.txt").read_text(encoding="utf-8")
    message = f"cosignature/v1\ntime 1700000000\n{note.rpartition(chr(10) * 2)[0]}\n".encode()
    blob = witness.hash + (1700000000).to_bytes(8, "big") + seed.sign(message)
    cosigned = f"{note}— {witness.name} {base64.b64encode(blob).decode()}\n"
    (folder / "cosigned.txt").write_text(cosigned, encoding="utf-8")
    verify = ("verify", "run.proof", "--trust", f"{LEDGER}.owner.key.pub", "--witness", str(witness), "--expect-head")
    assert run_cli(*verify, "cosigned.txt").code == 0
    alone = run_cli(*verify, "head.txt")
    assert (alone.code, "cosignature of witness.example" in alone.err) == (5, True)
    assert run_cli(*verify, head["head"]).code == 2
    assert run_cli("verify", "run.proof", "--trust", f"{LEDGER}.owner.key.pub", "--all-heads").code == 2


def test_an_owner_elsewhere_certifies_the_numbers_of_an_rdp_ledger(run_cli: Cli, empty: Path) -> None:
    assert run_cli("ledger", "init", "a.ledger", "--epsilon", "6", "--delta", "1e-5", "--filter", "rdp").code == 0
    plan = ("plan", "new", "--ledger", "a.ledger", *SMALL, "--noise-multiplier", "3", "--request", "p.req")
    assert run_cli(*plan).code == 0
    sign = ("key", "sign", "p.req", "p.signed", "--owner-key", "a.ledger.owner.key")
    refused = run_cli(*sign)
    assert (refused.code, "--ledger" in refused.err) == (2, True)
    assert run_cli("ledger", "export", "a.ledger", "a.jsonl").code == 0
    assert run_cli("ledger", "init", "b.ledger", "--epsilon", "6", "--delta", "1e-5", "--filter", "rdp").code == 0
    assert run_cli(*sign, "--ledger", "b.ledger").code == 2  # another owner's
    assert run_cli(*sign, "--ledger", "a.jsonl").code == 0
    assert run_cli("ledger", "apply", "a.ledger", "p.signed").code == 0
    request = (empty / "p.req").read_bytes()
    text = base64.b64decode(json.loads(request)["payload"]).decode()
    statement = json.loads(text)
    statement["predicate"]["costs"][0] = ["0x0.0p+0"] * len(statement["predicate"]["costs"][0])
    payload = json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()
    forged = {**json.loads(request), "payload": base64.b64encode(payload).decode()}
    (empty / "f.req").write_bytes(json.dumps(forged, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    answer = run_cli("key", "sign", "f.req", "f.signed", "--owner-key", "a.ledger.owner.key", "--ledger", "a.jsonl")
    assert (answer.code, "below what is certified" in answer.err) == (2, True)
    assert not (empty / "f.signed").exists()


def test_an_owner_elsewhere_grants_nothing_on_top_of_an_understated_claim(run_cli: Cli, folder: Path) -> None:
    """The writer froze the portfolio at less than it costs; only who recomputes it notices before verification."""
    with dpbudget.open_ledger(LEDGER, writer=dpbudget.load_key(f"{LEDGER}.writer.key")) as ledger:
        run_id, nonce = next(iter(ledger.state.runs)), "ab" * 32
        ledger._journal.transact(
            lambda draft: draft.add(
                "lease", run=run_id, nonce=nonce, commitment="cd" * 32, first=0, count=1, claim=0.001
            )
        )
    assert run_cli("ledger", "grant", LEDGER, "--epsilon", "5").code == 1
    assert run_cli("ledger", "grant", LEDGER, "--epsilon", "5", "--request", "g.req").code == 1
    with dpbudget.open_ledger(LEDGER) as ledger:  # a machine that looks away
        (folder / "g.req").write_bytes(request_budget(ledger.state, dpbudget.Budget(epsilon=5.0, delta=1e-5), None))
    sign = ("key", "sign", "g.req", "g.signed", "--owner-key", f"{LEDGER}.owner.key")
    refused = run_cli(*sign, "--ledger", LEDGER)
    assert (refused.code, "frozen at a claim" in refused.err) == (1, True)
    assert run_cli("verify", LEDGER, "--trust", f"{LEDGER}.owner.key.pub").code == 1
    owner = dpbudget.load_key(f"{LEDGER}.owner.key")
    (folder / "g.signed").write_bytes(sign_request((folder / "g.req").read_bytes(), owner))
    refused = run_cli("ledger", "apply", LEDGER, "g.signed")
    assert (refused.code, "frozen at a claim" in refused.err) == (1, True)


def test_a_ledger_for_users_is_planned_for_users(run_cli: Cli, empty: Path) -> None:
    keys = ("--epsilon", "3", "--delta", "1e-5")
    assert run_cli("ledger", "init", "u.ledger", *keys, "--unit", "people").code == 2
    assert run_cli("ledger", "init", "u.ledger", *keys, "--unit", "user", "--json").json["unit"] == "user"
    assert run_cli("plan", "new", "--ledger", "u.ledger", *SMALL, "--epsilon", "1").code == 0
    assert run_cli("ledger", "show", "u.ledger", "--json").json["unit"] == "user"
    assert "add-remove of one user" in run_cli("ledger", "show", "u.ledger").out
    report = run_cli("verify", "u.ledger", "--trust", "u.ledger.owner.key.pub", "--json").json
    assert (report["ok"], report["unit"], report["adjacency"]) == (True, "user", "add-remove")
