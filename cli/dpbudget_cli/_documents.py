"""What ``dpbudget verify`` takes beside ledgers and exports: reports, proofs, signed verdicts, checkpoints."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import click

from dpbudget.curve import round_up, show_delta
from dpbudget.errors import InvalidParameter, Tampered, Unanchored
from dpbudget_cli import _output as out

_HEAD = re.compile(r"\s*[0-9]+:.*")
#: As much of a document as shows what it is, white space left out.
_START = 64


@dataclass(frozen=True)
class Demands:
    """What is asked of a document beside holding in itself.

    Attributes:
        trust: the key, from elsewhere, of whoever must have signed it.
        heads: ``size:root`` of the heads that it must be about, those of checkpoint files among them.
        as_json: whether the answer is one JSON object.
    """

    trust: str | None
    heads: tuple[str, ...]
    as_json: bool

    @classmethod
    def of(cls, trust: str | None, expect_head: tuple[str, ...], witnesses: tuple[str, ...], as_json: bool) -> Self:
        """The demands that the options of ``verify`` make.

        Raises:
            InvalidParameter: a head is none (DP082), or a witness is named and no checkpoint file is (DP064).
            Unanchored: no checkpoint file carries the cosignature of a witness (DP079).
        """
        from dpbudget._verify import anchor_of, parse_anchors

        texts, notes = read_anchors(expect_head)
        for witness in witnesses:
            _require_cosignature(witness, notes)
        anchors = (*parse_anchors(texts), *map(anchor_of, notes))
        return cls(trust, tuple(f"{size}:{root}" for size, root in anchors), as_json)

    def meet(self, head: str | None, what: str, hint: str) -> None:
        """Refuse a document about another head than each that was demanded.

        Raises:
            Unanchored: (DP079).
        """
        if any(wanted != head for wanted in self.heads):
            raise Unanchored(f"the {what} is about the head {head}", hint=hint)


def _require_cosignature(witness: str, notes: list[bytes]) -> None:
    from dpbudget.ledger.head import check_cosignature

    if not notes:
        raise InvalidParameter(
            "a witness cosigns a checkpoint, and none was given",
            code="DP064",
            hint="pass the checkpoint's file with --expect-head",
        )
    failed = []
    for note in notes:
        try:
            check_cosignature(note, witness)
        except Tampered as error:
            failed.append(error.message)
    if len(failed) == len(notes):
        raise Unanchored(
            f"no checkpoint carries the cosignature of {witness[:60]}: {failed[-1]}",
            hint="ask the witness for its cosignature of this checkpoint",
        )


_Show = Callable[[str, Demands], None]


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


def _show_run_proof(path: str, demands: Demands) -> None:
    from dpbudget.ledger.keys import load_public_key
    from dpbudget.ledger.proof_file import MAX_BYTES, check_run_proof
    from dpbudget.ledger.store.files import as_path, read_regular

    owner = load_public_key(_trusted(demands.trust, "a run proof"))
    proof = check_run_proof(read_regular(as_path(path), MAX_BYTES), owner)
    demands.meet(str(proof.head), "proof", "ask for a proof under the head that you know")
    if demands.as_json:
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


def _show_consistency(path: str, demands: Demands) -> None:
    from dpbudget.ledger.head import Head
    from dpbudget.ledger.proof_file import check_consistency_proof
    from dpbudget.ledger.store.files import as_path, read_regular

    parts = (text.split(":") for text in demands.heads)
    heads = sorted((Head(int(size), root, "") for size, root in parts), key=lambda head: head.size)
    if len(heads) != 2:
        raise InvalidParameter(
            f"a consistency proof joins two heads, and {len(heads)} were given",
            code="DP064",
            hint="pass --expect-head twice, the old head and the new one: SIZE:ROOT or a checkpoint file",
        )
    check_consistency_proof(read_regular(as_path(path), 1 << 16), *heads)
    facts = {"ok": True, "old": str(heads[0]), "new": str(heads[1])}
    if demands.as_json:
        out.emit_json(facts)
    else:
        click.echo(f"CONSISTENT: the history under {heads[1]} begins with the whole history under {heads[0]}")


def _show_attestation(path: str, demands: Demands) -> None:
    from dpbudget._attest import read_attestation
    from dpbudget.ledger.entries import MAX_ENVELOPE_BYTES
    from dpbudget.ledger.keys import load_public_key
    from dpbudget.ledger.store.files import as_path, read_regular

    signer = load_public_key(_trusted(demands.trust, "a signed verdict"))
    found = read_attestation(read_regular(as_path(path), MAX_ENVELOPE_BYTES), signer)
    demands.meet(found.head, "verdict", "verify the ledger itself for other heads")
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
    if demands.as_json:
        out.emit_json({"ok": True, **facts})
        return
    click.echo(f"SIGNED VERDICT: epsilon <= {round_up(found.epsilon_upper, 10)} at delta {show_delta(found.delta)}")
    hidden = ("signed", "epsilon", "delta", "warnings")
    out.emit_table([(name, value) for name, value in facts.items() if name not in hidden])
    for warning in found.warnings:
        click.echo(out.clean(f"  note: {warning}"))
    out.talk("This is the signer's word; verify the ledger with this head to see for yourself.")


def _show_report(path: str, demands: Demands) -> None:
    from dpbudget_cli._reports import show_report

    show_report(path, demands)


_DOCUMENTS: dict[bytes, _Show] = {
    b'{"report":': _show_report,
    b"<!doctypehtml>": _show_report,
    b'{"payload":': _show_attestation,
    b'{"head":': _show_run_proof,
    b'{"new_size":': _show_consistency,
}
