"""Who may come in, and what they may do: real servers and sockets, keys made by the command."""

import ast
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from engine import keys, model_file, rights
from engine import messages as m
from engine.cli import app
from engine.client import Client
from engine.errors import ConfigError, Disconnected, ModelFileError, Refused
from engine.keys import Identity
from engine.watch import Subscription
from tests import tiny
from tests.conftest import ANYWHERE, ROOT, Server
from tests.drive import Driven
from tests.test_faults import metric

Starter = Callable[..., Server]
DEADLINE_S = 20.0
SIGNAL = np.random.default_rng(4).standard_normal(100).astype(np.float32)


def make(folder: Path, name: str, *options: str) -> Path:
    """Make a key with the command, return the file of its secret half."""
    command = ["keys", "make", name, "--file", str(folder / "keys.toml"), *options, "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return Path(json.loads(result.output)["secret_file"])


class Ward(NamedTuple):
    """A server with keys."""

    folder: Path
    server: Server
    key: bytes  # the server's public half

    def identity(self, name: str) -> Identity:
        return Identity(keys.pair(self.folder / f"{name}.key_secret"), self.key)

    def client(self, name: str) -> Client:
        return Client(self.server.address, DEADLINE_S, self.identity(name))


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Iterator[Ward]:
    folder = tmp_path_factory.mktemp("keys")
    secret = make(folder, "server", "--server")
    make(folder, "bed", "--publish", "bed-*", "--subscribe", "*/bed-7*")
    make(folder, "nurse", "--subscribe", "*", "--acknowledge", "--list-alerts")
    make(folder, "leaver", "--publish", "*")
    make(folder, "stranger", "--file", str(folder / "other.toml"))  # the last --file counts
    config = folder / "engine.toml"
    config.write_text(f'[security]\nkey = "{secret}"\nkeys = "{folder / "keys.toml"}"\n')
    addresses = ["--bind", ANYWHERE, "--publish", ANYWHERE, "--metrics", "127.0.0.1:0"]
    server = Server([str(config), "--model", str(tiny_path), *addresses])
    yield Ward(folder, server, keys.pair(secret).public)
    assert server.stop() == 0


def test_who_has_a_key_with_the_right_is_served(ward: Ward) -> None:
    published = ward.server.endpoints["publish"]
    with (
        Subscription(published, None, DEADLINE_S, ward.identity("nurse")) as subscription,
        ward.client("bed") as client,
    ):
        stream = client.open("bed-1", "tiny", rate_hz=100.0, unit="mV")
        stream.send(SIGNAL)
        stream.flush()
        assert sum(isinstance(one, m.Scores) for one in client.events()) == 10
        heard: list[m.Message] = []
        while len(heard) < 10:
            heard += subscription.results(DEADLINE_S)
        assert {one.stream for one in heard if isinstance(one, m.Scores)} == {"bed-1"}


def test_a_peer_without_a_key_is_refused_and_held_nowhere(ward: Ward) -> None:
    before = metric(ward.server, "murmur_peers")
    with pytest.raises(Disconnected):
        Client(ward.server.address, 5.0)
    assert metric(ward.server, "murmur_peers") <= before  # who was there may have gone


def test_a_key_that_is_not_in_the_file_is_refused(ward: Ward) -> None:
    before = metric(ward.server, "murmur_peers")
    with pytest.raises(Disconnected, match="does not let this key in"):
        ward.client("stranger")
    assert metric(ward.server, "murmur_peers") <= before  # who was there may have gone


def test_a_client_believes_no_other_server(ward: Ward) -> None:
    identity = ward.identity("bed")._replace(server=ward.identity("nurse").own.public)
    with pytest.raises(Disconnected):
        Client(ward.server.address, 5.0, identity)


def test_a_key_publishes_no_streams_but_its_own(ward: Ward) -> None:
    with ward.client("bed") as client, pytest.raises(Refused, match=r"may use \['bed-\*'\]") as no:
        client.open("room-1", "tiny", rate_hz=100.0, unit="mV")
    assert no.value.code == "forbidden"


@pytest.mark.parametrize(
    "request_", [m.Acknowledge("bed-7", "", "me"), m.ListAlerts()], ids=["acknowledge", "list"]
)
def test_a_key_does_nothing_to_alerts_without_the_right(
    ward: Ward, request_: m.AlertRequest
) -> None:
    with ward.client("bed") as client, pytest.raises(Refused) as caught:
        client.ask(request_)
    assert caught.value.code == "forbidden"
    with ward.client("nurse") as client:
        assert client.ask(m.ListAlerts()).subjects == ()


def test_streams_are_given_away_only_with_the_right_to_adopt(ward: Ward) -> None:
    with ward.client("nurse") as client, pytest.raises(Refused) as caught:
        client.drain("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")
    assert caught.value.code == "forbidden"


def test_a_subscriber_gets_what_its_key_may_have_and_nothing_else(ward: Ward) -> None:
    published = ward.server.endpoints["publish"]
    with (
        Subscription(published, None, DEADLINE_S, ward.identity("bed")) as subscription,
        ward.client("bed") as client,
    ):
        for name in ("bed-8", "bed-7"):  # in this order: what is forbidden would come first
            stream = client.open(name, "tiny", rate_hz=100.0, unit="mV")
            stream.send(SIGNAL)
            stream.flush()
        heard: list[m.Message] = []
        while len(heard) < 10:
            heard += subscription.results(DEADLINE_S)
        assert {one.stream for one in heard if isinstance(one, m.Scores)} == {"bed-7"}


def test_a_key_that_is_revoked_ends_its_connections(ward: Ward) -> None:
    with ward.client("leaver") as client:
        client.open("s", "tiny", rate_hz=100.0, unit="mV")
        result = CliRunner().invoke(
            app, ["keys", "revoke", "leaver", "--file", str(ward.folder / "keys.toml")]
        )
        assert result.exit_code == 0
        client.timeout_s = 5.0  # more than the server takes to see it, and than two pings
        with pytest.raises(Disconnected):
            client.wait(lambda: False)
    with pytest.raises(Disconnected, match="does not let this key in"):
        ward.client("leaver")


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    """Start a server that is expected to refuse."""
    return subprocess.run(
        [sys.executable, "-m", "engine", "serve", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )


def test_no_address_beyond_loopback_without_keys(tiny_path: Path) -> None:
    done = serve("--model", str(tiny_path), "--bind", "tcp://0.0.0.0:0", "--publish", ANYWHERE)
    assert done.returncode == 1
    assert "expected security.key and security.keys" in done.stderr


def test_a_secret_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    secret = make(tmp_path, "me")
    assert secret.stat().st_mode & 0o777 == 0o600
    os.chmod(secret, 0o640)
    with pytest.raises(ConfigError, match="expected mode 0600, found 0640"):
        keys.pair(secret)


def test_the_file_of_keys_has_no_secrets(tmp_path: Path) -> None:
    pair = keys.pair(make(tmp_path, "me", "--publish", "*"))
    text = (tmp_path / "keys.toml").read_text()
    assert pair.public.decode() in text
    assert pair.secret.decode() not in text


def account(**bounds: float) -> rights.Account:
    return rights.Account("me", rights.Key(public="0" * 40, publish=("*",), **bounds))


@pytest.mark.parametrize(
    ("bounds", "code", "reason"),
    [
        ({"max_streams": 2}, "full", "max_streams of this key is 2"),
        ({"max_bodies_per_s": 1.0}, "over_rate", "max_bodies_per_s of this key is 1"),
    ],
)
def test_a_bound_of_a_key_is_named_by_the_error_that_it_makes(
    tiny_path: Path, bounds: dict[str, float], code: str, reason: str
) -> None:
    driven, mine, peer = Driven(tiny_path), account(**bounds), b"sixteen random b"
    driven.engine.receive(peer, m.body([m.encode(m.Hello(m.VERSION))]), driven.now, mine)
    for number in range(4):
        body = m.body([m.encode(m.Open(f"s{number}", "tiny", 100.0, "mV"))])
        driven.engine.receive(peer, body, driven.now, mine)
    error = next(one for one in driven.told(peer.decode(), m.Error))
    assert (error.code, reason in error.reason) == (code, True)
    assert len(driven.told(peer.decode(), m.Opened)) < 4


def test_a_key_has_no_more_connections_than_it_may(tiny_path: Path) -> None:
    driven, mine = Driven(tiny_path), account(max_peers=1)
    hello = m.body([m.encode(m.Hello(m.VERSION))])
    assert driven.engine.receive(b"sixteen random 1", hello, driven.now, mine)
    assert not driven.engine.receive(b"sixteen random 2", hello, driven.now, mine)
    assert len(driven.engine.peers) == 1


def test_no_log_says_whose_signals_they_are(
    tiny_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    driven = Driven(tiny_path)
    with caplog.at_level(logging.DEBUG):
        driven.open("a", "s", subject="miller-1951", life=5)
        driven.say("a", m.Chunk("s", 0, 0, b"\0" * 40), m.Close("s"))
        driven.run()
        driven.open("a", "t", subject="miller-1951")
        driven.say("a", m.Chunk("t", 0, 0, np.float32([np.nan]).tobytes()))
        driven.engine.drop(b"a", "gone")
    assert "stream s opened" in caplog.text
    assert "miller" not in caplog.text


@pytest.mark.parametrize(
    ("name", "reason"), [("tiny", "expected 00"), ("tinny", r"expected one of the models ['tiny']")]
)
def test_a_model_file_other_than_the_configured_one_is_not_served(
    tmp_path: Path, tiny_path: Path, name: str, reason: str
) -> None:
    config = tmp_path / "engine.toml"
    config.write_text(f'sha256 = {{ {name} = "{"0" * 64}" }}\n')
    done = serve(str(config), "--model", str(tiny_path), "--bind", ANYWHERE, "--publish", ANYWHERE)
    assert done.returncode == 1
    assert reason in done.stderr


def test_a_model_file_reads_no_other_file(tmp_path: Path) -> None:
    """ONNX may say that a tensor lies in a file beside it; that file could be any."""
    path = tiny.write(tmp_path, tiny.spec(), "LSTM")
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    (tmp_path / "secret").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret")
    onnx.save(model, path)
    with pytest.raises(ModelFileError):
        model_file.load(path)


def test_nothing_that_comes_in_is_run() -> None:
    """No module of the engine can make an object of bytes but by a schema."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
    called = set()
    for file in (ROOT / "engine").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                called |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                called.add((node.module or "").split(".")[0])
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called |= {node.func.id} & {"eval", "exec", "__import__"}
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                called |= set() if ast.unparse(node.value) == "False" else {"pickle"}
    assert called & (forbidden | {"eval", "exec", "__import__"}) == set()
