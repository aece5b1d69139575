"""Exercise 3: two boundaries, one behind what all share and one behind what a tenant shares (lesson 3).

One agent serves many tenants. Before any user comes, the cache is primed twice: with what all prompts have in common,
and with what all prompts of one tenant have in common. Two markers say where these parts end. Rewrite `messages`: the
first boundary as late as all tenants allow, the second one as late as all users of a tenant allow.

The prompt must still hold every line of the shared text and of the tenant's policies once, and the tenant's name, the
user and the question word for word. The markers are taken out before anything is sent.

    python run_all_examples.py --exercise 3
"""

from __future__ import annotations

MARKER = "// __CACHE_END__"


def messages(shared: str, tenant: dict, request: dict) -> list[dict]:
    """Return the messages of one request, with two markers in them.

    A tenant has a "name" and "policies", a request a "user" and a "question".
    """
    system = f"You answer for {tenant['name']}. The user is {request['user']}.\n\n"
    system += f"{shared}\n{MARKER}\n"
    system += f"{tenant['policies']}\n{MARKER}\n"
    return [{"role": "system", "content": system}, {"role": "user", "content": request["question"]}]
