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
from collections.abc import AsyncIterator, Iterator

from stable_prefix_vs_timestamp import (
    OUTPUT_TOKENS,
    CacheModel,
    Engine,
    Measurement,
    Run,
    UsageError,
    common_prefix,
    good_messages,
    lesson_parser,
    milliseconds,
    run_lesson,
    system_prompt,
    time_verdict,
)  # fmt: skip

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
    text = system_prompt(run.args.prefix_tokens, run.count)
    other = f"You work for another shop, in another country.\n{text}"
    system = [run.encode(good_messages(text, n)) for n in range(4)]
    tenant = [run.encode(good_messages(other, n)) for n in range(2)]
    pin = system[0][: min(common_prefix(system[0], ids) for ids in system[1:])]
    prefix, longest = len(pin) // run.block_size, max(map(len, system + tenant)) + OUTPUT_TOKENS
    if prefix < 2 or longest > 2 * prefix * run.block_size:
        raise UsageError("the questions are as long as the system prompt: choose a larger --prefix-tokens")
    return Prompts(system, tenant, pin, prefix, 3 * prefix, len(tenant[0]) // run.block_size, run.tokens(text))


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


class Client:
    """vLLM's client, with what the next request asks of the scheduler, and what the scheduler answered."""

    def __init__(self, vllm_engine) -> None:
        self.vllm_engine, self.asks, self.answer = vllm_engine, {}, None

    def __getattr__(self, name: str):
        return getattr(self.vllm_engine, name)

    async def generate(self, prompt: dict, params, request_id: str) -> AsyncIterator:
        params.extra_args = self.asks
        async for output in self.vllm_engine.generate(prompt, params, request_id):
            yield output
        self.answer = (output.kv_transfer_params or {}).get("pinning")


class Bench:
    """The engine and its prompts. Keeps the cache model in step with the pins, and the scheduler's answers."""

    def __init__(self, run: Run, engine: Engine, prompts: Prompts) -> None:
        engine.vllm_engine = Client(engine.vllm_engine)
        self.run, self.engine, self.prompts = run, engine, prompts
        self.withheld: dict[str, set[int]] = {arm: set() for arm in ARMS}  # blocks, by what the scheduler answered
        self.reset_while_pinned: set[bool] = set()

    async def fresh(self) -> None:
        """Empty the cache; the model of it starts anew, with an end."""
        await self.engine.reset()
        self.engine.cache_model = EvictingCache(self.engine.block_size, self.prompts.capacity)

    async def ask(self, ids: list[int], experiment: str, arm: str, request: int, **asks: object) -> Measurement:
        self.engine.vllm_engine.asks = asks
        return await self.engine.ask(ids, experiment, arm, request)

    async def ask_system(self, which: int, experiment: str, arm: str, request: int) -> Measurement:
        """Ask under the system prompt; the good arm asks for the pin each time, as an application would."""
        ids, asks = self.prompts.system[which], {"pin_tokens": len(self.prompts.pin)} if arm == "good" else {}
        measurement = await self.ask(ids, experiment, arm, request, **asks)
        if asks:
            self.engine.cache_model.pin(self.prompts.pin)
        answer = self.engine.vllm_engine.answer
        self.withheld[arm].add(answer["withheld_blocks"] if answer else 0)
        return measurement

    def flood(self, blocks: int, number: int) -> Iterator[list[int]]:
        """Yield unique requests that fill `blocks` blocks: each some whole ones, and a token, so that all are found."""
        each, size = max(1, self.prompts.prefix // 4), self.engine.block_size
        for n, begin in enumerate(range(0, blocks, each)):
            ids = self.run.tokens(f"{number + n} is the number of this ticket.\n") + self.prompts.ticket
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


async def rounds(run: Run, bench: Bench) -> None:
    """Measure the arms round by round in ABBA order, print the tables, and judge the token counts."""
    run.print_pair_head("no pin is asked for", "a pin is asked for")
    for n in range(run.args.requests):
        run.print_pair(n, **{arm: await bench.round(arm, n) for arm in (ARMS, ARMS[::-1])[n % 2]})
    bad, good = (run.arm("main", arm)[1:] for arm in ARMS)
    run.print_comparison(bad, good)

    prefix, owned = bench.prompts.prefix, bench.prompts.tenant_blocks
    known, kept = (common_prefix(*p[:2]) // run.block_size for p in (bench.prompts.system, bench.prompts.tenant))
    withheld = {arm: max(blocks) for arm, blocks in bench.withheld.items()}
    run.print(f"\n[bold]{'per round: tokens found, total TTFT':<36}{'bad':>20}{'good':>20}")
    run.print(f"{'blocks withheld':<36}{withheld['bad']:>20}{withheld['good']:>20}")
    before = print_found(run, "system prompt, before the flood", "before the flood")
    flood = print_found(run, "the flood, asked once more", "flood again")
    tenant = print_found(run, "a tenant, after a smaller flood", "tenant")

    def claim(text: str, found: list[int], blocks: int) -> None:
        expected = blocks * run.block_size
        run.claim(text, set(found) == {expected}, f"{min(found):,} to {max(found):,} tokens, {expected:,} expected")

    claim("before the flood both arms find the system prompt", [*before[0], *before[1]], known)
    claim("without a pin nothing of it is left after the flood", [m.cached_tokens for m in bad], 0)
    claim("with a pin all its whole blocks are left", [m.cached_tokens for m in good], prefix)
    claim("the flood finds as many blocks fewer as are withheld", [b - g for b, g in zip(*flood, strict=True)], prefix)
    claim("without a pin the tenant keeps its whole prefix", tenant[0], kept)
    claim("beside a pin the tenant loses as many blocks as are withheld", tenant[1], owned - prefix)
    run.claim("no pin withholds nothing, a pin its prefix once, however often it is asked for",
              bench.withheld == {"bad": {0}, "good": {prefix}}, f"blocks withheld: {bench.withheld}")  # fmt: skip
    run.claim("the cache is not reset while a prefix is pinned", bench.reset_while_pinned == {False},
              f"reset_prefix_cache() returned {bench.reset_while_pinned}")  # fmt: skip
    run.print(f"\nThe pin withholds {withheld['good']} of {bench.prompts.capacity} blocks from everybody else.")
    run.print(time_verdict(bad, good))


def print_found(run: Run, label: str, experiment: str) -> list[list[int]]:
    """Print what an arm found in an experiment, the median of its rounds; return the cached tokens by arm and round."""
    found, cells = [], ""
    for arm in ARMS:
        measured = run.arm(experiment, arm)
        rounds = [[m for m in measured if m.request == n] for n in range(1, run.args.requests)]
        found.append([sum(m.cached_tokens for m in one) for one in rounds])
        ttft = milliseconds(statistics.median(sum(m.ttft_ms for m in one) for one in rounds))
        cells += f"{f'{statistics.median(found[-1]):,.0f}, {ttft}':>20}"
    run.print(f"{label:<36}{cells}")
    return found


async def second_pin(run: Run, bench: Bench) -> None:
    """Ask for a second pin beside the first: it goes beyond the share, and the request runs without it."""
    await bench.fresh()
    await bench.ask_system(0, "second pin", "good", 0)
    length = bench.prompts.prefix * run.block_size
    await bench.ask(bench.prompts.tenant[0], "second pin", "tenant", 1, pin_tokens=length)
    answer = bench.engine.vllm_engine.answer
    run.print("\nA second pin beside the first was asked for. The scheduler's answer:")
    run.print(f"  {answer['refused'] or 'it is pinned'}", markup=False)
    await bench.ask(bench.prompts.tenant[1], "second pin", "tenant", 2, unpin="all")
    run.claim("a pin beyond the share is refused, and its request served",
              answer["pinned_tokens"] == 0 and answer["withheld_blocks"] == bench.prompts.prefix,
              f"{answer['pinned_tokens']} tokens pinned, {answer['withheld_blocks']} blocks withheld")  # fmt: skip
    await bench.fresh()  # EngineError, if not all pins are released


# --- the further experiment: --deeper ---


async def flood_sizes(run: Run, bench: Bench) -> None:
    """Show what floods of several sizes leave of the prefix; its last blocks go first."""
    capacity = bench.prompts.capacity
    run.print("\n[bold]How large a flood[/]: cached tokens of the system prompt after it")
    run.print(f"{'flood / cache':<16}{'bad':>8}{'':22}{'good':>8}")
    left = []
    for eighths in (2, 4, 5, 6, 7, 8):
        found = {}
        for arm in ARMS:
            await bench.fresh()
            await bench.ask_system(0, f"flood {eighths}/8", arm, 0)
            await bench.ask_all(list(bench.flood(capacity * eighths // 8, 1)), f"flood {eighths}/8", "flood", 0)
            found[arm] = await bench.ask_system(1, f"flood {eighths}/8", arm, 1)
            await bench.release(arm, 0)
        bars = {arm: run.bar(m.cached_tokens / len(bench.prompts.pin), 18) for arm, m in found.items()}
        bad, good = (f"{found[arm].cached_tokens:>8,}  {bars[arm]:<20}" for arm in ARMS)
        run.print(f"{f'{eighths / 8:.0%}':<16}{bad}{good}".rstrip())
        left.append((found["bad"].cached_tokens, found["good"].cached_tokens))
    unpinned, pinned = zip(*left, strict=True)
    run.claim("the larger the flood, the less is left without a pin", list(unpinned) == sorted(unpinned, reverse=True),
              f"{', '.join(f'{tokens:,}' for tokens in unpinned)} tokens")  # fmt: skip
    run.claim("no flood takes a token of the pinned prefix", min(pinned) == bench.prompts.prefix * run.block_size,
              f"at least {min(pinned):,} tokens")  # fmt: skip


async def lesson(run: Run) -> None:
    run.load_model()
    prompts = plan(run)
    pinning = {"additional_config": {"pinning": {"share": SHARE}}, "scheduler_cls": SCHEDULER}
    longest = max(map(len, prompts.system + prompts.tenant))
    suffix = longest - prompts.prefix * run.block_size
    engine = await run.open_engine(longest, suffix, num_gpu_blocks_override=prompts.capacity + 1, **pinning)
    bench = Bench(run, engine, prompts)
    with run.timed("measuring"):
        await rounds(run, bench)
        await second_pin(run, bench)
        if run.args.deeper:
            await flood_sizes(run, bench)


def main() -> int:
    return run_lesson(lesson_parser(__doc__, requests=6).parse_args(), lesson)


if __name__ == "__main__":
    sys.exit(main())
