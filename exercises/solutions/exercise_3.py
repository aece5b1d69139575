"""A solution to exercise 3: from the general to the particular, with a boundary behind each step.

Measured (built-in model, blocks of 128): hit rate 74.8 %, 3,357 of 13,341 tokens computed.
"""

from __future__ import annotations

MARKER = "// __CACHE_END__"


def messages(shared: str, tenant: dict, request: dict) -> list[dict]:
    """Return the messages of one request, with two markers in them.

    A tenant has a "name" and "policies", a request a "user" and a "question".
    """
    system = f"{shared}\n{MARKER}\nYou answer for {tenant['name']}.\n{tenant['policies']}\n{MARKER}"
    user = f"The user is {request['user']}.\n{request['question']}"
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
