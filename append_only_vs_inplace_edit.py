"""Lesson 2: an append-only context against a state that is edited in place.

An agent carries its state with it: a list of tasks, what is done, a step
counter. Every turn something in it changes. How the change is written decides
what the next turn costs, because a prompt is found in the KV cache only up to
its first different token (see lesson 1).

  bad   the JSON state at the top is edited in place: a status, a counter. From
        there on all is new, instructions, tools and conversation included
  good  the state is written once, and each change is appended as a log entry.
        Every turn's prompt begins with all of the turn before

Both arms carry the same facts at every turn, for a reader who applies the log:
`read_state` reads them back from either, in the tests. Append-only sends more
tokens and computes fewer: both are shown, and what they cost at a price for
new and for cached tokens.

What it takes: entries are never changed once written; they are serialised the
same way each time (`sort_keys=True`); the chat template renders old messages
as before when new ones follow, which is checked before the engine starts.

Request n is turn n, `--requests` sets the number of turns. Turn 0 fills the
cache and is left out of hit rates and medians, though not of the bill. What the
assistant says is scripted; weights may be random, and no answer is read here.

--deeper adds: another key order each turn; a log that is compacted when it has
grown long; generated tokens sent back as ids and as text; and the arithmetic
of a course text (a Q&A on message structure and KV cache), recomputed.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Iterator

# What is not defined here stands below: questions (predict_first), instrument (Engine, ...), plumbing (Run, ...).

# --- the lesson: an agent's state, written in two ways, sent to vLLM ---

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
    for version in itertools.count(1):
        for noun, verb in itertools.product(NOUNS, VERBS):
            does = f"Use it to {verb} a {noun} by its id."
            yield f"{verb}_{noun}_v{version}(id: string, limit: integer) -> object. {does}\n"


def instructions(tokens: int, count: Callable[[str], int]) -> str:
    """Return the static instructions, with as many tools as it takes to reach `tokens`, as counted by `count`."""
    text, tools = INSTRUCTIONS, tool_definitions()
    while (missing := tokens - count(text)) > 0:
        for _ in range(1 + missing // 200):  # a tool has less than 200 tokens: one too many at most
            text += next(tools)
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
        keys = [int(key) if key.isdigit() else key for key in path.split("/")]
        target = state
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value
    return state


def state_at(turn: int) -> dict:
    state = START
    for n in range(1, turn + 1):
        state = apply(state, changes(n))
    return state


def dump(value: dict) -> str:
    """Serialise the same way each time: an equal state must give equal tokens."""
    return json.dumps(value, sort_keys=True)


def history(since: int, turn: int, log: bool) -> list[dict]:
    """Return the scripted conversation from `since` to `turn`; with `log`, a turn begins with what it changes."""
    messages = []
    for n in range(since, turn + 1):
        entry = f"{dump({'set': changes(n)})}\n" if log and n > since else ""
        result = f"Result of step {n}: {TITLES[n % len(TITLES)]}: 12 entries read, 3 of them new, no errors. Go on."
        messages.append({"role": "user", "content": entry + result})
        answer = f"I have read the result of step {n} and noted what has changed. The next task can begin."
        messages.append({"role": "assistant", "content": answer})
    return messages[:-1]  # the last word is the user's


def head(static: str, state: dict) -> dict:
    return {"role": "system", "content": f"# State\n{dump(state)}\n\n{static}"}


def bad_messages(static: str, turn: int) -> list[dict]:
    """The state is edited in place: it always shows the latest values."""
    return [head(static, state_at(turn)), *history(0, turn, log=False)]


def good_messages(static: str, turn: int, since: int = 0) -> list[dict]:
    """The state is written once, at turn `since`; every change is appended to the message of its turn."""
    return [head(static, state_at(since)), *history(since, turn, log=True)]


def read_state(messages: list[dict]) -> dict:
    """Return the state that a model can read from a prompt: what stands at the top, with every log entry applied."""
    state = json.loads(messages[0]["content"].splitlines()[1])
    for message in messages[1:]:
        if message["content"].startswith("{"):
            state = apply(state, json.loads(message["content"].splitlines()[0])["set"])
    return state


LAYOUTS = {"bad": bad_messages, "good": good_messages}


async def pair(run: Run, engine: Engine, prompts: dict[str, list[list[int]]]) -> None:
    """Go through the turns with both arms side by side, and judge what was sent and what was computed."""
    run.print(f"{'':4}[bold red]{'BAD: the state is edited in place':<38}[/][bold green]GOOD: changes are appended")
    run.print("turn prompt cached   new     TTFT new        prompt cached   new     TTFT new", markup=False)
    longest = max(map(len, prompts["good"]))
    for n in range(run.args.requests):
        measured = {}
        for arm in in_turn(LAYOUTS, n):
            # The salt gives each arm a part of the cache of its own.
            measured[arm] = await engine.ask(prompts[arm][n], "main", arm, n, salt=arm)
        row = f"{n:<4}"
        for m in (measured["bad"], measured["good"]):
            bar = run.bar(m.computed_tokens / longest, 7)
            row += f"{m.prompt_tokens:>7,}{m.cached_tokens:>7,}{m.computed_tokens:>6,}"
            row += f"{milliseconds(m.ttft_ms):>9} {bar:<8}"
        run.print(row.rstrip())
    bad, good = run.measured("main", "bad"), run.measured("main", "good")
    run.print_comparison(bad[1:], good[1:])
    print_cost(run, bad, good)
    claim_counts(run, prompts, bad, good)

    before, after = dump(state_at(0)), dump(state_at(1))
    field = re.findall(r'"(\w+)":', before[: common_prefix(before, after)])[-1]  # the first one that differs
    run.print_break(f"Field '{field}': prompts", *prompts["bad"][:2])
    sent = prompt_tokens(good) / prompt_tokens(bad) - 1
    computed = computed_tokens(good) / computed_tokens(bad) - 1
    run.print(f"\nAppend-only sends {sent:+.1%} tokens and computes {computed:+.0%}.")
    run.result["verdict"] = [time_verdict(bad[1:], good[1:])]
    run.print(*run.result["verdict"])


def claim_counts(
    run: Run, prompts: dict[str, list[list[int]]], bad: list[Measurement], good: list[Measurement]
) -> None:
    """Claim what the prompts themselves allow: whole blocks of what a turn has in common with earlier ones."""
    model = run.model
    no_more = all_found = True
    before_edit = 0
    for n in range(1, len(bad)):
        turn = prompts["bad"][n]
        left = model.whole_blocks(max(common_prefix(earlier, turn) for earlier in prompts["bad"][:n]))
        no_more = no_more and bad[n].cached_tokens <= left  # no earlier turn, whichever it is, has left more of it
        before_edit = max(before_edit, left)

        before = prompts["good"][n - 1]
        in_common = model.whole_blocks(common_prefix(before, prompts["good"][n]))
        # A prompt ends with the opening of an answer, which the next turn may write differently: a block at most.
        is_append = in_common >= model.whole_blocks(len(before)) - model.block_size
        all_found = all_found and is_append and good[n].cached_tokens >= in_common
    evidence = f"at most {max(m.cached_tokens for m in bad[1:]):,} cached, {before_edit:,} before the edit"
    run.claim("in place: no turn finds more than what stands before the edit", no_more, evidence)
    evidence = f"{sum(m.cached_tokens for m in good[1:]):,} cached, {prompt_tokens(good[:-1]):,} sent"
    run.claim("append-only: every turn finds all whole blocks of the turn before", all_found, evidence)

    sends_more = prompt_tokens(good) > prompt_tokens(bad)
    computes_less = computed_tokens(good) < computed_tokens(bad)
    evidence = f"sent {prompt_tokens(bad):,} and {prompt_tokens(good):,}, "
    evidence += f"computed {computed_tokens(bad):,} and {computed_tokens(good):,}"
    run.claim("append-only sends more and computes less", sends_more and computes_less, evidence)


def prompt_tokens(arm: list[Measurement]) -> int:
    return sum(m.prompt_tokens for m in arm)


def computed_tokens(arm: list[Measurement]) -> int:
    return sum(m.computed_tokens for m in arm)


def cost(arm: list[Measurement], args: argparse.Namespace) -> float:
    """Return what the requests cost in $: computed tokens at the full price, cached ones at the reduced one."""
    cached = prompt_tokens(arm) - computed_tokens(arm)
    return (computed_tokens(arm) * args.price_input + cached * args.price_cached) / 1e6


def break_even(bad: list[Measurement], good: list[Measurement], args: argparse.Namespace) -> int | None:
    """Return the turn from which on the bill so far is lower than with the state edited in place, or None."""
    not_cheaper = [n for n in range(len(good)) if cost(good[: n + 1], args) >= cost(bad[: n + 1], args)]
    first = not_cheaper[-1] + 1 if not_cheaper else 0
    return first if first < len(good) else None


def print_cost(run: Run, bad: list[Measurement], good: list[Measurement]) -> None:
    """Show the bill of all turns, at the given prices, from the measured tokens only."""
    row = "{:<36}{:>20}{:>20}"
    bill_bad, bill_good = cost(bad, run.args), cost(good, run.args)
    run.print(row.format("tokens sent, all turns", f"{prompt_tokens(bad):,}", f"{prompt_tokens(good):,}"))
    run.print(row.format("TTFT of the last turn", milliseconds(bad[-1].ttft_ms), milliseconds(good[-1].ttft_ms)))
    prices = f"cost at ${run.args.price_input:g} new, ${run.args.price_cached:g} cached"
    run.print(row.format(prices, f"${bill_bad:.4f}", f"${bill_good:.4f}"))
    first = break_even(bad, good, run.args)
    says = "append-only was never cheaper" if first is None else f"from turn {first} on append-only is cheaper"
    run.print(f"cost {bill_good / bill_bad - 1:+.0%}; {says}")


async def lesson(run: Run) -> None:
    """Make the prompts of all turns, start vLLM with room for them, and send them."""
    model, turns = run.model, range(run.args.requests)
    static = instructions(run.args.prefix_tokens, model.count)
    model.check_length(len(model.encode(good_messages(static, turns[-1]))))  # the longest one, before all are made
    check_template(model, [good_messages(static, n) for n in turns])
    prompts = {}
    with run.timed(None, "Making prompts..."):
        for arm, layout in LAYOUTS.items():
            prompts[arm] = [model.encode(layout(static, n)) for n in turns]
    longest = max(map(len, prompts["bad"] + prompts["good"])) + model.block_size  # --deeper sends a little more
    suffix = model.suffix(prompts["good"])  # what a hit leaves to compute
    length = longest + OUTPUT_TOKENS

    # An AsyncLLMEngine with these of vLLM's arguments. `engine.ask` predicts what its cache will find, sends token ids
    # with SamplingParams(max_tokens=1), times the first token, and reads what was found: num_cached_tokens.
    with run.timed("engine_start", "Starting vLLM..."):
        engine = run.start_engine(
            enable_prefix_caching=not run.args.no_prefix_caching,
            max_model_len=length,
            max_num_batched_tokens=length,  # a prompt is computed in one step
            kv_cache_memory_bytes=model.kv_bytes(16, length),  # 16 prompts: more than the last turns of both arms
            graph_tokens=suffix,  # ours: on a GPU, steps as short as a hit's are replayed as one CUDA graph
        )
    await run.warm_up(longest, suffix)
    edited, appended, last = prompts["bad"], prompts["good"], turns[-1]
    questions = [
        Question("BAD, turn 1, after turn 0", "bad", 1, edited[0], edited[1]),
        Question("GOOD, turn 1, after turn 0", "good", 1, appended[0], appended[1]),
        Question(f"GOOD, turn {last}, the last one", "good", last, appended[last - 1], appended[last]),
    ]
    answers = predict_first(run, questions)
    with run.timed("measuring"):
        await pair(run, engine, prompts)
        tell_score(run, questions, answers)
        if run.args.deeper:
            await key_order(run, engine, static)
            await compaction(run, engine, static)
            await generated_tokens(run, engine, static)
            await course_arithmetic(run, engine, static)


def check_template(model: Model, turns: list[list[dict]]) -> None:
    """Raise LessonError unless the template renders each turn as a prefix of the next, token for token."""
    for n, (before, after) in enumerate(itertools.pairwise(turns)):
        ids, longer = model.encode(before, answer=False), model.encode(after)
        at = common_prefix(ids, longer)
        if at < len(ids):
            raise LessonError(
                f"the model's chat template is not prefix-stable, turn {n + 1} departs from turn {n} at token {at} "
                f"({model.tokenizer.decode(ids[at : at + 8])!r}): no turn finds the one before it; choose a --model "
                "whose template leaves old messages as they were"
            )


def price(text: str) -> float:
    """Return $ per million tokens, or raise argparse.ArgumentTypeError."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or float(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price in $ per million tokens, such as 3.00")
    return float(text)


def main() -> int:
    parser = lesson_parser(__doc__, requests=10)
    for option, default, what in (("--price-input", 3.00, "computed"), ("--price-cached", 0.30, "cached")):
        text = f"$ per million {what} tokens (an example: {default:.2f})"
        parser.add_argument(option, type=price, default=default, help=text)
    return run_lesson(parse(parser), lesson)


# --- the lesson, --deeper: further experiments ---


async def key_order(run: Run, engine: Engine, static: str) -> None:
    """The same state each turn, but its keys in another order: what a dict filled in another order does to a prompt."""
    for n in range(run.args.requests):
        messages = good_messages(static, n)
        keys = random.Random(n).sample(sorted(START), len(START))
        shuffled = json.dumps({key: START[key] for key in keys})
        messages[0]["content"] = messages[0]["content"].replace(dump(START), shuffled)
        await engine.ask(run.model.encode(messages), "key_order", "bad_key_order", n, salt="bad_key_order")
    good, shuffled = run.measured("main", "good")[1:], run.measured("key_order", "bad_key_order")[1:]
    run.print("\n[bold]Key order[/]: append-only, but the state's keys are shuffled each turn (seed: turn)")
    for name, arm in (("good", good), ("bad_key_order", shuffled)):
        rate, last = f"{hit_rate(arm):.1%}", milliseconds(arm[-1].ttft_ms)
        run.print(f"{name:<16}hit rate {rate:>6}   computed {computed_tokens(arm):>8,}   last TTFT {last:>8}")
    few, many = sum(m.cached_tokens for m in shuffled), sum(m.cached_tokens for m in good)
    run.claim("another key order loses what append-only keeps", few < many, f"{few:,} of {many:,} cached tokens")


async def compaction(run: Run, engine: Engine, static: str) -> None:
    """Half-way, put the state in the place of the conversation that led to it: one cold turn, then short again."""
    fold = run.args.requests // 2
    for n in range(run.args.requests):
        messages = good_messages(static, n, since=fold if n >= fold else 0)
        await engine.ask(run.model.encode(messages), "compaction", "good_compact", n, salt="good_compact")
    kept, folded = run.measured("main", "good"), run.measured("compaction", "good_compact")
    run.print(f"\n[bold]Compaction[/]: at turn {fold} the log becomes the state: append-only, but not unbounded")
    first = max(0, fold - 5)
    rows = {
        "turn": range(len(folded)),
        "prompt": [m.prompt_tokens for m in folded],
        "new": [m.computed_tokens for m in folded],
        "new, not folded": [m.computed_tokens for m in kept],
    }
    for name, values in rows.items():
        run.print(f"{name:<16}" + "".join(f"{value:>6,}" for value in values[first : first + 10]))
    short, long = folded[-1].prompt_tokens, kept[-1].prompt_tokens
    run.claim("a folded log is a shorter prompt", short < long, f"{short:,} and {long:,} tokens")
    cold, later = folded[fold].computed_tokens, [m.computed_tokens for m in folded[fold + 1 :]]
    if later:
        evidence = f"at most {max(later):,} tokens computed, {cold:,} at the fold"
        run.claim("after the cold turn it is cheap again", max(later) < cold, evidence)


def drawn(model: Model, tokens: int) -> dict:
    """Return how vLLM is to write so many tokens: drawn, since the likeliest one of random weights is always the same.

    Of those that the tokenizer and the model both have, so that each has a text.
    """
    known = sorted(n for n in model.tokenizer.get_vocab().values() if n < model.vocabulary)
    return dict(max_tokens=tokens, temperature=1.0, seed=1, allowed_token_ids=known)


async def generated_tokens(run: Run, engine: Engine, static: str) -> None:
    """Send back what the model wrote, as its token ids or as text that is tokenised again."""
    model = run.model
    ids = model.encode(good_messages(static, 0))
    ids = ids[: model.whole_blocks(len(ids)) - 8]  # so that what is generated completes a block
    following = model.encode([{"role": "user", "content": "Go on."}])
    run.print("\n[bold]Generated tokens as history[/]: ids are found again, text encoded anew may not be")
    run.print(f"{'sent back as':<14}{'history':>9}{'cached':>9}   first difference in the generated part")
    for arm in ("ids", "text"):
        await engine.ask(ids, "generated", arm, 0, salt=arm, **drawn(model, OUTPUT_TOKENS))
        written = list(engine.output.outputs[0].token_ids)
        again = written
        if arm == "text":
            again = model.tokens(model.tokenizer.decode(written, skip_special_tokens=False))
        m = await engine.ask(ids + again + following, "generated", arm, 1, salt=arm)
        at = common_prefix(written, again)
        where = "none" if at == len(written) else f"token {at} of {len(written)}, {len(again)} when encoded again"
        run.print(f"{arm:<14}{len(ids) + len(again):>9,}{m.cached_tokens:>9,}   {where}")
        if arm == "ids":
            whole = model.whole_blocks(len(ids) + len(written) - 1)  # the last token has no KV yet
            run.claim("generated ids are found", m.cached_tokens == whole, f"{m.cached_tokens:,} of {whole:,} tokens")


async def course_arithmetic(run: Run, engine: Engine, static: str) -> None:
    """Recompute a course text's figures: a Q&A on message structure and KV cache."""
    run.print("\n[bold]The arithmetic of the course text[/], a Q&A on message structure and KV cache")
    await course_turn(run, engine, static)
    course_bill(run)


async def course_turn(run: Run, engine: Engine, static: str) -> None:
    """Its second turn: system 100 + user 20, an answer of 50, user 20. It counts all but the last 20 as cached."""
    model = run.model
    asked, following = model.encode(good_messages(static, 0))[:120], model.encode(good_messages(static, 1))[-20:]
    await engine.ask(asked, "course", "cache", 0, salt="course", **drawn(model, 50))
    again = [*asked, *engine.output.outputs[0].token_ids, *following]
    cold = await engine.ask(again, "course", "no cache", 1, salt="another")
    warm = await engine.ask(again, "course", "cache", 1, salt="course")
    run.print("turn 2: 100 + 20 + an answer of 50 + 20 tokens, at $0.01 and $0.001 per 1,000")
    run.print(f"{'':<34}{'cached':>8}{'new':>6}{'cost':>11}{'':>8}{'TTFT':>10}")
    row = "{:<34}{:>8}{:>6}{:>11}{:>8}{:>10}"
    alone = course_cost(0, len(again))
    found = {"the text, no cache": (0, "200 ms"), "the text, with the cache": (170, "20 ms")}
    found |= {"measured, no cache": (cold.cached_tokens, milliseconds(cold.ttft_ms))}
    found |= {f"measured, in blocks of {model.block_size}": (warm.cached_tokens, milliseconds(warm.ttft_ms))}
    for name, (cached, ttft) in found.items():
        bill = course_cost(cached, len(again) - cached)
        run.print(row.format(name, cached, len(again) - cached, f"${bill:.6f}", f"{bill / alone - 1:+.0%}", ttft))
    whole = model.whole_blocks(len(again) - len(following) - 1)
    run.print("The answer's last token has no KV yet, and a block is found whole or not at all.")
    run.claim("turn 2 finds turn 1 and its answer, in whole blocks", warm.cached_tokens == whole, f"{whole} tokens")


def course_cost(cached: int, new: int) -> float:
    """Return $ at the course text's own prices, a tenth for what is cached."""
    return (new * 0.01 + cached * 0.001) / 1000


def course_bill(run: Run) -> None:
    """Its ten turns, each 100 tokens longer: -95 % time and -90 % cost, it says; not so, by its own numbers."""
    growing = [100 * turn for turn in range(1, 11)]
    sent, new = sum(growing), growing[-1]  # edited in place everything sent is computed, appended only what is new
    run.print(f"ten turns, each 100 tokens longer: computes {sent:,} or {new:,}: {new / sent - 1:+.0%}, not -95%")
    paid = course_cost(sent - new, new) / course_cost(0, sent)
    run.print(f"cost with cached tokens at a tenth of the price: {paid - 1:+.0%}, not -90%")
    bad, good = run.measured("main", "bad"), run.measured("main", "good")
    computed = computed_tokens(good) / computed_tokens(bad) - 1
    bill = cost(good, run.args) / cost(bad, run.args) - 1
    run.print(f"measured here: computed {computed:+.0%}, cost {bill:+.0%}")


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
