"""Exercise 5: what broke the cache? A log to be diagnosed with the replayer.

exercises/agent_log.jsonl holds the requests of one conversation. Most of them extend the one before; three do not, and
pay for it. Replay the log and name the three:

    python -m going_further.replay_request_log exercises/agent_log.jsonl --without-engine

For each break give the line of the log, the kind of break and the place, as the replayer writes them. If it says

      12   1,893       640  user message changed, line 11
           message 3 (user), token 652: 1,104 tokens lost

then the entry is (12, "user message changed", "message 3 (user)").

    python run_all_examples.py --exercise 5
"""

from __future__ import annotations


def breaks() -> list[tuple[int, str, str]]:
    """Return the three breaks, each as line, kind and place."""
    return []
