"""What survives a crash: all that streams carry, as bytes, and the store that keeps them.

A checkpoint is written in the loop's thread, between two steps, so that all parts of it are of
one moment; a thread of its own puts it on the disk, as many in one transaction as have come
meanwhile. Everything that names a checkpoint as durable waits for that transaction.
"""

import contextlib
import logging
import queue
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

FORMAT = 1  # of what `encode` writes; a reader knows no other
_HEAD = len(b"murmur") + 1 + 4  # the word, the format, a CRC-32 of the rest
_ARRAY = 1  # MessagePack extension: an array's description, then its bytes
_SCHEMA = 1
_RETRY_S = 0.5


def encode(state: Any) -> bytes:
    """Return plain data, structs and NumPy arrays as bytes that say if they were damaged."""
    body = _encoder.encode(state)
    return b"".join((b"murmur", bytes([FORMAT]), zlib.crc32(body).to_bytes(4, "big"), body))


def decode(data: bytes) -> Any:
    """Return what :func:`encode` was given: tuples have become lists, structs maps.

    Raises
    ------
    CheckpointError
        If it is something else, of another format, or damaged.
    """
    if data[:6] != b"murmur" or len(data) < _HEAD:
        raise CheckpointError("expected a checkpoint, found something else")
    if data[6] != FORMAT:
        raise CheckpointError(f"expected a checkpoint of format {FORMAT}, found {data[6]}")
    body = data[_HEAD:]
    if zlib.crc32(body).to_bytes(4, "big") != data[7:_HEAD]:
        raise CheckpointError("the checkpoint is damaged: its checksum is another")
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error}") from None


@lru_cache(maxsize=1024)
def _description(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    described = msgspec.msgpack.encode((dtype.str, shape))
    return bytes([len(described)]) + described


def _write(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        head = _description(value.dtype, value.shape)
        return msgspec.msgpack.Ext(_ARRAY, head + value.tobytes())
    raise NotImplementedError(f"expected plain data or an array, found {type(value)}")


def _read(code: int, data: memoryview) -> NDArray[Any]:
    if code != _ARRAY:
        raise ValueError(f"expected extension {_ARRAY}, found {code}")
    end = 1 + data[0]
    dtype, shape = msgspec.msgpack.decode(data[1:end], type=tuple[str, tuple[int, ...]])
    return np.frombuffer(data[end:], np.dtype(dtype)).reshape(shape).copy()


_encoder = msgspec.msgpack.Encoder(enc_hook=_write)
_decoder = msgspec.msgpack.Decoder(ext_hook=_read)


class Entry(NamedTuple):
    """A checkpoint under its name; None takes the place of one that is over."""

    name: str
    state: bytes | None


class Store:
    """Checkpoints in a file of SQLite, the latest under each name.

    Parameters
    ----------
    path : Path
        Made if it is not there; its folder must be. No two servers can have it open.
    max_mb : float
        The file takes no more.
    wake : callable
        Called from the store's thread when a transaction is on the disk, or failed.

    Raises
    ------
    ConfigError
        If there is something else, it cannot be written, or another server has it open.

    Attributes
    ----------
    committed : int
        Everything up to the batch of this number is on the disk.
    fault : str
        Why the last transaction failed; empty: it did not. It is tried again.
    """

    def __init__(self, path: Path, max_mb: float, wake: Callable[[], None]) -> None:
        self._path, self._max_mb, self._wake = path, max_mb, wake
        self.committed = self._put = 0
        self.fault = ""
        self._waiting: queue.SimpleQueue[list[Entry] | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        try:
            self._database = _open(path, max_mb)
        except (sqlite3.Error, ConfigError) as error:
            raise ConfigError(f"checkpoint {path}: {error}") from None
        self._thread = threading.Thread(target=self._write_all, name="checkpoint", daemon=True)

    def load(self) -> Iterator[tuple[str, bytes]]:
        """Yield all checkpoints, as (name, state); before :meth:`start`."""
        try:
            yield from self._database.execute("SELECT name, state FROM checkpoints ORDER BY name")
        except sqlite3.Error as error:
            raise ConfigError(f"checkpoint {self._path}: {error}") from None

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, entries: list[Entry]) -> int:
        """Take checkpoints, which are all written or none; never waits.

        Returns
        -------
        int
            The number of this batch.
        """
        self._put += 1
        self._waiting.put(entries)
        return self._put

    @property
    def behind(self) -> int:
        """How many batches are still to be written."""
        return self._put - self.committed

    def close(self) -> None:
        """Write what waits, then end."""
        self._ending.set()
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()
        self._database.close()

    def _write_all(self) -> None:
        going = True
        while going:
            batches = [self._waiting.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    batches.append(self._waiting.get_nowait())
            going = None not in batches
            given = [batch for batch in batches if batch is not None]
            if given and self._write({one.name: one.state for batch in given for one in batch}):
                self.committed += len(given)
                self._wake()

    def _write(self, latest: dict[str, bytes | None]) -> bool:
        """Write in one transaction; a disk that takes nothing is tried again."""
        kept = [(name, state) for name, state in latest.items() if state is not None]
        over = [(name,) for name, state in latest.items() if state is None]
        while True:
            try:
                with self._database:
                    self._database.execute("BEGIN")
                    self._database.executemany(
                        "INSERT OR REPLACE INTO checkpoints VALUES (?, ?)", kept
                    )
                    self._database.executemany("DELETE FROM checkpoints WHERE name = ?", over)
            except sqlite3.Error as error:
                if not self.fault:
                    log.error("checkpoint %s: %s; trying again", self._path, error)
                self.fault = str(error)
                self._wake()
                if self._ending.wait(_RETRY_S):
                    return False
            else:
                if self.fault:
                    log.warning("checkpoint %s: written again", self._path)
                self.fault = ""
                return True


def _open(path: Path, max_mb: float) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        # Held until the process is gone, whatever ended it.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")  # a power cut takes nothing that is committed
        _prepare(database)
        (page,) = database.execute("PRAGMA page_size").fetchone()
        database.execute(f"PRAGMA max_page_count = {max(1, int(max_mb * 2**20 / page))}")
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection) -> None:
    """Lay out an empty file, or check that it is a store."""
    database.execute("BEGIN EXCLUSIVE")
    if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        database.execute(
            "CREATE TABLE checkpoints (name TEXT PRIMARY KEY, state BLOB NOT NULL) STRICT"
        )
        database.execute(f"PRAGMA user_version = {_SCHEMA}")
    (found,) = database.execute("PRAGMA user_version").fetchone()
    names = [name for (name,) in database.execute("SELECT name FROM sqlite_master")]
    database.execute("COMMIT")
    if found != _SCHEMA or "checkpoints" not in names:
        raise ConfigError(f"expected a store of version {_SCHEMA}, found version {found}")
