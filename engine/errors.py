"""Every error that murmur raises on purpose.

::

    MurmurError
    ├── ModelFileError   a model file is not what it must be; raised before it serves anyone
    ├── ConfigError      engine.toml names an unknown key or a value out of bounds
    ├── CheckpointError  a checkpoint is damaged, or not of a stream that could go on here
    ├── Refused          one message of one peer was not accepted; carries a code for the reply
    └── Disconnected     the client's view: the server did not answer in time

A broken invariant of the engine's own is an ``assert``, not one of these. Where it concerns one
stream, that stream ends, and the others go on: :func:`fault`.
"""

import logging

log = logging.getLogger(__name__)


class MurmurError(Exception):
    """Anything that murmur refuses on purpose, with a reason for a person."""


class ModelFileError(MurmurError):
    """A model file lacks something, contradicts its graph, or cannot be read."""


class ConfigError(MurmurError):
    """The configuration names an unknown key or a value out of bounds."""


class CheckpointError(MurmurError):
    """A checkpoint is damaged, of another format, or of a model that is not served."""


class Refused(MurmurError):
    """A message was not accepted. Only its stream is concerned.

    Parameters
    ----------
    code : str
        One word from the table in ``docs/protocol.md``; counted under that name.
    reason : str
        What was expected and what came.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Disconnected(MurmurError):
    """No server answered within the client's time limit."""


def fault(concerned: str, error: Exception) -> str:
    """Log an error that nobody expected, with its traceback; return it on one line."""
    log.error("%s: %r", concerned, error, exc_info=error)
    said = (str(error).splitlines() or [""])[0]
    return f"{concerned}: {type(error).__name__}: {said}"
