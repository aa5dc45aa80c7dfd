"""What ``dpbudget verify`` takes beside ledgers and exports: reports, proofs, signed verdicts, checkpoints."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable

import click

from dpbudget.curve import round_up, show_delta
from dpbudget.errors import InvalidParameter, Unanchored
from dpbudget_cli import _output as out

_HEAD = re.compile(r"\s*[0-9]+:.*")
_Show = Callable[[str, str | None, tuple[str, ...], bool], None]
#: As much of a document as shows what it is, white space left out.
_START = 64


def other_document(path: str) -> _Show | None:
    """How to check and show the document in ``path``; None for a ledger, an export, or what is none of all."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            start = b"".join(file.read(_START).split())
    except (OSError, ValueError):
        return None
    return next((show for mark, show in _DOCUMENTS.items() if start.startswith(mark)), None)


def is_report(path: str) -> bool:
    """Whether ``path`` seems to be a report, as JSON or as a page."""
    return other_document(path) is _show_report


def read_anchors(given: tuple[str, ...]) -> tuple[list[str], list[bytes]]:
    """Heads as ``size:root``, and the notes of those that were given as files."""
    from dpbudget.ledger.head import MAX_CHECKPOINT_BYTES
    from dpbudget.ledger.store.files import as_path, read_regular

    heads = [text for text in given if _HEAD.fullmatch(text) or not os.path.exists(text)]
    notes = [read_regular(as_path(text), MAX_CHECKPOINT_BYTES) for text in given if text not in heads]
    return heads, notes


def _trusted(trust: str | None, what: str) -> str:
    if trust is None:
        raise InvalidParameter(
            f"{what} is worth as much as a key that you know from elsewhere",
            code="DP072",
            hint="pass --trust with that public key: a .pub file or 64 hexadecimal digits",
        )
    return trust


def _show_run_proof(path: str, trust: str | None, expect_head: tuple[str, ...], as_json: bool) -> None:
    from dpbudget.ledger.keys import load_public_key
    from dpbudget.ledger.proof_file import MAX_BYTES, check_run_proof
    from dpbudget.ledger.store.files import as_path, read_regular

    owner = load_public_key(_trusted(trust, "a run proof"))
    proof = check_run_proof(read_regular(as_path(path), MAX_BYTES), owner)
    heads, _ = read_anchors(expect_head)
    if any(head.strip() != str(proof.head) for head in heads):
        raise Unanchored(
            f"the proof is about the head {proof.head}", hint="ask for a proof under the head that you know"
        )
    if as_json:
        out.emit_json(
            {
                "ok": True,
                "run": proof.run_id,
                "ledger": proof.ledger_id,
                "head": str(proof.head),
                "epsilon": proof.plan.claim.epsilon,
                "delta": proof.plan.claim.delta,
                "planned": proof.plan.steps,
                "charged": proof.charged,
                "portfolio": proof.portfolio,
                "portfolio_claim": proof.portfolio_claim,
                "proved": list(proof.proved),
                "not_proved": list(proof.not_proved),
            }
        )
        return
    click.echo("PROVED")
    for line in proof.proved:
        click.echo(f"  {out.clean(line)}")
    click.echo("not proved")
    for line in proof.not_proved:
        click.echo(f"  {out.clean(line)}")


def _show_consistency(path: str, _: str | None, expect_head: tuple[str, ...], as_json: bool) -> None:
    from dpbudget.ledger.head import Head
    from dpbudget.ledger.proof_file import check_consistency_proof
    from dpbudget.ledger.store.files import as_path, read_regular

    parsed = [re.fullmatch(r"\s*([0-9]{1,16}):([0-9a-f]{64})\s*", text) for text in expect_head]
    heads = sorted((Head(int(match[1]), match[2], "") for match in parsed if match), key=lambda head: head.size)
    if len(heads) != 2 or len(parsed) != 2:
        raise InvalidParameter(
            f"a consistency proof joins two heads, and {len(expect_head)} were given",
            code="DP064",
            hint="pass --expect-head SIZE:ROOT twice: the old head and the new one",
        )
    check_consistency_proof(read_regular(as_path(path), 1 << 16), *heads)
    facts = {"ok": True, "old": str(heads[0]), "new": str(heads[1])}
    if as_json:
        out.emit_json(facts)
    else:
        click.echo(f"CONSISTENT: the history under {heads[1]} begins with the whole history under {heads[0]}")


def _show_attestation(path: str, trust: str | None, expect_head: tuple[str, ...], as_json: bool) -> None:
    from dpbudget._attest import read_attestation
    from dpbudget.ledger.entries import MAX_ENVELOPE_BYTES
    from dpbudget.ledger.keys import load_public_key
    from dpbudget.ledger.store.files import as_path, read_regular

    signer = load_public_key(_trusted(trust, "a signed verdict"))
    found = read_attestation(read_regular(as_path(path), MAX_ENVELOPE_BYTES), signer)
    heads, _ = read_anchors(expect_head)
    if any(head.strip() != found.head for head in heads):
        raise Unanchored(f"the verdict is about the head {found.head}", hint="verify the ledger itself for other heads")
    facts = {
        "signed": True,
        "ledger": found.ledger_id,
        "head": found.head,
        "filter": found.filter,
        "adjacency": found.adjacency,
        "unit": found.unit,
        "epsilon": {"lower": found.epsilon_lower, "upper": found.epsilon_upper},
        "delta": found.delta,
        "budget": {"epsilon": found.total_epsilon, "delta": found.total_delta},
        "steps": found.steps,
        "anchored": found.anchored,
        "checked_by": list(found.checked_by),
        "warnings": list(found.warnings),
    }
    if as_json:
        out.emit_json({"ok": True, **facts})
        return
    click.echo(f"SIGNED VERDICT: epsilon <= {round_up(found.epsilon_upper, 10)} at delta {show_delta(found.delta)}")
    hidden = ("signed", "epsilon", "delta", "warnings")
    out.emit_table([(name, value) for name, value in facts.items() if name not in hidden])
    for warning in found.warnings:
        click.echo(out.clean(f"  note: {warning}"))
    out.talk("This is the signer's word; verify the ledger with this head to see for yourself.")


def _show_report(path: str, trust: str | None, expect_head: tuple[str, ...], as_json: bool) -> None:
    from dpbudget_cli._reports import show_report

    show_report(path, trust, expect_head, as_json)


_DOCUMENTS: dict[bytes, _Show] = {
    b'{"report":': _show_report,
    b"<!doctypehtml>": _show_report,
    b'{"payload":': _show_attestation,
    b'{"head":': _show_run_proof,
    b'{"new_size":': _show_consistency,
}
