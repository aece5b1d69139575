"""What running vLLM servers do now: hit rate, TTFT, KV cache, from their metrics.

    python -m going_further.watch_server http://127.0.0.1:8000
    python -m going_further.watch_server --once URL URL URL

Every vLLM server counts what it does since it was started, and tells it to
whoever asks for /metrics. The difference between two looks is what happened in
the interval between them, for all engines of a server together:

  TTFT      p50 and p90 of the requests that got their first token, from the
            histogram's buckets, linear inside a bucket, as Prometheus does it:
            no finer than the buckets are; ">2560 s" is beyond the last of them
  KV        share of the KV cache in use by requests, in the fullest engine
  wait      requests that wait now; preempt: preemptions in the interval
  prompt    prompt tokens a second; cached: those that a cache had, a KV
            connector's included
  hit rate  cached tokens / queried tokens, in the interval and since the start;
            last, a sparkline of intervals, with gaps where nothing was asked

"-" is not zero: there was nothing to divide by. The first line of a server, and
the first after a restart (a counter went back, or its process is another one),
show all since its start. Who does not answer is watched on. Names of metrics
are those of vLLM 0.32; nothing but /metrics is asked for, without a
proxy. The exit status is 1 where a server did not answer at the last look.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import datetime
import http.client
import importlib.util
import itertools
import math
import platform
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from going_further.common import (
    LessonError,
    Parser,
    UsageError,
    at_least,
    json_path,
    milliseconds,
    run_command,
    shown,
    stop,
    use_python_with_vllm,
    write_json,
)
from going_further.http_sessions import connection_fault, origins, say, status_fault

PROGRAM = "watch_server"
TIMEOUT = 5  # seconds for one look
MOST_BYTES = 10_000_000  # of an answer; vLLM's has about 100,000
WIDTH = 80
SPARKS = 16  # intervals in a sparkline, where there is room
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BLOCKS = "▁▂▃▄▅▆▇█"
HEAD = """
                   TTFT             pre-   tokens/s      hit rate
time      #     p50     p90   KV wait empt prompt cached   now start"""

# --- what a server tells ---

COUNTERS = {
    "vllm:prefix_cache_queries_total": "queried",
    "vllm:prefix_cache_hits_total": "cached",
    "vllm:external_prefix_cache_hits_total": "cached",  # a KV connector's, as in shared_store
    "vllm:prompt_tokens_total": "prompt",
    "vllm:num_preemptions_total": "preemptions",
}
TTFT = "vllm:time_to_first_token_seconds_bucket"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"  # a share of 1, in spite of its name
PROCESS_START = "process_start_time_seconds"  # Unix time; not told where one server has several API processes
CONFIG = "vllm:cache_config_info"
NEEDED = {*COUNTERS, TTFT, WAITING, KV_USAGE} - {"vllm:external_prefix_cache_hits_total"}


class Fault(Exception):
    """Why a server cannot be shown; `state` is "gone", or "no metrics" where it answers with something else."""

    def __init__(self, state: str, why: str) -> None:
        super().__init__(why)
        self.state = state


@dataclasses.dataclass
class Look:
    """What a server had counted at one moment, all its engines together."""

    counters: Counter[str] = dataclasses.field(default_factory=Counter)  # tokens, preemptions
    ttft: Counter[float] = dataclasses.field(default_factory=Counter)  # bucket's upper bound in ms: requests up to it
    waiting: int = 0
    kv_usage: float = 0.0  # of the fullest engine, 0 to 1
    process_start: float | None = None
    prefix_caching: bool = True
    taken_at: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, name: str, labels: dict[str, str], value: float) -> None:
        """Take in one sample of the metrics; raise ValueError for a value that cannot be."""
        if not 0 <= value < 2**63:  # nor is NaN
            raise ValueError(f"{name} is {value}")
        if name in COUNTERS:
            self.counters[COUNTERS[name]] += int(value)
        elif name == TTFT:
            self.ttft[float(labels.get("le", "")) * 1000] += int(value)
        elif name == WAITING:
            self.waiting += int(value)
        elif name == KV_USAGE:
            self.kv_usage = max(self.kv_usage, value)
        elif name == PROCESS_START:
            self.process_start = value
        elif labels.get("enable_prefix_caching") == "False":
            self.prefix_caching = False

    def is_restart_after(self, earlier: Look) -> bool:
        """Say whether the server was started anew since an earlier look."""
        back = any(self.counters[name] < count for name, count in earlier.counters.items())
        back |= any(self.ttft[bound] < count for bound, count in earlier.ttft.items())
        return back or self.process_start != earlier.process_start


def read_metrics(text: str) -> Look:
    """Return what the text of a server's metrics tells; raise Fault where it is not that of a vLLM server."""
    from prometheus_client.parser import text_string_to_metric_families  # comes with vLLM

    names = (*NEEDED, *COUNTERS, PROCESS_START, CONFIG)
    lines = [line for line in text.split("\n") if line.startswith(names)]
    found = set()
    look = Look()
    try:
        for family in text_string_to_metric_families("\n".join(lines)):
            for name, labels, value, *_ in family.samples:
                found.add(name)
                look.add(name, labels, value)
    except (ValueError, IndexError, OverflowError) as error:  # all are the parser's for text that is none
        raise Fault("no metrics", "not in Prometheus' text format") from error
    if "vllm:" not in text:
        begins = " ".join(text[:200].split()) or "nothing"
        raise Fault("no metrics", f"no vLLM metrics, found: {begins}")
    missing = sorted(NEEDED - found)
    if missing or math.inf not in look.ttft:
        raise Fault("no metrics", f"vLLM metrics without {missing[0] if missing else f'the last bucket of {TTFT}'}")
    return look


# --- how it is asked ---


def fetch(url: str) -> str:
    """Return the text at an address; raise Fault where there is none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy; a redirect to file: it refuses
    deadline = time.monotonic() + TIMEOUT
    body = b""
    try:
        with opener.open(url, timeout=TIMEOUT) as answer:
            while chunk := answer.read1(2**16):
                body += chunk
                if len(body) > MOST_BYTES:
                    raise Fault("no metrics", f"an answer of more than {MOST_BYTES:,} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError
            if answer.length:  # so many bytes were announced and did not come
                raise Fault("gone", "connection lost")
        return body.decode()
    except UnicodeDecodeError as error:
        raise Fault("no metrics", "an answer that is not UTF-8") from error
    except urllib.error.HTTPError as error:
        raise Fault("gone" if error.code >= 500 else "no metrics", status_fault(error.code)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: of a redirect to no address
        timed_out = any(isinstance(cause, TimeoutError) for cause in origins(error))
        raise Fault("gone", f"no answer within {TIMEOUT} s" if timed_out else connection_fault(error)) from error


def look_at_all(urls: list[str]) -> list[Look | Fault]:
    """Look at all servers at once, so that none waits for another one that does not answer."""
    silent = Fault("gone", f"no answer within {TIMEOUT} s")
    looks: dict[str, Look | Fault] = dict.fromkeys(urls, silent)

    def look_at(url: str) -> None:
        try:
            looks[url] = read_metrics(fetch(url))
        except Fault as fault:
            looks[url] = fault

    deadline = time.monotonic() + TIMEOUT + 1
    threads = [threading.Thread(target=look_at, args=[url], daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    return [looks[url] for url in urls]


# --- what happened between two looks ---


def quantile(q: float, buckets: dict[float, int]) -> float | None:
    """Return the q-quantile, 0 < q <= 1, of a cumulative histogram, as Prometheus' histogram_quantile does.

    `buckets` holds by upper bound how many values are not above it, the last bound being infinite. None: there are no
    values, or it is above the largest finite bound.
    """
    rank = q * buckets[math.inf]
    below, lower = 0, 0.0
    for upper, count in sorted(buckets.items()):
        if count >= rank > below:
            inside = (upper - lower) * (rank - below) / (count - below)
            return min(upper, lower + inside) if upper < math.inf else None  # rounding may lead out of the bucket
        below, lower = count, upper
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What one look at one server showed, in the JSON too; None is what there is not, or what nobody told.

    Numbers are those of the interval before `at`, and those since the server's start in the states "start" and
    "restarted". A TTFT that is None although requests got a first token is above the histogram's largest bound.
    """

    server: str
    at: str
    state: str  # "start", "interval", "restarted", "gone", "no metrics"
    fault: str | None = None
    prefix_caching: bool | None = None
    seconds: float | None = None  # None since the start: how long ago that was is not told
    prompt_tokens: int | None = None
    queried_tokens: int | None = None
    cached_tokens: int | None = None
    hit_rate: float | None = None
    hit_rate_since_start: float | None = None
    first_tokens: int | None = None  # requests that got their first one
    ttft_p50_ms: float | None = None
    ttft_p90_ms: float | None = None
    ttft_largest_bound_ms: float | None = None
    kv_usage: float | None = None  # at this moment, 0 to 1, of the fullest engine
    waiting: int | None = None  # at this moment
    preemptions: int | None = None


def ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None


def timestamp() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")


def time_of_day(taken_at: str) -> str:
    return taken_at[11:19]


class Watched:
    """A server over time: what it had counted at the last look, and its hit rates of the last intervals."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.last: Look | None = None
        self.gone_since: str | None = None
        self.rates: deque[float | None] = deque(maxlen=SPARKS)  # None: nothing was queried

    def take(self, look: Look | Fault, at: str) -> Sample:
        """Take in what came of a look, and return what it shows."""
        if isinstance(look, Fault):
            self.rates.append(None)
            why = str(look)
            self.gone_since = (self.gone_since or at) if look.state == "gone" else None
            if self.gone_since:
                why = f"{'gone' if self.last else 'no answer'} since {time_of_day(self.gone_since)}: {look}"
            return Sample(server=self.url, at=at, state=look.state, fault=why)
        self.gone_since = None
        state, before, seconds = "start", Look(), None
        if self.last and look.is_restart_after(self.last):
            state = "restarted"
        elif self.last:
            state, before, seconds = "interval", self.last, look.taken_at - self.last.taken_at
        self.last = look
        done = {name: count - before.counters[name] for name, count in look.counters.items()}
        ttft = {bound: count - before.ttft[bound] for bound, count in look.ttft.items()}
        hit_rate = ratio(done["cached"], done["queried"])
        if state != "start":
            self.rates.append(hit_rate if state == "interval" else None)
        return Sample(
            server=self.url,
            at=at,
            state=state,
            prefix_caching=look.prefix_caching,
            seconds=seconds,
            prompt_tokens=done["prompt"],
            queried_tokens=done["queried"],
            cached_tokens=done["cached"],
            hit_rate=hit_rate,
            hit_rate_since_start=ratio(look.counters["cached"], look.counters["queried"]),
            first_tokens=ttft[math.inf],
            ttft_p50_ms=quantile(0.5, ttft),
            ttft_p90_ms=quantile(0.9, ttft),
            ttft_largest_bound_ms=max((bound for bound in ttft if bound < math.inf), default=0),
            kv_usage=look.kv_usage,
            waiting=look.waiting,
            preemptions=done["preemptions"],
        )


# --- how it is shown ---


def short(number: float | None) -> str:
    """Write a number in five characters: 999, 12.3k, 4.5M."""
    if number is None:
        return "-"
    for unit in ("", "k", "M"):
        if number < 999.5:
            decimals = 1 if unit and number < 99.95 else 0
            return f"{number:.{decimals}f}{unit}"
        number /= 1000
    return f"{number:.0f}G"


def percent(share: float | None) -> str:
    if share is None:
        return "-"
    return "100%" if share > 0.9995 else f"{share:.1%}"


def duration(ms: float) -> str:
    return f"{ms / 1000:.0f} s" if ms >= 100_000 else milliseconds(ms)


def ttft_text(ms: float | None, sample: Sample) -> str:
    if sample.first_tokens == 0:
        return "-"
    return f">{duration(sample.ttft_largest_bound_ms)}" if ms is None else duration(ms)


def sparkline(rates: deque[float | None]) -> str:
    """Draw hit rates, 0 to 1, as blocks; None is a gap."""
    return "".join(" " if rate is None else BLOCKS[min(int(rate * 8), 7)] for rate in rates)


def fit(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."


def row(n: int, sample: Sample, sparks: str) -> str:
    """Return the line of server `n`, at most WIDTH columns; of the sparkline as much as has room, the latest."""
    line = f"{time_of_day(sample.at)} {n:>2} "
    if sample.fault is not None:
        return fit(line + shown(sample.fault))
    if sample.state == "restarted" and not sample.prefix_caching:
        return f"{line}restarted, prefix caching is off"
    line += f"{ttft_text(sample.ttft_p50_ms, sample):>7} {ttft_text(sample.ttft_p90_ms, sample):>7} "
    line += f"{sample.kv_usage:>4.0%} {short(sample.waiting):>4} {short(sample.preemptions):>4} "
    line += f"{short(ratio(sample.prompt_tokens, sample.seconds)):>6} "
    if not sample.prefix_caching:
        return f"{line} prefix caching is off"
    line += f"{short(ratio(sample.cached_tokens, sample.seconds)):>6} "
    line += f"{percent(sample.hit_rate):>5} {percent(sample.hit_rate_since_start):>5} "
    if sample.state != "interval":
        return line + {"start": "since start", "restarted": "restarted"}[sample.state]
    room = max(1, WIDTH - len(line))
    return line + sparks[-room:]


@contextlib.contextmanager
def display(urls: list[str], live: bool) -> Iterator[Callable[[list[str]], None]]:
    """Yield what shows one look's rows: in place of the last ones where `live`, else below them."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    head = [fit(f"{n:>2} {shown(url)}") for n, url in enumerate(urls, start=1)] + HEAD.split("\n")
    if not live:
        say("\n".join(head))
        yield lambda rows: say("\n".join(rows))
        return
    with Live(console=Console(), auto_refresh=False) as screen:
        yield lambda rows: screen.update(Text("\n".join(head + rows), no_wrap=True, overflow="crop"), refresh=True)


# --- the command ---


class Stopped(LessonError):
    """A signal came: Ctrl-C, for example."""


def stop_watching(signum: int, _: object) -> None:
    """Raise Stopped, so that the JSON is still written. A second signal ends at once."""
    for other in SIGNALS:
        if signal.getsignal(other) is stop_watching:
            signal.signal(other, stop)
    stopped = Stopped("interrupted")
    stopped.status = 128 + signum
    raise stopped


def watch(args: argparse.Namespace) -> int:
    """Look at all servers again and again, show what happened, write the JSON at the end, return the exit status."""
    if any(importlib.util.find_spec(name) is None for name in ("prometheus_client", "rich")):
        use_python_with_vllm()
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, stop_watching)
    utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
    servers = [Watched(url) for url in args.urls]
    samples: list[Sample] = []
    title, *_ = __doc__.splitlines()
    environment = {"python": platform.python_version(), "interval_s": args.interval, "started_at": timestamp()}
    content = {"schema": 1, "lesson": PROGRAM, "title": title, "environment": environment, "servers": args.urls}
    due = time.monotonic()
    try:
        with display(args.urls, live=sys.stdout.isatty() and not args.once) as show:
            for n in itertools.count():
                looks = look_at_all(args.urls)
                latest = [server.take(look, timestamp()) for server, look in zip(servers, looks, strict=True)]
                if args.json:
                    samples += latest
                sparks = [sparkline(server.rates) if utf8 else "" for server in servers]
                show(list(map(row, itertools.count(1), latest, sparks)))
                if n == args.count:
                    return 1 if any(sample.fault for sample in latest) else 0
                due = max(due + args.interval, time.monotonic())
                time.sleep(max(0, due - time.monotonic()))
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        return stopped.status
    finally:
        if args.json:
            write_json(args.json, content | {"samples": samples})


def metrics_url(url: str) -> str:
    """Return the address of a server's metrics; raise UsageError where `url` is none of a server."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number or too large, half an IPv6 address
        usable = False
    if not usable or not re.fullmatch(r"[!-~]+", url):
        raise UsageError("URL is an address with http:// or https://, like http://127.0.0.1:8000")
    if parts.username is not None or parts.query or parts.fragment:
        raise UsageError("URL holds more than an address: vLLM's metrics take no key")
    return f"{re.sub(r'/*(/v1|/metrics)?/*$', '', url)}/metrics"


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, prog=f"python -m going_further.{PROGRAM}")
    add = parser.add_argument
    add("urls", metavar="URL", nargs="+", help="a vLLM server, like http://127.0.0.1:8000, with or without /v1")
    add("--interval", metavar="S", type=at_least(1, 86_400), default=2, help="seconds between two looks (default: 2)")
    looks = parser.add_mutually_exclusive_group()
    looks.add_argument("--once", action="store_true", help="one look: all since the servers' start")
    looks.add_argument("--count", metavar="N", type=at_least(1), help="end after N intervals (default: at Ctrl-C)")
    add("--json", type=json_path, metavar="PATH", help="write every sample to this file, at the end")
    args = parser.parse_args()
    args.count = 0 if args.once else args.count
    args.urls = list(dict.fromkeys(metrics_url(url) for url in args.urls))
    return args


def main() -> int:
    return run_command(PROGRAM, lambda: watch(parse_args()))


if __name__ == "__main__":
    sys.exit(main())
