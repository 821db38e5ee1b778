"""What was recorded comes back through the wfdb package: samples, gaps, beats, alerts."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine import messages as m
from engine.client import Client
from engine.recorder import Note, Record, Recorder, Signal
from tests.conftest import Server
from tests.drive import Driven, chunks
from tests.test_engine import deliver, noise

wfdb = pytest.importorskip("wfdb")
# wfdb 4.3.1 asks pandas for what pandas 3.1 calls old.
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")

RATE_HZ = 360.0
LOUD = 200_000.0  # MiB: never full


def opened(name: str = "bed-7", **fields: Any) -> m.Open:
    return m.Open(**({"stream": name, "model": "tiny", "rate_hz": RATE_HZ, "unit": "mV"} | fields))


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    one = Recorder(tmp_path / "records", LOUD, flush_s=60.0)
    yield one
    if one._thread.is_alive():
        one.stop()


def stem(folder: Path) -> str:
    (header,) = folder.glob("*.hea")
    return str(header.with_suffix(""))


def test_integers_come_back_as_they_were_sent(recorder: Recorder, tmp_path: Path) -> None:
    raw = np.random.default_rng(3).integers(-32767, 32768, (5000, 2))
    steps = [(0.005, 0.0), (0.0025, -5.12)]
    values = np.float32(raw * [0.005, 0.0025] + [0.0, -5.12])
    info = (m.Channel("MLII"), m.Channel("V5"))
    device = m.Device("Acme", "Holter 3", "0042")
    fields: dict[str, Any] = {"dtype": "i2", "channels": 2, "channel_info": info, "index": 700}
    take = recorder.open(
        opened(subject="k3v9x7q2", device=device, **fields), Signal("mV", steps), "tiny 0123"
    )
    for begin in range(0, 5000, 777):
        take(700 + begin, values[begin : begin + 777])
    recorder.stop()
    record = wfdb.rdrecord(stem(tmp_path / "records"), physical=False)
    np.testing.assert_array_equal(record.d_signal, raw)
    assert (record.fs, record.sig_len, record.fmt) == (RATE_HZ, 5000, ["16", "16"])
    assert (record.adc_gain, record.baseline) == ([200.0, 400.0], [0, 2048])
    assert (record.sig_name, record.units) == (["MLII", "V5"], ["mV", "mV"])
    assert record.init_value == raw[0].tolist()
    assert [each % 2**16 for each in record.checksum] == (raw.sum(axis=0) % 2**16).tolist()
    assert record.comments == [
        "stream bed-7, first sample 700, model tiny 0123",
        "subject k3v9x7q2",
        "device Acme Holter 3 0042",
        m.NOTICE,
    ]
    physical = wfdb.rdrecord(stem(tmp_path / "records")).p_signal
    np.testing.assert_allclose(physical, values, atol=1e-5)


def test_floats_come_back_within_half_of_the_step_that_the_header_states(
    recorder: Recorder, tmp_path: Path
) -> None:
    """An electrode's offset of 300 mV takes no room."""
    values = np.float32(300.0 + noise(4000, loud=4.0).clip(-30, 30))[:, None]
    take = recorder.open(opened(), Signal("mV", [(1.0, 0.0)]), "tiny")
    take(0, values)
    recorder.stop()
    record = wfdb.rdrecord(stem(tmp_path / "records"))
    assert record.adc_gain == [1000.0]
    assert np.abs(record.p_signal - values).max() <= 0.5 / 1000.0 + 2e-5  # float32 at 300


def test_samples_that_never_came_are_invalid_and_noted(recorder: Recorder, tmp_path: Path) -> None:
    take = recorder.open(opened(), Signal("mV", [(1.0, 0.0)]), "tiny")
    take(0, np.ones((100, 1), np.float32))
    recorder.note("bed-7", m.Bridged("bed-7", 100, 103))
    take(103, np.ones((97, 1), np.float32))
    recorder.note("bed-7", m.Gap("bed-7", 180, 70_200, "reset"))
    take(70_200, np.ones((50, 1), np.float32))
    recorder.stop()
    values = wfdb.rdrecord(stem(tmp_path / "records")).p_signal[:, 0]
    there = np.flatnonzero(np.isfinite(values))
    np.testing.assert_array_equal(there, [*range(100), *range(103, 200), *range(70_200, 70_250)])
    np.testing.assert_array_equal(values[there], 1.0)
    notes = wfdb.rdann(stem(tmp_path / "records"), "atr")
    assert notes.sample.tolist() == [100, 180]
    assert notes.aux_note == ["bridged 3 samples", "gap of 70020 samples, state: reset"]


def test_a_gap_of_more_than_an_hour_begins_another_record(
    recorder: Recorder, tmp_path: Path
) -> None:
    take = recorder.open(opened(), Signal("mV", [(1.0, 0.0)]), "tiny")
    take(0, np.ones((10, 1), np.float32))
    take(2**60, np.ones((20, 1), np.float32))
    recorder.stop()
    lengths = [wfdb.rdheader(str(p.with_suffix(""))).sig_len for p in tmp_path.glob("*/*.hea")]
    assert sorted(lengths) == [10, 20]


def test_values_beyond_sixteen_bits_are_cut_off_and_noted(
    recorder: Recorder, tmp_path: Path
) -> None:
    take = recorder.open(opened(), Signal("mV", [(1.0, 0.0)]), "tiny")
    take(0, np.array([[0], [1], [40], [-50]], np.float32))
    recorder.stop()
    values = wfdb.rdrecord(stem(tmp_path / "records")).p_signal[:, 0]
    np.testing.assert_allclose(values, [0, 1, 32.767, -32.767])
    assert wfdb.rdann(stem(tmp_path / "records"), "atr").aux_note == ["beyond what 16 bits hold"]


def test_beats_and_alerts_are_annotations_of_their_kind(recorder: Recorder, tmp_path: Path) -> None:
    take = recorder.open(opened(index=1000), Signal("mV", [(1.0, 0.0)]), "tiny")
    take(1000, np.zeros((2000, 1), np.float32))
    for k, label in enumerate("NSVFQ"):
        recorder.note("bed-7", m.Beat("bed-7", 1100 + 300 * k, 0.0, label, 1.0, 0, None))
    rule = "atrial_fibrillation_suspected"
    recorder.note("bed-7", m.Alert("bed-7", rule, "active", "medium", 1.0, 1.0, 1500, 0.0, 0))
    over = m.Alert("bed-7", rule, "resolved", "medium", 0.0, 1.0, 2400, 0.0, 0, from_state="active")
    recorder.note("bed-7", over)
    recorder.note("another", m.Beat("another", 1200, 0.0, "N", 1.0, 0, None))
    recorder.stop()
    found = wfdb.rdann(stem(tmp_path / "records"), "atr")
    said = list(zip(found.sample.tolist(), found.symbol, found.aux_note, strict=True))
    assert said == [
        (100, "N", ""),
        (400, "S", ""),
        (500, '"', f"alert {rule} active, medium priority"),
        (500, "+", "(AFIB"),
        (700, "V", ""),
        (1000, "F", ""),
        (1300, "Q", ""),
        (1400, '"', f"alert {rule} resolved, medium priority"),
        (1400, "+", "(U"),
    ]


@given(
    notes=st.lists(
        st.tuples(
            st.one_of(st.integers(1, 5000), st.integers(1, 2**31 - 1)),
            st.sampled_from([(1, "N"), (5, "V"), (22, '"'), (28, "+")]),
            st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40),
        ),
        max_size=20,
    )
)
def test_any_annotations_come_back_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, notes: list[tuple[int, tuple[int, str], str]]
) -> None:
    folder = tmp_path_factory.mktemp("notes")
    record = Record(folder, "r", opened(), Signal("mV", [(1.0, 0.0)]), 0, [])
    record.samples(0, np.zeros((10, 1), np.float32))
    for place, (code, _), text in notes:
        record.note(place, Note(code, text))
        record.flush()
    record.close()
    found = wfdb.rdann(str(folder / "r"), "atr")
    said = list(zip(found.sample.tolist(), found.symbol, found.aux_note, strict=True))
    expected = [(place, symbol, text) for place, (_, symbol), text in notes]
    assert said == sorted(expected, key=lambda each: each[0])


def test_what_was_flushed_can_be_read_while_the_record_goes_on(tmp_path: Path) -> None:
    record = Record(tmp_path, "r", opened(), Signal("mV", [(1.0, 0.0)]), 0, ["more"])
    signal_mv = np.float32(np.arange(20_000) % 500 / 1000)[:, None]
    for begin in range(0, 20_000, 4000):
        record.samples(begin, signal_mv[begin : begin + 4000])
        record.note(begin + 7, Note(1))
        record.flush()
        end = begin + 4000
        read = wfdb.rdrecord(str(tmp_path / "r"))
        np.testing.assert_allclose(read.p_signal, signal_mv[:end], atol=1e-6)
        # Those of the last ten seconds wait for others that lie before them.
        settled = [place for place in range(7, end, 4000) if place < end - 10 * RATE_HZ]
        if settled:
            assert wfdb.rdann(str(tmp_path / "r"), "atr").sample.tolist() == settled
    record.close()
    assert wfdb.rdann(str(tmp_path / "r"), "atr").sample.tolist() == list(range(7, 20_000, 4000))


def test_recording_ends_when_the_folder_is_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "old").write_bytes(bytes(2**19))
    recorder = Recorder(tmp_path, 1.0, flush_s=60.0)
    take = recorder.open(opened(), Signal("mV", [(1.0, 0.0)]), "tiny")
    for k in range(1000):
        take(1000 * k, np.zeros((1000, 1), np.float32))
    recorder.open(opened("late"), Signal("mV", [(1.0, 0.0)]), "tiny")
    recorder.stop()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1.01 * 2**20
    assert wfdb.rdheader(stem(tmp_path)).sig_len == 263_000
    assert caplog.text.count("record.max_mb") == 1


def test_a_disk_that_refuses_ends_recording_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "records"
    recorder = Recorder(folder, LOUD, flush_s=60.0)
    folder.rmdir()
    take = recorder.open(opened(), Signal("mV", [(1.0, 0.0)]), "tiny")
    take(0, np.zeros((10, 1), np.float32))
    take(10, np.zeros((10, 1), np.float32))
    recorder.stop()
    assert caplog.text.count("recording ends") == 1


def test_the_engine_records_what_hearts_send_and_what_it_finds(
    heart_path: Path, tiny_path: Path, tmp_path: Path
) -> None:
    recorder = Recorder(tmp_path, LOUD, flush_s=60.0)
    driven = Driven(heart_path, tiny_path, recorder=recorder, credit_s=30.0, bridge_s=0.05)
    driven.open("a", "scores", "tiny")
    driven.open("a", "bed:7", "tinyheart", index=50)
    sent = noise(2000, seed=4, loud=1.0)
    made = [
        *chunks("bed:7", sent[:800], (301,), 0, 50),
        *chunks("bed:7", sent[803:1200], (), 2, 853),
    ]
    made += chunks("bed:7", sent[1500:], (), 3, 1550)
    deliver(driven, "a", [made[0], made[2], made[1], *made[3:]])  # one of them is late
    driven.say("a", m.Flush("bed:7", 1), m.Close("bed:7"), *chunks("scores", sent[:100]))
    driven.run()
    recorder.stop()
    values = wfdb.rdrecord(stem(tmp_path)).p_signal[:, 0]
    expected = sent.copy()
    expected[800:803] = expected[1200:1500] = np.nan
    np.testing.assert_allclose(values, expected, atol=0.51e-3)
    found = wfdb.rdann(stem(tmp_path), "atr")
    beats = [(beat.index - 50, beat.label) for beat in driven.told("a", m.Beat)]
    assert len(beats) > 10
    labels = zip(found.sample.tolist(), found.symbol, strict=True)
    assert [each for each in labels if each[1] in "NSVFQ"] == beats
    assert [text for text in found.aux_note if text.startswith(("gap", "bridged"))] == [
        "bridged 3 samples",
        "gap of 300 samples, state: reset",
    ]


def test_after_a_kill_all_that_was_flushed_is_there(
    serving: Callable[..., Server], heart_path: Path, tmp_path: Path
) -> None:
    options = tmp_path / "engine.toml"
    options.write_text("[record]\nflush_s = 0.05\n")
    folder = tmp_path / "records"
    server = serving(str(options), "--record", str(folder), model=heart_path)
    sent: NDArray[np.float32] = noise(3000, loud=1.0)
    with Client(server.address) as client:
        stream = client.open("bed-7", "tinyheart", rate_hz=100, unit="mV")
        for part in np.array_split(sent, 30):
            stream.send(part)
        stream.flush()
        deadline = time.monotonic() + 30.0
        while not list(folder.glob("*.hea")) or wfdb.rdheader(stem(folder)).sig_len < 3000:
            assert time.monotonic() < deadline, "nothing was flushed"
            list(client.events(0.02))
        server.stop(signal.SIGKILL)
    np.testing.assert_allclose(wfdb.rdrecord(stem(folder)).p_signal[:, 0], sent, atol=0.51e-3)
    found = wfdb.rdann(stem(folder), "atr")
    assert len(found.sample) > 10
    assert set(found.symbol) <= {*"NSVFQ", '"'}  # beats, and notes of alerts
