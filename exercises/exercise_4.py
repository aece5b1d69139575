"""Exercise 4: which worker gets a session's next request (lesson 4).

Every worker has a cache of its own, so a session should come back to the worker that knows it. This router looks for
the least work only. Rewrite `route` so that

  - each worker has about the same share of the sessions, and a session comes back to its worker while that has room
  - routers that share nothing agree, in whatever order they list the workers
  - where one of N workers is lost, its own sessions move and no others: about 1/N of all
  - a hot session overruns nobody: a worker that has `most(workers)` requests gets no further one

The rules are tried with 8 workers and 5,000 sessions, without the engine, which measures the hit rate afterwards.

    python run_all_examples.py --exercise 4
"""

from __future__ import annotations

import math


def most(workers: dict[str, int]) -> int:
    """Return how many requests one worker may have when the next one is routed: 1.25 times its share, rounded up."""
    return math.ceil(1.25 * (sum(workers.values()) + 1) / len(workers))


def route(session: str, workers: dict[str, int]) -> str:
    """Return the name of one of the workers; `workers` says how many requests each of them has had."""
    return min(workers, key=lambda name: workers[name])
