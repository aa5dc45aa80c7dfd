"""Key files: made privately, refused when others could read or replace them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.exceptions import InternalError
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from dpbudget.errors import InvalidParameter, Tampered, Unreadable, UnsafeKeyFile
from dpbudget.ledger import keys
from dpbudget.ledger.keys import MAX_KEY_BYTES, load_key, load_public_key, new_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "keys" / "owner"
    new_key(place)
    return place


def test_a_key_is_made_in_private_and_loads_again(tmp_path: Path) -> None:
    place = tmp_path / "keys" / "owner"
    signer = new_key(place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    assert load_key(place).public == signer.public
    assert load_public_key(f"{place}.pub") == signer.public
    assert load_public_key(Path(f"{place}.pub").read_text()) == signer.public
    assert load_public_key(signer.public.hex) == signer.public
    assert load_public_key(f"dpbudget-ed25519 {signer.public.hex} alice@example.org") == signer.public
    assert signer.public.verify(b"m", load_key(place).sign(b"m"))
    assert b"PRIVATE" not in Path(f"{place}.pub").read_bytes()


def test_a_key_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        new_key(tmp_path / "keys" / "owner")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keys" / "owner").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


def test_two_keys_differ(tmp_path: Path) -> None:
    assert new_key(tmp_path / "a").public != new_key(tmp_path / "b").public


def test_a_passphrase_protects_the_key(tmp_path: Path) -> None:
    place = tmp_path / "owner"
    signer = new_key(place, b"correct horse")
    assert b"ENCRYPTED" in place.read_bytes()
    assert load_key(place, b"correct horse").public == signer.public
    with pytest.raises(Unreadable, match="needs a passphrase"):
        load_key(place)
    with pytest.raises(Unreadable, match="passphrase is wrong"):
        load_key(place, b"wrong")


def test_a_passphrase_for_an_open_key_is_refused(path: Path) -> None:
    with pytest.raises(Unreadable, match="not encrypted"):
        load_key(path, b"secret")
    with pytest.raises(InvalidParameter, match="empty"):
        new_key(path.with_name("other"), b"")


@pytest.mark.parametrize("name", ["owner", "owner.pub"])
def test_a_key_is_never_written_over_anything(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(InvalidParameter) as caught:
        new_key(tmp_path / "owner")
    assert caught.value.code == "DP074"
    assert (tmp_path / name).read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["owner", "owner.pub"])
def test_a_new_key_follows_no_link(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidParameter):
        new_key(tmp_path / "owner")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o606, 0o610, 0o601, 0o777, 0o644])
def test_a_key_that_others_can_touch_is_refused(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(UnsafeKeyFile, match=f"{mode:04o}") as caught:
        load_key(path)
    assert caught.value.code == "DP073"
    assert "chmod 600" in caught.value.hint


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_key_of_its_owner_alone_is_accepted(path: Path, mode: int) -> None:
    path.chmod(mode)
    assert load_key(path)


def test_a_key_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys.os, "getuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(UnsafeKeyFile, match="belongs to user"):
        load_key(path)


def test_a_link_to_a_key_is_refused(path: Path) -> None:
    path.with_name("link").symlink_to(path)
    with pytest.raises(UnsafeKeyFile, match="symbolic link"):
        load_key(path.with_name("link"))


def test_a_fifo_a_folder_and_a_device_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for place in (tmp_path / "fifo", tmp_path, Path("/dev/null"), Path("/dev/zero")):
        with pytest.raises(UnsafeKeyFile, match="regular file"):
            load_key(place)


def test_a_missing_key_and_a_big_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="No such file"):
        load_key(tmp_path / "missing")
    big = tmp_path / "big"
    big.write_bytes(bytes(MAX_KEY_BYTES + 1))
    big.chmod(0o600)
    with pytest.raises(Unreadable, match="a key has less"):
        load_key(big)


@pytest.mark.parametrize("data", [b"", b"text", b"-----BEGIN PRIVATE KEY-----\n", b"\x00" * 100])
def test_what_is_not_a_key_is_refused(tmp_path: Path, data: bytes) -> None:
    place = tmp_path / "key"
    place.write_bytes(data)
    place.chmod(0o600)
    with pytest.raises(Unreadable):
        load_key(place)


def test_a_key_of_another_algorithm_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "key"
    key = ec.generate_private_key(ec.SECP256R1())
    place.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    place.chmod(0o600)
    with pytest.raises(Unreadable, match="another algorithm"):
        load_key(place)


def test_a_key_in_openssh_form_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "key"
    key = ed25519.Ed25519PrivateKey.generate()
    place.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    place.chmod(0o600)
    with pytest.raises(Unreadable, match="PKCS#8"):
        load_key(place)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dpbudget-ed25519\n",
        "ssh-ed25519 AAAA",
        "dpbudget-ed25519 " + "AB" * 32,
        "dpbudget-ed25519 " + "ab" * 31,
        "dpbudget-ed25519 " + "d7" * 32 + " a comment with spaces",
        "dpbudget-ed25519 " + "d7" * 32 + "\nmore\n",
    ],
)
def test_another_public_key_line_is_refused(tmp_path: Path, text: str) -> None:
    place = tmp_path / "key.pub"
    place.write_text(text)
    with pytest.raises(Unreadable):
        load_public_key(place)


def test_a_private_key_in_place_of_a_public_one_is_named(path: Path) -> None:
    with pytest.raises(Unreadable) as caught:
        load_public_key(path)
    assert ".pub" in caught.value.hint


def test_an_unsafe_public_key_is_refused() -> None:
    with pytest.raises(Tampered, match="small order"):
        load_public_key("01" + "00" * 31)


def test_a_public_key_in_place_of_a_private_one_is_named_and_nobody_is_told_to_chmod_it(tmp_path: Path) -> None:
    new_key(tmp_path / "owner.key")
    with pytest.raises(Unreadable, match="is a public key") as caught:
        load_key(tmp_path / "owner.key.pub")
    assert "without .pub" in caught.value.hint


@pytest.mark.parametrize(
    ("mode", "safe"), [(0o700, True), (0o755, True), (0o777, False), (0o1777, True), (0o2757, False)]
)
def test_a_key_in_a_folder_where_others_can_replace_it_is_refused(mode: int, safe: bool, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    new_key(folder / "key")
    folder.chmod(mode)
    if safe:
        assert load_key(folder / "key").public
    else:
        with pytest.raises(UnsafeKeyFile, match="others can replace files") as caught:
            load_key(folder / "key")
        assert "chmod go-w" in caught.value.hint


def test_a_group_that_is_not_ones_own_counts_as_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "keys"
    new_key(folder / "key")
    folder.chmod(0o770)
    monkeypatch.setattr("dpbudget.ledger.keys._own_group", lambda gid: True)
    assert load_key(folder / "key").public
    monkeypatch.setattr("dpbudget.ledger.keys._own_group", lambda gid: False)
    with pytest.raises(UnsafeKeyFile):
        load_key(folder / "key")


def test_a_bent_key_that_openssl_stumbles_over_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by fuzzing: some damaged PKCS#8 ends in OpenSSL's internal error."""

    def stumble(*_: object) -> None:
        raise InternalError("Unknown OpenSSL error", [])

    new_key(tmp_path / "key")
    monkeypatch.setattr("dpbudget.ledger.keys.load_pem_private_key", stumble)
    with pytest.raises(Unreadable, match="not a private key"):
        load_key(tmp_path / "key")
