"""Recordings reach the server whole, in parallel, at their pace, and each gets its own text."""

import math
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from engine import child
from engine.client import Client
from engine.dictation import Plan, Take, Unheard, dictate
from engine.errors import MurmurError, Refused
from engine.messages import Partial, Speech
from tests.tones import PITCH, ToneServer, say, tone_server


@pytest.fixture(scope="module")
def tones() -> Iterator[ToneServer]:
    with tone_server() as server:
        yield server


@pytest.fixture
def client(tones: ToneServer) -> Iterator[Client]:
    with Client(tones.address) as made:
        yield made


def write(folder: Path, name: str, *words: str, rate_hz: int = 16_000) -> Path:
    path = folder / name
    soundfile.write(path, say(*words, rate_hz=rate_hz), rate_hz)
    return path


def takes(client: Client, paths: list[Path], plan: Plan) -> dict[str, Take]:
    heard = list(dictate(client, paths, plan))
    assert all(isinstance(one, Take) for one in heard)
    return {one.path.name: one for one in heard if isinstance(one, Take)}


@pytest.mark.parametrize("streams", [1, 3, 40])
def test_each_recording_gets_its_own_text(client: Client, tmp_path: Path, streams: int) -> None:
    rng = np.random.default_rng(streams)
    rates = [8000, 16_000, 44_100]
    said = {
        f"{number}.wav": rng.choice(list(PITCH), rng.integers(1, 12)).tolist()
        for number in range(12)
    }
    paths = [
        write(tmp_path, name, *words, rate_hz=rates[k % 3])
        for k, (name, words) in enumerate(said.items())
    ]
    heard = takes(client, paths, Plan(streams=streams))
    texts = {name: take.text.lower().rstrip(".").split() for name, take in heard.items()}
    assert texts == said
    assert all(not take.faults for take in heard.values())


def test_so_many_are_under_way_at_once_and_no_more(tmp_path: Path) -> None:
    paths = [write(tmp_path, f"{k}.wav", "one") for k in range(7)]
    with tone_server() as tones, Client(tones.address) as client:
        takes(client, paths, Plan(streams=3))
        assert (tones.most_open, len(tones.opened)) == (3, 7)


def test_a_server_that_is_full_is_given_what_it_takes(tmp_path: Path) -> None:
    paths = [write(tmp_path, f"{k}.wav", "two") for k in range(5)]
    with tone_server(most=2) as tones, Client(tones.address) as client:
        heard = takes(client, paths, Plan(streams=4))
        assert {take.text for take in heard.values()} == {"Two."}
        assert tones.most_open == 2
    with (
        tone_server(most=0) as tones,
        Client(tones.address) as client,
        pytest.raises(Refused, match="max_streams is 0"),
    ):
        list(dictate(client, paths, Plan(streams=4)))


def test_a_pace_sends_each_chunk_when_its_last_sample_is_spoken(
    client: Client, tmp_path: Path
) -> None:
    path = write(tmp_path, "a.wav", "one", "two")  # of 1 s
    plan = Plan(pace=2.0, chunk_s=0.1, silence_s=0.25)
    begin = time.monotonic()
    take = takes(client, [path], plan)["a.wav"]
    assert time.monotonic() - begin >= 1.25 / 2.0
    assert [index for index, _ in take.sent] == [*range(1600, 17_000, 1600), 17_600, 19_200, 20_000]
    for index, at in take.sent:
        late_s = at - (take.begin + index / 16_000 / 2.0)
        assert 0 <= late_s < 0.1
    assert take.seconds == pytest.approx(1.0)
    assert take.flushed_at >= take.sent[-1][1]


def test_without_a_pace_minutes_need_not_be_waited_for(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    soundfile.write(path, np.zeros(8000 * 300, np.int16), 8000)
    begin = time.monotonic()
    take = takes(client, [path], Plan())["long.flac"]
    assert time.monotonic() - begin < 30
    assert (take.seconds, take.text, take.faults) == (300.0, "", [])


def test_results_have_the_time_at_which_they_came(client: Client, tmp_path: Path) -> None:
    path = write(tmp_path, "a.wav", "one", "two", "three")
    take = takes(client, [path], Plan(pace=4.0, chunk_s=0.05))["a.wav"]
    times = [at for at, message in take.told if isinstance(message, Partial)]
    assert len(times) == 3
    assert all(earlier < later for earlier, later in pairwise(times))
    # A tone ends at 0.4, 0.9, 1.4 s, which the frame after it shows.
    for end_s, at in zip((0.4, 0.9, 1.4), times, strict=True):
        assert at - take.begin == pytest.approx((end_s + 0.05) / 4.0, abs=0.06)


def test_what_a_stream_asks_for_is_asked_for(
    client: Client, tones: ToneServer, tmp_path: Path
) -> None:
    path = write(tmp_path, "a.wav", "one", "-", "two")
    speech = Speech(partials=False, silence_s=0.3)
    take = takes(client, [path], Plan(speech=speech, model="words"))["a.wav"]
    assert (tones.opened[-1].speech, tones.opened[-1].model) == (speech, "words")
    assert [final.reason for final in take.finals] == ["silence", "flush"]
    assert not any(isinstance(message, Partial) for _, message in take.told)


def test_what_is_no_sound_does_not_keep_the_others_from_theirs(
    client: Client, tmp_path: Path
) -> None:
    good = write(tmp_path, "good.wav", "four")
    empty, text = tmp_path / "empty.wav", tmp_path / "text.wav"
    empty.touch()
    text.write_text("no sound")
    heard = {one.path.name: one for one in dictate(client, [empty, text, good], Plan())}
    one = heard["good.wav"]
    assert isinstance(one, Take)
    assert one.text == "Four."
    for name, said in (("empty.wav", "is empty"), ("text.wav", "expected WAV")):
        unheard = heard[name]
        assert isinstance(unheard, Unheard)
        assert said in unheard.reason


def test_a_damaged_file_gives_the_text_before_the_damage(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "cut.flac"
    noise = np.random.default_rng(0).normal(0, 1e-3, 80_000).astype(np.float32)
    soundfile.write(path, np.concatenate([say("one", "two"), noise]), 16_000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 20_000])
    take = takes(client, [path], Plan())["cut.flac"]
    assert take.text == "One two."
    (fault,) = take.faults
    assert "cut.flac: after" in fault


def test_a_server_that_does_not_start_says_why() -> None:
    with (
        pytest.raises(MurmurError, match=r"nosuch: expected a \.onnx or \.toml file"),
        child.running("nosuch"),
    ):
        pass


def test_a_server_that_is_named_is_not_started() -> None:
    with child.running("nosuch", "tcp://127.0.0.1:9") as (address, process):
        assert (address, process) == ("tcp://127.0.0.1:9", None)


def test_seconds_that_are_through_are_counted(client: Client, tmp_path: Path) -> None:
    paths = [write(tmp_path, f"{k}.wav", "one", "two") for k in range(2)]
    seen: list[float] = []
    list(dictate(client, paths, Plan(streams=2), lambda t: seen.append(sum(x.done_s for x in t))))
    assert max(seen) == pytest.approx(2.0)
    assert not math.isnan(seen[0])
