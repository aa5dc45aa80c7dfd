"""Random command lines: mostly such as people type, with values that are almost right, and words in wrong places.

The grammar is read off the commands themselves, so that a new command or option takes part without being named here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import click

from dpbudget_cli.main import app

#: No output may show it: it stands where passwords and private values do.
SECRET = "S3CRET770077"
NUMBERS = ["0", "1", "-1", "2.5", "-0.0", "1e-5", "1/60000", "256/60000", "1/0", "0.5", "nan", "inf", "-inf", "1e400"]
NUMBERS += ["1e-400", "", " ", "x", "0x10", "1_000", "٣", "1e9", "1e12", "9" * 70, "3", "8", "1e-9", "0.999999"]
COUNTS = ["0", "1", "-5", "2", "10", "20", "100", "256", "2.5", "1e3", "60000", "6e4", "1e9", "1e12", "1e30", "x", ""]
FILES = ["budget.ledger", "new.ledger", "missing.ledger", "owner.key", "owner.key.pub", "budget.ledger.writer.key"]
FILES += ["budget.ledger.owner.key", "budget.ledger.owner.key.pub", "train.csv", "train.npz", "random.bin", "empty.bin"]
FILES += [".", "no/where", "new.out", "budget.jsonl", "plan.request", "a\nb", "\x1b[2J", "🙂", "", "/dev/null", "-"]
FILES += [f"postgresql://user:{SECRET}@127.0.0.1:1/base#ledger", "profile.svg", "a" * 300, "\x00", "--", "~"]
WORDS = [
    "prv",
    "rdp",
    "pld",
    "portfolio",
    "add-remove",
    "zero-out",
    "replace-one",
    "user",
    "example",
    "secure",
    "exact",
]
WORDS += [
    "linear",
    "mlp",
    "nowhere:make",
    "os:getcwd",
    "y",
    "label",
    "owner",
    "writer",
    "checked",
    "DP050",
    "dp8",
    "bash",
]
WORDS += ["0.1,1,10", "1,2,3,4", "3f9c", "0" * 64, f"3:{'a' * 64}", "é", "", "%s", "{}", "$HOME", "*"]
#: By metavar; an option without one takes words.
VALUES = {"FILE": FILES, "PATH": FILES, "KEY": FILES}
VALUES |= dict.fromkeys(["E", "D", "S", "Q", "C", "A", "R", "F"], NUMBERS)
VALUES |= dict.fromkeys(["N", "B", "K", "T", "P"], COUNTS)
VALUES["Q,S,T"] = ["0.01,1,10", "1,1,1", "0.5,2,1e3", "1,0,1", "2,1,1", "0.1,1", ",,", "1e-9,0.5,1e9", "x,y,z"]
#: Of these a large value is honest, and takes memory or time in proportion: a width, a wait, a descriptor to read.
SMALL = {name: ["0", "1", "3", "64", "-1", "x", ""] for name in ("hidden", "classes", "physical_batch_size")}
SMALL |= {name: ["0", "0.01", "-1", "nan", "x"] for name in ("seconds", "interval")}
SMALL |= {"words": ["true", "false", "no-such-program", "", "-", "./train.csv"]}  # of run: it runs what it is told
SMALL |= {"passphrase_fd": ["99", "-1", "x", "1e9"], "time_limit": ["1", "0", "-1", "nan", "x"]}
#: What a careful person would type, by name or metavar.
TIDY = {"path": ["budget.ledger"], "target": ["new.out"], "source": ["budget.jsonl"], "request": ["plan.request"]}
TIDY |= {"event": ["checked"], "code": ["DP050"], "shell": ["bash", "fish"], "role": ["writer"], "folder": ["."]}
TIDY |= {"ledger": ["budget.ledger"], "data": ["train.csv"], "classes": ["2"], "phases": ["0.01,1,10"], "run": []}
TIDY |= {"owner_key": ["budget.ledger.owner.key"], "writer_key": ["budget.ledger.writer.key"], "plot": ["new.svg"]}
TIDY |= {"trust": ["budget.ledger.owner.key.pub"], "key": ["budget.ledger.owner.key"], "output": ["new.weights"]}
TIDY |= {"E": ["0.5", "1", "3", "8"], "D": ["1e-5", "1/60000"], "S": ["1.1", "4"], "Q": ["0.01", "20/100"], "C": ["1"]}
TIDY |= {"N": ["100", "60000"], "B": ["20", "64"], "K": ["1", "5"], "T": ["3", "20"], "A": ["0.1"], "R": ["0.2"]}
TIDY |= {"P": ["2", "5"], "F": ["0.01"], "PATH": ["budget.ledger"], "FILE": ["new.out"]}
TIDY |= {"KEY": ["budget.ledger.owner.key.pub"]}
#: Lines in which nothing is odd but their combination.
TIDY_SHARE = 0.4
#: What would go on until somebody ends it is told to end, and a sweep of hundreds of cells to have few.
ALWAYS = {("ledger", "watch"): ["--once"], ("plan", "explore"): ["--points", "3"]}
STRAY = ["--", "-", "--nothing", "--epsilonn", "-x", "surplus", "ledger", "--epsilon", "--json=1", "=", "-qv", "-h"]


@dataclass(frozen=True)
class Line:
    """Words after ``dpbudget``, and whether exactly one JSON object must answer them."""

    words: tuple[str, ...]
    as_json: bool


def leaves(group: click.Group, words: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that call it."""
    context, found = click.Context(group), []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        here = (*words, name)
        found += leaves(command, here) if isinstance(command, click.Group) else [(here, command)]
    return found


#: All but the one whose words are another program's.
COMMANDS = [(words, command) for words, command in leaves(app) if words != ("run",)]


def random_line(draw: random.Random) -> Line:
    """One line: a command with some of its options and arguments, sometimes with something out of place."""
    if draw.random() < 0.03:
        return Line(
            tuple(draw.choices([*STRAY, *WORDS, *(name for words, _ in COMMANDS for name in words)], k=3)), False
        )
    words, command = draw.choice(COMMANDS)
    tidy = draw.random() < TIDY_SHARE
    parts: list[list[str]] = []
    for param in command.params:
        if param.name == "as_json":
            continue
        if isinstance(param, click.Argument):
            if draw.random() < (1.0 if tidy and param.required else 0.8):
                parts.append([_value(draw, param, tidy)])
        elif draw.random() < (0.95 if param.required else 0.1 if tidy else 0.25):
            parts += [_option(draw, param, tidy) for _ in range(draw.choice([1, 1, 1, 2]) if param.multiple else 1)]
    if not tidy:
        draw.shuffle(parts)
    typed = [word for part in parts for word in part]
    if not tidy and draw.random() < 0.2:
        typed.insert(draw.randrange(len(typed) + 1), draw.choice(STRAY))
    as_json = draw.random() < 0.5 and not {"-h", "--", "--help", "--help-all"} & set(typed)
    # First, where neither can be taken for the value of an option.
    first = [*ALWAYS.get(words, []), *(["--json"] if as_json else [])]
    return Line((*words, *first, *typed), as_json)


def _option(draw: random.Random, param: click.Parameter, tidy: bool) -> list[str]:
    name = draw.choice(param.opts)
    if isinstance(param, click.Option) and param.is_flag:
        return [name]
    value = _value(draw, param, tidy)
    return [f"{name}={value}"] if name.startswith("--") and draw.random() < 0.2 else [name, value]


def _value(draw: random.Random, param: click.Parameter, tidy: bool) -> str:
    name, choices = str(param.name), list(getattr(param.type, "choices", ()))
    likely = choices or TIDY.get(name) or TIDY.get(str(param.metavar))
    if likely and (tidy or draw.random() < 0.5):
        return draw.choice(likely)
    if name in SMALL:
        return draw.choice(SMALL[name])
    if draw.random() < 0.1:
        return draw.choice(NUMBERS + FILES + WORDS)
    if isinstance(param, click.Argument):
        # The first of FILES are those that are there.
        return draw.choice(FILES[:10] if draw.random() < 0.7 else [*FILES, *WORDS])
    return draw.choice(VALUES.get(str(param.metavar), WORDS))
