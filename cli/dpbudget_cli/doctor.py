"""``dpbudget doctor``: whether installation, state folder, ledgers and keys are in order, with the way out if not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpbudget.errors import Unreadable
from dpbudget_cli import _output as out
from dpbudget_cli._options import JSON
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget_cli._checkup import Finding

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
_UNSAFE = 1


@click.command("doctor", cls=Leaf)
@click.argument("folder", required=False, default=".")
@click.option("--deep", is_flag=True, help="Load torch too: ask it for a GPU, and compile the native code.")
@JSON
@click.pass_context
def command(ctx: click.Context, folder: str, deep: bool, as_json: bool) -> None:
    """Look at installation, SQLite, compiler, state folder and settings, and at ledgers and keys in FOLDER (here).

    Every line is ok, warn (something is missing; the line says what for) or fail (something is unsafe), with the way
    out. Nothing is changed. Exit code 1 if anything is unsafe, else 0. Whether a ledger holds is what verify says.

    Examples:
      dpbudget doctor
      dpbudget doctor --deep --json
    """
    from dpbudget_cli import _checkup

    place = Path(folder)
    if not place.is_dir():
        raise Unreadable(f"{folder} is not a folder", hint="name the folder of ledgers and keys, or none for this one")
    found = [*_checkup.installed(), _checkup.compiler()]
    if deep:
        from dpbudget_cli._deep import devices_and_kernels

        found += devices_and_kernels()
    else:
        found.append(_checkup.Finding("GPU", "ok", "not asked", "load torch and ask: dpbudget doctor --deep"))
    found += [_checkup.database(), _checkup.marks(), _checkup.settings(), *_checkup.ledgers_and_keys(place)]
    unsafe, lacking = (sum(one.status == status for one in found) for status in ("fail", "warn"))
    if as_json:
        lines = [{"name": one.name, "status": one.status, "message": one.says, "fix": one.fix} for one in found]
        out.emit_json({"ok": not unsafe, "unsafe": unsafe, "warnings": lacking, "checks": lines})
    else:
        _tell(found, unsafe, lacking)
    ctx.exit(_UNSAFE if unsafe else 0)


def _tell(found: list[Finding], unsafe: int, lacking: int) -> None:
    width = max(len(one.name) for one in found)
    for one in found:
        status = click.style(f"{one.status:<4}", fg=_COLOURS[one.status])
        click.echo(f"{status}  {out.clean(one.name):<{width}}  {out.clean(one.says)}")
        if one.fix:
            word = "Try" if one.status == "ok" else "Fix"
            click.echo(f"{'':6}{'':{width}}  {word}: {out.clean(one.fix)}")
    if unsafe:
        click.echo(f"{unsafe} unsafe, {lacking} to know of")
    else:
        click.echo(f"nothing unsafe{f', {lacking} to know of' if lacking else ''}")
