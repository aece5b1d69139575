"""Lesson 2: an append-only context against a state that is edited in place.

An agent carries its state with it: a list of tasks, what is done, a step
counter. Every turn something in it changes. How the change is written decides
what the next turn costs, because a prompt is found in the KV cache only up to
its first different token (see lesson 1).

  bad   the JSON state at the top is edited in place: a status, a counter. From
        there on everything is new, the whole conversation after it included
  good  the state is written once, and each change is appended as a log entry.
        Every turn's prompt begins with all of the turn before

Both arms carry the same facts at every turn; `read_state` reads them back from
either. Append-only sends more tokens, and computes far fewer: both are shown,
and what they cost at a price for new and for cached tokens.

What it takes: entries are never changed once written; they are serialised the
same way each time (`sort_keys=True`); the chat template renders old messages
as before when new ones follow, which is checked before the engine starts.

Request n is turn n, `--requests` sets the number of turns. Request 0 of each
arm fills the cache and is left out of hit rates and medians.

--deeper adds: another key order each turn; a log that is compacted when it has
grown long; generated tokens sent back as ids and as text; and the arithmetic
of the course text, recomputed.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Iterator

INSTRUCTIONS = """\
You are an agent that works through a list of tasks. Read the state, choose the next open task, call a tool, read the
result, and write down what has changed. Never repeat a task that is done. Ask when a task is not clear.
"""
TITLES = (
    "Collect the sales figures",
    "Check the figures against the ledger",
    "Explain the three largest differences",
    "Draw the charts",
    "Write the summary",
    "Send the draft to the analyst",
    "Correct the draft",
    "Prepare the slides",
    "Book the meeting",
    "Archive the documents",
)
VERBS = ("read", "list", "search", "write", "check", "send", "move", "close")
NOUNS = ("report", "invoice", "document", "ledger", "chart", "order", "payment", "account", "message", "meeting")
START = {
    "budget": {"limit": 200, "used": 0},
    "goal": "Prepare the quarterly report",
    "step": 0,
    "tasks": [{"id": i, "notes": "", "owner": "agent", "status": "open", "title": t} for i, t in enumerate(TITLES)],
}


def tool_definitions() -> Iterator[str]:
    """Yield one line per tool, never the same twice."""
    for version, noun, verb in ((v, n, w) for v in itertools.count(1) for n in NOUNS for w in VERBS):
        yield f"{verb}_{noun}_v{version}(id: string, limit: integer) -> object. Use it to {verb} a {noun} by its id.\n"


def instructions(tokens: int, count: Callable[[str], int]) -> str:
    """Return the static instructions, with as many tools as it takes to reach `tokens`, as counted by `count`."""
    text, tools = INSTRUCTIONS, tool_definitions()
    while (missing := tokens - count(text)) > 0:
        text += "".join(itertools.islice(tools, 1 + missing // 200))  # a tool is no 200 tokens
    return text


def changes(turn: int) -> dict:
    """Return what happens in `turn`, as path -> new value: one task is finished, the next begun, money spent."""
    if turn == 0:
        return {}
    done, begun = (turn - 1) % len(TITLES), turn % len(TITLES)
    tasks = {f"tasks/{done}/status": "done", f"tasks/{begun}/status": "in_progress"}
    return {"budget/used": 7 * turn, "step": turn, **tasks}


def apply(state: dict, change: dict) -> dict:
    """Return a copy of `state` with `change` made."""
    state = copy.deepcopy(state)
    for path, value in change.items():
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        target = state
        for key in parents:
            target = target[key]
        target[last] = value
    return state


def state_at(turn: int) -> dict:
    state = START
    for n in range(1, turn + 1):
        state = apply(state, changes(n))
    return state


def dump(value: dict) -> str:
    """Serialise the same way each time: an equal state must give equal tokens."""
    return json.dumps(value, sort_keys=True)


def history(turn: int) -> list[dict]:
    """Return the scripted conversation up to `turn`: what the tool found, what the assistant said to it."""
    messages = []
    for n in range(turn + 1):
        result = f"Result of step {n}: {TITLES[n % len(TITLES)]}: 12 entries read, 3 of them new, no errors. Go on."
        messages.append({"role": "user", "content": result})
        answer = f"I have read the result of step {n} and noted what has changed. The next task can begin."
        messages.append({"role": "assistant", "content": answer})
    return messages[:-1]  # the last word is the user's


def bad_messages(static: str, turn: int) -> list[dict]:
    """The state is edited in place: it always shows the latest values."""
    return [{"role": "system", "content": f"# State\n{dump(state_at(turn))}\n\n{static}"}, *history(turn)]


def good_messages(static: str, turn: int, since: int = 0) -> list[dict]:
    """The state is written once, at turn `since`; every change is appended to the message of its turn."""
    messages = [{"role": "system", "content": f"# State\n{dump(state_at(since))}\n\n{static}"}]
    messages += [dict(message) for message in history(turn)[2 * since :]]
    for n, message in enumerate(messages[3::2], start=since + 1):  # the user's words of the turns after `since`
        message["content"] = f"{dump({'set': changes(n)})}\n{message['content']}"
    return messages


def read_state(messages: list[dict]) -> dict:
    """Return the state that a model can read from a prompt: what stands at the top, with every log entry applied."""
    state = json.loads(messages[0]["content"].splitlines()[1])
    for message in messages[1:]:
        if message["content"].startswith("{"):
            state = apply(state, json.loads(message["content"].splitlines()[0])["set"])
    return state


LAYOUTS = {"bad": bad_messages, "good": good_messages}


async def pair(run: Run, engine: Engine, prompts: dict[str, list[list[int]]]) -> None:
    """Go through the turns with both arms side by side, and judge what was sent and what computed."""
    run.print(f"{'':4}[bold red]{'BAD: the state is edited in place':<38}[/][bold green]GOOD: changes are appended")
    run.print("turn prompt cached   new     TTFT new        prompt cached   new     TTFT new", markup=False)
    longest = max(map(len, prompts["good"]))
    for n in range(run.args.requests):
        row = {}
        for arm in (LAYOUTS, reversed(LAYOUTS))[n % 2]:
            row[arm] = await engine.ask(prompts[arm][n], "main", arm, n, salt=arm)
        cells = (
            f"{m.prompt_tokens:>7,}{m.cached_tokens:>7,}{m.computed_tokens:>6,}{milliseconds(m.ttft_ms):>9} "
            f"{run.bar(m.computed_tokens / longest, 7):<8}"
            for m in (row["bad"], row["good"])
        )
        run.print(f"{n:<4}" + "".join(cells).rstrip())
    bad, good = run.arm("main", "bad"), run.arm("main", "good")
    run.print_comparison(bad[1:], good[1:])
    print_cost(run, bad, good)

    edited, kept = prompts["bad"], prompts["good"]
    before = [run.whole_blocks(max(common_prefix(a, b) for a in edited[:n])) for n, b in enumerate(edited) if n]
    run.claim("in place: no turn finds more than what stands before the edit",
              all(m.cached_tokens <= whole for m, whole in zip(bad[1:], before, strict=True)),
              f"at most {max(m.cached_tokens for m in bad[1:]):,} cached, {max(before):,} before the edit")  # fmt: skip
    run.claim("append-only: every turn finds all whole blocks of the turn before",
              all(m.cached_tokens >= run.whole_blocks(common_prefix(a, b)) >= run.whole_blocks(len(a)) - run.block_size
                  for m, (a, b) in zip(good[1:], itertools.pairwise(kept), strict=True)),
              f"{sum(m.cached_tokens for m in good[1:]):,} cached, {sum(map(len, kept[:-1])):,} sent")  # fmt: skip
    sent, computed = ([total(arm) for arm in (bad, good)] for total in (prompt_tokens, computed_tokens))
    run.claim("append-only sends more and computes less", sent[1] > sent[0] and computed[1] < computed[0],
              f"sent {sent[0]:,} and {sent[1]:,}, computed {computed[0]:,} and {computed[1]:,}")  # fmt: skip

    states = [dump(state_at(n)) for n in (0, 1)]
    field = re.findall(r'"(\w+)":', states[0][: common_prefix(*states)])[-1]
    run.print_break(f"Field '{field}': prompts", *edited[:2])
    more, fewer = (b / a - 1 for a, b in (sent, computed))
    run.print(f"\nAppend-only sends {more:+.1%} tokens and computes {fewer:+.0%}.")
    run.print(time_verdict(bad[1:], good[1:]))


def prompt_tokens(arm: list[Measurement]) -> int:
    return sum(m.prompt_tokens for m in arm)


def computed_tokens(arm: list[Measurement]) -> int:
    return sum(m.computed_tokens for m in arm)


def cost(arm: list[Measurement], args: argparse.Namespace) -> float:
    """Return what the requests cost in $: computed tokens at the full price, cached ones at the reduced one."""
    dollars = (m.computed_tokens * args.price_input + m.cached_tokens * args.price_cached for m in arm)
    return sum(dollars) / 1e6


def print_cost(run: Run, bad: list[Measurement], good: list[Measurement]) -> None:
    """Show the bill of all turns, at the given prices, from the measured tokens only."""
    bills = [cost(arm, run.args) for arm in (bad, good)]
    rows = {
        "tokens sent, all turns": [f"{prompt_tokens(arm):,}" for arm in (bad, good)],
        "TTFT of the last turn": [milliseconds(arm[-1].ttft_ms) for arm in (bad, good)],
        f"cost at ${run.args.price_input:g} new, ${run.args.price_cached:g} cached": [f"${bill:.4f}" for bill in bills],
    }
    for name, cells in rows.items():
        run.print(f"{name:<36}{cells[0]:>20}{cells[1]:>20}")
    cheaper = [cost(good[: n + 1], run.args) < cost(bad[: n + 1], run.args) for n in range(len(good))]
    first = len(cheaper) - cheaper[::-1].index(False) if False in cheaper else 0
    says = f"from turn {first} on append-only is cheaper" if first < len(cheaper) else "append-only was never cheaper"
    run.print(f"cost {bills[1] / bills[0] - 1:+.0%}; {says}")


# --- the further experiments: --deeper ---


async def key_order(run: Run, engine: Engine, static: str) -> None:
    """The same state each turn, but its keys in another order: what an unordered dict or set does to a prompt."""
    for n in range(run.args.requests):
        messages = good_messages(static, n)
        keys = random.Random(n).sample(sorted(START), len(START))
        shuffled = json.dumps({key: START[key] for key in keys})
        messages[0]["content"] = messages[0]["content"].replace(dump(START), shuffled)
        await engine.ask(run.encode(messages), "key_order", "bad_key_order", n, salt="bad_key_order")
    arms = {"good": run.arm("main", "good")[1:], "bad_key_order": run.arm("key_order", "bad_key_order")[1:]}
    run.print("\n[bold]Key order[/]: append-only, but the state's keys are shuffled each turn (seed: turn)")
    print_arms(run, arms)
    few, many = (sum(m.cached_tokens for m in arm) for arm in (arms["bad_key_order"], arms["good"]))
    run.claim("another key order loses what append-only keeps", few < many, f"{few:,} of {many:,} cached tokens")


async def compaction(run: Run, engine: Engine, static: str) -> None:
    """Fold the log into a new static state half-way: one cold turn, then short again."""
    fold = run.args.requests // 2
    for n in range(run.args.requests):
        messages = good_messages(static, n, since=fold if n >= fold else 0)
        await engine.ask(run.encode(messages), "compaction", "good_compact", n, salt="good_compact")
    kept, folded = run.arm("main", "good"), run.arm("compaction", "good_compact")
    run.print(f"\n[bold]Compaction[/]: at turn {fold} the log becomes the state: append-only, but not unbounded")
    for name, values in {
        "prompt": [m.prompt_tokens for m in folded],
        "new": [m.computed_tokens for m in folded],
        "new, not folded": [m.computed_tokens for m in kept],
    }.items():
        run.print(f"{name:<16}" + "".join(f"{value:>6,}" for value in values[-10:]))
    lengths = folded[-1].prompt_tokens, kept[-1].prompt_tokens
    run.claim("a folded log is a shorter prompt", lengths[0] < lengths[1], "{:,} and {:,} tokens".format(*lengths))
    if later := [m.computed_tokens for m in folded[fold + 1 :]]:
        run.claim("after the cold turn it is cheap again", max(later) < folded[fold].computed_tokens,
                  f"at most {max(later):,} tokens computed, {folded[fold].computed_tokens:,} at the fold")  # fmt: skip


async def generated_tokens(run: Run, engine: Engine, static: str) -> None:
    """Send back what the model wrote, as its token ids or as text that is tokenised again."""
    known = sorted(n for n in run.tokenizer.get_vocab().values() if n < run.vocabulary)  # either may be the larger
    ids = run.encode(good_messages(static, 0))
    ids = ids[: run.whole_blocks(len(ids)) - 8]  # so that what is generated completes a block
    following = run.encode([{"role": "user", "content": "Go on."}])
    run.print("\n[bold]Generated tokens as history[/]: ids are found again, text encoded anew may not be")
    run.print(f"{'sent back as':<14}{'history':>9}{'cached':>9}   first difference in the generated part")
    for arm in ("ids", "text"):
        await engine.ask(ids, "generated", arm, 0, salt=arm, max_tokens=OUTPUT_TOKENS, sample_from=known)
        written = engine.output_ids
        text = run.tokenizer.decode(written, skip_special_tokens=False)
        again = written if arm == "ids" else run.tokenizer.encode(text, add_special_tokens=False)
        m = await engine.ask(ids + again + following, "generated", arm, 1, salt=arm)
        at = common_prefix(written, again)
        where = "none" if at == len(written) else f"token {at} of {len(written)}, {len(again)} when encoded again"
        run.print(f"{arm:<14}{len(ids) + len(written):>9,}{m.cached_tokens:>9,}   {where}")
        if arm == "ids":
            whole = run.whole_blocks(len(ids) + len(written) - 1)  # the last token has no KV yet
            run.claim("generated ids are found", m.cached_tokens == whole, f"{m.cached_tokens:,} of {whole:,} tokens")


def course_arithmetic(run: Run) -> None:
    """Recompute the figures of the course text beside what was measured here."""
    cheap, size = run.args.price_cached / run.args.price_input, run.block_size
    run.print("\n[bold]The arithmetic of the course text[/]: ten turns, each 100 tokens longer")
    growing = [100 * turn for turn in range(1, 11)]
    sent, new = sum(growing), growing[-1]  # edited in place everything sent is computed, appended only what is new
    run.print(f"computed {sent:,} and {new:,} tokens: {new / sent - 1:+.0%}, not -95%")
    paid = (new + cheap * (sent - new)) / sent
    run.print(f"cost with cached tokens at {cheap:.0%} of the price: {paid - 1:+.0%}, not -90%")
    arms = run.arm("main", "bad"), run.arm("main", "good")
    new, bill = ([total(arm) for arm in arms] for total in (computed_tokens, lambda arm: cost(arm, run.args)))
    run.print(f"measured here: computed {new[1] / new[0] - 1:+.0%}, cost {bill[1] / bill[0] - 1:+.0%}")
    run.print(f"120 tokens become 170 when edited, 190 when appended: 170 and {190 - 120} to compute,")
    run.print(f"but {190 - 120 // size * size} in blocks of {size}: a short prompt gains little or nothing")


def print_arms(run: Run, arms: dict[str, list[Measurement]]) -> None:
    for name, arm in arms.items():
        rate, last = f"{hit_rate(arm):.1%}", milliseconds(arm[-1].ttft_ms)
        run.print(f"{name:<16}hit rate {rate:>6}   computed {computed_tokens(arm):>8,}   last TTFT {last:>8}")


async def lesson(run: Run) -> None:
    run.load_model()
    static, turns = instructions(run.args.prefix_tokens, run.count), range(run.args.requests)
    run.check_template([good_messages(static, n) for n in turns])
    prompts = {arm: [run.encode(layout(static, n)) for n in turns] for arm, layout in LAYOUTS.items()}
    longest = max(map(len, itertools.chain(*prompts.values()))) + run.block_size
    engine = await run.open_engine(longest, run.suffix(prompts["good"]), prompts=16)
    with run.timed("measuring"):
        await pair(run, engine, prompts)
        if run.args.deeper:
            await key_order(run, engine, static)
            await compaction(run, engine, static)
            await generated_tokens(run, engine, static)
            course_arithmetic(run)


def price(text: str) -> float:
    """Return $ per million tokens, or raise argparse.ArgumentTypeError."""
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price in $ per million tokens, such as 3.00")
    return float(text)


def main() -> int:
    parser = lesson_parser(__doc__, requests=10)
    for option, default, what in (("--price-input", 3.00, "computed"), ("--price-cached", 0.30, "cached")):
        text = f"$ per million {what} tokens (an example: {default:.2f})"
        parser.add_argument(option, type=price, default=default, help=text)
    return run_lesson(parser.parse_args(), lesson)


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
