"""Real vLLM servers behind the real vllm-router: both arms, and what is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.models import write_llama
from helpers.processes import left_behind, lesson_processes

pytest.importorskip("vllm_router", reason="vllm-router is not installed: pip install -r requirements-router.txt")

pytestmark = pytest.mark.alone  # servers at once, and signals have ten seconds
ROOT = Path(__file__).parent.parent.parent
TOOL = [sys.executable, "-m", "going_further.vllm_router_sessions"]


def ports_in_use(temporary: Path) -> set[int]:
    """Return the TCP ports at which the processes of a run listen."""
    inodes = set()
    for pid in lesson_processes(temporary):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    inodes.add(os.readlink(handle))
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [(words[1], words[9]) for words in sockets if words[3] == "0A"]
    return {int(address.split(":")[1], 16) for address, inode in listening if f"socket:[{inode}]" in inodes}


def answering(ports: set[int]) -> list[int]:
    """Return those of the ports at which something listens."""
    found = []
    for port in ports:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                found.append(port)
    return found


@dataclass
class Done:
    status: int
    out: str
    err: str
    ports: set[int]
    left: list
    result: dict


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    path, ports, lines = tmp_path_factory.mktemp("router") / "out.json", set(), []
    command = [*TOOL, "--prefix-tokens", "800", "--json", str(path)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as temporary:
        with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": temporary}, **pipes) as process:
            for line in process.stdout:
                lines.append(line)
                ports |= ports_in_use(Path(temporary))
            err = process.stderr.read()
        left = left_behind(Path(temporary))
    assert process.returncode == 0, "".join(lines) + err
    return Done(process.returncode, "".join(lines), err, ports, left, json.loads(path.read_text()))


def rows(result: dict, arm: str) -> list[dict]:
    return [m for m in result["measurements"] if m["arm"] == arm]


def test_every_claim_holds_and_the_json_keeps_the_schema(done: Done) -> None:
    assert [claim for claim in done.result["claims"] if not claim["holds"]] == []
    assert len(done.result["claims"]) == 7
    assert (done.result["schema"], done.result["lesson"]) == (1, "vllm_router_sessions")
    assert {m["predicted_cached_tokens"] for m in done.result["measurements"]} == {None}
    assert all(m["ttft_ms"] > 0 and m["error"] is None for m in done.result["measurements"])
    environment = done.result["environment"]
    assert (environment["model"], environment["weights"], environment["dtype"]) == (
        "built_in_model/cpu", "random", "bfloat16"
    )  # fmt: skip
    assert environment["block_size"] == 128
    assert str(ROOT.parent) not in json.dumps(done.result), "no path of this machine"


def test_with_consistent_hash_a_turn_finds_exactly_the_whole_blocks_of_the_turn_before(done: Done) -> None:
    before: dict[tuple, int] = {}
    for m in rows(done.result, "good"):
        session = m["round"], m["session"]
        assert m["cached_tokens"] == before.get(session, 0) // 128 * 128
        before[session] = m["prompt_tokens"]
    assert len(before) == 12


def test_round_robin_changes_servers_and_loses_what_was_said(done: Done) -> None:
    bad, good = (sum(m["cached_tokens"] for m in rows(done.result, arm)) for arm in ("bad", "good"))
    assert bad < 0.9 * good, "about half of the turns meet the other server"
    work = done.result["computed_tokens_per_worker"]["bad"]
    assert min(work) > 0.3 * sum(work), "round robin spreads the work"


def test_both_arms_send_the_same_turns(done: Done) -> None:
    bad, good = (
        sorted((m["round"], m["session"], m["request"], m["prompt_tokens"]) for m in rows(done.result, arm))
        for arm in ("bad", "good")
    )
    assert bad == good


def test_the_output_is_one_table_and_a_verdict_of_two_lines(done: Done) -> None:
    assert done.err == ""
    assert max(map(len, done.out.splitlines())) <= 80
    for text in ("BAD: round_robin", "GOOD: consistent_hash", "hit rate", "TTFT, p90", "none, HTTP tells no token ids"):
        assert text in done.out
    verdict = done.out.split("\n\n")[-2].splitlines()
    assert len(verdict) == 2
    assert verdict[0].startswith("The same turns: round_robin computes ")


def test_a_run_leaves_no_process_and_no_port(done: Done) -> None:
    assert len(done.ports) >= 2 + 2 * 2, "two servers, two routers with a port for their metrics each"
    assert done.left == []
    assert answering(done.ports) == []


def wait_for(process: subprocess.Popen[str], measuring: bool, temporary: Path) -> None:
    """Wait until both servers are starting, or until the first arm has been measured."""
    if not measuring:
        while len(lesson_processes(temporary)) < 4:  # the tool, its watchdog and two servers
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        time.sleep(3)  # into the start of the servers' own processes
        return
    for line in process.stdout:
        if line.startswith("round 1"):
            return
    pytest.fail(f"the tool ended early: {process.communicate()}")


@pytest.mark.parametrize(
    ("sent", "measuring"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGKILL, False), (signal.SIGINT, True)],
)
def test_a_signal_ends_servers_and_routers_within_ten_seconds(
    sent: signal.Signals, measuring: bool, temporary: Path
) -> None:
    process = subprocess.Popen(
        TOOL, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(process, measuring, temporary)
    ports = ports_in_use(temporary)
    assert not measuring or len(ports) >= 6
    process.send_signal(sent)
    out, err = process.communicate(timeout=10)
    assert process.returncode == (-sent if sent == signal.SIGKILL else 128 + sent)
    assert "Traceback" not in out + err
    assert left_behind(temporary) == []
    assert answering(ports) == []


def test_a_server_that_cannot_start_is_one_line_with_the_root_cause_and_the_log(
    tmp_path: Path, temporary: Path
) -> None:
    model = write_llama(tmp_path / "broken")
    (model / "model.safetensors").write_bytes(b"no weights")
    done = subprocess.run([*TOOL, "--model", model], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    told = r"error: server \d ended with status 1: .*SafetensorError: .* \(its log: (.+\.log)\)"
    found = re.search(told, done.stderr)
    assert found, done.stderr
    assert "SafetensorError" in Path(found[1]).read_text()
    assert left_behind(temporary) == []


def test_more_servers_than_cores_are_refused_before_one_starts() -> None:
    done = subprocess.run([*TOOL, "--workers", "4000"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "--workers 4000 needs as many cores" in done.stderr
