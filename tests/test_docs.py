"""What is written for people is what the code does: the pages, held to the source."""

import ast
import re
from pathlib import Path
from typing import Any, get_args

import msgpack
import msgspec
import pytest

from engine import messages as m
from engine import model_file, rules
from engine.config import Limits
from engine.model_file import ModelSpec
from tests.drive import Driven

ROOT = Path(__file__).parent.parent
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
ALERTS = (ROOT / "docs" / "alerts.md").read_text()
MODEL_FILE = (ROOT / "docs" / "model-file.md").read_text()
KINDS = {*get_args(m.Request), *get_args(m.Reply)}


def section(page: str, title: str) -> str:
    """Return what stands under a heading, up to the next one."""
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", page, re.M | re.S)
    assert match, f"no heading {title!r}"
    return match[1]


def rows(text: str) -> list[list[str]]:
    """Return the cells of a section's tables, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = [i - 1 for i, row in enumerate(cells) if set(row[0]) == {"-"}]
    return [row for i, row in enumerate(cells) if i not in heads and i - 1 not in heads]


def documented_fields(page: str, title: str) -> dict[str, str]:
    """Return field and default of a section's table."""
    return {row[0].strip("`"): row[2].strip("`") for row in rows(section(page, title))}


def defaults(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.default for field in msgspec.structs.fields(kind)}


def refusals() -> set[str]:
    """Return every code that the engine refuses with, by raising or by saying it."""
    codes = set()
    for file in ("loop", "session", "speech/hotwords"):
        for node in ast.walk(ast.parse((ROOT / "engine" / f"{file}.py").read_text())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                function = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if function in ("Refused", "Error"):
                    codes.add(node.args[0].value)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "_fail":
                codes.add(node.args[1].value)
    return codes


@pytest.mark.parametrize("kind", sorted(KINDS, key=lambda kind: kind.__name__))
def test_every_message_is_documented_with_its_fields_and_defaults(kind: type[m.Message]) -> None:
    if kind is m.Alert:
        assert m.NOTICE in documented_fields(PROTOCOL, "alert")["notice"]
    fields = documented_fields(PROTOCOL, kind.__name__.lower())
    assert list(fields) == list(kind.__struct_fields__)
    for name, default in defaults(kind).items():
        if default is msgspec.NODEFAULT:
            assert fields[name] == ""
        elif default is None:
            assert fields[name] == "nil"
        elif default != m.NOTICE:
            assert ast.literal_eval(fields[name]) == default


def test_every_code_of_an_error_is_documented_and_no_other() -> None:
    assert {row[0].strip("`") for row in rows(section(PROTOCOL, "Errors"))} == refusals()


def test_every_limit_is_documented_with_its_default() -> None:
    told = {row[0].strip("`"): float(row[1]) for row in rows(section(PROTOCOL, "Limits"))}
    assert told == msgspec.structs.asdict(Limits())


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("The statement", ModelSpec),
        ("`input`", model_file.Input),
        ("`input.filters[]`", model_file.Filter),
        ("`stages[]`", model_file.Stage),
        ("`stages[].states[]`", model_file.State),
        ("`outputs[]`", model_file.Output),
        ("`gate`", model_file.Gate),
        ("`decoding`", model_file.Decoding),
        ("`beats`", model_file.Beats),
    ],
)
def test_every_key_of_a_model_file_is_documented_with_its_default(
    title: str, kind: type[msgspec.Struct]
) -> None:
    fields = documented_fields(MODEL_FILE, title)
    assert set(fields) == set(kind.__struct_fields__)
    for field in msgspec.structs.fields(kind):
        told = fields[field.name]
        if field.default_factory is not msgspec.NODEFAULT or field.default in ((), None):
            assert told == "none"
        elif isinstance(field.default, msgspec.Struct):
            assert told == "its own"
        elif field.required:
            assert told == ""
        else:
            assert ast.literal_eval(told) == field.default


def test_every_key_of_a_rule_is_documented_with_its_default() -> None:
    keys = [row for row in rows(section(ALERTS, "The file")) if len(row) == 3 and row[1] != ""]
    told = {row[0].strip("`"): row[1].strip('`"') for row in keys}
    for field in msgspec.structs.fields(rules._Entry):
        if field.required:
            assert f"| `{field.encode_name}` | |" in ALERTS
        elif field.default in ((), None):
            assert told[field.name] == "none"
        elif isinstance(field.default, str):
            assert told[field.name] == field.default
        else:
            assert float(told[field.name]) == field.default


def test_the_rules_that_come_along_are_documented_and_no_other() -> None:
    table = ALERTS[ALERTS.index("| rule | raise | priority |") :]
    told = {row[0].strip("`"): (row[1].strip("`"), row[2]) for row in rows(table)}
    assert told == {
        rule.name: (rules.spelt(rule.raised), rule.priority)
        for rule in rules.load().by_name.values()
    }


def test_the_example_of_a_foreign_model_is_the_file_that_is_served() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", MODEL_FILE, re.S)
    served = (model_file.BUNDLED / "silero-vad.toml").read_bytes()
    assert msgspec.toml.decode(example) == msgspec.toml.decode(served)


def conversation() -> list[tuple[bool, bytes]]:
    """Return the bodies of the recorded conversation: whether from the client, and its bytes."""
    bodies: list[tuple[bool, bytes]] = []
    for block in re.findall(r"```text\n(.*?)```", section(PROTOCOL, "A whole conversation"), re.S):
        for sign, code in re.findall(r"^([<>]) ((?:[0-9a-f]+\n {2})*[0-9a-f]+)$", block, re.M):
            bodies.append((sign == ">", bytes.fromhex(code.replace("\n", ""))))
    return bodies


def test_the_recorded_conversation_is_what_a_server_says() -> None:
    engine = Driven(model_file.find("heart"), max_streams=4096, bridge_s=Limits().bridge_s)
    expected, found = [], []
    for from_client, body in conversation()[:-2]:  # the last two are a subscriber's
        if not from_client:
            expected += msgpack.unpackb(body)
            continue
        engine.throw("client", body)
        engine.run()
        found += msgpack.unpackb(engine.engine.take(b"client"))
    for message in [*expected, *found]:
        for key in ("sha256", "hop_s", "look_ahead_s"):  # of the model file of the day
            message.pop(key, None)
    assert found == expected
    assert len(found) == 11


def test_the_recorded_beat_can_be_read() -> None:
    topic, body = (body for _, body in conversation()[-2:])
    (beat,) = m.decode_replies(body)
    assert isinstance(beat, m.Beat)
    assert topic == f"beat/{beat.stream}".encode()


def test_every_test_that_the_page_on_security_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text()))
    found = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert named - found == set()
    assert len(named) > 15
