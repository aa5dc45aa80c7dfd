"""``dpbudget explain``: what an error code means, offline."""

from __future__ import annotations

import click

from dpbudget.errors import CODES, WAYS_OUT, InvalidParameter
from dpbudget_cli import _output as out
from dpbudget_cli._options import JSON
from dpbudget_cli.main import Leaf


def _padded(name: str) -> str:
    """``DP005`` for ``DP5`` and ``5``; anything else as it is."""
    number = name.removeprefix("DP")
    return f"DP{int(number):03d}" if number.isascii() and number.isdecimal() and len(number) <= 9 else name


@click.command("explain", cls=Leaf)
@click.argument("code", required=False)
@JSON
def command(code: str | None, as_json: bool) -> None:
    """What a code in an error or a warning means, and the way out; without a code, what all of them mean.

    Examples:
      dpbudget explain DP050
      dpbudget explain --json DP008
    """
    if code is None:
        if as_json:
            out.emit_json({"codes": CODES, "ways_out": WAYS_OUT})
        else:
            out.emit_table(CODES.items())
        return
    name = code.upper()
    if name not in CODES:
        from dpbudget._checks import did_you_mean

        raise InvalidParameter(
            f"there is no code {code[:20]!r}",
            code="DP060",
            hint=f"{did_you_mean(_padded(name), tuple(CODES))} dpbudget explain lists all of them".strip(),
        )
    if as_json:
        out.emit_json({"code": name, "meaning": CODES[name], "way_out": WAYS_OUT[name]})
    else:
        out.emit_table([(name, CODES[name]), ("Fix", WAYS_OUT[name])])
