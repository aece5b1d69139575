"""A real server under lesson 1's two layouts, killed, and started anew: what is shown is what its requests report."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

from going_further.common import good_messages, system_prompt
from going_further.http_sessions import count_tokens
from going_further.vllm_router_sessions import (
    Child,
    choose_model,
    end_marked,
    ending,
    free_ports,
    server_command,
    start_child,
    vllm_is_for_gpus,
    wait_until_healthy,
)
from going_further.watch_server import BLOCKS
from stable_prefix_vs_timestamp import bad_messages

openai = pytest.importorskip("openai", reason="the client: pip install -r requirements-router.txt")

pytestmark = pytest.mark.alone  # it looks at times
ROOT = Path(__file__).parent.parent.parent
LAYOUTS = {"bad": bad_messages, "good": good_messages}
REQUESTS = 4


def start_server(port: int, folder: Path, children: list[Child]) -> Child:
    """Start the server of vllm_router_sessions with a small cache; a second one at the same port is the first anew."""
    model, served = choose_model(None, vllm_is_for_gpus())
    command = server_command(model, served, vllm_is_for_gpus())
    command[command.index("--kv-cache-memory-bytes") + 1] = str(2**28)
    child = start_child(f"server {len(children)}", port, command, folder, TMPDIR=str(folder), SPT_NOENV="1")
    children.append(child)
    wait_until_healthy([child])
    return child


def send(server: Child, layout: str) -> tuple[int, int]:
    """Send lesson 1's requests in one layout; return the prompt and the cached tokens that they report."""
    system = system_prompt(1000, count_tokens)
    prompt = cached = 0
    _, served = choose_model(None, vllm_is_for_gpus())
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for n in range(REQUESTS):
            messages = LAYOUTS[layout](f"{layout}: {system}", n)  # no layout finds what another one left
            usage = client.chat.completions.create(model=served, messages=messages, max_tokens=4).usage
            prompt += usage.prompt_tokens
            cached += usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    return prompt, cached


def lines_until(watcher: subprocess.Popen[str], lines: list[str], what: str) -> None:
    """Read what the tool prints until a line holds `what`; a tool that hangs, the time limit of the test ends."""
    for line in watcher.stdout:
        lines.append(line.rstrip("\n"))
        if what in line:
            return
    pytest.fail(f"no {what!r} in {lines}")


@dataclass
class Done:
    status: int
    lines: list[str]
    reported: dict[str, tuple[int, int]]  # prompt and cached tokens by layout; "again": of the server started anew
    samples: dict[str, list[dict]]
    once: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Watch a server through both layouts, its death and its next life."""
    folder, path = tmp_path_factory.mktemp("watched"), tmp_path_factory.mktemp("json") / "out.json"
    tool = [sys.executable, "-m", "going_further.watch_server"]
    (port,) = free_ports(1)
    children: list[Child] = []
    lines: list[str] = []
    reported = {}
    marks = []  # how many lines there were before a layout, and after it
    with ending(children):
        server = start_server(port, folder, children)
        command = [*tool, "--interval", "1", "--json", str(path), f"{server.url}/v1"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with subprocess.Popen(command, cwd=ROOT, **pipes) as watcher:
            try:
                lines_until(watcher, lines, "since start")
                for layout in LAYOUTS:
                    reported[layout] = send(server, layout)
                    time.sleep(3)  # so that the last request is in a line, and one line is of nothing
                    marks.append(time.time())
                end_marked(str(folder))  # all but the tracker that frees shared memory
                lines_until(watcher, lines, "gone since")
                server = start_server(port, folder, children)
                lines_until(watcher, lines, "restarted")
                reported["again"] = send(server, "good")
                time.sleep(3)
                once = subprocess.run([*tool, "--once", server.url], cwd=ROOT, capture_output=True, text=True)
                watcher.send_signal(signal.SIGINT)
                out, err = watcher.communicate(timeout=10)
            finally:
                watcher.kill()
    lines += out.splitlines()
    assert err == "interrupted\n"
    result = json.loads(path.read_text())
    return Done(watcher.returncode, lines, reported, by_phase(result["samples"], marks), once)


def by_phase(samples: list[dict], marks: list[float]) -> dict[str, list[dict]]:
    """Sort a run's samples by what was sent: in one layout, in the other, and to the server started anew."""
    phases = {"bad": [], "good": [], "gone": [], "again": []}
    restarted = False
    for sample in samples:
        at = datetime.fromisoformat(sample["at"]).timestamp()
        restarted |= sample["state"] == "restarted"
        phase = "bad" if at < marks[0] else "good" if at < marks[1] else "again" if restarted else "gone"
        phases[phase].append(sample)
    return phases


@pytest.mark.parametrize("layout", ["bad", "good", "again"])
def test_the_intervals_show_exactly_the_tokens_that_the_requests_report(done: Done, layout: str) -> None:
    prompt, cached = done.reported[layout]
    shown = [sample for sample in done.samples[layout] if sample["queried_tokens"]]
    assert sum(sample["queried_tokens"] for sample in shown) == prompt
    assert sum(sample["prompt_tokens"] for sample in shown) == prompt
    assert sum(sample["cached_tokens"] for sample in shown) == cached
    assert sum(sample["first_tokens"] for sample in shown) == REQUESTS
    for sample in shown:
        assert sample["hit_rate"] == sample["cached_tokens"] / sample["queried_tokens"]
        assert 0 < sample["ttft_p50_ms"] <= sample["ttft_p90_ms"]


def test_the_hit_rate_since_the_start_is_that_of_all_requests(done: Done) -> None:
    prompt = done.reported["bad"][0] + done.reported["good"][0]
    cached = done.reported["bad"][1] + done.reported["good"][1]
    assert done.samples["good"][-1]["hit_rate_since_start"] == cached / prompt


def test_the_two_layouts_can_be_told_apart(done: Done) -> None:
    rates = {layout: cached / prompt for layout, (prompt, cached) in done.reported.items()}
    assert rates["bad"] < 0.2 < 0.5 < rates["good"] == rates["again"]


def test_intervals_of_nothing_have_no_hit_rate(done: Done) -> None:
    idle = [sample for sample in done.samples["bad"] if sample["queried_tokens"] == 0]
    assert idle
    assert {(sample["hit_rate"], sample["ttft_p50_ms"]) for sample in idle} == {(None, None)}


def test_that_the_server_was_killed_and_started_anew_is_said(done: Done) -> None:
    states = [sample["state"] for sample in done.samples["gone"]]
    assert states[-1] == "gone"
    assert "connection refused" in done.samples["gone"][-1]["fault"]
    assert done.samples["again"][0]["state"] == "restarted"
    assert {sample["state"] for sample in done.samples["again"][1:]} == {"interval"}
    assert done.status == 130


def test_lines_are_of_80_columns_and_end_with_the_sparkline(done: Done) -> None:
    assert max(map(len, done.lines)) <= 80
    assert any(line.rstrip()[-1] in BLOCKS for line in done.lines if line)


def test_one_look_shows_what_was_since_the_start(done: Done) -> None:
    prompt, cached = done.reported["again"]
    assert (done.once.returncode, done.once.stderr) == (0, "")
    rate = f"{cached / prompt:.1%}"
    assert done.once.stdout.splitlines()[-1].endswith(f" {rate} {rate} since start")
