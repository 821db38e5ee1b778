"""From what a sensor sends to what a model reads: units, rate, filters, overlap.

:class:`Resampler` belongs to one stream and works as its chunks arrive. :class:`Front` holds the
filters and the overlap of all streams of a model in arrays, one row a stream, because there one
call over many rows is what makes it fast. Both give the same output for any split of a stream
into chunks, bit for bit, and both keep all that they carry in plain arrays.

No gaps, clocks or sequence numbers here: see :mod:`engine.session`.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import signal

from engine.model_file import Filter, ModelSpec

# Metric prefixes of UCUM that sensors use; a unit is one of these and a symbol that follows.
_PREFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3}

# Side lobes of the resampler's kernel: 10 zero crossings a side and beta 5, as
# scipy.signal.resample_poly; the delay is 10 samples of the lower of the two rates.
_ZERO_CROSSINGS = 10
_KAISER_BETA = 5.0
# Inputs of an output from which on each is computed by itself, which takes 3 us and the product.
_LONG = 200
# Largest integer of a ratio of rates: bounds the kernel that a peer can ask for to 20,001 taps.
_WIDEST = 1000


def unit_factor(given: str, wanted: str) -> float:
    """Return what turns values in one unit into another that differs by a metric prefix.

    Raises
    ------
    ValueError
        If the two do not measure the same thing, such as ``kPa`` and ``mV``.
    """
    for prefix, scale in _PREFIXES.items():
        for wanted_prefix, wanted_scale in _PREFIXES.items():
            symbol = wanted.removeprefix(wanted_prefix)
            if symbol and wanted == wanted_prefix + symbol and given == prefix + symbol:
                return scale / wanted_scale
    raise ValueError(f"unit: expected {wanted} or a multiple of it, found {given!r}")


def rate_ratio(rate_in: float, rate_out: float) -> Fraction:
    """Return the rate out over the rate in, as the nearest fraction of integers up to 1000.

    It is within a thousandth of the true ratio: a sensor of 249.9 Hz is taken for one of 250.

    Raises
    ------
    ValueError
        If one rate is more than 1000 times the other.
    """
    ratio = rate_out / rate_in
    if not 1 / _WIDEST <= ratio <= _WIDEST:
        raise ValueError(
            f"rate: expected {rate_out / _WIDEST:g} to {rate_out * _WIDEST:g} Hz, found {rate_in:g}"
        )
    return Fraction(ratio).limit_denominator(min(_WIDEST, int(_WIDEST / ratio)))


class Resampler:
    """Change a stream's rate by a rational factor, chunk by chunk.

    A polyphase FIR: output *n* is a fixed sum over the inputs around time ``n / rate_out``, so
    the time axis is kept and any split into chunks gives the same bits. Before the first input
    and behind the last lies their value, not 0: an electrode's offset is no step.

    Parameters
    ----------
    ratio : Fraction
        The rate out over the rate in, not 1.
    channels : int

    Attributes
    ----------
    reach : int
        Inputs that an output needs on each side; so many are held back.

    Notes
    -----
    soxr was measured for this and not taken: its block transform holds 0.5 to 7 s of signal
    back at the rates of body sensors, and its state cannot be taken out (docs/decisions.md).
    """

    def __init__(self, ratio: Fraction, channels: int) -> None:
        self.up, self.down = ratio.numerator, ratio.denominator
        self._kernel, self._half = _kernel(self.up, self.down)
        self.reach = -(-self._half // self.up)
        # Kept inputs start at a multiple of `down`, so that output times fall on upfirdn's grid.
        self._first = -self.down * -(-self.reach // self.down)
        self._kept = np.zeros((-self._first, channels), np.float32)
        self._fresh = True
        self._produced = 0

    def push(self, chunk: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take (samples, channels), return every output sample that is now complete."""
        if self._fresh and len(chunk):
            self._kept[:] = chunk[0]
            self._fresh = False
        self._kept = np.concatenate([self._kept, chunk])
        end = self._complete(self._first + len(self._kept))
        if end <= self._produced:
            return np.empty((0, chunk.shape[1]), np.float32)
        if self.down >= _LONG * self.up:
            out = self._each(end)
        else:
            filtered = signal.upfirdn(self._kernel, self._kept, self.up, self.down, axis=0)
            origin = self._half // self.down - self._first * self.up // self.down
            out = filtered[self._produced + origin : end + origin]
        self._produced = end
        self._forget()
        return out

    def flush(self) -> NDArray[np.float32]:
        """Force the tail out, as if the last value went on."""
        if self._fresh:
            return np.empty((0, self._kept.shape[1]), np.float32)
        behind = np.repeat(self._kept[-1:], self.reach, axis=0)
        if self.up > self.down:
            return self.push(behind)
        end = self._complete(self._first + len(self._kept) + self.reach)
        self._kept = np.concatenate([self._kept, behind])
        out = self._each(end)
        self._produced = end
        return out

    def _complete(self, received: int) -> int:
        """Return how many outputs so many inputs suffice for."""
        # Output n needs inputs up to n * down / up + reach.
        return max(self._produced, ((received - self.reach) * self.up - 1) // self.down + 1)

    def _each(self, end: int) -> NDArray[np.float32]:
        """Return the outputs up to one, each by itself.

        `upfirdn` gives some twenty more at each end of what is kept, and where the kernel is long
        these are nearly all of its work: a gap at 360 kHz took 2.8 ms, and takes 0.2 ms.
        """
        out = np.empty((end - self._produced, self._kept.shape[1]), np.float32)
        for place in range(len(out)):
            tap = (self._produced + place) * self.down + self._half  # of input 0
            oldest = -((len(self._kernel) - 1 - tap) // self.up)  # input of the last tap
            taps = self._kernel[tap - oldest * self.up :: -self.up]
            begin = oldest - self._first
            out[place] = taps @ self._kept[begin : begin + len(taps)]
        return out

    def take(self) -> tuple[int, NDArray[np.float32], bool, int]:
        """Return all that is carried, to be put back here or elsewhere."""
        return self._first, self._kept, self._fresh, self._produced

    def put(self, carried: tuple[int, NDArray[np.float32], bool, int]) -> None:
        self._first, kept, self._fresh, self._produced = carried
        self._kept = kept.copy()

    def _forget(self) -> None:
        oldest = self._produced * self.down // self.up - self.reach
        steps = (oldest - self._first) // self.down
        if steps > 0:
            self._kept = self._kept[steps * self.down :].copy()
            self._first += steps * self.down


@lru_cache(maxsize=64)
def _kernel(up: int, down: int) -> tuple[NDArray[np.float32], int]:
    """Return the low-pass kernel and its centre, padded so that the centre is on the grid."""
    widest = max(up, down)
    half = _ZERO_CROSSINGS * widest
    taps = up * signal.firwin(2 * half + 1, 1 / widest, window=("kaiser", _KAISER_BETA))
    padding = -half % down
    return np.concatenate([np.zeros(padding), taps]).astype(np.float32), half + padding


class Front:
    """Filters and overlap of all streams of one model: new samples in, windows out.

    Parameters
    ----------
    spec : ModelSpec
    num_slots : int
        Rows of carried state. A row must be :meth:`reset` before its first use.
    """

    def __init__(self, spec: ModelSpec, num_slots: int) -> None:
        channels = spec.input.channels
        self.sos = design(spec.input.filters, spec.input.rate_hz)
        # Memory of a filter at rest on a value of 1; (sections, 2).
        self._at_rest = signal.sosfilt_zi(self.sos) if len(self.sos) else np.zeros((0, 2))
        # Filter memory: (slots, sections, 2, channels); sosfilt wants the sections first.
        self.memory = np.zeros((num_slots, len(self.sos), 2, channels))
        self.fresh = np.ones(num_slots, bool)
        overlap = spec.window_samples - spec.hop_samples
        self.overlap = np.zeros((num_slots, overlap, channels), np.float32)

    def reset(self, slot: int) -> None:
        """Make a row as new: silence before the first sample."""
        self.fresh[slot] = True
        self.overlap[slot] = 0.0

    def settle(self, slot: int) -> None:
        """Let a row's filters begin with the next sample, as if its value had always been."""
        self.fresh[slot] = True

    def take(self, slot: int) -> tuple[bool, NDArray[np.float64], NDArray[np.float32]]:
        """Return a copy of all that a row carries, to be put back here or elsewhere."""
        return bool(self.fresh[slot]), self.memory[slot].copy(), self.overlap[slot].copy()

    def put(
        self, slot: int, carried: tuple[bool, NDArray[np.float64], NDArray[np.float32]]
    ) -> None:
        self.fresh[slot], self.memory[slot], self.overlap[slot] = carried

    def push(self, slots: NDArray[np.intp], samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Filter one hop of each row and put it behind what the row has kept.

        Parameters
        ----------
        slots : (rows,) intp
        samples : (rows, hop, channels) float32

        Returns
        -------
        (rows, window, channels) float32
        """
        if len(self.sos):
            samples = self._filter(slots, samples)
        if not self.overlap.shape[1]:
            return samples
        windows = np.concatenate([self.overlap[slots], samples], axis=1)
        self.overlap[slots] = windows[:, samples.shape[1] :]
        return windows

    def _filter(self, slots: NDArray[np.intp], samples: NDArray[np.float32]) -> NDArray[np.float32]:
        memory = self.memory[slots]
        fresh = self.fresh[slots]
        if fresh.any():
            # Start as if the first value had lasted for ever: an electrode's offset is no step.
            first = samples[fresh, 0].astype(np.float64)
            memory[fresh] = self._at_rest[:, :, None] * first[:, None, None, :]
            self.fresh[slots] = False
        # float64: a high-pass of 0.5 Hz at 360 Hz loses its poles in float32.
        filtered, memory = signal.sosfilt(
            self.sos, samples.astype(np.float64), axis=1, zi=memory.transpose(1, 0, 2, 3)
        )
        self.memory[slots] = memory.transpose(1, 0, 2, 3)
        out: NDArray[np.float32] = filtered.astype(np.float32)
        return out


def design(filters: Sequence[Filter], rate_hz: float) -> NDArray[np.float64]:
    """Return the filters as second-order sections, (sections, 6); none gives (0, 6)."""
    sections = [np.empty((0, 6))]
    for filter_ in filters:
        if filter_.kind == "notch":
            centre, width = filter_.hz
            sections.append(signal.tf2sos(*signal.iirnotch(centre, centre / width, fs=rate_hz)))
        else:
            corner = filter_.hz[0] if len(filter_.hz) == 1 else filter_.hz
            sections.append(
                signal.butter(filter_.order, corner, filter_.kind, fs=rate_hz, output="sos")
            )
    return np.concatenate(sections)
