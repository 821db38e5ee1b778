"""Recordings of sound, read block by block: WAV, FLAC, Ogg (Vorbis, Opus), MP3 and more.

Any rate and format, mixed down to one channel, so that hours of it take the memory of a block.
Nothing is resampled or filtered: the server's sessions do that. Needs the extra ``speech``.
"""

import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import MurmurError

SUFFIXES = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".sph"}
)
# The largest value of 16 bits is 1 - 2**-15. A lossy codec turns a clipped top into one near it.
_FULL_SCALE = 0.999


class Sound:
    """One recording, open for reading from its beginning.

    Parameters
    ----------
    path : Path

    Raises
    ------
    MurmurError
        If there is no such file, nothing in it, or nothing that can be read as sound.

    Attributes
    ----------
    rate_hz : float
    channels : int
        In the file; what is read has one, their mean.
    seconds : float
        As the file states it; a cut file may have less.
    samples : int
        Read so far.
    clipped : int
        Of them, how many were at full scale in some channel.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = _soundfile()
        self._file = self._open()
        self.rate_hz = float(self._file.samplerate)
        self.channels = int(self._file.channels)
        self.seconds = self._file.frames / self.rate_hz
        self.samples = self.clipped = 0

    def __enter__(self) -> "Sound":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def read(self, count: int) -> NDArray[np.float32]:
        """Return the next samples, fewer at the end and none behind it.

        Returns
        -------
        (samples,) float32
            In [-1, 1], but for files of floats that hold more.

        Raises
        ------
        MurmurError
            If the file turns out to be damaged.
        """
        try:
            block = self._file.read(count, dtype="float32", always_2d=True)
        except self._library.LibsndfileError as error:
            raise MurmurError(f"{self.path}: after {self.read_s:.1f} s: {error}") from None
        self.samples += len(block)
        self.clipped += int(np.count_nonzero((np.abs(block) >= _FULL_SCALE).any(axis=1)))
        # The mean of float32 in float32, as of one channel it must be the same bits.
        mixed: NDArray[np.float32] = block[:, 0] if self.channels == 1 else block.mean(axis=1)
        return mixed

    def blocks(self, seconds: float) -> Iterator[NDArray[np.float32]]:
        """Yield all that is left, in blocks of so long."""
        count = math.ceil(seconds * self.rate_hz)
        while len(block := self.read(count)):
            yield block

    @property
    def read_s(self) -> float:
        return self.samples / self.rate_hz

    def close(self) -> None:
        self._file.close()

    def _open(self) -> Any:
        if not self.path.is_file():
            raise MurmurError(f"{self.path}: there is no such file")
        if not self.path.stat().st_size:
            raise MurmurError(f"{self.path}: the file is empty (0 bytes)")
        try:
            file = self._library.SoundFile(str(self.path))
        # TypeError: a suffix of headerless sound, of which soundfile wants rate and channels.
        except (self._library.LibsndfileError, TypeError) as error:
            raise MurmurError(
                f"{self.path}: expected WAV, FLAC, Ogg (Vorbis, Opus) or MP3: {error}"
            ) from None
        if not file.frames:
            file.close()
            raise MurmurError(f"{self.path}: there is no sound in it (0 samples)")
        return file


def _soundfile() -> Any:
    try:
        return import_module("soundfile")
    except (ImportError, OSError) as error:  # OSError: the package is there, libsndfile is not
        raise MurmurError(
            f"reading sound needs soundfile: pip install 'murmur-engine[speech]' ({error})"
        ) from None
