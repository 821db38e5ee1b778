"""What the engine counts, and how Prometheus reads it."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.errors import ConfigError

_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # rows
_STEP_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)  # seconds


class Histogram:
    """Counts of values up to each of some bounds, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """Return it as Prometheus wants it: cumulative."""
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        total, buckets = 0, []
        for bound, count in zip(names, self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self._sum)


class Metrics(Collector):
    """The engine's counts, as plain attributes; they are read only when somebody asks."""

    def __init__(self) -> None:
        self.streams_open = 0
        self.peers = 0
        self.chunks = 0
        self.duplicates = 0
        self.gaps = 0
        self.lost_samples = 0
        self.bridged_samples = 0
        self.late = 0
        self.rows = 0  # hops of a stream that were stepped
        self.missed_deadlines = 0
        self.runs: dict[str, Counter[tuple[int, int]]] = {}  # of each model: by rows and hops
        self.dropped_peers = 0  # that did not read, or died
        self.queued_bytes = 0  # undone or unread, a second ago at the most
        self.audit_lost = 0
        self.lost_checkpoints = 0  # that could not be read
        self.connections = 0  # of clients and subscribers, and on their way in
        self.shut_out: Counter[str] = Counter()  # connections, by reason
        self.refused: Counter[str] = Counter()  # by code
        self.failed: Counter[str] = Counter()  # streams, by code
        self.results: Counter[str] = Counter()  # by type
        self.batch_rows = Histogram(_BATCH_BUCKETS)
        self.step_seconds = Histogram(_STEP_BUCKETS)

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("murmur_streams_open", "streams", value=self.streams_open)
        yield GaugeMetricFamily("murmur_peers", "connections", value=self.peers)
        yield GaugeMetricFamily(
            "murmur_queued_bytes", "of peers, undone or unread", value=self.queued_bytes
        )
        for name, text, value in (
            ("chunks", "chunks accepted", self.chunks),
            ("duplicates", "chunks that had come before", self.duplicates),
            ("gaps", "places where samples are missing", self.gaps),
            ("lost_samples", "samples that never came", self.lost_samples),
            ("bridged_samples", "samples that never came, interpolated", self.bridged_samples),
            ("late", "chunks that came after they were given up", self.late),
            ("rows", "hops stepped", self.rows),
            ("missed_deadlines", "hops whose results left late", self.missed_deadlines),
            ("dropped_peers", "connections given up", self.dropped_peers),
            ("lost_checkpoints", "checkpoints that could not be read", self.lost_checkpoints),
            ("audit_lost", "transitions of alerts that were not written", self.audit_lost),
        ):
            yield CounterMetricFamily(f"murmur_{name}", text, value=value)
        yield GaugeMetricFamily("murmur_connections", "TCP connections", value=self.connections)
        yield _labelled("murmur_shut_out", "connections ended", "reason", self.shut_out.items())
        yield _labelled("murmur_refused", "messages not accepted", "code", self.refused.items())
        yield _labelled(
            "murmur_failed", "streams that ended by a fault", "code", self.failed.items()
        )
        yield _labelled("murmur_results", "results told", "type", self.results.items())
        labels = ["model", "rows", "hops"]
        runs = CounterMetricFamily("murmur_runs", "calls of the models", labels=labels)
        for model, calls in self.runs.items():
            for (rows, hops), count in sorted(calls.items()):
                runs.add_metric([model, str(rows), str(hops)], count)
        yield runs
        yield self.batch_rows.family("murmur_batch_rows", "rows of a step")
        yield self.step_seconds.family("murmur_step_seconds", "seconds of a step")


def _labelled(
    name: str, text: str, label: str, values: Iterable[tuple[str, int]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in values:
        family.add_metric([value], count)
    return family


def serve(metrics: Metrics, address: str) -> str:
    """Offer the counts, and the process's CPU time and memory, over HTTP.

    Parameters
    ----------
    metrics : Metrics
    address : str
        ``host:port``; port 0 takes a free one.

    Returns
    -------
    str
        The URL.

    Raises
    ------
    ConfigError
        If the address is taken or none of this machine's.
    """
    registry = CollectorRegistry()
    registry.register(metrics)
    ProcessCollector(registry=registry)
    host, port = address.rsplit(":", 1)
    try:
        server, _ = start_http_server(int(port), addr=host, registry=registry)
    except (OSError, OverflowError) as error:  # taken, or no port at all
        raise ConfigError(f"metrics: cannot listen at {address}: {error}") from None
    return f"http://{host}:{server.server_port}/metrics"
