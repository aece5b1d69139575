"""What the hit rate would be if what stands too early stood behind the static part: replayed, not guessed."""

from __future__ import annotations

import dataclasses
import functools

from going_further.common import CacheModel
from going_further.replay.comparing import DROPPED, OTHERWISE, REWRITTEN, Comparer, Moved, Row, gap, shared, units
from going_further.replay.rendering import Prompt, Renderer, plain

HINTS = (  # what the place or the kind of a break holds, and what helps
    ("order of keys", "write JSON with its keys in one order, as with sort_keys"),
    ("tools", "keep the tools, their order and their texts the same for the whole session"),
    ("tool_calls", "send tool calls back as they were written"),
    ("message removed", "keep what was sent before, and append; compact less often"),
    ("message inserted", "append messages; what stands between others breaks all behind it"),
    (OTHERWISE, "send answers back as they were written, with their reasoning"),
    (DROPPED, "use another template, or its options (chat_template_kwargs)"),
    (REWRITTEN, "use another template, or its options (chat_template_kwargs)"),
    ("template variables", "keep chat_template_kwargs the same for the whole session"),
)
PLACES_REPLAYED = 5  # those that lose most
REQUESTS_REPLAYED = 2_000  # of a family, the first ones


@dataclasses.dataclass(frozen=True)
class Advice:
    """One place in prompts: what it costs, what stands there too early, and what moving that would give."""

    where: str
    families: int  # of prompts, that lose something there
    requests: int  # that lose something there
    lost_tokens: int
    texts: list[str]  # that change, in the order in which they were seen
    replayed: int  # requests
    hit_rate: float  # of those, as they are
    moved_hit_rate: float | None  # of those, with the texts at the end of each prompt; None: nothing can be moved
    hint: str = ""  # what else helps


def moved_behind(prompt: Prompt, moved: dict[Moved, None], renderer: Renderer, tokens) -> list[int]:
    """Return the token ids of a prompt with the texts in `moved` at its end; `tokens` makes them, piece by piece."""
    early, late, end = [], "", 0
    touched = {text.index for text in moved}
    parts = []  # index and text of each gap and each content, in their order
    for n, span in enumerate(renderer.spans(prompt)):
        parts += [(gap(n), prompt.text[end : span.start]), (n, prompt.text[slice(*span)])]
        end = span.end
    for index, content in parts:
        is_whole = index >= 0 and Moved(None, plain(prompt.messages[index].get("content"))) in moved
        if not is_whole and index not in touched:
            early.append(content)
            continue
        stays = ""
        for unit in [content] if is_whole else units(content):
            if is_whole or Moved(index, unit) in moved:
                late += unit
            else:
                stays += unit
        early.append(stays)
    pieces = [*early, late, prompt.text[end:]]
    return [token for piece in pieces if piece for token in tokens(piece)]


def advise(comparer: Comparer, rows: list[Row]) -> list[Advice]:
    """Return advice for the places that lose most; a trace of hashes loses nothing that could be named."""
    lost: dict[str, list[Row]] = {}
    for row in rows:
        if row.lost_tokens:
            lost.setdefault(row.where.partition(" field")[0], []).append(row)
    places = sorted(lost, key=lambda where: -sum(row.lost_tokens for row in lost[where]))[:PLACES_REPLAYED]
    if comparer.renderer is None or not places:
        return []
    tokens = functools.lru_cache(maxsize=500)(comparer.renderer.tokens)
    return [advice_for(where, lost[where], comparer, rows, tokens) for where in places]


def advice_for(where: str, losing: list[Row], comparer: Comparer, rows: list[Row], tokens) -> Advice:
    """Replay the requests of all families that lose something in a place, as they are and with the texts moved."""
    moved = {row.family: comparer.moved.get((row.family, where), {}) for row in losing}
    numbers = [n for n, row in enumerate(rows) if row.family in moved][:REQUESTS_REPLAYED]
    caches = CacheModel(comparer.block_size), CacheModel(comparer.block_size)
    sent, hits = [0, 0], [0, 0]
    for number in numbers:
        prompt = comparer.recall(number)
        late = (
            moved_behind(prompt, moved[rows[number].family], comparer.renderer, tokens) if any(moved.values()) else []
        )
        for n, ids in enumerate((prompt.ids, late)):
            hits[n] += caches[n].cached_tokens(ids, prompt.salt)
            sent[n] += len(ids)
            caches[n].store(ids, prompt.salt)
    rates = [hit / most if most else None for hit, most in zip(hits, sent, strict=True)]
    texts = [text.text.strip() for of_family in moved.values() for text in of_family]
    about = f"{losing[0].kind} {losing[0].where}"
    hint = next((text for sign, text in HINTS if sign in about), "")
    total = sum(row.lost_tokens for row in losing)
    told = telling([text for text in texts if text])[:4]
    return Advice(where, len(moved), len(losing), total, told, len(numbers), *rates, hint)


def telling(texts: list[str]) -> list[str]:
    """Return texts from a little before where they differ; those of letters and digits first."""
    same = shared(min(texts), max(texts)) if len(texts) > 1 else 0
    cut = [text[max(0, same - 12) :] if len(text) > 28 else text for text in texts]
    return sorted(cut, key=lambda text: sum(map(str.isalnum, text)) < 3)
