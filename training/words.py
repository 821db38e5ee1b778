"""Train the recogniser of single words: ``python -m training.words``, then see LOG.md.

A causal network over log-mel frames says for every 40 ms which word has just been heard, if any:
CTC over whole words, the ten digits and five commands. It learns from streams of words, noise and
silence (:mod:`training.mixtures`), half of which go on from the state that others left, and may
tell a word until ``look_ahead_samples`` after its end and not later. The command ends by writing
the bundled model file and what it does on the validation speakers, through the engine's runtime.
"""

import argparse
import dataclasses
import datetime
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as lightning
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from engine import model_file
from engine.features import LogMel
from engine.model_file import Input, ModelSpec, Output, Stage
from engine.runtime import CpuRuntime
from engine.signal import Front
from exporters.net import Conv, Head, NetConfig, StreamingNet
from exporters.to_onnx import export, states_of
from training import mixtures
from training.mixtures import LABELS, RATE_HZ, Batch, Sources, Streams

FEATURES = LogMel(shift_samples=320, gain=32.0)  # every second frame of the usual 10 ms
HOP = 3200  # samples; 0.2 s, 10 frames, 5 outputs
# Puts the frames where kaldi-native-fbank has them, see engine.features.LogMel.
WINDOW = HOP + 120
LOOK_AHEAD = 3200  # samples; 0.2 s, in which the end of a word shows that it is one
CLIP = 1.0  # gradient norm
WARM_UP = 0.3  # of the highest learning rate, in the first epoch
ROWS = 48
BATCHES = 100  # an epoch
# Share of the loss by which each output should also know which word is being spoken, and the
# weight of outputs at which none is. CTC alone teaches one output a word: after nineteen epochs
# it still had four of five words wrong.
HEARD_LOSS = 0.3
UNSPOKEN = 0.1
FRESH = 0.5  # share of streams that begin with the state of a new one
# Torch's own float32 is 2e-5 from its float64 after some seconds of a trained recogniser.
TOLERANCE = 1e-4
GAINS = (0.25, 1.0, 4.0)  # at which the noise is listened to

NET = NetConfig(
    heads={"ctc": Head(len(LABELS), "log_softmax")},
    channels=FEATURES.bins,
    convs=(Conv(128, 4, 2),),
    cell="gru",
    layers=2,
    hidden=192,
    dropout=0.25,
    normalised=True,
    layer_norms=True,
)
STRIDE = NET.stride * FEATURES.shift_samples  # samples of one output


class Word(NamedTuple):
    """One word that was told."""

    label: int
    confidence: float  # greatest posterior while it was told
    sample: int  # end of the output that first told it


def statement(net: StreamingNet, provenance: str) -> ModelSpec:
    """Return what the model file says of this network."""
    return ModelSpec(
        format=model_file.FORMAT,
        name="words",
        pipeline="speech",
        input=Input(float(RATE_HZ), "1"),
        hop_samples=HOP,
        window_samples=WINDOW,
        stages=(
            Stage(
                "x",
                (HOP // FEATURES.shift_samples, FEATURES.bins),
                features=FEATURES,
                states=states_of(net),
            ),
        ),
        outputs=(Output("ctc", "ctc", LABELS),),
        licence="Apache-2.0; trained on Speech Commands, CC BY 4.0, and Free Spoken Digits, "
        "CC BY-SA 4.0",
        provenance=provenance,
        look_ahead_samples=LOOK_AHEAD,
        gap="reset",
        latency_ms=200.0,
    )


def words_of(scores: NDArray[np.float32], first: int = 0) -> list[Word]:
    """Read a stream greedily: the likeliest label of each output, repetitions once.

    Parameters
    ----------
    scores : (outputs, labels) float32
        Natural logarithms of posteriors.
    first : int
        Sample at which the first output begins.
    """
    best = scores.argmax(1)
    found: list[Word] = []
    before = 0
    for place, label in enumerate(best.tolist()):
        posterior = math.exp(float(scores[place, label]))
        if label and label == before:
            last = found[-1]
            found[-1] = last._replace(confidence=max(last.confidence, posterior))
        elif label:
            found.append(Word(label, posterior, first + (place + 1) * STRIDE))
        before = label
    return found


def ctc(log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch, and the same as a figure to look at.

    Only alignments count that tell a word where it is allowed. Torch's gradient of CTC takes for
    granted that the posteriors of an output sum to one, which they no longer do; so the
    occupancies of the labels are taken from it, and the loss is their cross entropy, whose
    gradient is the right one.

    Parameters
    ----------
    log_probs : (rows, outputs, labels)
    batch : Batch
    """
    masked = log_probs.detach().masked_fill(~batch.allowed, -30.0).requires_grad_()
    lengths = torch.full((len(masked),), masked.shape[1])
    with torch.enable_grad():
        loss = functional.ctc_loss(
            masked.transpose(0, 1), batch.targets, lengths, batch.counts, reduction="none"
        )
        (gradient,) = torch.autograd.grad(loss.sum(), masked)
    occupied = masked.detach().exp() - gradient
    rows = len(masked)
    return -(occupied * log_probs).sum() / rows, loss.detach().mean()


class Validation(NamedTuple):
    """What is listened to after each epoch, as features."""

    clips: Sequence[tuple[Tensor, list[int]]]  # (rows, frames, bins), outputs that are heard
    labels: NDArray[np.int64]  # (clips,)
    digits: NDArray[np.bool_]  # (clips,) those of the set "digits"
    noise: Tensor  # (rows, frames, bins)
    noise_hours: float
    streams: Sequence[Batch]


class WordsModel(lightning.LightningModule):
    """The network, its loss, and the state that one batch leaves to the next.

    Parameters
    ----------
    config : NetConfig
    epochs : int
        Over which the learning rate falls to zero.
    rate : float
        Highest learning rate.
    seed : int
    """

    def __init__(self, config: NetConfig, epochs: int, rate: float, seed: int) -> None:
        super().__init__()
        heads = {**config.heads, "heard": Head(len(LABELS))}
        self.net = StreamingNet(dataclasses.replace(config, heads=heads))
        self.served = config
        self.spec = statement(self.net, "in training")
        self.epochs, self.rate, self.seed = epochs, rate, seed
        self.states: tuple[Tensor, ...] = ()
        self.weights = torch.tensor([UNSPOKEN] + [1.0] * (len(LABELS) - 1))

    def to_serve(self) -> StreamingNet:
        """Return the network without the head that only training listens to."""
        net = StreamingNet(self.served)
        net.load_state_dict(
            {k: v for k, v in self.net.state_dict().items() if not k.startswith("heads.heard")}
        )
        return net

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.rate, weight_decay=1e-2)

    def on_train_epoch_start(self) -> None:
        # A cosine, set here for the reason given in training/heart.py.
        falling = (1 + math.cos(math.pi * self.current_epoch / self.epochs)) / 2
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.rate * (falling if self.current_epoch else WARM_UP)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if index == 0:
            # Dropout draws from the global generator; with this a resumed run draws the same.
            torch.manual_seed(self.seed + self.current_epoch)
            self.states = ()
        logits, states = self.net.logits(batch.x, *self._begin(len(batch.x)))
        self.states = tuple(state.detach() for state in states)
        loss, shown = ctc(logits["ctc"].log_softmax(2), batch)
        self.log("ctc", shown, prog_bar=True, batch_size=len(batch.x))
        heard = functional.cross_entropy(
            logits["heard"].flatten(0, 1), batch.heard.flatten(), self.weights
        )
        return loss + HEARD_LOSS * batch.heard.shape[1] * heard

    def _begin(self, rows: int) -> tuple[Tensor, ...]:
        """Return states to begin with: of new streams, or those that other streams left."""
        new = self.net.initial_states(rows)
        if not self.states:
            return new
        kept = (torch.rand(rows) >= FRESH).float()
        return tuple(
            state.roll(1, 0) * kept.view(-1, *[1] * (state.dim() - 1)) for state in self.states
        )

    def validation_step(self, validation: Validation, _index: int) -> None:
        found = [words for clips, heard in validation.clips for words in self.hear(clips, heard)]
        wrong = np.array(
            [
                errors([label], [word.label for word in words])
                for label, words in zip(validation.labels.tolist(), found, strict=True)
            ]
        )
        false = sum(len(words) for words in self.hear(validation.noise))
        lost, said = 0, 0
        for batch in validation.streams:
            wanted = np.split(batch.targets.numpy(), np.cumsum(batch.counts.numpy())[:-1])
            for words, labels in zip(self.hear(batch.x), wanted, strict=True):
                lost += errors(labels.tolist(), [word.label for word in words])
                said += len(labels)
        figures = {
            "commands": 100.0 * float(wrong[~validation.digits].mean()),
            "digits": 100.0 * float(wrong[validation.digits].mean()),
            "streams": 100.0 * lost / said,
            "false_per_hour": false / validation.noise_hours,
        }
        # Half a point of errors is worth ten false words an hour: a threshold deals with them.
        total = 100.0 * float(wrong.mean())
        figures["score"] = -(total + 0.5 * figures["streams"] + 0.05 * figures["false_per_hour"])
        self.log_dict(figures, prog_bar=True, batch_size=1)

    def hear(self, x: Tensor, heard: Sequence[int] | None = None) -> list[list[Word]]:
        """Return each row's words, of (rows, frames, bins) from new streams on."""
        with torch.no_grad():
            scores, *_ = self.net(x, *self.net.initial_states(len(x)))
        counts = heard or [scores.shape[1]] * len(x)
        return [words_of(row[:count]) for row, count in zip(scores.numpy(), counts, strict=True)]


def errors(wanted: Sequence[int], found: Sequence[int]) -> int:
    """Return how many words must be changed, left out or put in."""
    costs = np.arange(len(found) + 1)
    for row, label in enumerate(wanted, 1):
        before, costs[0] = costs[0], row
        for column, other in enumerate(found, 1):
            here = min(costs[column] + 1, costs[column - 1] + 1, before + (label != other))
            before, costs[column] = costs[column], here
    return int(costs[-1])


def flushed(samples: NDArray[np.float32], spec: ModelSpec) -> NDArray[np.float32]:
    """Return a stream with the end that a flush gives it: whole hops of its last value."""
    length = -(-(len(samples) + spec.look_ahead_samples) // spec.hop_samples) * spec.hop_samples
    return np.pad(samples, (0, length - len(samples)), mode="edge")


def validate_on(sources: Sources, num_digits: int, spec: ModelSpec, seed: int) -> Validation:
    """Put the validation clips and noise side by side.

    Parameters
    ----------
    sources : Sources
    num_digits : int
        So many clips at the end are of the set "digits".
    spec : ModelSpec
    seed : int
    """
    sounds = [flushed(clip.samples.astype(np.float32) / 32768, spec) for clip in sources.clips]
    labels = np.array([clip.label for clip in sources.clips])
    digits = np.arange(len(sounds)) >= len(sounds) - num_digits
    order = np.argsort([len(sound) for sound in sounds], kind="stable")
    clips = []
    for group in np.array_split(order, -(-len(order) // 128)):
        longest = max(len(sounds[number]) for number in group)
        padded = np.stack([_padded(sounds[number], longest) for number in group])
        heard = [len(sounds[number]) // STRIDE for number in group]
        clips.append((torch.from_numpy(mixtures.to_features(spec, padded)), heard))
    noise = np.concatenate(sources.noises).astype(np.float32) / 32768
    minute = 60 * RATE_HZ // spec.hop_samples * spec.hop_samples
    minutes = noise[: len(noise) // minute * minute].reshape(-1, minute)
    minutes = np.concatenate([np.clip(gain * minutes, -1, 1) for gain in GAINS])
    streams = Streams(sources, spec, STRIDE, 64, 2, (seed,))
    return Validation(
        clips,
        labels[order],
        digits[order],
        torch.from_numpy(mixtures.to_features(spec, minutes)),
        minutes.size / RATE_HZ / 3600,
        [streams[0], streams[1]],
    )


def _padded(sound: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    return np.pad(sound, (0, length - len(sound)))


class WordsData(lightning.LightningDataModule):
    """New streams every epoch, and the same validation after each."""

    def __init__(
        self, sources: Sources, spec: ModelSpec, validation: Validation, batches: int, seed: int
    ) -> None:
        super().__init__()
        self._sources, self._spec, self._validation = sources, spec, validation
        self._batches, self._seed = batches, seed

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        seed = (self._seed, self.trainer.current_epoch)
        streams = Streams(self._sources, self._spec, STRIDE, ROWS, self._batches, seed)
        return DataLoader(streams, batch_size=None)

    def val_dataloader(self) -> DataLoader[Validation]:
        return DataLoader([self._validation], batch_size=None, collate_fn=_unchanged)


def _unchanged(item: Any) -> Any:
    """Keep the loader from turning arrays into tensors."""
    return item


def normalise(net: StreamingNet, streams: Streams, batches: int = 4) -> None:
    """Set what the network subtracts from its input and multiplies it with."""
    x = torch.cat([streams[index].x for index in range(batches)]).flatten(0, 1)
    net.mean.copy_(x.mean(0))
    net.scale.copy_(1.0 / x.std(0))


def make_trainer(folder: Path, epochs: int, **options: Any) -> lightning.Trainer:
    """Return a trainer that keeps the best and the last state in `folder`."""
    best, last = (
        ModelCheckpoint(folder, name, enable_version_counter=False, **kept)
        for name, kept in (
            ("best", {"monitor": "score", "mode": "max"}),
            ("last", {"save_on_train_epoch_end": True}),
        )
    )
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=CLIP,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        callbacks=[best, last],
        logger=[CSVLogger(folder, "csv"), TensorBoardLogger(folder, "tensorboard")],
        log_every_n_steps=10,
        check_val_every_n_epoch=min(4, epochs),
        **options,
    )


class Listener:
    """A model file over whole recordings, many at a time, as the engine runs it."""

    def __init__(self, path: Path, rows: int = 32) -> None:
        self.model = model_file.load(path)
        self.spec = self.model.spec
        self.runtime = CpuRuntime(self.model, rows)
        self.front = Front(self.spec, rows)
        self.rows = rows

    def hear(self, sounds: Sequence[NDArray[np.float32]]) -> list[list[Word]]:
        """Return the words of each recording, each a stream of its own that ends in a flush."""
        found: list[list[Word]] = []
        for start in range(0, len(sounds), self.rows):
            found += self._hear(sounds[start : start + self.rows])
        return found

    def _hear(self, sounds: Sequence[NDArray[np.float32]]) -> list[list[Word]]:
        ended = [flushed(sound, self.spec) for sound in sounds]
        hops = [len(sound) // self.spec.hop_samples for sound in ended]
        scores: list[list[NDArray[np.float32]]] = [[] for _ in ended]
        for slot in range(len(ended)):
            self.runtime.reset(slot)
            self.front.reset(slot)
        for hop in range(max(hops)):
            slots = np.array([slot for slot, count in enumerate(hops) if hop < count])
            part = slice(hop * self.spec.hop_samples, (hop + 1) * self.spec.hop_samples)
            samples = np.stack([ended[slot][part] for slot in slots])[:, :, None]
            outputs = self.runtime.step(slots, self.front.push(slots, samples))
            for slot, row in zip(slots.tolist(), outputs["ctc"], strict=True):
                scores[slot].append(row)
        return [words_of(np.concatenate(rows)) for rows in scores]


def table(path: Path, sources: Sources, num_digits: int) -> str:
    """Return what a model file does on clips and noise, by the least confidence of a word."""
    listener = Listener(path)
    sounds = [clip.samples.astype(np.float32) / 32768 for clip in sources.clips]
    found = listener.hear(sounds)
    noise = np.concatenate(sources.noises).astype(np.float32) / 32768
    noises = [np.clip(gain * noise, -1, 1) for gain in GAINS]
    hours = sum(map(len, noises)) / RATE_HZ / 3600
    false = [word for words in listener.hear(noises) for word in words]
    lines = [
        "| least confidence | commands, % errors | digits, % | all, % | false words an hour |",
        "| --- | --- | --- | --- | --- |",
    ]
    for least in (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        wrong = np.array(
            [
                errors([clip.label], [w.label for w in words if w.confidence >= least])
                for clip, words in zip(sources.clips, found, strict=True)
            ]
        )
        parts = (wrong[:-num_digits], wrong[-num_digits:], wrong)
        rates = " | ".join(f"{100 * part.mean():.2f}" for part in parts)
        heard = sum(word.confidence >= least for word in false)
        lines.append(f"| {least:g} | {rates} | {heard / hours:.2f} |")
    return "\n".join(lines)


def provenance(seed: int, command: str) -> str:
    """Return where a model is from: data, split, seed, command, date and version."""
    return (
        "Google Speech Commands (Warden 2018), nine words, and Free Spoken Digit Dataset, the "
        "speakers of their split 'train'; noise of Speech Commands and of OpenVoiceOS; "
        f"seed {seed}; {command}; {datetime.date.today().isoformat()}; torch {torch.__version__}"
    )


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    lightning.seed_everything(arguments.seed)
    model = WordsModel(NET, arguments.epochs, arguments.rate, arguments.seed)
    training, held = (mixtures.read(arguments.data, split) for split in ("train", "valid"))
    num_digits = mixtures.count(arguments.data, "digits", "valid")
    normalise(model.net, Streams(training, model.spec, STRIDE, ROWS, 4, (arguments.seed,)))
    validation = validate_on(held, num_digits, model.spec, arguments.seed)
    data = WordsData(training, model.spec, validation, arguments.batches, arguments.seed)
    trainer = make_trainer(arguments.runs, arguments.epochs)
    last = arguments.runs / "last.ckpt"
    trainer.fit(model, data, ckpt_path=last if arguments.resume else None)
    best = torch.load(arguments.runs / "best.ckpt", weights_only=True)
    model.load_state_dict(best["state_dict"])
    command = "python -m training.words " + shlex.join(sys.argv[1:])
    net = model.to_serve()
    spec = statement(net, provenance(arguments.seed, command.strip()))
    export(net, spec, arguments.output, TOLERANCE)
    print(table(arguments.output, held, num_digits))  # noqa: T201 - the command's result


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/speech"))
    parser.add_argument("--runs", type=Path, default=Path("runs/words"), help="logs, checkpoints")
    parser.add_argument("--output", type=Path, default=model_file.BUNDLED / "words.onnx")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batches", type=int, default=BATCHES, help="of an epoch")
    parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    main()
