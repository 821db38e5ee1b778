"""What is said into a microphone is read as it is said, and a missing one is told."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from rich.console import Console

from engine import messages as m
from engine import mic
from engine.errors import MurmurError
from engine.mic import Microphone
from tests.conftest import Clock
from tests.tones import ToneServer, say, tone_server, write_model

ROOT = Path(__file__).parent.parent
RATE_HZ = 16_000.0


class Library:
    """PortAudio with the devices that a test names, and blocks that it hands over."""

    class PortAudioError(Exception):
        """As sounddevice's."""

    def __init__(self, *channels: int, mono: bool = True) -> None:
        self.channels, self.mono = channels, mono
        self.default = SimpleNamespace(device=(0 if channels else -1, -1))
        self.opened: dict[str, Any] = {}

    def query_devices(self, device: int | str | None = None, kind: str = "") -> Any:
        rows = [
            {
                "index": index,
                "name": f"mic {index}",
                "max_input_channels": channels,
                "default_samplerate": RATE_HZ,
            }
            for index, channels in enumerate(self.channels)
        ]
        if not kind:
            return rows
        if device is None and rows:
            return rows[0]
        if device in range(len(rows)):
            return rows[device]  # type: ignore[call-overload]
        raise (self.PortAudioError if device is None else ValueError)("no such device")

    def InputStream(self, **options: Any) -> Any:
        if options["channels"] == 1 and not self.mono:
            raise self.PortAudioError("Invalid number of channels")
        self.opened = options
        return SimpleNamespace(start=lambda: None, close=lambda: None)


@pytest.fixture
def microphone(monkeypatch: pytest.MonkeyPatch) -> Microphone:
    monkeypatch.setattr(mic, "_sounddevice", lambda: Library(1))
    return Microphone()


def hand(
    microphone: Microphone, samples: NDArray[np.float32], at_s: float, overflow: bool = False
) -> None:
    times = SimpleNamespace(inputBufferAdcTime=at_s)
    microphone.heard(
        samples[:, None], len(samples), times, SimpleNamespace(input_overflow=overflow)
    )


def ramp(start: int, count: int) -> NDArray[np.float32]:
    return (np.arange(start, start + count) / 1e5).astype(np.float32)


def test_blocks_come_in_order_and_joined(microphone: Microphone) -> None:
    for k in range(5):
        hand(microphone, ramp(100 * k, 100), k * 100 / RATE_HZ)
    (block,) = microphone.take()
    assert block.lost == 0
    np.testing.assert_allclose(block.samples, ramp(0, 500))
    assert list(microphone.take()) == []


def test_an_overflow_is_a_gap_as_long_as_the_device_s_clock_says(microphone: Microphone) -> None:
    hand(microphone, ramp(0, 160), 5.0)
    hand(microphone, ramp(0, 160), 5.01 + 0.25, overflow=True)
    hand(microphone, ramp(160, 160), 5.02 + 0.25)
    blocks = list(microphone.take())
    assert [(block.lost, len(block.samples)) for block in blocks] == [(0, 160), (4000, 320)]
    assert (microphone.overflows, microphone.lost_samples) == (1, 4000)


def test_what_the_server_cannot_take_in_time_is_a_gap_of_its_length(microphone: Microphone) -> None:
    second = round(RATE_HZ)
    for k in range(14):  # ten of which may wait
        hand(microphone, ramp(0, second), float(k))
    (block,) = microphone.take()
    assert len(block.samples) == 10 * second
    hand(microphone, ramp(0, second), 14.0)
    (block,) = microphone.take()
    assert (block.lost, len(block.samples)) == (4 * second, second)
    assert (microphone.overflows, microphone.lost_samples) == (1, 4 * second)


def test_a_device_that_has_only_stereo_is_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(2, mono=False)
    monkeypatch.setattr(mic, "_sounddevice", lambda: library)
    microphone = Microphone(0)
    assert library.opened["channels"] == 2
    sound = np.stack([ramp(0, 50), ramp(100, 50)], axis=1)
    microphone.heard(
        sound, 50, SimpleNamespace(inputBufferAdcTime=0.0), SimpleNamespace(input_overflow=False)
    )
    np.testing.assert_allclose(next(microphone.take()).samples, ramp(50, 50), rtol=1e-6)


def test_a_device_that_is_gone_is_told(
    microphone: Microphone, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(mic.time, "monotonic", clock)
    with microphone:
        clock.now += 6.0
        with pytest.raises(MurmurError, match=r"mic 0: no sound for 5 s"):
            list(microphone.take())


@pytest.mark.parametrize(
    ("channels", "device", "said"),
    [
        ((), None, "expected a microphone, found none: PortAudio sees no input device"),
        ((0,), "desk", "expected an input device 'desk', found none"),
        ((2, 1), "desk", "expected an input device 'desk', found\n*   0  mic 0  (2 channels"),
        ((2, 1), 7, "expected an input device 7, found\n"),
    ],
)
def test_a_missing_microphone_is_told_with_those_that_are_there(
    monkeypatch: pytest.MonkeyPatch, channels: tuple[int, ...], device: Any, said: str
) -> None:
    monkeypatch.setattr(mic, "_sounddevice", lambda: Library(*channels))
    with pytest.raises(MurmurError) as caught:
        Microphone(device)
    assert said in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(MurmurError, match=r"pip install 'murmur-engine\[mic\]'"):
        mic.devices()


def test_a_missing_portaudio_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: str) -> None:
        raise OSError("PortAudio library not found")

    monkeypatch.setattr(mic, "import_module", gone)
    with pytest.raises(MurmurError, match="apt install libportaudio2"):
        mic.devices()


def test_the_meter_rises_with_the_sound_and_says_when_it_is_clipped() -> None:
    meter = mic.Meter()
    levels = []
    for loud in (0.0, 0.01, 0.1, 0.9):
        meter.take(np.full(100, loud, np.float32), 0.0)
        levels.append(meter.text(0.0).plain.count("\u2588"))
    assert levels == sorted(set(levels))
    assert "CLIPPED" not in meter.text(0.0).plain
    meter.take(np.full(100, -1.0, np.float32), 10.0)
    assert "CLIPPED" in meter.text(10.5).plain
    assert "CLIPPED" not in meter.text(11.5).plain
    assert meter.clipped == 100


def partial(text: str) -> m.Partial:
    return m.Partial("s", 0, text, 0, 0)


def final(text: str) -> m.Final:
    return m.Final("s", 0, text, 0, 0, 0, "silence", ())


def test_on_a_terminal_partials_are_grey_and_finals_stay() -> None:
    text = io.StringIO()
    console = Console(file=text, width=40, force_terminal=True, color_system="standard")
    with mic.Screen(console) as screen:
        screen.take(partial("hello wor"))
        screen.move(mic.Meter().text(0.0))
        assert "\x1b[90m  hello wor" in text.getvalue()  # bright black
        screen.take(final("Hello, world."))
        screen.take(m.Gap("s", 5, 9, "reset"))
        screen.move(mic.Meter().text(0.0))
        shown = text.getvalue()
        assert "Hello, world.\n" in shown
        assert "[4 samples from 5 were lost]" in shown
        assert "hello wor" not in shown[shown.index("Hello, world.") :]
        screen.take(partial("word " * 100))
        screen.move(mic.Meter().text(0.0))
    assert "\u2026" in text.getvalue()


def test_elsewhere_finals_are_lines_and_json_has_all() -> None:
    told: list[str] = []
    for as_json in (False, True):
        lines = mic.Lines(told.append, as_json)
        for message in (partial("one"), final("One."), final("")):
            lines.take(message)
    assert told[0] == "One."
    assert [json.loads(line)["type"] for line in told[1:]] == ["partial", "final", "final"]


# --- through a virtual sound device ----------------------------------------------------------


@pytest.fixture(scope="module")
def sound_card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """PulseAudio with one sink, whose monitor is the default microphone: its environment."""
    for program in ("pulseaudio", "pactl", "paplay"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}: apt install pulseaudio pulseaudio-utils")
    pytest.importorskip("sounddevice", exc_type=OSError, reason="needs PortAudio: libportaudio2")
    if not any(Path("/usr").glob("lib/*/alsa-lib/libasound_module_pcm_pulse.so")):
        pytest.skip("needs ALSA's plug-in for PulseAudio: apt install libasound2-plugins")
    folder = tmp_path_factory.mktemp("pulse")
    (folder / "asound.conf").write_text(
        "</usr/share/alsa/alsa.conf>\npcm.!default { type pulse }\nctl.!default { type pulse }\n"
    )
    places = ("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "PULSE_RUNTIME_PATH")
    environment = os.environ | dict.fromkeys(places, str(folder))
    environment |= {
        "PULSE_SERVER": f"unix:{folder}/native",
        "PULSE_SOURCE": "vmic.monitor",
        "ALSA_CONFIG_PATH": str(folder / "asound.conf"),
    }
    command = ["pulseaudio", "-n", "--daemonize=no", "--use-pid-file=no", "--exit-idle-time=-1"]
    command += [f"--load=module-native-protocol-unix socket={folder}/native auth-anonymous=1"]
    command += ["--load=module-null-sink sink_name=vmic rate=48000"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            _wait_for_sink(process, environment, folder / "log")
            yield environment
        finally:
            process.terminate()
            process.wait(10)


def _wait_for_sink(
    process: subprocess.Popen[bytes], environment: dict[str, str], log: Path
) -> None:
    give_up = time.monotonic() + 10
    asking = ["pactl", "list", "short", "sinks"]
    while time.monotonic() < give_up:
        if process.poll() is not None:
            pytest.skip(f"PulseAudio does not run here: {log.read_text()[-300:]}")
        done = subprocess.run(asking, env=environment, capture_output=True, text=True, check=False)
        if "vmic" in done.stdout:
            return
    pytest.skip("PulseAudio has no sink after 10 s")


@pytest.fixture(scope="module")
def tones() -> Iterator[ToneServer]:
    with tone_server() as server:
        yield server


class Speaking:
    """``murmur mic`` in a process of its own, and what is played to it."""

    def __init__(self, environment: dict[str, str], *options: str) -> None:
        self._environment = environment
        command = [sys.executable, "-m", "engine", "mic", *options]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"PYTHONWARNINGS": "error"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        assert self.process.stderr is not None
        self.ready = self.process.stderr.readline()

    def play(self, path: Path) -> None:
        subprocess.run(
            ["paplay", "--device=vmic", str(path)], env=self._environment, check=True, timeout=30
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def interrupt(self) -> tuple[list[str], str, int]:
        """Press Ctrl-C: a terminal tells all processes of the group."""
        os.killpg(self.process.pid, signal.SIGINT)
        out, error = self.process.communicate(timeout=30)
        return out.splitlines(), error, self.process.returncode


def test_what_is_said_is_read_and_ctrl_c_brings_the_last_words(
    sound_card: dict[str, str], tones: ToneServer, tmp_path: Path
) -> None:
    path = tmp_path / "said.wav"
    soundfile.write(path, say("one", "two", "-", "three", "four"), 16_000)
    speaking = Speaking(sound_card, "--connect", tones.address)
    assert speaking.ready.startswith("listening to ")
    speaking.play(path)
    assert speaking.line() == "One two."
    # The second utterance's silence has not been long enough: only the flush ends it.
    assert speaking.interrupt() == (["Three four."], "", 0)


def test_json_tells_each_result_and_sums_up(
    sound_card: dict[str, str], tones: ToneServer, tmp_path: Path
) -> None:
    path = tmp_path / "said.wav"
    soundfile.write(path, say("zero", "three", "-", "-"), 16_000)
    speaking = Speaking(
        sound_card, "--connect", tones.address, "--json", "--stream", "desk", "--model", "words"
    )
    speaking.play(path)
    told = [json.loads(speaking.line())]
    while told[-1]["type"] != "final":
        told.append(json.loads(speaking.line()))
    texts = [one["text"] for one in told]
    # The virtual card has been seen to play a stretch twice: what comes then is not our doing.
    assert texts[:2] == ["zero", "zero three"]
    assert texts[-1].startswith("Zero three")
    assert {one["stream"] for one in told} == {"desk"}
    assert tones.opened[-1].model == "words"
    rest, error, code = speaking.interrupt()
    assert (error, code) == ("", 0)
    report = json.loads(rest[-1])
    words = len(texts[-1].split())
    assert (report["finals"], report["words"], report["lost_samples"]) == (1, words, 0)
    assert report["rate_hz"] == tones.opened[-1].rate_hz
    assert report["seconds"] >= 3.0
    assert 0 <= report["figure"] < 1.0


def test_its_own_server_outlives_ctrl_c_until_the_last_words_are_in(
    sound_card: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "said.wav"
    soundfile.write(path, say("two", "-", "zero", "four"), 16_000)
    speaking = Speaking(sound_card, "--model", str(write_model(tmp_path)))
    assert speaking.ready.startswith("listening to ")
    speaking.play(path)
    assert speaking.line() == "two"
    assert speaking.interrupt() == (["zero four"], "", 0)


def test_the_devices_are_listed(sound_card: dict[str, str]) -> None:
    command = [sys.executable, "-m", "engine", "mic", "--list"]
    done = subprocess.run(
        command, cwd=ROOT, env=sound_card, capture_output=True, text=True, timeout=30, check=True
    )
    assert any(line.startswith("*") and "default" in line for line in done.stdout.splitlines())


def test_no_device_at_all_ends_with_its_reason(
    sound_card: dict[str, str], tones: ToneServer
) -> None:
    """Without a sound server, on a machine that has no card."""
    cards = Path("/proc/asound/cards")
    if cards.exists() and "no soundcards" not in cards.read_text():
        pytest.skip("needs a machine without a sound card")
    bare = sound_card | {"PULSE_SERVER": "unix:/nowhere"}
    del bare["ALSA_CONFIG_PATH"]
    command = [sys.executable, "-m", "engine", "mic", "--connect", tones.address]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=bare,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert "expected a microphone, found none" in done.stderr
    assert "Traceback" not in done.stderr
