"""A deployment that is already there: how it is judged, and what a faulty one is reported as."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.faulty_server import LISTS, MALFORMED, Faulty, faulty_server
from helpers.sessions import KEPT, MOVED, NOTHING, SILENT, row, rows

from going_further import is_it_sticky as tool
from going_further.http_sessions import summarise, with_zeros

ROOT = Path(__file__).parent.parent
TOOL = [sys.executable, "-m", "going_further.is_it_sticky"]
KEY = "sk-4f9a1c77e2d85b30aa61"


# --- how it is judged ---


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
    summaries = summarise(rows(bad, good), None)
    servers = servers and dict(zip(("bad", "good"), servers, strict=True))
    found, verdict = tool.stickiness(*summaries.values(), "x-session-id", servers)
    assert found is sticky
    assert says in verdict


def test_each_server_misses_a_new_prompt_once() -> None:
    cached = [0, 0, 1920, 16, 1920, None, 1920]
    errors = [None] * 5 + ["timeout", None]
    sent = [row("good", n, 0, 2000, c, error) for n, (c, error) in enumerate(zip(cached, errors, strict=True))]
    assert (tool.servers_reached(sent, "good"), tool.servers_reached(sent, "bad")) == (3, 0)


def test_where_cached_tokens_are_left_out_when_there_are_none_every_such_answer_is_a_miss() -> None:
    sent = with_zeros([row("good", n, 0, 2000, None) for n in range(12)])
    assert tool.servers_reached(sent, "good") == 12


def test_an_answer_without_usage_tells_nothing_about_servers() -> None:
    sent = [row("good", 0, 0, 2000, 0), row("good", 1, 0, None, None), row("good", 2, 0, None, 16)]
    assert tool.servers_reached(sent, "good") == 1


def test_without_usage_nothing_can_be_told() -> None:
    replies = [row(arm, 0, turn, None, None) for arm in ("bad", "good") for turn in range(2)]
    sticky, verdict = tool.stickiness(*summarise(replies, None).values(), "x-session-id", None)
    assert sticky is None
    assert "answers come without usage" in verdict


# --- a deployment with faults ---


@pytest.fixture(scope="module")
def faulty() -> Iterator[str]:
    """Yield the address of a server that misbehaves."""
    with faulty_server() as url:
        yield url


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
        command = [*TOOL, url or f"{faulty}/{mode}/v1", *small, *(["--served-model", "m"] if named else []), *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | (env or {}))
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


NOT_NEEDED = ("vllm", "torch", "transformers", "rich", "prometheus_client", "numpy", "psutil", "huggingface_hub")
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {NOT_NEEDED}:
            raise ModuleNotFoundError(f"{{name}} is not to be imported here")
sys.meta_path.insert(0, Blocker())
"""


def test_of_all_that_the_suite_needs_it_needs_the_openai_client_alone(probe, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    env = {"PYTHONPATH": str(tmp_path)}
    blocked = subprocess.run(
        [sys.executable, "-c", "import rich"], capture_output=True, text=True, env=os.environ | env
    )
    assert "rich is not to be imported here" in blocked.stderr
    done = probe("textless", env=env)
    assert done.err == ""
    assert len(done.result["measurements"]) == 16
    assert all(m["error"] is None for m in done.result["measurements"])


def test_tokens_without_text_are_tokens(probe) -> None:
    done = probe("textless")
    assert all(m["error"] is None and m["ttft_ms"] > 0 for m in done.result["measurements"])


def test_a_refused_connection_is_counted(probe) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        _, port = listener.getsockname()
    done = probe("", url=f"http://127.0.0.1:{port}/v1")
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
    assert (done.result["lesson"], done.result["sticky"]) == ("is_it_sticky", None)
    for m in done.result["measurements"]:
        assert (m["error"], m["prompt_tokens"], m["cached_tokens"]) == (None, 40, None)
        assert m["ttft_ms"] > 0
    assert "python -m going_further.is_it_sticky http://127.0.0.1:" in done.result["environment"]["command"]
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


def test_a_model_named_after_the_key_is_refused_and_the_key_is_not_shown(probe) -> None:
    done = probe("echo", "--api-key-env", "KEY", env={"KEY": KEY}, named=False)
    assert (done.status, done.out) == (1, "")
    assert "repeats the API key" in done.err
    assert KEY not in done.err


def test_what_a_server_calls_its_model_does_not_steer_the_terminal(probe) -> None:
    done = probe("escapes", named=False)
    assert "\\x1b[31m at http" in done.out
    assert "\x1b" not in done.out + done.err


def test_a_deployment_that_lists_no_models_is_one_line_that_says_what_to_check(probe) -> None:
    others = ((mode, "no list of models: check the URL") for mode in ("html", *LISTS))
    for mode, says in (("404", "HTTP 404 Not Found"), *others):
        done = probe(mode, named=False)
        assert done.status == 1
        assert len(done.err.splitlines()) == 1
        assert says in done.err
        assert "--served-model" in done.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["127.0.0.1:8000/v1"], "with http:// or https://"),
        (["http://"], "with http:// or https://"),
        (["http://127.0.0.1:99999/v1"], "with http:// or https://"),
        (["http://127.0.0.1:port/v1"], "with http:// or https://"),
        ([KEY], "with http:// or https://"),
        ([f"http://me:{KEY}@127.0.0.1/v1"], "give a key with --api-key-env"),
        ([f"http://127.0.0.1/v1?key={KEY}"], "give a key with --api-key-env"),
        (["http://127.0.0.1/v1", "--api-key-env", "NOT_SET"], "the one it names is not set"),
        (["http://127.0.0.1/v1", "--api-key-env", KEY], "the one it names is not set"),
        (["http://127.0.0.1/v1", "--api-key-env", "BROKEN"], "a line break"),
        (["http://127.0.0.1/v1", "--session-header", "x session"], "the name of an HTTP header"),
        (["http://127.0.0.1/v1", "--workers", "2"], "arguments that are not known"),
        (["http://127.0.0.1/v1", "--token", KEY], "arguments that are not known"),
        (["--token", KEY, "http://127.0.0.1/v1"], "arguments that are not known"),
        (["http://127.0.0.1/v1", KEY], "arguments that are not known"),
        (["http://127.0.0.1/v1", f"--se={KEY}"], "arguments that are not known"),  # it abbreviates three options
    ],
)
def test_bad_input_is_one_line_that_repeats_no_secret(options: list[str], says: str) -> None:
    env = os.environ | {"BROKEN": f"{KEY}\n"}
    done = subprocess.run([*TOOL, *options], capture_output=True, text=True, cwd=ROOT, env=env)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert says in done.stderr
    assert KEY not in done.stderr


def test_without_a_url_there_is_a_usage_line_that_repeats_no_secret() -> None:
    for options in (["--token", f"--{KEY}"], ["--api-key-env", KEY]):
        done = subprocess.run([*TOOL, *options], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout) == (2, "")
        assert "the following arguments are required: URL" in done.stderr
        assert KEY not in done.stderr
