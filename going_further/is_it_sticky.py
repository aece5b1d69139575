"""Is a deployment sticky? The same sessions with and without a header for them.

    python -m going_further.is_it_sticky http://127.0.0.1:8000/v1

A prefix cache belongs to one server. A conversation that comes back to the same
server finds all it has said so far; on another one it starts from nothing. This
sends multi-turn sessions to an OpenAI-compatible API that is already there, and
the cached tokens that it reports say whether a session stays with its server:

  bad   no request tells its session
  good  each does, in the header x-session-id (another one: --session-header)

Both arms send the same text in the order bad, good, good, bad, under new names
each time: nothing that was sent before is found. All sessions run at once; who
asks first is shuffled every turn, from a printed seed. The assistant's turns
are scripted. No block is shared by two sessions: what a turn finds was left by
an earlier turn of its own session on the same server. Last, one prompt sent
under many names tells how many servers it meets: each one misses it once.

This needs no vLLM, only the client: `pip install openai`. It keeps no cookie:
sticky by cookie is sticky for one browser only. A key is taken from the
environment variable that --api-key-env names, and is never shown.

Token counts are what the servers report. TTFT is shown and not judged: it
contains the wait for the other sessions. A request that fails has no TTFT; it
is counted under its fault.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import importlib.util
import os
import re
import secrets
import sys
import time
from urllib.parse import urlsplit

from going_further.common import Claim, LessonError, Parser, UsageError, run_command, shown
from going_further.http_sessions import (
    SESSION_HEADER,
    Arm,
    Reply,
    Summary,
    add_options,
    ask,
    cached_tokens_are_reported,
    common_claims,
    conversation,
    describe,
    describe_run,
    finish,
    http_faults,
    measure,
    open_client,
    parse,
    print_table,
    say,
    summarise,
    with_zeros,
)

PROGRAM = "is_it_sticky"
NAMES = 12  # sessions that send one prompt; that all of them meet one of two servers is as likely as 1 to 2048
APART = 16  # tokens by which a turn may differ between the arms: new names have other tokens
# What a lesson's JSON tells of its engine, and HTTP does not.
UNKNOWN = ("vllm", "torch", "transformers", "device", "weights", "dtype", "block_size", "kv_cache_tokens")


def new_suffix() -> str:
    """Return what was never sent, always equally long: so nothing is found that another run, or a former day, left."""
    return f"{secrets.randbelow(10**8):08}"


# --- how many servers there are ---


async def send_one_prompt_under_many_names(args: argparse.Namespace, arms: list[Arm]) -> list[Reply]:
    """Send a new prompt again and again, each time for another session: every server that it reaches misses it once."""
    replies = []
    for arm in arms:
        suffix = new_suffix()
        *_, prompt = conversation(f"{NAMES:03}-{suffix}", 0, args.prefix_tokens, args.requests)
        async with open_client(arm.url, args.key) as client:
            for n in range(NAMES):
                name = f"{n:03}-{suffix}"
                reply = Reply(experiment="servers", arm=arm.name, session=name)
                replies.append(await ask(client, args, prompt, reply, arm.headers(name)))
    return replies


def servers_reached(replies: list[Reply], arm: str) -> int:
    """Return how many of an arm's answers found less than half of the prompt that all of them were sent."""
    reached = 0
    for reply in replies:
        answered = reply.arm == arm and reply.error is None and reply.prompt_tokens is not None
        if answered and reply.cached_tokens < reply.prompt_tokens / 2:
            reached += 1
    return reached


# --- the verdict ---


def why_unclear(bad: Summary, good: Summary) -> str | None:
    """Return why cached tokens cannot tell whether a deployment is sticky; None: they can."""
    answered = [reply for reply in bad.replies + good.replies if reply.error is None]
    if any(reply.prompt_tokens is None for reply in answered):
        return "answers come without usage, in spite of stream_options.include_usage."
    if not (bad.later and good.later):
        return "in one arm no session was given a second answer."
    if good.found is None:
        switch = "vLLM reports them when it is started with --enable-prompt-tokens-details."
        return f"no answer reports cached tokens.\n{switch}"
    if good.first_cached > min(reply.prompt_tokens for reply in answered) / 2:
        return f"a first turn, never sent before, finds {good.first_cached:,} tokens."
    if all(reply.cached_tokens <= good.first_cached for reply in bad.later + good.later):
        reasons = "Prefix caching is off, or the cache too small, or every turn meets another server."
        return f"later turns find no more than first ones. {reasons}"
    return None


def stickiness(bad: Summary, good: Summary, header: str, servers: dict[str, int] | None) -> tuple[bool | None, str]:
    """Say from cached tokens alone whether a deployment keeps a session on its server; None: they cannot tell.

    `servers` holds how many servers one prompt reached without the header ("bad") and under many names ("good"); it is
    None only where no cached tokens were found.
    """
    unclear = why_unclear(bad, good)
    if unclear is not None:
        return None, f"Cannot tell whether it is sticky: {unclear}"
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


# --- the command ---


async def find_served_model(args: argparse.Namespace) -> str:
    """Return the first model that the deployment lists; LessonError where it lists none."""
    hint = "check the URL, which mostly ends in /v1, or name the model with --served-model"
    async with open_client(args.url, args.key) as client:
        try:
            async with asyncio.timeout(args.timeout):
                # Not client.models.list(): that fails inside on an answer that is no list of models.
                listed = await client.get("/models", cast_to=object)
        except http_faults() as fault:
            raise LessonError(f"no list of models: {describe(fault, args.key is not None)}; {hint}") from fault
    match listed:
        case {"data": [{"id": str(name)}, *_]}:
            if args.key is not None and args.key in name:  # it would be printed
                raise LessonError("the server's list of models repeats the API key; name the model with --served-model")
            return name
    raise LessonError(f"no list of models: {hint}")


def probe(args: argparse.Namespace) -> int:
    """Measure a deployment with the session's header and without it, and return the exit status."""
    if importlib.util.find_spec("openai") is None:
        raise LessonError(f"the openai client is missing: run {sys.executable} -m pip install openai")
    args.served_model = args.served_model or asyncio.run(find_served_model(args))
    version = importlib.metadata.version("openai")
    header = args.session_header
    say(f"{shown(args.served_model)} at {args.url}\nopenai client {version}; the session's header: {header}\n")
    arms = [Arm("bad", "no header", args.url, None), Arm("good", "with header", args.url, header)]
    began = time.perf_counter()
    replies = asyncio.run(measure(args, arms, new_suffix))
    under_many_names: list[Reply] = []
    servers: dict[str, int] | None = None
    if any(reply.cached_tokens for reply in replies):
        under_many_names = with_zeros(asyncio.run(send_one_prompt_under_many_names(args, arms)))
        servers = {arm.name: servers_reached(under_many_names, arm.name) for arm in arms}
    seconds = dict(imports=0.0, engine_start=0.0, warm_up=0.0, measuring=time.perf_counter() - began)
    summaries = summarise(replies, block_size=None)
    bad, good = summaries["bad"], summaries["good"]
    print_table(arms, summaries, servers_row(servers))
    sticky, verdict = stickiness(bad, good, header, servers)
    about_servers = {"openai": version, "base_url": args.url, "session_header": header}
    content = {
        "environment": describe_run(args) | dict.fromkeys(UNKNOWN) | about_servers,
        "seconds": seconds,
        "measurements": replies + under_many_names,
        "claims": common_claims(replies, under_many_names, APART) + sticky_claims(replies, good, header, sticky),
        "sticky": sticky,
        "servers_reached": servers,
    }
    return finish(args, PROGRAM, __doc__, verdict, content)


def servers_row(servers: dict[str, int] | None) -> dict[str, tuple[int, int]]:
    """Return the row of the table that tells how many servers one prompt met, if that is known."""
    if servers is None:
        return {}
    return {f"servers met by {NAMES} x one prompt": (servers["bad"], servers["good"])}


def sticky_claims(replies: list[Reply], good: Summary, header: str, sticky: bool | None) -> list[Claim]:
    reported = sum(reply.cached_tokens is not None for reply in replies)
    found = f"{good.found} of {len(good.later)} turns" if cached_tokens_are_reported(replies) else "not reported"
    return [
        Claim("cached tokens are reported", reported > 0, f"by {reported} of {len(replies)} answers"),
        Claim(f"with {header} every later turn finds its session's last turn", sticky is True, found),
    ]


def parse_args() -> argparse.Namespace:
    """Return the checked command line with the API key as `key`. An error never repeats what may be one."""
    # An abbreviation that fits several options would be repeated, with its value, in argparse's error.
    parser = Parser(__doc__, prog=f"python -m going_further.{PROGRAM}", allow_abbrev=False)
    add = parser.add_argument
    add("url", metavar="URL", help="an OpenAI-compatible API, like http://127.0.0.1:8000/v1")
    add("--api-key-env", metavar="NAME", help="the environment variable that holds its API key")
    add("--session-header", metavar="NAME", default=SESSION_HEADER,
        help=f"the header that carries the session (default: {SESSION_HEADER})")  # fmt: skip
    add("--served-model", metavar="NAME", help="its model (default: the first one that it lists)")
    add_options(parser)
    args = parse(parser, advice="see --help; a key is given by --api-key-env")
    check_url(args.url)
    if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", args.session_header, re.ASCII):
        raise UsageError("--session-header takes the name of an HTTP header, like x-session-id")
    args.key = None if args.api_key_env is None else read_key(args.api_key_env)
    return args


def check_url(url: str) -> None:
    """Raise UsageError where `url` is no address of an API, or holds what must not be printed."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number or too large, half an IPv6 address
        usable = False
    if not usable:
        raise UsageError("URL is an address with http:// or https://, like http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError("URL holds more than an address: give a key with --api-key-env")


def read_key(variable: str) -> str:
    """Return the API key that an environment variable holds; UsageError where it holds none that can be sent."""
    key = os.environ.get(variable)
    if not key:
        raise UsageError("--api-key-env takes the name of an environment variable; the one it names is not set")
    if not re.fullmatch(r"[!-~]+", key):
        raise UsageError("the API key holds a blank, a line break or another character that no header takes")
    return key


def main() -> int:
    return run_command(PROGRAM, lambda: probe(parse_args()))


if __name__ == "__main__":
    sys.exit(main())
