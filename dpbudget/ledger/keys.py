"""Key files: private keys as PKCS#8 PEM that others can neither read nor replace, public keys as one line of text."""

from __future__ import annotations

import grp
import os
import pwd
import re
import stat
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from dpbudget.errors import InvalidParameter, Unreadable, UnsafeKeyFile
from dpbudget.ledger.signing import Ed25519Signer, PublicKey
from dpbudget.ledger.store.files import as_path, check_path, read_regular, sync_folder

MAX_KEY_BYTES = 16 * 1024
#: Signing keys, and the keys of auditors, who open sealed noise keys (:mod:`dpbudget.ledger.auditor`).
Algorithm = Literal["ed25519", "x25519"]
_PUBLIC_LINE = re.compile(r"dpbudget-(?P<algorithm>ed25519|x25519) (?P<key>[0-9a-f]{64})(?: [\x21-\x7e]{1,200})?\n?")
#: What to say of a key of another kind than is wanted.
WRONG_KIND = {
    "ed25519": "this is a signing key: name the key of an auditor (dpbudget key new --auditor)",
    "x25519": "this is an auditor's key, which signs nothing: name a signing key",
}


def new_key(path: str | os.PathLike[str], passphrase: bytes | None = None) -> Ed25519Signer:
    """Make a key; write the private half to ``path`` (mode 0600) and the public half to ``path`` + ".pub".

    The folder is made with mode 0700 where it is missing. Nothing is ever overwritten.

    Raises:
        InvalidParameter: a file of either name exists (DP074), or an empty passphrase.
        Unreadable: the folder cannot be written (DP070).
    """
    encryption = protection(passphrase)
    key = Ed25519PrivateKey.generate()
    signer = Ed25519Signer(key)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    write_key_pair(path, pem, f"dpbudget-ed25519 {signer.public.hex}")
    return signer


def write_key_pair(path: str | os.PathLike[str], private: bytes, public_line: str | None) -> None:
    """Write the private half of a key to ``path`` (mode 0600), and the public half, if any, to ``path`` + ".pub".

    Raises:
        InvalidParameter, Unreadable: as :func:`new_key`.
    """
    place = as_path(path)
    public = place.with_name(place.name + ".pub")
    for name in (place, public):
        if os.path.lexists(name):
            raise InvalidParameter(
                f"{name} exists",
                code="DP074",
                hint="use the key that is there (dpbudget.load_key, or its name in a command), or choose another path; "
                "keys are not overwritten",
            )
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_new(place, private, 0o600)
        if public_line is not None:
            _write_new(public, f"{public_line}\n".encode("ascii"), 0o644)
        sync_folder(place.parent)
    except FileExistsError as error:
        raise InvalidParameter(f"{error.filename} exists", code="DP074", hint="choose another path") from None
    except OSError as error:
        raise Unreadable(f"cannot write {place}: {error.strerror}", hint="choose a folder of your own") from None


def load_key(path: str | os.PathLike[str], passphrase: bytes | None = None) -> Ed25519Signer:
    """The private key of a file that only its owner, this user, can read.

    Raises:
        UnsafeKeyFile: a symbolic link, not a regular file, of another user, or open to group or world (DP073).
        Unreadable: missing, too big, not an Ed25519 key in PKCS#8 PEM, or a wrong or missing passphrase (DP070).
    """
    key = load_private(path, passphrase)
    if not isinstance(key, Ed25519PrivateKey):
        hint = WRONG_KIND["x25519"] if isinstance(key, X25519PrivateKey) else "make keys with dpbudget"
        raise Unreadable(f"{as_path(path)} holds a key of another algorithm than Ed25519", hint=hint)
    return Ed25519Signer(key)


def load_private(path: str | os.PathLike[str], passphrase: bytes | None) -> PrivateKeyTypes:
    """The key of whatever algorithm in a file; raises as :func:`load_key`."""
    place = as_path(path)
    data = read_private_file(place)
    if b"PRIVATE KEY" not in data:
        raise Unreadable(f"{place} is not a private key in PKCS#8 PEM", hint="make keys with dpbudget")
    try:
        return load_pem_private_key(data, passphrase)
    except TypeError:
        problem = "needs a passphrase" if passphrase is None else "is not encrypted, but a passphrase was given"
        raise Unreadable(f"the key {place} {problem}", hint="give the passphrase that the key was made with") from None
    except (ValueError, UnsupportedAlgorithm, InternalError):  # the last one is OpenSSL's for some bent keys
        raise Unreadable(
            f"{place} is not a private key in PKCS#8 PEM, or the passphrase is wrong", hint="make keys with dpbudget"
        ) from None


def check_key_file(path: str | os.PathLike[str]) -> None:
    """Whether a private key file is as safe as :func:`load_key` wants it; nothing of it is decoded.

    Raises:
        UnsafeKeyFile, Unreadable: as :func:`load_key`.
    """
    read_private_file(as_path(path))


def load_public_key(source: str | os.PathLike[str]) -> PublicKey:
    """A public key from 64 hexadecimal digits, from a line ``dpbudget-ed25519 <hex> [comment]``, or a file with it.

    Raises:
        Unreadable: no such key (DP070).
        Tampered: the key is not a safe Ed25519 point (DP080).
    """
    return PublicKey.from_hex(read_public(source, "ed25519"))


def read_public(source: str | os.PathLike[str], algorithm: Algorithm) -> str:
    """The digits of a public key of one algorithm, as :func:`load_public_key` finds them.

    Raises:
        Unreadable: no such key (DP070).
    """
    text = os.fspath(source)
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return text
    found, digits = read_any_public(text)
    if found != algorithm:
        raise Unreadable(f"{text[:200]} is not a public key of the kind {algorithm}", hint=WRONG_KIND[found])
    return digits


def read_any_public(source: str) -> tuple[str, str]:
    """Algorithm and digits of a public key, from its line or from a file with it.

    Raises:
        Unreadable: no such key (DP070).
    """
    match, hint = _PUBLIC_LINE.fullmatch(source), "name the .pub file of the key"
    if match is None:
        data = read_regular(Path(as_path(source)), MAX_KEY_BYTES)
        try:
            match = _PUBLIC_LINE.fullmatch(data.decode("ascii"))
        except UnicodeDecodeError:
            match = None
        if b"PRIVATE KEY" in data:
            hint = "this is a private key: keep it, and name the file that ends in .pub"
    if match is None:
        raise Unreadable(f"{source[:200]} is not a dpbudget public key", hint=hint)
    return match["algorithm"], match["key"]


def _check_folder(place: Path) -> None:
    """Refuse a key in a folder where others could put another one in its place."""
    status = os.stat(place.parent)
    others = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _own_group(status.st_gid))
    # With the sticky bit, as in /tmp, nobody replaces a file of somebody else.
    if (others and not status.st_mode & stat.S_ISVTX) or status.st_uid not in (os.getuid(), 0):
        raise UnsafeKeyFile(
            f"others can replace files in {place.parent}, where the key {place.name} lies "
            f"(mode {stat.S_IMODE(status.st_mode):04o}, user {status.st_uid})",
            hint=f"chmod go-w {place.parent}, or keep the key in a folder of your own",
        )


def _own_group(gid: int) -> bool:
    """Whether a group is this user's private one, as many systems make it."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return user.pw_gid == gid and set(group.gr_mem) <= {user.pw_name}


def protection(passphrase: bytes | None) -> KeySerializationEncryption:
    """How a private key is written; refuses an empty passphrase (InvalidParameter, DP073)."""
    if passphrase is None:
        return NoEncryption()
    if not passphrase:
        raise InvalidParameter("the passphrase is empty", code="DP073", hint="give one, or none at all")
    return BestAvailableEncryption(passphrase)


def _write_new(place: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(place, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def read_private_file(place: Path) -> bytes:
    """The bytes of a private file, which nobody but this user can read or replace; raises as :func:`load_key`."""
    try:
        # O_NOFOLLOW and fstat on the descriptor: what was checked is what is read. O_NONBLOCK: a FIFO must not wait.
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if place.is_symlink():
            raise UnsafeKeyFile(f"the key {place} is a symbolic link", hint="name the file itself") from None
        raise Unreadable(f"{place}: {error.strerror}", hint=check_path(place)) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UnsafeKeyFile(f"the key {place} is not a regular file", hint="name the file of the key")
    with os.fdopen(descriptor, "rb") as file:
        if _PUBLIC_LINE.fullmatch(
            os.pread(descriptor, MAX_KEY_BYTES, 0).decode("latin-1")
        ):  # before "chmod 600" misleads
            raise Unreadable(
                f"{place} is a public key, and the private one is needed",
                hint="name the file of the key, without .pub",
            )
        _check_folder(place)
        if status.st_uid != os.getuid():
            raise UnsafeKeyFile(f"the key {place} belongs to user {status.st_uid}", hint="use a key of your own")
        if status.st_mode & 0o077:
            raise UnsafeKeyFile(
                f"the key {place} has mode {stat.S_IMODE(status.st_mode):04o}: others can read or replace it",
                hint=f"chmod 600 {place}",
            )
        if status.st_size > MAX_KEY_BYTES:
            raise Unreadable(f"{place} has {status.st_size} bytes; a key has less than {MAX_KEY_BYTES}")
        return file.read(MAX_KEY_BYTES + 1)
