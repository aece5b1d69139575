"""Lesson 1: a stable prefix against a timestamp at the front of the prompt.

Before a language model writes its first token it must read the whole prompt:
for every token, every layer computes a key and a value. This is the prefill,
and it is most of the time to first token (TTFT). vLLM keeps those keys and
values in blocks of tokens. A block is found again by a hash over its own
tokens and over all blocks before it (a chain, not a radix tree; the answer is
the same). So a prompt that starts like an earlier one, token for token, skips
the common part, rounded down to whole blocks; from the first different token
on, everything is computed again, however equal the rest may be.

An agent sends its instructions, policies and tools with every request, and
often the current time as well. The two arms hold the same text:

  bad   the clock opens the system prompt: each request is new from the top
  good  the clock rides with the question: the long system prompt is the same

Predicted cached tokens come from a ten-line model of the cache, and must equal
what vLLM reports on every request. Request 0 of an arm fills the cache and is
left out of medians. The engine is warmed up first, with other text, so that
the slow first request of a process is not mistaken for a cache miss.

--deeper adds: where in the prompt the change stands; user data inside or after
the system message; the prompt's length, with decoding as the control; what the
time of a hit is made of; and the "speed-up" of forgetting to warm the engine.
"""

from __future__ import annotations

import datetime
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator

INSTRUCTIONS = """\
You are the support agent of a web shop. You help customers with orders, returns, refunds, invoices and deliveries.
Read the whole conversation before you answer. Answer in at most five sentences and end with the next step.
When a fact is missing, call a tool; never invent an order number, a price, a date or a delivery status.
Use the tool with the narrowest scope that answers the question. Repeat identifiers exactly as they were given.
"""
POLICIES = """\
Returns: a customer may return an item within 30 days after delivery. The item must be complete and unused.
Refunds: a refund goes back to the payment method of the order. Above 500 euros a supervisor must approve it.
Deliveries: a parcel is late two working days after the promised date. A late parcel is first traced, then sent again.
Privacy: data of one customer is never shown to another one. Notes are factual, short and free of opinions.
Escalation: hand the case over when the customer asks for a person or when a tool has failed twice.
"""
VERBS = {
    "get": "Returns one {}. Read only.",
    "list": "Lists every {} of the given account, newest first. Read only.",
    "create": "Creates a new {} and returns its id.",
    "update": "Updates the {} and returns the current state.",
    "cancel": "Cancels the {}. This cannot be undone.",
    "search": "Searches for a {} by words and dates. Read only.",
    "export": "Writes the {} to a file and returns its name.",
    "approve": "Approves the {}. Only for supervisors.",
}
NOUNS = (
    *("order", "return", "refund", "invoice", "shipment", "parcel", "payment", "voucher", "address", "account"),
    *("product", "supplier", "warehouse", "contract", "ticket", "report", "appointment", "subscription", "document"),
)
FAILURES = (
    "Fails with not_found when it does not exist.",
    "Fails with conflict when another one is already open.",
    "Fails with permission_denied when the caller may not do this.",
    "Fails with rate_limited when called more than ten times a minute.",
)
QUESTIONS = (
    "Where is my parcel? It should have arrived on Monday.",
    "I would like to send back the shoes from my last order. How do I get a label?",
    "The invoice shows my old address. Can you correct it?",
    "Was my refund approved, and when will the money be in my account?",
    "Please cancel the second item and keep the rest of the order.",
)


def tool_definitions() -> Iterator[str]:
    """Yield one line per tool, never the same twice: the long, static part of an agent's prompt."""
    for version in itertools.count(1):
        for (i, noun), (verb, does) in itertools.product(enumerate(NOUNS), VERBS.items()):
            name = f"{verb}_{noun}" + (f"_v{version}" if version > 1 else "")
            arguments = f"{noun}_id: string, customer_id: string, limit: integer"
            yield f"{name}({arguments}) -> object. {does.format(noun)} {FAILURES[(i + version) % len(FAILURES)]}\n"


def system_prompt(tokens: int, count: Callable[[str], int]) -> str:
    """Return instructions, policies and as many tools as it takes to reach `tokens`, as counted by `count`."""
    text, tools = f"{INSTRUCTIONS}\n# Policies\n{POLICIES}\n# Tools\n", tool_definitions()
    while (missing := tokens - count(text)) > 0:
        text += "".join(itertools.islice(tools, 1 + missing // 200))  # a tool is no 200 tokens
    return text


def clock(n: int) -> str:
    """Return the time of request `n`: an input, so that no two requests can share a second by accident."""
    return f"{datetime.datetime(2026, 1, 15, 9, 30) + n * datetime.timedelta(seconds=47):%Y-%m-%d %H:%M:%S}"


def bad_messages(system: str, n: int) -> list[dict]:
    """The clock opens the system prompt."""
    return [
        {"role": "system", "content": f"Current time: {clock(n)}\n\n{system}"},
        {"role": "user", "content": QUESTIONS[n % len(QUESTIONS)]},
    ]


def good_messages(system: str, n: int) -> list[dict]:
    """The clock rides with the question."""
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Current time: {clock(n)}\n\n{QUESTIONS[n % len(QUESTIONS)]}"},
    ]


LAYOUTS = {"bad": bad_messages, "good": good_messages}


async def pair(run: Run, engine: Engine, prompts: dict[str, list[list[int]]]) -> None:
    """Ask bad and good in ABBA order, so that a drifting machine favours neither, and judge the token counts."""
    run.print_pair_head("the clock opens the prompt", "clock rides with the question")
    for n in range(run.args.requests):
        row = {arm: await engine.ask(prompts[arm][n], "main", arm, n) for arm in (LAYOUTS, reversed(LAYOUTS))[n % 2]}
        run.print_pair(n, **row)
    bad, good = run.arm("main", "bad")[1:], run.arm("main", "good")[1:]
    run.print_comparison(bad, good)
    run.print_break("Two bad prompts", *prompts["bad"][:2])

    before_clock = run.whole_blocks(max(itertools.starmap(common_prefix, itertools.combinations(prompts["bad"], 2))))
    static = run.whole_blocks(min(map(common_prefix, prompts["good"], prompts["good"][1:])))
    found = [m.cached_tokens for m in bad], [m.cached_tokens for m in good]
    run.claim("a bad request finds no more than what stands before the clock", max(found[0]) <= before_clock < static,
              f"at most {max(found[0]):,} tokens found, {before_clock:,} stand before the clock")  # fmt: skip
    run.claim("a good request finds the whole static prefix", min(found[1]) >= static,
              f"at least {min(found[1]):,} tokens found, {static:,} are static")  # fmt: skip
    longer = max(abs(b.prompt_tokens - g.prompt_tokens) for b, g in zip(bad, good, strict=True))
    run.claim("both arms send equally long prompts, within a block", longer < run.block_size, f"{longer} tokens apart")
    computed = [statistics.median(m.computed_tokens for m in arm) for arm in (bad, good)]
    run.print(f"\nTokens computed per request: {computed[0]:,.0f} with the clock in front, {computed[1]:,.0f} behind.")
    run.print(time_verdict(bad, good))


# --- the further experiments: --deeper ---


SAMPLES = 5


async def position_sweep(run: Run, engine: Engine, system: str) -> None:
    """Change one token at five places of one prompt; at 0 % the change is one more space between two words."""
    base, words = run.encode(good_messages(system, 0)), system.split(" ")
    run.print("\n[bold]Where the change stands[/]: one token differs, everything after it is lost")
    run.print(f"{'changed at':<18}{'cached / prompt':>16}{'TTFT, median':>14}{'range':>20}")
    await engine.reset()
    await engine.ask(base, "position", "base", 0)
    for percent in (0, 25, 50, 75, 100):
        at = min(len(base) * percent // 100, len(base) - 1)
        others = sorted(set(base) - {base[at]})
        measured, kept = [], []
        for n in range(SAMPLES):
            ids = [*base[:at], others[n], *base[at + 1 :]]
            if percent == 0:  # not before the first word: some templates strip what stands there
                ids = run.encode(good_messages(" ".join([*words[: n + 1], "", *words[n + 1 :]]), 0))
            measured.append(await engine.ask(ids, "position", f"{percent}%", n))
            kept.append(run.whole_blocks(common_prefix(base, ids)))
        found = [m.cached_tokens for m in measured]
        run.claim(f"a change at {percent} % leaves the blocks before it", found == kept,
                  f"{found} tokens cached, {kept} before the change")  # fmt: skip
        ttft = statistics.median(m.ttft_ms for m in measured)
        label = f"{percent} %" + (" (extra space)" if percent == 0 else "")
        counts = f"{found[0]:,} / {measured[0].prompt_tokens:,}"
        bar = run.bar(hit_rate(measured), width=10)
        run.print(f"{label:<18}{counts:>16}{milliseconds(ttft):>14}{ttft_range(measured):>20}  {bar}".rstrip())


async def user_data(run: Run, engine: Engine, system: str) -> None:
    """Put what is known of the customer into the system message, or into the message after it."""
    run.print("\n[bold]User data[/]: from the general to the particular (instructions, context, question)")
    run.print(f"{'user data':<28}{'hit rate':>10}{'TTFT, median':>16}{'range':>22}")
    arms: dict[str, list[Measurement]] = {"inside the system message": [], "in the message after it": []}
    await engine.reset()
    for n in range(1 + SAMPLES):
        profile = f"Customer C-{10482 + 7 * n}, member since {2015 + n}, language English, {n} open orders.\n"
        question = QUESTIONS[n % len(QUESTIONS)]
        inside = [system.replace(INSTRUCTIONS, INSTRUCTIONS + profile, 1), question]
        both = [*zip(arms, (inside, [system, profile + question]), strict=True)]
        for arm, contents in (both, reversed(both))[n % 2]:
            messages = [{"role": role, "content": c} for role, c in zip(("system", "user"), contents, strict=True)]
            arms[arm].append(await engine.ask(run.encode(messages), "user_data", arm, n))
    for arm, measured in arms.items():
        ttft = statistics.median(m.ttft_ms for m in measured[1:])
        run.print(f"{arm:<28}{hit_rate(measured[1:]):>10.1%}{milliseconds(ttft):>16}{ttft_range(measured[1:]):>22}")
    inside, after = (sum(m.cached_tokens for m in measured[1:]) for measured in arms.values())
    run.claim("user data after the system message leaves it cached", after > inside, f"{after:,} and {inside:,} tokens")


async def length_sweep(run: Run, engine: Engine, ids: list[int]) -> list[int]:
    """Miss and hit at growing length; return the lengths. Decoding is the control: a hit skips prefill only."""
    lengths = []
    run.print("\n[bold]Prompt length[/]: a miss grows, a hit hardly; decoding (TPOT) is the control")
    run.print("  tokens      miss       hit  speed-up   bound  reached  TPOT: miss      hit")
    for length in (run.args.prefix_tokens * eighths // 8 for eighths in (1, 2, 4, 8, 16)):
        if not 2 * run.block_size <= length <= len(ids):
            continue
        lengths.append(length)
        arms: dict[str, list[Measurement]] = {"miss": [], "hit": []}
        for n in range(SAMPLES):
            await engine.reset()
            for arm in arms:
                arms[arm].append(await engine.ask(ids[:length], f"length {length}", arm, n, max_tokens=33))
        miss, hit = (statistics.median(m.ttft_ms for m in arm) for arm in arms.values())
        bound = length / arms["hit"][0].computed_tokens
        tpot = [milliseconds(statistics.median(m.tpot_ms for m in arm)) for arm in arms.values()]
        run.print(
            f"{length:>8,}{milliseconds(miss):>10}{milliseconds(hit):>10}{miss / hit:>9.1f}x{bound:>7.0f}x"
            f"{miss / hit / bound:>9.0%}{tpot[0]:>12}{tpot[1]:>9}"
        )
        most = max(m.computed_tokens for m in arms["hit"])
        run.claim(f"a hit of {length} tokens computes at most one block", most <= run.block_size, f"{most} tokens")
    run.print("medians; bound: prompt / computed tokens; missing: what a hit is made of, below")
    return lengths


def anatomy(run: Run, lengths: list[int]) -> None:
    """Split the hits of the length sweep by vLLM's own time stamps: what stays of a hit when its tokens are found."""
    run.print("\n[bold]Anatomy of a hit[/]: what is left when all but a few tokens are found")
    run.print(" tokens computed      hit   client  waiting     step  speed-up  of step   bound")
    for length in lengths:
        miss, hit = run.arm(f"length {length}", "miss"), run.arm(f"length {length}", "hit")
        ttft, client = statistics.median(m.ttft_ms for m in hit), statistics.median(m.client_ms for m in hit)
        waiting, step = statistics.median(m.waiting_ms for m in hit), statistics.median(m.step_ms for m in hit)
        speed_up = statistics.median(m.ttft_ms for m in miss) / ttft
        of_step = statistics.median(m.step_ms for m in miss) / step
        computed = hit[0].computed_tokens
        times = "".join(f"{milliseconds(value):>9}" for value in (ttft, client, waiting, step))
        run.print(f"{length:>7,}{computed:>9}{times}{speed_up:>9.1f}x{of_step:>8.1f}x{length / computed:>7.0f}x")
    run.print("client: ids sent, hashed by block, the first token sent back; step: blocks found")
    run.print("and one forward pass; of step: the speed-up if there were nothing but the step")


def hashing(run: Run, ids: list[int]) -> None:
    """Time vLLM's own hashing of a prompt, a part of `client`, by block size and algorithm."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import hash_block_tokens

    sizes = (16, 32, 64, 128)
    head = f"hashing {len(ids):,} tokens, in blocks of"
    run.print(f"\n{head:<40}" + "".join(f"{size:>10}" for size in sizes))
    for algorithm in ("sha256", "sha256_cbor"):
        cells, hash_function = "", get_hash_fn_by_name(algorithm)
        for size in sizes:
            times = []
            for _ in range(SAMPLES):
                start, parent = time.perf_counter(), b"none"
                for at in range(0, len(ids) - size + 1, size):
                    parent = hash_block_tokens(hash_function, parent, ids[at : at + size], None)
                times.append((time.perf_counter() - start) * 1000)
            cells += f"{milliseconds(statistics.median(times)):>10}"
        run.print(f"{algorithm:<40}{cells}")


async def naive_speed_up(run: Run, engine: Engine) -> None:
    """The same division with a cold engine in the numerator: what a benchmark without warm-up reports."""
    first, *_, hit = run.arm("warm_up", "decoy")
    await engine.reset()
    miss = await engine.ask([5] * first.prompt_tokens, "warm_up", "warm decoy", 0)
    times = [milliseconds(m.ttft_ms) for m in (first, miss, hit)]
    run.print(f"\n[bold]Without a warm-up[/] ({first.prompt_tokens:,} tokens, one sample each)")
    run.print(f"first request of the engine {times[0]}, a miss when warm {times[1]}, a hit {times[2]}")
    naive, honest = (m.ttft_ms / hit.ttft_ms for m in (first, miss))
    run.print(f"naive speed-up {naive:.1f}x, honest {honest:.1f}x: the cache has no part in the difference")


async def lesson(run: Run) -> None:
    run.load_model()
    system = system_prompt(run.args.prefix_tokens, run.count)
    numbers = range(run.args.requests)
    prompts = {arm: [run.encode(layout(system, n)) for n in numbers] for arm, layout in LAYOUTS.items()}
    long_ids = []
    if run.args.deeper:
        long_ids = run.encode(good_messages(system_prompt(2 * run.args.prefix_tokens, run.count), 0))
        long_ids = long_ids[: run.max_model_len - OUTPUT_TOKENS]
    longest = max(map(len, [*prompts["bad"], *prompts["good"], long_ids]))
    engine = await run.open_engine(longest, run.suffix(prompts["good"]))
    with run.timed("measuring"):
        await pair(run, engine, prompts)
        if run.args.deeper:
            await position_sweep(run, engine, system)
            await user_data(run, engine, system)
            lengths = await length_sweep(run, engine, long_ids)
            anatomy(run, lengths)
            hashing(run, long_ids[: lengths[-1]])
            await naive_speed_up(run, engine)


def main() -> int:
    return run_lesson(lesson_parser(__doc__, requests=6).parse_args(), lesson)


# --- measuring block: the same in all four lessons; tests/test_measuring_block.py holds the copies equal ---

import argparse
import asyncio
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import fcntl
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TextIO

HERE = Path(__file__).resolve().parent
OUTPUT_TOKENS = 64  # the most that a lesson lets a request generate
SEQUENCES = 16  # the most that an engine computes at once
GRAPH_TOKENS = 2048  # the longest step that is captured as a CUDA graph: each size takes memory and time
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")


class LessonError(Exception):
    """A foreseeable fault, told in one line that says what to do; `status` is 2 for wrong usage."""

    status = 1


class UsageError(LessonError):
    status = 2


class EngineError(LessonError):
    """vLLM failed; the root cause is in its log."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One request. `predicted_cached_tokens` is None only over HTTP, `ttft_ms` only where `error` says why."""

    experiment: str
    arm: str
    request: int
    worker: int | None
    session: str | None
    prompt_tokens: int
    cached_tokens: int
    predicted_cached_tokens: int | None
    ttft_ms: float | None  # the client's clock, from the call to the first streamed output
    error: str | None
    engine_ttft_ms: float | None = None  # the engine's part of it, from queueing to the first token: the two below
    waiting_ms: float | None = None  # queued until scheduled
    step_ms: float | None = None  # scheduled until the first token: finding the blocks, and the forward pass
    client_ms: float | None = None  # the rest: tokens in, hashed by block, and out; a busy engine first ends its step
    tpot_ms: float | None = None  # decode only: first token to last, per token

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclasses.dataclass(frozen=True)
class Claim:
    claim: str
    holds: bool
    evidence: str


class CacheModel:
    """vLLM's prefix cache: a full block is found by the hash of its own tokens and of all blocks before it."""

    def __init__(self, block_size: int) -> None:
        self.block_size, self.blocks = block_size, set()

    def chain(self, ids: list[int], salt: str | None = None) -> Iterator[int]:
        parent = hash(salt)
        for end in range(self.block_size, len(ids) + 1, self.block_size):
            parent = hash((parent, *ids[end - self.block_size : end]))
            yield parent

    def cached_tokens(self, ids: list[int], salt: str | None = None) -> int:
        """Return how many leading tokens need no prefill. The last one always does: it gives the first output."""
        found = itertools.takewhile(self.blocks.__contains__, self.chain(ids[:-1], salt))
        return self.block_size * sum(1 for _ in found)

    def store(self, ids: list[int], salt: str | None = None) -> None:
        self.blocks.update(self.chain(ids, salt))


class CacheCounters:
    """vLLM's own `prefix_cache_queries` and `prefix_cache_hits`, in tokens, received as one of its stat loggers."""

    def __init__(self) -> None:
        self.queries = self.hits = 0

    def record(self, scheduler_stats=None, *_: object, **__: object) -> None:
        if scheduler_stats is not None:
            self.queries += scheduler_stats.prefix_cache_stats.queries
            self.hits += scheduler_stats.prefix_cache_stats.hits

    def log(self, *_: object) -> None:
        """vLLM calls this, under its three names, when a logger should print; there is nothing to print."""

    log_engine_initialized = record_sleep_state = log


class WorkerExtension:
    """What vLLM's worker is asked beyond its own methods: it alone knows what its attention backend takes."""

    def execution(self) -> str:
        """Say how prefill steps run: kernels replayed as one CUDA graph, or launched one by one."""
        return "CUDA graphs" if str(self.vllm_config.compilation_config.cudagraph_mode) == "FULL" else "eager"


class Engine:
    """A running vLLM engine with the cache model beside it: prompts go in as token ids, measurements come out."""

    def __init__(self, vllm_engine, counters: CacheCounters, worker: int | None) -> None:
        cache = vllm_engine.vllm_config.cache_config
        self.vllm_engine, self.counters, self.worker = vllm_engine, counters, worker
        self.block_size: int = cache.block_size
        self.kv_cache_tokens: int = cache.num_gpu_blocks * cache.block_size
        self.cache_model = CacheModel(self.block_size)
        self.measurements: list[Measurement] = []
        self.output_ids: list[int] = []  # what the latest request generated
        self.execution = "eager"  # "CUDA graphs", where the worker says so

    async def ask(
        self,
        ids: list[int],
        experiment: str,
        arm: str,
        request: int,
        *,
        session: str | None = None,
        salt: str | None = None,
        max_tokens: int = 1,
        sample_from: list[int] | None = None,
    ) -> Measurement:
        """Predict, send one prompt, read its stream to the end, record both.

        A `salt` keeps equal prompts of different arms apart in the cache. `sample_from` asks for tokens that are drawn
        from these, from a fixed seed, instead of the likeliest ones.
        """  # fmt: skip
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        predicted, first, output = self.cache_model.cached_tokens(ids, salt), None, None
        prompt = tokens_input(ids, cache_salt=salt)
        drawn = dict(temperature=1.0, seed=1, allowed_token_ids=sample_from) if sample_from else dict(temperature=0.0)
        # Nobody reads the text: to make it would be counted as time to first token.
        params = SamplingParams(**drawn, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        try:
            async for output in self.vllm_engine.generate(prompt, params, str(uuid.uuid4())):  # noqa: B007, read below
                first = first or time.perf_counter()
        except EngineDeadError as error:
            raise EngineError("the engine died") from error
        if first is None or output is None:
            raise EngineError(f"{experiment}, {arm}, request {request}: the stream ended without a token")
        self.output_ids = list(output.outputs[0].token_ids)
        self.cache_model.store(ids + self.output_ids[:-1], salt)  # nothing followed the last token, so it has no KV yet
        stats, decoded = output.metrics, len(self.output_ids) - 1
        ttft, engine_ttft = first - start, stats.first_token_ts - stats.queued_ts
        measurement = Measurement(
            experiment, arm, request, self.worker, session, len(ids), output.num_cached_tokens, predicted,
            ttft_ms=ttft * 1000,
            error=None,
            engine_ttft_ms=engine_ttft * 1000,
            waiting_ms=(stats.scheduled_ts - stats.queued_ts) * 1000,
            step_ms=(stats.first_token_ts - stats.scheduled_ts) * 1000,
            client_ms=(ttft - engine_ttft) * 1000,
            tpot_ms=(stats.last_token_ts - stats.first_token_ts) * 1000 / decoded if decoded else None,
        )  # fmt: skip
        self.measurements.append(measurement)
        return measurement

    async def reset(self) -> None:
        """Empty the prefix cache, and the model of it."""
        if not await self.vllm_engine.reset_prefix_cache():
            raise EngineError("vLLM did not reset its prefix cache: a block is still in use")
        self.cache_model = CacheModel(self.block_size)

    async def warm_up(self, length: int, suffix: int) -> None:
        """Send unrelated tokens: `length` new ones, then hits of which `suffix` are new, and forget them.

        There are hits until two in a row take equally long, within a tenth, and eight at most.
        """
        times = [(await self.ask([6] * length, "warm_up", "decoy", 0)).ttft_ms]
        while len(times) < 3 or (len(times) < 9 and abs(times[-1] - times[-2]) > times[-2] / 10):
            ids = [6] * (length - suffix) + [6 + len(times)] * suffix
            times.append((await self.ask(ids, "warm_up", "decoy", len(times))).ttft_ms)
        await self.reset()
        [self.execution] = await self.vllm_engine.collective_rpc("execution")

    def end(self) -> None:
        """End vLLM's processes at once, which have nothing left to save, and wait until their memory is free."""
        processes = self.vllm_engine.engine_core.resources.engine_manager.processes
        self.vllm_engine.shutdown(timeout=0)
        for process in processes:
            process.join()


class Run:
    """One run of a lesson: its arguments, model and engines, and all that it prints and writes."""

    def __init__(self, args: argparse.Namespace, terminal: TextIO) -> None:
        from rich.console import Console

        self.args, self.console = args, Console(file=terminal, width=80, highlight=False)
        # A row is a row: one of more than 80 columns is seen as such by the tests, not broken into two.
        self.print = functools.partial(self.console.print, soft_wrap=True)
        self.engines: list[Engine] = []
        self.elsewhere: list[Measurement] = []  # measured on something that is no vLLM engine
        self.claims: list[Claim] = []
        self.more: dict = {}  # further keys of the JSON
        self.seconds = dict.fromkeys(("imports", "engine_start", "warm_up", "measuring"), 0.0)

    @property
    def measurements(self) -> list[Measurement]:
        return [measurement for engine in self.engines for measurement in engine.measurements] + self.elsewhere

    def arm(self, experiment: str, arm: str) -> list[Measurement]:
        return [m for m in self.measurements if (m.experiment, m.arm) == (experiment, arm)]

    def claim(self, claim: str, holds: bool, evidence: str) -> None:
        self.claims.append(Claim(claim, holds, evidence))

    @contextlib.contextmanager
    def timed(self, what: str, label: str = "") -> Iterator[None]:
        """Add the seconds that pass inside to `seconds[what]`; a terminal shows the label and counts along."""
        from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

        start, shown = time.perf_counter(), bool(label) and self.console.is_terminal
        columns = SpinnerColumn(), label, TimeElapsedColumn()
        with Progress(*columns, console=self.console, transient=True, disable=not shown) as progress:
            progress.add_task(label)
            yield
        self.seconds[what] += time.perf_counter() - start

    def built_in(self, share: int = 1) -> Path:
        """Return the built-in model for this device: on a GPU the largest shape that fits into one `share`-th of it."""
        return HERE / "built_in_model" / (built_in_shape(self.gpu_memory // share) if self.on_gpu else "cpu")

    def load_model(self, engines: int = 1) -> None:
        """Find the model, its tokenizer and its limits for so many engines on one GPU; none is started yet."""
        args, built_in = self.args, HERE / "built_in_model"
        if args.model is None and not built_in.is_dir():
            raise LessonError("the built-in model is not beside this script: give --model a folder or a hub name")
        name = args.model and find_model(args.model)
        with self.timed("imports", "Importing vLLM..."):
            gc.disable()  # imports leave no garbage; to look for it takes a quarter of their time
            import torch
            import transformers
            import vllm
            from vllm import AsyncEngineArgs, AsyncLLMEngine  # noqa: F401, the engine is imported here, too
            from vllm.platforms import current_platform

            gc.freeze(), gc.enable()
        if not current_platform.device_type:
            raise LessonError("this vLLM was built for a GPU that does not answer: run `python3 setup_and_test.py`")
        self.on_gpu: bool = not current_platform.is_cpu()
        self.gpu_memory: int = current_platform.get_device_total_memory() if self.on_gpu else 0  # of one, in bytes
        device = current_platform.get_device_name() if self.on_gpu else f"CPU ({len(os.sched_getaffinity(0))} cores)"
        name = name or find_model(str(self.built_in(engines)))
        if args.prefix_tokens is None:
            args.prefix_tokens = 8000 if self.on_gpu else 4000
        path = Path(name)
        real = not path.is_dir() or any(file for pattern in WEIGHT_FILES for file in path.glob(pattern))
        # Blocks of 32 on a GPU: of 16 twice as many are hashed, of 128 a hit computes a hundred tokens more. "uni": the
        # model runs in the engine's own process. The utilization is but a check at the start once the size of the cache
        # is given; 0.1 keeps it out of the way on a shared GPU. No hybrid manager: beside layers of full attention it
        # would drop what sliding windows have left, a cache of other rules.
        self.engine_args = functools.partial(
            AsyncEngineArgs, model=name, load_format="auto" if real else "dummy",
            enable_prefix_caching=not args.no_prefix_caching, max_num_seqs=SEQUENCES,
            block_size=args.block_size or (32 if self.on_gpu else None), distributed_executor_backend="uni",
            gpu_memory_utilization=0.1, disable_hybrid_kv_cache_manager=True,
            worker_extension_cls=f"{__name__}.{WorkerExtension.__name__}",
        )  # fmt: skip
        self.takes_graphs: bool = current_platform.is_cuda_alike()
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, mistral_format=False)
            config = self.engine_args(enforce_eager=True).create_engine_config()
        except (OSError, ValueError) as error:
            raise LessonError(f"vLLM cannot use the model in {name}: {telling_line(error)}") from error
        shape, parallel = config.model_config, config.parallel_config
        if shape.is_hybrid or shape.is_attention_free:
            raise LessonError(f"{name} is not a full-attention model; its cache hits cannot be predicted here")
        kinds = shape.hf_text_config.to_dict().get("layer_types") or ()
        self.window: int | None = None if "full_attention" in kinds else shape.get_sliding_window()
        heads, layers = shape.get_num_kv_heads(parallel), shape.get_num_layers(parallel)
        self.dtype_bytes: int = shape.dtype.itemsize
        self.kv_bytes_per_token = 2 * layers * heads * shape.get_head_size() * self.dtype_bytes
        self.vocabulary: int = shape.get_vocab_size()
        self.max_model_len, self.block_size = shape.max_model_len, config.cache_config.block_size
        if 0 < args.prefix_tokens < 2 * self.block_size:
            raise UsageError(f"--prefix-tokens must be at least two blocks, {2 * self.block_size} tokens here")
        self.check_length(args.prefix_tokens)
        self.environment = {
            "vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(), "device": device,
            "model": args.model if args.model and not Path(args.model).is_dir() else f"{path.parent.name}/{path.name}",
            "weights": "real" if real else "random", "dtype": str(shape.dtype).removeprefix("torch."),
            "block_size": self.block_size, "prefix_caching_hash_algo": config.cache_config.prefix_caching_hash_algo,
            "prefix_tokens": args.prefix_tokens, "requests": args.requests,
            "started_at": f"{datetime.datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}",
            "command": " ".join(["python", *(re.sub(r"(^|=)/(?:\S*/)?", r"\1", word) for word in sys.orig_argv[1:])]),
            "config_sha256": hashlib.sha256((path / "config.json").read_bytes()).hexdigest() if path.is_dir() else None,
        }  # fmt: skip

    def whole_blocks(self, tokens: int) -> int:
        return tokens // self.block_size * self.block_size

    def bar(self, share: float, width: int = 24) -> str:
        return ("\u2588" if self.console.encoding.startswith("utf") else "#") * round(width * share)

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def count(self, text: str) -> int:
        return len(self.tokens(text))

    def render(self, messages: list[dict], answer: bool = True) -> str:
        """Return a chat as the template writes it, to where the answer begins or the last message ends."""
        return render(self.tokenizer, messages, answer)

    def encode(self, messages: list[dict], answer: bool = True) -> list[int]:
        """Return the token ids of a chat; the template writes the special tokens itself."""
        return self.tokens(self.render(messages, answer))

    def check_length(self, prompt: int) -> None:
        """Raise UsageError where the model takes no prompt of so many tokens, or does not look back as far."""
        length = prompt + OUTPUT_TOKENS
        if length > self.max_model_len:
            limit = f"prompt and answer need {length:,} tokens, the model takes {self.max_model_len:,}"
            raise UsageError(f"{limit}: choose a shorter prompt (--prefix-tokens)")
        if self.window and length > self.window:
            limit = f"every layer of this model has a sliding window, of {self.window:,} tokens"
            raise UsageError(f"{limit}: beyond it nothing is predicted; choose a shorter prompt (--prefix-tokens)")

    def check_template(self, conversation: list[list[dict]]) -> None:
        """Raise LessonError unless the template renders each turn as a prefix of the next, token for token."""
        for n, (before, after) in enumerate(itertools.pairwise(conversation)):
            ids, longer = self.encode(before, answer=False), self.encode(after)
            at = common_prefix(ids, longer)
            if at < len(ids):
                where = (
                    f"turn {n + 1} departs from turn {n} at token {at} ({self.tokenizer.decode(ids[at : at + 8])!r})"
                )
                raise LessonError(
                    f"the model's chat template is not prefix-stable, {where}: no turn finds the one before it; "
                    "choose a --model whose template leaves old messages as they were"
                )

    def suffix(self, prompts: list[list[int]]) -> int:
        """Return the most tokens that are computed of a prompt that comes after the one before it."""
        pairs = itertools.pairwise(prompts)
        return max(len(after) - self.whole_blocks(common_prefix(before, after)) for before, after in pairs)

    def start_engine(
        self, longest: int, suffix: int, worker: int | None = None, prompts: int = 8, batch: int = 1, **more: object
    ) -> Engine:
        """Start vLLM so that a prompt is one prefill step and the KV cache holds `prompts` of the longest.

        On a GPU a step of up to `batch` hits, each of `suffix` tokens, is one replay of a CUDA graph, and nothing is
        compiled. vLLM narrows that to decoding where the attention lets no prefill be captured, and where it captures
        nothing vLLM does not start: then prefill runs eagerly, and `execution` says so. `more` are further arguments of
        vLLM's AsyncEngineArgs. Raises UsageError where the model takes no such prompt, EngineError where vLLM does not
        start.
        """
        from vllm import AsyncLLMEngine

        self.check_length(longest)
        length = longest + OUTPUT_TOKENS
        kv_bytes = prompts * math.ceil(length / self.block_size) * self.block_size * self.kv_bytes_per_token
        counters = CacheCounters()
        sizes = dict(max_model_len=length, max_num_batched_tokens=length, kv_cache_memory_bytes=kv_bytes)
        capture = graph_sizes(batch * suffix)  # of these vLLM leaves out what no step can reach
        graphs = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": capture}
        ways = [{"enforce_eager": False, "compilation_config": graphs}] if self.takes_graphs else []
        for way in [*ways, {"enforce_eager": True}]:
            try:
                config = self.engine_args(**sizes | way | more).create_engine_config()
                os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # what is imported here need not be once more
                vllm_engine = AsyncLLMEngine.from_vllm_config(config, stat_loggers=[lambda *_: counters])
                break
            except (OSError, RuntimeError, ValueError) as error:
                if way["enforce_eager"]:
                    raise EngineError("vLLM did not start") from error
        engine = Engine(vllm_engine, counters, worker)
        self.engines.append(engine)
        if engine.block_size != self.block_size:  # some backends decide only once the engine is there
            raise UsageError(f"this device wants other blocks: add --block-size {engine.block_size}")
        return engine

    async def open_engine(self, longest: int, suffix: int, **more: object) -> Engine:
        """Start one engine, warm it up, and print what the numbers will depend on."""
        with self.timed("engine_start", "Starting vLLM..."):
            engine = self.start_engine(longest, suffix, **more)
        with self.timed("warm_up", "Warming up..."):
            await engine.warm_up(longest, suffix)
        self.print_banner()
        return engine

    def print_banner(self) -> None:
        engine = self.engines[0]
        self.environment |= {"kv_cache_tokens": engine.kv_cache_tokens, "execution": engine.execution}
        engine_line = (
            "blocks of {block_size} tokens ({prefix_caching_hash_algo}), KV cache of {kv_cache_tokens:,} tokens"
        )
        self.console.print(  # names of models and devices may be long: this may wrap
            "vLLM {vllm} on {device}, {model} with {weights} weights, {dtype}\n".format_map(self.environment)
            + (engine_line + ", {execution}").format_map(self.environment)
        )
        seconds = "imports {imports:.1f} s, engine start {engine_start:.1f} s, warm-up {warm_up:.1f} s\n"
        self.print(seconds.format_map(self.seconds))

    def print_pair_head(self, bad: str, good: str) -> None:
        columns = f"{'TTFT':>8}{'cached / prompt':>17}{'predicted':>10}"
        self.print(f"{'':7}[bold red]{'BAD: ' + bad:<37}[bold green]GOOD: {good}")
        self.print(f"{'':7}{columns}  {columns}")

    def print_pair(self, request: int, bad: Measurement, good: Measurement) -> None:
        self.print(f"{request:<3}{'fill' if request == 0 else '':4}{cells(bad)}  {cells(good)}")

    def print_comparison(self, bad: list[Measurement], good: list[Measurement]) -> None:
        rows = {
            "hit rate (cached / prompt tokens)": lambda arm: f"{hit_rate(arm):.1%}",
            "tokens computed": lambda arm: f"{sum(m.computed_tokens for m in arm):,}",
            "TTFT, median": lambda arm: milliseconds(statistics.median(m.ttft_ms for m in arm)),
            "TTFT, range": ttft_range,
        }
        self.print(f"\n[bold]{'without request 0':<36}{'bad':>20}{'good':>20}")
        for name, cell in rows.items():
            self.print(f"{name:<36}{cell(bad):>20}{cell(good):>20}")

    def print_break(self, which: str, before: list[int], after: list[int]) -> None:
        """Show where two prompts first differ, and which blocks that costs."""
        at, blocks = common_prefix(before, after), len(after) // self.block_size
        lost = blocks - at // self.block_size
        self.print(f"\n{which} first differ at token {at:,} of {len(after):,}: {lost} of {blocks} blocks lost")
        for ids in (before, after):
            text = repr(self.tokenizer.decode(ids[max(0, at - 24) : at + 6]))
            self.print(f"  {text if len(text) <= 78 else f'...{text[-75:]}'}", markup=False)

    def finish(self) -> int:
        """Check every prediction, print the failed claims, write the JSON, and return the exit status."""
        measured = self.measurements
        wrong = [m for m in measured if m.cached_tokens != m.predicted_cached_tokens]
        evidence = f"{len(measured) - len(wrong)} of {len(measured)} requests"
        for m in wrong[:1]:
            where = f"{m.experiment}, {m.arm}, request {m.request}"
            evidence += f"; first in {where}: {m.cached_tokens:,} cached, {m.predicted_cached_tokens:,} predicted"
        self.claim("predicted = measured cached tokens on every request", not wrong, evidence)
        counted = sum(e.counters.hits for e in self.engines), sum(e.counters.queries for e in self.engines)
        asked = [m for e in self.engines for m in e.measurements]
        summed = sum(m.cached_tokens for m in asked), sum(m.prompt_tokens for m in asked)
        evidence = f"hits / queries {counted[0]:,} / {counted[1]:,}; requests {summed[0]:,} / {summed[1]:,}"
        self.claim("vLLM's own counters agree with the requests", counted == summed, evidence)
        failed = [claim for claim in self.claims if not claim.holds]
        for claim in failed:
            self.console.print(f"\n[bold red]FAILED[/]: {claim.claim}\n  {claim.evidence}")
        held = f"{len(self.claims) - len(failed)} of {len(self.claims)} claims about token counts hold"
        self.print(f"\n{held}; measuring took {self.seconds['measuring']:.1f} s")
        if self.args.json:
            lesson = sys.modules["__main__"].__doc__.splitlines()[0]
            content = {"schema": 1, "lesson": Path(sys.argv[0]).stem, "title": lesson, "environment": self.environment}
            content |= {"seconds": self.seconds, "measurements": measured, "claims": self.claims} | self.more
            write_json(self.args.json, content)
        return 1 if failed else 0


def render(tokenizer, messages: list[dict], answer: bool = True, **variables: object) -> str:
    """Return a chat as text; `variables` are further ones of the template, like tools."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=answer, tokenize=False, **variables)
    except (TemplateError, TypeError, ValueError) as error:
        raise LessonError(f"the model's chat template does not take this prompt: {telling_line(error)}") from error


def cells(m: Measurement) -> str:
    return f"{milliseconds(m.ttft_ms):>8}{m.cached_tokens:>8,} / {m.prompt_tokens:<6,}{m.predicted_cached_tokens:>10,}"


def milliseconds(value: float) -> str:
    """Write a time given in ms with three digits."""
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def ttft_range(measurements: list[Measurement]) -> str:
    return "{:,.1f} - {:,.1f} ms".format(*(f(m.ttft_ms for m in measurements) for f in (min, max)))


def hit_rate(measurements: list[Measurement]) -> float:
    return sum(m.cached_tokens for m in measurements) / sum(m.prompt_tokens for m in measurements)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return how many leading tokens two prompts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def time_verdict(bad: list[Measurement], good: list[Measurement], alone: bool = True) -> str:
    """Say what TTFT did and no more: a speed-up only where the two ranges lie apart.

    The bound is what computing fewer tokens can give at most. Requests that are not `alone` also wait, so have none.
    """
    slow, fast = ([m.ttft_ms for m in arm] for arm in (bad, good))
    change = f"{milliseconds(statistics.median(slow))} to {milliseconds(statistics.median(fast))}"
    if statistics.median(slow) <= statistics.median(fast):
        return f"TTFT did not improve ({change}): nothing gained at this prompt length."
    if min(slow) <= max(fast):
        return f"TTFT went from {change}, but the ranges overlap: no speed-up is shown."
    factor = statistics.median(slow) / statistics.median(fast)
    bound = sum(m.computed_tokens for m in bad) / sum(m.computed_tokens for m in good)
    return f"TTFT fell from {change}: {factor:.1f}x" + (
        f" of at most {bound:.0f}x (tokens computed)." if alone else "."
    )


def built_in_shape(memory: int) -> str:
    """Return the largest built-in shape for so many bytes: weights, KV cache and work space, with room to spare."""
    gib = memory / 2**30
    return "7b" if gib >= 39 else "1.5b" if gib >= 11 else "0.5b"  # cards of 40 and 12 GiB have a little less to show


def graph_sizes(longest: int) -> list[int]:
    """Return the batch sizes, in tokens, that are captured: a step is padded to the next one, by half at most."""
    sizes = [1, 2, 4, 8, 16]
    while sizes[-1] < min(longest, GRAPH_TOKENS):
        sizes += [sizes[-1] * 3 // 2, sizes[-1] * 2]
    return sizes


def find_model(name: str) -> str:
    """Return a folder, or a hub name that can be had; LessonError for all else."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise LessonError(f"{name} holds no config.json: give --model the folder of a model")
        return str(Path(name).resolve())
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise LessonError(f"no model in {name}: give --model a folder, or a hub name like Qwen/Qwen2.5-1.5B-Instruct")
    from huggingface_hub import constants, get_token, snapshot_download

    headers = {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
    url = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
    try:  # the libraries below retry for a minute; this does not
        urllib.request.urlopen(urllib.request.Request(url, headers=headers, method="HEAD"), timeout=10).close()
        return name
    except OSError as error:
        if isinstance(error, urllib.error.HTTPError) and error.code < 500:
            advice = "check the name, or run `hf auth login`"
            raise LessonError(f"the hub answers {error.code} for {name}: {advice}") from error
        try:
            return snapshot_download(name, local_files_only=True)
        except OSError:
            raise LessonError(f"{name}: no folder, not downloaded, and the hub is out of reach") from error


def telling_line(error: BaseException) -> str:
    """Return the line of a message that says what is wrong; in pydantic's it is not the first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if line.startswith(("Value error", "Input should", "Assertion"))), lines[0])


def root_cause(error: EngineError, log: str) -> str:
    """Return the first exception in an engine's log that does not just pass on another one."""
    causes = re.findall(r"^(?:\(.*?\) )?(?:ERROR .*?\] )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", log, re.MULTILINE)
    causes = [cause for cause in causes if "root cause" not in cause]
    return causes[0] if causes else telling_line(error.__cause__ or error)


def write_json(path: Path, content: dict) -> None:
    """Write all of `content` or nothing."""
    path = path.resolve()  # what a link points to is written, the link stays
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(content, indent=1, default=dataclasses.asdict) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise LessonError(f"cannot write {path}: {error.strerror}") from error


def json_path(name: str) -> Path:
    try:
        if Path(name).exists() and not Path(name).is_file():
            raise OSError(errno.EINVAL, "it is no regular file")
        tempfile.TemporaryFile(dir=Path(name).parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {name}: {error.strerror}") from error
    return Path(name)


def at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return parse


class Parser(argparse.ArgumentParser):
    """A command line that shows its `doc` as it is, and takes no empty value: an unset variable of a shell is one."""

    def __init__(self, doc: str, **options: object) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if not word or (word.startswith("--") and word.endswith("=")):
                self.error("there is an empty value among the arguments")  # none is repeated: it may be a key
        return super().parse_known_args(args, namespace)


def engine_parser(doc: str) -> argparse.ArgumentParser:
    """Return the command line of everything that starts an engine."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--model", help="a folder or a hub name (default: built_in_model, random weights, no download)")
    add("--block-size", type=at_least(1), help="tokens per block (default: 128 on a CPU, 32 on a GPU)")
    add("--no-prefix-caching", action="store_true", help="the control: without the cache, claims must fail")
    add("--json", type=json_path, metavar="PATH", help="write every measurement to this file")
    add("--verbose", action="store_true", help="show the engine's own log")
    add("--check-options", action="store_true", help=argparse.SUPPRESS)  # by the runner, which knows none of them
    return parser


def lesson_parser(doc: str, requests: int) -> argparse.ArgumentParser:
    """Return the command line that all lessons share; `requests` is this lesson's default."""
    parser = engine_parser(doc)
    add = parser.add_argument
    add("--prefix-tokens", type=at_least(1), help="length of the static prompt (default: 4000, on a GPU 8000)")
    add(
        "--requests",
        type=at_least(2),
        default=requests,
        help=f"requests per arm; 0 fills the cache (default: {requests})",
    )
    add("--deeper", action="store_true", help="add this lesson's further experiments")
    return parser


def use_python_with_vllm() -> None:
    """Go on in the .venv beside the lesson where this Python has no vLLM."""
    if sys.version_info < (3, 11):
        raise LessonError(f"Python 3.11 or newer is needed, this is {platform.python_version()}")
    venv = HERE / ".venv"
    if importlib.util.find_spec("vllm") is None:
        if not (venv / "complete").is_file() or Path(sys.prefix).resolve() == venv.resolve():
            raise LessonError(f"no vLLM in {sys.executable}: run `python3 setup_and_test.py` first")
        os.execv(venv / "bin" / "python", [str(venv / "bin" / "python"), *sys.orig_argv[1:]])


def end_with_parent(parent: int, libc: ctypes.CDLL) -> None:
    """Let the kernel end this process when the thread that made it ends, however it ends (prctl(2), PR_SET_PDEATHSIG).

    So a thread that starts an engine must live as long as the engine; asyncio keeps those of its executor.
    """
    libc.prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it was too late
        os._exit(1)


def prepare_process(engines: int = 1) -> Path:
    """Make this process fit to start `engines` engines; return its folder, which a lock keeps from being removed.

    Folders of runs that were killed are removed. A process of this one's making ends with it.
    """
    for left in Path(tempfile.gettempdir()).glob("kv-lesson-*/"):
        with contextlib.suppress(OSError):  # another user's, in use, or gone by now
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(descriptor)
    folder = Path(tempfile.mkdtemp(prefix="new-kv-lesson-"))  # not to be taken for an old one before it is locked
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)
    folder = folder.rename(folder.with_name(folder.name.removeprefix("new-")))
    forked_by: list[int] = []  # an engine may fork in its turn
    libc = ctypes.CDLL(None)
    os.register_at_fork(
        before=lambda: forked_by.append(os.getpid()), after_in_child=lambda: end_with_parent(forked_by[-1], libc)
    )
    # Several engines share the cores; one alone leaves one to the client, as vLLM does where it binds threads itself.
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores - 1 if engines == 1 else cores // engines)
    # Without vLLM's multiprocessing of its own the CPU platform, too, lets the model run in the engine's process.
    os.environ.update(OMP_NUM_THREADS=str(threads), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    os.environ.update(TMPDIR=str(folder), VLLM_NO_USAGE_STATS="1", TOKENIZERS_PARALLELISM="false")
    tempfile.tempdir = str(folder)
    return folder


def leave(folder: Path | None) -> None:
    """End the engines that are left, which write into `folder`, and remove it."""
    for engine in multiprocessing.active_children():
        engine.kill(), engine.join()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def run_lesson(args: argparse.Namespace, lesson: Callable[[Run], Awaitable[None]], engines: int = 1) -> int:
    """Run a lesson of `engines` engines with their output in a log file, and return the exit status."""
    if args.check_options:
        return 0
    script, pid, folder = Path(sys.argv[0]).name, os.getpid(), None
    out = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="replace")
    err = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors="replace")

    def stop(signum: int, _: object) -> None:
        if os.getpid() == pid:  # an engine that is just being made has this handler, too
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(err.fileno(), b"\x1b[?25h\ninterrupted\n" if err.isatty() else b"interrupted\n")
            leave(folder)
        os._exit(128 + signum)

    async def measure() -> int:
        try:
            await lesson(run)
            return run.finish()
        finally:
            for engine in run.engines:
                engine.end()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop)
    try:
        use_python_with_vllm()
        folder = prepare_process(engines)
        log = folder / "engine.log"
        if not args.verbose:
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            sys.excepthook = functools.partial(traceback.print_exception, file=err)  # a bug is shown all the same
        run = Run(args, out)
        status = asyncio.run(measure())
    except EngineError as error:
        kept = log.exists() and shutil.copy(log, folder.with_suffix(".log"))
        cause = root_cause(error, log.read_text(errors="replace") if kept else "")
        see = f" (the engine's log: {kept})" if kept else ""
        print(f"{script}: error: {error}: {cause}{see}", file=err, flush=True)
        return error.status
    except LessonError as error:
        print(f"{script}: error: {error}", file=err, flush=True)
        return error.status
    finally:
        leave(folder)
    out.flush()
    os._exit(status)  # all is written; to take an interpreter with vLLM in it apart takes two seconds


if "__mp_main__" in sys.modules:  # an engine's process that was not forked but spawned
    end_with_parent(os.getppid(), ctypes.CDLL(None))


# --- end of the measuring block ---

if __name__ == "__main__":
    sys.exit(main())
