"""``dpbudget config show``: every setting, its value, and where it comes from."""

from __future__ import annotations

from typing import Any

import click

from dpbudget_cli import _output as out
from dpbudget_cli._options import ACCOUNTANT, ADJACENCY, BATCH, CLIP, COUNT, DELTA, EPOCHS, JSON, MODE, SIZE, TwoNames
from dpbudget_cli.main import Leaf


@click.command("show", cls=Leaf)
@click.option(*SIZE, cls=TwoNames, type=COUNT, metavar="N", help="Public nominal size of the dataset.")
@click.option(*BATCH, cls=TwoNames, type=COUNT, metavar="B", help="Expected batch size.")
@click.option("--epochs", type=EPOCHS, metavar="K", help="Expected uses of each record.")
@click.option("--delta", type=DELTA, metavar="D", help="Delta; 1 / dataset-size^1.1 if not given.")
@click.option("--clip-norm", type=CLIP, metavar="C", help="L2 bound of each record's gradient.")
@click.option("--adjacency", type=ADJACENCY, help="add-remove (default), zero-out or replace-one.")
@click.option("--accountant", type=ACCOUNTANT, help="prv (default, tight) or rdp (looser).")
@click.option("--max-parameters", type=COUNT, metavar="D", help="Most trainable parameters.")
@MODE
@JSON
def command(as_json: bool, **values: Any) -> None:
    """Show what a command takes for everything that it is not told, and where that comes from.

    A flag comes before dpbudget.toml or [tool.dpbudget] in pyproject.toml, the nearest of them at or above this folder,
    and that before the documented default. No environment variable changes a setting: what decides a guarantee stands
    in the command or in a file. The same flags as of other commands may be tried here.

    Examples:
      dpbudget config show
      dpbudget config show --dataset-size 5000 --epochs 20 --json
    """
    from dpbudget._config import DEFAULTS
    from dpbudget_cli._question import Question, ask_batch, ask_delta

    question = Question(values)
    given = [name for name in DEFAULTS if question.has(name)]
    question.need("dataset_size")
    ask_batch(question)
    question.need(*DEFAULTS)
    if not question.has("delta"):
        ask_delta(question)
    why = {item.name: item.why for item in question.assumed}
    settings = {}
    for name in DEFAULTS:
        # A default that another setting changed, such as a batch of the whole dataset, is no longer the file's.
        from_file = why.get(name, "").startswith("set in")
        origin = "flag" if name in given else "file" if from_file else "default"
        value = values[name] if name != "epochs" else float(values[name])
        settings[name] = {"value": value, "from": origin, "why": why.get(name, "said in this command")}
    source = question.settings.source
    if as_json:
        out.emit_json({"file": None if source is None else str(source), "settings": settings})
        return
    out.talk("no settings file is at or above this folder" if source is None else f"the settings file is {source}")
    rows = [(name.replace("_", "-"), _plain(one["value"]), one["from"], one["why"]) for name, one in settings.items()]
    out.emit_columns(("setting", "value", "from", "why"), rows)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
