"""Lesson 3: an explicit boundary between what is cached and what is not.

Write a prompt in two parts, the static one first, and mark where it ends:

    <instructions, policies, tools> // __CACHE_END__ <user data, question>

vLLM has no such marker: it finds the longest cached prefix of every prompt by
itself, in whole blocks. There the boundary is a discipline of yours, split
off before the prompt is sent, and a place up to which the cache can be primed
before the first user comes. Hosted APIs with explicit breakpoints do need to
be told: a field of the request, not a text in the prompt, says "keep the
prefix up to here", and a prefix that does not match exactly is not found.

  bad   dynamic data stands before the end of the static part
  good  the prompt is split at the marker; all dynamic data comes after it

Both arms send the same text and both are primed once (request 0), before it
is known who will ask. In good the very first user hits.

Then the same on an engine without automatic prefix caching, a transformers
model: `PrefixStore` keeps the KV of marked prefixes under the SHA-256 of their
token ids, within a byte budget (least recently used out first), for a time to
live, pinned on request. Its answers are compared with uncached ones.

--prompt-file FILE takes a prompt of your own with the marker in it.
--deeper adds: a boundary too early, too late, and inside a token.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import dataclasses
import hashlib
import itertools
import re
import statistics
import sys
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache

MARKER = "// __CACHE_END__"
INSTRUCTIONS = """\
You are the service desk of a library. You help readers with loans, reservations, fees and opening hours.
Answer in at most four sentences. Look things up with a tool; never guess a due date, a fee or a shelf mark.
Books are lent for four weeks and can be renewed twice, unless somebody else has reserved them.
"""
VERBS = ("find", "list", "reserve", "renew", "return", "cancel", "count", "explain")
NOUNS = ("book", "loan", "reservation", "fee", "reader", "room", "magazine", "map", "film", "course")
QUESTION = "When is my next book due, and can I keep it for another two weeks?"


def default_prompt(tokens: int, count: Callable[[str], int]) -> str:
    """Return instructions and tools of about `tokens` tokens, as counted by `count`, the marker, and a question."""

    def tools() -> Iterator[str]:
        for version in itertools.count(1):
            for noun, verb in itertools.product(NOUNS, VERBS):
                yield f"{verb}_{noun}_v{version}(id: string, reader_id: string) -> object. Use it to {verb} a {noun}.\n"

    text, lines = INSTRUCTIONS, tools()
    while (missing := tokens - count(text)) > 0:
        text += "".join(itertools.islice(lines, 1 + missing // 200))  # a tool is no 200 tokens
    return f"{text}{MARKER}\n{QUESTION}"


def split_at_boundary(prompt: str) -> tuple[str, str]:
    """Return the static prefix and the dynamic suffix of a prompt; the marker itself belongs to neither.

    Raises ValueError unless there is exactly one marker with something before it.
    """
    if (markers := prompt.count(MARKER)) != 1:
        raise ValueError(f"the prompt has {markers} markers {MARKER!r}, it must have exactly one")
    prefix, suffix = prompt.split(MARKER)
    if not prefix.strip():
        raise ValueError(f"nothing stands before {MARKER!r}: there is no prefix to cache")
    return prefix, suffix.strip()


def reader(n: int) -> str:
    """Return what is known of reader `n`; reader 0 is nobody, for priming."""
    return f"Reader R-{20000 + 131 * n}: member since {1990 + n % 30}, {n % 7} loans, fees {n % 10}.50."


def bad_messages(prompt: str, n: int) -> list[dict]:
    """The reader's data stands inside the static part: after its first sentence, in its middle where that is long."""
    static, question = split_at_boundary(prompt)
    place = min(re.search(r"[.!?]\s|$", static).end(), static.rfind(" ", 0, len(static) // 2) + 1 or len(static) // 2)
    inside = f"{static[:place]}{reader(n)}\n{static[place:]}"
    return [{"role": "system", "content": inside}, {"role": "user", "content": question}]


def good_messages(prompt: str, n: int) -> list[dict]:
    """The reader's data stands after the boundary, with the question."""
    static, question = split_at_boundary(prompt)
    return [{"role": "system", "content": static}, {"role": "user", "content": f"{reader(n)}\n{question}"}]


LAYOUTS = {"bad": bad_messages, "good": good_messages}


async def pair(run: Run, engine: Engine, prompts: dict[str, list[list[int]]]) -> None:
    """Prime both arms for a reader who does not exist, then let the real ones come."""
    run.print("[bold]On vLLM[/]: request 0 primes the prefix, for nobody")
    run.print_pair_head("dynamic data inside", "split at the marker")
    for n in range(run.args.requests):
        row = {}
        for arm in (LAYOUTS, reversed(LAYOUTS))[n % 2]:
            row[arm] = await engine.ask(prompts[arm][n], "main", arm, n, salt=arm)
        run.print_pair(n, **row)
    bad, good = run.arm("main", "bad")[1:], run.arm("main", "good")[1:]
    run.print_comparison(bad, good)

    inside = run.whole_blocks(max(itertools.starmap(common_prefix, itertools.combinations(prompts["bad"], 2))))
    static = run.whole_blocks(min(common_prefix(prompts["good"][0], ids) for ids in prompts["good"][1:]))
    run.claim("dynamic data inside loses all static text behind it", max(m.cached_tokens for m in bad) <= inside,
              f"at most {max(m.cached_tokens for m in bad):,} tokens found, {inside:,} before the data")  # fmt: skip
    run.claim("split at the marker, the first user finds the static part", good[0].cached_tokens >= static > inside,
              f"{good[0].cached_tokens:,} of {static:,} tokens in whole blocks")  # fmt: skip
    run.print_break("Two bad prompts", *prompts["bad"][:2])
    run.print(time_verdict(bad, good))


# --- an engine without automatic prefix caching, and an explicit store for it ---


@dataclasses.dataclass
class Entry:
    """The KV of one prefix."""

    length: int  # tokens
    kv: DynamicCache
    nbytes: int
    stored_at: float  # seconds, on the store's clock
    pinned: bool


def kv_nbytes(kv: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in kv.layers)


class NoRoom(ValueError):
    """A store refuses an entry: it does not fit in the budget, or not beside what is pinned."""


class PrefixStore:
    """KV of prompt prefixes under the SHA-256 of their token ids, in a byte budget, for a time to live.

    The longest stored prefix of a prompt wins. Least recently used entries leave first, pinned ones never do. KV is
    copied on the way in and on the way out, so that no request can change an entry. `clock` returns seconds.
    """

    def __init__(self, max_bytes: int, ttl_s: float, clock: Callable[[], float]) -> None:
        self.max_bytes, self.ttl_s, self.clock = max_bytes, ttl_s, clock
        self.entries: OrderedDict[str, Entry] = OrderedDict()  # least recently used first
        self.hits = self.misses = self.evictions = 0

    @staticmethod
    def key(ids: list[int]) -> str:
        return hashlib.sha256(array("q", ids).tobytes()).hexdigest()

    def nbytes(self, pinned_only: bool = False) -> int:
        return sum(entry.nbytes for entry in self.entries.values() if entry.pinned or not pinned_only)

    def put(self, ids: list[int], kv: DynamicCache, pinned: bool = False) -> None:
        """Keep a copy of `kv`, the KV of exactly `ids`; a pinned entry stays pinned. Raises ValueError, or NoRoom."""
        size = kv_nbytes(kv)
        if kv.get_seq_length() != len(ids):
            raise ValueError(f"KV of {kv.get_seq_length()} tokens does not belong to {len(ids)} token ids")
        if size > self.max_bytes:
            raise NoRoom(f"an entry of {size:,} bytes is larger than the budget of {self.max_bytes:,}")
        self.expire()
        key = self.key(ids)
        replaced = self.entries.get(key)
        was_pinned = replaced is not None and replaced.pinned
        held, pinned = self.nbytes(pinned_only=True) - (replaced.nbytes if was_pinned else 0), pinned or was_pinned
        if held + size > self.max_bytes or (pinned and held + size == self.max_bytes):
            raise NoRoom(f"pinned entries hold {held:,} of {self.max_bytes:,} bytes: no room beside {size:,} more")
        self.entries.pop(key, None)
        for oldest in [k for k, entry in self.entries.items() if not entry.pinned]:
            if self.nbytes() + size <= self.max_bytes:
                break
            del self.entries[oldest]
            self.evictions += 1
        self.entries[key] = Entry(len(ids), copy.deepcopy(kv), size, self.clock(), pinned)

    def get(self, ids: list[int]) -> tuple[int, DynamicCache | None]:
        """Return the length of the longest stored prefix that leaves a token to compute, and a copy of its KV."""
        self.expire()
        for length in sorted({entry.length for entry in self.entries.values()}, reverse=True):
            key = self.key(ids[:length])
            if length < len(ids) and key in self.entries:
                self.hits += 1
                self.entries.move_to_end(key)
                return length, copy.deepcopy(self.entries[key].kv)
        self.misses += 1
        return 0, None

    def unpin(self, ids: list[int]) -> None:
        """Let an entry leave like others from now on. Raises KeyError where there is none for exactly `ids`."""
        self.entries[self.key(ids)].pinned = False

    def expire(self) -> None:
        """Drop what is older than the time to live, unless it is pinned."""
        now = self.clock()
        for key in [k for k, e in self.entries.items() if not e.pinned and now - e.stored_at >= self.ttl_s]:
            del self.entries[key]
            self.evictions += 1


class ExplicitEngine:
    """A transformers model with no prefix caching of its own: it computes what it is not given the KV of."""

    tolerance = 1e-3  # of logits in float32, which differ by rounding only; other dtypes would need more

    def __init__(self, model: str, device: str, memory: int, kv_bytes: int) -> None:
        """Find out whether there is such a model and `memory` bytes are enough for it; `load` makes it on `device`.

        `kv_bytes` is the size of the longest prompt's KV: a request, its entry in the store and copies of both.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self.config, self.device = AutoConfig.from_pretrained(model), device
        try:
            with torch.device("meta"):  # shapes without numbers
                network = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        except (ImportError, ValueError) as error:
            raise LessonError(f"transformers cannot build the model in {model}: {telling_line(error)}") from error
        self.nbytes = sum(parameter.nbytes for parameter in network.parameters()) + 4 * kv_bytes
        self.check_memory(memory)

    def check_memory(self, free: int) -> None:
        if self.nbytes > free:
            sizes = f"this model in float32 needs {self.nbytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            raise LessonError(f"{sizes}: choose a smaller --model, or a smaller --prefix-tokens")

    def load(self, length: int) -> None:
        """Make the model, with random weights, and warm it up with `length` unrelated tokens."""
        import torch
        from transformers import AutoModelForCausalLM

        if self.device == "cuda":  # only now: what has touched the GPU cannot be forked
            self.check_memory(torch.cuda.mem_get_info()[0])
        torch.manual_seed(0)  # normally initialised: with vLLM's tiny dummy weights all prompts give the same logits
        with torch.device(self.device):
            self.network = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).eval()
        kv, _ = self.prefill([5] * length)
        self.store_bytes = 2 * kv_nbytes(kv)  # a store that holds two prompts

    def prefill(self, ids: list[int], kv: DynamicCache | None = None) -> tuple[DynamicCache, Tensor]:
        """Return the KV of `ids` and the logits of the next token, shape (vocabulary,).

        `kv`, shape (1, heads, tokens, size) per layer, holds the first of the ids and is extended by the others.
        """
        import torch
        from transformers import DynamicCache

        kv = DynamicCache(config=self.config) if kv is None else kv
        new = torch.tensor([ids[kv.get_seq_length() :]], device=self.device)
        with torch.inference_mode():
            output = self.network(input_ids=new, past_key_values=kv, logits_to_keep=1)
        return kv, output.logits[0, -1].cpu()

    def ask(self, ids: list[int], boundaries: list[int], store: PrefixStore | None) -> tuple[int, float, Tensor]:
        """Return cached tokens, TTFT in ms and logits; what ends at a boundary and is not stored yet is stored.

        A prompt may have several boundaries. One that the store has no room for is answered all the same.
        """
        start = time.perf_counter()
        cached, kv = (0, None) if store is None else store.get(ids)
        for end in sorted(boundaries) if store else []:
            if cached < end < len(ids):  # the last token is left: it gives the logits
                kv, _ = self.prefill(ids[:end], kv)
                with contextlib.suppress(NoRoom):
                    store.put(ids[:end], kv)
        _, logits = self.prefill(ids, kv)
        return cached, (time.perf_counter() - start) * 1000, logits


def record(run: Run, experiment: str, arm: str, n: int, ids: list[int], cached: int, predicted: int, ms: float) -> None:
    run.elsewhere.append(Measurement(experiment, arm, n, None, None, len(ids), cached, predicted, ms, None))


def explicit_store(run: Run, explicit: ExplicitEngine, prompts: list[list[int]], boundary: int) -> None:
    """Send the good prompts to an engine without automatic prefix caching, with a store and without one."""
    run.print("\n[bold]On transformers, without automatic prefix caching[/] (float32, normal weights)")
    if run.environment["transformers_model"] != run.environment["model"]:
        run.print(f"with {run.environment['transformers_model']}", markup=False)
    run.print_pair_head("everything is prefilled", "PrefixStore, marked prefix")
    store = PrefixStore(explicit.store_bytes, ttl_s=300, clock=time.monotonic)
    differences, equal, rows = [], 0, {"bad": [], "good": []}
    for n, ids in enumerate(prompts):
        logits = {}
        for arm in (rows, reversed(rows))[n % 2]:
            cached, ms, logits[arm] = explicit.ask(ids, [boundary], store if arm == "good" else None)
            predicted = boundary if arm == "good" and n > 0 else 0
            record(run, "explicit_store", arm, n, ids, cached, predicted, ms)
            rows[arm] = run.arm("explicit_store", arm)
        run.print_pair(n, rows["bad"][-1], rows["good"][-1])
        differences.append(float((logits["good"] - logits["bad"]).abs().max()))
        equal += int(logits["good"].argmax() == logits["bad"].argmax())
    counts = f"{store.hits} hits, {store.misses} misses, {store.evictions} evictions"
    run.print(f"store: {counts}, {store.nbytes() / 1e6:.1f} MB held")
    _, spoilt = store.get(prompts[-1])
    for layer in spoilt.layers:
        layer.values.mul_(-1)
    control = float((explicit.prefill(prompts[-1], spoilt)[1] - logits["bad"]).abs().max())

    apart = f"cached and uncached {max(differences):.0e} apart"
    run.print(f"first-token logits: {apart}; with corrupted KV {control:.1f}")
    run.print(time_verdict(rows["bad"][1:], rows["good"][1:]))
    run.claim("logits from stored KV are those of a full prefill", max(differences) <= explicit.tolerance,
              f"{max(differences):.1e} apart at most, tolerance {explicit.tolerance:.0e} in float32")  # fmt: skip
    run.claim("the next token is the same", equal == len(prompts), f"{equal} of {len(prompts)} requests")
    run.claim("corrupted KV does change the logits", control > explicit.tolerance, f"{control:.1e} apart")


# --- the further experiments: --deeper ---


SAMPLES = 5


def boundary_places(run: Run, prompt: str) -> dict[str, list[int]]:
    """Return what is primed, as token ids, with the boundary where it belongs and where it does not."""
    text, whole = run.render(good_messages(prompt, 0)), run.encode(good_messages(prompt, 0))
    end = text.index(reader(0))
    right = run.tokens(text[:end])
    right = right[: common_prefix(right, whole)]  # what follows may change the last token
    # half of the tokens, so that it is a block less at least; part of a prompt's tokens may be no text
    half = bisect.bisect_right(range(end), len(right) // 2, key=lambda place: run.count(text[:place])) - 1
    early = max(text.rfind(" ", 0, half), text.rfind("\n", 0, half) + 1)
    places = {"too early": early if early > 0 else half, "too late": end + len(reader(0))}
    primed = {"right": right} | {name: run.tokens(text[:place]) for name, place in places.items()}
    block_ends = range(run.whole_blocks(len(primed["right"])), 0, -run.block_size)
    for block_end in block_ends[:40]:  # a text without letters has no such place
        about = len(run.tokenizer.decode(whole[:block_end]))
        for place in range(max(1, about - 12), min(about + 12, end)):
            # glued to a word: the text before the marker ends with another token than the whole text has there
            ids = run.tokens(text[:place])
            if text[place - 1 : place + 1].isalpha() and len(ids) == block_end and ids != whole[:block_end]:
                return primed | {"inside a token": ids}
    return primed


async def boundaries_on_vllm(run: Run, engine: Engine, primed: dict[str, list[int]], whole: list[int]) -> None:
    """Prime with each boundary in turn, then let the first user come, from an empty cache each time."""
    for n, (name, ids) in itertools.product(range(SAMPLES), primed.items()):
        await engine.reset()
        await engine.ask(ids, "boundary", f"{name}, primed", n)
        await engine.ask(whole, "boundary", name, n)


def boundaries_in_store(run: Run, explicit: ExplicitEngine, primed: dict[str, list[int]], whole: list[int]) -> None:
    """The same with the store, which knows no prefix but those that were marked; then the table of both."""
    why = {
        "right": "all that is static",
        "too early": "the rest is left out",
        "too late": "nobody's data is in",
        "inside a token": "other tokens there",
    }
    run.print("\n[bold]Where the boundary stands[/]: what the first user finds, on vLLM and in the store")
    run.print(f"{'boundary':<16}{'primed':>7}{'vLLM':>7}{'TTFT':>10}{'store':>8}{'TTFT':>10}  because")
    for name, ids in primed.items():
        exact = len(ids) if whole[: len(ids)] == ids else 0
        for n in range(SAMPLES):
            store = PrefixStore(explicit.store_bytes, ttl_s=300, clock=time.monotonic)
            store.put(ids, explicit.prefill(ids)[0])
            cached, ms, _ = explicit.ask(whole, [], store)
            record(run, "boundary_store", name, n, whole, cached, exact, ms)
        arms = run.arm("boundary", name), run.arm("boundary_store", name)
        times = (milliseconds(statistics.median(m.ttft_ms for m in arm)) for arm in arms)
        cells = (f"{arm[0].cached_tokens:>7,}{ttft:>10}" for arm, ttft in zip(arms, times, strict=True))
        run.print(f"{name:<16}{len(ids):>7,}{' '.join(cells)}  {why[name]}")
    found = {name: run.arm("boundary", name)[0].cached_tokens for name in primed}
    early = f"{found['too early']:,} of {found['right']:,} tokens"
    run.claim("a boundary too early leaves less to find", found["too early"] < found["right"], early)
    late = run.arm("boundary_store", "too late")[0].cached_tokens
    run.claim("a boundary too late: nothing in the store, on vLLM all that is static",
              late == 0 and found["too late"] >= found["right"], f"{late:,}, {found['too late']:,} tokens")  # fmt: skip
    if "inside a token" in primed:
        lost = len(primed["inside a token"]) - found["inside a token"]
        run.claim("a boundary inside a token loses a block", lost >= run.block_size, f"{lost} tokens")


async def lesson(run: Run) -> None:
    prompt = read_prompt(run.args)
    run.load_model()
    import psutil  # comes with vLLM

    prompt = prompt or default_prompt(run.args.prefix_tokens, run.count)
    numbers = range(run.args.requests)
    prompts = {arm: [run.encode(layout(prompt, n)) for n in numbers] for arm, layout in LAYOUTS.items()}
    boundary = marked_tokens(run, prompt)
    run.environment["prefix_tokens"] = run.args.prefix_tokens or boundary
    if run.whole_blocks(boundary) <= run.whole_blocks(common_prefix(*prompts["bad"][:2])):
        short = f"the prefix before {MARKER!r} has {boundary} tokens, too few to lose a block of {run.block_size}"
        raise UsageError(f"{short}: write more before the marker, or choose a smaller --block-size")
    primed = boundary_places(run, prompt) if run.args.deeper else {}
    longest = max(map(len, itertools.chain(*prompts.values(), primed.values())))
    kv_bytes = longest * run.kv_bytes_per_token // run.dtype_bytes * 4  # in float32
    device, memory = ("cuda", run.gpu_memory) if run.on_gpu else ("cpu", psutil.virtual_memory().available)
    # In float32 a GPU computes some ten times slower: a shape for an eighth of it takes about as long as vLLM's.
    model = run.engine_args.keywords["model"] if run.args.model else str(run.built_in(share=8))
    run.environment["transformers_model"] = "/".join(Path(model).parts[-2:])
    explicit = ExplicitEngine(model, device, memory, kv_bytes)
    engine = await run.open_engine(longest, run.suffix(prompts["good"]))
    with run.timed("measuring"):
        await pair(run, engine, prompts)
        await boundaries_on_vllm(run, engine, primed, prompts["good"][1])
    engine.end()  # its cores and memory are needed now
    with run.timed("measuring"):
        explicit.load(max(map(len, prompts["good"])))
        explicit_store(run, explicit, prompts["good"], boundary)
        if primed:
            boundaries_in_store(run, explicit, primed, prompts["good"][1])


def marked_tokens(run: Run, prompt: str) -> int:
    """Return how many tokens stand before the marker, up to the last one that what follows leaves as it is."""
    text = run.render(good_messages(prompt, 0))
    return common_prefix(run.tokens(text[: text.index(reader(0))]), run.tokens(text))


def read_prompt(args: argparse.Namespace) -> str | None:
    """Return the user's prompt, None where there is none; UsageError where it has no boundary."""
    if args.prompt_file is None:
        return None
    if args.prefix_tokens is not None:
        raise UsageError("--prompt-file brings a prompt of its own length: leave --prefix-tokens out")
    args.prefix_tokens = 0
    try:
        prompt = Path(args.prompt_file).read_text(encoding="utf-8")
        split_at_boundary(prompt)
    except OSError as error:
        raise UsageError(f"cannot read {args.prompt_file}: {error.strerror}") from error
    except ValueError as error:  # no UTF-8, or no boundary
        raise UsageError(f"{args.prompt_file}: {error}") from error
    return prompt


def main() -> int:
    parser = lesson_parser(__doc__, requests=6)
    parser.add_argument("--prompt-file", metavar="FILE", help=f"a prompt of your own, with one {MARKER} in it")
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
