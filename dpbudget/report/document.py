"""The report as a document: everything that it says, as numbers and words, in one JSON object.

Every page is made from this document alone, so that a page, its JSON and its Markdown cannot differ. Numbers are the
shortest decimals that read back as the same float, and ``digest`` is the SHA-256 of all else, so that no digit can be
changed unnoticed; what the digits mean is recomputed by :mod:`dpbudget.report.check`.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dpbudget._record import MAX_INTEGER
from dpbudget.curve import Bounds, Kind
from dpbudget.errors import Tampered
from dpbudget.mechanisms import Adjacency
from dpbudget.plan import Claim, Digest, NoiseMode, Phase, Plan, Unit, rate_from_float

#: The name of this form; another meaning gets another name.
FORM: Literal["urn:dpbudget:budget-report:v1"] = "urn:dpbudget:budget-report:v1"
MAX_BYTES = 1 << 25
_INTEGER = re.compile(r"-?[1-9][0-9]{0,15}|0")
RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
#: A number of units of an rdp ledger, far beyond what a JSON number holds.
Units = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,99})$")]


class Part(BaseModel):
    """Base of all parts: frozen, strict, closed, without NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Ends(Part):
    """A two-sided answer."""

    lower: float
    upper: float
    kind: Kind

    @classmethod
    def of(cls, bounds: Bounds) -> Ends:
        """The same as a part of a document."""
        return cls(lower=bounds.lower, upper=bounds.upper, kind=bounds.kind)


class Pair(Part):
    """The totals that were granted."""

    epsilon: float = Field(gt=0, le=1e6)
    delta: float = Field(gt=0, lt=1)


class PhasePart(Part):
    """A phase of a plan."""

    sample_rate: float
    noise_multiplier: float
    steps: Count


class ClaimPart(Part):
    """What a plan claims for itself."""

    epsilon: float
    delta: float
    accountant: Literal["prv", "rdp"]
    accountant_version: Count


class PlanPart(Part):
    """A signed plan, whole; :meth:`plan` and :meth:`of` are inverse."""

    phases: tuple[PhasePart, ...]
    clip_norm: float
    adjacency: Adjacency
    unit: Unit
    sampling: Literal["poisson"]
    dataset_size: Count | None
    noise: NoiseMode
    max_parameters: Count
    claim: ClaimPart
    model_digest: Digest | None
    code_digest: Digest | None

    @classmethod
    def of(cls, plan: Plan) -> PlanPart:
        """The plan as a part of a document."""
        phases = tuple(
            PhasePart(sample_rate=phase.rate, noise_multiplier=phase.noise_multiplier, steps=phase.steps)
            for phase in plan.phases
        )
        claim = ClaimPart(**plan.claim.model_dump())
        same = ("clip_norm", "adjacency", "unit", "sampling", "noise", "max_parameters", "model_digest", "code_digest")
        facts = {name: getattr(plan, name) for name in same}
        return cls(phases=phases, claim=claim, dataset_size=plan.nominal_size, **facts)

    def plan(self) -> Plan:
        """The plan; raises :class:`Tampered` (DP082) for values that no plan has."""
        facts = self.model_dump(exclude={"phases", "claim", "dataset_size"})
        try:
            phases = tuple(
                Phase(
                    rate_k=rate_from_float(phase.sample_rate),
                    noise_multiplier=phase.noise_multiplier,
                    steps=phase.steps,
                )
                for phase in self.phases
            )
            claim = Claim(**self.claim.model_dump())
            return Plan(phases=phases, claim=claim, nominal_size=self.dataset_size, **facts)
        except ValueError as error:
            raise Tampered(f"a plan of the report is none: {str(error)[:200]}", code="DP082") from None


class CostPart(Part):
    """What one step of a phase costs in an rdp ledger."""

    costs: tuple[float | None, ...]
    tail: float
    factor: float


class RunPart(Part):
    """One signed plan and what became of it; ``statement`` is the SHA-256 of what the owner signed.

    ``commitment`` and ``entropy`` are those of a run whose noise key is committed; null for fresh keys.
    """

    run: RunId
    portfolio: Count
    statement: Digest
    planned: Count
    charged: Count
    released: Count
    plan: PlanPart
    costs: tuple[CostPart, ...] | None
    commitment: Digest | None = None
    entropy: Digest | None = None


class PortfolioPart(Part):
    """Plans that are composed jointly."""

    index: Count
    delta: float
    epsilon: float | None
    claim: float | None
    runs: tuple[RunId, ...]


class GrantPart(Part):
    """Totals that the owner signed."""

    record: Count
    epsilon: float = Field(gt=0, le=1e6)
    delta: float = Field(gt=0, lt=1)
    charged_before: Count
    allowances: tuple[float, ...] | None


class RenyiPart(Part):
    """Orders, shares of delta and what is spent at each order of an rdp ledger."""

    orders: tuple[float, ...]
    shares: tuple[Count, ...]
    spent: tuple[Units | None, ...]


class EventPart(Part):
    """One record, or a stretch of records in which steps were charged."""

    first: Count
    last: Count
    kind: str = Field(pattern=r"^[a-z]{1,20}$")
    about: str
    steps: dict[RunId, Count]


class SpentPart(Part):
    """What was spent when ``steps`` steps were charged.

    Attributes:
        steps: charged steps of all runs.
        spent: the guarantee at that time.
        total: what the owner had granted.
        alone: what these steps would have cost, had the plans ended there; None where that is not known.
    """

    steps: Count
    spent: float
    total: float
    alone: float | None


class ProfilePart(Part):
    """Delta at an epsilon."""

    epsilon: float
    lower: float
    upper: float


class TradePart(Part):
    """A false positive rate, and the smallest false negative rate that any attack can reach with it."""

    false_positives: float
    false_negatives: float


class AttackPart(Part):
    """What an attacker who knows everything but whether one record was used may gain, at most ``upper``."""

    advantage: Ends
    tpr_at_1_percent_fpr: Ends
    tpr_at_1_permille_fpr: Ends
    right_guess_from_even_odds: Ends


class Document(Part):
    """The whole report; the keys from ``ok`` to ``checked_by`` are those of ``dpbudget verify --json``."""

    report: Literal["urn:dpbudget:budget-report:v1"]
    dpbudget: str
    accountants: dict[str, Count]
    name: str
    ok: bool
    verdict: Literal["valid", "not valid", "not anchored"]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    epsilon: Ends | None
    delta: float | None
    budget: Pair | None
    filter: Literal["portfolio", "rdp"] | None
    adjacency: Adjacency | None
    unit: Unit | None
    steps: Count
    head: str | None
    ledger: Digest | None
    trusted: bool
    anchored: bool
    anchors: tuple[str, ...]
    heads: Count | None
    checked_by: tuple[str, ...]
    owner: Digest | None
    writer: Digest | None
    public_data: bool | None
    records: Count
    statement: tuple[str, ...]
    runs: tuple[RunPart, ...]
    portfolios: tuple[PortfolioPart, ...]
    grants: tuple[GrantPart, ...]
    renyi: RenyiPart | None
    scope: Literal["spent", "planned", "pair", "none"]
    attack: AttackPart | None
    profile: tuple[ProfilePart, ...]
    trade_off: tuple[TradePart, ...]
    spending: tuple[SpentPart, ...]
    history: tuple[EventPart, ...]
    unheard: Count
    left_out: tuple[str, ...]


def write(document: Document) -> bytes:
    """The JSON object with its digest, indented for people, with one line feed at its end."""
    value = document.model_dump(mode="json")
    text = json.dumps({**value, "digest": digest_of(value)}, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def read(data: bytes) -> Document:
    """The document in a JSON object, in whatever order and white space, once its digest was checked.

    Raises:
        Tampered: no such document (DP082), a number in another spelling (DP082), or a digest of other bytes (DP071).
    """
    if len(data) > MAX_BYTES:
        raise Tampered(f"a report of {len(data)} bytes; the limit is {MAX_BYTES}", code="DP082")
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_float=_exact_float,
            parse_int=_exact_int,
            parse_constant=_exact_float,
            object_pairs_hook=_no_key_twice,
        )
    except (ValueError, RecursionError) as error:
        raise Tampered(f"the report is not its own JSON: {str(error)[:200]}", code="DP082") from None
    if not isinstance(value, dict) or value.get("report") != FORM:
        raise Tampered(f"not a report of the form {FORM}", code="DP082")
    stated = value.pop("digest", None)
    if stated != digest_of(value):
        raise Tampered(
            "the report was changed after it was written: its digest is that of other values",
            hint="ask for the file again, or make it anew from the ledger: dpbudget report",
        )
    try:
        # JSON mode of a strict model reads lists as tuples and strings as enums, and converts nothing else.
        return Document.model_validate_json(json.dumps(value))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])[:100]
        raise Tampered(f"field {where} of the report: {problem['msg']}", code="DP082") from None


def digest_of(value: dict[str, Any]) -> str:
    """SHA-256 of the compact JSON with sorted keys, 64 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _exact_float(text: str) -> float:
    """A float in the one spelling that is written: several decimals stand for each, and none may take its place."""
    number = float(text)
    if repr(number) != text or number in (float("inf"), float("-inf")):
        raise ValueError(f"number {text[:40]} is not spelt as it was written: the file was changed")
    return number


def _exact_int(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"number {text[:40]} is not spelt as it was written: the file was changed")
    return int(text)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return value
