"""Recordings to text: plain, JSON, or subtitles (SRT, WebVTT) with the words' own times.

Goes through a real server, as everything does: one that is running, or one in a child process.
"""

import html
import math
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console

from engine import keys
from engine.child import running
from engine.client import Client
from engine.dictation import Plan, Take, Unheard, dictate, length_s
from engine.errors import MurmurError
from engine.messages import Final, Gap, Message, Word
from engine.progress import Bar

# Subtitles: two lines of 42 letters, as broadcasters have it, and at most 6 s on the screen.
_LINE_LETTERS = 42
_CUE_LETTERS = 2 * _LINE_LETTERS
_CUE_S = 6.0
_PAUSE_S = 1.0  # between two words: a new subtitle
_SOME = 0.001  # part of the samples at full scale that is worth a word
_WIDE_HZ = 16_000  # below it consonants are missing


class Utterance(msgspec.Struct, frozen=True):
    """One final, its times in seconds from the recording's beginning."""

    text: str
    start_s: float
    end_s: float
    reason: str
    words: tuple[Word, ...]
    alternatives: tuple[str, ...]


class Transcript(msgspec.Struct, frozen=True):
    """What a recording says, and what there is to say about it."""

    path: str
    seconds: float
    rate_hz: float
    channels: int
    text: str
    utterances: tuple[Utterance, ...]
    notes: tuple[str, ...] = ()  # for a person
    faults: tuple[str, ...] = ()  # the text is not all of it, or there is none


class Cue(NamedTuple):
    """One subtitle."""

    start_s: float
    end_s: float
    text: str


class Outcome(NamedTuple):
    """What became of all recordings, in the order in which they were given."""

    transcripts: list[Transcript]
    wall_s: float

    @property
    def audio_s(self) -> float:
        return sum(one.seconds for one in self.transcripts)

    def report(self, plan: Plan) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        audio_s = self.audio_s
        return {
            "figure": self.wall_s / audio_s if audio_s else None,
            "what": "wall-clock time over the length of the sound",
            "model": plan.model,
            "streams": plan.streams,
            "audio_s": audio_s,
            "wall_s": self.wall_s,
            "files": [msgspec.to_builtins(one) for one in self.transcripts],
        }


class Printing(NamedTuple):
    """What is written where."""

    format: str = "txt"  # txt, srt, vtt
    out: Path | None = None  # file or folder; None: standard output
    text: bool = True  # False: no transcripts on standard output


def run(
    paths: Sequence[Path],
    plan: Plan,
    printing: Printing,
    console: Console,
    echo: Callable[[str], None],
    address: str | None = None,
    timeout_s: float = 10.0,
) -> Outcome:
    """Transcribe recordings through a server and write what they say.

    Parameters
    ----------
    paths : sequence of Path
    plan : Plan
    printing : Printing
    console : Console
        For progress, notes and faults: not standard output.
    echo : callable
        Writes text to standard output as it is.
    address : str, optional
        Of a running server; default: one is started for the purpose.
    timeout_s : float

    Raises
    ------
    MurmurError
        If nothing can be transcribed. A single recording's fault is in its transcript.
    """
    paths = list(dict.fromkeys(paths))
    bar = Bar(console, length_s(paths), "listening")
    writer = _Writer(paths, printing, bar, echo)
    with (
        running(plan.model, address) as (found, _),
        Client(found, timeout_s, keys.ours(address)) as client,
        bar,
    ):
        return transcribe(client, paths, plan, bar, writer.tell, writer.tell_final)


class _Writer:
    """Takes transcripts, and the finals of a lone one, to where they are to be written."""

    def __init__(
        self,
        paths: list[Path],
        printing: Printing,
        bar: Bar,
        echo: Callable[[str], None],
    ) -> None:
        self._printing, self._bar, self._echo = printing, bar, echo
        self._lone = lone = len(paths) == 1
        if not lone and printing.out is None and printing.format != "txt" and printing.text:
            raise MurmurError(f"--{printing.format} of several files needs --out FOLDER")
        out, suffix = printing.out, printing.format
        self._targets = {} if out is None else targets(paths, out, suffix)
        # Of one recording, the text is shown as it comes.
        self._as_it_comes = lone and out is None and suffix == "txt" and printing.text
        # On a terminal the bar is there as well: it must know of the lines above it.
        self._above_bar = bar.shown and sys.stdout.isatty()

    def tell_final(self, final: Final) -> None:
        if self._as_it_comes and final.text:
            self._line(final.text)

    def tell(self, one: Transcript) -> None:
        for line in (*one.notes, *one.faults):
            self._bar.say(f"murmur: {line}")
        path = Path(one.path)
        text = FORMATS[self._printing.format](one)
        if self._targets:
            self._targets[path].parent.mkdir(parents=True, exist_ok=True)
            self._targets[path].write_text(text, encoding="utf-8")
        elif self._printing.text and not self._as_it_comes:
            heading = f"==> {path} <==\n" if not self._lone else ""
            self._line(heading + text.rstrip("\n"))

    def _line(self, text: str) -> None:
        if self._above_bar:
            self._bar.say(text)
        else:
            self._echo(f"{text}\n")


def transcribe(
    client: Client,
    paths: Sequence[Path],
    plan: Plan,
    bar: Bar,
    tell: Callable[[Transcript], None],
    tell_final: Callable[[Final], None] = lambda _: None,
) -> Outcome:
    """Send recordings to a server and return what they say.

    Parameters
    ----------
    client : Client
    paths : sequence of Path
    plan : Plan
    bar : Bar
    tell : callable
        Takes each transcript as soon as it and those of all paths before it are there.
    tell_final : callable
        Takes each final as it comes, of whichever recording.

    Raises
    ------
    Refused, Disconnected
        If the server takes none at all, or does not answer.
    """
    made: dict[Path, Transcript] = {}
    next_up = deque(paths)

    def hear(_: Take, message: Message) -> None:
        if isinstance(message, Final):
            tell_final(message)

    begin = time.monotonic()
    for heard in dictate(client, paths, plan, bar.move, hear):
        made[heard.path] = transcript(heard)
        bar.over(made[heard.path].seconds)
        while next_up and next_up[0] in made:
            tell(made[next_up.popleft()])
    return Outcome([made[path] for path in paths], time.monotonic() - begin)


def transcript(heard: Take | Unheard) -> Transcript:
    """Put together what came of one recording."""
    if isinstance(heard, Unheard):
        return Transcript(str(heard.path), 0.0, 0.0, 0, "", (), (), (heard.reason,))
    return Transcript(
        str(heard.path),
        heard.seconds,
        heard.rate_hz,
        heard.channels,
        heard.text,
        tuple(utterance(final, heard.rate_hz) for final in heard.finals),
        tuple(_notes(heard)),
        tuple(heard.faults),
    )


def utterance(final: Final, rate_hz: float) -> Utterance:
    """Give a final's times in seconds."""
    return Utterance(
        final.text,
        final.start / rate_hz,
        final.end / rate_hz,
        final.reason,
        final.words,
        final.alternatives,
    )


def _notes(take: Take) -> Iterator[str]:
    if take.channels > 1:
        yield f"{take.path}: {take.channels} channels, mixed down to one"
    if take.rate_hz < _WIDE_HZ:
        yield (
            f"{take.path}: {take.rate_hz:g} Hz, so nothing above {take.rate_hz / 2:g} Hz is in it: "
            "expect more errors"
        )
    if take.clipped > _SOME * take.sound_samples:
        part = take.clipped / take.sound_samples
        yield f"{take.path}: {part:.1%} of the samples are clipped: expect more errors"
    for _, message in take.told:
        if isinstance(message, Gap):
            lost = message.end - message.start
            yield f"{take.path}: {lost} samples from {message.start} were lost on the way"
    if not take.text and not take.faults:
        yield f"{take.path}: no speech was found in it"


# --- what is written -------------------------------------------------------------------------


def as_text(one: Transcript) -> str:
    """Return one line for each utterance."""
    return "".join(f"{utterance.text}\n" for utterance in one.utterances if utterance.text)


def as_srt(one: Transcript) -> str:
    """Return SubRip subtitles."""
    blocks = [
        f"{number}\n{_clock(cue.start_s, ',')} --> {_clock(cue.end_s, ',')}\n{_wrapped(cue.text)}\n"
        for number, cue in enumerate(cues(one.utterances), 1)
    ]
    return "\n".join(blocks)


def as_vtt(one: Transcript) -> str:
    """Return WebVTT subtitles."""
    blocks = ["WEBVTT\n"]
    for cue in cues(one.utterances):
        text = html.escape(_wrapped(cue.text), quote=False)
        blocks.append(f"{_clock(cue.start_s, '.')} --> {_clock(cue.end_s, '.')}\n{text}\n")
    return "\n".join(blocks)


FORMATS: dict[str, Callable[[Transcript], str]] = {"txt": as_text, "srt": as_srt, "vtt": as_vtt}


def cues(utterances: Iterable[Utterance]) -> list[Cue]:
    """Cut utterances into subtitles: at a pause, after a sentence, or where one is full."""
    made: list[Cue] = []
    for one in utterances:
        if one.words:
            made += [_cue(part) for part in _parts(one.words)]
        elif one.text:
            made.append(Cue(one.start_s, one.end_s, one.text))
    # Two are never on the screen at once.
    return [
        cue._replace(end_s=min(cue.end_s, after.start_s))
        for cue, after in zip_longest(made, made[1:], fillvalue=Cue(math.inf, 0.0, ""))
    ]


def _parts(words: Sequence[Word]) -> Iterator[list[Word]]:
    part: list[Word] = []
    for word in words:
        if part and _breaks(part, word):
            yield part
            part = []
        part.append(word)
    if part:
        yield part


def _breaks(part: Sequence[Word], word: Word) -> bool:
    letters = len(" ".join(one.text for one in part))
    return (
        letters + 1 + len(word.text) > _CUE_LETTERS
        or word.end_s - part[0].start_s > _CUE_S
        or word.start_s - part[-1].end_s > _PAUSE_S
        or (letters > _LINE_LETTERS and part[-1].text.endswith((".", "?", "!")))
    )


def _cue(words: Sequence[Word]) -> Cue:
    return Cue(words[0].start_s, words[-1].end_s, " ".join(word.text for word in words))


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _LINE_LETTERS))


def _clock(seconds: float, point: str) -> str:
    whole = round(seconds * 1000)
    minutes, milliseconds = divmod(whole, 60_000)
    return (
        f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}"
        f"{point}{milliseconds % 1000:03}"
    )


def targets(paths: Sequence[Path], out: Path, suffix: str) -> dict[Path, Path]:
    """Say where each transcript is written: a file, or for several files a folder.

    Raises
    ------
    MurmurError
        If two would be written to one file.
    """
    if len(paths) == 1 and not out.is_dir():
        return {paths[0]: out}
    found = {path: out / f"{path.stem}.{suffix}" for path in paths}
    if len(set(found.values())) < len(found):
        raise MurmurError(f"--out {out}: several of the files have the same name but for a suffix")
    if out.is_file():
        raise MurmurError(f"--out {out}: expected a folder for {len(paths)} files, found a file")
    return found
