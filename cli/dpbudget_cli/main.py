"""The root command and its groups: which commands exist, under which heading, and where each is."""

from __future__ import annotations

import click

from dpbudget_cli._app import COMPLETE_VAR as COMPLETE_VAR
from dpbudget_cli._app import CONTEXT, EXIT_CODES, LazyGroup, Root
from dpbudget_cli._app import Leaf as Leaf


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from dpbudget import __version__

        click.echo(f"dpbudget {__version__}")
        ctx.exit()


def _leaf(name: str) -> str:
    return f"dpbudget_cli.{name}:command"


app = Root(
    "dpbudget",
    context_settings=CONTEXT,
    help="Privacy budgets that are certified before, enforced during and proved after training.\n\n"
    "\b\nExamples:\n  dpbudget calibrate --epsilon 3\n  dpbudget epsilon --sample-rate 256/60000 "
    "--noise-multiplier 1.1 --steps 14062 --delta 1e-5\n  dpbudget explain DP050",
    epilog=EXIT_CODES,
    params=[
        click.Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
        )
    ],
    sections={
        "Begin": ("init", "doctor"),
        "Plan": ("calibrate", "epsilon", "delta", "compare", "plan"),
        "Budget and ledger": ("ledger", "verify", "report", "plot"),
        "Train": ("train", "run"),
        "Keys": ("key",),
        "Help": ("explain", "config", "completion"),
    },
    lazy={
        "init": (_leaf("init"), "A few questions, and a ledger, its keys and settings from them."),
        "doctor": (_leaf("doctor"), "Whether everything here is in order, and what to do if not."),
        "calibrate": (_leaf("calibrate"), "The smallest noise for a budget, or another unknown."),
        "epsilon": (_leaf("epsilon"), "The epsilon of a schedule at a delta."),
        "delta": (_leaf("delta"), "The delta of a schedule at an epsilon."),
        "compare": (_leaf("compare"), "One schedule, counted by every accountant."),
        "key": ("dpbudget_cli.main:key", "Make, show and rotate signing keys."),
        "ledger": ("dpbudget_cli.main:ledger", "Grant a budget; show, export, prove and verify its ledger."),
        "plan": ("dpbudget_cli.main:plan", "Explore, sign and show training plans."),
        "train": (_leaf("train"), "Train a model on a file under a signed plan."),
        "run": (_leaf("run"), "Run a script of yours under a signed plan."),
        "verify": (_leaf("ledger_verify"), "Check a ledger, recompute its epsilon (ledger verify)."),
        "report": (_leaf("report"), "What a ledger guarantees, as one page (or JSON, Markdown, PDF)."),
        "plot": (_leaf("plot"), "Figures of ledgers, plans and schedules for a paper."),
        "explain": (_leaf("explain"), "What an error code means."),
        "config": ("dpbudget_cli.main:config", "What holds for everything that is not said."),
        "completion": (_leaf("completion"), "A script by which your shell completes commands."),
    },
)

key = LazyGroup(
    "key",
    context_settings=CONTEXT,
    help="Make, show and rotate signing keys. The owner's key grants budget, the writer's key spends it; an auditor's "
    "opens noise keys that were kept.\n\n"
    "\b\nExamples:\n  dpbudget key new owner.key\n  dpbudget key show owner.key",
    epilog=EXIT_CODES,
    lazy={
        "new": (_leaf("key_new"), "Make a new key file."),
        "show": (_leaf("key_show"), "Show the public half of a key."),
        "sign": (_leaf("key_sign"), "Sign a request away from the ledger."),
        "rotate": (_leaf("key_rotate"), "Hand a role of a ledger to a new key."),
        "replay": (_leaf("key_replay"), "Open the noise key of one step, for an auditor."),
    },
)

ledger = LazyGroup(
    "ledger",
    context_settings=CONTEXT,
    help="Grant a budget in a signed ledger; show, export and verify it.\n\n"
    "\b\nExamples:\n  dpbudget ledger init budget.ledger --epsilon 3 --delta 1e-5\n"
    "  dpbudget ledger verify budget.ledger",
    epilog=EXIT_CODES,
    lazy={
        "init": (_leaf("ledger_init"), "Make a ledger for one dataset."),
        "grant": ("dpbudget_cli.ledger_grant:grant", "Raise the total."),
        "lower": ("dpbudget_cli.ledger_grant:lower", "Take back what is not in use."),
        "apply": (_leaf("ledger_apply"), "Write what the owner signed elsewhere."),
        "show": (_leaf("ledger_show"), "What was granted, planned and spent."),
        "plans": ("dpbudget_cli.ledger_runs:plans", "The signed plans."),
        "runs": ("dpbudget_cli.ledger_runs:runs", "What became of every plan."),
        "watch": (_leaf("ledger_watch"), "Show steps and epsilon as they are charged."),
        "commit": ("dpbudget_cli.ledger_commit:commit", "Fix the noise of a run, for a replay."),
        "entropy": ("dpbudget_cli.ledger_commit:entropy", "Write an auditor's part of that noise."),
        "note": (_leaf("ledger_note"), "Record that something happened."),
        "verify": (_leaf("ledger_verify"), "Check every record and recompute epsilon."),
        "prove": (_leaf("ledger_prove"), "Prove a run, or a head, without the ledger."),
        "attest": (_leaf("ledger_attest"), "Verify, and sign the verdict."),
        "head": (_leaf("ledger_head"), "The signed head, to keep elsewhere."),
        "export": (_leaf("ledger_export"), "Write the ledger as JSON lines."),
        "import": (_leaf("ledger_import"), "Make a ledger from an export."),
    },
)

plan = LazyGroup(
    "plan",
    context_settings=CONTEXT,
    help="Explore what training costs, and sign a plan into a ledger.\n\n"
    "\b\nExamples:\n  dpbudget plan explore --epsilon 3 --dataset-size 60000\n"
    "  dpbudget plan new --ledger budget.ledger --epochs 10\n"
    "  dpbudget plan show --ledger budget.ledger",
    epilog=EXIT_CODES,
    lazy={
        "explore": (_leaf("plan_explore"), "What batch size and epochs cost in noise, and which are worth it."),
        "new": (_leaf("plan_new"), "Calibrate a plan and sign it in."),
        "show": (_leaf("plan_show"), "Show the plans of a ledger."),
    },
)

config = LazyGroup(
    "config",
    context_settings=CONTEXT,
    help="The settings: flags, then dpbudget.toml or [tool.dpbudget], then documented defaults.\n\n"
    "\b\nExamples:\n  dpbudget config show\n  dpbudget config show --json",
    epilog=EXIT_CODES,
    lazy={"show": (_leaf("config_show"), "Every setting, its value, and where it comes from.")},
)

#: The script and the tests' name of the same command.
main = app
