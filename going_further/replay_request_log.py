"""Replay a log of chat requests and see where each one stopped matching the cache.

    python -m going_further.replay_request_log FILE
    python -m going_further.replay_request_log FILE --without-engine

FILE holds one JSON object a line with `messages` and perhaps `tools`, as clients of OpenAI-compatible servers log
them (also under `body`, as in batch files). The prompts are rendered like vLLM's server does it, with
`chat_template_kwargs`, `documents` and `reasoning_effort`, and sent one at a time, in their order. For every request:
prompt tokens, cached tokens as predicted and as measured, TTFT, and its best predecessor: the latest request that
shares the most blocks. Where the rendered prompt departs from that one is told by message, role, and field if it is in
JSON. Last, what each kind of break has cost.

--without-engine does all but sending, with the cache model alone, and needs no vLLM: for large logs. Time is linear
in tokens. Memory is bounded: the hashes of a million blocks (the least recently used are forgotten, as in a cache of
that size) and the token ids of the latest 64 requests; older predecessors are read from the file again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import re
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from going_further.common import (
    BROKEN_FILES,
    HERE,
    OUTPUT_TOKENS,
    CacheModel,
    LessonError,
    Run,
    UsageError,
    at_least,
    common_prefix,
    engine_parser,
    find_model,
    import_transformers,
    milliseconds,
    price,
    render,
    run_command,
    run_lesson,
    shown,
    telling_line,
    use_python_with_vllm,
    write_json,
)

BLOCKS_KNOWN = 1_000_000
REQUESTS_KEPT = 64
HEADS_COMPARED = 8  # where not even a block matches, so many latest requests are tried as predecessors
ROWS_SHOWN = 200
# What rendering itself takes; vLLM's server refuses or drops these.
RESERVED = {"self", "tokenizer", "messages", "conversation", "tools", "tokenize", "return_dict", "return_tensors"}


@dataclasses.dataclass(frozen=True)
class Request:
    """One line of the log, ready for a chat template."""

    line: int
    offset: int  # bytes from the start of the file
    messages: list[dict]
    tools: list[dict] | None
    variables: dict  # further ones of the template


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A request as the model gets it."""

    request: Request
    text: str
    ids: list[int]


class Span(NamedTuple):
    """Where a text stands in a longer one, in characters."""

    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found out about one request; token counts."""

    line: int
    prompt_tokens: int
    predicted_cached_tokens: int
    predecessor: int | None  # its line
    kind: str
    where: str  # message, role, field
    token: int  # the first different one
    before: str  # the texts around it
    after: str
    lost_tokens: int  # in whole blocks that the predecessor had computed and this request could not use


# --- reading ---


def check_content(content: object, line: int) -> None:
    """Raise UsageError for content that is neither text nor a list of text parts."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise UsageError(f"line {line}: a message's content is of type {type(content).__name__}, not text")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UsageError(f"line {line}: a content part of type {kind!r}; only text can be replayed")


def message_of(message: object, line: int) -> dict:
    """Return a message as a server hands it to the template: tool call arguments are objects."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UsageError(f"line {line}: a message without a role")
    calls = message.get("tool_calls") or []
    if message.get("content") is None and not calls:
        raise UsageError(f"line {line}: a message of {message['role']} without content")
    check_content(message.get("content"), line)
    clean = {"content": None, **message}
    if not calls:
        clean.pop("tool_calls", None)
        return clean
    try:
        functions = [dict(call["function"]) for call in calls]
        for function in functions:
            if isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"] or "{}")
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise UsageError(f"line {line}: a tool call without function name and JSON arguments") from error
    return clean | {"tool_calls": [{**call, "function": f} for call, f in zip(calls, functions, strict=True)]}


def variables_of(body: dict, line: int) -> dict:
    """Return what a request gives the template beside messages and tools, as vLLM's server passes it on."""
    variables = body.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise UsageError(f"line {line}: chat_template_kwargs are no object")
    for name in sorted(RESERVED & variables.keys()):
        raise UsageError(
            f"line {line}: chat_template_kwargs must not hold {name!r}, which is no variable of a template"
        )
    for name, usual in {"chat_template": None, "add_generation_prompt": True, "continue_final_message": False}.items():
        if any(given.get(name, usual) != usual for given in (body, variables)):
            raise UsageError(f"line {line}: {name} asks for another prompt than the one that is rendered here")
    named = {name: body[name] for name in ("documents", "reasoning_effort") if body.get(name) is not None}
    if "reasoning_effort" in named:
        named = {"enable_thinking": named["reasoning_effort"] != "none", **variables, **named}
    return variables | named


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and infinities, which are no JSON though Python reads them."""
    raise ValueError(f"{name} is no number of JSON")


def parse_line(raw: bytes, line: int, offset: int) -> Request:
    """Return the request in one line of the log; UsageError names the line and what is wrong with it."""
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of 5,000 digits
        raise UsageError(f"line {line}: no JSON: {error}") from error
    if rb"\ud" in raw.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"line {line}: a text with half of a surrogate pair, which is no character") from error
    if isinstance(value, dict) and isinstance(value.get("body"), dict):
        value = value["body"]
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list) or not value["messages"]:
        raise UsageError(f"line {line}: no object with a list of messages")
    tools = value.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UsageError(f"line {line}: tools are no list of objects")
    messages = [message_of(message, line) for message in value["messages"]]
    return Request(line, offset, messages, tools, variables_of(value, line))


def read_log(path: Path, limit: int | None) -> Iterator[Request]:
    """Yield the requests of a log, blank lines left out; raise UsageError for what is no log."""
    offset = found = 0
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no regular file: the log is read more than once")
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield parse_line(raw, number, offset)
                    found += 1
                    if found == limit:
                        return
                offset += len(raw)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if found == 0:
        raise UsageError(f"{path} holds no request")


# --- comparing ---


def json_around(text: str, at: int) -> tuple[int, object] | None:
    """Return where the outermost JSON object or array around character `at` starts, and its value."""
    decoder, start = json.JSONDecoder(), 0
    while (match := re.compile(r"[{\[]").search(text, start)) and match.start() <= at:
        try:
            value, end = decoder.raw_decode(text, match.start())
        except (json.JSONDecodeError, RecursionError):
            start = match.end()
            continue
        if at < end:
            return match.start(), value
        start = end
    return None


def written(value: object) -> str:
    """Return JSON as it was written: two objects that differ in the order of their keys are different prompts."""
    return json.dumps(value)


def first_difference(a: object, b: object, path: str = "") -> str:
    """Return the path of the first field in which two JSON values are written differently."""
    if isinstance(a, dict) and isinstance(b, dict):
        changed = [key for key in [*b, *a] if key not in a or key not in b or written(a[key]) != written(b[key])]
        if not changed:
            return f"{path} (order of keys)"
        return first_difference(a.get(changed[0]), b.get(changed[0]), f"{path}.{changed[0]}")
    if isinstance(a, list) and isinstance(b, list):
        pairs = enumerate(itertools.zip_longest(a, b))
        at, (x, y) = next((at, pair) for at, pair in pairs if written(pair[0]) != written(pair[1]))
        return first_difference(x, y, f"{path}[{at}]")
    return path


def json_field(before: str, after: str, old: Span, new: Span, char: int) -> str:
    """Return the path of the JSON field of a content in which two texts first differ, "" where that is not in JSON."""
    in_old = json_around(before[old.start : old.end], char - old.start)
    in_new = json_around(after[new.start : new.end], char - new.start)
    if in_old is None or in_new is None:
        return ""
    (old_place, old_value), (new_place, new_value) = in_old, in_new
    if old_place != new_place or written(old_value) == written(new_value):
        return ""
    return f" field {first_difference(old_value, new_value)}"


def heading(message: dict) -> str:
    """Return what templates write of a message beside its content; ids of tool calls and the like are left out."""
    return written([message["role"], [call["function"] for call in message.get("tool_calls", ())]])


def changed_message(a: list[dict], b: list[dict], at: int, field: str) -> tuple[str, str]:
    """Return the kind of a break in message `at`, which both conversations have, and where it is."""
    texts, others = ([heading(message) + written(message["content"]) for message in messages] for messages in (a, b))
    where = f"message {at} ({b[at]['role']})"
    if written(a[at]) == written(b[at]):
        return "template", f"{where} is written anew by the chat template"
    if texts[at] != others[at] and texts[at] in others[at + 1 :]:
        return "message inserted", where
    if texts[at] != others[at] and others[at] in texts[at + 1 :]:
        return "message removed", f"message {at} ({a[at]['role']})"
    if a[at]["role"] != b[at]["role"]:
        return "message inserted", where
    return f"{b[at]['role']} message changed", where + field


def describe(before: Prompt, after: Prompt, spans: Callable[[Prompt], list[Span]]) -> tuple[str, str]:
    """Return the kind of break between two prompts, and where it is: message number, role, field.

    The rendered texts decide: what the template does not write breaks nothing. `spans` finds the contents in them.
    """
    if before.ids == after.ids:
        return "same prompt", ""
    a, b = before.request.messages, after.request.messages
    if len(a) < len(b) and after.text.startswith(before.text):
        return "extended", ""
    char, old, new = common_prefix(before.text, after.text), spans(before), spans(after)
    at = min(sum(span.end <= char for span in found) for found in (old, new))  # so many contents are the same
    both = min(len(a), len(b))
    if at < both and max(old[at].start, new[at].start) <= char:
        return changed_message(a, b, at, json_field(before.text, after.text, old[at], new[at], char))
    # It is between two contents: in the tools, in a message's role or tool calls, or in what the template adds.
    for name, x, y in (
        ("tools", before.request.tools, after.request.tools),
        ("template variables", before.request.variables, after.request.variables),
    ):
        if written(x) != written(y):
            return f"{name} changed", f"{name}{first_difference(x, y)}"
    last = max((n for n, span in enumerate(new[:at]) if span.start < span.end), default=0)
    near = range(last, min(at + 1, both))
    at = next((n for n in near if heading(a[n]) != heading(b[n])), at)
    if at < both:
        at = next((n for n in near if written(a[n]) != written(b[n])), at)
        field = next((key for key in [*b[at], *a[at]] if written(a[at].get(key)) != written(b[at].get(key))), "")
        return changed_message(a, b, at, f" {field}")
    head_of_answer = len(before.ids) - common_prefix(before.ids, after.ids) <= OUTPUT_TOKENS
    if len(a) == len(b) or (at == len(a) and not head_of_answer):
        return "template", "the end of the prompt is written anew by the chat template"
    return ("extended", "") if at == len(a) else ("shortened", f"message {at} was left out")


def plain(content: str | list[dict] | None) -> str | None:
    """Return a content as text: its parts on lines of their own, as vLLM joins them."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content


def takes_parts(tokenizer) -> bool:
    """Say whether a chat template reads content as a list of parts; where it does not, vLLM's server joins them."""
    parts = [{"type": "text", "text": word} for word in ("one", "two")]
    try:
        text = render(tokenizer, [{"role": "user", "content": parts}])
    except LessonError:
        return False
    return "one" in text and "two" in text and "type" not in text


class Comparer:
    """Finds for each request of a log what the cache model holds of it, and its best predecessor."""

    def __init__(self, path: Path, tokenizer, block_size: int) -> None:
        self.path, self.tokenizer, self.block_size = path, tokenizer, block_size
        self.takes_parts = takes_parts(tokenizer)
        self.chain = CacheModel(block_size).chain
        self.owners: OrderedDict[int, tuple[int, int]] = OrderedDict()  # block -> line and offset of its latest request
        self.recent: OrderedDict[int, Prompt] = OrderedDict()  # by line
        self.heads: deque[tuple[int, int]] = deque(maxlen=HEADS_COMPARED)

    def render(self, request: Request, messages: list[dict], answer: bool = True) -> str:
        if not self.takes_parts:
            messages = [{**message, "content": plain(message["content"])} for message in messages]
        try:
            return render(self.tokenizer, messages, answer, tools=request.tools, **request.variables)
        except LessonError as error:
            raise LessonError(f"line {request.line}: {error}") from error

    def encode(self, request: Request) -> Prompt:
        text = self.render(request, request.messages)
        return Prompt(request, text, self.tokenizer.encode(text, add_special_tokens=False))

    def spans(self, prompt: Prompt) -> list[Span]:
        """Return where the content of each message stands in a prompt; it is empty for one that is not written.

        A rendering with a mark for each content shows what the template writes between them.
        """
        messages, spans, end = prompt.request.messages, [], 0
        marks = [f"<content {n}>" for n in range(len(messages))]
        marked = [{**m, "content": mark} if m["content"] else m for m, mark in zip(messages, marks, strict=True)]
        rest = self.render(prompt.request, marked)
        for message, mark in zip(messages, marks, strict=True):
            between, found, after = rest.partition(mark)
            if found:
                start, content, rest = end + len(between), plain(message["content"]), after
                if prompt.text.startswith(content, start):
                    end = start + len(content)
                else:  # trimmed, or otherwise written anew: it ends where the template goes on
                    end = max(start, prompt.text.find(re.split(r"<content \d+>", rest, maxsplit=1)[0], start))
                spans.append(Span(start, end))
            else:
                spans.append(Span(end, end))
        return spans

    def recall(self, line: int, offset: int) -> Prompt:
        """Return an earlier prompt, from memory or from the file."""
        if line in self.recent:
            return self.recent[line]
        with self.path.open("rb") as file:
            file.seek(offset)
            return self.encode(parse_line(file.readline(), line, offset))

    def add(self, prompt: Prompt) -> Row:
        """Return what is to be said of the next request of the log, and remember it."""
        request, ids = prompt.request, prompt.ids
        blocks = list(self.chain(ids))
        usable = (len(ids) - 1) // self.block_size
        known = sum(1 for _ in itertools.takewhile(self.owners.__contains__, blocks[:usable]))
        candidates = [self.owners[blocks[known - 1]]] if known else list(self.heads)
        earlier = [self.recall(*candidate) for candidate in candidates]
        best = max(earlier, key=lambda other: (common_prefix(other.ids, ids), other.request.line), default=None)
        row = self.compare(prompt, known * self.block_size, best)
        for block in reversed(blocks):  # so that the last block of a prompt is the first to be forgotten, as in vLLM
            self.owners[block] = request.line, request.offset
            self.owners.move_to_end(block)
        while len(self.owners) > BLOCKS_KNOWN:
            self.owners.popitem(last=False)
        self.heads.append((request.line, request.offset))
        self.recent[request.line] = prompt
        if len(self.recent) > REQUESTS_KEPT:
            self.recent.popitem(last=False)
        return row

    def compare(self, prompt: Prompt, cached: int, best: Prompt | None) -> Row:
        ids, line = prompt.ids, prompt.request.line
        if best is None:
            return Row(line, len(ids), cached, None, "first request", "", 0, "", "", 0)
        kind, where = describe(best, prompt, self.spans)
        whole = min(len(best.ids), len(ids) - 1) // self.block_size * self.block_size
        lost = 0 if kind in ("extended", "same prompt", "shortened") else max(0, whole - cached)
        at = common_prefix(best.ids, ids)
        around = [self.tokenizer.decode(tokens[max(0, at - 8) : at + 8]) for tokens in (best.ids, ids)]
        return Row(line, len(ids), cached, best.request.line, kind, where, at, *around, lost)


# --- showing ---


def row_text(row: Row, measured: tuple[int, float] | None) -> str:
    cached = f"{measured[0]:>8,}{milliseconds(measured[1]):>9}" if measured else ""
    why = row.kind if row.predecessor is None else f"{row.kind}, line {row.predecessor}"
    return f"{row.line:>5}{row.prompt_tokens:>8,}{row.predicted_cached_tokens:>10,}{cached}  {why}"


def print_row(console, row: Row, measured: tuple[int, float] | None) -> None:
    console.print(shown(row_text(row, measured)), markup=False)
    if row.lost_tokens:
        where = f"{'':7}{row.where}, token {row.token:,}: {row.lost_tokens:,} tokens lost"
        console.print(shown(where), markup=False)
        for text in (row.before, row.after):
            console.print(f"{'':9}{text[-70:]!r}"[:80], markup=False)


def print_summary(console, rows: list[Row], args: argparse.Namespace) -> None:
    """Print what was computed, and what each kind of break has cost."""
    prompt, cached = sum(r.prompt_tokens for r in rows), sum(r.predicted_cached_tokens for r in rows)
    console.print(f"\n{len(rows):,} requests, {prompt:,} tokens, {cached:,} cached ({cached / prompt:.1%}), "
                  f"{prompt - cached:,} computed")  # fmt: skip
    console.print(f"[bold]{'kind of break':<32}{'requests':>10}{'tokens lost':>14}{'cost':>12}")
    counts, lost = Counter(row.kind for row in rows), Counter()
    for row in rows:
        lost[row.kind] += row.lost_tokens
    for kind, count in sorted(counts.items(), key=lambda item: (-lost[item[0]], -item[1])):
        dollars = lost[kind] * (args.price_input - args.price_cached) / 1e6
        console.print(f"{shown(kind):<32}{count:>10,}{lost[kind]:>14,}{f'${dollars:.4f}':>12}", markup=False)
    prices = f"${args.price_input:g} instead of ${args.price_cached:g}"
    console.print(f"cost: lost tokens at {prices} per million, prices that are an example")


def rows_to_show(rows: list[Row]) -> list[Row]:
    """Return all rows of a short log, of a long one those that lost most."""
    if len(rows) <= ROWS_SHOWN:
        return rows
    return sorted(sorted(rows, key=lambda row: -row.lost_tokens)[:20], key=lambda row: row.line)


def analyse(path: Path, comparer: Comparer, limit: int | None, max_tokens: int | None, console) -> list[Row]:
    """Run the cache model over a log. Raises UsageError for a prompt longer than `max_tokens`."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    rows = []
    columns = ("reading the log", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=path.stat().st_size if path.is_file() else None)
        for request in read_log(path, limit):
            prompt = comparer.encode(request)
            if max_tokens is not None and len(prompt.ids) > max_tokens:
                raise UsageError(f"line {request.line}: {len(prompt.ids):,} tokens, the model takes {max_tokens:,}")
            rows.append(comparer.add(prompt))
            progress.update(task, completed=request.offset)
    return rows


def without_engine(args: argparse.Namespace) -> int:
    """Analyse a log with the cache model alone and print the result; return the exit status."""
    from rich.console import Console

    transformers = import_transformers()
    console, path = Console(width=80, highlight=False), Path(args.file)
    folder = find_model(args.model or str(HERE / "built_in_model" / "cpu"))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, mistral_format=False, trust_remote_code=False)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().to_dict()
    except BROKEN_FILES as error:
        raise LessonError(f"no tokenizer and config in {folder}: {telling_line(error)}") from error
    block_size = args.block_size or 16
    most = config.get("max_position_embeddings")  # not every architecture has such a limit
    rows = analyse(path, Comparer(path, tokenizer, block_size), args.limit, most, console)
    console.print(f"blocks of {block_size} tokens, nothing was sent\n[bold] line  prompt predicted  best predecessor")
    for row in rows_to_show(rows):
        print_row(console, row, None)
    print_summary(console, rows, args)
    if args.json:
        environment = {"model": args.model or "built_in_model/cpu", "block_size": block_size}
        content = {"schema": 1, "lesson": "replay_request_log", "environment": environment, "requests": rows}
        write_json(args.json, content)
    return 0


async def with_engine(run: Run) -> None:
    """Analyse the log, then send it request by request to an engine whose cache holds all of it."""
    path, args, model = Path(run.args.file), run.args, run.model
    comparer = Comparer(path, model.tokenizer, model.block_size)
    rows = analyse(path, comparer, args.limit, model.max_model_len - OUTPUT_TOKENS, run.console)
    run.environment["requests"] = len(rows)
    longest = max(row.prompt_tokens for row in rows)
    if len(comparer.owners) == BLOCKS_KNOWN:
        raise LessonError("this log is too large to be sent: use --without-engine, or --limit N")
    prompts = math.ceil(len(comparer.owners) * model.block_size / longest) + 2
    check_memory(run, model.kv_bytes(prompts, longest))
    hits = [row for row in rows if row.predicted_cached_tokens]
    suffix = max((row.prompt_tokens - row.predicted_cached_tokens for row in hits), default=1)
    length = longest + OUTPUT_TOKENS
    with run.timed("engine_start", "Starting vLLM..."):
        engine = run.start_engine(
            enable_prefix_caching=not args.no_prefix_caching,
            max_model_len=length,
            max_num_batched_tokens=length,  # a prompt is computed in one step
            kv_cache_memory_bytes=model.kv_bytes(prompts, length),
            graph_tokens=suffix,
        )
    await run.warm_up(longest, suffix)
    run.print("[bold] line  prompt predicted  cached     TTFT  best predecessor")
    with run.timed("measuring"):
        for row, request in zip(rows, read_log(path, args.limit), strict=True):
            m = await engine.ask(comparer.encode(request).ids, "replay", "log", row.line)
            if len(rows) <= ROWS_SHOWN:
                print_row(run.console, row, (m.cached_tokens, m.ttft_ms))
    measured = run.measured("replay", "log")
    if len(rows) > ROWS_SHOWN:
        by_line = {m.request: (m.cached_tokens, m.ttft_ms) for m in measured}
        for row in rows_to_show(rows):
            print_row(run.console, row, by_line[row.line])
    print_summary(run.console, rows, args)
    agree = sum(m.cached_tokens == row.predicted_cached_tokens for m, row in zip(measured, rows, strict=True))
    run.claim("the analysis and the engine agree", agree == len(rows), f"{agree} of {len(rows)} requests")
    run.result["requests"] = rows


def check_memory(run: Run, kv_bytes: int) -> None:
    """Raise LessonError where the cache for a whole log does not fit; on a GPU vLLM itself finds out."""
    import psutil  # comes with vLLM

    free = psutil.virtual_memory().available
    if not run.model.on_gpu and kv_bytes > free:
        sizes = f"the KV of this log takes {kv_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        raise LessonError(f"{sizes}: use --without-engine, or --limit N")


def replay(args: argparse.Namespace) -> int:
    next(read_log(Path(args.file), 1))  # a log that cannot be read is told at once
    if not args.without_engine:
        return run_lesson(args, with_engine)
    if importlib.util.find_spec("transformers") is None:
        use_python_with_vllm()
    return without_engine(args)


def main() -> int:
    parser = engine_parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="the log, JSONL")
    parser.add_argument("--without-engine", action="store_true", help="analyse only, in blocks of 16 unless told")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N requests")
    parser.add_argument("--price-input", type=price, default=3.00, help="$ per million computed tokens (example: 3.00)")
    parser.add_argument("--price-cached", type=price, default=0.30, help="$ per million cached tokens (example: 0.30)")
    args = parser.parse_args()
    if args.json and args.json.exists() and Path(args.file).exists() and args.json.samefile(args.file):
        parser.error("--json names the log itself, which would be lost")
    return run_command("replay_request_log", lambda: replay(args))


if __name__ == "__main__":
    sys.exit(main())
