"""What training promises: targets the engine can read, state carried, a resumed run like a whole.

Runs on made-up heartbeats; what needs the real records skips where they are absent.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'train'")
lightning = pytest.importorskip("pytorch_lightning", reason="needs the extra 'train'")
pytest.importorskip("wfdb", reason="needs the extra 'train'")

from engine import messages, model_file, ward  # noqa: E402
from engine.child import serving  # noqa: E402
from engine.client import Client  # noqa: E402
from engine.heart.beats import Beat, BeatFinder  # noqa: E402
from exporters.net import Conv, Head, NetConfig, StreamingNet  # noqa: E402
from exporters.to_onnx import export  # noqa: E402
from training import augment, data, evaluate, heart  # noqa: E402
from training.data import Recording  # noqa: E402
from training.lanes import HeartData, Lanes, Window, whole  # noqa: E402

MITDB = Path(__file__).parents[1] / "../shared/data/ecg/mitdb"
RATE_HZ = 360
STRIDE = heart.NET.stride
WINDOW = 4 * heart.HOP
SMALL = NetConfig(
    channels=heart.LEADS,
    heads={"beat": Head(1, "sigmoid"), "beat_class": Head(5, "softmax")},
    convs=(Conv(8, 8, 2), Conv(8, 4, 2)),
    hidden=16,
    dropout=0.1,
)
SPEC = heart.statement(StreamingNet(heart.NET), "in a test")

needs_records = pytest.mark.skipif(not MITDB.is_dir(), reason=f"no MIT-BIH records at {MITDB}")
# Lightning 2.6 with torch 2.13, its advice on workers and folders; wfdb 4.3 with pandas 3.
quiet = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny nets lose more by waiting for a second core than they win by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recording(seconds: float = 20, seed: int = 0) -> Recording:
    """Return spikes of 1 mV about 0.8 s apart; every fifth is early, wide and called V."""
    rng = np.random.default_rng(seed)
    samples = int(seconds * RATE_HZ)
    steps = rng.normal(0.8, 0.05, int(seconds)) * RATE_HZ
    beats = np.cumsum(steps).astype(np.int64)
    beats = beats[beats < samples - RATE_HZ]
    classes = np.where(np.arange(len(beats)) % 5 == 4, data.LABELS.index("V"), 0)
    time = np.arange(samples)
    signal = np.zeros(samples)
    for beat, label in zip(beats, classes, strict=True):
        width = 16 if label else 4
        signal += np.exp(-0.5 * ((time - beat) / width) ** 2)
    leads = np.stack([signal, -0.5 * signal], axis=1).astype(np.float32)
    return Recording(f"made-up-{seed}", leads, beats, classes, np.empty((0, 2), np.int64))


def lanes(*seed: int) -> Lanes:
    return Lanes([recording(seed=0), recording(seed=1)], SPEC, STRIDE, WINDOW, 2, seed)


# Data and targets


def test_the_beat_finder_reads_targets_as_the_beats_they_came_from() -> None:
    made = recording()
    marks = data.targets(made, SPEC, STRIDE)
    classes = np.zeros((len(marks.label), len(data.LABELS)), np.float32)
    labelled = marks.label != data.NO_LABEL
    classes[labelled, marks.label[labelled]] = 1.0
    finder, frames = BeatFinder(SPEC, 1), heart.HOP // STRIDE
    found = []
    for start in range(0, len(marks.beat), frames):
        part = slice(start, start + frames)
        outputs = {"beat": marks.beat[None, part], "beat_class": classes[None, part]}
        found += finder.push(np.array([0]), outputs, np.array([start * STRIDE]))
    positions = np.array([beat.position for _, beat in found])
    assert len(positions) == len(made.beats)
    assert ((made.beats - positions >= 0) & (made.beats - positions < STRIDE)).all()
    assert [beat.label for _, beat in found] == [data.LABELS[label] for label in made.classes]


def test_flutter_is_not_learnt_as_an_absence_of_beats() -> None:
    made = recording()._replace(unscored=np.array([[3600, 4320]]))
    weight = data.targets(made, SPEC, STRIDE).weight
    silent = (np.array([3600, 4320]) + heart.LOOK_AHEAD) // STRIDE
    assert not weight[silent[0] : silent[1]].any()
    assert weight[: silent[0]].all()
    assert weight[silent[1] :].all()


@needs_records
@quiet
def test_a_record_is_read_with_its_modified_limb_lead_first() -> None:
    read = data.read(MITDB, "114")  # the one record that stores V5 before MLII
    assert read.signal.shape == (650_000, 2)
    # The upper lead of 114 as PhysioNet plots it, V5, has an inverted and small complex.
    assert len(read.beats) == 1879
    counts = np.bincount(read.classes, minlength=5)
    assert dict(zip(data.LABELS, counts.tolist(), strict=True)) == {
        "N": 1820, "S": 12, "V": 43, "F": 4, "Q": 0,
    }  # fmt: skip


@needs_records
@quiet
def test_ventricular_flutter_of_record_207_is_found() -> None:
    episodes = data.read(MITDB, "207").unscored
    assert len(episodes) == 6
    assert (episodes[:, 1] > episodes[:, 0]).all()


def test_validation_records_are_never_trained_on() -> None:
    assert not set(data.TRAINING) & set(data.VALIDATION)
    assert len(data.TRAINING) + len(data.VALIDATION) == 22
    assert "208" in data.VALIDATION  # the demonstration shows it


# Augmentation and lanes


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_stretched_recording_keeps_its_beats_on_their_peaks(factor: float) -> None:
    slow = augment.stretch(recording(), factor)
    assert len(slow.signal) == pytest.approx(factor * 20 * RATE_HZ, abs=1)
    np.testing.assert_allclose(slow.signal[slow.beats, 0], 1.0, atol=0.05)


def test_disturbance_is_bounded_and_repeatable() -> None:
    clean = recording().signal
    one, same, other = (
        augment.disturb(clean, RATE_HZ, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert np.abs(one).max() < 10  # mV: still an electrocardiogram


def test_lanes_depend_on_seed_and_epoch_only() -> None:
    np.testing.assert_array_equal(lanes(1, 0).samples, lanes(1, 0).samples)
    assert not np.array_equal(lanes(1, 0).samples, lanes(1, 1).samples)


def test_windows_follow_each_other_without_a_seam() -> None:
    walked = lanes(1, 0)
    windows = [walked[index] for index in range(len(walked))]
    assert [window.first for window in windows] == [True] + [False] * (len(windows) - 1)
    joined = torch.cat([window.x for window in windows], dim=1)
    np.testing.assert_array_equal(joined.numpy(), walked.samples)
    beat = torch.cat([window.beat for window in windows], dim=1)
    assert beat.shape == (4, joined.shape[1] // STRIDE)


# Training


def model() -> heart.HeartModel:
    torch.manual_seed(0)
    return heart.HeartModel(SMALL, epochs=2, rate=1e-2, seed=0)


def heart_data() -> HeartData:
    return HeartData(lambda seed: lanes(*seed), whole([recording(seed=2)], SPEC), seed=0)


def fit(folder: Path, epochs: int, resume: bool = False) -> heart.HeartModel:
    made = model()
    trainer = heart.make_trainer(
        folder, epochs, patience=9, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(made, heart_data(), ckpt_path=folder / "last.ckpt" if resume else None)
    return made


def test_state_is_carried_from_window_to_window(monkeypatch: pytest.MonkeyPatch) -> None:
    made, walked = model().eval(), lanes(1, 0)
    monkeypatch.setattr(made, "log_dict", lambda *_, **__: None)
    first, second = walked[0], walked[1]
    made.training_step(first, 0)
    carried = made.training_step(second, 1)
    assert not any(state.requires_grad for state in made.states)  # cut from the first window
    pairs = zip(first[:-1], second[:-1], strict=True)
    both = Window(*(torch.cat(pair, dim=1) for pair in pairs), first=True)
    logits, _ = made.net.logits(both.x, *made.net.initial_states(len(both.x)))
    tail = {name: value[:, both.beat.shape[1] // 2 :] for name, value in logits.items()}
    beat_loss, class_loss = made.losses(tail, second)
    torch.testing.assert_close(carried, beat_loss + heart.CLASS_LOSS * class_loss)
    forgotten = made.training_step(second._replace(first=True), 1)
    assert abs(forgotten - carried) > 1e-4


def test_loss_falls() -> None:
    made, window = model(), lanes(1, 0)[0]
    optimizer = made.configure_optimizers()
    losses = []
    for _ in range(30):
        logits, _ = made.net.logits(window.x, *made.net.initial_states(len(window.x)))
        loss = sum(made.losses(logits, window))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@quiet
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    unbroken = fit(tmp_path / "unbroken", 2)
    fit(tmp_path / "broken", 1)
    resumed = fit(tmp_path / "broken", 2, resume=True)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert (tmp_path / "broken" / "best.ckpt").is_file()


# Evaluation


def test_a_score_counts_missed_false_and_mistaken_beats() -> None:
    made = recording()
    beats = [Beat(int(place), "N", 0.9, int(place)) for place in made.beats[1:]]
    # One missed, every V called N, one false V, and one behind the end, which does not count.
    last = len(made.signal)
    beats += [Beat(last - 1, "V", 0.9, 0), Beat(last, "V", 0.9, 0)]
    scored = evaluate.score(made, beats, RATE_HZ)
    total, ventricular = len(made.beats), int((made.classes > 0).sum())
    assert (scored.hits, scored.missed, scored.false) == (total - 1, 1, 1)
    assert scored.counts[2].tolist() == [ventricular, 0, 0, 0, 0, 0]
    assert scored.counts[5].tolist() == [0, 0, 1, 0, 0, 0]
    assert scored.of("V").f1 == 0.0


def test_streaming_the_exported_model_finds_what_torch_finds(tmp_path: Path) -> None:
    made = model().eval()
    signals = np.stack([recording(seed=seed).signal for seed in (0, 1)])
    with torch.no_grad():  # untrained, it would find nothing
        beat = made.net.heads["beat"]
        beat.weight *= 20
        x = whole([recording(seed=seed) for seed in (0, 1)], made.spec).x
        logits, _ = made.net.logits(x, *made.net.initial_states(2))
        beat.bias -= logits["beat"].quantile(0.9)
    path = tmp_path / "small.onnx"
    export(made.net, heart.statement(made.net, "random weights"), path)
    streamed = evaluate.stream(model_file.load(path), signals)
    with torch.no_grad():
        at_once = made.find(x)
    for one, other in zip(streamed, at_once, strict=True):
        inside = [beat.position for beat in one if beat.position < signals.shape[1] - RATE_HZ]
        assert inside
        expected = [b.position for b in other if b.position < signals.shape[1] - RATE_HZ]
        assert inside == expected


def test_a_server_tells_the_beats_that_streaming_finds() -> None:
    t = np.arange(20 * 360) / 360
    signals = np.exp(-(((t % [[0.8], [0.5]]) - 0.3) ** 2) / 2 / 0.02**2).astype(np.float32)
    signals = np.repeat(signals[:, :, None], model_file.load("heart").spec.input.channels, axis=2)
    sent = [ward.Signal(str(row), one, 360.0, "mV") for row, one in enumerate(signals)]
    with serving("heart") as server, Client(server.address) as client:
        heard = {one.name: one.told for one in ward.watch(client, sent, ward.Plan(seed=0))}
    streamed = evaluate.stream(model_file.load("heart"), signals)
    for row, beats in enumerate(streamed):
        told = [one for one in heard[str(row)] if isinstance(one, messages.Beat)]
        inside = [(beat.position, beat.probability) for beat in beats if beat.position < len(t)]
        assert len(told) > 15
        # Their classes come from another model (tests/test_classes.py).
        assert [(one.index, one.probability) for one in told] == inside
