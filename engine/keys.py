"""CURVE keys: made, read and listed as files; and the three of them that a client needs.

Files are pyzmq's certificates (``NAME.key`` public, ``NAME.key_secret`` both halves), which czmq
reads too. A secret file is its owner's alone, or it is refused.
"""

import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq
from zmq import auth
from zmq.utils.monitor import recv_monitor_message

from engine import rights
from engine.errors import ConfigError

# What a client command reads: the file of its own secret key; the server's public key, or its file.
KEY, SERVER_KEY = "MURMUR_KEY", "MURMUR_SERVER_KEY"
_EVENTS = (
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
)
# A network may cut a handshake short, but not so often in a row.
_HANG_UPS = 4
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


class Handshake:
    """What becomes of the first handshakes of a socket that connects.

    ZeroMQ tries again for ever and tells nobody; here a client learns why it is not let in.
    """

    def __init__(self, one: zmq.Socket[bytes]) -> None:
        self._socket = one
        self._monitor = one.get_monitor_socket(_EVENTS)
        self._hung_up = 0
        self.done = False
        self.reason = ""

    def __enter__(self) -> "Handshake":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.disable_monitor()
        self._monitor.close()

    def refused(self) -> bool:
        """Return whether the server has said no; :attr:`reason` says why."""
        while not self.done and not self.reason and self._monitor.poll(0):
            self._take(recv_monitor_message(self._monitor))
        return bool(self.reason)

    def wait(self, timeout_s: float) -> bool:
        """Wait until the server has let the socket in; return False if it does not."""
        end = time.monotonic() + timeout_s
        while not self.refused() and not self.done:
            if not self._monitor.poll(max(0, round(1000 * (end - time.monotonic())))):
                return False
        return self.done

    def _take(self, event: Mapping[str, Any]) -> None:
        kind, value = event["event"], event["value"]
        if kind == zmq.Event.HANDSHAKE_SUCCEEDED:
            self.done = True
        elif kind == zmq.Event.HANDSHAKE_FAILED_AUTH:
            self.reason = "the server does not let this key in"
        elif value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            self.reason = "one side has a key and the other none; see --key and --server-key"
        elif self._socket.mechanism == zmq.CURVE:
            self._hung_up += 1
            if self._hung_up >= _HANG_UPS:
                self.reason = "the server hangs up; is --server-key its key?"


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


def ours(address: str | None) -> Identity | None:
    """Return the keys that the environment names for a server; None if it names none.

    Parameters
    ----------
    address : str or None
        None: a server that a command starts for itself, which asks for no key.

    Raises
    ------
    ConfigError
        If only one of the two variables is set, or a file cannot be read.
    """
    own, server = os.environ.get(KEY), os.environ.get(SERVER_KEY)
    if address is None or (not own and not server):
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
    _write(file, (file.read_text() if file.exists() else "") + table(name, key))


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


def table(name: str, key: rights.Key) -> str:
    """Return a key as a table of TOML, without what is as it is by default.

    Raises
    ------
    ConfigError
        If it is none that a server would take.
    """
    stated: dict[str, Any] = msgspec.to_builtins(key)
    usual = {field.name: field.default for field in msgspec.structs.fields(key)}
    lines = [
        f"{field} = {json.dumps(value)}"  # of such values JSON is TOML
        for field, value in stated.items()
        if getattr(key, field) != usual[field]
    ]
    text = "\n".join([f'\n["{name}"]', *lines]) + "\n"
    rights.parse(text.encode())
    return text


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
