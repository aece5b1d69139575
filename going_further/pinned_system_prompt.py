"""A system prompt that is never released: pinned in the KV cache, under a flood.

A prefix cache keeps what was used last. When other requests need room, the
blocks of a system prompt that nobody asked for lately are the first to go, and
its next request computes all of it again. vLLM has no switch against this, but
takes a scheduler class of one's own: `pinning_scheduler.py` holds one more
reference on the blocks that a request asks to pin, and a block in use is never
evicted. One small engine with that scheduler serves both arms:

  bad   the requests ask for no pin
  good  the same requests ask for one: `extra_args={"pin_tokens": N}`

A round: an empty cache; the system prompt, twice; a flood of other, unique
requests; the flood again, newest first; the system prompt. Then the price: a
second tenant, unpinned, before and after a smaller flood. Round 0 ends with its
first request, which fills the cache.

What must come out follows from the sizes. The flood fills as many blocks as the
cache has, so that without a pin nothing older is left; with a pin all whole
blocks of the prefix are, and everybody else has that many blocks less. The
tenant's flood is as large as fits beside it in the whole cache: without a pin
the tenant loses nothing, with one as many blocks as are withheld. Besides, each
request is predicted by a model of the cache with eviction: the queue in which
free blocks wait, the least recently used in front.

--deeper adds: floods of several sizes, and what each leaves of the prefix.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator

from going_further.common import (
    OUTPUT_TOKENS,
    CacheModel,
    Engine,
    Measurement,
    Run,
    UsageError,
    common_prefix,
    good_messages,
    in_turn,
    lesson_parser,
    milliseconds,
    parse,
    run_lesson,
    system_prompt,
    time_verdict,
)

SCHEDULER = "going_further.pinning_scheduler.PinningScheduler"
SHARE = 0.4  # of the cache may be pinned: enough for one prefix of a third of it, not for two
ARMS = ("bad", "good")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """All prompts as token ids, and the sizes, in blocks, that make the outcome certain."""

    system: list[list[int]]  # four questions under the system prompt: before, before, and after the flood, at the end
    tenant: list[list[int]]  # two questions under another one
    pin: list[int]  # what the prompts in `system` have in common
    prefix: int  # whole blocks of it
    capacity: int  # blocks that requests can have
    tenant_blocks: int  # whole blocks of the tenant's first prompt
    ticket: list[int]  # the text of every request of a flood, after its number


def plan(run: Run) -> Prompts:
    """Make the prompts, and a cache of which the prefix is a third. UsageError where the questions are too long."""
    model = run.model
    text = system_prompt(run.args.prefix_tokens, model.count)
    other = f"You work for another shop, in another country.\n{text}"
    system = [model.encode(good_messages(text, n)) for n in range(4)]
    tenant = [model.encode(good_messages(other, n)) for n in range(2)]
    pin = system[0][: min(common_prefix(system[0], ids) for ids in system[1:])]
    prefix, longest = len(pin) // model.block_size, max(map(len, system + tenant)) + OUTPUT_TOKENS
    if prefix < 2 or longest > 2 * prefix * model.block_size:
        raise UsageError("the questions are as long as the system prompt: choose a larger --prefix-tokens")
    return Prompts(system, tenant, pin, prefix, 3 * prefix, len(tenant[0]) // model.block_size, model.tokens(text))


class EvictingCache(CacheModel):
    """The cache model with an end. Free blocks wait in a queue, and what a request needs is taken from its front.

    The blocks of a finished request join at the back, its last one first; one that is not full has nothing to offer
    and goes to the front. A pinned block does not join, so nobody can take it.
    """

    def __init__(self, block_size: int, capacity: int) -> None:
        super().__init__(block_size)
        self.queue: list[int | None] = [None] * capacity
        self.pinned: set[int] = set()

    def store(self, ids: list[int], salt: str | None = None) -> None:
        full, hit = list(self.chain(ids, salt)), self.cached_tokens(ids, salt) // self.block_size
        queue = [block for block in self.queue if block not in full[:hit]]
        new = math.ceil(len(ids) / self.block_size) - hit
        self.blocks = self.blocks.difference(queue[:new]).union(full)
        not_full = [None] * (hit + new - len(full))
        self.queue = not_full + queue[new:] + [block for block in reversed(full) if block not in self.pinned]

    def pin(self, ids: list[int]) -> None:
        """Keep the whole blocks of `ids`, which are in the cache."""
        self.pinned.update(self.chain(ids))
        self.queue = [block for block in self.queue if block not in self.pinned]


class Demonstration:
    """The engine and its prompts. Keeps the cache model in step with the pins, and the scheduler's answers."""

    def __init__(self, run: Run, engine: Engine, prompts: Prompts) -> None:
        self.run, self.engine, self.prompts = run, engine, prompts
        self.withheld: dict[str, set[int]] = {arm: set() for arm in ARMS}  # blocks, by what the scheduler answered
        self.reset_while_pinned: set[bool] = set()

    @property
    def answer(self) -> dict | None:
        """What the scheduler answered to the latest request, None where it had nothing to say."""
        return (self.engine.output.kv_transfer_params or {}).get("pinning")

    async def fresh(self) -> None:
        """Empty the cache; the model of it starts anew, with an end."""
        await self.engine.reset()
        self.engine.cache_model = EvictingCache(self.engine.block_size, self.prompts.capacity)

    async def ask(self, ids: list[int], experiment: str, arm: str, request: int, **asks: object) -> Measurement:
        """Send a request; `asks` is what it asks of the scheduler."""
        return await self.engine.ask(ids, experiment, arm, request, extra_args=asks)

    async def ask_system(self, which: int, experiment: str, arm: str, request: int) -> Measurement:
        """Ask under the system prompt; the good arm asks for the pin each time, as an application would."""
        ids, asks = self.prompts.system[which], {"pin_tokens": len(self.prompts.pin)} if arm == "good" else {}
        measurement = await self.ask(ids, experiment, arm, request, **asks)
        if asks:
            self.engine.cache_model.pin(self.prompts.pin)
        self.withheld[arm].add(self.answer["withheld_blocks"] if self.answer else 0)
        return measurement

    def flood(self, blocks: int, number: int) -> Iterator[list[int]]:
        """Yield unique requests that fill `blocks` blocks: each some whole ones, and a token, so that all are found."""
        each, size = max(1, self.prompts.prefix // 4), self.engine.block_size
        for n, begin in enumerate(range(0, blocks, each)):
            ids = self.run.model.tokens(f"{number + n} is the number of this ticket.\n") + self.prompts.ticket
            yield ids[: min(each, blocks - begin) * size + 1]

    async def ask_all(self, requests: list[list[int]], experiment: str, arm: str, request: int) -> None:
        for ids in requests:
            await self.ask(ids, experiment, arm, request)

    async def release(self, arm: str, request: int) -> None:
        """Give the pin back, where there is one; before that, see whether vLLM resets a cache with a pinned prefix."""
        if arm == "good":
            self.reset_while_pinned.add(await self.engine.vllm_engine.reset_prefix_cache())
            await self.ask(self.prompts.system[3], "release", arm, request, unpin="prefix")

    async def round(self, arm: str, n: int) -> Measurement:
        """Measure round `n` of one arm; return the row that it is about."""
        await self.fresh()
        measured = await self.ask_system(0, "fill" if n else "main", arm, n)
        if n:
            prompts, tickets = self.prompts, list(self.flood(self.prompts.capacity, 1000 * n))
            await self.ask_system(1, "before the flood", arm, n)
            await self.ask_all(tickets, "flood", arm, n)
            await self.ask_all(tickets[::-1], "flood again", arm, n)
            measured = await self.ask_system(2, "main", arm, n)
            await self.ask(prompts.tenant[0], "tenant, before", arm, n)
            beside = prompts.capacity - prompts.tenant_blocks - 1  # one for a block that is not full
            await self.ask_all(list(self.flood(beside, 1000 * n + 500)), "tenant's flood", arm, n)
            await self.ask(prompts.tenant[1], "tenant", arm, n)
        await self.release(arm, n)
        return measured


async def rounds(run: Run, demonstration: Demonstration) -> None:
    """Measure the arms round by round, print the tables, and judge the token counts."""
    run.print_pair_head("no pin is asked for", "a pin is asked for")
    for n in range(run.args.requests):
        measured = {}
        for arm in in_turn(ARMS, n):
            measured[arm] = await demonstration.round(arm, n)
        run.print_pair(n, measured["bad"], measured["good"])
    bad, good = run.measured("main", "bad")[1:], run.measured("main", "good")[1:]
    run.print_comparison(bad, good)

    prompts, withheld, size = demonstration.prompts, demonstration.withheld, run.model.block_size
    run.print(f"\n[bold]{'per round: tokens found, total TTFT':<36}{'bad':>20}{'good':>20}")
    run.print(f"{'blocks withheld':<36}{max(withheld['bad']):>20}{max(withheld['good']):>20}")
    before_bad, before_good = print_found(run, "system prompt, before the flood", "before the flood")
    flood_bad, flood_good = print_found(run, "the flood, asked once more", "flood again")
    tenant_bad, tenant_good = print_found(run, "a tenant, after a smaller flood", "tenant")

    def claim(text: str, found: list[int], blocks: int) -> None:
        expected = blocks * size
        run.claim(text, set(found) == {expected}, f"{min(found):,} to {max(found):,} tokens, {expected:,} expected")

    known = common_prefix(*prompts.system[:2]) // size
    kept = common_prefix(*prompts.tenant) // size
    fewer = [without - beside for without, beside in zip(flood_bad, flood_good, strict=True)]
    claim("before the flood both arms find the system prompt", before_bad + before_good, known)
    claim("without a pin nothing of it is left after the flood", [m.cached_tokens for m in bad], 0)
    claim("with a pin all its whole blocks are left", [m.cached_tokens for m in good], prompts.prefix)
    claim("the flood finds as many blocks fewer as are withheld", fewer, prompts.prefix)
    claim("without a pin the tenant keeps its whole prefix", tenant_bad, kept)
    beside_pin = prompts.tenant_blocks - prompts.prefix
    claim("beside a pin the tenant loses as many blocks as are withheld", tenant_good, beside_pin)
    once = withheld == {"bad": {0}, "good": {prompts.prefix}}
    text = "no pin withholds nothing, a pin its prefix once, however often it is asked for"
    run.claim(text, once, f"blocks withheld: {withheld}")
    never_reset = demonstration.reset_while_pinned == {False}
    evidence = f"reset_prefix_cache() returned {demonstration.reset_while_pinned}"
    run.claim("the cache is not reset while a prefix is pinned", never_reset, evidence)
    run.print(f"\nThe pin withholds {max(withheld['good'])} of {prompts.capacity} blocks from everybody else.")
    run.print(time_verdict(bad, good))


def print_found(run: Run, label: str, experiment: str) -> list[list[int]]:
    """Print what an arm found in an experiment, the median of its rounds; return the cached tokens by arm and round."""
    found_by_arm, row = [], f"{label:<36}"
    for arm in ARMS:
        found, ttft = [], []
        for n in range(1, run.args.requests):
            measured = [m for m in run.measured(experiment, arm) if m.request == n]
            found.append(sum(m.cached_tokens for m in measured))
            ttft.append(sum(m.ttft_ms for m in measured))
        row += f"{f'{statistics.median(found):,.0f}, {milliseconds(statistics.median(ttft))}':>20}"
        found_by_arm.append(found)
    run.print(row)
    return found_by_arm


async def second_pin(run: Run, demonstration: Demonstration) -> None:
    """Ask for a second pin beside the first: it goes beyond the share, and the request runs without it."""
    prompts = demonstration.prompts
    await demonstration.fresh()
    await demonstration.ask_system(0, "second pin", "good", 0)
    length = prompts.prefix * run.model.block_size
    await demonstration.ask(prompts.tenant[0], "second pin", "tenant", 1, pin_tokens=length)
    answer = demonstration.answer
    run.print("\nA second pin beside the first was asked for. The scheduler's answer:")
    run.print(f"  {answer['refused'] or 'it is pinned'}", markup=False)
    await demonstration.ask(prompts.tenant[1], "second pin", "tenant", 2, unpin="all")
    refused = answer["pinned_tokens"] == 0 and answer["withheld_blocks"] == prompts.prefix
    evidence = f"{answer['pinned_tokens']} tokens pinned, {answer['withheld_blocks']} blocks withheld"
    run.claim("a pin beyond the share is refused, and its request served", refused, evidence)
    await demonstration.fresh()  # EngineError, if not all pins are released


# --- the further experiment: --deeper ---


async def flood_sizes(run: Run, demonstration: Demonstration) -> None:
    """Show what floods of several sizes leave of the prefix; its last blocks go first."""
    prompts = demonstration.prompts
    run.print("\n[bold]How large a flood[/]: cached tokens of the system prompt after it")
    run.print(f"{'flood / cache':<16}{'bad':>8}{'':22}{'good':>8}")
    unpinned, pinned = [], []
    for eighths in (2, 4, 5, 6, 7, 8):
        experiment, row = f"flood {eighths}/8", f"{f'{eighths / 8:.0%}':<16}"
        for arm, left in (("bad", unpinned), ("good", pinned)):
            await demonstration.fresh()
            await demonstration.ask_system(0, experiment, arm, 0)
            flood = demonstration.flood(prompts.capacity * eighths // 8, 1)
            await demonstration.ask_all(list(flood), experiment, "flood", 0)
            m = await demonstration.ask_system(1, experiment, arm, 1)
            await demonstration.release(arm, 0)
            left.append(m.cached_tokens)
            row += f"{m.cached_tokens:>8,}  {run.bar(m.cached_tokens / len(prompts.pin), 18):<20}"
        run.print(row.rstrip())
    less_and_less = unpinned == sorted(unpinned, reverse=True)
    evidence = f"{', '.join(f'{tokens:,}' for tokens in unpinned)} tokens"
    run.claim("the larger the flood, the less is left without a pin", less_and_less, evidence)
    all_left = min(pinned) == prompts.prefix * run.model.block_size
    run.claim("no flood takes a token of the pinned prefix", all_left, f"at least {min(pinned):,} tokens")


async def measure(run: Run) -> None:
    """Start vLLM with the pinning scheduler and a small cache, and go through the rounds."""
    prompts = plan(run)
    longest = max(map(len, prompts.system + prompts.tenant))
    length, suffix = longest + OUTPUT_TOKENS, longest - prompts.prefix * run.model.block_size
    with run.timed("engine_start", "Starting vLLM..."):
        engine = run.start_engine(
            enable_prefix_caching=not run.args.no_prefix_caching,
            max_model_len=length,
            max_num_batched_tokens=length,
            scheduler_cls=SCHEDULER,
            additional_config={"pinning": {"share": SHARE}},
            num_gpu_blocks_override=prompts.capacity + 1,  # one is vLLM's own
            kv_cache_memory_bytes=run.model.kv_bytes(8, length),  # more than that
            graph_tokens=suffix,
        )
    await run.warm_up(longest, suffix)
    demonstration = Demonstration(run, engine, prompts)
    with run.timed("measuring"):
        await rounds(run, demonstration)
        await second_pin(run, demonstration)
        if run.args.deeper:
            await flood_sizes(run, demonstration)


def main() -> int:
    return run_lesson(parse(lesson_parser(__doc__, requests=6)), measure)


if __name__ == "__main__":
    sys.exit(main())
