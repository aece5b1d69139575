"""Where each request of a log departs from its best predecessor, and what of it another layout could have kept."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import difflib
import itertools
import json
import pickle
import re
import tempfile
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence

from going_further.common import CacheModel, LessonError
from going_further.replay.records import Record
from going_further.replay.rendering import CannotRender, Prompt, Renderer, Span, plain, written

BLOCKS_KNOWN = 4_000_000  # some 100 bytes each; 64 million tokens in blocks of 16
REQUESTS_KEPT = 64  # in memory; older ones are read again from a file
HEADS_COMPARED = 8  # where not even a block matches, so many latest requests are tried as predecessors
DROPPED, REWRITTEN = "template drops generated text", "template rewrites the prompt"
OTHERWISE = "answer sent back otherwise"  # by the client, than the engine wrote it
UNITS_COMPARED = 20_000  # of two texts, between what they begin and end with; difflib's time grows faster than that
TEXTS_MOVED = 20_000  # kept of one place
STOPS = r"\n.!?;,}\]\u3002\uff01\uff1f\uff1b\uff0c"  # the last ones are those of Chinese and Japanese
PIECES = re.compile(f"[^{STOPS}]*[{STOPS}]*")
UNREAD = "cache not read: prompt_logprobs"
NO_BREAK = {
    *("first request", "another model or cache_salt", "same prompt", "extended", "shortened"),
    *("another question", "another conversation", "another prompt"),
}


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
    lost_tokens: int  # in whole blocks: what stands behind the break, is the same as before, and was not found
    answer_tokens: int = 0  # found beside `predicted_cached_tokens` where the engine wrote the predecessor's answer
    session: str = ""
    family: int = 0  # requests under one prompt: line of the family's first request
    group: str | None = None  # value of --group-by
    evicted_tokens: int = 0  # found where the cache had no bounds
    logged_prompt_tokens: int | None = None  # what the server said
    logged_cached_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Moved:
    """A text that stands too early. `index` is its message, or the gap that it stands in; None: a whole message."""

    index: int | None
    text: str


def gap(message: int) -> int:
    """Return the index of what stands before a message and behind the content of the one before."""
    return -1 - message


# --- two texts ---


def shared(a: Sequence, b: Sequence) -> int:
    """Return how many characters or tokens two prompts begin with in common: slices are compared, and halved."""
    if a == b:
        return len(a)
    low, high = 0, min(len(a), len(b))  # so many are shared at least, and at most
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def units(text: str) -> list[str]:
    """Return a text in pieces that change as a whole: lines, sentences, members of JSON; long ones by words."""
    found = []
    for piece in PIECES.findall(text):
        words = re.findall(r"\S*\s*", piece) if len(piece) > 200 else [piece]
        for word in words:
            found += word if len(word) > 200 else [word]  # a script without spaces: by characters
    return [piece for piece in found if piece]


def equal_parts(a: list, b: list) -> list[tuple[int, int, int]]:
    """Return the runs that two lists have in common and in order: start in `a`, start in `b`, length."""
    front = shared(a, b)
    back = shared(a[front:][::-1], b[front:][::-1])
    inner_a, inner_b = a[front : len(a) - back], b[front : len(b) - back]
    runs = [(0, 0, front)]
    if len(inner_a) + len(inner_b) <= UNITS_COMPARED:
        inner = difflib.SequenceMatcher(None, inner_a, inner_b)
        runs += [(front + x, front + y, size) for x, y, size in inner.get_matching_blocks() if size]
    runs.append((len(a) - back, len(b) - back, back))
    return [run for run in runs if run[2]]


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


def first_difference(a: object, b: object, path: str = "") -> str:
    """Return the path of the first field in which two JSON values are written differently."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = [*b, *a]
        changed = [name for name in names if name not in a or name not in b or written(a[name]) != written(b[name])]
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
    return f" field {first_difference(old_value, new_value).lstrip()}"


# --- two prompts ---


def calls(message: dict) -> list:
    return [call["function"] for call in message.get("tool_calls") or ()]


def heading(message: dict) -> str:
    """Return what templates write of a message beside its content; ids of tool calls and the like are left out."""
    return written([message["role"], calls(message)])


def key(message: dict) -> str:
    return heading(message) + written(message.get("content"))


@dataclasses.dataclass(frozen=True)
class Break:
    """How a prompt departs from another one: kind, place, and the first message that differs; -1 is before all."""

    kind: str
    where: str
    message: int | None = None


def changed_message(a: list[dict], b: list[dict], at: int, field: str) -> Break:
    """Return the break in message `at`, which both conversations have."""
    where = f"message {at} ({b[at]['role']})"
    texts, others = [key(message) for message in a], [key(message) for message in b]
    if written(a[at]) == written(b[at]):
        kind = DROPPED if b[at]["role"] == "assistant" else REWRITTEN
        return Break(kind, where, at)
    same_role, rest = a[at]["role"] == b[at]["role"], texts[at + 1 : at + 2] == others[at + 1 : at + 2]
    if texts[at] != others[at] and not (same_role and rest and len(a) > at + 1):
        if texts[at] in others[at + 1 :]:
            return Break("message inserted", where, at)
        if others[at] in texts[at + 1 :]:
            return Break("message removed", f"message {at} ({a[at]['role']})", at)
    if not same_role:
        return Break("message inserted", where, at)
    if at == len(b) - 1 and at and b[at]["role"] == "user":
        return Break("another question", where + field, at)
    return Break(f"{b[at]['role']} message changed", where + field, at)


def describe(before: Prompt, after: Prompt, renderer: Renderer) -> Break:
    """Return how a prompt departs from an earlier one. The texts decide: what is not written breaks nothing."""
    if before.ids == after.ids:
        return Break("same prompt", "")
    a, b = before.messages, after.messages
    if not a or not b or "prompt" in (a[0]["role"], b[0]["role"]):  # token ids, or completions
        least = min(len(before.ids), len(after.ids))
        if shared(before.ids, after.ids) == least:
            return Break("extended" if least == len(before.ids) else "shortened", "")
        return Break("prompt changed", "the prompt", 0)
    if len(a) < len(b) and after.text.startswith(before.text):
        return Break("extended", "")
    char, old, new = shared(before.text, after.text), renderer.spans(before), renderer.spans(after)
    at = min(sum(span.end <= char for span in found) for found in (old, new))  # so many contents are the same
    both = min(len(a), len(b))
    if at < both and max(old[at].start, new[at].start) <= char:
        return changed_message(a, b, at, json_field(before.text, after.text, old[at], new[at], char))
    # It is between two contents: in the tools, in a message's role or tool calls, or in what the template adds.
    for name, x, y in (("tools", before.tools, after.tools), ("template variables", before.variables, after.variables)):
        if written(x) != written(y):
            return Break(f"{name} changed", f"{name}{first_difference(x, y)}", -1)
    last = max((n for n, span in enumerate(new[:at]) if span.start < span.end), default=-1)
    near = range(last + 1, min(at + 1, both))
    if last >= 0 and calls(a[last]) != calls(b[last]):  # they stand behind the content, the role before it
        at = last
    else:
        at = next((n for n in near if heading(a[n]) != heading(b[n])), min(at, last + 1))
    if at < both:
        at = next((n for n in near if at > last and written(a[n]) != written(b[n])), at)
        field = next((name for name in [*b[at], *a[at]] if written(a[at].get(name)) != written(b[at].get(name))), "")
        return changed_message(a, b, at, f" {field}")
    if at == len(a) < len(b):
        if not before.text[char:].strip():  # a line end, say, that the answer takes the place of
            return Break("extended", "")
        if b[at]["role"] == "assistant":
            return Break(DROPPED, f"message {at} ({b[at]['role']})", at)
    if len(a) == len(b) or at == len(a):
        return Break(REWRITTEN, "the end of the prompt", at)
    return Break("shortened", f"message {at} was left out")


@dataclasses.dataclass(frozen=True)
class Kept:
    """What stands behind a break: spans of the later prompt that are as before, and the texts that are not."""

    same: list[Span]
    moved: list[Moved]  # of both prompts
    is_other: bool = False  # most of the message that changed is other text: it is no edited one


def behind(found: Break, before: Prompt, after: Prompt, renderer: Renderer) -> Kept:
    """Return what of a prompt another layout could have kept, and what would have to stand behind it.

    The last message is a request's own, unless it is the only one, or said before. What is equal is looked for in the
    message that changed, by lines and sentences, and among the messages after it, which count as a whole.
    """
    a, b, at = before.messages, after.messages, found.message
    old, new = renderer.spans(before), renderer.spans(after)
    same, moved = [], []
    changed_at = shared(before.text, after.text)
    old_text = new_text = ""
    index, start, first = at, 0, max(at, 0)
    if at == -1:  # between two contents, where templates write tools, for one
        first = min(sum(span.end <= changed_at for span in spans) for spans in (old, new))
        index, start = gap(first), new[first - 1].end if first else 0
        old_text = before.text[old[first - 1].end if first else 0 : old[first].start if first < len(a) else None]
        new_text = after.text[start : new[first].start if first < len(b) else None]
    elif found.kind.endswith(" changed") and at < len(a) and (at < len(b) - 1 or len(b) == 1):
        old_text, new_text = before.text[slice(*old[at])], after.text[slice(*new[at])]
        start, first = new[at].start, at + 1
    old_units, new_units = units(old_text), units(new_text)
    common = Counter(old_units) & Counter(new_units)
    if at == 0 and 2 * sum(len(unit) * times for unit, times in common.items()) < min(len(old_text), len(new_text)):
        return Kept([], [], is_other=True)
    runs = equal_parts(old_units, new_units)
    places = list(itertools.accumulate(map(len, new_units), initial=start))
    for _, y, size in runs:
        if places[y + size] > changed_at:
            same.append(Span(max(places[y], changed_at), places[y + size]))
    if new_units:
        in_old = {n for x, _, size in runs for n in range(x, x + size)}
        in_new = {n for _, y, size in runs for n in range(y, y + size)}
        moved += [Moved(index, unit) for n, unit in enumerate(old_units) if n not in in_old]
        moved += [Moved(index, unit) for n, unit in enumerate(new_units) if n not in in_new]
    old_keys, new_keys = [key(message) for message in a[first:]], [key(message) for message in b[first:]]
    equal = equal_parts(old_keys, new_keys)
    for _, y, size in equal:
        for n in range(first + y, first + y + size):
            begin = new[n - 1].end if n and (n > first or at != -1) else new[n].start  # the gap was looked at above
            same.append(Span(max(changed_at, begin), new[n].end))
    if not new_units and found.kind.startswith(("message", "assistant", "tool", "user", "system")):
        in_old = {n for x, _, size in equal for n in range(x, x + size)}
        in_new = {n for _, y, size in equal for n in range(y, y + size)}
        others = [a[first + n] for n in range(len(old_keys)) if n not in in_old]
        others += [b[first + n] for n in range(len(new_keys) - 1) if n not in in_new]
        moved += [Moved(None, text) for message in others if (text := plain(message.get("content")))]
    return Kept([span for span in same if span.start < span.end], moved)


def tokens_in(prompt: Prompt, spans: list[Span], renderer: Renderer) -> int:
    """Return how many tokens of a prompt begin in some spans of its text."""
    offsets = prompt.offsets
    if offsets is None:  # a slow tokenizer, which does not say where its tokens are
        return sum(len(renderer.tokens(prompt.text[slice(*span)])) for span in spans)

    def tokens_before(character: int) -> int:
        return bisect.bisect_left(offsets, character, key=lambda offset: offset[0])

    count = end = 0
    for span in sorted(spans):
        begin = max(span.start, end)  # of spans that overlap each token counts once
        end = max(span.end, end)
        count += max(0, tokens_before(end) - tokens_before(begin))
    return count


class Comparer:
    """Finds for each request of a log what the cache model holds of it, and its best predecessor."""

    def __init__(self, renderer: Renderer | None, block_size: int) -> None:
        """A trace of hashes has no texts and needs no renderer."""
        self.renderer, self.block_size, self.chain = renderer, block_size, CacheModel(block_size).chain
        self.drops_last_block = renderer is not None and renderer.drops_last_block
        self.owners: dict[int, int] = {}  # block -> number of its latest request; the least recently used first
        self.forgotten = 0  # blocks
        self.lines: list[int] = []  # per request, as are the following
        self.lengths: list[int] = []  # whole blocks
        self.families: list[int] = []
        self.sessions: list[str] = []
        self.recent: OrderedDict[int, Prompt] = OrderedDict()
        self.store, self.places = tempfile.TemporaryFile(), []  # noqa: SIM115, all prompts; the file has no name
        self.openings: dict[int, int] = {}  # what tells a conversation -> its latest request
        self.moved: dict[tuple[int, str], dict[Moved, None]] = {}  # by family and place; a dict keeps the order
        self.salts: dict[tuple, deque[int]] = {}  # model and cache_salt -> latest requests

    def recall(self, number: int) -> Prompt:
        """Return an earlier prompt, from memory or from the file."""
        if number in self.recent:
            return self.recent[number]
        self.store.seek(self.places[number])
        prompt = pickle.load(self.store)
        return dataclasses.replace(prompt, ids=prompt.ids.tolist())

    def keep(self, prompt: Prompt) -> None:
        record = dataclasses.replace(prompt.record, body={}, entry={})  # its messages are in the prompt
        prompt = dataclasses.replace(prompt, record=record, encoding=None)
        try:
            self.store.seek(0, 2)
            self.places.append(self.store.tell())
            pickle.dump(dataclasses.replace(prompt, ids=array("i", prompt.ids)), self.store, pickle.HIGHEST_PROTOCOL)
            self.store.flush()
        except OSError as error:
            folder = tempfile.gettempdir()
            raise LessonError(
                f"cannot keep the prompts in {folder}: {error.strerror} (TMPDIR names another)"
            ) from error
        self.recent[len(self.places) - 1] = prompt
        if len(self.recent) > REQUESTS_KEPT:
            self.recent.popitem(last=False)

    def signs(self, prompt: Prompt, session: str | None, said: int) -> list[int]:
        """Return what tells a conversation when its beginning has changed, the surest first.

        That is a session's name, an agent's conversation, what the user said (that many messages of the user's from
        the end), an agent, and a conversation.
        """
        users = [key(message) for message in prompt.messages if message["role"] == "user"]
        agent = plain(prompt.messages[0].get("content"))[-200:] if prompt.messages else ""
        last = users[-said] if len(users) >= said else (prompt.record.line, said)  # else it is nobody's
        names = (
            ("session", session or prompt.record.line),
            (agent, *users[:1]),
            ("said", last),
            (agent,),
            (None, *users[:1]),
        )
        return [hash((prompt.salt, *name)) for name in names]

    def best_predecessor(self, prompt: Prompt, blocks: list[int], known: int, session: str | None) -> int | None:
        """Return the number of the latest request that shares most; among equals one of the same conversation."""
        openings = [self.openings.get(sign) for sign in self.signs(prompt, session, said=2)]
        candidates = {self.owners[blocks[known - 1]]} if known else {*self.salts.get(prompt.salt, ())}
        candidates |= {number for number in openings if number is not None}

        def closeness(number: int) -> tuple:
            at = shared(self.recall(number).ids, prompt.ids)
            return at // self.block_size, *(number == other for other in openings), at, number

        return max(candidates, key=closeness, default=None)

    def add(self, prompt: Prompt, session: str | None = None) -> tuple[Row, list[int]]:
        """Return what is to be said of the next request of the log, and its blocks; remember it."""
        blocks = list(self.chain(prompt.ids, prompt.salt))
        known = self.known(blocks, len(prompt.ids))
        best = self.best_predecessor(prompt, blocks, known, session)
        row = self.compare(prompt, known * self.block_size, best, session)
        if not prompt.is_read:
            row = dataclasses.replace(row, predicted_cached_tokens=0, kind=UNREAD, lost_tokens=0, answer_tokens=0)
        self.salts.setdefault(prompt.salt, deque(maxlen=HEADS_COMPARED)).append(len(self.lines))
        self.openings.update(dict.fromkeys(self.signs(prompt, session, said=1), len(self.lines)))
        self.keep(prompt)
        self.remember(row, blocks)
        return row, blocks

    def add_trace(self, record: Record, session: str | None = None) -> tuple[Row, list[int]]:
        """Do the same for a request of which only the hashes of its blocks are known. What broke is not."""
        tokens, ids = record.body["input_length"], record.body["hash_ids"]
        blocks = list(itertools.accumulate(ids, lambda parent, block: hash((parent, block)), initial=0))[1:]
        blocks = blocks[: tokens // self.block_size]
        known = self.known(blocks, tokens)
        before = self.owners[blocks[known - 1]] if known else None
        kind = "another prompt" if self.lines else "first request"
        alone, family, line = f"line {record.line}", record.line, None
        if before is not None:
            whole = known >= min(self.lengths[before], (tokens - 1) // self.block_size)
            kind = "extended" if whole else "departs"
            family, line = self.families[before], self.lines[before]
            alone = self.sessions[before] if whole else alone
        row = Row(record.line, tokens, known * self.block_size, line, kind, "", known * self.block_size, "", "", 0,
                  session=session or alone, family=family)  # fmt: skip
        self.remember(row, blocks)
        return row, blocks

    def known(self, blocks: list[int], tokens: int) -> int:
        """Return how many leading blocks an earlier request had; the last token is always computed."""
        usable = (tokens - 1) // self.block_size
        return sum(1 for _ in itertools.takewhile(self.owners.__contains__, blocks[:usable]))

    def remember(self, row: Row, blocks: list[int]) -> None:
        number = len(self.lines)
        for block in reversed(blocks):  # so that the last block of a prompt is the first to be forgotten, as in vLLM
            self.owners.pop(block, None)
            self.owners[block] = number
        for block in list(itertools.islice(self.owners, max(0, len(self.owners) - BLOCKS_KNOWN))):
            del self.owners[block]
            self.forgotten += 1
        self.lines.append(row.line), self.families.append(row.family), self.sessions.append(row.session)
        self.lengths.append(len(blocks))

    def compare(self, prompt: Prompt, cached: int, number: int | None, session: str | None) -> Row:
        ids, line = prompt.ids, prompt.record.line
        found = cached - self.block_size if cached and self.drops_last_block else cached
        alone = dict(session=session or f"line {line}", family=line)
        if number is None:
            kind = "another model or cache_salt" if self.salts else "first request"
            return Row(line, len(ids), found, None, kind, "", 0, "", "", 0, **alone)
        before = self.recall(number)
        family, departs = self.families[number], describe(before, prompt, self.renderer)
        lost, is_other, answer = 0, False, 0
        written_ids, said_again = [], 0  # tokens: the answer to `before`; what the next prompt says again of it
        if departs.kind == "extended" or (departs.kind == DROPPED and departs.message == len(before.messages)):
            dropped, written_ids, said_again = self.answered(before, prompt)
            departs = dropped or departs
        held = [*before.ids, *written_ids]  # the last token that was written has no KV
        at = shared(held, ids)
        if written_ids:
            answer = max(0, self.whole_blocks(min(at, len(held) - 1, len(ids) - 1)) - cached)
        if departs.kind not in NO_BREAK and before.messages and prompt.messages:
            kept = behind(departs, before, prompt, self.renderer)
            is_other = kept.is_other
            same = shared(before.ids, ids) + tokens_in(prompt, kept.same, self.renderer) + said_again
            lost = 0 if is_other else max(0, self.whole_blocks(min(same, len(ids) - 1)) - cached - answer)
            if lost and kept.moved:
                texts = self.moved.setdefault((family, departs.where.partition(" field")[0]), {})
                if len(texts) < TEXTS_MOVED:
                    texts.update(dict.fromkeys(kept.moved))
        kind = departs.kind
        if not lost and kind == "user message changed" and not self.goes_on(before, prompt):
            kind = "another conversation"
        if is_other or (not lost and not cached and departs.message in (0, -1)):
            kind, family = "another prompt", line
        around = [self.renderer.tokenizer.decode(tokens[max(0, at - 8) : at + 8]) for tokens in (held, ids)]
        if session is None:
            session = self.sessions[number] if self.goes_on(before, prompt) else alone["session"]
        return Row(line, len(ids), found, self.lines[number], kind, departs.where, at, *around, lost,
                   answer, session, family)  # fmt: skip

    def whole_blocks(self, tokens: int) -> int:
        return tokens // self.block_size * self.block_size

    def goes_on(self, before: Prompt, prompt: Prompt) -> bool:
        """Say whether a request is a later turn of the same conversation: what the user said last is said again."""
        if not prompt.messages or not before.messages:
            return prompt.ids[: len(before.ids)] == before.ids
        users = [[key(message) for message in p.messages if message["role"] == "user"] for p in (before, prompt)]
        if not users[0] or not users[1]:
            return prompt.ids[: len(before.ids)] == before.ids
        if users[0][-1] in users[1]:
            return True
        last = len(before.messages) - 1
        if len(prompt.messages) <= last + 1:
            return False
        # A clock behind the last question goes when the next one comes.
        said, says = (plain(p.messages[last].get("content")) for p in (before, prompt))
        is_same = 2 * shared(said, says) >= min(len(said), len(says)) > 0
        return users[0][0] == users[1][0] or is_same

    def answered(self, before: Prompt, prompt: Prompt) -> tuple[Break | None, list[int], int]:
        """Say how the answer to `before`, which the engine wrote, stands in the next prompt.

        Return the break, if it stands there otherwise; the tokens that the engine wrote; and how many of the tokens
        that it holds so far the two have in common, but for where. The answer is the logged one, with its reasoning;
        where only the next request has it, the template says how it looked when it was the last message.
        """
        n = len(before.messages)
        if not self.renderer.has_template or len(prompt.messages) <= n or prompt.messages[n]["role"] != "assistant":
            return None, [], 0
        sent = answer = prompt.messages[n]
        if before.record.answer:
            with contextlib.suppress(CannotRender):  # a log may hold something else there
                answer = self.renderer.parsed(before.record.answer)
        as_sent, as_written = self.continuation(before, sent), self.continuation(before, answer)
        if as_written is None:
            return None, [], 0
        tokens = self.tokens_behind(before.text, as_written)
        if prompt.text.startswith(before.text + as_written):
            return None, tokens, 0
        client = as_sent is not None and prompt.text.startswith(before.text + as_sent)
        old, new = (units(plain(message.get("content"))) for message in (answer, sent))
        both = "".join(unit for _, y, size in equal_parts(old, new) for unit in new[y : y + size])
        found = Break(OTHERWISE if client else DROPPED, f"message {n} (assistant)", n)
        return found, tokens, len(self.renderer.tokens(both))

    def tokens_behind(self, text: str, more: str) -> list[int]:
        """Return the tokens of what is written behind a text; some tokenizers begin a text with one of their own."""
        context = text[-64:]
        ahead, both = self.renderer.tokens(context), self.renderer.tokens(context + more)
        return both[shared(ahead, both) :]

    def continuation(self, before: Prompt, answer: dict) -> str | None:
        """Return what stands behind a prompt once it is answered; None where the template writes all of it anew."""
        try:
            text = self.renderer.write(before, [*before.messages, answer], answer=False)
        except CannotRender:
            return None
        return text.removeprefix(before.text).rstrip() if text.startswith(before.text) else None
