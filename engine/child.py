"""A real server in a child process, and what it counts; for commands that bring their own."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from engine.client import Client
from engine.errors import Disconnected, MurmurError


class Counts(NamedTuple):
    """A server's counters at one moment."""

    cpu_seconds: float
    resident_bytes: float
    rows: float  # hops of a stream
    steps: float
    missed_deadlines: float
    runs: dict[str, Counter[tuple[int, int]]]  # ONNX Runtime calls of each model, by rows and hops
    step_seconds: float  # of all steps together

    def since(self, before: "Counts") -> "Counts":
        """Return what has been added since an earlier moment."""
        return Counts(
            self.cpu_seconds - before.cpu_seconds,
            self.resident_bytes - before.resident_bytes,
            self.rows - before.rows,
            self.steps - before.steps,
            self.missed_deadlines - before.missed_deadlines,
            {model: runs - before.runs[model] for model, runs in self.runs.items()},
            self.step_seconds - before.step_seconds,
        )

    def rows_per_run(self, model: str) -> float:
        runs = self.runs[model]
        return sum(rows * count for (rows, _), count in runs.items()) / runs.total()


class ServerProcess:
    """A real server, started for one command; what it logs goes to a file, or nowhere."""

    def __init__(
        self,
        models: str | Sequence[str],
        limits: dict[str, float] | None = None,
        log: IO[bytes] | None = None,
    ) -> None:
        command = [sys.executable, "-m", "engine", "serve", "--json"]
        for model in [models] if isinstance(models, str) else models:
            command += ["--model", model]
        command += ["--bind", "tcp://127.0.0.1:0", "--publish", "tcp://127.0.0.1:0"]
        command += ["--metrics", "127.0.0.1:0"]
        for key, value in (limits or {}).items():
            command += ["--limit", f"{key}={value}"]
        # A process group of its own: Ctrl-C is for who started it, and who then stops the server
        # once its last results are in.
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log or subprocess.DEVNULL,
            text=True,
            process_group=0,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            raise MurmurError(f"the server did not start: {' '.join(command)}")
        self.endpoints = json.loads(line)

    @property
    def address(self) -> str:
        return str(self.endpoints["bind"])

    def counts(self) -> Counts:
        """Return the server's counters, its CPU seconds and memory among them."""
        with urllib.request.urlopen(self.endpoints["metrics"], timeout=10) as answer:
            text = answer.read().decode()
        values: dict[str, float] = {}
        runs: dict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "murmur_runs_total":
                    call = int(sample.labels["rows"]), int(sample.labels["hops"])
                    runs[sample.labels["model"]][call] = int(sample.value)
                elif not sample.labels:
                    values[sample.name] = sample.value
        return Counts(
            values["process_cpu_seconds_total"],
            values["process_resident_memory_bytes"],
            values["murmur_rows_total"],
            values["murmur_batch_rows_count"],
            values["murmur_missed_deadlines_total"],
            runs,
            values["murmur_step_seconds_sum"],
        )

    def stop(self) -> int:
        """Ask the server to end and return its exit code; one that does not listen is killed."""
        self._process.terminate()
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        return self._process.returncode


@contextlib.contextmanager
def pinned(cores: set[int]) -> Iterator[None]:
    """Keep this thread, and what it starts meanwhile, to some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def serving(model: str, **limits: float) -> Iterator[ServerProcess]:
    """Start a server, and stop it at the end."""
    server = ServerProcess(model, limits)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def running(
    model: str, address: str | None = None, **limits: float
) -> Iterator[tuple[str, ServerProcess | None]]:
    """Give the address of a running server: the one that is named, or one that is started.

    Raises
    ------
    MurmurError
        If the server does not start or ends meanwhile, with what it said last.
    """
    if address is not None:
        yield address, None
        return
    with tempfile.TemporaryFile() as log:
        try:
            # Not real time: a stream more makes the others slower, and late for nobody.
            server = ServerProcess(model, {"max_load": 1e9, **limits}, log)
        except MurmurError:
            raise MurmurError(_last_line(log)) from None
        try:
            yield server.address, server
        except Disconnected as error:
            code = server.stop()
            raise MurmurError(f"{error}; it ended with code {code}: {_last_line(log)}") from None
        finally:
            server.stop()


def served(client: Client, model: str) -> str:
    """Return the name under which a model, perhaps given by its file, is served."""
    names = client.welcome.models if client.welcome else []
    return names[0] if len(names) == 1 and Path(model).suffix in (".onnx", ".toml") else model


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
    return lines[-1].removeprefix("murmur: ")
