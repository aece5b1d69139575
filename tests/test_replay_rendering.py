"""Rendering of the log replayer: token for token as vLLM's own server does it; what cannot be rendered is named."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.models import write_llama, write_model
from rich.console import Console

from going_further.common import LessonError
from going_further.replay import rendering
from going_further.replay.analysis import Options, analyse, notes_on
from going_further.replay.readers import read_log
from going_further.replay.records import Record
from going_further.replay.rendering import CannotRender, Prompt, Renderer, plain

ROOT = Path(__file__).parent.parent
BUILT_IN = ROOT / "built_in_model" / "cpu"
FIELD = Path(__file__).parent / "field"
# Tools, arguments, reasoning and variables are written by none of the other templates all at once.
FULL_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% if documents %}{{ documents | tojson }}{% endif %}"
    "{% if style %}<{{ style }}>{% endif %}{% if reasoning_effort %}({{ reasoning_effort }}){% endif %}"
    "{% for m in messages %}[{{ m.role }}] {% if m.reasoning %}<{{ m.reasoning }}>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% if not loop.last or add_generation_prompt %}[/{{ m.role }}]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MODELS = "built-in", "qwen3-like", "parts-like", "llama", "full"
SYSTEM = {"role": "system", "content": "You tend a lamp shop. " * 5}
USER = {"role": "user", "content": "Which lamp is brightest?"}
ANSWER = {"role": "assistant", "content": "The tall one."}
TOOLS = [{"type": "function", "function": {"name": "price", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "price", "arguments": '{"id": "7", "day": "Monday"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "40 euros"}


def text_parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


CONVERSATIONS = {
    "tools": {"messages": [SYSTEM, USER, CALLING, RESULT, USER], "tools": TOOLS},
    "tools, with a choice of none": {"messages": [USER], "tools": TOOLS, "tool_choice": "none"},
    "several calls": {"messages": [USER, CALLING | {"tool_calls": [CALL, CALL | {"id": "c2"}]}, RESULT, RESULT]},
    "arguments that are an object": {
        "messages": [USER, CALLING | {"tool_calls": [CALL | {"function": {"name": "price", "arguments": {"id": 7}}}]}]
    },
    "parts": {"messages": [SYSTEM, {"role": "user", "content": text_parts("Which", "lamp?")}]},
    "parts of system and tool": {
        "messages": [
            {"role": "system", "content": text_parts("Be kind.", "Be short.")}, USER, CALLING,
            RESULT | {"content": text_parts("40", "euros")},
        ]
    },
    "a part that is no text only by its name": {
        "messages": [{"role": "user", "content": [{"type": "input_text", "text": "Which lamp?"}]}]
    },
    "reasoning": {"messages": [USER, CALLING | {"reasoning": "I ask the tool."}, RESULT]},
    "reasoning_content": {"messages": [USER, CALLING | {"reasoning_content": "I ask the tool."}, RESULT]},
    "reasoning of an earlier answer": {"messages": [USER, ANSWER | {"reasoning": "Tall is bright."}, USER]},
    "developer": {"messages": [{"role": "developer", "content": "Be kind."}, USER]},
    "system and developer": {"messages": [SYSTEM, {"role": "developer", "content": "Be kind."}, USER, ANSWER, USER]},
    "two system messages": {"messages": [SYSTEM, USER, SYSTEM, USER]},
    "a role that no template knows": {"messages": [USER, {"role": "critic", "content": "Hm."}]},
    "names": {"messages": [USER | {"name": "ann"}, ANSWER, USER | {"name": "bob"}]},
    "documents": {"messages": [USER], "documents": [{"title": "lamps", "text": "The tall one."}]},
    "reasoning_effort": {"messages": [USER], "reasoning_effort": "low"},
    "reasoning_effort none": {"messages": [USER], "reasoning_effort": "none"},
    "variables": {"messages": [USER], "chat_template_kwargs": {"style": "plain", "enable_thinking": False}},
    "thinking on": {"messages": [USER, ANSWER, USER], "chat_template_kwargs": {"enable_thinking": True}},
    "no answer begun": {"messages": [USER], "add_generation_prompt": False},
    "an answer to be continued": {
        "messages": [USER, ANSWER], "continue_final_message": True, "add_generation_prompt": False
    },
    "special tokens": {"messages": [USER], "add_special_tokens": True},
    "text with special tokens in it": {"messages": [{"role": "user", "content": "<|im_end|></s> naïve 猫 🙂 \r\n"}]},
    "nothing said": {"messages": [{"role": "user", "content": ""}]},
    "an answer of nothing": {"messages": [USER, {"role": "assistant", "content": None}, USER]},
    "sampling": {"messages": [USER], "temperature": 0.2, "max_tokens": 5, "stop": ["x"], "model": "m", "n": 2},
}  # fmt: skip
RESPONSES = {
    "a text": {"model": "m", "input": "Which lamp is brightest?"},
    "instructions": {"model": "m", "input": "Which lamp?", "instructions": "You tend a lamp shop."},
    "items": {
        "model": "m", "instructions": "You tend a lamp shop.",
        "tools": [{"type": "function", "name": "price", "parameters": {"type": "object", "properties": {}}}],
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Which lamp?"}]},
            {"type": "function_call", "call_id": "c1", "name": "price", "arguments": '{"id": "7"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "40 euros"},
        ],
    },
    "messages": {"model": "m", "input": [SYSTEM, USER, ANSWER, USER]},
    "effort": {"model": "m", "input": "Which lamp?", "reasoning": {"effort": "high"}},
}  # fmt: skip
ANTHROPIC = {
    "a text": {"model": "m", "max_tokens": 9, "messages": [USER, ANSWER, USER]},
    "system": {"model": "m", "max_tokens": 9, "system": "You tend a lamp shop.", "messages": [USER]},
    "system in blocks": {
        "model": "m", "max_tokens": 9, "messages": [USER],
        "system": text_parts("x-anthropic-billing-header: cch=1;", "You tend", "a lamp shop."),
    },
    "a system message among the others": {
        "model": "m", "max_tokens": 9, "system": "You tend a lamp shop.",
        "messages": [USER, ANSWER, {"role": "system", "content": "It is late."}, USER],
    },
    "tools": {
        "model": "m", "max_tokens": 9, "tools": [{"name": "price", "input_schema": {"type": "object"}}],
        "messages": [
            USER,
            {"role": "assistant", "content": [*text_parts("Looking."),
             {"type": "tool_use", "id": "t1", "name": "price", "input": {"id": "7"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": text_parts("40 euros")}, *text_parts("So?")]},
        ],
    },
    "thinking": {
        "model": "m", "max_tokens": 9, "thinking": {"type": "enabled", "budget_tokens": 2000},
        "messages": [
            USER,
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Tall is bright.", "signature": "s"}, *text_parts("The tall one.")]},
            USER,
        ],
    },
    "thinking disabled": {"model": "m", "max_tokens": 9, "thinking": {"type": "disabled"}, "messages": [USER]},
}  # fmt: skip


@pytest.fixture(scope="module")
def renderer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Renderer]:
    """Make the renderer of a model, once for each."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def renderer(name: str) -> Renderer:
        if name not in made:
            path = write_model(folder / name, name, FULL_TEMPLATE if name == "full" else None)
            made[name] = Renderer(str(path))
        return made[name]

    return renderer


def record(body: dict, api: str = "chat") -> Record:
    return Record(1, api, body, body)


def refusal(renderer: Renderer, body: dict, api: str = "chat") -> str:
    with pytest.raises(CannotRender) as caught:
        renderer.prompt(record(body, api))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def ids_of_server(renderer: Renderer, body: dict, api: str) -> list[int] | None:
    """Return what vLLM's OnlineRenderer makes of a request; None where it answers with an error."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    server, body = renderer.online_renderer, copy.deepcopy(body)

    async def render() -> object:
        if api == "responses":
            found = await server.render_responses(ResponsesRequest.model_validate(body))
            return found if isinstance(found, ErrorResponse) else found.engine_input
        if api == "messages":
            request = AnthropicMessagesRequest.model_validate({"model": "m", "max_tokens": 1, **body})
            effort = "none"
            if request.thinking is not None and request.thinking.type == "disabled":
                serving = object.__new__(AnthropicServingMessages)
                serving.online_renderer, serving.model_config = server, renderer.model_config
                effort = await serving._probe_disabled_thinking_effort()
            request = AnthropicServingMessages.to_chat_completion_request(
                request,
                merge_inline_system=AnthropicServingMessages._should_merge_inline_system(server),
                disabled_thinking_effort=effort,
            )
        else:
            request = ChatCompletionRequest.model_validate(body)
        request.tool_choice = "none"  # what else a server needs for tools is a parser of answers
        found = await server.render_chat(request)
        return found if isinstance(found, ErrorResponse) else found[1][0]

    try:
        found = asyncio.run(render())
    except (TypeError, ValueError, renderer.refusal):
        return None
    return None if isinstance(found, ErrorResponse) else list(found["prompt_token_ids"])


def ids_of_replayer(renderer: Renderer, body: dict, api: str) -> list[int] | None:
    before = copy.deepcopy(body)
    try:
        return renderer.prompt(record(body, api)).ids
    except CannotRender:
        return None
    finally:
        assert body == before, "a renderer has changed the log's own entry"


# --- what is relied on ---


def is_there(name: str) -> bool:
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for attribute in path.split("."):
        found = getattr(found, attribute, None)
    return callable(found) or isinstance(found, property)


@pytest.mark.parametrize("name", rendering.RELIES_ON)
def test_what_is_relied_on_is_there(name: str) -> None:
    assert is_there(name)


@pytest.mark.parametrize("names", rendering.RELIES_ON_ONE_OF)
def test_of_what_has_two_names_one_is_there(names: tuple[str, str]) -> None:
    assert any(map(is_there, names))


def test_a_tokenizer_that_begins_texts_with_a_token_of_its_own_does_so_where_vllm_lets_it(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama", template="{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    begin = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": pieces, "pair": [*pieces, *pieces[1:]],
                                   "special_tokens": {"<s>": begin}}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    renderer = Renderer(str(folder))
    text = "Which lamp is brightest?"
    for api, body in (("chat", {"messages": [{"role": "user", "content": text}]}), ("completions", {"prompt": text}),
                      ("responses", {"model": "m", "input": text})):  # fmt: skip
        ids = renderer.prompt(record(body, api)).ids
        assert (ids[0] == 1) == (api != "chat"), api
        if api != "completions":
            assert ids == ids_of_server(renderer, body, api)


def test_a_server_s_own_template_and_defaults_are_taken(tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "Which lamp?"}]}
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ mood }}"
    renderer = Renderer(str(BUILT_IN), None, template, {"mood": "glad"})
    prompt = renderer.prompt(record(body))
    assert prompt.text == "<Which lamp?>glad"
    assert renderer.prompt(record(body | {"chat_template_kwargs": {"mood": "sad"}})).text == "<Which lamp?>sad"
    assert prompt.text[slice(*renderer.spans(prompt)[0])] == "Which lamp?"


# --- as vLLM's server does it ---


@pytest.mark.parametrize("model", MODELS)
def test_a_prompt_is_token_for_token_that_of_vllm_s_server(renderer_of, model: str) -> None:
    renderer, differing, refused = renderer_of(model), [], []
    for api, bodies in (("chat", CONVERSATIONS), ("responses", RESPONSES), ("messages", ANTHROPIC)):
        for name, body in bodies.items():
            theirs, ours = ids_of_server(renderer, body, api), ids_of_replayer(renderer, body, api)
            if theirs != ours:
                differing.append((api, name))
            if theirs is None:
                refused.append((api, name))
    assert differing == []
    assert len(refused) <= 3, f"what is refused compares nothing: {refused}"


@pytest.mark.parametrize("model", MODELS)
def test_every_request_of_the_field_is_token_for_token_that_of_vllm_s_server(renderer_of, model: str) -> None:
    renderer, rendered = renderer_of(model), 0
    for path in sorted(FIELD.glob("*.*")):
        if path.name.startswith(("02-", "21-", "57-")):  # no request in it that can be replayed; 200 alike
            continue
        for found in read_log(path):
            if isinstance(found, Record):
                theirs = ids_of_server(renderer, found.body, found.api)
                assert ids_of_replayer(renderer, found.body, found.api) == theirs, (path.name, found.line)
                rendered += theirs is not None
    assert rendered >= 45


@pytest.mark.parametrize("name", ["built-in", "llama"])
def test_a_completion_is_its_text_with_the_special_tokens_of_vllm_s_server(renderer_of, name: str) -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    renderer = renderer_of(name)
    for body in ({"prompt": "Which lamp?"}, {"prompt": "Which lamp?", "add_special_tokens": False, "model": "m"}):
        request = CompletionRequest.model_validate({"model": "m", **body})
        (theirs,) = asyncio.run(renderer.online_renderer.render_completion(request))
        assert renderer.prompt(record(body, "completions")).ids == theirs["prompt_token_ids"]


def test_token_ids_are_taken_as_they_are(renderer_of) -> None:
    renderer = renderer_of("built-in")
    prompt = renderer.prompt(record({"prompt_token_ids": [5, 6, 7]}, "tokens"))
    assert (prompt.ids, prompt.text, prompt.messages) == ([5, 6, 7], None, [])
    assert "whole numbers" in refusal(renderer, {"prompt_token_ids": [5, True]}, "tokens")
    assert "whole numbers" in refusal(renderer, {"prompt_token_ids": [-5]}, "tokens")


def test_tools_and_reasoning_and_variables_reach_a_template_that_writes_them(renderer_of) -> None:
    def text(**fields: object) -> str:
        return renderer_of("full").prompt(record({"messages": [USER], **fields})).text

    assert '"name": "price"' in text(tools=TOOLS)
    assert "(low)" in text(reasoning_effort="low")
    assert "<plain>" in text(chat_template_kwargs={"style": "plain"})
    assert '"title": "lamps"' in text(documents=[{"title": "lamps", "text": "x"}])
    assert "<I ask.>" in text(messages=[USER, ANSWER | {"reasoning": "I ask."}])
    assert 'price{"id": "7", "day": "Monday"}' in text(messages=[USER, CALLING])
    assert text().endswith("[/user][assistant]")
    assert text(add_generation_prompt=False).endswith("brightest?")


@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
def test_the_body_of_a_record_is_not_changed(renderer_of, api: str) -> None:
    bodies = {"chat": CONVERSATIONS, "responses": RESPONSES, "messages": ANTHROPIC}[api]
    for body in copy.deepcopy(bodies).values():
        before = json.dumps(body)
        ids_of_replayer(renderer_of("full"), body, api)
        assert json.dumps(body) == before  # keys in their order, too


def test_rendering_is_the_same_again(renderer_of) -> None:
    for body in CONVERSATIONS.values():
        assert len({tuple(ids_of_replayer(renderer_of("full"), body, "chat") or ()) for _ in range(2)}) == 1


# --- what splits the cache, what is ignored ---


def test_model_and_cache_salt_split_the_cache(renderer_of) -> None:
    salts = {
        renderer_of("built-in").prompt(record(body, api)).salt
        for more in ({}, {"model": "a"}, {"model": "b"}, {"model": "a", "cache_salt": "s"}, {"cache_salt": "t"})
        for api, body in (("chat", {"messages": [USER]} | more), ("completions", {"prompt": "Hi"} | more))
    }
    assert salts == {(None, None), ("a", None), ("b", None), ("a", "s"), (None, "t")}


def test_fields_that_vllm_does_not_know_are_named(renderer_of) -> None:
    def ignored(**fields: object) -> tuple:
        return renderer_of("built-in").prompt(record({"messages": [USER], **fields})).ignored

    assert ignored(system="Be kind.", images=[1]) == ("images", "system")
    assert ignored(temperature=1, model="m", user="u", tools=TOOLS, metadata={}) == ()
    assert ignored(usage={}, session_id="s", timestamp=1) == (), "what logs add is no field of a request"


# --- where contents stand ---


@pytest.mark.parametrize("model", MODELS)
def test_spans_find_the_contents(renderer_of, model: str) -> None:
    renderer = renderer_of(model)
    bodies = [
        {"messages": [SYSTEM, USER, ANSWER, USER]},
        {"messages": [SYSTEM, {"role": "user", "content": text_parts("Which", "lamp?")}, ANSWER, USER]},
        {"messages": [SYSTEM, USER, CALLING, RESULT, USER], "tools": TOOLS},
        {"messages": [{"role": "user", "content": "a <content 1> b"}, ANSWER, {"role": "user", "content": "user"}]},
    ]
    for body in bodies:
        prompt = renderer.prompt(record(body))
        spans = renderer.spans(prompt)
        assert [span.start for span in spans] == sorted(span.start for span in spans)
        for message, span in zip(prompt.messages, spans, strict=True):
            assert prompt.text[slice(*span)] in (plain(message["content"]), "\n".join(
                part["text"] for part in message["content"] or () if isinstance(part, dict)
            )), (model, message)  # fmt: skip


def test_spans_of_what_a_template_trims_are_what_it_writes(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    renderer = Renderer(str(write_llama(tmp_path / "trim", template=template)))
    prompt = renderer.prompt(record({"messages": [{"role": "user", "content": "  Hi\n"}, ANSWER]}))
    assert [prompt.text[slice(*span)] for span in renderer.spans(prompt)] == ["Hi", "The tall one."]


def test_a_template_that_looks_into_contents_has_spans_too(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.content.startswith('<content') %}{{ raise_exception('no') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    )
    renderer = Renderer(str(write_llama(tmp_path / "looks", template=template)))
    prompt = renderer.prompt(record({"messages": [USER, ANSWER]}))
    assert [prompt.text[slice(*span)] for span in renderer.spans(prompt)] == [USER["content"], ANSWER["content"]]


# --- what cannot be rendered ---


@pytest.mark.parametrize(
    ("api", "body", "says"),
    [
        ("chat", {"messages": [USER], "chat_template": "x"}, "chat template of its own"),
        ("chat", {"messages": [USER], "chat_template_kwargs": {"chat_template": "x"}}, "chat template of its own"),
        ("chat", {"messages": [USER], "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ("completions", {"prompt": "Which lamp is brightest?", "truncate_prompt_tokens": 2}, "truncate_prompt_tokens"),
        ("completions", {"prompt": "Which lamp", "suffix": "?"}, "suffix"),
        ("responses", {"model": "m", "input": "Hi", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("responses", {"model": "m", "input": "Hi", "prompt": {"id": "pmpt_1"}}, "prompt template"),
        ("chat", {"messages": [USER], "continue_final_message": True}, "add_generation_prompt"),
        ("chat", {"messages": [USER], "chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ("chat", {"messages": [USER], "tools": {}}, "tools: "),
        ("chat", {"messages": [USER], "tools": ["a"]}, "tools.0"),
        ("chat", {"messages": [{"role": "user", "content": 5}]}, "content"),
        ("chat", {"messages": [{"content": "x"}]}, "messages.0"),
        ("chat", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "vLLM does not take it"),
        ("chat", {"messages": [USER, CALLING | {"tool_calls": [CALL | {"function": {"name": "f",
                  "arguments": "[" * 100_000}}]}]}, "vLLM does not take it"),
        ("responses", {"model": "m", "input": [{"type": "reasoning", "id": "r", "summary": [],
                       "encrypted_content": "x"}]}, "Encrypted content"),
        ("messages", {"model": "m", "messages": [{"role": "user", "content": [{"type": "nonsense"}]}]}, "content"),
    ],
)  # fmt: skip
def test_what_vllm_would_not_take_or_is_not_replayed_is_one_line(renderer_of, api: str, body: dict, says: str) -> None:
    assert says in refusal(renderer_of("built-in"), body, api)


def test_a_request_of_the_messages_api_needs_no_model(renderer_of) -> None:
    prompt = renderer_of("built-in").prompt(record({"messages": [USER], "system": "Be kind."}, "messages"))
    assert "Be kind." in prompt.text


def test_what_only_the_template_refuses_is_one_line(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}x"
    renderer = Renderer(str(write_llama(tmp_path / "model", template=template)))
    assert renderer.prompt(record({"messages": [USER]})).text == "x"
    assert "no system message" in refusal(renderer, {"messages": [SYSTEM, USER]})


class Listener(threading.Thread):
    """A server that must not be asked anything: it hangs up on everybody, and remembers that somebody came."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.socket, self.visitors = socket.create_server(("127.0.0.1", 0)), 0
        self.port = self.socket.getsockname()[1]

    def run(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                self.socket.accept()[0].close()
                self.visitors += 1


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    found.start()
    yield found
    found.socket.shutdown(socket.SHUT_RDWR), found.socket.close()


IMAGE = "http://127.0.0.1:{port}/lamp.png"
MEDIA = {
    "image_url": ("chat", {"type": "image_url", "image_url": {"url": IMAGE}}),
    "without a type": ("chat", {"image_url": IMAGE}),
    "audio_url": ("chat", {"type": "audio_url", "audio_url": {"url": IMAGE}}),
    "video_url": ("chat", {"type": "video_url", "video_url": {"url": IMAGE}}),
    "input_image": ("responses", {"type": "input_image", "image_url": IMAGE, "detail": "auto"}),
    "source": ("messages", {"type": "image", "source": {"type": "url", "url": IMAGE}}),
    # vLLM looks for an image in any part that has a uuid, whatever its type says.
    "a text with a uuid": ("chat", {"type": "text", "text": "Which lamp?", "uuid": "u", "image_url": IMAGE}),
}


@pytest.mark.parametrize("name", MEDIA)
def test_an_image_in_a_log_is_left_out_and_never_fetched(renderer_of, listener, tmp_path: Path, name: str) -> None:
    api, part = MEDIA[name]
    message = {"role": "user", "content": [{"type": "input_text" if api == "responses" else "text", "text": "A"}, part]}
    fields = {"responses": ["input", message], "chat": ["messages", message], "messages": ["messages", message]}[api]
    body = {"model": "m", "max_tokens": 1, fields[0]: [fields[1]]}
    body = body | {"system": "Be kind."} if api == "messages" else body
    text = json.dumps(body).replace("{port}", str(listener.port))
    log = tmp_path / "log.jsonl"
    log.write_text(f"{json.dumps({'messages': [USER]})}\n{text}\n")
    found = analyse(log, renderer_of("built-in"), 16, Options(), Console())
    assert listener.visitors == 0
    assert [left.line for left in found.left_out] == [2]
    assert len(found.left_out[0].reason.splitlines()) == 1


def test_a_renderer_refuses_media_itself(renderer_of, listener) -> None:
    url = IMAGE.replace("{port}", str(listener.port))
    for kind in ("image_url", "audio_url", "video_url"):
        message = {"role": "user", "content": [{"type": kind, kind: {"url": url}}]}
        refusal(renderer_of("built-in"), {"messages": [message]})
        assert listener.visitors == 0
    for part in ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
                 {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}):  # fmt: skip
        refusal(renderer_of("built-in"), {"messages": [{"role": "user", "content": [part]}]})


# --- the model's rules ---


def analysed(model: Path | Renderer, tmp_path: Path, **options: object):
    """Analyse a log of two requests, of some 30 and 200 tokens."""
    log = tmp_path / "log.jsonl"
    long = {"role": "user", "content": "Which lamp is brightest? " * 20}
    log.write_text("".join(json.dumps({"messages": [message]}) + "\n" for message in (USER, long)))
    renderer = model if isinstance(model, Renderer) else Renderer(str(model))
    return analyse(log, renderer, 16, Options(**options), Console())


def test_a_template_that_writes_the_date_is_named(tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    dated = Renderer(str(write_llama(tmp_path / "dated", template=template)))
    plain_one = Renderer(str(write_llama(tmp_path / "plain")))
    assert (dated.writes_the_date, plain_one.writes_the_date) == (True, False)
    assert any("strftime_now" in note for note in notes_on(analysed(dated, tmp_path)))
    assert not any("strftime_now" in note for note in notes_on(analysed(plain_one, tmp_path)))


def write_hybrid(folder: Path) -> Path:
    """Write a config with attention and convolution layers."""
    shape = {"architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "layer_types": ["conv", "full_attention"]}
    return write_llama(folder, **shape)


def test_models_whose_cache_follows_other_rules_are_refused_by_name(tmp_path: Path) -> None:
    def refused(model: Path) -> str:
        with pytest.raises(LessonError) as caught:
            Renderer(str(model)).check_rules()
        assert str(model) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    assert "Mamba or linear attention" in refused(write_hybrid(tmp_path / "hybrid"))
    assert "chunked local attention" in refused(write_llama(tmp_path / "chunked", attention_chunk_size=64))
    gpt_oss = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": 2}
    assert "gpt-oss" in refused(write_llama(tmp_path / "gpt-oss", num_experts_per_tok=1, **gpt_oss))
    Renderer(str(write_llama(tmp_path / "plain"))).check_rules()


def test_a_model_without_prefix_caching_is_refused(renderer_of, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = renderer_of("llama")
    monkeypatch.setattr(renderer.config.cache_config, "enable_prefix_caching", False)
    with pytest.raises(LessonError, match="no prefix caching"):
        renderer.check_rules()


def test_prompts_beyond_a_sliding_window_are_refused_unless_all_layers_keep_their_blocks(tmp_path: Path) -> None:
    all_layers = write_llama(
        tmp_path / "all", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=64
    )
    some = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=True, max_window_layers=1)
    mixed = write_llama(tmp_path / "mixed", sliding_window=64, **some)
    wide = write_llama(tmp_path / "wide", sliding_window=1024, **some)
    without_manager = {"disable_hybrid_kv_cache_manager": True}
    for model, options, advice in ((all_layers, {}, False), (all_layers, without_manager, False), (mixed, {}, True)):
        with pytest.raises(LessonError) as caught:
            analysed(model, tmp_path, **options)
        assert "line 2: " in str(caught.value)
        assert f"{model} have a sliding window of 64" in str(caught.value)
        assert ("--disable-hybrid-kv-cache-manager" in str(caught.value)) == advice
    assert len(analysed(mixed, tmp_path, **without_manager).rows) == 2
    assert len(analysed(wide, tmp_path).rows) == 2, "within its window a layer keeps what one of full attention keeps"


def test_speculative_decoding_drops_the_last_block_where_vllm_does(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    eagle = {"method": "eagle", "model": str(write_llama(tmp_path / "eagle")), "num_speculative_tokens": 2}
    user = {"role": "user", "content": "Which lamp is brightest? " * 20}
    log = tmp_path / "log.jsonl"
    log.write_text(f"{json.dumps({'messages': [user]})}\n" * 2)
    cached = {}
    for name, config in (("none", None), ("ngram", ngram), ("eagle", eagle)):
        found = analyse(log, Renderer(str(model), config), 16, Options(), Console())
        cached[name] = found.rows[1].predicted_cached_tokens
        assert any("speculative decoding" in note for note in notes_on(found)) == (name == "eagle")
    assert cached["none"] == cached["ngram"] == cached["eagle"] + 16 > 100


def test_a_speculative_config_or_a_model_that_vllm_cannot_use_is_one_line(tmp_path: Path) -> None:
    for model, config in (
        (write_llama(tmp_path / "model"), {"method": "nonsense", "num_speculative_tokens": 2}),
        (write_llama(tmp_path / "broken", architectures=["NoSuchModel"], model_type="no_such_model"), None),
        (tmp_path, None),
    ):
        with pytest.raises(LessonError) as caught:
            Renderer(str(model), config)
        assert str(model) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_a_prompt_longer_than_the_model_takes_is_analysed_and_named(tmp_path: Path) -> None:
    found = analysed(write_llama(tmp_path / "short", max_position_embeddings=64), tmp_path)
    assert found.rows[1].prompt_tokens > 64
    assert any("longer than the model takes (64 tokens)" in note and "1 request" in note for note in notes_on(found))


def test_a_prompt_has_what_is_needed_to_compare_it(renderer_of) -> None:
    prompt = renderer_of("built-in").prompt(record({"messages": [SYSTEM, USER], "tools": TOOLS}))
    assert isinstance(prompt, Prompt)
    assert [message["role"] for message in prompt.messages] == ["system", "user"]
    assert prompt.tools[0]["function"]["name"] == "price"
    assert len(prompt.offsets) == len(prompt.ids)
    assert prompt.text[slice(*prompt.offsets[-1])] == "\n"


def test_a_renderer_is_quiet_and_asks_that_of_no_process_that_is_started_later() -> None:
    code = (
        "import io, logging, os, sys; sys.stdout = notebook = io.StringIO(); "
        "from going_further.replay.rendering import Renderer; "
        f"Renderer({str(BUILT_IN)!r}); log = logging.getLogger('vllm.renderers'); log.error('shown'); "
        "sys.stdout = sys.__stdout__; print(len(notebook.getvalue().splitlines())); "
        "print(os.environ.get('VLLM_LOGGING_LEVEL'), log.getEffectiveLevel())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "1\nNone 40\n", "logging.ERROR, here alone"
