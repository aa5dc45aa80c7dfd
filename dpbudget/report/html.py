"""Markup that is escaped where it is made: what is not :class:`Safe` can never become a tag."""

from __future__ import annotations

from collections.abc import Iterable

_VOID = frozenset({"meta", "br", "hr"})
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"})


class Safe(str):
    """Markup that :func:`tag` made, or a constant of this package."""

    __slots__ = ()


#: What a tag may hold; None is nothing.
Child = str | int | None | Iterable["Child"]


def escape(text: str) -> Safe:
    """Text as it may stand between tags and in quoted attributes."""
    return text if isinstance(text, Safe) else Safe(text.translate(_ESCAPES))


def join(*children: Child) -> Safe:
    """Children one after the other: markup as it is, everything else escaped."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, str):
            parts.append(escape(child))
        elif isinstance(child, int):
            parts.append(str(child))
        elif child is not None:
            parts.append(join(*child))
    return Safe("".join(parts))


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Safe:
    """An element. ``class_`` is the attribute class, ``aria_label`` is aria-label; True is an empty attribute."""
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(_plain(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Safe(f"<{name}{shown}>")
    return Safe(f"<{name}{shown}>{join(*children)}</{name}>")


def _plain(value: str | float) -> str:
    """Coordinates with at most two decimals, so that a page is small and the same on every machine."""
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
