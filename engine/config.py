"""The server's options. ``deploy/engine.toml`` lists each with its default and unit."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from engine.errors import ConfigError

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(ge=1e-9)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Immutable; an unknown key is an error that names it."""


class Limits(_Section, frozen=True):
    """What one peer, one stream and all together may ask for."""

    max_peers: Count = 4096
    max_streams: Count = 4096  # of each model
    max_state_mb: Count = 4096  # of memory for the state of each model's streams
    max_streams_per_peer: Count = 4096
    max_message_bytes: Count = 1_048_576
    max_messages: Count = 512  # in one body
    max_chunk_bytes: Count = 262_144
    max_queued_bytes: Count = 16 * 2**20  # of a peer, undone or unread; then it is dropped
    max_queued_mb: Count = 1024  # of all peers; then the one of whom most waits is dropped
    max_queued_messages: Count = 1_000  # to a subscriber that does not read; it loses more
    max_subscriptions: Count = 128  # of one subscriber
    credit_s: Positive = 2.0  # seconds of signal that a stream may have in flight
    idle_timeout_s: Positive = 60.0  # a peer that says nothing for so long is dropped
    resume_s: Positive = 60.0  # so long a stream waits for a client that lost its connection
    stream_timeout_s: Positive = 600.0  # a stream without a chunk for so long is closed
    max_load: Positive = 0.7  # part of the measured capacity that is given away
    drain_s: Positive = 10.0  # at SIGTERM, to finish what has arrived
    bridge_s: Annotated[float, Meta(ge=0, le=1)] = 0.05  # a gap up to here is interpolated
    reorder_chunks: Annotated[int, Meta(ge=0, le=64)] = 2  # that wait for one they overtook


class Subjects(_Section, frozen=True):
    """Whom the streams are of, and how they may be named."""

    require_pseudonyms: bool = False  # refuse a subject in the clear, and a stream without one
    pattern: str = "[a-z0-9]{8,64}"  # regular expression that a whole pseudonym matches


class Security(_Section, frozen=True):
    """Keys of the server and its clients; docs/security.md."""

    key: str = ""  # file of the server's secret key; empty: no encryption
    keys: str = ""  # TOML file of the clients' public keys and their rights
    allow_plain: bool = False  # bind beyond the loopback interface without keys


class AlertOptions(_Section, frozen=True):
    """When alerts are raised, and where they are written down."""

    rules: str = ""  # TOML file of rules; empty: those that come along
    audit: str = ""  # SQLite file to which every transition is added; empty: none
    summary_s: Positive = 5.0  # after so long what is active is published again


class Record(_Section, frozen=True):
    """Heart streams written down as WFDB records."""

    folder: str = ""  # empty: nothing is written
    max_mb: Positive = 10_000.0  # MiB that all files in it may take; then recording ends
    flush_s: Positive = 5.0  # after so long what has come can be read


class Checkpoints(_Section, frozen=True):
    """Streams written down, so that they go on after a crash."""

    path: str = ""  # SQLite file; empty: nothing is written
    every_s: Positive = 4.0  # seconds between two checkpoints of a stream
    max_mb: Positive = 4_096.0  # MiB that the file may take


class Config(_Section, frozen=True):
    """The whole file."""

    bind: str = "tcp://127.0.0.1:7700"  # ROUTER: clients
    publish: str = "tcp://127.0.0.1:7701"  # PUB: subscribers
    metrics: Annotated[str, Meta(pattern=r"^(|[^:]+:[0-9]{1,5})$")] = ""  # host:port; empty: none
    models: Annotated[tuple[str, ...], Meta(min_length=1)] = ("heart",)
    provider: Literal["cpu", "cuda"] = "cpu"
    threads: Annotated[int, Meta(ge=0, le=256)] = 0  # cores for the models; 0: all
    limits: Limits = Limits()
    alerts: AlertOptions = AlertOptions()
    subjects: Subjects = Subjects()
    security: Security = Security()
    sha256: dict[str, str] = {}  # of models, by name: what their files must have
    record: Record = Record()
    checkpoints: Checkpoints = Checkpoints()

    @property
    def num_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


def read(path: Path | None, limits: Sequence[str] = (), **given: object) -> Config:
    """Read a configuration file; None gives the defaults.

    Parameters
    ----------
    path : Path or None
    limits : sequence of str
        ``key=number``, in place of the file's values in the section ``limits``.
    **given : object
        In place of the file's values; an empty one changes nothing.

    Raises
    ------
    ConfigError
        Naming the file, the key and what was expected there.
    """
    try:
        raw = msgspec.toml.decode(path.read_bytes()) if path else {}
        raw |= {key: value for key, value in given.items() if value}
        section = raw.setdefault("limits", {})
        if isinstance(section, dict):  # anything else is refused below
            section |= msgspec.toml.decode("\n".join(limits).encode())
        return msgspec.convert(raw, Config)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path or 'options'}: {error}") from None
