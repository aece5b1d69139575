"""What a prefix cache finds of a log whose requests are sent one after another, and what several replicas find of it.

A request is a chain of block hashes: one for each whole block of its prompt, made of the block's own tokens and of all
blocks before it. Equal hashes mean equal prefixes. Chains are kept as array('q'), eight bytes a block.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from going_further.common import Affinity, RoundRobin

# As in lesson 4's bounded load: a replica that has computed more than so many times its share gets no request.
LOAD_BOUND = 1.25


class Arrival(NamedTuple):
    """One request of a log, in the order of their arrival."""

    chain: Sequence[int]  # a hash for each whole block of the prompt, 64 bits with a sign
    tokens: int  # of the whole prompt
    session: str
    time: float | None = None  # seconds, since any moment
    is_read: bool = True  # whether it is looked up at all; it is stored in any case


class BlockPool:
    """The blocks of a KV cache between two requests, in the order in which vLLM takes them for the next one.

    This is `vllm/v1/core/block_pool.py` of vLLM 0.32 for full attention and requests that never run side by side. A
    block without a hash goes back to the front of the free queue, one with a hash to its end. So those without are
    always in front, none can be told from another, and their number is enough.
    """

    def __init__(self, blocks: int) -> None:
        self.without_hash = blocks
        self.queue: OrderedDict[int, int] = OrderedDict()  # a number that each computed block gets, and its hash
        self.copies: dict[int, list[int]] = {}  # per hash the numbers of the blocks that have it, the oldest first
        self.numbers = itertools.count()

    def run(self, chain: Sequence[int], found: int, partial: bool) -> list[int]:
        """Take the first `found` blocks of a chain, compute the rest, free all. Return the hashes that are lost by it.

        `partial` says whether the prompt ends within a block, which takes a block and gets no hash.
        """
        used = []
        for block in chain[:found]:
            oldest = self.copies[block][0]  # vLLM, too, takes the first of several
            self.queue.pop(oldest, None)  # None: a chain that is not one of hashes may have a block twice
            used.append(oldest)
        needed = len(chain) - found + partial
        evicted = max(0, needed - self.without_hash)
        lost = [block for _ in range(evicted) if (block := self.evict()) is not None]
        self.without_hash = max(0, self.without_hash - needed)
        # The last block of a prompt of whole blocks is computed anew even where it is held. vLLM then has it twice.
        for block in chain[found:]:
            number = next(self.numbers)
            self.copies.setdefault(block, []).append(number)
            used.append(number)
        for number, block in zip(reversed(used), reversed(chain), strict=True):  # so that tails are evicted first
            self.queue[number] = block
        self.without_hash += partial
        return lost

    def evict(self) -> int | None:
        """Empty the block at the front of the queue; return its hash if no other block has it."""
        number, block = self.queue.popitem(last=False)
        self.copies[block].remove(number)
        if self.copies[block]:
            return None
        del self.copies[block]
        return block


class PrefixCache:
    """Predicts how many leading tokens of each request are found, when they are sent one after another.

    With `capacity_tokens` blocks are evicted in vLLM's order. This is the number that vLLM prints as "KV cache size",
    all of its blocks (`get_kv_cache_capacity` in kv_cache_utils.py; exact where max_model_len is whole blocks). One of
    them, BlockPool.null_block, never holds anything. Every request is taken to generate one token, which needs no
    block: its KV is never computed. Longer answers would take more, and evict more.

    With `ttl` a block is not found once its last use, found or stored, is more than so many seconds ago: hosted APIs
    keep a prefix like this, Anthropic's five minutes from the last use
    (https://platform.claude.com/docs/en/build-with-claude/prompt-caching).
    """

    def __init__(
        self,
        block_size: int,
        capacity_tokens: int | None = None,
        ttl: float | None = None,
        drops_last_block: bool = False,
    ) -> None:
        """With `drops_last_block` the last block that is found is computed once more: speculative decoding needs it."""
        self.block_size, self.ttl, self.drops_last_block = block_size, ttl, drops_last_block
        self.usable_blocks, self.pool = None, None
        if capacity_tokens is not None:
            # Rounded up: what vLLM prints went through a division, and may have lost a token.
            self.usable_blocks = max(0, -(-capacity_tokens // block_size) - 1)
            self.pool = BlockPool(self.usable_blocks)
        # Per block that is held: how many blocks had been computed when its last use was over, and when that was. All
        # blocks of a request share one tuple.
        self.last_use: dict[int, tuple[int, float | None]] = {}
        self.requests = 0  # all, with those that are too long
        self.too_long = 0  # requests that need more blocks than there are: vLLM never runs them, nothing is stored
        self.sent_tokens = self.found_tokens = 0  # of the requests that are not too long
        self.computed_blocks = 0  # whole ones

    @property
    def computed_tokens(self) -> int:
        return self.sent_tokens - self.found_tokens

    def fits(self, tokens: int) -> bool:
        """Say whether vLLM could run a prompt at all: it needs all of its blocks at once."""
        return self.usable_blocks is None or -(-tokens // self.block_size) <= self.usable_blocks

    def find(self, chain: Sequence[int], tokens: int, time: float | None = None) -> int:
        """Return how many leading tokens of a prompt are found: whole blocks, and never its last token."""
        if tokens < 1 or len(chain) < tokens // self.block_size:
            raise ValueError(f"{len(chain)} blocks of {self.block_size} tokens are no prompt of {tokens} tokens")
        if self.ttl is not None and time is None:
            raise ValueError("a time to live needs the time of every request")
        held = self.last_use.__contains__ if self.ttl is None else lambda block: self.is_alive(block, time)
        # vLLM needs the last token's output, so it never looks for the block that would hold it.
        blocks = itertools.islice(chain, (tokens - 1) // self.block_size)
        found = sum(1 for _ in itertools.takewhile(held, blocks))
        return self.block_size * max(0, found - self.drops_last_block)

    def is_alive(self, block: int, time: float) -> bool:
        use = self.last_use.get(block)
        return use is not None and time - use[1] <= self.ttl

    def request(self, chain: Sequence[int], tokens: int, time: float | None = None, is_read: bool = True) -> int:
        """Return what `find` returns, and store the prompt. One that is not read is computed whole, as in vLLM."""
        found_tokens = self.find(chain, tokens, time) if is_read else 0
        self.requests += 1
        if not self.fits(tokens):
            self.too_long += 1
            return found_tokens
        self.sent_tokens += tokens
        self.found_tokens += found_tokens
        chain, found = chain[: tokens // self.block_size], found_tokens // self.block_size
        if self.pool is not None:
            for block in self.pool.run(chain, found, partial=tokens % self.block_size > 0):
                del self.last_use[block]
        self.computed_blocks += len(chain) - found
        self.last_use.update(zip(chain, itertools.repeat((self.computed_blocks, time))))
        return found_tokens

    def age(self, block: int) -> int | None:
        """Return how many whole blocks other requests have computed since the last one that had this block.

        None for a block that is not held. Right after a request it is 0 for all blocks of it. A cache of so many usable
        blocks, or fewer, has lost the block. One of more may have lost it too: what was found meanwhile, and needs room
        as well, is not counted.
        """
        use = self.last_use.get(block)
        return None if use is None else self.computed_blocks - use[0]


@dataclasses.dataclass(frozen=True)
class RoutingResult:
    """What came of a log under one policy; tuples have an entry for each replica."""

    policy: str
    sent_tokens: int  # of the requests that fit into a replica's cache, as are the following
    found_tokens: int
    requests: tuple[int, ...]  # all that were sent there, also the too long ones
    computed_tokens: tuple[int, ...]
    too_long: int  # requests that did not fit: more blocks than a replica has

    @property
    def hit_rate(self) -> float:
        return self.found_tokens / self.sent_tokens if self.sent_tokens else 0.0

    @property
    def spread(self) -> float:
        """The busiest replica's computed tokens, divided by the mean: from 1 to the number of replicas."""
        total = sum(self.computed_tokens)
        return max(self.computed_tokens) * len(self.computed_tokens) / total if total else 1.0


def prefix_aware(arrival: Arrival, caches: list[PrefixCache]) -> int:
    """Return the replica that holds the longest prefix of a request; among equals the one that has computed the least.

    A replica that has computed more than LOAD_BOUND times its share is passed over: else a system prompt that all
    requests share would draw all of them to the replica that saw it first. vLLM's router does so by pending requests:
    `cache_aware` leaves the prefix for the shortest queue once the longest has 64 requests more and 1.5 times as many
    (balance_abs_threshold, balance_rel_threshold in vllm_router/router_args.py of vllm-router 0.1.17, and
    https://github.com/vllm-project/router/blob/main/docs/load_balancing/README.md). In a log that is sent one by one
    nothing is pending, so what was computed so far stands for the load.
    """
    share = sum(cache.computed_tokens for cache in caches) / len(caches)
    merits = {}
    for n, cache in enumerate(caches):
        if cache.computed_tokens <= LOAD_BOUND * share:  # true of one at least: not all are above their mean
            merits[n] = cache.find(arrival.chain, arrival.tokens, arrival.time), -cache.computed_tokens
    return max(merits, key=merits.get)


def route_log(
    requests: Iterable[Arrival],
    replicas: int,
    block_size: int,
    capacity_tokens: int | None = None,
    ttl: float | None = None,
    drops_last_block: bool = False,
) -> list[RoutingResult]:
    """Send a log through each policy, every time to empty caches; `requests` is gone through once for each.

    Capacity and time to live are those of one replica. "one cache" is there to compare with: a single cache as large
    as those of all replicas together.
    """
    if iter(requests) is requests:
        raise TypeError("requests must be a list, or the like: the first policy would use an iterator up")
    round_robin, affinity = RoundRobin(replicas), Affinity(replicas)
    policies = {
        "one cache": lambda arrival, caches: 0,
        "round robin": lambda arrival, caches: round_robin.route(arrival.session, []),
        "session affinity": lambda arrival, caches: affinity.route(arrival.session, []),
        "prefix-aware": prefix_aware,
    }
    results = []
    for policy, choose in policies.items():
        count, capacity = replicas, capacity_tokens
        if policy == "one cache":
            count, capacity = 1, None if capacity_tokens is None else replicas * capacity_tokens
        caches = [PrefixCache(block_size, capacity, ttl, drops_last_block) for _ in range(count)]
        for arrival in requests:
            caches[choose(arrival, caches)].request(arrival.chain, arrival.tokens, arrival.time, arrival.is_read)
        sent, found = sum(cache.sent_tokens for cache in caches), sum(cache.found_tokens for cache in caches)
        per_replica = tuple(cache.requests for cache in caches), tuple(cache.computed_tokens for cache in caches)
        results.append(RoutingResult(policy, sent, found, *per_replica, sum(cache.too_long for cache in caches)))
    return results
