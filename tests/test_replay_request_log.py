"""The log replayer without an engine: reading, comparing, and what a break costs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.models import write_llama

from going_further.replay_request_log import Comparer, Request, UsageError, describe, parse_line, plain, read_log
from stable_prefix_vs_timestamp import CacheModel

ROOT = Path(__file__).parent.parent
BUILT_IN = ROOT / "built_in_model" / "cpu"
SYSTEM = {"role": "system", "content": "You are an agent. Use the tools. " * 40}
USER = {"role": "user", "content": "Begin with the first task. " * 10}
ANSWER = {"role": "assistant", "content": "I have begun. " * 10}
NEXT = {"role": "user", "content": "Go on, please. " * 10}
TOOLS = [{"type": "function", "function": {"name": "get_order", "parameters": {}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "get_order", "arguments": '{"order_id": "7"}'}}


def log(tmp_path: Path, *requests: dict | bytes) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in requests))
    return path


def replay(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "going_further.replay_request_log", str(path), "--without-engine", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module", params=["built-in", "llama"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    folder = BUILT_IN if request.param == "built-in" else write_llama(tmp_path_factory.mktemp("llama"))
    return AutoTokenizer.from_pretrained(folder)


def request(*messages: dict, tools: list | None = None, **variables: object) -> Request:
    return Request(1, 0, list(messages), tools, variables)


def break_between(tokenizer, before: Request, after: Request) -> tuple[str, str]:
    comparer = Comparer(Path("unused"), tokenizer, 16)
    return describe(comparer.encode(before), comparer.encode(after), comparer.spans)


def calling(arguments: dict, **more: object) -> dict:
    call = {"type": "function", "function": {"name": "get_order", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call | more]}


def result(text: str, **more: object) -> dict:
    return {"role": "tool", "content": text} | more


def system(text: str) -> dict:
    return {"role": "system", "content": text}


SORTED, SHUFFLED = {"a": 1, "b": 2}, {"b": 2, "a": 1}


@pytest.mark.parametrize(
    ("before", "after", "kind", "where"),
    [
        (request(SYSTEM, USER), request(SYSTEM, USER, ANSWER, NEXT), "extended", ""),
        (request(SYSTEM, USER), request(SYSTEM, USER), "same prompt", ""),
        (request(SYSTEM, USER, ANSWER), request(SYSTEM, USER), "shortened", "message 2 was left out"),
        (request(SYSTEM, USER), request(SYSTEM, NEXT, USER), "message inserted", "message 1 (user)"),
        (request(SYSTEM, USER, ANSWER), request(SYSTEM, ANSWER), "message removed", "message 1 (user)"),
        (request(SYSTEM, USER), request(USER, NEXT), "message removed", "message 0 (system)"),
        (request(SYSTEM, USER), request(SYSTEM, NEXT), "user message changed", "message 1 (user)"),
        (request(SYSTEM, system("ab"), USER), request(SYSTEM, system("abc"), USER), "system message changed",
         "message 1 (system)"),
        (request(SYSTEM, system("abc"), USER), request(SYSTEM, system("ab"), USER), "system message changed",
         "message 1 (system)"),
    ],
)  # fmt: skip
def test_every_kind_of_break_is_told_apart(tokenizer, before: Request, after: Request, kind: str, where: str) -> None:
    assert break_between(tokenizer, before, after) == (kind, where)


@pytest.mark.parametrize(
    ("before", "after", "kind", "where"),
    [
        (request(USER), request(USER, tools=TOOLS), "tools changed", "tools"),
        (request(USER, tools=[SORTED]), request(USER, tools=[SHUFFLED]), "tools changed", "tools[0] (order of keys)"),
        (request(USER, calling(SORTED)), request(USER, calling(SHUFFLED)), "assistant message changed",
         "message 1 (assistant) tool_calls"),
        (request(USER, calling({}), result("7")), request(USER, calling({}), result("8")), "tool message changed",
         "message 2 (tool)"),
    ],
)  # fmt: skip
def test_tools_and_tool_calls_are_told_apart(before: Request, after: Request, kind: str, where: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN)  # the template of the Llama model writes neither
    assert break_between(tokenizer, before, after) == (kind, where)


def test_what_the_template_does_not_write_breaks_nothing(tokenizer) -> None:
    def turn(n: int, question: str) -> Request:
        call, answer = calling({"order": 7}, id=f"call_{n}"), result("sent on Monday", tool_call_id=f"call_{n}")
        return request(SYSTEM, USER, call, answer, {"role": "user", "content": question, "name": f"user{n}"})

    assert break_between(tokenizer, turn(1, "A?"), turn(2, "A?")) == ("same prompt", "")
    assert break_between(tokenizer, turn(1, "A?"), turn(2, "B?")) == ("user message changed", "message 4 (user)")
    longer = request(*turn(2, "A?").messages, ANSWER, NEXT)
    assert break_between(tokenizer, turn(1, "A?"), longer) == ("extended", "")


def test_what_only_the_template_changes_is_put_down_to_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = (
        "{% for m in messages %}<s>{{ m.role }}\n{% if loop.last %}(answer this) {% endif %}{{ m.content }}"
        "</s>{% endfor %}{% if thinking %}<s>think{% endif %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(write_llama(tmp_path / "llama", template=template))
    found = break_between(tokenizer, request(SYSTEM, USER), request(SYSTEM, USER, ANSWER, NEXT))
    assert found == ("template", "message 1 (user) is written anew by the chat template")
    found = break_between(tokenizer, request(USER), request(USER, thinking=True))
    assert found == ("template variables changed", "template variables.thinking")


@pytest.mark.parametrize(
    ("before", "after", "field"),
    [
        ('{"step": 1, "n": 2}', '{"step": 2, "n": 2}', ".step"),
        ('# State\n{"tasks": [{"s": 0}, {"s": 0}]}', '# State\n{"tasks": [{"s": 0}, {"s": 1}]}', ".tasks[1].s"),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', " (order of keys)"),
        ('{"x": {"a": 1, "b": 2}}', '{"x": {"b": 2, "a": 1}}', ".x (order of keys)"),
        ("[1, 2]", "[1, 2, 3]", "[2]"),
        ("[see] {broken", "[see] {broken!", None),
        ('At 09:30. State {"step": 1}', 'At 09:31. State {"step": 2}', None),
        ('Tools: [] State: {"step": 1}', 'Tools: [] State: {"step": 2}', ".step"),
        ('{"step": 1} begin', '{"step": 1} go on', None),
        ('{"step": 1}', '{"step":1}', None),
    ],
)  # fmt: skip
def test_a_break_in_json_is_told_by_its_field(tokenizer, before: str, after: str, field: str | None) -> None:
    kind, where = break_between(tokenizer, *(request(system(text), USER) for text in (before, after)))
    assert kind == "system message changed"
    assert where == "message 0 (system)" + (f" field {field}" if field is not None else "")


@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_the_comparer_counts_what_the_cache_model_counts(tmp_path: Path, tokenizer, block_size: int) -> None:
    conversation = [SYSTEM, USER, ANSWER, NEXT]
    other = [{"role": "system", "content": "Others have another system prompt. " * 30}, USER]
    bodies = [conversation[:2], other, conversation, conversation, [SYSTEM, NEXT], [*other, ANSWER, NEXT]]
    path = log(tmp_path, *({"messages": messages} for messages in bodies))
    comparer, model = Comparer(path, tokenizer, block_size), CacheModel(block_size)
    for entry in read_log(path, None):
        prompt = comparer.encode(entry)
        assert comparer.add(prompt).predicted_cached_tokens == model.cached_tokens(prompt.ids)
        model.store(prompt.ids)


def test_the_best_predecessor_need_not_be_the_line_before(tmp_path: Path, tokenizer) -> None:
    other = [{"role": "system", "content": "Another agent. " * 40}, USER]
    path = log(tmp_path, *({"messages": m} for m in ([SYSTEM, USER], other, [SYSTEM, USER, ANSWER, NEXT])))
    comparer = Comparer(path, tokenizer, 16)
    rows = [comparer.add(comparer.encode(entry)) for entry in read_log(path, None)]
    assert [row.predecessor for row in rows] == [None, 1, 1]
    assert [row.kind for row in rows] == ["first request", "system message changed", "extended"]
    assert rows[2].lost_tokens == 0 < rows[1].lost_tokens


def test_a_predecessor_that_is_no_longer_in_memory_is_read_from_the_file(
    tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("going_further.replay_request_log.REQUESTS_KEPT", 1)
    others = [{"messages": [{"role": "system", "content": f"{n} is another agent. " * 20}]} for n in range(5)]
    path = log(tmp_path, {"messages": [SYSTEM, USER]}, *others, {"messages": [SYSTEM, USER, ANSWER, NEXT]})
    comparer = Comparer(path, tokenizer, 16)
    rows = [comparer.add(comparer.encode(entry)) for entry in read_log(path, None)]
    assert (rows[-1].predecessor, rows[-1].kind) == (1, "extended")


def test_blocks_beyond_the_bound_are_forgotten(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("going_further.replay_request_log.BLOCKS_KNOWN", 4)
    path = log(tmp_path, {"messages": [SYSTEM, USER]}, {"messages": [SYSTEM, USER]})
    comparer = Comparer(path, tokenizer, 16)
    rows = [comparer.add(comparer.encode(entry)) for entry in read_log(path, None)]
    assert len(comparer.owners) == 4
    assert rows[1].predicted_cached_tokens == 4 * 16, "the end of a prompt is forgotten first, its start stays"


def test_tool_call_arguments_reach_the_template_as_objects() -> None:
    body = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": []}
    parsed = parse_line(json.dumps(body).encode(), 1, 0)
    assert parsed.messages[1]["tool_calls"][0]["function"]["arguments"] == {"order_id": "7"}
    assert parsed.tools is None, "no tools and an empty list of tools are the same prompt"


def test_text_parts_bodies_byte_order_marks_blank_lines_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "naïve "}, {"type": "text", "text": "猫 🙂"}]
    lines = [
        b"\xef\xbb\xbf" + json.dumps({"messages": [{"role": "user", "content": parts}]}).encode() + b"\r\n",
        b"\r\n",
        json.dumps({"custom_id": "1", "body": {"messages": [USER]}}).encode() + b"\r\n",
    ]
    found = list(read_log(log(tmp_path, *lines), None))
    assert plain(found[0].messages[0]["content"]) == "naïve \n猫 🙂"
    assert [entry.line for entry in found] == [1, 3]


def test_text_parts_are_joined_as_vllm_does_it_unless_the_template_reads_parts(tmp_path: Path, tokenizer) -> None:
    from transformers import AutoTokenizer

    parts = [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]
    asked = request({"role": "user", "content": parts})
    assert "first\nsecond" in Comparer(Path("unused"), tokenizer, 16).encode(asked).text
    template = "{% for m in messages %}{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endfor %}"
    reading = AutoTokenizer.from_pretrained(write_llama(tmp_path / "llama", template=template))
    assert Comparer(Path("unused"), reading, 16).encode(asked).text == "<first><second>"


def test_template_variables_are_passed_on_as_vllm_does_it() -> None:
    def variables(**fields: object) -> dict:
        return parse_line(json.dumps({"messages": [USER], **fields}).encode(), 1, 0).variables

    assert variables(temperature=1.0) == {}
    assert variables(chat_template_kwargs={"enable_thinking": False}) == {"enable_thinking": False}
    assert variables(reasoning_effort="low") == {"reasoning_effort": "low", "enable_thinking": True}
    both = variables(reasoning_effort="low", chat_template_kwargs={"enable_thinking": False})
    assert both == {"reasoning_effort": "low", "enable_thinking": False}
    assert variables(documents=[{"title": "t", "text": "x"}]) == {"documents": [{"title": "t", "text": "x"}]}


def test_ctrl_c_while_a_large_log_is_read_is_one_word(tmp_path: Path) -> None:
    path = log(tmp_path, *({"messages": [SYSTEM, USER]} for _ in range(20_000)))
    command = [sys.executable, "-m", "going_further.replay_request_log", str(path), "--without-engine"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=10), process.returncode) == (("", "interrupted\n"), 130)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no request"),
        (b"\n\n", "holds no request"),
        (b"{not json}\n", "line 1: no JSON"),
        (b'{"messages": []}\n', "line 1: no object with a list of messages"),
        (b"[1]\n", "line 1: no object"),
        (b'{"messages": [{"role": "user"}]}\n', "line 1: a message of user without content"),
        (b'{"messages": [{"content": "x"}]}\n', "line 1: a message without a role"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}\n', "'image_url'"),
        (b'{"messages": [{"role": "user", "content": 5}]}\n', "is of type int, not text"),
        (b'{"messages": [{"role": "user", "content": "\\uD83D"}]}\n', "line 1: a text with half of a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": {}}\n{"messages"', "line 2: no JSON"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": ["a"]}\n', "tools are no list of objects"),
        (b'{"messages": [{"role": "assistant", "tool_calls": [{}]}]}\n', "a tool call without function name"),
        (b"\xff\xfe{}\n", "line 1: no JSON"),
        (b'{"messages": [{"role": "user", "content": "x"}], "continue_final_message": true}\n', "another prompt"),
        (b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": "x"}\n', "no object"),
        (b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tools": 1}}\n', "hold 'tools'"),
        (b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"self": 1}}\n', "hold 'self'"),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_p": NaN}\n', "NaN is no number of JSON"),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}\n", "line 1: no JSON"),
        (
            b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "'
            + b"[" * 100_000
            + b'"}}]}]}\n',
            "a tool call without function name and JSON arguments",
        ),
    ],
)
def test_what_is_no_log_is_one_line_that_names_the_line(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(UsageError) as error:
        list(read_log(log(tmp_path, content), None))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_log_is_not_written_over(tmp_path: Path) -> None:
    path = log(tmp_path, {"messages": [SYSTEM, USER]})
    before = path.read_bytes()
    (tmp_path / "link.json").symlink_to(path)
    for name in (path, tmp_path / "link.json"):
        command = [sys.executable, "-m", "going_further.replay_request_log", path, "--without-engine", "--json", name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        assert "--json names the log itself" in done.stderr
    assert path.read_bytes() == before


def test_what_a_log_holds_does_not_steer_the_terminal(tmp_path: Path) -> None:
    def asked(role: str) -> dict:
        return {"messages": [SYSTEM, {"role": role, "content": "a" * 2000}, USER]}

    path = log(tmp_path, asked("\x1b[31mred"), asked("\x1b]0;title\x07"), asked("[/bold]"))
    command = [sys.executable, "-m", "going_further.replay_request_log", path, "--without-engine"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(line.isprintable() for line in (done.stdout + done.stderr).split("\n"))


def test_json_that_is_nested_too_deep_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 1: no JSON"):
        list(read_log(log(tmp_path, b'{"messages": ' + b"[" * 100_000 + b"\n"), None))


def test_a_request_that_the_template_does_not_take_is_named_by_its_line(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    model = write_llama(tmp_path / "llama", template=template)
    done = replay(log(tmp_path, {"messages": [USER]}, {"messages": [SYSTEM, USER]}), "--model", str(model))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "line 2: the model's chat template does not take this prompt: no system message" in done.stderr


def test_without_transformers_here_it_goes_on_in_the_venv_or_says_what_to_run(tmp_path: Path) -> None:
    bare = sys.base_prefix + "/bin/python3"
    command = [bare, "-m", "going_further.replay_request_log", log(tmp_path, {"messages": [USER]})]
    done = subprocess.run([*command, "--without-engine"], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr
    assert "1 requests" in done.stdout or "run `python3 setup_and_test.py` first" in done.stderr


def test_faults_end_the_command_with_one_line_and_status_2(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path, log(tmp_path, b"oops\n")):
        done = replay(path)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1


def test_a_prompt_longer_than_the_model_takes_is_refused(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "short", max_position_embeddings=64)
    done = replay(log(tmp_path, {"messages": [SYSTEM]}), "--model", str(model))
    assert done.returncode == 2
    assert "line 1:" in done.stderr
    assert "the model takes 64" in done.stderr


def test_the_command_prints_rows_breaks_and_costs_in_80_columns_and_writes_json(tmp_path: Path) -> None:
    clock = [{"role": "system", "content": f"It is 09:3{n}. {SYSTEM['content']}"} for n in range(3)]
    path, out = log(tmp_path, *({"messages": [c, USER]} for c in clock)), tmp_path / "out.json"
    done = replay(path, "--json", str(out), "--price-input", "10", "--price-cached", "1")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    rows = json.loads(out.read_text())["requests"]
    assert [row["kind"] for row in rows] == ["first request", "system message changed", "system message changed"]
    lost = sum(row["lost_tokens"] for row in rows)
    assert lost > 0
    assert f"${lost * 9 / 1e6:.4f}" in done.stdout
