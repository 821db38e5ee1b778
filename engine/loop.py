"""The engine without its sockets: messages in, one batch a turn, messages out.

One thread owns everything. :class:`Engine` takes message bodies with :meth:`~Engine.receive`,
advances streams with :meth:`~Engine.turn`, and leaves what is to be sent in two lists. The clock
is an argument, so the same engine runs under a test's clock.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np

from engine import checkpoint, lives, messages, pseudonyms, rules
from engine.alerts import Alerts, Moment
from engine.audit import Audit
from engine.checkpoint import Store
from engine.config import Checkpoints, Limits, Subjects
from engine.errors import CheckpointError, ConfigError, Refused, fault
from engine.heart import news2
from engine.heart.wing import HeartWing, Naming
from engine.lane import Lane, Told
from engine.lives import Group, Keeper, Life, Over, Owed, Taken
from engine.messages import Message, Numbered
from engine.metrics import Metrics
from engine.model_file import Model
from engine.peer import Peer
from engine.recorder import RECORDED, Recorder, Signal
from engine.rights import ANYONE, MOVED, Account
from engine.runtime import CpuRuntime, Runtime
from engine.scheduler import Batch, Scheduler, Terms
from engine.session import Session, closed_of
from engine.speech.wing import SpeechWing
from engine.wing import AudioWing, ScoresWing, Wing

log = logging.getLogger(__name__)

SERVER = "murmur 0.1"
Waker = Callable[[], None]


def _heart(model: Model, rows: int, _: Waker) -> HeartWing:
    naming = None
    if model.beats is not None:
        naming = Naming(model.beats.spec, CpuRuntime(model.beats, rows))
    return HeartWing(model.spec, rows, naming)


# From a model, its rows, and what to call from another thread when there are results to collect.
WINGS: dict[str, Callable[[Model, int, Waker], Wing]] = {
    "heart": _heart,
    "speech": SpeechWing,
    "scores": lambda model, rows, _: ScoresWing(model.spec, rows),
    "audio": lambda model, rows, _: AudioWing(model.spec, rows),
}
# Codes after which a stream cannot go on: its signal is not what was announced.
_FATAL = frozenset({"bad_length", "not_finite"})
# Every wake costs as much as some ten chunks: by then the caches hold the model's weights, not
# the interpreter. So where many chunks come, they are left in their socket until a batch should be
# full or its time has come (docs/decisions.md); who opens a stream or pings waits so long as well.
_MANY = 8
_LONGEST_PAUSE_S = 0.1
# Of what a peer asks for is done so long before it is another's turn: many that ask for what is
# dear keep nobody waiting for longer than this times their number.
_TURN_S = 0.002
_ANY_SUBJECT = Subjects()
_PUBLISHED = (
    messages.Beat,
    messages.Measures,
    messages.Alert,
    messages.Scores,
    messages.Samples,
    messages.Partial,
    messages.Final,
    messages.Gap,
    messages.Bridged,
)


# What comes of a checkpoint that is whole, but not of this version's making.
_UNREADABLE = (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError)
# Of a durable stream they wait for the checkpoint that makes them true.
_WAITING = (messages.Ack, messages.Flushed, messages.Closed)
_MOST_ADOPTED_BYTES = 64 * 2**20  # of one subject's streams
_NOBODY = b""  # the peer of a stream whose connection was lost
_WATCHED = (messages.Measures, messages.Scores, messages.Gap)
# Pipelines of which nobody is the subject, unless a rule looks at an output of the model.
_UNWATCHED = frozenset({"speech", "audio", "scores"})
# Ends of a stream that do not say that something is wrong with it.
_CALM_ENDS = ("reopened", "draining")
_ANY_CHECKPOINTS = Checkpoints()


class Pause(NamedTuple):
    """Until when there is nothing to do; ``deaf``: not even if something arrives."""

    until: float
    deaf: bool


class Stream(NamedTuple):
    """Where a stream lives."""

    session: Session
    lane: str
    slot: int
    peer: bytes
    budget_s: float
    subject: str  # empty: its alerts are not looked for
    life: Life | None  # None: it ends with its connection

    @property
    def group(self) -> str:
        """Whose streams are written down together with it."""
        return self.session.opened.subject or self.session.name


class Engine:
    """All models, streams and peers.

    Parameters
    ----------
    served : iterable of (Model, Runtime)
    limits : Limits
    metrics : Metrics
    clock : callable
        Seconds of a monotonic clock, for the time that steps take.
    wake : callable
        Called from another thread when the engine should have a turn.
    alerts : Alerts, optional
        None: of the rules that come along.
    audit : Audit, optional
        Where every transition of an alert is written; alerts go on from what it holds.
    summary_s : float
        After so long what is active is published again.
    subjects : Subjects
    recorder : Recorder, optional
        Takes the signal and the results of heart streams.
    store : Store, optional
        Where streams with a life are written down; call :meth:`restore` before the first turn.
    checkpoints : Checkpoints

    Attributes
    ----------
    handover : (bytes, Drain) or None
        Who asked that all streams be given away, and to whom: it is up to the caller.
    published : list of (topic, body)
        To be sent to subscribers, and then cleared, by the caller.
    turned_away : list of (peer, body)
        To be sent to peers beyond the limit, and then cleared, by the caller.
    """

    def __init__(
        self,
        served: Iterable[tuple[Model, Runtime]],
        limits: Limits,
        metrics: Metrics,
        clock: Callable[[], float] = time.perf_counter,
        wake: Waker = lambda: None,
        subjects: Subjects = _ANY_SUBJECT,
        alerts: Alerts | None = None,
        audit: Audit | None = None,
        summary_s: float = 5.0,
        recorder: Recorder | None = None,
        store: Store | None = None,
        checkpoints: Checkpoints = _ANY_CHECKPOINTS,
    ) -> None:
        self.limits, self.metrics, self._clock = limits, metrics, clock
        self._subjects, self._recorder = subjects, recorder
        self.published: list[tuple[bytes, bytes]] = []
        self.turned_away: list[tuple[bytes, bytes]] = []
        self.peers: dict[bytes, Peer] = {}
        self._behind: dict[bytes, None] = {}  # peers with work left, whose turn is next first
        self.draining = False
        self._models: dict[str, Model] = {}
        self._lanes: dict[str, Lane] = {}
        terms: dict[str, Terms] = {}
        for model, runtime in served:
            spec = model.spec
            rows = runtime.num_slots
            wing = WINGS[spec.pipeline](model, rows, wake)
            self._models[spec.name] = model
            self._lanes[spec.name] = Lane(spec, runtime, wing, rows, limits.credit_s)
            metrics.runs |= {spec.name: runtime.runs, **wing.runs}
            terms[spec.name] = Terms(
                rows,
                runtime.max_rows,
                spec.hop_samples / spec.input.rate_hz,
                spec.priority,
                runtime.step_seconds,
            )
        self._scheduler = Scheduler(terms)
        self._store, self._checkpoints = store, checkpoints
        self._keeper = Keeper(store, checkpoints.every_s)
        self._over: dict[str, Over] = {}  # streams that ended a short time ago
        self._now = 0.0  # of the last message, turn or tick
        self._saved = False  # all that is durable is on its way to the disk, at the end
        self.handover: tuple[bytes, messages.Drain] | None = None
        self._unheard: set[bytes] = set()  # peers of whom chunks were not taken meanwhile
        self._lossy = False  # the disk takes nothing, and nothing waits for it
        self._streams: dict[str, Stream] = {}
        self._last_chunk: dict[str, float] = {}
        self._budgets: Counter[float] = Counter()  # latency budgets of the open streams
        self._tightest_s = math.inf
        self._load = 0.0  # part of the capacity that open streams need
        self._vitals: dict[str, news2.Vitals] = {}  # by subject
        self._last_vital: dict[str, float] = {}
        self._alerts = alerts or Alerts(rules.load())
        self._audit, self._summary_s = audit, summary_s
        self._next_summary = -math.inf
        self._summarised: set[str] = set()  # subjects of whom the last summary told alerts
        if audit is not None and store is None:
            self._restore(audit)

    # --- in --------------------------------------------------------------------------------

    def receive(self, peer_id: bytes, body: bytes, now: float, account: Account = ANYONE) -> bool:
        """Take one message body. Whatever is wrong with it is answered, and harms no one else.

        Parameters
        ----------
        peer_id : bytes
            Routing id of the connection.
        body : bytes
        now : float
        account : Account
            Of the key that the connection has shown.

        Returns
        -------
        bool
            False: the connection has no place here, and is better ended once it has been told.
        """
        self._now = now
        peer = self.peers.get(peer_id)
        if peer is not None and peer.account is not account:
            self.drop(peer_id, "other_key")  # who had this routing id before is gone
            peer = None
        if peer is None:
            try:
                self._admit_peer(peer_id, account)
            except Refused as refused:
                self._turn_away(peer_id, refused)
                return False
            peer = self.peers[peer_id] = account.peers[peer_id] = Peer(now, account)
            self.metrics.peers = len(self.peers)
        peer.seen = now
        if not account.spend(len(body), now):
            self._complain(peer, account, now)
            return True
        peer.queue(body, now)
        if peer_id not in self._behind:
            self._serve(peer_id, peer)
        elif peer.waiting > self.limits.max_queued_bytes:
            most = f"limits.max_queued_bytes is {self.limits.max_queued_bytes}"
            self._turn_away(peer_id, Refused("over_queue", f"{most}: more waits to be done"))
            self.drop(peer_id, "over_queue")
            return False
        return True

    def catch_up(self, seconds: float) -> bool:
        """Do what waits of peers that have had their turn, in turns, for so long at the most.

        Returns
        -------
        bool
            Whether nothing is left.
        """
        until = self._clock() + seconds
        while self._behind and self._clock() < until:
            peer_id = next(iter(self._behind))
            self._serve(peer_id, self.peers[peer_id])
        return not self._behind

    def _admit_peer(self, peer_id: bytes, account: Account) -> None:
        if len(self.peers) >= self.limits.max_peers:
            raise Refused("too_many_peers", f"limits.max_peers is {self.limits.max_peers}")
        account.admit(peer_id)

    def _complain(self, peer: Peer, account: Account, now: float) -> None:
        """Count a body that was one too many, and tell of it now and then."""
        self.metrics.refused["over_rate"] += 1
        complaint = account.complaint(now)
        if complaint is not None:
            self._tell(peer, messages.Error(complaint.code, complaint.reason))

    def _serve(self, peer_id: bytes, peer: Peer) -> None:
        """Do what a peer asks for, message by message, until it is done or the turn is over."""
        self._behind.pop(peer_id, None)
        over = self._clock() + _TURN_S
        while True:
            for request in peer.requests:
                self._attempt(peer_id, peer, request)
                if self._clock() > over:
                    self._behind[peer_id] = None
                    return
            body = peer.next_body()
            if body is None:
                return
            try:
                peer.requests = iter(self._decode(body))
            except Refused as refused:
                self._refuse(peer, refused)

    def _attempt(self, peer_id: bytes, peer: Peer, request: messages.Request) -> None:
        try:
            self._handle(peer_id, peer, request, peer.arrived)
        except Refused as refused:
            self._refuse(peer, refused, request)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this peer's
            self._fail_request(peer_id, peer, request, error)

    def _fail_request(
        self, peer_id: bytes, peer: Peer, request: messages.Request, error: Exception
    ) -> None:
        """Answer a message that the server failed on, and end the stream that it was of."""
        reason = fault(type(request).__name__.lower(), error)
        stream = self._streams.get(getattr(request, "stream", ""))
        if stream is not None and stream.peer == peer_id:
            self._fail(stream, "server_error", reason)
        else:
            self._refuse(peer, Refused("server_error", reason), request)

    def _turn_away(self, peer_id: bytes, refused: Refused) -> None:
        self.metrics.refused[refused.code] += 1
        error = messages.Error(refused.code, refused.reason)
        self.turned_away.append((peer_id, messages.body([messages.encode(error)])))

    def _decode(self, body: bytes) -> list[messages.Request]:
        if len(body) > self.limits.max_message_bytes:
            raise Refused(
                "oversize",
                f"message: expected at most {self.limits.max_message_bytes} bytes, "
                f"found {len(body)}",
            )
        try:
            requests = messages.decode_requests(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Refused("malformed", f"expected an array of messages: {error}") from None
        if len(requests) > self.limits.max_messages:
            raise Refused(
                "oversize",
                f"message: expected an array of at most {self.limits.max_messages}, "
                f"found {len(requests)}",
            )
        return requests

    def _handle(self, peer_id: bytes, peer: Peer, request: messages.Request, now: float) -> None:
        if isinstance(request, messages.Hello):
            self._hello(peer, request)
        elif not peer.greeted:
            raise Refused("not_greeted", "expected hello first")
        elif isinstance(request, messages.Chunk):
            self._chunk(peer_id, request, now)
        elif isinstance(request, messages.Ping):
            self._tell(peer, messages.Pong(request.id))
        else:
            peer.account.permit(request)
            self._do(peer_id, peer, request, now)

    def _do(self, peer_id: bytes, peer: Peer, request: messages.Request, now: float) -> None:
        """Do what a peer has the right to ask for."""
        if isinstance(request, messages.Vital):
            self._vital(peer, request, now)
        elif isinstance(request, messages.AlertRequest):
            self._ask_alerts(peer, request)
        elif isinstance(request, messages.Open):
            self._open(peer_id, peer, request, now)
        elif isinstance(request, messages.Again):
            self._again(peer, request)
        elif isinstance(request, messages.Adopt):
            self._adopt(peer_id, peer, request, now)
        elif isinstance(request, messages.Drain):
            if self.draining:
                raise Refused("draining", "the server is about to stop")
            self.draining, self.handover = True, (peer_id, request)
        elif isinstance(request, messages.Flush):
            self._flush(peer_id, request, now)
        elif isinstance(request, messages.Close):
            stream = self._own(peer_id, request.stream)
            stream.session.close()
            self._feed(stream, now)

    def _hello(self, peer: Peer, hello: messages.Hello) -> None:
        if hello.version != messages.VERSION:
            raise Refused(
                "bad_version",
                f"version: this server speaks {messages.VERSION}, found {hello.version}",
            )
        peer.greeted = True
        welcome = messages.Welcome(
            messages.VERSION,
            SERVER,
            sorted(self._models),
            self.limits.max_message_bytes,
            self.limits.max_messages,
            self.limits.max_chunk_bytes,
            self.limits.idle_timeout_s,
        )
        self._tell(peer, welcome)

    def _open(self, peer_id: bytes, peer: Peer, request: messages.Open, now: float) -> None:
        if self.draining:
            raise Refused("draining", "the server is about to stop")
        if request.resume:
            self._resume(peer_id, peer, request, now)
            return
        known = self._streams.get(request.stream)
        if known is not None and known.peer not in (peer_id, _NOBODY):
            raise Refused("stream_taken", f"stream {request.stream!r} is another connection's")
        if known is not None:
            self._end(known, "reopened")  # the connection was lost without our noticing
        if len(peer.streams) >= self.limits.max_streams_per_peer:
            raise Refused(
                "full", f"limits.max_streams_per_peer is {self.limits.max_streams_per_peer}"
            )
        if request.model not in self._models:
            raise Refused(
                "unknown_model",
                f"model: expected one of {sorted(self._models)}, found {request.model!r}",
            )
        self._check_subject(request.subject)
        lane = self._lanes[request.model]
        self._admit(lane)
        self._over.pop(request.stream, None)
        session = self._session(request)
        life = Life(request.life) if request.life else None
        stream = self._enter(session, lane.open(session), peer_id, life, now)
        if stream.subject:
            at = Moment(request.index, request.index / request.rate_hz, request.index)
            self._alerts.opened(stream.subject, request.stream, at)
        peer.streams.add(request.stream)
        log.info("stream %s opened: %s at %g Hz", session.name, request.model, request.rate_hz)
        self._tell(peer, self._opened(stream, resumed=False))

    def _session(self, request: messages.Open) -> Session:
        """Return the session that an open asks for."""
        lane = self._lanes[request.model]
        credit_s = lane.credit_s
        if request.life and self._store is not None:  # acks come with the checkpoints
            credit_s += self._checkpoints.every_s
        return Session(
            request,
            lane.spec.input,
            round(credit_s * request.rate_hz),
            self.limits.max_chunk_bytes,
            4 + lane.wing.delay // lane.hop,
            self.limits.bridge_s,
            self.limits.reorder_chunks,
            lane.spec.pipeline == "heart" and lane.spec.input.unit == "mV",
        )

    def _enter(
        self, session: Session, slot: int, peer_id: bytes, life: Life | None, now: float
    ) -> Stream:
        """Count a stream among those that are open."""
        request = session.opened
        model, lane = self._models[request.model], self._lanes[request.model]
        budget_s = (request.latency_ms or model.spec.latency_ms) / 1000
        stream = Stream(
            session, request.model, slot, peer_id, budget_s, self._subject(request), life
        )
        self._streams[request.stream] = stream
        self._last_chunk[request.stream] = now
        self._budgets[budget_s] += 1
        self._tightest_s = min(self._tightest_s, budget_s)
        self._load += self._share(lane)
        if self._recorder is not None and model.spec.pipeline == "heart":
            signal = Signal(model.spec.input.unit, session.steps)
            made_by = f"{request.model} {model.sha256}"
            session.tap = self._recorder.open(request, signal, made_by)
        if life is not None and self._store is not None:
            self._keeper.group(stream.group).streams.add(session.name)
            self._keeper.moved(stream.group, now)
        self.metrics.streams_open = len(self._streams)
        return stream

    def _opened(self, stream: Stream, resumed: bool) -> messages.Opened:
        model, session = self._models[stream.lane], stream.session
        return messages.Opened(
            session.name,
            stream.lane,
            model.sha256,
            session.credit,
            model.spec.look_ahead_samples / model.spec.input.rate_hz,
            model.spec.hop_samples / model.spec.input.rate_hz,
            resumed,
            session.next_seq,
            stream.life is not None and self._store is not None,
        )

    def _resume(self, peer_id: bytes, peer: Peer, request: messages.Open, now: float) -> None:
        """Let a client go on with a stream that it opened on another connection."""
        name = request.stream
        over = self._over.get(name)
        if over is not None and over.life.id == request.life:
            self._tell_again(peer, over.life, request.seen)
            self._tell(peer, over.closed)
            return
        stream = self._streams.get(name)
        life = None if stream is None else stream.life
        if stream is None or life is None or life.id != request.life:
            raise Refused("unknown_life", f"stream {name!r}: nothing is known of that life")
        asked = msgspec.structs.replace(request, resume=False, seen={})
        if asked != stream.session.opened:
            raise Refused("unknown_life", f"stream {name!r} of that life was opened otherwise")
        if stream.peer in self.peers:
            self.peers[stream.peer].streams.discard(name)
        peer.streams.add(name)
        self._streams[name] = stream = stream._replace(peer=peer_id)
        self._last_chunk[name] = now
        log.info("stream %s resumed at chunk %d", name, stream.session.next_seq)
        self._tell(peer, self._opened(stream, resumed=True))
        if life.ack is not None:
            self._tell(peer, life.ack)
        self._tell_again(peer, life, request.seen)

    def _tell_again(self, peer: Peer, life: Life, seen: dict[str, int]) -> None:
        for encoded in life.missed(seen):
            peer.tell(encoded)

    def _again(self, peer: Peer, request: messages.Again) -> None:
        """Tell a subscriber what it has missed."""
        name = request.stream
        stream, over = self._streams.get(name), self._over.get(name)
        life = stream.life if stream is not None else over.life if over is not None else None
        if life is None:
            raise Refused("unknown_life", f"stream {name!r} is not open, or has no life")
        self._tell_again(peer, life, request.seen if life.id == request.life else {})
        self._tell(peer, messages.Recalled(name, life.id, dict(life.numbers), request.id))

    def _flush(self, peer_id: bytes, request: messages.Flush, now: float) -> None:
        """Queue a flush; one that was asked for on a lost connection is not done twice."""
        stream = self._own(peer_id, request.stream)
        session = stream.session
        if stream.life is None or request.id > session.last_flush:
            session.flush(request.id)
            self._feed(stream, now)
        elif request.id <= session.flushed:
            index = session.repeat_ack().index
            self._route(stream, messages.Flushed(session.name, request.id, index))

    def _subject(self, request: messages.Open) -> str:
        """Return whose alerts a stream may raise; empty: nobody's."""
        spec = self._models[request.model].spec
        looked_at = any(output.name in self._alerts.outputs for output in spec.outputs)
        if spec.pipeline in _UNWATCHED and not looked_at:
            return ""
        return request.subject or request.stream

    def _check_subject(self, subject: str | None) -> None:
        """Refuse a subject in the clear; nobody is told what it was, as it may be a name."""
        if not self._subjects.require_pseudonyms:
            return
        if subject is None:
            raise Refused("bad_subject", "subject: expected a pseudonym, found none")
        fault = pseudonyms.fault(subject, self._subjects.pattern)
        if fault is not None:
            raise Refused("bad_subject", f"subject: expected a pseudonym, {fault}")

    def _admit(self, lane: Lane) -> None:
        if lane.slots.full:
            rows, limits = lane.runtime.num_slots, self.limits
            if rows < limits.max_streams:
                raise Refused("full", f"limits.max_state_mb suffices for {rows} streams")
            raise Refused("full", f"limits.max_streams is {limits.max_streams}")
        load = self._load + self._share(lane)
        if load > self.limits.max_load:
            raise Refused(
                "full",
                f"another stream would take the measured load to {load:.2f}; "
                f"limits.max_load is {self.limits.max_load:g}",
            )

    def _share(self, lane: Lane) -> float:
        """Return the part of the measured capacity that a stream of this model needs."""
        rows = lane.runtime.max_rows
        hops_per_s = lane.spec.input.rate_hz / lane.hop
        return hops_per_s * lane.runtime.step_seconds(rows) / rows + lane.wing.share

    def _own(self, peer_id: bytes, name: str) -> Stream:
        stream = self._streams.get(name)
        if stream is None or stream.peer != peer_id or stream.session.ending:
            raise Refused("unknown_stream", f"stream {name!r} is not open on this connection")
        return stream

    def _chunk(self, peer_id: bytes, chunk: messages.Chunk, now: float) -> None:
        stream = self._own(peer_id, chunk.stream)
        session = stream.session
        self._last_chunk[chunk.stream] = now
        gaps, lost = session.gaps, session.lost_samples
        bridged, late = session.bridged_samples, session.late
        if self.draining and stream.life is not None and (self.handover or self._store):
            self._unheard.add(peer_id)
            return  # it is not acknowledged, and will be sent to who goes on with the stream
        if not session.accept(chunk, now):
            self.metrics.late += session.late - late
            self.metrics.duplicates += 1 - (session.late - late)
            ack = session.repeat_ack() if stream.life is None else stream.life.ack
            if ack is not None:
                self._tell(self.peers[peer_id], ack)
            return
        self.metrics.chunks += 1
        self.metrics.gaps += session.gaps - gaps
        self.metrics.lost_samples += session.lost_samples - lost
        self.metrics.bridged_samples += session.bridged_samples - bridged
        self._feed(stream, now)

    def _feed(self, stream: Stream, now: float) -> None:
        """Move what was accepted towards the model, and tell the scheduler if a hop is whole."""
        lane = self._lanes[stream.lane]
        for message in lane.feed(stream.slot):
            self._route(stream, message)
        self._advance(stream, lane, now)

    def _advance(self, stream: Stream, lane: Lane, now: float) -> None:
        hops = lane.hops(stream.slot)
        if hops:
            self._scheduler.arrived(stream.lane, stream.slot, hops, now + stream.budget_s, now)
        elif lane.over(stream.slot):
            self._end(stream, "closed")

    # --- one turn --------------------------------------------------------------------------

    def turn(self, now: float) -> Pause:
        """Run the batch that is due, if any, and say when to call again."""
        self._now = now
        self._let_out(now)
        pause = self._work(now)
        self._write(now)
        return pause

    def _work(self, now: float) -> Pause:
        self._collect(now)
        decision = self._scheduler.next(now)
        if isinstance(decision, Batch):
            self._step(decision, now)
            return Pause(now, deaf=False)
        if self._behind:
            return Pause(now, deaf=False)
        expected, until = self._scheduler.arrivals(now, self._tightest_s)
        until = min(until, now + _LONGEST_PAUSE_S)
        if until <= now:  # a budget too tight to leave anything in the socket
            return Pause(math.inf if decision.until is None else decision.until, deaf=False)
        if decision.until is not None:
            return Pause(min(until, decision.until), deaf=True)
        if expected >= _MANY:
            return Pause(until, deaf=True)
        return Pause(math.inf, deaf=False)

    def _step(self, batch: Batch, now: float) -> None:
        lane = self._lanes[batch.lane]
        deadlines = self._scheduler.deadlines(batch)
        hops = lane.most_hops(batch.slots)
        begin = self._clock()
        told = lane.step(batch.slots, hops)
        seconds = self._clock() - begin
        self._scheduler.stepped(batch, hops, lane.remaining(batch.slots), seconds)
        self._route_all(told)
        for slot in lane.ending(batch.slots):
            self._advance(self._streams[lane.sessions[slot].name], lane, now)
        if lane.failed:
            self._end_failed(lane)
        self.metrics.rows += hops * len(batch.slots)
        self.metrics.missed_deadlines += int(np.sum(now + seconds > deadlines))
        self.metrics.batch_rows.add(len(batch.slots))
        self.metrics.step_seconds.add(seconds)

    def _collect(self, now: float) -> None:
        """Route results that took longer than their step."""
        for lane in self._lanes.values():
            told = lane.collect()
            self._route_all(told)
            if lane.failed:
                self._end_failed(lane)
            for name in dict.fromkeys(session.name for session, _ in told):
                if name in self._streams:
                    self._advance(self._streams[name], lane, now)

    def _route_all(self, told: list[Told]) -> None:
        for session, message in told:
            stream = self._streams.get(session.name)
            if stream is None:
                continue  # it failed on its last message
            try:
                self._route(stream, message)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this stream's
                self._fail(stream, "server_error", fault(f"stream {session.name}", error))

    def _end_failed(self, lane: Lane) -> None:
        """End the streams that the model or the wing could not take further."""
        for slot, reason in list(lane.failed.items()):
            self._fail(self._streams[lane.sessions[slot].name], "model_error", reason)

    def _fail(self, stream: Stream, code: str, reason: str) -> None:
        """End a stream that is not to blame for it, and say so."""
        log.error("stream %s failed: %s", stream.session.name, reason)
        self.metrics.failed[code] += 1
        self._send(stream.peer, messages.encode(messages.Error(code, reason, stream.session.name)))
        self._end(stream, code)

    def tick(self, now: float) -> None:
        """Give up peers and streams that have said nothing for too long. Call it once a second."""
        self._now = now
        limits = self.limits
        for peer_id in [p for p, x in self.peers.items() if now - x.seen > limits.idle_timeout_s]:
            self.drop(peer_id, "idle")
        for name in [n for n, t in self._last_chunk.items() if now - t > limits.stream_timeout_s]:
            self._end(self._streams[name], "idle")
        self._bound_queues()
        self._forget_lives(now)
        self._tell_silence(now)
        self._forget_vitals(now)
        if now >= self._next_summary:
            self._next_summary = now + self._summary_s
            self._summarise()
        if self._audit is not None:
            self.metrics.audit_lost = self._audit.lost

    def _bound_queues(self) -> None:
        """Give up the peers of whom most waits, if all together is more than may."""
        self.metrics.queued_bytes = sum(x.waiting + x.unsent for x in self.peers.values())
        while self.metrics.queued_bytes > self.limits.max_queued_mb * 2**20:
            size, peer_id = max((x.waiting + x.unsent, p) for p, x in self.peers.items())
            most = f"limits.max_queued_mb is {self.limits.max_queued_mb}"
            self._turn_away(peer_id, Refused("over_queue", f"{most}: more waits, yours is most"))
            self.drop(peer_id, "over_queue")
            self.metrics.queued_bytes -= size

    def drop(self, peer_id: bytes, reason: str) -> None:
        """Give up a connection and its streams; those with a life may be resumed on another."""
        peer = self.peers[peer_id]
        for name in sorted(peer.streams):
            stream = self._streams[name]
            if stream.life is None:
                self._end(stream, reason)
            else:
                self._streams[name] = stream._replace(peer=_NOBODY)
        del self.peers[peer_id], peer.account.peers[peer_id]
        self._behind.pop(peer_id, None)
        self.metrics.dropped_peers += 1
        self.metrics.peers = len(self.peers)

    def drain(self, at_once: bool = False) -> bool:
        """Open nothing more; return whether all that has arrived is through.

        A stream that has nothing left to step or to tell, or any ``at_once``, is closed with the
        reason ``draining``. Durable ones are written down as they are, and not closed.
        """
        self.draining = True
        if not self._saved:
            self._saved = True
            for name in self._keeper.groups:
                self._keeper.moved(name, self._now, at_once=True)
        left = False
        for stream in list(self._streams.values()):
            if self._durable(stream):
                continue
            if at_once or self._lanes[stream.lane].idle(stream.slot):
                self._end(stream, "draining")
            else:
                left = True
        return not left and (at_once or not self._keeper.busy)

    # --- out -------------------------------------------------------------------------------

    def waiting(self) -> list[bytes]:
        """Return the peers for whom there is something to send."""
        return [peer_id for peer_id, peer in self.peers.items() if peer.unsent]

    def take(self, peer_id: bytes) -> bytes:
        """Return one body of what a peer is to be told, and forget it."""
        return self.peers[peer_id].take()

    def _route(self, stream: Stream, message: Message) -> None:
        """Queue a message for the stream's client, and a result for subscribers too."""
        life = stream.life
        if life is not None and isinstance(message, Numbered):
            life.number(message)
        elif life is not None and isinstance(message, _WAITING):
            self._owe(stream, life, message)
            return
        encoded = messages.encode(message)
        if life is not None and isinstance(message, Numbered):
            life.keep(message, encoded, stream.session.samples, stream.session.credit)
        self._send(stream.peer, encoded)
        if isinstance(message, _PUBLISHED):
            self._publish(message, stream.session.name, encoded)
        if stream.subject and isinstance(message, _WATCHED):
            self._watch(stream, message)

    def _publish(self, message: Message, name: str, encoded: bytes) -> None:
        """Queue a result for subscribers."""
        kind = type(message).__name__.lower()
        self.metrics.results[kind] += 1
        self.published.append((f"{kind}/{name}".encode(), messages.body([encoded])))
        if self._recorder is not None and isinstance(message, RECORDED):
            self._recorder.note(name, message)

    def _send(self, peer_id: bytes, encoded: bytes) -> None:
        """Queue a message for a peer, unless it is gone."""
        peer = self.peers.get(peer_id)
        if peer is not None:
            peer.tell(encoded)

    def _tell(self, peer: Peer, message: Message) -> None:
        peer.tell(messages.encode(message))

    def _refuse(
        self, peer: Peer, refused: Refused, request: messages.Request | None = None
    ) -> None:
        self.metrics.refused[refused.code] += 1
        name = getattr(request, "stream", "")
        seq = getattr(request, "seq", None)
        self._tell(peer, messages.Error(refused.code, refused.reason, name, seq))
        if refused.code in _FATAL:
            self._end(self._streams[name], refused.code)

    def _end(self, stream: Stream, reason: str) -> None:
        """Tell a stream's client that it is over, and free its row."""
        name = stream.session.name
        if reason == "closed":
            self._tell_alerts(self._alerts.closed(stream.subject, name))
        else:
            told = self._alerts.lost(stream.subject, name, tell=reason not in _CALM_ENDS)
            self._tell_alerts(told)
        if self._recorder is not None and stream.session.tap is not None:
            self._recorder.close(name)
        closed = stream.session.closed(reason)
        life = stream.life
        if life is not None and reason not in _CALM_ENDS:
            self._over[name] = Over(life, closed, self._now)
            if len(self._over) > self.limits.max_streams:
                self._forget_over(next(iter(self._over)))
        if self._durable(stream):
            group = self._keeper.group(stream.group)
            group.streams.discard(name)
            if name in self._over:
                group.over.add(name)
        self._route(stream, closed)
        self._leave(stream)
        log.info("stream %s closed: %s", name, reason)

    def _leave(self, stream: Stream) -> None:
        """Count a stream no more among those that are open."""
        name, lane = stream.session.name, self._lanes[stream.lane]
        self._scheduler.removed(stream.lane, stream.slot)
        lane.close(stream.slot)
        self._load -= self._share(lane)
        if stream.peer in self.peers:
            self.peers[stream.peer].streams.discard(name)
        del self._streams[name], self._last_chunk[name]
        self._budgets[stream.budget_s] -= 1
        if not self._budgets[stream.budget_s]:
            del self._budgets[stream.budget_s]
            self._tightest_s = min(self._budgets, default=math.inf)
        self.metrics.streams_open = len(self._streams)

    # --- lives -----------------------------------------------------------------------------

    def _durable(self, stream: Stream) -> bool:
        return stream.life is not None and self._store is not None

    def _owe(self, stream: Stream, life: Life, message: Message) -> None:
        """Tell a message now, or once the next checkpoint of its stream is on the disk."""
        if self._store is None or self._lossy:
            self._pay(Owed(stream.peer, message))
            return
        if not isinstance(message, messages.Ack):
            group = self._keeper.group(stream.group)
            if life.waiting is not None:
                group.owed.append(Owed(stream.peer, life.waiting))
                life.waiting = None
            group.owed.append(Owed(stream.peer, message))
            self._keeper.moved(stream.group, self._now, at_once=True)
            return
        life.waiting = message
        session = stream.session
        hurry = session.acked_samples - life.written > session.credit // 4
        self._keeper.moved(stream.group, self._now, at_once=hurry)

    def _pay(self, owed: Owed) -> None:
        """Tell a message that was owed."""
        message = owed.message
        if isinstance(message, messages.Alert):
            self._tell_alert(message, owed.peer)
            return
        stream = self._streams.get(getattr(message, "stream", ""))
        if stream is None or stream.life is None:
            self._send(owed.peer, messages.encode(message))
            return
        if isinstance(message, messages.Ack):
            stream.life.ack = message
        self._send(stream.peer, messages.encode(message))

    def _let_out(self, now: float) -> None:
        """Tell what waited for checkpoints that are on the disk now."""
        for owed in self._keeper.let_out(now):
            self._pay(owed)
        failing = self._keeper.failing(now)
        if failing and not self._lossy:
            assert self._store is not None
            reason = f"checkpoints cannot be written: {self._store.fault}"
            log.error("%s; streams go on without", reason)
            for name, stream in self._streams.items():
                if stream.life is not None:
                    error = messages.Error("not_durable", reason, name)
                    self._send(stream.peer, messages.encode(error))
        self._lossy = failing

    def _write(self, now: float) -> None:
        """Write down the groups that are due."""
        states = []
        for group in self._keeper.due(now):
            streams = [self._streams[name] for name in sorted(group.streams)]
            if any(self._lanes[one.lane].wing.pending(one.slot) for one in streams):
                self._keeper.again(group)
                continue
            states.append((group, checkpoint.encode(self._take(group, streams))))
        if states:
            self._keeper.write(states)

    def _take(self, group: Group, streams: list[Stream]) -> dict[str, Any]:
        """Return all that is carried of a group, and owe the acks that its checkpoint allows."""
        taken = {}
        for stream in streams:
            life, name = stream.life, stream.session.name
            assert life is not None
            if life.waiting is not None:
                group.owed.append(Owed(stream.peer, life.waiting))
                life.waiting = None
            life.written = stream.session.acked_samples
            taken[name] = {
                "open": stream.session.opened,
                "sha256": self._models[stream.lane].fingerprint,
                "life": life.take(),
                "row": self._lanes[stream.lane].take(stream.slot),
            }
        return {
            "streams": taken,
            "over": {
                name: (self._over[name].life.take(), self._over[name].closed)
                for name in sorted(group.over)
            },
            "alerts": self._alerts.memory(group.name),
            "vitals": self._vitals.get(group.name),
        }

    def restore(self, now: float) -> None:
        """Go on with all streams that the store holds; their clients will resume them."""
        self._now = now
        if self._store is not None:
            for name, data in self._store.load():
                try:
                    self._put(name, checkpoint.decode(data), now)
                except (CheckpointError, *_UNREADABLE) as error:
                    log.error("%s", fault("a checkpoint was given up", error))
                    self.metrics.lost_checkpoints += 1
            self._store.start()
        if self._audit is not None:
            self._restore(self._audit)

    # --- from one server to the next -------------------------------------------------------

    @property
    def movable(self) -> bool:
        """Whether all streams with a life could be taken now: no result of theirs is to come."""
        return not any(
            self._lanes[one.lane].wing.pending(one.slot)
            for one in self._streams.values()
            if one.life is not None
        )

    def take_all(self) -> list[Taken]:
        """Return all streams with a life."""
        groups: dict[str, Group] = {}
        for name, stream in self._streams.items():
            if stream.life is not None and stream.group not in groups:
                known = self._keeper.groups.get(stream.group)
                groups[stream.group] = known or Group(stream.group)
            if stream.life is not None:
                groups[stream.group].streams.add(name)
        for group in self._keeper.groups.values():
            groups.setdefault(group.name, group)
        taken = []
        for group in groups.values():
            streams = [self._streams[name] for name in sorted(group.streams)]
            state = checkpoint.encode(self._take(group, streams))
            taken.append(Taken(group.name, sorted(group.streams), state))
        return taken

    def give_away(self, request: messages.Drain) -> None:
        """Let go of all streams with a life, which go on elsewhere, and say where."""
        for owed in self._keeper.pay_all():  # it is durable there
            self._pay(owed)
        for stream in list(self._streams.values()):
            if stream.life is not None:
                if self._recorder is not None and stream.session.tap is not None:
                    self._recorder.close(stream.session.name)
                self._leave(stream)
        self._over.clear()
        for group in self._keeper.groups.values():
            group.streams.clear()
            group.over.clear()
        moved = messages.Moved(request.to, request.publish, request.key)
        self.published.append((MOVED, messages.body([messages.encode(moved)])))
        for peer in self.peers.values():
            self._tell(peer, moved)
        self.handover = None

    def keep(self, reason: str) -> None:
        """Go on with all streams: they could not be given away."""
        assert self.handover is not None
        error = messages.Error("not_moved", reason)
        asker = self.handover[0]
        self._send(asker, messages.encode(error))
        self.draining, self.handover = False, None
        for peer_id in self._unheard & self.peers.keys() - {asker}:
            self.drop(peer_id, "not_moved")  # they come again, and send what was not taken
        self._unheard.clear()

    def _adopt(self, peer_id: bytes, peer: Peer, request: messages.Adopt, now: float) -> None:
        """Go on with the streams of another server; they are this peer's until they are resumed."""
        if self.draining:
            raise Refused("draining", "the server is about to stop")
        peer.parts.append(request.state)
        if sum(map(len, peer.parts)) > _MOST_ADOPTED_BYTES:
            peer.parts.clear()
            raise Refused("oversize", f"adopt: expected at most {_MOST_ADOPTED_BYTES} bytes")
        if request.more:
            return
        data = b"".join(peer.parts)
        peer.parts.clear()
        try:
            state = checkpoint.decode(data)
            for name, carried in state["streams"].items():
                opened = msgspec.convert(carried["open"], messages.Open)
                if name in self._streams:
                    raise Refused("stream_taken", f"stream {name!r} is open here")
                lack = self._cannot_go_on(opened, carried["sha256"])
                if lack:
                    raise Refused(lack, f"stream {name!r} cannot go on here")
                self._admit(self._lanes[opened.model])
            self._put(request.name, state, now)
        except (CheckpointError, *_UNREADABLE) as error:
            raise Refused("bad_state", fault("adopt", error)) from None
        for name in state["streams"].keys() & self._streams.keys():
            peer.streams.add(name)
            self._streams[name] = self._streams[name]._replace(peer=peer_id)
        adopted = Owed(peer_id, messages.Adopted(request.id))
        if self._store is None or self._lossy:
            self._pay(adopted)
        else:
            self._keeper.group(request.name).owed.append(adopted)
            self._keeper.moved(request.name, now, at_once=True)

    def _put(self, name: str, state: Mapping[str, Any], now: float) -> None:
        """Go on with the streams of a group."""
        group = self._keeper.group(name)
        for stream, (life, closed) in state["over"].items():
            found = msgspec.convert(closed, messages.Closed)
            self._over[stream] = Over(lives.put(life), found, now)
            group.over.add(stream)
        if state["vitals"] is not None:
            self._vitals[name] = msgspec.convert(state["vitals"], news2.Vitals)
            self._last_vital[name] = now
        for stream, carried in state["streams"].items():
            self._put_stream(stream, carried, group, now)
        if state["alerts"] is not None:
            self._put_alerts(name, state["alerts"])
        self._keeper.moved(name, now)

    def _put_stream(self, name: str, carried: Mapping[str, Any], group: Group, now: float) -> None:
        request = msgspec.convert(carried["open"], messages.Open)
        life = lives.put(carried["life"])
        fault = self._cannot_go_on(request, carried["sha256"])
        if not fault:
            session = self._session(request)
            try:
                slot = self._lanes[request.model].put(session, carried["row"])
            except Refused as refused:
                fault = refused.code
        if fault:
            log.error("stream %s cannot go on: %s", name, fault)
            closed = closed_of(name, fault, carried["row"]["session"])
            self._over[name] = Over(life, closed, now)
            group.over.add(name)
            return
        life.ack, life.written = session.repeat_ack(), session.acked_samples
        self._feed(self._enter(session, slot, _NOBODY, life, now), now)

    def _cannot_go_on(self, request: messages.Open, sha256: str) -> str:
        """Return why a stream has no place here, as a code; empty: it has."""
        model = self._models.get(request.model)
        if model is None:
            return "unknown_model"
        if sha256 not in (model.fingerprint, *model.spec.continues):
            return "model_changed"
        return "full" if self._lanes[request.model].slots.full else ""

    def _put_alerts(self, subject: str, memory: Any) -> None:
        try:
            told = self._alerts.put_back(subject, memory, live=True)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"alerts: {error}") from None
        for stream in memory["streams"]:
            if stream not in self._streams:  # it has no life: it went with its connection
                told += self._alerts.lost(subject, stream, tell=False)
        self._tell_alerts(told)
        if self._audit is not None:  # it may not have got what was told last
            for alert in [one for name in memory["streams"] for one in self._told_alerts(name)]:
                self._audit.add([alert], self._alerts.take_out(subject))

    def _told_alerts(self, name: str) -> list[messages.Alert]:
        """Return the alerts among the results of a stream that are kept."""
        stream = self._streams.get(name)
        if stream is None or stream.life is None:
            return []
        kept = [one.encoded for one in stream.life.told if one.kind == "alert"]
        return [one for one in map(messages.decode_reply, kept) if isinstance(one, messages.Alert)]

    def _forget_lives(self, now: float) -> None:
        """Give up streams whose client does not come back, and forget those that are over."""
        for name, stream in list(self._streams.items()):
            if stream.peer == _NOBODY and now - self._last_chunk[name] > self.limits.resume_s:
                self._end(stream, "gone")
        for name in [
            n for n, over in self._over.items() if now - over.since > self.limits.resume_s
        ]:
            self._forget_over(name)

    def _forget_over(self, name: str) -> None:
        del self._over[name]
        for group in self._keeper.groups.values():
            if name in group.over:
                group.over.discard(name)
                self._keeper.moved(group.name, self._now)

    # --- vitals ----------------------------------------------------------------------------

    def _vital(self, peer: Peer, vital: messages.Vital, now: float) -> None:
        """Take a slow vital, and tell what is known of its subject."""
        subject = vital.subject
        self._check_subject(subject)
        try:
            value = news2.convert(vital.parameter, vital.value, vital.unit)
        except ValueError as error:
            raise Refused("bad_vital", str(error)) from None
        if subject not in self._vitals:
            if len(self._vitals) >= self.limits.max_streams:
                raise Refused("full", f"limits.max_streams is {self.limits.max_streams}: subjects")
            self._vitals[subject] = news2.Vitals()
        self._last_vital[subject] = now
        self._keeper.moved(subject, now)
        self._vitals[subject].note(vital.parameter, value, vital.seconds)
        self._tell(peer, self._tell_vitals(subject))

    def _note_heart(self, subject: str, message: messages.Measures) -> None:
        """Take the heart rate of a subject's ECG; publish the score if that changes it."""
        bpm = message.values.get("heart_rate_bpm")
        if bpm is None:
            return
        vitals = self._vitals[subject]
        before = vitals.score
        vitals.note_heart(bpm, message.seconds)
        if vitals.rate() != before:
            self._tell_vitals(subject)

    def _tell_vitals(self, subject: str) -> messages.Measures:
        """Publish what is known of a subject, let the alerts know, and return it."""
        vitals = self._vitals[subject]
        index = round(1000 * vitals.now_s)  # there are no samples: milliseconds
        message = messages.Measures(subject, index, vitals.now_s, index, vitals.measures())
        self._publish(message, subject, messages.encode(message))
        at = Moment(index, vitals.now_s, index)
        self._tell_alerts(self._alerts.update(subject, subject, at, message.values))
        return message

    def _forget_vitals(self, now: float) -> None:
        """Let go of subjects of whom all vitals are too old."""
        for subject, heard in list(self._last_vital.items()):
            if now - heard > news2.LONGEST_AGE_S:
                del self._vitals[subject], self._last_vital[subject]

    # --- alerts ----------------------------------------------------------------------------

    def _watch(self, stream: Stream, message: Message) -> None:
        """Let the alerts know what a stream told, and tell what comes of it."""
        subject, session = stream.subject, stream.session
        match message:
            case messages.Measures():
                at = Moment(message.index, message.seconds, message.decided_at)
                told = self._alerts.update(subject, session.name, at, message.values)
                if subject in self._vitals:
                    self._note_heart(subject, message)
            case messages.Gap():
                self._alerts.gap(subject, session.name)
                return
            case messages.Scores() if message.output in self._alerts.outputs:
                at = Moment(message.index, message.index / session.rate_hz, message.index)
                largest = float(np.frombuffer(message.data, "<f4").max())
                values = {f"scores.{message.output}": largest}
                told = self._alerts.update(subject, session.name, at, values)
            case _:
                return
        self._tell_alerts(told)

    def _tell_silence(self, now: float) -> None:
        """Let the alerts know of streams whose next chunk is overdue."""
        for name, heard in self._last_chunk.items():
            stream = self._streams[name]
            session = stream.session
            usual_s = session.samples / max(1, session.chunks) / session.rate_hz
            overdue_s = now - heard - usual_s
            if overdue_s > 1.0:
                values = {"silence_s": overdue_s}
                self._tell_alerts(self._alerts.missing(stream.subject, name, values))

    def _ask_alerts(self, peer: Peer, request: messages.AlertRequest) -> None:
        """Do what is asked of alerts, and answer with those that are active then."""
        subject = request.subject
        match request:
            case messages.Acknowledge():
                told = self._alerts.acknowledge(subject, request.rule, request.by)
            case messages.PauseAlerts():
                told = self._alerts.pause(
                    subject, request.rule, request.seconds, request.by, request.off
                )
            case messages.ResumeAlerts():
                told = self._alerts.resume(subject, request.rule, request.by)
            case messages.ListAlerts():
                told = []
        if told is None:
            rule = getattr(request, "rule", "") or "any"
            kind = type(request).__name__.lower()
            raise Refused("unknown_alert", f"{kind}: found none of {subject!r}, rule: {rule}")
        self._tell_alerts(told)
        active = tuple(self._alerts.active(subject))
        self._tell(peer, messages.AlertList(request.id, active))

    def _tell_alerts(self, alerts: list[messages.Alert]) -> None:
        """Tell transitions, those of durable streams with their next checkpoint."""
        for alert in map(self._stated, alerts):
            stream = self._streams.get(alert.stream)
            if stream is None or stream.life is None:
                self._tell_alert(alert, _NOBODY if stream is None else stream.peer)
                continue
            session, life = stream.session, stream.life
            life.number(alert)
            life.keep(alert, messages.encode(alert), session.samples, session.credit)
            # A transition may have other causes than samples, which do not come again after a
            # crash. So nobody hears of one that could be undone.
            self._owe(stream, life, alert)

    def _tell_alert(self, alert: messages.Alert, peer_id: bytes) -> None:
        """Tell a transition to its stream's client and to subscribers, and write it down."""
        encoded = messages.encode(alert)
        stream = self._streams.get(alert.stream)
        self._send(peer_id if stream is None else stream.peer, encoded)
        self._publish(alert, alert.stream, encoded)
        if self._audit is not None:
            self._audit.add([alert], self._alerts.take_out(alert.subject))

    def _stated(self, alert: messages.Alert) -> messages.Alert:
        """Return a transition with the model that its stream is served by."""
        stream = self._streams.get(alert.stream)
        if stream is None:
            return alert
        sha256 = self._models[stream.lane].sha256
        return msgspec.structs.replace(alert, model=stream.lane, sha256=sha256)

    def _summarise(self) -> None:
        """Publish what is active, and once of each subject that nothing is any more."""
        found = {active.subject: active for active in self._alerts.active()}
        for subject in self._summarised - found.keys():
            known = self._alerts.active(subject)
            seconds = known[0].seconds if known else 0.0
            found[subject] = messages.ActiveAlerts(subject, seconds, ())
        for subject, active in found.items():
            self._publish(active, subject, messages.encode(active))
        self._summarised = {subject for subject, active in found.items() if active.alerts}

    def _restore(self, audit: Audit) -> None:
        """Go on with the alerts that an audit log holds, of who has no checkpoint."""
        for subject, state in audit.states():
            if subject in self._keeper.groups:
                continue
            try:
                told = self._alerts.put_back(subject, state, live=False)
            except msgspec.ValidationError as error:
                raise ConfigError(f"audit: the state of {subject!r}: {error}") from None
            self._tell_alerts(told)
