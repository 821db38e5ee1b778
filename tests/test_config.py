"""The server's options: the documented file is the code's defaults, and faults are named."""

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine import config
from engine.config import Config, Limits
from engine.errors import ConfigError

DOCUMENTED = Path(__file__).parent.parent / "deploy" / "engine.toml"

SECTIONS = {
    field.name: field.type
    for field in msgspec.structs.fields(Config)
    if isinstance(field.default, msgspec.Struct)
}


def written(folder: Path, text: str) -> Path:
    path = folder / "engine.toml"
    path.write_text(text)
    return path


def leaves(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return every value of a TOML file by its dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{path}{key}"
        inner = isinstance(value, dict) and value
        found |= leaves(value, f"{name}.") if inner else {name: value}
    return found


def test_the_documented_file_lists_every_option() -> None:
    options = {*Config.__struct_fields__} - {*SECTIONS}
    for name, section in SECTIONS.items():
        options |= {f"{name}.{option}" for option in section.__struct_fields__}
    assert set(leaves(tomllib.loads(DOCUMENTED.read_text()))) == options


def test_the_documented_values_are_the_defaults_of_the_code() -> None:
    assert config.read(DOCUMENTED) == Config() == config.read(None)


def test_each_documented_option_is_explained() -> None:
    options = [line for line in DOCUMENTED.read_text().splitlines() if " = " in line]
    sections = sum(len(section.__struct_fields__) for section in SECTIONS.values())
    assert len(options) == len(Config.__struct_fields__) - len(SECTIONS) + sections
    assert [line for line in options if not re.search(r"# .{10}", line)] == []


def test_options_given_by_hand_replace_those_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[limits]\nmax_peers = 3\ncredit_s = 5.0\n")
    limits = config.read(path, ["max_peers=9", "max_load = 0.5"]).limits
    assert (limits.max_peers, limits.credit_s, limits.max_load) == (9, 5.0, 0.5)
    assert limits.max_streams == Limits().max_streams


def test_no_threads_means_every_core_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3, 5})
    assert Config().num_threads == 3
    assert Config(threads=2).num_threads == 2


@pytest.mark.parametrize(
    ("text", "key", "expected", "found"),
    [
        ("spam = 1", "spam", "unknown field", ""),
        ("[limits]\nspam = 1", "limits", "unknown field `spam`", ""),
        ("threads = 'two'", "threads", "`int`", "`str`"),
        ("threads = 1.5", "threads", "`int`", "`float`"),
        ("threads = -1", "threads", ">= 0", ""),
        ("models = 'heart'", "models", "`array`", "`str`"),
        ("models = []", "models", "length >= 1", ""),
        ("provider = 'tpu'", "provider", "", "'tpu'"),
        ("metrics = '9464'", "metrics", "matching regex", ""),
        ("limits = 1", "limits", "`object`", "`int`"),
        ("[limits]\nmax_peers = 0", "limits.max_peers", ">= 1", ""),
        ("[limits]\ncredit_s = 0.0", "limits.credit_s", ">= 1e-09", ""),
        ("[limits]\ncredit_s = nan", "limits.credit_s", ">= 1e-09", ""),
        ("[limits]\ncredit_s = '2 s'", "limits.credit_s", "`float`", "`str`"),
    ],
)
def test_a_fault_of_the_file_is_named(
    tmp_path: Path, text: str, key: str, expected: str, found: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config.read(path)
    said = str(caught.value)
    for part in (str(path), key, expected, found):
        assert part in said


@pytest.mark.parametrize("text", ["threads = ", "= 1", "threads = 1\nthreads = 2", "\x00"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        config.read(path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    path.write_bytes(b"bind = '\xff'")
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        config.read(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        config.read(path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("spam=1", "spam"),
        ("max_peers=0", "limits.max_peers"),
        ("max_peers=many", "options"),
        ("max_peers", "options"),
        ("max_peers='3'", "limits.max_peers"),
    ],
)
def test_a_bad_limit_given_by_hand_is_named(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        config.read(None, [given])
