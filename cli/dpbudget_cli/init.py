"""``dpbudget init``: a few questions, and from the answers a ledger, its keys and the settings of this folder."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpbudget.curve import round_up, show_delta
from dpbudget.errors import InvalidParameter, Unreadable
from dpbudget_cli import _output as out
from dpbudget_cli._files import write_new
from dpbudget_cli._keys import local_name, shown
from dpbudget_cli._options import BATCH, COUNT, DELTA, EPOCHS, EPSILON, JSON, SIZE, TwoNames
from dpbudget_cli.ledger_init import ONE_PERSON, TWO_LEDGERS, make_ledger
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget.ledger.ledger import Ledger
    from dpbudget.plan import Plan

Answers = dict[str, Any]
_SETTINGS = "dpbudget.toml"


@dataclass(frozen=True)
class Ask:
    """One question: what to answer, and what is proposed from the answers before it; None where nobody else can say."""

    option: str
    text: str
    propose: Callable[[Answers], str] | None = None


def _delta_below_one_over_n(answers: Answers) -> str:
    """1 / n^1.1 with two digits, rounded down."""
    from dpbudget._schedule import default_delta

    delta = default_delta(answers["dataset_size"])
    unit = 10.0 ** (math.floor(math.log10(delta)) - 1)
    return f"{math.floor(delta / unit) * unit:.1e}"


ASKS = {
    "path": Ask("PATH", "Ledger file; one for each dataset", lambda _: "budget.ledger"),
    "dataset_size": Ask("--dataset-size", "Public nominal size of the dataset: declared, never counted"),
    "epsilon": Ask("--epsilon", "Epsilon of all runs together: 1 is strong, 3 common, 8 weak"),
    "delta": Ask("--delta", "Delta, well below 1 / dataset size", _delta_below_one_over_n),
    "batch_size": Ask(
        "--batch-size", "Batch size; a larger one needs less noise", lambda a: str(min(256, a["dataset_size"]))
    ),
    "epochs": Ask("--epochs", "Epochs", lambda _: "10"),
}


@click.command("init", cls=Leaf)
@click.argument("path", required=False)
@click.option(*SIZE, cls=TwoNames, type=COUNT, metavar="N", help="Public nominal size: declared, never counted.")
@click.option("--epsilon", type=EPSILON, metavar="E", help="Total epsilon of all runs: 1 is strong, 3 common, 8 weak.")
@click.option("--delta", type=DELTA, metavar="D", help="Total delta; 1 / dataset-size^1.1 is proposed.")
@click.option(*BATCH, cls=TwoNames, type=COUNT, metavar="B", help="Expected batch size; 256 is proposed.")
@click.option("--epochs", type=EPOCHS, metavar="K", help="Expected uses of each record; 10 is proposed.")
@click.option("--yes", is_flag=True, help="Take what is proposed for everything that is not given.")
@JSON
@click.pass_context
def command(ctx: click.Context, /, yes: bool, as_json: bool, **given: Any) -> None:
    """Begin: ask for what is not given, then write the ledger PATH, keys for its owner and writer, and dpbudget.toml.

    It asks at a terminal alone; with everything given, or with --yes, it never asks. One plan may take the whole
    budget, and what it would cost is computed before anything is written. Other ledgers are made by ledger init.

    Examples:
      dpbudget init first.ledger --dataset-size 60000 --epsilon 3 --delta 1e-5 --batch-size 256 --epochs 10
      dpbudget init first.ledger --dataset-size 60000 --epsilon 3 --yes --json
    """
    answers = _answers(ctx, given, yes)
    folder = _folder(answers["path"])
    plan = _plan(answers)
    settings = folder / _SETTINGS
    write_new(str(settings), _settings(answers))
    try:
        from dpbudget.plan import Budget

        budget = Budget(epsilon=answers["epsilon"], delta=answers["delta"])
        ledger, made = make_ledger(answers["path"], budget, keys={}, passphrases=(), whole_budget=True)
    except BaseException:
        settings.unlink(missing_ok=True)  # all of it or nothing
        raise
    with ledger:
        _report(answers["path"], ledger, plan, made, settings, as_json)


def _answers(ctx: click.Context, given: Answers, yes: bool) -> Answers:
    """A checked value for every question: given, proposed, or asked for.

    Raises:
        InvalidParameter: there is nobody to ask (DP064); all that is missing is named.
    """
    answers = {name: given[name] for name in ASKS if given[name] is not None}
    params = {str(param.name): param for param in ctx.command.params}
    _check(answers)
    missing = [name for name, ask in ASKS.items() if name not in answers and not (yes and ask.propose)]
    if missing and not _at_terminal():
        missing = [name for name in missing if name != "path"]  # it has a name that suits everybody
        if missing:
            raise _nobody_to_ask({name: f"{ASKS[name].option} {params[name].metavar}" for name in missing})
        yes = True
    for name, ask in ASKS.items():
        if name not in answers:
            if yes and ask.propose:
                proposed = ask.propose(answers)
                answers[name] = params[name].type.convert(proposed, params[name], ctx)
                out.talk(f"took {ask.option} {proposed}")
            else:
                answers[name] = _ask(ask, params[name], ctx, answers)
    return answers


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _nobody_to_ask(missing: dict[str, str]) -> InvalidParameter:
    """What to add, where ``missing`` has name -> option and metavar."""
    options = ", ".join(ASKS[name].option for name in missing)
    needed = " ".join(call for name, call in missing.items() if ASKS[name].propose is None)
    return InvalidParameter(
        f"there is no terminal to ask at, and {options} {'is' if len(missing) == 1 else 'are'} missing",
        code="DP064",
        hint=f"add {' '.join(missing.values())}; or {needed} --yes, to take what is proposed".replace("  ", " "),
    )


def _ask(ask: Ask, param: click.Parameter, ctx: click.Context, before: Answers) -> Any:
    """Ask until the answer is one; Ctrl-C and the end of the input end it all, with nothing written."""
    proposed = ask.propose(before) if ask.propose else None
    while True:
        text = str(click.prompt(ask.text, default=proposed, err=True))
        try:
            value = param.type.convert(text, param, ctx)
            _check({**before, str(param.name): value})
        except InvalidParameter as error:
            out.report_error(error, as_json=False)
        else:
            return value


def _check(answers: Answers) -> None:
    """What can be refused so far: a place that is taken (:func:`_folder`), a batch larger than the dataset (DP008)."""
    if "path" in answers:
        _folder(answers["path"])
    if {"batch_size", "dataset_size"} <= answers.keys():
        from dpbudget._schedule import make_schedule

        make_schedule(batch_size=answers["batch_size"], dataset_size=answers["dataset_size"], steps=1)


def _folder(path: str) -> Path:
    """Where the settings go: beside the ledger, or here for a database.

    Raises:
        InvalidParameter: the ledger is there, or there are settings already (DP074).
        Unreadable: the folder is missing (DP070).
    """
    from dpbudget._config import load_settings
    from dpbudget.ledger.store.postgres_url import is_database

    folder = Path(local_name(path)).parent
    if not is_database(path) and os.path.lexists(path):
        raise InvalidParameter(
            f"{path} exists",
            code="DP074",
            hint=f"go on with it: dpbudget ledger show {shlex.quote(path)}; or choose another path",
        )
    if not folder.is_dir():
        raise Unreadable(f"the folder {folder} does not exist", hint="make the folder first")
    source = load_settings(folder).source
    if source is not None and source.parent == folder.resolve():
        raise InvalidParameter(
            f"{source.name} has settings already, and nothing is overwritten",
            code="DP074",
            hint=f"make it alone: dpbudget ledger init {shlex.quote(path)} --epsilon E --delta D --whole-budget; "
            "or choose another folder",
        )
    return folder


def _plan(answers: Answers) -> Plan:
    """What plan new will make of the answers; its refusals come before anything is written."""
    from dpbudget._calibrate import calibrate

    return calibrate(**{name: value for name, value in answers.items() if name != "path"})


def _settings(answers: Answers) -> bytes:
    lines = [
        "# What a command of dpbudget is not told it takes from here, and says so (docs/commands.md).",
        f"dataset_size = {answers['dataset_size']}  # public, nominal: declared and never counted",
        f"batch_size = {answers['batch_size']}",
        f"epochs = {float(answers['epochs'])!r}",
        f"delta = {answers['delta']!r}",
    ]
    return ("\n".join(lines) + "\n").encode()


def _report(path: str, ledger: Ledger, plan: Plan, made: list[str], settings: Path, as_json: bool) -> None:
    folder, noise = settings.parent, plan.phases[0].noise_multiplier
    here = folder.resolve() == Path.cwd()
    go = "" if here else f"cd {shlex.quote(str(folder))} && "
    name = shown(path) if here else Path(path).name
    following = f"{go}dpbudget plan new --ledger {shlex.quote(name)}"
    notes = [ONE_PERSON, TWO_LEDGERS]
    if as_json:
        out.emit_json(
            {
                "ledger": shown(path),
                "id": ledger.id,
                "epsilon": ledger.state.epsilon,
                "delta": ledger.state.delta,
                "head": str(ledger.head),
                "keys": made,
                "settings": str(settings),
                "noise_multiplier": noise,
                "steps": plan.steps,
                "notes": notes,
                "next": following,
            }
        )
        return
    claim = f"epsilon {round_up(plan.claim.epsilon)} at delta {show_delta(plan.claim.delta)}"
    out.emit_table(
        [
            ("ledger", shown(path)),
            *(("key made", name) for name in made),
            ("settings", settings),
            ("first plan", f"{plan.steps} steps at noise multiplier {noise:.4g}: {claim}"),
            ("next", following),
        ]
    )
    for note in notes:
        out.talk(note)
