"""A command with more options than a screen has lines: ``-h`` shows what most calls need, ``--help-all`` every one."""

from __future__ import annotations

from typing import Any

import click

from dpbudget_cli.main import Leaf


class LongLeaf(Leaf):
    """A command whose options may be hidden from ``-h``; ``--help-all`` shows them too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        show_all = click.Option(
            ["--help-all"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_all,
            help="Show every option and exit.",
        )
        kwargs["params"] = [*(kwargs.get("params") or ()), show_all]
        super().__init__(*args, **kwargs)


def _show_all(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    hidden = [option for option in ctx.command.params if isinstance(option, click.Option) and option.hidden]
    for option in hidden:
        option.hidden = False
    try:
        click.echo(ctx.get_help())
    finally:
        for option in hidden:
            option.hidden = True
    ctx.exit()
