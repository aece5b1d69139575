"""What the hit rate would be if what stands too early stood behind the static part: replayed, not guessed."""

from __future__ import annotations

import dataclasses
import functools

from going_further.common import CacheModel
from going_further.replay.comparing import Comparer, Moved, Row, gap, units
from going_further.replay.rendering import Prompt, Renderer, plain

PLACES_REPLAYED = 5  # those that lose most
REQUESTS_REPLAYED = 2_000  # of a family, the first ones


@dataclasses.dataclass(frozen=True)
class Advice:
    """One place of a family's prompts: what it costs, what stands there too early, and what moving that would give."""

    family: int  # line of its first request
    where: str
    requests: int  # that lose something there
    lost_tokens: int
    texts: list[str]  # that change, in the order in which they were seen
    replayed: int  # requests
    hit_rate: float  # of those, as they are
    moved_hit_rate: float  # of those, with the texts at the end of each prompt


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
    """Return advice for the places that lose most."""
    lost: dict[tuple[int, str], list[int]] = {}
    for row in rows:
        if row.lost_tokens:
            lost.setdefault((row.family, row.where.partition(" field")[0]), []).append(row.lost_tokens)
    places = sorted((place for place in lost if place in comparer.moved), key=lambda place: -sum(lost[place]))
    tokens = functools.lru_cache(maxsize=2_000)(comparer.renderer.tokens)
    found = []
    for family, where in places[:PLACES_REPLAYED]:
        moved = comparer.moved[family, where]
        numbers = [n for n, row in enumerate(rows) if row.family == family][:REQUESTS_REPLAYED]
        caches = CacheModel(comparer.block_size), CacheModel(comparer.block_size)
        sent, hits = [0, 0], [0, 0]
        for number in numbers:
            prompt = comparer.recall(number)
            for n, ids in enumerate((prompt.ids, moved_behind(prompt, moved, comparer.renderer, tokens))):
                hits[n] += caches[n].cached_tokens(ids, prompt.salt)
                sent[n] += len(ids)
                caches[n].store(ids, prompt.salt)
        texts = [text.text.strip() for text in moved if text.text.strip()]
        rates = [hit / most if most else 0.0 for hit, most in zip(hits, sent, strict=True)]
        found.append(Advice(family, where, len(lost[family, where]), sum(lost[family, where]), texts[:4],
                            len(numbers), *rates))  # fmt: skip
    return found
