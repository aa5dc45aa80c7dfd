"""A report says what verify says, reads back as itself, and no number in it can be changed unnoticed."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from reportkit import OWNER, Shelf

from dpbudget._recompute import Clock
from dpbudget.errors import Tampered
from dpbudget.report.check import check_report
from dpbudget.report.document import Document, digest_of, read, write

NAMES = ["one", "two", "phases", "rdp", "users", "waiting", "empty", "changed", "committed"]
Value = dict[str, Any]


def check(document: Document, seconds: float = 60.0) -> list[str]:
    return check_report(document, Clock(seconds))


@pytest.mark.parametrize("name", NAMES)
def test_a_report_says_what_verify_says(shelf: Shelf, name: str) -> None:
    document, verdict = shelf.report(name), shelf.verdict(name).to_json()
    said = json.loads(write(document))
    for key in set(verdict) - {"runs"}:
        assert said[key] == verdict[key], key
    for mine, his in zip(said["runs"], verdict["runs"], strict=True):
        claim = mine["plan"]["claim"]
        facts = (mine["run"], claim["epsilon"], claim["delta"], mine["planned"], mine["charged"], mine["released"])
        assert facts == tuple(his[key] for key in ("run", "epsilon", "delta", "planned", "charged", "released"))
        assert mine["plan"]["noise"] == his["noise"]
        assert (mine["commitment"], mine["entropy"]) == (his["commitment"], his["entropy"])


@pytest.mark.parametrize("name", NAMES)
def test_a_report_reads_back_as_itself_and_its_numbers_follow_from_its_plans(shelf: Shelf, name: str) -> None:
    document = shelf.report(name)
    assert read(write(document)) == document
    assert check(document) == []


def test_the_same_ledger_gives_the_same_bytes(shelf: Shelf) -> None:
    assert write(shelf.report("two", trust=OWNER.public)) == write(shelf.report("two"))


def test_white_space_and_order_of_keys_mean_nothing(shelf: Shelf) -> None:
    value = json.loads(write(shelf.report("one")))
    other = json.dumps(dict(reversed(value.items())), separators=(" ,  ", "\n: ")).encode()
    assert read(other) == shelf.report("one")


def test_every_digit_of_every_number_that_is_edited_is_noticed(shelf: Shelf) -> None:
    text = write(shelf.report("two")).decode()
    hidden = re.sub(r'"[^"]*"', lambda m: "x" * len(m[0]), text)  # hashes and words are another matter
    numbers = re.finditer(r"-?\d[\d.e+-]*", hidden)
    places = [m.start() + i for m in numbers for i, char in enumerate(m[0]) if char.isdigit()]
    assert len(places) > 2000
    # All digits of plans, charges and claims; every seventh of the long lists of points.
    start, end = text.index('"profile"'), text.index('"history"')
    chosen = [place for index, place in enumerate(places) if not start < place < end or index % 7 == 0]
    for place in chosen:
        digit = str((int(text[place]) + 1) % 10)
        with pytest.raises(Tampered):
            read((text[:place] + digit + text[place + 1 :]).encode())


def test_another_decimal_of_the_same_float_is_noticed() -> None:
    # Both read as the same float, so no digest of values would tell them apart.
    assert 0.30000000000000004 == 0.30000000000000005
    value = {"report": "urn:dpbudget:budget-report:v1", "x": 0.30000000000000004}
    text = json.dumps({**value, "digest": digest_of(value)})
    with pytest.raises(Tampered, match="spelt"):
        read(text.replace("0.30000000000000004", "0.30000000000000005").encode())


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "1", '{"report": 1}', '{"report": "urn:dpbudget:budget-report:v2"}', "[" * 100_000,
        '{"report": NaN}', '{"a": 1, "a": 1}', '{"a": 1e999}', '{"a": 1.0e5}', '{"a": -0}',
        '{"a": 12345678901234567890}',
        '{"a": "\ud800"}',
    ],
)  # fmt: skip
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(Tampered):
        read(text.encode("utf-8", "surrogatepass"))


def test_a_report_with_an_unknown_or_a_missing_field_is_refused(shelf: Shelf) -> None:
    value = json.loads(write(shelf.report("one")))
    for changed in ({**value, "more": 1}, {key: item for key, item in value.items() if key != "steps"}):
        del changed["digest"]
        with pytest.raises(Tampered, match="field"):
            read(json.dumps({**changed, "digest": digest_of(changed)}).encode())


def test_a_report_of_more_bytes_than_are_read_is_refused(monkeypatch: pytest.MonkeyPatch, shelf: Shelf) -> None:
    monkeypatch.setattr("dpbudget.report.document.MAX_BYTES", 1000)
    with pytest.raises(Tampered, match="limit"):
        read(write(shelf.report("one")))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that were changed by somebody who made the digest anew
# ---------------------------------------------------------------------------------------------------------------------


def forged(document: Document, change: Callable[[Value], None]) -> Document:
    """The document after a change, with a digest that fits it."""
    value = json.loads(write(document))
    before = copy.deepcopy(value)
    change(value)
    assert value != before
    del value["digest"]
    return read(json.dumps({**value, "digest": digest_of(value)}).encode())


def _set(*path: Any, to: Any) -> Callable[[Value], None]:
    def change(value: Value) -> None:
        at: Any = value
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = to(at[path[-1]]) if callable(to) else to

    return change


def _scaled(factor: float) -> Callable[[float], float]:
    return lambda number: number * factor


PHASE = ("runs", 0, "plan", "phases", 0)
CHANGES = {
    "more noise": _set(*PHASE, "noise_multiplier", to=_scaled(1.001)),
    "less noise": _set(*PHASE, "noise_multiplier", to=_scaled(0.999)),
    "a smaller rate": _set(*PHASE, "sample_rate", to=0.5),
    "fewer steps in a phase": _set(*PHASE, "steps", to=29),
    "another norm": _set("runs", 0, "plan", "clip_norm", to=2.0),
    "another size": _set("runs", 0, "plan", "dataset_size", to=2001),
    "fewer parameters": _set("runs", 0, "plan", "max_parameters", to=4999),
    "exact noise": _set("runs", 0, "plan", "noise", to="exact"),
    "a plan for users": _set("runs", 0, "plan", "unit", to="user"),
    "a smaller claim": _set("runs", 0, "plan", "claim", "epsilon", to=_scaled(0.99)),
    "another delta of a plan": _set("runs", 0, "plan", "claim", "delta", to=2e-5),
    "another accountant": _set("runs", 0, "plan", "claim", "accountant", to="rdp"),
    "an older accountant": _set("runs", 0, "plan", "claim", "accountant_version", to=2),
    "a digest of a model": _set("runs", 0, "plan", "model_digest", to="ab" * 32),
    "another statement": _set("runs", 0, "statement", to="ab" * 32),
    "another run": _set("runs", 0, "run", to="ab" * 16),
    "fewer steps charged": _set("runs", 0, "charged", to=29),
    "more steps charged": _set("runs", 0, "charged", to=31),
    "more steps released": _set("runs", 0, "released", to=31),
    "fewer steps in all": _set("steps", to=41),
    "a run of another portfolio": _set("runs", 0, "portfolio", to=2),
    "a smaller claim of the portfolio": _set("portfolios", 0, "claim", to=_scaled(0.99)),
    "a larger claim of the portfolio": _set("portfolios", 0, "claim", to=3.5),
    "no claim of the portfolio": _set("portfolios", 0, "claim", to=None),
    "another delta of the portfolio": _set("portfolios", 0, "delta", to=9e-6),
    "a smaller epsilon": _set("epsilon", "upper", to=_scaled(0.9999)),
    "an epsilon that is smaller by a billionth": _set("epsilon", "upper", to=_scaled(1.0 - 1e-9)),
    "a larger epsilon": _set("epsilon", "upper", to=_scaled(1.0001)),
    "another lower bound": _set("epsilon", "lower", to=_scaled(0.9999)),
    "another kind": _set("epsilon", "kind", to="numerical"),
    "a smaller delta": _set("delta", to=9e-6),
    "a larger budget": _set("budget", "epsilon", to=4.0),
    "a larger grant": _set("grants", 0, "epsilon", to=4.0),
    "a smaller grant": _set("grants", 0, "delta", to=1e-6),
    "other neighbours": _set("adjacency", to="zero-out"),
    "users": _set("unit", to="user"),
    "another filter": _set("filter", to="rdp"),
    "another ledger": _set("ledger", to="ab" * 32),
    "a smaller advantage": _set("attack", "advantage", "upper", to=_scaled(0.999)),
    "fewer found": _set("attack", "tpr_at_1_percent_fpr", "upper", to=_scaled(0.999)),
    "a better profile": _set("profile", 20, "upper", to=_scaled(0.99)),
    "a shorter profile": _set("profile", to=lambda points: points[:-1]),
    "a better trade-off": _set("trade_off", 10, "false_negatives", to=_scaled(1.001)),
    "less spent on the way": _set("spending", 5, "spent", to=_scaled(0.9)),
    "cheaper steps": _set("spending", -1, "alone", to=_scaled(0.9)),
    "figures of plans": _set("scope", to="planned"),
    "another history": _set("history", -1, "steps", to={"ab" * 16: 1}),
    "another sentence": _set("statement", 1, to=lambda text: text.replace("epsilon at most ", "epsilon at most 0.")),
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(CHANGES))
def test_a_number_that_was_changed_together_with_the_digest_does_not_follow(shelf: Shelf, what: str) -> None:
    document = shelf.report("two")
    try:
        assert check(forged(document, CHANGES[what])) != []
    except Tampered:
        pass  # a value that no plan has


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_set("renyi", "spent", 0, to="1"), "have spent"),
        (_set("renyi", "orders", 0, to=1.5), "costs are below"),
        (_set("runs", 0, "costs", 0, "costs", 3, to=_scaled(0.5)), ""),
        (_set("grants", 0, "allowances", 3, to=lambda number: number + 1.0), "allowances"),
        (_set("epsilon", "upper", to=_scaled(0.99)), "follows"),
        (_set("runs", 0, "charged", to=11), ""),
    ],
)
def test_what_an_rdp_ledger_spent_follows_from_its_charges(
    shelf: Shelf, change: Callable[[Value], None], what: str
) -> None:
    problems = check(forged(shelf.report("rdp"), change))
    assert any(what in problem for problem in problems), problems


def test_hostile_parts_are_refused_and_never_an_internal_failure(shelf: Shelf) -> None:
    changes = [
        _set("portfolios", to=[]),
        _set("portfolios", 0, "runs", to=["ab" * 16]),
        _set("runs", to=[]),
        _set("runs", 0, "plan", "phases", to=[]),
        _set("runs", 0, "plan", "phases", 0, "sample_rate", to=7.0),
        _set("runs", 0, "costs", to=[{"costs": [], "tail": 0.0, "factor": 0.0}]),
        _set("grants", to=[]),
        _set("renyi", to={"orders": [], "shares": [], "spent": []}),
        _set("history", to=[]),
        _set("spending", to=[]),
        _set("epsilon", to=None),
    ]
    for change in changes:
        try:
            problems = check(forged(shelf.report("two"), change))
        except Tampered:
            continue
        assert problems


def test_a_report_that_takes_too_long_is_not_confirmed(shelf: Shelf) -> None:
    problems = check(shelf.report("two"), 0.0)
    assert any("nothing" in problem for problem in problems)


def test_without_trust_or_with_a_wrong_head_the_report_says_so(shelf: Shelf) -> None:
    document = shelf.report("one", expect_head=f"3:{'ab' * 32}")
    assert (document.ok, document.verdict, document.trusted) == (False, "not anchored", False)
    assert any("another history" in problem for problem in document.problems)
    assert document.epsilon is not None
    head = shelf.report("one").head
    met = shelf.report("one", trust=OWNER.public, expect_head=head)
    assert (met.ok, met.anchored, met.anchors) == (True, True, (head,))


def test_a_changed_ledger_gives_a_report_of_no_guarantee(shelf: Shelf, tmp_path: Any) -> None:
    import dpbudget

    export = tmp_path / "a.jsonl"
    with dpbudget.open_ledger(shelf.path("one")) as ledger:
        ledger.export(export)
    text = export.read_bytes()
    export.write_bytes(text.replace(b'"step":', b'"step" :', 1))
    from dpbudget.report.make import make_report

    document = make_report(export, trust=OWNER.public)
    assert (document.ok, document.verdict, document.epsilon, document.runs) == (False, "not valid", None, ())
    assert document.problems
    assert read(write(document)) == document


def test_figures_that_took_too_long_are_left_out_by_name(shelf: Shelf) -> None:
    from dpbudget._verify import examine
    from dpbudget.report.history import History
    from dpbudget.report.make import document_of

    history = History()
    found = examine(shelf.path("one"), OWNER.public, see=history.see)
    document = document_of(found, history, "one", Clock(0.0))
    assert (document.ok, document.attack, document.profile, document.spending) == (True, None, (), ())
    assert len(document.left_out) == 4
    assert all("not computed in 0 s" in text for text in document.left_out)
    assert check(document) == []


def test_spending_ends_at_what_is_spent_and_never_falls(shelf: Shelf) -> None:
    for name in ("one", "two", "rdp", "changed"):
        document = shelf.report(name)
        spent = [point.spent for point in document.spending]
        assert spent == sorted(spent)
        assert document.epsilon is not None
        assert spent[-1] == document.epsilon.upper
        assert document.spending[-1].steps == document.steps
        assert all(point.alone is None or point.alone <= point.spent for point in document.spending)


def test_the_raise_of_a_total_is_seen_in_the_spending(shelf: Shelf) -> None:
    document = shelf.report("changed")
    assert document.spending[0].total == 3.0
    assert document.spending[-1].total == 4.0
    assert [event.kind for event in document.history if event.kind in ("budget", "note")] == ["budget", "note"]
    assert any("raised" in text for text in document.warnings)
    assert document.scope == "pair"


def test_a_plan_in_a_report_has_every_field_of_a_plan(shelf: Shelf) -> None:
    from dpbudget.plan import Claim, Phase, Plan
    from dpbudget.report.document import ClaimPart, PhasePart, PlanPart

    renamed = {"nominal_size": "dataset_size", "rate_k": "sample_rate"}
    for whole, part in ((Plan, PlanPart), (Phase, PhasePart), (Claim, ClaimPart)):
        assert {renamed.get(name, name) for name in whole.model_fields} == set(part.model_fields)
    for name in NAMES:
        for run in shelf.report(name).runs:
            assert PlanPart.of(run.plan.plan()) == run.plan
