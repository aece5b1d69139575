"""What the server said against what was predicted: is it the prompt, the template, eviction, or another replica?"""

from __future__ import annotations

import dataclasses
import statistics

from going_further.replay.caches import Arrival, PrefixCache
from going_further.replay.comparing import DROPPED, REWRITTEN, Row

TEMPLATE_KINDS = DROPPED, REWRITTEN
# Why tokens were computed, in the order in which they are shown.
NEW, LAYOUT, TEMPLATE = "new text", "the prompt's layout broke the prefix", "the template wrote it anew"
EVICTED, REPLICA = "evicted, or too old", "another replica, or a restart"
NEVER, OTHERWISE = "nothing is ever found by this server", "the server counts other prompt tokens"
REASONS = NEW, LAYOUT, TEMPLATE, EVICTED, REPLICA, NEVER, OTHERWISE


@dataclasses.dataclass
class Logged:
    """What the server found of the requests that say so, and why it computed the rest; tokens, and requests."""

    requests: int = 0
    unreported: int = 0  # requests without a number of cached tokens
    sent_tokens: int = 0
    found_tokens: int = 0
    predicted_tokens: int = 0
    surplus_tokens: int = 0  # found beyond the prediction: known from before the log
    computed: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(REASONS, 0))  # tokens
    affected: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(REASONS, 0))  # requests
    ages: dict[str, list[float]] = dataclasses.field(default_factory=lambda: {"found": [], EVICTED: [], REPLICA: []})

    def add(self, reason: str, tokens: int) -> None:
        if tokens > 0:
            self.computed[reason] += tokens
            self.affected[reason] += 1

    def median_age(self, reason: str) -> float | None:
        """Return the seconds since the last use, where the log has times."""
        ages = self.ages[reason]
        return statistics.median(ages) if ages else None


def ages_of(rows: list[Row], arrivals: list[Arrival], block_size: int) -> list[tuple[int | None, int | None, float]]:
    """Return per request how many blocks were computed since the last use of the last block that the server found, and
    of the first that it missed; and the seconds since the latest use of the first block.

    In one cache that evicts the least recently used, everything found is younger than everything missed.
    """
    cache, last_seen, found = PrefixCache(block_size), {}, []
    for row, arrival in zip(rows, arrivals, strict=True):
        hit = (row.logged_cached_tokens or 0) // block_size
        ages = [cache.age(arrival.chain[n]) if 0 <= n < len(arrival.chain) else None for n in (hit - 1, hit)]
        place = arrival.chain[min(hit, len(arrival.chain) - 1)] if arrival.chain else None
        before = last_seen.get(place)
        seconds = arrival.time - before if arrival.time is not None and before is not None else -1.0
        found.append((ages[0], ages[1], seconds))
        cache.request(arrival.chain, arrival.tokens)
        last_seen.update(dict.fromkeys(arrival.chain, arrival.time))
    return found


def explain(rows: list[Row], arrivals: list[Arrival], block_size: int) -> Logged | None:
    """Sort what the server computed by its reason; None where no request says what the server found."""
    reporting = [row for row in rows if row.logged_cached_tokens is not None]
    if not reporting:
        return None
    logged, ages = Logged(unreported=len(rows) - len(reporting)), ages_of(rows, arrivals, block_size)
    ever = any(row.logged_cached_tokens for row in reporting)
    hits = [found for row, (found, _, _) in zip(rows, ages, strict=True) if row.logged_cached_tokens and found]
    holds = max(hits, default=0)  # so many blocks may be computed, and what was there before is still found
    for row, (_, missed, seconds) in zip(rows, ages, strict=True):
        if row.logged_cached_tokens is None:
            continue
        sent = row.logged_prompt_tokens if row.logged_prompt_tokens is not None else row.prompt_tokens
        logged.requests += 1
        logged.sent_tokens += sent
        logged.found_tokens += row.logged_cached_tokens
        logged.predicted_tokens += row.predicted_cached_tokens
        if abs(sent - row.prompt_tokens) > max(block_size, sent // 50):
            logged.add(OTHERWISE, sent - row.logged_cached_tokens)
            continue
        logged.add(TEMPLATE if row.kind in TEMPLATE_KINDS else LAYOUT, row.lost_tokens)
        missing = row.predicted_cached_tokens - row.logged_cached_tokens
        if missing < block_size:  # within a block: the server's may have another size
            logged.surplus_tokens += max(0, -missing - row.answer_tokens - block_size)
            logged.add(NEW, sent - row.logged_cached_tokens - row.lost_tokens)
            if seconds >= 0 and row.logged_cached_tokens:
                logged.ages["found"].append(seconds)
            continue
        reason = NEVER if not ever else EVICTED if missed is None or missed > holds else REPLICA
        logged.add(reason, missing)
        logged.add(NEW, sent - row.predicted_cached_tokens - row.lost_tokens)
        if seconds >= 0 and reason in logged.ages:
            logged.ages[reason].append(seconds)
    return logged
