"""A detector of voice in front of a model: who is stepped, what is heard, what is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine import model_file
from engine.config import Config, Limits
from engine.device import DeviceRuntime
from engine.errors import ModelFileError
from engine.gate import VOICE, GatedRuntime
from engine.model_file import Filter, Gate, Input, Output, Stage
from engine.runtime import CpuRuntime
from engine.server import runtime
from tests import tiny

HOP, FRAMES = tiny.HOP, tiny.HOP // tiny.FRAME
HOLD = 3  # hops of the model
LOOK_AHEAD = 12
Rows = NDArray[np.float32]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A talker that rests 0.6 s after the last voice; a letter lies 12 samples behind."""
    folder = tmp_path_factory.mktemp("gate")
    tiny.write_detector(folder)
    gate = Gate("detector.onnx", threshold=0.5, release=0.3, hold_s=HOLD * HOP / tiny.RATE_HZ)
    return tiny.write_talker(folder, "gated", gate=gate)


def gated(path: Path, rows: int = 4) -> GatedRuntime:
    made = runtime(model_file.load(path), Config(threads=1, limits=Limits(max_streams=rows)))
    assert isinstance(made, GatedRuntime)
    for slot in range(rows):
        made.reset(slot)
    return made


def hops(*loud: float) -> Rows:
    """Return hops of the model of which each half is so loud, (hops, HOP, 1)."""
    return np.repeat(np.array(loud, np.float32), tiny.VOICE_HOP).reshape(-1, HOP, 1)


def step(made: GatedRuntime, rows: dict[int, Rows]) -> tuple[Rows, Rows]:
    """Return scores and voice of a step of some slots, in their order."""
    outputs = made.step(np.array(list(rows)), np.stack(list(rows.values())))
    return outputs["ctc"], outputs[VOICE]


# --- who is stepped ------------------------------------------------------------------------------


def test_rows_without_voice_are_not_stepped_and_say_nothing(path: Path) -> None:
    made = gated(path)
    (quiet,) = hops(0.0, 0.0)
    scores, voice = step(made, {0: quiet, 2: quiet})
    assert not made.runs
    assert scores.shape == (2, FRAMES, len(tiny.ALPHABET))
    assert (scores.argmax(axis=2) == 0).all()
    assert not voice.any()


def test_only_rows_with_voice_are_stepped_and_all_have_as_many_frames(path: Path) -> None:
    made = gated(path)
    quiet, loud = hops(0.0, 0.0, 0.0, 3.0)
    scores, voice = step(made, {0: quiet, 1: loud, 3: quiet})
    assert dict(made.runs) == {(1, 1): 1}
    assert scores.shape == (3, FRAMES, len(tiny.ALPHABET))
    assert voice.tolist() == [[0, 0], [0, 1], [0, 0]]


def test_a_row_is_stepped_for_the_held_time_behind_its_last_voice(path: Path) -> None:
    made = gated(path)
    stepped = []
    for hop in hops(1, 0, *[0] * 12, 0, 1, *[0] * 12):
        before = sum(made.runs.values())
        step(made, {0: hop})
        stepped.append(sum(made.runs.values()) - before)
    # As long as less than the 0.6 s lie between the voice and the beginning of the hop.
    assert stepped == [1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]


def test_a_row_that_opens_again_is_as_a_new_one(path: Path) -> None:
    made = gated(path)
    said = hops(2.0, 2.0, 4.0, 4.0)
    for hop in [*said, *hops(*[0] * 20)]:
        step(made, {0: hop})
    assert np.abs(made.model.take(0)).max() == 0.0  # silence has gone through
    made.model.put(0, np.full_like(made.model.take(0), 5.0))
    again, _ = step(made, {0: said[0]})
    new, _ = step(gated(path), {0: said[0]})
    np.testing.assert_array_equal(again, new)


def test_a_row_that_is_reset_hears_nothing_of_its_former_tenant(path: Path) -> None:
    made = gated(path)
    loud, soft = hops(3.0, 3.0, 0.4, 0.4)
    step(made, {0: loud})
    _, held = step(made, {0: soft})
    assert held.all()  # above the release: had it not been reset, it would be voice
    made.reset(0)
    made.runs.clear()
    _, voice = step(made, {0: soft})
    assert not voice.any()
    assert not made.runs


def test_voice_begins_at_the_threshold_and_ends_below_the_release(path: Path) -> None:
    made = gated(path)
    loud = [0.45, 0.5, 0.35, 0.31, 0.29, 0.45, 0.49, 0.6]
    heard = [step(made, {1: hop})[1] for hop in hops(*loud)]
    assert np.ravel(heard).tolist() == [0, 1, 1, 1, 0, 0, 0, 1]


# --- alone is batched, and what is carried -------------------------------------------------------


@given(
    loud=st.lists(
        st.lists(st.sampled_from([0.0, 0.0, 0.4, 1.0, 3.0]), min_size=4, max_size=4),
        min_size=1,
        max_size=12,
    ),
    absent=st.sets(st.tuples(st.integers(0, 11), st.integers(0, 1))),
)
def test_a_row_does_not_depend_on_its_neighbours(
    path: Path, loud: list[list[float]], absent: set[tuple[int, int]]
) -> None:
    """Two rows, of which either may have nothing to step in some turn."""
    together, alone = gated(path), [gated(path), gated(path)]
    for turn, parts in enumerate(loud):
        rows = {slot: hops(*parts[2 * slot : 2 * slot + 2])[0] for slot in (0, 1)}
        rows = {slot: hop for slot, hop in rows.items() if (turn, slot) not in absent}
        if not rows:
            continue
        both = step(together, rows)
        for place, (slot, hop) in enumerate(rows.items()):
            for found, expected in zip(both, step(alone[slot], {slot: hop}), strict=True):
                np.testing.assert_array_equal(found[place], expected[0])


@pytest.mark.parametrize("before", [0, 1, 3, 9])
def test_what_a_row_carries_goes_on_elsewhere(path: Path, before: int) -> None:
    here, there = gated(path), gated(path)
    signal = hops(2, 2, 0.4, 0.4, 0.4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.4, 0.4, 3, 3, 0, 0)
    for hop in signal[:before]:
        step(here, {0: hop})
    there.put(3, here.take(0))
    for hop in signal[before:]:
        for found, expected in zip(step(there, {3: hop}), step(here, {0: hop}), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_a_model_whose_state_stays_on_a_device_rests_as_well(path: Path) -> None:
    model = model_file.load(path)
    assert model.gate is not None
    bare, detector = model._replace(gate=None), CpuRuntime(model.gate, 4)
    device = DeviceRuntime(bare, 4, device="cpu", buckets=(1, 4))
    there = GatedRuntime(model.spec, device, detector, model.gate.spec)
    here = gated(path)
    for slot in range(4):
        there.reset(slot)
    for loud in ([2, 2, 0, 0, 3, 3], [0, 0, 0, 0, 3, 3], [0, 0, 4, 4, 0, 0]):
        rows = dict(enumerate(hops(*loud), start=1))
        for found, expected in zip(step(there, rows), step(here, rows), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_the_detectors_windows_end_where_the_models_do(tmp_path: Path) -> None:
    """A window of 30 samples with 26 that overlap hears what a window of 10 without hears."""
    tiny.write_detector(tmp_path)
    wide = {
        "window_samples": HOP + 8,
        "stages": (Stage("x", (HOP + 8, 1)),),
        "look_ahead_samples": 0,
    }
    seeing = tiny.write_talker(tmp_path, "wide", 0, gate=Gate("detector.onnx"), **wide)
    made = gated(seeing, 1)
    quiet, loud = hops(0.0, 0.0, 1.0, 0.0)
    before = np.full((8, 1), 9.0, np.float32)  # was heard a hop ago
    assert step(made, {0: np.concatenate([before, quiet])})[1].tolist() == [[0, 0]]
    assert step(made, {0: np.concatenate([before, loud])})[1].tolist() == [[1, 0]]


def test_the_time_of_a_step_holds_the_detectors(path: Path) -> None:
    made = gated(path)
    assert made.step_seconds(2) > made.model.step_seconds(2)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("detector", "said"),
    [
        ({"input": Input(200.0, "1")}, "expected the model's input"),
        ({"input": Input(100.0, "mV")}, "expected the model's input"),
        ({"input": Input(100.0, "1", filters=(Filter("highpass", (1.0,)),))}, "expected the model"),
        (
            {"hop_samples": 8, "window_samples": 8, "stages": (Stage("x", (8, 1)),)},
            "a hop that divides 20, found",
        ),
        (
            {"window_samples": 14, "stages": (Stage("x", (14, 1)),)},
            "windows that overlap by at most 0 samples, found 4",
        ),
    ],
)
def test_a_detector_that_does_not_fit_is_refused(
    tmp_path: Path, detector: dict[str, object], said: str
) -> None:
    tiny.write_detector(tmp_path, **detector)
    path = tiny.write_talker(tmp_path, "gated", gate=Gate("detector.onnx"))
    with pytest.raises(ModelFileError) as caught:
        model_file.load(path)
    assert str(caught.value).startswith(f"{path}: gate.model: ")
    assert said in str(caught.value)


def test_a_detector_of_several_values_a_hop_is_refused(tmp_path: Path) -> None:
    tiny.write_detector(tmp_path, values=2)
    path = tiny.write_talker(tmp_path, "gated", gate=Gate("detector.onnx"))
    with pytest.raises(ModelFileError, match="expected one probability a hop, found 2 values"):
        gated(path)


def test_a_detector_with_a_gate_is_refused_even_if_it_is_the_model_itself(tmp_path: Path) -> None:
    path = tiny.write_talker(tmp_path, "gated", gate=Gate("gated.onnx"))
    with pytest.raises(ModelFileError, match=r"expected no gate of its own, found gated\.onnx"):
        model_file.load(path)


def test_a_detector_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tiny.write_talker(tmp_path, "gated", gate=Gate("nowhere"))
    with pytest.raises(ModelFileError, match=r"nowhere: expected a \.onnx or \.toml file"):
        model_file.load(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gate": Gate(threshold=0.3)}, r"gate\.release: expected at most the threshold \(0\.3\)"),
        ({"gate": Gate(hold_s=0.1)}, r"gate\.hold_s: expected the look-ahead \(0\.12 s\) at least"),
        ({"pipeline": "scores", "gate": Gate()}, "gate: expected the pipeline 'speech'"),
        (
            {"outputs": (Output("ctc", "ctc", tiny.ALPHABET),) * 2},
            "outputs: expected one that means 'ctc'",
        ),
        ({"decoding": {"language_model": "x.arpa"}}, "expected a beam beside it, found 0"),
    ],
)
def test_a_statement_that_contradicts_itself_is_refused(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ModelFileError, match=said):
        model_file.load(tiny.write_talker(tmp_path, "odd", **changes))
