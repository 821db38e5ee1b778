"""Alerts through the loop and through a real server: told, asked for, written, kept."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import audit, rules
from engine import messages as m
from engine.alerts import Alerts
from engine.client import Client
from engine.errors import Refused
from engine.loop import Engine
from engine.watch import Subscription
from tests import tiny
from tests.drive import Driven, chunks

# The model says how loud the loudest sample of each 0.1 s is.
RULES = """
[[rule]]
name = "loud"
raise = "scores.voice >= 0.5"
clear = "scores.voice < 0.2"
for_s = 0.3
priority = "high"
"""
HOP_S = 0.1


def sound(*seconds: float) -> np.ndarray:
    """Return a second of each loudness."""
    return np.repeat(np.array(seconds, np.float32), int(tiny.RATE_HZ))


class Ward(Driven):
    """An engine of the detector with these rules, and the bodies that it published."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, credit_s=60.0)
        self.engine._alerts = Alerts(rules.parse(RULES))
        self.open("a", "bed-7", "detector", unit="1", subject="p-17")

    def hear(self, signal: np.ndarray, seq: int = 0, index: int = 0) -> list[tuple[str, str]]:
        before = len(self.told("a", m.Alert))
        self.say("a", *chunks("bed-7", signal, seq=seq, index=index))
        self.run()
        return [(one.from_state, one.state) for one in self.told("a", m.Alert)[before:]]

    def published(self, kind: type[m.Message]) -> list[tuple[str, Any]]:
        """Return (topic, message) of one kind, since the last call."""
        told = [
            (topic.decode(), message)
            for topic, body in self.engine.published
            for message in m.decode_replies(body)
            if isinstance(message, kind)
        ]
        self.engine.published.clear()
        return told


def test_scores_raise_an_alert_that_says_of_whom_and_by_which_model(detector: Path) -> None:
    ward = Ward(detector)
    assert ward.hear(sound(0, 1)) == [("inactive", "pending"), ("pending", "active")]
    active = ward.told("a", m.Alert)[-1]
    assert (active.subject, active.stream, active.model) == ("p-17", "bed-7", "detector")
    assert active.sha256 == ward.told("a", m.Opened)[0].sha256
    assert (active.onset, active.index) == (110, 140)  # the first loud hop ends at 110
    topics = [topic for topic, _ in ward.published(m.Alert)]
    assert topics == ["alert/bed-7"] * 2


@pytest.mark.parametrize("size", [1, 7, 100, 150])
def test_alerts_do_not_hang_on_how_the_signal_was_cut(detector: Path, size: int) -> None:
    signal = sound(0, 1, 0.3, 0, 1, 1, 0)
    whole, cut = Ward(detector), Ward(detector)
    whole.hear(signal[:150])
    whole.hear(signal[150:], 1, 150)
    for seq, start in enumerate(range(0, len(signal), size)):
        cut.hear(signal[start : start + size], seq, start)
    assert cut.told("a", m.Alert) == whole.told("a", m.Alert)
    assert len(whole.told("a", m.Alert)) == 5


def test_an_alert_is_acknowledged_on_any_connection_and_its_client_learns_who_did(
    detector: Path,
) -> None:
    ward = Ward(detector)
    ward.hear(sound(1))
    ward.say("desk", m.Acknowledge("p-17", "loud", "nurse-3", 7))
    (answer,) = ward.told("desk", m.AlertList)
    assert answer.id == 7
    assert [(one.rule, one.state, one.acknowledged_by) for one in answer.subjects[0].alerts] == [
        ("loud", "acknowledged", "nurse-3")
    ]
    told = ward.told("a", m.Alert)[-1]
    assert (told.state, told.actor) == ("acknowledged", "nurse-3")


@pytest.mark.parametrize(
    "request_",
    [
        m.Acknowledge("p-17", "loud", "me"),
        m.Acknowledge("p-18", "", "me"),
        m.PauseAlerts("p-18", "", 5.0, "me"),
        m.PauseAlerts("p-17", "quiet", 5.0, "me"),
        m.ResumeAlerts("p-17", "", "me"),
    ],
)
def test_what_is_not_there_is_refused(detector: Path, request_: m.Message) -> None:
    ward = Ward(detector)
    ward.say("desk", request_)
    assert [error.code for error in ward.told("desk", m.Error)] == ["unknown_alert"]


def test_a_pause_is_told_and_ends_with_the_signal(detector: Path) -> None:
    ward = Ward(detector)
    ward.hear(sound(1))
    ward.say("desk", m.PauseAlerts("p-17", "", 1.0, "me", id=2))
    paused = ward.told("desk", m.AlertList)[0].subjects[0].alerts[0]
    assert (paused.state, paused.until_s) == ("paused", 1.0)
    assert ward.hear(sound(1, 1), 1, 100) == [("active", "paused"), ("paused", "active")][1:]


def test_who_comes_late_is_told_what_is_active_and_that_it_is_over(detector: Path) -> None:
    ward = Ward(detector)
    ward.hear(sound(1))
    ward.published(m.Alert)
    ward.engine.tick(ward.now)
    ((topic, active),) = ward.published(m.ActiveAlerts)
    assert topic == "activealerts/p-17"
    assert [(one.rule, one.state, one.onset) for one in active.alerts] == [("loud", "active", 10)]
    ward.engine.tick(ward.now + 4.9)
    assert ward.published(m.ActiveAlerts) == []
    ward.engine.tick(ward.now + 5.0)
    assert len(ward.published(m.ActiveAlerts)) == 1
    ward.say("desk", m.Acknowledge("p-17", "", "me"))
    ward.hear(sound(0), 1, 100)
    ward.engine.tick(ward.now + 10.0)
    assert [active.alerts for _, active in ward.published(m.ActiveAlerts)] == [()]
    ward.engine.tick(ward.now + 15.0)
    assert ward.published(m.ActiveAlerts) == []


def watched() -> Alerts:
    """The rules above, beside those of missing data that come along."""
    bundled = rules.BUNDLED.read_text()
    parts = [part for part in bundled.split("[[rule]]") if "silence_s" in part or "_lost" in part]
    return Alerts(rules.parse(RULES + "".join(f"[[rule]]{part}" for part in parts)))


def test_a_stream_that_falls_silent_cannot_be_monitored_until_it_is_heard(detector: Path) -> None:
    ward = Ward(detector)
    ward.engine._alerts = watched()
    ward.open("a", "bed-7", "detector", unit="1", subject="p-17")
    ward.hear(sound(1))
    ward.engine.tick(ward.now + 10.5)  # the next chunk was due after a second
    assert [one.rule for one in ward.told("a", m.Alert)][2:] == []
    ward.engine.tick(ward.now + 11.5)
    silent = ward.told("a", m.Alert)[-1]
    assert (silent.rule, silent.state, silent.kind) == ("no_data", "active", "technical")
    assert silent.cannot_monitor == ("loud",)
    assert ward.hear(sound(1), 1, 100) == [("active", "resolved")]
    ward.say("desk", m.ListAlerts())
    (subject,) = ward.told("desk", m.AlertList)[0].subjects
    assert [one.rule for one in subject.alerts] == ["loud"]


def test_a_stream_whose_sender_is_gone_is_said_to_be_and_a_closed_one_is_over(
    detector: Path,
) -> None:
    ward = Ward(detector)
    ward.engine._alerts = watched()
    ward.open("a", "bed-7", "detector", unit="1", subject="p-17")
    ward.hear(sound(1))
    ward.published(m.Alert)
    ward.engine.drop(b"a", "gone")
    ((topic, lost),) = ward.published(m.Alert)
    assert (topic, lost.rule, lost.state) == ("alert/bed-7", "stream_lost", "active")
    ward.open("b", "bed-7", "detector", unit="1", subject="p-17")
    ward.say("b", *chunks("bed-7", sound(1)), m.Close("bed-7"))
    ward.run()
    assert [(one.rule, one.state) for one in ward.told("b", m.Alert)] == [
        ("stream_lost", "resolved"),
        ("loud", "inactive"),
    ]
    assert isinstance(ward.heard("b")[-1], m.Closed)


def test_alerts_survive_a_restart_and_nothing_is_told_twice(detector: Path, tmp_path: Path) -> None:
    def start() -> tuple[Ward, audit.Audit]:
        ward = Ward(detector)
        log = audit.Audit(tmp_path / "audit.db")
        served = [(ward.engine._models["detector"], ward.runtimes[0])]
        ward.engine = Engine(
            served,
            ward.engine.limits,
            ward.metrics,
            clock=lambda: ward.now,
            alerts=Alerts(rules.parse(RULES)),
            audit=log,
        )
        ward._heard.clear()
        ward.open("a", "bed-7", "detector", unit="1", subject="p-17")
        return ward, log

    first, log = start()
    assert first.hear(sound(1, 0))[-1] == ("active", "latched")
    log.close()
    second, log = start()
    second.say("desk", m.ListAlerts("p-17"))
    (active,) = second.told("desk", m.AlertList)[0].subjects[0].alerts
    assert (active.rule, active.state, active.onset) == ("loud", "latched", 10)
    assert second.hear(sound(0), 0, 200) == []
    second.say("desk", m.Acknowledge("p-17", "loud", "nurse-3"))
    log.close()
    found = [(line["from_state"], line["to_state"], line["actor"]) for line in audit.lines(
        tmp_path / "audit.db"
    )]  # fmt: skip
    assert found == [
        ("inactive", "pending", ""),
        ("pending", "active", ""),
        ("active", "latched", ""),
        ("latched", "resolved", "nurse-3"),
    ]


def test_the_same_samples_write_the_same_lines_but_for_the_time_on_the_wall(
    detector: Path, tmp_path: Path
) -> None:
    written = []
    for number in range(2):
        path = tmp_path / f"{number}.db"
        ward = Ward(detector)
        ward.engine._audit = audit.Audit(path, wall=lambda number=number: 1e9 + number)
        ward.hear(sound(0, 1, 0, 1, 0.3, 0))
        ward.engine._audit.close()
        written.append([line | {"wall": ""} for line in audit.lines(path)])
    assert written[0] == written[1]
    assert len(written[0]) == 5


def murmur(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine", "alerts", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_commands_through_a_real_server_that_is_killed_and_comes_back(
    detector: Path, tmp_path: Path, serving: Callable[..., Any]
) -> None:
    (tmp_path / "rules.toml").write_text(RULES)
    config = tmp_path / "engine.toml"
    config.write_text(
        f'[alerts]\nrules = "{tmp_path / "rules.toml"}"\naudit = "{tmp_path / "audit.db"}"\n'
        "summary_s = 0.2\n"
    )
    server = serving(str(config), model=detector)
    with Client(server.address) as client:
        stream = client.open("bed-7", "detector", 100.0, "1", subject="p-17")
        stream.send(sound(0, 1))
        stream.flush()
        told = [one.state for one in client.events() if isinstance(one, m.Alert)]
        assert told == ["pending", "active"]
        done = murmur("ack", "p-17", "loud", "--by", "nurse-3", "--address", server.address)
        assert "loud acknowledged (high)" in done.stdout
        done = murmur("pause", "p-17", "--seconds", "600", "--by", "me", "--json",
                      "--address", server.address)  # fmt: skip
        (subject,) = json.loads(done.stdout)["subjects"]
        assert subject["alerts"][0]["state"] == "paused"
        done = murmur("pause", "p-17", "--seconds", "1e9", "--by", "me",
                      "--address", server.address)  # fmt: skip
        assert (done.returncode, "86400" in done.stderr) == (1, True)
        # The server is killed: what is written by then is kept.
        lines: list[Any] = []
        while len(lines) < 4:
            lines = list(audit.lines(tmp_path / "audit.db"))
        server.stop(signal.SIGKILL)
        server = serving(str(config), model=detector)
        done = murmur("list", "--json", "--address", server.address)
        (subject,) = json.loads(done.stdout)["subjects"]
        assert [(a["rule"], a["state"]) for a in subject["alerts"]] == [("loud", "paused")]
        done = murmur("resume", "p-17", "--by", "me", "--json", "--address", server.address)
        assert json.loads(done.stdout)["subjects"][0]["alerts"][0]["state"] == "acknowledged"
        with Subscription(server.endpoints["publish"], "p-17") as subscription:
            first = next(iter(subscription.results(10.0)))
            assert isinstance(first, m.ActiveAlerts)
            assert [one.acknowledged_by for one in first.alerts] == ["nurse-3"]
        done = murmur("ack", "p-18", "--by", "me", "--address", server.address)
        assert (done.returncode, done.stderr.count("unknown")) == (1, 0)
        assert "found none of 'p-18'" in done.stderr
    assert server.stop() == 0
    out = tmp_path / "audit.jsonl"
    done = murmur("export", str(tmp_path / "audit.db"), "--out", str(out), "--json")
    assert json.loads(done.stdout)["figure"] == 5
    exported = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["actor"] for line in exported] == ["", "", "nurse-3", "me", "me"]
    assert {line["subject"] for line in exported} == {"p-17"}


def test_a_client_asks_and_is_refused_with_a_reason(
    detector: Path, serving: Callable[..., Any]
) -> None:
    server = serving(model=detector)
    with Client(server.address) as client:
        assert client.ask(m.ListAlerts()).subjects == ()
        with pytest.raises(Refused, match="found none of 'p-1'"):
            client.ask(m.Acknowledge("p-1", "", "me"))
        assert client.ask(m.ListAlerts()).subjects == ()


def test_a_file_of_rules_is_checked_and_printed(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(RULES)
    done = murmur("rules", str(path), "--json")
    (rule,) = json.loads(done.stdout)["rules"]
    assert (rule["name"], rule["raise"], rule["for_s"]) == ("loud", "scores.voice >= 0.5", 0.3)
    path.write_text(RULES.replace("< 0.2", "< 0.7"))
    done = murmur("rules", str(path))
    assert done.returncode == 1
    assert "rule loud: expected raise and clear never to hold at once" in done.stderr
