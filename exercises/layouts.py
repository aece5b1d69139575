"""Exercises 1 to 3, measured: how much of a prompt should be found, how much is, and where the rest is lost.

What should be found follows from lengths and blocks alone: the tokens that the best layout keeps, in whole blocks, and
one block less for each request, since a layout is free in what it writes between the texts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Awaitable, Callable

from exercises import facts
from exercises.student import Student
from going_further.common import (
    OUTPUT_TOKENS,
    CacheModel,
    Engine,
    LessonError,
    Run,
    UsageError,
    check_template,
    common_prefix,
    milliseconds,
    shown,
)
from going_further.replay.comparing import describe
from going_further.replay.records import Record
from going_further.replay.rendering import Prompt, Renderer
from going_further.replay_request_log import check_memory

STATIC_TOKENS = {1: 1800, 2: 1000, 3: 1200}  # about so many, of the text that is the same for all
TENANT_TOKENS = 700
Claim = tuple[str, bool, str]  # claim, whether it holds, evidence


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a prompt departs from the one that it is compared with."""

    where: str  # message and role, perhaps the field
    character: int | None  # of that message
    token: int  # of the prompt
    texts: tuple[str, ...]  # what stands there in either


@dataclasses.dataclass(frozen=True)
class Row:
    """One request: what it is called, what should be found of its prompt, and where that ends."""

    name: str
    ids: list[int]
    needed: int | None  # tokens; None for a request that fills the cache
    place: Place | None
    salt: str | None = None  # requests of other salts share no cache


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a student's function returned for all requests, and how it is to be measured."""

    chats: list[list[dict]]
    missing: list[str]  # facts that the messages do not carry
    static: str  # what a hit must at least consist of
    rows: Callable[[Reader], list[Row]]
    claims: Callable[[Reader], list[Claim]] = lambda reader: []
    free: int = 0  # so many requests, those that lost most, are not counted
    growing: tuple[list[dict], ...] = ()  # a conversation that the model's template must not write anew


@dataclasses.dataclass(frozen=True)
class Score:
    """Token counts of the requests that count; what was lost, by message: requests, tokens, and the first place."""

    sent: int
    found: int
    needed: int
    losses: dict[str, tuple[int, int, Place]]


class Reader:
    """Renders messages as the model gets them, and compares two prompts as the replayer does."""

    def __init__(self, renderer: Renderer, block_size: int) -> None:
        self.renderer, self.block_size = renderer, block_size

    def chat(self, messages: list[dict]) -> Prompt:
        return self.renderer.prompt(Record(0, "chat", {"messages": messages}, {}))

    def render(self, messages: list[dict]) -> str:
        return self.chat(messages).text

    def prompt(self, messages: list[dict]) -> Prompt:
        """Return a prompt without its markers, if it has any: they are taken out of the rendered text."""
        text = self.render(messages).replace(facts.MARKER, "")
        return dataclasses.replace(self.chat(facts.without_markers(messages)), text=text, ids=self.tokens(text))

    def tokens(self, text: str) -> list[int]:
        return self.renderer.tokens(text)

    def needed(self, *texts: str) -> int:
        return self.needed_of(len(self.tokens("\n".join(texts))))

    def needed_of(self, tokens: int) -> int:
        """Return how much of so many tokens must be found: whole blocks, and one less."""
        return max(0, tokens // self.block_size - 1) * self.block_size

    def place(self, before: Prompt, after: Prompt) -> Place | None:
        """Return where a prompt departs from another one, None where it only goes on."""
        found = describe(before, after, self.renderer)
        if found.kind in ("extended", "same prompt"):
            return None
        at, token = common_prefix(before.text, after.text), common_prefix(before.ids, after.ids)
        inside = [at - span.start for span in self.renderer.spans(after) if span.start <= at < span.end]
        texts = tuple(prompt.text[max(0, at - 30) : at + 40] for prompt in (before, after))
        return Place(found.where or found.kind, inside[0] if inside else None, token, texts)


# --- what is asked of the student's function, and what of its prompts should be found ---


def answer_1(student: Student) -> Answer:
    """Each request must find all static text, whatever it is about."""
    texts = dict(zip(("rules", "policies", "tools"), facts.static_texts(STATIC_TOKENS[1]), strict=True))
    requests, missing = facts.requests(), []
    chats = student.all_messages({f"request {n}": (*texts.values(), request) for n, request in enumerate(requests)})
    for n, (chat, request) in enumerate(zip(chats, requests, strict=True)):
        faults = facts.lost(chat, texts, request) + facts.foreign(chat, request, requests)
        missing += [f"request {n}: {fault}" for fault in faults]

    def rows(reader: Reader) -> list[Row]:
        return one_after_the_other(reader, chats, lambda before: reader.needed(*texts.values()))

    return Answer(chats, missing, "\n".join(texts.values()), rows)


def answer_2(student: Student) -> Answer:
    """Each turn must find the whole turn before, but for one turn, at which the student may have compacted."""
    instructions, turns = "\n".join(facts.static_texts(STATIC_TOKENS[2])), facts.turns()
    calls, missing = {}, []
    for n in range(len(turns)):
        calls[f"turn {n}"] = (instructions, [*turns[:n], {**turns[n], "answer": ""}])
    chats = student.all_messages(calls)
    for n, chat in enumerate(chats):
        missing += [f"turn {n}: {fault}" for fault in facts.lost_memory(chat, instructions, turns[: n + 1])]

    def rows(reader: Reader) -> list[Row]:
        return one_after_the_other(reader, chats, lambda before: reader.needed_of(len(before.ids)))

    said = [{"role": role, "content": f"I am the {role}."} for role in ("system", "user", "assistant", "user")]
    return Answer(chats, missing, instructions, rows, free=1, growing=(said[:2], said))


def one_after_the_other(reader: Reader, chats: list[list[dict]], needed: Callable[[Prompt], int]) -> list[Row]:
    """Return the rows of chats that follow each other; `needed` gets the prompt before."""
    prompts = [reader.prompt(chat) for chat in chats]
    rows = [Row("0", prompts[0].ids, None, None)]
    for n, (before, after) in enumerate(itertools.pairwise(prompts), start=1):
        rows.append(Row(str(n), after.ids, needed(before), reader.place(before, after)))
    return rows


def answer_3(student: Student) -> Answer:
    """Priming a tenant must find what all share; a tenant's first user must find the tenant's part as well."""
    shared = "\n".join(facts.static_texts(STATIC_TOKENS[3]))
    tenants = [facts.tenant(name, TENANT_TOKENS) for name in facts.TENANTS]
    visitors, missing = facts.visitors(), []
    everybody = [*itertools.product(tenants, (facts.NOBODY, *visitors))]
    all_values = [{"name": owner["name"], **request} for owner, request in everybody]
    calls = {f"{owner['name']}, {request['user']}": (shared, owner, request) for owner, request in everybody}
    chats: dict[tuple[str, str], list[dict]] = {}  # by tenant and user
    for when, messages, (owner, request) in zip(calls, student.all_messages(calls), everybody, strict=True):
        if (markers := facts.text_of(messages).count(facts.MARKER)) != 2:
            raise student.fault(student.line, f"messages returns {markers} markers, not two ({when})")
        chats[owner["name"], request["user"]] = messages
        texts, values = {"shared text": shared, "policies": owner["policies"]}, {"name": owner["name"], **request}
        faults = facts.lost(facts.without_markers(messages), texts, values)
        missing += [f"{when}: {fault}" for fault in faults + facts.foreign(messages, values, all_values)]

    def rows(reader: Reader) -> list[Row]:
        made = []
        for n, owner in enumerate(tenants):
            # What is primed was written for nobody, and the shared part for another tenant: what belongs to one user
            # or one tenant is not found. The salt makes each tenant's cache an empty one.
            name, nobody = owner["name"], facts.NOBODY["user"]
            three = [chats[tenants[n - 1]["name"], nobody], chats[name, nobody], chats[name, visitors[n]["user"]]]
            prompts = [reader.prompt(chat) for chat in three]
            first, second = (reader.tokens(head) for head in (heads(reader, three[0])[0], heads(reader, three[1])[1]))
            made.append(Row(f"{name}: boundary 1", first, None, None, name))
            place = behind(1, len(first), reader.place(prompts[0], prompts[1]))
            made.append(Row(f"{name}: boundary 2", second, reader.needed(shared), place, name))
            place = behind(2, len(second), reader.place(prompts[1], prompts[2]))
            needed = reader.needed(shared, owner["policies"])
            made.append(Row(f"{name}: first user", prompts[2].ids, needed, place, name))
        return made

    return Answer(list(chats.values()), missing, tenants[0]["policies"], rows, lambda reader: same_heads(reader, chats))


def heads(reader: Reader, messages: list[dict]) -> tuple[str, str]:
    """Return what stands before the first boundary, and before the second one."""
    parts = reader.render(messages).split(facts.MARKER)
    if len(parts) != 3:
        raise LessonError("the model's chat template does not write the system message once: choose another --model")
    first, second, _ = parts
    return first, first + second


def behind(boundary: int, token: int, place: Place | None) -> Place:
    """Return the place where a hit ends: the boundary, or a difference that stands before it."""
    if place and place.token < token:
        return place
    return Place(f"boundary {boundary} stands at token {token:,}", None, token, ())


def same_heads(reader: Reader, chats: dict[tuple[str, str], list[dict]]) -> list[Claim]:
    """Claim that what stands before a boundary is the same for everybody whom it is for.

    vLLM would find the common part of unequal ones; an engine that is told its boundaries would find nothing.
    """
    claims = []
    heads_of = {who: heads(reader, messages) for who, messages in chats.items()}
    for at, claim in enumerate(("all prompts agree up to boundary 1", "those of a tenant agree up to boundary 2")):
        told = ""
        for (name, user), these in heads_of.items():
            for (other_name, other_user), those in heads_of.items():
                one, another = these[at], those[at]
                if one != another and (at == 0 or name == other_name) and not told:
                    place = common_prefix(one, another)
                    text = one[max(0, place - 20) : place + 20]
                    told = f"{name}, {user} and {other_name}, {other_user} differ at {text!r}"
        claims.append((claim, not told, told or f"{len(chats)} prompts"))
    return claims


# --- sending, and telling what was lost ---


def predicted(rows: list[Row], block_size: int) -> list[int]:
    """Return what the cache model finds of each row; vLLM must find the same."""
    cache, found = CacheModel(block_size), []
    for row in rows:
        found.append(cache.cached_tokens(row.ids, row.salt))
        cache.store(row.ids, row.salt)
    return found


def score(rows: list[Row], cached: list[int], free: int) -> Score:
    """Add up the rows that need something, but for the `free` ones that lost most."""
    losing = sorted((cached[n] - row.needed, n) for n, row in enumerate(rows) if row.needed is not None)
    counted = [n for _, n in losing[free:]]
    losses: dict[str, tuple[int, int, Place]] = {}
    for n in sorted(counted):
        row, tokens = rows[n], rows[n].needed - cached[n]
        if tokens > 0 and row.place:
            requests, lost, place = losses.get(row.place.where, (0, 0, row.place))
            losses[row.place.where] = requests + 1, lost + tokens, min(place, row.place, key=lambda place: place.token)
    sent, found = sum(len(rows[n].ids) for n in counted), sum(cached[n] for n in counted)
    return Score(sent, found, sum(rows[n].needed for n in counted), losses)


async def start_engine(run: Run, prompts: list[list[int]]) -> Engine:
    """Start vLLM with room for all prompts, warmed up; LessonError for one that is too long."""
    model, longest = run.model, max(map(len, prompts))
    length, suffix = longest + OUTPUT_TOKENS, min(2 * model.block_size, longest // 2)
    if length > model.max_model_len:
        raise LessonError(f"a prompt has {longest:,} tokens; with an answer the model takes {model.max_model_len:,}")
    room = model.kv_bytes(len(prompts) + 2, length)
    check_memory(run, room)
    with run.timed("engine_start", "Starting vLLM..."):
        engine = run.start_engine(
            enable_prefix_caching=not run.args.no_prefix_caching,
            max_model_len=length,
            max_num_batched_tokens=length,  # a prompt is computed in one step
            kv_cache_memory_bytes=room,  # nothing is evicted
            graph_tokens=suffix,
        )
    await run.warm_up(longest, suffix)
    return engine


async def send(run: Run, rows: list[Row]) -> list[int]:
    """Send the prompts of all rows in their order, print each one as it is measured, and return what was found."""
    if not all(row.ids for row in rows):
        raise LessonError("nothing stands before a boundary: there is nothing to prime")
    engine, width = await start_engine(run, [row.ids for row in rows]), max(len(row.name) for row in rows)
    width = max(width, len("request"))
    run.print(f"[bold]{'request':<{width}}{'prompt':>8}{'cached':>8}{'needed':>8}{'TTFT':>10}")
    with run.timed("measuring"):
        for n, row in enumerate(rows):
            m = await engine.ask(row.ids, "main", "student", n, salt=row.salt)
            needed = "fill" if row.needed is None else f"{row.needed:,}"
            counts = f"{m.prompt_tokens:>8,}{m.cached_tokens:>8,}{needed:>8}"
            run.print(f"{row.name:<{width}}{counts}{milliseconds(m.ttft_ms):>10}")
    return [m.cached_tokens for m in run.measured("main", "student")]


def tell(run: Run, result: Score, free: int) -> None:
    """Print what is still lost and where, and claim that it is no more than rounding to blocks explains."""
    tell_hit_rate(run, result.sent, result.found, result.needed, "without the turn that lost most" if free else "")
    if result.losses:
        run.print("[bold]Still lost[/], each prompt against the one before it:")
    for where, (requests, tokens, place) in result.losses.items():
        character = "" if place.character is None else f", character {place.character:,}"
        run.print(f"  {shown(where)}{character}"[:80], markup=False)
        many = f"{requests} request{'s' if requests > 1 else ''}"
        run.print(f"    from token {place.token:,} on; {tokens:,} tokens lost in {many}")
        for text in place.texts:
            run.print(f"    {text!r}"[:80], markup=False)


def tell_hit_rate(run: Run, sent: int, found: int, needed: int, which: str = "") -> None:
    """Print the hit rate and claim that it reaches its bound."""
    rate, bound = found / sent, needed / sent
    run.print(f"\nhit rate {rate:.1%}, needed {bound:.1%}; {sent - found:,} of {sent:,} tokens computed")
    if which:
        run.print(f"({which})")
    run.result["exercise"] |= {"hit_rate": rate, "needed": bound, "sent": sent, "computed": sent - found}
    run.claim(
        "the hit rate reaches its bound", found >= needed, f"{found:,} of {sent:,} tokens found, {needed:,} needed"
    )


def quoted(text: str) -> str:
    """Return text of the student's as evidence: without control characters, and no markup to rich."""
    from rich.markup import escape

    return escape(shown(text[:300]))


def measuring(answer: Answer) -> Callable[[Run], Awaitable[None]]:
    """Return what measures an answer on the engine and makes the claims."""

    async def measure(run: Run) -> None:
        reader = Reader(Renderer(run.model.name), run.model.block_size)
        if 4 * reader.block_size > len(reader.tokens(answer.static)):
            raise UsageError(f"blocks of {reader.block_size:,} tokens are too large for this exercise's prompts")
        check_template(run.model, list(answer.growing))
        rows = answer.rows(reader)
        tell(run, score(rows, await send(run, rows), answer.free), answer.free)
        for claim, holds, evidence in answer.claims(reader):
            run.claim(claim, holds, quoted(evidence))
        more = f"; and {len(answer.missing) - 1} more" if len(answer.missing) > 1 else ""
        evidence = quoted(answer.missing[0]) + more if answer.missing else f"all in {len(answer.chats)} prompts"
        run.claim("every prompt carries its facts", not answer.missing, evidence)

    return measure


def exercise_1(student: Student) -> Callable[[Run], Awaitable[None]]:
    return measuring(answer_1(student))


def exercise_2(student: Student) -> Callable[[Run], Awaitable[None]]:
    return measuring(answer_2(student))


def exercise_3(student: Student) -> Callable[[Run], Awaitable[None]]:
    return measuring(answer_3(student))
