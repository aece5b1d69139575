"""The caches of the log replayer: held against vLLM's own block manager, and what routing makes of a log."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from going_further.common import CacheModel
from going_further.replay.caches import LOAD_BOUND, Arrival, PrefixCache, RoutingResult, route_log

MAX_MODEL_LEN = 4096
PROMPT = st.lists(st.integers(0, 1), min_size=1, max_size=24)  # two tokens only: prompts begin alike


def chain(ids: list[int], block_size: int) -> array:
    return array("q", CacheModel(block_size).chain(ids))


def found_by_us(prompts: list[list[int]], cache: PrefixCache) -> list[int]:
    return [cache.request(chain(ids, cache.block_size), len(ids)) for ids in prompts]


# --- vLLM's own ---


@pytest.fixture(scope="module")
def vllm_config() -> Callable[[int, int], object]:
    """Make vLLM's description of a KV cache of full attention, from a block size and a number of blocks."""
    pytest.importorskip("vllm")
    import torch
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    init_none_hash(sha256)

    def config(block_size: int, blocks: int) -> KVCacheConfig:
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
        return KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )

    return config


def found_by_vllm(prompts: list[list[int]], config: object, chunk: int | None = None) -> tuple[list[int], int]:
    """Send prompts through vLLM's KVCacheManager as its scheduler does, one after another, each for one token.

    Return the tokens found of each and how many were refused. `chunk` is the most tokens computed in one step.
    """
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    size = config.kv_cache_groups[0].kv_cache_spec.block_size
    manager = KVCacheManager(config, max_model_len=MAX_MODEL_LEN, scheduler_block_size=size, hash_block_size=size)
    hasher, params, found, refused = get_request_block_hasher(size, sha256), SamplingParams(max_tokens=1), [], 0
    for number, ids in enumerate(prompts):
        request = Request(str(number), ids, params, pooling_params=None, block_hasher=hasher)
        manager.new_step_starts()
        blocks, hit, _ = manager.get_computed_blocks(request)
        found.append(hit)
        first, adopted = min(chunk or len(ids), len(ids) - hit), dict(has_scheduled_reqs=False)
        adopted |= dict(num_new_computed_tokens=hit, new_computed_blocks=blocks, full_sequence_must_fit=True)
        if manager.allocate_slots(request, first, **adopted) is None:
            refused += 1
            continue
        request.num_computed_tokens = hit + first
        while rest := len(ids) - request.num_computed_tokens:
            step = min(chunk, rest)
            manager.new_step_starts()
            assert manager.allocate_slots(request, step) is not None
            request.num_computed_tokens += step
        request.append_output_token_ids(0)
        manager.cache_blocks(request, request.num_computed_tokens)  # as AsyncScheduler does after a step
        manager.free(request)
    return found, refused


def grown_sessions(seed: int, block_size: int, requests: int, most_blocks: int) -> list[list[int]]:
    """Return prompts of sessions that take turns and append, now and then by whole blocks, to a shared beginning."""
    dice = random.Random(seed)
    shared = [[n] * dice.randrange(3 * block_size) for n in range(3)]
    sessions, prompts = [], []
    while len(prompts) < requests:
        if not sessions or dice.random() < 0.2:
            sessions.append(list(dice.choice(shared)))
        ids = dice.choice(sessions[-6:])
        ids += [dice.randrange(1000) for _ in range(dice.randrange(1, 2 * block_size))]
        if dice.random() < 0.4:
            del ids[len(ids) // block_size * block_size or 1 :]  # a multiple of the block size
        if dice.random() < 0.1:
            ids += [dice.randrange(1000)] * block_size * most_blocks  # too long from now on, and soon out of the window
        prompts.append(list(ids))
        if dice.random() < 0.2:
            prompts.append(list(ids))  # the same once more
    return prompts + [[0] * 2 * block_size] * 2


@given(st.lists(PROMPT, max_size=60), st.integers(1, 4), st.integers(1, 14))
def test_what_is_found_is_what_vllm_finds(vllm_config, prompts: list[list[int]], block_size: int, usable: int) -> None:
    cache = PrefixCache(block_size, (usable + 1) * block_size)
    found, refused = found_by_vllm(prompts, vllm_config(block_size, usable + 1))
    assert found_by_us(prompts, cache) == found
    assert cache.too_long == refused


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("seed", range(6))
def test_sessions_find_what_they_find_in_vllm(vllm_config, seed: int, chunk: int | None) -> None:
    block_size, usable = 4, 12 + 10 * seed
    prompts = grown_sessions(seed, block_size, 400, usable)
    cache = PrefixCache(block_size, (usable + 1) * block_size)
    found, refused = found_by_vllm(prompts, vllm_config(block_size, usable + 1), chunk)
    assert found_by_us(prompts, cache) == found
    assert cache.too_long == refused > 0
    unbounded = sum(found_by_us(prompts, PrefixCache(block_size)))
    assert 0 < sum(found) < unbounded, "something was evicted"
    assert any(len(copies) > 1 for copies in cache.pool.copies.values()), "a block is held twice"
    assert sum(map(len, cache.pool.copies.values())) + cache.pool.without_hash == usable, "no block was lost"
    assert cache.last_use.keys() == cache.pool.copies.keys() == set(cache.pool.queue.values())


@given(st.integers(2, 10**6), st.integers(1, 10**4), st.sampled_from([16, 32, 128]))
@example(blocks=29, longest=100, block_size=16)  # vLLM prints 463 tokens of 464
def test_the_number_that_vllm_prints_gives_its_blocks(vllm_config, blocks: int, longest: int, block_size: int) -> None:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    parallel = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1)
    model = SimpleNamespace(max_model_len=longest * block_size)
    engine = SimpleNamespace(model_config=model, parallel_config=parallel)
    printed, _ = get_kv_cache_capacity(engine, vllm_config(block_size, blocks))
    assert PrefixCache(block_size, printed).usable_blocks == blocks - 1, "all but the null block"


# --- the cache ---


@given(st.lists(PROMPT, max_size=40), st.integers(1, 5))
def test_without_bounds_it_is_the_cache_model_of_the_lessons(prompts: list[list[int]], block_size: int) -> None:
    model, cache, expected = CacheModel(block_size), PrefixCache(block_size), []
    for ids in prompts:
        expected.append(model.cached_tokens(ids))
        model.store(ids)
    assert found_by_us(prompts, cache) == expected
    assert cache.last_use.keys() == model.blocks
    assert cache.found_tokens == sum(expected)
    assert cache.sent_tokens == sum(map(len, prompts))


def test_a_prompt_that_does_not_fit_finds_what_is_there_and_leaves_no_trace() -> None:
    cache = PrefixCache(4, 4 * 4)  # three blocks and the null block
    assert cache.request([1, 2], 9) == 0
    assert cache.request([1, 2, 3], 13) == 8
    assert cache.too_long == 1
    assert cache.sent_tokens == 9
    assert cache.find([1, 2, 3], 13) == 8
    assert cache.request([1, 2, 3], 12) == 8, "twelve tokens are three blocks: the output needs none"
    assert cache.too_long == 1


def test_with_speculative_decoding_the_last_block_that_is_found_is_computed_once_more() -> None:
    chain = list(range(1, 6))
    for cache in (PrefixCache(16, drops_last_block=True), PrefixCache(16, 1600, drops_last_block=True)):
        assert [cache.request(chain, 80), cache.request(chain, 80), cache.find(chain[:1], 20)] == [0, 48, 0]


def test_what_is_not_read_finds_nothing_and_is_stored_all_the_same() -> None:
    cache, chain = PrefixCache(16, 1600), list(range(1, 6))
    assert [cache.request(chain, 80), cache.request(chain, 80, is_read=False), cache.request(chain, 80)] == [0, 0, 64]
    assert cache.computed_tokens == 80 + 80 + 16


def test_the_tail_is_evicted_before_the_head() -> None:
    cache = PrefixCache(4, 5 * 4)
    cache.request([1, 2, 3], 12)
    cache.request([9, 8], 8)
    assert cache.find([1, 2, 3], 13) == 8
    assert cache.find([9, 8], 9) == 8


def test_a_block_is_found_until_its_time_to_live_is_over_and_every_use_renews_it() -> None:
    cache = PrefixCache(4, ttl=300.0)
    assert cache.request([1, 2], 9, 1000.0) == 0
    assert cache.request([1, 3], 9, 1300.0) == 4, "to the second"
    assert cache.find([1, 2], 9, 1301.0) == 4, "2 was not used again"
    assert cache.find([1, 3], 9, 1600.0) == 8
    assert cache.find([1, 3], 9, 1600.5) == 0
    assert cache.request([1, 3], 9, 1700.0) == 0
    assert cache.find([1, 3], 9, 2000.0) == 8


def test_a_time_to_live_and_a_capacity_go_together() -> None:
    cache = PrefixCache(4, 4 * 4, ttl=300.0)
    cache.request([1, 2], 8, 0.0)
    assert cache.request([1, 2], 8, 400.0) == 0, "both are computed anew"
    assert cache.find([1, 2], 9, 500.0) == 8
    cache.request([5, 6, 7], 12, 500.0)
    assert cache.find([1, 2], 9, 500.0) == 0, "evicted"


def test_a_time_to_live_without_a_time_and_a_chain_that_is_too_short_are_errors() -> None:
    with pytest.raises(ValueError, match="needs the time of every request"):
        PrefixCache(4, ttl=300.0).request([1], 5)
    with pytest.raises(ValueError, match="no prompt of 12 tokens"):
        PrefixCache(4).request([1, 2], 12)
    with pytest.raises(ValueError, match="no prompt of 0 tokens"):
        PrefixCache(4).request([], 0)


def test_the_age_of_a_block_is_how_many_blocks_others_have_computed_since() -> None:
    cache = PrefixCache(4)
    assert cache.age(1) is None
    cache.request([1, 2], 9)
    assert (cache.age(1), cache.age(2)) == (0, 0)
    cache.request([1, 3, 4], 13)
    assert (cache.age(1), cache.age(2), cache.age(4)) == (0, 2, 0)
    cache.request([1, 3, 4], 13)
    assert cache.age(2) == 2, "nothing was computed"
    cache.request([7, 8, 9], 12)
    assert (cache.age(1), cache.age(2)) == (3, 5)


@given(st.lists(PROMPT, max_size=40), st.integers(24, 40))
def test_a_cache_of_no_more_blocks_than_its_age_has_lost_a_block(prompts: list[list[int]], usable: int) -> None:
    unbounded, bounded = PrefixCache(1), PrefixCache(1, usable + 1)
    found_by_us(prompts, unbounded), found_by_us(prompts, bounded)
    assert bounded.too_long == 0
    for block in unbounded.last_use:
        if unbounded.age(block) >= usable:
            assert bounded.age(block) is None


@pytest.mark.alone
def test_blocks_cost_little_more_than_those_of_a_set(capsys: pytest.CaptureFixture[str]) -> None:
    dice = random.Random(0)
    chains = [array("q", [dice.getrandbits(63) for _ in range(1000)]) for _ in range(300)]
    begin, blocks = time.perf_counter(), set()
    for hashes in chains * 2:
        blocks.update(hashes)
    middle, cache = time.perf_counter(), PrefixCache(16)
    for hashes in chains * 2:
        cache.request(hashes, 16_001)
    end = time.perf_counter()
    assert cache.last_use.keys() == blocks
    with capsys.disabled():
        per_block = [seconds / 600_000 * 1e6 for seconds in (middle - begin, end - middle)]
        print(f"\na set {per_block[0]:.2f}, the cache {per_block[1]:.2f} microseconds a block")


# --- routing ---


def conversations(names: list[str], turns: int, system: list[int], block_size: int = 4) -> list[Arrival]:
    """Return what sessions send, one after another in every turn, each time five tokens more."""
    arrivals = []
    for turn in range(turns):
        for number, name in enumerate(names):
            ids = system + [1000 + number] * 5 * (turn + 1)
            arrivals.append(Arrival(chain(ids, block_size), len(ids), name, float(len(arrivals))))
    return arrivals


def routed(arrivals: list[Arrival], replicas: int, **bounds: float) -> dict[str, RoutingResult]:
    results = route_log(arrivals, replicas, 4, **bounds)
    assert [result.policy for result in results] == ["one cache", "round robin", "session affinity", "prefix-aware"]
    for result in results:
        assert sum(result.requests) == len(arrivals)
        assert sum(result.computed_tokens) == result.sent_tokens - result.found_tokens
        assert 1 <= result.spread <= replicas
    return {result.policy: result for result in results}


def test_round_robin_loses_what_sessions_left_on_another_replica() -> None:
    results = routed(conversations(["a", "b", "c"], 8, []), 2)
    assert results["round robin"].requests == (12, 12)
    for policy in ("session affinity", "prefix-aware"):
        assert results["round robin"].hit_rate < results[policy].hit_rate


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 4))
def test_affinity_loses_nothing_of_sessions_that_share_nothing(senders: list[int], replicas: int) -> None:
    prompts = {sender: [sender] for sender in senders}
    arrivals = []
    for sender in senders:
        prompts[sender] = prompts[sender] + [sender] * 3
        arrivals.append(Arrival(chain(prompts[sender], 4), len(prompts[sender]), str(sender)))
    results = routed(arrivals, replicas)
    assert results["session affinity"].found_tokens == results["one cache"].found_tokens
    assert results["round robin"].found_tokens <= results["one cache"].found_tokens


@given(st.lists(st.tuples(PROMPT, st.sampled_from("abc")), max_size=40), st.integers(1, 4))
def test_no_policy_finds_more_than_one_cache_without_bounds(requests: list[tuple], replicas: int) -> None:
    results = routed([Arrival(chain(ids, 4), len(ids), session) for ids, session in requests], replicas)
    for result in results.values():
        assert result.found_tokens <= results["one cache"].found_tokens
        assert result.sent_tokens == sum(len(ids) for ids, _ in requests)
    if replicas == 1:
        assert {result.found_tokens for result in results.values()} == {results["one cache"].found_tokens}


def test_a_hot_session_is_a_spread_and_bounded_load_holds_it_down() -> None:
    arrivals = []
    for n in range(200):  # no prompt finds much of another: what a hot session sends is computed where it is sent
        arrivals.append(Arrival(chain([n] * 400, 4), 400, "hot"))
        arrivals.append(Arrival(chain([1000 + n] * 40, 4), 40, f"session-{n}"))
    results = routed(arrivals, 4)
    assert results["session affinity"].spread > 3
    assert results["round robin"].spread > 1.5, "every second request is a long one"
    assert results["prefix-aware"].spread < 1.1


def test_a_system_prompt_that_all_share_does_not_draw_all_to_one_replica() -> None:
    system = list(range(400))
    results = routed(conversations([f"session-{n}" for n in range(41)], 20, system), 4)
    aware, once = results["prefix-aware"], results["one cache"]
    assert aware.spread < LOAD_BOUND
    assert min(aware.requests) > 100
    assert aware.hit_rate > results["round robin"].hit_rate
    assert once.found_tokens - aware.found_tokens < 2 * 4 * len(system), "each replica computes it, no session does"


@given(st.lists(PROMPT, min_size=1, max_size=60), st.integers(1, 5))
def test_no_replica_computes_more_than_its_bound_and_one_prompt(prompts: list[list[int]], replicas: int) -> None:
    arrivals = [Arrival(chain(ids, 4), len(ids), "") for ids in prompts]
    computed, longest = routed(arrivals, replicas)["prefix-aware"].computed_tokens, max(map(len, prompts))
    assert max(computed) <= LOAD_BOUND * sum(computed) / replicas + longest


def test_a_replica_has_the_capacity_and_one_cache_that_of_all() -> None:
    arrivals = [Arrival(chain([n] * 40, 4), 40, str(n)) for n in range(8)] * 2
    results = routed(arrivals, 4, capacity_tokens=24 * 4)  # 23 blocks hold two prompts of ten, and four times so many 8
    assert results["one cache"].found_tokens == 8 * 36
    assert results["round robin"].found_tokens == 8 * 36, "two on each"
    assert max(results["session affinity"].requests) > 4, "three sessions meet somewhere"
    assert results["session affinity"].found_tokens < 8 * 36


def test_what_is_too_long_for_a_replica_is_counted_beside_the_tokens() -> None:
    arrivals = [Arrival(chain([n] * 40, 4), 40, str(n)) for n in range(4)]
    results = routed(arrivals, 4, capacity_tokens=10 * 4)
    assert [result.too_long for result in results.values()] == [0, 4, 4, 4]
    assert [result.sent_tokens for result in results.values()] == [160, 0, 0, 0]
    assert results["round robin"].hit_rate == 0.0


def test_the_time_to_live_is_that_of_every_replica() -> None:
    arrivals = [Arrival(chain([1] * 9, 4), 9, "a", at) for at in (0.0, 10.0, 20.0, 40.0)]
    results = routed(arrivals, 2, ttl=15.0)
    assert results["one cache"].found_tokens == results["session affinity"].found_tokens == 16
    assert results["round robin"].found_tokens == 0, "a replica is asked every 20 seconds"
    assert routed(arrivals, 2, ttl=20.0)["round robin"].found_tokens == 8


def test_an_iterator_would_be_used_up_by_the_first_policy() -> None:
    with pytest.raises(TypeError, match="must be a list"):
        route_log(iter([]), 2, 4)
