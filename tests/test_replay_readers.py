"""Reading logs: every shape, every form of file, and every fault of one."""

from __future__ import annotations

import gzip
import json
import os
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from going_further.common import UsageError
from going_further.replay import readers
from going_further.replay.readers import SHAPES, media, read_log
from going_further.replay.records import LeftOut, Record, Usage
from going_further.replay.shapes import count, seconds

FIELD = Path(__file__).parent / "field"
USER = {"role": "user", "content": "Which lamp is brightest?"}
CHAT = {"messages": [USER]}
REPLY = {"role": "assistant", "content": "The tall one."}
OPENAI_USAGE = {"prompt_tokens": 90, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 64}}
COMPLETION = {"choices": [{"message": REPLY}], "usage": OPENAI_USAGE, "created": 1767225600}
NEW_YEAR = 1767225600.0  # 2026-01-01T00:00:00Z


def log(tmp_path: Path, *entries: object) -> Path:
    """Write a log; bytes stand as they are, anything else is a line of JSON."""
    path = tmp_path / "log"
    path.write_bytes(b"".join(e if isinstance(e, bytes) else json.dumps(e).encode() + b"\n" for e in entries))
    return path


def read(tmp_path: Path, *entries: object, **options: object) -> list[Record | LeftOut]:
    return list(read_log(log(tmp_path, *entries), **options))


def one(tmp_path: Path, entry: object, shape: str | None = None) -> Record:
    (record,) = read(tmp_path, entry, shape=shape)
    assert isinstance(record, Record)
    return record


def reason(tmp_path: Path, entry: object, shape: str | None = None) -> str:
    """Return why an entry is left out, from a log in which another one is not."""
    kept, left = read(tmp_path, CHAT, entry, shape=shape)
    assert isinstance(kept, Record)
    assert left.line == 2
    assert len(left.reason) < 200
    assert len(left.reason.splitlines()) == 1
    return left.reason


def message_of(tmp_path: Path, *entries: object, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, *entries, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- the inputs of tests/field ---

# Per file: the API and how many requests; lines that are left out.
FILES = {
    "01-openai-batch-input.jsonl": ("chat", 2, []),
    "03-openai-responses.jsonl": ("responses", 2, []),
    "04-anthropic-system-string.jsonl": ("messages", 3, []),
    "05-anthropic-system-blocks.jsonl": ("messages", 3, []),
    "06-anthropic-tool-use.jsonl": ("messages", 1, []),
    "07-litellm-standard-payload.jsonl": ("chat", 1, []),
    "08-langfuse-generation-input-list.jsonl": ("chat", 1, []),
    "11-vllm-debug-log.txt": ("chat", 1, []),
    "11c-from-vllm-debug-log.jsonl": ("chat", 1, []),
    "13-multimodal-one-of-three.jsonl": ("chat", 2, [2]),
    "15b-array-pretty.json": ("chat", 2, []),
    "16-log.jsonl.gz": ("chat", 2, []),
    "18-sharegpt.jsonl": ("chat", 1, []),
    "22-cache-salt.jsonl": ("chat", 2, []),
    "24-billing-header-openai.jsonl": ("chat", 3, []),
    "25-tool-arguments-cut.jsonl": ("chat", 1, []),
    "25-tool-arguments-list.jsonl": ("chat", 1, []),
    "26c-reasoning-only-assistant.jsonl": ("chat", 1, []),
    "27b-tool-top-level-keys.jsonl": ("chat", 2, []),
    "28-tool-content-parts.jsonl": ("chat", 1, []),
    "29-tool-results-cleared.jsonl": ("chat", 2, []),
    "33-error-line-in-the-middle.jsonl": ("chat", 2, [2]),
    "34-developer-and-function-roles.jsonl": ("chat", 1, []),
    "39-agent-loop-reasoning.jsonl": ("chat", 2, []),
    "40-developer-role.jsonl": ("chat", 2, []),
    "41-thinking-off-three-turns.jsonl": ("chat", 3, []),
    "42-agent-loop-then-question.jsonl": ("chat", 4, []),
    "51-with-server-usage.jsonl": ("chat", 3, []),
    "56-longer-than-model.jsonl": ("chat", 3, []),
    "57-good-layout-200-users.jsonl": ("chat", 200, []),
}
REFUSED = {
    "02-openai-batch-output.jsonl": "openai-batch-output.*give the batch's input file",
    "21-ollama-chat-images.jsonl": "an image \\(Ollama's `images`\\)",
}


@pytest.mark.parametrize("name", FILES)
def test_every_log_from_the_field_is_read(name: str) -> None:
    api, requests, left_out = FILES[name]
    found = list(read_log(FIELD / name))
    records = [item for item in found if isinstance(item, Record)]
    assert len(records) == requests
    assert {record.api for record in records} == {api}
    assert [item.line for item in found if isinstance(item, LeftOut)] == left_out
    assert [item.line for item in found] == sorted(item.line for item in found)


@pytest.mark.parametrize("name", REFUSED)
def test_logs_from_the_field_without_a_prompt_in_text_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[name]):
        list(read_log(FIELD / name))


def test_no_log_from_the_field_is_forgotten() -> None:
    assert {path.name for path in FIELD.iterdir() if path.is_file()} == {*FILES, *REFUSED}


def test_the_body_of_a_chat_request_is_what_the_line_says() -> None:
    path = FIELD / "42-agent-loop-then-question.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record.body for record in read_log(path)] == lines


# --- files ---

FORMS = {
    "lines": json.dumps(CHAT) + "\n" + json.dumps(CHAT),
    "crlf and blank lines": f"\r\n{json.dumps(CHAT)}\r\n\r\n{json.dumps(CHAT)}\r\n",
    "a byte order mark": "\ufeff" + json.dumps(CHAT) + "\n\ufeff" + json.dumps(CHAT),
    "an array in one line": json.dumps([CHAT, CHAT]),
    "an array with a line each": f"[\n{json.dumps(CHAT)},\n{json.dumps(CHAT)}\n]",
    "a pretty array": "\n" + json.dumps([CHAT, CHAT], indent=2),
    "pretty objects": json.dumps(CHAT, indent=2) + "\n" + json.dumps(CHAT, indent=4),
    "objects without a newline": json.dumps(CHAT) * 2,
    "a list under a key": json.dumps({"object": "list", "data": [CHAT, CHAT]}),
    "a pretty list under a key": json.dumps({"meta": {"page": 1}, "requests": [CHAT, CHAT]}, indent=1),
    "a list under a key, with a line each": f'{{"logs": [\n{json.dumps(CHAT)},\n{json.dumps(CHAT)}\n]}}',
    "a list under a key in every line": (json.dumps({"observations": [CHAT]}) + "\n") * 2,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_every_form_of_file_holds_the_same_requests(tmp_path: Path, form: str, pack) -> None:
    found = read(tmp_path, pack(FORMS[form].encode()))
    assert [(record.api, record.body) for record in found] == [("chat", CHAT)] * 2


@pytest.mark.parametrize(
    ("form", "lines"),
    [
        ("crlf and blank lines", [2, 4]),
        ("an array in one line", [1, 1]),
        ("an array with a line each", [2, 3]),
        ("a pretty array", [3, 11]),
        ("pretty objects", [1, 9]),
        ("a pretty list under a key", [6, 14]),
        ("a list under a key, with a line each", [2, 3]),
    ],
)
def test_line_is_where_the_entry_begins(tmp_path: Path, form: str, lines: list[int]) -> None:
    assert [record.line for record in read(tmp_path, FORMS[form].encode())] == lines


FAULTS = {
    b'{"messages": [{"role": "user", "con': "cut off",
    b'{"messages": [': "cut off",
    b"Traceback (most recent call last):": "no JSON",
    b"17": "no JSON",
    b'{"messages": NaN}': "NaN is no number of JSON",
    b'{"messages": [], "top_p": -Infinity}': "-Infinity is no number of JSON",
    b'{"messages": [], "seed": ' + b"7" * 5000 + b"}": "4300 digits",
    b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nested too deep",
    b'{"messages": [{"role": "user", "content": "\\ud83d"}]}': "surrogate pair",
    b'{"messages": [{"role": "user", "content": "caf\xe9"}]}': "no UTF-8",
    b'{"error": {"message": "over\\nloaded", "code": 529}}': "an error record: over loaded",
    b'{"error": "overloaded"}': "an error record: overloaded",
    b'{"messages": []}': "no known shape; its fields: messages",
    b'{"messages": ["hello"]}': "no known shape; its fields: messages",
    b'{"a": 1, "b": 2}': "no known shape; its fields: a, b",
    b"{}": "no known shape; its fields: none",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[:40].decode(errors="replace"))
def test_a_faulty_line_is_left_out_and_the_rest_is_read(tmp_path: Path, fault: bytes) -> None:
    assert FAULTS[fault] in reason(tmp_path, fault + b"\n")
    left, kept = read(tmp_path, fault + b"\n", CHAT)  # the first line is looked at to tell the form
    assert isinstance(left, LeftOut)
    assert (kept.line, kept.body) == (2, CHAT)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[:40].decode(errors="replace"))
def test_a_faulty_element_of_an_array_is_left_out_and_the_rest_is_read(tmp_path: Path, fault: bytes) -> None:
    chat = json.dumps(CHAT).encode()
    for opening, closing in ((b"[", b"]"), (b'{"data": [', b"]}")):
        before, left, after = read(tmp_path, opening + b"\n" + chat + b",\n" + fault + b",\n" + chat + b"\n" + closing)
        assert isinstance(left, LeftOut)
        assert [before.line, left.line, after.line] == [2, 3, 4]
        assert before.body == after.body == CHAT


def test_an_array_that_is_cut_off_says_so(tmp_path: Path) -> None:
    text = json.dumps([CHAT, CHAT], indent=2).encode()
    kept, left = read(tmp_path, text[:-50])
    assert kept.body == CHAT
    assert "cut off" in left.reason
    *kept, left = read(tmp_path, text.rstrip(b"]\n"))
    assert [record.body for record in kept] == [CHAT, CHAT]
    assert left.reason == "no JSON: the list is cut off"


def test_a_list_under_a_key_may_hold_one_entry_in_a_line_of_its_own(tmp_path: Path) -> None:
    (record,) = read(tmp_path, b'{"data": [\n' + json.dumps(CHAT).encode() + b"\n]}")
    assert (record.line, record.body) == (2, CHAT)


def test_strict_makes_an_error_of_what_is_left_out(tmp_path: Path) -> None:
    assert message_of(tmp_path, CHAT, {"error": "overloaded"}, strict=True) == "line 2: an error record: overloaded"


def test_limit_counts_requests(tmp_path: Path) -> None:
    found = read(tmp_path, {"error": "busy"}, CHAT, {"error": "busy"}, CHAT, CHAT, limit=2)
    assert [item.line for item in found] == [1, 2, 3, 4]


def test_a_limit_is_reached_before_a_later_fault(tmp_path: Path) -> None:
    assert len(read(tmp_path, CHAT, b"no JSON\n", limit=1, strict=True)) == 1


def test_a_file_without_requests_is_an_error_that_tells_the_first_reasons(tmp_path: Path) -> None:
    assert message_of(tmp_path, b"").endswith("log holds no request")
    assert message_of(tmp_path, b" \n\n").endswith("log holds no request")
    assert message_of(tmp_path, b"[]").endswith("log holds no request")
    assert message_of(tmp_path, b"hello\n", {"error": "busy"}).endswith(
        "holds no request; line 1: no JSON object; line 2: an error record: busy"
    )
    unknown = message_of(tmp_path, {"question": 1, "reply": 2}, {"other": 3})
    assert "line 1: no known shape; its fields: question, reply; line 2: no known shape; its fields: other" in unknown
    assert "known shapes: otel, langfuse, litellm, helicone" in unknown
    assert "known shapes" not in message_of(tmp_path, {"error": "busy"})


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none\nsuch", "No such file"), (tmp_path, "no regular file")):
        with pytest.raises(UsageError, match=words) as caught:
            list(read_log(path))
        assert "\n" not in str(caught.value)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="no regular file"):  # and does not wait for a writer
        list(read_log(tmp_path / "pipe"))


def test_a_file_without_permission_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = log(tmp_path, CHAT)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError, match=r"log: Permission denied$"):
        list(read_log(path))


@pytest.mark.parametrize("cut", [10, 30, 45])
def test_gzip_that_is_cut_off_or_corrupt_is_one_line(tmp_path: Path, cut: int) -> None:
    packed = gzip.compress(json.dumps(CHAT).encode())
    for broken in (packed[:cut], packed[:cut] + bytes([packed[cut] ^ 255]) + packed[cut + 1 :]):
        assert message_of(tmp_path, broken).endswith("its gzip data is cut off or corrupt")


def test_json_lines_are_streamed(tmp_path: Path) -> None:
    text = "".join(random.Random(0).choices("abcdefgh ", k=30_000))
    line = json.dumps({"messages": [{"role": "user", "content": text}]}).encode() + b"\n"
    path = log(tmp_path, line * 1_000)
    tracemalloc.start()
    try:
        assert sum(isinstance(item, Record) for item in read_log(path)) == 1_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 30_000_000
    assert peak < 2_000_000


def test_what_must_be_read_whole_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LARGEST_TEXT", 200)
    assert len(read(tmp_path, *[CHAT] * 10)) == 10
    assert "only JSON lines" in message_of(tmp_path, json.dumps([CHAT] * 10, indent=1).encode())
    assert message_of(tmp_path, json.dumps([CHAT] * 10).encode()).startswith("line 1 is longer")


# --- the APIs' own bodies ---


def test_openai_in_batches_in_pairs_and_beside_its_usage(tmp_path: Path) -> None:
    for entry in (
        CHAT | {"usage": OPENAI_USAGE, "created_at": "2026-01-01T00:00:00Z"},
        CHAT | {"response": COMPLETION, "timestamp": 1767225600000},
        {"request": CHAT, "response": COMPLETION},
        {"request": json.dumps(CHAT), "response": json.dumps(COMPLETION)},
        {"custom_id": "a", "body": CHAT, "response": {"status_code": 200, "body": COMPLETION}},
    ):
        record = one(tmp_path, entry)
        assert record.api == "chat"
        assert record.body in (CHAT, entry)
        assert record.entry == entry
        assert record.usage == Usage(90, 64, 7)
        assert record.time == NEW_YEAR
        assert record.answer == (REPLY if "response" in entry else None)


def test_the_url_of_a_batch_tells_the_api(tmp_path: Path) -> None:
    def sent_to(url: str, body: dict, shape: str | None = None) -> str:
        return one(tmp_path, {"custom_id": "a", "method": "POST", "url": url, "body": body}, shape).api

    assert sent_to("/v1/chat/completions", {**CHAT, "model": "claude", "max_tokens": 9}) == "chat"
    assert sent_to("https://host/v1/messages?beta=true", CHAT) == "messages"
    assert sent_to("/v1/responses", {"model": "m", "input": "hello"}, "openai") == "responses"
    assert sent_to("/v1/completions", {"prompt": "hello"}, "openai") == "completions"
    embedding = {"custom_id": "a", "url": "/v1/embeddings", "body": {"model": "m", "input": "hello"}}
    assert "no known shape" in reason(tmp_path, embedding)


def test_a_stream_of_chunks_has_no_answer(tmp_path: Path) -> None:
    assert one(tmp_path, CHAT | {"response": [{"choices": [{"delta": {"content": "The"}}]}]}).answer is None


def test_a_batch_output_is_refused_by_name_and_left_out_elsewhere(tmp_path: Path) -> None:
    output = {"custom_id": "r0", "response": {"body": COMPLETION}, "error": None}
    assert "openai-batch-output" in message_of(tmp_path, output)
    assert "give the batch's input file instead" in reason(tmp_path, output)
    assert "input file" in reason(tmp_path, {"custom_id": "r0", "response": None, "error": {"message": "expired"}})


@pytest.mark.parametrize(
    "more",
    [
        {"system": "Be kind."},
        {"system": [{"type": "text", "text": "Be kind."}]},
        {"anthropic_version": "vertex-2023-10-16"},
        {"tools": [{"name": "price", "input_schema": {"type": "object"}}]},
        {"model": "us.anthropic.Claude-x", "max_tokens": 9},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "40"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}]}]},
    ],
)
def test_anthropic_is_told_by_what_only_its_api_has(tmp_path: Path, more: dict) -> None:
    assert one(tmp_path, CHAT | more).api == "messages"
    assert one(tmp_path, CHAT | more, "openai").api == "chat"


def test_a_model_named_claude_behind_openai_s_api_stays_chat(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be kind."}
    assert one(tmp_path, {"model": "claude", "max_tokens": 9, "messages": [system, USER]}).api == "chat"
    assert one(tmp_path, CHAT | {"model": "claude"}).api == "chat"


def test_anthropic_counts_and_answers_as_openai_does(tmp_path: Path) -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm."},
        {"type": "text", "text": "Looking."},
        {"type": "tool_use", "id": "t1", "name": "price", "input": {"id": "7"}},
    ]
    usage = {"input_tokens": 5, "cache_read_input_tokens": 64, "cache_creation_input_tokens": 32, "output_tokens": 3}
    response = {"type": "message", "role": "assistant", "content": blocks, "usage": usage}
    record = one(tmp_path, {"request": CHAT | {"system": "Be kind."}, "response": response})
    assert record.api == "messages"
    assert record.usage == Usage(101, 64, 3)
    assert record.answer == {
        "role": "assistant",
        "content": "Looking.",
        "reasoning": "Hm.",
        "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "price", "arguments": '{"id": "7"}'}}],
    }


def test_responses_counts_and_answers_as_openai_does(tmp_path: Path) -> None:
    output = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "The tall one."}]},
        {"type": "function_call", "call_id": "c1", "name": "price", "arguments": "{}"},
    ]
    usage = {"input_tokens": 90, "input_tokens_details": {"cached_tokens": 64}, "output_tokens": 7}
    body = {"model": "m", "instructions": "Be kind.", "input": [USER]}
    record = one(tmp_path, {"request": body, "response": {"output": output, "usage": usage}})
    assert (record.api, record.body, record.usage) == ("responses", body, Usage(90, 64, 7))
    call = {"id": "c1", "type": "function", "function": {"name": "price", "arguments": "{}"}}
    assert record.answer == {**REPLY, "reasoning": "Hm.", "tool_calls": [call]}


def test_an_embedding_is_no_request_of_the_responses_api(tmp_path: Path) -> None:
    assert "no known shape" in reason(tmp_path, {"model": "m", "input": "hello", "encoding_format": "float"})


def test_tokens_alone_or_several_prompts(tmp_path: Path) -> None:
    for entry in ({"prompt_token_ids": [1, 2, 3]}, {"prompt": [1, 2, 3]}):
        record = one(tmp_path, entry | {"model": "m"})
        assert (record.api, record.body) == ("tokens", {"model": "m", "prompt_token_ids": [1, 2, 3]})
    found = read(tmp_path, {"prompt": [[1, 2], [3]], "usage": OPENAI_USAGE})
    assert [record.body["prompt_token_ids"] for record in found] == [[1, 2], [3]]
    assert {record.usage for record in found} == {None}  # it is of both
    assert "no known shape" in reason(tmp_path, {"prompt_token_ids": [1, -2]})
    assert "no known shape" in reason(tmp_path, {"prompt_token_ids": [True, 2]})


def test_completions_alone_or_several_prompts(tmp_path: Path) -> None:
    record = one(tmp_path, {"prompt": "Once", "response": {"choices": [{"text": " upon"}], "usage": OPENAI_USAGE}})
    assert (record.api, record.body["prompt"], record.usage) == ("completions", "Once", Usage(90, 64, 7))
    assert record.answer == {"role": "assistant", "content": " upon"}
    found = read(tmp_path, {"prompt": ["Once", "Twice"], "suffix": "."})
    assert [record.body for record in found] == [{"suffix": ".", "prompt": "Once"}, {"suffix": ".", "prompt": "Twice"}]


def test_ollama_is_chat_with_its_options(tmp_path: Path) -> None:
    entry = CHAT | {"options": {"num_ctx": 4096}, "response": {"message": REPLY, "done": True}}
    record = one(tmp_path, entry)
    assert (record.api, record.body, record.answer) == ("chat", entry, REPLY)
    image = {"messages": [USER | {"images": ["AAAA"]}]}
    assert reason(tmp_path, image) == "an image (Ollama's `images`): only text can be replayed"


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"type": "image_url", "image_url": {"url": "data:"}}, "an image"),
        ({"image_url": {"url": "data:"}}, "an image"),
        ({"type": "input_image", "image_url": "data:"}, "an image"),
        ({"type": "image", "source": {}}, "an image"),
        ({"type": "input_audio", "input_audio": {}}, "audio"),
        ({"type": "audio_url", "audio_url": {}}, "audio"),
        ({"type": "video_url", "video_url": {}}, "a video"),
        ({"type": "file", "file": {}}, "a file"),
        ({"type": "input_file", "file_id": "f"}, "a file"),
        ({"type": "document", "source": {}}, "a document"),
        ({"type": "tool_result", "content": [{"type": "text", "text": "see"}, {"type": "image"}]}, "an image"),
        ({"type": "function_call_output", "output": [{"type": "input_image"}]}, "an image"),
    ],
)
def test_a_body_with_more_than_text_is_named_as_such(tmp_path: Path, part: dict, name: str) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "Look:"}, part]}
    for body in ({"messages": [USER, message]}, {"input": [message], "model": "m"}, {"input": [part]}):
        assert media(body) == f"{name}: only text can be replayed"
    assert reason(tmp_path, {"messages": [USER, message]}) == f"{name}: only text can be replayed"


def test_text_alone_is_no_media() -> None:
    text = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]}
    assert media({"messages": [text | {"file": "notes"}], "documents": [{"text": "c"}], "input": "d"}) is None


# --- gateways and observability tools ---


def test_litellm_payloads_bring_their_parameters(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "price"}}]
    entry = {
        "id": "x", "call_type": "acompletion", "model": "m", "messages": [USER], "response": COMPLETION,
        "model_parameters": {"temperature": "0.5", "tools": tools,
                             "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        "startTime": NEW_YEAR, "endTime": NEW_YEAR + 1, "metadata": {"user_api_key_hash": "h"},
    }  # fmt: skip
    record = one(tmp_path, entry)
    prompt = {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}, "messages": [USER]}
    assert record.body == {"model": "m", **prompt}
    assert (record.api, record.usage, record.answer, record.time) == ("chat", Usage(90, 64, 7), REPLY, NEW_YEAR)
    assert "generates no text" in reason(tmp_path, entry | {"call_type": "aembedding"})
    assert "does it store prompts" in reason(tmp_path, entry | {"messages": "redacted-by-litellm"})
    assert one(tmp_path, entry | {"call_type": "anthropic_messages"}).api == "messages"
    responses = one(tmp_path, entry | {"call_type": "aresponses"})
    assert (responses.api, responses.body["input"]) == ("responses", [USER])


@pytest.mark.parametrize("sent", [CHAT, json.dumps(CHAT), {"url": "/chat", "method": "POST", "body": CHAT}])
def test_litellm_spend_rows_hold_the_body_as_it_was_sent(tmp_path: Path, sent: object) -> None:
    metadata = {"usage_object": OPENAI_USAGE}
    row = {
        "request_id": "r", "call_type": "acompletion", "startTime": "2026-01-01T00:00:00.000Z", "messages": {},
        "proxy_server_request": sent, "response": "{}", "metadata": json.dumps(metadata), "prompt_tokens": 1,
    }  # fmt: skip
    record = one(tmp_path, row)
    assert (record.api, record.body, record.usage, record.time) == ("chat", CHAT, Usage(90, 64, 7), NEW_YEAR)


def test_litellm_cached_tokens_are_found_where_they_are(tmp_path: Path) -> None:
    row = {"call_type": "acompletion", "messages": [USER], "prompt_tokens": 90, "completion_tokens": 7}
    for metadata in (
        {"additional_usage_values": {"prompt_tokens_details": {"cached_tokens": 64}}},
        {"additional_usage_values": {"cache_read_input_tokens": 64, "cache_creation_input_tokens": 0}},
        {"usage_object": {"prompt_tokens": 90, "completion_tokens": 7, "cache_read_input_tokens": 64}},
    ):
        assert one(tmp_path, row | {"metadata": metadata}).usage == Usage(90, 64, 7)
    assert one(tmp_path, row | {"metadata": {}}).usage == Usage(90, None, 7)


def test_langfuse_generations_are_requests_and_other_observations_none(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "price"}}]
    entry = {
        "id": "g", "traceId": "t", "type": "GENERATION", "model": "m", "startTime": "2026-01-01T00:00:00Z",
        "input": {"messages": [USER], "tools": tools}, "output": REPLY, "sessionId": "s",
        "usageDetails": {"input": 26, "input_cached_tokens": 64, "output": 7, "total": 97},
        "modelParameters": {"temperature": "0.5", "reasoning_effort": "low"},
    }  # fmt: skip
    record = one(tmp_path, entry)
    assert record.body == {"model": "m", "reasoning_effort": "low", "messages": [USER], "tools": tools}
    assert (record.api, record.usage, record.answer, record.time) == ("chat", Usage(90, 64, 7), REPLY, NEW_YEAR)
    assert one(tmp_path, entry | {"input": json.dumps([USER]), "output": "The tall one."}).answer == REPLY
    anthropic = {"input": 5, "cache_read_input_tokens": 64, "cache_creation_input_tokens": 21, "output": 7}
    assert one(tmp_path, entry | {"usageDetails": anthropic}).usage == Usage(90, 64, 7)
    assert "type SPAN" in reason(tmp_path, entry | {"type": "SPAN"})
    assert "no list of messages" in reason(tmp_path, entry | {"input": "hello"})
    assert len(read(tmp_path, {"id": "t", "observations": [entry, entry | {"type": "EVENT"}]})) == 2


def test_langfuse_input_is_no_request_of_the_responses_api(tmp_path: Path) -> None:
    assert one(tmp_path, {"type": "GENERATION", "traceId": "t", "input": [USER]}).api == "chat"


def test_helicone_flat_and_nested(tmp_path: Path) -> None:
    flat = {"request_body": CHAT, "response_body": COMPLETION, "request_created_at": "2026-01-01T00:00:00Z"}
    nested = {
        "request": {"body": json.dumps(CHAT), "created_at": "2026-01-01 00:00:00"},
        "response": {"body": json.dumps(COMPLETION)},
    }
    for entry in (flat, nested):
        record = one(tmp_path, entry)
        assert (record.api, record.body, record.answer) == ("chat", CHAT, REPLY)
        assert (record.usage, record.time) == (Usage(90, 64, 7), NEW_YEAR)
    counted = {"request_body": CHAT, "response_body": {}, "prompt_tokens": 90, "prompt_cache_read_tokens": 64}
    assert one(tmp_path, counted).usage == Usage(90, 64, None)
    assert one(tmp_path, {"request_body": CHAT, "request_path": "https://host/v1/messages"}).api == "messages"
    assert "no request in the body" in reason(tmp_path, {"request_body": {"model": "m"}})


# --- OpenTelemetry ---

PARTS = [
    {"role": "user", "parts": [{"type": "text", "content": "Price of lamp 7?"}]},
    {
        "role": "assistant",
        "parts": [
            {"type": "reasoning", "content": "I ask."},
            {"type": "tool_call", "id": "c1", "name": "price", "arguments": {"id": "7"}},
        ],
    },
    {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "40"}]},
]
CALLS = [{"id": "c1", "type": "function", "function": {"name": "price", "arguments": '{"id": "7"}'}}]
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Price of lamp 7?"},
    {"role": "assistant", "content": None, "reasoning": "I ask.", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "c1", "content": "40"},
]
ATTRIBUTES = {
    "gen_ai.request.model": "m",
    "gen_ai.system_instructions": [{"type": "text", "content": "Be kind."}],
    "gen_ai.input.messages": PARTS,
    "gen_ai.output.messages": [{"role": "assistant", "parts": [{"type": "text", "content": "The tall one."}]}],
    "gen_ai.tool.definitions": [{"type": "function", "name": "price", "parameters": {"type": "object"}}],
    "gen_ai.usage.input_tokens": 90,
    "gen_ai.usage.cache_read.input_tokens": 64,
    "gen_ai.usage.output_tokens": 7,
}
FUNCTION = {"name": "price", "parameters": {"type": "object"}}


def otlp(value: object) -> dict:
    """Return a value as OTLP's JSON writes it."""
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, list):
        return {"arrayValue": {"values": [otlp(item) for item in value]}}
    if isinstance(value, dict):
        return {"kvlistValue": {"values": [{"key": key, "value": otlp(item)} for key, item in value.items()]}}
    return {"stringValue": value}


def exported(*spans: dict) -> dict:
    return {"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {}, "spans": list(spans)}]}]}


AS_TEXT = {name: json.dumps(value) if isinstance(value, list) else value for name, value in ATTRIBUTES.items()}
SPANS = {
    "flat": {"span_id": "1", "start_time": "2026-01-01T00:00:00Z", "attributes": ATTRIBUTES},
    "flat, in JSON text": {"span_id": "1", "start_time": NEW_YEAR, "attributes": AS_TEXT},
    "names at the top": {"timestamp": NEW_YEAR, **AS_TEXT},
    "otlp": exported(
        {"startTimeUnixNano": "1767225600000000000", "attributes": otlp(ATTRIBUTES)["kvlistValue"]["values"]}
    ),
    "in an event": {
        "spanId": "1", "startTimeUnixNano": 1767225600000000000, "attributes": [],
        "events": [{"name": "details", "attributes": otlp(AS_TEXT)["kvlistValue"]["values"]}],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", SPANS)
def test_otel_spans_in_every_form(tmp_path: Path, form: str) -> None:
    record = one(tmp_path, SPANS[form])
    assert record.api == "chat"
    assert record.body == {"model": "m", "messages": MESSAGES, "tools": [{"type": "function", "function": FUNCTION}]}
    assert (record.usage, record.answer, record.time) == (Usage(90, 64, 7), REPLY, NEW_YEAR)


def test_otel_attributes_of_older_conventions(tmp_path: Path) -> None:
    attributes = {
        "gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": "Price of lamp 7?",
        "gen_ai.prompt.1.role": "assistant", "gen_ai.prompt.1.tool_calls.0.id": "c1",
        "gen_ai.prompt.1.tool_calls.0.name": "price", "gen_ai.prompt.1.tool_calls.0.arguments": '{"id": "7"}',
        "gen_ai.prompt.2.role": "tool", "gen_ai.prompt.2.content": "40", "gen_ai.prompt.2.tool_call_id": "c1",
        "gen_ai.prompt.10.role": "user", "gen_ai.prompt.10.content": '[{"type": "text", "text": "So?"}]',
        "gen_ai.completion.0.role": "assistant", "gen_ai.completion.0.content": "The tall one.",
        "llm.request.functions.0.name": "price", "llm.request.functions.0.parameters": '{"type": "object"}',
        "gen_ai.usage.prompt_tokens": 90, "gen_ai.usage.cache_read_input_tokens": 64,
    }  # fmt: skip
    record = one(tmp_path, exported({"attributes": otlp(attributes)["kvlistValue"]["values"]}))
    _, user, assistant, tool = MESSAGES
    last = {"role": "user", "content": [{"type": "text", "text": "So?"}]}
    calling = {"role": "assistant", "content": None, "tool_calls": assistant["tool_calls"]}
    assert record.body["messages"] == [user, calling, tool, last]
    assert record.body["tools"] == [{"type": "function", "function": FUNCTION}]
    assert (record.usage, record.answer) == (Usage(90, 64, None), REPLY)


def test_otel_spans_without_a_prompt_or_with_an_image_are_left_out(tmp_path: Path) -> None:
    bare = {"spanId": "1", "name": "GET /", "attributes": [{"key": "http.method", "value": {"stringValue": "GET"}}]}
    full = {"spanId": "2", "attributes": otlp(ATTRIBUTES)["kvlistValue"]["values"]}
    image = [{"role": "user", "parts": [{"type": "uri", "modality": "image", "uri": "http://host/a.png"}]}]
    seen = {"spanId": "3", "attributes": {"gen_ai.input.messages": image}}
    left, kept, other = read(tmp_path, json.dumps(exported(bare, full, seen), indent=1).encode())
    assert left.reason == "no GenAI prompt in this span"
    assert kept.body["messages"] == MESSAGES
    assert other.reason == "an image: only text can be replayed"
    assert 1 < left.line < kept.line < other.line


def test_an_image_in_an_answer_of_otel_does_not_matter(tmp_path: Path) -> None:
    answer = [{"role": "assistant", "parts": [{"type": "blob", "modality": "image", "content": "AAAA"}]}]
    assert one(tmp_path, {"span_id": "1", "attributes": ATTRIBUTES | {"gen_ai.output.messages": answer}}).answer is None


# --- vLLM's log ---

BODY_LINE = "(APIServer pid=1) DEBUG 01-0{} 00:00:00 [request_logger.py:74] Request N/A JSON body: {}\n"
DETAILS_LINE = (
    "DEBUG 01-02 00:00:00 [request_logger.py:50] Request cmpl-1 details: prompt: {!r}, "
    "prompt_token_ids: {}, prompt_embeds shape: None.\n"
)
NOISE = "INFO 01-01 00:00:00 [api_server.py:1] vLLM is up: {'port': 8000}\n"
TRAP = "Request N/A JSON body: {}, prompt_token_ids: [9], prompt_embeds shape"


def test_vllm_s_log_gives_bodies_of_every_api_and_not_their_details(tmp_path: Path) -> None:
    bodies = [CHAT, {"prompt": "Once"}, {"model": "m", "input": "hello"}, CHAT | {"system": "Be kind."}]
    lines = [BODY_LINE.format(n, json.dumps(body)) for n, body in enumerate(bodies, start=1)]
    text = NOISE + "".join(line + DETAILS_LINE.format("Once", [1, 2]) for line in lines)
    found = read(tmp_path, text.encode())
    assert [record.api for record in found] == ["chat", "completions", "responses", "messages"]
    assert [record.line for record in found] == [2, 4, 6, 8]
    assert [record.time - found[0].time for record in found] == [0, 86400, 2 * 86400, 3 * 86400]
    assert found == read(tmp_path, text.encode(), shape="vllm-log")


def test_vllm_s_log_without_bodies_gives_token_ids(tmp_path: Path) -> None:
    text = NOISE + DETAILS_LINE.format(TRAP, [1, 2, 3]) + DETAILS_LINE.format("Once", None)
    record, left = read(tmp_path, text.encode())
    assert (record.api, record.line, record.body) == ("tokens", 2, {"prompt_token_ids": [1, 2, 3]})
    assert (left.line, "no token ids" in left.reason) == (3, True)


def test_a_body_that_vllm_cut_is_left_out(tmp_path: Path) -> None:
    text = BODY_LINE.format(1, json.dumps(CHAT)) + BODY_LINE.format(2, json.dumps(CHAT)[:30])
    kept, left = read(tmp_path, text.encode())
    assert kept.body == CHAT
    assert left.line == 2
    assert "cut off" in left.reason
    assert "--max-log-len" in left.reason


def test_a_line_of_vllm_s_log_may_begin_with_a_bracket_or_a_number(tmp_path: Path) -> None:
    for first in ("[rank0] loading\n", "2026-01-01 00:00:00 loading\n", "[1] loading\n"):
        found = read(tmp_path, (first + BODY_LINE.format(1, json.dumps(CHAT))).encode())
        assert [record.body for record in found] == [CHAT]


def test_what_looks_like_vllm_s_log_in_a_prompt_is_a_prompt(tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": BODY_LINE.format(1, "{}")}]}
    left, record = read(tmp_path, b"no JSON\n", body)
    assert left.line == 1
    assert record.body == body


def test_a_log_without_requests_is_no_log_of_vllm_s(tmp_path: Path) -> None:
    assert message_of(tmp_path, NOISE.encode(), shape="vllm-log").endswith("holds no request")
    assert "no JSON" in message_of(tmp_path, NOISE.encode())


# --- data sets and traces ---


def test_sharegpt_is_one_request_for_every_answer(tmp_path: Path) -> None:
    turns = [
        ("gpt", "Welcome."),
        ("human", "Price of lamp 7?"),
        ("function_call", '{"name": "price", "arguments": {"id": "7"}}'),
        ("observation", "40"),
        ("gpt", "40 euros."),
        ("human", "Thanks."),
    ]
    conversations = [{"from": name, "value": value} for name, value in turns]
    first, second = read(tmp_path, {"conversations": conversations, "system": "Be kind."})
    call = {"id": "call_2", "type": "function", "function": {"name": "price", "arguments": '{"id": "7"}'}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert first.body["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "content": "Welcome."},
        {"role": "user", "content": "Price of lamp 7?"},
    ]
    assert first.answer == calling
    result = {"role": "tool", "content": "40", "tool_call_id": "call_2"}
    assert second.body["messages"] == [*first.body["messages"], calling, result]
    assert second.answer == {"role": "assistant", "content": "40 euros."}
    assert {first.api, second.api} == {"chat"}


def test_sharegpt_with_unknown_turns_or_without_answers_is_left_out(tmp_path: Path) -> None:
    assert "without an answer" in reason(tmp_path, {"conversations": [{"from": "human", "value": "Hello"}]})
    assert "a turn from ghost" in reason(tmp_path, {"conversations": [{"from": "ghost", "value": "Hello"}]})


def test_mooncake_and_bailian_are_blocks(tmp_path: Path) -> None:
    # The first request of each trace as it is published, cut to the fields.
    mooncake = {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [*range(46, 58), 2353, 2354]}
    record = one(tmp_path, mooncake)
    assert record.api == "blocks"
    assert record.body == {"hash_ids": mooncake["hash_ids"], "block_size": 512, "input_length": 6955}
    assert (record.usage, record.time) == (Usage(6955, None, 52), 27.482)
    bailian = {"chat_id": 159, "parent_chat_id": 55, "timestamp": 61.114, "input_length": 33, "hash_ids": [1, 2, 3]}
    record = one(tmp_path, bailian | {"output_length": 132, "type": "text", "turn": 2})
    assert record.body == {"hash_ids": [1, 2, 3], "block_size": 16, "input_length": 33}
    assert (record.usage, record.time) == (Usage(33, None, 132), 61.114)


@pytest.mark.parametrize(
    ("tokens", "fits"), [(1024, False), (1025, True), (1536, True), (1537, True), (2047, True), (2048, False)]
)
def test_blocks_must_fit_the_tokens_whether_a_last_part_has_one_or_not(tmp_path: Path, tokens: int, fits: bool) -> None:
    _, found = read(tmp_path, CHAT, {"timestamp": 0, "input_length": tokens, "hash_ids": [1, 2, 3]})
    assert isinstance(found, Record) == fits
    assert fits or found.reason == f"3 blocks of 512 tokens are not {tokens} tokens"


def test_one_of_bailian_s_own_fields_tells_its_block_size(tmp_path: Path) -> None:
    for name in ("chat_id", "parent_chat_id"):
        assert one(tmp_path, {name: 1, "input_length": 33, "hash_ids": [1, 2, 3]}).body["block_size"] == 16


def test_blocks_without_ids_are_left_out(tmp_path: Path) -> None:
    assert "hash_ids" in reason(tmp_path, {"hash_ids": ["a"], "input_length": 1})
    assert "hash_ids" in reason(tmp_path, {"hash_ids": [1], "input_length": "1"})


# --- --format ---


def test_a_given_shape_overrules_recognition(tmp_path: Path) -> None:
    entry = CHAT | {"system": "Be kind.", "prompt": "Once"}
    assert one(tmp_path, entry).api == "messages"
    assert one(tmp_path, entry, "openai").api == "chat"
    assert one(tmp_path, entry, "completions").api == "completions"
    assert one(tmp_path, {"messages": [USER, {"role": "tool", "content": "40"}]}, "anthropic").api == "messages"


@pytest.mark.parametrize("shape", SHAPES)
def test_an_entry_that_does_not_fit_the_given_shape_is_left_out(tmp_path: Path, shape: str) -> None:
    message = message_of(tmp_path, {"colour": "red"}, shape=shape)
    assert "holds no request" in message
    assert "known shapes" not in message


def test_every_shape_has_one_line_that_describes_it() -> None:
    assert all(shape.description and "\n" not in shape.description for shape in SHAPES.values())


# --- values ---


@pytest.mark.parametrize(
    ("value", "found"), [(7, 7), (0, 0), (7.0, 7), (7.5, None), (-1, None), (True, None), ("7", None), (None, None)]
)
def test_only_numbers_are_numbers_of_tokens(value: object, found: int | None) -> None:
    assert count(value) == found


@pytest.mark.parametrize(
    "value",
    [1767225600, 1767225600.0, 1767225600_000, 1767225600_000_000, 1767225600_000_000_000, "1767225600",
     "2026-01-01T00:00:00Z", "2026-01-01 00:00:00", "2026-01-01T01:00:00+01:00", "2026-01-01T00:00:00.000000"],
)  # fmt: skip
def test_a_time_is_seconds_however_it_is_written(value: object) -> None:
    assert seconds(value) == NEW_YEAR


@pytest.mark.parametrize("value", [None, True, "yesterday", "nan", float("inf"), 10**400, [], {}])
def test_what_is_no_time_is_none(value: object) -> None:
    assert seconds(value) is None


# --- anything ---

WORDS = st.sampled_from(
    ["messages", "role", "content", "user", "assistant", "tool", "type", "text", "input", "prompt", "prompt_token_ids",
     "body", "request", "response", "usage", "url", "/v1/chat/completions", "error", "data", "spans", "resourceSpans",
     "scopeSpans", "attributes", "key", "value", "stringValue", "kvlistValue", "arrayValue", "values", "spanId",
     "gen_ai.input.messages", "gen_ai.prompt.0.role", "gen_ai.prompt.0.tool_calls.0.name", "gen_ai.tool.definitions",
     "gen_ai.system_instructions", "parts", "GENERATION", "traceId", "usageDetails", "modelParameters", "call_type",
     "model_parameters", "extra_body", "proxy_server_request", "metadata", "usage_object", "startTime", "request_body",
     "response_body", "conversations", "from", "human", "gpt", "function_call", "hash_ids", "input_length", "chat_id",
     "timestamp", "custom_id", "choices", "message", "output", "images", "image_url", "tool_use", "system", "tools",
     "input_schema", "model", "claude", "max_tokens", "prompt_tokens", "prompt_tokens_details", "cached_tokens"]
)  # fmt: skip
SHAPE = st.sampled_from(list(SHAPES))
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.text(max_size=5), st.just("[{}]"))
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=5), max_leaves=25
)


def outcome(path: Path, shape: str | None = None) -> str | None:
    """Read a log to its end; return the message where it is refused."""
    try:
        for item in read_log(path, shape):
            assert isinstance(item, Record | LeftOut)
            assert item.line >= 1
            assert isinstance(item, Record) or (len(item.reason) < 200 and len(item.reason.splitlines()) == 1)
    except UsageError as error:
        return str(error)
    return None


@given(entries=st.lists(st.dictionaries(WORDS, ANYTHING, max_size=6), max_size=3), shape=st.none() | SHAPE)
def test_any_json_is_read_left_out_or_refused(tmp_path_factory: pytest.TempPathFactory, entries: list, shape) -> None:
    path = tmp_path_factory.getbasetemp() / "anything"
    for text in ("\n".join(map(json.dumps, entries)), json.dumps(entries, indent=1)):
        path.write_text(text)
        assert len((outcome(path, shape) or "read").splitlines()) == 1


@given(raw=st.binary(max_size=60) | st.text(alphabet='[]{}",:\\\n 1ae', max_size=60).map(str.encode))
def test_any_bytes_are_read_left_out_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(raw)
    assert len((outcome(path) or "read").splitlines()) == 1
