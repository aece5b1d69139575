"""Read a log of requests, whatever file it is in: JSON lines, an array, pretty-printed, gzip, vLLM's own log.

JSON lines and vLLM's log are read line by line; other files are read whole. What an entry means is in shapes.py. An
entry that cannot be replayed is left out and said so, and the rest goes on; a file without any request is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from going_further.common import UsageError, shown
from going_further.replay.records import LeftOut, Record
from going_further.replay.shapes import SHAPES, Shape, Unfit, media, one_line, read_entry

__all__ = ["SHAPES", "Shape", "media", "read_log"]

LARGEST_TEXT = 1 << 30  # bytes of a file that is read whole, or of one line
GZIP = b"\x1f\x8b"
# Where exports keep the list of their entries; OpenTelemetry's lie in lists of lists.
LISTS = (
    "data", "logs", "requests", "observations", "records", "entries", "results", "items", "rows", "traces", "batches",
    "resourceSpans", "resource_spans", "scopeSpans", "scope_spans", "spans",
)  # fmt: skip
DEEPEST_LIST = 6


class Entry(NamedTuple):
    """A JSON value and where it begins; `fault` tells why there is none."""

    line: int
    value: object
    fault: str | None = None


# --- JSON ---


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and infinities, which are no JSON though Python reads them."""
    raise ValueError(f"{name} is no number of JSON")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)
BETWEEN = re.compile(r"[\s,\ufeff]*")  # concatenated files have a byte order mark within
BRACKET = re.compile(r'"[^"\\\n]*(?:\\.[^"\\\n]*)*"|[\[\]{}]')  # strings are passed over


def decode(text: str, at: int) -> tuple[object, int]:
    """Return the JSON value that begins at `at` and where it ends; raise Unfit where there is none."""
    try:
        value, end = DECODER.raw_decode(text, at)
        part = text[at:end]
        part.encode()
        if re.search(r"\\u[dD]", part):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        is_cut = error.msg.startswith("Unterminated") or not text[error.pos :].strip()
        raise Unfit(f"no JSON: {'it is cut off' if is_cut else one_line(error.msg)}") from error
    except UnicodeEncodeError as error:
        if "\udc80" <= error.object[error.start] <= "\udcff" and error.object is part:
            raise Unfit("no JSON: bytes that are no UTF-8") from error
        raise Unfit("a text with half of a surrogate pair, which is no character") from error
    except RecursionError as error:
        raise Unfit("no JSON: it is nested too deep") from error
    except ValueError as error:  # NaN, or a number of 5,000 digits
        raise Unfit(f"no JSON: {one_line(str(error).partition(';')[0])}") from error
    return value, end


def after_brackets(text: str, at: int, depth: int = 0) -> int | None:
    """Return the place after the bracket that closes what begins at `at`, or `depth` brackets that are open there."""
    for match in BRACKET.finditer(text, at):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(match.group(), 0)
        if depth == 0:
            return match.end()
    return None


def end_of(text: str, at: int) -> int:
    """Return where a value ends that cannot be decoded: at its last bracket, or where a line begins like its own.

    That line comes first where the value is cut off, and the next one's brackets would count as its own.
    """
    indent = text[text.rfind("\n", 0, at) + 1 : at]
    following = r"\n" if indent.strip() or text[at] not in "{[" else rf"\n{indent}(?=[{{\[])"
    match = re.compile(following).search(text, at)
    closed = after_brackets(text, at) if text[at] in "{[" else None
    return min(match.end() if match else len(text), closed or len(text))


def place_of_list(text: str, at: int) -> int | None:
    """Return where the list begins that an object at `at` holds under a known key."""
    name = re.compile(r'\s*,?\s*("[^"\\]*(?:\\.[^"\\]*)*")\s*:\s*')
    at += 1
    try:
        while match := name.match(text, at):
            if match.group(1)[1:-1] in LISTS and text.startswith("[", match.end()):
                return match.end()
            _, at = DECODER.raw_decode(text, match.end())
    except (ValueError, RecursionError):
        pass
    return None


def is_wrapper(value: object) -> bool:
    """Say whether an object is not an entry but holds a list of them."""
    if not isinstance(value, dict) or "messages" in value:
        return False
    lists = [value[name] for name in LISTS if isinstance(value.get(name), list)]
    return bool(lists) and any(isinstance(item, dict) for item in lists[0])


def values(text: str, at: int = 0, depth: int = 0) -> Iterator[tuple[int, object]]:
    """Yield the entries that stand one after another from `at`, with their places; return where they end.

    They end at the bracket that closes their list where depth > 0. What cannot be decoded is yielded as an Unfit.
    Lists that stand alone, or under a known key of an object, are opened.
    """
    value = None
    while (at := BETWEEN.match(text, at).end()) < len(text):
        if depth and text[at] == "]":
            return at + 1
        if text[at] == "[" and depth == 0:
            at = yield from values(text, at + 1, 1)
            continue
        try:
            if depth == 0 and text[at] != "{":
                raise Unfit("no JSON object")
            value, end = decode(text, at)
        except Unfit as fault:
            value, end = fault, end_of(text, at)
        opened = None
        if depth < DEEPEST_LIST and text[at] == "{" and (isinstance(value, Unfit) or is_wrapper(value)):
            opened = place_of_list(text, at)
        if opened is None:
            yield at, value
        else:
            after = yield from values(text, opened + 1, depth + 1)
            if isinstance(value, Unfit):  # where the object ends was a guess until its list was read
                end = after_brackets(text, after, 1) or len(text)
        at = end
    if depth == 1 and not isinstance(value, Unfit):
        yield at, Unfit("no JSON: the list is cut off")
    return at


def entries(text: str, line: int) -> Iterator[Entry]:
    """Yield the entries in a text that begins on `line`."""
    counted = 0
    for at, value in values(text):
        line += text.count("\n", counted, at)
        counted = at
        if isinstance(value, Unfit):
            yield Entry(line, None, str(value))
        elif not isinstance(value, dict):
            yield Entry(line, None, f"a JSON value of type {type(value).__name__}, no object")
        else:
            yield Entry(line, value)


# --- vLLM's log ---

# No brace or quote before it: else it stands in the text of a prompt.
VLLM_LINE = re.compile(
    r"^(?P<head>[^{'\"]*?)Request \S+ (?:JSON body: (?P<body>\{.*)"
    r"|details: prompt: .*prompt_token_ids: (?P<ids>\[[\d, ]*\]|None), prompt_embeds shape)"
)


def moment_of(head: str) -> float | None:
    """Return the time in front of a line in seconds; it has no year, so a leap year is as good as any."""
    stamp = re.search(r"\b(\d\d-\d\d \d\d:\d\d:\d\d)\b", head)
    try:
        return datetime.strptime(f"2000-{stamp[1]}", "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()
    except (TypeError, ValueError):
        return None


def vllm_records(lines: Iterator[tuple[int, str]], has_bodies: bool, shape: str | None) -> Iterator[Record | LeftOut]:
    """Yield the requests of vLLM's log: their bodies, or their token ids where no line of the log has a body."""
    for line, text in lines:
        match = VLLM_LINE.match(text)
        if not match or (match["body"] is None) == has_bodies:
            continue
        if not has_bodies and match["ids"] in ("None", "[]"):
            yield LeftOut(line, "no token ids in the details of this request")
            continue
        body = match["body"] or f'{{"prompt_token_ids": {match["ids"]}}}'
        try:
            entry, _ = decode(body, 0)
        except Unfit as fault:
            yield LeftOut(line, f"a body that is {fault} (--max-log-len cuts it)".replace("no JSON: it is ", ""))
            continue
        for item in read(Entry(line, entry), None if shape == "vllm-log" else shape):
            is_record = isinstance(item, Record) and item.time is None
            yield dataclasses.replace(item, time=moment_of(match["head"])) if is_record else item


# --- files ---


def lines_of(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers; bytes that are no UTF-8 become halves of pairs."""
    file.seek(0)
    number = 0
    while raw := file.readline(LARGEST_TEXT + 1):
        number += 1
        if len(raw) > LARGEST_TEXT:
            raise UsageError(f"line {number} is longer than {LARGEST_TEXT / 2**30:.2g} GiB")
        text = raw.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        if text.strip():
            yield number, text


def is_json(text: str) -> bool:
    """Say whether a line is JSON: objects or lists, and nothing else. A time stamp begins like a number."""
    try:
        _, end = DECODER.raw_decode(text.strip())
    except (ValueError, RecursionError):
        return False
    rest = text.strip()[end:].lstrip(" ,")
    return text.lstrip().startswith(("{", "[")) and rest[:1] in ("", "{", "[")


def is_pretty(first: str, second: str) -> bool:
    """Tell from its first two lines whether JSON runs over lines; a first line may also just be cut off."""
    first, second = first.strip(), second.strip()
    if not first.startswith(("{", "[")) or is_json(first):
        return False
    return first.endswith("[") or first.startswith("[") or not (second.startswith("{") and is_json(second))


def read(entry: Entry, shape: str | None) -> Iterator[Record | LeftOut]:
    """Yield the requests of one entry, or why there are none."""
    if entry.fault:
        yield LeftOut(entry.line, entry.fault)
        return
    try:
        yield from read_entry(entry.value, entry.line, shape)
    except Unfit as reason:
        yield LeftOut(entry.line, str(reason))
    except RecursionError:
        yield LeftOut(entry.line, "nested too deep")


def read_file(file: BinaryIO, path: Path, shape: str | None) -> Iterator[Record | LeftOut]:
    """Yield what is in a file, whatever form it has."""
    head = [text for _, text in zip(range(2), (text for _, text in lines_of(file)), strict=False)]
    first, second = [*head, "", ""][:2]
    if shape == "vllm-log" or (first and not is_json(first.strip())):
        # vLLM writes many lines of other kinds first, so that all lines are looked at.
        kinds = [match["body"] is not None for _, text in lines_of(file) if (match := VLLM_LINE.match(text))]
        if kinds or shape == "vllm-log":
            yield from vllm_records(lines_of(file), any(kinds), shape)
            return
    if not is_pretty(first, second):
        for line, text in lines_of(file):
            for entry in entries(text, line):
                yield from read(entry, shape)
        return
    file.seek(0)
    raw = file.read(LARGEST_TEXT + 1)
    if len(raw) > LARGEST_TEXT:
        raise UsageError(
            f"{shown(str(path))} is larger than {LARGEST_TEXT / 2**30:.2g} GiB: only JSON lines can be so large"
        )
    for entry in entries(raw.decode("utf-8", "surrogateescape"), 1):
        yield from read(entry, shape)


def open_log(path: Path) -> BinaryIO:
    """Open a log, unpacked where it is gzip; that its first bytes tell."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{shown(str(path))} is no regular file: the log is read more than once")
    with path.open("rb") as file:
        is_gzip = file.read(2) == GZIP
    return gzip.open(path, "rb") if is_gzip else path.open("rb")


def nothing_found(path: Path, left: list[LeftOut]) -> str:
    """Return the message for a file without a request, with the first reasons."""
    name = shown(str(path))
    if not left:
        return f"{name} holds no request"
    with contextlib.suppress(OSError, EOFError, zlib.error), open_log(path) as file:
        if b"Received request " in file.read(1 << 20):
            return f"{name} is a log of vLLM's without requests: start the server with VLLM_LOGGING_LEVEL=DEBUG"
    reasons = {item.reason: f"line {item.line}: {item.reason}" for item in reversed(left)}
    known = [shape for shape in SHAPES if shape != "openai-batch-output"]
    hint = f"; known shapes: {', '.join(known)}" if any("no known shape" in item.reason for item in left) else ""
    return f"{name} holds no request; {'; '.join(reversed(reasons.values()))}{hint}"


def read_log(
    path: Path, shape: str | None = None, strict: bool = False, limit: int | None = None
) -> Iterator[Record | LeftOut]:
    """Yield the requests of a log in their order, and what had to be left out.

    `shape` is one of SHAPES; by default every entry's fields tell it. `limit` counts requests. UsageError is raised
    for a file that cannot be read or holds no request; with `strict`, for the first entry that is left out, too.
    """
    found, left = 0, []
    try:
        with open_log(path) as file:
            for item in read_file(file, path, shape):
                if isinstance(item, Record):
                    found += 1
                elif strict:
                    raise UsageError(f"line {item.line}: {item.reason}")
                elif len(left) < 2:
                    left.append(item)
                yield item
                if found == limit:
                    return
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"cannot read {shown(str(path))}: its gzip data is cut off or corrupt") from error
    except OSError as error:
        raise UsageError(f"cannot read {shown(str(path))}: {error.strerror or one_line(error)}") from error
    if not found:
        raise UsageError(nothing_found(path, left))
