"""Replies of sessions as the tests of what they mean need them: with these tokens, however they came about."""

from __future__ import annotations

from going_further.http_sessions import Reply

# Cached tokens by turn of the session of `rows`: found on its server, on other ones, nowhere, and never reported.
KEPT, MOVED, NOTHING, SILENT = [0, 992, 1488, 1984], [0, 0, 992, 0], [0, 0, 0, 0], [None] * 4


def row(arm: str, session: int, turn: int, prompt: int | None, cached: int | None, error: str | None = None) -> Reply:
    return Reply(
        experiment="main",
        arm=arm,
        request=turn,
        session=f"{session:03}-10482",
        prompt_tokens=prompt,
        cached_tokens=cached,
        ttft_ms=None if error else 50.0,
        error=error,
    )


def rows(bad: list[int | None], good: list[int | None]) -> list[Reply]:
    """Return one session per arm that grows by 500 tokens a turn, with these cached tokens."""
    arms = {"bad": bad, "good": good}
    return [row(arm, 0, n, 1000 + 500 * n, cached) for arm, found in arms.items() for n, cached in enumerate(found)]
