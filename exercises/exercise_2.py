"""Exercise 2: a memory that is rewritten with every turn (lesson 2).

The agent writes down what it learns. It keeps its memory in one block at the top, with the latest value of every key,
and so all that stands below is computed again in every turn. Rewrite `messages` so that what was sent stays as it was.

Whoever reads the prompt goes by one rule, and so does the check:

    a line "key = value" says what is known of a key; of several lines with one key the last one counts

The instructions must be there, every value of the memory by that rule, and the last three turns word for word. You may
compact: at one turn drop older turns and write the memory anew. That turn is new to the cache; one such turn is free.

    python run_all_examples.py --exercise 2
"""

from __future__ import annotations


def memory(turns: list[dict]) -> dict[str, str]:
    """Return what is known after these turns: the latest value of every key."""
    known = {}
    for turn in turns:
        known |= turn["learned"]
    return known


def messages(instructions: str, turns: list[dict]) -> list[dict]:
    """Return the messages of the last one of `turns`, oldest first.

    A turn has what the "user" says, what was "learned" just before (key -> value), and the "answer"; the last one has
    no answer yet.
    """
    block = "\n".join(f"{key} = {value}" for key, value in memory(turns).items())
    said = [{"role": "system", "content": f"# Memory\n{block}\n\n# Instructions\n{instructions}"}]
    for turn in turns:
        said.append({"role": "user", "content": turn["user"]})
        said.append({"role": "assistant", "content": turn["answer"]})
    return said[:-1]
