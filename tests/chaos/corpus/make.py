"""Write the inputs that the fuzzers begin with: ``python -m tests.chaos.corpus.make``.

Beside them lie inputs that once broke something; those have names of their own and stay.
"""

from pathlib import Path

import msgpack
import msgspec

from engine import model_file
from engine.features import LogMel
from engine.model_file import Filter, Input, Output, Stage
from tests import tiny
from tests.chaos import fuzz

HERE = Path(__file__).parent


def bodies() -> list[bytes]:
    """Return honest conversations, a body each, and some bytes that are none."""
    hello, *rest = fuzz.TEMPLATES
    opens = [number for number, one in enumerate(rest) if one["type"] == "open"]
    talks = [[hello, *rest[at : at + 9]] for at in opens] + [[one] for one in fuzz.TEMPLATES]
    packed = [msgpack.packb(talk) for talk in talks]
    return [*packed, b"", b"\x90", b"\xdd\xff\xff\xff\xff", b"\x91" * 900, packed[0][:-1]]


def statements() -> list[bytes]:
    """Return what model files state, in JSON and in TOML."""
    log_mel = Stage("x", (2, 40), features=LogMel(10, 40, 20))
    specs = [
        tiny.spec(),
        tiny.spec(pipeline="heart", look_ahead_samples=8, priority=9),
        tiny.spec(input=Input(100.0, "mV", filters=(Filter("bandpass", (0.5, 40.0), 2),))),
        tiny.spec(stages=(log_mel,), outputs=(Output("beat", "ctc", ("", "a")),)),
        tiny.spec(gate=model_file.Gate("detector.onnx"), pipeline="speech"),
        tiny.spec(beats=model_file.Beats("detector.onnx", 1, 10, 5, 1), pipeline="heart"),
    ]
    raw = [msgspec.to_builtins(spec) for spec in specs]
    for one in raw:
        for stage in one["stages"]:
            stage["file"] = "graph.onnx"
    tomls = [msgspec.toml.encode(_without_none(one)) for one in raw]
    jsons = [model_file.encode_spec(spec).encode() for spec in specs]
    return [*jsons, *tomls, b"{", b"{}", b"[]", b"format = 1\n"]


def _without_none(part: object) -> object:
    """Return the same without what TOML cannot say."""
    if isinstance(part, dict):
        return {key: _without_none(value) for key, value in part.items() if value is not None}
    return [_without_none(value) for value in part] if isinstance(part, list) else part


def main() -> None:
    for target, inputs in (("wire", bodies()), ("files", statements())):
        (HERE / target).mkdir(exist_ok=True)
        for number, data in enumerate(inputs):
            (HERE / target / f"seed-{number:02d}").write_bytes(data)


if __name__ == "__main__":
    main()
