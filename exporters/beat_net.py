"""A recurrent network over heart beats: one step a beat, all that it carries in plain sight.

It is given the signal around a beat and the interval before it, and says the beat's class and
the rhythm so far. What a cardiologist compares a beat with is carried beside the recurrent state:
the amplitude and the usual shape of this patient's beats in these leads, and the usual interval.
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
_AMPLITUDE, _SHAPE, _FAST, _SLOW = 0.05, 0.05, 1 / 8, 1 / 64
_PATCH, _STEP = 10, 5  # points
_LEAST_MV = 0.02  # amplitude of a lead that is not there, or flat
_LEAST_S, _LONGEST_S = 0.15, 4.0


class BeatNetConfig(NamedTuple):
    """The architecture, and nothing else."""

    classes: int = 5
    rhythms: int = 4
    patch: int = 40  # what is read off each stretch of a window
    width: int = 64
    hidden: int = 64
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
            "beats": (2,),  # beats and intervals seen, at most 1000
            "amplitude": (LEADS,),
            "shape": (LEADS * POINTS,),
            "intervals": (3,),  # fast mean, slow mean, the last
            "h": (config.hidden,),
        }
        self.patch = nn.Linear(2 * LEADS * _PATCH, config.patch)
        patches = (POINTS - _PATCH) // _STEP + 1
        self.shrink = nn.Linear(patches * config.patch, config.width)
        width = config.width + 11
        self.norm = nn.LayerNorm(width)
        self.gru = nn.GRU(width, config.hidden, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.beat_class = nn.Linear(width + config.hidden, config.classes)
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
        shapes, features = [], []
        for number in range(x.shape[1]):
            window, seen, amplitude, shape = _compare(x[:, number, :-1], seen, amplitude, shape)
            rhythm, seen, intervals = _interval(x[:, number, -1], seen, intervals)
            shapes.append(window)
            features.append(torch.cat([rhythm, (amplitude > _LEAST_MV).float()], 1))
        y = torch.stack(shapes, 1).unfold(3, _PATCH, _STEP).transpose(2, 3).flatten(3)
        y = self.dropout(torch.relu(self.patch(y)).flatten(2))
        y = self.dropout(torch.relu(self.shrink(y)))
        y = self.norm(torch.cat([y, torch.stack(features, 1)], 2))
        z, h = self.gru(y, h.unsqueeze(0))
        z = self.dropout(z)
        beat_class = self.beat_class(torch.cat([y, z], 2))
        return beat_class, self.rhythm(z), (seen, amplitude, shape, intervals, h.squeeze(0))


def _compare(
    x: Tensor, seen: Tensor, amplitude: Tensor, shape: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a beat as it is and less the usual one, (N, 2 LEADS, POINTS), and new states."""
    count = seen[:, :1] + 1
    window = x.reshape(-1, LEADS, POINTS)
    # As a product: ONNX Runtime's ReduceMean rounds a row differently with the rows beside it.
    mean = torch.full((POINTS, 1), 1.0 / POINTS)
    window = window - window @ mean
    size = (window.square() @ mean).squeeze(2).sqrt()
    amplitude = amplitude + torch.clamp(1 / count, min=_AMPLITUDE) * (size - amplitude)
    window = window / (amplitude + _LEAST_MV).unsqueeze(2)
    usual = shape.reshape(-1, LEADS, POINTS)
    known = (count > 1).float().unsqueeze(2)
    pair = torch.cat([window, (window - usual) * known], 1)
    weight = torch.clamp(1 / count, min=_SHAPE).unsqueeze(2)
    shape = (usual + weight * (window - usual)).flatten(1)
    return pair, torch.cat([count.clamp(max=1000.0), seen[:, 1:]], 1), amplitude, shape


def _interval(seconds: Tensor, seen: Tensor, intervals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what an interval says beside the usual one, (N, 9), and new states.

    Ratios and no logarithms: ONNX Runtime's Log rounds by where in the batch a row stands.
    """
    known = (seconds > 0).float()
    seconds = seconds.clamp(_LEAST_S, _LONGEST_S)
    fast, slow, last = intervals.clamp(min=_LEAST_S).unbind(1)
    before = seen[:, 1]
    some = known * (before > 0).float()
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
            (seen[:, 0] / 100).clamp(max=1.0),
        ],
        1,
    )
    count = (before + known).clamp(min=1.0)
    means = [
        mean + known * torch.clamp(1 / count, min=weight) * (seconds - mean)
        for mean, weight in zip(intervals.unbind(1), (_FAST, _SLOW, 1.0), strict=True)
    ]
    new = torch.stack([seen[:, 0], (before + known).clamp(max=1000.0)], 1)
    return features, new, torch.stack(means, 1)
