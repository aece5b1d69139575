"""What a reader makes of one entry of a log, whatever its shape was. Nothing is rendered here."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Usage:
    """What the server said of a request, in tokens; None where it did not say it."""

    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """One request of a log.

    `body` is what the client sent, for the API that `api` names: "chat", "messages" (Anthropic), "responses",
    "completions"; or "tokens", a body with `prompt_token_ids`; or "blocks", a body with `hash_ids`, `block_size` and
    `input_length`, which is a trace without texts.
    """

    line: int  # of the file, where the entry begins, from 1
    api: str
    body: dict
    entry: dict  # all of it, in which --session-field and --group-by look for their values
    usage: Usage | None = None
    answer: dict | None = None  # the message that the model wrote, as in OpenAI's chat responses
    time: float | None = None  # seconds, since any moment


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """An entry that cannot be replayed, and why."""

    line: int
    reason: str


def count(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"
