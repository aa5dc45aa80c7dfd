"""What mkdocs does to a page beside its plugins: cross-references of docstrings become plain names."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc|obj):<code>~?([^<]*)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """``:func:`~a.b.c``` as ``c``, and ``:func:`a.b``` as ``a.b``."""
    return _ROLE.sub(lambda found: f"<code>{_name(found[0], found[1])}</code>", html)


def _name(role: str, path: str) -> str:
    return path.rpartition(".")[2] if "<code>~" in role else path
