"""A recurrent network over heart beats: one step a beat, all that it carries in plain sight.

It is given the signal around a beat and the interval before it, and says the beat's class and
the rhythm so far. What a cardiologist compares a beat with is carried beside the recurrent state:
the amplitude and the usual shape of this patient's beats in these leads, and the usual interval.
What is odd changes the usual little: ectopic beats are not taken into the shape, nor a run of
early ones into the interval.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

POINTS = 80  # of a window, at POINTS_HZ
POINTS_HZ = 120.0
BEFORE = 54  # points before the beat: 0.45 s, which holds the P wave
LEADS = 2
INPUTS = POINTS * LEADS + 1  # the leads one after the other, then the interval

# Weights of a new beat in the running means; until there are so many beats, a plain mean.
_AMPLITUDE, _SHAPE, _ALIKE = 0.05, 0.06, 0.1
_FAST, _SLOW, _USUAL = 1 / 8, 1 / 64, 1 / 16
_UNREST, _LONG_UNREST = 1 / 12, 1 / 48
_ODD_SHAPE, _ODD_INTERVAL = 0.05, 0.06  # of that weight, what a beat unlike the usual has
_PATCH, _STEP = 10, 5  # points
_LEAST_MV = 0.02  # amplitude of a lead that is not there, or flat
_LEAST_S, _LONGEST_S = 0.15, 4.0
_SOME = 0.05  # energy, of a normalised lead, that makes no difference
_BESIDE = (_SOME, 0.3, 0.3)  # the same, of the QRS complex, the P wave and the T wave

_MARKS = 9  # that are read off a lead, see _marks
_TIMES = 13  # that are read off intervals, see _interval


class BeatNetConfig(NamedTuple):
    """The architecture, and nothing else."""

    classes: int = 5
    rhythms: int = 4
    patch: int = 40  # what is read off each stretch of a window
    width: int = 64
    hidden: int = 64
    verdict: int = 48  # units between the recurrent state and the classes
    dropout: float = 0.3


class BeatNet(nn.Module):
    """Patches of a beat, a GRU over beats, two heads.

    Parameters
    ----------
    config : BeatNetConfig
    favour : (classes,) float32, optional
        How much more of each class than it has the network was taught with, as a weight of its
        loss: in what it says, the odds are divided by it again.
    against : (rhythms, classes) float32, optional
        What is taken from the logit of a class where a rhythm is sure.

    Attributes
    ----------
    state_shapes : dict of str to tuple of int
        Each state's name and the shape of its row, in the order of ``forward``.
    """

    favour: Tensor
    against: Tensor

    def __init__(
        self,
        config: BeatNetConfig,
        favour: Tensor | None = None,
        against: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        favour = torch.ones(config.classes) if favour is None else favour
        against = torch.zeros(config.rhythms, config.classes) if against is None else against
        self.register_buffer("favour", favour, persistent=False)
        self.register_buffer("against", against, persistent=False)
        self.state_shapes = {
            "beats": (3,),  # beats and intervals seen, at most 1000; how alike the beats are
            "amplitude": (LEADS,),
            "shape": (LEADS * POINTS,),
            "intervals": (6,),  # fast and slow mean, the last, the usual, unrest, longer unrest
            "h": (config.hidden,),
        }
        self.patch = nn.Linear(2 * LEADS * _PATCH, config.patch)
        patches = (POINTS - _PATCH) // _STEP + 1
        self.shrink = nn.Linear(patches * config.patch, config.width)
        width = config.width + _TIMES + _MARKS * LEADS
        self.norm = nn.LayerNorm(width)
        self.gru = nn.GRU(width, config.hidden, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.verdict = nn.Linear(width + config.hidden, config.verdict)
        self.beat_class = nn.Linear(config.verdict, config.classes)
        self.rhythm = nn.Linear(config.hidden, config.rhythms)

    def initial_states(self, rows: int) -> tuple[Tensor, ...]:
        """Return the states of new streams: zeros, each (rows, ...)."""
        return tuple(torch.zeros(rows, *shape) for shape in self.state_shapes.values())

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Advance streams by some beats.

        Parameters
        ----------
        x : (N, beats, INPUTS) float32
            Millivolts, and seconds since the beat before; 0 where that is not known.
        *states : (N, ...) float32 each

        Returns
        -------
        class, rhythm : (N, beats, classes), (N, beats, rhythms)
            Probabilities.
        new_states
        """
        beat_class, logits, new = self.logits(x, *states)
        rhythm = logits.softmax(2)
        beat_class = beat_class - self.favour.log() - rhythm @ self.against
        return beat_class.softmax(2), rhythm, *new

    def logits(self, x: Tensor, *states: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """As ``forward``, without the softmax: what a loss wants."""
        seen, amplitude, shape, intervals, h = states
        windows, usual, on, times = [], [], [], []
        for number in range(x.shape[1]):
            before = shape
            window, seen, amplitude, shape = _compare(x[:, number, :-1], seen, amplitude, shape)
            known = (seen[:, :1] > 1).float()
            time, seen, intervals = _interval(x[:, number, -1], seen, intervals)
            windows.append(window)
            # The first beat is its own measure: nothing is odd about it.
            usual.append(known * before + (1 - known) * window)
            on.append(known * (amplitude > _LEAST_MV).float())
            times.append(time)
        window = torch.stack(windows, 1).reshape(*x.shape[:2], LEADS, POINTS)
        known = torch.stack(usual, 1).reshape(window.shape)
        pair = torch.cat([window, window - known], 2)
        y = pair.unfold(3, _PATCH, _STEP).transpose(2, 3).flatten(3)
        y = self.dropout(torch.relu(self.patch(y)).flatten(2))
        y = self.dropout(torch.relu(self.shrink(y)))
        marks = _marks(window, known, torch.stack(on, 2).transpose(1, 2))
        y = self.norm(torch.cat([y, torch.stack(times, 1), marks], 2))
        z, h = self.gru(y, h.unsqueeze(0))
        z = self.dropout(z)
        verdict = self.dropout(torch.relu(self.verdict(torch.cat([y, z], 2))))
        new = (seen, amplitude, shape, intervals, h.squeeze(0))
        return self.beat_class(verdict), self.rhythm(z), new


# All sums are products with constant columns: ONNX Runtime's reductions round a row differently
# with the rows beside it. For its Log the same holds, so that there are ratios and no logarithms.


def _seconds(points: int, middle: float) -> Tensor:
    """Return the time of each point, from the beat on."""
    return (torch.arange(points) - middle) / POINTS_HZ


def _within(first: float, last: float) -> Tensor:
    """Return 1 for the points between two times in seconds from the beat, 0 for the others."""
    seconds = _seconds(POINTS, BEFORE)
    return ((seconds >= first) & (seconds <= last)).float()


_QRS, _P, _T = _within(-0.1, 0.1), _within(-0.27, -0.09), _within(0.1, 0.3)
_REGIONS = torch.stack([_QRS, _P, _T], 1)
# The P and the T wave are each about their own mean, the QRS complex about that of the window.
_ABOUT_MEAN = torch.tensor([0.0, 1.0, 1.0]) / _REGIONS.sum(0)
_BOTH = _QRS.repeat(LEADS)[:, None]
_BETWEEN = _seconds(POINTS - 1, BEFORE - 0.5)
_SPREAD = (_BETWEEN.abs() <= 0.16).float()[:, None] * _BETWEEN[:, None] ** torch.arange(3)
_WIDTH_S = 0.05  # a usual one


def _compare(
    x: Tensor, seen: Tensor, amplitude: Tensor, shape: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a beat in units of the usual amplitude, (N, LEADS POINTS), and new states."""
    count = seen[:, :1] + 1
    window = x.reshape(-1, LEADS, POINTS)
    mean = torch.full((POINTS, 1), 1.0 / POINTS)
    window = window - window @ mean
    size = (window.square() @ mean).squeeze(2).sqrt()
    amplitude = amplitude + torch.clamp(1 / count, min=_AMPLITUDE) * (size - amplitude)
    window = (window / (amplitude + _LEAST_MV).unsqueeze(2)).flatten(1)
    known = (count > 1).float()
    energies = (window.square() + shape.square()) @ _BOTH
    unlike = ((window - shape).square() @ _BOTH) / (energies + 0.1)
    alike = (1.2 - 2 * unlike).clamp(0.0, 1.0) * known + (1 - known)
    # Where few of the last beats were like it, the usual shape is not usual, and gives way.
    often = seen[:, 2:] + torch.clamp(1 / count, min=_ALIKE) * (alike - seen[:, 2:])
    alike = torch.maximum(alike, (1.1 - 2 * often).clamp(_ODD_SHAPE, 1.0))
    shape = shape + torch.clamp(1 / count, min=_SHAPE) * alike * (window - shape)
    seen = torch.cat([count.clamp(max=1000.0), seen[:, 1:2], often], 1)
    return window, seen, amplitude, shape


def _marks(window: Tensor, usual: Tensor, on: Tensor) -> Tensor:
    """Return what a beat has of its own, (N, beats, LEADS _MARKS).

    Of the QRS complex, the P wave and the T wave how much it correlates with the usual one, and
    how much more energy it has; how wide the QRS complex is, and how much wider than usual. All
    zeros for a lead that is off.

    Parameters
    ----------
    window, usual : (N, beats, LEADS, POINTS)
    on : (N, beats, LEADS)
    """
    both = torch.stack([window, usual], 2)
    sums = both @ _REGIONS
    one, other = sums.unbind(2)
    energy = (both.square() @ _REGIONS - sums.square() * _ABOUT_MEAN).clamp(min=0.0)
    common = (window * usual) @ _REGIONS - one * other * _ABOUT_MEAN
    has, had = energy.unbind(2)
    correlation = common / ((has + _SOME) * (had + _SOME)).sqrt()
    more = (has - had) / (has + had + torch.tensor(_BESIDE))
    steps = (both[..., 1:] - both[..., :-1]).square() @ _SPREAD
    total, first, second = (steps + torch.tensor([0.02, 0.0, 0.0])).unbind(4)
    variance = (second / total - (first / total).square()).clamp(min=0.0)
    wide, was = ((variance + 1e-6).sqrt() / _WIDTH_S - 1).unbind(2)
    marks = torch.cat([correlation, more, torch.stack([wide, wide - was], 3)], 3)
    return torch.cat([marks * on.unsqueeze(3), on.unsqueeze(3)], 3).flatten(2)


def _interval(seconds: Tensor, seen: Tensor, intervals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what an interval says beside the usual ones, (N, _TIMES), and new states."""
    known = (seconds > 0).float()
    seconds = seconds.clamp(_LEAST_S, _LONGEST_S)
    fast, slow, last, usual = intervals[:, :4].clamp(min=_LEAST_S).unbind(1)
    unrest, long_unrest = intervals[:, 4:].unbind(1)
    before = seen[:, 1]
    some = known * (before > 0).float()
    early = some * (seconds / usual - 1)
    features = torch.stack(
        [
            known * (seconds - 0.8),
            some * (seconds / fast - 1),
            some * (seconds / slow - 1),
            some * (seconds / last - 1),
            some * (last / fast - 1),
            some * (seconds / fast - 1).abs(),
            some * (fast / slow - 1),
            some,
            4 * unrest,
            4 * long_unrest,
            early.clamp(-1.0, 2.0),
            (some * ((seconds + last) / usual - 2)).clamp(-2.0, 2.0),
            (seen[:, 0] / 100).clamp(max=1.0),
        ],
        1,
    )
    share = 1 / (before + known).clamp(min=1.0)
    # A run of early beats is to be early to its end: the usual interval hardly heeds it.
    heeded = (1.6 - 8 * early.abs()).clamp(_ODD_INTERVAL, 1.0) * some + (1 - some)
    step = (some * (seconds - last).abs() / fast).clamp(max=1.0)
    new = torch.stack(
        [
            intervals[:, 0] + known * share.clamp(min=_FAST) * (seconds - intervals[:, 0]),
            intervals[:, 1] + known * share.clamp(min=_SLOW) * (seconds - intervals[:, 1]),
            intervals[:, 2] + known * (seconds - intervals[:, 2]),
            intervals[:, 3]
            + known * share.clamp(min=_USUAL) * heeded * (seconds - intervals[:, 3]),
            unrest + some * _UNREST * (step - unrest),
            long_unrest + some * _LONG_UNREST * (step - long_unrest),
        ],
        1,
    )
    seen = torch.cat([seen[:, :1], (before + known).clamp(max=1000.0)[:, None], seen[:, 2:]], 1)
    return features, seen, new
