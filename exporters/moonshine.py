"""Moonshine base-en in PyTorch: the encoder, whole and streaming, and the decoder.

The architecture is that of Jeffries et al. 2024 (arXiv 2410.15608); :mod:`engine.speech.moonshine`
reads its weights. What is ours is :meth:`Encoder.stream`: the same weights over chunks of frames
that see a bounded past and a few frames ahead, as a live stream is served. The frames ahead are
computed anew with each chunk and never kept (Emformer, Shi et al. 2021), so that the look-ahead
does not add up over the layers.
"""

from collections.abc import Iterable
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.speech import moonshine

WIDTH = 416
HEADS = 8
HEAD = WIDTH // HEADS
LAYERS = 8
ROTATED = 32  # dimensions of each head that carry the position
SAMPLES_PER_FRAME = 384  # 24 ms
CONV1_HOP, CONV1_SIZE = 64, 127
_RATIO = SAMPLES_PER_FRAME // CONV1_HOP  # frames of the first convolution in one of the last
_EXTRA = 7  # frames of the first convolution that a frame needs beyond its own six
# Samples that the first frame reads beyond its hop: windows overlap by so much at the least.
RECEPTIVE = (_RATIO + _EXTRA - 1) * CONV1_HOP + CONV1_SIZE - SAMPLES_PER_FRAME

# Mean and mean square of the first convolution's output, the average of read English, and for
# how many of its frames (4 ms) they count before the stream's own are known.
PRIOR_MEAN, PRIOR_SQUARE, PRIOR_FRAMES = 0.0, 0.0018, 125.0
# The stream's own statistics are those of the last ten seconds or so.
LONGEST_FRAMES = 2500.0


class Chunking(NamedTuple):
    """How a stream is cut, in frames of 24 ms."""

    chunk: int
    ahead: int
    left: int  # of earlier frames that are attended to; whole chunks


def frames_of(samples: Tensor) -> Tensor:
    """Return how many frames so many samples give."""
    first = (samples - CONV1_SIZE) // CONV1_HOP + 1
    return ((first - 7) // 3 + 1 - 3) // 2 + 1


def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary embedding, (positions, ROTATED)."""
    rates = 10000 ** (-torch.arange(0, ROTATED, 2, dtype=torch.float32) / ROTATED)
    turned = (positions[:, None].float() * rates).repeat_interleave(2, -1)
    return turned.cos(), turned.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring pairs of the first dimensions of (..., positions, HEAD)."""
    cos, sin = (part.to(x.dtype) for part in turn)
    moving, fixed = x[..., :ROTATED], x[..., ROTATED:]
    pairs = torch.stack((-moving[..., 1::2], moving[..., 0::2]), -1).flatten(-2)
    return torch.cat((moving * cos + pairs * sin, fixed), -1)


def heads(x: Tensor) -> Tensor:
    """(batch, positions, WIDTH) to (batch, HEADS, positions, HEAD)."""
    return x.view(x.shape[0], -1, HEADS, HEAD).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """(batch, HEADS, positions, HEAD) to (batch, positions, WIDTH)."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, WIDTH)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward, each behind a norm."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (batch, positions, WIDTH) each, not yet turned."""
        h = self.norm1(x)
        return self.q(h), self.k(h), self.v(h)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.o(attended)
        wide = functional.gelu(self.fc1(self.norm2(x)))
        y: Tensor = x + self.fc2(wide)
        return y


class Encoder(nn.Module):
    """Audio to frames of 24 ms."""

    def __init__(self, weights: dict[str, np.ndarray] | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, WIDTH, CONV1_SIZE, CONV1_HOP, bias=False)
        self.conv2 = nn.Conv1d(WIDTH, 2 * WIDTH, 7, 3)
        self.conv3 = nn.Conv1d(2 * WIDTH, WIDTH, 3, 2)
        self.group_norm = nn.GroupNorm(1, WIDTH, eps=1e-5)
        self.layers = nn.ModuleList([EncoderLayer() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        if weights is not None:
            self.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})

    def first(self, audio: Tensor) -> Tensor:
        """(batch, samples) to (batch, WIDTH, frames of 4 ms)."""
        return torch.tanh(self.conv1(audio[:, None]))

    def normed(self, h: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        """Scale by given statistics, each (batch,), in place of the whole utterance's."""
        variance = (square - mean * mean).clamp(min=1e-8)
        h = (h - mean[:, None, None]) * torch.rsqrt(variance + self.group_norm.eps)[:, None, None]
        return h * self.group_norm.weight[:, None] + self.group_norm.bias[:, None]

    def stem(self, h: Tensor) -> Tensor:
        """(batch, WIDTH, frames of 4 ms) to (batch, frames of 24 ms, WIDTH)."""
        h = functional.gelu(self.conv3(functional.gelu(self.conv2(h))))
        return h.transpose(1, 2)

    def forward(self, audio: Tensor, samples: Tensor | None = None) -> Tensor:
        """Encode whole utterances, every frame seeing all others.

        Parameters
        ----------
        audio : (batch, samples) float32
        samples : (batch,) int64, optional
            How many of them are the utterance's; the rest is padding.

        Returns
        -------
        (batch, frames, WIDTH) float32
        """
        x = self.whole_stem(audio, samples)
        return self.attend_all(x, None if samples is None else frames_of(samples))

    def whole_stem(self, audio: Tensor, samples: Tensor | None) -> Tensor:
        """Return what the convolutions make of whole utterances, (batch, frames, WIDTH)."""
        h = self.first(audio)
        if samples is None:
            return self.stem(self.group_norm(h))
        counts = (samples - CONV1_SIZE) // CONV1_HOP + 1
        inside = (torch.arange(h.shape[2]) < counts[:, None])[:, None]
        total = counts * WIDTH
        mean = (h * inside).sum((1, 2)) / total
        return self.stem(self.normed(h, mean, (h * h * inside).sum((1, 2)) / total))

    def attend_all(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """Run the layers over whole utterances; frames from ``counts`` on are padding."""
        mask = None
        if counts is not None:
            known = (torch.arange(x.shape[1]) < counts[:, None])[:, None, None]
            mask = torch.zeros(known.shape, dtype=_dtype(x)).masked_fill(~known, -1e4)
        turn = angles(torch.arange(x.shape[1]))
        for layer in cast(Iterable[EncoderLayer], self.layers):
            q, k, v = (heads(part) for part in layer.keys(x))
            attended = functional.scaled_dot_product_attention(
                rotate(q, turn), rotate(k, turn), v, attn_mask=mask
            )
            x = layer.finish(x, joined(attended))
        y: Tensor = self.norm(x)
        return y

    def windows(self, audio: Tensor, cut: Chunking) -> Tensor:
        """Return what the stem makes of each window of a stream.

        Parameters
        ----------
        audio : (batch, samples) float32
            As many samples as ``num_chunks`` windows need.

        Returns
        -------
        (batch, chunks, cut.chunk + cut.ahead, WIDTH) float32
        """
        h = self.first(audio)
        size = (cut.chunk + cut.ahead) * _RATIO + _EXTRA
        new = cut.chunk * _RATIO
        pieces = h.unfold(2, size, new)  # (batch, WIDTH, chunks, size)
        batch, _, chunks, _ = pieces.shape
        means, squares = self._statistics(h, size, new, chunks)
        pieces = pieces.transpose(1, 2).reshape(batch * chunks, WIDTH, size)
        x = self.stem(self.normed(pieces, means.flatten(), squares.flatten()))
        return x.view(batch, chunks, cut.chunk + cut.ahead, WIDTH)

    def _statistics(self, h: Tensor, size: int, new: int, chunks: int) -> tuple[Tensor, Tensor]:
        """Return the running mean and mean square at each window, (batch, chunks) each.

        As a stream does it: each window adds its newest frames, and the weight of what was
        before is bounded, so that an hour later the statistics still follow the voice.
        """
        mean = torch.full((h.shape[0],), PRIOR_MEAN)
        square = torch.full((h.shape[0],), PRIOR_SQUARE)
        count = PRIOR_FRAMES
        means, squares = [], []
        for index in range(chunks):
            end = index * new + size
            fresh = h[:, :, end - new : end]
            count = min(count + new, LONGEST_FRAMES)
            mean = mean + (new / count) * (fresh.mean((1, 2)) - mean)
            square = square + (new / count) * (fresh.square().mean((1, 2)) - square)
            means.append(mean)
            squares.append(square)
        return torch.stack(means, 1), torch.stack(squares, 1)

    def stream(self, audio: Tensor, cut: Chunking) -> Tensor:
        """Encode chunk by chunk, all chunks of a training batch at once.

        Returns
        -------
        (batch, chunks * cut.chunk, WIDTH) float32
        """
        return self.attend(self.windows(audio, cut), cut)

    def attend(self, x: Tensor, cut: Chunking) -> Tensor:
        """Run the layers over (batch, chunks, chunk + ahead, WIDTH) windows of the stem."""
        batch, chunks, size, _ = x.shape
        positions = torch.arange(chunks)[:, None] * cut.chunk + torch.arange(size)
        cos, sin = angles(positions.flatten())
        turn = (cos[None], sin[None])
        mask = _mask(chunks, cut, x)
        x = x.reshape(batch, chunks * size, WIDTH)
        for layer in cast(Iterable[EncoderLayer], self.layers):
            q, k, v = layer.keys(x)
            q, k = (joined(rotate(heads(part), turn)) for part in (q, k))
            q = q.reshape(batch * chunks, size, WIDTH)
            k, v = (_with_past(part.view(batch, chunks, size, WIDTH), cut) for part in (k, v))
            # Spelt out: torch's fused attention with a mask is slow backwards on a CPU.
            scores = heads(q) @ heads(k).transpose(2, 3) / HEAD**0.5
            scores = (scores.view(batch, chunks, HEADS, size, -1) + mask).softmax(-1)
            attended = scores.to(v.dtype).flatten(0, 1) @ heads(v)
            x = layer.finish(x, joined(attended).view(batch, chunks * size, WIDTH))
        x = x.view(batch, chunks, size, WIDTH)[:, :, : cut.chunk]
        y: Tensor = self.norm(x.reshape(batch, chunks * cut.chunk, WIDTH))
        return y


def _with_past(x: Tensor, cut: Chunking) -> Tensor:
    """Put the frames before each chunk in front of it: (batch * chunks, left + size, WIDTH)."""
    batch, chunks, size, _ = x.shape
    before = cut.left // cut.chunk
    kept = functional.pad(x[:, :, : cut.chunk], (0, 0, 0, 0, before, 0))
    past = [kept[:, first : first + chunks] for first in range(before)]
    return torch.cat((*past, x), 2).reshape(batch * chunks, cut.left + size, WIDTH)


def _mask(chunks: int, cut: Chunking, like: Tensor) -> Tensor:
    """Hide what lies before the stream's beginning, (chunks, 1, 1, left + size)."""
    place = torch.arange(cut.left + cut.chunk + cut.ahead)
    known = place >= cut.left - cut.chunk * torch.arange(chunks)[:, None]
    # A finite number: with -inf two runs of bfloat16 training ended in NaN.
    return torch.zeros(known.shape, dtype=_dtype(like)).masked_fill(~known, -1e4)[:, None, None]


def _dtype(like: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else like.dtype


class CtcHead(nn.Module):
    """Frames to letters: a recurrent net, h and c carried, and a linear layer.

    Parameters
    ----------
    labels : int
        The blank included.
    hidden, layers : int
    dropout : float
    """

    def __init__(self, labels: int, hidden: int = 320, layers: int = 2, dropout: float = 0.1):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, hidden, layers, batch_first=True, dropout=dropout)
        self.linear = nn.Linear(hidden, labels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frames, WIDTH) to natural-log posteriors, (batch, frames, labels)."""
        h, _ = self.lstm(self.dropout(x))
        logits: Tensor = self.linear(self.dropout(h))
        return logits.log_softmax(-1)


class DecoderLayer(nn.Module):
    """Self-attention, attention to the encoder's frames, and a gated feed-forward."""

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    norm3: nn.LayerNorm

    def __init__(self) -> None:
        super().__init__()
        parts = {name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("q", "k", "v", "o")}
        self.self = nn.ModuleDict(parts)
        parts = {name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("q", "k", "v", "o")}
        self.cross = nn.ModuleDict(parts)
        self.up_proj = nn.Linear(WIDTH, 8 * WIDTH)
        self.down_proj = nn.Linear(4 * WIDTH, WIDTH)
        for number in (1, 2, 3):
            setattr(self, f"norm{number}", nn.LayerNorm(WIDTH, bias=False))

    def memory(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the encoder's frames."""
        return heads(self.cross["k"](frames)), heads(self.cross["v"](frames))

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        memory: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Advance by some tokens; ``past`` holds the keys and values of those before."""
        h = self.norm1(x)
        q, k, v = (heads(self.self[name](h)) for name in ("q", "k", "v"))
        k = torch.cat((past[0], rotate(k, turn)), 2)
        v = torch.cat((past[1], v), 2)
        attended = functional.scaled_dot_product_attention(rotate(q, turn), k, v, attn_mask=mask)
        x = x + self.self["o"](joined(attended))
        q = heads(self.cross["q"](self.norm2(x)))
        attended = functional.scaled_dot_product_attention(q, *memory)
        x = x + self.cross["o"](joined(attended))
        up, gate = self.up_proj(self.norm3(x)).chunk(2, -1)
        return x + self.down_proj(functional.silu(gate) * up), (k, v)


class Decoder(nn.Module):
    """Tokens, given the encoder's frames and the tokens before."""

    def __init__(self, weights: dict[str, np.ndarray] | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32768, WIDTH)
        self.layers = nn.ModuleList([DecoderLayer() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        if weights is not None:
            self.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})

    def forward(self, tokens: Tensor, memory: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Advance by some tokens.

        Parameters
        ----------
        tokens : (1, new) int64
        memory : (LAYERS, 2, 1, HEADS, frames, HEAD) float32
            Of :meth:`remember`.
        past : (LAYERS, 2, 1, HEADS, old, HEAD) float32

        Returns
        -------
        logits : (1, new, vocabulary) float32
        past : (LAYERS, 2, 1, HEADS, old + new, HEAD) float32
        """
        new, old = tokens.shape[1], past.shape[4]
        turn = angles(torch.arange(new) + old)
        later = torch.arange(old + new) > torch.arange(new)[:, None] + old
        mask = torch.zeros(later.shape).masked_fill(later, -1e4)
        x = self.embedding(tokens)
        kept = []
        for layer, keys, before in zip(self.layers, memory, past, strict=True):
            x, now = layer(x, turn, (keys[0], keys[1]), (before[0], before[1]), mask)
            kept.append(torch.stack(now))
        return self.norm(x) @ self.embedding.weight.T, torch.stack(kept)

    def remember(self, frames: Tensor) -> Tensor:
        """Return the keys and values of the encoder's frames for all layers."""
        layers = cast(Iterable[DecoderLayer], self.layers)
        return torch.stack([torch.stack(layer.memory(frames)) for layer in layers])


def greedy(decoder: Decoder, frames: Tensor) -> list[int]:
    """Return the most probable next token again and again, for one utterance, to its end.

    Parameters
    ----------
    decoder : Decoder
    frames : (1, frames, WIDTH) float32
    """
    memory = decoder.remember(frames)
    past = torch.zeros(LAYERS, 2, 1, HEADS, 0, HEAD)
    token, found = 1, []
    # Six and a half tokens a second is Moonshine's own bound against loops.
    for _ in range(int(frames.shape[1] * SAMPLES_PER_FRAME / 16000 * 6.5) + 8):
        logits, past = decoder(torch.tensor([[token]]), memory, past)
        token = int(logits[0, -1].argmax())
        if token == 2:
            break
        found.append(token)
    return found


def base() -> tuple[Encoder, Decoder]:
    """Return Moonshine as it comes."""
    return Encoder(moonshine.encoder()).eval(), Decoder(moonshine.decoder()).eval()


class StreamingRecogniser(nn.Module):
    """One chunk of a stream: samples and carried state in, letters and new state out.

    What :meth:`Encoder.stream` and :class:`CtcHead` compute for a whole utterance, chunk by chunk.

    Parameters
    ----------
    encoder : Encoder
    head : CtcHead
    cut : Chunking
    """

    turn: Tensor

    def __init__(self, encoder: Encoder, head: CtcHead, cut: Chunking) -> None:
        super().__init__()
        self.encoder, self.head, self.cut = encoder, head, cut
        size = cut.left + cut.chunk + cut.ahead
        self.register_buffer("turn", torch.stack(angles(torch.arange(size))))

    @property
    def window_samples(self) -> int:
        """Samples of a step: the chunk's, those ahead, and what the last frame reads beyond."""
        return (self.cut.chunk + self.cut.ahead) * SAMPLES_PER_FRAME + RECEPTIVE

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return each state's row: keys and values of all layers, statistics, h and c."""
        lstm = self.head.lstm
        recurrent = (lstm.num_layers, lstm.hidden_size)
        past = (LAYERS, 2, self.cut.left, WIDTH)
        return {
            "past": past,
            "mean": (1,),
            "square": (1,),
            "count": (1,),
            "h": recurrent,
            "c": recurrent,
        }

    def forward(
        self,
        audio: Tensor,
        past: Tensor,
        mean: Tensor,
        square: Tensor,
        count: Tensor,
        h: Tensor,
        c: Tensor,
    ) -> tuple[Tensor, ...]:
        """Advance each stream by a chunk.

        Parameters
        ----------
        audio : (rows, window_samples) float32
        past, mean, square, count, h, c : (rows, ...) float32
            As :meth:`state_shapes` says.

        Returns
        -------
        ctc : (rows, chunk, labels) float32
            Natural-log posteriors.
        new states
            In the same order.
        """
        first = self.encoder.first(audio)
        new = self.cut.chunk * _RATIO
        fresh = first[:, :, -new:]
        counted = (count + new).clamp(max=LONGEST_FRAMES)
        weight = new / counted
        mean = mean + weight * (fresh.mean((1, 2))[:, None] - mean)
        square = square + weight * ((fresh * fresh).mean((1, 2))[:, None] - square)
        x = self.encoder.stem(self.encoder.normed(first, mean[:, 0], square[:, 0]))
        place = torch.arange(self.turn.shape[1], dtype=torch.float32)
        known = place >= self.cut.left - (count - PRIOR_FRAMES) / _RATIO
        mask = torch.where(known, 0.0, -1e4)[:, None, None]
        kept = []
        layers = cast(Iterable[EncoderLayer], self.encoder.layers)
        for number, layer in enumerate(layers):
            x, keys, values = self._attend(layer, x, past[:, number, 0], past[:, number, 1], mask)
            kept += [keys, values]
        frames = self.encoder.norm(x[:, : self.cut.chunk])
        y, (h, c) = self.head.lstm(frames, (h.transpose(0, 1), c.transpose(0, 1)))
        ctc = self.head.linear(y).log_softmax(-1)
        past = torch.stack(kept, 1).view(-1, LAYERS, 2, self.cut.left, WIDTH)
        return ctc, past, mean, square, counted, h.transpose(0, 1), c.transpose(0, 1)

    def _attend(
        self, layer: EncoderLayer, x: Tensor, old_keys: Tensor, old_values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one layer; return its frames, and the keys and values to keep."""
        left, chunk = self.cut.left, self.cut.chunk
        q, k, v = layer.keys(x)
        k, v = torch.cat((old_keys, k), 1), torch.cat((old_values, v), 1)
        turned = rotate(heads(q), (self.turn[0, left:], self.turn[1, left:]))
        scores = turned @ rotate(heads(k), (self.turn[0], self.turn[1])).transpose(2, 3)
        attended = (scores / HEAD**0.5 + mask).softmax(-1) @ heads(v)
        x = layer.finish(x, joined(attended))
        return x, k[:, chunk : chunk + left], v[:, chunk : chunk + left]
