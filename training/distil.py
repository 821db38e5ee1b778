"""Make Moonshine's encoder a streaming one: ``python -m training.distil``, then training/LOG.md.

The student is the same encoder, cut into chunks that see a bounded past and a few frames ahead.
It learns to give, frame by frame, what the unmasked encoder gives for the whole utterance, and
its recurrent head learns to spell (CTC). The convolutions stay as they came, so that what is
trained is eight layers and a head. Chunk, look-ahead and past vary from batch to batch.

Three stages, each resumed where it was stopped: the teacher's frames are computed once and kept
on disk; the head alone learns on them; then all together. ``--steps`` may be changed between
runs: the learning rate is constant and falls to zero over the last part.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from scipy import signal
from torch import Tensor, nn
from torch.nn import functional

from engine import model_file
from engine.speech import moonshine
from engine.speech.second_pass import SecondPass
from exporters.moonshine import (
    SAMPLES_PER_FRAME,
    WIDTH,
    Chunking,
    CtcHead,
    Encoder,
    frames_of,
)
from training import recordings
from training.recordings import LETTERS, Utterance

SETS = ("librispeech", "kathleen", "ljspeech")
# Sets of many voices whose texts are unknown: they are what the offline recogniser hears.
UNTRANSCRIBED = ("orders", "spelt")
LONGEST_S = 20.0
_MOST_TIMES = 4
SPEEDS = (Fraction(1), Fraction(1), Fraction(9, 10), Fraction(11, 10))
BATCH_S = 32.0  # of audio, padding included
CTC_WEIGHT = 0.3  # of the loss of a letter, beside the distance to the teacher
CLIP = 1.0  # gradient norm
FALLING = 0.5  # part of the steps over which the learning rate falls
WARM_UP = 50  # steps
SERVED = Chunking(24, 16, 192)


class Item(NamedTuple):
    """An utterance to learn from."""

    speaker: str
    audio: NDArray[np.int16]
    letters: list[int]  # empty: only the teacher is listened to
    frames: NDArray[np.float16]  # the teacher's, (frames, WIDTH)


class Batch(NamedTuple):
    """Utterances of about one length."""

    audio: Tensor  # (rows, samples) float32, with `skipped` frames of quiet before each
    skipped: int
    counts: Tensor  # (rows,) int64, frames of each
    target: Tensor  # (rows, frames, WIDTH) float32
    letters: list[list[int]]


class Source(NamedTuple):
    """An utterance as it was recorded."""

    name: str
    speaker: str
    text: str
    audio: NDArray[np.int16]


def sources(folder: Path, kept: Path, split: str) -> list[Source]:
    """Return the utterances of a split; for training, those of other voices as well."""
    found = [
        Source(each.name, each.speaker, each.text, recordings.audio(folder, each))
        for each in recordings.manifest(folder, SETS if split == "train" else SETS[:1], split)
    ]
    if split == "train":
        found += heard(folder, kept) + spliced(folder)
    return [each for each in found if 0.5 < len(each.audio) / recordings.RATE_HZ < LONGEST_S]


def heard(folder: Path, kept: Path) -> list[Source]:
    """Return the untranscribed utterances with the texts that Moonshine gives them, kept on disk.

    A teacher's texts serve as labels (Kahn et al. 2020, Self-training for end-to-end ASR).
    """
    found = recordings.manifest(folder, UNTRANSCRIBED, "train")
    sounds = [recordings.audio(folder, each) for each in found]
    path = kept / "heard.json"
    if not path.exists():
        english = model_file.load("english")
        second = SecondPass(english.folder / english.spec.decoding.second_pass)
        texts = {}
        for each, sound in track(list(zip(found, sounds, strict=True)), "texts"):
            texts[each.name] = second.transcribe(
                sound[: int(LONGEST_S * recordings.RATE_HZ)].astype(np.float32) / 32768
            ).text
        path.write_text(json.dumps(texts))
    texts = json.loads(path.read_text())
    return [
        Source(each.name, each.speaker, texts[each.name], sound)
        for each, sound in zip(found, sounds, strict=True)
    ]


def spliced(folder: Path) -> list[Source]:
    """Return each speaker's commands one after the other: clips of a second teach too little."""
    rng = np.random.default_rng(0)
    by_speaker: dict[str, list[Utterance]] = {}
    for each in recordings.manifest(folder, ("commands",), "train"):
        by_speaker.setdefault(each.speaker, []).append(each)
    found = []
    for speaker, clips in by_speaker.items():
        for first in range(0, len(clips), 10):
            group = [clips[first + place] for place in rng.permutation(len(clips[first:][:10]))]
            sound = np.concatenate([recordings.audio(folder, each) for each in group])
            text = " ".join(each.text for each in group)
            found.append(Source(f"commands/{speaker}/{first}", speaker, text, sound))
    return found


def teacher_frames(kept: Path, utterances: list[Source]) -> list[NDArray[np.float16]]:
    """Return the unmasked encoder's frames of each utterance, computed once and kept on disk."""
    index_path, data_path = kept / "teacher.json", kept / "teacher.f16"
    names = [utterance.name for utterance in utterances]
    if not index_path.exists():
        encoder = Encoder(moonshine.encoder()).eval()
        order = np.argsort([len(each.audio) for each in utterances])
        groups = [order[first : first + 4] for first in range(0, len(order), 4)]
        found: dict[str, NDArray[np.float16]] = {}
        for group in track(groups, "teacher"):
            some = [utterances[place] for place in group]
            frames = _frames(encoder, [each.audio for each in some])
            found |= dict(zip([each.name for each in some], frames, strict=True))
        with data_path.open("wb") as out:
            for name in names:
                out.write(found[name].tobytes())
        index_path.write_text(json.dumps({name: len(found[name]) for name in names}))
    counts = json.loads(index_path.read_text())
    if list(counts) != names:
        raise ValueError(f"{index_path}: expected these {len(names)} utterances; delete it")
    data = np.memmap(data_path, np.float16, "r").reshape(-1, WIDTH)
    return np.split(data, np.cumsum(list(counts.values()))[:-1])


def _frames(encoder: Encoder, sounds: list[NDArray[np.int16]]) -> list[NDArray[np.float16]]:
    """Return the frames of utterances of about one length.

    They are padded to whole seconds, because torch compiles its bfloat16 kernels per shape.
    """
    samples = torch.tensor([len(sound) for sound in sounds])
    audio = torch.zeros(len(sounds), -(-int(samples.max()) // 16000) * 16000)
    for row, sound in enumerate(sounds):
        audio[row, : len(sound)] = torch.from_numpy(sound).float() / 32768
    with torch.inference_mode():
        stem = encoder.whole_stem(audio, samples)
        with torch.autocast("cpu", torch.bfloat16):
            frames = encoder.attend_all(stem, frames_of(samples)).half().numpy()
    counts = frames_of(samples).tolist()
    return [each[:count] for each, count in zip(frames, counts, strict=True)]


def items(folder: Path, kept: Path, split: str) -> list[Item]:
    """Return all utterances of a split, with the teacher's frames and their letters."""
    kept = kept / split
    kept.mkdir(parents=True, exist_ok=True)
    chosen = sources(folder, kept, split)
    found = []
    for source, target in zip(chosen, teacher_frames(kept, chosen), strict=True):
        spelt = recordings.spelling(source.text)
        letters = recordings.numbers(spelt) if spelt else []
        if len(target) > 1.1 * len(letters):
            found.append(Item(source.speaker, source.audio, letters, target))
    return found


def hastened(group: list[Item], ratio: Fraction, teacher: Encoder) -> list[Item]:
    """Return utterances spoken faster or slower, and so by other voices, and what the teacher says.

    Speed perturbation (Ko et al. 2015) where there are few speakers.
    """
    sounds = []
    for item in group:
        faster = signal.resample_poly(
            item.audio.astype(np.float32), ratio.denominator, ratio.numerator
        )
        sounds.append(np.clip(faster, -32768, 32767).astype(np.int16))
    frames = _frames(teacher, sounds)
    return [
        item._replace(audio=sound, frames=each)
        for item, sound, each in zip(group, sounds, frames, strict=True)
    ]


def balanced(found: list[Item]) -> list[Item]:
    """Return utterances of rare speakers several times: most of the hours are of six voices."""
    hours = Counter[str]()
    for item in found:
        hours[item.speaker] += len(item.audio)
    most = max(hours.values())
    times = {name: min(_MOST_TIMES, round((most / each) ** 0.25)) for name, each in hours.items()}
    return [item for item in found for _ in range(times[item.speaker])]


class Noise:
    """Backgrounds to mix in."""

    def __init__(self, folder: Path) -> None:
        utterances = recordings.manifest(folder, ("noise",), "train")
        self._sounds = [recordings.audio(folder, each) for each in utterances]

    def mix(self, voice: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        """Return a voice at another level, sometimes with a background 5 to 30 dB below it."""
        voice = voice * np.float32(10 ** (rng.uniform(-8, 6) / 20))
        if rng.random() < 0.85:
            return voice
        sound = self._sounds[rng.integers(len(self._sounds))].astype(np.float32) / 32768
        first = int(rng.integers(max(1, len(sound) - len(voice))))
        sound = np.resize(sound[first : first + len(voice)], len(voice))
        level = np.sqrt(np.mean(voice**2) / (np.mean(sound**2) + 1e-9))
        return voice + sound * np.float32(level * 10 ** (rng.uniform(-30, -5) / 20))


def batches(found: list[Item], rng: np.random.Generator) -> Iterator[list[Item]]:
    """Yield utterances of similar length together, in another order each time, for ever."""
    while True:
        jitter = rng.uniform(0.9, 1.1, len(found))
        order = np.argsort([len(item.audio) * j for item, j in zip(found, jitter, strict=True)])
        groups: list[list[Item]] = [[]]
        for place in order:
            item = found[place]
            longest = max(len(item.audio), *(len(other.audio) for other in groups[-1]), 0)
            if groups[-1] and (len(groups[-1]) + 1) * longest > BATCH_S * recordings.RATE_HZ:
                groups.append([])
            groups[-1].append(item)
        for place in rng.permutation(len(groups)):
            yield groups[place]


def collate(group: list[Item], cut: Chunking, noise: Noise, rng: np.random.Generator) -> Batch:
    """Put utterances side by side, each after the same few frames of quiet."""
    skipped = int(rng.integers(cut.chunk))
    counts = torch.tensor([len(item.frames) for item in group])
    # Even numbers of chunks: torch compiles its bfloat16 kernels for every new shape.
    chunks = -(-(skipped + int(counts.max())) // (2 * cut.chunk)) * 2
    samples = (chunks * cut.chunk + cut.ahead) * SAMPLES_PER_FRAME + 7 * 64 + 127
    audio = rng.normal(0, 1e-4, (len(group), samples)).astype(np.float32)
    target = torch.zeros(len(group), chunks * cut.chunk, WIDTH)
    for row, item in enumerate(group):
        voice = noise.mix(item.audio.astype(np.float32) / 32768, rng)
        begin = skipped * SAMPLES_PER_FRAME
        room = audio[row, begin : begin + len(voice)]
        room += voice[: len(room)]
        target[row, skipped : skipped + len(item.frames)] = torch.from_numpy(
            item.frames.astype(np.float32)
        )
    letters = [item.letters for item in group]
    return Batch(torch.from_numpy(audio), skipped, counts, target, letters)


def ctc(head: CtcHead, frames: Tensor, batch: Batch) -> Tensor:
    """Return the loss of a letter over the utterances that have a text."""
    rows = [row for row, letters in enumerate(batch.letters) if letters]
    if not rows:
        return torch.zeros(())
    log_probs = head(frames[rows]).transpose(0, 1)
    letters = [batch.letters[row] for row in rows]
    lengths = torch.tensor([len(each) for each in letters])
    flat = torch.tensor([letter for each in letters for letter in each])
    ends = batch.skipped + batch.counts[rows]
    total = functional.ctc_loss(log_probs, flat, ends, lengths, reduction="sum", zero_infinity=True)
    return total / lengths.sum()


def distance(frames: Tensor, batch: Batch, variance: float) -> Tensor:
    """Return the mean square distance to the teacher, over its variance."""
    place = torch.arange(frames.shape[1])
    inside = (place >= batch.skipped) & (place < (batch.skipped + batch.counts)[:, None])
    error = ((frames - batch.target) ** 2).mean(2)
    return (error * inside).sum() / inside.sum() / variance


def random_cut(rng: np.random.Generator) -> Chunking:
    """Return how a batch is cut: mostly as it will be served."""
    if rng.random() < 0.9:
        return SERVED
    chunk, ahead, left = rng.choice(((16, 16, 192), (24, 12, 144), (32, 16, 224)))
    return Chunking(int(chunk), int(ahead), int(left))


class Training:
    """Encoder, head, optimiser and counters: all that a checkpoint holds."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.encoder = Encoder(moonshine.encoder())
        self.head = CtcHead(len(LETTERS))
        for part in (self.encoder.conv1, self.encoder.conv2, self.encoder.conv3):
            part.requires_grad_(False)
        self.encoder.group_norm.requires_grad_(False)
        layers = [p for p in self.encoder.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": layers, "highest": 1.5e-4},
                {"params": list(self.head.parameters()), "highest": 8e-4},
            ],
            weight_decay=1e-3,
        )
        self.step = 0
        self.head_step = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimiser.param_groups for p in group["params"]]

    def save(self, path: Path) -> None:
        whole = {
            "encoder": self.encoder.state_dict(),
            "head": self.head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "steps": (self.step, self.head_step),
        }
        torch.save(whole, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        whole = torch.load(path, weights_only=True)
        self.encoder.load_state_dict(whole["encoder"])
        self.head.load_state_dict(whole["head"])
        self.optimiser.load_state_dict(whole["optimiser"])
        self.step, self.head_step = whole["steps"]

    def learn(self, loss: Tensor, scale: float) -> float:
        """Take one step down; return the gradient's norm. One that is not finite is skipped."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["highest"] * scale
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(self.parameters, CLIP))
        if np.isfinite(norm):
            self.optimiser.step()
        return norm


def rate(step: int, steps: int) -> float:
    """Return the learning rate, as a part of the highest."""
    return min(1.0, (step + 1) / WARM_UP, max(0.01, (steps - step) / (FALLING * steps)))


def train_head(training: Training, found: list[Item], steps: int, seed: int, log: IO[str]) -> None:
    """Teach the head to spell from the teacher's frames."""
    rng = np.random.default_rng((seed, 1, training.head_step))
    texts = [item for item in found if item.letters]
    stream = batches(texts, rng)
    for step in track(range(training.head_step, steps), "head"):
        group = next(stream)
        counts = torch.tensor([len(item.frames) for item in group])
        frames = torch.zeros(len(group), int(counts.max()), WIDTH)
        for row, item in enumerate(group):
            frames[row, : len(item.frames)] = torch.from_numpy(item.frames.astype(np.float32))
        batch = Batch(frames, 0, counts, frames, [item.letters for item in group])
        loss = ctc(training.head, frames, batch)
        training.learn(loss, min(1.0, (step + 1) / WARM_UP) * 1.5)
        training.head_step = step + 1
        if training.head_step % 50 == 0:
            _note(log, {"head_step": training.head_step, "ctc": loss.item()})


def validate(training: Training, found: list[Item], noise: Noise) -> dict[str, float]:
    """Return distance and letter loss on the validation utterances, as served."""
    rng = np.random.default_rng(0)
    training.encoder.eval()
    training.head.eval()
    variance = float(np.mean([item.frames.astype(np.float32).var() for item in found]))
    far, spelt = [], []
    with torch.inference_mode():
        for item in found:
            batch = collate([item], SERVED, noise, rng)
            frames = training.encoder.stream(batch.audio, SERVED)
            far.append(float(distance(frames, batch, variance)))
            spelt.append(float(ctc(training.head, frames, batch)))
    training.encoder.train()
    training.head.train()
    return {"distance": float(np.mean(far)), "ctc": float(np.mean(spelt))}


def _note(log: IO[str], line: dict[str, float]) -> None:
    log.write(json.dumps({name: round(float(value), 4) for name, value in line.items()}) + "\n")
    log.flush()


def train(
    training: Training, found: list[Item], valid: list[Item], args: Any, log: IO[str]
) -> None:
    """Teach encoder and head together."""
    noise = Noise(args.data)
    rng = np.random.default_rng((args.seed, 2, training.step))
    variance = float(np.mean([item.frames.astype(np.float32).var() for item in found[::50]]))
    stream = batches(balanced(found), rng)
    teacher = Encoder(moonshine.encoder()).eval()
    began = time.time()
    means = np.full(2, np.nan)
    for step in track(range(training.step, args.steps), "encoder"):
        cut = random_cut(rng)
        group, speed = next(stream), SPEEDS[rng.integers(len(SPEEDS))]
        if speed != 1:
            group = hastened(group, speed, teacher)
        batch = collate(group, cut, noise, rng)
        with torch.no_grad():
            windows = training.encoder.windows(batch.audio, cut)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            frames = training.encoder.attend(windows, cut)
        frames = frames.float()
        far, spelt = distance(frames, batch, variance), ctc(training.head, frames, batch)
        norm = training.learn(far + args.ctc_weight * spelt, rate(step, args.steps))
        training.step = step + 1
        now = np.array([far.item(), spelt.item()])
        means = np.where(np.isnan(means), now, means + 0.05 * (now - means))
        line: dict[str, float] = {}
        if training.step % args.check == 0:
            training.save(args.out / "last.pt")
            line = {f"valid_{name}": v for name, v in validate(training, valid, noise).items()}
        if training.step % 20 == 0 or line:
            line |= {"step": training.step, "distance": means[0], "ctc": means[1], "norm": norm}
            line["s"] = time.time() - began
            _note(log, line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/speech"))
    parser.add_argument("--out", type=Path, default=Path("runs/distil"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--head-steps", type=int, default=500)
    parser.add_argument("--ctc-weight", type=float, default=CTC_WEIGHT)
    parser.add_argument("--check", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    found = items(args.data, args.out, "train")
    valid = items(args.data, args.out, "valid")
    training = Training(args.seed)
    last = args.out / "last.pt"
    if last.exists():
        training.load(last)
    with (args.out / "log.jsonl").open("a") as log:
        train_head(training, found, args.head_steps, args.seed, log)
        training.save(last)
        train(training, found, valid, args, log)
    training.save(last)


if __name__ == "__main__":
    main()
