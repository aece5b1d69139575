"""Deployments that are already there, of real vLLM servers behind the real vllm-router: sticky, and not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from going_further.vllm_router_sessions import ending, free_ports, start_child, wait_until_healthy

pytest.importorskip("vllm_router", reason="vllm-router is not installed: pip install -r requirements-router.txt")

pytestmark = pytest.mark.alone  # it looks at times
ROOT = Path(__file__).parent.parent.parent
TOOL = [sys.executable, "-m", "going_further.is_it_sticky"]
KEY = "sk-4f9a1c77e2d85b30aa61"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start what the README tells to start on several machines, and yield the addresses of its parts."""
    model, folder = ROOT / "built_in_model" / "cpu", tmp_path_factory.mktemp("deployment")
    server = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--load-format", "dummy",
        "--enable-prefix-caching", "--enable-prompt-tokens-details", "--api-key", KEY,
        "--served-model-name", "built_in_model", "--enforce-eager", "--kv-cache-memory-bytes", str(2**28),
        "--gpu-memory-utilization", "0.1",
    ]  # fmt: skip
    cores, children = sorted(os.sched_getaffinity(0)), []
    with ending(children):
        for n, port in enumerate(free_ports(2)):
            place = dict(VLLM_CPU_OMP_THREADS_BIND=str(cores[n]), TMPDIR=str(folder))
            children.append(start_child(f"server {n}", port, server, folder, **place))
        wait_until_healthy(children)
        workers = [child.url for child in children]
        for policy in ("consistent_hash", "round_robin"):
            port, metrics = free_ports(2)
            router = ["vllm_router.launch_router", "--policy", policy, "--prometheus-port", str(metrics)]
            command = [sys.executable, "-m", *router, "--worker-urls", *workers]
            children.append(start_child(policy, port, command, folder, TMPDIR=str(folder)))
        wait_until_healthy(children)
        yield {child.name: child.url for child in children}


@pytest.mark.parametrize(
    ("part", "status", "sticky", "says"),
    [
        ("consistent_hash", 0, True, "Sticky by x-session-id: with it all later turns find their last turn"),
        ("round_robin", 1, False, "Not sticky by x-session-id: with it"),
        ("server 0", 0, True, "All later turns find their last turn, but 12 names reach one server"),
    ],
)
def test_a_deployment_that_is_there_is_told_sticky_or_not(
    deployment: dict[str, str], tmp_path: Path, part: str, status: int, sticky: bool, says: str
) -> None:
    path = tmp_path / "out.json"
    small = ["--sessions", "4", "--requests", "4", "--prefix-tokens", "400", "--json", str(path)]
    command = [*TOOL, f"{deployment[part]}/v1", "--api-key-env", "DEPLOYMENT_KEY", *small]
    env = os.environ | {"DEPLOYMENT_KEY": KEY}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (status, ""), done.stdout + done.stderr
    assert says in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 80
    result = json.loads(path.read_text())
    assert (result["lesson"], result["sticky"]) == ("is_it_sticky", sticky)
    assert result["servers_reached"]["good"] == (1 if part == "server 0" else 2)
    assert result["environment"]["model"] == "built_in_model"
    assert all(m["ttft_ms"] > 0 and m["predicted_cached_tokens"] is None for m in result["measurements"])
    assert KEY not in done.stdout + path.read_text()


def test_a_key_that_a_real_server_refuses_is_reported_without_the_key(deployment: dict[str, str]) -> None:
    command = [*TOOL, f"{deployment['consistent_hash']}/v1", "--api-key-env", "DEPLOYMENT_KEY"]
    env = os.environ | {"DEPLOYMENT_KEY": "sk-of-somebody-else"}
    done = subprocess.run([*command, "--served-model", "m"], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert "failed: HTTP 401 Unauthorized" in done.stdout
    assert "somebody-else" not in done.stdout + done.stderr
