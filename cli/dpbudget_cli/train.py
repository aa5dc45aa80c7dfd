"""``dpbudget train``: a linear model, an MLP, a CNN or your own model on a file, under a signed plan."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from dpbudget.curve import round_up, show_delta
from dpbudget.errors import InvalidParameter, MissingExtra, PlanExhausted
from dpbudget_cli import _output as out
from dpbudget_cli._card import Facts, accuracy_text, card, split_text
from dpbudget_cli._checkpoints import Checkpoints
from dpbudget_cli._heldout import Score, Split, charged_score, check_score, public_score, split_off
from dpbudget_cli._job import Job
from dpbudget_cli._keys import key_path, load_signer, local_name, read_passphrases, require_ledger, shown
from dpbudget_cli._lock import hold_output
from dpbudget_cli._models import BUILT_IN, make_model
from dpbudget_cli._more import LongLeaf
from dpbudget_cli._noise_keys import NoiseKeys, kept_keys, open_plan_key
from dpbudget_cli._progress import Clock, last_line, lease_steps, stop_on_interrupt
from dpbudget_cli._runs import choose_run, used_up
from dpbudget_cli._train_options import train_options
from dpbudget_cli._training import blaming, nothing_of_the_data, train_private
from dpbudget_cli._weights import card_of, check_output, save_weights, write_whole
from dpbudget_cli.ledger_init import USERS_TRAIN

if TYPE_CHECKING:
    import torch

    from dpbudget.ledger.ledger import Ledger
    from dpbudget.ledger.run import Run
    from dpbudget.ledger.state import LedgerState
    from dpbudget_cli._data import Table
    from dptrainer.trainer import TrainingResult

_SIGNED = "leave it out: the signed plan has it (dpbudget plan show); for another, dpbudget plan new"
_UNSCALED = (
    "features are used as the file has them; SGD wants about -1 to 1: scale columns by constants that are public, or "
    "all of them by --feature-scale"
)
_IN_PLAN = (
    "epochs",
    "steps",
    "batch-size",
    "batch",
    "dataset-size",
    "examples",
    "sample-rate",
    "noise-multiplier",
    "clip-norm",
    "epsilon",
    "delta",
)


@dataclass(frozen=True)
class _Prepared:
    """What training needs, read and checked before anything is charged."""

    model: torch.nn.Module
    split: Split
    public: Table | None


@dataclass(frozen=True)
class _Done:
    """What came of it."""

    result: TrainingResult
    head: str
    output: str
    public: float | None
    score: Score | None
    interrupted: bool
    untaken: int


@click.command("train", cls=LongLeaf, elsewhere={f"--{name}": _SIGNED for name in _IN_PLAN})
@train_options
def command(
    path: str,
    run_id: str | None,
    writer_key: str | None,
    keep_keys: str | None,
    auditor: str | None,
    plan_key: str | None,
    expect_head: str | None,
    passphrase_fd: int | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Train on a file under a signed plan; noise, clipping, sampling and steps come from the plan alone.

    No loss, size or accuracy of private data is shown: an accuracy needs a file that you declare public
    (--public-eval), or a plan of one step that pays for a noisy one (--score-plan). Started again after a crash, it
    goes on from the newest checkpoint; Ctrl-C writes the weights. docs/commands.md says more.

    Examples:
      dpbudget train --ledger budget.ledger --data train.csv --target label --classes 2
      dpbudget train --ledger budget.ledger --data train.npz --classes 10 --model mlp --output mlp.safetensors
    """
    job, clock, keep = Job(**values), Clock(), kept_keys(keep_keys, auditor)
    job.check()
    _require_torch()
    if job.output is not None:
        check_output(job.output)
    from dpbudget._surface import open_ledger

    require_ledger(path)
    passphrases = read_passphrases(passphrase_fd)
    writer = load_signer(key_path(writer_key, path, "writer"), passphrases)
    key = None if plan_key is None else open_plan_key(plan_key, passphrases)
    with ExitStack() as held, open_ledger(path, writer=writer) as ledger:
        score_run = job.score_plan and choose_run(ledger.state, job.score_plan, ledger=shown(path))
        chosen = choose_run(ledger.state, run_id, ledger=shown(path), but=score_run)
        check_score(job, ledger.state, chosen, score_run)
        output = job.output or f"{local_name(path)}.{chosen[:8]}.safetensors"
        held.enter_context(hold_output(output))  # until the weights are written
        held.enter_context(nothing_of_the_data())
        prepared = _prepare(job, ledger.state)
        noise = NoiseKeys(keep, key, expect_head)
        try:
            done = _train(job, prepared, ledger, shown(path), chosen, score_run, output, noise)
        except PlanExhausted as error:
            raise used_up(error.message, shown(path)) from None
    _report(done, as_json)
    if done.untaken:
        out.talk(f"{done.untaken} of the charged steps were not taken: the rest of a lease, which nobody gets back")
    if done.result.charged == done.result.planned:
        out.talk(f"next: dpbudget report {shlex.quote(shown(path))}, a page for the owner of the data")
    out.talk(last_line(done.result, done.public, clock))
    if done.result.charged < done.result.planned:
        out.talk(f"to go on, call it again with --init {output} and another --output")
    if done.interrupted:
        sys.exit(130)


def _require_torch() -> None:
    try:
        import safetensors
        import torch
    except ImportError as error:
        raise MissingExtra(
            f"training needs {error.name}, which is not installed", hint="pip install 'dpbudget[train]'"
        ) from None
    del safetensors, torch


def _prepare(job: Job, state: LedgerState) -> _Prepared:
    """Read and check everything that the options name; nothing is charged meanwhile."""
    _check_unit(job, state)
    split = split_off(job, job.read(job.data), state)
    if job.hold_out is not None:
        out.talk(f"kept from training: {split_text(job.hold_out, 'user' if job.user_column else 'record')}")
    if job.feature_scale == 1.0 and len(split.train.features.shape) == 2:
        out.talk(_UNSCALED)
    public = job.read_public(job.public_eval) if job.public_eval else None
    shape = split.train.features.shape[1:]
    for name, other in ((job.validation, split.held_out), (job.public_eval, public)):
        if other is not None and other.features.shape[1:] != shape:
            raise InvalidParameter(
                f"records of {name} have the shape {list(other.features.shape[1:])}, those of {job.data} {list(shape)}",
                code="DP091",
                hint="give both files the same features; nothing was charged",
            )
    return _Prepared(make_model(job, shape), split, public)


def _check_unit(job: Job, state: LedgerState) -> None:
    """Refuse a ledger for users without users, where every row would be taken for one, and the other way round."""
    unit = state.genesis.unit
    if unit == "user" and job.user_column is None:
        raise InvalidParameter(
            "the ledger protects users with all of their rows, and nothing says whose each row is",
            code="DP025",
            hint=f"{USERS_TRAIN}; nothing was charged",
        )
    if unit != "user" and job.user_column is not None:
        raise InvalidParameter(
            "the ledger protects one row, and --user-column asks for users",
            code="DP025",
            hint="leave --user-column out, or make a ledger with --unit user; nothing was charged",
        )


def _train(
    job: Job,
    prepared: _Prepared,
    ledger: Ledger,
    location: str,
    chosen: str,
    score_run: str | None,
    output: str,
    noise: NoiseKeys,
) -> _Done:
    """Train, write the weights, then measure what may be measured, and write the card."""
    model, planned = prepared.model, ledger.state.runs[chosen].plan.steps
    with stop_on_interrupt() as interrupt, noise.start(ledger, chosen, lease_steps(planned, job.max_steps)) as run:
        if run.remaining:
            check_output(output)
        _say_before(run, str(ledger.head), location)
        before = run.charged
        checkpoints = Checkpoints(output, run, job.checkpoint_every)
        result = train_private(model, job, prepared.split.train, run, noise, interrupt, checkpoints)
    digest = save_weights(model, output, Facts.of(ledger, location, result).metadata())
    checkpoints.clear()
    public, score = None, None
    try:
        if prepared.public is not None:
            public = public_score(model, prepared.public.scaled(job.feature_scale)).accuracy
        if not interrupt.asked:
            with blaming(job.model, "on the held-out records"):
                score = _score(job, prepared, ledger, score_run)
    finally:
        facts = Facts.of(ledger, location, result)
        text = card(
            facts, output, digest, model=job.model, init=job.init, public=public, score=score, hold_out=job.hold_out
        )
        write_whole(card_of(output), text.encode())
    return _Done(result, facts.head, output, public, score, interrupt.asked, result.charged - before - result.steps)


def _score(job: Job, prepared: _Prepared, ledger: Ledger, score_run: str | None) -> Score | None:
    """An accuracy on held-out records, where somebody pays for it or the owner declared the data public."""
    from dpbudget._surface import start

    if prepared.split.held_out is None:
        return None
    table = prepared.split.held_out.scaled(job.feature_scale)
    if score_run is not None:
        with start(ledger, score_run) as run:
            return charged_score(prepared.model, table, run, alone=job.model not in BUILT_IN)
    if ledger.state.genesis.public_data:
        return public_score(prepared.model, table)
    out.talk("no accuracy on the held-out records was computed: --score-plan RUN would pay for it")
    return None


def _say_before(run: Run, head: str, location: str) -> None:
    claim = run.plan.claim
    out.talk(f"run {run.run_id}: {run.charged} of {run.planned} steps charged; head {head}")
    out.talk(f"the plan claims epsilon {round_up(claim.epsilon)} at delta {show_delta(claim.delta)}")
    if not sys.stderr.isatty():  # a terminal has a bar
        out.talk(f"how far it is, from elsewhere: dpbudget ledger watch {shlex.quote(location)}")


def _report(done: _Done, as_json: bool) -> None:
    result, score = done.result, done.score
    if as_json:
        live = None if result.epsilon is None else out.bounds_json(result.epsilon)
        held_out = None if score is None else {"accuracy": score.accuracy, "noise": score.noise, "run": score.run}
        out.emit_json(
            {
                "run": result.run_id,
                "steps": result.steps,
                "charged": result.charged,
                "planned": result.planned,
                "claim": {"epsilon": result.claim, "delta": result.delta},
                "epsilon_so_far": live,
                "head": done.head,
                "output": done.output,
                "card": card_of(done.output),
                "public_accuracy": done.public,
                "held_out": held_out,
            }
        )
        return
    rows: list[tuple[str, object]] = [
        ("run", result.run_id),
        ("claim", f"epsilon {round_up(result.claim)} at delta {show_delta(result.delta)}"),
        ("steps", f"{result.charged} of {result.planned} charged"),
        ("head", done.head),
        ("weights", done.output),
        ("model card", card_of(done.output)),
    ]
    if done.public is not None:
        rows.append(("public accuracy", f"{done.public:.4f}"))
    if score is not None:
        rows.append(("held-out accuracy", accuracy_text(score)))
    out.emit_table(rows)
