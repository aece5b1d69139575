"""Exercise 1: a date, a user and a request id in three places (lesson 1).

The agent of a web shop sends its rules, policies and tools with every request. They never change, and yet hardly a
token of them is found in the cache. Rewrite `messages` so that all of them are.

The prompt must still say the same: every line of the three texts once, and the date, the user, the request id and the
question word for word, in every request. Where each of them stands is yours to decide.

    python run_all_examples.py --exercise 1
"""

from __future__ import annotations


def messages(rules: str, policies: str, tools: str, request: dict) -> list[dict]:
    """Return the messages of one request; it has a "date", a "user", an "id" and a "question"."""
    system = f"Current time: {request['date']}\n\n"
    system += f"# Rules\n{rules}\nYou talk to {request['user']}.\n\n"
    system += f"# Policies\n{policies}\nRequest id: {request['id']}\n\n"
    system += f"# Tools\n{tools}"
    return [{"role": "system", "content": system}, {"role": "user", "content": request["question"]}]
