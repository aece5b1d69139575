"""Sessions through vLLM's router: what is sent, how it is judged, and what a faulty deployment is reported as.

The server below misbehaves on purpose. It injects faults into the client and measures nothing.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.server
import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from helpers.models import write_llama

from going_further import vllm_router_sessions as tool
from session_consistency import EngineError, LessonError, UsageError
from stable_prefix_vs_timestamp import common_prefix

ROOT = Path(__file__).parent.parent
BUILT_IN = ROOT / "built_in_model" / "cpu"
TOOL = [sys.executable, "-m", "going_further.vllm_router_sessions"]
KEY = "sk-4f9a1c77e2d85b30aa61"


# --- what is sent ---


@pytest.fixture(scope="module", params=["built-in", "llama"])
def encode(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    folder = BUILT_IN if request.param == "built-in" else write_llama(tmp_path_factory.mktemp("llama"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda messages: tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_a_turn_starts_with_all_tokens_of_the_turn_before_and_adds_more_than_two_blocks_of_a_cpu(encode) -> None:
    prompts = [encode(messages) for messages in tool.conversation("000-10482", 0, 300, 5)]
    for before, after in itertools.pairwise(prompts):
        assert common_prefix(before, after) == len(before)
        assert len(after) - len(before) > 2 * 128


def test_two_sessions_and_two_names_of_one_session_share_no_block(encode) -> None:
    first, *others = (
        encode(tool.conversation(name, session, 300, 2)[-1])
        for name, session in (("000-10482", 0), ("001-10482", 1), ("000-57110", 0))
    )
    for other in others:
        assert common_prefix(first, other) < 16, "the smallest block of all builds"


def test_under_another_name_a_session_says_the_same_at_the_same_length(encode) -> None:
    one, other = (tool.conversation(name, 3, 300, 4) for name in ("003-10482936", "003-57110482"))
    for a, b in zip(one, other, strict=True):
        assert [m["content"] for m in a[1:]] == [m["content"] for m in b[1:]]
        assert abs(len(encode(a)) - len(encode(b))) <= 16


def test_sessions_have_different_lengths_that_depend_on_the_seed_alone() -> None:
    args = argparse.Namespace(seed=0, sessions=50, requests=5)
    assert set(tool.session_lengths(args).values()) == {3, 4, 5}
    assert tool.session_lengths(args) == tool.session_lengths(args)
    assert set(tool.session_lengths(argparse.Namespace(seed=0, sessions=9, requests=2)).values()) == {2}


# --- how it is judged ---


@pytest.mark.parametrize(
    ("earlier", "cached", "block_size", "shared", "found"),
    [
        ([1000], 896, 128, 0, True),  # seven whole blocks of 128
        ([1000], 768, 128, 0, False),
        ([1000, 1500], 896, 128, 0, False),  # the turn before the last one
        ([1000, 1500], 1408, 128, 0, True),
        ([1000], 16, None, 0, True),  # blocks of unknown size
        ([1000], 0, None, 0, False),
        ([1000, 1500], 1000, None, 0, False),
        ([1000, 1500], 1008, None, 0, True),
        ([1000], 500, None, 500, False),  # what first turns find too
        ([1000, 1500], 1008, None, 1200, False),
    ],
)
def test_a_turn_finds_its_last_turn_when_no_earlier_one_could_have_left_as_much(
    earlier: list[int], cached: int, block_size: int | None, shared: int, found: bool
) -> None:
    reply = row("good", 0, len(earlier), 2000, cached)
    assert tool.finds_last_turn(earlier, reply, block_size, shared) is found


def row(
    arm: str, session: int, turn: int, prompt: int | None, cached: int | None, error: str | None = None
) -> tool.Reply:
    ttft = None if error else 50.0
    return tool.Reply("main", arm, turn, None, f"{session:03}-10482", prompt, cached, None, ttft, error)


def rows(bad: list[int | None], good: list[int | None]) -> list[tool.Reply]:
    """Return one session per arm that grows by 500 tokens a turn, with these cached tokens."""
    arms = {"bad": bad, "good": good}
    return [row(arm, 0, n, 1000 + 500 * n, cached) for arm, found in arms.items() for n, cached in enumerate(found)]


KEPT, MOVED, NOTHING, SILENT = [0, 992, 1488, 1984], [0, 0, 992, 0], [0, 0, 0, 0], [None] * 4


@pytest.mark.parametrize(
    ("bad", "good", "servers", "sticky", "says"),
    [
        (MOVED, KEPT, (3, 1), True, "with it all later turns find their last turn, without it 0 of 3."),
        (KEPT, KEPT, (1, 2), True, "Sticky by x-session-id: with it all later turns find their last turn, without"),
        (KEPT, KEPT, (1, 2), True, "without it one prompt always meets one server"),
        (KEPT, KEPT, (4, 2), True, "without it one prompt always meets several servers"),
        (KEPT, KEPT, (1, 1), True, "but 12 names reach one server: there is no other, or it is chosen by the prompt."),
        (MOVED, MOVED, (2, 2), False, "Not sticky by x-session-id: with it 0 of 3 later turns"),
        (MOVED, [0, 992, 992, 1984], (2, 2), False, "Not sticky by x-session-id: with it 2 of 3 later turns"),
        (NOTHING, NOTHING, None, None, "later turns find no more than first ones. Prefix caching is off"),
        ([256] * 4, [256] * 4, (2, 2), None, "later turns find no more than first ones"),
        (SILENT, SILENT, None, None, "--enable-prompt-tokens-details"),
        (MOVED, [960, 992, 1488, 1984], (2, 2), None, "a first turn, never sent before, finds 960 tokens"),
        (MOVED, [0], (2, 2), None, "no session was given a second answer"),
    ],
)
def test_cached_tokens_alone_say_whether_a_deployment_is_sticky(bad, good, servers, sticky, says) -> None:
    summaries = tool.summarise(rows(bad, good), None)
    servers = servers and dict(zip(("bad", "good"), servers, strict=True))
    found, verdict = tool.stickiness(*summaries.values(), "x-session-id", servers)
    assert found is sticky
    assert says in verdict


def test_each_server_misses_a_new_prompt_once() -> None:
    cached = [0, 0, 1920, 16, 1920, None, 1920]
    errors = [None] * 5 + ["timeout", None]
    sent = [row("good", n, 0, 2000, c, error) for n, (c, error) in enumerate(zip(cached, errors, strict=True))]
    assert (tool.servers_reached(sent, "good"), tool.servers_reached(sent, "bad")) == (3, 0)


def test_without_usage_nothing_can_be_told() -> None:
    replies = [row(arm, 0, turn, None, None) for arm in ("bad", "good") for turn in range(2)]
    sticky, verdict = tool.stickiness(*tool.summarise(replies, None).values(), "x-session-id", None)
    assert sticky is None
    assert "answers come without usage" in verdict


def test_a_turn_that_failed_is_passed_over_and_the_session_judged_by_the_turn_before_it() -> None:
    replies = rows(MOVED, KEPT)
    replies[6] = row("good", 0, 2, None, None, "HTTP 500 Internal Server Error: out of luck")
    good = tool.summarise(replies, 128)["good"]
    assert (good.found, len(good.later), good.faults) == (2, 2, {"HTTP 500 Internal Server Error": 1})
    assert [reply.request for reply in good.timed] == [1, 3]


def test_the_claims_fail_where_their_numbers_do() -> None:
    work, counters = {"bad": [5, 5], "good": [9, 1]}, tool.Counter(hits=992 + 4464, queries=2 * 7000)

    def failed(replies: list[tool.Reply], work=work, counters=counters) -> list[str]:
        claims = tool.common_claims(replies, [], 0) + tool.routed_claims(tool.summarise(replies, 128), work, counters)
        return [claim.claim for claim in claims if not claim.holds]

    kept = [0, 896, 1408, 1920]
    counters["hits"] = 992 + sum(kept)
    assert failed(rows(MOVED, kept)) == []
    assert failed(rows(MOVED, kept), work={"bad": [9, 0], "good": [9, 1]}) == ["round_robin uses every server"]
    other = tool.Counter(hits=1, queries=14000)
    assert failed(rows(MOVED, kept), counters=other) == ["vLLM's own counters agree with the requests"]
    assert "with consistent_hash every later turn finds its session's earlier whole blocks" in failed(rows(kept, MOVED))
    assert "consistent_hash finds more cached tokens than round_robin" in failed(rows(kept, kept))
    assert "first turns find no more than a chat template's head: the caches are cold" in failed(
        rows([128, 0, 992, 0], kept)
    )
    longer = [*rows(MOVED, kept)[:-1], row("good", 0, 3, 2501, 1920)]
    assert "both arms send equally long prompts" in failed(longer)
    assert "every request was answered" in failed([*rows(MOVED, kept), row("bad", 1, 0, None, None, "timeout")])


def test_sessions_that_do_not_fit_into_one_cache_are_refused_with_the_numbers() -> None:
    tool.check_capacity(6, 1000, 6000)
    with pytest.raises(UsageError, match=r"6 sessions of up to 1,001 tokens .* 6,000 tokens: take fewer --sessions"):
        tool.check_capacity(6, 1001, 6000)


# --- a deployment with faults ---


MALFORMED = {
    "choices-text": {"choices": "abc"},
    "choice-null": {"choices": [None]},
    "delta-text": {"choices": [{"index": 0, "delta": "hi"}]},
    "usage-text": {"usage": "none"},
    "tokens-text": {"usage": {"prompt_tokens": "40", "completion_tokens": 2}},
    "details-list": {"usage": {"prompt_tokens": 40, "completion_tokens": 2, "prompt_tokens_details": [1]}},
}
LISTS = {"named": {"data": [{"name": "x"}]}, "object": {"data": {"id": "x"}}, "texts": ["m"], "none": {"data": []}}


class Faulty(http.server.BaseHTTPRequestHandler):
    """Answers /MODE/v1/... the way MODE says, and remembers what it was sent."""

    protocol_version = "HTTP/1.1"
    received: list[tuple[str, dict, dict]] = []  # noqa: RUF012, one list for all requests of a server

    def remember(self, body: dict) -> None:
        self.received.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))

    def do_GET(self) -> None:
        self.remember({})
        mode = self.path.split("/")[1]
        if mode in ("silent", "cookie"):
            self.answer(200, json.dumps({"object": "list", "data": [{"id": "listed", "object": "model"}]}))
        elif mode == "html":
            self.answer(200, "<html>a proxy</html>", "text/html")
        elif mode in LISTS:
            self.answer(200, json.dumps(LISTS[mode]))
        else:
            self.refuse(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.remember(body)
        mode = self.path.split("/")[1]
        if mode.isdigit():
            self.refuse(int(mode))
        elif mode == "hang":
            time.sleep(3)
            self.close_connection = True
        elif mode == "html":
            self.answer(200, "<html>a proxy</html>", "text/html")
        else:
            self.stream(mode)

    def refuse(self, status: int) -> None:
        """Refuse, and repeat the key wherever one can."""
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        spelled = f"{key} {quote(key)} {key[:12]} {key[::-1]} {base64.b64encode(key.encode()).decode()}"
        message = {"error": {"message": f"this key is no good: {spelled}", "type": key, "code": key}}
        self.send_response(status, f"no good {key}")
        self.finish_headers(json.dumps(message), "application/json", key)

    def answer(self, status: int, text: str, kind: str = "application/json") -> None:
        self.send_response(status)
        self.finish_headers(text, kind, "")

    def finish_headers(self, text: str, kind: str, key: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("X-Request-Id", key)
        self.send_header("Set-Cookie", "server=2; Path=/")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def stream(self, mode: str) -> None:
        """Stream an answer of two tokens that goes wrong as `mode` says; without a length, its end is the close."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Set-Cookie", "server=2; Path=/")
        if mode == "broken":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        role, token = (
            {"role": "assistant", "content": ""},
            {"content": "" if mode in ("blank", "textless") else "Hello"},
        )
        made = 0 if mode == "blank" else 2
        usage = {"prompt_tokens": 40, "completion_tokens": made, "total_tokens": 40 + made}
        deltas = {"empty": [role], "cut": [role, token], "broken": [role, token], "error": [role]}
        chunks = [
            {"id": "1", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]}
            for delta in deltas.get(mode, [role, token, token])
        ]
        if mode not in ("empty", "cut", "broken", "error"):
            chunks[-1]["choices"][0]["finish_reason"] = "length"
        if mode not in ("empty", "cut", "broken", "error", *MALFORMED):
            chunks.append({"id": "1", "object": "chat.completion.chunk", "choices": [], "usage": usage})
        if mode == "error":
            chunks.append({"error": {"message": f"sorry {self.headers.get('Authorization')}", "code": 500}})
        if mode in MALFORMED:
            chunks[1] = {"id": "1", "object": "chat.completion.chunk", "choices": [], **MALFORMED[mode]}
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        if mode == "number":
            lines[1] = "data: 5\n\n"
        if mode == "garbage":
            lines[1] = "data: {not json\n\n"
        if mode in ("silent", "cookie", "empty"):
            lines.append("data: [DONE]\n\n")
        for line in lines:
            self.wfile.write((f"{len(line):x}\r\n{line}\r\n" if mode == "broken" else line).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def faulty() -> Iterator[str]:
    """Yield the address of a server that misbehaves."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Done:
    def __init__(self, status: int, out: str, err: str, path: Path) -> None:
        self.status, self.out, self.err, self.json = status, out, err, path.read_text() if path.exists() else ""

    @property
    def result(self) -> dict:
        return json.loads(self.json)

    def arm(self, name: str) -> list[dict]:
        return [m for m in self.result["measurements"] if m["arm"] == name]


@pytest.fixture
def probe(tmp_path: Path, faulty: str):
    """Return a function that runs the tool against one mode of the faulty server, as a user does."""
    pytest.importorskip("openai", reason="the client that is tested here: pip install -r requirements-router.txt")
    Faulty.received.clear()

    def run(mode: str, *options: str, env: dict[str, str] | None = None, url: str | None = None, named: bool = True):
        path = tmp_path / "out.json"
        small = ["--sessions", "2", "--requests", "2", "--prefix-tokens", "10", "--timeout", "1", "--json", str(path)]
        command = [
            sys.executable,
            "-m",
            "going_further.vllm_router_sessions",
            "--base-url",
            url or f"{faulty}/{mode}/v1",
        ]
        command += [*small, *(["--served-model", "m"] if named else []), *options]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=os.environ | (env or {}), timeout=60
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert max(map(len, done.stdout.splitlines()), default=0) <= 80, done.stdout
        return Done(done.returncode, done.stdout, done.stderr, path)

    return run


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("500", "HTTP 500 Internal Server Error"),
        ("429", "HTTP 429 Too Many Requests"),
        ("599", "HTTP 599"),
        ("hang", "timeout"),
        ("broken", "connection lost"),
        ("cut", "stream cut off"),
        ("empty", "no token"),
        ("blank", "no token"),
        ("html", "no token"),
        ("error", "error in the stream"),
        ("garbage", "no OpenAI answer"),
        ("number", "no OpenAI answer"),
        *((mode, "no OpenAI answer") for mode in MALFORMED),
    ],
)
def test_a_fault_is_counted_in_its_arm_and_never_gets_a_time(probe, mode: str, kind: str) -> None:
    done = probe(mode)
    assert (done.status, done.err) == (1, "")
    assert [line.split() for line in done.out.splitlines() if line.startswith("failed:")] == [
        ["failed:", *kind.split(), "4", "4"]
    ]
    assert "FAILED: every request was answered: 0 of 8 were" in done.out
    for m in done.result["measurements"]:
        assert m["error"].partition(":")[0] == kind
        assert m["ttft_ms"] is m["prompt_tokens"] is m["cached_tokens"] is m["predicted_cached_tokens"] is None
    assert len(done.arm("bad")) == len(done.arm("good")) == 4, "no turn is sent after one that nobody was answered"
    assert done.result["sticky"] is None
    assert len(Faulty.received) == 8, "a request that failed is not repeated"


def test_tokens_without_text_are_tokens(probe) -> None:
    done = probe("textless")
    assert all(m["error"] is None and m["ttft_ms"] > 0 for m in done.result["measurements"])


def test_a_refused_connection_is_counted(probe) -> None:
    done = probe("", url=f"http://127.0.0.1:{tool.free_ports(1)[0]}/v1")
    assert done.status == 1
    assert {m["error"] for m in done.result["measurements"]} == {"connection refused"}


def test_without_a_key_the_servers_own_words_are_passed_on_in_one_line(probe) -> None:
    done = probe("400", env={"OPENAI_API_KEY": KEY})
    assert all(m["error"].startswith("HTTP 400 Bad Request: this key is no good: none") for m in done.arm("bad"))
    assert KEY not in done.out + done.err + done.json
    assert {headers["authorization"] for _, headers, _ in Faulty.received} == {"Bearer none"}, "not OPENAI_API_KEY"


@pytest.mark.parametrize("mode", ["401", "error"])
def test_a_key_that_the_server_repeats_is_never_shown(probe, mode: str) -> None:
    for named in (True, False):
        done = probe(mode, "--api-key-env", "MY_KEY", env={"MY_KEY": KEY}, named=named)
        assert done.status == 1
        shown = done.out + done.err + done.json
        for part in (KEY, KEY[:8], KEY[::-1], base64.b64encode(KEY.encode()).decode()[:12]):
            assert part not in shown
        assert "MY_KEY" not in done.err
    assert {headers["authorization"] for _, headers, _ in Faulty.received} == {f"Bearer {KEY}"}


def test_an_answer_without_cached_tokens_says_how_to_switch_the_report_on(probe) -> None:
    done = probe("silent")
    assert done.status == 1
    verdict = "Cannot tell whether it is sticky: no answer reports cached tokens.\n"
    assert verdict + "vLLM reports them when it is started with --enable-prompt-tokens-details.\n" in done.out
    assert "hit rate" + " " * 37 + "not reported" + " " * 11 + "not reported" in done.out
    assert done.result["sticky"] is None
    for m in done.result["measurements"]:
        assert (m["error"], m["prompt_tokens"], m["cached_tokens"]) == (None, 40, None)
        assert m["ttft_ms"] > 0
    assert "python -m going_further.vllm_router_sessions --base-url" in done.result["environment"]["command"]
    assert str(ROOT.parent) not in done.json
    assert "/tmp" not in done.json


def test_the_session_is_sent_in_its_header_in_one_arm_and_no_cookie_in_any(probe) -> None:
    done = probe("cookie", "--session-header", "X-Conversation", named=False)
    assert "listed at http://127.0.0.1:" in done.out, "the first model that the deployment lists"
    assert not any("cookie" in headers for _, headers, _ in Faulty.received)
    posts = [(headers, body) for _, headers, body in Faulty.received if body]
    assert len(posts) == 16
    sessions: dict[str, list[str]] = {}
    for headers, body in posts:
        name = body["messages"][0]["content"].split()[0]
        assert headers.get("x-conversation", name) == name
        assert body["model"] == "listed"
        assert body["stream_options"] == {"include_usage": True}
        sessions.setdefault(name, []).append("x-conversation" in headers)
    assert len(sessions) == 8, "new names in each of four runs of two sessions"
    assert sorted(sessions.values()) == [[False, False]] * 4 + [[True, True]] * 4


def test_a_deployment_that_lists_no_models_is_one_line_that_says_what_to_check(probe) -> None:
    others = ((mode, "no list of models: check --base-url") for mode in ("html", *LISTS))
    for mode, says in (("404", "HTTP 404 Not Found"), *others):
        done = probe(mode, named=False)
        assert done.status == 1
        assert len(done.err.splitlines()) == 1
        assert says in done.err
        assert "--served-model" in done.err


def test_an_unknown_host_and_a_failed_handshake_have_names_of_their_own() -> None:
    openai = pytest.importorskip("openai", reason="the client that is tested here")
    for cause, kind in ((socket.gaierror(-2, "?"), "unknown host"), (tool.ssl.SSLError(1, "?"), "TLS failed")):
        fault = openai.APIConnectionError(request=None)
        fault.__cause__ = ExceptionGroup("all attempts failed", [cause])
        assert tool.describe(fault, keyed=False) == kind


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--base-url", "127.0.0.1:8000/v1"], "with http:// or https://"),
        (["--base-url", "http://"], "with http:// or https://"),
        (["--base-url", "http://127.0.0.1:99999/v1"], "with http:// or https://"),
        (["--base-url", "http://127.0.0.1:port/v1"], "with http:// or https://"),
        (["--base-url", f"http://me:{KEY}@127.0.0.1/v1"], "give a key with --api-key-env"),
        (["--base-url", f"http://127.0.0.1/v1?key={KEY}"], "give a key with --api-key-env"),
        (["--base-url", "http://127.0.0.1/v1", "--api-key-env", "NOT_SET"], "the one it names is not set"),
        (["--base-url", "http://127.0.0.1/v1", "--api-key-env", KEY], "the one it names is not set"),
        (["--base-url", "http://127.0.0.1/v1", "--api-key-env", "BROKEN"], "a line break"),
        (["--base-url", "http://127.0.0.1/v1", "--session-header", "x session"], "the name of an HTTP header"),
        (["--base-url", "http://127.0.0.1/v1", "--workers", "2"], "give one or the other"),
        (["--api-key-env", "NAME"], "go with --base-url"),
        (["--base-url", "http://127.0.0.1/v1", "--token", KEY], "arguments that are not known"),
    ],
)
def test_bad_input_is_one_line_that_repeats_no_secret(options: list[str], says: str) -> None:
    env = os.environ | {"BROKEN": f"{KEY}\n"}
    done = subprocess.run([*TOOL, *options], capture_output=True, text=True, cwd=ROOT, env=env)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert says in done.stderr
    assert KEY not in done.stderr


def test_without_vllm_router_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "use_python_with_vllm", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LessonError, match=r"vllm-router is missing: run .* -m pip install -r requirements-router.txt"):
        tool.route(argparse.Namespace())


# --- what is started is ended ---

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 1:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "a child of a child"])
    print("ready", flush=True)
time.sleep(600)
"""


def group_is_alive(group: int) -> bool:
    """Say whether a process group has a member that is no zombie."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            states += [state] if int(its_group) == group else []
    return any(state != "Z" for state in states)


def test_a_child_that_ignores_the_request_is_killed_with_its_own_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "END_SECONDS", 0.5)
    children = [tool.start("stubborn", 1, [sys.executable, "-c", STUBBORN], tmp_path)]
    group = children[0].process.pid
    with tool.ending(children):
        while "ready" not in children[0].log.read_text():
            time.sleep(0.05)
        assert group_is_alive(group)
    assert children[0].process.returncode == -signal.SIGKILL
    end = time.monotonic() + 5
    while group_is_alive(group):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_child_that_ends_at_its_start_is_one_line_with_the_root_cause_and_the_log(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    fails = "raise SystemExit('(EngineCore pid=7) ValueError: the KV cache is too small\\nlast words')"
    children = [tool.start("server 0", 1, [sys.executable, "-c", fails], folder)]
    with tool.ending(children), pytest.raises(EngineError) as caught:
        tool.wait_until_healthy(children)
    kept = tmp_path / "run.log"
    cause = "ValueError: the KV cache is too small"
    assert str(caught.value) == f"server 0 ended with status 1: {cause} (its log: {kept})"
    assert "last words" in kept.read_text()


def test_free_ports_are_different_and_free() -> None:
    ports = tool.free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        with socket.socket() as found:
            found.bind(("127.0.0.1", port))
