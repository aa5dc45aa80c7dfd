"""``dpbudget plan new``: calibrate a plan to what a ledger allows, and sign it in."""

from __future__ import annotations

import shlex
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import click

from dpbudget.curve import round_down, round_up, show_delta
from dpbudget.errors import BudgetExceeded, InvalidParameter
from dpbudget_cli import _output as out
from dpbudget_cli._files import write_new
from dpbudget_cli._keys import PASSPHRASE_FD, key_path, load_signer, read_passphrases, require_ledger, shown
from dpbudget_cli._options import (
    ACCOUNTANT,
    ADVANTAGE,
    CLIP,
    COUNT,
    EPSILON,
    JSON,
    MODE,
    NO_PRIVACY,
    NOISE,
    schedule_options,
)
from dpbudget_cli._owner import REQUEST
from dpbudget_cli._standing import standing, usable
from dpbudget_cli.ledger_init import USERS_TRAIN
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget.ledger.ledger import Ledger
    from dpbudget.ledger.signing import Signer
    from dpbudget.plan import Plan
    from dpbudget_cli._question import Question

_USERS = "dataset size and batch size of this plan count users, not rows"
_SIZE = "pass --dataset-size N, the public nominal size; a signed plan is not taken back"
_DELTA = (
    "leave it out: delta is the ledger's. The owner sets it with dpbudget ledger init, and raises it with "
    "dpbudget ledger grant --delta D"
)


@click.command("new", cls=Leaf, elsewhere={"--delta": _DELTA, **NO_PRIVACY})
@click.option("--ledger", "path", required=True, metavar="PATH", help="The ledger that pays for the plan.")
@click.option("--owner-key", metavar="FILE", help="The owner's key; PATH.owner.key, else owner.key beside PATH.")
@click.option("--writer-key", metavar="FILE", help="The writer's key; PATH.writer.key, else writer.key beside PATH.")
@click.option("--epsilon", type=EPSILON, metavar="E", help="What the plan may claim; else all that is left.")
@ADVANTAGE
@schedule_options
@click.option("--noise-multiplier", type=NOISE, metavar="S", help="Use this noise; epsilon follows from it.")
@click.option("--clip-norm", type=CLIP, metavar="C", help="L2 bound of each record's gradient.")
@click.option("--max-parameters", type=COUNT, metavar="D", help="Most trainable parameters.")
@MODE
@click.option("--accountant", type=ACCOUNTANT, help="prv (default, tight) or rdp (looser).")
@REQUEST
@PASSPHRASE_FD
@JSON
def command(
    path: str,
    owner_key: str | None,
    writer_key: str | None,
    request: str | None,
    passphrase_fd: int | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Calibrate a plan and sign it into a ledger. It is charged when it begins to run, and then as a whole.

    Delta is that of the ledger's open portfolio. Plans signed before any of them runs share a portfolio and are
    composed jointly. The dataset size is a public, nominal one, and never assumed here. --request is for an owner
    whose key is elsewhere.

    Examples:
      dpbudget plan new --ledger budget.ledger --epsilon 1 --dataset-size 60000 --batch-size 256 --epochs 10
      dpbudget plan new --ledger budget.ledger --dataset-size 60000 --epochs 5
    """
    from dpbudget._surface import open_ledger
    from dpbudget_cli._question import Question

    require_ledger(path)
    passphrases = read_passphrases(passphrase_fd)
    owner = writer = None
    if request is None:
        owner = load_signer(key_path(owner_key, path, "owner"), passphrases)
        writer = load_signer(key_path(writer_key, path, "writer"), passphrases)
    with open_ledger(path, writer=writer) as ledger:
        if owner is not None:
            _require_owner(ledger, owner)
        question = Question(values)
        plan = _plan(question, ledger, shown(path))
        if owner is not None:
            run_id = ledger.sign_plan(plan, owner=owner)
        else:
            run_id, wish = ledger.request_plan(plan)
            write_new(str(request), wish)
        head, crumbs = str(ledger.head), "" if request else _lost_later(ledger)
    _report(plan, question, run_id, head, as_json)
    if request is None and not as_json:
        name = shlex.quote(shown(path))
        out.talk(f"next: dpbudget train --ledger {name} --data FILE --target COL --classes K")
        out.talk(f"or, with a script of your own: dpbudget run --ledger {name} -- python train.py")
        if crumbs:
            out.talk(crumbs)
    if request is not None and not as_json:
        out.talk(f"Nothing is written yet. The owner signs: dpbudget key sign {request} OUT --owner-key FILE")


def _lost_later(ledger: Ledger) -> str:
    """That room is left beside this plan which its first step takes away; empty where nothing is lost."""
    from dpbudget.filters.portfolio import FULL

    state = ledger.state
    if not state.portfolios or state.portfolios[-1].frozen or state.remaining_delta > 0:
        return ""
    stands = standing(state, ledger.plan_delta)
    (taken, delta), epsilon = stands.promised, stands.plannable[0]
    if taken > FULL * (taken + epsilon):  # what a search leaves, as below
        return ""
    return (
        f"warning epsilon {round_down(epsilon)} is left, and may be planned only until a first step is charged: plans "
        f"signed until then share delta {show_delta(delta)}, and no delta is left for later ones"
    )


def _require_owner(ledger: Ledger, owner: Signer) -> None:
    """Refuse another key before anything is computed (DP080)."""
    if owner.public != ledger.state.owner:
        raise InvalidParameter(
            f"the key {owner.public.hex} is not the ledger's owner",
            code="DP080",
            hint=f"pass --owner-key with the key whose public half is {ledger.state.owner.hex}",
        )


def _plan(question: Question, ledger: Ledger, path: str) -> Plan:
    """The plan that was asked for, at the delta and within the epsilon that the ledger has left."""
    from dpbudget._calibrate import calibrate, plan_for
    from dpbudget_cli._question import ask_schedule, refuse_together

    values, state = question.values, ledger.state
    refuse_together(values, "epsilon", "noise_multiplier")
    refuse_together(values, "epsilon", "advantage")
    refuse_together(values, "noise_multiplier", "advantage")
    if not state.portfolios:
        return _adaptive_plan(question, ledger)
    newest = state.portfolios[-1]
    room = out.floor_float(_room(ledger, path))
    values["adjacency"] = str(state.genesis.adjacency)
    question.note("delta", ledger.plan_delta, "what the ledger's open portfolio has")
    question.require("dataset_size", _SIZE)
    ask_schedule(question)
    question.need("clip_norm", "max_parameters", "noise")
    facts = question.pick("sample_rate", "batch_size", "steps", "epochs", "dataset_size", "delta")
    facts |= question.pick("clip_norm", "adjacency", "accountant", "max_parameters", "noise")
    facts["unit"] = state.genesis.unit
    if question.has("noise_multiplier"):
        return plan_for(noise_multiplier=values["noise_multiplier"], **facts)
    if question.has("epsilon") or question.has("advantage"):
        return calibrate(**question.pick("epsilon", "advantage"), **facts)
    beside = () if newest.frozen else state.plans_of(newest)
    _refuse_crumbs(beside, room, ledger.plan_delta, path)
    question.note("epsilon", room, "all that is left of the budget; pass --epsilon to leave some")
    return calibrate(epsilon=room, beside=beside, **facts)


def _room(ledger: Ledger, path: str) -> Fraction:
    """The largest claim of the portfolio that the plan will join.

    Raises:
        BudgetExceeded: no epsilon that a plan could use, or no delta (DP052).
    """
    state = ledger.state
    newest = state.portfolios[-1]
    room = usable(state, state.remaining_epsilon if newest.frozen else state.room_for(newest))
    no_delta = ledger.plan_delta <= 0.0
    if not room:
        taken = out.ceil_float(Fraction(state.epsilon) - state.remaining_epsilon)
        raise BudgetExceeded(
            f"the plans take epsilon {round_up(taken, 10)} of {state.epsilon:.10g}; nothing usable is left",
            hint=f"the owner can raise the total: dpbudget ledger grant {path} --epsilon E"
            f"{' --delta D' if no_delta else ''}",
        )
    if no_delta:
        took = "the first portfolio" if len(state.portfolios) == 1 else "the portfolios"
        raise BudgetExceeded(
            f"epsilon {round_down(float(room))} is left, but no delta: {took} took all of it",
            hint=f"dpbudget ledger grant {path} --delta D",
        )
    return room


def _adaptive_plan(question: Question, ledger: Ledger) -> Plan:
    """A plan for an rdp ledger: what it claims for itself is asked for, and the ledger has no share to propose."""
    from dpbudget._calibrate import calibrate, plan_for
    from dpbudget_cli._question import ask_schedule

    values = question.values
    values["adjacency"] = str(ledger.state.genesis.adjacency)
    question.note("delta", ledger.plan_delta, "the total of the ledger")
    question.require("dataset_size", _SIZE)
    ask_schedule(question)
    question.need("clip_norm", "max_parameters", "noise")
    facts = question.pick("sample_rate", "batch_size", "steps", "epochs", "dataset_size", "delta")
    facts |= question.pick("clip_norm", "adjacency", "accountant", "max_parameters", "noise")
    facts["unit"] = ledger.state.genesis.unit
    if question.has("noise_multiplier"):
        return plan_for(noise_multiplier=values["noise_multiplier"], **facts)
    if question.has("epsilon") or question.has("advantage"):
        return calibrate(**question.pick("epsilon", "advantage"), **facts)
    raise InvalidParameter(
        "a plan for a ledger with the filter rdp needs its noise or its own epsilon",
        code="DP064",
        hint="pass --noise-multiplier S, or --epsilon E or --advantage A for what the plan alone may cost",
    )


def _refuse_crumbs(beside: tuple[Plan, ...], room: float, delta: float, path: str) -> None:
    """Refuse to fill what rounding left of a portfolio with a plan that would be noise alone (DP052)."""
    from dpbudget.filters.portfolio import FULL, PortfolioFilter

    taken = PortfolioFilter().joint_claim(beside, delta)
    if taken > FULL * room:
        raise BudgetExceeded(
            f"the {'plan' if len(beside) == 1 else f'{len(beside)} plans'} signed before may claim epsilon "
            f"{round_up(taken, 10)} of {round_down(room, 10)}, so nothing of use is left for another",
            hint=f"train under a plan that dpbudget plan show --ledger {path} lists; a plan is not taken back, so pass "
            "--epsilon to leave room for the next",
        )


def _report(plan: Plan, question: Question, run_id: str, head: str, as_json: bool) -> None:
    from dpbudget._schedule import delta_warning
    from dpbudget_cli.calibrate import describe

    users = [f"{_USERS}; {USERS_TRAIN}"] if plan.unit == "user" else []
    if as_json:
        delta = delta_warning(plan.claim.delta, plan.nominal_size)
        answer = describe(plan, question, [*([delta] if delta else []), *users])
        out.emit_json({"run": run_id, "plan": plan.digest(), "head": head, **answer})
        return
    out.talk_assumed(question.assumed)
    for warning in users:
        out.talk(f"warning {warning}")
    phase = plan.phases[0]
    out.emit_table(
        [
            ("run", run_id),
            ("plan", plan.digest()),
            ("noise multiplier", f"{phase.noise_multiplier:.10g}"),
            ("claim", f"epsilon {round_up(plan.claim.epsilon)} at delta {show_delta(plan.claim.delta)}"),
            ("sampling rate", f"{phase.rate:.10g}"),
            ("steps", plan.steps),
            ("noise", plan.noise),
            ("head", head),
        ]
    )
