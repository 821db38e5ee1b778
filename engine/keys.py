"""CURVE keys: made, read and listed as files; and the three of them that a client needs.

Files are pyzmq's certificates (``NAME.key`` public, ``NAME.key_secret`` both halves), which czmq
reads too. A secret file is its owner's alone, or it is refused.
"""

import json
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq
from zmq import auth

from engine import rights
from engine.errors import ConfigError

# What a client command reads: the file of its own secret key; the server's public key, or its file.
KEY, SERVER_KEY = "MURMUR_KEY", "MURMUR_SERVER_KEY"
_Z85 = re.compile(r"[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}\Z")


class Pair(NamedTuple):
    """Both halves of a key, in Z85."""

    public: bytes
    secret: bytes

    def guard(self, one: zmq.Socket[bytes]) -> None:
        """Let a socket that will be bound take only who knows the public half."""
        one.curve_server = True
        one.curve_publickey, one.curve_secretkey = self


class Identity(NamedTuple):
    """What a client shows, and the public key of the server that it believes."""

    own: Pair
    server: bytes

    def show(self, one: zmq.Socket[bytes]) -> None:
        """Let a socket that will be connected show its key to that server, and to no other."""
        one.curve_publickey, one.curve_secretkey = self.own
        one.curve_serverkey = self.server


def make(name: str, folder: Path) -> tuple[Path, Path]:
    """Make a key; return the files of its public half and of both, mode 0600.

    Raises
    ------
    ConfigError
        If there is one of that name, which stays as it is.
    """
    try:
        msgspec.convert(name, rights.KeyName)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Nobody can read what is not yet in its place.
        with tempfile.TemporaryDirectory(dir=folder) as hidden:
            public, secret = map(Path, auth.create_certificates(hidden, name))
            secret.chmod(0o600)
            public.chmod(0o644)
            made = folder / public.name, folder / secret.name
            os.link(secret, made[1])  # unlike a rename, it replaces nothing
            public.replace(made[0])
    except FileExistsError as error:
        raise ConfigError(f"{error.filename2}: expected no key of that name, found one") from None
    except (OSError, msgspec.ValidationError) as error:
        raise ConfigError(f"key {name!r}: {error}") from None
    return made


def pair(path: Path) -> Pair:
    """Read a file of a secret key.

    Raises
    ------
    ConfigError
        If it is none, or others than its owner may read or write it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        public, secret = auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected the file of a secret key: {error}") from None
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"{path}: expected mode 0600, found {mode:04o}: chmod 600 {path}")
    if secret is None or not _fits(secret) or not _fits(public):
        raise ConfigError(f"{path}: expected a public and a secret key of 40 characters each")
    if zmq.curve_public(secret) != public:
        raise ConfigError(f"{path}: expected a public key that belongs to the secret one")
    return Pair(public, secret)


def public(given: str) -> bytes:
    """Return a public key that is given as such, or as the file of one.

    Raises
    ------
    ConfigError
    """
    if _fits(given.encode()):
        return given.encode()
    try:
        found, _ = auth.load_certificate(given)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{given}: expected a public key or the file of one: {error}") from None
    if not _fits(found):
        raise ConfigError(f"{given}: expected a public key of 40 characters")
    return found


def ours() -> Identity | None:
    """Return what the environment says of keys; None if it says nothing.

    Raises
    ------
    ConfigError
        If only one of the two variables is set, or a file cannot be read.
    """
    own, server = os.environ.get(KEY), os.environ.get(SERVER_KEY)
    if not own and not server:
        return None
    if not own or not server:
        raise ConfigError(
            f"keys: expected both {KEY} (or --key) and {SERVER_KEY} (or --server-key), found "
            + (KEY if own else SERVER_KEY)
        )
    return Identity(pair(Path(own)), public(server))


def add(file: Path, name: str, key: rights.Key) -> None:
    """Add a key to a file of keys, which is made if it is not there.

    Raises
    ------
    ConfigError
        If it holds that name, or cannot be read or written.
    """
    if file.exists() and name in rights.read(file):
        raise ConfigError(f"{file}: expected no key {name!r}, found one")
    _write(file, (file.read_text() if file.exists() else "") + _table(name, key))


def revoke(file: Path, name: str) -> None:
    """Mark a key in a file of keys as revoked; all else in the file stays as it is.

    Raises
    ------
    ConfigError
        If it is not there, or is revoked already.
    """
    keys = rights.read(file)
    if name not in keys or keys[name].revoked:
        valid = sorted(name for name, key in keys.items() if not key.revoked)
        raise ConfigError(f"{file}: expected one of {valid}, found {name!r}")
    heading = re.compile(rf"^\[\s*[\"']?{re.escape(name)}[\"']?\s*\][^\n]*\n", re.M)
    text = re.sub(r"^revoked\s*=\s*false[^\n]*\n", "", file.read_text(), flags=re.M)
    _write(file, heading.sub(lambda match: match[0] + "revoked = true\n", text, count=1))
    if not rights.read(file)[name].revoked:
        raise ConfigError(f"{file}: expected a heading [{name}]; set revoked = true by hand")


def _fits(key: bytes) -> bool:
    return _Z85.match(key.decode("ascii", "replace")) is not None


def _table(name: str, key: rights.Key) -> str:
    """Return a key as a table of TOML, without what is as it is by default."""
    stated: dict[str, Any] = msgspec.to_builtins(key)
    usual = {field.name: field.default for field in msgspec.structs.fields(key)}
    lines = [
        f"{field} = {json.dumps(value)}"  # of such values JSON is TOML
        for field, value in stated.items()
        if getattr(key, field) != usual[field]
    ]
    return "\n".join([f'\n["{name}"]', *lines]) + "\n"


def _write(file: Path, text: str) -> None:
    """Put a new file in the place of the old one, as a whole."""
    new = file.with_name(file.name + ".new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text)
        if file.exists():
            new.chmod(stat.S_IMODE(file.stat().st_mode))
        new.replace(file)
    except OSError as error:
        raise ConfigError(f"{file}: {error}") from None
