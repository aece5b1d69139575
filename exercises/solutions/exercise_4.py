"""A solution to exercise 4: rendezvous hashing with a bound; of the workers with room, the best one for the session.

Measured (built-in model, blocks of 128): hit rate 75.5 %, 18,105 of 73,785 tokens computed.
"""

from __future__ import annotations

import hashlib
import math


def most(workers: dict[str, int]) -> int:
    """Return how many requests one worker may have when the next one is routed: 1.25 times its share, rounded up."""
    return math.ceil(1.25 * (sum(workers.values()) + 1) / len(workers))


def route(session: str, workers: dict[str, int]) -> str:
    """Return the name of one of the workers; `workers` says how many requests each of them has had."""
    with_room = [name for name in workers if workers[name] < most(workers)]
    return max(with_room, key=lambda name: hashlib.sha256(f"{session}/{name}".encode()).digest())
