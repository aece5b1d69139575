"""Multi-turn sessions over HTTP: what is sent, what comes of it, and what that shows.

The library of `vllm_router_sessions` and of `is_it_sticky`; they differ in whom they measure. It needs the openai
client and nothing else. Both send the same sessions in two arms, "bad" and "good", and compare by cached tokens what
later turns find of earlier ones. Of the command line (`args`) it reads the options of `add_options`, and besides
`served_model`, the model's name at the servers, and `key`, the API key or None.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import json
import platform
import random
import re
import socket
import ssl
import statistics
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import ModuleType, UnionType
from typing import TYPE_CHECKING, NamedTuple

from going_further.common import (
    ANSWER,
    INSTRUCTIONS,
    QUESTIONS,
    Claim,
    LessonError,
    Parser,
    UsageError,
    at_least,
    hit_rate,
    json_path,
    milliseconds,
    p90,
    report,
    schedule,
    telling_line,
    write_json,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI

ORDER = ("bad", "good", "good", "bad")  # of the arms: two rounds, so that neither is always the first
SESSION_HEADER = "x-session-id"  # the first one that vllm-router's consistent_hash looks for
OUTPUT_TOKENS = 8
TURN_TOKENS = 300  # more than a block, so that finding the last turn differs from finding the one before it


# --- one session ---


def count_tokens(text: str) -> int:
    """Return about how many tokens a text has: there is no tokenizer here, and servers report what it really was."""
    return len(text) // 3


def conversation(name: str, session: int, prefix_tokens: int, turns: int) -> list[list[dict]]:
    """Return the messages of each turn of a session: a long report, and one more part of it every turn.

    The name stands first, so that no block is shared with another name.
    """
    messages = [{"role": "system", "content": f"{name}\n{INSTRUCTIONS}"}]
    sent = []
    for turn in range(turns):
        tokens = prefix_tokens if turn == 0 else TURN_TOKENS
        part = report(f"session-{session:02}-{turn}", tokens, count_tokens)
        question = QUESTIONS[turn % len(QUESTIONS)]
        messages = [*messages, {"role": "user", "content": f"{part}\n{question}"}]
        sent.append(messages)
        messages = [*messages, {"role": "assistant", "content": ANSWER}]
    return sent


def session_lengths(args: argparse.Namespace) -> dict[int, int]:
    """Return how many turns each session has."""
    dice = random.Random(args.seed)
    shortest = max(2, args.requests - 2)
    return {session: dice.randint(shortest, args.requests) for session in range(args.sessions)}


# --- one request ---


class Arm(NamedTuple):
    name: str  # "bad" or "good", as in the lessons
    label: str
    url: str
    header: str | None  # carries the session's name, if sent

    def headers(self, session: str) -> dict[str, str]:
        return {self.header: session} if self.header else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """One request over HTTP: turn `request` of its session. Its keys in the JSON are those of a lesson's measurement.

    Tokens that no server reported are None. Before it is sent, all that is known is that it has had no token yet.
    """

    experiment: str
    arm: str
    request: int = 0
    worker: None = None
    session: str
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    predicted_cached_tokens: None = None  # HTTP tells no token ids
    ttft_ms: float | None = None  # the client's clock, from the call to the first streamed token; None after an error
    error: str | None = "no token"
    engine_ttft_ms: None = None  # this and the next four are known only where the engine runs in the same process
    waiting_ms: None = None
    step_ms: None = None
    client_ms: None = None
    tpot_ms: None = None
    round: int = 0

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


class NoAnswer(Exception):
    """What came is JSON, but not of the form of the OpenAI API."""


def of_type(kind: type | UnionType, value: object):
    """Return `value`; raise NoAnswer where it is of another type."""
    if not isinstance(value, kind):
        raise NoAnswer
    return value


def check_counts(prompt_tokens: int | None, cached_tokens: int | None) -> None:
    """Raise NoAnswer for counts that cannot be: a prompt of no tokens, or more found than were sent."""
    if prompt_tokens is not None and prompt_tokens < 1:
        raise NoAnswer
    if cached_tokens is not None and not 0 <= cached_tokens <= (prompt_tokens or cached_tokens):
        raise NoAnswer


class Heard:
    """What a stream has told so far. All that it takes in raises NoAnswer where it is not of the OpenAI API's form."""

    def __init__(self) -> None:
        self.first_token_at: float | None = None  # time.perf_counter()
        self.has_text = False
        self.has_ended = False
        self.usage: dict = {}

    def take(self, body: dict, now: float) -> None:
        """Take in one chunk of the stream, which came at `now`."""
        self.usage = of_type(dict, body.get("usage") or self.usage)
        for choice in of_type(list, body.get("choices") or []):
            self.take_choice(of_type(dict, choice), now)

    def take_choice(self, choice: dict, now: float) -> None:
        delta = of_type(dict, choice.get("delta") or {})
        if choice.get("finish_reason") is not None:
            self.has_ended = True
        text = any(value for key, value in delta.items() if key != "role")
        if text:
            self.has_text = True
        # A token may have no text (random weights make many such); the role alone is no token.
        empty_token = delta.get("role") is None and delta.get("content") is not None
        if self.first_token_at is None and (text or empty_token):
            self.first_token_at = now

    def tokens(self, kind: str) -> int | None:
        """Return the usage's "prompt" or "completion" tokens."""
        return of_type(int | None, self.usage.get(f"{kind}_tokens"))

    def cached_tokens(self) -> int | None:
        details = of_type(dict, self.usage.get("prompt_tokens_details") or {})
        return of_type(int | None, details.get("cached_tokens"))


def open_client(url: str, key: str | None) -> AsyncOpenAI:
    """Return a client that repeats nothing and keeps no cookie: sticky by cookie is sticky for one browser only.

    Raises LessonError where the environment gives it what it cannot use: a proxy, a certificate, a header.
    """
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
    try:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        transport = DefaultAsyncHttpxClient(cookies=no_cookies, timeout=None)
        # Without a key one must be given all the same: the client would send the one of OPENAI_API_KEY to any URL.
        client = AsyncOpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=None, http_client=transport)
        for value in client.default_headers.values():
            str(value).encode("ascii")
    except (ImportError, OSError, ValueError, *bad_addresses()) as error:
        # The message of another one may repeat a proxy's password.
        fault = telling_line(error) if isinstance(error, ImportError) else type(error).__name__
        names = "SSL_CERT_FILE, OPENAI_* and the proxies"
        raise LessonError(f"no client: {fault}; check the environment: {names}") from error
    return client


async def ask(
    client: AsyncOpenAI, args: argparse.Namespace, messages: list[dict], reply: Reply, headers: dict[str, str]
) -> Reply:
    """Send one turn, read its stream to the end, and return `reply` with what came of it, a fault included."""
    from openai.types.chat import ChatCompletionChunk

    heard = Heard()
    sent_at = time.perf_counter()
    try:
        async with asyncio.timeout(args.timeout):
            stream = await client.chat.completions.create(
                model=args.served_model,
                messages=messages,
                max_tokens=OUTPUT_TOKENS,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_headers=headers,
            )
            async with stream:
                async for chunk in stream:
                    now = time.perf_counter()
                    # The client does not check what it passes on: as a dictionary it has what was sent.
                    heard.take(of_type(ChatCompletionChunk, chunk).to_dict(warnings=False), now)
        prompt_tokens = heard.tokens("prompt")
        generated_tokens = heard.tokens("completion")
        cached_tokens = heard.cached_tokens()
        check_counts(prompt_tokens, cached_tokens)
    except (NoAnswer, *http_faults()) as fault:
        return dataclasses.replace(reply, error=describe(fault, args.key is not None))
    if heard.first_token_at is None or not (heard.has_text or generated_tokens):
        return reply
    if not heard.has_ended:
        return dataclasses.replace(reply, error="stream cut off")
    ttft_ms = (heard.first_token_at - sent_at) * 1000
    return dataclasses.replace(
        reply, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens, ttft_ms=ttft_ms, error=None
    )


# --- its faults ---


def http_faults() -> tuple[type[Exception], ...]:
    """Return what a deployment can make the client raise; up to openai 2 that includes the errors of httpx itself."""
    import openai

    transport_faults = [module.TransportError for module in http_modules()]
    return TimeoutError, json.JSONDecodeError, UnicodeDecodeError, openai.APIError, *transport_faults


def http_modules() -> list[ModuleType]:
    """Return the library below the client, under the names that it has had."""
    return [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]


def bad_addresses() -> tuple[type[Exception], ...]:
    """Return what it raises of an address, of a proxy for example, that it cannot read."""
    return tuple(module.InvalidURL for module in http_modules())


def origins(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and all that led to it."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            first, *_ = error.exceptions
            yield from origins(first)
        error = error.__cause__ or error.__context__


def connection_fault(fault: Exception) -> str:
    """Return why there was no connection, or why it ended."""
    for error in origins(fault):
        if isinstance(error, ConnectionRefusedError):
            return "connection refused"
        if isinstance(error, socket.gaierror):
            return "unknown host"
        if isinstance(error, ssl.SSLError):
            return "TLS failed"
    return "connection lost"


def status_fault(status: int) -> str:
    """Return an HTTP status in words of our own: a server's may hold a key."""
    phrases = {known.value: known.phrase for known in HTTPStatus}
    return f"HTTP {status} {phrases[status]}" if status in phrases else f"HTTP {status}"


def describe(fault: Exception, keyed: bool) -> str:
    """Return the kind of a fault and, after a colon, what the server said of it.

    Where a key is in use, the server's own words are left out: they may hold the key, in whatever spelling.
    """
    import openai

    if isinstance(fault, TimeoutError):
        return "timeout"
    no_answers = NoAnswer, json.JSONDecodeError, UnicodeDecodeError, openai.APIResponseValidationError
    if isinstance(fault, no_answers):
        return "no OpenAI answer"
    if isinstance(fault, openai.APIStatusError):
        kind = status_fault(fault.status_code)
    elif type(fault) is openai.APIError:
        kind = "error in the stream"
    else:
        return connection_fault(fault)
    said = fault.body.get("message") if isinstance(fault.body, dict) else None
    if keyed or not isinstance(said, str):
        return kind
    one_line = " ".join(said.split())
    printable = "".join(c for c in one_line if c.isprintable())
    return f"{kind}: {printable[:200]}"


# --- all sessions ---


async def run_sessions(args: argparse.Namespace, arm: Arm, round_: int, suffix: str) -> list[Reply]:
    """Run all sessions once, turn by turn; a turn in which nobody was answered is the last one."""
    lengths = session_lengths(args)
    names, talks = {}, {}
    for session, turns in lengths.items():
        names[session] = f"{session:03}-{suffix}"
        talks[session] = conversation(names[session], session, args.prefix_tokens, turns)
    replies = []
    async with open_client(arm.url, args.key) as client:
        for turn, arrivals in enumerate(schedule(lengths, args.seed + round_)):
            requests = []
            for session in arrivals:
                name = names[session]
                reply = Reply(experiment="main", arm=arm.name, session=name, request=turn, round=round_)
                requests.append(ask(client, args, talks[session][turn], reply, arm.headers(name)))
            answers = await asyncio.gather(*requests)
            replies += answers
            if all(answer.error for answer in answers):
                break
    return replies


async def measure(args: argparse.Namespace, arms: list[Arm], cold: Callable[[], str]) -> list[Reply]:
    """Run all sessions four times, in ORDER. `cold` prepares each and returns what sessions' names end with."""
    lengths = session_lengths(args).values()
    turns = f"{min(lengths)} to {max(lengths)} turns"
    say(f"{args.sessions} sessions of {turns}, all at once, shuffled every turn (seed {args.seed})")
    by_name = {arm.name: arm for arm in arms}
    replies = []
    for n, name in enumerate(ORDER):
        arm = by_name[name]
        round_ = n // len(arms)
        suffix = cold()
        began = time.perf_counter()
        answers = await run_sessions(args, arm, round_, suffix)
        took = f"{time.perf_counter() - began:.1f} s"
        say(f"round {round_ + 1}  {arm.label:<24}{len(answers):>4} requests in {took}")
        replies += answers
    return with_zeros(replies) if cached_tokens_are_reported(replies) else replies


def cached_tokens_are_reported(replies: list[Reply]) -> bool:
    return any(reply.cached_tokens is not None for reply in replies)


def with_zeros(replies: list[Reply]) -> list[Reply]:
    """Fill in what some releases of vLLM leave out: an answer for which nothing was cached is then without a report.

    For servers that do report cached tokens.
    """
    filled = []
    for reply in replies:
        if reply.prompt_tokens is not None and reply.cached_tokens is None:
            reply = dataclasses.replace(reply, cached_tokens=0)
        filled.append(reply)
    return filled


# --- what it means ---


def answered_turns(replies: list[Reply]) -> list[tuple[list[int], Reply]]:
    """Return every answered turn with the prompt tokens of its session's answered turns before it."""
    sessions: dict[tuple, list[int]] = {}
    turns = []
    for reply in sorted(replies, key=lambda reply: reply.request):
        if reply.error is None and reply.prompt_tokens is not None:
            earlier = sessions.setdefault((reply.arm, reply.round, reply.session), [])
            turns.append((list(earlier), reply))
            earlier.append(reply.prompt_tokens)
    return turns


def finds_last_turn(earlier: list[int], reply: Reply, block_size: int | None, shared: int) -> bool:
    """Say whether a turn found its session's last turn; `earlier` holds the prompt tokens of the turns before it.

    That is all whole blocks of it; or, with blocks of unknown size, more than the turn before the last could have
    left, and more than the `shared` tokens that even first turns find.
    """
    *before_last, last = earlier
    if block_size is not None:
        return reply.cached_tokens >= last // block_size * block_size
    left_before = before_last[-1] if before_last else 0
    return reply.cached_tokens > max(shared, left_before)


class Summary(NamedTuple):
    """One arm. Later turns are those after a session's first, which fills the cache."""

    replies: list[Reply]
    later: list[Reply]
    found: int | None  # how many later turns found their last turn; None where no cached tokens are reported
    first_cached: int  # the most that a first turn found, in tokens, in either arm

    @property
    def timed(self) -> list[Reply]:
        return [reply for reply in self.replies if reply.request > 0 and reply.error is None]

    @property
    def faults(self) -> Counter[str]:
        return Counter(reply.error.partition(":")[0] for reply in self.replies if reply.error)


def summarise(replies: list[Reply], block_size: int | None) -> dict[str, Summary]:
    """Return both arms' summaries."""
    turns = answered_turns(replies)
    reported = cached_tokens_are_reported(replies)
    first_cached = max((reply.cached_tokens or 0 for earlier, reply in turns if not earlier), default=0)
    summaries = {}
    for arm in ("bad", "good"):
        later, found = [], 0
        for earlier, reply in turns:
            if earlier and reply.arm == arm:
                later.append(reply)
                if reported and finds_last_turn(earlier, reply, block_size, first_cached):
                    found += 1
        of_arm = [reply for reply in replies if reply.arm == arm]
        summaries[arm] = Summary(of_arm, later, found if reported else None, first_cached)
    return summaries


def column(arm: Summary) -> dict[str, str]:
    """Return an arm's column of the table, by row."""
    cells = {
        "turns that found their last turn": "not reported",
        "cached / prompt tokens": "not reported",
        "hit rate": "not reported",
        "TTFT, median": "none",
        "TTFT, p90": "none",
    }
    if arm.later and arm.found is not None:
        cached = sum(reply.cached_tokens for reply in arm.later)
        prompt = sum(reply.prompt_tokens for reply in arm.later)
        cells["turns that found their last turn"] = f"{arm.found} of {len(arm.later)}"
        cells["cached / prompt tokens"] = f"{cached:,} / {prompt:,}"
        cells["hit rate"] = f"{hit_rate(arm.later):.1%}"
    if arm.timed:
        cells["TTFT, median"] = milliseconds(statistics.median(reply.ttft_ms for reply in arm.timed))
        cells["TTFT, p90"] = milliseconds(p90(arm.timed))
    return cells


def print_row(name: str, bad: object, good: object) -> None:
    say(f"{name:<34}{bad:>23}{good:>23}")


def print_table(arms: list[Arm], summaries: dict[str, Summary], with_first_turns: dict[str, tuple]) -> None:
    """Print both arms; `with_first_turns` are further rows, with a cell for each arm, about all turns."""
    bad, good = summaries["bad"], summaries["good"]
    bad_column, good_column = column(bad), column(good)
    say("")
    print_row("without first turns", *(f"{arm.name.upper()}: {arm.label}" for arm in arms))
    for name in bad_column:
        print_row(name, bad_column[name], good_column[name])
    say("predicted cached tokens: none, HTTP tells no token ids\n\nwith first turns")
    for name, (bad_cell, good_cell) in with_first_turns.items():
        print_row(name, bad_cell, good_cell)
    for kind in sorted(bad.faults | good.faults) or ["none"]:
        say(f"{f'failed: {kind}':<50}{bad.faults[kind]:>7}{good.faults[kind]:>23}")


def widest_difference(replies: list[Reply]) -> int:
    """Return by how many prompt tokens the same turn of the same session differs at most, in all arms and rounds."""
    lengths: dict[tuple, list[int]] = {}
    for _, reply in answered_turns(replies):
        session, _, _ = reply.session.partition("-")  # without the suffix of its round
        lengths.setdefault((session, reply.request), []).append(reply.prompt_tokens)
    return max((max(tokens) - min(tokens) for tokens in lengths.values()), default=0)


def common_claims(replies: list[Reply], others: list[Reply], apart: int) -> list[Claim]:
    """Return what must hold everywhere, of the sessions' replies and of `others`.

    `apart` is by how many tokens the same turn may differ between the arms.
    """
    sent = replies + others
    failed = [reply for reply in sent if reply.error]
    answered = f"{len(sent) - len(failed)} of {len(sent)} were"
    if failed:
        first, *_ = failed
        answered += f"; the first fault, in {first.arm}, turn {first.request}: {first.error}"
    widest = widest_difference(replies)
    within = f", within {apart} tokens" if apart else ""
    return [
        Claim("every request was answered", not failed, answered),
        Claim(f"both arms send equally long prompts{within}", widest <= apart, f"{widest} tokens apart"),
    ]


# --- what both commands do alike ---


def say(text: str) -> None:
    print(text, flush=True)


def add_options(parser: Parser) -> None:
    """Add the options that say which sessions are sent."""
    add = parser.add_argument
    add("--sessions", metavar="N", type=at_least(2), default=6, help="conversations at the same time (default: 6)")
    add("--requests", metavar="N", type=at_least(2), default=5, help="turns of the longest session (default: 5)")
    add("--prefix-tokens", metavar="N", type=at_least(1), default=2000, help="first turn, about (default: 2000)")
    add("--seed", metavar="N", type=at_least(0), default=0, help="of arrival order and session lengths (default: 0)")
    add("--timeout", type=at_least(1), default=120, metavar="S", help="seconds for one request (default: 120)")
    add("--json", type=json_path, metavar="PATH", help="write every measurement to this file")


def parse(parser: Parser, advice: str = "see --help") -> argparse.Namespace:
    """Return the command line. The error of an unknown argument gives `advice` and does not repeat it: it may be a key.

    Argparse would repeat it.
    """
    args, unknown = parser.parse_known_args()
    if unknown:
        raise UsageError(f"there are arguments that are not known here: {advice}")
    return args


def describe_run(args: argparse.Namespace) -> dict:
    """Return what the numbers of every kind of run depend on; no absolute path in it."""
    words = (re.sub(r"(^|=)/(?:\S*/)?", r"\1", word) for word in sys.orig_argv[1:])
    return {
        "python": platform.python_version(),
        "model": args.served_model,
        "prefix_tokens": args.prefix_tokens,
        "requests": args.requests,
        "sessions": args.sessions,
        "seed": args.seed,
        "started_at": f"{datetime.datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}",
        "command": " ".join(["python", *words]),
    }


def finish(args: argparse.Namespace, program: str, doc: str, verdict: str, content: dict) -> int:
    """Print the verdict and the failed claims, write the JSON, and return the exit status.

    `program` and `doc` are the command's name and docstring, `content` is what the JSON holds beside them.
    """
    claims = content["claims"]
    failed = [claim for claim in claims if not claim.holds]
    say("\n" + "\n".join(textwrap.fill(line, 80) for line in verdict.splitlines()))
    for claim in failed:
        say("\n" + textwrap.fill(f"FAILED: {claim.claim}: {claim.evidence}", 80, subsequent_indent="  "))
    took = f"{content['seconds']['measuring']:.1f} s"
    say(f"\n{len(claims) - len(failed)} of {len(claims)} claims about token counts hold; measuring took {took}")
    if args.json:
        title, *_ = doc.splitlines()
        head = {"schema": 1, "lesson": program, "title": title}
        write_json(args.json, head | content | {"verdict": verdict})
    return 1 if failed else 0
