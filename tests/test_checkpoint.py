"""Checkpoints as bytes, and the store that keeps them: real files, damaged and full ones too."""

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import checkpoint
from engine.checkpoint import Entry, Store
from engine.errors import CheckpointError, ConfigError

DEADLINE_S = 20.0

_bits = st.binary(min_size=24, max_size=24)
_arrays = st.builds(
    lambda bits, kind: np.frombuffer(bits, kind).reshape(3, -1),
    _bits,
    st.sampled_from(["<f4", "<f8", "<i8", "u1"]),
)
_plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_subnormal=False)  # the engine flushes them, see conftest.py
    | st.text()
    | st.binary()
    | _arrays,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def same(one: object, other: object) -> bool:
    """Compare to the last bit, nan included."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and one.tobytes() == other.tobytes()
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    return type(one) is type(other) and repr(one) == repr(other)


@given(_plain)
def test_what_is_written_is_read_to_the_last_bit(state: object) -> None:
    assert same(checkpoint.decode(checkpoint.encode(state)), state)


def test_an_array_that_was_read_can_be_written_to() -> None:
    read = checkpoint.decode(checkpoint.encode(np.zeros(3)))
    read[0] = 1.0
    assert read.tolist() == [1.0, 0.0, 0.0]


def test_a_single_bit_that_changed_is_noticed() -> None:
    written = checkpoint.encode({"state": np.arange(8, dtype=np.float32)})
    for place in range(len(written)):
        damaged = bytearray(written)
        damaged[place] ^= 0x10
        with pytest.raises(CheckpointError):
            checkpoint.decode(bytes(damaged))


def test_what_was_cut_short_is_noticed() -> None:
    written = checkpoint.encode([1, "two"])
    for length in range(len(written)):
        with pytest.raises(CheckpointError):
            checkpoint.decode(written[:length])


def test_another_format_is_named() -> None:
    later = bytearray(checkpoint.encode(1))
    later[6] = checkpoint.FORMAT + 1
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of format 1, found 2"):
        checkpoint.decode(bytes(later))


def test_objects_are_not_written() -> None:
    with pytest.raises(NotImplementedError, match="plain data"):
        checkpoint.encode({"state": object()})


class Woken:
    """Notes that it was called."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self) -> None:
        self._event.set()

    def wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self._event.wait(DEADLINE_S), "the store did not say that it was through"
            self._event.clear()


@pytest.fixture
def woken() -> Woken:
    return Woken()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "streams.db"


@pytest.fixture
def store(path: Path, woken: Woken) -> Iterator[Store]:
    one = Store(path, 100.0, woken)
    yield one
    one.close()


def read(path: Path) -> dict[str, bytes]:
    one = Store(path, 100.0, lambda: None)
    found = dict(one.load())
    one.close()
    return found


def test_the_latest_of_each_name_is_kept(store: Store, path: Path, woken: Woken) -> None:
    store.start()
    store.put([Entry("a", b"1"), Entry("b", b"2")])
    store.put([Entry("a", b"3")])
    number = store.put([Entry("b", None), Entry("c", b"4")])
    woken.wait(lambda: store.committed == number)
    store.close()
    assert read(path) == {"a": b"3", "c": b"4"}


def test_what_is_committed_is_in_the_file_while_the_store_is_open(
    store: Store, path: Path, woken: Woken
) -> None:
    """As a process would find it that comes after a kill: the files as they lie there."""
    store.start()
    number = store.put([Entry("a", b"1")])
    woken.wait(lambda: store.committed == number)
    for file in path.parent.glob("streams.db*"):
        (path.parent / file.name.replace("streams", "copy")).write_bytes(file.read_bytes())
    assert read(path.parent / "copy.db") == {"a": b"1"}


def test_a_second_server_cannot_have_it(store: Store, path: Path) -> None:
    with pytest.raises(ConfigError, match="locked"):
        Store(path, 100.0, lambda: None)


def test_another_database_is_refused(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE lines (x)")
    other.close()
    with pytest.raises(ConfigError, match="expected a store of version 1, found version 0"):
        Store(path, 100.0, lambda: None)


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.write_bytes(b"something else" * 100)
    with pytest.raises(ConfigError, match="not a database"):
        Store(path, 100.0, lambda: None)


def test_a_full_file_is_a_fault_that_is_told_and_passes(path: Path, woken: Woken) -> None:
    store = Store(path, 0.25, woken)
    store.start()
    store.put([Entry("large", os.urandom(400_000))])
    woken.wait(lambda: bool(store.fault))
    assert "full" in store.fault
    assert store.committed == 0
    assert store.behind == 1
    store.close()
    assert read(path) == {}
