"""Servers behind vLLM's router: what is claimed of them, what their metrics say, and that they are ended."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers.sessions import MOVED, row, rows

from going_further import vllm_router_sessions as tool
from going_further.common import EngineError, LessonError, UsageError
from going_further.http_sessions import Reply, common_claims, summarise

ROOT = Path(__file__).parent.parent
KEY = "sk-4f9a1c77e2d85b30aa61"


def test_the_claims_fail_where_their_numbers_do() -> None:
    work, counters = {"bad": [5, 5], "good": [9, 1]}, Counter(hits=992 + 4464, queries=2 * 7000)

    def failed(replies: list[Reply], work=work, counters=counters) -> list[str]:
        claims = common_claims(replies, [], 0) + tool.routed_claims(summarise(replies, 128), work, counters)
        return [claim.claim for claim in claims if not claim.holds]

    kept = [0, 896, 1408, 1920]
    counters["hits"] = 992 + sum(kept)
    assert failed(rows(MOVED, kept)) == []
    assert failed(rows(MOVED, kept), work={"bad": [9, 0], "good": [9, 1]}) == ["round_robin uses every server"]
    other = Counter(hits=1, queries=14000)
    assert failed(rows(MOVED, kept), counters=other) == ["vLLM's own counters agree with the requests"]
    assert "with consistent_hash every later turn finds its session's earlier whole blocks" in failed(rows(kept, MOVED))
    assert "consistent_hash finds more cached tokens than round_robin" in failed(rows(kept, kept))
    assert "first turns find no more than a chat template's head: the caches are cold" in failed(
        rows([128, 0, 992, 0], kept)
    )
    longer = [*rows(MOVED, kept)[:-1], row("good", 0, 3, 2501, 1920)]
    assert "both arms send equally long prompts" in failed(longer)
    assert "every request was answered" in failed([*rows(MOVED, kept), row("bad", 1, 0, None, None, "timeout")])


def test_sessions_that_do_not_fit_into_one_cache_are_refused_with_the_numbers() -> None:
    tool.check_capacity(6, 1000, 6000)
    with pytest.raises(UsageError, match=r"6 sessions of up to 1,001 tokens .* 6,000 tokens: take fewer --sessions"):
        tool.check_capacity(6, 1001, 6000)


METRICS = """\
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="a {strange} name"} 28000.0
# HELP vllm:prefix_cache_queries_created Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_created gauge
vllm:prefix_cache_queries_created{engine="0",model_name="a {strange} name"} 1.7e+09
# HELP vllm:prefix_cache_hits_total Prefix cache hits, in terms of number of cached tokens.
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="a {strange} name"} 1.2416e+04
# TYPE vllm:external_prefix_cache_hits_total counter
vllm:external_prefix_cache_hits_total{engine="0",model_name="a {strange} name"} 5.0
"""


def test_a_servers_own_counts_of_tokens_are_read_from_its_metrics() -> None:
    pytest.importorskip("prometheus_client", reason="comes with vLLM")
    assert tool.cache_counters(METRICS) == {"hits": 12416, "queries": 28000}


def test_what_a_server_computed_is_what_it_was_asked_for_less_what_it_found() -> None:
    start, bad, good, good_again, bad_again = (
        [Counter(queries=queries, hits=hits) for queries, hits in servers]
        for servers in (
            [(7, 3), (0, 0)],
            [(17, 3), (30, 5)],
            [(47, 23), (30, 5)],
            [(47, 23), (70, 35)],
            [(57, 23), (90, 40)],
        )
    )
    snapshots = [start, bad, good, good_again, bad_again]
    assert tool.computed_per_server(snapshots) == {"bad": [10 + 10, 25 + 15], "good": [10 + 0, 0 + 10]}
    assert tool.counted_by_all(snapshots) == {"queries": 140, "hits": 60}


def test_without_vllm_router_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "use_python_with_vllm", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LessonError, match=r"vllm-router is missing: run .* -m pip install -r requirements-router.txt"):
        tool.route(argparse.Namespace())


@pytest.mark.parametrize("options", [["--token", KEY], ["--base-url", f"http://me:{KEY}@127.0.0.1/v1"], [KEY]])
def test_an_argument_that_is_not_known_is_one_line_that_does_not_repeat_it(options: list[str]) -> None:
    command = [sys.executable, "-m", "going_further.vllm_router_sessions", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert "arguments that are not known" in done.stderr
    assert KEY not in done.stderr


# --- what is started is ended ---

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 1:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "a child of a child"])
    print("ready", flush=True)
time.sleep(600)
"""


def group_is_alive(group: int) -> bool:
    """Say whether a process group has a member that is no zombie."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            states += [state] if int(its_group) == group else []
    return any(state != "Z" for state in states)


def test_a_child_that_ignores_the_request_is_killed_with_its_own_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "END_SECONDS", 0.5)
    children = [tool.start_child("stubborn", 1, [sys.executable, "-c", STUBBORN], tmp_path)]
    group = children[0].process.pid
    with tool.ending(children):
        while "ready" not in children[0].log.read_text():
            time.sleep(0.05)
        assert group_is_alive(group)
    assert children[0].process.returncode == -signal.SIGKILL
    end = time.monotonic() + 5
    while group_is_alive(group):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_child_that_ends_at_its_start_is_one_line_with_the_root_cause_and_the_log(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    fails = "raise SystemExit('(EngineCore pid=7) ValueError: the KV cache is too small\\nlast words')"
    children = [tool.start_child("server 0", 1, [sys.executable, "-c", fails], folder)]
    with tool.ending(children), pytest.raises(EngineError) as caught:
        tool.wait_until_healthy(children)
    kept = tmp_path / "run.log"
    cause = "ValueError: the KV cache is too small"
    assert str(caught.value) == f"server 0 ended with status 1: {cause} (its log: {kept})"
    assert "last words" in kept.read_text()


def test_free_ports_are_different_and_free() -> None:
    ports = tool.free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        with socket.socket() as found:
            found.bind(("127.0.0.1", port))
