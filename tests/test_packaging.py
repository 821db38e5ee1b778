"""A fresh machine gets what was tested: versions are pinned, and the units agree with the code."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from engine.config import Limits
from engine.loop import SERVER

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = {
    canonicalize_name(name): Version(version)
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M
    )
}


@pytest.mark.parametrize(
    "line",
    sorted({*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)}),
)
def test_every_direct_dependency_is_pinned_to_an_allowed_version(line: str) -> None:
    wanted = Requirement(line)
    if wanted.name != PROJECT["name"]:
        assert wanted.specifier.contains(PINS[canonicalize_name(wanted.name)])


def test_a_constraint_is_a_version_of_the_index_and_nothing_else() -> None:
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == len(PINS)
    assert [name for name, version in PINS.items() if version.local] == []


def test_what_the_demo_installs_asks_for_no_torch() -> None:
    lines = [*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["ecg"]]
    assert "torch" not in {Requirement(line).name for line in lines}


def test_systemd_waits_longer_than_the_server_drains() -> None:
    unit = (ROOT / "deploy" / "murmur.service").read_text()
    (wait_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)
    assert int(wait_s) > Limits().drain_s
    assert re.search(r"^KillSignal=SIGTERM$", unit, re.M)


def test_the_server_names_the_version_of_the_package() -> None:
    name, version = SERVER.split()
    assert name == "murmur"
    assert PROJECT["version"].startswith(f"{version}.")
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()
