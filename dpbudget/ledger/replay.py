"""Replay: an auditor opens sealed noise keys and gets the step keys of single steps and purposes, never more.

The ledger says which key is the right one: the key of a lease is checked against the commitment in its lease record,
that of a committed run against its commit record; fresh bytes come from the settle record, whose ``output`` is the hash
of what was released. With the step key of
``grad-noise`` and the clipped sum, :mod:`dptrainer.replay` makes that output again.
"""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dpbudget._record import decode, encode, float_to_hex, hex_to_float, hex_to_rate, rate_to_hex
from dpbudget.errors import InvalidParameter, Tampered, Unreadable
from dpbudget.ledger.auditor import AuditorKey
from dpbudget.ledger.entries import read
from dpbudget.ledger.journal import CheckedReading
from dpbudget.ledger.keys import read_private_file, write_key_pair
from dpbudget.ledger.noise_keys import KEY_BYTES, commitment_matches, run_ratchet
from dpbudget.ledger.plan_key import plan_commitment, run_secret
from dpbudget.ledger.scan import scan
from dpbudget.ledger.sealed import open_sealed
from dpbudget.ledger.signing import PublicKey
from dpbudget.ledger.state import RunState
from dpbudget.ledger.step_keys import Purpose, encode_committed_info, encode_info, expand
from dpbudget.ledger.store.files import as_path
from dpbudget.ledger.store.locate import Location, reading_at

#: Fields of the file of a step key that are digits, and how many; ``output`` may be null.
_DIGITS = {"key": 64, "ledger": 64, "output": 64, "run": 32}
_FIELDS = {*_DIGITS, "clip_norm", "noise_multiplier", "purpose", "rate", "step", "type", "v"}


@dataclass(frozen=True, eq=False)
class StepKey:
    """The key of one step and one purpose, with what a replay needs of the plan and of the step's settle record.

    Attributes:
        ledger_id: 64 hexadecimal digits.
        run_id: 32 hexadecimal digits.
        step: 0-based.
        purpose: what it is the key of; that of ``grad-noise`` reveals the clipped sum of the step to whoever has the
            output, that of ``sampling`` which records were in the batch, that of ``record-draws`` what dropout and
            augmentation drew.
        rate_k: the inclusion probability is ``rate_k / 2**64``.
        noise_multiplier: noise standard deviation / clipping norm.
        clip_norm: L2 bound of every record's gradient.
        output: SHA-256 of what was released, from the settle record; None where none was recorded.
        key: 32 secret bytes.
    """

    ledger_id: str
    run_id: str
    step: int
    purpose: Purpose
    rate_k: int
    noise_multiplier: float
    clip_norm: float
    output: str | None
    key: bytes = field(repr=False)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it to a new file of mode 0600.

        Raises:
            InvalidParameter: the file exists (DP074).
            Unreadable: the folder cannot be written (DP070).
        """
        record: dict[str, Any] = {
            "clip_norm": float_to_hex(self.clip_norm),
            "key": self.key.hex(),
            "ledger": self.ledger_id,
            "noise_multiplier": float_to_hex(self.noise_multiplier),
            "output": self.output,
            "purpose": self.purpose.value,
            "rate": rate_to_hex(self.rate_k),
            "run": self.run_id,
            "step": self.step,
            "type": "dpbudget-step-key",
            "v": 1,
        }
        write_key_pair(path, encode(record) + b"\n", None)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StepKey:
        """Read what :meth:`write` wrote.

        Raises:
            UnsafeKeyFile: others can read or replace the file (DP073).
            Unreadable: it is no step key (DP070).
        """
        place = as_path(path)
        try:
            record = decode(read_private_file(place).removesuffix(b"\n"), max_depth=1)
            _check_fields(record)
            return cls(
                ledger_id=record["ledger"],
                run_id=record["run"],
                step=record["step"],
                purpose=Purpose(record["purpose"]),
                rate_k=hex_to_rate(record["rate"]),
                noise_multiplier=hex_to_float(record["noise_multiplier"]),
                clip_norm=hex_to_float(record["clip_norm"]),
                output=record["output"],
                key=bytes.fromhex(record["key"]),
            )
        except (Tampered, TypeError, ValueError):
            raise Unreadable(f"{place} is no step key", hint="make it with dpbudget key replay") from None

    def __reduce__(self) -> NoReturn:
        raise TypeError("a step key is never pickled or copied; write() makes a file that only you can read")


@dataclass(frozen=True)
class _Leased:
    first: int
    end: int
    nonce: bytes
    commitment: str


@dataclass(frozen=True)
class RunReplay:
    """What a ledger says about the noise of one run, after all of the ledger was checked.

    Attributes:
        ledger_id: 64 hexadecimal digits.
        run: plan and state of the run.
        settled: fresh bytes and output of every settled step.
    """

    ledger_id: str
    run: RunState
    leases: tuple[_Leased, ...]
    settled: Mapping[int, tuple[bytes, str | None]]

    @classmethod
    def read(cls, location: Location, run_id: str | None = None, *, trust: PublicKey | None = None) -> RunReplay:
        """Check a ledger or an export and collect what it says about a run.

        Args:
            location: a ledger file, an export, or ``postgresql://...#name``.
            run_id: the run, or the start of its id; None takes the only one.
            trust: the owner's public key, got by another way than the file; without it the ledger proves nothing.

        Raises:
            Unreadable: no ledger (DP070).
            Tampered: it breaks a rule, or has another owner (DP071, DP072).
            InvalidParameter: it has no such run, or several (DP081).
        """
        text, leases, settled = run_id or "", list[_Leased](), dict[int, tuple[bytes, str | None]]()
        with reading_at(location) as reading:
            checked = CheckedReading(reading, trust)
            for entry in checked.entries():
                record = scan(entry.line) or read(entry.line)
                if not record.get("run", "").startswith(text):
                    continue
                if record["type"] == "lease":
                    first, nonce = record["first"], bytes.fromhex(record["nonce"])
                    leases.append(_Leased(first, first + record["count"], nonce, record["commitment"]))
                elif record["type"] == "settle":
                    settled[record["step"]] = bytes.fromhex(record["fresh"]), record["output"]
            checked.newest()
            state, _ = checked.conclusion()
        found = [run for run in state.runs if run.startswith(text)]
        if len(found) != 1:
            raise InvalidParameter(
                f"{len(found) or 'no'} runs of this ledger begin with {text[:40]!r}",
                code="DP081",
                hint=f"the runs are {', '.join(state.runs)}" if state.runs else "no plan is signed into this ledger",
            )
        return cls(state.genesis.ledger_id, state.runs[found[0]], tuple(leases), settled)

    def step_key(
        self, step: int, purpose: Purpose | str, *, sealed: str | os.PathLike[str], auditor: AuditorKey
    ) -> StepKey:
        """Open the key that the run kept for the auditor, check it against the ledger, and derive one step key.

        Args:
            step: 0-based.
            purpose: ``grad-noise``, ``sampling`` or ``record-draws``.
            sealed: the file of sealed keys.
            auditor: the private key that they were sealed to.

        Raises:
            InvalidParameter: no such purpose (DP060).
            Unreadable: the step has no lease, or with fresh keys no settle record, or its key was not kept (DP085).
            Tampered: what is kept does not open, or is not the key that the ledger commits to (DP085).
        """
        use = _purpose(purpose)
        lease = next((lease for lease in self.leases if lease.first <= step < lease.end), None)
        committed = self.run.commitment is not None
        if lease is None or (step not in self.settled and not committed):
            state = "was not charged" if lease is None else "is charged, but has no settle record"
            raise Unreadable(
                f"step {step} of run {self.run.run_id} {state}: its noise cannot be made again",
                code="DP085",
                hint="replay a settled step",
            )
        fresh, output = self.settled.get(step, (b"", None))
        phase = self.run.plan.phase_at(step)
        if committed:
            key = self._committed_key(step, use, sealed, auditor)
        else:
            key = self._fresh_key(lease, step, fresh, use, sealed, auditor)
        return StepKey(
            ledger_id=self.ledger_id,
            run_id=self.run.run_id,
            step=step,
            purpose=use,
            rate_k=phase.rate_k,
            noise_multiplier=phase.noise_multiplier,
            clip_norm=self.run.plan.clip_norm,
            output=output,
            key=key,
        )

    def _committed_key(self, step: int, purpose: Purpose, sealed: str | os.PathLike[str], auditor: AuditorKey) -> bytes:
        commitment, entropy = self.run.commitment or "", self.run.entropy or ""
        facts = {"commitment": commitment, "ledger": self.ledger_id, "run": self.run.run_id, "type": "plan-key"}
        key = open_sealed(sealed, auditor, facts)
        if not hmac.compare_digest(plan_commitment(key), commitment):
            raise _other_key()
        info = encode_committed_info(purpose, bytes.fromhex(self.run.statement), step)
        return expand(run_secret(key, entropy), info)

    def _fresh_key(
        self,
        lease: _Leased,
        step: int,
        fresh: bytes,
        purpose: Purpose,
        sealed: str | os.PathLike[str],
        auditor: AuditorKey,
    ) -> bytes:
        facts = {"commitment": lease.commitment, "ledger": self.ledger_id, "run": self.run.run_id, "type": "lease-key"}
        key = open_sealed(sealed, auditor, facts)
        if not commitment_matches(lease.commitment, key):
            raise _other_key()
        of_step = bytes(run_ratchet(key, step - lease.first + 1)[-KEY_BYTES:])
        return expand(of_step, encode_info(purpose, lease.nonce, step, fresh))


def _check_fields(record: Mapping[str, Any]) -> None:
    known = set(record) == _FIELDS and (record["type"], record["v"]) == ("dpbudget-step-key", 1)
    if not known or type(record["step"]) is not int or record["step"] < 0:
        raise Tampered("another document")
    for name, count in _DIGITS.items():
        absent = name == "output" and record[name] is None
        if not absent and not re.fullmatch(rf"[0-9a-f]{{{count}}}", record[name]):
            raise Tampered(f"{name} is not {count} digits")


def _other_key() -> Tampered:
    return Tampered(
        "the sealed noise key is not the one that the ledger commits to",
        code="DP085",
        hint="whoever ran this sealed something else: the noise cannot be checked",
    )


def _purpose(name: Purpose | str) -> Purpose:
    choices = (Purpose.GRAD_NOISE, Purpose.SAMPLING, Purpose.RECORD_DRAWS)
    if name not in [choice.value for choice in choices]:
        raise InvalidParameter(f"unknown purpose {str(name)[:40]!r}", code="DP060", hint=f"choose {', '.join(choices)}")
    return Purpose(name)
