"""The tool on the real engine: what the chain of block hashes finds is what vLLM finds, on every request."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.models import write_llama

TOOL = "going_further.prefix_indexes"


def check(done, block_size: int) -> None:
    """Hold all that is recorded together: tree, chain and engine, request by request."""
    assert done.status == 0, done.out + done.err
    for workload in done.result["workloads"]:
        rows = [m for m in done.result["measurements"] if m["experiment"] == workload["workload"]]
        assert [m["cached_tokens"] for m in rows] == workload["engine_cached_tokens"]
        by_message, by_tree, by_block = (index["found"] for index in workload["indexes"])
        assert by_block == workload["engine_cached_tokens"]
        assert [b // block_size * block_size for b in by_tree] == by_block
        assert all(a <= b for a, b in zip(by_message, by_tree, strict=True))
        assert sum(by_message) < sum(by_tree)


def test_on_its_own_workloads(run_script) -> None:
    done = run_script(TOOL)
    check(done, block_size=128)
    assert len(done.result["workloads"]) == 3
    assert "SGLang keeps (b), vLLM (c)" in done.out


def test_on_a_log_with_another_model_and_smaller_blocks(run_script, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "llama")
    log = tmp_path / "log.jsonl"
    system = {"role": "system", "content": "You help with orders. " * 60}
    requests, said = [], [system]
    for turn in range(4):
        said = [*said, {"role": "user", "content": f"Question {turn}: where is order {turn * 17}?"}]
        requests.append({"messages": said})
        said = [*said, {"role": "assistant", "content": "It is on its way. " * 5}]
    requests.append({"messages": [system, {"role": "user", "content": "Question 0: where is my own order?"}]})
    log.write_text("\n".join(map(json.dumps, requests)))
    done = run_script(TOOL, str(log), "--model", str(model), "--block-size", "32")
    check(done, block_size=32)
    [workload] = done.result["workloads"]
    assert len(workload["prompt_tokens"]) == 5


def test_without_prefix_caching_the_claim_fails(run_script, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    messages = [{"role": "user", "content": "The same words again and again. " * 60}]
    log.write_text("\n".join([json.dumps({"messages": messages})] * 2))
    done = run_script(TOOL, str(log), "--no-prefix-caching")
    assert done.status == 1
    assert "(c) finds what vLLM finds" in done.out
