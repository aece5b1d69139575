"""The log replayer on the real engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import write_llama

ROOT = Path(__file__).parent.parent.parent
SYSTEM = {"role": "system", "content": "You are an agent. Use the tools. " * 60}
TOOLS = [{"type": "function", "function": {"name": "get_order", "parameters": {"type": "object"}}}]


def write_log(path: Path) -> Path:
    """Write two interleaved conversations, an identical request, a changed state, and a call of a tool."""
    said = [
        {"role": "user", "content": "Where is my order? " * 20},
        {"role": "assistant", "content": "I will look. " * 20},
    ]
    call = {"type": "function", "id": "1", "function": {"name": "get_order", "arguments": '{"id": 7}'}}
    other = {"role": "system", "content": "Another agent with other rules. " * 60}
    with_call = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "{}"}]
    states = [{"role": "system", "content": f'{SYSTEM["content"]}{{"step": {n}}}'} for n in range(2)]
    bodies = [
        {"messages": [SYSTEM, said[0]]},
        {"messages": [other, said[0]]},
        {"messages": [SYSTEM, *said, said[0]]},
        {"messages": [SYSTEM, *said, said[0]]},
        {"messages": [other, *said, said[0]]},
        *({"messages": [state, said[0]]} for state in states),
        {"messages": [SYSTEM, said[0]], "tools": TOOLS},
        {"messages": [SYSTEM, said[0], *with_call], "tools": TOOLS},
    ]
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    return path


def replay(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "going_further.replay_request_log", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("model", ["built-in", "llama"])
def test_every_request_of_a_log_is_cached_as_predicted(model: str, tmp_path: Path) -> None:
    out, options = tmp_path / "out.json", ["--block-size", "32"]
    if model == "llama":
        message = "<s>{{ m.role }}: {{ m.content }}{{ m.tool_calls or '' }}</s>"
        template = f"{{% for m in messages %}}{message}{{% endfor %}}{{{{ tools or '' }}}}"
        options += ["--model", str(write_llama(tmp_path / "llama", template=template))]
    done = replay(write_log(tmp_path / "log.jsonl"), "--json", out, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    result = json.loads(out.read_text())
    sent = [m for m in result["measurements"] if m["experiment"] == "replay"]
    assert len(sent) == len(result["requests"]) == 9
    for m, row in zip(sent, result["requests"], strict=True):
        assert m["cached_tokens"] == m["predicted_cached_tokens"] == row["predicted_cached_tokens"]
    assert {"extended", "same prompt", "system message changed"} <= {row["kind"] for row in result["requests"]}
    assert all(claim["holds"] for claim in result["claims"])


def test_requests_of_all_apis_and_what_splits_the_cache_are_found_as_predicted(tmp_path: Path) -> None:
    question = {"role": "user", "content": "Where is my order? " * 20}
    chat = {"messages": [SYSTEM, question]}
    bodies = [
        chat,
        chat,
        chat | {"model": "an-adapter"},
        chat | {"cache_salt": "tenant"},
        chat | {"cache_salt": "tenant"},
        {"model": "m", "system": SYSTEM["content"], "messages": [question], "max_tokens": 5},
        {"model": "m", "instructions": SYSTEM["content"], "input": question["content"]},
        {"prompt": SYSTEM["content"] * 2},
        {"prompt": SYSTEM["content"] * 2 + "And so on."},
        {"prompt_token_ids": [*range(300, 420)] * 3},
        {"prompt_token_ids": [*range(300, 420)] * 4},
    ]
    path, out = tmp_path / "log.jsonl", tmp_path / "out.json"
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    done = replay(path, "--json", out, "--block-size", "32", "--fail-under", "99")
    result = json.loads(out.read_text())
    failed = {claim["claim"] for claim in result["claims"] if not claim["holds"]}
    assert (done.returncode, failed) == (1, {"the hit rate is at least 99 %"}), done.stdout + done.stderr
    cached = [row["predicted_cached_tokens"] for row in result["requests"]]
    prompt = result["requests"][0]["prompt_tokens"]
    whole = (prompt - 1) // 32 * 32
    assert cached[:5] == [0, whole, 0, 0, whole]
    assert cached[5:7] == [0, whole], "two APIs, one model's name, and the same prompt"
    assert all(cached[n] > 0 for n in (8, 10))


def test_a_log_that_cannot_be_read_is_told_before_vllm_is_imported(tmp_path: Path) -> None:
    done = replay(tmp_path / "none.jsonl")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
