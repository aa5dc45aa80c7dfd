"""``dpbudget train``: a linear model, an MLP or your own model on a file, under a signed plan."""

from __future__ import annotations

import importlib
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from dpbudget.curve import round_up, show_delta
from dpbudget.errors import DPBudgetError, InvalidParameter, MissingExtra, Unreadable
from dpbudget_cli import _output as out
from dpbudget_cli._checkpoints import Checkpoints
from dpbudget_cli._keys import PASSPHRASE_FD, key_path, load_signer, local_name, read_passphrases, require_ledger
from dpbudget_cli._lock import hold_output
from dpbudget_cli._noise_keys import committed_options, keep_options, kept_keys, open_plan_key
from dpbudget_cli._options import COUNT, JSON, POSITIVE, SEED, SHARE
from dpbudget_cli.ledger_init import USERS_TRAIN
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    import torch

    from dpbudget.curve import Bounds
    from dpbudget.ledger.run import Run
    from dpbudget.ledger.state import LedgerState
    from dpbudget_cli._data import Table
    from dptrainer.trainer import TrainingResult


@dataclass(frozen=True)
class _Job:
    """What the options say; every field is public."""

    data: str
    target: str
    classes: int
    model: str
    hidden: int
    lr: float
    momentum: float
    feature_scale: float
    seed: int
    output: str | None
    init: str | None
    public_eval: str | None
    physical_batch_size: int | None
    checkpoint_every: int
    record_outputs: bool


_SIGNED = "leave it out: the signed plan has it (dpbudget plan show); for another, dpbudget plan new"
_IN_PLAN = (
    "epochs",
    "steps",
    "batch-size",
    "dataset-size",
    "sample-rate",
    "noise-multiplier",
    "clip-norm",
    "epsilon",
    "delta",
)


@click.command("train", cls=Leaf, elsewhere={f"--{name}": _SIGNED for name in _IN_PLAN})
@click.option("--ledger", "path", required=True, metavar="PATH", help="The ledger that holds the plan.")
@click.option("--plan", "run_id", metavar="RUN", help="The run, if several have steps left.")
@click.option("--writer-key", metavar="FILE", help="PATH.writer.key or writer.key beside it if not given.")
@click.option("--data", required=True, metavar="FILE", help="Private .csv with a header, or .npz.")
@click.option("--target", default="y", metavar="COL", help="Column or array with the labels (y).")
@click.option("--classes", type=COUNT, required=True, metavar="K", help="Number of classes: declared, not counted.")
@click.option("--model", default="linear", metavar="M", help="linear, mlp, or module:factory(features, classes).")
@click.option("--hidden", type=COUNT, default=64, metavar="H", help="Width of the mlp (64).")
@click.option("--lr", type=POSITIVE, default=0.5, metavar="R", help="Learning rate of SGD (0.5).")
@click.option("--momentum", type=SHARE, default=0.0, metavar="M", help="Momentum (0).")
@click.option("--feature-scale", type=POSITIVE, default=1.0, metavar="F", help="Public factor for all features (1).")
@click.option("--seed", type=SEED, default=0, metavar="N", help="Seed of the initial weights alone (0).")
@click.option("--output", metavar="FILE", help="New file for weights (PATH.RUN.safetensors).")
@click.option("--init", metavar="FILE", help="Begin with these weights: public, or an --output.")
@click.option("--public-eval", metavar="FILE", help="File that you declare public, for an accuracy.")
@click.option("--physical-batch-size", type=COUNT, metavar="B", help="Most records in memory at once.")
@click.option("--checkpoint-every", type=COUNT, default=100, metavar="T", help="Steps between two checkpoints (100).")
@keep_options
@committed_options
@PASSPHRASE_FD
@JSON
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

    No loss, size or accuracy of the private data is computed for display, and features are not standardised by it.
    Column names and their number are treated as public. Started again after a crash, it goes on from the newest
    checkpoint; Ctrl-C writes the weights. docs/commands.md says more.

    Examples:
      dpbudget train --ledger budget.ledger --data train.csv --target label --classes 2
      dpbudget train --ledger budget.ledger --data train.npz --classes 10 --model mlp --output mlp.safetensors
    """
    keep = kept_keys(keep_keys, auditor)
    job = _Job(**values, record_outputs=keep is not None or plan_key is not None)
    _require_torch()
    if job.output is not None:
        _check_output(job.output)
    from dpbudget._surface import open_ledger, start

    require_ledger(path)
    passphrases = read_passphrases(passphrase_fd)
    writer = load_signer(key_path(writer_key, path, "writer"), passphrases)
    key = None if plan_key is None else open_plan_key(plan_key, passphrases)
    with ExitStack() as held:
        with open_ledger(path, writer=writer) as ledger:
            _refuse_users(ledger.state)
            chosen = _choose_run(ledger.state, run_id)
            output = job.output or f"{local_name(path)}.{chosen[:8]}.safetensors"
            held.enter_context(hold_output(output))  # until the weights are written
            table = _read(job, job.data)
            held_out = _read(job, job.public_eval) if job.public_eval else None
            model = _make_model(job, table)
            with (
                _stop_on_interrupt() as interrupt,
                start(ledger, chosen, keep_keys=keep, plan_key=key, expect_head=expect_head) as run,
            ):
                if run.remaining:
                    _check_output(output)
                _say_before(run, str(ledger.head))
                checkpoints = Checkpoints(output, run, job.checkpoint_every)
                result = _fit(model, job, table, run, interrupt, checkpoints)
            head = str(ledger.head)
        _save(model, output, result)
        checkpoints.clear()
    job = replace(job, output=output)
    accuracy = None if held_out is None else _accuracy(model, held_out)
    _report(result, job, head, accuracy, as_json)
    if interrupt.asked:
        out.talk(f"to go on, call it again with --init {output} and another --output")
        sys.exit(130)


def _refuse_users(state: LedgerState) -> None:
    """Refuse a ledger that protects users: every row of a file would be taken for one of them."""
    if state.genesis.unit == "user":
        raise InvalidParameter(
            "the ledger protects users with all of their rows; dpbudget train reads every row as an example of its own",
            code="DP025",
            hint=f"{USERS_TRAIN}; nothing was charged",
        )


def _choose_run(state: LedgerState, text: str | None) -> str:
    """The named run, else the only one with steps left; the newest where none has, which is refused later (DP050)."""
    from dpbudget_cli.plan_show import find_run

    if text is not None:
        return find_run(tuple(state.runs), text)
    unfinished = [run.run_id for run in state.runs.values() if run.charged < run.plan.steps]
    if len(unfinished) == 1:
        return unfinished[0]
    if state.runs and not unfinished:
        return list(state.runs)[-1]
    if not unfinished:
        raise InvalidParameter(
            "no plan is signed into this ledger yet", code="DP081", hint="sign one in: dpbudget plan new"
        )
    raise InvalidParameter(
        f"{len(unfinished)} runs of this ledger have steps left",
        code="DP081",
        hint=f"name one with --plan: {', '.join(unfinished)}",
    )


def _require_torch() -> None:
    try:
        import safetensors
        import torch
    except ImportError as error:
        raise MissingExtra(
            f"training needs {error.name}, which is not installed", hint="pip install 'dpbudget[train]'"
        ) from None
    del safetensors, torch


def _check_output(output: str) -> None:
    """Refuse, before any step is charged, a file that could not be written after the last one."""
    place = Path(output)
    if os.path.lexists(place):
        raise InvalidParameter(
            f"{output} exists",
            code="DP074",
            hint="choose another --output, with --init if these weights go on; no step was taken",
        )
    if not place.parent.is_dir() or not os.access(place.parent, os.W_OK):
        raise Unreadable(f"the folder {place.parent} cannot be written", hint="make the folder first")


def _read(job: _Job, path: str) -> Table:
    from dpbudget_cli._data import read_table

    return read_table(path, job.target, job.classes, job.feature_scale)


def _make_model(job: _Job, table: Table) -> torch.nn.Module:
    """The model with its initial weights, on the CPU and in train mode."""
    import torch

    torch.manual_seed(job.seed)  # initial weights only; sampling and noise have keys of their own
    features = int(table.features[0].size)
    if job.model == "linear":
        layers: list[torch.nn.Module] = [torch.nn.Linear(features, job.classes)]
        model: torch.nn.Module = torch.nn.Sequential(torch.nn.Flatten(), *layers)
    elif job.model == "mlp":
        layers = [torch.nn.Linear(features, job.hidden), torch.nn.Tanh(), torch.nn.Linear(job.hidden, job.classes)]
        model = torch.nn.Sequential(torch.nn.Flatten(), *layers)
    else:
        model = _from_factory(job, features)
        _try_out(model, job, table.features.shape[1:])
    if job.init:
        _load(model, job.init)
    return model.train()


def _from_factory(job: _Job, features: int) -> torch.nn.Module:
    """What ``module:factory(features, classes)`` returns; its failures are reported as the user's (DP093)."""
    import torch

    module, colon, name = job.model.partition(":")
    if not colon or not module or not name:
        from dpbudget._checks import did_you_mean

        close = did_you_mean(job.model, ("linear", "mlp"))
        raise InvalidParameter(
            f"unknown model {job.model!r}",
            code="DP060",
            hint=f"choose linear, mlp or module:factory. {close}".strip(),
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        model = getattr(importlib.import_module(module), name)(features, job.classes)
    except DPBudgetError:
        raise
    except Exception as error:  # noqa: BLE001 - code of the user: whatever it raises is reported, not shown as a trace
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InvalidParameter(
            f"the model factory {job.model} failed with {what}",
            code="DP093",
            hint="it is imported from this folder or PYTHONPATH, called as factory(features, classes), and returns a "
            "torch.nn.Module",
        ) from None
    finally:
        sys.path.pop(0)
    if not isinstance(model, torch.nn.Module):
        raise InvalidParameter(
            f"the model factory {job.model} returned {type(model).__name__}",
            code="DP093",
            hint="return a torch.nn.Module",
        )
    return model


def _try_out(model: torch.nn.Module, job: _Job, shape: tuple[int, ...]) -> None:
    """Call a user's model on two records of zeros; what it says of those may be shown in full (DP093)."""
    import torch

    what = ""
    try:
        with torch.no_grad():
            scores = model.eval()(torch.zeros(2, *shape))
        if not isinstance(scores, torch.Tensor) or scores.shape != (2, job.classes):
            what = f"returns {list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__}"
    except Exception as error:  # noqa: BLE001 - code of the user, as above
        what = "fails with " + " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if what:
        raise InvalidParameter(
            f"the model {job.model} {what} for two records of zeros, of shape {[2, *shape]}",
            code="DP093",
            hint=f"take float32 of shape [B, {', '.join(map(str, shape))}] and return [B, {job.classes}]; nothing was "
            "charged",
        )


@dataclass
class _Interrupt:
    asked: bool = False


@contextmanager
def _stop_on_interrupt() -> Iterator[_Interrupt]:
    """The first interrupt ends training after the running step, so that the weights are kept; the second ends all."""
    interrupt = _Interrupt()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True
        out.talk("stopping after this step; interrupt again to stop at once")

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread, which alone receives signals
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _say_before(run: Run, head: str) -> None:
    claim = run.plan.claim
    out.talk(f"run {run.run_id}: {run.charged} of {run.planned} steps charged; head {head}")
    out.talk(f"the plan claims epsilon {round_up(claim.epsilon)} at delta {show_delta(claim.delta)}")


def _resume(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, job: _Job, run: Run, checkpoints: Checkpoints
) -> bool:
    """Go on from the newest checkpoint, and say where the weights come from; whether there was one."""
    steps = None if job.init else checkpoints.resume(model, optimizer)
    if steps is not None:
        out.talk(f"going on from the checkpoint of step {steps}")
    elif run.charged and run.remaining and job.init is None:
        out.talk(
            "the ledger has steps of this run already, and there is no checkpoint and no --init: weights begin anew"
        )
    return steps is not None


def _fit(
    model: torch.nn.Module,
    job: _Job,
    table: Table,
    run: Run,
    interrupt: _Interrupt,
    checkpoints: Checkpoints,
) -> TrainingResult:
    import torch

    from dptrainer.trainer import PrivateTrainer, TrainingResult

    dataset = torch.utils.data.TensorDataset(torch.from_numpy(table.features), torch.from_numpy(table.labels))
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad] or list(model.parameters()),
        lr=job.lr,
        momentum=job.momentum,
    )
    if _resume(model, optimizer, job, run, checkpoints) and not run.remaining:
        claim = run.plan.claim  # killed within the last lease: its steps are spent, and these are the weights
        return TrainingResult(run.run_id, 0, run.charged, run.planned, False, run.epsilon(), claim.epsilon, claim.delta)
    with _progress(run) as show:

        def each(steps: int, epsilon: Bounds | None) -> bool:
            show(epsilon)
            checkpoints.keep(model, optimizer, steps)
            return not interrupt.asked

        try:
            trainer = PrivateTrainer(
                model,
                optimizer,
                torch.nn.CrossEntropyLoss(),
                dataset,
                run,
                physical_batch_size=job.physical_batch_size,
                record_outputs=job.record_outputs,
                callbacks=[each],
                note=out.talk,
            )
            return trainer.fit()
        except DPBudgetError:
            raise
        except Exception as error:
            if os.environ.get("DPBUDGET_TRACEBACK") or ":" not in job.model:
                raise
            # The message could show a batch size or a value, so only its type is told.
            raise InvalidParameter(
                f"the model {job.model} failed with {type(error).__name__} during training",
                code="DP093",
                hint="set DPBUDGET_TRACEBACK=1 on data that are not private to see where",
            ) from None


@contextmanager
def _progress(run: Run) -> Iterator[Callable[[Bounds | None], None]]:
    """A bar with live epsilon on a terminal; silence elsewhere. It shows the run's clock, which is public."""
    if out.VOICE.quiet or not sys.stderr.isatty():
        yield lambda epsilon: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    target = round_up(run.plan.claim.epsilon, 3)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"epsilon 0 of {target}", total=run.planned, completed=run.planned - run.remaining)

        def show(epsilon: Bounds | None) -> None:
            text = "" if epsilon is None else f"epsilon {round_up(epsilon.upper, 3)} of {target}"
            bar.update(task, advance=1, description=text)

        yield show


def _load(model: torch.nn.Module, path: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError, ValueError):
        raise Unreadable(
            f"{path} does not hold weights of this model", code="DP091", hint="pass the --output of the same --model"
        ) from None


def _save(model: torch.nn.Module, output: str, result: TrainingResult) -> None:
    """Write the weights so that the file appears whole or not at all, and never over another."""
    from safetensors.torch import save

    tensors = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    facts = {"run": result.run_id, "epsilon": repr(result.claim), "delta": repr(result.delta)}
    place = Path(output)
    partial = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
    try:
        with partial.open("xb") as file:
            file.write(save(tensors, metadata=facts))
            file.flush()
            os.fsync(file.fileno())
        os.link(partial, place)
    except FileExistsError:
        raise InvalidParameter(f"{output} exists", code="DP074", hint="another process wrote it meanwhile") from None
    finally:
        partial.unlink(missing_ok=True)


def _accuracy(model: torch.nn.Module, table: Table) -> float:
    """Share of right answers on data that were declared public."""
    import torch

    model.eval()
    with torch.no_grad():
        guesses = model(torch.from_numpy(table.features)).argmax(dim=1)
    return float((guesses == torch.from_numpy(table.labels)).float().mean())


def _report(result: TrainingResult, job: _Job, head: str, accuracy: float | None, as_json: bool) -> None:
    if as_json:
        live = None if result.epsilon is None else out.bounds_json(result.epsilon)
        out.emit_json(
            {
                "run": result.run_id,
                "steps": result.steps,
                "charged": result.charged,
                "planned": result.planned,
                "claim": {"epsilon": result.claim, "delta": result.delta},
                "epsilon_so_far": live,
                "head": head,
                "output": job.output,
                "public_accuracy": accuracy,
            }
        )
        return
    rows: list[tuple[str, object]] = [
        ("run", result.run_id),
        ("claim", f"epsilon {round_up(result.claim)} at delta {show_delta(result.delta)}"),
        ("steps", f"{result.charged} of {result.planned} charged"),
        ("head", head),
    ]
    rows.append(("weights", job.output))
    if accuracy is not None:
        rows.append(("public accuracy", f"{accuracy:.4f}"))
    out.emit_table(rows)
