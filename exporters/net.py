"""A streaming recurrent network whose carried state is in plain sight.

``forward(x, *states)`` serves a whole recording and a chunk of it alike: it returns the outputs
and then the new states, which the next call takes. Nothing is kept inside, nothing looks ahead.
States have the batch as their first axis, one row a stream.

No training here: losses and augmentation are in :mod:`training`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

_CELLS: Mapping[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class Conv(NamedTuple):
    """One causal convolution; the kernel is at least as long as the stride."""

    channels: int
    kernel: int
    stride: int


class Head(NamedTuple):
    """One output. A sigmoid of size 1 has no last axis: it is one probability a frame."""

    size: int
    activation: Literal["sigmoid", "softmax", "log_softmax", "none"] = "none"


@dataclass(frozen=True)
class NetConfig:
    """The architecture, and nothing else."""

    heads: Mapping[str, Head]
    channels: int = 1
    convs: tuple[Conv, ...] = ()
    cell: Literal["rnn", "lstm", "gru"] = "lstm"
    layers: int = 1
    hidden: int = 64
    linears: tuple[int, ...] = field(default=())  # widths of ReLU layers before the heads
    dropout: float = 0.0  # after each recurrent layer, in training only
    normalised: bool = False  # each channel, by figures of the training data
    layer_norms: bool = False  # one before each recurrent layer

    @property
    def stride(self) -> int:
        """Samples a frame."""
        total = 1
        for conv in self.convs:
            total *= conv.stride
        return total


class CausalConv(nn.Module):
    """A strided convolution that carries the end of its input instead of padding.

    A frame comes out with the last of the ``stride`` samples that it is due for; what it sees
    before them, ``kernel - stride`` samples, is the state; where that is none, there is no state.
    """

    def __init__(self, channels_in: int, conv: Conv) -> None:
        super().__init__()
        if conv.kernel < conv.stride:
            raise ValueError(f"kernel: expected at least the stride {conv.stride}, found {conv}")
        self.conv = nn.Conv1d(channels_in, conv.channels, conv.kernel, conv.stride)
        self.kept = conv.kernel - conv.stride

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Take (N, C, T) and the (N, C, kept) before it, return frames and the new state."""
        if not self.kept:
            return torch.relu(self.conv(x)), state
        x = torch.cat([state, x], dim=2)
        return torch.relu(self.conv(x)), x[:, :, -self.kept :]


class StreamingNet(nn.Module):
    """Causal convolutions, recurrent layers and linear heads, with explicit states.

    Attributes
    ----------
    state_shapes : dict of str to tuple of int
        Each state's name and the shape of its row, in the order that ``forward`` takes and
        returns them: ``conv0``, ..., ``h0``, ``c0``, ``h1``, ...
    mean, scale : (channels,) float32
        What a normalised network subtracts from its input, and then multiplies it with.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.state_shapes: dict[str, tuple[int, ...]] = {}
        width = self._add_convs()
        if config.normalised:
            self.register_buffer("mean", torch.zeros(config.channels))
            self.register_buffer("scale", torch.ones(config.channels))
        self.recurrent, self.norms = nn.ModuleList(), nn.ModuleList()
        for layer in range(config.layers):
            self.norms.append(nn.LayerNorm(width) if config.layer_norms else nn.Identity())
            self.recurrent.append(_CELLS[config.cell](width, config.hidden, batch_first=True))
            width = config.hidden
            for letter in self._letters:
                self.state_shapes[f"{letter}{layer}"] = (width,)
        self.dropout = nn.Dropout(config.dropout)
        linears: list[nn.Module] = []
        for size in config.linears:
            linears += [nn.Linear(width, size), nn.ReLU()]
            width = size
        self.linears = nn.Sequential(*linears)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, head.size) for name, head in config.heads.items()}
        )

    def _add_convs(self) -> int:
        width = self.config.channels
        self.convs = nn.ModuleList()
        for index, conv in enumerate(self.config.convs):
            self.convs.append(CausalConv(width, conv))
            if conv.kernel > conv.stride:
                self.state_shapes[f"conv{index}"] = (width, conv.kernel - conv.stride)
            width = conv.channels
        return width

    @property
    def _letters(self) -> str:
        return "hc" if self.config.cell == "lstm" else "h"

    def initial_states(self, rows: int) -> tuple[Tensor, ...]:
        """Return the states of new streams: zeros, each (rows, ...)."""
        like = next(self.parameters())
        return tuple(like.new_zeros(rows, *shape) for shape in self.state_shapes.values())

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Advance the streams by some samples.

        Parameters
        ----------
        x : (N, T, channels) float32
            T is a multiple of ``config.stride``; samples, or frames of features.
        *states : (N, ...) float32 each
            In the order of ``state_shapes``.

        Returns
        -------
        outputs : (N, T / stride[, size]) each
            In the order of the heads, with their activations applied.
        new_states
            As many, and of the same shapes, as `states`.
        """
        logits, new_states = self.logits(x, *states)
        outputs = tuple(activate(logits[name], head) for name, head in self.config.heads.items())
        return outputs + new_states

    def logits(self, x: Tensor, *states: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """As ``forward``, without the activations: what a loss wants, (N, frames, size) each."""
        carried = list(states)
        new_states: list[Tensor] = []
        if self.config.normalised:
            x = (x - self.mean) * self.scale
        y = x.transpose(1, 2)
        for conv in self.convs:
            y, kept = conv(y, carried.pop(0) if conv.kept else y[:, :, :0])
            new_states += [kept] if conv.kept else []
        y = y.transpose(1, 2)
        for norm, layer in zip(self.norms, self.recurrent, strict=True):
            # The module's states are (1, N, hidden): one layer each, so that each has a name.
            before = tuple(carried.pop(0).unsqueeze(0) for _ in self._letters)
            y, after = layer(norm(y), before if len(before) == 2 else before[0])
            new_states += [s.squeeze(0) for s in (after if len(before) == 2 else (after,))]
            y = self.dropout(y)
        y = self.linears(y)
        return {name: head(y) for name, head in self.heads.items()}, tuple(new_states)


def activate(logits: Tensor, head: Head) -> Tensor:
    """Return a head's output, from the (N, frames, size) that its linear layer gives."""
    if head.activation == "sigmoid":
        probability = torch.sigmoid(logits)
        return probability.squeeze(2) if head.size == 1 else probability
    if head.activation == "softmax":
        return torch.softmax(logits, dim=2)
    if head.activation == "log_softmax":
        return torch.log_softmax(logits, dim=2)
    return logits
