"""Sessions behind vLLM's own router: round robin against a hash of the session.

A prefix cache belongs to one server. A conversation that comes back to the same
server finds all it has said so far; on another one it starts from nothing. This
starts several OpenAI-compatible vLLM servers on this machine, puts vllm-router
(the vLLM project's own) in front of them, and measures the same multi-turn
sessions through the `openai` client:

  bad   --policy round_robin: each request goes to the next server
  good  --policy consistent_hash: the header x-session-id chooses the server

Both arms send the same text, to empty caches, in the order bad, good, good,
bad. All sessions run at once; who asks first is shuffled every turn, from a
printed seed, since round robin would otherwise be sticky by accident. The
assistant's turns are scripted. No block is shared by two sessions: what a turn
finds was left by an earlier turn of its own session on the same server.

With --base-url the sessions go to a deployment that is already there, with the
session's header and without it, under new names each time, and cached tokens
say whether it is sticky. One prompt sent under many names tells how many
servers it meets: each one misses it once. This needs no vLLM, only the client:
`pip install openai`.

Token counts are what the servers report. HTTP tells no token ids, so cached
tokens are not predicted to the token, as they are in the lessons; where
sessions are kept, every turn must find at least the whole blocks of the turn
before it. TTFT is shown and not judged: it contains the wait for the other
sessions. A request that fails has no TTFT; it is counted under its fault.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import os
import platform
import random
import re
import secrets
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from session_consistency import (
    ANSWER,
    HERE,
    INSTRUCTIONS,
    QUESTIONS,
    WEIGHT_FILES,
    Claim,
    EngineError,
    LessonError,
    Measurement,
    Parser,
    UsageError,
    at_least,
    find_model,
    hit_rate,
    json_path,
    milliseconds,
    p90,
    report,
    root_cause,
    schedule,
    time_verdict,
    use_python_with_vllm,
    worker_places,
    write_json,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI

PROGRAM = "vllm_router_sessions"
POLICIES = {"bad": "round_robin", "good": "consistent_hash"}
ROUTER_HEADER = "x-session-id"  # the first one that vllm-router's consistent_hash looks for
OUTPUT_TOKENS = 8
TURN_TOKENS = 300  # more than a block, so that finding the last turn differs from finding the one before it
TEMPLATE_TOKENS = 64  # what a chat template may put before the text, alike in all sessions
NAMES = 12  # sessions that send one prompt; that all of them meet one of two servers is as likely as 1 to 2048
END_SECONDS = 15
START_SECONDS = 900  # a server may have to download its model first


# --- one session, one request ---


def conversation(name: str, session: int, prefix_tokens: int, turns: int) -> list[list[dict]]:
    """Return the messages of each turn of a session: a long report, and one more part of it every turn.

    The name stands first, so that no block is shared with another name. A token counts as three characters: there is
    no tokenizer here, and the servers report what it really was.
    """
    messages, sent = [{"role": "system", "content": f"{name}\n{INSTRUCTIONS}"}], []
    for turn in range(turns):
        tokens = TURN_TOKENS if turn else prefix_tokens
        part = report(f"session-{session:02}-{turn}", tokens, lambda text: len(text) // 3)
        messages = [*messages, {"role": "user", "content": f"{part}\n{QUESTIONS[turn % len(QUESTIONS)]}"}]
        sent.append(messages)
        messages = [*messages, {"role": "assistant", "content": ANSWER}]
    return sent


class Arm(NamedTuple):
    name: str  # "bad" or "good", as in the lessons
    label: str
    url: str
    header: str | None  # carries the session's name, if sent


@dataclasses.dataclass(frozen=True)
class Reply(Measurement):
    """One request over HTTP: turn `request` of its session. Tokens that no server reported are None."""

    prompt_tokens: int | None
    cached_tokens: int | None
    round: int = 0


def blank(experiment: str, arm: str, session: str, turn: int = 0, round_: int = 0) -> Reply:
    """Return what is known of a request before it is sent: that it has had no token yet."""
    return Reply(experiment, arm, turn, None, session, None, None, None, None, "no token", round=round_)


def open_client(url: str, key: str | None) -> AsyncOpenAI:
    """Return a client that repeats nothing and keeps no cookie: sticky by cookie is sticky for one browser only."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    http = DefaultAsyncHttpxClient(cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])), timeout=None)
    # Without a key one must be given all the same: the client would send the one of OPENAI_API_KEY to any URL.
    return AsyncOpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=None, http_client=http)


def http_faults() -> tuple[type[Exception], ...]:
    """Return what a deployment can make the client raise; up to openai 2 that includes the errors of httpx itself."""
    import openai

    transport = (sys.modules[name].TransportError for name in ("httpx", "httpx2") if name in sys.modules)
    return (TimeoutError, json.JSONDecodeError, UnicodeDecodeError, openai.APIError, *transport)


def origins(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and all that led to it."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            yield from origins(error.exceptions[0])
        error = error.__cause__ or error.__context__


def describe(fault: Exception, keyed: bool) -> str:
    """Return the kind of a fault and, after a colon, what the server said of it.

    Where a key is in use, the server's own words are left out: they may hold the key, in whatever spelling.
    """
    import openai

    if isinstance(fault, TimeoutError):
        return "timeout"
    if isinstance(fault, NoAnswer):
        return "no OpenAI answer"
    if isinstance(fault, openai.APIStatusError):
        phrases = {status.value: f" {status.phrase}" for status in HTTPStatus}
        kind = f"HTTP {fault.status_code}{phrases.get(fault.status_code, '')}"
    elif type(fault) is openai.APIError:
        kind = "error in the stream"
    elif isinstance(fault, json.JSONDecodeError | UnicodeDecodeError | openai.APIResponseValidationError):
        return "no OpenAI answer"
    else:
        kinds = {
            ConnectionRefusedError: "connection refused",
            socket.gaierror: "unknown host",
            ssl.SSLError: "TLS failed",
        }
        found = (kind for error in origins(fault) for known, kind in kinds.items() if isinstance(error, known))
        return next(found, "connection lost")
    said = fault.body.get("message") if isinstance(fault.body, dict) else None
    if keyed or not isinstance(said, str):
        return kind
    return f"{kind}: {''.join(c for c in ' '.join(said.split()) if c.isprintable())[:200]}"


class NoAnswer(Exception):
    """What came is JSON, but not of the form of the OpenAI API."""


def of_type(kind: type, value: object):
    """Return `value`; raise NoAnswer where it is of another type."""
    if not isinstance(value, kind):
        raise NoAnswer
    return value


async def ask(
    client: AsyncOpenAI, args: argparse.Namespace, messages: list[dict], reply: Reply, headers: dict
) -> Reply:
    """Send one turn, read its stream to the end, and return `reply` with what came of it, a fault included."""
    from openai.types.chat import ChatCompletionChunk

    first, ended, spoke, usage = None, False, False, {}
    start = time.perf_counter()
    try:
        async with asyncio.timeout(args.timeout):
            stream = await client.chat.completions.create(
                model=args.served_model, messages=messages, max_tokens=OUTPUT_TOKENS, temperature=0, stream=True,
                stream_options={"include_usage": True}, extra_headers=headers,
            )  # fmt: skip
            async with stream:
                async for chunk in stream:
                    now = time.perf_counter()
                    # The client does not check what it passes on: as a dictionary it has what was sent.
                    body = of_type(ChatCompletionChunk, chunk).to_dict(warnings=False)
                    usage = of_type(dict, body.get("usage") or usage)
                    for choice in of_type(list, body.get("choices") or []):
                        delta = of_type(dict, of_type(dict, choice).get("delta") or {})
                        ended = ended or choice.get("finish_reason") is not None
                        text = any(value for key, value in delta.items() if key != "role")
                        # A token may have no text (random weights make many such); the role alone is no token.
                        if text or (delta.get("role") is None and delta.get("content") is not None):
                            first, spoke = first or now, spoke or text
        prompt, made = (of_type(int | None, usage.get(f"{kind}_tokens")) for kind in ("prompt", "completion"))
        details = of_type(dict, usage.get("prompt_tokens_details") or {})
        cached = of_type(int | None, details.get("cached_tokens"))
    except (NoAnswer, *http_faults()) as fault:
        return dataclasses.replace(reply, error=describe(fault, args.key is not None))
    if first is None or not (spoke or made):
        return reply
    if not ended:
        return dataclasses.replace(reply, error="stream cut off")
    return dataclasses.replace(
        reply, prompt_tokens=prompt, cached_tokens=cached, ttft_ms=(first - start) * 1000, error=None
    )


# --- all sessions ---


def session_lengths(args: argparse.Namespace) -> dict[int, int]:
    """Return how many turns each session has."""
    dice = random.Random(args.seed)
    return {n: dice.randint(max(2, args.requests - 2), args.requests) for n in range(args.sessions)}


async def run_sessions(args: argparse.Namespace, arm: Arm, round_: int, suffix: str) -> list[Reply]:
    """Run all sessions once, turn by turn; a turn in which nobody was answered is the last one."""
    lengths, replies = session_lengths(args), []
    names = {n: f"{n:03}-{suffix}" for n in lengths}
    talks = {n: conversation(names[n], n, args.prefix_tokens, length) for n, length in lengths.items()}
    async with open_client(arm.url, args.key) as client:
        for turn, arrivals in enumerate(schedule(lengths, args.seed + round_)):
            asked = (
                ask(client, args, talks[n][turn], blank("main", arm.name, names[n], turn, round_),
                    {arm.header: names[n]} if arm.header else {})
                for n in arrivals
            )  # fmt: skip
            answers = await asyncio.gather(*asked)
            replies += answers
            if all(answer.error for answer in answers):
                break
    return replies


async def measure(args: argparse.Namespace, arms: list[Arm], cold: Callable[[], str]) -> list[Reply]:
    """Run all sessions four times: bad, good, good, bad. `cold` prepares each and returns what names end with."""
    lengths, replies = session_lengths(args), []
    turns = f"{min(lengths.values())} to {max(lengths.values())} turns"
    say(f"{args.sessions} sessions of {turns}, all at once, shuffled every turn (seed {args.seed})")
    for round_, ordered in enumerate((arms, arms[::-1])):
        for arm in ordered:
            suffix, start = cold(), time.perf_counter()
            found = await run_sessions(args, arm, round_, suffix)
            took = f"{time.perf_counter() - start:.1f} s"
            say(f"round {round_ + 1}  {arm.label:<24}{len(found):>4} requests in {took}")
            replies += found
    return with_zeros(replies)


def with_zeros(replies: list[Reply]) -> list[Reply]:
    """Fill in what some releases of vLLM leave out: an answer for which nothing was cached is then without a report."""
    if not any(reply.cached_tokens is not None for reply in replies):
        return replies
    silent = [reply.prompt_tokens is not None and reply.cached_tokens is None for reply in replies]
    return [dataclasses.replace(r, cached_tokens=0) if s else r for r, s in zip(replies, silent, strict=True)]


# --- what it means ---


def answered_turns(replies: list[Reply]) -> list[tuple[list[int], Reply]]:
    """Return every answered turn with the prompt tokens of its session's answered turns before it."""
    sessions: dict[tuple, list[int]] = {}
    found = []
    for reply in sorted(replies, key=lambda reply: reply.request):
        if reply.error is None and reply.prompt_tokens is not None:
            earlier = sessions.setdefault((reply.arm, reply.round, reply.session), [])
            found.append((list(earlier), reply))
            earlier.append(reply.prompt_tokens)
    return found


def finds_last_turn(earlier: list[int], reply: Reply, block_size: int | None, shared: int) -> bool:
    """Say whether a turn found its session's last turn.

    That is all whole blocks of it; or, with blocks of unknown size, more than the turn before the last could have
    left, and more than the `shared` tokens that even first turns find.
    """
    if block_size is not None:
        return reply.cached_tokens >= earlier[-1] // block_size * block_size
    return reply.cached_tokens > max(shared, *earlier[-2:-1], 0)


class Summary(NamedTuple):
    """One arm. Later turns are those after a session's first, which fills the cache."""

    replies: list[Reply]
    later: list[Reply]
    found: int | None  # how many later turns found their last turn; None where no cached tokens are reported
    first_cached: int  # the most that a first turn found, in tokens

    @property
    def timed(self) -> list[Reply]:
        return [reply for reply in self.replies if reply.request > 0 and reply.error is None]

    @property
    def faults(self) -> Counter[str]:
        return Counter(reply.error.partition(":")[0] for reply in self.replies if reply.error)


def summarise(replies: list[Reply], block_size: int | None) -> dict[str, Summary]:
    """Return both arms' summaries."""
    turns = answered_turns(replies)
    reported = any(reply.cached_tokens is not None for reply in replies)
    first_cached = max((reply.cached_tokens or 0 for earlier, reply in turns if not earlier), default=0)
    summaries = {}
    for arm in ("bad", "good"):
        later = [(earlier, reply) for earlier, reply in turns if earlier and reply.arm == arm]
        found = sum(finds_last_turn(*turn, block_size, first_cached) for turn in later) if reported else None
        mine = [reply for reply in replies if reply.arm == arm]
        summaries[arm] = Summary(mine, [reply for _, reply in later], found, first_cached)
    return summaries


def print_table(
    arms: list[Arm],
    summaries: dict[str, Summary],
    work: dict[str, list[int]] | None = None,
    servers: dict[str, int] | None = None,
) -> None:
    """Print both arms; `work` is what each server computed, in tokens, `servers` how many of them one prompt met."""

    def counted(cell: Callable[[Summary], str]) -> Callable[[Summary], str]:
        return lambda arm: cell(arm) if arm.later and arm.found is not None else "not reported"

    def timed(statistic: Callable[[list[Reply]], float]) -> Callable[[Summary], str]:
        return lambda arm: milliseconds(statistic(arm.timed)) if arm.timed else "none"

    def tokens(arm: Summary) -> str:
        cached, sent = (sum(getattr(reply, f"{kind}_tokens") for reply in arm.later) for kind in ("cached", "prompt"))
        return f"{cached:,} / {sent:,}"

    rows = {
        "turns that found their last turn": counted(lambda arm: f"{arm.found} of {len(arm.later)}"),
        "cached / prompt tokens": counted(tokens),
        "hit rate": counted(lambda arm: f"{hit_rate(arm.later):.1%}"),
        "TTFT, median": timed(lambda timed: statistics.median(reply.ttft_ms for reply in timed)),
        "TTFT, p90": timed(p90),
    }
    titles = [f"{arm.name.upper()}: {arm.label}" for arm in arms]
    say(f"\n{'without first turns':<34}{titles[0]:>23}{titles[1]:>23}")
    for name, cell in rows.items():
        say(f"{name:<34}{cell(summaries['bad']):>23}{cell(summaries['good']):>23}")
    say("predicted cached tokens: none, HTTP tells no token ids\n\nwith first turns")
    if work:
        shares = [f"{max(work[arm]) / max(1, sum(work[arm])):.0%}" for arm in summaries]
        say(f"{'computed by the busiest server':<34}{shares[0]:>23}{shares[1]:>23}")
    if servers:
        say(f"{f'servers met by {NAMES} x one prompt':<34}{servers['bad']:>23}{servers['good']:>23}")
    bad, good = (arm.faults for arm in summaries.values())
    for kind in sorted(bad | good) or ["none"]:
        say(f"{f'failed: {kind}':<50}{bad[kind]:>7}{good[kind]:>23}")


def common_claims(replies: list[Reply], more: list[Reply], apart: int) -> list[Claim]:
    """Return what must hold everywhere; `apart` is by how many tokens the same turn may differ between the arms."""
    sent = replies + more
    failed = [reply for reply in sent if reply.error]
    evidence = f"{len(sent) - len(failed)} of {len(sent)} were"
    if failed:
        evidence += f"; the first fault, in {failed[0].arm}, turn {failed[0].request}: {failed[0].error}"
    lengths: dict[tuple, list[int]] = {}
    for _, reply in answered_turns(replies):
        lengths.setdefault((reply.session.partition("-")[0], reply.request), []).append(reply.prompt_tokens)
    widest = max((max(found) - min(found) for found in lengths.values()), default=0)
    within = f", within {apart} tokens" if apart else ""
    return [
        Claim("every request was answered", not failed, evidence),
        Claim(f"both arms send equally long prompts{within}", widest <= apart, f"{widest} tokens apart"),
    ]


# --- servers and routers on this machine ---


class Child(NamedTuple):
    name: str
    url: str
    log: Path
    process: subprocess.Popen


def start(name: str, port: int, command: list[str], folder: Path, **environment: str) -> Child:
    """Start a command in a process group of its own, with its output in a log."""
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=os.environ | environment,
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    return Child(name, f"http://127.0.0.1:{port}", log, process)


@contextlib.contextmanager
def ending(children: list[Child]) -> Iterator[None]:
    """End all children, and what they started, on leaving. Where this process is killed, its watchdog does that."""
    try:
        yield
    finally:
        for child in children:
            child.process.terminate()
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(END_SECONDS)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()


def free_ports(count: int) -> list[int]:
    """Return loopback ports that are free now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]


def child_failed(child: Child, what: str) -> EngineError:
    """Return the error with the root cause from the child's log, and the name under which that log is kept."""
    text = child.log.read_text(errors="replace")
    kept = shutil.copy(child.log, child.log.parent.with_suffix(".log"))
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "its log is empty")
    return EngineError(f"{child.name} {what}: {root_cause(EngineError(last), text)} (its log: {kept})")


def wait_until_healthy(children: list[Child]) -> None:
    """Wait until all of them answer; raise EngineError where one ends before that."""
    waiting, end = list(children), time.monotonic() + START_SECONDS
    while waiting:
        for child in list(waiting):
            if child.process.poll() is not None:
                raise child_failed(child, f"ended with status {child.process.returncode}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{child.url}/health", timeout=5).close()
                waiting.remove(child)
        if waiting and time.monotonic() > end:
            raise child_failed(waiting[0], f"did not answer within {START_SECONDS} s")
        time.sleep(0.2)


def call(server: Child, path: str, method: str = "GET") -> str:
    """Return what a server answers outside the OpenAI API; raise EngineError where it does not."""
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, method=method), timeout=60) as answer:
            return answer.read().decode()
    except OSError as error:
        raise child_failed(server, f"did not answer {path}") from error


def empty_cache(server: Child) -> None:
    """Empty a server's prefix cache. It refuses while a block is in use: until shortly after the last request."""
    end = time.monotonic() + 10
    while not json.loads(call(server, "/reset_prefix_cache", "POST"))["success"]:
        if time.monotonic() > end:
            raise EngineError(f"{server.name} did not reset its prefix cache: a block is still in use")
        time.sleep(0.1)


def cache_counters(server: Child) -> Counter[str]:
    """Return a server's own count of prefix cache hits and queries, in tokens, since it was started."""
    from prometheus_client.parser import text_string_to_metric_families  # comes with vLLM

    names = {"vllm:prefix_cache_hits_total": "hits", "vllm:prefix_cache_queries_total": "queries"}
    counters = Counter()
    for family in text_string_to_metric_families(call(server, "/metrics")):
        for sample in family.samples:
            if sample.name in names:
                counters[names[sample.name]] += int(sample.value)
    return counters


def server_command(model: str, served: str, on_gpu: bool) -> list[str]:
    """Return the command of one server, without host and port."""
    path = Path(model)
    real = not path.is_dir() or any(file for pattern in WEIGHT_FILES for file in path.glob(pattern))
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", served,
        "--load-format", "auto" if real else "dummy", "--enforce-eager", "--max-num-seqs", "16",
        "--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-hybrid-kv-cache-manager",
        # The longest prompt is what fits into this cache. With its size given, the utilization is but a check at the
        # start; 0.1 keeps it out of the way of several servers on one GPU.
        "--kv-cache-memory-bytes", str(2**31 if on_gpu else 2**29), "--max-model-len", "auto",
        "--gpu-memory-utilization", "0.1",
    ]  # fmt: skip


def clean_up_after(tool: int, folder: str) -> None:
    """Wait until process `tool` ends, however it ends; then end what it started and remove its folder.

    Runs as a process of its own: SIGKILL leaves a tool no time for anything, and its servers would live on.
    """
    import os, shutil, signal, time  # noqa: E401, I001

    while os.getppid() == tool:
        time.sleep(0.2)
    mark, left = f"KV_LESSON={folder}".encode(), True
    while left:
        left = False
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as environ, open(f"/proc/{pid}/cmdline", "rb") as command:
                    # multiprocessing's resource tracker frees shared memory once the others are gone, and then ends
                    if mark in environ.read().split(b"\0") and b"resource_tracker" not in command.read():
                        os.kill(int(pid), signal.SIGKILL)
                        left = True
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue
    shutil.rmtree(folder, ignore_errors=True)


def make_folder() -> Path:
    """Return a folder for sockets and logs. From here on it, and all that is started, vanish when this process ends."""
    folder = Path(tempfile.gettempdir()) / f"kv-{uuid.uuid4().hex[:12]}"
    watchdog = f"{inspect.getsource(clean_up_after)}\nclean_up_after({os.getpid()}, {str(folder)!r})"
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    subprocess.Popen([sys.executable, "-I", "-S", "-c", watchdog], start_new_session=True, **quiet)
    folder.mkdir()
    # SPT_NOENV: vLLM renames its processes, and must not write the new name over the mark in their environment.
    os.environ.update(KV_LESSON=str(folder), SPT_NOENV="1", TMPDIR=str(folder), VLLM_NO_USAGE_STATS="1")
    return folder


def server_place(place: tuple[list[str], list[list[int]]], n: int) -> dict[str, str]:
    """Return the environment that gives server `n` a GPU of its own where there are enough, else cores of its own."""
    gpus, cores = place
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[n]}
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores[n]))}  # read by the CPU build only


def start_all(args: argparse.Namespace, children: list[Child]) -> list[str]:
    """Start servers and one router per policy, add them to `children`, and return the servers' command."""
    versions = [found.version for found in importlib.metadata.distributions(name="vllm")]
    on_gpu = bool(versions) and "cpu" not in versions[0]  # none: the CPU build is distributed as vllm-cpu
    place = worker_places(on_gpu, args.workers)
    model = find_model(args.model or str(HERE / "built_in_model" / ("1.5b" if on_gpu else "cpu")))
    is_folder = args.model is None or Path(args.model).is_dir()
    args.served_model = "/".join(Path(model).parts[-2:]) if is_folder else args.model
    for name in ("no_proxy", "NO_PROXY"):  # the router, no Python program, asks the servers too
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))
    folder = make_folder()
    command = server_command(model, args.served_model, on_gpu)
    for n, port in enumerate(free_ports(args.workers)):
        own = server_place(place, n)
        children.append(start(f"server {n}", port, command, folder, VLLM_SERVER_DEV_MODE="1", **own))
    servers = list(children)
    wait_until_healthy(servers)
    for policy in POLICIES.values():
        port, metrics = free_ports(2)
        router = [
            sys.executable, "-m", "vllm_router.launch_router", "--policy", policy, "--disable-retries",
            "--prometheus-port", str(metrics), "--worker-urls", *(server.url for server in servers),
        ]  # fmt: skip
        children.append(start(f"router {policy}", port, router, folder))
    wait_until_healthy(children)
    return command


def device(kind: str) -> str:
    """Return the name of what the servers run on; `kind` is vLLM's word for it."""
    if kind == "cpu":
        return f"CPU ({len(os.sched_getaffinity(0))} cores)"
    if kind != "cuda":
        return kind
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


async def warm_up(args: argparse.Namespace, servers: list[Child]) -> int:
    """Send unrelated text of full length to every server, twice new and once known; return its tokens."""

    async def one(server: Child) -> list[Reply]:
        names = ("1", "2", "2")
        talks = [conversation(f"warm-up {name}", 99, args.prefix_tokens, args.requests)[-1] for name in names]
        async with open_client(f"{server.url}/v1", None) as client:
            return [await ask(client, args, talk, blank("warm_up", "decoy", "warm-up"), {}) for talk in talks]

    replies = [reply for found in await asyncio.gather(*map(one, servers)) for reply in found]
    for reply in replies:
        if reply.error:
            raise LessonError(f"a server did not take the longest prompt: {reply.error}")
    return max(reply.prompt_tokens for reply in replies)


def routed_claims(summaries: dict[str, Summary], work: dict[str, list[int]], counters: Counter[str]) -> list[Claim]:
    """Return what must hold of the servers and routers that were started here."""
    bad, good = summaries["bad"], summaries["good"]
    turns = [reply for _, reply in answered_turns(bad.replies + good.replies)]
    cached = [sum(reply.cached_tokens or 0 for reply in arm.later) for arm in (bad, good)]
    summed = Counter(hits=sum(m.cached_tokens or 0 for m in turns), queries=sum(m.prompt_tokens for m in turns))
    kept = good.found == len(good.later) > 0
    evidence = f"hits / queries {counters['hits']:,} / {counters['queries']:,}"
    return [
        Claim("first turns find no more than a chat template's head: the caches are cold",
              bad.first_cached <= TEMPLATE_TOKENS,
              f"at most {bad.first_cached:,} tokens found"),
        Claim("with consistent_hash every later turn finds its session's earlier whole blocks", kept,
              f"{good.found} of {len(good.later)} turns"),
        Claim("consistent_hash finds more cached tokens than round_robin", cached[1] > cached[0],
              f"{cached[1]:,} and {cached[0]:,} tokens"),
        Claim("round_robin uses every server", min(work["bad"]) > 0, f"tokens computed: {work['bad']}"),
        Claim("vLLM's own counters agree with the requests", counters == summed,
              f"{evidence}; requests {summed['hits']:,} / {summed['queries']:,}"),
    ]  # fmt: skip


def routed_verdict(bad: Summary, good: Summary) -> str:
    if not (bad.later and good.later):
        return "Nothing can be said: in one arm no session was given a second answer."
    computed = [sum(reply.computed_tokens for reply in arm.later) for arm in (bad, good)]
    tokens = f"The same turns: round_robin computes {computed[0]:,} tokens, consistent_hash {computed[1]:,}."
    return f"{tokens}\n{time_verdict(bad.later, good.later, alone=False)}"


def check_capacity(sessions: int, longest: int, kv_cache_tokens: int) -> None:
    """Raise UsageError unless one server can hold all sessions: what is evicted would pass for what was moved."""
    if sessions * longest > kv_cache_tokens:
        raise UsageError(
            f"{sessions} sessions of up to {longest:,} tokens do not fit into the KV cache of one server, "
            f"{kv_cache_tokens:,} tokens: take fewer --sessions, or a smaller --prefix-tokens or --requests"
        )


def route(args: argparse.Namespace) -> int:
    """Start servers and routers, measure, end them, and return the exit status."""
    use_python_with_vllm()
    if importlib.util.find_spec("vllm_router") is None:
        raise LessonError(f"vllm-router is missing: run {sys.executable} -m pip install -r requirements-router.txt")
    router_version = importlib.metadata.version("vllm-router")
    say(f"Starting {args.workers} vLLM servers, then vllm-router {router_version}: about a minute...")
    children: list[Child] = []
    snapshots: list[list[Counter[str]]] = []
    seconds = dict.fromkeys(("imports", "engine_start", "warm_up", "measuring"), 0.0)

    @contextlib.contextmanager
    def timed(what: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds[what] = time.perf_counter() - begin

    def cold() -> str:
        for server in servers:
            empty_cache(server)
        snapshots.append([cache_counters(server) for server in servers])
        return "10482"  # the same text each time

    with ending(children):
        with timed("engine_start"):
            command = start_all(args, children)
        servers, routers = children[: args.workers], children[args.workers :]
        config = json.loads(call(servers[0], "/server_info?config_format=json"))["vllm_config"]
        environment = describe_run(args) | {
            "vllm": json.loads(call(servers[0], "/version"))["version"],
            "torch": importlib.metadata.version("torch"),
            "transformers": importlib.metadata.version("transformers"),
            "vllm_router": router_version,
            "device": device(config["device_config"]["device"]),
            "weights": "real" if command[command.index("--load-format") + 1] == "auto" else "random",
            "dtype": config["model_config"]["dtype"].removeprefix("torch."),
            "block_size": config["cache_config"]["block_size"],
            "kv_cache_tokens": config["cache_config"]["num_gpu_blocks"] * config["cache_config"]["block_size"],
            "workers": args.workers,
        }
        with timed("warm_up"):
            longest = asyncio.run(warm_up(args, servers))
        say(
            "vLLM {vllm} on {device}, {model} with {weights} weights, {dtype}\n"
            "{workers} servers, each with blocks of {block_size} tokens, KV cache of {kv_cache_tokens:,} tokens\n"
            "start {engine_start:.1f} s, warm-up {warm_up:.1f} s\n".format_map(environment | seconds)
        )
        check_capacity(args.sessions, longest, environment["kv_cache_tokens"])
        fronts = zip(POLICIES.items(), routers, strict=True)
        arms = [Arm(name, policy, f"{router.url}/v1", ROUTER_HEADER) for (name, policy), router in fronts]
        with timed("measuring"):
            replies = asyncio.run(measure(args, arms, cold))
        cold()
    work = {name: [0] * args.workers for name in POLICIES}
    for name, (before, after) in zip(("bad", "good", "good", "bad"), itertools.pairwise(snapshots), strict=True):
        for n, (b, a) in enumerate(zip(before, after, strict=True)):
            work[name][n] += (a["queries"] - b["queries"]) - (a["hits"] - b["hits"])
    counters = sum(snapshots[-1], Counter())
    counters.subtract(sum(snapshots[0], Counter()))
    summaries = summarise(replies, environment["block_size"])
    print_table(arms, summaries, work)
    claims = common_claims(replies, [], 0) + routed_claims(summaries, work, counters)
    content = {"environment": environment, "seconds": seconds, "measurements": replies, "claims": claims}
    return finish(args, routed_verdict(*summaries.values()), content | {"computed_tokens_per_worker": work})


# --- a deployment that is already there ---


async def send_one_prompt_under_many_names(args: argparse.Namespace, arms: list[Arm]) -> list[Reply]:
    """Send a new prompt again and again, each time for another session: every server that it reaches misses it once."""
    replies = []
    for arm in arms:
        suffix = new_suffix()
        prompt = conversation(f"{NAMES:03}-{suffix}", 0, args.prefix_tokens, args.requests)[-1]
        async with open_client(arm.url, args.key) as client:
            for n in range(NAMES):
                name = f"{n:03}-{suffix}"
                headers = {arm.header: name} if arm.header else {}
                replies.append(await ask(client, args, prompt, blank("servers", arm.name, name), headers))
    return replies


def servers_reached(replies: list[Reply], arm: str) -> int:
    """Return how many of an arm's answers found less than half of the prompt that all of them were sent."""
    answered = [reply for reply in replies if reply.arm == arm and reply.error is None]
    return sum(reply.cached_tokens < reply.prompt_tokens / 2 for reply in answered)


def stickiness(bad: Summary, good: Summary, header: str, servers: dict[str, int]) -> tuple[bool | None, str]:
    """Say from cached tokens alone whether a deployment keeps a session on its server; None: they cannot tell.

    `servers` holds how many servers one prompt reached without the header ("bad") and under many names ("good").
    """
    answered, unclear = [r for r in bad.replies + good.replies if r.error is None], "Cannot tell whether it is sticky:"
    if any(reply.prompt_tokens is None for reply in answered):
        return None, f"{unclear} answers come without usage, in spite of stream_options.include_usage."
    if not (bad.later and good.later):
        return None, f"{unclear} in one arm no session was given a second answer."
    if good.found is None:
        switch = "vLLM reports them when it is started with --enable-prompt-tokens-details."
        return None, f"{unclear} no answer reports cached tokens.\n{switch}"
    if good.first_cached > min(reply.prompt_tokens for reply in answered) / 2:
        return None, f"{unclear} a first turn, never sent before, finds {good.first_cached:,} tokens."
    if all(reply.cached_tokens <= good.first_cached for reply in bad.later + good.later):
        reasons = "Prefix caching is off, or the cache too small, or every turn meets another server."
        return None, f"{unclear} later turns find no more than first ones. {reasons}"
    without = f"without it {bad.found} of {len(bad.later)}"
    if good.found < len(good.later):
        counts = f"with it {good.found} of {len(good.later)} later turns find their last turn"
        return False, f"Not sticky by {header}: {counts}, {without}."
    if bad.found == len(bad.later):
        if servers["good"] < 2:
            reasons = f"but {NAMES} names reach one server: there is no other, or it is chosen by the prompt."
            return True, f"All later turns find their last turn, {reasons}"
        without = f"without it one prompt always meets {'one server' if servers['bad'] < 2 else 'several servers'}"
    return True, f"Sticky by {header}: with it all later turns find their last turn, {without}."


def new_suffix() -> str:
    """Return what was never sent, always equally long: so nothing is found that another run, or a former day, left."""
    return f"{secrets.randbelow(10**8):08}"


async def find_served_model(args: argparse.Namespace) -> str:
    """Return the first model that the deployment lists; LessonError where it lists none."""
    hint = "check --base-url, which mostly ends in /v1, or name the model with --served-model"
    async with open_client(args.base_url, args.key) as client:
        try:
            async with asyncio.timeout(args.timeout):
                # Not client.models.list(): that fails inside on an answer that is no list of models.
                listed = await client.get("/models", cast_to=object)
        except http_faults() as fault:
            raise LessonError(f"no list of models: {describe(fault, args.key is not None)}; {hint}") from fault
    match listed:
        case {"data": [{"id": str(name)}, *_]}:
            return name
    raise LessonError(f"no list of models: {hint}")


def probe(args: argparse.Namespace) -> int:
    """Measure a deployment with the session's header and without it, and return the exit status."""
    if importlib.util.find_spec("openai") is None:
        raise LessonError(f"the openai client is missing: run {sys.executable} -m pip install openai")
    args.served_model = args.served_model or asyncio.run(find_served_model(args))
    client, header = importlib.metadata.version("openai"), args.session_header
    say(f"{args.served_model} at {args.base_url}\nopenai client {client}; the session's header: {header}\n")
    arms = [Arm("bad", "no header", args.base_url, None), Arm("good", "with header", args.base_url, header)]
    begin = time.perf_counter()
    replies, more = asyncio.run(measure(args, arms, new_suffix)), []
    if any(reply.cached_tokens for reply in replies):
        more = with_zeros(asyncio.run(send_one_prompt_under_many_names(args, arms)))
    servers = {arm: servers_reached(more, arm) for arm in ("bad", "good")} if more else None
    seconds = dict(imports=0.0, engine_start=0.0, warm_up=0.0, measuring=time.perf_counter() - begin)
    summaries = summarise(replies, None)
    print_table(arms, summaries, servers=servers)
    unknown = ("vllm", "torch", "transformers", "device", "weights", "dtype", "block_size", "kv_cache_tokens")
    environment = describe_run(args) | dict.fromkeys(unknown)
    environment |= {"openai": client, "base_url": args.base_url, "session_header": header}
    sticky, verdict = stickiness(*summaries.values(), header, servers)
    reported, good = sum(reply.cached_tokens is not None for reply in replies), summaries["good"]
    claims = [
        *common_claims(replies, more, 16),
        Claim("cached tokens are reported", reported > 0, f"by {reported} of {len(replies)} answers"),
        Claim(f"with {header} every later turn finds its session's last turn", sticky is True,
              f"{good.found} of {len(good.later)} turns" if reported else "not reported"),
    ]  # fmt: skip
    content = {"environment": environment, "seconds": seconds, "measurements": replies + more, "claims": claims}
    return finish(args, verdict, content | {"sticky": sticky, "servers_reached": servers})


# --- the command ---


def say(text: str) -> None:
    print(text, flush=True)


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


def finish(args: argparse.Namespace, verdict: str, content: dict) -> int:
    """Print the verdict and the failed claims, write the JSON, and return the exit status."""
    claims = content["claims"]
    failed = [claim for claim in claims if not claim.holds]
    say("\n" + "\n".join(textwrap.fill(line, 80) for line in verdict.splitlines()))
    for claim in failed:
        say("\n" + textwrap.fill(f"FAILED: {claim.claim}: {claim.evidence}", 80, subsequent_indent="  "))
    took = f"{content['seconds']['measuring']:.1f} s"
    say(f"\n{len(claims) - len(failed)} of {len(claims)} claims about token counts hold; measuring took {took}")
    if args.json:
        head = {"schema": 1, "lesson": PROGRAM, "title": __doc__.splitlines()[0]}
        write_json(args.json, head | content | {"verdict": verdict})
    return 1 if failed else 0


def parse_args() -> argparse.Namespace:
    """Return the checked command line with the API key as `key`. An error never repeats what may be one."""
    name = f"python -m going_further.{PROGRAM}"
    parser = Parser(__doc__, prog=name)
    add = parser.add_argument
    add("--workers", metavar="N", type=at_least(2), help="vLLM servers to start (default: 2)")
    add("--model", metavar="M", help="a folder or a hub name (default: built_in_model, random weights, no download)")
    add("--sessions", metavar="N", type=at_least(2), default=6, help="conversations at the same time (default: 6)")
    add("--requests", metavar="N", type=at_least(2), default=5, help="turns of the longest session (default: 5)")
    add("--prefix-tokens", metavar="N", type=at_least(1), default=2000, help="first turn, about (default: 2000)")
    add("--seed", metavar="N", type=at_least(0), default=0, help="of arrival order and session lengths (default: 0)")
    add("--timeout", type=at_least(1), default=120, metavar="S", help="seconds for one request (default: 120)")
    add("--json", type=json_path, metavar="PATH", help="write every measurement to this file")
    add = parser.add_argument_group("a deployment that is already there").add_argument
    add("--base-url", metavar="URL", help="its OpenAI-compatible API, like http://127.0.0.1:8000/v1")
    add("--api-key-env", metavar="NAME", help="the environment variable that holds its API key")
    add("--session-header", metavar="NAME", help=f"the header that carries the session (default: {ROUTER_HEADER})")
    add("--served-model", metavar="NAME", help="its model (default: the first one that it lists)")
    args, unknown = parser.parse_known_args()
    if unknown:  # argparse would repeat them
        raise UsageError("there are arguments that are not known here: see --help; a key is given by --api-key-env")
    args.key = None
    if args.base_url is None:
        if args.api_key_env or args.session_header or args.served_model:
            raise UsageError("--api-key-env, --session-header and --served-model go with --base-url")
        args.workers = args.workers or 2
        return args
    if args.workers or args.model:
        raise UsageError("--workers and --model start servers, --base-url does not: give one or the other")
    check_url(args.base_url)
    args.session_header = args.session_header or ROUTER_HEADER
    if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", args.session_header, re.ASCII):
        raise UsageError("--session-header takes the name of an HTTP header, like x-session-id")
    if args.api_key_env is not None:
        args.key = os.environ.get(args.api_key_env)
        if not args.key:
            raise UsageError("--api-key-env takes the name of an environment variable; the one it names is not set")
        if not re.fullmatch(r"[!-~]+", args.key):
            raise UsageError("the API key holds a blank, a line break or another character that no header takes")
    return args


def check_url(url: str) -> None:
    """Raise UsageError where `url` is no address of an API, or holds what must not be printed."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number or too large, half an IPv6 address
        usable = False
    if not usable:
        raise UsageError("--base-url takes an address with http:// or https://, like http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError("--base-url holds more than an address: give a key with --api-key-env")


def stop(signum: int, _: object) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, b"interrupted\n")
    os._exit(128 + signum)  # the watchdog of make_folder() ends what was started


def main() -> int:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop)
    try:
        args = parse_args()
        return probe(args) if args.base_url else route(args)
    except LessonError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr, flush=True)
        return error.status


if __name__ == "__main__":
    sys.exit(main())
