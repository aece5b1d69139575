"""The shapes that entries of a log have: one small reader a shape, and the table of all of them at the end.

A reader gets one entry, a JSON object that is already decoded, and yields the requests in it. It checks no more than
it needs to find them: whether a body is right is for vLLM's own request classes to say.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from going_further.replay.records import Record, Usage


class Unfit(Exception):
    """An entry that cannot be replayed; the message is the reason, one line."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """How entries of one kind are told from others, and read."""

    description: str
    fits: Callable[[dict], bool]
    read: Callable[[dict, int], Iterator[Record]]  # of an entry and its line; raises Unfit


# --- values of any type ---


def one_line(text: object, length: int = 120) -> str:
    return " ".join(str(text).split())[:length]


def first(entry: dict, *names: str) -> object:
    """Return the first value that is there."""
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def as_json(value: object) -> object:
    """Return what a JSON text says: many logs hold JSON in a string. Anything else is returned as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def as_object(value: object) -> dict:
    value = as_json(value)
    return value if isinstance(value, dict) else {}


def objects(value: object) -> list[dict]:
    """Return the objects of a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def is_numbers(value: object) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int} and min(value) >= 0


def count(value: object) -> int | None:
    """Return a number of tokens; None for what is none: a text, true, a negative number, more than a billion."""
    if isinstance(value, float) and value.is_integer():  # as scripts in JavaScript and pandas write it
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10**9 else None


def seconds(value: object) -> float | None:
    """Return a time in seconds: ISO texts, and numbers since 1970 in seconds to nanoseconds, told by their size."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            try:
                moment = datetime.fromisoformat(value)
                return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
            except (ValueError, OverflowError):
                return None
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
    except OverflowError:  # an integer that is no float
        return None
    for least, unit in ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3)):
        if value >= least:
            return value / unit
    return float(value)


def time_of(*places: dict) -> float | None:
    names = ("timestamp", "created_at", "createdAt", "request_created_at", "startTime", "start_time", "created", "time")
    found = (seconds(place.get(name)) for place in places for name in names)
    return next((moment for moment in found if moment is not None), None)


# --- what a server said: usage and answer ---


def usage_of(*reports: object) -> Usage | None:
    """Return the usage that says most: of the first report with cached tokens, else of the first that says anything.

    Names are those of OpenAI's chat and Responses APIs, Anthropic's Messages API, and vLLM and LiteLLM, who use them.
    """
    found = []
    for report in filter(None, map(as_object, reports)):
        details = as_object(first(report, "prompt_tokens_details", "input_tokens_details"))
        prompt = count(first(report, "prompt_tokens", "input_tokens"))
        read, written = count(report.get("cache_read_input_tokens")), count(report.get("cache_creation_input_tokens"))
        if prompt is not None and "prompt_tokens" not in report and "input_tokens_details" not in report:
            prompt += (read or 0) + (written or 0)  # Anthropic counts as input only what no cache has to do with
        cached = count(details.get("cached_tokens"))
        usage = Usage(
            prompt, read if cached is None else cached, count(first(report, "completion_tokens", "output_tokens"))
        )
        if usage != Usage(None, None):
            found.append(usage)
    return next((usage for usage in found if usage.cached_tokens is not None), found[0] if found else None)


def call_of(name: object, arguments: object, call_id: object) -> dict:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}


def assistant(texts: list, reasoning: list, calls: list[dict]) -> dict:
    """Return an assistant message as OpenAI's chat API has it; what is not a text is left out."""
    texts, reasoning = ([text for text in part if isinstance(text, str)] for part in (texts, reasoning))
    message = {"role": "assistant", "content": "".join(texts) if texts else None}
    if reasoning:
        message["reasoning"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def of_anthropic(blocks: object) -> dict:
    texts, reasoning, calls = [], [], []
    for block in objects(blocks):
        match block.get("type"):
            case "text":
                texts.append(block.get("text"))
            case "thinking":
                reasoning.append(block.get("thinking"))
            case "tool_use":
                calls.append(call_of(block.get("name"), block.get("input"), block.get("id")))
    return assistant(texts, reasoning, calls)


def of_responses(items: object) -> dict:
    texts, reasoning, calls = [], [], []
    for item in objects(items):
        match item.get("type"):
            case "message":
                texts += [part.get("text") for part in objects(item.get("content"))]
            case "reasoning":
                reasoning += [part.get("text") for part in objects(item.get("content") or item.get("summary"))]
            case "function_call":
                calls.append(call_of(item.get("name"), item.get("arguments"), item.get("call_id")))
    return assistant(texts, reasoning, calls)


def answer_of(response: object) -> dict | None:
    """Return the message in a response of any API; None where there is none, or only the chunks of a stream."""
    response = as_object(response)
    response = as_object(response.get("body")) or response
    choice = next(iter(objects(response.get("choices"))), {})
    for message in (choice.get("message"), response.get("message")):  # the second one is Ollama's
        if isinstance(message, dict):
            return message
    if isinstance(choice.get("text"), str):
        return {"role": "assistant", "content": choice["text"]}
    if isinstance(response.get("output"), list):
        return of_responses(response["output"])
    if response.get("role") == "assistant":
        has_blocks = isinstance(response.get("content"), list) and "tool_calls" not in response
        return of_anthropic(response["content"]) if has_blocks else response
    return None


# --- bodies of requests ---

MEDIA = {
    "image_url": "an image", "input_image": "an image", "image": "an image", "image_pil": "an image",
    "image_embeds": "an image", "image-url": "an image",
    "input_audio": "audio", "audio_url": "audio", "audio": "audio", "audio_embeds": "audio", "audio-url": "audio",
    "video_url": "a video", "input_video": "a video", "video": "a video", "video-url": "a video",
    "file": "a file", "input_file": "a file", "blob": "a file", "uri": "a file", "binary": "a file",
    "document": "a document", "document-url": "a document",
}  # fmt: skip


def media_in(part: dict) -> str | None:
    """Return what a message or a part of one holds beside text, as a reason; parts may lie in parts."""
    kind = part.get("type")
    found = kind if isinstance(kind, str) and kind in MEDIA else None
    if found is None and ("type" not in part or "uuid" in part):  # vLLM takes {"image_url": ...} too
        found = next((name for name in MEDIA if name in part and part[name] not in (None, [])), None)
    if found:
        modality = {"image": "an image", "audio": "audio", "video": "a video"}.get(str(part.get("modality")))
        return f"{modality or MEDIA[found]}: only text can be replayed"
    inner = [*objects(part.get("content")), *objects(part.get("output"))]  # a tool's result is a list of parts
    return next(filter(None, map(media_in, inner)), None)


def media(body: dict) -> str | None:
    """Return the reason why a body is no text alone, None where it is: "an image: only text can be replayed"."""
    for field in ("system", "messages", "input"):
        for item in objects(body.get(field)):
            if item.get("images"):
                return "an image (Ollama's `images`): only text can be replayed"
            # A message is no part, whatever other fields it has.
            if reason := media_in({**item, "type": "message"} if "role" in item else item):
                return reason
    return None


NOT_GENERATION = ("embeddings", "audio", "images", "moderations", "rerank", "score", "classify", "pooling", "tokenize")


def api_of_url(url: object) -> str | None:
    """Return the API of an endpoint, "" where it generates no text, None where the URL does not tell."""
    words = url.split("?")[0].rstrip("/").split("/") if isinstance(url, str) else [""]
    if words[-1] == "completions":
        return "chat" if "chat" in words else "completions"
    if words[-1] in ("responses", "messages"):
        return words[-1]
    return "" if not set(words).isdisjoint(NOT_GENERATION) else None


def is_anthropic(body: dict) -> bool:
    """Say whether a body with `messages` is for the Messages API; what that one alone has comes first."""
    if isinstance(body.get("system"), str | list) or "anthropic_version" in body:
        return True
    if any("input_schema" in tool for tool in objects(body.get("tools"))):
        return True
    if any(message.get("role") not in ("user", "assistant") for message in body["messages"]):
        return False  # of OpenAI's API, which has roles system and tool
    kinds = [part.get("type") for message in body["messages"] for part in objects(message.get("content"))]
    if any(kind in ("tool_use", "tool_result", "thinking", "redacted_thinking") for kind in kinds):
        return True
    return "claude" in str(body.get("model")).lower() and "max_tokens" in body


def api_of_fields(body: dict) -> str | None:
    """Return the API that a body is for, None where it is no request."""
    if is_messages(body.get("messages")):
        return "messages" if is_anthropic(body) else "chat"
    prompt, ids = body.get("prompt"), body.get("prompt_token_ids")
    for numbers in (ids, prompt):
        if is_numbers(numbers) or (isinstance(numbers, list) and numbers and all(map(is_numbers, numbers))):
            return "tokens"
    if prompt and (isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(p, str) for p in prompt))):
        return "completions"
    given = body.get("input")
    if isinstance(given, str) and given and ("model" in body or "instructions" in body):
        return None if "encoding_format" in body else "responses"  # that one asks for an embedding
    if is_messages(given) and all("role" in item or "type" in item for item in given):
        return "responses"
    return None


def located(entry: dict) -> tuple[dict, object]:
    """Return the body of a request in an entry, and the URL that it went to: `params` is in Anthropic's batches."""
    for name in ("body", "params", "request"):
        body = as_object(entry.get(name))
        if api_of_fields(body):
            return body, first(entry, "url", "request_path")
    return entry, first(entry, "url", "request_path")


def api_of(body: dict, url: object = None) -> str | None:
    """Return the API of a body: fields tell it, and the URL where `messages` could be of two."""
    fields, told = api_of_fields(body), api_of_url(url)
    if told == "":
        return None
    both = ("chat", "messages")
    return told if fields in both and told in both else fields


def requests(api: str | None, body: dict, record: Record) -> Iterator[Record]:
    """Yield `record` with each request in a body: a list of prompts is one request each."""
    if api in ("chat", "messages") and not is_messages(body.get("messages")):
        raise Unfit("no list of messages")
    given = body.get("input")
    if api == "responses" and not (is_messages(given) or (isinstance(given, str) and given)):
        raise Unfit("no `input` of the Responses API")
    if reason := media(body):
        raise Unfit(reason)
    if api not in ("tokens", "completions"):
        yield dataclasses.replace(record, api=api, body=body)
        return
    name = "prompt_token_ids" if api == "tokens" else "prompt"
    given = first(body, "prompt_token_ids", "prompt") if api == "tokens" else body.get("prompt")
    fits = is_numbers if api == "tokens" else lambda text: isinstance(text, str)
    prompts = given if isinstance(given, list) and not fits(given) else [given]
    if not prompts or not all(map(fits, prompts)):
        raise Unfit("no token ids" if api == "tokens" else "no prompt that is a text")
    rest = {key: value for key, value in body.items() if key not in ("prompt", "prompt_token_ids")}
    for prompt in prompts:
        one = dataclasses.replace(record, api=api, body=rest | {name: prompt})
        yield one if len(prompts) == 1 else dataclasses.replace(one, usage=None, answer=None)  # they are of all


# --- bodies of the APIs, alone or beside their response ---


def read_body(api: str, entry: dict, line: int) -> Iterator[Record]:
    """Read the body of one API; where that is chat the URL may name another, as in OpenAI's batches."""
    body, url = located(entry)
    response = as_object(first(entry, "response", "response_body"))
    inner = as_object(response.get("body")) or response
    usage = usage_of(inner.get("usage"), entry.get("usage"), body.get("usage"))
    record = Record(line, api, body, entry, usage, answer_of(inner), time_of(entry, inner))
    if api == "chat" and api_of_url(url):
        api = api_of(body, url) or api
    yield from requests(api, body, record)


def of_api(api: str) -> Callable[[dict], bool]:
    return lambda entry: api_of(*located(entry)) == api


def is_ollama(entry: dict) -> bool:
    body, _ = located(entry)
    messages = objects(body.get("messages"))
    own = isinstance(body.get("options"), dict) or "keep_alive" in body or any("images" in m for m in messages)
    return is_messages(body.get("messages")) and own


def is_batch_output(entry: dict) -> bool:
    has_result = any(name in entry for name in ("response", "error", "result"))
    return "custom_id" in entry and has_result and api_of(*located(entry)) is None


def read_batch_output(entry: dict, line: int) -> Iterator[Record]:
    raise Unfit("a batch's output (openai-batch-output), which holds no requests: give the batch's input file instead")


# --- logs of gateways and of observability tools ---

# Of a model's parameters, these are in the prompt; others, which tools write in types of their own, do not matter.
OF_PROMPT = (
    "tools", "functions", "tool_choice", "documents", "chat_template", "chat_template_kwargs", "reasoning_effort",
    "add_generation_prompt", "continue_final_message", "system", "instructions", "thinking", "cache_salt",
)  # fmt: skip


def of_prompt(parameters: object) -> dict:
    parameters = as_object(parameters)
    parameters = parameters | as_object(parameters.get("extra_body"))
    return {name: parameters[name] for name in OF_PROMPT if parameters.get(name) is not None}


def is_litellm(entry: dict) -> bool:
    own = ("model_parameters", "proxy_server_request", "startTime", "metadata", "request_id", "response_cost")
    return isinstance(entry.get("call_type"), str) and any(name in entry for name in own)


def is_cut_by_litellm(body: dict) -> bool:
    """Say whether a text in a body is not whole: spend rows hold long ones shortened, and redacted ones as a word."""
    texts = [body.get("prompt"), body.get("system")]
    for message in [*objects(body.get("messages")), *objects(body.get("input"))]:
        texts += [message.get("content"), *(part.get("text") for part in objects(message.get("content")))]
    cut = [text for text in texts if isinstance(text, str)]
    return any("(litellm_truncated " in text or text == "redacted-by-litellm" for text in cut)


def read_litellm(entry: dict, line: int) -> Iterator[Record]:
    """Read a StandardLoggingPayload (docs.litellm.ai/docs/proxy/logging_spec) or a row of LiteLLM_SpendLogs."""
    sent = as_object(entry.get("proxy_server_request"))
    sent = as_object(sent.get("body")) or sent
    messages, kind = as_json(entry.get("messages")), str(entry.get("call_type"))
    if any(word in kind for word in ("embedding", "image", "moderation", "speech", "transcription", "rerank")):
        raise Unfit(f"call type {one_line(kind, 40)}, which generates no text")
    if api_of_fields(sent):
        body = sent
    elif "text_completion" in kind:
        raise Unfit("a text completion without the prompt as it was sent")
    else:
        messages = messages.get("messages") if isinstance(messages, dict) else messages
        field = "input" if "responses" in kind else "messages"
        body = {"model": entry.get("model"), **of_prompt(entry.get("model_parameters")), field: messages}
    api = "messages" if "anthropic_messages" in kind and is_messages(body.get("messages")) else api_of_fields(body)
    if api is None:
        raise Unfit("no messages in this entry of LiteLLM's: does it store prompts?")
    if is_cut_by_litellm(body):
        raise Unfit("LiteLLM has cut or redacted this request's texts")
    response, metadata = as_object(entry.get("response")), as_object(entry.get("metadata"))
    more = as_object(metadata.get("additional_usage_values"))
    counted = {name: entry.get(name) for name in ("prompt_tokens", "completion_tokens")}
    usage = usage_of(metadata.get("usage_object"), response.get("usage"), counted | more)
    yield from requests(api, body, Record(line, api, body, entry, usage, answer_of(response), time_of(entry)))


LANGFUSE_TYPES = (
    "GENERATION", "SPAN", "EVENT", "AGENT", "TOOL", "CHAIN", "RETRIEVER", "EVALUATOR", "EMBEDDING", "GUARDRAIL"
)  # fmt: skip


def is_langfuse(entry: dict) -> bool:
    own = any(name in entry for name in ("traceId", "trace_id", "input", "usageDetails", "modelParameters"))
    return entry.get("type") in LANGFUSE_TYPES and own


def usage_of_langfuse(report: object) -> Usage | None:
    """Langfuse takes what has a name of its own, like input_cached_tokens, from `input`: all of them are the prompt."""
    report = as_object(report)
    if "input" not in report:
        return usage_of(report)
    inputs = {name: count(value) or 0 for name, value in report.items() if "input" in name}
    cached = next((inputs[name] for name in inputs if "cached" in name or "cache_read" in name), None)
    return Usage(None if count(report["input"]) is None else sum(inputs.values()), cached, count(report.get("output")))


def read_langfuse(entry: dict, line: int) -> Iterator[Record]:
    if entry.get("type") != "GENERATION":
        raise Unfit(f"Langfuse's observation of type {one_line(entry.get('type'), 20)}: only a GENERATION has a prompt")
    given, output = as_json(entry.get("input")), as_json(entry.get("output"))
    given = {"messages": given} if isinstance(given, list) else as_object(given)
    body = {"model": entry.get("model"), **of_prompt(first(entry, "modelParameters", "model_parameters")), **given}
    api = api_of_fields(body)
    if api is None:
        raise Unfit("no list of messages in the input of this generation")
    reports = map(usage_of_langfuse, (first(entry, "usageDetails", "usage_details"), entry.get("usage")))
    answer = {"role": "assistant", "content": output} if isinstance(output, str) else answer_of(output)
    usage = next(filter(None, reports), None)
    yield from requests(api, body, Record(line, api, body, entry, usage, answer, time_of(entry)))


def is_helicone(entry: dict) -> bool:
    return "request_body" in entry or "body" in as_object(entry.get("request"))


def read_helicone(entry: dict, line: int) -> Iterator[Record]:
    request, response = as_object(entry.get("request")), as_object(entry.get("response"))
    body = as_object(first(entry, "request_body")) or as_object(request.get("body"))
    answer = as_object(first(entry, "response_body")) or as_object(response.get("body"))
    api = api_of(body, first(entry, "request_path", "url") or first(request, "path", "url"))
    if not api:
        raise Unfit("no request in the body of this entry")
    counted = {"prompt_tokens": entry.get("prompt_tokens"), "completion_tokens": entry.get("completion_tokens")}
    counted["cache_read_input_tokens"] = entry.get("prompt_cache_read_tokens")
    usage = usage_of(answer.get("usage"), counted)
    yield from requests(api, body, Record(line, api, body, entry, usage, answer_of(answer), time_of(entry, request)))


# --- OpenTelemetry's conventions for generative AI ---


def plain(value: object) -> object:
    """Return a value of OTLP's JSON as an ordinary one; {"intValue": "7"} is 7."""
    match value:
        case {"stringValue": text} | {"doubleValue": text} | {"boolValue": text}:
            return text
        case {"intValue": number}:
            return int(number) if isinstance(number, str) and number.isdecimal() and len(number) < 20 else number
        case {"arrayValue": array}:
            return [plain(item) for item in objects(as_object(array).get("values"))]
        case {"kvlistValue": pairs}:
            return attributes_of(as_object(pairs).get("values"))
    return value


def attributes_of(value: object) -> dict:
    if isinstance(value, dict):
        return value
    return {str(pair.get("key")): plain(pair.get("value")) for pair in objects(value)}


def is_otel(entry: dict) -> bool:
    names = ("spanId", "span_id", "traceId", "trace_id", "context", "startTimeUnixNano", "start_time", "kind")
    is_span = isinstance(entry.get("attributes"), dict | list) and any(name in entry for name in names)
    return is_span or any(name.startswith("gen_ai.") for name in [*entry, *attributes_of(entry.get("attributes"))])


def of_parts(message: dict) -> Iterator[dict]:
    """Yield the chat messages that a message of `gen_ai.input.messages` stands for; results of tools are their own."""
    if not isinstance(message.get("parts"), list):
        yield message
        return
    role, texts, reasoning, calls, results = message.get("role"), [], [], [], []
    for part in objects(message["parts"]):
        match part.get("type"):
            case "text":
                texts.append(part.get("content"))
            case "reasoning" | "thinking":
                reasoning.append(part.get("content"))
            case "tool_call":
                calls.append(call_of(part.get("name"), part.get("arguments"), part.get("id")))
            case "tool_call_response":
                result = first(part, "response", "result")
                text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
                results.append({"role": "tool", "tool_call_id": part.get("id"), "content": text})
            case kind:
                raise Unfit(media_in(part) or f"a message part of type {one_line(kind, 40)}")
    yield from results
    if role == "assistant":
        yield assistant(texts, reasoning, calls)
    elif texts:
        several = [{"type": "text", "text": text} for text in texts]
        yield {"role": role, "content": texts[0] if len(texts) == 1 else several}


def numbered(attributes: dict, prefix: str) -> list[dict]:
    """Return what attributes like `gen_ai.prompt.0.role` hold, as a list of {"role": ...}."""
    found: dict[int, dict] = {}
    for name, value in attributes.items():
        number, _, field = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdecimal() and len(number) < 7 and field:
            found.setdefault(int(number), {})[field] = value
    return [found[number] for number in sorted(found)]


def of_numbered(fields: dict) -> dict:
    message = {name: value for name, value in fields.items() if "." not in name and name != "finish_reason"}
    message["content"] = as_json(content) if str(content := fields.get("content")).startswith('[{"type') else content
    if calls := numbered(fields, "tool_calls."):
        message["tool_calls"] = [call_of(call.get("name"), call.get("arguments"), call.get("id")) for call in calls]
    return message


def wrapped(tools: list[dict]) -> list[dict]:
    """Return tools as OpenAI's chat API has them, with the function under its name; some logs hold functions alone."""
    found = []
    for tool in tools:
        function = {name: value for name, value in tool.items() if name != "type"}
        if "parameters" in function:
            function["parameters"] = as_json(function["parameters"])
        found.append(tool if "function" in tool else {"type": "function", "function": function})
    return found


def tools_of(attributes: dict) -> list[dict]:
    """Return the tools of a span, from the attribute of today or the older ones."""
    tools = objects(as_json(attributes.get("gen_ai.tool.definitions")))
    return wrapped(tools or numbered(attributes, "llm.request.functions."))


def read_otel(entry: dict, line: int) -> Iterator[Record]:
    """Read a span; the names are of OpenTelemetry's registry, and older ones that are still written."""
    attributes = attributes_of(entry.get("attributes")) or entry
    for event in objects(entry.get("events")):  # newer instrumentations put the messages there
        more = attributes_of(event.get("attributes"))
        attributes = attributes | {name: value for name, value in more.items() if name.startswith("gen_ai.")}
    messages = []
    system = as_json(attributes.get("gen_ai.system_instructions"))
    if system:
        parts = system if isinstance(system, list) else [system]
        parts = [part if isinstance(part, dict) else {"type": "text", "content": part} for part in parts]
        messages += of_parts({"role": "system", "parts": parts})
    for message in objects(as_json(attributes.get("gen_ai.input.messages"))):
        messages += of_parts(message)
    answers = objects(as_json(attributes.get("gen_ai.output.messages")))
    answer = None
    with contextlib.suppress(Unfit):  # an image in an answer does not matter to its request
        answer = next((reply for message in answers[:1] for reply in of_parts(message)), None)
    if not messages:
        messages = [of_numbered(fields) for fields in numbered(attributes, "gen_ai.prompt.")]
        answer = answer or next(map(of_numbered, numbered(attributes, "gen_ai.completion.")), None)
    if not messages:
        raise Unfit("no GenAI prompt in this span")
    tokens = {name.removeprefix("gen_ai.usage."): value for name, value in attributes.items()}
    cached = first(tokens, "cache_read.input_tokens", "cache_read_input_tokens", "input_tokens.cached",
                   "prompt_tokens_details.cached_tokens", "details.cache_read_tokens")  # fmt: skip
    usage = Usage(
        count(first(tokens, "input_tokens", "prompt_tokens")),
        count(cached),
        count(first(tokens, "output_tokens", "completion_tokens")),
    )
    body = {"model": attributes.get("gen_ai.request.model"), "messages": messages}
    if tools := tools_of(attributes):
        body["tools"] = tools
    begun = seconds(first(entry, "startTimeUnixNano", "start_time_unix_nano"))
    begun = time_of(entry) if begun is None else begun
    entry = {**entry, "attributes": attributes} if attributes is not entry else entry
    record = Record(line, "chat", body, entry, None if usage == Usage(None, None) else usage, answer, begun)
    yield from requests("chat", body, record)


# --- data sets and traces ---

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "function_call": "assistant", "system": "system", "tool": "tool",
    "function": "tool", "function_response": "tool", "observation": "tool",
}  # fmt: skip


def is_sharegpt(entry: dict) -> bool:
    turns = entry.get("conversations")
    return is_messages(turns) and all("from" in turn or "role" in turn for turn in turns)


def read_sharegpt(entry: dict, line: int) -> Iterator[Record]:
    """Read a conversation: every turn of the assistant was one request, with the turns before it."""
    messages, asked = [], False
    if isinstance(entry.get("system"), str) and entry["system"]:
        messages.append({"role": "system", "content": entry["system"]})
    more = {"tools": wrapped(tools)} if (tools := objects(as_json(entry.get("tools")))) else {}
    if not is_sharegpt(entry):
        raise Unfit("no `conversations` of {from, value}")
    for n, turn in enumerate(entry["conversations"]):
        name, value = first(turn, "from", "role"), first(turn, "value", "content")
        role = SHAREGPT_ROLES.get(str(name))
        if role is None or not isinstance(value, str):
            raise Unfit(f"a turn from {one_line(name, 40)} that is no text of user, assistant, system or tool")
        message = {"role": role, "content": value}
        if name == "function_call":
            call = as_object(value)
            message = assistant([], [], [call_of(call.get("name"), call.get("arguments"), f"call_{n}")])
        if role == "tool":
            message["tool_call_id"] = f"call_{n - 1}"
        # A greeting, with no turn or only the system's before it, has answered nothing.
        if role == "assistant" and any(message["role"] != "system" for message in messages):
            asked = True
            body = {"messages": list(messages), **more}
            yield Record(line, "chat", body, entry, answer=message)
        messages.append(message)
    if not asked:
        raise Unfit("a conversation without an answer of the assistant")


def read_blocks(block_size: int, unit: float, entry: dict, line: int) -> Iterator[Record]:
    """Read a request of a trace without texts. `unit` is how many of its time stamps are a second."""
    blocks, tokens = entry.get("hash_ids"), count(entry.get("input_length"))
    if not is_numbers(blocks) or not tokens:
        raise Unfit("no `hash_ids` and `input_length`")
    if len(blocks) not in (tokens // block_size, -(-tokens // block_size)):
        raise Unfit(f"{len(blocks):,} blocks of {block_size} tokens are not {one_line(tokens, 20)} tokens")
    body = {"hash_ids": blocks, "block_size": block_size, "input_length": tokens}
    begun = entry.get("timestamp")
    begun = begun / unit if isinstance(begun, int | float) and seconds(begun) is not None else None
    usage = Usage(tokens, None, count(entry.get("output_length")))
    yield Record(line, "blocks", body, entry, usage, time=begun)


def is_bailian(entry: dict) -> bool:
    return isinstance(entry.get("hash_ids"), list) and ("chat_id" in entry or "parent_chat_id" in entry)


# --- all shapes ---


def body_shape(api: str, description: str) -> Shape:
    return Shape(description, of_api(api), functools.partial(read_body, api))


# Recognition goes from the top: first what has names that nothing else has, last the bodies, told by a field or two.
# Langfuse stands before Responses, since its `input` looks alike; Anthropic and Ollama before OpenAI, since all three
# have `messages`.
SHAPES = {
    "otel": Shape("spans of OpenTelemetry with gen_ai attributes (OTLP JSON or flat)", is_otel, read_otel),
    "langfuse": Shape("observations exported from Langfuse", is_langfuse, read_langfuse),
    "litellm": Shape("LiteLLM's standard logging payload, or rows of its spend logs", is_litellm, read_litellm),
    "helicone": Shape("requests exported from Helicone", is_helicone, read_helicone),
    # 16 tokens a block: README of github.com/alibaba-edu/qwen-bailian-usagetraces-anon; time stamps are seconds.
    "bailian": Shape("Alibaba's Qwen-Bailian traces: hashes of blocks of 16 tokens", is_bailian,
                     functools.partial(read_blocks, 16, 1)),
    # 512 tokens a block: arXiv 2407.00079, section 4; in milliseconds: github.com/kvcache-ai/Mooncake, FAST25-release.
    "mooncake": Shape("Mooncake's traces: hashes of blocks of 512 tokens",
                      lambda entry: isinstance(entry.get("hash_ids"), list), functools.partial(read_blocks, 512, 1000)),
    "sharegpt": Shape("conversations of {from, value}: a request for every answer", is_sharegpt, read_sharegpt),
    "openai-batch-output": Shape("the output of a batch, which holds no requests: it is refused",
                                 is_batch_output, read_batch_output),
    "tokens": body_shape("tokens", "`prompt_token_ids`, or a `prompt` of token ids"),
    "anthropic": body_shape("messages", "requests of Anthropic's Messages API"),
    "ollama": Shape("requests of Ollama's chat API", is_ollama, functools.partial(read_body, "chat")),
    "openai": body_shape("chat", "chat requests, alone, in batch input, or beside their response"),
    "completions": body_shape("completions", "a `prompt` of text, or several"),
    "responses": body_shape("responses", "requests of OpenAI's Responses API"),
    # Lines of text: readers.py finds the requests in them, which are of any shape above.
    "vllm-log": Shape("vLLM's own log, written with --enable-log-requests and level DEBUG",
                      lambda entry: False, lambda entry, line: read_entry(entry, line)),
}  # fmt: skip


def read_entry(entry: dict, line: int, shape: str | None = None) -> Iterator[Record]:
    """Yield the requests of an entry, of the shape that its fields tell or of the given one; Unfit where none are."""
    name = shape or next((name for name, shape in SHAPES.items() if shape.fits(entry)), None)
    if name:
        yield from SHAPES[name].read(entry, line)
    elif entry.get("error"):
        error = entry["error"]
        raise Unfit(f"an error record: {one_line(error.get('message') if isinstance(error, dict) else error)}")
    else:
        raise Unfit(f"no known shape; its fields: {one_line(', '.join(entry) or 'none')}")
