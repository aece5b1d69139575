"""One pass over a log: read, rendered, compared; rows and what the other parts need of it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from going_further.common import LessonError, UsageError
from going_further.replay.caches import Arrival, PrefixCache
from going_further.replay.comparing import Comparer, Row
from going_further.replay.readers import open_log, read_log
from going_further.replay.records import LeftOut, Record, count
from going_further.replay.rendering import CannotRender, Prompt, Renderer
from going_further.replay.shapes import as_json


@dataclasses.dataclass(frozen=True)
class Options:
    """What of a log is read, and how; the names are those of the command line."""

    limit: int | None = None
    format: str | None = None
    strict: bool = False
    session_field: str | None = None
    group_by: str | None = None
    cache_tokens: int | None = None
    ttl: float | None = None
    disable_hybrid_kv_cache_manager: bool = False
    one_model: bool = False


@dataclasses.dataclass
class Analysis:
    """What came of a log."""

    comparer: Comparer
    rows: list[Row] = dataclasses.field(default_factory=list)
    arrivals: list[Arrival] = dataclasses.field(default_factory=list)
    left_out: list[LeftOut] = dataclasses.field(default_factory=list)
    ignored: Counter = dataclasses.field(default_factory=Counter)  # fields that vLLM does not know -> requests
    models: Counter = dataclasses.field(default_factory=Counter)
    salts: Counter = dataclasses.field(default_factory=Counter)
    without_session: int = 0
    is_one_line: bool = False  # all entries stand in one line, and have numbers instead of lines
    impossible: int = 0  # requests whose usage says more cached than prompt tokens

    @property
    def longest(self) -> int:
        return max(row.prompt_tokens for row in self.rows)


def field_of(record: Record, path: str | None) -> str | None:
    """Return the value at a dotted path of a log's entry, or of the request in it, as a text; None for none."""
    if path is None:
        return None
    values = (value_at(record.entry, path), value_at(record.body, path))
    return next((value for value in values if value is not None), None)


def value_at(entry: object, path: str) -> str | None:
    for name in path.split("."):
        if isinstance(entry, list) and name.isdecimal() and int(name) < len(entry):
            entry = entry[int(name)]
        else:
            entry = as_json(entry)  # some logs hold JSON in a text
            entry = entry.get(name) if isinstance(entry, dict) else None
    return None if entry is None or isinstance(entry, dict | list) else str(entry)


def block_size_of(path: Path, options: Options) -> int | None:
    """Return the block size of a trace without texts, None for a log of requests; UsageError for what is no log."""
    for record in read_log(path, options.format, options.strict, 1):
        if isinstance(record, Record):
            return record.body["block_size"] if record.api == "blocks" else None
    return None


def add(record: Record, found: Analysis, options: Options, bounded: PrefixCache | None) -> None:
    """Add one request to an analysis. CannotRender where vLLM would not take it."""
    comparer, renderer = found.comparer, found.comparer.renderer
    session = field_of(record, options.session_field)
    if options.ttl is not None and record.time is None:
        raise CannotRender("no time, which --ttl needs")
    if (record.api == "blocks") != (renderer is None):
        raise CannotRender("a trace of hashes and a log of requests do not go together")
    if renderer is None:
        if record.body["block_size"] != comparer.block_size:
            raise CannotRender(f"blocks of another size: {record.body['block_size']}")
        check_room(record.body["input_length"], bounded)
        row, blocks = comparer.add_trace(record, session)
    else:
        prompt = renderer.prompt(record)
        if options.one_model:
            prompt = dataclasses.replace(prompt, salt=(None, *prompt.salt[1:]))
        if not prompt.ids:
            raise CannotRender("its prompt has no tokens")
        check_window(renderer, len(prompt.ids), record.line, options)
        check_room(len(prompt.ids), bounded)
        row, blocks = comparer.add(prompt, session)
        found.ignored.update(prompt.ignored)
        model, salt = prompt.salt
        found.models[model] += 1
        found.salts[salt] += 1
    is_read = renderer is None or prompt.is_read
    arrival = Arrival(array("q", blocks), row.prompt_tokens, row.session, record.time, is_read)
    if bounded is not None:
        cached = bounded.request(arrival.chain, arrival.tokens, arrival.time, is_read)
        evicted = max(0, row.predicted_cached_tokens - cached)
        row = dataclasses.replace(
            row, predicted_cached_tokens=row.predicted_cached_tokens - evicted, evicted_tokens=evicted,
            answer_tokens=0 if evicted else row.answer_tokens,
        )  # fmt: skip
    usage = record.usage
    if (
        usage
        and usage.cached_tokens is not None
        and usage.cached_tokens > (row.prompt_tokens if usage.prompt_tokens is None else usage.prompt_tokens)
    ):
        found.impossible += 1
        usage = None
    found.without_session += session is None
    found.arrivals.append(arrival)
    found.rows.append(dataclasses.replace(
        row,
        group=field_of(record, options.group_by),
        logged_prompt_tokens=usage.prompt_tokens if usage else None,
        logged_cached_tokens=usage.cached_tokens if usage else None,
    ))  # fmt: skip


def check_room(tokens: int, bounded: PrefixCache | None) -> None:
    if bounded is not None and not bounded.fits(tokens):
        raise CannotRender("longer than the cache of --cache-tokens: vLLM would not run it")


def check_window(renderer: Renderer, tokens: int, line: int, options: Options) -> None:
    """Raise LessonError for a prompt that is longer than a sliding window: vLLM then keeps other blocks."""
    window = renderer.window
    if window is None or tokens <= window:
        return
    if options.disable_hybrid_kv_cache_manager and renderer.has_full_attention:
        return  # with it off, vLLM keeps the blocks of all layers like those of full attention
    advice = "; --disable-hybrid-kv-cache-manager, if the server has it" if renderer.has_full_attention else ""
    raise LessonError(
        f"line {line}: {tokens:,} tokens; layers of {renderer.model} have a sliding window of {window:,}, beyond which "
        f"nothing is predicted here{advice}"
    )


def analyse(path: Path, renderer: Renderer | None, block_size: int, options: Options, console) -> Analysis:
    """Read a log and compare its requests; UsageError for what is no log, or with `strict` holds what is none."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    found = Analysis(Comparer(renderer, block_size))
    is_bounded = options.cache_tokens is not None or options.ttl is not None
    drops = found.comparer.drops_last_block
    bounded = PrefixCache(block_size, options.cache_tokens, options.ttl, drops) if is_bounded else None
    columns = ("reading the log", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        lines = count_lines(path)
        found.is_one_line = lines is not None and lines <= 1
        task = progress.add_task("", total=lines)
        for number, record in enumerate(read_log(path, options.format, options.strict, options.limit), start=1):
            progress.update(task, completed=record.line)
            if found.is_one_line:  # as exports often are: lines tell nothing apart
                record = dataclasses.replace(record, line=number)
            if isinstance(record, LeftOut):
                found.left_out.append(record)
                continue
            try:
                add(record, found, options, bounded)
            except CannotRender as error:
                if options.strict:
                    raise UsageError(f"line {record.line}: {error}") from error
                found.left_out.append(LeftOut(record.line, str(error)))
    if not found.rows:
        reasons = "; ".join(f"line {left.line}: {left.reason}" for left in found.left_out[:2])
        raise UsageError(f"{path} holds no request that can be replayed: {reasons}")
    if options.session_field and found.without_session == len(found.rows):
        raise UsageError(f"--session-field: no request of this log has a field {options.session_field}")
    if options.group_by and all(row.group is None for row in found.rows):
        raise UsageError(f"--group-by: no request of this log has a field {options.group_by}")
    return found


def prompts_in(path: Path, renderer: Renderer, limit: int | None = None) -> Iterator[Prompt]:
    """Yield the prompts of a log; what cannot be replayed is passed over. UsageError where there are none."""
    found = 0
    for record in read_log(path, limit=limit):
        if isinstance(record, Record) and record.api != "blocks":
            with contextlib.suppress(CannotRender):
                yield renderer.prompt(record)
                found += 1
    if not found:
        raise UsageError(f"{path} holds no request that can be rendered")


def count_lines(path: Path) -> int | None:
    """Return how many lines a log has; None where it cannot be read to its end, which its reader tells."""
    lines, last = 0, b"\n"
    with contextlib.suppress(OSError, EOFError, zlib.error), open_log(path) as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            lines, last = lines + chunk.count(b"\n"), chunk[-1:]
        return lines + (last != b"\n")
    return None


def notes_on(found: Analysis) -> list[str]:
    """Return what must be known to read the numbers right."""
    notes, renderer = [], found.comparer.renderer
    by_reason = Counter(left.reason for left in found.left_out)
    for reason, times in by_reason.most_common(5):
        lines = [str(left.line) for left in found.left_out if left.reason == reason][:5]
        notes.append(f"left out, {times:,}: {reason} (line {', '.join(lines)}{', ...' if times > 5 else ''})")
    if len(by_reason) > 5:
        notes.append(f"left out for other reasons: {sum(c for _, c in by_reason.most_common()[5:]):,}")
    if found.is_one_line and len(found.rows) > 1:
        notes.append("all of this log is one line: what is called a line is the number of an entry")
    if found.ignored:
        names = ", ".join(f"{name} ({times:,})" for name, times in found.ignored.most_common(8))
        notes.append(f"fields that vLLM's server does not know and ignores: {names}")
    if len(found.models) > 1:
        names = ", ".join(str(name) for name, _ in found.models.most_common(3))
        notes.append(
            f"{len(found.models):,} models ({names}): each has a cache of its own (--one-model: "
            "they are names of one); one template renders all"
        )
    if len(found.salts) > 1:
        notes.append(f"{len(found.salts):,} values of cache_salt: each has a part of the cache of its own")
    if found.impossible:
        notes.append(f"usage with more cached than prompt tokens, not counted: {found.impossible:,}")
    times = [arrival.time for arrival in found.arrivals if arrival.time is not None]
    if any(after < before for before, after in itertools.pairwise(times)):
        notes.append("times run backwards: requests are taken in the order of the log; is it the newest first?")
    if found.comparer.forgotten:
        notes.append(f"{found.comparer.forgotten:,} blocks of old requests were forgotten, as in a cache of that size")
    if renderer is None:
        notes.append("a trace of hashes: what broke a prefix is not in it")
        return notes
    if renderer.writes_the_date:
        notes.append("the template writes today's date (strftime_now): on another day all prompts begin otherwise")
    too_long = sum(row.prompt_tokens > renderer.max_model_len for row in found.rows)
    if too_long:
        notes.append(f"longer than the model takes ({renderer.max_model_len:,} tokens): {count(too_long, 'request')}")
    if renderer.drops_last_block:
        notes.append("speculative decoding: vLLM computes the last block that it finds once more")
    return notes
