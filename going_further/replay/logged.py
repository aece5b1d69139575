"""What the server said against what was predicted: is it the prompt, the template, eviction, or another replica?"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import NamedTuple

from going_further.replay.caches import Arrival, PrefixCache
from going_further.replay.comparing import DROPPED, REWRITTEN, Row

TEMPLATE_KINDS = DROPPED, REWRITTEN
# Why tokens were computed, in the order in which they are shown.
NEW, LAYOUT, TEMPLATE = "new text", "the prompt's layout broke the prefix", "the template wrote it anew"
EVICTED, REPLICA = "evicted, or too old", "another replica, or a restart"
NEVER, COUNTED_OTHERWISE = "nothing is ever found by this server", "the server counts other prompt tokens"
REASONS = NEW, LAYOUT, TEMPLATE, EVICTED, REPLICA, NEVER, COUNTED_OTHERWISE


@dataclasses.dataclass
class Logged:
    """What the server found of the requests that say so, and why it computed the rest; tokens, and requests."""

    requests: int = 0
    unreported: int = 0  # requests without a number of cached tokens
    sent_tokens: int = 0
    found_tokens: int = 0
    predicted_tokens: int = 0
    block_size: int | None = None  # what the server's seems to be, where that is larger than the one here
    surplus_tokens: int = 0  # found beyond the prediction: known from before the log
    computed: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(REASONS, 0))  # tokens
    affected: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(REASONS, 0))  # requests
    ages: dict[str, list[float]] = dataclasses.field(default_factory=lambda: {"found": [], EVICTED: [], REPLICA: []})

    def add(self, reason: str, tokens: int) -> int:
        """Count tokens that were computed, and return them."""
        if tokens > 0:
            self.computed[reason] += tokens
            self.affected[reason] += 1
        return tokens

    def median_age(self, reason: str) -> float | None:
        """Return the seconds since the last use, where the log has times."""
        ages = self.ages[reason]
        return statistics.median(ages) if ages else None


class Use(NamedTuple):
    """How long the last use of a block was ago: in blocks that were computed since, and in seconds; None: unknown."""

    blocks: int | None
    seconds: float | None


def uses_of(rows: list[Row], arrivals: list[Arrival], block_size: int) -> list[tuple[Use, Use]]:
    """Return per request the last uses of the last block that the server found, and of the first that it missed."""
    cache, last_seen, found = PrefixCache(block_size), {}, []
    for row, arrival in zip(rows, arrivals, strict=True):
        hit = (row.logged_cached_tokens or 0) // block_size
        uses = []
        for n in (hit - 1, hit):
            block = arrival.chain[n] if 0 <= n < len(arrival.chain) else None
            before = last_seen.get(block)
            seconds = arrival.time - before if arrival.time is not None and before is not None else None
            uses.append(Use(cache.age(block), seconds))
        found.append(tuple(uses))
        cache.request(arrival.chain, arrival.tokens)
        last_seen.update(dict.fromkeys(arrival.chain, arrival.time))
    return found


def explain(rows: list[Row], arrivals: list[Arrival], block_size: int) -> Logged | None:
    """Sort what the server computed by its reason; None where no request says what the server found.

    One cache finds what was used lately. So what it misses must be older than all that it found, in blocks computed
    since or in seconds; else it is another cache, or a new one.
    """
    reporting = [row for row in rows if row.logged_cached_tokens is not None]
    if not reporting:
        return None
    logged, uses = Logged(unreported=len(rows) - len(reporting)), uses_of(rows, arrivals, block_size)
    counts = {row.logged_cached_tokens for row in reporting} - {0}
    of_server = math.gcd(*counts) if len(counts) >= 3 else 0
    of_server &= -of_server  # the largest power of two in all of them
    if of_server > block_size:
        logged.block_size = of_server
    unit = logged.block_size or block_size
    hits = [found for row, (found, _) in zip(rows, uses, strict=True) if row.logged_cached_tokens]
    most_blocks = max((use.blocks for use in hits if use.blocks is not None), default=0)
    most_seconds = max((use.seconds for use in hits if use.seconds is not None), default=None)
    for row, (found, missed) in zip(rows, uses, strict=True):
        if row.logged_cached_tokens is None:
            continue
        sent = row.logged_prompt_tokens if row.logged_prompt_tokens is not None else row.prompt_tokens
        rest = sent - row.logged_cached_tokens
        logged.requests += 1
        logged.sent_tokens += sent
        logged.found_tokens += row.logged_cached_tokens
        logged.predicted_tokens += row.predicted_cached_tokens
        if abs(sent - row.prompt_tokens) > max(block_size, sent // 50):
            logged.add(COUNTED_OTHERWISE, rest)
            continue
        if found.seconds is not None and row.logged_cached_tokens:
            logged.ages["found"].append(found.seconds)
        missing = row.predicted_cached_tokens - row.logged_cached_tokens
        if missing >= unit:  # within a block, which may be larger there
            older = missed.blocks is None or missed.blocks > most_blocks
            older = older or (None not in (missed.seconds, most_seconds) and missed.seconds > most_seconds)
            reason = NEVER if not hits else EVICTED if older else REPLICA
            rest -= logged.add(reason, missing)
            if missed.seconds is not None and reason in logged.ages:
                logged.ages[reason].append(missed.seconds)
        surplus = max(0, -missing)
        logged.surplus_tokens += max(0, surplus - row.answer_tokens - block_size)
        rest -= logged.add(EVICTED, min(rest, max(0, row.evicted_tokens - surplus)))
        layout = TEMPLATE if row.kind in TEMPLATE_KINDS else LAYOUT
        rest -= logged.add(layout, min(rest, max(0, row.lost_tokens - surplus)))
        logged.add(NEW, rest)
    return logged
