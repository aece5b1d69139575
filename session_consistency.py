"""Lesson 4: sessions that stay with their worker against sessions that are dealt round.

A KV cache lives in one process. With several workers behind a load balancer,
a conversation's next turn finds its past only on the worker that computed it.

  bad   round robin: each request goes to the next worker
  good  session affinity: `session_id` decides, by rendezvous hashing. Every
        worker gets a score from a hash of session and worker, the best wins.
        Nothing is stored, all routers agree, and when a worker is lost only
        its own sessions move

Each arm sends the same sessions, in the same order, at the same time, to real
vLLM workers on cores (or GPUs) of their own, and each has its own part of the
cache. What all sessions share, the system prompt, is primed once per worker.
The order in which sessions arrive is shuffled each turn: in lockstep, with as
many sessions as a multiple of the workers, round robin would be sticky by
accident. Order and lengths of the sessions come from the printed seed.

Request n is turn n of a session, `--requests` the most turns of one. Turn 0
is new everywhere and left out of hit rates and medians.

--deeper adds: the price of stickiness (a hot session that sends half of all
requests; bounded load and prefix-aware routing as ways out), and the loss of
a worker, computed for many and live.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import math
import multiprocessing
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable

INSTRUCTIONS = """\
You help engineers to read incident reports. Answer from the report that opens the conversation, in at most three
sentences. Quote times and names exactly. Say so when the report does not tell.
"""
PARTS = {
    "gateway": "takes requests from outside and passes them on; the first to show a fault, seldom its cause",
    "queue": "holds work until a worker is free; grows when workers are slow or lost",
    "scheduler": "decides which work is next and restarts what has stopped",
    "database": "keeps orders and accounts; one writer, two readers, a backup every night",
    "cache": "keeps answers for a minute; when it is empty, the database feels it",
    "billing job": "runs every hour and must not run twice at the same time",
    "search index": "is built anew on Sundays and read all week",
    "mail relay": "sends messages to customers, at most a thousand a minute",
}
SYSTEM = INSTRUCTIONS + "".join(f"{part}: {does}.\n" for part, does in PARTS.items())
EVENTS = (
    "reported a rising error rate",
    "was restarted by the agent on duty",
    "stopped answering health checks",
    "returned to normal latency",
    "was moved to another machine",
    "ran out of memory and was killed",
    "was rolled back to the release before",
)
QUESTIONS = (
    "What happened first?",
    "Which part failed longest, and who noticed?",
    "Was anything rolled back?",
    "Which step would you automate?",
    "Write one sentence for the status page.",
    "What is still open?",
)
ANSWER = "According to the report it began with the gateway; the times and the names are given in the lines above."


def report(session: str, tokens: int, count: Callable[[str], int]) -> str:
    """Return the incident report of one session, about `tokens` tokens as counted by `count`: its own long context."""
    dice, text = random.Random(session), f"{session}: incident report\n"
    while (missing := tokens - count(text)) > 0:
        for _ in range(1 + missing // 100):  # a line is no 100 tokens
            time = f"{dice.randrange(24):02}:{dice.randrange(60):02}"
            text += (
                f"{time} the {dice.choice(list(PARTS))} {dice.choice(EVENTS)} ({dice.randrange(100, 1000)} requests)\n"
            )
    return text


def messages(context: str, turn: int) -> list[dict]:
    """Return what a session sends in `turn`: all that was said before, and a question. Assistant turns are scripted."""
    said = [{"role": "system", "content": SYSTEM}]
    for n in range(turn + 1):
        question = QUESTIONS[n % len(QUESTIONS)]
        said.append({"role": "user", "content": f"{context}\n{question}" if n == 0 else question})
        said.append({"role": "assistant", "content": ANSWER})
    return said[:-1]


def schedule(lengths: dict[str, int], seed: int) -> list[list[str]]:
    """Return the sessions that send in each turn, in the order of their arrival."""
    dice, turns = random.Random(seed), range(max(lengths.values()))
    active = [[session for session, length in lengths.items() if turn < length] for turn in turns]
    return [dice.sample(sessions, len(sessions)) for sessions in active]


class RoundRobin:
    """Each request goes to the next worker."""

    def __init__(self, workers: int) -> None:
        self.next = itertools.cycle(range(workers))

    def route(self, session: str, ids: list[int]) -> int:
        return next(self.next)


def changes_workers(traffic: Traffic, workers: int) -> bool:
    """Say whether round robin takes any session to a second worker; with few sessions it may happen not to."""
    router, homes = RoundRobin(workers), {}
    for session in itertools.chain.from_iterable(traffic.arrivals):
        homes.setdefault(session, set()).add(router.route(session, []))
    return max(map(len, homes.values())) > 1


def rendezvous(session: str, workers: list[int]) -> list[int]:
    """Return the workers in a session's order of preference; to lose one changes nothing about the others."""
    return sorted(workers, key=lambda worker: hashlib.sha256(f"{session}/{worker}".encode()).digest(), reverse=True)


class Affinity:
    """A session goes where rendezvous hashing puts it."""

    def __init__(self, workers: int) -> None:
        self.workers = list(range(workers))

    def route(self, session: str, ids: list[int]) -> int:
        return rendezvous(session, self.workers)[0]


ARMS = {"bad": RoundRobin, "good": Affinity}


@dataclasses.dataclass
class Traffic:
    """What is sent: per session and turn the token ids of a prompt, and who arrives when."""

    prompts: dict[str, list[list[int]]]
    arrivals: list[list[str]]


async def send(
    workers: list[Engine], experiment: str, arm: str, turn: int, routed: list[tuple[str, int, list[int]]]
) -> None:
    """Send the requests of one turn, as session, worker and token ids, at once; those of one session in their order."""

    async def one(session: str) -> None:
        for name, worker, ids in routed:
            if name == session:
                await workers[worker].ask(ids, experiment, arm, turn, session=session, salt=arm)

    await asyncio.gather(*(one(session) for session in dict.fromkeys(name for name, _, _ in routed)))


def shared_prefixes(prompts: list[list[int]], block_size: int) -> list[list[int]]:
    """Return the leading blocks that a prompt has in common with any other one, each run of blocks once."""
    chains = [list(CacheModel(block_size).chain(ids)) for ids in prompts]
    seen = Counter(itertools.chain.from_iterable(chains))
    lengths = (block_size * sum(seen[block] > 1 for block in chain) for chain in chains)
    shared = {tuple(ids[:length]) for ids, length in zip(prompts, lengths, strict=True)}
    return [list(ids) for ids in sorted(shared, key=len) if ids]


async def prime(run: Run, workers: list[Engine], arm: str, prompts: list[list[int]]) -> None:
    """Let every worker compute what sessions share, so that no two of them race for it."""
    for engine, ids in itertools.product(workers, shared_prefixes(prompts, run.block_size)):
        await engine.ask(ids, "shared", arm, 0, salt=arm)


async def pair(run: Run, workers: list[Engine], traffic: Traffic) -> None:
    """Send turn after turn in both arms, and judge where the sessions found their past."""
    routers = {arm: router(len(workers)) for arm, router in ARMS.items()}
    for arm in ARMS:
        await prime(run, workers, arm, [prompts[0] for prompts in traffic.prompts.values()])
    turns = sorted(map(len, traffic.prompts.values()))
    run.print(f"{len(turns)} sessions of {turns[0]} to {turns[-1]} turns, shuffled every turn (seed {run.args.seed})")
    head = f"{'cached / prompt':>17}{'hits':>6}{'TTFT':>10}"
    run.print(f"{'':13}[bold red]{'BAD: round robin':<36}[/][bold green]GOOD: session affinity")
    run.print(f"turn sessions{head}{head}")
    for turn, arrivals in enumerate(traffic.arrivals):
        for arm in (ARMS, reversed(ARMS))[turn % 2]:
            prompts = [(session, traffic.prompts[session][turn]) for session in arrivals]
            routed = [(session, routers[arm].route(session, ids), ids) for session, ids in prompts]
            await send(workers, "main", arm, turn, routed)
        cells = ""
        for arm in ARMS:
            sent = [m for m in run.arm("main", arm) if m.request == turn]
            counts = f"{sum(m.cached_tokens for m in sent):,} / {sum(m.prompt_tokens for m in sent):,}"
            cells += f"{counts:>17}{hit_rate(sent):>6.0%}{milliseconds(statistics.median(m.ttft_ms for m in sent)):>10}"
        run.print(f"{turn:<4}{len(arrivals):>9}{cells}")
    judge(run, workers, traffic)


def judge(run: Run, workers: list[Engine], traffic: Traffic) -> None:
    """Print both arms side by side, and claim what the token counts must show."""
    bad, good = ([m for m in run.arm("main", arm) if m.request > 0] for arm in ARMS)
    run.print_comparison(bad, good)
    rows = {
        "TTFT, p90": lambda arm: milliseconds(p90(arm)),
        "requests per worker": lambda arm: per_worker(arm, len(workers), lambda m: 1),
        "computed tokens per worker": lambda arm: per_worker(arm, len(workers), lambda m: m.computed_tokens),
    }
    for name, cell in rows.items():
        run.print(f"{name:<36}{cell(bad):>20}{cell(good):>20}")

    print_pairs(run, bad, good)

    kept = {
        (session, turn): run.whole_blocks(common_prefix(a, b))
        for session, prompts in traffic.prompts.items()
        for turn, (a, b) in enumerate(itertools.pairwise(prompts), start=1)
    }
    run.claim("affinity: every turn finds its session's past",
              all(m.cached_tokens >= kept[m.session, m.request] for m in good),
              f"{sum(m.cached_tokens for m in good):,} tokens found, {sum(kept.values()):,} were there")  # fmt: skip
    moved = [len({(m.session, m.worker) for m in run.arm("main", arm)}) - len(traffic.prompts) for arm in ARMS]
    run.claim("round robin changes workers, affinity does not", moved[0] > 0 == moved[1],
              f"{moved[0]} and {moved[1]} moves to a worker that is new to the session")  # fmt: skip
    computed = [sum(m.computed_tokens for m in arm) for arm in (bad, good)]
    run.claim("affinity computes fewer tokens", computed[1] < computed[0], f"{computed[1]:,} of {computed[0]:,} tokens")
    run.print(f"\nThe same sessions, the same order: {computed[0]:,} tokens computed, with affinity {computed[1]:,}.")
    run.print(pair_verdict(pair_ratios(bad, good), sign_test=run.args.deeper))


def pair_ratios(bad: list[Measurement], good: list[Measurement]) -> list[float]:
    """Return, for every turn of every session, its TTFT in `bad` by that in `good`: like is compared with like."""
    good_ttft = {(m.session, m.request): m.ttft_ms for m in good}
    return [m.ttft_ms / good_ttft[m.session, m.request] for m in bad]


def print_pairs(run: Run, bad: list[Measurement], good: list[Measurement]) -> None:
    """Show by turn what the same request took in both arms."""
    turns = sorted({m.request for m in bad})[:5]
    faster, medians = "", ""
    for turn in turns:
        ratios = pair_ratios([m for m in bad if m.request == turn], [m for m in good if m.request == turn])
        faster += f"{f'{sum(ratio > 1 for ratio in ratios)} of {len(ratios)}':>8}"
        medians += f"{f'{statistics.median(ratios):.1f}x':>8}"
    run.print(f"\n[bold]{'the same request, bad / good':<36}" + "".join(f"{f'turn {turn}':>8}" for turn in turns))
    run.print(f"{'faster with affinity':<36}{faster}\n{'median of the ratios':<36}{medians}")


def pair_verdict(ratios: list[float], sign_test: bool) -> str:
    """Say how many requests were faster with affinity, and by how much; p: as many, or as few, by chance alone."""
    faster, count = sum(ratio > 1 for ratio in ratios), len(ratios)
    verdict = f"TTFT of the same request: {faster} of {count} faster with affinity"
    if 2 * faster <= count:
        return f"{verdict}: no speed-up is shown."
    tail = sum(math.comb(count, n) for n in range(faster, count + 1)) / 2**count
    p = f"\n(sign test, two-sided: p = {min(1.0, 2 * tail):.1g})" if sign_test else ""
    return f"{verdict}, median ratio {statistics.median(ratios):.1f}.{p}"


def p90(arm: list[Measurement]) -> float:
    """Return the TTFT in ms that nine of ten requests do not exceed."""
    times = sorted(m.ttft_ms for m in arm)
    return times[math.ceil(0.9 * len(times)) - 1]


def per_worker(arm: list[Measurement], workers: int, value: Callable[[Measurement], int]) -> str:
    """Return the sum of a value for each worker; for many workers the least and the greatest."""
    sums = [sum(value(m) for m in arm if m.worker == worker) for worker in range(workers)]
    return " ".join(f"{n:,}" for n in sums) if workers < 4 else f"{min(sums):,} to {max(sums):,}"


# --- the further experiments: --deeper ---


class BoundedAffinity:
    """Affinity, but no worker takes more than `bound` times its share of the requests so far; the next best does."""

    def __init__(self, workers: int, bound: float = 1.25) -> None:
        self.requests, self.bound = [0] * workers, bound

    def route(self, session: str, ids: list[int]) -> int:
        most = math.ceil(self.bound * (sum(self.requests) + 1) / len(self.requests))
        worker = next(w for w in rendezvous(session, list(range(len(self.requests)))) if self.requests[w] < most)
        self.requests[worker] += 1
        return worker


class PrefixAware:
    """The worker that was sent the longest prefix of a prompt gets it; among equals the one with fewest requests."""

    def __init__(self, workers: int, block_size: int, everywhere: list[list[int]]) -> None:
        self.known, self.requests = [CacheModel(block_size) for _ in range(workers)], [0] * workers
        for known, ids in itertools.product(self.known, everywhere):
            known.store(ids)  # what all workers hold must draw nobody: else all follow the first

    def route(self, session: str, ids: list[int]) -> int:
        worker = max(range(len(self.known)), key=lambda w: (self.known[w].cached_tokens(ids), -self.requests[w]))
        self.known[worker].store(ids)
        self.requests[worker] += 1
        return worker


async def hot_session(run: Run, workers: list[Engine], traffic: Traffic, hot: list[list[int]]) -> None:
    """One session sends half of all requests: what stickiness costs, and what bounded load gives back of it."""
    count = len(workers)
    first = [*(prompts[0] for prompts in traffic.prompts.values()), hot[0]]
    policies = {
        "round robin": RoundRobin(count),
        "affinity": Affinity(count),
        "bounded load": BoundedAffinity(count),
        "prefix-aware": PrefixAware(count, run.block_size, shared_prefixes(first, run.block_size)),
    }
    run.print("\n[bold]A hot session[/] sends half of all requests: stickiness has a price")
    run.print("policy         hit rate  TTFT median       p90   requests per worker  max / mean")
    for name, router in policies.items():
        for engine in workers:
            await engine.reset()
        await prime(run, workers, name, first)
        its_turns = iter(hot)
        for turn, arrivals in enumerate(traffic.arrivals):
            mixed = random.Random(run.args.seed + turn).sample([*arrivals, *["hot"] * len(arrivals)], 2 * len(arrivals))
            requests = [(s, next(its_turns) if s == "hot" else traffic.prompts[s][turn]) for s in mixed]
            await send(workers, "hot session", name, turn, [(s, router.route(s, ids), ids) for s, ids in requests])
        sent = run.arm("hot session", name)
        loads = [sum(m.worker == worker for m in sent) for worker in range(count)]
        spread = max(loads) / statistics.mean(loads)
        median = milliseconds(statistics.median(m.ttft_ms for m in sent))
        times, counts = f"{median:>13}{milliseconds(p90(sent)):>10}", per_worker(sent, count, lambda m: 1)
        run.print(f"{name:<14}{hit_rate(sent):>9.1%}{times}{counts:>22}{spread:>12.2f}")
    rates = {name: hit_rate(run.arm("hot session", name)) for name in policies}
    run.claim("with a hot session too affinity finds more", rates["affinity"] > rates["round robin"],
              f"{rates['affinity']:.1%} and {rates['round robin']:.1%}")  # fmt: skip
    loads = {name: Counter(m.worker for m in run.arm("hot session", name)) for name in policies}
    most = [max(loads[name].values()) for name in ("bounded load", "affinity")]
    run.claim("bounded load spreads the requests no worse than affinity", most[0] <= most[1],
              f"at most {most[0]} and {most[1]} on one worker")  # fmt: skip


def moved_share(sessions: int, before: int, after: int) -> dict[str, float]:
    """Return which share of sessions changes workers when only the first `after` of `before` are left."""
    names = [f"session-{n}" for n in range(sessions)]
    hashed = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) for name in names}
    ranked = {name: rendezvous(name, list(range(before))) for name in names}
    return {
        "rendezvous": sum(next(w for w in order if w < after) != order[0] for order in ranked.values()) / sessions,
        "modulo": sum(value % before != value % after for value in hashed.values()) / sessions,
    }


async def lost_worker(run: Run, workers: list[Engine], traffic: Traffic) -> None:
    """Shut a worker down in the middle: its sessions move once, pay one cold turn, and go on."""
    share = moved_share(5000, 8, 7)
    moves = f"rendezvous moves {share['rendezvous']:.1%}, modulo {share['modulo']:.1%} of 5,000 sessions"
    run.print(f"\n[bold]A worker of 8 is lost[/]: {moves}")
    for engine in workers:
        await engine.reset()
    await prime(run, workers, "good", [prompts[0] for prompts in traffic.prompts.values()])
    router, middle = Affinity(len(workers)), min(map(len, traffic.prompts.values())) // 2  # all are there still
    homes = {session: router.route(session, []) for session in traffic.prompts}
    lost = Counter(homes.values()).most_common(1)[0][0]
    for turn, arrivals in enumerate(traffic.arrivals):
        if turn == middle:
            workers[lost].end()
            router.workers.remove(lost)
        routed = [(s, router.route(s, []), traffic.prompts[s][turn]) for s in arrivals]
        await send(workers, "lost worker", "good", turn, routed)
    sent = run.arm("lost worker", "good")
    run.print(f"live: worker {lost} of {len(workers)} is shut down before turn {middle}")
    turns = range(len(traffic.arrivals))[:7]
    run.print(f"{'hit rate in turn':<18}" + "".join(f"{turn:>8}" for turn in turns))
    for name, theirs in (("its sessions", True), ("the others", False)):
        own = [m for m in sent if (homes[m.session] == lost) is theirs]
        groups = ([m for m in own if m.request == turn] for turn in turns)
        run.print(f"{name:<18}" + "".join(f"{f'{hit_rate(group):.0%}' if group else '-':>8}" for group in groups))
    moved = [m for m in sent if m.worker != homes[m.session]]
    run.claim("only the sessions of the lost worker move", {homes[m.session] for m in moved} <= {lost},
              f"{len({m.session for m in moved})} of {len(homes)} sessions moved")  # fmt: skip
    cold, later = ([m for m in moved if (m.request == middle) is is_cold] for is_cold in (True, False))
    if later:
        run.claim("they pay one cold turn", max(map(hit_of, cold)) < min(map(hit_of, later)),
                  f"{hit_rate(cold):.0%} found in turn {middle}, {hit_rate(later):.0%} later")  # fmt: skip
    run.print(f"{len(sent)} of {sum(map(len, traffic.arrivals))} requests answered")


def hit_of(m: Measurement) -> float:
    return m.cached_tokens / m.prompt_tokens


# --- workers ---


async def start_workers(run: Run, longest: int, suffix: int, prompts: int) -> list[Engine]:
    """Start all workers together, each on its own cores, or on its own GPU where there are enough."""
    count = run.args.workers
    gpus, cores = worker_places(run.on_gpu, count)
    check_memory(run, longest, prompts, sharing=1 if gpus else count)

    def start(worker: int) -> Engine:
        os.sched_setaffinity(0, cores[worker])  # of this thread, and of the engine that it makes
        return run.start_engine(longest, suffix, worker, prompts, batch=run.args.sessions)

    with run.timed("engine_start", f"Starting {count} vLLM workers..."):
        starting = []
        for worker in range(count):
            if gpus:
                os.environ["CUDA_VISIBLE_DEVICES"] = gpus[worker]  # an engine inherits it when it is made
            before = len(multiprocessing.active_children())
            starting.append(asyncio.create_task(asyncio.to_thread(start, worker)))
            while len(multiprocessing.active_children()) == before and not starting[-1].done():
                await asyncio.sleep(0.05)
        workers = await asyncio.gather(*starting)
    with run.timed("warm_up", "Warming up..."):
        await asyncio.gather(*(engine.warm_up(longest, suffix) for engine in workers))
    run.engines.sort(key=lambda engine: engine.worker)
    run.environment |= {"workers": count, "sessions": run.args.sessions, "seed": run.args.seed}
    run.print_banner()
    return workers


def worker_places(on_gpu: bool, count: int) -> tuple[list[str], list[list[int]]]:
    """Return a GPU for each worker, or none where they must share one, and the cores of each."""
    cores = sorted(os.sched_getaffinity(0))
    if on_gpu:
        import torch

        every = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
        return gpus[:count] if len(gpus) >= count else [], [cores] * count
    if count > len(cores):
        raise UsageError(f"--workers {count} needs as many cores, {len(cores)} are here")
    each = len(cores) // count
    return [], [cores[worker * each : (worker + 1) * each] for worker in range(count)]


def check_memory(run: Run, longest: int, prompts: int, sharing: int) -> None:
    """Raise LessonError unless `sharing` workers with the KV of `prompts` prompts fit into what memory is free."""
    import psutil  # comes with vLLM
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name = run.engine_args.keywords["model"]
    try:
        with torch.device("meta"):  # shapes without numbers
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    except (ImportError, ValueError) as error:
        raise LessonError(f"the size of the model in {name} is not to be found: {telling_line(error)}") from error
    weights = sum(parameter.numel() for parameter in model.parameters()) * run.dtype_bytes
    kv = prompts * (longest + OUTPUT_TOKENS) * run.kv_bytes_per_token
    have = run.gpu_memory or psutil.virtual_memory().available
    need = sharing * (weights + kv + 2**30)  # and what an engine takes besides
    if need > have:
        sizes = f"{sharing} workers need {need / 2**30:.1f} GiB ({kv / 2**30:.1f} GiB of KV cache each)"
        advice = "take fewer --workers or --sessions, or a smaller --prefix-tokens"
        raise LessonError(f"{sizes}, {have / 2**30:.1f} GiB are {'there' if run.on_gpu else 'free'}: {advice}")


async def lesson(run: Run) -> None:
    run.load_model(engines=run.args.workers)  # they may have to share a GPU
    args, dice = run.args, random.Random(run.args.seed)
    names = [f"session-{n:02}" for n in range(args.sessions)]
    lengths = {name: dice.randint(max(2, args.requests - 2), args.requests) for name in names}
    contexts = {name: report(name, args.prefix_tokens, run.count) for name in names}
    prompts = {name: [run.encode(messages(contexts[name], n)) for n in range(lengths[name])] for name in names}
    traffic, hot = Traffic(prompts, schedule(lengths, args.seed)), []
    run.check_template([messages(contexts[names[0]], n) for n in range(args.requests)])
    if not changes_workers(traffic, args.workers):
        raise UsageError(f"with --seed {args.seed} round robin takes each session to one worker only, by accident: "
                         "choose another --seed, or more --sessions")  # fmt: skip
    if args.deeper:
        context = report("hot", args.prefix_tokens, run.count)
        hot = [run.encode(messages(context, n)) for n in range(sum(lengths.values()))]
    longest = max(map(len, itertools.chain(hot, *prompts.values())))
    suffix = max(run.suffix(its_prompts) for its_prompts in prompts.values())
    workers = await start_workers(run, longest, suffix, prompts=2 * args.sessions + 2)
    with run.timed("measuring"):
        await pair(run, workers, traffic)
        if args.deeper:
            await hot_session(run, workers, traffic, hot)
            await lost_worker(run, workers, traffic)


def main() -> int:
    parser = lesson_parser(__doc__, requests=5)
    parser.add_argument("--workers", type=at_least(2), default=2, help="vLLM engines (default: 2)")
    parser.add_argument("--sessions", type=at_least(2), default=6, help="conversations at the same time (default: 6)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of arrival order and session lengths (default: 0)")
    args = parser.parse_args()
    return run_lesson(args, lesson, engines=args.workers)


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
