"""One store for the KV of all workers: what one has computed, another loads.

Lesson 4's round robin computes a conversation's past on every worker that it
comes to, and affinity keeps the conversation where its past is. With a store
outside the engines its past is wherever it is asked for:

  1. vLLM hashes the blocks of the prompt, each with all before it (SHA-256)
  2. a worker takes what its own cache has, then what follows in the store
  3. it loads these blocks
  4. it computes the suffix, and stores the blocks that became full

Three arms send lesson 4's sessions, in the same order: round robin and affinity
to workers without a store, round robin to workers with one. Each request is
predicted: the longest prefix in whole blocks that any worker has stored.

--store redis     Redis or Valkey, through the connector in redis_connector.py;
                  without --redis-url a server of this run's own
--store mooncake  Mooncake Store, through vLLM's own MooncakeStoreConnector

Then controls: what is loaded gives the same answer as what is computed; what
was changed in the store gives another one; what is not there is not found.

--deeper adds: a worker is lost, the store is gone and comes back, the price:
bytes, and the length from which loading is faster than computing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from going_further.common import (
    NOWHERE_TO_WRITE,
    OUTPUT_TOKENS,
    Affinity,
    CacheCounters,
    CacheModel,
    Engine,
    LessonError,
    Measurement,
    RoundRobin,
    Run,
    Traffic,
    common_prefix,
    hit_rate,
    in_turn,
    make_traffic,
    median_ms,
    milliseconds,
    p90,
    pair_ratios,
    pair_verdict,
    parse,
    per_worker,
    prime,
    run_lesson,
    send,
    sessions_parser,
    start_workers,
    telling_line,
    use_python_with_vllm,
)
from going_further.kv_stores import MooncakeStore, RedisStore, leave_the_network

ROUND_ROBIN, STORE, AFFINITY = ARMS = ("round robin", "and a store", "affinity")
SALT = "answers"  # of all prompts after the arms: nothing of theirs is found
LOGPROBS = 20  # the most that vLLM gives by default


def register_normal_weights() -> str:
    """Teach vLLM a way to "load" random weights that tell prompts apart; return its name, vLLM's load_format.

    Matrices are drawn from a normal distribution, as models are initialised. vLLM's own random weights ("dummy") are so
    small that all prompts have the same answer.
    """
    import torch
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader("normal")
    class NormalWeights(BaseModelLoader):
        def download_model(self, model_config) -> None:
            """There is nothing to download."""

        def load_weights(self, model, model_config) -> None:
            parameters = dict(model.named_parameters())
            device = next(iter(parameters.values())).device
            dice = torch.Generator(device).manual_seed(0)  # alike on every worker
            for name, weights in parameters.items():
                if weights.dim() > 1:
                    weights.data.normal_(0, 0.02, generator=dice)
                else:
                    weights.data.fill_(1.0 if "norm" in name else 0.0)

    return "normal"


class SharedCache(CacheModel):
    """A worker's cache, and a store behind it; `stored` are the store's blocks, one set for all workers."""

    def __init__(self, block_size: int, stored: set[int]) -> None:
        super().__init__(block_size)
        self.stored = stored

    def own_tokens(self, ids: list[int], salt: str | None = None) -> int:
        return super().cached_tokens(ids, salt)

    def cached_tokens(self, ids: list[int], salt: str | None = None) -> int:
        """Return how many leading tokens need no prefill: the worker's own, then those that the store goes on with."""
        own = self.own_tokens(ids, salt)
        behind = itertools.islice(self.chain(ids[:-1], salt), own // self.block_size, None)
        loaded = itertools.takewhile(self.stored.__contains__, behind)
        return own + self.block_size * sum(1 for _ in loaded)

    def store(self, ids: list[int], salt: str | None = None) -> None:
        super().store(ids, salt)
        self.stored.update(self.chain(ids, salt))


def count_connector(counters: CacheCounters) -> Counter:
    """Let a worker's counters take what its connector gave as hits, too.

    Returns vLLM's own count of it: "tokens", and the bytes of each operation.
    """
    given, record = Counter(), counters.record

    def record_both(scheduler_stats=None, *others: object, **named: object) -> None:
        record(scheduler_stats, *others, **named)
        if scheduler_stats is None:
            return
        if scheduler_stats.connector_prefix_cache_stats is not None:
            counters.hits += scheduler_stats.connector_prefix_cache_stats.hits
            given["tokens"] += scheduler_stats.connector_prefix_cache_stats.hits
        for operation, records in (scheduler_stats.kv_connector_stats or {}).items():
            given[operation] += sum(record["num_bytes"] for record in records)

    counters.record = record_both
    return given


class StoreEngine(Engine):
    """A worker with a store behind its cache."""

    def __init__(self, engine: Engine, stored: set[int]) -> None:
        super().__init__(engine.vllm_engine, engine.counters, engine.all_measured, engine.worker)
        self.stored, self.given = stored, count_connector(engine.counters)
        self.cache_model = SharedCache(self.block_size, stored)
        self.loaded: list[tuple[Measurement, int]] = []  # and how many of its tokens must come from the store

    async def ask(self, ids, experiment, arm, request, *, salt=None, **options) -> Measurement:
        """As every engine does it. What warms a worker up is its own: else the next one would load, not compute."""
        salt = f"worker {self.worker}" if experiment == "warm_up" else salt
        own = self.cache_model.own_tokens(ids, salt)
        measurement = await super().ask(ids, experiment, arm, request, salt=salt, **options)
        self.loaded.append((measurement, measurement.predicted_cached_tokens - own))
        return measurement

    async def reset(self) -> None:
        """Empty the worker's own cache, once all is stored: until then vLLM keeps the blocks. The store keeps its."""
        for _ in range(100):
            if await self.vllm_engine.reset_prefix_cache():
                self.cache_model = SharedCache(self.block_size, self.stored)
                return
            await asyncio.sleep(0.05)
        await super().reset()  # raises EngineError


class Fleet:
    """Workers with a store and workers without one, what is sent to them, and what the store must hold."""

    def __init__(self, run: Run, store: RedisStore | MooncakeStore, traffic: Traffic) -> None:
        self.run, self.store, self.traffic = run, store, traffic
        self.alone: list[Engine] = []
        self.sharing: list[StoreEngine] = []
        self.stored: set[int] = set()  # blocks, as the cache model counts them

    @property
    def vllm_config(self):
        return self.sharing[0].vllm_engine.vllm_config

    def workers(self, arm: str) -> list[Engine]:
        return self.sharing if arm == STORE else self.alone

    async def start(self, **arguments: object) -> None:
        """Start both kinds of workers, on the same cores, and give them the same weights."""
        arguments["async_scheduling"] = False  # a load that fails must be known before the next step is planned
        if not self.run.model.has_weights:
            arguments["load_format"] = register_normal_weights()
        self.alone = await start_workers(self.run, **arguments)
        config = self.store.transfer_config()
        for engine in await start_workers(self.run, kv_transfer_config=config, **arguments):
            self.sharing.append(StoreEngine(engine, self.stored))
            self.run.engines[self.run.engines.index(engine)] = self.sharing[-1]

    async def warm_up(self, longest: int, suffix: int) -> None:
        for engine in self.sharing:  # the first request with log probabilities takes seconds
            await engine.ask([6] * engine.block_size, "warm_up", "decoy", 0, logprobs=LOGPROBS)
        await self.run.warm_up(longest, suffix)
        await self.empty()

    async def empty(self) -> None:
        """Empty the store and all caches in front of it."""
        await self.settle()
        for engine in self.sharing:
            await engine.reset()
        await self.store.empty(self.sharing[0])
        self.stored.clear()

    async def settle(self) -> int:
        """Wait until the store has what was sent to it; return how many blocks it holds."""
        for _ in range(100):
            blocks = await self.store.blocks()
            if blocks == len(self.stored):
                break
            await asyncio.sleep(0.05)
        return blocks

    async def ask(self, worker: int, ids: list[int], experiment: str, arm: str, **more: object) -> Measurement:
        """Ask one worker that shares, and wait until all is stored."""
        measurement = await self.sharing[worker].ask(ids, experiment, arm, worker, **{"salt": SALT} | more)
        await self.settle()
        return measurement


# --- the arms ---


async def compare_arms(fleet: Fleet) -> None:
    """Send the sessions turn after turn in all arms, print what was found where, and judge the token counts."""
    run, traffic, count = fleet.run, fleet.traffic, len(fleet.alone)
    routers = {ROUND_ROBIN: RoundRobin(count), STORE: RoundRobin(count), AFFINITY: Affinity(count)}
    first_prompts = [prompts[0] for prompts in traffic.prompts.values()]
    for arm in ARMS:
        for engine in fleet.workers(arm):
            await prime([engine], arm, first_prompts)
            await fleet.settle()
    lengths = sorted(map(len, traffic.prompts.values()))
    run.print(f"{len(lengths)} sessions of {lengths[0]} to {lengths[-1]} turns, shuffled (seed {run.args.seed})")
    run.print(f"{'turn sessions':<18}" + "".join(f"[bold]{arm.upper():>20}[/]" for arm in ARMS))
    for turn, arrivals in enumerate(traffic.arrivals):
        for arm in in_turn(ARMS, turn):
            routed = []
            for session in arrivals:
                ids = traffic.prompts[session][turn]
                routed.append((session, routers[arm].route(session, ids), ids))
            await send(fleet.workers(arm), "main", arm, turn, routed)
            await fleet.settle()
        row = f"{turn:<4}{len(arrivals):>9}{'' if turn else ' fill':5}"
        for arm in ARMS:
            sent = [m for m in run.measured("main", arm) if m.request == turn]
            row += f"{hit_rate(sent):>10.0%}{milliseconds(median_ms(sent)):>10}"
        run.print(row)
        if turn == 0:
            filling = sum((Counter(engine.given) for engine in fleet.sharing), Counter())
    print_arms(fleet, filling)
    await claim_counts(fleet)


def print_arms(fleet: Fleet, filling: Counter) -> None:
    """Print the arms side by side, without turn 0; `filling` is what vLLM had counted after it."""
    run, count = fleet.run, len(fleet.alone)
    given = sum((Counter(engine.given) for engine in fleet.sharing), Counter()) - filling
    measured = {arm: [m for m in run.measured("main", arm) if m.request > 0] for arm in ARMS}
    loaded = sum(tokens for m, tokens in loads(fleet, "main") if m.request > 0)
    prompts = sum(m.prompt_tokens for m in measured[STORE])

    def row(label: str, value: Callable[[list[Measurement]], str]) -> None:
        run.print(f"{label:<26}" + "".join(f"{value(measured[arm]):>18}" for arm in ARMS))

    def store_row(label: str, value: str) -> None:
        run.print(f"{label:<26}{'-':>18}{value:>18}{'-':>18}")

    run.print(f"\n[bold]{'without turn 0':<26}" + "".join(f"{arm:>18}" for arm in ARMS))
    row("hit rate", lambda arm: f"{hit_rate(arm):.1%}")
    store_row("  of it from the store", f"{loaded / prompts:.1%}")
    row("tokens computed", lambda arm: f"{sum(m.computed_tokens for m in arm):,}")
    row("  per worker", lambda arm: per_worker(arm, count, lambda m: m.computed_tokens))
    row("requests per worker", lambda arm: per_worker(arm, count, lambda m: 1))
    row("TTFT, median", lambda arm: milliseconds(median_ms(arm)))
    row("TTFT, p90", lambda arm: milliseconds(p90(arm)))
    store_row("loaded from the store", megabytes(given["load_get"]))
    store_row("stored", megabytes(given["save_put"]))
    computed = {arm: sum(m.computed_tokens for m in measured[arm]) for arm in ARMS}
    run.print(
        f"\nRound robin computes {computed[ROUND_ROBIN]:,} tokens alone, {computed[STORE]:,} with a store; "
        f"affinity {computed[AFFINITY]:,}."
    )
    run.print(pair_verdict(pair_ratios(measured[ROUND_ROBIN], measured[STORE]), run.args.deeper, "the store"))


def loads(fleet: Fleet, experiment: str) -> list[tuple[Measurement, int]]:
    """Return the requests of an experiment, each with the tokens that it must have loaded."""
    every = itertools.chain.from_iterable(engine.loaded for engine in fleet.sharing)
    return [(m, tokens) for m, tokens in every if m.experiment == experiment]


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


async def claim_counts(fleet: Fleet) -> None:
    run = fleet.run
    found = {arm: sum(m.cached_tokens for m in run.measured("main", arm)) for arm in ARMS}
    evidence = ", ".join(f"{arm} {tokens:,}" for arm, tokens in found.items())
    run.claim("round robin finds more with a store than without", found[STORE] > found[ROUND_ROBIN], evidence)
    run.claim("with a store round robin finds what affinity finds", found[STORE] >= found[AFFINITY], evidence)
    blocks = await fleet.settle()
    evidence = f"{blocks:,} blocks in the store, {len(fleet.stored):,} were sent"
    run.claim("every block is stored once, whoever computed it", 0 < blocks == len(fleet.stored), evidence)


def claim_counters(fleet: Fleet) -> None:
    """Hold vLLM's own count of what its connectors gave against the prediction, over the whole run."""
    counted = sum(engine.given["tokens"] for engine in fleet.sharing)
    predicted = sum(tokens for engine in fleet.sharing for _, tokens in engine.loaded)
    evidence = f"{counted:,} tokens from the store by vLLM's count, {predicted:,} predicted"
    fleet.run.claim("vLLM's connector counters agree with the prediction", counted == predicted, evidence)


# --- the controls: is what is loaded worth what is computed? ---


class Answer(NamedTuple):
    """What a prompt found, and how the model would go on: token -> log probability, of the likeliest ones."""

    measurement: Measurement
    logprobs: dict[int, float]


async def answer(fleet: Fleet, worker: int, ids: list[int], arm: str) -> Answer:
    measurement = await fleet.ask(worker, ids, "answers", arm, logprobs=LOGPROBS)
    [after_prompt] = fleet.sharing[worker].output.outputs[0].logprobs
    return Answer(measurement, {token: entry.logprob for token, entry in after_prompt.items()})


def compare(one: Answer, other: Answer) -> tuple[int, float]:
    """Return how many of the likeliest tokens two answers have in common, and how far apart those are at most."""
    common = one.logprobs.keys() & other.logprobs.keys()
    return len(common), max((abs(one.logprobs[token] - other.logprobs[token]) for token in common), default=0.0)


async def controls(fleet: Fleet) -> None:
    """Ask for one prompt computed, found, loaded, loaded with values that were changed, and from an empty store."""
    run, store, ids = fleet.run, fleet.store, fleet.traffic.prompts["session-00"][0]
    await fleet.empty()
    answers = {"computed by worker 0": await answer(fleet, 0, ids, "computed")}
    answers["found in its own cache"] = await answer(fleet, 0, ids, "own")
    answers["loaded by worker 1"] = await answer(fleet, 1, ids, "loaded")
    if isinstance(store, RedisStore):
        keys = store.block_keys(fleet.vllm_config, ids, SALT)
        same = sorted(keys) == sorted(key.decode() for key in store.stored_keys())
        evidence = f"{len(keys)} keys, the first ends in ...{keys[0][-12:]}"
        run.claim("the keys are vLLM's own hashes over block and past", same, evidence)
        await fleet.sharing[1].reset()
        store.reverse_values(keys, run.model.dtype.itemsize)
        answers["loaded, values reversed"] = await answer(fleet, 1, ids, "reversed")
    await fleet.empty()
    answers["asked of an empty store"] = await answer(fleet, 1, ids, "empty")

    columns = f"{'cached / prompt':>17}{'TTFT':>11}{'in common':>11}{'log prob.':>11}"
    run.print(f"\n[bold]{'One prompt, its next token':<30}{columns}")
    computed = answers["computed by worker 0"]
    for label, this in answers.items():
        m, (common, apart) = this.measurement, compare(computed, this)
        counts = f"{m.cached_tokens:,} / {m.prompt_tokens:,}"
        row = f"{label:<30}{counts:>17}{milliseconds(m.ttft_ms):>11}{f'{common} of {LOGPROBS}':>11}"
        run.print(f"{row}{f'+-{apart:.2f}' if common else '-':>11}")
    own, loaded = answers["found in its own cache"], answers["loaded by worker 1"]
    common, apart = compare(own, loaded)
    evidence = f"{common} of {LOGPROBS} likeliest tokens, log probabilities at most {apart:.3f} apart"
    run.claim("a loaded prefix answers as the worker's own does", common == LOGPROBS and apart < 0.05, evidence)
    if "loaded, values reversed" in answers:
        common, apart = compare(own, answers["loaded, values reversed"])
        evidence = f"{common} of {LOGPROBS} likeliest tokens, log probabilities at most {apart:.3f} apart"
        run.claim("values changed in the store change the answer", common < LOGPROBS or apart > 0.5, evidence)
    none = answers["asked of an empty store"].measurement.cached_tokens
    run.claim("an empty store has nothing", none == 0, f"{none:,} tokens found")


# --- what a store lets go, by its own rules ---


async def let_go(fleet: Fleet, store: RedisStore) -> None:
    """Give half of a prompt a second to live; then give the store too little memory, where it is this run's own."""
    run, size = fleet.run, fleet.run.model.block_size
    ids, other = (fleet.traffic.prompts[session][0] for session in ("session-00", "session-01"))
    run.print(f"\n[bold]{'What the store lets go':<46}{'blocks left':>14}{'in a row':>10}{'found':>10}")

    async def ask_again(label: str, arm: str) -> Measurement:
        """Ask for the prompt with what is left in the store, and in no cache."""
        left = []
        for block, key in zip(model.chain(ids, SALT), keys, strict=True):
            left.append(store.client.exists(key) == 1)
            if not left[-1]:
                fleet.stored.discard(block)
        in_a_row = len(list(itertools.takewhile(bool, left)))
        await fleet.sharing[1].reset()
        m = await fleet.sharing[1].ask(ids, "let go", arm, 1, salt=SALT)
        run.print(f"{label:<46}{f'{sum(left)} of {len(left)}':>14}{in_a_row:>10}{m.cached_tokens:>10,}")
        evidence = f"{in_a_row} blocks in a row, {m.cached_tokens:,} tokens found"
        run.claim(f"{arm}: found is what is left in a row", m.cached_tokens == in_a_row * size, evidence)
        return m

    await fleet.empty()
    await fleet.ask(0, ids, "let go", "fill")
    model, keys = fleet.sharing[0].cache_model, store.block_keys(fleet.vllm_config, ids, SALT)
    for key in keys[len(keys) // 2 :]:
        store.client.expire(key, 1)
    await asyncio.sleep(1.2)
    await ask_again("1 s to live for the second half, 1.2 s later", "time to live")
    if not store.is_own:
        return
    await fleet.empty()
    await fleet.ask(0, ids, "let go", "fill")
    used = store.client.info("memory")["used_memory"]
    value = store.client.strlen(keys[0])
    store.client.config_set("maxmemory-policy", "allkeys-lru")
    store.client.config_set("maxmemory", used + len(keys) * value // 2)
    await fleet.sharing[0].ask(other, "let go", "another prompt", 0, salt=SALT)
    await ask_again("allkeys-lru, memory for one prompt and a half", "least recently used")
    evicted = store.client.info("stats")["evicted_keys"]
    run.claim("a full store evicts", evicted > 0, f"{evicted} keys evicted")
    store.client.config_set("maxmemory", 0)


# --- further experiments: --deeper ---


async def price(fleet: Fleet) -> None:
    """Compare computing with loading at several lengths, and say what a token takes."""
    run, size = fleet.run, fleet.run.model.block_size
    ids = fleet.traffic.prompts["session-00"][0]
    await fleet.empty()
    run.print(f"\n[bold]{'The price':<14}{'KV':>12}{'computed':>12}{'loaded':>12}{'ratio':>9}")
    blocks, faster_from = 1, None
    while (blocks * size) < len(ids):
        prompt = ids[: blocks * size + 1]
        times: dict[str, list[float]] = {"computed": [], "loaded": []}
        for n in range(3):
            for arm, worker in (("computed", 0), ("loaded", 1)):
                m = await fleet.ask(worker, prompt, "price", arm, salt=f"price {n}")
                times[arm].append(m.ttft_ms)
        computed, loaded = statistics.median(times["computed"]), statistics.median(times["loaded"])
        amount = megabytes(blocks * size * run.model.kv_bytes_per_token)
        row = f"{f'{len(prompt):,} tokens':<14}{amount:>12}{milliseconds(computed):>12}{milliseconds(loaded):>12}"
        run.print(f"{row}{f'{computed / loaded:.1f}x':>9}")
        if computed <= loaded:
            faster_from = None
        elif faster_from is None:
            faster_from = len(prompt)
        blocks *= 2
    shortest = f"from {faster_from:,} tokens on" if faster_from else "at none of these lengths"
    run.print(f"To load was faster than to compute {shortest}.")


async def gone_and_back(fleet: Fleet, store: RedisStore) -> None:
    """End the store and start it again: requests are served all the while."""
    run, ids = fleet.run, fleet.traffic.prompts["session-00"][0]
    await fleet.empty()
    await fleet.ask(0, ids, "gone", "stored")
    store.stop()
    fleet.stored.clear()
    await fleet.sharing[1].reset()
    gone = await fleet.sharing[1].ask(ids, "gone", "gone", 1, salt=SALT)
    fleet.stored.clear()  # it could not be stored
    store.start()
    await fleet.ask(0, ids, "gone", "back", salt=SALT)  # in its own cache; that is stored again
    await fleet.sharing[1].reset()
    back = await fleet.ask(1, ids, "gone", "loaded")
    run.print(
        f"\nWhile the store is gone a worker finds {gone.cached_tokens:,} tokens, "
        f"once it is back {back.cached_tokens:,}."
    )
    evidence = f"{gone.cached_tokens:,} tokens found without it, {back.cached_tokens:,} when it is back"
    run.claim(
        "a store that is gone costs its hits and no request", gone.cached_tokens == 0 < back.cached_tokens, evidence
    )


async def lost_worker(fleet: Fleet) -> None:
    """Shut a worker down between two turns: another one loads its sessions' past."""
    run, traffic, router = fleet.run, fleet.traffic, Affinity(len(fleet.sharing))
    await fleet.empty()
    for engine in fleet.sharing:
        await prime([engine], "lost worker", [prompts[0] for prompts in traffic.prompts.values()])
        await fleet.settle()
    middle = min(map(len, traffic.prompts.values())) // 2
    homes = {session: router.route(session, []) for session in traffic.prompts}
    [(lost, _)] = Counter(homes.values()).most_common(1)
    for turn, arrivals in enumerate(traffic.arrivals[: middle + 1]):
        if turn == middle:
            run.end_engine(fleet.sharing[lost])
            router.workers.remove(lost)
        routed = [(session, router.route(session, []), traffic.prompts[session][turn]) for session in arrivals]
        await send(fleet.sharing, "lost worker", "lost worker", turn, routed)
        await fleet.settle()
    moved = [m for m in run.measured("lost worker", "lost worker") if m.session and m.worker != homes[m.session]]
    kept = 0
    for m in moved:
        before, now = traffic.prompts[m.session][middle - 1], traffic.prompts[m.session][middle]
        kept += run.model.whole_blocks(common_prefix(before, now))
    found = sum(m.cached_tokens for m in moved)
    run.print(f"\n[bold]A worker is lost[/] before turn {middle}: its {len(moved)} sessions go on with another one")
    evidence = f"{len(moved)} sessions found {found:,} tokens, their past had {kept:,}"
    run.print(f"and lose nothing: {evidence}." if found >= kept else f"and lose something: {evidence}.")
    run.claim("a lost worker's sessions lose nothing", 0 < kept <= found, evidence)


# --- the tool ---


async def measure(run: Run) -> None:
    """Start the store and the workers, and go through arms and controls."""
    model, args, traffic = run.model, run.args, make_traffic(run)
    longest = max(map(len, itertools.chain(*traffic.prompts.values())))
    suffix = max(map(model.suffix, traffic.prompts.values()))
    length = longest + OUTPUT_TOKENS
    os.environ["PYTHONHASHSEED"] = "0"  # the first block's hash starts from it; all workers need the same
    kv_bytes = model.kv_bytes(2 * args.sessions + 2, length)
    store = RedisStore(args.redis_url) if args.store == "redis" else MooncakeStore(2 * kv_bytes)
    run.environment["store"] = f"{store.label} {store.version}"
    try:
        fleet = Fleet(run, store, traffic)
        await fleet.start(
            enable_prefix_caching=not args.no_prefix_caching,
            max_model_len=length,
            max_num_batched_tokens=length,
            kv_cache_memory_bytes=kv_bytes,  # room for both arms: nothing is evicted
            graph_tokens=args.sessions * suffix,
        )
        await fleet.warm_up(longest, suffix)
        run.print(f"store: {run.environment['store']}; {model.kv_bytes_per_token:,} bytes a token")
        with run.timed("measuring"):
            await compare_arms(fleet)
            await controls(fleet)
            if isinstance(store, RedisStore):
                await let_go(fleet, store)
            if args.deeper:
                await price(fleet)
                if isinstance(store, RedisStore) and store.is_own:
                    await gone_and_back(fleet, store)
                await lost_worker(fleet)
        claim_counters(fleet)
    except store.errors as error:
        if getattr(error, "errno", None) in NOWHERE_TO_WRITE:  # it is this run's output that is gone
            raise
        raise LessonError(f"the store does not answer any more: {telling_line(error)}") from error
    finally:
        store.stop()


def redis_url(text: str) -> str:
    """Return an address without a password, which would be seen in the list of processes and in what is recorded."""
    try:
        url = urlsplit(text)
        is_address = url.scheme in ("redis", "rediss", "unix") and (url.port or 1) > 0
    except ValueError:
        is_address = False
    if not is_address:
        raise argparse.ArgumentTypeError("an address is redis://HOST:PORT, rediss://HOST:PORT or unix:///PATH")
    if url.password is not None or "passw" in unquote(url.query).lower():
        raise argparse.ArgumentTypeError("no password in the address: put it into REDIS_PASSWORD")
    if url.query:
        raise argparse.ArgumentTypeError("no options in the address; a database is redis://HOST:PORT/NUMBER")
    return text


def main() -> int:
    parser = sessions_parser(__doc__)
    parser.set_defaults(fleets=2)  # workers without a store, and workers with one
    add = parser.add_argument
    add("--store", choices=("redis", "mooncake"), default="redis", help="which store (default: redis)")
    add(
        "--redis-url",
        type=redis_url,
        help="a server that is there, best an empty database; its password: REDIS_PASSWORD",
    )
    add("--open-ports", action="store_true", help="let Mooncake's ports be open to other machines")
    args = parse(parser)
    if args.redis_url and args.store == "mooncake":
        parser.error("--redis-url names no Mooncake")
    use_python_with_vllm()
    if args.store == "mooncake" and not args.open_ports and not args.check_options:
        leave_the_network()
    return run_lesson(args, measure)


if __name__ == "__main__":
    sys.exit(main())
