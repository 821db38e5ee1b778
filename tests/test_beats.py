"""How the model that names beats is taught: early beats that are made, batches, the network."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'train'")
pytest.importorskip("wfdb", reason="needs the extra 'train'")

from engine import model_file  # noqa: E402
from exporters.beat_net import INPUTS, LEADS, POINTS, BeatNet, BeatNetConfig  # noqa: E402
from exporters.to_onnx import export  # noqa: E402
from training import beats, data, ectopy  # noqa: E402
from training.ectopy import Strip  # noqa: E402

RATE_HZ = int(beats.RATE_HZ)
SMALL = BeatNetConfig(patch=6, width=8, hidden=8)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def strip(seed: int = 0, number: int = 40) -> Strip:
    """Return a P wave and a spike for each beat, about 0.9 s apart."""
    rng = np.random.default_rng(seed)
    places = np.cumsum(rng.integers(310, 340, number)) + 400
    time = np.arange(places[-1] + 500)
    signal = np.zeros(len(time))
    for place in places:
        signal += np.exp(-0.5 * ((time - place) / 4) ** 2)
        signal += 0.2 * np.exp(-0.5 * ((time - place + 50) / 8) ** 2)
    leads = np.stack([signal, -0.5 * signal], axis=1).astype(np.float32)
    nothing = np.zeros(number, np.int64)
    return Strip(f"made-up-{seed}", leads, places, nothing, nothing)


def test_beats_brought_forward_are_supraventricular_early_and_still_on_their_peaks() -> None:
    before = strip()
    after = ectopy.bring_forward(before, 0.3, np.random.default_rng(0))
    early = after.classes == data.LABELS.index("S")
    assert 3 < early.sum() < 25
    np.testing.assert_allclose(after.signal[after.beats, 0], 1.0, atol=0.06)
    shorter = np.diff(after.beats) / np.diff(before.beats)
    assert shorter[early[1:]].max() < 0.86
    assert shorter.min() > 0.4
    np.testing.assert_array_equal(before.classes, 0)  # a copy was changed


def test_a_run_of_early_beats_keeps_its_pace() -> None:
    before = strip(number=120)
    lengths = []
    for seed in range(30):
        early = ectopy.bring_forward(before, 0.01, np.random.default_rng(seed)).classes == 1
        edges = np.flatnonzero(np.diff(np.concatenate([[0], early, [0]]).astype(int)))
        lengths += (edges[1::2] - edges[::2]).tolist()
    assert min(lengths) == 1
    assert 12 < max(lengths) < 70


def ventricular(seed: int) -> Strip:
    """Return a strip every fifth beat of which is a broad wave of the second lead."""
    made = strip(seed)
    time = np.arange(len(made.signal))
    chosen = np.arange(4, 36, 5)
    signal, classes = made.signal.copy(), made.classes.copy()
    for beat in made.beats[chosen]:
        signal[beat - 60 : beat + 60] = 0
        signal[:, 1] += 2 * np.exp(-0.5 * ((time - beat) / 15) ** 2).astype(np.float32)
    classes[chosen] = data.LABELS.index("V")
    return made._replace(signal=signal, classes=classes)


def test_a_transplanted_beat_is_ventricular_at_its_place_and_leaves_the_others_alone() -> None:
    given = ectopy.donors([strip(2), ventricular(1)])
    assert [len(beats) for beats in given] == [7]
    before = strip()
    chosen = np.array([5, 11, 12])
    after = ectopy.transplant(before, chosen, given, np.random.default_rng(1))
    np.testing.assert_array_equal(np.flatnonzero(after.classes == data.LABELS.index("V")), chosen)
    np.testing.assert_array_equal(after.beats, before.beats)
    changed = np.flatnonzero((after.signal != before.signal).any(1))
    nearest = np.abs(changed[:, None] - before.beats[chosen]).min(1)
    assert nearest.max() < 1.2 * 150  # samples of a donor's beat after its place, stretched
    for beat in before.beats[chosen]:  # the peak of what is there now is where the beat was
        around = np.abs(after.signal[beat - 60 : beat + 60]).max(1)
        assert abs(int(around.argmax()) - 60) <= 4


def test_a_transplanted_beat_does_not_connect_a_lead_that_is_off() -> None:
    before = strip()
    before.signal[:, 1] = 0
    given = ectopy.donors([ventricular(1)])
    after = ectopy.transplant(before, np.arange(4, 30), given, np.random.default_rng(0))
    assert (after.classes == 2).any()
    assert not after.signal[:, 1].any()


def test_other_filters_are_the_same_for_all_beats_of_a_row() -> None:
    x = torch.from_numpy(beats.inputs(strip().signal, strip().beats))[None, 10:11]
    changed = beats.refilter(x.repeat(8, 5, 1), 0.5, 0.5, np.random.default_rng(0))
    torch.testing.assert_close(changed, changed[:, :1].repeat(1, 5, 1))
    assert 2 < sum(bool((row != x[0]).any()) for row in changed) <= 8
    torch.testing.assert_close(beats.refilter(x, 0.0, 0.0, np.random.default_rng(0)), x)


def test_nothing_brought_forward_leaves_all_as_it_was() -> None:
    before = strip()
    after = ectopy.bring_forward(before, 0.0, np.random.default_rng(0))
    np.testing.assert_array_equal(after.signal, before.signal)
    np.testing.assert_array_equal(after.beats, before.beats)


def test_inputs_are_the_mean_signal_around_the_beat_and_the_interval() -> None:
    made = strip()
    x = beats.inputs(made.signal, made.beats)
    assert x.shape == (len(made.beats), INPUTS)
    begin = made.beats[5] - 54 * 3
    expected = [
        made.signal[begin + 3 * point : begin + 3 * point + 3, lead].mean()
        for lead in range(LEADS)
        for point in range(POINTS)
    ]
    np.testing.assert_allclose(x[5, :-1], expected, atol=1e-6)
    assert x[5, -1] == pytest.approx((made.beats[5] - made.beats[4]) / RATE_HZ)


def test_disturbance_leaves_a_lead_that_is_off_at_zero() -> None:
    x = torch.from_numpy(beats.inputs(strip().signal, strip().beats))[None].repeat(32, 1, 1)
    changed = beats.disturb(x, False, np.random.default_rng(0))
    assert torch.isfinite(changed).all()
    second = changed[:, :, POINTS:-1].abs().sum((1, 2))
    assert 3 < (second == 0).sum() < 22  # about a third of the rows
    assert (second[second > 0] > 40).all()


def test_folds_leave_out_every_patient_once() -> None:
    names = [name for fold in beats.FOLDS for name in fold]
    assert sorted(names) == sorted(data.TRAINING + data.VALIDATION)


def test_the_state_makes_one_walk_of_many_steps() -> None:
    torch.manual_seed(0)
    net = BeatNet(SMALL).eval()
    x = torch.from_numpy(beats.inputs(strip().signal, strip().beats))[None]
    with torch.no_grad():
        whole, rhythm, *_ = net(x, *net.initial_states(1))
        states: tuple[torch.Tensor, ...] = net.initial_states(1)
        steps = []
        for number in range(x.shape[1]):
            one, _, *states = net(x[:, number : number + 1], *states)
            steps.append(one)
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    torch.testing.assert_close(whole.sum(2), torch.ones_like(whole.sum(2)))
    assert rhythm.shape == (1, x.shape[1], len(beats.RHYTHMS))


def test_the_gain_of_the_electrodes_is_learnt_away() -> None:
    torch.manual_seed(0)
    net = BeatNet(SMALL).eval()
    x = torch.from_numpy(beats.inputs(strip().signal, strip().beats))[None]
    louder = torch.cat([x[:, :, :-1] * 40, x[:, :, -1:]], 2)
    x = torch.cat([x[:, :, :-1] * 20, x[:, :, -1:]], 2)
    with torch.no_grad():
        one, other = (net(each, *net.initial_states(1))[0] for each in (x, louder))
    torch.testing.assert_close(one, other, atol=0.01, rtol=0)


def carried(net: BeatNet, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        *_, states = net.logits(x, *net.initial_states(len(x)))
    return dict(zip(net.state_shapes, states, strict=True))


def test_ectopic_beats_hardly_change_the_usual_shape() -> None:
    net = BeatNet(SMALL).eval()
    plain, some = strip(1), ventricular(1)
    before = carried(net, torch.from_numpy(beats.inputs(plain.signal, plain.beats))[None])
    after = carried(net, torch.from_numpy(beats.inputs(some.signal, some.beats))[None])
    for lead in range(LEADS):  # each in its own amplitude, which ectopic beats do change
        one, other = (states["shape"][0, lead * POINTS :][:POINTS] for states in (before, after))
        assert float(torch.corrcoef(torch.stack([one, other]))[0, 1]) > 0.99


def test_a_run_of_early_beats_is_early_to_its_end_and_another_rate_becomes_usual() -> None:
    net = BeatNet(SMALL).eval()
    x = torch.zeros(1, 340, INPUTS)
    x[0, 1:, -1] = 0.8
    x[0, 40:80, -1] = 0.4
    usual = carried(net, x[:, :80])["intervals"][0, 3]
    assert 0.7 < float(usual) < 0.8
    x[0, 80:, -1] = 0.7
    assert float(carried(net, x)["intervals"][0, 3]) == pytest.approx(0.7, abs=0.01)


def test_a_network_is_exported_with_its_states_and_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = BeatNet(SMALL)
    path = tmp_path / "named.onnx"
    export(net, beats.statement(net, "untrained"), path, hop_by_hop=True)
    spec = model_file.load(path).spec
    assert [state.input for state in spec.states] == list(net.state_shapes)
    assert [output.meaning for output in spec.outputs] == ["beat_class", "rhythm"]


def test_a_run_that_goes_on_equals_one_that_was_not_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beats, "STEPS", 2)
    monkeypatch.setattr(beats, "ROWS", 2)
    monkeypatch.setattr(beats, "BEATS", 24)
    monkeypatch.setattr(beats, "RECORDS", 3)
    monkeypatch.setattr(beats, "DISORDERED", 2)
    other = strip(1)
    records = [
        beats.one_lead(str(label), other.signal[:, 0], other.beats, label) for label in range(4)
    ]
    unbroken = beats.train([strip()], records, tmp_path / "unbroken.pt", 2, 5)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    rate = beats.math.cos
    calls = []

    def cosine(angle: float) -> float:
        calls.append(angle)
        return rate(angle) if len(calls) <= 2 else stop()

    monkeypatch.setattr(beats.math, "cos", cosine)  # the third step of all is not taken
    with pytest.raises(KeyboardInterrupt):
        beats.train([strip()], records, tmp_path / "broken.pt", 2, 5)
    monkeypatch.setattr(beats.math, "cos", rate)
    resumed = beats.train([strip()], records, tmp_path / "broken.pt", 2, 5)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_what_the_loss_favoured_is_taken_back_and_fibrillation_speaks_against_early_beats() -> None:
    torch.manual_seed(0)
    plain = BeatNet(SMALL).eval()
    made = BeatNet(SMALL, beats.CLASS_WEIGHTS, beats.AGAINST).eval()
    made.load_state_dict(plain.state_dict())
    x = torch.from_numpy(beats.inputs(strip().signal, strip().beats))[None]
    with torch.no_grad():
        taught, rhythm, *_ = plain(x, *plain.initial_states(1))
        said, *_ = made(x, *made.initial_states(1))
    odds = (said[..., 1] / said[..., 0]) / (taught[..., 1] / taught[..., 0])
    torch.testing.assert_close(odds, torch.exp(-3.0 * rhythm[..., 1]) / 4.0)
