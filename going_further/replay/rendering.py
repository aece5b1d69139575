"""Requests as vLLM's server renders them, by vLLM's own classes and functions, without an engine.

What a request means (the developer role, reasoning, tool arguments, content parts, header lines that are stripped) is
vLLM's word. All that is relied on is named in RELIES_ON; a test looks whether it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

from going_further import common
from going_further.common import BROKEN_FILES, LessonError, shown, telling_line
from going_further.replay.records import Record
from going_further.replay.shapes import media

RELIES_ON = (
    "vllm:AsyncEngineArgs.create_engine_config",
    "vllm.config:ModelConfig.get_sliding_window",
    "vllm.config:ModelConfig.get_vocab_size",
    "vllm.config:ModelConfig.is_attention_free",
    "vllm.config:ModelConfig.is_hybrid",
    "vllm.config:SpeculativeConfig.use_eagle",
    "vllm.exceptions:VLLMValidationError",
    "vllm.renderers:renderer_from_config",
    "vllm.renderers.base:BaseRenderer.render_messages",
    "vllm.renderers.hf:HfRenderer",
    "vllm.renderers.hf:safe_apply_chat_template",
    "vllm.renderers.hf:resolve_chat_template",
    "vllm.renderers.online_renderer:OnlineRenderer",
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.build_chat_params",
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.build_tok_params",
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest.build_tok_params",
    "vllm.entrypoints.openai.responses.protocol:ResponsesRequest.build_chat_params",
    "vllm.entrypoints.openai.responses.protocol:ResponsesRequest.build_tok_params",
    "vllm.entrypoints.openai.responses.utils:construct_input_messages",
    "vllm.entrypoints.openai.responses.utils:construct_tool_dicts",
    "vllm.entrypoints.anthropic.protocol:AnthropicMessagesRequest",
    "vllm.utils.mistral:is_mistral_tokenizer",
    "vllm.utils.mistral:mt.maybe_serialize_tool_calls",
    "vllm.utils.mistral:mt.truncate_tool_call_ids",
    "vllm.utils.mistral:mt.validate_request_params",
)
# Of these one is there: the later name, or that of vLLM 0.26.
RELIES_ON_ONE_OF = (
    (
        "vllm.entrypoints.anthropic.serving:AnthropicServingMessages.to_chat_completion_request",
        "vllm.entrypoints.anthropic.serving:AnthropicServingMessages._convert_anthropic_to_openai_request",
    ),
    (
        "vllm.entrypoints.anthropic.serving:AnthropicServingMessages._should_merge_inline_system",
        "vllm.entrypoints.anthropic.serving:AnthropicServingMessages._detect_merge_inline_system",
    ),
)
# What vLLM's code raises for a request that its server answers with an error: fields of another type than they should
# be, a template that takes no such message, content that it cannot parse.
REFUSALS = ArithmeticError, AttributeError, LookupError, NotImplementedError, RecursionError, TypeError, ValueError
# Fields that logs add to a request. What else vLLM's request class does not know is named: it may be thought to count.
ADDED_BY_LOGS = {
    *("usage", "response", "id", "object", "created", "created_at", "timestamp", "time", "request_id", "custom_id"),
    *("session", "session_id", "user_id", "tenant", "options", "metadata", "method", "url", "error", "choices"),
}


class CannotRender(LessonError):
    """vLLM's server would not take this request; the message says why."""


class Span(NamedTuple):
    """Where a text stands in a longer one, in characters."""

    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A request as the model gets it."""

    record: Record
    text: str | None  # None where a log holds token ids
    ids: list[int]
    messages: list[dict] = dataclasses.field(default_factory=list)  # as vLLM has parsed them
    tools: list[dict] | None = None
    variables: dict = dataclasses.field(default_factory=dict)  # what else the template got
    salt: tuple = ()  # what splits the cache beside the tokens: the model's name, `cache_salt`
    is_read: bool = True  # whether vLLM looks it up in the cache; if not, it stores it all the same
    ignored: tuple[str, ...] = ()  # fields that vLLM does not know
    encoding: object = None  # the tokenizer's own; kept while a prompt is looked at

    @property
    def offsets(self) -> list[tuple[int, int]] | None:
        """Where each token stands in the text; None where the tokenizer does not say."""
        return self.encoding and self.encoding.offsets


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what a library prints, also from C, and what it logs, also to a notebook, from who looks on."""
    with tempfile.TemporaryFile() as nowhere:
        kept, logged = (os.dup(1), os.dup(2)), logging.root.manager.disable
        logging.disable(logging.WARNING)
        common.errors = kept[1]  # where a signal is answered
        os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            common.errors = 2
            os.close(kept[0]), os.close(kept[1])
            logging.disable(logged)


class Renderer:
    """vLLM's renderer and configuration of a model; the weights are not read."""

    def __init__(
        self,
        model: str,
        speculative_config: dict | None = None,
        chat_template: str | None = None,
        default_chat_template_kwargs: dict | None = None,
    ) -> None:
        """Take a model's folder or name, and what its server was given, in vLLM's own words."""
        from huggingface_hub.errors import StrictDataclassError

        is_first = "vllm" not in sys.modules  # else an engine's log is kept already
        self.chat_template, self.default_kwargs = chat_template, default_chat_template_kwargs or {}
        try:
            with quiet():
                from vllm import AsyncEngineArgs
                from vllm.exceptions import VLLMValidationError
                from vllm.renderers import renderer_from_config
                from vllm.utils.mistral import is_mistral_tokenizer

                arguments = AsyncEngineArgs(
                    model=model, trust_remote_code=False, enforce_eager=True, speculative_config=speculative_config
                )
                self.config = arguments.create_engine_config()
                self.vllm_renderer = renderer_from_config(self.config)
                if is_first:  # only now: vLLM sets its level anew while it makes the configuration
                    logging.getLogger("vllm").setLevel(logging.ERROR)
        except (*BROKEN_FILES, ImportError, NotImplementedError, RuntimeError, StrictDataclassError) as error:
            raise LessonError(f"vLLM cannot use the model in {model}: {telling_line(error)}") from error
        self.model, self.model_config, self.tokenizer = model, self.config.model_config, self.vllm_renderer.tokenizer
        self.max_model_len = self.model_config.max_model_len
        self.model_config.max_model_len = 2**31 - 1  # what is longer is analysed all the same, and named
        self.refusal = VLLMValidationError
        self.vocabulary = self.model_config.get_vocab_size()
        self.is_mistral = is_mistral_tokenizer(self.tokenizer)
        if self.model_config.hf_config.model_type == "gpt_oss":
            raise LessonError(f"{model}: prompts of gpt-oss are written by openai-harmony, which is not replayed here")

    @cached_property
    def has_template(self) -> bool:
        """Say whether a chat template in Jinja writes the prompts; some models have a renderer of their own."""
        from vllm.renderers.hf import HfRenderer

        return isinstance(self.vllm_renderer, HfRenderer)

    @cached_property
    def writes_the_date(self) -> bool:
        from vllm.renderers.hf import resolve_chat_template

        if not self.has_template:
            return False
        templates = (
            resolve_chat_template(self.tokenizer, self.chat_template, tools, model_config=self.model_config)
            for tools in (None, [])
        )
        return any("strftime_now" in (template or "") for template in templates)

    # --- what vLLM's configuration says of this model's cache ---

    def check_rules(self) -> None:
        """Raise LessonError for a model whose cache follows other rules than whole blocks of one prefix."""
        shape = self.model_config
        layers = set(shape.hf_text_config.to_dict().get("layer_types") or ())
        others = layers - {"full_attention", "sliding_attention", "chunked_attention", "attention"}
        if shape.is_hybrid or shape.is_attention_free or others:
            raise LessonError(f"{self.model} has Mamba or linear attention layers: which of their states vLLM keeps "
                              "for a prefix is not predicted here")  # fmt: skip
        if getattr(shape.hf_text_config, "attention_chunk_size", None) or "chunked_attention" in layers:
            raise LessonError(f"{self.model} has chunked local attention: what vLLM keeps of it is not predicted here")
        if not self.config.cache_config.enable_prefix_caching:
            raise LessonError(f"vLLM has no prefix caching for {self.model} here: choose another --model")

    @property
    def window(self) -> int | None:
        """Return the tokens that the layers with a sliding window look back; None where there are none."""
        return self.model_config.get_sliding_window()

    @property
    def has_full_attention(self) -> bool:
        return "full_attention" in (self.model_config.hf_text_config.to_dict().get("layer_types") or ())

    @property
    def drops_last_block(self) -> bool:
        """Say whether speculative decoding lets vLLM compute the last block that was found once more."""
        speculative = self.config.speculative_config
        if speculative is None:
            return False
        drops = getattr(speculative, "use_eagle_block_drop", speculative.use_eagle)  # vLLM 0.26 has only the latter
        return drops()

    # --- rendering ---

    def prompt(self, record: Record) -> Prompt:
        """Return a request as the model gets it; CannotRender says why vLLM's server would not take it."""
        if without_text := media(record.body):  # vLLM would go and load it
            raise CannotRender(without_text)
        try:
            with no_warnings():
                return self.prompt_of(dataclasses.replace(record, body=copy.deepcopy(record.body)), record)
        except (*REFUSALS, self.refusal) as error:
            raise CannotRender(f"vLLM does not take it: {shown(reason(error))}") from error

    def prompt_of(self, asked: Record, record: Record) -> Prompt:
        """Render a request; vLLM's parsers write into its body, so `asked` is a copy of `record`."""
        body = asked.body
        if not all(isinstance(body.get(field), str | None) for field in ("model", "cache_salt")):
            raise CannotRender("a model or cache_salt that is no text")
        transferred = body.get("kv_transfer_params")
        if body.get("prompt_embeds") or (isinstance(transferred, dict) and transferred.get("prompt_token_ids")):
            raise CannotRender("it brings its prompt as embeddings, or with the KV of another server")
        if asked.api in ("tokens", "completions"):
            return self.completion(asked, record)
        request, messages, tools = self.chat(asked)
        check_cut(request)
        defaults = self.default_kwargs | {"tools": tools, "tokenize": self.is_mistral}
        params = request.build_chat_params(self.chat_template, "auto").with_defaults(defaults)
        conversation, rendered = self.vllm_renderer.render_messages(messages, params)
        variables = {}
        for name, value in params.chat_template_kwargs.items():
            is_usual = value is None or (name, value) == ("continue_final_message", False)
            if name not in ("tools", "tokenize", "add_generation_prompt") and not is_usual:
                variables[name] = value
        if getattr(request, "add_generation_prompt", True) is False:
            variables["add_generation_prompt"] = False
        text, ids, encoding = rendered.get("prompt"), rendered.get("prompt_token_ids"), None
        if ids is None:
            ids, encoding = self.encode(text, request.build_tok_params(self.model_config).add_special_tokens)
        if getattr(request, "truncation", None) == "auto" and len(ids) > self.max_model_len:
            raise CannotRender("truncation: auto cuts this prompt, which is not replayed here")
        # vLLM reads no cache where it is asked for the prompt's probabilities: they have to be computed.
        is_read = getattr(request, "prompt_logprobs", None) is None and not getattr(request, "echo", False)
        return Prompt(
            record,
            text or self.tokenizer.decode(ids),
            list(ids),
            conversation,
            tools,
            variables,
            (body.get("model"), getattr(request, "cache_salt", None)),
            is_read,
            self.unknown_fields(asked, request),
            encoding,
        )

    def unknown_fields(self, asked: Record, request: object) -> tuple[str, ...]:
        """Return the fields of a request that vLLM's class for it does not have."""
        if asked.api == "messages":
            from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

            extra = asked.body.keys() - AnthropicMessagesRequest.model_fields.keys()
        else:
            extra = (request.model_extra or {}).keys()
        return tuple(sorted(extra - ADDED_BY_LOGS))

    def chat(self, asked: Record) -> tuple[object, list, list[dict] | None]:
        """Return vLLM's request object of a chat, its messages, and its tools as the template gets them."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        if asked.api == "responses":
            return self.responses(asked.body)
        if asked.api == "messages":
            request = self.anthropic(asked.body)
        else:
            request = ChatCompletionRequest.model_validate(asked.body)
        if request.chat_template or (request.chat_template_kwargs or {}).get("chat_template"):
            raise CannotRender("it carries a chat template of its own, which vLLM's server refuses unless told")
        if self.is_mistral:
            from vllm.utils.mistral import mt

            mt.maybe_serialize_tool_calls(request), mt.truncate_tool_call_ids(request)
            mt.validate_request_params(request)
        tools = [tool.model_dump() for tool in request.tools] if request.tools is not None else None
        return request, request.messages, tools

    def responses(self, body: dict) -> tuple[object, list, list[dict] | None]:
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
        from vllm.entrypoints.openai.responses.utils import construct_input_messages, construct_tool_dicts

        request = ResponsesRequest.model_validate(body)
        if request.previous_response_id or request.prompt:
            raise CannotRender("it goes on from something that the server keeps (previous_response_id, prompt)")
        messages = construct_input_messages(request_instructions=request.instructions, request_input=request.input)
        return request, messages, construct_tool_dicts(request.tools, request.tool_choice)

    def anthropic(self, body: dict):
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
        from vllm.entrypoints.anthropic.serving import AnthropicServingMessages as Serving

        request = AnthropicMessagesRequest.model_validate({"model": "any", "max_tokens": 1, **body})
        if not hasattr(Serving, "to_chat_completion_request"):  # vLLM 0.26
            return Serving._convert_anthropic_to_openai_request(request, merge_inline_system=self.merges_system)
        thinking = getattr(request, "thinking", None)
        more = {}
        if thinking is not None and thinking.type == "disabled":
            more = {"disabled_thinking_effort": self.disabled_thinking_effort}
        return Serving.to_chat_completion_request(request, merge_inline_system=self.merges_system, **more)

    @cached_property
    def online_renderer(self):
        from vllm.renderers.online_renderer import OnlineRenderer

        return OnlineRenderer(
            self.model_config,
            self.vllm_renderer,
            request_logger=None,
            chat_template=self.chat_template,
            chat_template_content_format="auto",
            default_chat_template_kwargs=self.default_kwargs,
        )

    @cached_property
    def merges_system(self) -> bool:
        """Say whether vLLM's Anthropic endpoint merges later system messages into the first, for this template."""
        from vllm.entrypoints.anthropic.serving import AnthropicServingMessages as Serving

        if hasattr(Serving, "_should_merge_inline_system"):
            return Serving._should_merge_inline_system(self.online_renderer)
        return Serving._detect_merge_inline_system(self.chat_template)

    @cached_property
    def disabled_thinking_effort(self) -> str:
        """Return the reasoning effort that vLLM's Anthropic endpoint takes for thinking that is disabled."""
        from vllm.entrypoints.anthropic.serving import AnthropicServingMessages as Serving

        serving = object.__new__(Serving)  # without an engine; only its renderer is asked
        serving.online_renderer, serving.model_config = self.online_renderer, self.model_config
        with ThreadPoolExecutor(1) as thread:  # in this one a loop may be running
            return thread.submit(asyncio.run, serving._probe_disabled_thinking_effort()).result()

    def completion(self, asked: Record, record: Record) -> Prompt:
        """Render a completion, whose prompt is a text, or token ids; a text counts as one message."""
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        body = dict(asked.body)
        ids = body.pop("prompt_token_ids", None)
        request = CompletionRequest.model_validate({"model": "any", "prompt": "?", **body})  # vLLM wants one beside ids
        check_cut(request)
        salt = asked.body.get("model"), request.cache_salt
        is_read = request.prompt_logprobs is None and not (request.echo and request.logprobs is not None)
        more = dict(salt=salt, is_read=is_read, ignored=self.unknown_fields(asked, request))
        if ids is not None:
            if not all(type(token) is int and 0 <= token < self.vocabulary for token in ids):
                raise CannotRender("token ids that are no whole numbers, or beyond this model's vocabulary")
            return Prompt(record, None, ids, **more)
        if request.suffix is not None or not isinstance(request.prompt, str):
            raise CannotRender("a completion with a suffix, or without a text")
        special = request.build_tok_params(self.model_config).add_special_tokens
        ids, encoding = self.encode(request.prompt, special)
        messages = [{"role": "prompt", "content": request.prompt}]
        return Prompt(record, request.prompt, ids, messages, encoding=encoding, **more)

    def encode(self, text: str, special: bool = False) -> tuple[list[int], object]:
        """Return the token ids of a text, and what knows where they stand in it, which only a fast tokenizer has."""
        if not self.has_template or not self.tokenizer.is_fast:
            return self.tokenizer.encode(text, add_special_tokens=special), None
        encoded = self.tokenizer(
            text, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return encoded["input_ids"], encoded.encodings[0]

    def tokens(self, text: str) -> list[int]:
        return self.encode(text)[0]

    # --- where things stand in a prompt ---

    def write(self, prompt: Prompt, messages: list[dict], answer: bool = True) -> str:
        """Return other messages as the template writes them, with the tools and variables of `prompt`."""
        from vllm.renderers.hf import safe_apply_chat_template

        if not self.has_template:
            raise CannotRender("this model's prompts are not written by a template")
        more = {"add_generation_prompt": answer, **prompt.variables}
        try:
            with no_warnings():
                return safe_apply_chat_template(
                    self.model_config,
                    self.tokenizer,
                    messages,
                    tools=prompt.tools,
                    chat_template=self.chat_template,
                    tokenize=False,
                    **more,
                )
        except (*REFUSALS, self.refusal) as error:
            raise CannotRender(shown(telling_line(error))) from error

    def parsed(self, message: dict) -> dict:
        """Return one message as vLLM parses it; CannotRender where it would not take it."""
        asked = {"messages": [{"role": "user", "content": "?"}, message]}
        return self.prompt(Record(0, "chat", asked, {})).messages[-1]

    def spans(self, prompt: Prompt) -> list[Span]:
        """Return where the content of each message stands in a prompt; it is empty for one that is not written.

        A rendering with a mark for each content shows what the template writes between them.
        """
        if prompt.record.api == "completions":
            return [Span(0, len(prompt.text))]
        contents = [plain(message.get("content")) for message in prompt.messages]
        if not self.has_template:
            return spans_by_search(prompt.text, contents)
        marks = [f"<content {n}>" for n in range(len(contents))]
        marked = [with_content(m, mark) if text else m
                  for m, text, mark in zip(prompt.messages, contents, marks, strict=True)]  # fmt: skip
        try:
            rest = self.write(prompt, marked)
        except CannotRender:  # a template may look into the contents
            return spans_by_search(prompt.text, contents)
        spans, end = [], 0
        for content, mark in zip(contents, marks, strict=True):
            between, found, after = rest.partition(mark)
            if not found:
                spans.append(Span(end, end))
                continue
            start, rest = end + len(between), after
            if prompt.text.startswith(content, start):
                end = start + len(content)
            else:  # trimmed, or otherwise written anew: it ends where the template goes on
                end = max(start, prompt.text.find(re.split(r"<content \d+>", rest, maxsplit=1)[0], start))
            spans.append(Span(start, end))
        return spans


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Keep back what libraries log of single requests; what it means for the prompt is in the prompt."""
    was = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(was)


def check_cut(request: object) -> None:
    if getattr(request, "truncate_prompt_tokens", None) is not None:
        raise CannotRender("truncate_prompt_tokens cuts this prompt, which is not replayed here")


def reason(error: BaseException) -> str:
    """Return what is wrong with a request, with the field if pydantic names it."""
    faults = error.errors() if hasattr(error, "errors") else []
    if not faults:
        return telling_line(error)

    def says_little(fault: dict) -> tuple:
        """A message may be of several classes, and is wrong in each of them in another way."""
        last = [part for part in fault["loc"] if isinstance(part, str) and part[:1].islower()][-1:]
        is_missing = fault["type"] == "missing"
        return last != ["role"] or not is_missing, last != ["content"], not is_missing, len(fault["loc"])

    fault = min(faults, key=says_little)
    place = ".".join(str(part) for part in fault["loc"] if isinstance(part, int) or str(part)[:1].islower())
    return f"{place}: {fault['msg']}".removeprefix(": ")[:250]


def plain(content: str | list | None) -> str:
    """Return the text of a content; parts stand one after another."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content or ""


def with_content(message: dict, text: str) -> dict:
    """Return a message with another content, in the form that it had."""
    if isinstance(message["content"], list):
        return {**message, "content": [{"type": "text", "text": text}]}
    return {**message, "content": text}


def spans_by_search(text: str, contents: list[str]) -> list[Span]:
    """Return where contents stand in a text, each looked for behind the one before."""
    spans, end = [], 0
    for content in contents:
        start = text.find(content, end) if content else -1
        if start >= 0:
            end = start + len(content)
        spans.append(Span(start if start >= 0 else end, end))
    return spans


def written(value: object) -> str:
    """Return JSON as it was written: two objects that differ in the order of their keys are different prompts."""
    return json.dumps(value, default=str)
