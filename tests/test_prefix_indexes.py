"""The three indexes against brute force and against each other, with and without room; and what the tool prints."""

from __future__ import annotations

import gc
import itertools
import json
import random
import time
from array import array
from pathlib import Path

import pytest
from helpers.models import write_llama
from hypothesis import given
from hypothesis import strategies as st

from going_further import prefix_indexes as tool
from going_further.common import CacheModel, common_prefix
from going_further.prefix_indexes import BlockHashes, MessageHashes, RadixTree, shared

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=24)  # few kinds of tokens: many prompts begin alike
PROMPTS = st.lists(TOKENS, min_size=1, max_size=12)


def ids(tokens: list[int]) -> array:
    return array("i", tokens)


@given(TOKENS, TOKENS)
def test_shared_counts_the_leading_tokens_that_are_equal(a: list[int], b: list[int]) -> None:
    assert shared(ids(a), ids(b)) == common_prefix(a, b)


@given(PROMPTS)
def test_the_tree_finds_the_longest_beginning_of_any_earlier_prompt(prompts: list[list[int]]) -> None:
    tree = RadixTree()
    for n, prompt in enumerate(prompts):
        assert tree.find(ids(prompt)) == max((common_prefix(prompt, other) for other in prompts[:n]), default=0)
        tree.insert(ids(prompt))
    assert tree.tokens == len({tuple(p[:n]) for p in prompts for n in range(1, len(p) + 1)}), "each beginning once"


@given(PROMPTS, st.integers(1, 5))
def test_the_chain_finds_what_the_cache_model_predicts_and_the_tree_in_whole_blocks(
    prompts: list[list[int]], block_size: int
) -> None:
    tree, chain, model = RadixTree(), BlockHashes(block_size), CacheModel(block_size)
    for prompt in prompts:
        found = chain.find(ids(prompt[:-1]))
        assert found == model.cached_tokens(prompt)
        assert found == tree.find(ids(prompt[:-1])) // block_size * block_size
        tree.insert(ids(prompt)), chain.insert(ids(prompt)), model.store(prompt)


@given(st.lists(st.lists(st.sampled_from(["a", "b", "aa"]), min_size=1, max_size=5), min_size=1, max_size=10))
def test_whole_messages_never_find_more_than_the_tree(conversations: list[list[str]]) -> None:
    by_message, tree = MessageHashes(), RadixTree()
    for contents in conversations:
        messages = [{"role": "user", "content": content} for content in contents]
        written = [[ord(c) for c in content] + [0] for content in contents]  # a message ends with token 0
        ends = list(itertools.accumulate(map(len, written)))
        prompt = ids([*itertools.chain(*written), 1])  # where the answer begins
        assert by_message.find(messages) <= tree.find(prompt)
        by_message.insert(messages, ends), tree.insert(prompt)
        assert by_message.find(messages) == ends[-1]


def test_a_list_of_messages_is_found_by_its_longest_beginning_that_is_known() -> None:
    index, (a, b, c) = MessageHashes(), ({"role": "user", "content": word} for word in "abc")
    index.insert([a, b], [10, None])  # the template takes no two of them alone
    assert index.find([a, b, c]) == 10
    index.insert([a, b, c], [10, 20, 30])
    assert index.find([a, b, b]) == 20
    assert index.find([b, a]) == 0
    assert index.find([{"content": "a", "role": "user"}]) == 10, "the order of keys does not count"


@given(PROMPTS, st.integers(1, 30))
def test_a_tree_without_room_keeps_its_bound_and_finds_nothing_that_is_not_there(
    prompts: list[list[int]], room: int
) -> None:
    tree = RadixTree(tokens_kept=room)
    for n, prompt in enumerate(prompts):
        longest = max((common_prefix(prompt, other) for other in prompts[:n]), default=0)
        assert tree.find(ids(prompt)) <= longest
        tree.insert(ids(prompt))
        held = list(nodes(tree.root))
        assert tree.tokens == sum(len(node.edge) for node in held) <= room
        assert len(tree) == len(held)
        leaves = [node for node in held if not node.children]
        in_heap = [node for _, _, node in tree.leaves if not node.children]
        assert sorted(map(id, in_heap)) == sorted(map(id, leaves)), "each once"
        assert len(tree.leaves) <= len(held), "memory is bounded"


def nodes(node: tool.Node) -> list[tool.Node]:
    return [found for child in node.children.values() for found in (child, *nodes(child))]


def test_what_was_not_used_for_longest_is_forgotten_first() -> None:
    tree, chain = RadixTree(tokens_kept=8), BlockHashes(2, tokens_kept=8)
    for index in (tree, chain):
        index.insert(ids([1, 1, 2, 2])), index.insert(ids([3, 3, 4, 4]))
        index.find(ids([1, 1, 2, 2]))
        index.insert(ids([5, 5]))
        assert index.evicted > 0
        assert index.find(ids([1, 1, 2, 2])) == 4, "used a moment ago"
        assert index.find(ids([5, 5])) == 2
    assert tree.find(ids([3, 3, 4, 4])) == 0, "the leaf was one edge"
    assert chain.find(ids([3, 3, 4, 4])) == 2, "of one prompt the last block goes first"


def cpu_seconds(make, prompts: list[array]) -> float:
    """Return the CPU time that asking and telling takes, the best of five; no other test's garbage is collected."""
    best = float("inf")
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            index, began = make(), time.process_time()
            for prompt in prompts:
                index.find(prompt), index.insert(prompt)
            best = min(best, time.process_time() - began)
    finally:
        gc.enable()
    return best


@pytest.mark.alone
@pytest.mark.parametrize("of", ["prompts", "tokens of a prompt"])
@pytest.mark.parametrize("make", [RadixTree, lambda: BlockHashes(16)], ids=["tree", "chain"])
def test_time_is_linear_in_tokens(make, of: str) -> None:
    """Sixteen times the tokens; what is quadratic in prompts or in their length takes 256 times as long."""
    dice = random.Random(0)

    def prompts(count: int, length: int) -> list[array]:
        heads = [dice.choices(range(30_000), k=length // 2) for _ in range(10)]
        return [ids(dice.choice(heads) + dice.choices(range(30_000), k=length // 2)) for _ in range(count)]

    few, many = prompts(100, 1000), prompts(*(1600, 1000) if of == "prompts" else (100, 16_000))
    assert cpu_seconds(make, many) < 4 * 16 * cpu_seconds(make, few)


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["prefix_indexes", *map(str, words)])
    status = tool.main()
    return status, capsys.readouterr().out


@pytest.mark.usefixtures("own_signals")
def test_on_the_workloads_made_here_the_output_fits_and_the_json_holds_every_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.json"
    status, out = run(capsys, monkeypatch, "--without-engine", "--json", path)
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    conversation, users, late_clock = json.loads(path.read_text())["workloads"]
    for workload in (conversation, users, late_clock):
        by_message, by_tree, by_block = (index["found"] for index in workload["indexes"])
        for a, b, c in zip(by_message, by_tree, by_block, strict=True):
            assert a <= b
            assert c == b // 16 * 16
    assert len(users["prompt_tokens"]) == 200
    assert sum(late_clock["indexes"][0]["found"]) == 0, "no whole message is the same"
    assert sum(late_clock["indexes"][1]["found"]) > 0.9 * sum(late_clock["prompt_tokens"])


@pytest.mark.usefixtures("own_signals")
def test_equal_json_that_is_rendered_otherwise_is_called_false(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    model = write_llama(tmp_path / "llama", template=template)
    log, calls = tmp_path / "log.jsonl", ['{"a": 1, "b": 2}', '{"b": 2, "a": 1}']
    requests = []
    for arguments in calls:
        function = {"name": "f", "arguments": arguments}
        answer = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        }
        requests.append({"messages": [{"role": "user", "content": "one two three"}, answer]})
    log.write_text("\n".join(map(json.dumps, requests)))
    status, out = run(capsys, monkeypatch, log, "--without-engine", "--model", model)
    assert status == 0
    assert "tokens that (a) finds are others: equal JSON, rendered in another way" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [(["no/such/log"], "cannot read no/such/log"), (["--limit", "0"], "at least 1"), ([""], "empty value")],
)
@pytest.mark.usefixtures("own_signals")
def test_bad_usage_is_one_line(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["prefix_indexes", "--without-engine", *words])
    try:
        status = tool.main()
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert says in capsys.readouterr().err
