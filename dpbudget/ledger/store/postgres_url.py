"""The location of a ledger in PostgreSQL: what libpq is given, the ledger's name, and what may be shown of it.

A location may hold a password, so that nothing of it is shown but parts that were recognised as something else. What
is not understood whole, such as a password with a raw ``@``, ``/``, ``?`` or ``#``, is refused and not shown at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dpbudget.errors import InvalidParameter

_SCHEMES = ("postgresql://", "postgres://")
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%-]*)(?::[0-9]{1,5})?"
# As libpq reads it: credentials end at the first @, if there is one before the first slash.
_URL = re.compile(
    r"(?P<scheme>postgres(?:ql)?://)"
    r"(?:(?P<user>[A-Za-z0-9._~%+-]*)(?::(?P<password>[^@/?#\s]*))?@)?"
    rf"(?P<hosts>{_HOST}(?:,{_HOST})*)"
    r"(?P<database>/[A-Za-z0-9._~-]*)?"
    r"(?:\?(?P<query>[^#\s@]*))?"
    r"(?:#(?P<name>.*))?",
    re.ASCII,
)
_LOOKALIKE = re.compile(r"://|^\s*(?:postgres\w*|pgsql|psql|jdbc)\s*:|password\s*=", re.IGNORECASE)
#: Parameters that hold no secret; every other one, however it is spelt, is left out of what is shown.
_SHOWN = frozenset(
    ("host", "hostaddr", "port", "dbname", "user", "sslmode", "sslrootcert", "application_name", "connect_timeout",
     "target_session_attrs", "channel_binding", "gssencmode", "keepalives", "keepalives_idle", "keepalives_interval",
     "keepalives_count", "service")
)  # fmt: skip
_NAME_OF_DATABASE = re.compile(r"[A-Za-z0-9._~-]*", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9._~,:/%+-]*", re.ASCII)


@dataclass(frozen=True, repr=False)
class PostgresUrl:
    """A location that was understood.

    Attributes:
        conninfo: libpq's part, password included: never print it.
        name: the ledger's name; ``main`` where the location has none.
        shown: the location without anything that could be a secret.
    """

    conninfo: str
    name: str
    shown: str

    @classmethod
    def parse(cls, location: str) -> PostgresUrl:
        """A location in its parts.

        Raises:
            InvalidParameter: not of the form ``postgresql://user@host/database#name``, or no name of a ledger (DP070);
                the message holds nothing of the location but its name.
        """
        found = _URL.fullmatch(location)
        if found is None:
            raise InvalidParameter(
                "the PostgreSQL location is not understood; it is not shown, since it may hold a password",
                code="DP070",
                hint="write postgresql://user@host/database#name, with %40 for @, %2F for /, %3A for :, %3F for ? and "
                "%23 for # in a password, or leave the password to PGPASSWORD or ~/.pgpass",
            )
        name = found["name"] or "main"
        if not NAME.fullmatch(name):
            raise InvalidParameter(
                "what stands behind the # of the location is no name of a ledger",
                code="DP070",
                hint="write postgresql://host/database#name with 1 to 63 of a-z, 0-9, _ and -",
            )
        return cls(location.partition("#")[0], name, _shown(found))

    def __repr__(self) -> str:
        return f"<PostgresUrl {self.shown}>"


def is_database(location: object) -> bool:
    """Whether a location is a PostgreSQL URL.

    Raises:
        InvalidParameter: it looks like a URL or a connection string of another kind, which is no path and may hold a
            password (DP070).
    """
    text = location if isinstance(location, str) else ""
    if text.startswith(_SCHEMES):
        return True
    if _LOOKALIKE.search(text):
        raise InvalidParameter(
            "the location looks like that of a database, but not in the one form that is known; it is not shown, since "
            "it may hold a password",
            code="DP070",
            hint="write postgresql://user@host/database#name, or name a file without :// and password= in its name",
        )
    return False


def show_location(location: str) -> str:
    """The location without anything that could be a secret; three dots where it is not understood."""
    try:
        return PostgresUrl.parse(location).shown
    except InvalidParameter:
        return "postgresql://..."


def _shown(found: re.Match[str]) -> str:
    user = f"{found['user']}@" if found["user"] else ""
    kept = [item for item in (found["query"] or "").split("&") if _harmless(item)]
    query = f"?{'&'.join(kept)}" if kept else ""
    name = f"#{found['name']}" if found["name"] else ""
    return f"{found['scheme']}{user}{found['hosts']}{found['database'] or ''}{query}{name}"


def _harmless(item: str) -> bool:
    key, equals, value = item.partition("=")
    # libpq takes a dbname that looks like a connection string for one.
    plain = _PLAIN if key != "dbname" else _NAME_OF_DATABASE
    return equals == "=" and key in _SHOWN and plain.fullmatch(value) is not None
