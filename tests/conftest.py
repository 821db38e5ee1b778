"""What several test files need: tiny model files, a fake clock, closed sockets, a server."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
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


@pytest.fixture(scope="session")
def wide_path(models: Callable[..., Path]) -> Path:
    """The LSTM with windows of 60 samples that overlap, in hops of 20."""
    stage = msgspec.structs.replace(tiny.spec().stages[0], input_shape=(60, 1))
    return models("wide", window_samples=60, stages=(stage,))


@pytest.fixture(scope="session")
def heart_path(models: Callable[..., Path]) -> Path:
    """The LSTM as a heart model that decides 8 samples behind the signal."""
    return models("tinyheart", pipeline="heart", look_ahead_samples=8)


@pytest.fixture(scope="session", params=[50, 60], ids=lambda window: f"window{window}")
def smoother(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """A model that makes signal in hops of 20 samples, and its window."""
    folder = tmp_path_factory.mktemp("smoother")
    return tiny.write_smoother(folder, request.param), request.param


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that says how loud the loudest sample of each 0.1 s is."""
    return tiny.write_detector(tmp_path_factory.mktemp("detector"))


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
def sockets() -> Iterator[Callable[[int], zmq.Socket]]:
    """Return a maker of sockets that are all closed at the end, whatever the test did."""
    with zmq.Context() as context, ExitStack() as stack:
        context.setsockopt(zmq.LINGER, 0)  # of each socket that it makes
        yield lambda kind: stack.enter_context(context.socket(kind))


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


def arguments(model: Path | str, bind: str = ANYWHERE) -> list[str]:
    addresses = ["--bind", bind, "--publish", ANYWHERE, "--metrics", "127.0.0.1:0"]
    return ["--model", str(model), *addresses]


@pytest.fixture(scope="module")
def running(tiny_path: Path) -> Iterator[Server]:
    """One server of the tiny model, for those tests of a file that leave it as it was."""
    server = Server(arguments(tiny_path))
    yield server
    assert server.stop() == 0


@pytest.fixture
def serving(tiny_path: Path) -> Iterator[Callable[..., Server]]:
    """Return a starter of server processes; those that still run at the end are killed."""
    started: list[Server] = []

    def start(*options: str, model: Path | str = tiny_path, bind: str = ANYWHERE) -> Server:
        started.append(Server([*arguments(model, bind), *options]))
        return started[-1]

    yield start
    for server in started:
        if server.process.returncode is None:
            server.stop(signal.SIGKILL)
