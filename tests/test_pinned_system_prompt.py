"""The pinned system prompt without an engine: the sizes of the experiment, and the model of a cache with eviction."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from going_further.common import UsageError, common_prefix
from going_further.pinned_system_prompt import ARMS, SHARE, Demonstration, EvictingCache, Prompts, plan

ROOT = Path(__file__).parent.parent
TOOL = [sys.executable, "-m", "going_further.pinned_system_prompt"]
tokens = itertools.count()


def unique(length: int) -> list[int]:
    return list(itertools.islice(tokens, length))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "built_in_model" / "cpu")


class Tokenizing(SimpleNamespace):
    """What `plan` and `Demonstration` take from a run's model: the tokenizer, and the size of a block."""

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def count(self, text: str) -> int:
        return len(self.tokens(text))

    def encode(self, messages: list[dict]) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def a_run(tokenizer, prefix_tokens: int, block_size: int, model: type = Tokenizing) -> SimpleNamespace:
    known = model(tokenizer=tokenizer, block_size=block_size)
    return SimpleNamespace(args=SimpleNamespace(prefix_tokens=prefix_tokens), model=known)


# --- the model of the cache ---


def test_a_flood_as_large_as_the_cache_leaves_nothing_and_one_block_less_leaves_a_block() -> None:
    for blocks, left in ((8, 0), (7, 1), (6, 2)):
        cache, ids = EvictingCache(4, 8), unique(9)
        cache.store(ids)
        for _ in range(blocks):
            cache.store(unique(4))
        assert cache.cached_tokens(ids) == 4 * left


def test_the_last_block_of_a_prompt_goes_first_and_the_least_recently_used_prompt_before() -> None:
    cache, old, new = EvictingCache(4, 6), unique(13), unique(13)
    cache.store(old)
    cache.store(new)
    assert (cache.cached_tokens(old), cache.cached_tokens(new)) == (8, 12), "each has one more block that is not full"
    cache.store(old[:9])  # used again: now it is the newer one
    cache.store(unique(12))
    assert (cache.cached_tokens(old), cache.cached_tokens(new)) == (8, 4)


def test_a_block_that_is_not_full_is_the_next_to_be_taken() -> None:
    cache, ids = EvictingCache(4, 3), unique(9)
    cache.store(ids)
    cache.store(unique(4))
    assert cache.cached_tokens(ids) == 8


def test_a_pinned_prefix_stays_whatever_comes() -> None:
    cache, ids = EvictingCache(4, 8), unique(15)
    cache.store(ids)
    cache.pin(ids[:11])
    for _ in range(20):
        cache.store(unique(23))
    assert cache.cached_tokens(ids) == 8


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20), st.booleans()), max_size=30), st.integers(1, 4))
def test_every_block_is_free_or_pinned_and_none_is_lost(requests: list[tuple[int, int, bool]], block_size: int) -> None:
    cache = EvictingCache(block_size, 60)
    for stem, length, pinned in requests:
        ids = [stem, *range(100, 100 + length)]
        if cache.cached_tokens([*ids, 0]) == len(ids):
            continue  # vLLM would hold its last block twice; the experiment never sends such a prompt
        cache.store(ids)
        if pinned:
            cache.pin(ids[:5])
        free = [block for block in cache.queue if block is not None]
        assert len(cache.queue) + len(cache.pinned) == 60
        assert len(free) == len(set(free))
        assert cache.blocks == set(free) | cache.pinned


# --- the experiment ---


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("prefix_tokens", [500, 1000, 2300, 4000])
def test_one_prefix_may_be_pinned_and_two_may_not(tokenizer, prefix_tokens: int, block_size: int) -> None:
    prompts = plan(a_run(tokenizer, prefix_tokens, block_size))
    assert prompts.prefix <= int(SHARE * prompts.capacity) < 2 * prompts.prefix
    longest = -(-(max(map(len, prompts.system + prompts.tenant)) + 64) // block_size)
    assert prompts.prefix + longest <= prompts.capacity, "the longest request fits beside the pin"


def test_all_prompts_under_one_system_prompt_start_with_what_is_pinned(tokenizer) -> None:
    prompts = plan(a_run(tokenizer, 1000, 32))
    assert all(ids[: len(prompts.pin)] == prompts.pin for ids in prompts.system)
    assert len(prompts.pin) > 1000
    assert len(set(map(tuple, prompts.system))) == len(prompts.system)
    assert all(common_prefix(prompts.pin, ids) < 16 for ids in prompts.tenant), "the tenant shares no block"


class Simulated(Demonstration):
    """The rounds against the cache model alone: what they must bring if vLLM does as the model says."""

    def __init__(self, run: SimpleNamespace, prompts: Prompts) -> None:
        nothing_said = SimpleNamespace(kv_transfer_params=None)
        engine = SimpleNamespace(output=nothing_said, block_size=run.model.block_size)
        super().__init__(run, engine, prompts)
        self.sent: list[tuple[str, str, list[int]]] = []
        self.found: dict[tuple[str, str], int] = {}

    async def fresh(self) -> None:
        self.engine.cache_model = EvictingCache(self.run.model.block_size, self.prompts.capacity)

    async def ask(self, ids: list[int], experiment: str, arm: str, request: int, **asks: object) -> None:
        cache, key = self.engine.cache_model, (experiment, arm)
        self.found[key] = self.found.get(key, 0) + cache.cached_tokens(ids)
        cache.store(ids)
        self.sent.append((experiment, arm, ids))

    async def release(self, arm: str, request: int) -> None:
        pass


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("prefix_tokens", [500, 1000, 4000])
def test_the_sizes_of_the_floods_make_the_outcome_certain(tokenizer, prefix_tokens: int, block_size: int) -> None:
    import asyncio

    run = a_run(tokenizer, prefix_tokens, block_size)
    prompts = plan(run)
    simulated = Simulated(run, prompts)
    for arm in ARMS:
        asyncio.run(simulated.round(arm, 1))
    blocks = {key: found // block_size for key, found in simulated.found.items()}
    assert (blocks["main", "bad"], blocks["main", "good"]) == (0, prompts.prefix)
    assert blocks["flood again", "bad"] - blocks["flood again", "good"] == prompts.prefix
    assert blocks["tenant", "bad"] == common_prefix(*prompts.tenant) // block_size
    assert blocks["tenant", "good"] == prompts.tenant_blocks - prompts.prefix


def test_the_arms_send_the_same_prompts_in_the_same_order(tokenizer) -> None:
    import asyncio

    run = a_run(tokenizer, 500, 32)
    simulated = Simulated(run, plan(run))
    for arm in ARMS:
        asyncio.run(simulated.round(arm, 1))
    bad, good = ([(experiment, ids) for experiment, a, ids in simulated.sent if a == arm] for arm in ARMS)
    assert bad == good


def test_the_requests_of_a_flood_fill_it_and_share_no_block(tokenizer) -> None:
    run = a_run(tokenizer, 1000, 16)
    prompts = plan(run)
    tickets = list(Simulated(run, prompts).flood(prompts.capacity, 1000))
    assert sum(len(ids) // 16 for ids in tickets) == prompts.capacity
    assert all(len(ids) % 16 == 1 for ids in tickets), "so that the last block is found, too"
    starts = [tuple(ids[:16]) for ids in [*tickets, *prompts.system[:1], *prompts.tenant[:1]]]
    assert len(set(starts)) == len(starts)


def test_questions_as_long_as_the_system_prompt_are_refused(tokenizer) -> None:
    with pytest.raises(UsageError, match="choose a larger --prefix-tokens"):
        plan(a_run(tokenizer, 400, 512))


class Talkative(Tokenizing):
    """A template that adds more to each question than the system prompt is long."""

    def encode(self, messages: list[dict]) -> list[int]:
        return super().encode(messages) + unique(3000)


def test_a_template_that_adds_more_than_the_system_prompt_is_refused(tokenizer) -> None:
    with pytest.raises(UsageError, match="choose a larger --prefix-tokens"):
        plan(a_run(tokenizer, 1000, 32, Talkative))


def test_help_needs_no_vllm_and_says_what_is_shown() -> None:
    program = "import sys; sys.modules['vllm'] = None; from going_further.pinned_system_prompt import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "A system prompt that is never released" in done.stdout


def test_wrong_usage_is_told_before_anything_starts() -> None:
    done = subprocess.run([*TOOL, "--requests", "1"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "at least 2" in done.stderr
