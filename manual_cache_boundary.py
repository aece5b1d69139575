"""Lesson 3: an explicit boundary between what is cached and what is not.

Write a prompt in two parts, the static one first, and mark where it ends:

    <instructions, policies, tools> // __CACHE_END__ <user data, question>

vLLM has no such marker: it finds the longest cached prefix of every prompt by
itself, in whole blocks of tokens. The marker is for you: it is taken out before
the prompt is sent, and says how far the cache can be primed before the first
user comes. Hosted APIs with explicit breakpoints do need to be told: a field of
the request, not a text in the prompt, says "keep the prefix up to here", and a
prefix that does not match exactly is not found.

  bad   dynamic data stands before the end of the static part
  good  the prompt is split at the marker; all dynamic data comes after it

Both arms send the same sentences, and both are primed once, for a reader who
does not exist (request 0). In good the very first user (request 1) hits.

Then the good prompts once more, on an engine without automatic prefix caching:
a transformers model with random weights, without a store (bad) and with one
(good). `PrefixStore` keeps the KV of marked prefixes under the SHA-256 of their
token ids, within a byte budget (least recently used out first), for a time to
live, pinned on request. First-token logits are compared with uncached ones.

--prompt-file FILE takes a prompt of your own with the marker in it. Given twice
or more, for prompts as they were really sent and without a marker, the lesson
finds where it belongs.
--deeper adds: a boundary too early, too late, and inside a token; three
tiers in one store; and the KV cache itself, within one request.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import itertools
import math
import re
import sys
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache

# What is not defined here stands below: questions (predict_first), instrument (Engine, ...), plumbing (Run, ...).

# --- the lesson: a prompt split at a marker, sent to vLLM; then a store for an engine without prefix caching ---

MARKER = "// __CACHE_END__"
LARGEST_FILE = 10_000_000  # bytes
ONE_ROW = dict(markup=False, soft_wrap=False, no_wrap=True, overflow="crop")  # some characters take two columns
BETWEEN_WORDS = r"\s\u3000-\u30ff\u3400-\u9fff\uff00-\uffef"  # Chinese and Japanese have no spaces: each of theirs
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
    text, tools = INSTRUCTIONS, 0
    while (missing := tokens - count(text)) > 0:
        for _ in range(1 + missing // 200):  # a tool has less than 200 tokens: one too many at most
            verb, noun = VERBS[tools % len(VERBS)], NOUNS[tools // len(VERBS) % len(NOUNS)]
            version = 1 + tools // (len(VERBS) * len(NOUNS))
            does = f"Use it to {verb} a {noun}."
            text += f"{verb}_{noun}_v{version}(id: string, reader_id: string) -> object. {does}\n"
            tools += 1
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


def find_boundary(texts: list[str], share: float = 1.0, places: Sequence[int] = ()) -> int:
    """Return the last place, in characters, up to which at least `share` of two texts or more agree.

    It is moved back to the end of a line, or to one of `places`, or where there is neither between two words.
    """
    needed = max(2, math.ceil(share * len(texts)))
    ordered, found = sorted(texts), 0
    for first, last in zip(ordered, ordered[needed - 1 :], strict=False):  # what these two share, all between share
        at = common_prefix(first, last)
        if first != last:
            line_end = first.rfind("\n", 0, at) + 1
            before = [place for place in places if place <= at]
            at = max(line_end, *before, 0) or re.search(rf"[^{BETWEEN_WORDS}]*$", first[:at]).start()
        found = max(found, at)
    return found


CLOCK = r"\d{4}-\d\d-\d\d|\d\d:\d\d|\b1[67]\d{8}"
USER = r"(?i)\b(user|member|reader|customer|account|tenant)\b"
ID = r"\b(?=[\w-]*\d)[\w-]{6,}"


def differences(text: str, other: str) -> list[tuple[str, str, str]]:
    """Return the kind of each difference between two texts, line by line, and how either has it."""
    lines, others = text.splitlines(), other.splitlines()
    if sorted(lines) == sorted(others):
        moved = [("order", a, b) for a, b in zip(lines, others, strict=True) if a != b]
        return moved[:1]
    found = []
    for what, a, b, c, d in difflib.SequenceMatcher(None, lines, others, autojunk=False).get_opcodes():
        if what != "equal":
            for line, counterpart in itertools.zip_longest(lines[a:b], others[c:d], fillvalue=""):
                found.append((kind_of_difference(line, counterpart), line, counterpart))
    return found


def kind_of_difference(line: str, counterpart: str) -> str:
    changed = " ".join(set(line.split()) ^ set(counterpart.split()))
    if re.search(CLOCK, changed):
        return "clock"
    if re.search(USER, f"{line} {counterpart}"):  # such a word stands beside what changes
        return "user"
    return "id" if re.search(ID, changed) else "text"


def reader(n: int) -> str:
    """Return what is known of reader `n`; reader 0 is nobody, for priming."""
    return f"Reader R-{20000 + 131 * n}: member since {1990 + n % 30}, {n % 7} loans, fees {n % 10}.50."


def place_inside(static: str) -> int:
    """Return where the first sentence ends, or the middle of the text where that comes earlier."""
    middle = len(static) // 2
    space = static.rfind(" ", 0, middle)
    if space >= 0:
        middle = space + 1  # between two words
    sentence = re.search(r"[.!?]\s", static)
    return min(sentence.end(), middle) if sentence else middle


def bad_messages(prompt: str, n: int) -> list[dict]:
    """The reader's data stands inside the static part."""
    static, question = split_at_boundary(prompt)
    place = place_inside(static)
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
        measured = {}
        for arm in in_turn(LAYOUTS, n):
            # The salt gives each arm a part of the cache of its own.
            measured[arm] = await engine.ask(prompts[arm][n], "main", arm, n, salt=arm)
        run.print_pair(n, measured["bad"], measured["good"])
    bad, good = run.measured("main", "bad")[1:], run.measured("main", "good")[1:]
    run.print_comparison(bad, good)

    # What the prompts themselves allow: a cache finds whole blocks of what two prompts have in common from the top.
    shared_by_bad = max(common_prefix(a, b) for a, b in itertools.combinations(prompts["bad"], 2))
    before_data = run.model.whole_blocks(shared_by_bad)
    static = run.model.whole_blocks(min(common_prefix(prompts["good"][0], ids) for ids in prompts["good"][1:]))
    most_bad, first_good = max(m.cached_tokens for m in bad), good[0].cached_tokens
    evidence = f"at most {most_bad:,} tokens found, {before_data:,} before the data"
    run.claim("dynamic data inside loses all static text behind it", most_bad <= before_data, evidence)
    first_user_hits = first_good >= static > before_data
    evidence = f"{first_good:,} of {static:,} tokens in whole blocks"
    run.claim("split at the marker, the first user finds the static part", first_user_hits, evidence)
    run.print_break("Two bad prompts", *prompts["bad"][:2])
    run.result["verdict"] = [time_verdict(bad, good)]
    run.print(*run.result["verdict"])


def boundary_of_its_own(run: Run, prompt: str, boundary: int) -> None:
    """Find from the prompts of each arm where their boundary is, without looking for the marker."""
    model, found = run.model, {}
    for arm, layout in LAYOUTS.items():
        chats = [layout(prompt, n) for n in range(run.args.requests)]
        texts = [model.render(chat) for chat in chats]
        starts = [texts[0].find(message["content"].strip()) for message in chats[0]]  # -1: the template changes it
        found[arm] = tokens_before(model, texts[0], find_boundary(texts, places=starts))
    kinds = {kind for kind, _, _ in differences(*texts[:2])}
    run.print(f"\nFound by itself in {len(texts)} good prompts: the boundary is at token {found['good']:,}")
    behind = f"behind it differ: {', '.join(sorted(kinds))}"
    run.print(f"(the marker: {boundary:,}), {behind}. In bad: at token {found['bad']:,}.")
    evidence = f"at token {found['good']:,}, the marker at {boundary:,}"
    equal = model.whole_blocks(found["good"]) == model.whole_blocks(boundary)
    run.claim("the boundary found primes as many blocks as the marker", equal, evidence)
    hits = max(m.cached_tokens for m in run.measured("main", "bad")[1:])
    early = model.whole_blocks(found["bad"])
    evidence = f"{early:,} tokens in whole blocks, {hits:,} found in the cache"
    run.claim("in bad it is as early as the hits end", early <= hits < model.whole_blocks(found["good"]), evidence)


def mark_boundary(run: Run, texts: list[str]) -> str:
    """Return the first of the user's prompts with the marker where it belongs; show why there."""
    model, first = run.model, texts[0]
    for text in texts:
        model.check_length(model.count(text))
    at = find_boundary(texts)
    static, rest = first[:at], first[at:]
    other = min(texts[1:], key=lambda text: common_prefix(first, text))  # the one that differs first
    found = differences(first, other)
    if not static.strip():
        differ = "; ".join(f"{kind}: {line[:60]!r}" for kind, line, _ in found[:2])
        raise LessonError(f"the prompts have no beginning in common: move what differs to their end ({differ})")
    tokens = tokens_before(model, first, at)
    lines = len(static.splitlines())
    run.print(f"Found in {len(texts)} prompts: they agree up to character {at:,} (token {tokens:,}), line {lines}.")
    for kind, one, another in found[:5]:
        same, most = common_prefix(one, another), 33 if (one + another).isascii() else 16
        start = 0 if same < 20 else same - 10
        left, right = (shown(line[start : start + most].strip()) for line in (one, another))
        run.print(f"  {kind:<6}{left!r:<{most + 4}}{right!r}", **ONE_ROW)
    if ("\r\n" in first) != ("\r\n" in other):
        run.print("One has the line ends of Windows (CRLF), the other has not: to the cache they differ.")
    others = [{*text[at:].splitlines()} for text in texts[1:]]
    shared = model.count("\n".join(line for line in rest.splitlines() if all(line in lines for lines in others)))
    if shared >= model.block_size:
        run.print(f"Behind it all share {shared:,} tokens more: move the lines above to the end.")
    around = [*static.splitlines()[-2:], MARKER, *rest.splitlines()[:2]]
    for line in around:
        run.print(f"  | {shown(line)}", **ONE_ROW)
    run.print("")
    marked = f"{static}{MARKER}\n{rest}"
    about = {"characters": at, "tokens": tokens, "differences": found, "shared_behind": shared, "marked_prompt": marked}
    run.result["found_boundary"] = about
    return marked


async def lesson(run: Run) -> None:
    """Split the prompt, start vLLM and send both layouts; then the same with transformers and a store."""
    model, texts = run.model, run.args.prompt_file
    prompt = texts[0] if texts else default_prompt(run.args.prefix_tokens, model.count)
    if len(texts) > 1:
        prompt = mark_boundary(run, texts)
    prompts = {}
    with run.timed(None, "Making prompts..."):
        for arm, layout in LAYOUTS.items():
            prompts[arm] = [model.encode(layout(prompt, n)) for n in range(run.args.requests)]
    text = model.render(good_messages(prompt, 0))  # what the template writes before the reader's data is static, too
    boundary = tokens_before(model, text, text.index(reader(0)))
    run.environment["prefix_tokens"] = run.args.prefix_tokens or boundary
    if model.whole_blocks(boundary) <= model.whole_blocks(common_prefix(*prompts["bad"][:2])):
        short = f"the prefix before {MARKER!r} has {boundary} tokens, too few to lose a block of {model.block_size}"
        raise UsageError(f"{short}: write more before the marker, or choose a smaller --block-size")
    primed = boundary_places(model, prompt, boundary) if run.args.deeper else {}
    longest = max(map(len, [*prompts["bad"], *prompts["good"], *primed.values()]))
    suffix = model.suffix(prompts["good"])  # what a hit leaves to compute
    length = longest + OUTPUT_TOKENS
    explicit = plan_explicit_engine(run, longest)

    # An AsyncLLMEngine with these of vLLM's arguments. `engine.ask` predicts what its cache will find, sends token ids
    # with SamplingParams(max_tokens=1), times the first token, and reads what was found: num_cached_tokens.
    with run.timed("engine_start", "Starting vLLM..."):
        engine = run.start_engine(
            enable_prefix_caching=not run.args.no_prefix_caching,
            max_model_len=length,
            max_num_batched_tokens=length,  # a prompt is computed in one step
            kv_cache_memory_bytes=model.kv_bytes(8, length),  # eight prompts: older ones leave, a prefix in use stays
            graph_tokens=suffix,  # ours: on a GPU, steps as short as a hit's are replayed as one CUDA graph
        )
    await run.warm_up(longest, suffix)
    questions = [
        Question("BAD, request 1, after request 0", "bad", 1, prompts["bad"][0], prompts["bad"][1]),
        Question("GOOD, request 1, the first user, after request 0", "good", 1, prompts["good"][0], prompts["good"][1]),
        Question("GOOD, request 0, which primes: nothing was sent before", "good", 0, [], prompts["good"][0]),
    ]
    answers = predict_first(run, questions)
    with run.timed("measuring"):
        await pair(run, engine, prompts)
        tell_score(run, questions, answers)
        boundary_of_its_own(run, prompt, boundary)
        if primed:
            await boundaries_on_vllm(run, engine, primed, prompts["good"][1])
    run.end_engine(engine)  # its cores and memory are needed now
    with run.timed("measuring"):
        explicit.load(max(map(len, prompts["good"])))
        explicit_store(run, explicit, prompts["good"], boundary)
        if primed:
            boundaries_in_store(run, explicit, primed, prompts["good"][1])
            tiers(run, explicit)
            kv_cache(run, explicit, prompts["good"][1])


def tokens_before(model: Model, text: str, place: int) -> int:
    """Return how many tokens of a text end at a place in it or before; one that would reach across it does not."""
    return common_prefix(model.tokens(text[:place]), model.tokens(text))


def read_prompt(path: str) -> str:
    """Return the user's prompt; argparse.ArgumentTypeError where there is none."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is no regular file")
        if Path(path).stat().st_size > LARGEST_FILE:
            raise ValueError(f"it is larger than {LARGEST_FILE:,} bytes, more than a model takes")
        return Path(path).read_bytes().decode()  # with the line ends that it has: others are other tokens
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # no UTF-8
        raise argparse.ArgumentTypeError(f"{path}: {error}") from error


def main() -> int:
    parser = lesson_parser(__doc__, requests=6)
    text = f"a prompt of your own, with one {MARKER} in it; or without it, twice or more, to find its place"
    parser.add_argument("--prompt-file", metavar="FILE", type=read_prompt, action="append", default=[], help=text)
    args = parse(parser)
    try:
        if len(args.prompt_file) == 1:
            split_at_boundary(args.prompt_file[0])
        elif any(MARKER in text for text in args.prompt_file):
            raise ValueError(f"several prompts are searched for their boundary: leave {MARKER} out")
    except ValueError as error:
        parser.error(f"--prompt-file: {error}")
    if args.prompt_file and args.prefix_tokens is not None:
        parser.error("--prompt-file brings a prompt of its own length: leave --prefix-tokens out")
    if args.prompt_file:
        args.prefix_tokens = 0  # the length comes from the file
    return run_lesson(args, lesson)


# --- the lesson, second part: an engine without automatic prefix caching, and an explicit store for it ---


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

    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def put(self, ids: list[int], kv: DynamicCache, pinned: bool = False) -> None:
        """Keep a copy of `kv`, the KV of exactly `ids`; a pinned entry stays pinned. Raises ValueError, or NoRoom."""
        key, size = self.key(ids), kv_nbytes(kv)
        if kv.get_seq_length() != len(ids):
            raise ValueError(f"KV of {kv.get_seq_length()} tokens does not belong to {len(ids)} token ids")
        if size > self.max_bytes:
            raise NoRoom(f"an entry of {size:,} bytes is larger than the budget of {self.max_bytes:,}")
        self.expire()
        earlier = self.entries.get(key)
        pinned = pinned or (earlier is not None and earlier.pinned)
        held = sum(entry.nbytes for other, entry in self.entries.items() if entry.pinned and other != key)
        room = self.max_bytes - held
        if size > room or (pinned and size == room):  # pins must not fill the store: nothing else could be kept then
            raise NoRoom(f"pinned entries hold {held:,} of {self.max_bytes:,} bytes: no room beside {size:,} more")
        self.entries.pop(key, None)
        self.make_room(size)
        self.entries[key] = Entry(len(ids), copy.deepcopy(kv), size, self.clock(), pinned)

    def make_room(self, size: int) -> None:
        """Evict the least recently used entries, never a pinned one, until `size` more bytes fit."""
        for key in [key for key, entry in self.entries.items() if not entry.pinned]:
            if self.nbytes() + size <= self.max_bytes:
                return
            del self.entries[key]
            self.evictions += 1

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

        self.config, self.device = AutoConfig.from_pretrained(model, trust_remote_code=False), device
        options = dict(dtype=torch.float32, trust_remote_code=False)
        self.build = functools.partial(AutoModelForCausalLM.from_config, self.config, **options)
        try:
            with torch.device("meta"):  # shapes without numbers
                weights = sum(parameter.nbytes for parameter in self.build().parameters())
        except (*BROKEN_FILES, ImportError) as error:
            raise LessonError(f"transformers cannot build the model in {model}: {telling_line(error)}") from error
        self.nbytes = weights + 4 * kv_bytes
        self.check_memory(memory)

    def check_memory(self, free: int) -> None:
        if self.nbytes > free:
            sizes = f"this model in float32 needs {self.nbytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            raise LessonError(f"{sizes}: choose a smaller --model, or a smaller --prefix-tokens")

    def load(self, length: int) -> None:
        """Make the model, with random weights, and warm it up with `length` unrelated tokens."""
        import torch

        if self.device == "cuda":  # only now: what has touched the GPU cannot be forked
            self.check_memory(torch.cuda.mem_get_info()[0])
        torch.manual_seed(0)  # normally initialised: with vLLM's tiny dummy weights all prompts give the same logits
        with torch.device(self.device):
            self.network = self.build().eval()
        self.computed = 0  # tokens that went through the model
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
        self.computed += new.shape[1]
        with torch.inference_mode():
            output = self.network(input_ids=new, past_key_values=kv, logits_to_keep=1)
        return kv, output.logits[0, -1].cpu()

    def write(self, ids: list[int], tokens: int, keep_kv: bool) -> tuple[list[int], list[float], int]:
        """Return the likeliest tokens after `ids`, the ms that each took, and how many tokens were computed in all."""
        kv, written, times, before = None, [], [], self.computed
        for _ in range(tokens):
            start = time.perf_counter()
            kv, logits = self.prefill([*ids, *written], kv if keep_kv else None)
            times.append((time.perf_counter() - start) * 1000)
            written.append(int(logits.argmax()))
        return written, times, self.computed - before

    def ask(self, ids: list[int], boundaries: list[int], store: PrefixStore | None) -> tuple[int, float, Tensor]:
        """Return cached tokens, TTFT in ms and logits; what ends at a boundary and is not stored yet is stored.

        A prompt may have several boundaries. One that the store has no room for is answered all the same.
        """
        start = time.perf_counter()
        cached, kv = store.get(ids) if store else (0, None)
        for end in sorted(boundaries):
            if store and cached < end < len(ids):  # the last token is left: it gives the logits
                kv, _ = self.prefill(ids[:end], kv)
                with contextlib.suppress(NoRoom):
                    store.put(ids[:end], kv)
        _, logits = self.prefill(ids, kv)
        return cached, (time.perf_counter() - start) * 1000, logits


def plan_explicit_engine(run: Run, longest: int) -> ExplicitEngine:
    """Find out whether transformers can run the model here, before anything is started; LessonError where not."""
    import psutil  # comes with vLLM

    model = run.model
    kv_bytes = 4 * longest * model.kv_bytes_per_token // model.dtype.itemsize  # in float32
    # In float32 a GPU computes some ten times slower, so the built-in model is the one for an eighth of its memory.
    name = model.name if run.args.model else built_in_model(model.gpu_memory // 8)
    run.environment["transformers_model"] = "/".join(Path(name).parts[-2:])
    if model.on_gpu:
        return ExplicitEngine(name, "cuda", model.gpu_memory, kv_bytes)
    return ExplicitEngine(name, "cpu", psutil.virtual_memory().available, kv_bytes)


def explicit_store(run: Run, explicit: ExplicitEngine, prompts: list[list[int]], boundary: int) -> None:
    """Send the good prompts to an engine without automatic prefix caching, with a store and without one."""
    run.print("\n[bold]On transformers, without automatic prefix caching[/] (float32, normal weights)")
    if run.environment["transformers_model"] != run.environment["model"]:
        run.print(f"with {shown(run.environment['transformers_model'])}", markup=False)
    run.print_pair_head("everything is prefilled", "PrefixStore, marked prefix")
    store = PrefixStore(explicit.store_bytes, ttl_s=math.inf, clock=time.monotonic)
    apart_by, equal = [], 0
    for n, ids in enumerate(prompts):
        logits = {}
        for arm in in_turn(("bad", "good"), n):
            cached, ms, logits[arm] = explicit.ask(ids, [boundary], store if arm == "good" else None)
            predicted = boundary if arm == "good" and n > 0 else 0
            add_measurement(run, "explicit_store", arm, n, ids, cached, predicted, ttft_ms=ms)
        bad, good = run.measured("explicit_store", "bad"), run.measured("explicit_store", "good")
        run.print_pair(n, bad[-1], good[-1])
        apart_by.append(apart(logits["good"], logits["bad"]))
        equal += int(logits["good"].argmax() == logits["bad"].argmax())
    counts = f"{store.hits} hits, {store.misses} misses, {store.evictions} evictions"
    run.print(f"store: {counts}, {store.nbytes() / 1e6:.1f} MB held")

    _, spoilt = store.get(prompts[-1])  # a copy: the store is not harmed
    for layer in spoilt.layers:
        layer.values.mul_(-1)
    control = apart(explicit.prefill(prompts[-1], spoilt)[1], logits["bad"])
    largest = max(apart_by)
    run.print(f"first-token logits: cached and uncached {largest:.0e} apart; with corrupted KV {control:.1f}")
    run.print(time_verdict(bad[1:], good[1:]))
    evidence = f"{largest:.1e} apart at most, tolerance {explicit.tolerance:.0e} in float32"
    equal_logits = all(difference <= explicit.tolerance for difference in apart_by)  # not a number: not equal
    run.claim("logits from stored KV are those of a full prefill", equal_logits, evidence)
    run.claim("the next token is the same", equal == len(prompts), f"{equal} of {len(prompts)} requests")
    run.claim("corrupted KV does change the logits", control > explicit.tolerance, f"{control:.1e} apart")


def tiers(run: Run, explicit: ExplicitEngine) -> None:
    """Keep a system prompt, a conversation and four requests in one store, each by the rule of its tier."""
    now = 0.0
    names = ("system prompt", "conversation", "request, used again", "request, unused", "request", "another request")
    prefixes = {name: [6 + n] * 64 for n, name in enumerate(names)}  # which tokens does not matter
    kv = {name: explicit.prefill(prefix)[0] for name, prefix in prefixes.items()}
    store = PrefixStore(4 * kv_nbytes(kv["system prompt"]), ttl_s=300, clock=lambda: now)
    store.put(prefixes["system prompt"], kv["system prompt"], pinned=True)
    store.put(prefixes["conversation"], kv["conversation"])
    now = 200.0
    for name in ("request, used again", "request, unused"):
        store.put(prefixes[name], kv[name])
    now = 301.0
    store.get([*prefixes["request, used again"], 6])
    for name in ("request", "another request"):  # the second takes the place of the one that is unused
        store.put(prefixes[name], kv[name])
    kept = {name: store.key(prefix) in store.entries for name, prefix in prefixes.items()}
    run.print(f"\n[bold]Three tiers in one store[/] with room for four, after {now:.0f} s")
    rules = ("pinned", f"time to live, {store.ttl_s} s", "last used a moment ago", "last used longest ago")
    for name, rule in zip(names, rules, strict=False):
        run.print(f"{name:<22}{rule:<32}{'kept' if kept[name] else 'gone'}")
    right = list(kept.values()) == [True, False, True, False, True, True]
    evidence = f"kept: {', '.join(name for name in names if kept[name])}"
    run.claim("each tier keeps and drops by its rule", right, evidence)


def apart(logits: Tensor, others: Tensor) -> float:
    return float((logits - others).abs().max())


def add_measurement(
    run: Run, experiment: str, arm: str, n: int, ids: list[int], cached: int, predicted: int, **times: float
) -> None:
    """Put a request to the explicit engine, which is no worker and has no sessions, beside those to vLLM."""
    run.measurements.append(Measurement(experiment, arm, n, None, None, len(ids), cached, predicted, **times))


# --- the lesson, --deeper: further experiments ---

SAMPLES = 5
WRITTEN = 32  # tokens
BECAUSE = {
    "right": "all that is static",
    "too early": "the rest is left out",
    "too late": "nobody's data is in",
    "inside a token": "other tokens there",
}


def inside_a_token(model: Model, static: str, whole: list[int], boundary: int) -> list[int] | None:
    """Return the tokens of a beginning of `static` that ends a block in the middle of a word, None where none does.

    Cut there, the text ends with another token than the whole text has in this place.
    """
    block_ends = range(model.whole_blocks(boundary), 0, -model.block_size)
    for block_end in block_ends[:40]:
        about = len(model.tokenizer.decode(whole[:block_end]))
        for place in range(max(1, about - 12), min(about + 12, len(static))):
            ids = model.tokens(static[:place])
            in_a_word = static[place - 1 : place + 1].isalpha()
            if in_a_word and len(ids) == block_end and ids != whole[:block_end]:
                return ids
    return None


def boundary_places(model: Model, prompt: str, boundary: int) -> dict[str, list[int]]:
    """Return what is primed, as token ids, with the boundary where it belongs and where it does not."""
    chat = good_messages(prompt, 0)
    text, whole = model.render(chat), model.encode(chat)
    static = text[: text.index(reader(0))]  # as rendered
    primed = {
        "right": whole[:boundary],
        "too early": whole[: boundary // 2],
        "too late": model.tokens(static + reader(0)),
    }
    if inside := inside_a_token(model, static, whole, boundary):  # not every text has such a place
        primed["inside a token"] = inside
    return primed


async def boundaries_on_vllm(run: Run, engine: Engine, primed: dict[str, list[int]], whole: list[int]) -> None:
    """Prime with each boundary in turn, then let the first user come, from an empty cache each time."""
    for n, (name, ids) in itertools.product(range(SAMPLES), primed.items()):
        await engine.reset()
        await engine.ask(ids, "boundary", f"{name}, primed", n)
        await engine.ask(whole, "boundary", name, n)


def boundaries_in_store(run: Run, explicit: ExplicitEngine, primed: dict[str, list[int]], whole: list[int]) -> None:
    """The same with the store, which knows no prefix but those that were marked; then the table of both."""
    row = "{:<16}{:>7}{:>7}{:>10}{:>8}{:>10}  {}"
    run.print("\n[bold]Where the boundary stands[/]: what the first user finds, on vLLM and in the store")
    run.print(row.format("boundary", "primed", "vLLM", "TTFT", "store", "TTFT", "because"))
    on_vllm, in_store = {}, {}
    for name, ids in primed.items():
        exact = len(ids) if whole[: len(ids)] == ids else 0
        for n in range(SAMPLES):
            store = PrefixStore(explicit.store_bytes, ttl_s=math.inf, clock=time.monotonic)
            store.put(ids, explicit.prefill(ids)[0])
            cached, ms, _ = explicit.ask(whole, [], store)
            add_measurement(run, "boundary_store", name, n, whole, cached, exact, ttft_ms=ms)
        vllm, own = run.measured("boundary", name), run.measured("boundary_store", name)
        on_vllm[name], in_store[name] = vllm[0].cached_tokens, own[0].cached_tokens
        cells = [f"{on_vllm[name]:,}", milliseconds(median_ms(vllm))]
        cells += [f"{in_store[name]:,}", milliseconds(median_ms(own))]
        run.print(row.format(name, f"{len(ids):,}", *cells, BECAUSE[name]))

    right, early, late = on_vllm["right"], on_vllm["too early"], on_vllm["too late"]
    run.claim("a boundary too early leaves less to find", early < right, f"{early:,} of {right:,} tokens")
    only_on_vllm = in_store["too late"] == 0 and late >= right
    evidence = f"{in_store['too late']:,} tokens in the store, {late:,} on vLLM"
    run.claim("a boundary too late: nothing in the store, on vLLM all that is static", only_on_vllm, evidence)
    if "inside a token" in primed:
        lost = len(primed["inside a token"]) - on_vllm["inside a token"]
        run.claim("a boundary inside a token loses a block", lost >= run.model.block_size, f"{lost} tokens")


def kv_cache(run: Run, explicit: ExplicitEngine, ids: list[int]) -> None:
    """Write with the KV of the tokens before and without it: what is called KV cache is this, within one request."""
    run.print(f"\n[bold]The KV cache itself[/]: {WRITTEN} tokens written, the KV of the tokens before kept or not")
    run.print(f"{'':<9}{'KV KEPT':>11}{'':>27}{'NOT KEPT'}")
    run.print(f"{'prompt':>7}" + f"{'first':>11}{'next':>10}{'computed':>11}" * 2)
    same = once = 0
    for n, part in enumerate((8, 4, 2)):
        prompt, texts, computed = ids[: len(ids) // part], {}, {}
        for arm in in_turn(("kept", "not kept"), n):
            texts[arm], times, computed[arm] = explicit.write(prompt, WRITTEN, keep_kv=arm == "kept")
            first, *later = times
            add_measurement(run, "kv_cache", arm, n, prompt, 0, 0, ttft_ms=first, tpot_ms=statistics.median(later))
        row = f"{len(prompt):>7,}"
        for arm in ("kept", "not kept"):
            m = run.measured("kv_cache", arm)[n]
            row += f"{milliseconds(m.ttft_ms):>11}{milliseconds(m.tpot_ms):>10}{computed[arm]:>11,}"
        run.print(row)
        same += int(texts["kept"] == texts["not kept"])
        once += int(computed["kept"] == len(prompt) + WRITTEN - 1)  # the last one written is not computed any more
    run.claim("the text is the same with the KV kept and without", same == 3, f"{same} of 3 prompts")
    run.claim("with the KV kept each token is computed once", once == 3, f"{once} of 3 prompts")
    print_two_caches(run)


def print_two_caches(run: Run) -> None:
    """Tell the two caches apart, with what each was measured to save."""
    kept, not_kept = (run.measured("kv_cache", arm)[-1] for arm in ("kept", "not kept"))
    cold, warm = (median_ms(run.measured("explicit_store", arm)[1:]) for arm in ("bad", "good"))
    rows = {
        "": ("KV cache", "prefix cache"),
        "is kept for": ("one request", "all requests"),
        "by": ("the model's own loop", "the service: a store, vLLM"),
        "spares": ("repeated work in decoding", "repeated prefill"),
        "grows with": ("length x tokens written", "length of the prefix"),
        "measured": (
            f"next token {milliseconds(not_kept.tpot_ms)} to {milliseconds(kept.tpot_ms)}",
            f"TTFT {milliseconds(cold)} to {milliseconds(warm)}",
        ),
    }
    run.print("")
    for name, (one, other) in rows.items():
        run.print(f"{name:<13}{one:<33}{other}")


# --- the questions: predict first; the same in all four lessons ---

from typing import NamedTuple


class Question(NamedTuple):
    """How many tokens of `ids` does a request of the main experiment find, when `before` is what was sent before it?"""

    text: str
    arm: str
    request: int
    before: list[int]
    ids: list[int]
    session: str | None = None

    def layout(self) -> str:
        """Tell from the top what is the same as before and what is new, and what of the rest is the same again."""
        before, now = ("".join(map(chr, ids)) for ids in (self.before, self.ids))  # texts can be searched
        front = common_prefix(before, now)
        again = common_prefix(before[front:][::-1], now[front:][::-1])  # at the end
        middle, new = (front + len(now)) // 2, len(now) - front - again
        at = before.find(now[middle : middle + 64])
        if at >= 0:  # or around the middle
            left = common_prefix(before[:at][::-1], now[front:middle][::-1])
            right = common_prefix(before[at:], now[middle:])
            again, new = max((again, new), (left + right, middle - left - front))
        again_is = "the same again" if new else "the same but moved up"  # nothing is new before it: something is gone
        parts = (front, "the same"), (new, "new"), (again, again_is), (len(now) - front - new - again, "new")
        return f"{', '.join(f'{tokens:,} {what}' for tokens, what in parts if tokens)}: {len(now):,} tokens"


def read_line() -> str:
    """Read one line byte by byte: what a pipe holds behind it is for the next question, or the next lesson."""
    line = b""
    while len(line) < 80 and (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode(errors="replace").strip()


def predict_first(run: Run, questions: list[Question]) -> list[int | None]:
    """With --predict let the student say, before anything is measured, what each request finds; None: no answer."""
    answers: list[int | None] = []
    if not run.args.predict:
        return answers
    run.print(f"[bold]Predict first:[/] how many tokens are found, in blocks of {run.model.block_size}? (Enter skips)")
    for number, question in enumerate(questions, 1):
        run.print(f"{number}. {question.text}:\n   {question.layout()}", markup=False)
        for again in ("", "a whole number, or Enter "):
            run.print(f"   {again}> ", end="")
            line = read_line()
            is_number = line.isascii() and line.isdigit()
            run.print("" if os.isatty(0) else shown(line), markup=False)  # a terminal shows it by itself
            if is_number or not line:
                break
        answers.append(int(line) if is_number else None)
    run.print("")
    return answers


def tell_score(run: Run, questions: list[Question], answers: list[int | None]) -> None:
    """Hold each answer against what was measured, with the reason, and keep all of it for the JSON."""
    size, told, verdicts = run.model.block_size, [], ["exact", "within one block", "off"]
    for question, answer in zip(questions, answers, strict=False):
        of_session = [m for m in run.measured("main", question.arm) if m.session == question.session]
        [m] = [m for m in of_session if m.request == question.request]
        same, verdict = common_prefix(question.before, question.ids[:-1]), "skipped"
        if answer is not None:
            off = abs(answer - m.cached_tokens)
            verdict = verdicts[0 if off == 0 else 1 if off <= size else 2]
        why = f"{same:,} are the same: {same // size:,} whole blocks"
        told.append(dict(question=question.text, answer=answer, measured=m.cached_tokens, verdict=verdict, why=why))
        said = "-" if answer is None else f"{answer:,}"
        run.print("" if len(told) > 1 else f"\n[bold]{'you said':>10}{'found':>9}\n", end="")
        run.print(f"{said:>10}{m.cached_tokens:>9,}  {verdict:<18}{why}")
    if told:
        counts = [sum(row["verdict"] == verdict for row in told) for verdict in verdicts]
        run.print("{} exact, {} within one block, {} off".format(*counts))
        run.result["predictions"] = told


# --- the instrument: how it is measured; the same in all four lessons ---

import dataclasses
import itertools
import statistics
import time
import uuid
from collections.abc import Iterable, Iterator

OUTPUT_TOKENS = 64  # the most that a lesson lets a request generate


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One request: what was sent, what was predicted, what vLLM reported, and what the client's clock showed.

    TTFT is the time from the call to the first streamed output. It has three parts: `client_ms` (tokens in, hashed by
    block, and out), `waiting_ms` (queued until scheduled), and `step_ms` (the blocks found, and one forward pass). The
    last two are vLLM's own time stamps.
    """

    experiment: str
    arm: str
    request: int
    worker: int | None
    session: str | None
    prompt_tokens: int
    cached_tokens: int  # vLLM's num_cached_tokens
    predicted_cached_tokens: int
    ttft_ms: float
    error: None = None  # a request over HTTP may have one; one that fails here ends the lesson
    engine_ttft_ms: float | None = None
    waiting_ms: float | None = None
    step_ms: float | None = None
    client_ms: float | None = None
    tpot_ms: float | None = None  # decoding: first token to last, per token

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


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


class Engine:
    """vLLM's AsyncLLMEngine with the cache model beside it: token ids go in, measurements come out."""

    def __init__(self, vllm_engine, counters: CacheCounters, all_measured: list[Measurement], worker: int | None):
        cache = vllm_engine.vllm_config.cache_config
        self.vllm_engine, self.counters, self.all_measured, self.worker = vllm_engine, counters, all_measured, worker
        self.block_size: int = cache.block_size
        self.kv_cache_tokens: int = cache.num_gpu_blocks * cache.block_size
        self.cache_model = CacheModel(self.block_size)
        self.prompt_tokens = self.cached_tokens = 0  # of all requests, to be held against vLLM's counters
        self.output = None  # vLLM's RequestOutput of the latest request

    async def ask(
        self, ids: list[int], experiment: str, arm: str, request: int, *, session: str | None = None,
        salt: str | None = None, **sampling: object,
    ) -> Measurement:  # fmt: skip
        """Predict, send one prompt, read its stream to the end, and return both.

        A `salt` keeps equal prompts of different arms apart in the cache. `sampling` are fields of vLLM's
        SamplingParams beside these: one token, the likeliest, not made into text, which nobody reads here.
        """
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        predicted, first, output = self.cache_model.cached_tokens(ids, salt), None, None
        defaults = dict(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
        prompt, params = tokens_input(ids, cache_salt=salt), SamplingParams(**defaults | sampling)
        sent = time.perf_counter()
        try:
            async for output in self.vllm_engine.generate(prompt, params, str(uuid.uuid4())):  # noqa: B007, read below
                first = first or time.perf_counter()
        except EngineDeadError as error:
            raise EngineError("the engine died") from error
        if first is None or output is None:
            raise EngineError(f"{experiment}, {arm}, request {request}: the stream ended without a token")
        self.output, written = output, output.outputs[0].token_ids
        self.cache_model.store([*ids, *written[:-1]], salt)  # nothing followed the last token, so it has no KV yet
        self.prompt_tokens += len(ids)
        self.cached_tokens += output.num_cached_tokens
        stats, ttft = output.metrics, first - sent
        engine_ttft, decoding = stats.first_token_ts - stats.queued_ts, stats.last_token_ts - stats.first_token_ts
        self.all_measured.append(
            Measurement(
                *(experiment, arm, request, self.worker, session, len(ids), output.num_cached_tokens, predicted),
                ttft_ms=ttft * 1000,
                engine_ttft_ms=engine_ttft * 1000,
                waiting_ms=(stats.scheduled_ts - stats.queued_ts) * 1000,
                step_ms=(stats.first_token_ts - stats.scheduled_ts) * 1000,
                client_ms=(ttft - engine_ttft) * 1000,
                tpot_ms=decoding * 1000 / (len(written) - 1) if len(written) > 1 else None,
            )
        )
        return self.all_measured[-1]

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


def in_turn(arms: Iterable, n: int) -> list:
    """Return the arms in the order of round n: bad good, good bad, ..., so that a drifting machine favours neither."""
    return list(arms) if n % 2 == 0 else list(arms)[::-1]


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return how many leading tokens two prompts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def hit_rate(measured: list[Measurement]) -> float:
    return sum(m.cached_tokens for m in measured) / sum(m.prompt_tokens for m in measured)


def median_ms(measured: list[Measurement], what: str = "ttft_ms") -> float:
    return statistics.median(getattr(m, what) for m in measured)


def time_verdict(bad: list[Measurement], good: list[Measurement], alone: bool = True) -> str:
    """Say what TTFT did and no more: a speed-up only where the two ranges lie apart.

    The bound is what computing fewer tokens can give at most. Requests that are not `alone` also wait, so have none.
    """
    slow, fast = median_ms(bad), median_ms(good)
    change = f"{milliseconds(slow)} to {milliseconds(fast)}"
    if slow <= fast:
        return f"TTFT did not improve ({change}): nothing gained at this prompt length."
    if min(m.ttft_ms for m in bad) <= max(m.ttft_ms for m in good):
        return f"TTFT went from {change}, but the ranges overlap: no speed-up is shown."
    bound = sum(m.computed_tokens for m in bad) / sum(m.computed_tokens for m in good)
    limit = f"of at most {bound:.0f}x" if slow / fast <= bound else f"with {bound:.0f}x fewer"
    return f"TTFT fell from {change}: {slow / fast:.1f}x" + (f" {limit} (tokens computed)." if alone else ".")


# --- the plumbing: skip this; the same in all four lessons ---

import argparse
import asyncio
import contextlib
import ctypes
import errno
import fcntl
import gc
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
GRAPH_TOKENS = 2048  # the longest step that is captured as a CUDA graph: each size takes memory and time
BROKEN_FILES = ArithmeticError, AttributeError, KeyError, OSError, TypeError, ValueError  # by readers of a model's
NOWHERE_TO_WRITE = errno.EIO, errno.ENOSPC, errno.EPIPE  # a terminal, a disk, or a reader is gone
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")


class LessonError(Exception):
    """A foreseeable fault, told in one line that says what to do; `status` is 2 for wrong usage."""

    status = 1


class UsageError(LessonError):
    status = 2


class EngineError(LessonError):
    """vLLM failed; the root cause is in its log."""


class Model:
    """What is known of a model, and of the machine, before an engine is started. Nothing of it changes."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoTokenizer
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform

        if not current_platform.device_type:
            raise LessonError("this vLLM was built for a GPU that does not answer: run `python3 setup_and_test.py`")
        self.on_gpu: bool = not current_platform.is_cpu()
        self.gpu_memory: int = current_platform.get_device_total_memory() if self.on_gpu else 0  # bytes, of one GPU
        self.name = name if args.model else built_in_model(self.gpu_memory // (args.workers * args.fleets))
        folder = Path(self.name)
        is_folder = args.model is None or Path(args.model).is_dir()
        self.label = f"{folder.parent.name}/{folder.name}" if is_folder else args.model
        self.has_weights = not folder.is_dir() or any(list(folder.glob(kind)) for kind in WEIGHT_FILES)
        # Blocks of 32 on a GPU: of 16 twice as many are hashed, of 128 a hit computes more. "uni": in the engine's own
        # process. The cache's size is given, the utilization but a check. A hybrid manager drops what windows left.
        self.engine_args = dict(
            model=self.name, trust_remote_code=False, load_format="auto" if self.has_weights else "dummy",
            block_size=args.block_size or (32 if self.on_gpu else None), distributed_executor_backend="uni",
            gpu_memory_utilization=0.1, max_num_seqs=16, disable_hybrid_kv_cache_manager=True,
            worker_extension_cls=f"{__name__}.{WorkerExtension.__name__}",
        )  # fmt: skip
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.name, mistral_format=False, trust_remote_code=False)
            config = AsyncEngineArgs(**self.engine_args, enforce_eager=True).create_engine_config()
        except (*BROKEN_FILES, StrictDataclassError) as error:
            fault = EngineError if "the logs" in str(error) else LessonError  # the log is shown with an EngineError
            raise fault(f"vLLM cannot use the model in {self.name}: {telling_line(error)}") from error
        if not self.count("one two three"):
            raise LessonError(f"{self.name} has no tokenizer that makes tokens of a text")
        shape, parallel = config.model_config, config.parallel_config
        if shape.is_hybrid or shape.is_attention_free or shape.is_encoder_decoder or shape.runner_type != "generate":
            raise LessonError(f"{self.name} is not a full-attention model that writes; no hits can be predicted here")
        self.block_size: int = config.cache_config.block_size
        self.hash_algo: str = config.cache_config.prefix_caching_hash_algo
        self.dtype, self.vocabulary, self.max_model_len = shape.dtype, shape.get_vocab_size(), shape.max_model_len
        full = "full_attention" in (shape.hf_text_config.to_dict().get("layer_types") or ())
        self.window: int | None = None if full else shape.get_sliding_window() or shape.attention_chunk_size
        numbers = 2 * shape.get_num_layers(parallel) * shape.get_num_kv_heads(parallel) * shape.get_head_size()
        self.kv_bytes_per_token: int = numbers * shape.dtype.itemsize

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def count(self, text: str) -> int:
        return len(self.tokens(text))

    def render(self, messages: list[dict], answer: bool = True) -> str:
        """Return a chat as the template writes it, to where the answer begins or the last message ends."""
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=answer, tokenize=False)
        except (*BROKEN_FILES, RecursionError, TemplateError) as error:
            raise LessonError(f"the model's chat template does not take this prompt: {telling_line(error)}") from error
        for message in messages:
            lines = [line.strip() for line in message["content"].splitlines() if line.strip()]
            if text and lines and not any(line in text for line in lines):
                raise LessonError(f"the chat template leaves {message['role']} messages out: choose another --model")
        return text

    def encode(self, messages: list[dict], answer: bool = True) -> list[int]:
        """Return the token ids of a chat; the template writes the special tokens itself."""
        ids = self.tokens(self.render(messages, answer))
        if not 0 <= max(ids, default=-1) < self.vocabulary:
            fault = "knows no tokens of" if ids else "writes nothing of"
            raise LessonError(f"the model in {self.name} {fault} this prompt: its files do not fit together")
        return ids

    def whole_blocks(self, tokens: int) -> int:
        return tokens // self.block_size * self.block_size

    def kv_bytes(self, prompts: int, tokens: int) -> int:
        """Return the size of the KV of so many prompts of so many tokens each, in whole blocks."""
        return prompts * self.whole_blocks(tokens + self.block_size - 1) * self.kv_bytes_per_token

    def suffix(self, prompts: list[list[int]]) -> int:
        """Return the most tokens that are computed of a prompt that comes after the one before it."""
        pairs = itertools.pairwise(prompts)
        return max(len(after) - self.whole_blocks(common_prefix(before, after)) for before, after in pairs)

    def check_length(self, tokens: int) -> None:
        """Raise UsageError where the model takes no prompt and answer of so many tokens, or looks not back so far."""
        limit = f"prompt and answer need {tokens:,} tokens, the model takes {self.max_model_len:,}"
        if self.window and self.window < self.max_model_len:
            limit = f"every layer of this model has a sliding window, of {self.window:,} tokens"
        if tokens > min(self.window or tokens, self.max_model_len):
            raise UsageError(f"{limit}: choose a shorter prompt (--prefix-tokens), or another --model")


class WorkerExtension:
    """What vLLM's worker is asked beyond its own methods: it alone knows what its attention backend takes."""

    def execution(self) -> str:
        """Say how prefill steps run: kernels replayed as one CUDA graph, or launched one by one."""
        return "CUDA graphs" if str(self.vllm_config.compilation_config.cudagraph_mode) == "FULL" else "eager"


class Run:
    """One run of a lesson: its model and engines, and all that it prints, claims and writes."""

    def __init__(self, args: argparse.Namespace, terminal) -> None:
        from rich.console import Console

        self.args, self.console = args, Console(file=terminal, width=80, highlight=False, soft_wrap=True)
        self.print = self.console.print  # a row stays one row, so that tests see it where it has more than 80 columns
        self.engines: list[Engine] = []
        self.measurements: list[Measurement] = []  # in the order of time
        self.claims: list[dict] = []
        self.seconds = dict.fromkeys(("imports", "engine_start", "warm_up", "measuring"), 0.0)
        try:
            name = find_model(args.model) if args.model else built_in_model(0)  # is it there? that costs no import
            with self.timed("imports", "Importing vLLM..."):
                gc.disable()  # imports leave no garbage; to look for it takes a quarter of their time
                import torch
                import transformers
                import vllm
                from vllm import AsyncLLMEngine  # noqa: F401, the engine is imported here, too
                from vllm.platforms import current_platform

                gc.freeze(), gc.enable()
        except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
            raise LessonError(f"cannot import vLLM: {telling_line(error)}; is a library or memory missing?") from error
        self.model = model = Model(args, name)
        if args.prefix_tokens is None:
            args.prefix_tokens = 8000 if model.on_gpu else 4000
        if 0 < args.prefix_tokens < 2 * model.block_size:
            raise UsageError(f"--prefix-tokens must be at least two blocks, {2 * model.block_size} tokens here")
        model.check_length(args.prefix_tokens + OUTPUT_TOKENS)
        cores = len(os.sched_getaffinity(0))
        command = [re.sub(r"(^|=)/(?:\S*/)?", r"\1", word) for word in sys.orig_argv[1:]]  # no path of this machine
        script, config = Path(sys.argv[0]).stem, Path(model.name) / "config.json"
        title, *_ = (sys.modules["__main__"].__doc__ or script).splitlines()  # under -OO there is no docstring
        self.environment = {
            "vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": sys.version.split()[0], "model": model.label,
            "device": current_platform.get_device_name() if model.on_gpu else f"CPU ({cores} cores)",
            "weights": "real" if model.has_weights else "random", "dtype": str(model.dtype).removeprefix("torch."),
            "block_size": model.block_size, "prefix_caching_hash_algo": model.hash_algo,
            "prefix_tokens": args.prefix_tokens, "requests": args.requests,
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": " ".join(["python", *command]),
            "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config.exists() else None,
        }  # fmt: skip
        self.result = {
            "schema": 1, "lesson": script, "title": title, "environment": self.environment,
            "seconds": self.seconds, "measurements": self.measurements, "claims": self.claims,
        }  # fmt: skip

    def measured(self, experiment: str, arm: str) -> list[Measurement]:
        return [m for m in self.measurements if (m.experiment, m.arm) == (experiment, arm)]

    def claim(self, claim: str, holds: bool, evidence: str) -> None:
        self.claims.append({"claim": claim, "holds": holds, "evidence": evidence})

    @contextlib.contextmanager
    def timed(self, what: str | None, label: str = "") -> Iterator[None]:
        """Add the seconds that pass inside to `seconds[what]`; a terminal shows the label and counts along."""
        from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

        began, hidden = time.perf_counter(), not (label and self.console.is_terminal)
        hide = dict(disable=hidden, redirect_stdout=False, redirect_stderr=False)  # else a forked engine prints here
        with Progress(SpinnerColumn(), label, TimeElapsedColumn(), console=self.console, transient=True, **hide) as bar:
            bar.add_task(label)
            yield
        if what:
            self.seconds[what] += time.perf_counter() - began

    def start_engine(self, graph_tokens: int, worker: int | None = None, **arguments: object) -> Engine:
        """Start vLLM with these of its AsyncEngineArgs beside those of all lessons; UsageError, or EngineError.

        On a GPU a step of up to `graph_tokens` is one replay of a CUDA graph where vLLM can capture one, else eager.
        """
        from vllm import AsyncEngineArgs, AsyncLLMEngine
        from vllm.platforms import current_platform

        self.model.check_length(arguments["max_model_len"])
        counters, capture, eager = CacheCounters(), graph_sizes(graph_tokens), {"enforce_eager": True}
        graphs = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": capture}}
        for way in [graphs, eager] if current_platform.is_cuda_alike() else [eager]:
            try:
                config = AsyncEngineArgs(**self.model.engine_args | arguments | way).create_engine_config()
                if arguments["enable_prefix_caching"] and not config.cache_config.enable_prefix_caching:
                    raise LessonError(f"vLLM has no prefix caching for {self.model.name} here: choose another --model")
                os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # what is imported here need not be once more
                vllm_engine = AsyncLLMEngine.from_vllm_config(config, stat_loggers=[lambda *_: counters])
                break
            except (MemoryError, OSError, RuntimeError, ValueError) as error:
                if way is eager:
                    raise EngineError("vLLM did not start") from error
        engine = Engine(vllm_engine, counters, self.measurements, worker)
        self.engines.append(engine)
        if engine.block_size != self.model.block_size:  # some backends decide only once the engine is there
            raise UsageError(f"this device wants other blocks: add --block-size {engine.block_size}")
        return engine

    def end_engine(self, engine: Engine) -> None:
        """End vLLM's processes at once, which have nothing left to save, and wait until their memory is free."""
        processes = engine.vllm_engine.engine_core.resources.engine_manager.processes
        engine.vllm_engine.shutdown(timeout=0)
        for process in processes:
            process.join()

    async def warm_up(self, length: int, suffix: int) -> None:
        """Warm up all engines at once, and print what the numbers will depend on."""
        with self.timed("warm_up", "Warming up..."):
            await asyncio.gather(*(engine.warm_up(length, suffix) for engine in self.engines))
        [execution] = await self.engines[0].vllm_engine.collective_rpc("execution")
        self.environment |= {"kv_cache_tokens": self.engines[0].kv_cache_tokens, "execution": execution}
        banner = (
            "vLLM {vllm} on {device}, {model} with {weights} weights, {dtype}\n"
            "blocks of {block_size} tokens ({prefix_caching_hash_algo}), KV cache of {kv_cache_tokens:,} tokens, "
            "{execution}\nimports {imports:.1f} s, engine start {engine_start:.1f} s, warm-up {warm_up:.1f} s\n"
        ).format_map(self.environment | self.seconds)
        self.print("\n".join(map(shown, banner.split("\n"))), markup=False, soft_wrap=False)  # names may be long

    def bar(self, share: float, width: int) -> str:
        return ("\u2588" if self.console.encoding.startswith("utf") else "#") * round(width * share)

    def print_pair_head(self, bad: str, good: str) -> None:
        columns = f"{'TTFT':>8}{'cached / prompt':>17}{'predicted':>10}"
        self.print(f"{'':7}[bold red]{'BAD: ' + bad:<37}[bold green]GOOD: {good}")
        self.print(f"{'':7}{columns}  {columns}")

    def print_pair(self, request: int, *measured: Measurement) -> None:
        row = f"{request:<3}{'' if request else 'fill':4}"
        for m in measured:
            counts = f"{m.cached_tokens:>8,} / {m.prompt_tokens:<6,}{m.predicted_cached_tokens:>10,}"
            row += f"{milliseconds(m.ttft_ms):>8}{counts}  "
        self.print(row.rstrip())

    def print_comparison(self, *arms: list[Measurement]) -> None:
        rows = {
            "hit rate (cached / prompt tokens)": [f"{hit_rate(arm):.1%}" for arm in arms],
            "tokens computed": [f"{sum(m.computed_tokens for m in arm):,}" for arm in arms],
            "TTFT, median": [milliseconds(median_ms(arm)) for arm in arms],
            "TTFT, range": [ttft_range(arm) for arm in arms],
        }
        self.print(f"\n[bold]{'without request 0':<36}{'bad':>20}{'good':>20}")
        for name, (bad, good) in rows.items():
            self.print(f"{name:<36}{bad:>20}{good:>20}")

    def print_break(self, which: str, before: list[int], after: list[int]) -> None:
        """Show where two prompts first differ, and which blocks that costs."""
        at, blocks = common_prefix(before, after), len(after) // self.model.block_size
        lost = blocks - at // self.model.block_size
        self.print(f"\n{which} first differ at token {at:,} of {len(after):,}: {lost} of {blocks} blocks lost")
        texts = [self.model.tokenizer.decode(ids[max(0, at - 24) : at + 6]) for ids in (before, after)]
        self.result["break"] = dict(token=at, of=len(after), blocks_lost=lost, blocks=blocks, texts=texts)
        for text in map(repr, texts):
            most = 78 if text.isascii() else 39  # others may take two columns each
            self.print(f"  {text if len(text) <= most else f'...{text[3 - most :]}'}", markup=False)

    def finish(self) -> int:
        """Check every prediction, print the failed claims, write the JSON, and return the exit status."""
        wrong = [m for m in self.measurements if m.cached_tokens != m.predicted_cached_tokens]
        evidence = f"{len(self.measurements) - len(wrong)} of {len(self.measurements)} requests"
        for m in wrong[:1]:
            evidence += f"; first in {m.experiment}, {m.arm}, request {m.request}: "
            evidence += f"{m.cached_tokens:,} cached, {m.predicted_cached_tokens:,} predicted"
        self.claim("predicted = measured cached tokens on every request", not wrong, evidence)
        counted = sum(e.counters.hits for e in self.engines), sum(e.counters.queries for e in self.engines)
        summed = sum(e.cached_tokens for e in self.engines), sum(e.prompt_tokens for e in self.engines)
        evidence = "hits / queries {:,} / {:,}; requests {:,} / {:,}".format(*counted, *summed)
        self.claim("vLLM's own counters agree with the requests", counted == summed, evidence)
        failed = [claim for claim in self.claims if not claim["holds"]]
        for claim in failed:
            self.print(f"\n[bold red]FAILED[/]: {claim['claim']}\n  {claim['evidence']}", soft_wrap=False)
        held = f"{len(self.claims) - len(failed)} of {len(self.claims)} claims about token counts hold"
        control = "\nthe control, without the cache: claims are meant to fail" if self.args.no_prefix_caching else ""
        self.print(f"\n{held}; measuring took {self.seconds['measuring']:.1f} s{control}")
        if self.args.json:
            write_json(self.args.json, self.result)
        return 1 if failed else 0


def milliseconds(value: float) -> str:
    """Write a time given in ms with three digits."""
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def ttft_range(measured: list[Measurement]) -> str:
    return " - ".join(milliseconds(end(m.ttft_ms for m in measured)) for end in (min, max))


def built_in_model(gpu_memory: int) -> str:
    """Return the folder of the largest built-in model for so many bytes of a GPU, with room to spare; 0: for a CPU."""
    gib = gpu_memory / 2**30  # cards of 40 and 12 GiB have a little less to show
    shape = "7b" if gib >= 39 else "1.5b" if gib >= 11 else "0.5b" if gib else "cpu"
    if not (HERE / "built_in_model").is_dir():
        raise LessonError("the built-in model is not beside this script: give --model a folder or a hub name")
    return str(HERE / "built_in_model" / shape)


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
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, snapshot_download

    http = sys.modules[errors.HTTPError.__module__.partition(".")[0]]  # httpx, under the name that the hub's client has
    try:  # what asks the hub later takes a minute to find out that it is not there
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
        return name
    except errors.HFValidationError as error:
        raise LessonError(f"{name} is no name that the hub takes: {telling_line(error)}") from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        if isinstance(error, errors.HfHubHTTPError) and (code := error.response.status_code) < 500:
            raise LessonError(f"the hub answers {code} for {name}: check the name, or run `hf auth login`") from error
        try:
            return snapshot_download(name, local_files_only=True)
        except OSError:
            raise LessonError(f"{name}: no folder, not downloaded, and the hub is out of reach") from error
    except (ImportError, OSError, ValueError, http.InvalidURL) as error:
        raise LessonError(f"cannot ask the hub: {telling_line(error)}; check HF_*, SSL_CERT_FILE, proxies") from error


def shown(text: str) -> str:
    """Return a text that is not ours as a terminal may have it: its control characters are seen, and do nothing."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def telling_line(error: BaseException) -> str:
    """Return the line of a message that says what is wrong; in pydantic's it is not the first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = next(filter(re.compile("Value ?[Ee]rror|TypeError: |Input should|Assertion").match, lines), lines[0])
    return line.partition(" [type=")[0][:250]


def root_cause(error: EngineError, log: str) -> str:
    """Return the first exception in an engine's log that does not just pass on another one."""
    causes = re.findall(r"^(?:\(.*?\) )?(?:ERROR .*?\] )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", log, re.MULTILINE)
    causes += re.findall(r"^.*\] +(assert .+)$", log, re.MULTILINE)  # one that says no more
    causes += [telling_line(error.__cause__ or error), "its process ended without a word, as one that is killed"]
    return next(cause for cause in causes if not re.search("root cause|exit status|Error raised in", cause))


def write_json(path: Path, content: dict) -> None:
    """Write all of `content` or nothing."""
    path = path.resolve()  # what a link points to is written, the link stays
    part = path.with_name(f"kv-{os.getpid()}.part")
    try:
        with part.open("x", encoding="utf-8") as file:  # anew: what a link there points to is not written
            file.write(json.dumps(content, indent=1, default=dataclasses.asdict) + "\n")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise LessonError(f"cannot write {path}: {error.strerror}") from error


def json_path(name: str) -> Path:
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(name).st_mode):
                raise OSError(0, "it is no regular file")
        tempfile.TemporaryFile(dir=Path(name).parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {name}: {error.strerror}") from error
    return Path(name)


def at_least(minimum: int, most: int = 10**18) -> Callable[[str], int]:
    def parse_number(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not minimum <= int(text) <= most:
            limit = f", {most:,} at most" if most < 10**18 else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}{limit}")
        return int(text)

    return parse_number


def lesson_parser(doc: str, requests: int) -> argparse.ArgumentParser:
    """Return the command line that all lessons share; `requests` is this lesson's default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(workers=1, fleets=1)  # engines at the same time; `fleets` of so many workers
    add = parser.add_argument
    add("--model", help="a folder or a hub name (default: built_in_model, random weights, no download)")
    add("--prefix-tokens", type=at_least(1), help="length of the static prompt (default: 4000, on a GPU 8000)")
    text = f"requests per arm; 0 fills the cache (default: {requests})"
    add("--requests", type=at_least(2, 1_000), default=requests, help=text)
    add("--block-size", type=at_least(1), help="tokens per block (default: 128 on a CPU, in steps of 32; 32 on a GPU)")
    add("--no-prefix-caching", action="store_true", help="the control: without the cache, claims must fail")
    add("--deeper", action="store_true", help="add this lesson's further experiments")
    add("--predict", action="store_true", help="in a lesson: say first how much will be found")
    add("--json", type=json_path, metavar="PATH", help="write every measurement to this file")
    add("--verbose", action="store_true", help="show the engine's own log")
    add("--check-options", action="store_true", help=argparse.SUPPRESS)  # by the runner, which knows none of them
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the values of the command line. An empty one is refused: an unset variable of a shell is one."""
    for word in sys.argv[1:]:  # none is repeated: it may be a key
        if not word or (word.startswith("--") and word.endswith("=")):
            parser.error("there is an empty value among the arguments")
        if re.search(r"[\x00-\x1f\x7f-\x9f]", word):
            parser.error("there is a control character among the arguments")
    args = parser.parse_args()
    files = [os.path.realpath(word.rpartition("=")[2]) for word in sys.argv[1:]]
    if args.json and args.json.exists() and files.count(os.path.realpath(args.json)) > 1:
        parser.error("--json names a file that is read, and would be lost")
    return args


def use_python_with_vllm() -> None:
    """Go on in the .venv beside the lesson where this Python has no vLLM."""
    script = Path(sys.argv[0]).name
    if sys.version_info < (3, 11):
        sys.exit(f"{script}: error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    venv = HERE / ".venv"
    if importlib.util.find_spec("vllm") is None:
        if not (venv / "complete").is_file() or Path(sys.prefix).resolve() == venv.resolve():
            sys.exit(f"{script}: error: no vLLM in {sys.executable}: run `python3 setup_and_test.py` first")
        os.execv(venv / "bin" / "python", [str(venv / "bin" / "python"), *sys.orig_argv[1:]])


def end_with_parent(parent: int, libc: ctypes.CDLL) -> None:
    """Let the kernel end this process with the thread that made it (prctl(2)): asyncio's threads live long enough."""
    libc.prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it was too late
        os._exit(1)


def prepare_process(engines: int) -> Path:
    """Make this process fit to start `engines` engines, which end with it; return its folder, which a lock protects."""
    base = tempfile.gettempdir()
    base = base if len(base) <= 50 else "/tmp"  # a socket's path has 107 bytes at most, and vLLM adds 37
    for left in Path(base).glob("kv-lesson-*/"):  # of runs that were killed
        with contextlib.suppress(OSError):  # another user's, in use, or gone by now
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(descriptor)
    folder = Path(tempfile.mkdtemp(prefix="new-kv-lesson-", dir=base))  # "new": not old, and not yet locked
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)
    folder = folder.rename(folder.with_name(folder.name.removeprefix("new-")))
    libc, forked_by = ctypes.CDLL(None), []  # an engine may fork in its turn
    os.register_at_fork(before=lambda: forked_by.append(os.getpid()))
    os.register_at_fork(after_in_child=lambda: end_with_parent(forked_by[-1], libc))
    # Several engines share the cores; one alone leaves one to the client, as vLLM does where it binds threads itself.
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores - 1 if engines == 1 else cores // engines)
    # Without vLLM's multiprocessing of its own the CPU platform, too, lets the model run in the engine's process.
    os.environ.update(OMP_NUM_THREADS=str(threads), VLLM_ENABLE_V1_MULTIPROCESSING="0", TMPDIR=str(folder))
    os.environ.update(VLLM_NO_USAGE_STATS="1", TOKENIZERS_PARALLELISM="false", VLLM_HOST_IP="127.0.0.1")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # like VLLM_HOST_IP: whatever this host is called
    tempfile.tempdir = str(folder)
    return folder


def run_lesson(args: argparse.Namespace, measure: Callable[[Run], Awaitable[None]]) -> int:
    """Run a lesson with its engines' output in a log file, and return the exit status."""
    if args.check_options:
        return 0
    if sys.stdout is None or sys.stderr is None:
        sys.exit(f"{Path(sys.argv[0]).name}: error: standard output is closed: there is nowhere to print to")
    use_python_with_vllm()
    pid, folder = os.getpid(), None
    out = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="replace")
    err = os.fdopen(os.dup(2), "w", 1, encoding=sys.stderr.encoding, errors="replace")  # by lines: nobody flushes it

    def leave() -> None:
        for engine in multiprocessing.active_children():  # they write into the folder
            engine.kill(), engine.join()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)

    def stop(signum: int, _: object) -> None:
        signal.signal(signum, lambda *_: None)  # once is enough
        if os.getpid() == pid:  # an engine that is just being made has this handler, too
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(err.fileno(), b"\x1b[?25h\ninterrupted\n" if err.isatty() else b"interrupted\n")
            leave()
        os._exit(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, stop)
    folder = prepare_process(args.workers)
    log = folder / "engine.log"
    with log.open("wb") as file:
        if not args.verbose:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.excepthook = lambda *bug: traceback.print_exception(*bug, file=err)  # shown all the same

    async def measure_and_finish(run: Run) -> int:
        try:
            await measure(run)
            return run.finish()
        finally:
            for engine in run.engines:
                run.end_engine(engine)

    try:
        told, status = "", asyncio.run(measure_and_finish(Run(args, out)))
        out.flush()
    except OSError as error:
        if error.errno not in NOWHERE_TO_WRITE:
            raise
        told, status = f"cannot write: {error.strerror}", 1
    except LessonError as error:
        told, status = str(error), error.status
        if isinstance(error, EngineError):
            told += f": {root_cause(error, log.read_text(errors='replace'))}"
            told += "" if args.verbose else f" (the engine's log: {shutil.copy(log, folder.with_suffix('.log'))})"
    finally:
        leave()
    if told:
        print(f"{Path(sys.argv[0]).name}: error: {shown(told)}", file=err)
    os._exit(status)  # all is written; to take an interpreter with vLLM in it apart takes two seconds


if "__mp_main__" in sys.modules:  # an engine's process that was not forked but spawned
    end_with_parent(os.getppid(), ctypes.CDLL(None))
if __name__ == "__main__":
    sys.exit(main())
