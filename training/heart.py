"""Train the heart model: ``python -m training.heart``, then see ``runs/heart`` and LOG.md.

A causal network over one or two leads says for every 11 ms frame how probable a beat is, and of
which class, 0.133 s after it happened. It learns as it will be used: on filtered samples from the
engine's own front, hop after hop, with the state carried from window to window. The command
ends by writing the bundled model file, which :mod:`training.evaluate` then streams and scores.
"""

import argparse
import datetime
import math
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.nn import functional

from engine import ec57, model_file
from engine.heart.beats import Beat, BeatFinder
from engine.model_file import Filter, Input, ModelSpec, Output, Stage
from exporters.net import Conv, Head, NetConfig, StreamingNet
from exporters.to_onnx import export, states_of
from training import data, evaluate
from training.beats import CUT
from training.lanes import HeartData, Lanes, Whole, Window, whole

HOP = 60  # samples; 1/6 s, 15 frames
LOOK_AHEAD = 48  # samples; 0.133 s, enough to see the end of a wide QRS complex
WINDOW_S = 5.0  # of back-propagation; the state is carried further
LANES_PER_RECORD = 2
CLIP = 1.0  # gradient norm
# Torch's own float32 is 1e-5 from its float64 in some of the states of a trained network.
TOLERANCE = 5e-5
TAUGHT = 0.4  # share of a run that began with weights of another, in the mean of the two
CLASS_LOSS = 0.3  # of the sum: the loss per beat is several times the loss per frame

LEADS = 2

NET = NetConfig(
    channels=LEADS,
    heads={"beat": Head(1, "sigmoid"), "beat_class": Head(len(data.LABELS), "softmax")},
    convs=(Conv(32, 12, 2), Conv(64, 8, 2)),
    cell="lstm",
    layers=2,
    hidden=96,
    dropout=0.2,
)


def statement(net: StreamingNet, provenance: str) -> ModelSpec:
    """Return what the model file says of this network."""
    return ModelSpec(
        format=model_file.FORMAT,
        name="heart",
        pipeline="heart",
        input=Input(360.0, "mV", LEADS, filters=(Filter("highpass", (0.5,), 2),), least_channels=1),
        hop_samples=HOP,
        window_samples=HOP,
        stages=(Stage("x", (HOP, LEADS), states=states_of(net)),),
        outputs=(Output("beat", "beat"), Output("beat_class", "beat_class", data.LABELS)),
        licence="Apache-2.0; trained on MIT-BIH Arrhythmia, ODC-By 1.0",
        provenance=provenance,
        look_ahead_samples=LOOK_AHEAD,
        gap="reset",
        latency_ms=100.0,
        priority=0,
        beats=CUT,
    )


class HeartModel(lightning.LightningModule):
    """The network, its losses, and the state that windows hand on.

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
        self.net = StreamingNet(config)
        self.spec = statement(self.net, "in training")
        self.epochs = epochs
        self.rate = rate
        self.seed = seed
        self.states: tuple[Tensor, ...] = ()
        self.class_weights = torch.tensor([data.CLASS_WEIGHTS[label] for label in data.LABELS])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.rate, weight_decay=1e-2)

    def on_train_epoch_start(self) -> None:
        # A cosine, set here because Lightning 2.6 saves an epoch's checkpoint before it steps a
        # scheduler and leaves that step out on resuming.
        falling = (1 + math.cos(math.pi * self.current_epoch / self.epochs)) / 2
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.rate * falling

    def training_step(self, window: Window, _index: int) -> Tensor:
        states = self.states
        if window.first:
            # Dropout draws from the global generator; with this a resumed run draws the same.
            torch.manual_seed(self.seed + self.current_epoch)
            states = self.net.initial_states(len(window.x))
        logits, states = self.net.logits(window.x, *states)
        self.states = tuple(state.detach() for state in states)
        beat_loss, class_loss = self.losses(logits, window)
        self.log_dict({"beat_loss": beat_loss, "class_loss": class_loss}, prog_bar=True)
        return beat_loss + CLASS_LOSS * class_loss

    def losses(self, logits: dict[str, Tensor], window: Window) -> tuple[Tensor, Tensor]:
        """Return the loss of the beat over all frames, and of the class over beats' frames."""
        beat_loss = functional.binary_cross_entropy_with_logits(
            logits["beat"].squeeze(2), window.beat, window.weight
        )
        labelled = window.label != data.NO_LABEL
        class_loss = functional.cross_entropy(
            logits["beat_class"][labelled],
            window.label[labelled],
            self.class_weights,
            reduction="sum",
        ) / self.class_weights[window.label[labelled]].sum().clamp(min=1.0)
        return beat_loss, class_loss

    def validation_step(self, validation: Whole, _index: int) -> None:
        found = self.find(validation.x)
        rate_hz = self.spec.input.rate_hz
        scores = [
            evaluate.score(recording, beats, rate_hz)
            for recording, beats in zip(validation.recordings, found, strict=True)
        ]
        total = ec57.gross(scores)
        figures = {"qrs": total.f1, "veb": total.of("V").f1, "sveb": total.of("S").f1}
        # Beats are named by another model (training.beats) where there is one; they rest on being
        # found.
        figures["score"] = np.dot([1.0, 0.01, 0.0], np.nan_to_num(list(figures.values())))
        self.log_dict(figures, prog_bar=True, batch_size=1)

    def find(self, x: Tensor) -> list[list[Beat]]:
        """Return each row's beats, (rows, samples, leads) walked in long steps."""
        step = 600 * HOP
        finder = BeatFinder(msgspec.structs.replace(self.spec, hop_samples=step), len(x))
        states = self.net.initial_states(len(x))
        beats: list[list[Beat]] = [[] for _ in x]
        padded = functional.pad(x, (0, 0, 0, -x.shape[1] % step))
        for start in range(0, padded.shape[1], step):
            beat, classes, *states = self.net(padded[:, start : start + step], *states)
            outputs = {"beat": beat.numpy(), "beat_class": classes.numpy()}
            place = np.full(len(x), start)
            for row, one in finder.push(np.arange(len(x)), outputs, place):
                beats[row].append(one)
        return beats


def make_trainer(folder: Path, epochs: int, patience: int, **options: Any) -> lightning.Trainer:
    """Return a trainer that stops early, and keeps the best and the last state in `folder`."""
    # Without its version counter: with it, a second run would leave the first one's "best" alone.
    best = ModelCheckpoint(
        folder, "best", monitor="score", mode="max", enable_version_counter=False
    )
    last = ModelCheckpoint(
        folder, "last", save_on_train_epoch_end=True, enable_version_counter=False
    )
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=CLIP,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        callbacks=[best, last, EarlyStopping("score", patience=patience, mode="max")],
        logger=[CSVLogger(folder, "csv"), TensorBoardLogger(folder, "tensorboard")],
        **options,
    )


def provenance(seed: int, command: str) -> str:
    """Return where a model is from: data, records, seed, command, date and version."""
    return (
        "MIT-BIH Arrhythmia Database 1.0.0 (PhysioNet, ODC-By 1.0), "
        f"trained on records {' '.join(data.TRAINING)}, "
        f"validated on {' '.join(data.VALIDATION)}; seed {seed}; "
        f"{command}; {datetime.date.today().isoformat()}; torch {torch.__version__}"
    )


def _blend(taught: Tensor, begun: Tensor | None) -> Tensor:
    """Return weights between those that a run began with and those that it came to.

    The mean keeps what both are good at (Wortsman et al. 2022, WiSE-FT): training/LOG.md.
    """
    return taught if begun is None else begun + TAUGHT * (taught - begun)


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    lightning.seed_everything(arguments.seed)
    model = HeartModel(NET, arguments.epochs, arguments.rate, arguments.seed)
    make_lanes = partial(
        Lanes,
        [data.read(arguments.data, name) for name in data.TRAINING],
        model.spec,
        NET.stride,
        round(WINDOW_S * model.spec.input.rate_hz),
        LANES_PER_RECORD,
    )
    validation = whole([data.read(arguments.data, name) for name in data.VALIDATION], model.spec)
    begun: dict[str, Tensor] = {}
    if arguments.begin:
        begun = torch.load(arguments.begin, weights_only=True)["state_dict"]
        model.load_state_dict(begun)
    trainer = make_trainer(arguments.runs, arguments.epochs, arguments.patience)
    last = arguments.runs / "last.ckpt"
    heart = HeartData(make_lanes, validation, arguments.seed)
    trainer.fit(model, heart, ckpt_path=last if arguments.resume else None)
    best = torch.load(arguments.runs / "best.ckpt", weights_only=True)["state_dict"]
    model.load_state_dict({name: _blend(value, begun.get(name)) for name, value in best.items()})
    command = "python -m training.heart " + shlex.join(sys.argv[1:])
    spec = statement(model.net, provenance(arguments.seed, command.strip()))
    export(model.net, spec, arguments.output, TOLERANCE)
    scores = evaluate.evaluate(model_file.load(arguments.output), validation.recordings)
    print(evaluate.table(data.VALIDATION, scores))  # noqa: T201 - the command's result


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ecg/mitdb"))
    parser.add_argument("--runs", type=Path, default=Path("runs/heart"), help="logs, checkpoints")
    parser.add_argument("--output", type=Path, default=model_file.BUNDLED / "heart.onnx")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--patience", type=int, default=8, help="epochs without a better score")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--begin", type=Path, help="checkpoint whose weights to begin with; the mean is exported"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    main()
