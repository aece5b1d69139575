"""Lesson 1: a stable prefix against a timestamp at the front of the prompt.

Before a language model writes its first token it must read the whole prompt:
for every token, every layer computes a key and a value. This is the prefill,
for a long prompt most of the time to first token (TTFT). vLLM keeps those keys
and values in blocks of tokens. A block is found again by a hash over its own
tokens and over all blocks before it (vLLM keeps no radix tree, as is sometimes
said). So a prompt that starts like an earlier one, token for token, skips the
common part, rounded down to whole blocks; from the first different token on,
everything is computed again, however equal the rest may be.

An agent sends its instructions, policies and tools with every request, and
often the current time as well. The two arms hold the same sentences:

  bad   the clock opens the system prompt: each request is new from the clock on
  good  the clock rides with the question: the long system prompt is the same

Before each request a ten-line model of the cache predicts how many tokens are
found. Where vLLM reports another number, or a claim about token counts does
not hold, the exit status is 1; no claim rests on a time. Request 0 of an
arm fills the cache and is left out of medians. The engine is warmed up first,
with other text, so that the slow first request of a process is not mistaken
for a cache miss. Weights may be random: no answer is read here.

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

# What is not defined here stands below: questions (predict_first), instrument (Engine, ...), plumbing (Run, ...).

# --- the lesson: two prompt layouts, sent to vLLM ---

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
    text = f"{INSTRUCTIONS}\n# Policies\n{POLICIES}\n# Tools\n"
    tools = tool_definitions()
    while (missing := tokens - count(text)) > 0:
        # Several tools between two counts, since counting is slow. Each has less than 200 tokens: one too many at most.
        for _ in range(1 + missing // 200):
            text += next(tools)
    return text


def clock(n: int) -> str:
    """Return the time of request `n`, computed and not read from a clock: no two requests share a second."""
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
    """Send bad and good in turn, print them side by side, and judge the token counts."""
    run.print_pair_head("the clock opens the prompt", "clock rides with the question")
    for n in range(run.args.requests):
        measured = {}
        for arm in in_turn(LAYOUTS, n):
            measured[arm] = await engine.ask(prompts[arm][n], "main", arm, n)
        run.print_pair(n, measured["bad"], measured["good"])
    bad, good = run.measured("main", "bad")[1:], run.measured("main", "good")[1:]
    run.print_comparison(bad, good)
    run.print_break("Two bad prompts", *prompts["bad"][:2])

    # What the prompts themselves allow: a cache finds whole blocks of what two prompts have in common from the top.
    shared_by_bad = max(common_prefix(a, b) for a, b in itertools.combinations(prompts["bad"], 2))
    before_clock = run.model.whole_blocks(shared_by_bad)
    static = run.model.whole_blocks(min(common_prefix(a, b) for a, b in itertools.pairwise(prompts["good"])))
    most_bad = max(m.cached_tokens for m in bad)
    least_good = min(m.cached_tokens for m in good)
    only_before_clock = most_bad <= before_clock < static
    evidence = f"at most {most_bad:,} tokens found, {before_clock:,} stand before the clock"
    run.claim("a bad request finds no more than what stands before the clock", only_before_clock, evidence)
    evidence = f"at least {least_good:,} tokens found, {static:,} are static"
    run.claim("a good request finds the whole static prefix", least_good >= static, evidence)
    length_gap = max(abs(b.prompt_tokens - g.prompt_tokens) for b, g in zip(bad, good, strict=True))
    evidence = f"{length_gap} tokens apart"
    run.claim("both arms send equally long prompts, within a block", length_gap < run.model.block_size, evidence)
    in_front = statistics.median(m.computed_tokens for m in bad)
    behind = statistics.median(m.computed_tokens for m in good)
    run.print(f"\nTokens computed per request: {in_front:,.0f} with the clock in front, {behind:,.0f} behind.")
    run.result["verdict"] = [time_verdict(bad, good)]
    run.print(*run.result["verdict"])


async def lesson(run: Run) -> None:
    """Make the prompts, start vLLM with room for them, and send them."""
    model, tokens = run.model, run.args.prefix_tokens  # the language model's tokenizer and limits; nothing runs yet
    system = system_prompt(tokens, model.count)
    prompts = {}
    with run.timed(None, "Making prompts..."):
        for arm, layout in LAYOUTS.items():
            prompts[arm] = [model.encode(layout(system, n)) for n in range(run.args.requests)]
    long_prompt = []  # twice as long, where the model takes it, for the further experiments
    if run.args.deeper:
        long_prompt = model.encode(good_messages(system_prompt(2 * tokens, model.count), 0))
        long_prompt = long_prompt[: model.max_model_len - OUTPUT_TOKENS]
    longest = max(map(len, [*prompts["bad"], *prompts["good"], long_prompt]))
    suffix = model.suffix(prompts["good"])  # what a hit leaves to compute
    length = longest + OUTPUT_TOKENS

    # An AsyncLLMEngine with these of vLLM's arguments. `engine.ask` predicts what its cache will find, sends token ids
    # with SamplingParams(max_tokens=1), times the first token, and reads what was found: num_cached_tokens.
    with run.timed("engine_start", "Starting vLLM..."):
        engine = run.start_engine(
            enable_prefix_caching=not run.args.no_prefix_caching,
            max_model_len=length,
            max_num_batched_tokens=length,  # a prompt is computed in one step
            kv_cache_memory_bytes=model.kv_bytes(8, length),  # eight prompts; what is found again was used a moment ago
            graph_tokens=suffix,  # ours: on a GPU, steps as short as a hit's are replayed as one CUDA graph
        )
    await run.warm_up(longest, suffix)
    questions = [
        Question("BAD, request 1, after request 0", "bad", 1, prompts["bad"][0], prompts["bad"][1]),
        Question("GOOD, request 1, after request 0", "good", 1, prompts["good"][0], prompts["good"][1]),
        Question("GOOD, request 0, after BAD, request 0", "good", 0, prompts["bad"][0], prompts["good"][0]),
    ]
    answers = predict_first(run, questions)
    with run.timed("measuring"):
        await pair(run, engine, prompts)
        tell_score(run, questions, answers)
        if run.args.deeper:
            await position_sweep(run, engine, system)
            await user_data(run, engine, system)
            lengths = await length_sweep(run, engine, long_prompt)
            anatomy(run, lengths)
            hashing(run, long_prompt[: lengths[-1]])
            await naive_speed_up(run, engine)


def main() -> int:
    return run_lesson(parse(lesson_parser(__doc__, requests=6)), lesson)


# --- the lesson, --deeper: further experiments ---

SAMPLES = 5
DECODED = 32  # tokens after the first one, to time decoding


def change_token(ids: list[int], at: int, n: int) -> list[int]:
    """Return `ids` with another token at `at`, for each n another one: no sample is to find an earlier one."""
    others = sorted(set(ids) - {ids[at]})
    return [*ids[:at], others[n], *ids[at + 1 :]]


def double_space(text: str, n: int) -> str:
    """Return `text` with its n-th space doubled: nobody sees it, and the tokens differ.

    The first one is after the first word: some templates strip what stands before it.
    """
    words = text.split(" ")
    words.insert(n + 1, "")
    return " ".join(words)


async def position_sweep(run: Run, engine: Engine, system: str) -> None:
    """Change one token at five places of one prompt; at 0 % the change is one more space between two words."""
    row = "{:<18}{:>16}{:>14}{:>20}  {}"
    run.print("\n[bold]Where the change stands[/]: one token differs, everything after it is lost")
    run.print(row.format("changed at", "cached / prompt", "TTFT, median", "range", "").rstrip())
    base = run.model.encode(good_messages(system, 0))
    await engine.reset()
    await engine.ask(base, "position", "base", 0)
    for percent in (0, 25, 50, 75, 100):
        at = min(len(base) * percent // 100, len(base) - 1)
        measured, before_change = [], []
        for n in range(SAMPLES):
            ids = change_token(base, at, n)
            if percent == 0:
                ids = run.model.encode(good_messages(double_space(system, n), 0))
            measured.append(await engine.ask(ids, "position", f"{percent}%", n))
            before_change.append(run.model.whole_blocks(common_prefix(base, ids[:-1])))  # the last is always computed
        found = [m.cached_tokens for m in measured]
        evidence = f"{found} tokens cached, {before_change} before the change"
        run.claim(f"a change at {percent} % leaves the blocks before it", found == before_change, evidence)
        label = f"{percent} %" if percent else "0 % (extra space)"
        counts = f"{measured[0].cached_tokens:,} / {measured[0].prompt_tokens:,}"
        ttft, bar = milliseconds(median_ms(measured)), run.bar(hit_rate(measured), width=10)
        run.print(row.format(label, counts, ttft, ttft_range(measured), bar).rstrip())


async def user_data(run: Run, engine: Engine, system: str) -> None:
    """Put what is known of the customer into the system message, or into the message after it."""
    arms = ("inside the system message", "in the message after it")
    await engine.reset()
    for n in range(1 + SAMPLES):
        profile = f"Customer C-{10482 + 7 * n}, member since {2015 + n}, language English, {n} open orders.\n"
        question = QUESTIONS[n % len(QUESTIONS)]
        inside = (system.replace(INSTRUCTIONS, INSTRUCTIONS + profile, 1), question)
        after = (system, profile + question)
        contents = {arms[0]: inside, arms[1]: after}
        for arm in in_turn(arms, n):
            first, second = contents[arm]
            ids = run.model.encode([{"role": "system", "content": first}, {"role": "user", "content": second}])
            await engine.ask(ids, "user_data", arm, n)

    row = "{:<28}{:>10}{:>16}{:>22}"
    run.print("\n[bold]User data[/]: from the general to the particular (instructions, context, question)")
    run.print(row.format("user data", "hit rate", "TTFT, median", "range"))
    found = []
    for arm in arms:
        measured = run.measured("user_data", arm)[1:]
        run.print(row.format(arm, f"{hit_rate(measured):.1%}", milliseconds(median_ms(measured)), ttft_range(measured)))
        found.append(sum(m.cached_tokens for m in measured))
    with_inside, with_after = found
    evidence = f"{with_after:,} tokens found, {with_inside:,} with the data inside"
    run.claim("user data after the system message leaves it cached", with_after > with_inside, evidence)


async def length_sweep(run: Run, engine: Engine, ids: list[int]) -> list[int]:
    """Send a prompt to an empty cache, and again; return the lengths. Decoding is the control: a hit skips prefill."""
    lengths = []
    run.print("\n[bold]Prompt length[/]: a miss grows, a hit hardly; decoding (TPOT) is the control")
    run.print("  tokens      miss       hit  speed-up   bound  reached  TPOT: miss      hit")
    for eighths in (1, 2, 4, 8, 16):
        length = run.args.prefix_tokens * eighths // 8
        if not 2 * run.model.block_size <= length <= len(ids):
            continue
        lengths.append(length)
        for n in range(SAMPLES):
            await engine.reset()
            for arm in ("miss", "hit"):  # the same prompt twice
                await engine.ask(ids[:length], f"length {length}", arm, n, max_tokens=1 + DECODED)
        misses, hits = run.measured(f"length {length}", "miss"), run.measured(f"length {length}", "hit")
        miss, hit = median_ms(misses), median_ms(hits)
        bound = length / hits[0].computed_tokens
        row = f"{length:>8,}{milliseconds(miss):>10}{milliseconds(hit):>10}{miss / hit:>9.1f}x{bound:>7.0f}x"
        row += f"{miss / hit / bound:>9.0%}"
        row += f"{milliseconds(median_ms(misses, 'tpot_ms')):>12}{milliseconds(median_ms(hits, 'tpot_ms')):>9}"
        run.print(row)
        most = max(m.computed_tokens for m in hits)
        claim = f"a hit of {length} tokens computes at most one block"
        run.claim(claim, most <= run.model.block_size, f"{most} tokens")
    run.print("medians; bound: prompt / computed tokens; missing: what a hit is made of, below")
    return lengths


def anatomy(run: Run, lengths: list[int]) -> None:
    """Split the hits of the length sweep by vLLM's own time stamps: why the bound is not reached. Sends nothing."""
    run.print("\n[bold]Anatomy of a hit[/]: what is left when all but a few tokens are found")
    run.print(" tokens computed      hit   client  waiting     step  speed-up  of step   bound")
    for length in lengths:
        misses, hits = run.measured(f"length {length}", "miss"), run.measured(f"length {length}", "hit")
        computed = hits[0].computed_tokens
        row = f"{length:>7,}{computed:>9}"
        for part in ("ttft_ms", "client_ms", "waiting_ms", "step_ms"):
            row += f"{milliseconds(median_ms(hits, part)):>9}"
        for part, width in (("ttft_ms", 9), ("step_ms", 8)):
            row += f"{median_ms(misses, part) / median_ms(hits, part):>{width}.1f}x"
        run.print(f"{row}{length / computed:>7.0f}x")
    run.print("client: ids sent, hashed by block, the first token sent back; step: blocks found")
    run.print("and one forward pass; of step: the speed-up if there were nothing but the step")


def hashing(run: Run, ids: list[int]) -> None:
    """Time vLLM's own hashing of a prompt, a part of `client`, by block size and algorithm."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import hash_block_tokens

    row = "{:<40}{:>10}{:>10}{:>10}{:>10}"
    sizes = (16, 32, 64, 128)
    run.print("\n" + row.format(f"hashing {len(ids):,} tokens, in blocks of", *sizes))
    for algorithm in ("sha256", "sha256_cbor"):
        hash_function = get_hash_fn_by_name(algorithm)
        medians = []
        for size in sizes:
            times = []
            for _ in range(SAMPLES):
                parent = b"none"
                began = time.perf_counter()
                for at in range(0, len(ids) - size + 1, size):
                    parent = hash_block_tokens(hash_function, parent, ids[at : at + size], None)
                times.append((time.perf_counter() - began) * 1000)
            medians.append(milliseconds(statistics.median(times)))
        run.print(row.format(algorithm, *medians))


async def naive_speed_up(run: Run, engine: Engine) -> None:
    """Divide the first request of a cold engine by a hit, as a benchmark without a warm-up would."""
    decoys = run.measured("warm_up", "decoy")  # the warm-up: one unrelated prompt, then hits of it
    first, hit = decoys[0], decoys[-1]
    await engine.reset()
    miss = await engine.ask([5] * first.prompt_tokens, "warm_up", "warm decoy", 0)  # another token than theirs
    run.print(f"\n[bold]Without a warm-up[/] ({first.prompt_tokens:,} tokens, one sample each)")
    cold, warm = milliseconds(first.ttft_ms), milliseconds(miss.ttft_ms)
    run.print(f"first request of the engine {cold}, a miss when warm {warm}, a hit {milliseconds(hit.ttft_ms)}")
    naive, honest = first.ttft_ms / hit.ttft_ms, miss.ttft_ms / hit.ttft_ms
    run.print(f"naive speed-up {naive:.1f}x, honest {honest:.1f}x: the cache has no part in the difference")


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
