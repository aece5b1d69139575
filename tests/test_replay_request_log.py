"""The log replayer's command: what it prints, writes down and refuses. What stands behind it is in test_replay_*.py."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.models import write_llama

from going_further import replay_request_log
from going_further.replay.readers import SHAPES

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "going_further.replay_request_log"]
SYSTEM = {"role": "system", "content": "You are an agent. Use the tools. " * 40}
USER = {"role": "user", "content": "Begin with the first task. " * 10}


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(own_signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command in this process, where vLLM is imported once."""

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["going_further/replay_request_log.py", *map(str, words)])
        capsys.readouterr()
        try:
            status = replay_request_log.main()
        except SystemExit as end:
            status = end.code
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture
def replay(command) -> Callable[..., Done]:
    return lambda path, *options: command(path, "--without-engine", *options)


def log(tmp_path: Path, *entries: dict | bytes, name: str = "log.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(b"".join(e if isinstance(e, bytes) else json.dumps(e).encode() + b"\n" for e in entries))
    return path


def asking(n: int, tenant: str, clock: bool = False, turns: int = 0) -> dict:
    """Return an entry; that of a tenant with a clock has it in front."""
    rules = " ".join(f"Rule {k} of {tenant} is to check {k} lamps and to name a price." for k in range(20))
    messages = [
        {"role": "system", "content": f"It is 09:{10 + n}. {rules}" if clock else rules},
        {"role": "user", "content": f"Which lamp for {tenant}?"},
    ]
    for turn in range(turns):
        messages += [{"role": "assistant", "content": f"Lamp {turn}. " * 5}, {"role": "user", "content": f"{turn}?"}]
    return {
        "messages": messages, "metadata": {"session": f"{tenant}-{n % 2}", "tenant": tenant}, "timestamp": 1000 + 60 * n
    }  # fmt: skip


IMAGE = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of two tenants: of one whose layout is good, and of one with a clock in front; and an image."""
    entries = []
    for n in range(6):
        entries += [asking(n, "good", turns=n // 2), asking(n, "bad", clock=True, turns=n // 2)]
    entries[5]["images_of_lamps"] = []
    for entry in entries:
        entry["usage"] = {"prompt_tokens": 400, "prompt_tokens_details": {"cached_tokens": 0}}
    return log(tmp_path, *entries, IMAGE)


def one_line(done: Done, says: str, status: int = 2) -> None:
    assert (done.status, done.out) == (status, ""), done
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("replay_request_log: error: ")
    assert says in done.err


def refused_by_parser(done: Done, says: str) -> None:
    assert (done.status, done.out) == (2, ""), done
    assert says in done.err.splitlines()[-1]


def fits(text: str) -> bool:
    return all(len(line) <= 80 and line.isprintable() for line in text.split("\n"))


# --- what is printed, and written down ---


def test_rows_summary_advice_groups_routing_and_notes(replay, path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = replay(path, "--session-field", "metadata.session", "--group-by", "metadata.tenant", "--replicas", 3,
                  "--json", out, "--price-input", 10, "--price-cached", 1)  # fmt: skip
    assert (done.status, done.err) == (0, "")
    assert fits(done.out)
    found = json.loads(out.read_text())
    assert (found["schema"], found["lesson"]) == (1, "replay_request_log")
    assert found["environment"] == {"model": "built_in_model/cpu", "block_size": 16}
    rows = found["requests"]
    assert [row["line"] for row in rows] == list(range(1, 13))
    assert [row["kind"] for row in rows[1::2]] == ["another prompt"] + ["system message changed"] * 5
    assert {row["group"] for row in rows} == {"good", "bad"}
    assert {row["session"] for row in rows} == {"good-0", "good-1", "bad-0", "bad-1"}
    assert {row["logged_prompt_tokens"] for row in rows} == {400}
    # rows
    lines = done.out.splitlines()
    for row in rows:
        line = next(line for line in lines if line.split()[:1] == [str(row["line"])])
        assert line.split()[1:3] == [f"{row['prompt_tokens']:,}", f"{row['predicted_cached_tokens']:,}"]
        assert row["kind"] in line
        if row["predecessor"]:
            assert line.endswith(f"line {row['predecessor']}")
    # summary
    sent, cached = (sum(row[key] for row in rows) for key in ("prompt_tokens", "predicted_cached_tokens"))
    assert f"12 requests, {sent:,} tokens, {cached:,} cached ({cached / sent:.1%})" in done.out
    assert found["hit_rate"] == pytest.approx(cached / sent)
    lost = sum(row["lost_tokens"] for row in rows)
    assert lost > 0
    assert f"${lost * 9 / 1e6:.4f}" in done.out
    # advice
    (advice,) = found["advice"]
    assert (advice["where"], advice["requests"], advice["lost_tokens"]) == ("message 0 (system)", 5, lost)
    assert f"message 0 (system): 5 requests, {lost:,} tokens lost" in done.out
    assert f"behind the static part {advice['moved_hit_rate']:.1%}" in done.out
    assert "'It is 09:10.'" in done.out
    # groups, sessions and families: name, requests, tokens, hit rate
    assert [group[0] for group in found["groups"]] == ["bad", "good"] or found["groups"][0][2] >= found["groups"][1][2]
    assert [group[1] for group in found["groups"]] == [6, 6]
    good = next(group for group in found["groups"] if group[0] == "good")
    assert good[3] > 0.7
    assert sum(group[2] for group in found["groups"]) == sum(session[2] for session in found["sessions"]) == sent
    assert any("metadata.tenant" in line for line in lines)
    assert [line.split()[:2] for line in lines if line.startswith("good ")] == [["good", "6"]]
    assert sorted(session[0] for session in found["sessions"]) == ["bad-0", "bad-1", "good-0", "good-1"]
    assert sorted(family[0] for family in found["families"]) == ["line 1", "line 2"]
    # routing
    policies = ["one cache", "round robin", "session affinity", "prefix-aware"]
    assert [result["policy"] for result in found["routing"]] == policies
    for result in found["routing"]:
        assert sum(result["requests"]) == 12
        assert any(line.startswith(result["policy"]) for line in lines)
    assert found["routing"][0]["found_tokens"] == cached
    # what the server said
    assert found["logged"]["requests"] == 12
    assert found["logged"]["sent_tokens"] == 12 * 400
    assert "Logged against predicted: 12 requests" in done.out
    # notes
    assert found["left_out"] == [{"line": 13, "reason": "an image: only text can be replayed"}]
    assert "left out, 1: an image: only text can be replayed (line 13)" in done.out
    assert "ignores: images_of_lamps (1)" in " ".join(done.out.split())
    assert len(found["notes"]) == 2


def test_a_log_without_breaks_costs_nothing_and_gets_no_advice(replay, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = replay(log(tmp_path, *(asking(n, "good", turns=n) for n in range(3))), "--json", out)
    found = json.loads(out.read_text())
    assert (done.status, found["advice"], found["routing"], found["logged"], found["groups"]) == (0, [], [], None, [])
    assert sum(row["lost_tokens"] for row in found["requests"]) == 0
    assert "$0.0000" in done.out
    assert "stands too early" not in done.out
    answers = sum(row["answer_tokens"] for row in found["requests"])
    assert f"a server finds {answers:,} more" in done.out


def test_one_request_is_told_in_the_singular(replay, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "short", max_position_embeddings=64)
    done = replay(log(tmp_path, {"messages": [SYSTEM, USER]}), "--model", model)
    assert done.status == 0
    assert "1 request, " in done.out
    assert "1 requests" not in done.out
    assert done.err == "", "what libraries remark about long prompts is kept back"


def test_limit_and_block_size(replay, path: Path, tmp_path: Path) -> None:
    out, cached = tmp_path / "out.json", {}
    for size in (16, 32):
        assert replay(path, "--limit", 3, "--block-size", size, "--json", out).status == 0
        found = json.loads(out.read_text())
        assert [row["line"] for row in found["requests"]] == [1, 2, 3]
        assert found["environment"]["block_size"] == size
        cached[size] = found["requests"][2]["predicted_cached_tokens"]
        assert cached[size] % size == 0
    assert cached[16] >= cached[32] > 0


def test_a_long_log_shows_what_lost_most(replay, tmp_path: Path) -> None:
    entries = [{"messages": [{"role": "system", "content": "Be kind. " * 20}, {"role": "user", "content": f"{n}?"}]}
               for n in range(250)]  # fmt: skip
    clocks = [asking(n, "bad", clock=True) for n in range(5)]
    done = replay(log(tmp_path, *entries, *clocks))
    assert done.status == 0
    shown = [line.split()[0] for line in done.out.splitlines() if ", line " in line]
    assert len(shown) <= 20
    assert {"252", "253", "254", "255"} <= set(shown)
    assert "255 requests" in done.out


# --- caches and fleets ---


def test_cache_tokens_and_ttl_bound_the_cache(replay, tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "a", "b"]
    path, out = log(tmp_path, *(asking(n, name) for n, name in enumerate(names))), tmp_path / "out.json"
    evicted = {}
    for options in ((), ("--cache-tokens", 1000), ("--cache-tokens", 100_000), ("--ttl", 100), ("--ttl", 1000)):
        done = replay(path, *options, "--json", out)
        assert done.status == 0
        rows = json.loads(out.read_text())["requests"]
        evicted[options] = [row["evicted_tokens"] for row in rows]
        assert (sum(evicted[options]) > 0) == ("evicted or too old" in done.out)
        if sum(evicted[options]):
            assert [row["predicted_cached_tokens"] for row in rows[4:]] == [0, 0]
    large = evicted[()]
    assert large == [0] * 6 == evicted["--cache-tokens", 100_000] == evicted["--ttl", 1000]
    assert min(evicted["--cache-tokens", 1000][4:]) > 0
    assert evicted["--ttl", 100] == evicted["--cache-tokens", 1000]


def test_ttl_without_times_is_one_line(replay, tmp_path: Path) -> None:
    one_line(replay(log(tmp_path, {"messages": [USER]}), "--ttl", 5), "line 1: no time, which --ttl needs")


def test_the_table_of_replicas_has_every_policy_and_the_requests_of_each(replay, tmp_path: Path) -> None:
    entries = [asking(n, name, turns=n // 3) for n in range(9) for name in "abcdef"]
    done = replay(
        log(tmp_path, *entries), "--replicas", 5, "--cache-tokens", 3000, "--session-field", "metadata.tenant"
    )
    assert (done.status, done.err) == (0, "")
    assert fits(done.out)
    lines = {line[:26].strip(): line for line in done.out.splitlines()}
    assert "5 replicas, the same log" in lines
    for policy in ("one cache", "round robin", "session affinity", "prefix-aware"):
        assert "%" in lines[policy]
    assert "11 11 11 11 ..." in lines["round robin"]


# --- --fail-under ---


def test_fail_under_is_one_line_and_status_1(replay, path: Path) -> None:
    done = replay(path, "--fail-under", 99)
    rate = next(line for line in done.out.splitlines() if "12 requests" in line).split("(")[1].split("%")[0]
    assert done.status == 1
    assert done.err == f"replay_request_log: hit rate {rate} %, below 99 %\n"
    assert replay(path, "--fail-under", float(rate) - 0.1)[::2] == (0, "")
    assert replay(path, "--fail-under", 0)[::2] == (0, "")


# --- fields ---


def test_a_field_of_the_request_in_an_entry_is_found_too(replay, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    pair = {"request": {"messages": [SYSTEM, USER], "metadata": {"tenant": "one"}}, "response": {}}
    assert replay(log(tmp_path, pair), "--group-by", "metadata.tenant", "--json", out).status == 0
    assert [row["group"] for row in json.loads(out.read_text())["requests"]] == ["one"]


def test_fields_that_no_request_has_are_one_line(replay, path: Path) -> None:
    one_line(replay(path, "--session-field", "metadata.nothing"), "--session-field: no request of this log has")
    one_line(replay(path, "--group-by", "tenant"), "--group-by: no request of this log has a field tenant")


def test_a_field_that_some_requests_have_groups_those(replay, tmp_path: Path) -> None:
    entries = [asking(0, "a"), asking(1, "a"), {"messages": [USER]}, asking(2, "b") | {"list": [{"name": 0}]}]
    out = tmp_path / "out.json"
    path = log(tmp_path, *entries)
    assert replay(path, "--group-by", "metadata.tenant", "--json", out).status == 0
    assert sorted(group[:2] for group in json.loads(out.read_text())["groups"]) == [
        ["(no value)", 1],
        ["a", 2],
        ["b", 1],
    ]
    assert replay(path, "--group-by", "list.0.name", "--json", out).status == 0, "0 is a value"
    assert sorted(group[:2] for group in json.loads(out.read_text())["groups"]) == [["(no value)", 3], ["0", 1]]


# --- what is left out, and --strict, --format ---


def test_strict_refuses_what_would_be_left_out(replay, path: Path, tmp_path: Path) -> None:
    one_line(replay(path, "--strict"), "line 13: an image: only text can be replayed")
    unusable = log(tmp_path, {"messages": [USER]}, {"messages": [USER], "tools": {}}, name="unusable.jsonl")
    assert "left out, 1: vLLM does not take it" in replay(unusable).out
    one_line(replay(unusable, "--strict"), "line 2: vLLM does not take it")


def test_what_the_template_does_not_take_is_left_out_and_named(replay, tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}x"
    model = write_llama(tmp_path / "model", template=template)
    done = replay(log(tmp_path, {"messages": [USER]}, {"messages": [SYSTEM, USER]}), "--model", model)
    assert done.status == 0
    assert "no system message (line 2)" in " ".join(done.out.split())
    done = replay(log(tmp_path, {"messages": [SYSTEM, USER]}), "--model", model)
    one_line(done, "line 1: vLLM does not take it: no system message")


def test_many_reasons_are_counted(replay, tmp_path: Path) -> None:
    bad = [b"oops\n", b"[1]\n", b'{"colour": 1}\n', b'{"error": {"message": "full"}}\n', b'{"messages": "x"}\n', b"{\n",
           b'{"messages": [{"role": "user", "content": 5}]}\n']  # fmt: skip
    done = replay(log(tmp_path, {"messages": [USER]}, *bad, *[IMAGE] * 9))
    assert done.status == 0
    text = " ".join(done.out.split())
    assert "left out, 9: an image: only text can be replayed (line 9, 10, 11, 12, 13, ...)" in text
    assert "left out for other reasons: " in text
    assert fits(done.out)


def test_format_overrules_what_the_fields_tell(replay, tmp_path: Path) -> None:
    path = log(tmp_path, {"messages": [USER], "system": "Be kind.", "model": "m", "max_tokens": 9, "prompt": "Once"})
    tokens = {}
    for shape in (None, "openai", "anthropic", "completions"):
        done = replay(path, *(("--format", shape) if shape else ()))
        assert done.status == 0
        tokens[shape] = next(line for line in done.out.splitlines() if line.split()[:1] == ["1"]).split()[1]
    assert tokens[None] == tokens["anthropic"] != tokens["openai"] != tokens["completions"]
    one_line(replay(path, "--format", "otel"), "holds no request")
    refused_by_parser(replay(path, "--format", "nonsense"), "invalid choice: 'nonsense'")
    assert all(shape in replay(path, "--format", "nonsense").err for shape in SHAPES)


# --- the command line ---


def test_what_is_computed_and_not_measured_needs_to_be_told_so(command, path: Path) -> None:
    for option, value in (("--cache-tokens", "1000"), ("--ttl", "5"), ("--replicas", "2"),
                          ("--speculative-config", '{"method": "ngram"}')):  # fmt: skip
        refused_by_parser(command(path, option, value), f"{option} needs --without-engine")


def test_values_of_no_sense_are_refused(command, path: Path) -> None:
    for option, value, says in (
        ("--limit", "0", "--limit"), ("--replicas", "1", "--replicas"), ("--ttl", "x", "--ttl"),
        ("--cache-tokens", "-5", "--cache-tokens"), ("--fail-under", "101", "'101' is no percentage"),
        ("--fail-under", "nan", "'nan' is no percentage"), ("--fail-under", "x", "'x' is no percentage"),
        ("--speculative-config", "[1]", "no JSON object"), ("--speculative-config", "{", "no JSON object"),
        ("--session-field", "", "empty value"), ("--group-by", "\x1b[31m", "control character"),
    ):  # fmt: skip
        refused_by_parser(command(path, "--without-engine", option, value), says)


def test_a_log_is_not_written_over(replay, path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    (tmp_path / "link.json").symlink_to(path)
    for name in (path, tmp_path / "link.json"):
        refused_by_parser(replay(path, "--json", name), "--json names the log itself")
    assert path.read_bytes() == before


def test_faults_end_the_command_with_one_line_and_status_2(replay, tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "none.jsonl", "cannot read"),
        (tmp_path, "no regular file"),
        (log(tmp_path, b"oops\n", name="oops"), "line 1: no JSON"),
        (log(tmp_path, b"", name="empty"), "holds no request"),
        (log(tmp_path, {"colour": "red"}, name="red"), "known shapes: "),
        (log(tmp_path, IMAGE, name="image"), "an image"),
        (log(tmp_path, {"messages": [{"role": "user", "content": 5}]}, name="five"), "line 1: vLLM does not take it"),
    ):
        one_line(replay(path), says)
    path = log(tmp_path, {"messages": [USER]})
    one_line(replay(path, "--model", tmp_path), str(tmp_path), status=1)
    bad_method = json.dumps({"method": "nonsense", "num_speculative_tokens": 2})
    assert replay(path, "--speculative-config", bad_method).status == 1


def test_a_model_of_other_rules_is_refused_by_name(replay, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "chunked", attention_chunk_size=64)
    one_line(replay(log(tmp_path, {"messages": [USER]}), "--model", model), "chunked local attention", status=1)
    some = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=True, max_window_layers=1)
    model, path = write_llama(tmp_path / "window", sliding_window=64, **some), log(tmp_path, {"messages": [SYSTEM]})
    done = replay(path, "--model", model)
    assert (done.status, len(done.err.splitlines())) == (1, 1)
    assert "--disable-hybrid-kv-cache-manager" in done.err
    assert replay(path, "--model", model, "--disable-hybrid-kv-cache-manager").status == 0


# --- traces ---


def trace(*requests: tuple[int, list[int]]) -> list[dict]:
    return [{"timestamp": 1000 * n, "input_length": tokens, "output_length": 9, "hash_ids": ids}
            for n, (tokens, ids) in enumerate(requests)]  # fmt: skip


@pytest.mark.alone
def test_a_trace_of_hashes_is_replayed_at_once_and_without_vllm(tmp_path: Path) -> None:
    path = log(tmp_path, *trace((1500, [1, 2, 3]), (2500, [1, 2, 3, 4, 5]), (1100, [1, 2, 9])), *[IMAGE] * 2)
    out = tmp_path / "out.json"
    script = (
        "import sys; from going_further.replay_request_log import main; status = main(); "
        "sys.exit(status or [n for n in ('vllm', 'torch', 'transformers') if n in sys.modules] or 0)"
    )
    words = [path, "--without-engine", "--replicas", "2", "--cache-tokens", "3000", "--ttl", "9", "--json", out]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began < 5
    found = json.loads(out.read_text())
    assert [row["prompt_tokens"] for row in found["requests"]] == [1500, 2500, 1100]
    assert [row["predicted_cached_tokens"] for row in found["requests"]] == [0, 1024, 1024]
    assert found["environment"]["block_size"] == 512
    assert "blocks of 512 tokens" in done.stdout
    assert "a trace of hashes: what broke a prefix is not in it" in done.stdout
    assert fits(done.stdout)


def test_a_trace_and_another_block_size_or_requests_do_not_go_together(command, replay, tmp_path: Path) -> None:
    bailian = {"chat_id": 1, "input_length": 20, "hash_ids": [1, 2]}
    path = log(tmp_path, *trace((1500, [1, 2, 3])), {"messages": [USER]}, bailian)
    one_line(replay(path, "--block-size", 16), "this trace has blocks of 512 tokens")
    done = replay(path)
    assert done.status == 0
    text = " ".join(done.out.split())
    assert "a trace of hashes and a log of requests do not go together (line 2)" in text
    assert "blocks of another size: 16 (line 3)" in text
    path = log(tmp_path, {"messages": [USER]}, *trace((1500, [1, 2, 3])), name="mixed")
    assert "do not go together (line 2)" in " ".join(replay(path).out.split())


# --- a pipe, a terminal, a signal ---


def hostile(n: int) -> dict:
    """Return a request whose every text would steer a terminal, break markup, or run over a line."""
    odd = ["\x1b[31mred", "\x1b]0;title\x07", "[/bold]", "[/]", "\u202eback", "long" * 50][n % 6]
    deep = {"type": "object", "properties": {("very_long_name_of_a_property_" * 5): {"n": n, odd: n}}}
    return {
        "model": odd if n > 3 else "m", odd: 1, "session": f"{odd} {n}", "[/x]": odd, "timestamp": n,
        "messages": [
            {"role": "system", "content": json.dumps({("a_very_long_name_in_json_" * 5): {odd: n}}) + " Be kind." * 50},
            {"role": "user", "content": odd * 30, "name": odd}, {"role": odd, "content": f"{odd} {n} " * 40}, USER,
        ],
        "tools": [{"type": "function", "function": {"name": f"f{odd[:3]}", "parameters": deep}}],
    }  # fmt: skip


def test_nothing_that_a_log_holds_steers_a_terminal_or_runs_over_80_columns(replay, tmp_path: Path) -> None:
    entries = [hostile(n) for n in range(12)]
    same = [hostile(0) | {"session": "same", "model": "m"} for _ in range(3)]
    for n, entry in enumerate(same):  # its tools alone change: the field is a long path
        function = entry["tools"][0]["function"]
        entry["tools"] = [
            {
                "type": "function",
                "function": function | {"parameters": hostile(n)["tools"][0]["function"]["parameters"]},
            }
        ]
    path = log(tmp_path, *entries, *same, b'{"error": "\\u001b[31m' + b"long" * 90 + b'"}\n')
    for group in ("[/x]", "session"):
        done = replay(path, "--session-field", "session", "--group-by", group, "--replicas", 2)
        assert (done.status, done.err) == (0, "")
        assert [line for line in done.out.split("\n") if len(line) > 80] == []
        assert [line for line in done.out.split("\n") if not line.isprintable()] == []
    done = replay(path, "--group-by", "absent_" * 40)
    assert (done.status, len(done.err.splitlines())) == (2, 1)


def test_advice_about_a_long_path_is_in_80_columns(replay, tmp_path: Path) -> None:
    def asked(n: int) -> dict:
        properties = {"a_very_long_name_of_a_property_" * 4: {"type": "string", "description": f"It is 09:1{n}."}}
        parameters = {"type": "object", "properties": properties}
        rest = [
            {"type": "function", "function": {"name": f"tool_{k}", "parameters": {"type": "object"}}} for k in range(5)
        ]
        tools = [{"type": "function", "function": {"name": "price", "parameters": parameters}}, *rest]
        return {"messages": [SYSTEM, USER, {"role": "assistant", "content": "Yes. " * 50}, USER], "tools": tools}

    done = replay(log(tmp_path, *map(asked, range(3))))
    assert done.status == 0
    assert "stands too early" in done.out
    assert [line for line in done.out.splitlines() if len(line) > 80] == []


def test_a_pipe_gets_what_a_terminal_gets_in_80_columns(path: Path) -> None:
    done = subprocess.run([*COMMAND, path, "--without-engine"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "12 requests" in done.stdout
    assert fits(done.stdout)


@pytest.mark.parametrize("delay", [2, 12])  # seconds: while vLLM is imported, and while requests are compared
def test_ctrl_c_while_a_large_log_is_read_is_one_word(tmp_path: Path, delay: int) -> None:
    path = log(tmp_path, *({"messages": [SYSTEM, USER]} for _ in range(40_000)))
    process = subprocess.Popen(
        [*COMMAND, path, "--without-engine"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=10), process.returncode) == (("", "interrupted\n"), 130)


def test_without_vllm_here_it_goes_on_in_the_venv_or_says_what_to_run(tmp_path: Path) -> None:
    bare = sys.base_prefix + "/bin/python3"
    words = ["-m", "going_further.replay_request_log", log(tmp_path, *trace((1500, [1, 2, 3]))), "--without-engine"]
    done = subprocess.run([bare, *words], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr
    assert "1 request" in done.stdout or "run `python3 setup_and_test.py` first" in done.stderr
