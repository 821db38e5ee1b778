"""What several test files need: tiny model files, a fake clock, sockets that get closed, a server."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
from hypothesis import settings

from engine import model_file
from engine.model_file import Model
from tests import tiny

ROOT = Path(__file__).parent.parent

settings.register_profile("murmur", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("murmur")


@pytest.fixture(scope="session", autouse=True)
def _flushing(tiny_path: Path) -> None:
    """Flush denormals from the first test on, as a server does once its model is loaded."""
    model_file.load(tiny_path)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a writer of tiny model files, each written once."""
    folder = tmp_path_factory.mktemp("models")

    def write(
        name: str = "tiny", cell: str = "LSTM", time: int | str = "samples", **changes: object
    ) -> Path:
        path = folder / f"{name}.onnx"
        if not path.exists():
            tiny.write(folder, tiny.spec(name, cell, **changes), cell, time=time)
        return path

    return write


@pytest.fixture(scope="session")
def tiny_path(models: Callable[..., Path]) -> Path:
    """The LSTM as it is: scores, hop of 20 samples at 100 Hz, in mV; several hops in a call."""
    return models()


@pytest.fixture(scope="session")
def tiny_model(tiny_path: Path) -> Model:
    return model_file.load(tiny_path)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    """A context whose sockets are all closed at the end, whatever the test did."""
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


class Server:
    """A real server process, and where it is to be found."""

    def __init__(self, arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engine", "serve", "--json", *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONWARNINGS": "error"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        first_line = self.process.stdout.readline()
        assert first_line, "the server ended before it said its addresses"
        self.endpoints: dict[str, str] = json.loads(first_line)
        self.address = self.endpoints["bind"]

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(timeout_s)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


ANYWHERE = "tcp://127.0.0.1:0"


@pytest.fixture
def serving(tiny_path: Path) -> Iterator[Callable[..., Server]]:
    """Return a starter of server processes; those that still run at the end are killed."""
    started: list[Server] = []

    def start(*options: str, model: Path | str = tiny_path, bind: str = ANYWHERE) -> Server:
        addresses = ["--bind", bind, "--publish", ANYWHERE, "--metrics", "127.0.0.1:0"]
        started.append(Server(["--model", str(model), *addresses, *options]))
        return started[-1]

    yield start
    for server in started:
        if server.process.returncode is None:
            server.stop(signal.SIGKILL)
