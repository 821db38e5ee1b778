"""Every message that crosses a socket: this file is the specification of the wire.

A ZeroMQ message body is one MessagePack array of messages, each a map with the key ``type``.
Messages gain fields with defaults only, and a reader skips keys it does not know, so that an
older peer stays welcome; anything else raises :data:`VERSION`. ``docs/protocol.md`` tells the
same with an example of a conversation.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

VERSION = 1
NOTICE = "Research and education software, not a medical device."

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}\Z")]
Text = Annotated[str, Meta(max_length=256)]
Index = Annotated[int, Meta(ge=0, le=2**62)]
Gapped = Literal["hold", "reset"]
Dtype = Literal["f4", "i2"]  # float32 or int16, both little-endian
Priority = Literal["low", "medium", "high"]
AlertKind = Literal["physiological", "technical"]
AlertState = Literal[
    "inactive",
    "pending",
    "active",
    "acknowledged",
    "resolving",
    "latched",
    "resolved",
    "paused",
    "off",
]
RuleName = Annotated[str, Meta(pattern=r"^(|[A-Za-z0-9][A-Za-z0-9_.:-]{0,63})\Z")]  # empty: all
Actor = Annotated[str, Meta(min_length=1, max_length=64)]  # who asks for it
Clock = Literal["device", "host", "ptp"]
Seconds = Annotated[float, Meta(ge=-1e12, le=1e12)]
Mask = Annotated[int, Meta(ge=0, le=2**62)]  # bit k: channel k
Seen = Annotated[dict[str, Index], Meta(max_length=32)]  # highest number, by type of result


class Message(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower):
    """A map with the key ``type``, which is the class's name in lower case."""


# --- from a client ---------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First message of a connection."""

    version: int
    client: Text = ""


class Hotword(msgspec.Struct, frozen=True):
    """A word or phrase that a stream expects, and by how much it is preferred."""

    phrase: Text
    boost: Annotated[float, Meta(ge=-20.0, le=20.0)] = 2.0  # natural log, for each of its letters


class Speech(msgspec.Struct, frozen=True):
    """What a stream of speech may ask for. An endpoint is where a partial becomes final."""

    silence_s: Annotated[float, Meta(ge=0.1, le=60)] = 0.8  # after words: an endpoint
    empty_silence_s: Annotated[float, Meta(ge=0.1, le=3600)] = 2.4  # after none: begin anew
    max_utterance_s: Annotated[float, Meta(ge=1, le=30)] = 20.0  # an endpoint in any case
    hotwords: Annotated[tuple[Hotword, ...], Meta(max_length=256)] = ()
    alternatives: Annotated[int, Meta(ge=1, le=16)] = 1  # texts of a final, the best included
    partials: bool = True


class Device(msgspec.Struct, frozen=True):
    """What measures a stream."""

    make: Text = ""
    model: Text = ""
    serial: Text = ""


class Channel(msgspec.Struct, frozen=True):
    """One channel; what is None here is as the open says for all."""

    name: Text = ""  # such as II or V5
    kind: Text = ""  # such as ecg
    unit: Text | None = None
    gain: float | None = None
    offset: float | None = None
    lo: float | None = None  # least and greatest value that the device can tell, in `unit`
    hi: float | None = None


class Open(Message, frozen=True):
    """Start a stream. ``gain`` and ``offset`` turn what is sent into ``unit``."""

    stream: Name
    model: Text
    rate_hz: Annotated[float, Meta(ge=1e-6, le=1e6)]
    unit: Text
    channels: Annotated[int, Meta(ge=1, le=64)] = 1
    dtype: Dtype = "f4"
    gain: float = 1.0
    offset: float = 0.0
    index: Index = 0  # of the first sample to come
    latency_ms: Annotated[float, Meta(ge=0.01, le=60_000)] | None = None  # None: the model's own
    speech: Speech | None = None  # None: its defaults; of no use to other pipelines
    subject: Name | None = None  # pseudonym of whom the signal is of; None: the stream's name
    device: Device | None = None
    channel_info: Annotated[tuple[Channel, ...], Meta(max_length=64)] = ()  # empty, or of each
    clock: Clock | None = None  # which one the chunks' times were read from; None: do not look
    # Drawn at random by the client for each new stream: who knows it may go on with the stream on
    # another connection, of a restarted server as well. 0: the stream ends with its connection.
    life: Index = 0
    resume: bool = False  # go on with that life; the rest is as at its beginning
    seen: Seen = {}  # of its results; those behind are told again


class Flags(msgspec.Struct, frozen=True):
    """What the device says of the samples of a chunk."""

    lead_off: Mask = 0
    saturated: Mask = 0
    paced: bool = False  # a pacemaker's stimulus lies in the chunk


class Chunk(Message, frozen=True):
    """Samples of a stream, interleaved if there are several channels."""

    stream: Name
    seq: Index  # counts the stream's chunks from 0
    index: Index  # of the first sample, in samples per channel
    data: bytes
    t_device: Seconds | None = None  # of the first sample, by the clock that the open names
    t_published: Seconds | None = None  # when the last sample was there and the chunk sent
    flags: Flags | None = None


class Flush(Message, frozen=True):
    """Force the tail out: the stream goes on afterwards with new state."""

    stream: Name
    id: Index = 0


class Close(Message, frozen=True):
    """End a stream. What was sent before is finished first; a flush is not implied."""

    stream: Name


class Ping(Message, frozen=True):
    """Ask for a pong; keeps the connection's streams from timing out."""

    id: Index = 0


class Vital(Message, frozen=True):
    """One value of a slow sign of life, measured now and then."""

    subject: Name
    parameter: Text  # one of engine.heart.news2.PARAMETERS, or SPO2_SCALE
    value: float
    unit: Text  # UCUM
    seconds: Annotated[float, Meta(ge=0, le=1e12)]  # of the subject: as its streams count them


class Acknowledge(Message, frozen=True):
    """Say that an alert has been seen. Answered, as all four, with what is active then."""

    subject: Name
    rule: RuleName  # empty: all of the subject
    by: Actor
    id: Index = 0


class PauseAlerts(Message, frozen=True):
    """Tell nothing of an alert for a time; with ``off``, forget it and do not look either."""

    subject: Name
    rule: RuleName  # empty: all
    seconds: Annotated[float, Meta(gt=0, le=86_400)]  # of the stream; never for good
    by: Actor
    off: bool = False
    id: Index = 0


class ResumeAlerts(Message, frozen=True):
    """End a pause, or an off, before its time."""

    subject: Name
    rule: RuleName  # empty: all
    by: Actor
    id: Index = 0


class ListAlerts(Message, frozen=True):
    """Ask what is active, of all subjects or of one."""

    subject: RuleName = ""  # empty: all
    id: Index = 0


class Again(Message, frozen=True):
    """Ask for the latest results of a stream behind those that were seen; for subscribers."""

    stream: Name
    life: Index
    seen: Seen
    id: Index = 0


class Adopt(Message, frozen=True):
    """From a server that gives its streams away: go on with these."""

    name: Name  # of whose signals they are
    state: bytes  # a part of what engine/checkpoint.py writes
    more: bool = False  # parts follow
    id: Index = 0


class Drain(Message, frozen=True):
    """Give all streams to another server, and stop."""

    to: Text  # address at which it takes clients
    publish: Text  # and subscribers
    key: Text = ""  # its public key, if it has one
    id: Index = 0


# --- from the server -------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """Answer to hello."""

    version: int
    server: str
    models: list[str]
    max_message_bytes: int
    max_messages: int  # in one body
    max_chunk_bytes: int
    idle_timeout_s: float
    notice: str = NOTICE


class Opened(Message, frozen=True):
    """Answer to open."""

    stream: str
    model: str
    sha256: str  # of the model file
    credit: int  # samples that may be in flight beyond the last ack's index
    look_ahead_s: float  # how far behind the signal a result lies, beside the hop
    hop_s: float
    resumed: bool = False  # the life goes on
    seq: int = 0  # of the next chunk that is wanted
    durable: bool = False  # acks wait until what they name is on the disk


class Ack(Message, frozen=True):
    """All effects of the chunks up to ``seq`` are out; ``index`` is the next sample's.

    Of a durable stream they are on the disk as well: no crash makes them be asked for again.
    """

    stream: str
    seq: int
    index: int


class Flushed(Message, frozen=True):
    """All that was sent before the flush of that id is through, its tail included."""

    stream: str
    id: int
    index: int


class Closed(Message, frozen=True):
    """The stream is over; ``reason`` is ``closed``, or a code from the table of errors."""

    stream: str
    reason: str
    chunks: int
    samples: int
    duplicates: int
    gaps: int
    lost_samples: int
    bridged_samples: int = 0
    reordered: int = 0  # chunks that waited for an earlier one
    late: int = 0  # chunks that came after they were given up


class AlertList(Message, frozen=True):
    """Answer to the request of that id about alerts: those of the subjects it was about."""

    id: int
    subjects: tuple["ActiveAlerts", ...]


class Recalled(Message, frozen=True):
    """Answer to again: what is kept has been told, of which these are the latest numbers."""

    stream: str
    life: int
    numbers: dict[str, int]
    id: int = 0


class Adopted(Message, frozen=True):
    """Answer to adopt: the streams go on here."""

    id: int


class Moved(Message, frozen=True):
    """All streams of this connection go on at another address; open them there again."""

    to: str
    publish: str
    key: str = ""  # public key of that server, if it has one


class Pong(Message, frozen=True):
    """Answer to ping."""

    id: int


class Error(Message, frozen=True):
    """A message was not accepted. An empty stream concerns the connection."""

    code: str
    reason: str
    stream: str = ""
    seq: int | None = None


# --- results: to the client, and published under the topic "type/stream" ----------------------


class Numbered(Message, frozen=True, kw_only=True):
    """A result that is told exactly once: who has seen its number has seen it.

    Each topic counts for itself, from 1, without holes. After a crash, or where a connection was
    lost, results may come again; they are the same to the last bit, and so are their numbers.
    """

    life: int = 0  # of the stream; 0: it has none, and nothing is numbered
    number: int = 0


class Gap(Numbered, frozen=True):
    """Samples ``start`` to ``end`` (exclusive) took no part in any result."""

    stream: str
    start: int
    end: int
    state: Gapped  # what became of the model's state


class Bridged(Numbered, frozen=True):
    """Samples ``start`` to ``end`` (exclusive) never came, and were interpolated."""

    stream: str
    start: int
    end: int


class Beat(Numbered, frozen=True):
    """One heart beat. ``decided_at``: the samples before this index sufficed to decide."""

    stream: str
    index: int
    seconds: float
    label: str  # AAMI class: N, S, V, F or Q
    probability: float
    decided_at: int
    heart_rate_bpm: float | None  # None until two intervals are known


class Measures(Numbered, frozen=True):
    """What is known of the signal at a sample, each value under its name with its unit.

    A measure that is not known is absent: it is neither zero nor what it was before.
    """

    stream: str
    index: int  # of the sample that the values are about
    seconds: float
    decided_at: int
    values: dict[str, float]


class Alert(Numbered, frozen=True):
    """A transition: the alert of a rule and a subject went from one state to another.

    It was raised where ``state`` is active and ``from_state`` none of active, acknowledged and
    resolving; then ``onset`` is of a new episode.
    """

    stream: str  # whose measures did it
    rule: str
    state: AlertState
    priority: Priority
    value: float
    limit: float
    index: int
    seconds: float
    decided_at: int
    notice: str = NOTICE
    subject: str = ""
    from_state: AlertState = "inactive"
    kind: AlertKind = "physiological"
    onset: int = 0  # index at which the condition was first seen to hold
    actor: str = ""  # who asked for it; empty: the signal or the time did it
    reason: str = ""  # why, where it was neither the condition nor its end
    cannot_monitor: tuple[str, ...] = ()  # rules that this alert keeps from being monitored
    transitions: int = 1  # how many this one stands for: more, where too many came in a minute
    model: str = ""
    sha256: str = ""  # of the model file
    quality: float | None = None  # of the signal: 2 good, 1 poor, 0 bad


class Active(msgspec.Struct, frozen=True):
    """One alert that is not inactive."""

    rule: str
    state: AlertState
    priority: Priority
    kind: AlertKind
    stream: str
    value: float
    limit: float
    onset: int
    onset_s: float
    acknowledged_by: str = ""
    until_s: float | None = None  # seconds that a pause or an off still lasts


class ActiveAlerts(Message, frozen=True):
    """All alerts of a subject that are not inactive, the most urgent first.

    Published again every few seconds, so that who comes late learns it; none: all is over.
    """

    subject: str
    seconds: float  # of the subject's streams
    alerts: tuple[Active, ...]
    cannot_monitor: tuple[str, ...] = ()  # rules
    notice: str = NOTICE


class Scores(Numbered, frozen=True):
    """One step's output of a model, as it is: float32, little-endian, in C order."""

    stream: str
    output: str
    index: int  # of the sample after the step's last
    shape: tuple[int, ...]
    data: bytes


class Samples(Numbered, frozen=True):
    """Signal that a model made, float32, little-endian, at the model's rate."""

    stream: str
    index: int  # of the model's first sample here
    rate_hz: float
    data: bytes


class Word(msgspec.Struct, frozen=True):
    """One word of a text, and when it was said, in seconds of the stream from index 0."""

    text: str
    start_s: float
    end_s: float
    confidence: float  # 0 to 1


class Partial(Message, frozen=True):
    """What an utterance seems to say so far; the next partial, or its final, replaces it."""

    stream: str
    utterance: int  # counts the stream's utterances from 0
    text: str
    index: int  # the samples before this one have been read
    stable_words: int  # so many words at the beginning are not expected to change


class Final(Numbered, frozen=True):
    """What an utterance says; it does not change any more."""

    stream: str
    utterance: int
    text: str
    start: int  # index of the first sample in which speech was heard
    end: int  # index after the last
    endpoint: int  # the samples before this index sufficed to know that it was over
    reason: Literal["silence", "length", "flush", "gap"]
    words: tuple[Word, ...]
    alternatives: tuple[str, ...] = ()  # the best first, if more than one was asked for


AlertRequest = Acknowledge | PauseAlerts | ResumeAlerts | ListAlerts
Handover = Adopt | Drain
Request = Hello | Open | Chunk | Flush | Close | Ping | Vital | AlertRequest | Again | Handover
Result = Beat | Measures | Alert | ActiveAlerts | Scores | Samples | Partial | Final | Gap | Bridged
Answer = Welcome | Opened | Ack | Flushed | Closed | AlertList | Pong | Error | Recalled
Reply = Answer | Adopted | Moved | Result

encode = msgspec.msgpack.Encoder().encode
decode_requests = msgspec.msgpack.Decoder(list[Request]).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
decode_replies = msgspec.msgpack.Decoder(list[Reply]).decode


def body(messages: list[bytes]) -> bytes:
    """Join encoded messages to one body: the head of a MessagePack array, then its elements."""
    count = len(messages)
    if count < 16:
        head = bytes([0x90 | count])
    elif count < 2**16:
        head = b"\xdc" + count.to_bytes(2, "big")
    else:
        head = b"\xdd" + count.to_bytes(4, "big")
    return head + b"".join(messages)
