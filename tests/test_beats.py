"""How the model that names beats is taught: early beats that are made, batches, the network."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'train'")
pytest.importorskip("wfdb", reason="needs the extra 'train'")

from engine import model_file  # noqa: E402
from exporters.beat_net import INPUTS, LEADS, POINTS, BeatNet, BeatNetConfig  # noqa: E402
from exporters.to_onnx import export  # noqa: E402
from training import beats, data  # noqa: E402
from training.beats import Short, Strip  # noqa: E402

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
    after = beats.bring_forward(before, 0.3, np.random.default_rng(0))
    early = after.classes == data.LABELS.index("S")
    assert 3 < early.sum() < 25
    np.testing.assert_allclose(after.signal[after.beats, 0], 1.0, atol=0.06)
    shorter = np.diff(after.beats) / np.diff(before.beats)
    assert shorter[early[1:]].max() < 0.86
    assert shorter.min() > 0.4
    np.testing.assert_array_equal(before.classes, 0)  # a copy was changed


def test_nothing_brought_forward_leaves_all_as_it_was() -> None:
    before = strip()
    after = beats.bring_forward(before, 0.0, np.random.default_rng(0))
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
    one_lead = beats.inputs(strip(1).signal * [1, 0], strip(1).beats)
    records = [Short(str(label), one_lead, label) for label in range(4)]
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
