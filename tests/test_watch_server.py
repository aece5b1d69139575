"""What a watched server is shown as: its numbers, and what is said where there are none."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("prometheus_client", reason="it comes with vLLM")

from going_further import watch_server as tool

pytestmark = pytest.mark.alone  # it looks at times
ROOT = Path(__file__).parent.parent
TOOL = [sys.executable, "-m", "going_further.watch_server"]
BOUNDS = (0.1, 0.5, 2.5, math.inf)  # of the buckets of all texts here, in s
AT = "2026-01-15T09:30:0{}.000+00:00"


def metrics(
    *engines: tuple[int, int], ttft: tuple[int, ...] = (0, 0, 0, 0), kv: tuple[float, ...] = (0.0,), preempted: int = 0,
    waiting: int = 0, caching: bool = True, start: float = 1.7e9, external: int = 0,
) -> str:  # fmt: skip
    """Return metrics as vLLM 0.32 tells them; `engines` are their tokens queried and cached, `ttft` its buckets."""
    lines = ["# TYPE process_start_time_seconds gauge", f"process_start_time_seconds {start}"]
    lines += ["# TYPE vllm:prefix_cache_queries counter", "# TYPE vllm:time_to_first_token_seconds histogram"]
    for engine, (queried, cached) in enumerate(engines):
        labels = f'engine="{engine}",model_name="m"'
        counters = {
            "prefix_cache_queries": queried, "prefix_cache_hits": cached, "prompt_tokens": queried,
            "external_prefix_cache_hits": external, "num_preemptions": preempted,
        }  # fmt: skip
        for name, value in counters.items():
            lines.append(f"vllm:{name}_total{{{labels}}} {value}.0")
            lines.append(f"vllm:{name}_created{{{labels}}} 1.7e9")
        for bound, count in zip(("0.1", "0.5", "2.5", "+Inf"), ttft, strict=True):
            lines.append(f'vllm:time_to_first_token_seconds_bucket{{le="{bound}",{labels}}} {count}.0')
        lines.append(f"vllm:num_requests_waiting{{{labels}}} {waiting}.0")
        lines.append(f'vllm:num_requests_waiting_by_reason{{{labels},reason="capacity"}} {waiting}.0')
        lines.append(f"vllm:kv_cache_usage_perc{{{labels}}} {kv[engine % len(kv)]}")
        lines.append(f'vllm:cache_config_info{{block_size="16",enable_prefix_caching="{caching}",engine="{engine}"}} 1')
    return "\n".join(lines) + "\n"


IDLE = metrics((0, 0))


def seen(*texts: str | tool.Fault) -> list[tuple[tool.Sample, str]]:
    """Return what one server is shown as at look after look: its samples, and its lines."""
    server = tool.Watched("http://s/metrics")
    shown = []
    for n, text in enumerate(texts):
        look = text
        if isinstance(text, str):
            look = tool.read_metrics(text)
            look.taken_at = 2.0 * n
        sample = server.take(look, AT.format(n))
        shown.append((sample, tool.row(1, sample, tool.sparkline(server.rates))))
    return shown


# --- quantiles ---


@pytest.mark.parametrize(
    ("q", "counts", "seconds"),
    [
        # 10 values up to 0.1 s, 20 up to 0.5 s, 10 up to 2.5 s: rank 20 of 40 is in the middle of the second bucket.
        (0.5, (10, 30, 40, 40), 0.1 + 0.4 * 10 / 20),
        (0.9, (10, 30, 40, 40), 0.5 + 2.0 * 6 / 10),
        (0.5, (4, 4, 4, 4), 0.05),
        (1.0, (0, 0, 4, 4), 2.5),
        (0.9, (4, 4, 4, 8), None),  # above the largest bound
        (0.5, (0, 0, 0, 0), None),
    ],
)
def test_a_quantile_is_interpolated_inside_its_bucket(q: float, counts: tuple[int, ...], seconds: float | None) -> None:
    found = tool.quantile(q, dict(zip(BOUNDS, counts, strict=True)))
    assert found == (seconds if seconds is None else pytest.approx(seconds))


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any), st.floats(0.001, 1), st.floats(0.001, 1))
def test_a_quantile_lies_in_its_bucket_and_does_not_fall_with_q(counts: list[int], a: float, b: float) -> None:
    cumulative = [sum(counts[: n + 1]) for n in range(4)]
    buckets = dict(zip(BOUNDS, cumulative, strict=True))
    found = []
    for q in sorted((a, b)):
        n = next(n for n, count in enumerate(cumulative) if count >= q * sum(counts))
        value = tool.quantile(q, buckets)
        if n == 3:
            assert value is None
        else:
            assert (0, *BOUNDS)[n] <= value <= BOUNDS[n]
        found.append(math.inf if value is None else value)
    assert found[0] <= found[1]


# --- one server over time ---


def test_an_interval_shows_its_own_numbers_and_the_hit_rate_since_the_start() -> None:
    first = metrics((1000, 0), ttft=(0, 0, 1, 1))
    second = metrics((3000, 1500), ttft=(0, 2, 3, 3), kv=(0.25,), waiting=3, preempted=2)
    (start, first_line), (sample, line) = seen(first, second)
    assert (start.state, start.hit_rate, start.seconds) == ("start", 0.0, None)
    assert first_line == "09:30:00  1  1.50 s  2.30 s   0%    0    0      -      -  0.0%  0.0% since start"
    assert (sample.state, sample.seconds) == ("interval", 2.0)
    assert (sample.queried_tokens, sample.cached_tokens, sample.prompt_tokens) == (2000, 1500, 2000)
    assert (sample.hit_rate, sample.hit_rate_since_start) == (0.75, 0.5)
    assert (sample.first_tokens, sample.ttft_p50_ms) == (2, pytest.approx(300))
    assert (sample.waiting, sample.preemptions, sample.kv_usage) == (3, 2, 0.25)
    assert line == "09:30:01  1  300 ms  460 ms  25%    3    2   1.0k    750 75.0% 50.0% ▇"


def test_engines_of_one_server_are_summed_and_the_fullest_tells_the_kv_usage() -> None:
    text = metrics((1000, 100), (3000, 900), (0, 0), ttft=(0, 1, 1, 1), kv=(0.1, 0.4, 0.2), waiting=2, preempted=1)
    ((sample, _),) = seen(text)
    assert (sample.queried_tokens, sample.cached_tokens, sample.hit_rate) == (4000, 1000, 0.25)
    assert (sample.first_tokens, sample.waiting, sample.preemptions, sample.kv_usage) == (3, 6, 3, 0.4)


def test_tokens_from_a_kv_connector_are_cached_tokens() -> None:
    ((sample, _),) = seen(metrics((1000, 100), external=400))
    assert sample.hit_rate == 0.5


def test_without_requests_nothing_is_drawn_as_zero() -> None:
    text = metrics((1000, 500), ttft=(1, 1, 1, 1))
    _, (sample, line), (_, last) = seen(text, text, metrics((2000, 1500), ttft=(2, 2, 2, 2)))
    assert sample.hit_rate is sample.ttft_p50_ms is sample.ttft_p90_ms is None
    assert line == "09:30:01  1       -       -   0%    0    0      0      0     - 50.0%  "
    assert last.endswith("100% 75.0%  █"), "a gap, then a full block"


def test_a_ttft_above_the_largest_bound_is_said_to_be_that() -> None:
    _, (sample, line) = seen(IDLE, metrics((10, 0), ttft=(0, 1, 1, 2)))
    assert (sample.first_tokens, sample.ttft_p50_ms, sample.ttft_p90_ms) == (2, 500, None)
    assert " 500 ms >2.50 s " in line


@pytest.mark.parametrize(
    "restarted",
    [
        metrics((900, 300), ttft=(0, 2, 2, 2)),
        metrics((2000, 600), ttft=(0, 0, 1, 1)),
        metrics((2000, 600), ttft=(0, 2, 2, 2), start=1.8e9),
    ],
    ids=["a counter went back", "a bucket went back", "another process"],
)
def test_after_a_restart_counting_starts_anew(restarted: str) -> None:
    before = metrics((1000, 0), ttft=(0, 1, 2, 2))
    _, (sample, line), (following, _) = seen(before, restarted, restarted)
    assert (sample.state, sample.seconds) == ("restarted", None)
    assert sample.hit_rate == sample.hit_rate_since_start == pytest.approx(0.3, abs=0.04)
    assert line.endswith(" restarted")
    assert (following.state, following.queried_tokens) == ("interval", 0)


def test_a_server_that_is_gone_is_watched_on_and_may_come_back() -> None:
    refused = tool.Fault("gone", "connection refused")
    looks = seen(refused, metrics((1000, 0)), refused, refused, metrics((1400, 300)), refused)
    lines = [line[13:] if n in (0, 2, 3, 5) else line for n, (_, line) in enumerate(looks)]
    assert lines[0] == "o answer since 09:30:00: connection refused"
    assert lines[2] == lines[3] == "one since 09:30:02: connection refused"
    assert lines[5] == "one since 09:30:05: connection refused", "it was there in between"
    back, line = looks[4]
    assert (back.state, back.seconds, back.hit_rate) == ("interval", 6.0, 0.75)
    assert line.endswith("  ▇"), "gaps where it was gone"
    assert all(sample.hit_rate is None for sample, _ in looks if sample.fault)


def test_a_server_without_prefix_caching_has_no_hit_rate() -> None:
    text = metrics((0, 0), ttft=(1, 1, 1, 1), caching=False)
    for sample, line in seen(text, text):
        assert line.endswith("  prefix caching is off")
        assert (sample.prefix_caching, sample.hit_rate) == (False, None)
        assert len(line) <= 80
    *_, (sample, line) = seen(metrics((10, 5)), text)
    assert (sample.state, line) == ("restarted", "09:30:01  1 restarted, prefix caching is off")


@given(st.integers(0, 2**60), st.integers(0, 2**60), st.lists(st.integers(0, 10**6), min_size=4, max_size=4))
def test_a_line_fits_80_columns(queried: int, cached: int, counts: list[int]) -> None:
    text = metrics((queried, cached), ttft=tuple(counts), kv=(1.0,), waiting=99_999, preempted=99_999)
    for _, line in seen(IDLE, *[IDLE] * 20, text, text):
        assert len(line) <= 80


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (0, "0"), (999.4, "999"), (999.6, "1.0k"), (12_345, "12.3k"), (123_456, "123k"), (4.5e6, "4.5M")],
)
def test_a_number_is_written_in_five_characters(number: float | None, text: str) -> None:
    assert tool.short(number) == text


# --- what is no vLLM server ---


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no vLLM metrics, found: nothing"),
        ("<html>\n<p>a proxy", "no vLLM metrics, found: <html> <p>a proxy"),
        ("# HELP go_gc_cycles x\ngo_gc_cycles 1\n", "no vLLM metrics, found: # HELP go_gc_cycles x go_gc_cycles 1"),
        (IDLE.replace("kv_cache_usage", "gpu_cache_usage"), "vLLM metrics without vllm:kv_cache_usage_perc"),
        (IDLE.replace('le="+Inf"', 'le="9"'), f"vLLM metrics without the last bucket of {tool.TTFT}"),
        (IDLE.replace('le="0.1",', ""), "not in Prometheus' text format"),
        (IDLE.replace('m"} 0.0', 'm"} NaN'), "not in Prometheus' text format"),
        (IDLE.replace('m"} 0.0', 'm"} -1'), "not in Prometheus' text format"),
        (IDLE.replace('engine="0"', 'engine="0'), "not in Prometheus' text format"),
    ],
)
def test_what_was_found_instead_is_said(text: str, says: str) -> None:
    with pytest.raises(tool.Fault) as caught:
        tool.read_metrics(text)
    assert (caught.value.state, str(caught.value)) == ("no metrics", says)


@pytest.mark.parametrize(
    "url",
    [
        *("127.0.0.1:8000", "http://", "ftp://h", "file:///etc/passwd", "http://h:0", "http://h:99999", "http://[::1"),
        *("http://me:secret@h", "http://h/?a=secret", "http://h/#secret", "http://h/ö", "http://h/ x"),
    ],
)
def test_what_is_no_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(tool.UsageError) as caught:
        tool.metrics_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/metrics", "/metrics/"])
def test_the_same_server_may_be_written_in_several_ways(end: str) -> None:
    assert tool.metrics_url(f"http://h:8000{end}") == "http://h:8000/metrics"
    assert tool.metrics_url(f"https://h/team{end}") == "https://h/team/metrics"


# --- the command ---

Answer = str | bytes | Callable[[http.server.BaseHTTPRequestHandler], None]


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers /NAME/metrics with the next text of NAME's script, at its end with the last one again and again."""

    scripts: dict[str, list[Answer]] = {}  # noqa: RUF012, one for all requests

    def do_GET(self) -> None:
        script = self.scripts[self.path.split("/")[1]]
        answer = script.pop(0) if len(script) > 1 else script[0]
        if callable(answer):
            answer(self)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer.encode() if isinstance(answer, str) else answer)

    def log_message(self, *_: object) -> None:
        pass


def endless(request: http.server.BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    with contextlib.suppress(OSError):
        while True:
            request.wfile.write(b"# more and more\n" * 4096)


def hang(_: http.server.BaseHTTPRequestHandler) -> None:
    time.sleep(7)


def drip(request: http.server.BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(70):
            request.wfile.write(b"#")
            time.sleep(0.1)


def cut_off(request: http.server.BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "100000")
    request.end_headers()
    request.wfile.write(IDLE.encode())


def redirect(place: str) -> Answer:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", place)
        request.end_headers()

    return answer


def status(code: int) -> Answer:
    return lambda request: request.send_error(code, "no\x1b[31mgood")


def nonsense(request: http.server.BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"\x00\x01\x02\n")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | environment
    done = subprocess.run([*TOOL, *words], cwd=ROOT, capture_output=True, text=True, env=env, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    assert max(map(len, done.stdout.splitlines()), default=0) <= 80, done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    return done


def samples(path: Path) -> list[dict]:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert (result["schema"], result["lesson"]) == (1, "watch_server")
    return result["samples"]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (endless, "an answer of more than 10,000,000 bytes"),
        (hang, "no answer since {}: no answer within 5 s"),
        (drip, "no answer since {}: no answer within 5 s"),
        (cut_off, "no answer since {}: connection lost"),
        (nonsense, "no answer since {}: connection lost"),
        (b"vllm:\xff\xfe", "an answer that is not UTF-8"),
        (status(404), "HTTP 404 Not Found"),
        (status(503), "no answer since {}: HTTP 503 Service Unavailable"),
        (redirect("file:///etc/passwd"), "HTTP 302 Found"),
        (redirect("http://[::1/"), "no answer since {}: connection lost"),
        ("<b>\x1b[31mred\x07 \u202e", "no vLLM metrics, found: <b>\\x1b[31mred\\x07 \\u202e"),
        ("<" * 300, f"no vLLM metrics, found: {'<' * 41}..."),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_of_a_server_is_one_line_and_status_1(address: str, answer: Answer, says: str) -> None:
    Scripted.scripts["fault"] = [answer]
    done = run("--once", f"{address}/fault")
    assert (done.returncode, done.stderr) == (1, "")
    last = done.stdout.splitlines()[-1]
    assert last[8:] == "  1 " + says.format(last[:8]) or says in last.replace(last[29:37], "{}"), last


def test_a_port_where_nobody_listens_and_a_name_that_nobody_has() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        done = run("--once", f"http://127.0.0.1:{held.getsockname()[1]}", "http://no-such-host.invalid")
    assert done.returncode == 1
    *_, refused, unknown = done.stdout.splitlines()
    assert refused.endswith(": connection refused")
    assert unknown.endswith(": unknown host")


def test_one_look_shows_all_since_the_start_and_goes_past_a_proxy(address: str, tmp_path: Path) -> None:
    Scripted.scripts["s"] = [metrics((1000, 250), ttft=(0, 2, 2, 2))]
    path = tmp_path / "out.json"
    done = run("--once", f"{address}/s/v1/", f"{address}/s", "--json", str(path), http_proxy="http://127.0.0.1:1")
    assert (done.returncode, done.stderr) == (0, "")
    place, _, *head, line = done.stdout.splitlines()
    assert place == f" 1 {address}/s/metrics", "one server, though written twice"
    assert len(head) == 2
    assert line[8:] == "  1  300 ms  460 ms   0%    0    0      -      - 25.0% 25.0% since start"
    (sample,) = samples(path)
    assert (sample["state"], sample["hit_rate"], sample["queried_tokens"]) == ("start", 0.25, 1000)
    assert str(tmp_path) not in path.read_text()


def test_each_interval_is_a_line_a_server(address: str, tmp_path: Path) -> None:
    Scripted.scripts["a"] = [metrics((1000, 0)), status(500), metrics((1100, 50)), metrics((10, 0))]
    Scripted.scripts["b"] = [metrics((0, 0), caching=False)]
    path = tmp_path / "out.json"
    done = run("--interval", "1", "--count", "3", f"{address}/a", f"{address}/b", "--json", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()[-8:]
    assert [line[10] for line in lines] == ["1", "2"] * 4
    assert [line.rsplit(" ", 1)[-1] for line in lines[1::2]] == ["off"] * 4
    assert [s["state"] for s in samples(path) if "/a/" in s["server"]] == ["start", "gone", "interval", "restarted"]
    assert lines[4].endswith("50.0%  4.5%  ▅")
    assert samples(path)[4]["seconds"] == pytest.approx(2, abs=0.9), "since the last look that was answered"


def test_a_server_that_does_not_answer_delays_no_other_and_the_last_look_counts(address: str) -> None:
    Scripted.scripts |= {"slow": [hang], "quick": [metrics((0, 0)), metrics((10, 5)), status(500)]}
    began = time.monotonic()
    done = run("--interval", "1", "--count", "1", f"{address}/slow", f"{address}/quick")
    assert time.monotonic() - began < 2 * (tool.TIMEOUT + 1) + 5
    assert done.returncode == 1
    assert "50.0% 50.0% ▅" in done.stdout


def test_where_the_output_is_not_utf8_there_is_no_sparkline(address: str) -> None:
    Scripted.scripts["a"] = [metrics((1000, 0)), metrics((2000, 1000))]
    done = run("--interval", "1", "--count", "1", f"{address}/a", PYTHONIOENCODING="ascii")
    assert done.stdout.isascii()
    assert done.stdout.endswith("100% 50.0% \n")


def start(*words: str, **options: object) -> subprocess.Popen:
    return subprocess.Popen([*TOOL, *words], cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True, **options)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_at_once_and_the_json_is_written(
    address: str, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    Scripted.scripts["a"] = [metrics((1000, 500)), hang]
    path = tmp_path / "out.json"
    with start("--interval", "1", f"{address}/a", "--json", str(path), stdout=subprocess.PIPE, text=True) as process:
        while "since start" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(1.5)  # into the look that nobody answers
        began = time.monotonic()
        process.send_signal(signum)
        _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (code, "interrupted\n")
    assert time.monotonic() - began < 3
    assert [sample["hit_rate"] for sample in samples(path)] == [0.5]


def test_a_reader_that_goes_away_is_one_line_and_the_json_is_written(address: str, tmp_path: Path) -> None:
    Scripted.scripts["a"] = [metrics((1000, 500))]
    path = tmp_path / "out.json"
    with start("--interval", "1", f"{address}/a", "--json", str(path), stdout=subprocess.PIPE, text=True) as process:
        while "since start" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (1, "watch_server: error: cannot write: Broken pipe\n")
    assert samples(path)


def test_on_a_terminal_the_lines_are_drawn_in_place(address: str) -> None:
    Scripted.scripts["a"] = [metrics((1000, 0)), metrics((2000, 1000))]
    terminal, inside = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    with start("--interval", "1", "--count", "2", f"{address}/a", stdout=inside, env=environment) as process:
        os.close(inside)
        out = b""
        with contextlib.suppress(OSError):  # it was closed at the other end
            while chunk := os.read(terminal, 4096):
                out += chunk
        assert process.wait(timeout=10) == 0
    os.close(terminal)
    text = out.decode()
    assert "\x1b[1A" in text, "the cursor goes up"
    assert "\x1b[?25h" in text, "the cursor is shown again"
    assert "100% 50.0% █" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required: URL"),
        (["nonsense"], "URL is an address with http:// or https://"),
        (["http://h", "--interval", "0"], "is not a whole number of at least 1"),
        (["http://h", "--count", "0"], "is not a whole number of at least 1"),
        (["http://h", "--once", "--count", "2"], "not allowed with argument --once"),
        (["http://h", "--json", "no/such/folder/x.json"], "cannot write no/such/folder/x.json"),
        (["http://h\x1b[31m"], "there is a control character among the arguments"),
    ],
)
def test_bad_usage_is_status_2_and_one_line(words: list[str], says: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]
