"""What a model states about itself, read and checked before it serves anyone.

A model made here is one ``.onnx`` file with this statement as JSON under the metadata key
``murmur``. A foreign model is a small TOML file that says the same and names its ONNX files.
Rates, hops, labels and shapes stand nowhere else. ``docs/model-file.md`` explains each field.
"""

import hashlib
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import onnxruntime as ort
from msgspec import Meta

from engine.errors import ModelFileError
from engine.features import LogMel, Recipe

FORMAT = 1
METADATA_KEY = "murmur"
BUNDLED = Path(__file__).parent / "models"
MANIFEST = "manifest.json"

# Outputs without which a pipeline has nothing to read.
_MEANINGS = {"heart": ("beat", "beat_class"), "speech": ("ctc",), "audio": ("samples",)}

Count = Annotated[int, Meta(ge=1)]
# Not gt=0: once ONNX Runtime flushes denormals, 0 is no longer below the least number above it.
Positive = Annotated[float, Meta(ge=1e-9)]


class _Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the statement: immutable, and an unknown key is an error that names it."""


class Filter(_Statement, frozen=True):
    """One Butterworth filter at the model's rate, applied before the windows are cut."""

    kind: Literal["highpass", "lowpass", "bandpass", "notch"]
    hz: tuple[Positive, ...]  # one corner; two for bandpass; notch: centre, then width
    order: Count = 2


class Input(_Statement, frozen=True):
    """The signal that the model expects."""

    rate_hz: Positive
    unit: str  # UCUM: "mV" for an electrocardiogram, "1" for audio in [-1, 1]
    channels: Count = 1
    filters: tuple[Filter, ...] = ()
    least_channels: Count | None = None  # that a stream must have; the rest are zeros; None: all


class State(_Statement, frozen=True):
    """One tensor that is carried from step to step, one row a stream."""

    input: str
    output: str
    shape: tuple[Count, ...]  # of one row: the graph's shape without its batch axis
    batch_axis: Annotated[int, Meta(ge=0)] = 0
    initial: float = 0.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Stage(_Statement, frozen=True):
    """One ONNX graph. Most models have one; DTLN has two with a spectrum between."""

    input: str
    input_shape: tuple[Count, ...]  # of one row, without the batch axis, which comes first
    file: str = ""  # beside the TOML file, or "package:path"; empty: the file that states this
    features: Recipe = "raw"
    states: tuple[State, ...] = ()
    constants: dict[str, int | float] = {}  # further inputs, the same at every step
    passes: str = ""  # output that the next stage reads; the last stage passes nothing
    passes_as: Literal["samples", "mask"] = "samples"


class Output(_Statement, frozen=True):
    """One output of the last stage, and what it means."""

    name: str
    meaning: Literal["beat", "beat_class", "rhythm", "ctc", "scores", "samples"]
    labels: tuple[str, ...] = ()  # of the last axis; of ctc, the blank "" comes first


class Gate(_Statement, frozen=True):
    """A detector of voice in front of a model of speech, which rests where nobody speaks."""

    model: str = "silero-vad"  # a model file of one probability a hop
    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.5  # from here on it is voice
    release: Annotated[float, Meta(ge=0, le=1)] = 0.35  # and stays so down to here
    hold_s: Positive = 2.0  # without voice for so long, and the model begins anew with the next


class Decoding(_Statement, frozen=True):
    """How letters or words are read off the scores of a model of speech."""

    beam: Annotated[int, Meta(ge=0, le=256)] = 0  # prefixes that are kept; 0: the best label
    language_model: str = ""  # file beside the statement; needs a beam
    language_weight: float = 0.5  # of its log-probability beside the model's
    letter_bonus: float = 0.8  # natural log, added for each letter
    min_confidence: Annotated[float, Meta(ge=0, le=1)] = 0.0  # a word below it was not said
    second_pass: str = ""  # folder beside the statement; empty: finals are what partials end as


class Beats(_Statement, frozen=True):
    """A model that steps once a beat and names it, behind one that finds beats.

    Its input is the signal around the beat, lead by lead, and then the seconds since the beat
    before, 0 where that is not known. Its own rate is that of the points.
    """

    model: str  # a model file, beside this one or bundled
    leads: Count
    points: Count  # of a window, in each lead
    before: Count  # of them, points before the beat
    factor: Count  # samples of the finder's rate of which a point is the mean


class ModelSpec(_Statement, frozen=True):
    """All that the engine must know about a model."""

    format: int
    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}\Z")]
    pipeline: Literal["heart", "speech", "scores", "audio"]  # the wing that reads the outputs
    input: Input
    hop_samples: Count  # new samples a step
    window_samples: Count  # samples that a step sees, the new ones last
    stages: Annotated[tuple[Stage, ...], Meta(min_length=1)]
    outputs: Annotated[tuple[Output, ...], Meta(min_length=1)]
    licence: str
    provenance: str  # data, seed and command of the training, or where a foreign model is from
    look_ahead_samples: Annotated[int, Meta(ge=0)] = 0  # an event lies this far before its step
    gap: Literal["hold", "reset"] = "reset"  # the state after lost samples
    latency_ms: Positive = 100.0  # default budget from a chunk's arrival to its events
    priority: Annotated[int, Meta(ge=0, le=9)] = 5  # under overload, lower goes first
    gate: Gate | None = None  # of the pipeline speech only
    decoding: Decoding = Decoding()  # of the pipeline speech
    beats: Beats | None = None  # of the pipeline heart
    # Fingerprints of earlier models whose streams may go on with this one: their states mean the
    # same. A stream of any other model is not taken over from a checkpoint.
    continues: tuple[str, ...] = ()

    @property
    def states(self) -> tuple[State, ...]:
        return tuple(state for stage in self.stages for state in stage.states)

    @property
    def state_size(self) -> int:
        """Values of float32 in one row of carried state."""
        return sum(state.size for state in self.states)


class Manifest(_Statement, frozen=True):
    """What a folder of a built model holds, or what a build must make."""

    command: str  # that builds it
    files: dict[str, str]  # sha256 of each


class Model(NamedTuple):
    """A statement, and one ONNX Runtime session for each of its stages."""

    spec: ModelSpec
    sessions: tuple[ort.InferenceSession, ...]
    graphs: tuple[bytes, ...]  # the ONNX of each stage
    sha256: str  # of the file, and for a foreign model of its ONNX files too
    batchable: bool  # False: some graph fixes the batch axis at 1
    folder: Path = BUNDLED  # of the statement, beside which its other files lie
    gate: "Model | None" = None
    beats: "Model | None" = None

    @property
    def fingerprint(self) -> str:
        """Of all files whose state a stream carries."""
        parts = (self, self.gate, self.beats)
        return "+".join(one.sha256 for one in parts if one is not None)


def encode_spec(spec: ModelSpec) -> str:
    """Return the JSON that an exporter writes under the metadata key ``murmur``."""
    return msgspec.json.encode(spec).decode()


def bundled_files() -> list[Path]:
    """Return the model files that come with the package."""
    return sorted([*BUNDLED.glob("*.onnx"), *BUNDLED.glob("*.toml")])


def load(path: Path | str, provider: str = "cpu") -> Model:
    """Read a model file, open its graphs and check that the two agree.

    Parameters
    ----------
    path : Path or str
        An ``.onnx`` file with its statement inside, a ``.toml`` file, or the name of a
        model that comes with the package.
    provider : {"cpu", "cuda"}

    Raises
    ------
    ModelFileError
        At the first fault; the message names the file, what was expected and what was found.
    """
    path = find(path)
    try:
        model = _read(path, provider)
        if model.spec.gate is not None:
            gate = _load_gate(model.spec, model.spec.gate, path.parent, provider)
            model = model._replace(gate=gate)
        if model.spec.beats is not None:
            model = model._replace(beats=_load_beats(model.spec, model.spec.beats, path.parent))
        return model
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None


def _load_gate(spec: ModelSpec, gate: Gate, folder: Path, provider: str) -> Model:
    beside = folder / gate.model
    path = beside if beside.is_file() else find(gate.model)
    model = _read(path, provider)
    detector = model.spec
    if detector.gate is not None:
        raise ModelFileError(
            f"gate.model: expected no gate of its own, found {detector.gate.model}"
        )
    if detector.input != spec.input or spec.hop_samples % detector.hop_samples:
        raise ModelFileError(
            f"gate.model: expected the model's input ({spec.input}) and a hop that divides "
            f"{spec.hop_samples}, found {detector.input} and {detector.hop_samples}"
        )
    overlap = detector.window_samples - detector.hop_samples
    most = spec.window_samples - spec.hop_samples
    if overlap > most:
        raise ModelFileError(
            f"gate.model: expected windows that overlap by at most {most} samples, found {overlap}"
        )
    return model


def _load_beats(spec: ModelSpec, cut: Beats, folder: Path) -> Model:
    """Read the model that names beats; it steps on the CPU, a few rows a call."""
    beside = folder / cut.model
    model = _read(beside if beside.is_file() else find(cut.model), "cpu")
    named = model.spec
    values = cut.leads * cut.points + 1
    if named.window_samples != values or named.hop_samples != values or named.input.channels != 1:
        raise ModelFileError(
            f"beats.model: expected a hop and window of {values} values (leads * points + 1) of "
            f"one channel, found {named.hop_samples}, {named.window_samples} and "
            f"{named.input.channels}"
        )
    if cut.before >= cut.points:
        raise ModelFileError(
            f"beats.before: expected less than points ({cut.points}), found {cut.before}"
        )
    if cut.leads != spec.input.channels:
        raise ModelFileError(
            f"beats.leads: expected input.channels ({spec.input.channels}), found {cut.leads}"
        )
    if named.input.rate_hz * cut.factor != spec.input.rate_hz:
        raise ModelFileError(
            f"beats.factor: expected {spec.input.rate_hz:g} Hz over the model's "
            f"{named.input.rate_hz:g} Hz, found {cut.factor}"
        )
    if "beat_class" not in [output.meaning for output in named.outputs]:
        raise ModelFileError("beats.model: expected an output that means 'beat_class'")
    return model


def find(name: Path | str) -> Path:
    """Return the file of that path, or of that bundled model's name."""
    path = Path(name)
    candidates = [path, *(BUNDLED / f"{name}{suffix}" for suffix in (".onnx", ".toml"))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    recipe = BUNDLED / name
    if (recipe / MANIFEST).is_file():
        built = built_folder(recipe.name, recipe=recipe) / f"{recipe.name}.toml"
        if built.is_file():
            return built
        command = read_manifest(recipe / MANIFEST).command
        raise ModelFileError(f"{name}: expected {built}, which is not built yet: {command}")
    known = ", ".join(file.stem for file in bundled_files())
    raise ModelFileError(f"{name}: expected a .onnx or .toml file, or one of: {known}")


def cache_folder() -> Path:
    """Return where built models are kept: $MURMUR_CACHE, or the user's cache."""
    if "MURMUR_CACHE" in os.environ:
        return Path(os.environ["MURMUR_CACHE"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "murmur"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/murmur"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "murmur"


def built_folder(name: str, cache: Path | None = None, recipe: Path | None = None) -> Path:
    """Return where a model lies that is built from a recipe; another recipe, another folder."""
    recipe = recipe or BUNDLED / name
    digest = hashlib.sha256()
    for path in sorted(path for path in recipe.rglob("*") if path.is_file()):
        digest.update(path.relative_to(recipe).as_posix().encode() + path.read_bytes())
    return (cache or cache_folder()) / f"{name}-{digest.hexdigest()[:12]}"


def verify(folder: Path) -> None:
    """Compare the files of a built model with its manifest.

    Raises
    ------
    ModelFileError
        If one is missing or damaged; the message says how to build the model again.
    """
    manifest = read_manifest(folder / MANIFEST)
    for name, expected in manifest.files.items():
        path = folder / name
        found = "none"
        if path.is_file():
            with path.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != expected:
            raise ModelFileError(
                f"{path}: expected sha256 {expected}, found {found}; {manifest.command}"
            )


def read_manifest(path: Path) -> Manifest:
    """Return what is stated of a folder's files, or of those that a build must make."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelFileError(f"{path}: expected a manifest, found: {error}") from None


def open_session(
    graph: bytes,
    provider: str = "cpu",
    provider_options: dict[str, str] | None = None,
    folder: Path | None = None,
) -> ort.InferenceSession:
    """Open one ONNX graph the way the engine runs it.

    Parameters
    ----------
    graph : bytes
    provider : {"cpu", "cuda"}
    provider_options : dict, optional
    folder : Path, optional
        Where the files lie that hold weights which are not in the graph.

    Notes
    -----
    One intra-op thread: the engine splits batches over cores itself, which beats ONNX
    Runtime's own split for GRU, and keeps rows bit-identical in any batch. Denormal states are
    160-205 times slower; the option that flushes them works only on the first session of a
    process, so every session sets it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder))
    providers = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider"]}
    if provider not in providers:
        raise ModelFileError(f"provider: expected cpu or cuda, found {provider!r}")
    wanted = providers[provider]
    if wanted[0] not in ort.get_available_providers():
        raise ModelFileError(
            f"provider {provider}: this onnxruntime offers {ort.get_available_providers()}; "
            "install the extra 'gpu' instead of 'cpu'"
        )
    try:
        return ort.InferenceSession(
            graph, options, providers=wanted, provider_options=[provider_options or {}]
        )
    except Exception as error:  # noqa: BLE001 - onnxruntime raises a class for each status
        first_line = str(error).splitlines()[0]
        raise ModelFileError(f"expected an ONNX model, found: {first_line}") from None


def _read(path: Path, provider: str) -> Model:
    """Read a model file, but not its gate."""
    read = _load_statement if path.suffix == ".toml" else _load_onnx
    return read(path, provider)._replace(folder=path.parent)


def _load_onnx(path: Path, provider: str) -> Model:
    graph = path.read_bytes()
    session = open_session(graph, provider)
    try:
        metadata = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise ModelFileError(f"the metadata cannot be read: {error}") from None
    if METADATA_KEY not in metadata:
        raise ModelFileError(
            f"expected metadata key {METADATA_KEY!r}, found {sorted(metadata)}; "
            "write a TOML file beside a foreign model (docs/model-file.md)"
        )
    spec = _decode(metadata[METADATA_KEY].encode(), msgspec.json.decode)
    return _checked(spec, (session,), (graph,), hashlib.sha256(graph).hexdigest())


def _load_statement(path: Path, provider: str) -> Model:
    text = path.read_bytes()
    digest = hashlib.sha256(text)
    if (path.parent / MANIFEST).is_file():
        verify(path.parent)
        digest.update((path.parent / MANIFEST).read_bytes())
    spec = _decode(text, msgspec.toml.decode)
    sessions, graphs = [], []
    for stage in spec.stages:
        if not stage.file:
            raise ModelFileError("stages: each stage of a TOML file needs the key 'file'")
        graph_path = _resolve(stage.file, path.parent)
        if not graph_path.is_file():
            raise ModelFileError(f"stages: expected a file at {graph_path}, found none")
        graph = graph_path.read_bytes()
        digest.update(graph)
        graphs.append(graph)
        sessions.append(open_session(graph, provider, folder=graph_path.parent))
    return _checked(spec, tuple(sessions), tuple(graphs), digest.hexdigest())


def _resolve(file: str, folder: Path) -> Path:
    """Find ``package:path`` inside an installed package without importing it."""
    package, colon, inside = file.partition(":")
    if not colon:
        return folder / file
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # the package of a part is not there; an empty name
        found = None
    if found is None or not found.submodule_search_locations:
        raise ModelFileError(f"stages: {file} needs the package {package!r}: pip install it")
    return Path(found.submodule_search_locations[0]) / inside


def _decode(data: bytes, decode: Any) -> ModelSpec:
    try:
        raw = decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelFileError(f"the statement cannot be read: {error}") from None
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise ModelFileError(f"format: expected {FORMAT}, found {found!r}")
    try:
        return msgspec.convert(raw, ModelSpec)
    except msgspec.ValidationError as error:
        raise ModelFileError(str(error)) from None


def _checked(
    spec: ModelSpec,
    sessions: tuple[ort.InferenceSession, ...],
    graphs: tuple[bytes, ...],
    sha256: str,
) -> Model:
    _check_statement(spec)
    free = [
        _check_graph(stage, session) for stage, session in zip(spec.stages, sessions, strict=True)
    ]
    _check_outputs(spec, sessions)
    return Model(spec, sessions, graphs, sha256, all(free))


def _check_statement(spec: ModelSpec) -> None:
    least = spec.input.least_channels
    if least is not None and least > spec.input.channels:
        raise ModelFileError(
            f"input.least_channels: expected at most channels ({spec.input.channels}), "
            f"found {least}"
        )
    if spec.window_samples < spec.hop_samples:
        raise ModelFileError(
            f"window_samples: expected at least hop_samples ({spec.hop_samples}), "
            f"found {spec.window_samples}"
        )
    nyquist = spec.input.rate_hz / 2
    for filter_ in spec.input.filters:
        corners = 2 if filter_.kind in ("bandpass", "notch") else 1
        rising = filter_.kind != "bandpass" or sorted(set(filter_.hz)) == list(filter_.hz)
        if len(filter_.hz) != corners or not rising or not max(filter_.hz) < nyquist:
            raise ModelFileError(
                f"input.filters: {filter_.kind} expects {corners} frequencies below "
                f"{nyquist:g} Hz, the lower first, found {list(filter_.hz)}"
            )
    for index, stage in enumerate(spec.stages):
        last = index == len(spec.stages) - 1
        if last == bool(stage.passes):
            raise ModelFileError(
                f"stages[{index}].passes: expected "
                + ("nothing in the last stage" if last else "the output that the next stage reads")
                + f", found {stage.passes!r}"
            )
    window = math.prod(_feature_shape(spec))
    if math.prod(spec.stages[0].input_shape) != window:
        raise ModelFileError(
            f"stages[0].input_shape: expected {window} values (the window's features), "
            f"found {list(spec.stages[0].input_shape)}"
        )
    for meaning in _MEANINGS.get(spec.pipeline, ()):
        if meaning not in [output.meaning for output in spec.outputs]:
            raise ModelFileError(
                f"outputs: the pipeline {spec.pipeline!r} expects one that means {meaning!r}"
            )
    if spec.pipeline == "speech":
        _check_speech(spec)
    elif spec.gate is not None:
        raise ModelFileError(f"gate: expected the pipeline 'speech', found {spec.pipeline!r}")
    if spec.pipeline != "heart" and spec.beats is not None:
        raise ModelFileError(f"beats: expected the pipeline 'heart', found {spec.pipeline!r}")
    for output in spec.outputs:
        if output.meaning == "ctc" and (len(output.labels) < 2 or output.labels[0]):
            raise ModelFileError(
                f"output {output.name}: expected labels whose first is the blank '', "
                f"found {list(output.labels[:3])}"
            )
    overlap = spec.window_samples - spec.hop_samples
    if spec.pipeline == "audio" and spec.look_ahead_samples != overlap:
        raise ModelFileError(
            f"look_ahead_samples: expected window less hop ({overlap}) for the pipeline 'audio', "
            f"found {spec.look_ahead_samples}"
        )


def _check_speech(spec: ModelSpec) -> None:
    meanings = [output.meaning for output in spec.outputs]
    if meanings.count("ctc") != 1:
        raise ModelFileError(f"outputs: expected one that means 'ctc', found {meanings}")
    if spec.input.channels != 1:
        raise ModelFileError(f"input.channels: speech expects 1, found {spec.input.channels}")
    if spec.decoding.language_model and not spec.decoding.beam:
        raise ModelFileError("decoding.language_model: expected a beam beside it, found 0")
    gate = spec.gate
    if gate is None:
        return
    if gate.release > gate.threshold:
        raise ModelFileError(
            f"gate.release: expected at most the threshold ({gate.threshold:g}), "
            f"found {gate.release:g}"
        )
    look_ahead_s = spec.look_ahead_samples / spec.input.rate_hz
    if gate.hold_s < look_ahead_s:
        raise ModelFileError(
            f"gate.hold_s: expected the look-ahead ({look_ahead_s:g} s) at least, "
            f"found {gate.hold_s:g}"
        )


def _feature_shape(spec: ModelSpec) -> tuple[int, int]:
    recipe, window = spec.stages[0].features, spec.window_samples
    if isinstance(recipe, LogMel):
        return _log_mel_shape(spec, recipe)
    return (window // 2 + 1 if recipe == "magnitude" else window), spec.input.channels


def _log_mel_shape(spec: ModelSpec, recipe: LogMel) -> tuple[int, int]:
    if spec.input.channels != 1:
        raise ModelFileError(f"input.channels: log_mel expects 1, found {spec.input.channels}")
    frames = recipe.frames(spec.window_samples)
    if frames * recipe.shift_samples != spec.hop_samples:
        raise ModelFileError(
            f"window_samples: log_mel expects one frame for every {recipe.shift_samples} samples "
            f"of hop_samples ({spec.hop_samples}), found {frames} frames in {spec.window_samples}"
        )
    return frames, recipe.bins


def _check_graph(stage: Stage, session: ort.InferenceSession) -> bool:
    """Compare a stage with its graph; return whether the batch axis is free."""
    inputs = {node.name: node for node in session.get_inputs()}
    outputs = {node.name: node for node in session.get_outputs()}
    stated = [stage.input, *(s.input for s in stage.states), *stage.constants]
    if sorted(stated) != sorted(inputs):
        raise ModelFileError(
            f"inputs: the graph has {sorted(inputs)}, the statement names {sorted(stated)}"
        )
    for name, value in stage.constants.items():
        expected = "tensor(int64)" if isinstance(value, int) else "tensor(float)"
        if inputs[name].type != expected or inputs[name].shape:
            raise ModelFileError(
                f"constant {name}: expected a scalar {expected}, "
                f"found {inputs[name].type} {inputs[name].shape}"
            )
    next_states = [s.output for s in stage.states]
    if len(set(next_states)) < len(next_states):
        raise ModelFileError(f"states: expected an output of its own each, found {next_states}")
    wanted = next_states + ([stage.passes] if stage.passes else [])
    missing = [name for name in wanted if name not in outputs]
    if missing:
        raise ModelFileError(f"outputs: expected {missing}, the graph has {sorted(outputs)}")
    batchable = _check_tensor(inputs[stage.input], stage.input_shape, 0)
    for state in stage.states:
        if state.batch_axis > len(state.shape):
            raise ModelFileError(
                f"state {state.input}: batch_axis {state.batch_axis} of a row {list(state.shape)}"
            )
        free_in = _check_tensor(inputs[state.input], state.shape, state.batch_axis)
        free_out = _check_tensor(outputs[state.output], state.shape, state.batch_axis)
        batchable = batchable and free_in and free_out
    return batchable


def _check_tensor(node: Any, row: tuple[int, ...], batch_axis: int) -> bool:
    """Compare a float32 tensor of the graph with a row's shape; return if its batch is free."""
    if node.type != "tensor(float)":
        raise ModelFileError(f"{node.name}: expected tensor(float), found {node.type}")
    expected = [*row[:batch_axis], "batch", *row[batch_axis:]]
    if not node.shape:  # some exporters leave an output's shape unsaid; the first step tells
        return True
    same = len(node.shape) == len(expected) and all(
        not isinstance(found, int) or axis == batch_axis or found == wanted
        for axis, (found, wanted) in enumerate(zip(node.shape, expected, strict=False))
    )
    batch = node.shape[batch_axis] if same else None
    if not same or (isinstance(batch, int) and batch != 1):
        raise ModelFileError(f"{node.name}: expected shape {expected}, found {node.shape}")
    return not isinstance(batch, int)


def _check_outputs(spec: ModelSpec, sessions: tuple[ort.InferenceSession, ...]) -> None:
    found = {node.name: node.shape for node in sessions[-1].get_outputs()}
    for output in spec.outputs:
        if output.name not in found:
            raise ModelFileError(
                f"outputs: expected {output.name!r}, the graph has {sorted(found)}"
            )
        row = found[output.name][1:]  # empty if the graph leaves the shape unsaid
        last = row[-1] if row else None
        if output.meaning in ("beat_class", "rhythm") and not output.labels:
            raise ModelFileError(f"output {output.name}: expected labels, found none")
        if output.labels and isinstance(last, int) and last != len(output.labels):
            raise ModelFileError(
                f"output {output.name}: expected {len(output.labels)} values for its labels, "
                f"found {last}"
            )
        frames = {"beat": last, "ctc": row[0] if row else None}.get(output.meaning)
        if isinstance(frames, int) and spec.hop_samples % frames:
            raise ModelFileError(
                f"output {output.name}: expected frames that divide hop_samples "
                f"({spec.hop_samples}), found {frames}"
            )
        known = row and all(isinstance(size, int) for size in row)
        if output.meaning == "samples" and known and math.prod(row) != spec.window_samples:
            raise ModelFileError(
                f"output {output.name}: expected {spec.window_samples} values (the window), "
                f"found {row}"
            )
